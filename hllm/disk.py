"""Whole files in the cache folder: locks, writes that appear at once or not at all, one error for a failing disk."""

import contextlib
import hashlib
import json
import logging
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
from filelock import FileLock, Timeout

from hllm.errors import CacheError

log = logging.getLogger(__name__)

TEMPORARY = ".tmp-"
"Marks names that a killed run may leave behind; swept by the next holder of the lock."


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn a failing disk into a CacheError that names the path and what to do."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise CacheError(
            f"cannot write {error.filename or path}: {reason}. Free space or mend the rights there, or choose another "
            "folder with cache_dir= or the variable HLLM_CACHE; what is finished is kept"
        ) from error


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """A file that takes the place of ``path`` when the block ends well: ``path`` is either absent, the old file, or the
    new one in full, also after a power cut.
    """
    temporary = path.with_name(f"{TEMPORARY}{os.getpid()}-{path.name}")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        _sync(path.parent)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


def write_whole(path: Path, data: bytes) -> None:
    """Write a file at once, as ``whole_file`` does.

    Raises:
        CacheError: the disk is full or the folder cannot be written.
    """
    with writing(path), whole_file(path) as file:
        file.write(data)


def write_array(file: BinaryIO, array: npt.NDArray[Any]) -> None:
    """Append an array's bytes. ``ndarray.tofile`` would lose the last of them on a full disk without a word."""
    file.write(np.ascontiguousarray(array).data)


def sync_tree(folder: Path) -> None:
    """Wait until all files of a folder are on disk: call before the rename that makes them appear."""
    for path in folder.iterdir():
        _sync(path)
    _sync(folder)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def file_digest(path: Path) -> str:
    """Hex sha256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def file_digests(paths: Sequence[Path], cache_dir: Path) -> list[str]:
    """Hex sha256 of each file's bytes.

    They are remembered in ``cache_dir/digests.json`` under path, size and time of change, so that many gigabytes of
    weights or ratings are read once.
    """
    memory = cache_dir / "digests.json"
    try:
        known: dict[str, str] = dict(json.loads(memory.read_text()))
    except (OSError, ValueError, TypeError):
        known = {}
    found = []
    for path in paths:
        stat = path.stat()
        key = f"{path.resolve()}:{stat.st_size}:{stat.st_mtime_ns}"
        found.append((key, known.get(key) or file_digest(path)))
    if not dict(found).keys() <= known.keys():
        try:
            memory.parent.mkdir(parents=True, exist_ok=True)
            write_whole(memory, json.dumps(known | dict(found), indent=1).encode())
        except (CacheError, OSError) as error:  # it only saves time, and a finished cache may well be read-only
            log.debug("digests not remembered: %s", error)
    return [digest for _, digest in found]


@contextlib.contextmanager
def locked(path: Path, work: str) -> Iterator[None]:
    """Hold a lock file while doing ``work``; another process that wants it waits, and says so.

    The system drops the lock of a killed process, so a left-over lock file blocks nobody.
    """
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(path)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            log.info("another run is %s (lock %s): waiting for it", work, path)
            lock.acquire()
    try:
        yield
    finally:
        lock.release()
