"""Losses over user vectors at supervised positions: a function each, with a small class around it for the config.

A loss says which items it scores (``candidates``), the module encodes each of them once, and the loss is computed on
the vectors. N supervised positions (padding is dropped before), M candidates, I catalogue items, D width.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from hllm.config import BinaryLossConfig, CELossConfig, LossKernel, NCELossConfig
from hllm.distributed import from_first
from hllm.head import SimilarityHead


@dataclass(frozen=True)
class Candidates:
    """Items scored at every position of a step.

    Args:
        ids: (M,) unique item ids, ascending; every target is among them.
        negative: (M,) bool, true for items that are negatives of all positions but those they are the target of; the
            others are there as positives only, or for positions to draw from.
        counts: (M,) how often a negative counts; None counts each once.
        expected: (M,) how often a negative is expected to count; None leaves scores uncorrected.
        own: negatives that each position draws for itself.
    """

    ids: Tensor
    negative: Tensor
    counts: Tensor | None = None
    expected: Tensor | None = None
    own: int = 0

    def offered(self) -> Tensor:
        """() negatives of a position before any is masked."""
        return (self.negative if self.counts is None else self.negative * self.counts).sum() + self.own

    def log_weights(self) -> Tensor | None:
        """(M,) float32, what is added to a candidate's score where it is a negative; None where that is 0."""
        if self.counts is None and self.expected is None:
            return None
        weights = torch.ones_like(self.ids) if self.counts is None else self.counts
        weights = weights.float().clamp(min=1)  # of candidates that are no negatives, and are not looked at
        return (weights if self.expected is None else weights / self.expected).log()


class Loss(nn.Module, ABC):
    """What the module asks of a loss."""

    mask_seen = False
    "What a row's history holds up to a position is not scored there; ``forward`` then takes ``seen``."
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


def softmax_loss(
    users: Tensor,
    items: Tensor,
    labels: Tensor,
    head: SimilarityHead,
    chunk_size: int,
    products: torch.dtype = torch.float32,
    seen: Tensor | None = None,
) -> Tensor:
    """Exact softmax cross entropy over all given items, mean over positions, in float32; 0 for no position.

    Args:
        users: (N, D). items: (I, D). labels: (N,) rows of ``items``.
        chunk_size: positions scored at a time; bounds memory to chunk_size x I scores and does not change the loss.
        products: what scores and probabilities are computed in.
        seen: (N, S) rows of ``items`` that a position leaves out, in any order and number of times; its label is scored
            all the same.
    """
    with torch.autocast(users.device.type, enabled=False):
        scaled = head.prepare(users.float()) * head.scale()
        loss: Tensor = _LinearCrossEntropy.apply(  # type: ignore[no-untyped-call]
            scaled, head.prepare(items.float()), labels, chunk_size, products, seen
        )
    return loss


def liger_softmax_loss(
    users: Tensor,
    items: Tensor,
    labels: Tensor,
    head: SimilarityHead,
    chunk_size: int,
    products: torch.dtype = torch.float32,
) -> Tensor:
    """As ``softmax_loss``, by Liger's fused linear cross entropy (arXiv 2410.10989), of the extra ``liger``.

    The algorithm is the same; one Triton kernel turns a chunk's scores into loss and gradient where they lie, in place
    of several passes and a second buffer. Gradients are rounded to ``products`` once more than ours.

    Args:
        chunk_size: positions scored at a time are the power of 2 below it or fewer; or as many as have N x D scores.
    """
    if not len(users):  # a kernel is not launched over nothing
        return softmax_loss(users, items, labels, head, chunk_size, products)
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    # Liger allows a chunk a multiple of N x D scores, once unless told otherwise: of 8,192 positions of width 256 it
    # would score 4 at a time over a million items, and go over all of their gradients for each 4
    rows = 1 << (chunk_size.bit_length() - 1)
    multiple = max(rows * len(items) // users.numel(), 1)
    with torch.autocast(users.device.type, enabled=False):
        loss: Tensor = liger_fused_linear_cross_entropy(
            (head.prepare(users.float()) * head.scale()).to(products),
            head.prepare(items.float()).to(products),
            labels,
            accum_dtype=torch.float32,
            chunk_mem_const=multiple,
        )
    return loss


def default_chunk_size(num_items: int, device: torch.device, products: torch.dtype = torch.float32) -> int:
    """Positions whose scores stay near a core, 4 MiB, or fill 1 GiB of a GPU; at least 128, and 512 of 16 bits."""
    budget = 2**22 if device.type == "cpu" else 2**30
    return max(budget // (products.itemsize * num_items), 128 if products is torch.float32 else 512)


PRODUCT_ROWS = 2048
"Of a product in 16 bits whose sum is in float32, so many rows at a time, which are then still in a core's cache."


class _LinearCrossEntropy(torch.autograd.Function):
    """Mean cross entropy of ``users @ items.T``, whose gradients are computed chunk by chunk in the forward pass.

    Scores and probabilities are rounded to ``products``, sums are in float32. The (N, I) scores are never stored or
    computed twice, as autograd or checkpointing would; docs/benchmarks.md has what that brings. The idea is that of
    Liger's fused linear cross entropy (arXiv 2410.10989). torch has one of its own from 2.13 on; hllm supports 2.11.
    """

    @staticmethod
    def forward(
        ctx: Any,
        users: Tensor,
        items: Tensor,
        labels: Tensor,
        chunk_size: int,
        products: torch.dtype,
        seen: Tensor | None,
    ) -> Tensor:
        share = 1 / max(len(users), 1)  # of a position in the mean
        users_grad, items_grad = -items[labels], None  # the targets' part, exact whatever the products are in
        if ctx.needs_input_grad[1]:  # a third of the work
            items_grad = torch.zeros_like(items).index_add_(0, labels, users, alpha=-share)
        total, rounded, rounded_items = users.new_zeros(()), users.to(products), items.to(products)
        # every chunk's: memory that is new each time costs a CPU half as much again as the products
        buffer = rounded.new_empty(min(chunk_size, len(users)), len(items))
        for begin in range(0, len(users), chunk_size):
            part = slice(begin, begin + chunk_size)
            chunk, label = rounded[part], labels[part, None]  # (C, D), (C, 1)
            scores = torch.mm(chunk, rounded_items.T, out=buffer[: len(chunk)])  # (C, I)
            if seen is not None:
                _leave_out(scores, seen[part], label)
            # the logarithm of the largest chance, which is never 0, and how far the target's score is below its score
            behind = (scores.amax(dim=1, keepdim=True) - scores.gather(1, label)).float()
            # over itself where each row is read before it is written: tests have that for CPUs only
            chance = torch.softmax(scores, dim=1, out=scores if scores.device.type == "cpu" else None)
            total += (behind - chance.amax(dim=1, keepdim=True).float().log()).sum()
            _add_product(users_grad[part], chance, rounded_items)
            if items_grad is not None:
                _add_product(items_grad, chance.T, (users[part] * share).to(products))
        ctx.gradients = users_grad.mul_(share), items_grad
        return total.mul_(share)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        # scaled in place and handed over: a copy would be as large as the catalogue
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:
            raise RuntimeError("a second backward pass through the exact softmax: compute the loss again")
        if grad.device.type != "cpu" or grad != 1:  # which would be a pass over the catalogue for nothing
            gradients = tuple(None if part is None else part.mul_(grad) for part in gradients)
        return *gradients, None, None, None, None


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """``total`` in float32 grows by a product, in place."""
    if left.dtype is total.dtype:
        total.addmm_(left, right)
        return
    size = PRODUCT_ROWS if total.device.type == "cpu" else len(total)
    for rows, part in zip(total.split(size), left.split(size), strict=True):
        rows += part @ right


def _leave_out(scores: Tensor, rows: Tensor, label: Tensor) -> None:
    """Scores of (C, S) rows become -inf in place, but for the (C, 1) labels."""
    own = scores.gather(1, label)
    scores.scatter_(1, rows, float("-inf")).scatter_(1, label, own)


Mask = Callable[[slice], Tensor]
"(C, K) bool for C of the positions: which shared negatives are none of theirs, whatever their targets."


class _SampledCrossEntropy(torch.autograd.Function):
    """As ``_LinearCrossEntropy``, for a positive of each position's own beside negatives that all share.

    Softmax and sums are in float32 whatever the vectors are.

    Args:
        users, positives: (N, D). negatives: (K, D).
        own: (N,) the row of a position's target among the negatives, and ``present``, (N,) bool: it is among them.
        log_weights: (K,) added to the negatives' scores, or None.

    Returns:
        () the sum over positions; (K,) at how many of them a negative was masked.
    """

    @staticmethod
    def forward(
        ctx: Any,
        users: Tensor,
        positives: Tensor,
        negatives: Tensor,
        own: Tensor,
        present: Tensor,
        log_weights: Tensor | None,
        mask: Mask | None,
        chunk_size: int,
    ) -> tuple[Tensor, Tensor]:
        users_grad, positives_grad = torch.empty_like(users), torch.empty_like(positives)
        negatives_grad = torch.zeros_like(negatives)
        total = torch.zeros((), device=users.device, dtype=torch.float32)
        masked = torch.zeros(len(negatives), device=users.device).long()
        for begin in range(0, len(users), chunk_size):
            part = slice(begin, begin + chunk_size)
            chunk, positive = users[part], positives[part]  # (C, D)
            scores = (chunk @ negatives.T).float()  # (C, K)
            if log_weights is not None:
                scores += log_weights
            column, is_own = own[part, None], present[part, None]  # (C, 1)
            if mask is None:
                scores.scatter_(1, column, scores.gather(1, column).masked_fill(is_own, float("-inf")))
                masked.scatter_add_(0, own[part], present[part].long())
            else:
                left_out = mask(part)
                left_out = left_out.scatter(1, column, left_out.gather(1, column) | is_own)
                scores.masked_fill_(left_out, float("-inf"))
                masked += left_out.sum(0)
            target_score = (chunk.float() * positive.float()).sum(1, keepdim=True)  # (C, 1)
            largest = torch.maximum(scores.amax(1, keepdim=True), target_score)
            scores_grad, share = scores.sub_(largest).exp_(), (target_score - largest).exp()
            norm = scores_grad.sum(1, keepdim=True) + share
            total += (norm.log() + largest - target_score).sum()
            scores_grad = scores_grad.div_(norm).to(users.dtype)
            target_grad = (share / norm - 1).to(users.dtype)
            torch.mm(scores_grad, negatives, out=users_grad[part])
            users_grad[part].addcmul_(target_grad, positive)
            torch.mul(target_grad, chunk, out=positives_grad[part])
            negatives_grad.addmm_(scores_grad.T, chunk)
        ctx.save_for_backward(users_grad, positives_grad, negatives_grad)
        ctx.mark_non_differentiable(masked)
        return total, masked

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Any) -> tuple[Tensor, Tensor, Tensor, None, None, None, None, None]:
        users_grad, positives_grad, negatives_grad = ctx.saved_tensors
        return users_grad * grad, positives_grad * grad, negatives_grad * grad, None, None, None, None, None


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

    With ``candidates.expected`` a negative j counts c_j / E[c_j] times, c_j being how often it was drawn: the logQ
    correction (Bengio and Senecal 2008; Yi et al. 2019), which makes the denominator an unbiased estimate of that of
    the full softmax. The positive was not drawn: it is there with certainty, and its score stays as it is. To correct
    it as if it had been drawn is the usual mistake (arXiv 2507.09331). So the gradient keeps that paper's form,
    1 - P(positive) times the positive's against the negatives' expected one, with P and expectation from the sample.

    Args:
        users: (N, D). items: (M, D) vectors of ``candidates.ids``. targets: (N,) ids.
        excluded: (N, M) bool, candidates that are no negatives of a position.

    Returns:
        () the loss, 0 for no position; () how many negatives a position has on average: the official code's
        ``nce_samples`` less one, which is the positive.
    """
    labels, num_positions = torch.searchsorted(candidates.ids, targets), max(len(targets), 1)  # (N,)
    log_weights, rows = candidates.log_weights(), candidates.negative.nonzero().flatten()  # (K,)
    chunk_size = default_chunk_size(max(len(rows), 1), items.device)
    mask = _mask(items, rows, labels, head, excluded, similarity_threshold)
    if len(rows) == len(items) > 0 and log_weights is None and mask is None and head.score_dtype is torch.float32:
        # a target's score as a negative is its score as the positive: the softmax over all candidates, at no more cost
        negatives = torch.full((), len(items) - 1.0 if len(targets) > 0 else 0.0, device=items.device)
        return softmax_loss(users, items, labels, head, chunk_size), negatives
    own = torch.searchsorted(rows, labels).clamp(max=max(len(rows) - 1, 0))
    with torch.autocast(users.device.type, enabled=False):
        table = head.table(items)
        total, masked = _SampledCrossEntropy.apply(  # type: ignore[no-untyped-call]
            head.prepare(users.to(head.score_dtype)) * head.scale().to(head.score_dtype),
            F.embedding(labels, table),
            table.index_select(0, rows),
            own,
            rows[own] == labels,
            None if log_weights is None else log_weights[rows],
            mask,
            chunk_size,
        )
    counts = torch.ones_like(rows) if candidates.counts is None else candidates.counts[rows]
    negatives = len(labels) * counts.sum() - (masked * counts).sum()
    return (total / num_positions).to(head.score_dtype), negatives.float() / num_positions


def _mask(
    items: Tensor,
    rows: Tensor,
    labels: Tensor,
    head: SimilarityHead,
    excluded: Tensor | None,
    similarity_threshold: float | None,
) -> Mask | None:
    """What of the (K,) rows is no negative of a position by its history, or because it is too like the target."""
    if similarity_threshold is None:
        return None if excluded is None else lambda part: excluded[part][:, rows]
    with torch.no_grad(), torch.autocast(items.device.type, enabled=False):
        directions = F.normalize(items.to(head.score_dtype), dim=-1, eps=1e-6)

    def mask(part: slice) -> Tensor:
        alike = directions[labels[part]] @ directions[rows].T > similarity_threshold
        return alike if excluded is None else alike | excluded[part][:, rows]

    return mask


class _OwnScores(torch.autograd.Function):
    """(N, K) scores of each position's user with items of its own: (N, D), (M, D) in float32, (N, K) rows of the items.

    A position's gradient is a sum of K weighted items and an item's a sum of weighted users: bags of embeddings, for
    which torch has kernels. The (N, K, D) vectors are gathered for scores alone, while they stay in a core's cache.
    """

    @staticmethod
    def forward(ctx: Any, users: Tensor, items: Tensor, rows: Tensor) -> Tensor:
        ctx.save_for_backward(users, items, rows)
        scores = users.new_empty(rows.shape)
        size = default_chunk_size(rows.shape[1] * users.shape[1], users.device)
        for begin in range(0, len(users), size):
            part = slice(begin, begin + size)
            vectors = F.embedding(rows[part], items)  # (C, K, D)
            torch.sum(vectors.mul_(users[part, None]), dim=2, out=scores[part])
        return scores

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        users, items, rows = ctx.saved_tensors
        users_grad = items_grad = None
        if ctx.needs_input_grad[0]:
            users_grad = F.embedding_bag(rows, items, per_sample_weights=grad, mode="sum")
        if ctx.needs_input_grad[1]:
            items_grad = torch.zeros_like(items)
            # users of a part stay in cache; but no fewer draws than items, as each part adds to all of those
            size = max(max(OWN_DRAWS, len(items)) // rows.shape[1], 1)
            for begin in range(0, len(users), size):
                part = slice(begin, begin + size)
                items_grad += _bags_by_item(users[part], rows[part], grad[part], len(items))
        return users_grad, items_grad, None


OWN_DRAWS = 2**19
"Negatives of positions' own whose gradients are added up at a time."


def _bags_by_item(users: Tensor, rows: Tensor, weights: Tensor, num_items: int) -> Tensor:
    """(I, D) for each item the sum of the (C, D) users that drew it, (C, K) rows of 32 bits, by (C, K) weights."""
    order = rows.flatten().sort()[1]
    counts = torch.bincount(rows.flatten(), minlength=num_items)
    return F.embedding_bag(
        order // rows.shape[1],
        users,
        offsets=counts.cumsum(0) - counts,
        per_sample_weights=weights.flatten()[order],
        mode="sum",
    )


def own_scores(
    users: Tensor,
    items: Tensor,
    targets: Tensor,
    num_negatives: int,
    head: SimilarityHead,
    excluded: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Scores of each position's target, and of negatives of its own: uniform, with replacement, never the target.

    Args:
        users: (N, D). items: (I, D) the catalogue. targets: (N,) ids.
        excluded: (N, I) bool, items that are no negatives of a position; drawn ones are left out, not drawn again.

    Returns:
        (N,) and (N, num_negatives) in float32, ``LEFT_OUT`` for what is left out.
    """
    labels, shape = (targets - 1).int()[:, None], (len(targets), num_negatives)
    rows = torch.randint(len(items) - 1, shape, device=users.device, dtype=torch.int32)
    rows += rows >= labels  # the others' rows, without a gap at the target's
    with torch.autocast(users.device.type, enabled=False):
        scaled = (head.prepare(users.to(head.score_dtype)) * head.scale().to(head.score_dtype)).float()
        table = head.table(items).float()
        positive = (scaled * F.embedding(labels[:, 0], table)).sum(1)
        negative: Tensor = _OwnScores.apply(scaled, table, rows)  # type: ignore[no-untyped-call]
    return positive, negative if excluded is None else negative.masked_fill(excluded.gather(1, rows.long()), LEFT_OUT)


LEFT_OUT = torch.finfo(torch.float32).min
"Of finite size, so that a softmax over nothing else has a gradient: 0."


def own_nce_loss(positive: Tensor, negative: Tensor, log_weight: float = 0.0) -> Tensor:
    """Sampled softmax of (N,) scores against (N, K) of a position's own negatives, mean over positions.

    Args:
        log_weight: added to each negative's score. The logarithm of (I - 1) / K makes the denominator an unbiased
            estimate of the full softmax's, as ``info_nce_loss`` says.
    """
    # log(exp(s+) + exp(n)) - s+, n all negatives' part: the (N, K) scores are neither copied nor added to
    return F.softplus(negative.logsumexp(1) + log_weight - positive).sum() / max(len(positive), 1)


def binary_loss(positive: Tensor, negative: Tensor, beta: float = 1.0) -> Tensor:
    """gBCE (Petrov and Macdonald, RecSys 2023, arXiv 2308.07192): binary cross entropy with sigmoid(s+) ** beta.

    -(beta log sigmoid(s+) + sum over negatives of log(1 - sigmoid(s-))) / (K + 1), mean over positions. With beta = 1
    it is BCE; with K = 1 too, half the loss of SASRec (Kang and McAuley, ICDM 2018, arXiv 1808.09781).

    Args:
        positive: (N,) scores. negative: (N, K), ``LEFT_OUT`` for what is left out, which then adds nothing.
    """
    summed = beta * F.softplus(-positive).sum() + F.softplus(negative).sum()
    return summed / ((negative.shape[1] + 1) * max(len(positive), 1))


def calibration_beta(num_items: int, num_negatives: int, calibration: float) -> float:
    """beta of gBCE: 1 at t = 0; at t = 1 the share of items that is drawn, where scores are calibrated."""
    alpha = min(num_negatives / (num_items - 1), 1)
    return alpha * (calibration * (1 - 1 / alpha) + 1 / alpha)


def _count(negative: Tensor, excluded: Tensor | None) -> Tensor:
    """() negatives of a position on average."""
    if excluded is None:  # a pass over (N, K) less
        return negative.new_full((), negative.shape[1] if len(negative) else 0)
    return (negative > LEFT_OUT).sum().float() / max(len(negative), 1)


class CrossEntropyLoss(Loss):
    """Exact softmax over the catalogue."""

    def __init__(self, config: CELossConfig, train_counts: Tensor | None = None) -> None:
        super().__init__()
        self.chunk_size, self.mask_seen = config.chunk_size, config.mask_seen
        self.products: torch.dtype = getattr(torch, config.products.value)
        self.kernel = config.kernel

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
        seen: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """As of any loss; seen: (N, S) ids that positions do not score, unless they are their targets."""
        chunk_size = self.chunk_size or default_chunk_size(len(items), items.device, self.products)
        if self.kernel is LossKernel.liger:
            loss = liger_softmax_loss(users, items, targets - 1, head, chunk_size, self.products)
        else:
            rows = None if seen is None else seen - 1
            loss = softmax_loss(users, items, targets - 1, head, chunk_size, self.products, rows)
        return loss, loss.new_full((), len(items) - 1)


class NCELoss(Loss):
    """InfoNCE against in-batch and uniform negatives, the same for all positions, users and processes.

    Uniform negatives are drawn with replacement, ``num_negatives`` a step however many processes share it. Unless
    ``distinct`` is off, an item is scored once however often it was drawn or occurs in the batch, which takes most of
    the weight off frequent items, though they are still more likely to be there.

    ``logq`` divides a negative's weight by its expected one, so that in-batch negatives stand for the catalogue: with
    N targets a step, shares p_j of the training events and K uniform draws from I items, an item is expected
    (N - 1) p_j + K / I times, and under ``distinct`` it is there with probability 1 - (1 - p_j)^(N - 1) (1 - 1/I)^K.
    N - 1, because the position's own target is no draw. Targets are taken as drawn one by one; those of one user are
    not, so in-batch estimates are better the more users a step has.

    ``per_position`` draws uniform negatives for each position, as the official ID baselines do. A step then reads the
    vectors of the whole catalogue.

    Args:
        train_counts: (I + 1,) events of each item in training, for ``logq`` with ``in_batch``.
    """

    popularity: Tensor | None

    def __init__(self, config: NCELossConfig, train_counts: Tensor | None = None) -> None:
        super().__init__()
        self.config, self.mask_history = config, config.mask_history
        shares = None
        if config.logq and config.in_batch:
            assert train_counts is not None, "in-batch negatives are corrected by how frequent items are"
            shares = train_counts.double() / train_counts.sum()
        self.register_buffer("popularity", shares, persistent=False)

    def candidates(self, targets: Tensor, num_items: int) -> Candidates:
        if self.config.per_position:
            return _to_draw_from(num_items, self.config.num_negatives, targets.device)
        drawn = torch.randint(1, num_items + 1, (self.config.num_negatives,), device=targets.device)
        uniform = from_first(drawn)
        ids = torch.cat([targets, uniform]).unique()
        negative = torch.ones_like(ids, dtype=torch.bool) if self.config.in_batch else torch.isin(ids, uniform)
        expected = self._expected(ids, len(targets) - 1, num_items) if self.config.logq else None
        if self.config.distinct:
            return Candidates(ids, negative, expected=expected)
        counted = torch.cat([targets, uniform]) if self.config.in_batch else uniform
        counts = torch.bincount(torch.searchsorted(ids, counted), minlength=len(ids))
        return Candidates(ids, negative, counts, expected)

    def _expected(self, ids: Tensor, num_others: int, num_items: int) -> Tensor:
        """(M,) float32 how often each of the items is expected among the negatives of a position."""
        share = torch.zeros_like(ids, dtype=torch.float64) if self.popularity is None else self.popularity[ids]
        num_uniform, num_others = self.config.num_negatives, max(num_others, 0)
        if not self.config.distinct:
            return (num_others * share + num_uniform / num_items).float()
        absent = num_others * torch.log1p(-share) + num_uniform * math.log1p(-1 / num_items)
        return -torch.expm1(absent).float()

    def forward(
        self,
        users: Tensor,
        items: Tensor,
        candidates: Candidates,
        targets: Tensor,
        head: SimilarityHead,
        excluded: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        config = self.config
        if not config.per_position:
            return info_nce_loss(users, items, candidates, targets, head, excluded, config.similarity_threshold)
        positive, negative = own_scores(users, items, targets, config.num_negatives, head, excluded)
        log_weight = math.log((len(items) - 1) / config.num_negatives) if config.logq else 0.0
        return own_nce_loss(positive, negative, log_weight).to(head.score_dtype), _count(negative, excluded)


class BinaryLoss(Loss):
    """BCE and gBCE against uniform negatives of each position's own. A step reads the vectors of the whole catalogue.

    Trained with few negatives, BCE's sigmoids are far too large for likely items; gBCE's beta takes that back by
    ``calibration``, t in the paper: 0 is BCE.
    """

    def __init__(self, config: BinaryLossConfig, train_counts: Tensor | None = None) -> None:
        super().__init__()
        self.config, self.mask_history = config, config.mask_history

    def candidates(self, targets: Tensor, num_items: int) -> Candidates:
        return _to_draw_from(num_items, self.config.num_negatives, targets.device)

    def forward(
        self,
        users: Tensor,
        items: Tensor,
        candidates: Candidates,
        targets: Tensor,
        head: SimilarityHead,
        excluded: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        positive, negative = own_scores(users, items, targets, self.config.num_negatives, head, excluded)
        beta = calibration_beta(len(items), self.config.num_negatives, self.config.calibration)
        return binary_loss(positive, negative, beta), _count(negative, excluded)


def _to_draw_from(num_items: int, num_negatives: int, device: torch.device) -> Candidates:
    """The whole catalogue, of which each position draws some."""
    ids = torch.arange(1, num_items + 1, device=device)
    return Candidates(ids, torch.zeros_like(ids, dtype=torch.bool), own=num_negatives)
