"""Similarity over a temperature."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from hllm.config import HeadConfig, ScoreDtype, Similarity
from hllm.head import SimilarityHead
from hllm.metrics import RankingMetrics, target_ranks

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


def gradient(log_scale: float, sign: int) -> float:
    """Of ``sign`` times the scale, with respect to its logarithm."""
    head = SimilarityHead(HeadConfig(learned=True))
    head.log_scale.data.fill_(log_scale)
    (sign * head.scale()).backward()
    assert head.log_scale.grad is not None
    return head.log_scale.grad.item()


@pytest.mark.parametrize(("log_scale", "outward"), [(-1.0, 1), (9.0, -1)])
def test_outside_its_range_a_learned_scale_has_a_gradient_only_back(log_scale: float, outward: int) -> None:
    assert gradient(log_scale, outward) == 0
    assert gradient(log_scale, -outward) == pytest.approx(-outward * min(max(math.exp(log_scale), 1), 100), rel=1e-5)


@pytest.mark.parametrize("log_scale", [0.0, math.log(100)])
@pytest.mark.parametrize("sign", [-1, 1])
def test_at_the_edge_of_its_range_a_learned_scale_has_a_gradient(log_scale: float, sign: int) -> None:
    """Reference 8, Loss: the official in-place clamp leaves a gradient at the boundary; so does ours."""
    assert gradient(log_scale, sign) == pytest.approx(sign * math.exp(log_scale), rel=1e-5)


def test_a_learned_scale_that_was_pushed_out_of_its_range_stays_near_and_comes_back() -> None:
    head = SimilarityHead(HeadConfig(temperature=0.0101, learned=True))
    optimizer = torch.optim.AdamW(head.parameters(), lr=0.01)
    for sign, steps in ((-1, 100), (1, 40)):
        for _ in range(steps):
            optimizer.zero_grad()
            (sign * head.scale()).backward()
            optimizer.step()
        if sign == -1:
            assert head.scale().item() == pytest.approx(100)
            assert head.log_scale.item() < math.log(100) + 0.1
    assert head.scale().item() < 99


def test_a_learned_scale_starts_at_the_official_one() -> None:
    """Reference 8, Loss: exp of the initial log-scale is 14.2857."""
    head = SimilarityHead(HeadConfig(temperature=0.07, learned=True))
    assert head.log_scale.item() == pytest.approx(2.65926, abs=1e-5)
    assert head.scale().item() == pytest.approx(14.2857, abs=1e-4)


@pytest.mark.parametrize("learned", [False, True])
def test_cast_to_bfloat16_the_scale_stays_exact(learned: bool) -> None:
    head = SimilarityHead(HeadConfig(temperature=0.07, learned=learned)).to(torch.bfloat16)
    assert head.log_scale.dtype == torch.float32
    assert head.scale().item() == pytest.approx(1 / 0.07, rel=1e-6)
    assert head.to("meta").log_scale.device.type == "meta"
    assert isinstance(head.log_scale, nn.Parameter) is learned


@pytest.mark.parametrize("similarity", Similarity)
@pytest.mark.parametrize("dtype", ScoreDtype)
def test_a_table_made_once_gives_the_same_scores_to_the_last_bit(similarity: Similarity, dtype: ScoreDtype) -> None:
    head = SimilarityHead(HeadConfig(similarity, temperature=0.07, score_dtype=dtype))
    torch.manual_seed(0)
    users, items = torch.randn(7, 16), torch.randn(50, 16)
    with torch.autocast("cpu", torch.bfloat16):
        table = head.table(items)
        scores = head.score(users, table)
    assert torch.equal(scores, head(users, items))


@pytest.mark.parametrize("dtype", ScoreDtype)
def test_scores_are_of_the_score_dtype(dtype: ScoreDtype) -> None:
    """Reference 8, Optimisation: float32 scores or bfloat16 ones, by a switch; autocast changes neither."""
    head = SimilarityHead(HeadConfig(score_dtype=dtype))
    with torch.autocast("cpu", torch.bfloat16):
        scores = head(USERS.bfloat16(), ITEMS)
    assert scores.dtype == getattr(torch, dtype.value)
    exact = SimilarityHead(HeadConfig())(USERS, ITEMS)
    torch.testing.assert_close(scores.float(), exact, atol=0.1, rtol=0.01)
    assert torch.equal(scores.float(), exact) is (dtype is ScoreDtype.float32)


def test_bfloat16_scores_tie_and_the_metrics_say_so() -> None:
    """Reference 1.10: the official scores are bfloat16, so many items share the target's."""
    torch.manual_seed(0)
    users, items, targets = torch.randn(200, 16), torch.randn(500, 16), torch.randint(1, 501, (200,))
    ties = {}
    for dtype in ScoreDtype:
        metrics = RankingMetrics([10], [1])
        scores = SimilarityHead(HeadConfig(score_dtype=dtype))(users, items)
        metrics.update(*target_ranks(scores, targets, torch.empty(2, 0, dtype=torch.int64)), torch.ones(200))
        ties[dtype] = metrics.compute()["all"]["ties"]
    assert ties[ScoreDtype.float32] < 0.02
    assert ties[ScoreDtype.bfloat16] > 0.3
