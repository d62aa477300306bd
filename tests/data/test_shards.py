"""Data sets in Parquet shards: the same rows as in one piece, each once over any number of processes."""

import contextlib
import json
import multiprocessing
import os
import re
import socket
import subprocess
import sys
import time
import tracemalloc
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from conftest import Run
from torch.utils.data import DataLoader

from hllm import evaluate, shard
from hllm.build import build_datamodule, build_module, build_trainer
from hllm.cli import quiet_libraries
from hllm.config import Config, Protocol, ShardedConfig, TrainRows, compose
from hllm.data.base import DataModule, SequenceDataModule
from hllm.data.schema import Batch, Catalog, Interactions
from hllm.data.sharded import ShardedData, ShardSampler
from hllm.data.shards import ShardFolder, read_shard, write_shards
from hllm.errors import CacheError, ConfigError, DataError
from hllm.evaluate import load_checkpoint

CONFIG = ShardedConfig(name="sharded", _target_="", max_history=4, batch_size=3, eval_batch_size=5)
NUM_SHARDS = 3

Row = tuple[Any, ...]


@pytest.fixture(scope="module")
def plain(run_config: Callable[..., Config]) -> SequenceDataModule:
    """The same data in one piece: 40 users with 5 to 14 events each."""
    data = build_datamodule(run_config("items=id"))
    assert isinstance(data, SequenceDataModule)
    return data


@pytest.fixture
def folder(plain: SequenceDataModule, tmp_path: Path) -> Path:
    write_shards(plain.interactions, plain.catalog, tmp_path / "shards", NUM_SHARDS, {"dataset": "made"})
    return tmp_path / "shards"


@pytest.fixture
def odd_folder(plain: SequenceDataModule, tmp_path: Path) -> Path:
    """All users but one: 79 training rows, which two processes cannot share evenly."""
    all_of = plain.interactions
    end = all_of.offsets[-2]
    data = Interactions(all_of.items[:end], all_of.timestamps[:end], all_of.offsets[:-1], all_of.users[:-1])
    write_shards(data, plain.catalog, tmp_path / "shards", NUM_SHARDS, {})
    return tmp_path / "shards"


def opened(folder: Path, **changes: Any) -> ShardedData:
    data = ShardedData(replace(CONFIG, root=str(folder), **changes), folder.parent / "cache")
    data.setup()
    return data


def in_one_piece(plain: SequenceDataModule, **changes: Any) -> SequenceDataModule:
    """``plain`` under the small windows and batches of ``CONFIG``."""
    config = replace(plain.config, max_history=4, batch_size=3, eval_batch_size=5, **changes)
    data = type(plain)(config, plain.cache_dir)
    data.setup()
    return data


def rows(data: DataModule, loader: DataLoader[Batch]) -> Counter[Row]:
    """Every row of a loader: original user id, history, times, targets and what is left out of the ranking."""
    found: Counter[Row] = Counter()
    for batch in loader:
        users = data.user_ids(batch.users.numpy())
        for n in range(len(batch)):
            kept = batch.mask[n]
            seen = batch.seen[1, batch.seen[0] == n]
            values = (batch.items[n][kept], batch.timestamps[n][kept], batch.targets[n][kept], seen)
            found[(users[n], *(tuple(value.tolist()) for value in values))] += 1
            assert not batch.items[n][~kept].any()
            assert not batch.targets[n][~kept].any()
    return found


def transitions(found: Counter[Row]) -> Counter[Row]:
    """User, target and the number of it among the user's events, which the history's times tell."""
    return Counter(
        (user, time, target)
        for user, _, times, targets, _ in found.elements()
        for time, target in zip(times, targets, strict=True)
        if target
    )


PLAIN = (TrainRows.windows, TrainRows.prefixes, TrainRows.latest)
LEAVE_ONE_OUT = [(Protocol.leave_one_out, kind) for kind in PLAIN]
OFFICIAL = [(Protocol.leave_one_out_official, TrainRows.chunks), (Protocol.leave_one_out_official, TrainRows.latest)]


@pytest.mark.parametrize(("protocol", "kind"), [*LEAVE_ONE_OUT, *OFFICIAL], ids=str)
def test_shards_give_the_same_training_and_evaluation_rows(
    plain: SequenceDataModule, tmp_path: Path, protocol: Protocol, kind: TrainRows
) -> None:
    one = in_one_piece(plain, protocol=protocol, train_rows=kind)
    write_shards(one.interactions, one.catalog, tmp_path / "shards", NUM_SHARDS, {})
    data = opened(tmp_path / "shards", protocol=protocol, train_rows=kind)
    for name in ("train_dataloader", "val_dataloader", "test_dataloader"):
        loader, expected = getattr(data, name)(), getattr(one, name)()
        assert rows(data, loader) == rows(one, expected)
        assert len(loader) == len(expected) == len(list(loader))


def test_shards_tell_the_same_about_items_and_users(plain: SequenceDataModule, folder: Path) -> None:
    data = opened(folder)
    assert data.train_counts.tolist() == plain.train_counts.tolist()
    assert data.catalog.ids.to_list() == plain.catalog.ids.to_list()
    assert {name: values.to_list() for name, values in data.catalog.fields.items()} == {
        name: values.to_list() for name, values in plain.catalog.fields.items()
    }
    assert (data.num_users, data.num_items) == (plain.num_users, plain.num_items)
    numbers = np.random.default_rng(0).permutation(data.num_users)
    assert sorted(data.user_ids(numbers)) == sorted(plain.interactions.users)
    for user in ("1", "40"):
        found, expected = data.history(user), plain.history(user)
        assert found is not None
        assert expected is not None
        assert [array.tolist() for array in found] == [array.tolist() for array in expected]
    assert data.history("41") is None
    assert data.newest_time() == plain.newest_time() > 0


def test_ids_of_many_users_take_no_python_objects(folder: Path) -> None:
    data = opened(folder)
    numbers = np.tile(np.arange(data.num_users), 1000)
    tracemalloc.start()
    try:
        ids = data.user_ids(numbers)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert ids.to_list() == data.user_ids(np.arange(data.num_users)).to_list() * 1000
    assert data.user_ids(numbers[:0]).to_list() == []
    assert peak < 64 * len(numbers)


def test_user_numbers_lead_to_the_users_own_ids(folder: Path) -> None:
    data = opened(folder)
    for batch in data.test_dataloader():
        for user, row, history in zip(batch.users, data.user_ids(batch.users.numpy()), batch.items, strict=True):
            events = data.history(row)
            assert events is not None
            assert history[history > 0].tolist() == events[0][-5:-1].tolist()
            assert 0 <= user < data.num_users


def test_a_checkpoint_ranks_every_user_as_it_does_in_one_piece(
    id_run: Run, plain: SequenceDataModule, folder: Path, tmp_path: Path
) -> None:
    quiet_libraries()

    def ranks(data: DataModule) -> tuple[Counter[Row], dict[str, Any]]:
        module = build_module(id_run.config, data)
        module.load_state_dict(load_checkpoint(id_run.best)["state_dict"])
        with warnings.catch_warnings():
            trainer = build_trainer(id_run.config, tmp_path, [], [])
            trainer.test(module, data, verbose=False)
        columns = (torch.cat(column) for column in zip(*module.test_ranks, strict=True))
        users, targets, places, _ = columns
        return Counter(
            zip(data.user_ids(users.numpy()), targets.tolist(), places.tolist(), strict=True)
        ), module.results

    own = replace(id_run.config.dataset, root=str(folder), name="sharded")
    changes = {name: getattr(own, name) for name in ("max_history", "batch_size", "eval_batch_size")}
    found, results = ranks(opened(folder, **changes))
    expected, expected_results = ranks(plain)
    assert found == expected
    for split, groups in expected_results.items():
        for group, metrics in groups.items():
            assert results[split][group] == pytest.approx(metrics, nan_ok=True)


def test_one_shard_is_read_at_a_time_and_each_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data, read = opened(folder), []
    monkeypatch.setattr(data.shards, "read", lambda n: read.append(n) or ShardFolder.read(data.shards, n))
    for loader in (data.train_dataloader(), data.test_dataloader()):
        read.clear()
        for _ in loader:
            assert len(data._open) == 1
        assert sorted(read) == [0, 1, 2]


def test_how_long_an_epoch_is_is_known_without_reading(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened(folder)
    monkeypatch.setattr("hllm.data.shards.read_shard", lambda *_: pytest.fail("read a shard"))
    data = opened(folder)
    assert [len(loader) for loader in (data.train_dataloader(), data.test_dataloader())] == [27, 8]


SIZES = np.array([5, 0, 17, 1, 9])


def stretches(world: int, seed: int | None, epoch: int = 0, mixed: int = 1) -> list[list[int]]:
    samplers = [ShardSampler(SIZES, rank, world, seed, mixed) for rank in range(world)]
    for sampler in samplers:
        sampler.set_epoch(epoch)
    found = [list(sampler) for sampler in samplers]
    assert [len(sampler) for sampler in samplers] == [len(rows) for rows in found]
    return found


@pytest.mark.parametrize("mixed", [1, 2, 9])
@pytest.mark.parametrize("world", [1, 2, 3, 5, 7])
def test_processes_train_equally_many_rows_and_none_twice(world: int, mixed: int) -> None:
    for epoch in range(4):
        found = stretches(world, 3, epoch, mixed)
        assert {len(part) for part in found} == {32 // world}
        assert len({row for part in found for row in part}) == 32 // world * world


@pytest.mark.parametrize("world", [1, 2, 3, 5, 7])
def test_processes_evaluate_every_row_once_in_order(world: int) -> None:
    assert [row for part in stretches(world, None) for row in part] == list(range(32))
    assert max(map(len, stretches(world, None))) - min(map(len, stretches(world, None))) <= 1


def test_what_is_left_out_differs_between_epochs_and_orders_follow_the_seed() -> None:
    missing = [set(range(32)) - {row for part in stretches(5, 3, epoch) for row in part} for epoch in range(20)]
    assert all(len(rows) == 2 for rows in missing)
    assert len(set().union(*missing)) > 20
    assert stretches(1, 3) == stretches(1, 3) != stretches(1, 4)
    assert stretches(1, 3) != stretches(1, 3, epoch=1)


def test_a_process_reads_its_stretch_of_the_shards_only() -> None:
    ends = np.cumsum(SIZES)
    touched = [{int(np.searchsorted(ends, row, side="right")) for row in part} for part in stretches(3, 3)]
    assert sum(map(len, touched)) <= 4 + 2  # four shards with rows, and two places where the line is cut


def test_rows_are_mixed_within_as_many_shards_as_are_held() -> None:
    (apart,), (mixed,) = stretches(1, 3), stretches(1, 3, mixed=5)
    shards = [np.searchsorted(np.cumsum(SIZES), part, side="right") for part in (apart, mixed)]
    changes = [int((np.diff(part) != 0).sum()) for part in shards]
    assert changes[0] == 3
    assert changes[1] > 8


def test_more_processes_than_rows_are_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_rank", lambda: 0)
    monkeypatch.setattr(dist, "get_world_size", lambda: 41)
    with pytest.raises(DataError, match="sharded: 40 test rows for 41 processes"):
        opened(folder).test_dataloader()


# Two real processes

SECONDS = 120
"Until a test gives up on other processes; what they do takes ten or twenty."


def _read_own_part(rank: int, folder: str, store: str, results: str) -> None:
    """A process of two: what it trains in three epochs and what it evaluates."""
    limit = timedelta(seconds=SECONDS)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2, timeout=limit)
    data = opened(Path(folder))
    torch.manual_seed(7)
    loader = data.train_dataloader()
    epochs = []
    for epoch in range(3):
        loader.batch_sampler.sampler.set_epoch(epoch)  # as Lightning does
        batches = list(loader)
        epochs.append([len(batches), list(transitions(rows(data, batches)).elements())])
        dist.barrier()
    tested = [user for batch in data.test_dataloader() for user in data.user_ids(batch.users.numpy())]
    Path(results, f"{rank}.json").write_text(json.dumps({"epochs": epochs, "tested": tested}))
    dist.destroy_process_group()


def test_two_processes_share_an_epoch_and_an_evaluation(odd_folder: Path) -> None:
    # processes of a server that reads our modules once
    multiprocessing.get_context("forkserver").set_forkserver_preload(["hllm.data.sharded", "hllm.build"])
    arguments = (str(odd_folder), str(odd_folder.parent / "store"), str(odd_folder.parent))
    started = mp.start_processes(_read_own_part, arguments, nprocs=2, join=False, start_method="forkserver")
    try:
        deadline = time.monotonic() + SECONDS
        while not started.join(timeout=1):  # raises what a process raised
            assert time.monotonic() < deadline, [path.name for path in odd_folder.parent.iterdir()]
    finally:
        for process in started.processes:
            process.kill()
    first, second = (json.loads((odd_folder.parent / f"{rank}.json").read_text()) for rank in range(2))
    alone = opened(odd_folder)
    whole = transitions(rows(alone, alone.train_dataloader()))
    left_out = set()
    for (steps, own), (other_steps, others) in zip(first["epochs"], second["epochs"], strict=True):
        assert steps == other_steps == 13
        together = Counter(tuple(row) for row in [*own, *others])
        assert max(together.values()) == 1
        assert together <= whole
        left_out.add(frozenset(whole - together))
    assert len(left_out) == 3  # another row each epoch
    assert sorted(first["tested"] + second["tested"], key=int) == [str(user) for user in range(1, 40)]


def train_as_two_nodes(flags: list[str], folder: Path) -> list[str]:
    """What two processes print that know each other by an address and a port only."""
    for _ in range(3):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        ends, outputs = _run_two_nodes(flags, folder, port)
        if "EADDRINUSE" not in outputs[0]:  # somebody else took the port meanwhile
            break
    assert ends == [0, 0], outputs
    return outputs


def _run_two_nodes(flags: list[str], folder: Path, port: str) -> tuple[list[int], list[str]]:
    """Both exit codes and outputs; who fails or takes too long takes the other one along."""
    processes = []
    try:
        for rank in range(2):
            command = [sys.executable, "-m", "hllm.train", *flags, f"hydra.run.dir={folder / f'run{rank}'}"]
            node = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "NODE_RANK": str(rank)}
            with (folder / f"output{rank}").open("w") as output:  # a pipe that nobody reads fills up
                processes.append(
                    subprocess.Popen(command, env=os.environ | node, stdout=output, stderr=subprocess.STDOUT)
                )
        deadline = time.monotonic() + SECONDS
        while any(process.poll() is None for process in processes) and time.monotonic() < deadline:
            if any(process.returncode for process in processes):
                break
            time.sleep(0.1)
    finally:
        for process in processes:
            process.kill()
    return [process.wait() for process in processes], [(folder / f"output{rank}").read_text() for rank in range(2)]


def test_a_run_of_two_processes_ends_with_the_numbers_of_one(
    odd_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["dataset=sharded", f"dataset.root={odd_folder}", "dataset.batch_size=8", f"cache_dir={tmp_path / 'cache'}"]
    flags += ["items=id", "user.num_layers=1", "user.dim=16", "trainer.max_epochs=1", "trainer.num_nodes=2"]
    flags += ["trainer.accelerator=cpu", "trainer.enable_progress_bar=false", "logger=csv", "evaluation.ks=[5,10]"]
    outputs = train_as_two_nodes(flags, tmp_path)
    assert "1 of 39 training rows are left out of each epoch" in outputs[0]
    stored = json.loads((tmp_path / "run0" / "metrics.json").read_text())["results"]
    with warnings.catch_warnings():
        evaluate.main([f"ckpt={tmp_path / 'run0' / 'checkpoints' / 'best.ckpt'}"])
    assert stored["test"]["all"]["users"] == 39
    assert capsys.readouterr().out.strip() == (tmp_path / "run0" / "report.md").read_text().strip()
    ranks = pl.read_parquet(tmp_path / "run0" / "ranks.parquet")
    assert sorted(ranks["user"], key=int) == [str(user) for user in range(1, 40)]


# Folders that other programs write


def write(folder: Path, *shards: list[tuple[Any, list[Any], list[Any]]], num_items: int = 9, **types: Any) -> Path:
    """A folder as another program may write it: a list of user, items and times a shard."""
    (folder / "histories").mkdir(parents=True)
    schema = {"user": pl.String, "items": pl.List(pl.Int32), "timestamps": pl.List(pl.Int64)} | types
    for number, shard_rows in enumerate(shards):
        table = pl.DataFrame(shard_rows, schema=schema, orient="row")
        table.write_parquet(folder / "histories" / f"part-{number}.parquet", row_group_size=1)
    pl.DataFrame({"id": [f"i{item}" for item in range(num_items)]}).write_parquet(folder / "catalog.parquet")
    return folder


GOOD = [("a", [1, 2, 3], [10, 20, 20]), ("b", [4], [5])]


def test_a_folder_of_another_program_is_surveyed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write(
        tmp_path / "shards",
        [(7, [9, 8, 7, 7], [1, 2, 3, 4]), (8, [1, 1, 2], [1, 2, 3])],
        [(100, [3, 4], [5, 6])],
        user=pl.Int64,
        items=pl.List(pl.Int64),
        timestamps=pl.List(pl.UInt32),
    )
    (folder / "histories" / "_SUCCESS").write_text("")
    (folder / "histories" / ".part-0.parquet.crc").write_text("")
    data = opened(folder)
    assert data.train_counts.tolist() == [0, 1, 0, 1, 1, 0, 0, 0, 1, 1]
    assert data.user_ids(np.array([2, 0, 1])).to_list() == ["100", "7", "8"]
    assert data.history("100")[0].tolist() == [3, 4]
    assert sorted(rows(data, data.test_dataloader())) == [
        ("7", (9, 8, 7), (1, 2, 3), (0, 0, 7), (9, 8, 7)),
        ("8", (1, 1), (1, 2), (0, 2), (1, 1)),
    ]
    assert json.loads((folder / "manifest.json").read_text())["made_from"] is None
    monkeypatch.setattr("hllm.data.shards.read_shard", lambda *_: pytest.fail("read a shard"))
    assert opened(folder).fingerprint == data.fingerprint


def test_ids_with_white_space_around_them_are_the_ids_without(tmp_path: Path) -> None:
    data = opened(write(tmp_path / "shards", [(" u1", [1], [1]), ("u2\t", [2, 3], [4, 5])]))
    for number, user in enumerate(data.user_ids(np.arange(2))):
        events = data.history(user)
        assert events is not None
        assert [array.tolist() for array in events] == [[[1], [1]], [[2, 3], [4, 5]]][number]


def test_a_folder_name_is_no_pattern(tmp_path: Path) -> None:
    folder = write(tmp_path / "shards [1-3]*", GOOD)
    for data in (opened(folder), opened(folder)):  # surveyed, and opened by the manifest
        assert data.user_ids(np.arange(2)).to_list() == ["a", "b"]
        assert data.history("b") is not None
        assert len(rows(data, data.test_dataloader())) == 1


def test_other_items_are_another_fingerprint(tmp_path: Path) -> None:
    folders = [write(tmp_path / name, GOOD) for name in ("one", "other")]
    catalog = folders[1] / "catalog.parquet"
    pl.read_parquet(catalog).reverse().write_parquet(catalog)
    assert opened(folders[0]).fingerprint != opened(folders[1]).fingerprint


def test_the_folder_that_the_documentation_writes_is_one(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    (tmp_path / "events").mkdir()
    for number in range(2):
        events = {"user": rng.integers(0, 30, 200), "item_row": rng.integers(1, 10, 200), "timestamp": rng.random(200)}
        table = pl.DataFrame(events).with_columns((pl.col("timestamp") * 1e9).cast(pl.Int64))
        table.write_parquet(tmp_path / "events" / f"{number}.parquet")
    folder = write(tmp_path / "FOLDER")
    snippet = (Path(__file__).parents[2] / "docs" / "scale.md").read_text().split("```python")[1].split("```")[0]
    subprocess.run([sys.executable, "-c", snippet], cwd=tmp_path, check=True)
    data = opened(folder)
    assert (data.num_users, data.shards.manifest.num_events, len(data.shards.paths)) == (30, 400, 8)


def test_a_folder_that_cannot_be_written_is_surveyed_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(path: Path, data: bytes) -> None:
        raise CacheError(f"cannot write {path}")

    folder = write(tmp_path / "shards", GOOD)
    monkeypatch.setattr("hllm.data.shards.write_whole", full)
    assert opened(folder).num_users == 2
    assert "the next run reads all histories again" in caplog.text


@pytest.mark.parametrize(
    ("second", "message"),
    [
        ([("c", [1, 10], [1, 2])], r"row 1 \(user 'c'\) names an item outside 1\.\.9"),
        ([("c", [1], [1]), ("d", [0, 1], [1, 2])], r"row 2 \(user 'd'\) names an item outside 1\.\.9"),
        ([("c", [1], [9]), ("d", [1, 2], [2, 1])], r"row 2 \(user 'd'\) goes back in time; sort each user's events"),
        ([("c", [1], [-1])], r"row 1 \(user 'c'\) has a time outside the years 1970 to 9999"),
        ([("c", [1], [1_700_000_000_000])], r"row 1 \(user 'c'\) has a time outside the years"),
        ([("c", [1, 2], [1])], r"row 1 \(user 'c'\) has not as many timestamps as items"),
        ([("c", [1], [1]), ("d", [], [])], r"row 2 \(user 'd'\) has no items"),
        ([("c", [1], [1]), ("d", None, [1])], r"row 2 \(user 'd'\) has no items"),
        ([("c", [1, None], [1, 2])], r"row 1 \(user 'c'\) has an empty value among its items"),
        ([("c", [1, 2], [1, None])], r"row 1 \(user 'c'\) has an empty value among its timestamps"),
        ([("c", [1], [1]), (None, [1], [1])], r"row 2 \(user None\) has no user id"),
        ([("c", [1], [1]), ("c", [1], [1])], r"row 2 \(user 'c'\) repeats a user"),
        ([], r"holds no user; leave out files without rows"),
    ],
)
def test_a_wrong_history_is_refused_by_file_row_and_user(tmp_path: Path, second: list[Row], message: str) -> None:
    folder = write(tmp_path / "shards", GOOD, second)
    with pytest.raises(DataError, match=rf"part-1\.parquet: {message}"):
        opened(folder)


@pytest.mark.parametrize(
    ("types", "message"),
    [
        ({"items": pl.List(pl.String)}, r"column 'items' is List\(String\), expected lists of whole numbers"),
        ({"timestamps": pl.List(pl.Float64)}, r"column 'timestamps' is List\(Float64\), expected lists of whole"),
        ({"items": pl.String}, r"column 'items' is String, expected lists"),
        ({"user": pl.Float64}, r"column 'user' is Float64, expected text or whole numbers"),
    ],
)
def test_a_column_of_another_type_is_refused(tmp_path: Path, types: dict[str, Any], message: str) -> None:
    folder = write(tmp_path / "shards", [], **types)
    with pytest.raises(DataError, match=rf"part-0\.parquet: {message}"):
        opened(folder)


def test_a_missing_column_is_refused_with_what_is_there(tmp_path: Path) -> None:
    folder = write(tmp_path / "shards", GOOD)
    path = folder / "histories" / "part-0.parquet"
    pl.read_parquet(path).rename({"timestamps": "times"}).write_parquet(path)
    with pytest.raises(DataError, match=r"part-0\.parquet: has no column 'timestamps'; expected .*found .*'times'"):
        opened(folder)


def test_a_user_in_two_files_is_refused(tmp_path: Path) -> None:
    folder = write(tmp_path / "shards", GOOD, [("c", [1], [1]), ("a", [1], [1])])
    with pytest.raises(DataError, match=r"part-1\.parquet: user 'a' is in part-0\.parquet as well"):
        opened(folder)


def test_of_very_many_users_a_sample_is_looked_for_in_two_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hllm.data.shards.CHECKED_USERS", 8)
    every = [(f"u{user}", [1], [1]) for user in range(100)]
    with pytest.raises(DataError, match=r"part-\d\.parquet: user 'u\d+' is in part-\d\.parquet as well"):
        opened(write(tmp_path / "by_day", every, every, every))
    assert opened(write(tmp_path / "by_user", every[:50], every[50:])).num_users == 100


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-20])


SHARD = "histories/00001.parquet"
RESTORE = "Restore the file, or delete manifest.json to take the folder as it now is"


@pytest.mark.parametrize(
    ("name", "harm", "message"),
    [
        (SHARD, truncate, rf"00001\.parquet: not as manifest\.json has it \(\d+ bytes, not \d+\)\. {RESTORE}"),
        (SHARD, Path.unlink, r"00001\.parquet: not as manifest\.json has it \(is missing\)"),
        ("histories/foreign.parquet", lambda path: path.write_bytes(b"x"), r"foreign\.parquet: .* \(is not in it\)"),
        ("manifest.json", lambda path: path.write_text("{"), r"manifest\.json: torn or altered .*; delete it"),
        ("manifest.json", lambda path: path.write_text("{}"), r"manifest\.json: torn or altered .*; delete it"),
        ("train_counts.parquet", truncate, r"manifest\.json: torn or altered .*; delete it"),
        ("train_counts.parquet", Path.unlink, r"manifest\.json: torn or altered .*; delete it"),
        ("catalog.parquet", truncate, r"catalog\.parquet: torn, or not Parquet .*; write it again"),
        ("catalog.parquet", Path.unlink, r"has no catalog\.parquet: not a sharded data set, or its writing was cut"),
        (
            "catalog.parquet",
            lambda path: pl.DataFrame({"id": ["one"]}).write_parquet(path),
            r"catalog\.parquet: not as manifest\.json has it \(1 items, not 30\)",
        ),
        (
            "catalog.parquet",
            lambda path: pl.read_parquet(path).reverse().write_parquet(path),
            r"catalog\.parquet: not as manifest\.json has it \(other items, or in another order\)",
        ),
        ("manifest.json", lambda path: path.write_text('{"layout": 1}'), r"altered \(layout 1, not 2\); delete it"),
    ],
)
def test_a_folder_that_was_harmed_is_refused(
    folder: Path, name: str, harm: Callable[[Path], Any], message: str
) -> None:
    harm(folder / name)
    with pytest.raises(DataError, match=message):
        opened(folder)


def test_a_shard_with_other_events_is_refused_when_it_is_read(folder: Path) -> None:
    path, manifest = folder / SHARD, json.loads((folder / "manifest.json").read_text())
    pl.read_parquet(path).reverse().write_parquet(path)
    manifest["shards"][1]["num_bytes"] = path.stat().st_size
    (folder / "manifest.json").write_text(json.dumps(manifest))
    data = opened(folder)
    with pytest.raises(DataError, match=r"00001\.parquet: not as manifest\.json has it \(other events\)"):
        list(data.test_dataloader())


@pytest.mark.parametrize("content", [b"", b"no parquet", None])
def test_a_torn_shard_is_refused(tmp_path: Path, content: bytes | None) -> None:
    path = write(tmp_path / "shards", GOOD) / "histories" / "part-0.parquet"
    path.write_bytes(path.read_bytes()[:-9] if content is None else content)
    with pytest.raises(DataError, match=r"part-0\.parquet: torn, or not Parquet \(.*\); write it again"):
        read_shard(path, 9)


def test_a_folder_without_histories_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"histories: holds no \.parquet file; python -m hllm\.shard"):
        opened(write(tmp_path / "shards"))


# Writing


def test_shards_are_about_equal_in_events_and_mix_users_from_everywhere(tmp_path: Path) -> None:
    lengths = np.random.default_rng(0).integers(1, 60, 3000)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    ids = pl.Series([f"u{user}" for user in range(3000)])
    data = Interactions(np.ones(offsets[-1], np.int32), np.arange(offsets[-1]), offsets, ids)
    manifest = write_shards(data, Catalog(["a"], {}), tmp_path / "shards", 7, {})
    events = [shard.num_events for shard in manifest.shards]
    assert max(events) < 1.03 * min(events)
    numbers = pl.read_parquet(tmp_path / "shards" / "histories" / "00003.parquet")["user"].str.slice(1).cast(pl.Int64)
    assert np.histogram(numbers, bins=10, range=(0, 3000))[0].min() > 20


def test_a_text_field_cannot_take_the_place_of_the_item_ids(plain: SequenceDataModule, tmp_path: Path) -> None:
    catalog = Catalog(plain.catalog.ids, {"id": pl.Series([str(row) for row in range(30)])})
    with pytest.raises(DataError, match=r"out=.*shards: the items have a text field 'id'.*Rename.*text_fields="):
        write_shards(plain.interactions, catalog, tmp_path / "shards", 2, {})
    assert not (tmp_path / "shards").exists()


@pytest.fixture
def command(
    movielens_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> Iterator[Callable[..., tuple[str, str]]]:
    def run(*arguments: str) -> tuple[str, str]:
        flags = [f"dataset.root={movielens_folder}", "dataset.check_counts=false", f"cache_dir={tmp_path / 'cache'}"]
        with contextlib.suppress(SystemExit):
            shard.main([*flags, *arguments])
        captured = capsys.readouterr()
        return captured.out, captured.err

    return run


def test_the_command_writes_a_folder_and_says_what_is_in_it(command: Callable[..., Any], tmp_path: Path) -> None:
    out, _ = command(f"out={tmp_path / 'shards'}", "shards=2")
    assert "380 interactions, 40 users, 30 items in 2 shards of" in out
    data = opened(tmp_path / "shards")
    made_from = data.shards.manifest.made_from
    assert made_from is not None
    assert (made_from["dataset"], made_from["filter"]["min_user_events"]) == ("movielens_100k", 0)
    assert f"fingerprint {data.fingerprint}" in out


def test_few_events_are_one_shard_unless_told_otherwise(command: Callable[..., Any], tmp_path: Path) -> None:
    assert "in 1 shards" in command(f"out={tmp_path / 'shards'}")[0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["out={full}"], r"out=.*full: is there already, and not an empty folder"),
        (["out={new}", "shards=41"], r"shards=41: too many for the histories of 40 users"),
        (["out={new}", "shards=0"], r"shards=0: must be a whole number above 0"),
        (["out={new}", "shards=two"], r"shards=two: must be a whole number above 0"),
        ([], r"out= is missing\nusage: "),
        (["out={new}", "dataset=sharded"], r"dataset=sharded: is in shards already"),
    ],
)
def test_the_command_refuses(command: Callable[..., Any], tmp_path: Path, arguments: list[str], message: str) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("")
    _, err = command(*(argument.format(full=tmp_path / "full", new=tmp_path / "new") for argument in arguments))
    assert re.match(f"error: {message}", err)
    assert not (tmp_path / "new").exists()


# Config


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("dataset.protocol=temporal", r"dataset\.protocol=temporal: cuts by all users at once"),
        ("dataset.protocol=user_split", r"dataset\.protocol=user_split: cuts by all users at once"),
        ("dataset.batch_events=9", r"dataset\.batch_events=9: dataset=sharded knows a shard's rows only once"),
        ("dataset.num_workers=1", r"dataset\.num_workers=1: dataset=sharded reads in the training process"),
        ("dataset.filter.min_user_events=5", r"dataset\.filter=.*: give filter and legacy_sort to python -m hllm\.sh"),
        ("dataset.legacy_sort=true", r"dataset\.filter=.*reads events as they were written"),
        ("dataset.shards_in_memory=0", r"dataset\.shards_in_memory=0: must be at least 1"),
    ],
)
def test_what_shards_cannot_do_is_refused_before_any_file_is_read(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        compose(["dataset=sharded", override])


def test_without_a_folder_the_message_says_what_writes_one(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"sharded: set dataset\.root= .* python -m hllm\.shard writes one"):
        build_datamodule(compose(["dataset=sharded", f"cache_dir={tmp_path}"]))
