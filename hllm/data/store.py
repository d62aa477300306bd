"""PreparedStore: a data set's encoded, sorted and filtered form on disk, made once and memory-mapped by every run.

``prepared/<key>/`` holds ``items`` (int32), ``timestamps`` (int64) and ``offsets`` (int64) as plain little-endian
arrays, ``users.arrow``, ``ids.arrow`` and ``texts.arrow``, and ``manifest.json`` with what they are made from, their
lengths and digests. The key is a digest of the raw files' content, of every rule that was applied and of the code that
applied them. The folder appears whole, by one rename: a killed run leaves only a temporary one, which the next sweeps.
A lock lets one run work while others wait.
"""

import hashlib
import json
import logging
import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl

from hllm.data.prepare import Prepared
from hllm.data.schema import Catalog, Interactions
from hllm.disk import TEMPORARY, file_digest, file_digests, locked, sync_tree, write_array, writing
from hllm.errors import CacheError

log = logging.getLogger(__name__)

ARRAYS = {"items": np.int32, "timestamps": np.int64, "offsets": np.int64}
TABLES = ("users.arrow", "ids.arrow", "texts.arrow")

Build = Callable[[Path], Prepared]
"Writes the files items and timestamps into a folder; returns the rest."


class PreparedStore:
    """The prepared form under one key.

    Args:
        cache_dir: holds ``prepared/``.
        files: the raw files.
        rules: everything else that the result depends on, as plain values.
    """

    def __init__(self, cache_dir: Path, files: Sequence[Path], rules: dict[str, Any]) -> None:
        self.parts = {"files": file_digests(files, cache_dir), "rules": rules}
        self.key = hashlib.sha256(json.dumps(self.parts, sort_keys=True).encode()).hexdigest()[:20]
        self.folder = cache_dir / "prepared" / self.key

    def open(self, build: Build) -> tuple[Interactions, Catalog, bool]:
        """The data, mapped read-only, and whether it was there already; ``build`` makes it where it was not.

        Raises:
            CacheError: the disk is full, or the folder cannot be written or read.
        """
        found = self._load()
        if found is not None:
            return *found, True
        with locked(self.folder.with_name(f"{self.key}.lock"), f"preparing data {self.key}"):
            found = self._load()  # another run may have made it while this one waited
            if found is not None:
                return *found, True
            self._build(build)
        found = self._load()
        if found is None:
            raise CacheError(f"{self.folder}: not what was just written to it; check the disk")
        return *found, False

    def _build(self, build: Build) -> None:
        """Make everything beside the folder, then rename. Call under the lock: it sweeps what a killed run left."""
        with writing(self.folder):
            for stale in self.folder.parent.glob(f"{TEMPORARY}{self.key}-*"):
                shutil.rmtree(stale)
            with tempfile.TemporaryDirectory(
                prefix=f"{TEMPORARY}{self.key}-", dir=self.folder.parent, ignore_cleanup_errors=True
            ) as scratch:
                work, result = Path(scratch) / "work", Path(scratch) / "result"
                work.mkdir()
                result.mkdir()
                offsets, users, catalog = build(work)
                for name in ("items", "timestamps"):
                    (work / name).rename(result / name)
                with (result / "offsets").open("wb") as file:
                    write_array(file, offsets.astype(np.int64, copy=False))
                tables = pl.DataFrame({"user": users}), pl.DataFrame({"id": catalog.ids}), pl.DataFrame(catalog.fields)
                for name, table in zip(TABLES, tables, strict=True):
                    table.write_ipc(result / name)
                interactions = self._interactions(result, users)
                assert len(interactions.items) == len(interactions.timestamps) == offsets[-1]
                manifest = {
                    "parts": self.parts,
                    "lengths": {name: len(getattr(interactions, name)) for name in ARRAYS},
                    "fingerprint": interactions.fingerprint,
                    "digests": {name: file_digest(result / name) for name in TABLES},
                }
                (result / "manifest.json").write_text(json.dumps(manifest, indent=2))
                sync_tree(result)
                if self.folder.exists():  # what could not be used goes only now that there is better
                    self.folder.rename(Path(scratch) / "unusable")
                result.rename(self.folder)

    def _interactions(self, folder: Path, users: pl.Series) -> Interactions:
        # as plain arrays, which index faster than np.memmap does; the pages are mapped all the same
        arrays: dict[str, npt.NDArray[Any]] = {
            name: np.asarray(np.memmap(folder / name, kind, mode="r")) for name, kind in ARRAYS.items()
        }
        return Interactions(**arrays, users=users)

    def _load(self) -> tuple[Interactions, Catalog] | None:
        """What is there, verified; None, with the reason in the log, where anything is missing or wrong.

        Raises:
            CacheError: the folder is there but cannot be read.
        """
        try:
            manifest = json.loads((self.folder / "manifest.json").read_text())
            for name, digest in manifest["digests"].items():
                if file_digest(self.folder / name) != digest:
                    raise ValueError(f"{name} is not what was written")
            users, ids, texts = (_read_table(self.folder / name) for name in TABLES)
            interactions = self._interactions(self.folder, users["user"])
            if interactions.fingerprint != manifest["fingerprint"]:
                raise ValueError("the events are not what was written")
            return interactions, Catalog(ids["id"], texts.to_dict())
        except FileNotFoundError:
            return None
        except OSError as error:  # a failing disk or missing rights say nothing of the content
            raise CacheError(
                f"cannot read {error.filename or self.folder}: {error.strerror or error}. Mend the rights there, or "
                "choose another folder with cache_dir= or the variable HLLM_CACHE"
            ) from error
        except (ValueError, LookupError, TypeError, AttributeError, pl.exceptions.PolarsError) as error:
            log.warning("%s: torn or altered (%s); preparing it anew", self.folder, error)
            return None


def _read_table(path: Path) -> pl.DataFrame:
    with path.open("rb") as file:  # a name would be taken for a pattern where it holds brackets
        return pl.read_ipc(file)
