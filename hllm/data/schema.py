"""The three shapes that data ever takes: Interactions and Catalog on the way in, Batch on the way out.

Item id 0 is padding everywhere; real items are 1..I, in the order of the catalogue's rows.
"""

import copy
import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import Self, cast

import numpy as np
import numpy.typing as npt
import polars as pl
import torch
from torch import Tensor

Array32 = npt.NDArray[np.int32]
Array64 = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Interactions:
    """Every user's history, end to end, as CSR arrays sorted by (user, time, file order).

    Events of one user with equal timestamps keep the order of the raw file (stable sort), so that the held-out item
    does not depend on the machine.

    Args:
        items: (E,) int32 item ids in 1..I.
        timestamps: (E,) int64 seconds since 1970.
        offsets: (U + 1,) int64; user u's events are ``offsets[u]:offsets[u + 1]``.
        users: (U,) the users' original ids as text, unique.
    """

    items: Array32
    timestamps: Array64
    offsets: Array64
    users: pl.Series

    @property
    def num_users(self) -> int:
        return len(self.offsets) - 1

    def __len__(self) -> int:
        return len(self.items)

    @cached_property
    def fingerprint(self) -> str:
        """Hex digest of the events in order: two data sets with the same digest give the same splits."""
        digest = hashlib.sha256()
        for array in (self.items, self.timestamps, self.offsets):
            digest.update(np.ascontiguousarray(array).data)
        return digest.hexdigest()[:16]


@dataclass(frozen=True)
class Catalog:
    """One row an item; row r is item id r + 1.

    Args:
        ids: (I,) original item ids as text, unique; a sequence of strings becomes a Series.
        fields: text fields by name, each (I,) strings; an empty string is a missing value.
    """

    ids: pl.Series
    fields: Mapping[str, pl.Series]

    def __post_init__(self) -> None:
        object.__setattr__(self, "ids", _text(self.ids))
        object.__setattr__(self, "fields", {name: _text(values) for name, values in self.fields.items()})

    def __len__(self) -> int:
        return len(self.ids)

    @cached_property
    def fingerprint(self) -> str:
        """Number of items and hex digest of their original ids in order: what is ranked, and which item is which."""
        digest = hashlib.sha256()
        for part in self.ids.to_frame("id").iter_slices(1 << 16):
            digest.update("\0".join(part["id"]).encode() + b"\0")
        return f"{len(self)} items {digest.hexdigest()[:8]}"

    @cached_property
    def titles(self) -> list[str]:
        """What to show a person for each item: its title, else its name (in any case), or its id where it has none."""
        by_name = {name.casefold(): values for name, values in self.fields.items()}
        titles = by_name.get("title", by_name.get("name"))
        if titles is None:
            return cast(list[str], self.ids.to_list())
        return [title or item for title, item in zip(titles, self.ids, strict=True)]


def _text(values: pl.Series | Sequence[str]) -> pl.Series:
    return values if isinstance(values, pl.Series) else pl.Series(list(values), dtype=pl.String)


@dataclass  # not frozen: under bf16-true and DeepSpeed Lightning assigns to the fields of a copy
class Batch:
    """Histories as rows of one length: real events first, padding (id 0) behind them.

    Padding stands on the right so that a causal model cannot see it: no event attends to anything after itself.
    B rows, L = longest history of the batch, S (row, item) pairs, T events, N supervised ones.

    Args:
        users: (B,) int64 user numbers, for per-user output.
        items: (B, L) int64 history.
        timestamps: (B, L) int64 seconds; 0 at padding.
        targets: (B, L) int64 the item that followed each event; 0 where nothing is to be predicted.
        target_times: (B, L) int64 seconds, when what followed each event happened; 0 at padding.
        mask: (B, L) bool, true at real events.
        seen: (2, S) int64 pairs of batch row and item id to leave out of the ranking: the user's whole history, also
            the part older than L. Empty in training.
    """

    users: Tensor
    items: Tensor
    timestamps: Tensor
    targets: Tensor
    target_times: Tensor
    mask: Tensor
    seen: Tensor
    places: Tensor = field(init=False)
    supervised: Tensor = field(init=False)

    def __post_init__(self) -> None:
        # by numpy, as all else in a loader's worker: torch's kernels are not made to go on behind a fork
        places = np.flatnonzero(self.mask.cpu().numpy())
        supervised = np.flatnonzero(self.targets.cpu().numpy().ravel()[places])
        self.places, self.supervised = (torch.from_numpy(found).to(self.mask.device) for found in (places, supervised))

    def of_events(self, values: Tensor) -> Tensor:
        """(B, L) -> (T,) what stands at the events, row after row."""
        return values.flatten()[self.places]

    def __len__(self) -> int:
        return len(self.users)

    @property
    def history_lengths(self) -> Tensor:
        """(B,) int64 events before the target, in evaluation: also those older than L."""
        return torch.bincount(self.seen[0], minlength=len(self))

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Self:
        """A copy on a device; Lightning calls this."""
        return self._each(lambda values: values.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Self:
        return self._each(Tensor.pin_memory)

    def _each(self, move: Callable[[Tensor], Tensor]) -> Self:
        moved = copy.copy(self)
        for f in fields(self):
            setattr(moved, f.name, move(getattr(self, f.name)))
        return moved
