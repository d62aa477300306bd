"""Fields embedded apart -> one vector an item (``dataset.text.fusion``).

Each field has a table of its own, so a field that changes is embedded again alone, and another way of joining them
embeds nothing. I items, F fields, D width of the Item LLM.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from hllm.config import Fusion, TextConfig
from hllm.errors import ConfigError
from hllm.items.store import ItemTable, fingerprint
from hllm.items.text import TextParts


def field_weights(names: Sequence[str], text: TextConfig) -> list[float]:
    """The weight of each field of the template: as ``text.weights`` has it, else 1.

    Raises:
        ConfigError: a weight's name is not a field of the template.
    """
    if unknown := sorted(set(text.weights) - set(names)):
        raise ConfigError(
            f"dataset.text.weights.{unknown[0]}: not a field of dataset.text.template; it has {', '.join(names)}"
        )
    return [text.weights.get(name, 1.0) for name in names]


def fuse(tables: Sequence[ItemTable], parts: TextParts, text: TextConfig) -> ItemTable:
    """Join the fields' tables; the fingerprint is made of theirs, the way of joining and the weights.

    Args:
        tables: one a field of the template, in order.
        parts: whose columns say which item lacks which field.

    Raises:
        ConfigError: as ``field_weights``.
    """
    weights = field_weights(parts.names, text)
    columns = [column for (_, name), column in zip(parts.segments, parts.columns, strict=True) if name]
    present = torch.from_numpy(np.stack([np.fromiter(map(bool, column), dtype=bool) for column in columns]))  # (F, I)
    vectors = fuse_vectors([table.vectors for table in tables], present, text.fusion, weights)
    identity = {"fusion": text.fusion.value, "fields": [table.fingerprint for table in tables], "weights": weights}
    return ItemTable(tables[0].ids, vectors, fingerprint(identity))


def fuse_vectors(fields: Sequence[Tensor], present: Tensor, fusion: Fusion, weights: Sequence[float]) -> Tensor:
    """Vectors of each field -> vectors of the items.

    concat: side by side, zeros where an item lacks the field. sum: the weighted mean over the fields that it has. An
    item without any field keeps what the Item LLM made of the empty text, in every field.

    Args:
        fields: F times (I, D).
        present: (F, I) bool.
        weights: F numbers above 0; only ``sum`` reads them.

    Returns:
        (I, F * D) or (I, D), in the fields' dtype.
    """
    present = present | ~present.any(dim=0)
    if fusion is Fusion.concat:
        return torch.cat([field * there[:, None] for field, there in zip(fields, present, strict=True)], dim=1)
    shares = present * torch.tensor(weights)[:, None]  # (F, I)
    shares = shares / shares.sum(dim=0)
    total = torch.zeros(fields[0].shape)  # float32: 16 bits would round at every field
    for field, share in zip(fields, shares, strict=True):
        total += field.float() * share[:, None]
    return total.to(fields[0].dtype)
