"""The prepared form: made once, whole or not at all, by one process at a time, and never read when it is wrong."""

import errno
import json
import logging
import multiprocessing
import os
import resource
import signal
import time
from collections.abc import Callable, Iterator
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from hllm.config import FilterConfig
from hllm.data.prepare import Prepared, RawEvents, prepare
from hllm.data.schema import Catalog, Interactions
from hllm.data.store import PreparedStore
from hllm.disk import TEMPORARY
from hllm.errors import CacheError

ITEMS, TIMES, OFFSETS = [1, 2, 3, 1, 2], [10, 20, 30, 5, 6], [0, 3, 5]


def build(folder: Path) -> Prepared:
    """Two users, three items."""
    np.array(ITEMS, np.int32).tofile(folder / "items")
    np.array(TIMES, np.int64).tofile(folder / "timestamps")
    catalog = Catalog(["a", "b", "ü"], {"title": ["A", "", 'x, "y"\n']})
    return np.array(OFFSETS, np.int64), pl.Series(["u", "v"]), catalog


def never(folder: Path) -> Prepared:
    raise AssertionError("built again")


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    path = tmp_path / "raw.csv"
    path.write_text("raw rows")
    return path


@pytest.fixture
def store(tmp_path: Path, raw: Path) -> Callable[..., PreparedStore]:
    def make(**rules: object) -> PreparedStore:
        return PreparedStore(tmp_path / "cache", [raw], rules)

    return make


def assert_right(interactions: Interactions, catalog: Catalog) -> None:
    found = [getattr(interactions, name).tolist() for name in ("items", "timestamps", "offsets", "users")[:3]]
    assert found == [ITEMS, TIMES, OFFSETS]
    assert interactions.users.to_list() == ["u", "v"]
    assert catalog.ids.to_list() == ["a", "b", "ü"]
    assert catalog.fields["title"].to_list() == ["A", "", 'x, "y"\n']


def left_over(store: PreparedStore) -> list[str]:
    return sorted(path.name for path in store.folder.parent.iterdir() if path.name != f"{store.key}.lock")


def test_it_is_built_once_and_reused(store: Callable[..., PreparedStore]) -> None:
    *built, reused = store().open(build)
    *again, reused_then = store().open(never)
    assert (reused, reused_then) == (False, True)
    assert_right(*built)
    assert_right(*again)
    assert left_over(store()) == [store().key]


def test_arrays_are_read_only_memory_maps(store: Callable[..., PreparedStore]) -> None:
    interactions, _, _ = store().open(build)
    for name in ("items", "timestamps", "offsets"):
        array = getattr(interactions, name)
        assert isinstance(array.base, np.memmap)
        assert not array.flags.writeable
        assert not array.flags.owndata
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 0


def test_another_file_or_rule_is_another_key(store: Callable[..., PreparedStore], raw: Path) -> None:
    keys = [store().key, store(min_rating=3).key, store(min_rating=4).key]
    raw.write_text("other rows")
    keys.append(store().key)
    raw.write_text("raw rows")
    assert len(set(keys)) == 4
    assert store().key == keys[0]


DAMAGES: dict[str, Callable[[Path], object]] = {
    "items cut short": lambda folder: (folder / "items").write_bytes((folder / "items").read_bytes()[:-4]),
    "items cut in a number": lambda folder: (folder / "items").write_bytes((folder / "items").read_bytes()[:-1]),
    "items empty": lambda folder: (folder / "items").write_bytes(b""),
    "items gone": lambda folder: (folder / "items").unlink(),
    "an item altered": lambda folder: (folder / "items").write_bytes(np.array([1, 2, 3, 2, 1], np.int32).tobytes()),
    "a time altered": lambda folder: (folder / "timestamps").write_bytes(np.arange(5).tobytes()),
    "offsets altered": lambda folder: (folder / "offsets").write_bytes(np.array([0, 2, 5]).tobytes()),
    "users altered": lambda folder: pl.DataFrame({"user": ["v", "u"]}).write_ipc(folder / "users.arrow"),
    "users cut short": lambda folder: (folder / "users.arrow").write_bytes(b"ARROW1"),
    "users gone": lambda folder: (folder / "users.arrow").unlink(),
    "all tables cut short": lambda folder: [p.write_bytes(p.read_bytes()[:-9]) for p in folder.glob("*.arrow")],
    "manifest cut short": lambda folder: (folder / "manifest.json").write_text('{"parts": '),
    "manifest of another kind": lambda folder: (folder / "manifest.json").write_text("[1]"),
    "manifest without digests": lambda folder: (folder / "manifest.json").write_text('{"digests": []}'),
    "manifest with another fingerprint": lambda folder: (folder / "manifest.json").write_text(
        (folder / "manifest.json").read_text().replace('"fingerprint": "', '"fingerprint": "0')
    ),
    "manifest that is not text": lambda folder: (folder / "manifest.json").write_bytes(b"\xff\xfe"),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_what_is_torn_or_altered_is_built_again(
    store: Callable[..., PreparedStore], damage: Callable[[Path], object], caplog: pytest.LogCaptureFixture
) -> None:
    store().open(build)
    damage(store().folder)
    *found, reused = store().open(build)
    assert not reused
    assert_right(*found)
    *found, reused = store().open(never)
    assert reused
    assert_right(*found)


def test_damage_is_named_in_the_log(store: Callable[..., PreparedStore], caplog: pytest.LogCaptureFixture) -> None:
    store().open(build)
    DAMAGES["an item altered"](store().folder)
    store().open(build)
    assert f"{store().folder}: torn or altered (the events are not what was written); preparing it anew" in caplog.text


def test_a_build_that_fails_keeps_nothing_and_says_what_failed(store: Callable[..., PreparedStore]) -> None:
    def fail(folder: Path) -> Prepared:
        build(folder)
        raise ValueError("no such column")

    with pytest.raises(ValueError, match="no such column"):
        store().open(fail)
    assert left_over(store()) == []
    assert_right(*store().open(build)[:2])


@pytest.mark.parametrize("moment", ["in the build", "behind it"])
def test_a_full_disk_is_one_error_and_keeps_nothing(
    store: Callable[..., PreparedStore], moment: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        if moment == "behind it":
            patch.setattr("hllm.data.store.sync_tree", full)
        with pytest.raises(CacheError, match=r"cannot write .*No space left on device.*cache_dir= or .*HLLM_CACHE"):
            store().open(full if moment == "in the build" else build)
    assert left_over(store()) == []
    assert_right(*store().open(build)[:2])


@pytest.mark.parametrize("limit", [0, 1, 3, 8, 15, 30, 100, 600, 700, 1000, 3000])
def test_whatever_byte_the_disk_ends_at_data_are_right_or_refused(tmp_path: Path, raw: Path, limit: int) -> None:
    """No file may grow beyond some bytes: the system refuses the rest, as a full disk does."""
    events = pl.DataFrame({"user": ["u", "v"] * 9, "item": ["a", "b", "a"] * 6, "timestamp": range(18)})

    def prepared(folder: Path) -> Prepared:
        events_on_disk = RawEvents(folder, raw, 2)
        events_on_disk.fill([events[:7], events[7:]], None)
        return prepare(events_on_disk, Catalog(["a", "b"], {}), FilterConfig(), folder)

    store, (soft, hard) = PreparedStore(tmp_path / "cache", [raw], {}), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        interactions, _, _ = store.open(prepared)
        assert interactions.timestamps.tolist() == [*range(0, 18, 2), *range(1, 18, 2)]
    except CacheError:
        assert limit < 3000
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert left_over(store) in ([], [store.key])


def test_a_cache_folder_that_cannot_be_made_is_refused(raw: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(CacheError, match=r"cannot (write|read) .*file"):
        PreparedStore(tmp_path / "file", [raw], {}).open(build)


def build_slowly(folder: Path, output: Path) -> None:
    """In a process of its own: names itself in the log of builds, and builds until it may end."""

    def slowly(work: Path) -> Prepared:
        result = build(work)
        with (folder / "builds").open("a") as file:
            file.write(f"{os.getpid()}\n")
        deadline = time.monotonic() + 2 * SECONDS
        while not (folder / "end").exists():
            assert time.monotonic() < deadline
            time.sleep(0.01)
        return result

    logging.basicConfig(level=logging.INFO, filename=output, force=True)
    interactions, catalog, reused = PreparedStore(folder / "cache", [folder / "raw.csv"], {}).open(slowly)
    assert_right(interactions, catalog)
    logging.info("reused=%s fingerprint=%s", reused, interactions.fingerprint)


@pytest.fixture(scope="module")
def context() -> ForkServerContext:
    """Processes that fork from one that has read our modules and done nothing else."""
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(["hllm.data.store"])
    return server


@pytest.fixture
def start(tmp_path: Path, raw: Path, context: ForkServerContext) -> Iterator[Callable[[str], ForkServerProcess]]:
    """Starts a slow build whose log goes to a file of the given name."""
    processes = []

    def process(name: str) -> ForkServerProcess:
        (tmp_path / name).touch()
        processes.append(context.Process(target=build_slowly, args=(tmp_path, tmp_path / name)))
        processes[-1].start()
        return processes[-1]

    yield process
    for left in processes:
        left.kill()
        left.join()


SECONDS = 60
"Until a test gives up on other processes; what they do takes one or two."


def wait_for(condition: Callable[[], bool], seen: Path, *processes: ForkServerProcess) -> None:
    """Fails with the files of ``seen`` where a process ends before the condition holds, or where it takes too long."""
    deadline = time.monotonic() + SECONDS
    while not condition():
        if time.monotonic() > deadline or not all(process.is_alive() for process in processes):
            ends = [process.exitcode for process in processes]
            texts = {path.name: path.read_text() for path in sorted(seen.iterdir()) if path.is_file()}
            pytest.fail(f"waited {SECONDS} s at most; ends of the processes: {ends}; files: {texts}")
        time.sleep(0.01)


def test_waiting_ends_and_says_what_was_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "one").write_text("preparing")
    monkeypatch.setattr("test_store.SECONDS", 0)
    with pytest.raises(pytest.fail.Exception, match=r"waited 0 s at most; .*'one': 'preparing'"):
        wait_for(lambda: False, tmp_path)


def test_a_killed_build_leaves_no_half_folder_and_the_next_sweeps(
    store: Callable[..., PreparedStore], start: Callable[[str], ForkServerProcess], tmp_path: Path
) -> None:
    killed = start("killed")
    wait_for((tmp_path / "builds").exists, tmp_path, killed)
    killed.kill()
    killed.join(SECONDS)
    assert killed.exitcode == -signal.SIGKILL
    assert [name.startswith(f"{TEMPORARY}{store().key}-") for name in left_over(store())] == [True]
    *found, reused = store().open(build)
    assert not reused
    assert_right(*found)
    assert left_over(store()) == [store().key]


def test_of_two_at_once_one_builds_and_the_other_waits_for_it(
    start: Callable[[str], ForkServerProcess], tmp_path: Path
) -> None:
    processes = {name: start(name) for name in ("one", "two")}

    def logged(word: str) -> list[str]:
        return [name for name in processes if word in (tmp_path / name).read_text()]

    wait_for(lambda: len(logged("another run is preparing data")) == 1, tmp_path, *processes.values())
    waiting = logged("another run is preparing data")
    (tmp_path / "end").touch()
    wait_for(lambda: not any(process.is_alive() for process in processes.values()), tmp_path)
    assert [process.exitcode for process in processes.values()] == [0, 0]
    assert len((tmp_path / "builds").read_text().splitlines()) == 1
    assert logged("reused=True") == waiting
    assert logged("reused=False") == [name for name in processes if name not in waiting]
    prints = [(tmp_path / name).read_text().rpartition("fingerprint=")[2] for name in processes]
    assert prints[0] == prints[1]


def test_the_manifest_says_what_it_was_made_from(store: Callable[..., PreparedStore]) -> None:
    store(min_rating=3).open(build)
    manifest = json.loads((store(min_rating=3).folder / "manifest.json").read_text())
    assert manifest["parts"]["rules"] == {"min_rating": 3}
    assert manifest["lengths"] == {"items": 5, "timestamps": 5, "offsets": 3}
