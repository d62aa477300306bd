import json
import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub.errors import IncompleteSnapshotError

from hllm import disk
from hllm.config import LLMConfig
from hllm.errors import LLMError
from hllm.items.files import LLMFiles, locate, weights_digest

Config = Callable[..., LLMConfig]


@pytest.fixture
def no_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A hub client that finds nothing on disk and cannot connect."""
    from huggingface_hub.errors import LocalEntryNotFoundError

    def absent(*args: object, **kwargs: object) -> str:
        raise LocalEntryNotFoundError("no snapshot on disk")

    def unreachable(*args: object, **kwargs: object) -> None:
        raise ConnectionError("Name or service not known\nsecond line")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", absent)
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", unreachable)


@pytest.mark.usefixtures("no_hub")
@pytest.mark.parametrize("name", ["google-bert/bert-base-uncased", "no such name", "a/b/c"])
def test_hub_out_of_reach_says_what_to_do_in_one_line(llm_config: Config, tmp_path: Path, name: str) -> None:
    with pytest.raises(LLMError, match=rf"llm\.model={name}: .*llm=smollm2_135m .*llm\.model=/folder$") as caught:
        locate(llm_config(Path(name)), tmp_path)
    assert "second line" not in str(caught.value)


def test_hub_download_takes_one_form_of_the_weights(
    llm_config: Config, tmp_path: Path, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ["config.json", "model.safetensors", "pytorch_model.bin", "onnx/model.onnx", "own.py", "tokenizer.model"]
    info = SimpleNamespace(sha="abc", siblings=[SimpleNamespace(rfilename=name) for name in names])
    asked: list[object] = []

    def download(name: str, **options: object) -> str:
        asked.append(options)
        return str(tmp_path if options.get("local_files_only") else tiny_llama)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda *args, **options: info)
    assert locate(llm_config(Path("org/name")), tmp_path).folder == tiny_llama
    assert asked[1] == {"revision": None, "allow_patterns": ["model.safetensors", "config.json", "tokenizer.model"]}
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "tokenizer.json").write_text("{}")
    assert locate(llm_config(Path("org/name")), tmp_path).folder == tiny_llama, "a tokenizer alone is not the model"


def test_for_the_tokenizer_alone_no_weights_are_fetched(
    llm_config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    info = SimpleNamespace(
        siblings=[SimpleNamespace(rfilename=name) for name in ("config.json", "model.safetensors", "tokenizer.json")]
    )

    def download(name: str, **options: Any) -> str:
        for file in options.get("allow_patterns", []):
            assert file != "model.safetensors"
            (tmp_path / file).write_text("{}")
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda *args, **options: info)
    assert locate(llm_config(Path("org/name")), tmp_path, weights=False).folder == tmp_path
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda *args, **options: pytest.fail("asked again"))
    assert locate(llm_config(Path("org/name")), tmp_path, weights=False).folder == tmp_path


@pytest.mark.parametrize("name", ["/no/such/folder", "./nowhere", "~/nowhere-at-all"])
def test_missing_folder_is_not_asked_of_the_hub(llm_config: Config, tmp_path: Path, name: str) -> None:
    config = llm_config(tmp_path)
    config.model = name
    with pytest.raises(LLMError, match=rf"llm\.model={name}: no such folder"):
        locate(config, tmp_path)


def test_gguf_path_is_told_the_right_flags(llm_config: Config, tmp_path: Path) -> None:
    (tmp_path / "a.gguf").touch()
    with pytest.raises(LLMError, match=rf"try llm\.model={tmp_path} llm\.gguf_file=a\.gguf"):
        locate(llm_config(tmp_path / "a.gguf"), tmp_path)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_incomplete_folder_names_the_file(
    save_llama: Callable[..., Path], llm_config: Config, tmp_path: Path, name: str
) -> None:
    folder = save_llama(tmp_path / "llm")
    (folder / name).unlink()
    with pytest.raises(LLMError, match=rf"no {name.replace('model', '.*')} in"):
        locate(llm_config(folder), tmp_path)


def test_missing_shard_is_named(save_llama: Callable[..., Path], llm_config: Config, tmp_path: Path) -> None:
    folder = save_llama(tmp_path / "llm")
    index = {"weight_map": {"a": "model.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(LLMError, match=r"no model-00002-of-00002\.safetensors in"):
        locate(llm_config(folder), tmp_path)


def test_digest_sees_every_byte_and_reads_each_file_once(
    save_llama: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, cache = save_llama(tmp_path / "llm"), tmp_path / "cache"
    cache.mkdir()
    subject = LLMFiles("tiny", folder)
    first = weights_digest(subject, cache)
    path = folder / "tokenizer.json"
    path.write_text(path.read_text().replace("word39", "word93"))
    stat = path.stat()
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    second = weights_digest(subject, cache)
    assert first != second
    with monkeypatch.context() as patch:
        patch.setattr(disk, "file_digest", lambda path: pytest.fail(f"{path} was read again"))
        assert weights_digest(subject, cache) == second
    (cache / "digests.json").write_text("torn")
    assert weights_digest(subject, cache) == second
    assert weights_digest(subject, tmp_path / "no such cache") == second


def test_a_downloaded_model_is_found_without_the_network(
    llm_config: Config, tmp_path: Path, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def incomplete(name: str, **options: object) -> str:  # as the hub client calls what was left out on purpose
        raise IncompleteSnapshotError("README.md is missing", str(tiny_llama))

    monkeypatch.setattr(huggingface_hub, "snapshot_download", incomplete)
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda *args, **options: pytest.fail("network asked"))
    assert locate(llm_config(Path("org/name")), tmp_path).folder == tiny_llama


def test_a_download_killed_before_the_tokenizer_came_is_not_whole(tmp_path: Path, tiny_llama: Path) -> None:
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((tiny_llama / name).read_bytes())
    assert "tokenizer.json" in str(LLMFiles("half", tmp_path).missing())
