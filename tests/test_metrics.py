"""Ranking metrics against sorting, and across groups, halves and processes."""

import math
from pathlib import Path

import pytest
import torch
import torch.multiprocessing
from torch import Tensor

import hllm.metrics
from hllm.metrics import Coverage, RankingMetrics, group_labels, target_ranks

KS, EDGES = [1, 3, 10], [1, 4]
Results = dict[str, dict[str, float]]
NOTHING = torch.empty(2, 0, dtype=torch.int64)


@pytest.fixture
def case() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Scores with many ties, targets, histories and training counts of 40 users and 25 items."""
    generator = torch.Generator().manual_seed(0)
    scores = torch.randint(0, 12, (40, 25), generator=generator).float()
    targets = torch.randint(1, 26, (40,), generator=generator)
    rows = torch.randint(0, 40, (200,), generator=generator)
    seen = torch.stack([rows, torch.randint(1, 26, (200,), generator=generator)])
    return scores, targets, seen, torch.randint(0, 8, (40,), generator=generator)


def brute_force_rank(scores: Tensor, target: int, history: set[int]) -> float:
    """Mean place of the target over the first and the last place that sorting could give it."""
    rivals = [s for item, s in enumerate(scores.tolist(), start=1) if item != target and item not in history]
    own = scores[target - 1].item()
    best = sorted([*rivals, own], reverse=True).index(own)
    worst = len(rivals) - sorted([*rivals, own]).index(own)
    return (best + worst) / 2


def expected_metrics(ranks: list[float]) -> dict[str, float]:
    total: dict[str, float] = {}
    for k in KS:
        total[f"hr@{k}"] = sum(rank < k for rank in ranks) / len(ranks)
        total[f"ndcg@{k}"] = sum(1 / math.log2(rank + 2) for rank in ranks if rank < k) / len(ranks)
    return total | {"mrr": sum(1 / (rank + 1) for rank in ranks) / len(ranks)}


def filled(case: tuple[Tensor, Tensor, Tensor, Tensor], users: slice = slice(None)) -> RankingMetrics:
    scores, targets, seen, counts = case
    ranks, ties = target_ranks(scores, targets, seen)
    metrics = RankingMetrics(KS, EDGES)
    metrics.update(ranks[users], ties[users], counts[users])
    return metrics


def assert_close(found: Results, expected: Results) -> None:
    """Equal but for the order of float64 sums."""
    assert list(found) == list(expected)
    for group, values in expected.items():
        assert found[group] == pytest.approx(values, rel=1e-13), group


def histories(seen: Tensor, users: int) -> list[set[int]]:
    return [set(seen[1, seen[0] == user].tolist()) for user in range(users)]


@pytest.mark.parametrize("at_once", [1, 3 * 25, 2**19])
def test_ranks_equal_sorting_with_ties_and_history(
    case: tuple[Tensor, Tensor, Tensor, Tensor], at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hllm.metrics, "CACHED_SCORES", at_once)
    scores, targets, seen, _ = case
    ranks, ties = target_ranks(scores, targets, seen)
    expected = [
        brute_force_rank(row, int(target), history)
        for row, target, history in zip(scores, targets, histories(seen, 40), strict=True)
    ]
    assert ranks.tolist() == expected
    assert (ties > 0).any()
    assert any(int(target) in history for target, history in zip(targets, histories(seen, 40), strict=True))


def test_metrics_equal_their_definition(case: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
    ranks, _ = target_ranks(*case[:3])
    found = filled(case).compute()["all"]
    assert found["users"] == 40
    for name, value in expected_metrics(ranks.tolist()).items():
        assert found[name] == pytest.approx(value, abs=1e-12), name


def test_a_target_ranked_third_by_hand() -> None:
    metrics = RankingMetrics([2, 3], [1])
    metrics.update(*target_ranks(torch.tensor([[9.0, 8.0, 7.0, 1.0]]), torch.tensor([3]), NOTHING), torch.tensor([5]))
    assert metrics.compute()["all"] == {
        "users": 1, "hr@2": 0, "ndcg@2": 0, "hr@3": 1, "ndcg@3": 0.5, "mrr": pytest.approx(1 / 3), "ties": 0,
    }  # fmt: skip


def test_items_that_score_alike_share_their_places() -> None:
    ranks, ties = target_ranks(torch.ones(1, 5), torch.tensor([2]), NOTHING)
    assert (ranks.item(), ties.item()) == (2.0, 4)


def test_history_does_not_take_places() -> None:
    scores, target = torch.tensor([[3.0, 2.0, 1.0]]), torch.tensor([3])
    assert target_ranks(scores, target, NOTHING)[0].item() == 2
    assert target_ranks(scores, target, torch.tensor([[0, 0], [1, 2]]))[0].item() == 0


def test_a_target_in_its_own_history_is_ranked_against_unseen_items() -> None:
    scores, seen = torch.tensor([[3.0, 2.0, 1.0, 0.0]]), torch.tensor([[0, 0], [1, 3]])
    assert target_ranks(scores, torch.tensor([3]), seen)[0].item() == 1


def test_history_of_one_user_hides_nothing_from_another() -> None:
    scores = torch.tensor([[2.0, 1.0], [2.0, 1.0]])
    assert target_ranks(scores, torch.tensor([2, 2]), torch.tensor([[1], [1]]))[0].tolist() == [1, 0]


def test_ranking_leaves_the_scores_as_they_were(case: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
    scores = case[0].clone()
    target_ranks(scores, *case[1:3])
    assert torch.equal(scores, case[0])


def test_nan_scores_are_refused() -> None:
    with pytest.raises(FloatingPointError, match="training diverged"):
        target_ranks(torch.tensor([[1.0, float("nan")]]), torch.tensor([1]), NOTHING)


def test_groups_by_training_frequency_add_up_to_all(case: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
    found = filled(case).compute()
    counts = case[3]
    sizes = {"0": counts < 1, "1-3": (counts >= 1) & (counts < 4), "4+": counts >= 4}
    assert list(found) == ["all", *sizes]
    assert {group: found[group]["users"] for group in sizes} == {g: int(m.sum()) for g, m in sizes.items()}
    for name in ("hr@3", "ndcg@10", "mrr"):
        total = sum(found[group][name] * found[group]["users"] for group in sizes)
        assert total / 40 == pytest.approx(found["all"][name], abs=1e-12)


def test_targets_held_out_of_training_are_a_group_of_their_own(case: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
    ranks, ties = target_ranks(*case[:3])
    counts, cold = torch.arange(40) % 3, torch.arange(40) % 6 == 0  # half of those that were never seen
    metrics = RankingMetrics(KS, [1, 4], cold=True)
    metrics.update(ranks, ties, counts, cold=cold)
    found = metrics.compute()
    members = {"cold": cold, "0": (counts == 0) & ~cold, "1-3": counts > 0}
    assert list(found) == ["all", *members]
    for group, chosen in members.items():
        assert found[group]["users"] == chosen.sum()
        assert found[group]["mrr"] == pytest.approx((1 / (ranks[chosen] + 1)).double().mean().item(), rel=1e-6)
    assert found["all"]["users"] == 40


def test_groups_without_users_are_left_out(case: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
    scores, targets, seen, _ = case
    assert list(filled((scores, targets, seen, torch.full((40,), 2))).compute()) == ["all", "1-3"]


def test_groups_are_named_by_their_bounds() -> None:
    assert group_labels([1, 2, 10, 50]) == ["0", "1", "2-9", "10-49", "50+"]


def test_groups_by_history_length_stand_beside_those_by_training_frequency(
    case: tuple[Tensor, Tensor, Tensor, Tensor],
) -> None:
    ranks, ties = target_ranks(*case[:3])
    lengths = torch.arange(40) % 7 + 1
    metrics = RankingMetrics(KS, EDGES, [2, 5])
    metrics.update(ranks, ties, case[3], lengths)
    found, without = metrics.compute(), filled(case).compute()
    assert list(found) == [*without, "history 1", "history 2-4", "history 5+"]
    assert_close({group: found[group] for group in without}, without)
    chosen = (lengths >= 2) & (lengths < 5)
    assert found["history 2-4"]["users"] == chosen.sum()
    for name, value in expected_metrics(ranks[chosen].tolist()).items():
        assert found["history 2-4"][name] == pytest.approx(value, abs=1e-12), name


def test_coverage_counts_items_in_anyones_list(case: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
    scores = torch.rand(40, 25, generator=torch.Generator().manual_seed(1)) * torch.linspace(0.2, 1, 25)
    coverage = Coverage([1, 3], 25)
    for rows in torch.arange(40).split(7):
        inside = torch.isin(case[2][0], rows)
        coverage.update(scores[rows], case[2][:, inside] - torch.tensor([[int(rows[0])], [0]]))
    for k in (1, 3):
        shown = set()
        for row, history in zip(scores.tolist(), histories(case[2], 40), strict=True):
            unseen = [item for item in range(1, 26) if item not in history]
            shown |= set(sorted(unseen, key=lambda item: -row[item - 1])[:k])
        assert coverage.compute()[f"coverage@{k}"] == len(shown) / 25
    assert 0 < coverage.compute()["coverage@1"] < coverage.compute()["coverage@3"] < 1


def test_what_is_seen_or_unknown_is_shown_to_nobody() -> None:
    coverage = Coverage([3], 4)
    unknown = torch.finfo(torch.float32).min
    coverage.update(torch.tensor([[2.0, 3.0, unknown, 1.0]]), torch.tensor([[0], [2]]))
    assert coverage.compute() == {"coverage@3": 0.5}


def test_ties_are_the_share_of_users_with_one() -> None:
    metrics = RankingMetrics([1], [1])
    metrics.update(torch.tensor([0.5, 1.0, 2.0, 0.0]), torch.tensor([1, 2, 0, 0]), torch.zeros(4, dtype=torch.int64))
    assert metrics.compute()["all"]["ties"] == 0.5


def test_batches_give_what_one_batch_gives(case: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
    ranks, ties = target_ranks(*case[:3])
    metrics = RankingMetrics(KS, EDGES)
    for users in torch.arange(40).split(7):
        metrics.update(ranks[users], ties[users], case[3][users])
    whole = filled(case).compute()
    for group, values in metrics.compute().items():
        assert values == pytest.approx(whole[group], abs=1e-12)


def test_after_a_reset_nothing_is_left(case: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
    metrics = filled(case)
    metrics.reset()
    metrics.update(torch.tensor([0.0]), torch.tensor([0]), torch.tensor([0]))
    assert metrics.compute()["all"] == {"users": 1, **dict.fromkeys(metrics.names, 1.0), "ties": 0}


def test_merged_halves_equal_the_whole(case: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
    half = filled(case, slice(0, 13))
    half.merge_state(filled(case, slice(13, None)))
    assert_close(half.compute(), filled(case).compute())


def covered(users: slice = slice(None)) -> Coverage:
    """Each of 40 users is shown two items of 100, some of them another's."""
    coverage = Coverage([1, 2], 100)
    coverage.update(torch.rand(40, 100, generator=torch.Generator().manual_seed(2))[users], NOTHING)
    return coverage


def _rank_of_two(rank: int, file: str, case: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
    torch.distributed.init_process_group("gloo", f"file://{file}", rank=rank, world_size=2)
    users = slice(0, 13) if rank == 0 else slice(13, None)
    torch.save((filled(case, users).compute(), covered(users).compute()), f"{file}.{rank}")
    torch.distributed.destroy_process_group()


def test_two_processes_each_report_the_whole(case: tuple[Tensor, Tensor, Tensor, Tensor], tmp_path: Path) -> None:
    file = str(tmp_path / "store")
    torch.multiprocessing.spawn(_rank_of_two, (file, case), nprocs=2)
    for rank in range(2):
        metrics, coverage = torch.load(f"{file}.{rank}")
        assert_close(metrics, filled(case).compute())
        assert coverage == covered().compute() != covered(slice(0, 13)).compute()


def test_ranks_are_exact_under_a_coarse_default_dtype() -> None:
    """As in an evaluation step under bf16-true, whose numbers above 256 are even."""
    scores = torch.arange(1000.0)[None].clone()
    scores[0, 0] = 698.0  # ties with the target
    torch.set_default_dtype(torch.bfloat16)
    try:
        ranks, ties = target_ranks(scores, torch.tensor([699]), torch.empty(2, 0, dtype=torch.int64))
    finally:
        torch.set_default_dtype(torch.float32)
    assert (ranks.tolist(), ties.tolist()) == ([301.5], [1])
