"""Cold items: training knows nothing of them, and test ranks them as it would without the protocol."""

from collections.abc import Callable
from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from hllm.build import build_datamodule, build_module
from hllm.config import Config, compose
from hllm.data.base import SequenceDataModule
from hllm.data.cold import draw_cold
from hllm.data.schema import Batch
from hllm.errors import ConfigError

SHARE, NUM_ITEMS, HISTORY = 0.4, 30, 4


def module(run_config: Callable[..., Config], *overrides: str) -> SequenceDataModule:
    data = build_datamodule(run_config("items=id", f"dataset.max_history={HISTORY}", *overrides))
    assert isinstance(data, SequenceDataModule)
    return data


@pytest.fixture
def data(run_config: Callable[..., Config]) -> SequenceDataModule:
    return module(run_config, f"dataset.cold_items={SHARE}")


@pytest.fixture
def cold() -> set[int]:
    return set(np.flatnonzero(draw_cold(NUM_ITEMS, SHARE, 0)).tolist())


def events(data: SequenceDataModule, user: int) -> list[tuple[int, int]]:
    """Item and time of everything a user did."""
    own = slice(*data.interactions.offsets[user : user + 2])
    return list(zip(data.interactions.items[own].tolist(), data.interactions.timestamps[own].tolist(), strict=True))


def rows(batch: Batch) -> list[tuple[int, list[tuple[int, int]], tuple[int, int], set[int]]]:
    """User, history read, target, and what is left out of the ranking."""
    found = []
    for row, user in enumerate(batch.users.tolist()):
        own = batch.mask[row]
        history = list(zip(batch.items[row][own].tolist(), batch.timestamps[row][own].tolist(), strict=True))
        last = len(history) - 1
        assert batch.targets[row].count_nonzero() == 1
        target = batch.targets[row, last].item(), batch.target_times[row, last].item()
        found.append((user, history, target, set(batch.seen[1, batch.seen[0] == row].tolist())))
    return found


def test_a_share_of_the_items_is_drawn_by_the_seed_alone() -> None:
    cold = draw_cold(1000, 0.1, 3)
    assert (len(cold), cold.sum(), cold[0]) == (1001, 100, False)
    assert (cold == draw_cold(1000, 0.1, 3)).all()
    assert (cold != draw_cold(1000, 0.1, 4)).any()


@pytest.mark.parametrize(("share", "count"), [(0.01, 0), (0.99, 30)])
def test_a_share_that_rounds_to_no_item_or_all_is_refused(share: float, count: int) -> None:
    with pytest.raises(ConfigError, match=rf"^dataset\.cold_items={share}: rounds to {count} of 30 items"):
        draw_cold(NUM_ITEMS, share, 0)


@pytest.mark.parametrize("kind", ["windows", "prefixes"])
def test_no_training_row_reads_or_predicts_a_cold_item(
    kind: str, run_config: Callable[..., Config], cold: set[int]
) -> None:
    data = module(run_config, f"dataset.cold_items={SHARE}", f"dataset.train_rows={kind}")
    trained, expected = set(), set()
    for batch in data.train_dataloader():
        for row, user in enumerate(batch.users.tolist()):
            read = batch.items[row][batch.mask[row]].tolist()
            followed = batch.targets[row][batch.mask[row]].tolist()
            trained |= {(user, *pair) for pair in zip(read, followed, strict=True) if pair[1]}
    for user in range(data.num_users):
        warm = [item for item, _ in events(data, user)[:-2] if item not in cold]
        expected |= {(user, *pair) for pair in pairwise(warm)}  # the sequence closes up
    assert trained == expected


def test_items_count_in_training_unless_they_are_cold(data: SequenceDataModule, cold: set[int]) -> None:
    counts = [0] * (NUM_ITEMS + 1)
    for user in range(data.num_users):
        for item, _ in events(data, user)[:-2]:
            counts[item] += item not in cold
    assert data.train_counts.tolist() == counts


@pytest.mark.parametrize("loss", [["loss=ce"], ["loss=nce", "loss.num_negatives=200"]])
def test_no_loss_knows_cold_items_even_as_negatives(
    loss: list[str], run_config: Callable[..., Config], cold: set[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = run_config("items=id", "user.dropout=0.0", f"dataset.cold_items={SHARE}", *loss)
    data = build_datamodule(config)
    module = build_module(config, data)
    monkeypatch.setattr(module, "log", lambda *args, **kwargs: None)
    batch = next(iter(data.train_dataloader()))
    found = module.training_step(batch, 0)
    found.backward()
    moved = module.items.table.weight.grad.abs().sum(1) > 0
    assert set(moved.nonzero().flatten().tolist()) == set(range(1, NUM_ITEMS + 1)) - cold
    warm = torch.tensor(sorted(set(range(1, NUM_ITEMS + 1)) - cold))
    table = module.items.all()
    supervised = batch.targets > 0
    users = module(batch, torch.arange(1, NUM_ITEMS + 1), table)[batch.supervised]
    labels = torch.searchsorted(warm, batch.targets[supervised])
    # so many negatives are drawn that nce has each of these too
    scores = module.head.score(users, module.head.table(table[warm - 1]))
    assert found.item() == pytest.approx(F.cross_entropy(scores, labels).item())


@pytest.mark.parametrize("part", ["validation", "test"])
def test_histories_leave_cold_items_out_and_rank_the_same_target(
    part: str, data: SequenceDataModule, cold: set[int]
) -> None:
    expected = []
    for user in range(data.num_users):
        own = events(data, user)
        place = len(own) - (1 if part == "test" else 2)
        warm = [event for event in own[:place] if event[0] not in cold]
        if warm and (part == "test" or own[place][0] not in cold):
            expected.append((user, warm[-HISTORY:], own[place], {item for item, _ in own[:place]}))
    loader = data.test_dataloader() if part == "test" else data.val_dataloader()
    found = [row for batch in loader for row in rows(batch)]
    assert found == expected
    targets = {target for _, _, (target, _), _ in found}
    assert bool(targets & cold) == (part == "test")


def test_without_cold_items_nothing_changes(run_config: Callable[..., Config]) -> None:
    data = module(run_config)
    assert data.events is data.interactions
    assert data.splits.test.targets is None
    assert data.config.protocol_name == "leave_one_out"


def test_the_protocols_name_carries_share_and_seed(data: SequenceDataModule) -> None:
    assert data.config.protocol_name == "leave_one_out cold 40% seed 0"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["dataset.cold_items=1"], r"dataset\.cold_items=1.0: must be at least 0 and below 1"),
        (["dataset=sharded", "dataset.root=x", "dataset.cold_items=.1"], r"dataset\.cold_items=0.1: dataset=sharded"),
    ],
)
def test_shares_that_cannot_be_are_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        compose(overrides)
