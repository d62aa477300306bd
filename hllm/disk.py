"""Whole files in the cache folder: locks, writes that appear at once or not at all, one error for a failing disk."""

import contextlib
import logging
import os
from collections.abc import Iterator
from pathlib import Path

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


def write_whole(path: Path, data: bytes) -> None:
    """Write a file so that ``path`` is either absent, the old file, or the new one in full, also after a power cut.

    Raises:
        CacheError: the disk is full or the folder cannot be written.
    """
    temporary = path.with_name(f"{TEMPORARY}{os.getpid()}-{path.name}")
    with writing(path):
        try:
            with temporary.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
            _sync_folder(path.parent)
        except OSError:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


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
