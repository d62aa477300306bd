"""Item ids -> item vectors, with one face for every kind of item tower.

A tower is asked for unique ids only and what it returns is gathered, so an item is encoded once a step however often
it occurs. n ids, I catalogue items, E width of the Item LLM, D width of the user model.
"""

import logging
from abc import ABC, abstractmethod

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hllm.config import Adaptor, CachedItemsConfig, FusedItemsConfig, IdItemsConfig, TargetSide, Transform
from hllm.dropout import Dropout
from hllm.errors import ConfigError
from hllm.items.store import ItemTable

log = logging.getLogger(__name__)


class ItemTower(nn.Module, ABC):
    """What the rest of the system knows of items."""

    num_items: int
    fingerprint: str
    "What the vectors are made from; a checkpoint is good for one fingerprint only."
    collective = False
    "Several processes must ask for the same ids at the same time, because they share the work."
    knows_cold = True
    "Its vector of an item that was not in training says something of that item."

    @abstractmethod
    def forward(self, ids: Tensor) -> Tensor:
        """(n,) unique item ids in 1..I -> (n, D)."""

    def all(self) -> Tensor:
        """(I, D) the whole catalogue; row r is item r + 1."""
        held = next(self.parameters(), None)  # a tower of vectors as stored has none
        device = next(self.buffers()).device if held is None else held.device
        vectors: Tensor = self(torch.arange(1, self.num_items + 1, device=device))
        return vectors

    def sides(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """(n, D) vectors as histories read them, and (n, D) as the head scores them: here the same."""
        vectors = self(ids)
        return vectors, vectors

    def catalogue(self) -> tuple[Tensor, Tensor]:
        """Both sides of the whole catalogue, (I, D) each."""
        vectors = self.all()
        return vectors, vectors


class IdItems(ItemTower):
    """A learned vector an item. It knows nothing of items that were not in training."""

    knows_cold = False

    def __init__(self, config: IdItemsConfig, num_items: int, dim: int) -> None:
        super().__init__()
        self.num_items, self.fingerprint = num_items, "id"
        width = config.dim or dim
        self.table = nn.Embedding(num_items + 1, width, padding_idx=0)
        nn.init.normal_(self.table.weight, std=0.02)
        self.dropout = Dropout(config.dropout)
        self.projector: nn.Module = nn.Identity()
        if width != dim:
            self.projector = nn.Linear(width, dim, bias=False)
            nn.init.normal_(self.projector.weight, std=0.02)

    def forward(self, ids: Tensor) -> Tensor:
        vectors: Tensor = self.projector(self.dropout(self.table(ids)))
        return vectors


class CachedItems(ItemTower):
    """Frozen Item LLM vectors, moved and scaled as fitted on the training catalogue, then a trained adaptor.

    The vectors come through ``attach`` and stay out of the checkpoint; what was fitted on them goes into it, so that
    a table with new items is mapped as the old one was.
    """

    vectors: Tensor
    mean: Tensor
    whitening: Tensor
    anchors: Tensor
    centre: Tensor
    components: Tensor

    def __init__(self, config: CachedItemsConfig, dim: int) -> None:
        super().__init__()
        self.config, self.dim = config, dim
        self.table: ItemTable | None = None
        self.statistics: dict[str, float] = {}
        "Mean cosine between items as embedded, and after the transform."
        self.register_load_state_dict_post_hook(lambda module, _: module._transform())  # type: ignore[no-untyped-call]

    def attach(self, table: ItemTable) -> None:
        """Take the vectors of a catalogue: (I, E). The first table fits the transform and sizes the adaptor.

        A later table, of the same catalogue with new items say, replaces the vectors only.
        """
        if table is self.table:
            return
        first = self.table is None
        self.table, self.num_items, self.fingerprint = table, len(table.ids), table.fingerprint
        if first:
            self._create(table.vectors.float())
        self._transform()
        log.info(
            "mean cosine between items: %(mean_cosine_raw).3f as embedded, %(mean_cosine).3f after the transform",
            self.statistics,
        )

    def _create(self, vectors: Tensor) -> None:
        width = vectors.shape[1]
        if self.config.adaptor is Adaptor.none:
            if width != self.dim:
                raise ConfigError(
                    f"items.adaptor=none: the vectors are {width} wide, the user model {self.dim}; choose linear or mlp"
                )
            self.adaptor: nn.Module = nn.Identity()
        elif self.config.adaptor is Adaptor.linear:
            self.adaptor = nn.Sequential(Dropout(self.config.dropout), nn.Linear(width, self.dim))
        else:
            hidden = self.config.hidden_dim
            self.adaptor = nn.Sequential(
                nn.Linear(width, hidden), nn.GELU(), Dropout(self.config.dropout), nn.Linear(hidden, self.dim)
            )
        mean, whitening = fit_transform(vectors, self.config.transform, self.config.whiten_epsilon)
        self.register_buffer("mean", mean)
        self.register_buffer("whitening", whitening)
        self.register_buffer("vectors", vectors, persistent=False)
        if self.config.neighbours:
            if self.config.neighbours > width:
                raise ConfigError(f"items.neighbours={self.config.neighbours}: the vectors are {width} wide")
            centre, components = fit_components(vectors, self.config.neighbours, self.config.whiten_epsilon)
            self.register_buffer("centre", centre)
            self.register_buffer("components", components)
            self.register_buffer("anchors", torch.empty(0), persistent=False)

    def _transform(self) -> None:
        """Map the raw vectors by the fitted mean and matrix; also after a checkpoint brought those."""
        assert self.table is not None, "no item vectors: attach a table before loading a checkpoint"
        raw = self.table.vectors.to(self.mean)
        # as they are to the last bit: a product with ones and zeros may round on some devices
        self.vectors = raw if self.config.transform is Transform.raw else (raw - self.mean) @ self.whitening
        if self.config.neighbours:
            self.anchors = F.normalize((raw - self.centre) @ self.components, dim=1)
        self.statistics = {"mean_cosine_raw": mean_cosine(raw), "mean_cosine": mean_cosine(self.vectors)}

    def forward(self, ids: Tensor) -> Tensor:
        """(n,) unique item ids -> (n, D), or (n, D + K) with the items' anchors behind, where there are neighbours."""
        vectors: Tensor = self.adaptor(self.vectors[ids - 1])
        return torch.cat([vectors, self.anchors[ids - 1]], dim=1) if self.config.neighbours else vectors


class FusedItems(CachedItems):
    """The adapted vector of an item's text plus a learned vector of its id (HLLM, arXiv 2409.12740, Table 12).

    In histories the two are summed. What a history is scored against is the sum as well, or, as in the paper, the
    text's vector alone. An item without an event in training, or one that was not in the training catalogue, has no
    id vector: its text speaks for it. ``id_dropout`` leaves id vectors out in training, an item's on both sides of a
    step, so that users and texts learn to do without.

    Args:
        train_counts: (I + 1,) events of each item in training.
    """

    known: Tensor

    def __init__(self, config: FusedItemsConfig, dim: int, train_counts: Tensor) -> None:
        super().__init__(config, dim)
        self.target, self.id_dropout = config.target, config.id_dropout
        self.id_table = nn.Embedding(len(train_counts), dim, padding_idx=0)
        nn.init.normal_(self.id_table.weight[1:], std=0.02)  # row 0 stays zero: it stands for no id vector
        self.register_buffer("known", train_counts > 0, persistent=False)

    def forward(self, ids: Tensor, both_sides: bool = False) -> Tensor:
        """(n,) unique item ids -> (n, D) as histories read them; (2, n, D) with what is scored where asked for."""
        text = super().forward(ids)
        rows = ids.where(ids < len(self.known), 0)  # new items stand behind the training catalogue
        kept = self.known[rows]
        if self.training and self.id_dropout > 0:
            kept = kept & (torch.rand(len(ids), device=ids.device) >= self.id_dropout)
        fused: Tensor = text + F.pad(self.id_table(rows.where(kept, 0)), (0, self.config.neighbours))
        if not both_sides:
            return fused
        return torch.stack([fused, text if self.target is TargetSide.text else fused])

    def sides(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        if self.target is TargetSide.sum:
            return super().sides(ids)
        fused, text = self(ids, both_sides=True)  # by way of the call, which gathers sharded weights
        return fused, text

    def catalogue(self) -> tuple[Tensor, Tensor]:
        return self.sides(torch.arange(1, self.num_items + 1, device=self.vectors.device))


def fit_transform(vectors: Tensor, kind: Transform, epsilon: float) -> tuple[Tensor, Tensor]:
    """Fit ``x -> (x - mean) @ matrix`` on a catalogue.

    raw: the vectors as they are.
    none: scaled to a mean square of 1 a dimension, so that the adaptor's input has one scale whatever the LLM.
    center: the mean taken off first. Vectors of an untuned LLM nearly all point one way; what tells items apart is
    what remains. whiten: the ZCA map to uncorrelated dimensions of equal variance.

    Args:
        vectors: (I, E) float32.
        epsilon: added to each variance of ``whiten``, as a share of the mean variance.

    Returns:
        (E,) mean and (E, E) matrix, float32.
    """
    x = vectors.double()
    width = x.shape[1]
    if kind is Transform.raw:
        return torch.zeros(width), torch.eye(width)
    mean = torch.zeros(width, dtype=x.dtype) if kind is Transform.none else x.mean(0)
    x = x - mean
    if kind is Transform.whiten:
        variances, directions = torch.linalg.eigh(x.T @ x / len(x))
        variances = variances.clamp(min=0) + epsilon * variances.mean()
        matrix = directions @ torch.diag(variances.clamp(min=1e-12).rsqrt()) @ directions.T
    else:
        matrix = torch.eye(width, dtype=x.dtype) / x.square().mean().sqrt().clamp(min=1e-12)
    return mean.float(), matrix.float()


def fit_components(vectors: Tensor, count: int, epsilon: float) -> tuple[Tensor, Tensor]:
    """(E,) mean of (I, E) float32 vectors and (E, K) their leading principal directions, each over its deviation.

    Args:
        count: K.
        epsilon: as of ``fit_transform``.
    """
    x = vectors.double()
    mean = x.mean(0)
    x = x - mean
    variances, directions = torch.linalg.eigh(x.T @ x / len(x))
    scales = (variances.clamp(min=0) + epsilon * variances.mean()).rsqrt()
    return mean.float(), (directions * scales)[:, -count:].float()


def mean_cosine(vectors: Tensor) -> float:
    """Mean cosine over all pairs of different rows: near 1, items hardly differ; (I, E) -> a number."""
    # in pieces: a training step's vectors in float64 may be more than a GPU has left
    summed = torch.stack([F.normalize(part.double(), dim=1).sum(0) for part in vectors.split(4096)]).sum(0)
    total, count = summed.square().sum(), len(vectors)
    return ((total - count) / max(count * (count - 1), 1)).item()
