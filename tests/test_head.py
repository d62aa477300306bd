"""Similarity over a temperature."""

import math

import pytest
import torch
import torch.nn.functional as F

from hllm.config import HeadConfig, Similarity
from hllm.head import SimilarityHead

USERS, ITEMS = torch.tensor([[3.0, 4.0], [0.0, 2.0]]), torch.tensor([[1.0, 0.0], [6.0, 8.0], [0.0, -5.0]])


def test_cosine_by_hand() -> None:
    head = SimilarityHead(HeadConfig(temperature=0.5))
    expected = torch.tensor([[0.6, 1.0, -0.8], [0.0, 0.8, -1.0]]) / 0.5
    torch.testing.assert_close(head(USERS, ITEMS), expected)


def test_dot_product_by_hand() -> None:
    head = SimilarityHead(HeadConfig(Similarity.dot, temperature=2.0))
    expected = torch.tensor([[3.0, 50.0, -20.0], [0.0, 16.0, -10.0]]) / 2
    torch.testing.assert_close(head(USERS, ITEMS), expected)


@pytest.mark.parametrize("similarity", Similarity)
def test_mixed_precision_does_not_round_scores(similarity: Similarity) -> None:
    head = SimilarityHead(HeadConfig(similarity, temperature=0.07))
    with torch.autocast("cpu", torch.bfloat16):
        scores = head(USERS, ITEMS)
    assert torch.equal(scores, head(USERS, ITEMS))


def test_zero_vectors_score_zero_and_have_finite_gradients() -> None:
    users = torch.zeros(2, 3, requires_grad=True)
    scores = SimilarityHead(HeadConfig())(users, torch.zeros(4, 3))
    F.cross_entropy(scores, torch.tensor([0, 1])).backward()
    assert torch.equal(scores, torch.zeros(2, 4))
    assert users.grad is not None
    assert users.grad.isfinite().all()


def test_a_fixed_temperature_is_no_parameter_and_not_in_the_checkpoint() -> None:
    head = SimilarityHead(HeadConfig(temperature=0.07))
    assert not list(head.parameters())
    assert not head.state_dict()
    assert head.scale().item() == pytest.approx(14.2857, abs=1e-4)


def test_a_learned_temperature_gets_a_gradient() -> None:
    head = SimilarityHead(HeadConfig(temperature=0.07, learned=True))
    F.cross_entropy(head(USERS, ITEMS), torch.tensor([0, 0])).backward()
    assert head.log_scale.grad is not None
    assert head.log_scale.grad.item() > 0


@pytest.mark.parametrize(
    ("log_scale", "scale"), [(-1.0, 1.0), (0.5, math.exp(0.5)), (4.6, math.exp(4.6)), (9.0, 100.0)]
)
def test_a_learned_scale_stays_within_1_and_100(log_scale: float, scale: float) -> None:
    head = SimilarityHead(HeadConfig(learned=True))
    head.log_scale.data.fill_(log_scale)
    assert head.scale().item() == pytest.approx(scale, rel=1e-5)


@pytest.mark.parametrize("log_scale", [-1.0, 9.0])
def test_outside_its_range_a_learned_scale_has_no_gradient(log_scale: float) -> None:
    head = SimilarityHead(HeadConfig(learned=True))
    head.log_scale.data.fill_(log_scale)
    head.scale().backward()
    assert head.log_scale.grad is not None
    assert head.log_scale.grad.item() == 0
