"""Every loss against a few lines of plain arithmetic."""

import importlib.util
import math
import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import hllm.losses
from hllm.build import check_kernel
from hllm.config import (
    BinaryLossConfig,
    CELossConfig,
    HeadConfig,
    LossKernel,
    NCELossConfig,
    ScoreDtype,
    Similarity,
    compose,
)
from hllm.errors import ConfigError
from hllm.head import SimilarityHead
from hllm.losses import (
    BinaryLoss,
    Candidates,
    CrossEntropyLoss,
    Loss,
    NCELoss,
    binary_loss,
    calibration_beta,
    info_nce_loss,
    liger_softmax_loss,
    own_nce_loss,
    own_scores,
    softmax_loss,
)

HEAD = SimilarityHead(HeadConfig(Similarity.cosine, temperature=0.07))
DOT = SimilarityHead(HeadConfig(Similarity.dot, temperature=1.0))


@pytest.fixture
def vectors() -> tuple[Tensor, Tensor]:
    """(11, 4) users and (7, 4) items."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(11, 4, generator=generator), torch.randn(7, 4, generator=generator)


def nce(**changes: Any) -> NCELoss:
    return NCELoss(NCELossConfig(name="nce", _target_="", **changes))


def candidates(ids: list[int], negative: list[int]) -> Candidates:
    return Candidates(torch.tensor(ids), torch.isin(torch.tensor(ids), torch.tensor(negative)))


def reference_nce(users: Tensor, items: dict[int, Tensor], negatives: set[int], targets: list[int]) -> float:
    """Mean of -log(e^positive / (e^positive + sum over negatives other than the target)), by loops."""
    total = 0.0
    for user, target in zip(users, targets, strict=True):
        scores = {item: F.cosine_similarity(user, items[item], dim=0).item() / 0.07 for item in negatives | {target}}
        total -= scores[target] - math.log(sum(map(math.exp, scores.values())))
    return total / len(targets)


def test_softmax_by_hand() -> None:
    users, items = torch.tensor([[1.0], [2.0]]), torch.tensor([[0.0], [math.log(2)], [math.log(3)]])
    # e^score: 1, 2, 3 and 1, 4, 9
    expected = -(math.log(2 / 6) + math.log(9 / 14)) / 2
    assert softmax_loss(users, items, torch.tensor([1, 2]), DOT, 100).item() == pytest.approx(expected, abs=1e-6)


def test_info_nce_by_hand() -> None:
    """Three users and three items, of which item 30 is nobody's target."""
    users = torch.eye(3)
    items = torch.tensor([[1.0, 2.0, 0.0], [0.0, 1.0, 1.0], [3.0, 0.0, 2.0]])
    found, negatives = info_nce_loss(
        users, items, candidates([10, 20, 30], [10, 20, 30]), torch.tensor([10, 20, 20]), DOT
    )  # each user's scores are a column of items
    rows = [(1.0, 0.0, 3.0, 1.0), (2.0, 1.0, 0.0, 1.0), (0.0, 1.0, 2.0, 1.0)]
    expected = sum(math.log(sum(map(math.exp, row[:3]))) - row[3] for row in rows) / 3
    assert found.item() == pytest.approx(expected, abs=1e-6)
    assert negatives.item() == 2


def test_ce_is_the_softmax_over_the_whole_catalogue(vectors: tuple[Tensor, Tensor]) -> None:
    users, items = vectors
    loss, targets = CrossEntropyLoss(CELossConfig(name="ce", _target_="")), torch.randint(1, 8, (11,))
    found = loss.candidates(targets, num_items=7)
    assert found.ids.tolist() == list(range(1, 8))
    expected = reference_nce(users, dict(enumerate(items, start=1)), set(range(1, 8)), targets.tolist())
    value, negatives = loss(users, items, found, targets, HEAD)
    assert value.item() == pytest.approx(expected, abs=1e-5)
    assert negatives.item() == 6


@pytest.mark.parametrize("chunk_size", [1, 4, 10])
def test_chunks_change_neither_value_nor_gradients(vectors: tuple[Tensor, Tensor], chunk_size: int) -> None:
    labels, results = torch.arange(11) % 7, []
    for size in (100, chunk_size):
        users, items = (part.clone().requires_grad_() for part in vectors)
        head = SimilarityHead(HeadConfig(learned=True))
        loss = softmax_loss(users, items, labels, head, size)
        loss.backward()
        results.append((loss, users.grad, items.grad, head.log_scale.grad))
    torch.testing.assert_close(results[0], results[1])


def test_a_multiple_of_the_loss_has_a_multiple_of_its_gradients(vectors: tuple[Tensor, Tensor]) -> None:
    """Of 1 they are handed over as they are."""
    labels, found = torch.arange(11) % 7, []
    for factor in (1.0, 2.5):
        users, items = (part.clone().requires_grad_() for part in vectors)
        found.append(gradients(factor * softmax_loss(users, items, labels, HEAD, 4), users, items))
    plain = gradients(F.cross_entropy(HEAD(users, items), labels), users, items)
    torch.testing.assert_close(found[0], plain)
    torch.testing.assert_close(found[1], tuple(2.5 * part for part in plain))


@pytest.mark.parametrize("in_batch", [True, False])
def test_nce_equals_its_definition(vectors: tuple[Tensor, Tensor], in_batch: bool) -> None:
    users, items = vectors
    ids, targets = [2, 3, 5, 8, 13, 21, 34], [2, 3, 5, 2, 2, 13, 13, 3, 5, 2, 8]
    negatives = set(ids) if in_batch else {2, 21, 34}
    found, number = info_nce_loss(users, items, candidates(ids, list(negatives)), torch.tensor(targets), HEAD)
    expected = reference_nce(users, dict(zip(ids, items, strict=True)), negatives, targets)
    assert found.item() == pytest.approx(expected, abs=1e-5)
    assert number.item() == pytest.approx(sum(len(negatives - {target}) for target in targets) / 11)


def test_a_target_drawn_as_negative_changes_nothing(vectors: tuple[Tensor, Tensor]) -> None:
    users, items = vectors[0][:4], vectors[1][:3]
    targets = torch.tensor([1, 1, 1, 1])
    apart = info_nce_loss(users, items, candidates([1, 2, 3], [2, 3]), targets, HEAD)
    drawn = info_nce_loss(users, items, candidates([1, 2, 3], [1, 2, 3]), targets, HEAD)
    assert drawn[0].item() == pytest.approx(apart[0].item())
    assert drawn[1] == apart[1]


def test_an_equal_vector_of_another_item_stays_a_negative() -> None:
    """Ids decide, not similarity: the official code's rule would leave no negatives when vectors collapse."""
    items = torch.ones(3, 2)
    loss, negatives = info_nce_loss(torch.ones(1, 2), items, candidates([1, 2, 3], [2, 3]), torch.tensor([1]), HEAD)
    assert loss.item() == pytest.approx(math.log(3), abs=1e-5)
    assert negatives.item() == 2


def test_collapsed_vectors_under_a_similarity_threshold_leave_no_negative_no_loss_and_no_gradient() -> None:
    """Reference 0.5: the official mask makes a collapse absorbing. Here it is a choice, and the count tells of it."""
    users, items = torch.randn(2, 4, requires_grad=True), torch.ones(3, 4, requires_grad=True)
    offered, targets = candidates([1, 2, 3], [1, 2, 3]), torch.tensor([1, 2])
    loss, negatives = info_nce_loss(users, items, offered, targets, HEAD, similarity_threshold=0.99)
    loss.backward()
    assert (loss.item(), negatives.item()) == (0, 0)
    assert users.grad is not None
    assert items.grad is not None
    assert not users.grad.any()
    assert not items.grad.any()
    assert offered.offered().item() == 3


@pytest.mark.parametrize(("cosine", "left"), [(0.9899, 1), (0.9901, 0)])
def test_the_similarity_threshold_is_a_cosine(cosine: float, left: int) -> None:
    items = torch.tensor([[2.0, 0.0], [3 * cosine, 3 * math.sqrt(1 - cosine**2)]])
    offered, users = candidates([1, 2], [1, 2]), torch.ones(1, 2)
    _, negatives = info_nce_loss(users, items, offered, torch.tensor([1]), HEAD, similarity_threshold=0.99)
    assert negatives.item() == left


OFFICIAL_ITEMS = torch.tensor([[1.0, 0.0], [5.0, 0.2], [0.0, 2.0], [-3.0, 4.0]])
"Ids 1 to 4. Cosines: 1 with 2 0.9992, 1 with 3 0, 1 with 4 -0.6, 2 with 3 0.04, 2 with 4 -0.5676, 3 with 4 0.8."


def test_official_loss_by_hand() -> None:
    """Reference 8, Loss: 3 positions x 4 items as section 1.8 has it, to 1e-6: cosines over 0.07, mean over positions.

    A negative with cos(target, negative) > 0.99 goes, at that position only; the target's own id always; the positive
    never.
    """
    users, targets = torch.tensor([[3.0, 4.0], [0.0, 1.0], [-4.0, 3.0]]), torch.tensor([1, 3, 4])
    head = SimilarityHead(HeadConfig(temperature=0.07, learned=True))
    found = nce(in_batch=False, distinct=False, similarity_threshold=0.99)(
        users, OFFICIAL_ITEMS, candidates([1, 2, 3, 4], [1, 2, 3, 4]), targets, head
    )
    length = math.sqrt(25.04)
    cosines = [  # of each user: with its positive, then with its negatives
        (0.6, [0.8, -9 / 25 + 16 / 25]),  # target 1: item 2 is too like it
        (1.0, [0.0, 0.2 / length, 0.8]),
        (24 / 25, [-0.8, (-4 * 5 + 3 * 0.2) / 5 / length, 0.6]),
    ]
    losses = [
        -math.log(math.exp(positive / 0.07) / sum(math.exp(score / 0.07) for score in [positive, *negatives]))
        for positive, negatives in cosines
    ]
    assert found[0].item() == pytest.approx(sum(losses) / 3, abs=1e-6)
    assert found[1].item() == pytest.approx((2 + 3 + 3) / 3)  # nce_samples of the official code, less the positive


def official_nce(users: Tensor, positives: Tensor, negatives: Tensor, log_scale: Tensor, threshold: float) -> Tensor:
    """Reference 1.8 as it stands there: (N, D) users and positives, (K, D) negatives with all their repetitions."""
    users, positives, negatives = (part / part.norm(dim=-1, keepdim=True) for part in (users, positives, negatives))
    alike = positives @ negatives.T > threshold
    scores = (users @ negatives.T).masked_fill(alike, torch.finfo(users.dtype).min)
    logits = (
        torch.cat([(users * positives).sum(1, keepdim=True), scores], dim=1) * log_scale.clamp(0, math.log(100)).exp()
    )
    return -logits.log_softmax(1)[:, 0].mean()


@pytest.mark.parametrize("num_items", [8, 200])
def test_official_choices_equal_the_official_formula_and_its_gradients(num_items: int) -> None:
    """Reference 8, Loss: sampled with repetition and masked by similarity, as a naive computation has it."""
    torch.manual_seed(0)
    table = torch.randn(num_items + 1, 6)
    table[3] = table[2] * 2 + 1e-3  # another id, nearly the same direction
    users, targets, results = torch.randn(12, 6), torch.randint(1, num_items + 1, (12,)), []
    targets[:2] = torch.tensor([2, 3])
    loss = nce(in_batch=False, num_negatives=64, distinct=False, similarity_threshold=0.99)
    torch.manual_seed(1)
    drawn = torch.randint(1, num_items + 1, (64,))
    for official in (False, True):
        head = SimilarityHead(HeadConfig(learned=True))
        leaves = users.clone().requires_grad_(), table.clone().requires_grad_()
        if official:
            value = official_nce(leaves[0], leaves[1][targets], leaves[1][drawn], head.log_scale, 0.99)
        else:
            torch.manual_seed(1)
            found = loss.candidates(targets, num_items)
            value, negatives = loss(leaves[0], leaves[1][found.ids], found, targets, head)
        value.backward()
        results.append((value, leaves[0].grad, leaves[1].grad, head.log_scale.grad))
    torch.testing.assert_close(results[0], results[1], atol=1e-5, rtol=1e-5)
    like = (
        table[targets]
        / table[targets].norm(dim=1, keepdim=True)
        @ (table[drawn] / table[drawn].norm(dim=1, keepdim=True)).T
    )
    assert negatives.item() == pytest.approx((like <= 0.99).sum().item() / 12)
    assert found.offered().item() == 64


@pytest.mark.parametrize("in_batch", [True, False])
def test_without_distinct_an_item_counts_as_often_as_it_occurs(vectors: tuple[Tensor, Tensor], in_batch: bool) -> None:
    """A loop over every draw, and over every other position's target where those count; a target is never its own."""
    users, items = vectors
    targets, total, count = torch.tensor([1, 1, 1, 2, 2, 3, 4, 4, 1, 2, 7]), 0.0, 0
    torch.manual_seed(0)
    drawn = torch.randint(1, 8, (20,))
    torch.manual_seed(0)
    loss = nce(in_batch=in_batch, num_negatives=20, distinct=False)
    found = loss.candidates(targets, num_items=7)
    occurrences = drawn.tolist() + (targets.tolist() if in_batch else [])
    for user, target in zip(users, targets.tolist(), strict=True):
        scores = F.cosine_similarity(user[None], items, dim=1) / 0.07
        negatives = [item for item in occurrences if item != target]
        total -= scores[target - 1] - math.log(sum(math.exp(scores[i - 1]) for i in [target, *negatives]))
        count += len(negatives)
    value, number = loss(users, items[found.ids - 1], found, targets, HEAD)
    assert value.item() == pytest.approx(total.item() / 11, abs=1e-5)
    assert number.item() == pytest.approx(count / 11)


@pytest.mark.parametrize("positions", [1, 7, 300])
def test_a_step_draws_exactly_num_negatives(positions: int) -> None:
    """Reference 8, Loss, bettered: K does not depend on the batch."""
    torch.manual_seed(0)
    found = nce(in_batch=False, num_negatives=96, distinct=False).candidates(torch.ones(positions).long(), 10_000)
    assert found.offered().item() == 96
    users, items = torch.randn(positions, 4), torch.randn(len(found.ids), 4)
    _, negatives = info_nce_loss(users, items, found, torch.ones(positions).long(), HEAD)
    assert found.ids[found.negative].min() > 1  # else the target itself was drawn
    assert negatives.item() == 96


def test_excluded_candidates_are_no_negatives_of_that_position(vectors: tuple[Tensor, Tensor]) -> None:
    users, items, targets = vectors[0][:2], vectors[1][:4], torch.tensor([1, 2])
    excluded = torch.tensor(
        [[True, False, True, False], [False, False, False, False]]
    )  # the first one's own target too
    loss, negatives = info_nce_loss(users, items, candidates([1, 2, 3, 4], [1, 2, 3, 4]), targets, HEAD, excluded)
    table = dict(enumerate(items, start=1))
    expected = (reference_nce(users[:1], table, {2, 4}, [1]) + reference_nce(users[1:], table, {1, 3, 4}, [2])) / 2
    assert loss.item() == pytest.approx(expected, abs=1e-5)
    assert negatives.item() == 2.5


@pytest.mark.parametrize("threshold", [None, 0.99])
@pytest.mark.parametrize("distinct", [True, False])
def test_no_position_gives_a_loss_of_zero_with_gradient(threshold: float | None, distinct: bool) -> None:
    """Reference 9: a process without a valid position gets NaN from the official code."""
    loss = nce(in_batch=False, num_negatives=5, distinct=distinct, similarity_threshold=threshold)
    none, users = torch.empty(0, dtype=torch.int64), torch.empty(0, 4, requires_grad=True)
    found = loss.candidates(none, num_items=9)
    items = torch.randn(len(found.ids), 4, requires_grad=True)
    value, negatives = loss(users, items, found, none, HEAD)
    value.backward()
    assert (value.item(), negatives.item()) == (0, 0)
    assert items.grad is not None
    assert not items.grad.any()


def test_no_position_gives_a_softmax_loss_of_zero() -> None:
    assert softmax_loss(torch.empty(0, 4), torch.randn(5, 4), torch.empty(0, dtype=torch.int64), HEAD, 8).item() == 0


@pytest.mark.parametrize("dtype", ScoreDtype)
def test_zero_item_vectors_give_a_finite_loss_and_gradient(dtype: ScoreDtype) -> None:
    """Reference 9: a zero vector gives NaN in the official code."""
    torch.manual_seed(0)
    users, items = torch.randn(3, 4), torch.randn(5, 4)
    users[0], items[1], items[3] = 0, 0, 0
    users.requires_grad_()
    items.requires_grad_()
    head = SimilarityHead(HeadConfig(learned=True, score_dtype=dtype))
    offered = candidates([1, 2, 3, 4, 5], [1, 2, 3, 4, 5])
    loss, negatives = info_nce_loss(users, items, offered, torch.tensor([1, 2, 5]), head, similarity_threshold=0.99)
    loss.backward()
    assert loss.isfinite()
    assert negatives.item() == 4
    for gradient in (users.grad, items.grad, head.log_scale.grad):
        assert gradient is not None
        assert gradient.isfinite().all()


def test_the_loss_is_of_the_score_dtype(vectors: tuple[Tensor, Tensor]) -> None:
    """Reference 8, Optimisation: float32 loss or bfloat16 loss, by a switch."""
    offered, targets, found = candidates(list(range(1, 8)), list(range(1, 8))), torch.arange(11) % 7 + 1, {}
    for dtype in ScoreDtype:
        head = SimilarityHead(HeadConfig(learned=True, score_dtype=dtype))
        found[dtype], _ = info_nce_loss(*vectors, offered, targets, head, similarity_threshold=0.99)
        assert found[dtype].dtype == getattr(torch, dtype.value)
    exact, rounded = found[ScoreDtype.float32].item(), found[ScoreDtype.bfloat16].item()
    assert rounded != exact
    assert rounded == pytest.approx(exact, rel=0.02)


def test_nce_candidates_are_unique_and_hold_every_target() -> None:
    targets = torch.tensor([5, 5, 9, 2, 9])
    found = nce(num_negatives=200).candidates(targets, num_items=50)
    assert found.ids.tolist() == sorted(set(found.ids.tolist()))
    assert set(targets.tolist()) < set(found.ids.tolist())
    assert found.ids.min() >= 1
    assert found.ids.max() <= 50
    assert found.negative.all()


def test_without_in_batch_only_drawn_items_are_negatives() -> None:
    targets = torch.arange(1, 101)
    torch.manual_seed(0)
    found = nce(num_negatives=30, in_batch=False).candidates(targets, num_items=1000)
    torch.manual_seed(0)
    drawn = torch.randint(1, 1001, (30,))
    assert found.ids[found.negative].tolist() == drawn.unique().tolist()


def test_with_in_batch_alone_the_targets_are_the_negatives() -> None:
    found = nce(num_negatives=0).candidates(torch.tensor([4, 7, 4]), num_items=50)
    assert (found.ids.tolist(), found.negative.tolist()) == ([4, 7], [True, True])


def test_uniform_negatives_reach_every_item() -> None:
    found = nce(num_negatives=5000, in_batch=False).candidates(torch.tensor([1]), num_items=20)
    assert found.ids[found.negative].tolist() == list(range(1, 21))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_losses_are_computed_in_float32(vectors: tuple[Tensor, Tensor], dtype: torch.dtype) -> None:
    users, items = (part.to(dtype) for part in vectors)
    targets = torch.arange(11) % 7
    assert softmax_loss(users, items, targets, HEAD, 4).dtype == torch.float32
    everything = candidates(list(range(1, 8)), list(range(1, 8)))
    with torch.autocast("cpu", torch.bfloat16):
        loss, negatives = info_nce_loss(users, items, everything, targets + 1, HEAD, similarity_threshold=0.99)
    assert loss.dtype == negatives.dtype == torch.float32
    exact, _ = info_nce_loss(users.float(), items.float(), everything, targets + 1, HEAD, similarity_threshold=0.99)
    assert loss.item() == exact.item()


def test_losses_of_zero_vectors_are_finite() -> None:
    users, items = torch.zeros(3, 4, requires_grad=True), torch.zeros(5, 4)
    loss = softmax_loss(users, items, torch.arange(3), HEAD, 100)
    loss.backward()
    assert loss.item() == pytest.approx(math.log(5), abs=1e-5)
    assert users.grad is not None
    assert users.grad.isfinite().all()


def gradients(loss: Tensor, *leaves: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(loss, leaves))


def skewed(num_items: int) -> tuple[Tensor, Tensor]:
    """An item table of width 3, with gradient, and (I + 1,) training counts, item r's in proportion to 1/r."""
    generator = torch.Generator().manual_seed(0)
    counts = torch.cat([torch.zeros(1), 900 / torch.arange(1, num_items + 1)]).long()
    return torch.randn(num_items, 3, generator=generator).requires_grad_(), counts


@pytest.mark.parametrize(
    "changes",
    [
        {"num_negatives": 0},
        {"num_negatives": 0, "distinct": False},
        {"num_negatives": 20},
        {"num_negatives": 20, "distinct": False},
        {"num_negatives": 20, "in_batch": False},
        {"num_negatives": 20, "in_batch": False, "distinct": False},
        {"num_negatives": 20, "in_batch": False, "distinct": False, "per_position": True},
    ],
)
def test_logq_brings_the_gradient_of_a_sample_to_that_of_the_full_softmax(changes: dict[str, Any]) -> None:
    """On average over draws of all targets, which their users are near to, and of uniform negatives."""
    table, counts = skewed(60)
    generator = torch.Generator().manual_seed(1)
    draws = torch.multinomial(counts[1:].double(), 150 * 48, replacement=True, generator=generator) + 1
    far = []
    for logq in (False, True):
        torch.manual_seed(1)
        loss, difference = NCELoss(NCELossConfig("nce", "", **changes, logq=logq), counts), torch.zeros_like(table)
        for targets in draws.view(150, 48):
            candidates, users = loss.candidates(targets, 60), 0.5 * table.detach()[targets - 1]
            sampled, _ = loss(users, table[candidates.ids - 1], candidates, targets, DOT)
            difference += gradients(sampled - softmax_loss(users, table, targets - 1, DOT, 64), table)[0]
        far.append(difference.norm().item())
    assert far[1] < 0.6 * far[0]


@pytest.mark.parametrize("in_batch", [True, False])
def test_with_the_whole_catalogue_as_sample_the_corrected_loss_is_the_full_softmax(in_batch: bool) -> None:
    (table, counts), targets, users = skewed(8), torch.arange(48) % 8 + 1, torch.randn(48, 3, requires_grad=True)
    loss = NCELoss(NCELossConfig("nce", "", num_negatives=500, in_batch=in_batch, logq=True), counts)
    candidates = loss.candidates(targets, 8)
    assert candidates.ids.tolist() == list(range(1, 9))
    found = loss(users, table, candidates, targets, DOT)[0]
    expected = softmax_loss(users, table, targets - 1, DOT, 64)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(gradients(found, users, table), gradients(expected, users, table))


@pytest.mark.parametrize("distinct", [True, False])
def test_logq_by_hand(distinct: bool) -> None:
    """Training counts 6 and 2; three positions and four uniform draws: what each item is expected to count."""
    loss = NCELoss(
        NCELossConfig("nce", "", num_negatives=4, distinct=distinct, logq=True), torch.tensor([0, 6, 2, 0, 0])
    )
    torch.manual_seed(0)
    found = loss.candidates(torch.tensor([1, 1, 2]), num_items=4)
    shares = [{1: 0.75, 2: 0.25}.get(item, 0.0) for item in found.ids.tolist()]
    if distinct:
        expected = [1 - (1 - share) ** 2 * 0.75**4 for share in shares]
    else:
        expected = [2 * share + 1 for share in shares]
    assert found.expected is not None
    assert found.expected.tolist() == pytest.approx(expected)
    counts = torch.ones(len(shares)) if found.counts is None else found.counts
    weights = found.log_weights()
    assert weights is not None
    torch.testing.assert_close(weights, (counts / torch.tensor(expected)).log())


def test_the_positive_is_not_corrected() -> None:
    """It is there with certainty: -log(e^2 / (e^2 + (1/4) e^1)), where the usual mistake divides e^2 too."""
    offered = Candidates(torch.tensor([1, 2]), torch.tensor([True, True]), expected=torch.tensor([0.5, 4.0]))
    loss, _ = info_nce_loss(torch.ones(1, 1), torch.tensor([[2.0], [1.0]]), offered, torch.tensor([1]), DOT)
    assert loss.item() == pytest.approx(-math.log(math.exp(2) / (math.exp(2) + math.exp(1) / 4)), abs=1e-6)


@pytest.mark.parametrize("excluding", [False, True])
@pytest.mark.parametrize("distinct", [True, False])
@pytest.mark.parametrize("in_batch", [True, False])
def test_shared_negatives_have_the_gradients_of_a_plain_cross_entropy(
    monkeypatch: pytest.MonkeyPatch, in_batch: bool, distinct: bool, excluding: bool
) -> None:
    """In several chunks; the (N, M) scores, weights and masks written out."""
    monkeypatch.setattr("hllm.losses.default_chunk_size", lambda *_: 5)
    torch.manual_seed(0)
    targets, users, table = torch.randint(1, 10, (12,)), torch.randn(12, 3), torch.randn(9, 3)
    found = nce(in_batch=in_batch, distinct=distinct, num_negatives=6).candidates(targets, 9)
    excluded = torch.rand(12, len(found.ids)) < 0.3 if excluding else None
    results = []
    for plain in (False, True):
        leaves = users.clone().requires_grad_(), table[found.ids - 1].clone().requires_grad_()
        head = SimilarityHead(HeadConfig(learned=True))
        if plain:
            is_target = found.ids == targets[:, None]
            left_out = ~found.negative if excluded is None else ~found.negative | excluded
            weights = torch.zeros(len(found.ids)) if found.counts is None else found.counts.clamp(min=1).log()
            scores = head(*leaves) + weights * ~is_target
            scores = scores.masked_fill(left_out & ~is_target, float("-inf"))
            value = F.cross_entropy(scores, is_target.long().argmax(1))
        else:
            value, _ = info_nce_loss(*leaves, found, targets, head, excluded)
        value.backward()
        results.append((value, [leaf.grad for leaf in leaves], head.log_scale.grad))
    torch.testing.assert_close(results[0], results[1], atol=1e-6, rtol=1e-5)


def test_own_negatives_are_uniform_over_the_other_items() -> None:
    """Items tell by their scores which were drawn."""
    torch.manual_seed(0)
    num_items = 9
    targets = torch.randint(1, num_items + 1, (1000,))
    head, items = SimilarityHead(HeadConfig(Similarity.dot, 1.0)), torch.arange(num_items).float()[:, None]
    positive, negative = own_scores(torch.ones(1000, 1), items, targets, 8, head)
    assert positive.tolist() == (targets - 1).tolist()
    assert negative.shape == (1000, 8)
    assert not (negative == positive[:, None]).any()
    assert (negative.min().item(), negative.max().item()) == (0, num_items - 1)
    assert negative.mean().item() == pytest.approx((num_items - 1) / 2, rel=0.05)


@pytest.mark.parametrize("num_items", [9, 400])
def test_own_scores_have_the_gradients_of_gathered_vectors(monkeypatch: pytest.MonkeyPatch, num_items: int) -> None:
    """In several parts; an item gradient of 400 items in one, as there are fewer draws."""
    monkeypatch.setattr("hllm.losses.default_chunk_size", lambda *_: 5)
    monkeypatch.setattr("hllm.losses.OWN_DRAWS", 20)
    torch.manual_seed(0)
    targets, weights = torch.randint(1, num_items + 1, (12,)), torch.randn(12, 5)
    users, items = torch.randn(12, 3, requires_grad=True), torch.randn(num_items, 3, requires_grad=True)
    torch.manual_seed(1)
    found = own_scores(users, items, targets, 4, HEAD)
    torch.manual_seed(1)
    rows = torch.randint(num_items - 1, (12, 4))
    rows = torch.cat([targets[:, None] - 1, rows + (rows >= targets[:, None] - 1)], dim=1)
    expected = F.cosine_similarity(users[:, None], items[rows], dim=2) / 0.07
    scores = torch.cat([found[0][:, None], found[1]], dim=1)
    torch.testing.assert_close(scores, expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(
        gradients((scores * weights).sum(), users, items),
        gradients((expected * weights).sum(), users, items),
        atol=1e-4,
        rtol=1e-4,
    )


def test_sampled_softmax_of_own_negatives_by_hand() -> None:
    positive, negative = torch.tensor([math.log(2), 0.0]), torch.tensor([[0.0, math.log(3)], [float("-inf"), 0.0]])
    expected = -(math.log(2 / 6) + math.log(1 / 2)) / 2
    assert own_nce_loss(positive, negative).item() == pytest.approx(expected, abs=1e-6)
    corrected = -(math.log(2 / (2 + 4 * 5)) + math.log(1 / (1 + 5))) / 2
    assert own_nce_loss(positive, negative, math.log(5)).item() == pytest.approx(corrected, abs=1e-6)


def test_own_negatives_of_the_official_id_baselines() -> None:
    """Reference 8, Loss: K of each position, cosine over fix_temp 20."""
    config = compose(["loss=nce_official_ids", "items=id"])
    assert config.head.temperature == 0.05
    assert isinstance(config.loss, NCELossConfig)
    assert config.loss.num_negatives == 512
    torch.manual_seed(0)
    loss, targets = NCELoss(config.loss), torch.tensor([1, 2, 2])
    found = loss.candidates(targets, 50)
    assert found.offered().item() == 512
    value, negatives = loss(torch.zeros(3, 4), torch.randn(50, 4), found, targets, SimilarityHead(config.head))
    assert value.item() == pytest.approx(math.log(513), abs=1e-5)
    assert negatives.item() == 512


OWN = [
    nce(num_negatives=20, in_batch=False, distinct=False, per_position=True),
    BinaryLoss(BinaryLossConfig("bce", "", num_negatives=20)),
]


@pytest.mark.parametrize("loss", OWN)
def test_excluded_items_are_no_negatives_of_a_positions_own(loss: Loss) -> None:
    users, items = torch.randn(2, 4), torch.randn(6, 4, requires_grad=True)
    excluded = torch.tensor([[False, True, True, True, True, True]] * 2)
    targets = torch.tensor([1, 1])
    value, negatives = loss(users, items, loss.candidates(targets, 6), targets, HEAD, excluded)
    assert negatives.item() == 0
    assert not gradients(value, items)[0][1:].any()


@pytest.mark.parametrize("loss", OWN)
def test_losses_with_own_negatives_are_0_without_a_position(loss: Loss) -> None:
    none, users = torch.empty(0, dtype=torch.int64), torch.empty(0, 4, requires_grad=True)
    items = torch.randn(9, 4, requires_grad=True)
    value, negatives = loss(users, items, loss.candidates(none, 9), none, HEAD)
    value.backward()
    assert (value.item(), negatives.item()) == (0, 0)


def test_gbce_equals_its_formula_and_its_gradients() -> None:
    """arXiv 2308.07192: the positive's sigmoid to the power of beta, here literally."""
    torch.manual_seed(0)
    positive, negative = torch.randn(7, requires_grad=True), torch.randn(7, 5, requires_grad=True)
    beta = calibration_beta(num_items=101, num_negatives=5, calibration=0.75)
    alpha = 5 / 100
    assert beta == pytest.approx(alpha * (0.75 * (1 - 1 / alpha) + 1 / alpha))
    found = binary_loss(positive, negative, beta)
    terms = (positive.sigmoid() ** beta).log() + (1 - negative.sigmoid()).log().sum(1)
    expected = -(terms / 6).mean()
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(gradients(found, positive, negative), gradients(expected, positive, negative))


def test_without_calibration_gbce_is_bce_and_with_all_of_it_the_sampling_rate() -> None:
    assert calibration_beta(101, 5, 0) == pytest.approx(1)
    assert calibration_beta(101, 5, 1) == pytest.approx(0.05)
    assert calibration_beta(4, 8, 1) == 1, "no more than all are drawn"
    scores, labels = torch.tensor([[0.5, -1.0], [2.0, 0.3]]), torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    expected = F.binary_cross_entropy_with_logits(scores, labels)
    assert binary_loss(scores[:, 0], scores[:, 1:]).item() == pytest.approx(expected.item(), abs=1e-6)


def test_bce_of_large_scores_is_finite() -> None:
    positive, negative = torch.tensor([-500.0], requires_grad=True), torch.tensor([[500.0]], requires_grad=True)
    loss = binary_loss(positive, negative)
    assert loss.item() == pytest.approx(500)
    assert [gradient.item() for gradient in gradients(loss, positive, negative)] == pytest.approx([-0.5, 0.5])


@pytest.mark.parametrize("block", [7, 2048])
def test_products_in_bfloat16_give_nearly_the_same_gradients(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hllm.losses, "PRODUCT_ROWS", block)
    torch.manual_seed(0)
    users, items = torch.randn(40, 16, requires_grad=True), torch.randn(90, 16, requires_grad=True)
    labels = torch.randint(90, (40,))
    exact, rounded = (
        torch.autograd.grad(softmax_loss(users, items, labels, HEAD, 16, dtype), [users, items])
        for dtype in (torch.float32, torch.bfloat16)
    )
    for one, other in zip(exact, rounded, strict=True):
        assert 0 < (one - other).norm() < 0.01 * one.norm()


@pytest.fixture
def device() -> torch.device:
    """Where Liger's kernel runs: on a GPU, or on a CPU by triton's interpreter, which triton chooses when imported."""
    if importlib.util.find_spec("liger_kernel") is None:
        pytest.skip('the extra is not installed: pip install "hllm[liger]"')
    if torch.cuda.is_available():
        return torch.device("cuda")
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("no GPU; with TRITON_INTERPRET=1 the kernel is interpreted")
    return torch.device("cpu")


@pytest.mark.parametrize("similarity", Similarity)
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("chunk_size", [3, 16, 500])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.02)])
def test_ligers_kernel_equals_ours(
    device: torch.device, similarity: Similarity, frozen: bool, chunk_size: int, dtype: torch.dtype, tolerance: float
) -> None:
    torch.manual_seed(0)
    users, items = torch.randn(50, 16, device=device), torch.randn(900, 16, device=device)
    labels, found = torch.randint(900, (50,), device=device), []
    for loss_of in (softmax_loss, liger_softmax_loss):
        head = SimilarityHead(HeadConfig(similarity, temperature=0.3, learned=True)).to(device)
        leaves = [users.clone().requires_grad_(), items.clone().requires_grad_(not frozen)]
        loss = loss_of(
            leaves[0], leaves[1], labels, head, chunk_size, dtype if loss_of is liger_softmax_loss else torch.float32
        )
        (3 * loss).backward()  # type: ignore[no-untyped-call]
        assert loss.dtype is torch.float32
        assert (leaves[1].grad is None) is frozen
        found.append([loss, leaves[0].grad, head.log_scale.grad, *([] if frozen else [leaves[1].grad])])
    for ours, ligers in zip(*found, strict=True):
        assert (ours - ligers).norm() <= tolerance * ours.norm()


def test_liger_scores_no_more_positions_at_a_time_than_told(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    import liger_kernel.ops.fused_linear_cross_entropy as liger

    kernel, rows = liger.liger_cross_entropy_kernel, []

    class Recorded:
        def __getitem__(self, grid: tuple[int]) -> Callable[..., None]:
            rows.append(grid[0])
            return kernel[grid]  # type: ignore[no-any-return]

    monkeypatch.setattr(liger, "liger_cross_entropy_kernel", Recorded())
    labels = torch.zeros(100, device=device).long()
    liger_softmax_loss(
        torch.randn(100, 4, device=device), torch.randn(3000, 4, device=device), labels, DOT.to(device), 20
    )
    assert rows == [16] * 6 + [4]


def test_no_position_gives_ligers_kernel_a_loss_of_zero() -> None:
    users, items = torch.empty(0, 4, requires_grad=True), torch.randn(5, 4, requires_grad=True)
    loss = liger_softmax_loss(users, items, torch.empty(0, dtype=torch.int64), HEAD, 8)
    loss.backward()  # type: ignore[no-untyped-call]
    assert loss.item() == 0
    assert items.grad is not None
    assert not items.grad.any()


@pytest.mark.parametrize(
    ("installed", "accelerator", "message"),
    [
        (False, "auto", r"needs liger-kernel; pip install hllm\[liger\]$"),
        (True, "cpu", r"needs a CUDA device, .* choose loss\.kernel=chunked$"),
        (True, "auto", r"needs a CUDA device, .* choose loss\.kernel=chunked$"),
    ],
)
def test_a_kernel_that_cannot_run_is_refused_before_training(
    installed: bool, accelerator: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object() if installed else None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: accelerator == "cpu")
    config = compose(["loss=ce", "loss.kernel=liger", f"trainer.accelerator={accelerator}"])
    with pytest.raises(ConfigError, match=rf"^loss\.kernel=liger: {message}"):
        check_kernel(config)
    check_kernel(compose(["loss=ce"]))


def test_the_config_chooses_the_kernel(vectors: tuple[Tensor, Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[Any] = []
    monkeypatch.setattr("hllm.losses.liger_softmax_loss", lambda *args: given.extend(args) or torch.tensor(7.0))
    loss = CrossEntropyLoss(CELossConfig("ce", "", products=ScoreDtype.bfloat16, kernel=LossKernel.liger))
    targets = torch.arange(11) % 7 + 1
    value, negatives = loss(*vectors, loss.candidates(targets, num_items=7), targets, HEAD)
    assert (value.item(), negatives.item()) == (7, 6)
    assert torch.equal(given[2], targets - 1)
    assert given[-1] is torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("items", [1, 30, 3_706, 12_101])
def test_torchs_softmax_may_be_written_over_its_input(items: int, dtype: torch.dtype) -> None:
    """The exact softmax does so on a CPU; torch does not promise it."""
    scores = (5 * torch.randn(65, items, generator=torch.Generator().manual_seed(0))).to(dtype)
    expected = torch.softmax(scores, dim=1)
    assert torch.equal(torch.softmax(scores, dim=1, out=scores), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_frozen_table_changes_neither_loss_nor_the_users_gradient(
    vectors: tuple[Tensor, Tensor], dtype: torch.dtype
) -> None:
    users, items = vectors[0].clone().requires_grad_(), vectors[1]
    labels, found = torch.arange(len(users)) % len(items), []
    for table in (items.clone().requires_grad_(), items):
        loss = softmax_loss(users, table, labels, HEAD, 4, dtype)
        found.append((loss, torch.autograd.grad(loss, users)[0]))
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])


def test_a_second_backward_pass_through_the_exact_softmax_is_refused(vectors: tuple[Tensor, Tensor]) -> None:
    users = vectors[0].clone().requires_grad_()
    loss = softmax_loss(users, vectors[1], torch.zeros(len(users)).long(), HEAD, 4)
    loss.backward(retain_graph=True)  # type: ignore[no-untyped-call]
    with pytest.raises(RuntimeError, match="compute the loss again"):
        loss.backward()  # type: ignore[no-untyped-call]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_loss_far_off_is_told_as_it_is(dtype: torch.dtype) -> None:
    users, items = torch.tensor([[300.0]]), torch.tensor([[1.0], [-1.0]])
    assert softmax_loss(users, items, torch.tensor([1]), DOT, 4, dtype).item() == pytest.approx(600, rel=0.01)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 0.02)])
def test_what_was_seen_is_not_scored_but_for_the_target(dtype: torch.dtype, tolerance: float) -> None:
    torch.manual_seed(0)
    users, items = torch.randn(7, 8, requires_grad=True), torch.randn(20, 8, requires_grad=True)
    labels, seen = torch.randint(20, (7,)), torch.randint(20, (7, 5))
    seen[3, 2] = labels[3]
    scores = HEAD(users, items)
    for row in range(7):
        left_out = [item for item in seen[row].tolist() if item != labels[row]]
        scores = scores.index_put((torch.tensor(row), torch.tensor(left_out)), torch.tensor(float("-inf")))
    expected = torch.nn.functional.cross_entropy(scores, labels)
    found = softmax_loss(users, items, labels, HEAD, 3, dtype, seen)
    assert found.item() == pytest.approx(expected.item(), rel=tolerance)
    gradients = [torch.autograd.grad(loss, [users, items]) for loss in (expected, found)]
    for one, other in zip(*gradients, strict=True):
        assert (one - other).norm() <= tolerance * one.norm()
