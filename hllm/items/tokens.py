"""The token ids of a catalogue's texts on disk: made once, mapped by every run that trains the Item LLM.

``tokens/<key>/`` holds ``ids`` (int32) and ``lengths`` (int64) as plain little-endian arrays and ``manifest.json`` with
what they are made from and their digests; the manifest is written last, so a folder without one is not finished.
"""

import hashlib
import json
import logging
from pathlib import Path
from typing import Any

import numpy as np

from hllm.config import LLMConfig, Pooling, Selection, TextConfig
from hllm.data.schema import Catalog
from hllm.disk import file_digest, file_digests, locked, write_whole, writing
from hllm.errors import CacheError
from hllm.items.encoder import Tokens, token_ids, tokenize
from hllm.items.files import SETTINGS, LLMFiles
from hllm.items.selection import select_texts, selection_identity
from hllm.items.store import texts_digest
from hllm.items.text import log_empty, text_parts

log = logging.getLogger(__name__)

VERSION = 1
"Of the files' layout and of what tokenize does; part of the key."
PROBE = "Ein Satz: it's 12 wörter, (1995)."
ARRAYS = {"ids": np.int32, "lengths": np.int64}


def catalog_tokens(
    catalog: Catalog, text: TextConfig, llm: LLMConfig, files: LLMFiles, tokenizer: Any, cache_dir: Path
) -> Tokens:
    """The tokens of each item's text, special ones as the tokenizer has them, at most ``llm.max_tokens``; mapped.

    Raises:
        ConfigError: the template does not fit the catalogue.
        CacheError: the cache cannot be written.
    """
    parts = text_parts(catalog, text)
    log_empty(parts)
    made_from: dict[str, Any] = {
        "layout": VERSION,
        "texts": texts_digest(catalog.ids.to_list(), parts.each()),
        "tokenizer": _tokenizer_digests(files, cache_dir),
        "max_tokens": llm.max_tokens,
        "cut": "head" if llm.pooling is Pooling.item else "text",
        # one tokenizer file is read in other ways by other releases: SmolLM2's has a bos token in some, in some not
        "probe": token_ids(tokenizer, ["", PROBE])["input_ids"],
    }
    if text.selection is not Selection.head:
        made_from["selection"] = selection_identity(parts, None, text.selection)
    key = hashlib.sha256(json.dumps(made_from, sort_keys=True).encode()).hexdigest()[:20]
    folder = cache_dir / "tokens" / key
    found = _load(folder, len(catalog))
    if found is None:
        with locked(folder / ".lock", f"tokenising {key}"):
            found = _load(folder, len(catalog))  # another run may have made them while this one waited
            if found is None:
                texts = select_texts(parts, None, text.selection, tokenizer, llm.max_tokens)
                _write(folder, tokenize(tokenizer, texts, llm), made_from)
                found = _load(folder, len(catalog))
    if found is None:
        raise CacheError(f"{folder}: not what was just written to it; check the disk")
    log.info("item tokens %s: %d items, %.1f tokens each", key, len(found), found.lengths.mean())
    return found


def tokens_digest(tokens: Tokens) -> str:
    """20 hex digits of what the Item LLM reads of each item."""
    digest = hashlib.sha256()
    for array in (tokens.lengths, tokens.ids):
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()[:20]


def _tokenizer_digests(files: LLMFiles, cache_dir: Path) -> list[list[str]]:
    if files.gguf_file is not None:
        paths = [files.folder / files.gguf_file]
    else:
        paths = [path for path in sorted(files.folder.iterdir()) if path.name.endswith(SETTINGS)]
    return [[path.name, digest] for path, digest in zip(paths, file_digests(paths, cache_dir), strict=True)]


def _write(folder: Path, tokens: Tokens, made_from: dict[str, Any]) -> None:
    for name, kind in ARRAYS.items():
        write_whole(folder / name, np.ascontiguousarray(getattr(tokens, name), dtype=kind).tobytes())
    digests = {name: file_digest(folder / name) for name in ARRAYS}
    content = {"made_from": made_from, "digests": digests}
    write_whole(folder / "manifest.json", json.dumps(content, indent=2).encode())


def _load(folder: Path, num_items: int) -> Tokens | None:
    """What is there, verified and mapped read-only; None, with the reason in the log, where anything is wrong."""
    try:
        digests = json.loads((folder / "manifest.json").read_text())["digests"]
        if any(file_digest(folder / name) != digests[name] for name in ARRAYS):
            raise ValueError("not what was written")
        ids, lengths = (np.memmap(folder / name, kind, mode="r") for name, kind in ARRAYS.items())
        if len(lengths) != num_items or lengths.sum() != len(ids):
            raise ValueError("not of this catalogue")
    except FileNotFoundError:
        return None
    except (ValueError, LookupError, TypeError) as error:
        log.warning("%s: torn or altered (%s); making it anew", folder, error)
        with writing(folder):
            (folder / "manifest.json").unlink(missing_ok=True)
        return None
    return Tokens.of(np.asarray(ids), np.asarray(lengths))
