"""The embedding cache as a whole: resume, verification, two runs at once, a failing disk."""

import errno
import gc
import json
import os
import signal
import subprocess
import sys
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from hllm import disk
from hllm.config import LLMConfig, Pooling, TextConfig
from hllm.data.schema import Catalog
from hllm.errors import CacheError
from hllm.items import cache
from hllm.items.cache import ItemEmbeddingCache, embed_catalog
from hllm.items.encoder import Encoder
from hllm.items.store import ItemTable

Embed = Callable[..., ItemTable]

# Embeds in a process of its own, which kills itself at the named call of a function.
CHILD = """
import json, logging, os, signal, sys
from pathlib import Path
import hllm.disk, hllm.items.store
from hllm.config import LLMConfig, TextConfig, Dtype
from hllm.data.schema import Catalog
from hllm.items.cache import embed_catalog
from hllm.items.encoder import Encoder

job = json.loads(sys.argv[1])
logging.basicConfig(level=logging.INFO)

def dies(function, at):
    calls = 0
    def wrapped(*args, **kwargs):
        nonlocal calls
        calls += 1
        if calls == at:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **kwargs)
    return wrapped

if job["kill"] == "between shards":
    Encoder.encode = dies(Encoder.encode, 3)
elif job["kill"] == "in a batch":
    Encoder._forward = dies(Encoder._forward, 4)
elif job["kill"] == "before the rename":
    Path.replace = dies(Path.replace, 5)
llm = LLMConfig(**job["llm"], dtype=Dtype.float32)
table = embed_catalog(Catalog(**job["catalog"]), TextConfig(**job["text"]), llm, Path(job["cache"]))
print(table.fingerprint, "transformers.models.llama.modeling_llama" in sys.modules)
"""


@pytest.fixture
def job(tiny_llama: Path, movies: Catalog, text: TextConfig, tmp_path: Path) -> dict[str, Any]:
    llm = {"name": "tiny", "model": str(tiny_llama), "shard_items": 5, "token_budget": 64, "max_tokens": 32}
    catalog = {"ids": list(movies.ids), "fields": {name: list(values) for name, values in movies.fields.items()}}
    texts = {"prompt": text.prompt, "template": text.template}
    return {"kill": "", "llm": llm | {"device": "cpu"}, "catalog": catalog, "text": texts, "cache": str(tmp_path)}


def child(job: dict[str, Any]) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", CHILD, json.dumps(job)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.fixture
def embed(movies: Catalog, text: TextConfig, tiny_llama: Path, llm_config: Callable[..., LLMConfig]) -> Embed:
    """Embeds the movies; a cache folder, and changes of the llm group."""
    return lambda folder, **changes: embed_catalog(movies, text, llm_config(tiny_llama, **changes), folder)


@pytest.fixture
def shards(tmp_path: Path, embed: Embed) -> list[Path]:
    """The shard files of a finished table in tmp_path."""
    embed(tmp_path)
    return sorted(tmp_path.glob("embeddings/*/shard-*"))


def same(one: ItemTable, other: ItemTable) -> bool:
    return (one.ids, one.fingerprint) == (other.ids, other.fingerprint) and torch.equal(one.vectors, other.vectors)


def test_table_has_a_row_an_item_and_leaves_the_random_state(tmp_path: Path, embed: Embed, movies: Catalog) -> None:
    state = torch.get_rng_state()
    table = embed(tmp_path)
    assert torch.equal(state, torch.get_rng_state())
    assert table.ids == movies.ids.to_list()
    assert table.vectors.shape == (23, 32)
    assert len(table.vectors.unique(dim=0)) == 23
    assert same(embed(tmp_path), table)


def test_cache_hit_does_not_load_transformers(tmp_path: Path, embed: Embed, job: dict[str, Any]) -> None:
    table = embed(tmp_path)
    assert child(job).communicate(timeout=60)[0].split() == [table.fingerprint, "False"]


@pytest.mark.parametrize("kill", ["between shards", "in a batch", "before the rename"])
def test_killed_run_goes_on_and_gives_the_same_table(
    tmp_path: Path, embed: Embed, job: dict[str, Any], kill: str, caplog: pytest.LogCaptureFixture
) -> None:
    run = child(job | {"kill": kill})
    run.communicate(timeout=60)
    assert run.returncode == -signal.SIGKILL
    finished = sorted(tmp_path.glob("embeddings/*/shard-*"))
    assert 0 < len(finished) < 5
    assert bool(list(tmp_path.glob("embeddings/*/.tmp-*"))) == (kill == "before the rename")
    written = [path.stat().st_mtime_ns for path in finished]
    caplog.set_level("INFO")
    resumed = embed(tmp_path)
    assert f"{5 * len(finished)} of them resumed" in caplog.text
    assert [path.stat().st_mtime_ns for path in finished] == written
    assert not list(tmp_path.glob("embeddings/*/.tmp-*"))
    assert same(resumed, embed(tmp_path / "uninterrupted"))


def flip(position: int) -> Callable[[bytes], bytes]:
    def change(data: bytes) -> bytes:
        at = position % len(data)
        return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]

    return change


DAMAGE = {
    "header length": flip(0),
    "header": flip(12),
    "fingerprint": lambda data: data.replace(b'"fingerprint":"', b'"fingerprint":"0', 1),
    "row number": lambda data: flip(data.index(b"}}") + 60)(data),
    "last byte": flip(-1),
    "truncated": lambda data: data[: len(data) // 2],
    "empty": lambda data: b"",
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_shard_is_found_and_rebuilt(
    tmp_path: Path, embed: Embed, shards: list[Path], damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    good, others = shards[2].read_bytes(), [path.stat().st_mtime_ns for path in shards if path != shards[2]]
    shards[2].write_bytes(DAMAGE[damage](good))
    assert shards[2].read_bytes() != good
    table = embed(tmp_path)
    assert f"{shards[2]}: rebuilding it" in caplog.text
    assert [path.stat().st_mtime_ns for path in shards if path != shards[2]] == others
    assert same(table, embed(tmp_path / "fresh"))


def test_shard_in_the_place_of_another_is_found(tmp_path: Path, embed: Embed, shards: list[Path]) -> None:
    shards[1].write_bytes(shards[0].read_bytes())
    assert same(embed(tmp_path), embed(tmp_path / "fresh"))


@pytest.mark.parametrize("content", ["", "[]", "null", '{"parts": {}}'])
def test_torn_manifest_is_written_anew_and_shards_are_kept(
    tmp_path: Path, embed: Embed, shards: list[Path], content: str
) -> None:
    written = [path.stat().st_mtime_ns for path in shards]
    (shards[0].parent / "manifest.json").write_text(content)
    assert same(embed(tmp_path), embed(tmp_path / "fresh"))
    assert [path.stat().st_mtime_ns for path in shards] == written


def test_begun_table_keeps_its_own_shard_size(tmp_path: Path, embed: Embed, shards: list[Path]) -> None:
    shards[3].unlink()
    assert same(embed(tmp_path, shard_items=7), embed(tmp_path / "fresh"))


def test_everything_that_moves_the_vectors_moves_the_fingerprint(
    tmp_path: Path,
    embed: Embed,
    movies: Catalog,
    text: TextConfig,
    tiny_llama: Path,
    llm_config: Callable[..., LLMConfig],
) -> None:
    llm = llm_config(tiny_llama)
    renamed = Catalog(["x", *movies.ids[1:]], movies.fields)
    tables = [
        embed(tmp_path),
        embed(tmp_path, pooling=Pooling.mean),
        embed(tmp_path, max_tokens=31),
        embed_catalog(renamed, text, llm, tmp_path),
        embed_catalog(movies, replace(text, prompt="Compress: "), llm, tmp_path),
        embed_catalog(movies, replace(text, template="{title}"), llm, tmp_path),
    ]
    assert len({table.fingerprint for table in tables}) == len(tables)
    assert embed(tmp_path, token_budget=40, shard_items=3).fingerprint == tables[0].fingerprint


def test_two_runs_at_once_embed_once(tmp_path: Path, embed: Embed, job: dict[str, Any]) -> None:
    runs = [child(job) for _ in range(2)]
    logs = [run.communicate(timeout=60) for run in runs]
    assert [run.returncode for run in runs] == [0, 0], logs
    assert sum("embedding 23 items" in log for _, log in logs) == 1, logs
    assert same(embed(tmp_path), embed(tmp_path / "alone"))


def test_full_disk_names_the_file_and_keeps_finished_shards(
    tmp_path: Path, embed: Embed, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fsync(descriptor: int) -> None:
        if "shard-00002" in str(Path(f"/proc/self/fd/{descriptor}").readlink()):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(disk.os, "fsync", fsync)
        with pytest.raises(CacheError, match=r"shard-00002\.safetensors: No space left .*cache_dir="):
            embed(tmp_path)
    folder = next(tmp_path.glob("embeddings/*"))
    assert sorted(path.name for path in folder.glob("*shard*")) == [f"shard-0000{n}.safetensors" for n in (0, 1)]
    assert same(embed(tmp_path), embed(tmp_path / "fresh"))


def test_unwritable_cache_names_the_flag(tmp_path: Path, embed: Embed) -> None:
    (tmp_path / "cache").write_text("a file in the place of the folder")
    with pytest.raises(CacheError, match=r"cannot write .*cache.*cache_dir= or the variable HLLM_CACHE"):
        embed(tmp_path / "cache")


def test_finished_table_is_read_without_writing(
    tmp_path: Path, embed: Embed, shards: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache.EmbeddingStore, "lock", lambda self: pytest.fail("no lock is needed"))
    monkeypatch.setattr(disk, "write_whole", lambda *args: pytest.fail("nothing is written"))
    assert len(embed(tmp_path).ids) == 23


def test_llm_is_freed(tmp_path: Path, embed: Embed, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = []
    load = cache.load_backbone

    def watched(*args: Any) -> Any:
        backbone = load(*args)
        loaded.append(weakref.ref(backbone.model))
        return backbone

    monkeypatch.setattr(cache, "load_backbone", watched)
    monkeypatch.setattr(gc, "callbacks", [])
    embed(tmp_path)
    assert loaded[0]() is None


def test_too_large_an_input_stops_at_the_first_batch(
    tmp_path: Path, embed: Embed, monkeypatch: pytest.MonkeyPatch
) -> None:
    lengths: list[int] = []
    forward = Encoder._forward

    def noted(self: Encoder, rows: list[int]) -> Tensor:
        lengths.append(int(self.tokens.lengths[rows[0]]))
        return forward(self, rows)

    monkeypatch.setattr(Encoder, "_forward", noted)
    embed(tmp_path)
    assert lengths == sorted(lengths, reverse=True)


def test_callback_attaches_the_table(
    tmp_path: Path, movies: Catalog, text: TextConfig, tiny_llama: Path, llm_config: Callable[..., LLMConfig]
) -> None:
    tables: list[ItemTable] = []
    trainer: Any = SimpleNamespace(datamodule=SimpleNamespace(catalog=movies))
    module: Any = SimpleNamespace(items=SimpleNamespace(attach=tables.append))
    callback = ItemEmbeddingCache(text, llm_config(tiny_llama), tmp_path)
    for stage in ("fit", "test"):
        callback.setup(trainer, module, stage)
    assert same(*tables)
