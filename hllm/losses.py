"""Losses over user vectors at supervised positions: a function each, with a small class around it for the config.

A loss says which items it scores (``candidates``), the module encodes each of them once, and the loss is computed on
the vectors. N supervised positions (padding is dropped before), M candidates, I catalogue items, D width.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from hllm.config import CELossConfig, NCELossConfig
from hllm.head import SimilarityHead


@dataclass(frozen=True)
class Candidates:
    """Items scored at every position of a step.

    Args:
        ids: (M,) unique item ids, ascending; every target is among them.
        negative: (M,) bool, true for items that are negatives of all positions but those they are the target of; the
            others are there as positives only.
    """

    ids: Tensor
    negative: Tensor


class Loss(nn.Module, ABC):
    """What the module asks of a loss."""

    @abstractmethod
    def candidates(self, targets: Tensor, num_items: int) -> Candidates:
        """Which items to score, for (N,) targets in 1..num_items."""

    @abstractmethod
    def forward(
        self, users: Tensor, items: Tensor, candidates: Candidates, targets: Tensor, head: SimilarityHead
    ) -> Tensor:
        """() mean loss over positions; users (N, D), items (M, D) the candidates' vectors, targets (N,) ids."""


def softmax_loss(users: Tensor, items: Tensor, labels: Tensor, head: SimilarityHead, chunk_size: int) -> Tensor:
    """Exact softmax cross entropy over all given items, in float32.

    Positions are scored ``chunk_size`` at a time, and a chunk's scores are computed again for its gradient, so that
    memory holds chunk_size x I scores whatever N is.

    Args:
        users: (N, D). items: (I, D). labels: (N,) rows of ``items``.
    """

    def total(users: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(head(users, items).float(), labels, reduction="sum")

    if len(users) <= chunk_size:
        return total(users, labels) / len(users)
    chunks = zip(users.split(chunk_size), labels.split(chunk_size), strict=True)
    totals = [checkpoint(total, *chunk, use_reentrant=False) for chunk in chunks]
    return torch.stack(totals).sum() / len(users)


def info_nce_loss(
    users: Tensor, items: Tensor, candidates: Candidates, targets: Tensor, head: SimilarityHead
) -> Tensor:
    """InfoNCE (HLLM, arXiv 2409.12740, eq. 1), in float32.

    Every position is scored against the same negatives; an item that is the position's target is its positive, once,
    and never a negative of itself. The official code masks by cosine > 0.99 instead, which loses all negatives when
    item vectors collapse.

    Args:
        users: (N, D). items: (M, D) vectors of ``candidates.ids``. targets: (N,) ids.
    """
    is_target = candidates.ids == targets[:, None]  # (N, M)
    scores = head(users, items).float().masked_fill(~(candidates.negative | is_target), float("-inf"))
    return F.cross_entropy(scores, torch.searchsorted(candidates.ids, targets))


class CrossEntropyLoss(Loss):
    """Exact softmax over the catalogue."""

    def __init__(self, config: CELossConfig) -> None:
        super().__init__()
        self.chunk_size = config.chunk_size

    def candidates(self, targets: Tensor, num_items: int) -> Candidates:
        ids = torch.arange(1, num_items + 1, device=targets.device)
        return Candidates(ids, torch.ones_like(ids, dtype=torch.bool))

    def forward(
        self, users: Tensor, items: Tensor, candidates: Candidates, targets: Tensor, head: SimilarityHead
    ) -> Tensor:
        return softmax_loss(users, items, targets - 1, head, self.chunk_size)


class NCELoss(Loss):
    """InfoNCE against in-batch and uniform negatives.

    Uniform negatives are drawn with replacement and an item is scored once however often it was drawn or occurs in
    the batch, so frequent items are no more often negatives than rare ones and no logQ correction is needed.
    """

    def __init__(self, config: NCELossConfig) -> None:
        super().__init__()
        self.num_negatives, self.in_batch = config.num_negatives, config.in_batch

    def candidates(self, targets: Tensor, num_items: int) -> Candidates:
        uniform = torch.randint(1, num_items + 1, (self.num_negatives,), device=targets.device)
        ids = torch.cat([targets, uniform]).unique()
        negative = torch.ones_like(ids, dtype=torch.bool) if self.in_batch else torch.isin(ids, uniform)
        return Candidates(ids, negative)

    def forward(
        self, users: Tensor, items: Tensor, candidates: Candidates, targets: Tensor, head: SimilarityHead
    ) -> Tensor:
        return info_nce_loss(users, items, candidates, targets, head)
