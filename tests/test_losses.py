"""Both losses against a few lines of plain arithmetic."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from hllm.config import CELossConfig, HeadConfig, NCELossConfig, Similarity
from hllm.head import SimilarityHead
from hllm.losses import Candidates, CrossEntropyLoss, NCELoss, info_nce_loss, softmax_loss

HEAD = SimilarityHead(HeadConfig(Similarity.cosine, temperature=0.07))
DOT = SimilarityHead(HeadConfig(Similarity.dot, temperature=1.0))


@pytest.fixture
def vectors() -> tuple[Tensor, Tensor]:
    """(11, 4) users and (7, 4) items."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(11, 4, generator=generator), torch.randn(7, 4, generator=generator)


def nce(**changes: object) -> NCELoss:
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
    found = info_nce_loss(
        users, items, candidates([10, 20, 30], [10, 20, 30]), torch.tensor([10, 20, 20]), DOT
    )  # each user's scores are a column of items
    rows = [(1.0, 0.0, 3.0, 1.0), (2.0, 1.0, 0.0, 1.0), (0.0, 1.0, 2.0, 1.0)]
    expected = sum(math.log(sum(map(math.exp, row[:3]))) - row[3] for row in rows) / 3
    assert found.item() == pytest.approx(expected, abs=1e-6)


def test_ce_is_the_softmax_over_the_whole_catalogue(vectors: tuple[Tensor, Tensor]) -> None:
    users, items = vectors
    loss, targets = CrossEntropyLoss(CELossConfig(name="ce", _target_="")), torch.randint(1, 8, (11,))
    found = loss.candidates(targets, num_items=7)
    assert found.ids.tolist() == list(range(1, 8))
    expected = reference_nce(users, dict(enumerate(items, start=1)), set(range(1, 8)), targets.tolist())
    assert loss(users, items, found, targets, HEAD).item() == pytest.approx(expected, abs=1e-5)


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


@pytest.mark.parametrize("in_batch", [True, False])
def test_nce_equals_its_definition(vectors: tuple[Tensor, Tensor], in_batch: bool) -> None:
    users, items = vectors
    ids, targets = [2, 3, 5, 8, 13, 21, 34], [2, 3, 5, 2, 2, 13, 13, 3, 5, 2, 8]
    negatives = set(ids) if in_batch else {2, 21, 34}
    found = info_nce_loss(users, items, candidates(ids, list(negatives)), torch.tensor(targets), HEAD)
    expected = reference_nce(users, dict(zip(ids, items, strict=True)), negatives, targets)
    assert found.item() == pytest.approx(expected, abs=1e-5)


def test_a_target_drawn_as_negative_changes_nothing(vectors: tuple[Tensor, Tensor]) -> None:
    users, items = vectors[0][:4], vectors[1][:3]
    targets = torch.tensor([1, 1, 1, 1])
    apart = info_nce_loss(users, items, candidates([1, 2, 3], [2, 3]), targets, HEAD)
    drawn = info_nce_loss(users, items, candidates([1, 2, 3], [1, 2, 3]), targets, HEAD)
    assert drawn.item() == apart.item()


def test_an_equal_vector_of_another_item_stays_a_negative() -> None:
    """Ids decide, not similarity: the official code's rule would leave no negatives when vectors collapse."""
    items = torch.ones(3, 2)
    loss = info_nce_loss(torch.ones(1, 2), items, candidates([1, 2, 3], [2, 3]), torch.tensor([1]), HEAD)
    assert loss.item() == pytest.approx(math.log(3), abs=1e-5)


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
    assert info_nce_loss(users, items, everything, targets + 1, HEAD).dtype == torch.float32


def test_losses_of_zero_vectors_are_finite() -> None:
    users, items = torch.zeros(3, 4, requires_grad=True), torch.zeros(5, 4)
    loss = softmax_loss(users, items, torch.arange(3), HEAD, 100)
    loss.backward()
    assert loss.item() == pytest.approx(math.log(5), abs=1e-5)
    assert users.grad is not None
    assert users.grad.isfinite().all()
