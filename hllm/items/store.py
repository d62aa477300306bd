"""EmbeddingStore: item vectors on disk, written in whole shards, verified whenever they are read.

``embeddings/<fingerprint>/manifest.json`` says what the vectors are made from and how the rows are cut into shards;
``shard-00000.safetensors`` ... hold row numbers and vectors, with the fingerprint and a sha256 of both. A killed run
goes on at the first missing shard. Shards are cut from one fixed order and batches never cross them, so that a resumed
table equals an uninterrupted one bit for bit (on one kind of device, under one llm.token_budget).
"""

import contextlib
import hashlib
import importlib.metadata
import json
import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from hllm.disk import TEMPORARY, locked, write_whole, writing

log = logging.getLogger(__name__)

VERSION = 1
"Of the files' layout; part of the fingerprint."


@dataclass(frozen=True)
class ItemTable:
    """Item vectors of one catalogue.

    Args:
        ids: (I,) original item ids.
        vectors: (I, D) on the CPU, in the Item LLM's dtype; row r is catalogue row r, item id r + 1.
        fingerprint: of everything the vectors are made from.
    """

    ids: list[str]
    vectors: Tensor
    fingerprint: str


def fingerprint(parts: dict[str, Any]) -> str:
    """20 hex digits of what a table is made from; equal parts give equal vectors."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:20]


def texts_digest(ids: Iterable[str], texts: Iterable[str]) -> str:
    """Hex sha256 over original ids and texts in order; each is quoted, so no two catalogues run together."""
    digest, quoted = hashlib.sha256(), json.JSONEncoder().encode
    for item, text in zip(ids, texts, strict=True):
        digest.update(f"[{quoted(item)}, {quoted(text)}]".encode())  # a JSON list, several times as fast
    return digest.hexdigest()


class EmbeddingStore:
    """The table of one fingerprint.

    Args:
        cache_dir: holds ``embeddings/``.
        parts: what the fingerprint is made from, plain values; includes a digest of the ids.
        ids: original item ids, one a row.
    """

    def __init__(self, cache_dir: Path, parts: dict[str, Any], ids: Sequence[str]) -> None:
        self.parts = {"layout": VERSION} | parts
        self.fingerprint = fingerprint(self.parts)
        self.folder = cache_dir / "embeddings" / self.fingerprint
        self.ids = list(ids)

    def lock(self) -> contextlib.AbstractContextManager[None]:
        """Hold while filling; another run that wants to fill the same table waits."""
        return locked(self.folder / ".lock", f"embedding {self.fingerprint}")

    def load(self) -> ItemTable | None:
        """The verified table, or None where a shard is missing or wrong. Needs no lock and writes nothing."""
        manifest = self._manifest()
        if manifest is None:
            return None
        paths = [self._path(shard) for shard in range(self._num_shards(manifest["shard_items"]))]
        if not all(path.is_file() for path in paths):
            return None
        vectors = torch.empty(len(self.ids), manifest["dim"], dtype=getattr(torch, manifest["dtype"]))
        missing = torch.ones(len(self.ids), dtype=torch.bool)
        for path in paths:
            found = self._read(path, manifest["dim"], vectors.dtype)
            if found is None or not missing[found[0]].all():
                return None
            missing[found[0]] = False
            vectors[found[0]] = found[1]
        return None if missing.any() else ItemTable(self.ids, vectors, self.fingerprint)

    def missing(
        self, order: Sequence[int], dim: int, dtype: torch.dtype, shard_items: int
    ) -> list[tuple[int, list[int]]]:
        """Shards to be computed, each with its rows; wrong and torn ones are deleted. Call while holding the lock.

        Args:
            order: every row once, in the order in which they are cut into shards.
            shard_items: rows of a shard; a table that was begun keeps its own.

        Raises:
            CacheError: disk full or folder not writable.
        """
        self._sweep()
        manifest = self._manifest()
        if manifest is None or (manifest["dim"], manifest["dtype"]) != (dim, _name(dtype)):
            manifest = self._begin(dim, dtype, shard_items)
        size = manifest["shard_items"]
        shards = enumerate(list(order[start : start + size]) for start in range(0, len(order), size))
        return [(shard, rows) for shard, rows in shards if not self._keep(shard, rows, dim, dtype)]

    def write(self, shard: int, rows: list[int], vectors: Tensor) -> None:
        """Put a computed shard on disk, whole: (n,) rows and their (n, D) vectors. Call while holding the lock.

        Raises:
            CacheError: disk full or folder not writable; finished shards are kept.
        """
        tensors = {"rows": torch.tensor(rows), "vectors": vectors.contiguous()}
        metadata = {"fingerprint": self.fingerprint, "sha256": _digest(tensors)}
        write_whole(self._path(shard), safetensors.torch.save(tensors, metadata))

    def _path(self, shard: int) -> Path:
        return self.folder / f"shard-{shard:05d}.safetensors"

    def _num_shards(self, shard_items: int) -> int:
        return -(-len(self.ids) // shard_items)

    def _manifest(self) -> dict[str, Any] | None:
        """The manifest, or None where there is none to be trusted."""
        path = self.folder / "manifest.json"
        try:
            manifest: dict[str, Any] = json.loads(path.read_text())
            valid = (manifest["parts"], manifest["num_items"]) == (self.parts, len(self.ids))
            valid = valid and manifest["shard_items"] >= 1 and manifest["dim"] >= 1
            valid = valid and isinstance(getattr(torch, manifest["dtype"]), torch.dtype)
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            log.warning("%s: unreadable (%s); starting it anew", path, error)
            return None
        if not valid:
            log.warning("%s: not of this table; starting it anew", path)
        return manifest if valid else None

    def _begin(self, dim: int, dtype: torch.dtype, shard_items: int) -> dict[str, Any]:
        manifest = {
            "fingerprint": self.fingerprint,
            "parts": self.parts,
            "num_items": len(self.ids),
            "dim": dim,
            "dtype": _name(dtype),
            "shard_items": shard_items,
            "versions": {package: importlib.metadata.version(package) for package in ("torch", "transformers")},
        }
        write_whole(self.folder / "manifest.json", json.dumps(manifest, indent=2).encode())
        return manifest

    def _sweep(self) -> None:
        """Remove what killed runs were writing; nobody else writes while we hold the lock."""
        with writing(self.folder):
            for stale in self.folder.glob(f"{TEMPORARY}*"):
                stale.unlink()

    def _keep(self, shard: int, rows: list[int], dim: int, dtype: torch.dtype) -> bool:
        """Whether a finished shard can be used; one that cannot is deleted."""
        path = self._path(shard)
        if not path.is_file():
            return False
        found = self._read(path, dim, dtype)
        if found is not None and found[0].tolist() == rows:
            return True
        log.warning("%s: rebuilding it", path)
        with writing(path):
            path.unlink()
        return False

    def _read(self, path: Path, dim: int, dtype: torch.dtype) -> tuple[Tensor, Tensor] | None:
        """Rows (n,) and vectors (n, dim) of a shard; None, with the reason in the log, where anything is wrong."""
        try:
            with safetensors.safe_open(path, "pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in ("rows", "vectors")}
        except (OSError, safetensors.SafetensorError) as error:
            log.warning("%s: torn or unreadable (%s)", path, error)
            return None
        rows, vectors = tensors["rows"], tensors["vectors"]
        if metadata.get("fingerprint") != self.fingerprint or metadata.get("sha256") != _digest(tensors):
            log.warning("%s: its content is not what was written", path)
            return None
        fits = rows.dtype == torch.int64 and vectors.shape == (len(rows), dim) and vectors.dtype == dtype
        if not (fits and bool((rows >= 0).all()) and bool((rows < len(self.ids)).all()) and vectors.isfinite().all()):
            log.warning("%s: its shape, type or values do not fit the table", path)
            return None
        return rows, vectors


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _digest(tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in ("rows", "vectors"):
        digest.update(tensors[name].flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
