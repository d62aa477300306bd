"""What every data set shares: prepared once, cut by the protocol, loaded by any number of workers."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
import torch.distributed as dist

from hllm.config import DatasetConfig, FilterConfig, Protocol, SplitConfig, TrainRows
from hllm.data.base import Counts, EventBatches, RawFiles, RowBatches, RowSampler, SequenceDataModule, event_cuts
from hllm.data.schema import Array64, Batch, Catalog
from hllm.errors import DataError

NUM_USERS, LENGTH = 9, 8
CONFIG = DatasetConfig(name="made", _target_="made", max_history=4, batch_size=3, eval_batch_size=5)


class Made(SequenceDataModule):
    """Users who each do something with items of their own, one a second; ``raw`` says how many users and events."""

    reads = 0

    def find(self, folder: Path) -> RawFiles:
        return RawFiles(folder / "raw", None)

    def read_events(self, files: RawFiles) -> Iterator[pl.DataFrame]:
        type(self).reads += 1
        users, length = map(int, files.interactions.read_text().split())
        events = np.arange(users * length)
        yield pl.DataFrame({"user": events // length, "item": events + 1, "timestamp": events, "rating": events % 5})

    def read_items(self, files: RawFiles, wanted: pl.Series) -> Catalog:
        return Catalog(wanted, {})


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., Made]:
    def module(users: int = NUM_USERS, length: int = LENGTH, **changes: object) -> Made:
        (tmp_path / "raw").write_text(f"{users} {length}")
        return Made(replace(CONFIG, root=str(tmp_path), **changes), tmp_path / "cache")

    return module


@pytest.fixture
def data(make: Callable[..., Made]) -> Made:
    module = make()
    module.setup()
    return module


def targets(loader: Iterable[Batch]) -> list[int]:
    return torch.cat([batch.targets[batch.targets > 0] for batch in loader]).tolist()


def test_an_epoch_trains_each_transition_once(data: Made) -> None:
    expected = [user * LENGTH + event for user in range(NUM_USERS) for event in range(2, LENGTH - 1)]
    assert sorted(targets(data.train_dataloader())) == expected


def test_training_order_follows_the_seed_and_changes_between_epochs(data: Made) -> None:
    loader = data.train_dataloader()
    torch.manual_seed(3)
    first, second = targets(loader), targets(loader)
    torch.manual_seed(3)
    assert targets(data.train_dataloader()) == first
    assert first != second


def test_each_user_is_evaluated_once_in_order(data: Made) -> None:
    ends = [LENGTH * (user + 1) for user in range(NUM_USERS)]
    assert targets(data.val_dataloader()) == [end - 1 for end in ends]
    assert targets(data.test_dataloader()) == ends
    assert [len(batch) for batch in data.test_dataloader()] == [5, 4]


@pytest.mark.parametrize(("loader", "rows"), [("train", "training"), ("val", "evaluation"), ("test", "evaluation")])
def test_a_process_without_a_row_is_refused(
    make: Callable[..., Made], monkeypatch: pytest.MonkeyPatch, loader: str, rows: str
) -> None:
    data = make(users=3)
    data.setup()
    num_rows = len(getattr(data, f"{loader}_dataloader")().dataset)
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_rank", lambda: 0)
    monkeypatch.setattr(dist, "get_world_size", lambda: num_rows)
    assert sum(1 for batch in getattr(data, f"{loader}_dataloader")() for _ in batch.users) == 1
    monkeypatch.setattr(dist, "get_world_size", lambda: num_rows + 1)
    with pytest.raises(
        DataError, match=rf"^made: {num_rows} {rows} rows for {num_rows + 1} processes, .*trainer\.devices"
    ):
        getattr(data, f"{loader}_dataloader")()


def test_only_evaluation_batches_carry_seen_items(data: Made) -> None:
    loaders = data.train_dataloader(), data.test_dataloader()
    assert [next(iter(loader)).seen.shape[1] for loader in loaders] == [0, 5 * (LENGTH - 1)]


def test_loader_workers_give_the_same_batches(data: Made) -> None:
    alone = [list(loader) for loader in (data.test_dataloader(), data.val_dataloader())]
    data.config.num_workers = 2
    for batches, loader in zip(alone, (data.test_dataloader(), data.val_dataloader()), strict=True):
        for expected, found in zip(batches, loader, strict=True):
            assert all(torch.equal(value, asdict(found)[name]) for name, value in asdict(expected).items())


def test_a_second_run_reads_nothing_again_and_has_the_same(make: Callable[..., Made], data: Made) -> None:
    reads = Made.reads
    for changes in ({}, {"protocol": Protocol.temporal}, {"max_history": 2, "split": SplitConfig(seed=4)}):
        again = make(**changes)
        again.setup()
        assert again.fingerprint == data.fingerprint
    assert Made.reads == reads


@pytest.mark.parametrize(
    "changes",
    [
        {"length": 7},
        {"filter": FilterConfig(min_rating=1)},
        {"legacy_sort": True},
        {"protocol": Protocol.leave_one_out_official},
    ],
    ids=["file", "filter", "sort", "numbering"],
)
def test_another_file_or_rule_is_prepared_anew(
    make: Callable[..., Made], data: Made, changes: dict[str, object]
) -> None:
    reads = Made.reads
    make(**changes).setup()
    assert Made.reads == reads + 1


def test_a_user_is_found_by_the_original_id(data: Made) -> None:
    items, times = data.history("1") or ((), ())
    assert data.user_ids(np.array([1, 0])).to_list() == ["1", "0"]
    assert list(items) == list(range(LENGTH + 1, 2 * LENGTH + 1))
    assert list(times) == list(range(LENGTH, 2 * LENGTH))
    assert data.history("x") is None


@pytest.mark.parametrize(
    ("length", "changes", "split", "message"),
    [
        (2, {}, "val", "no user has 3 events, which leave_one_out needs"),
        (2, {}, "test", "no user has 3 events, which leave_one_out needs"),
        (3, {}, "train", "no user has 2 training events, which leave_one_out needs"),
        (1, {"protocol": Protocol.user_split}, "test", "no user has 2 events, which user_split 80/10/10 seed 0 needs"),
        (
            1,
            {"protocol": Protocol.temporal},
            "val",
            "no user has an event after the cut and one before it, which temporal 80/10/10 last needs",
        ),
    ],
)
def test_a_split_without_a_row_is_refused(
    make: Callable[..., Made], length: int, changes: dict[str, object], split: str, message: str
) -> None:
    module = make(length=length, **changes)
    module.setup()
    with pytest.raises(DataError, match=f"made: {message}; give more events, or choose another dataset.protocol"):
        getattr(module, f"{split}_dataloader")()


def test_other_counts_than_published_are_refused(make: Callable[..., Made], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Made, "counts", Counts(interactions=72, users=9, items=70))
    with pytest.raises(DataError, match=r"raw: expected .*items=70\), found .*items=72\).*dataset.check_counts=false"):
        make().setup()
    make(check_counts=False).setup()
    make(filter=FilterConfig(min_rating=1)).setup()


def test_a_batch_moves_to_a_device_with_all_its_parts(data: Made) -> None:
    moved = next(iter(data.test_dataloader())).to("meta")
    assert {tensor.device.type for tensor in vars(moved).values()} == {"meta"}


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("given", [1, 3])
@pytest.mark.parametrize("batch_events", [None, 8])
def test_an_epoch_goes_on_in_another_process(data: Made, workers: int, given: int, batch_events: int | None) -> None:
    data.config.num_workers, data.config.batch_events = workers, batch_events
    loader = data.train_dataloader()
    epoch = iter(loader)
    for _ in range(given):
        next(epoch)
    state = loader.state_dict()
    rest = targets(epoch)
    torch.manual_seed(1)
    drawn = torch.get_rng_state()
    again = data.train_dataloader()
    again.load_state_dict(state)
    assert len(again) == len(loader)
    assert targets(again) == rest
    assert torch.equal(torch.get_rng_state(), drawn)  # training draws what it would have drawn
    assert len(targets(again)) > len(rest)  # the next epoch is whole


@pytest.mark.parametrize("workers", [0, 2])
def test_an_epoch_begins_with_its_first_batch(data: Made, workers: int) -> None:
    data.config.num_workers = workers
    sampler = RowSampler(6, True, 0, 2)  # which is shuffled by the epoch that Lightning tells it
    dataset = data.train_dataloader().dataset
    epoch = iter(data._loader(dataset, RowBatches(sampler, 3)))
    sampler.set_epoch(5)
    assert targets(epoch) == targets([dataset.__getitems__(list(sampler))])


def test_a_process_without_rows_has_an_empty_epoch(data: Made) -> None:
    batches = RowBatches(RowSampler(1, False, 1, 2), 3)
    assert list(data._loader(data.test_dataloader().dataset, batches)) == []


@pytest.mark.parametrize(("num_rows", "num_ranks"), [(10, 1), (10, 3), (9, 3), (2, 3)])
def test_processes_share_the_rows_of_an_epoch(num_rows: int, num_ranks: int) -> None:
    trained, evaluated = (
        [list(RowSampler(num_rows, shuffle, rank, num_ranks)) for rank in range(num_ranks)] for shuffle in (True, False)
    )
    assert len(set(map(len, trained))) == 1  # none waits for another
    rows = [row for own in trained for row in own]
    assert len(set(rows)) == len(rows) == num_rows - num_rows % num_ranks
    assert sorted(row for own in evaluated for row in own) == list(range(num_rows))
    lengths = [len(RowSampler(num_rows, False, rank, num_ranks)) for rank in range(num_ranks)]
    assert lengths == [len(own) for own in evaluated]


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_each_epoch_is_shuffled_anew(num_ranks: int) -> None:
    sampler = RowSampler(50, True, 0, num_ranks)
    epochs = []
    for epoch in range(2):
        sampler.set_epoch(epoch)
        epochs.append(list(sampler))
    assert epochs[0] != epochs[1]


def event_batches(lengths: Array64, batch_events: int, rank: int = 0, num_ranks: int = 1) -> EventBatches:
    return EventBatches(RowSampler(len(lengths), True, rank, num_ranks), lengths, batch_events)


UNEVEN = np.random.default_rng(0).geometric(0.05, 500).clip(1, 100)


@pytest.mark.parametrize("num_ranks", [1, 3])
@pytest.mark.parametrize("batch_events", [1, 30, 400, 10**6])
def test_batches_by_events_have_each_row_once_and_like_many_events(num_ranks: int, batch_events: int) -> None:
    batches = [event_batches(UNEVEN, batch_events, rank, num_ranks) for rank in range(num_ranks)]
    epochs = []
    for epoch in range(2):
        for own in batches:
            own.sampler.set_epoch(epoch)
        every = [list(own) for own in batches]
        assert [len(own) for own in every] == [len(own) for own in batches]
        assert len({len(own) for own in every}) == 1  # none waits for another
        epochs.append(every)
        rows = [row for own in every for batch in own for row in batch]
        assert sorted(rows) == list(range(len(UNEVEN)))
        events = np.array([UNEVEN[batch].sum() for own in every for batch in own])
        assert events.max() <= UNEVEN.sum() / len(events) + UNEVEN.max()
        if batch_events > UNEVEN.max():
            assert events.min() >= UNEVEN.sum() / len(events) - UNEVEN.max()
    assert epochs[0] != epochs[1]


@pytest.mark.parametrize(("batch_events", "steps"), [(100, 5), (99, 6), (500, 1), (501, 1), (10, 10)])
def test_an_epoch_by_events_has_as_few_batches_as_the_events_need(batch_events: int, steps: int) -> None:
    assert len(event_batches(np.full(10, 50), batch_events)) == steps
    assert len(event_batches(np.full(20, 50), batch_events, rank=1, num_ranks=2)) == steps


@pytest.mark.parametrize(
    ("lengths", "num_batches", "cuts"),
    [
        ([7], 1, [0, 1]),
        ([5, 5, 5, 5], 2, [0, 2, 4]),
        ([1, 1, 8, 1, 1], 3, [0, 2, 3, 5]),
        ([9, 1, 1, 1], 4, [0, 1, 2, 3, 4]),
        ([1, 1, 1, 9], 4, [0, 1, 2, 3, 4]),
        ([20, 1, 1, 1, 1], 3, [0, 1, 2, 5]),
        ([1, 1, 1, 30, 1, 1, 1, 1], 4, [0, 3, 4, 5, 8]),
    ],
)
def test_events_are_cut_at_the_nearest_row_and_no_batch_is_empty(
    lengths: list[int], num_batches: int, cuts: list[int]
) -> None:
    assert event_cuts(np.array(lengths, np.int32), num_batches).tolist() == cuts


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("kind", [TrainRows.windows, TrainRows.prefixes])
def test_a_data_sets_batches_by_events_train_all_it_has(
    make: Callable[..., Made], workers: int, kind: TrainRows
) -> None:
    by_rows, by_events = (make(train_rows=kind, num_workers=workers, batch_events=events) for events in (None, 9))
    for data in (by_rows, by_events):
        data.setup()
    loader = by_events.train_dataloader()
    batches = list(loader)
    assert sorted(targets(batches)) == sorted(targets(by_rows.train_dataloader()))
    events = [int(batch.mask.sum()) for batch in batches]
    assert len(loader) == len(events) == -(-sum(events) // 9)
    assert all(abs(found - sum(events) / len(events)) <= 4 for found in events)
