"""Losses over user vectors at supervised positions: a function each, with a small class around it for the config.

A loss says which items it scores (``candidates``), the module encodes each of them once, and the loss is computed on
the vectors. N supervised positions (padding is dropped before), M candidates, I catalogue items, D width.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from hllm.config import CELossConfig, NCELossConfig
from hllm.distributed import from_first
from hllm.head import SimilarityHead


@dataclass(frozen=True)
class Candidates:
    """Items scored at every position of a step.

    Args:
        ids: (M,) unique item ids, ascending; every target is among them.
        negative: (M,) bool, true for items that are negatives of all positions but those they are the target of; the
            others are there as positives only.
        counts: (M,) how often a negative counts; None counts each once.
    """

    ids: Tensor
    negative: Tensor
    counts: Tensor | None = None

    def offered(self) -> Tensor:
        """() negatives before any is masked."""
        return (self.negative if self.counts is None else self.negative * self.counts).sum()

    def log_weights(self) -> Tensor | None:
        """(M,) float32, what is added to a candidate's score where it is a negative; None where that is 0 for all."""
        if self.counts is None and self.negative.all():
            return None
        counts = self.negative if self.counts is None else self.negative * self.counts
        return counts.float().log()


class Loss(nn.Module, ABC):
    """What the module asks of a loss."""

    mask_history = False
    "No item of a training row is a negative of that row's positions."

    @abstractmethod
    def candidates(self, targets: Tensor, num_items: int) -> Candidates:
        """Which items to score, for the (N,) targets of all processes, in 1..num_items; the same in each of them."""

    @abstractmethod
    def forward(
        self,
        users: Tensor,
        items: Tensor,
        candidates: Candidates,
        targets: Tensor,
        head: SimilarityHead,
        excluded: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Mean loss over positions, and the mean number of negatives that a position was scored against, both ().

        Args:
            users: (N, D). items: (M, D) the candidates' vectors. targets: (N,) ids.
            excluded: (N, M) bool, candidates that are no negatives of a position.
        """


def softmax_loss(users: Tensor, items: Tensor, labels: Tensor, head: SimilarityHead, chunk_size: int) -> Tensor:
    """Exact softmax cross entropy over all given items, mean over positions, in float32; 0 for no position.

    Args:
        users: (N, D). items: (I, D). labels: (N,) rows of ``items``.
        chunk_size: positions scored at a time; bounds memory to chunk_size x I scores and does not change the loss.
    """
    return _softmax(users, items, labels, head, chunk_size)[0]


def default_chunk_size(num_items: int, device: torch.device) -> int:
    """Positions whose scores stay in a core's cache (2 MiB), or fill 1 GiB of a GPU; at least 64."""
    budget = 2**21 if device.type == "cpu" else 2**30
    return max(budget // (4 * max(num_items, 1)), 64)


Mask = Callable[[slice], Tensor]
"(C, M) bool for C of the positions: what is no item of the softmax there; a position's label always is."


def _softmax(
    users: Tensor,
    items: Tensor,
    labels: Tensor,
    head: SimilarityHead,
    chunk_size: int,
    log_weights: Tensor | None = None,
    mask: Mask | None = None,
) -> tuple[Tensor, Tensor]:
    """Mean cross entropy, and (M,) at how many positions an item was masked."""
    with torch.autocast(users.device.type, enabled=False):
        scale = head.scale().to(head.score_dtype)
        total, masked = _LinearCrossEntropy.apply(  # type: ignore[no-untyped-call]
            head.prepare(users.to(head.score_dtype)) * scale, head.table(items), labels, chunk_size, log_weights, mask
        )
    return (total / max(len(users), 1)).to(head.score_dtype), masked


class _LinearCrossEntropy(torch.autograd.Function):
    """Summed cross entropy of ``users @ items.T``, whose gradients are computed chunk by chunk in the forward pass.

    The (N, I) scores are never stored or computed twice, as autograd or checkpointing would. On 2,200 positions x 64
    it is 1.4 times as fast as ``F.cross_entropy(users @ items.T)`` over 1,682 items and 1.9 times over 12,000, on a
    CPU. The idea is that of Liger's fused linear cross entropy (arXiv 2410.10989). torch has one of its own from
    2.13 on; hllm supports 2.11.

    ``log_weights`` (M,) are added to the scores of items that are not the label. Softmax and sums are in float32.
    """

    @staticmethod
    def forward(
        ctx: Any,
        users: Tensor,
        items: Tensor,
        labels: Tensor,
        chunk_size: int,
        log_weights: Tensor | None,
        mask: Mask | None,
    ) -> tuple[Tensor, Tensor]:
        users_grad, items_grad = torch.empty_like(users), torch.zeros_like(items)
        total, masked = torch.zeros((), device=users.device), torch.zeros_like(items[:, 0], dtype=torch.int64)
        for begin in range(0, len(users), chunk_size):
            part = slice(begin, begin + chunk_size)
            chunk, label = users[part], labels[part, None]  # (C, D), (C, 1)
            scores = (chunk @ items.T).float()  # (C, I)
            target_score = scores.gather(1, label)
            if log_weights is not None:
                scores += log_weights
            if mask is not None:
                left_out = mask(part).scatter(1, label, False)
                scores.masked_fill_(left_out, float("-inf"))
                masked += left_out.sum(0)
            if log_weights is not None:
                scores.scatter_(1, label, target_score)
            largest = scores.amax(1, keepdim=True)
            scores_grad = scores.sub_(largest).exp_()  # in place from here on: each pass over (C, I) costs
            norm = scores_grad.sum(1, keepdim=True)
            total += (norm.log() + largest - target_score).sum()
            scores_grad.div_(norm)
            scores_grad.scatter_add_(1, label, torch.full_like(label, -1, dtype=scores.dtype))
            scores_grad = scores_grad.to(items.dtype)
            torch.mm(scores_grad, items, out=users_grad[part])
            items_grad.addmm_(scores_grad.T, chunk)
        ctx.save_for_backward(users_grad, items_grad)
        ctx.mark_non_differentiable(masked)
        return total, masked

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Any) -> tuple[Tensor, Tensor, None, None, None, None]:
        users_grad, items_grad = ctx.saved_tensors
        return users_grad * grad, items_grad * grad, None, None, None, None


def info_nce_loss(
    users: Tensor,
    items: Tensor,
    candidates: Candidates,
    targets: Tensor,
    head: SimilarityHead,
    excluded: Tensor | None = None,
    similarity_threshold: float | None = None,
) -> tuple[Tensor, Tensor]:
    """InfoNCE (HLLM, arXiv 2409.12740, eq. 1), mean over positions, in the head's ``score_dtype``.

    Every position is scored against the same negatives; an item that is the position's target is its positive, once,
    and never a negative of itself. The official code masks by cosine > 0.99 instead, which loses all negatives when
    item vectors collapse; ``similarity_threshold`` does so in addition.

    Where all candidates are negatives and count once, this is the softmax over them, at no further cost.

    Args:
        users: (N, D). items: (M, D) vectors of ``candidates.ids``. targets: (N,) ids.
        excluded: (N, M) bool, candidates that are no negatives of a position.

    Returns:
        () the loss, 0 for no position; () how many negatives a position has on average: the official code's
        ``nce_samples`` less one, which is the positive.
    """
    labels = torch.searchsorted(candidates.ids, targets)  # (N,)
    mask = _mask(items, labels, head, excluded, similarity_threshold)
    chunk_size = default_chunk_size(len(items), items.device)
    loss, masked = _softmax(users, items, labels, head, chunk_size, candidates.log_weights(), mask)
    counts = candidates.negative.long() if candidates.counts is None else candidates.negative * candidates.counts
    negatives = len(labels) * counts.sum() - counts[labels].sum() - (masked * counts).sum()
    return loss, negatives.float() / max(len(labels), 1)


def _mask(
    items: Tensor, labels: Tensor, head: SimilarityHead, excluded: Tensor | None, similarity_threshold: float | None
) -> Mask | None:
    """What is no negative of a position by its row, or because it is too like the target."""
    if similarity_threshold is None:
        return None if excluded is None else excluded.__getitem__
    with torch.no_grad(), torch.autocast(items.device.type, enabled=False):
        directions = F.normalize(items.to(head.score_dtype), dim=-1, eps=1e-6)

    def alike(part: slice) -> Tensor:
        found = directions[labels[part]] @ directions.T > similarity_threshold
        return found if excluded is None else found | excluded[part]

    return alike


class CrossEntropyLoss(Loss):
    """Exact softmax over the catalogue."""

    def __init__(self, config: CELossConfig) -> None:
        super().__init__()
        self.chunk_size = config.chunk_size

    def candidates(self, targets: Tensor, num_items: int) -> Candidates:
        ids = torch.arange(1, num_items + 1, device=targets.device)
        return Candidates(ids, torch.ones_like(ids, dtype=torch.bool))

    def forward(
        self,
        users: Tensor,
        items: Tensor,
        candidates: Candidates,
        targets: Tensor,
        head: SimilarityHead,
        excluded: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        chunk_size = self.chunk_size or default_chunk_size(len(items), items.device)
        loss = softmax_loss(users, items, targets - 1, head, chunk_size)
        return loss, loss.new_tensor(len(items) - 1)


class NCELoss(Loss):
    """InfoNCE against in-batch and uniform negatives, the same for all positions, users and processes.

    Uniform negatives are drawn with replacement, ``num_negatives`` a step however many processes share it. Unless
    ``distinct`` is off, an item is scored once however often it was drawn or occurs in the batch, so frequent items
    are no more often negatives than rare ones and no logQ correction is needed.
    """

    def __init__(self, config: NCELossConfig) -> None:
        super().__init__()
        self.config, self.mask_history = config, config.mask_history

    def candidates(self, targets: Tensor, num_items: int) -> Candidates:
        drawn = torch.randint(1, num_items + 1, (self.config.num_negatives,), device=targets.device)
        uniform = from_first(drawn)
        ids = torch.cat([targets, uniform]).unique()
        negative = torch.ones_like(ids, dtype=torch.bool) if self.config.in_batch else torch.isin(ids, uniform)
        if self.config.distinct:
            return Candidates(ids, negative)
        counted = torch.cat([targets, uniform]) if self.config.in_batch else uniform
        return Candidates(ids, negative, torch.bincount(torch.searchsorted(ids, counted), minlength=len(ids)))

    def forward(
        self,
        users: Tensor,
        items: Tensor,
        candidates: Candidates,
        targets: Tensor,
        head: SimilarityHead,
        excluded: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        threshold = self.config.similarity_threshold
        return info_nce_loss(users, items, candidates, targets, head, excluded, threshold)
