"""The catalogue's vectors: from the store when they are there, else out of the Item LLM, which is freed again."""

import contextlib
import functools
import gc
import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import torch
from tqdm import tqdm

from hllm.config import Fusion, LLMConfig, Positions, Selection, TextConfig
from hllm.data.schema import Catalog
from hllm.errors import ConfigError
from hllm.items.backbone import Backbone, choose_device, choose_dtype, has_fast_bfloat16, load_backbone
from hllm.items.encoder import Encoder
from hllm.items.files import LLMFiles, locate, weights_digest
from hllm.items.fusion import field_weights, fuse
from hllm.items.selection import select_texts, selection_identity
from hllm.items.store import EmbeddingStore, ItemTable, texts_digest
from hllm.items.text import TextParts, log_empty, text_parts

log = logging.getLogger(__name__)


class ItemEmbeddingCache(L.Callback):
    """Gives the module's item tower its table before weights are restored and optimizers exist.

    Every rank calls it; the store's lock lets one of them work while the others wait.
    """

    def __init__(self, text: TextConfig, llm: LLMConfig, cache_dir: Path) -> None:
        self.text, self.llm, self.cache_dir = text, llm, cache_dir
        self.table: ItemTable | None = None

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        datamodule: Any = trainer.datamodule  # type: ignore[attr-defined]
        items: Any = pl_module.items
        # a run sets up for fit, validate and test: the store is read and verified once
        self.table = self.table or embed_catalog(datamodule.catalog, self.text, self.llm, self.cache_dir)
        items.attach(self.table)


def embed_catalog(
    catalog: Catalog, text: TextConfig, llm: LLMConfig, cache_dir: Path, corpus: Catalog | None = None
) -> ItemTable:
    """The vectors of a catalogue; a finished table is read back in well under a second, without the LLM.

    Under ``text.fusion`` each field of the template has a table of its own, and they are joined here; the LLM is
    loaded once, for the first field that is not there yet. The global random state is left as it was.

    Args:
        cache_dir: holds downloads and tables, shared by all runs.
        corpus: for new items under ``text.selection``: the catalogue they are to stand beside, whose texts count in
            the weights of their words.

    Raises:
        ConfigError: the template or an llm flag does not fit the catalogue or the model.
        LLMError: the model cannot be had, loaded or used.
        CacheError: the cache cannot be written; finished shards are kept.
    """
    if not llm.pretrained:
        raise ConfigError("llm.pretrained=False: stored vectors are those of a trained model; leave the flag out")
    parts = text_parts(catalog, text)
    against = None if corpus is None or text.selection is Selection.head else text_parts(corpus, text)
    field_weights(parts.names, text)  # a wrong name must not show after hours of embedding
    log_empty(parts)
    files = locate(llm, cache_dir)
    with _loaded_once(files, llm) as load:
        job = _Job(catalog.ids.to_list(), text.selection, llm, files, cache_dir, load)
        if text.fusion is Fusion.none:
            return _embed(job, parts, against)
        fields = zip(parts.apart(), [None] * len(parts.names) if against is None else against.apart(), strict=True)
        table = fuse([_embed(job, *field) for field in fields], parts, text)
    log.info("item table %s: fields %s, fused by %s", table.fingerprint, ", ".join(parts.names), text.fusion.name)
    return table


@dataclass(frozen=True)
class _Job:
    """What the tables of a catalogue's fields have in common."""

    ids: list[str]
    selection: Selection
    llm: LLMConfig
    files: LLMFiles
    cache_dir: Path
    load: Callable[[], Backbone]


@contextlib.contextmanager
def _loaded_once(files: LLMFiles, llm: LLMConfig) -> Iterator[Callable[[], Backbone]]:
    """The LLM, loaded at the first call; it is gone when the block ends."""
    load = functools.cache(lambda: load_backbone(files, llm))
    try:
        yield load
    finally:
        loaded = load.cache_info().currsize > 0
        load.cache_clear()
        if loaded:
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()


def _embed(job: _Job, parts: TextParts, corpus: TextParts | None) -> ItemTable:
    """One table: read back, or filled."""
    started = time.perf_counter()
    store = EmbeddingStore(job.cache_dir, _parts(job, parts, corpus), job.ids)
    table = store.load()
    source = "from the cache"
    if table is None:
        with store.lock():
            table = store.load()  # another run may have finished it while this one waited
            if table is None:
                resumed = _fill(store, job, parts, corpus)
                source = f"embedded, {resumed} of them resumed"
                table = store.load()
    assert table is not None, "a table that was just written reads back"
    log.info(
        "item table %s: %d items %s, %d wide, %s, %.1f s",
        *(table.fingerprint, len(table.ids), source, table.vectors.shape[1], table.vectors.dtype),
        time.perf_counter() - started,
    )
    return table


def _parts(job: _Job, parts: TextParts, corpus: TextParts | None) -> dict[str, Any]:
    """Everything that the vectors depend on. Prompt, template and cleaning are in through the texts.

    The selection only stands here where one is made, by what it is made from: making it takes the tokenizer. A table
    without one keeps the fingerprint that it had before there was any.
    """
    llm = job.llm
    device = choose_device(llm.device)
    made_from: dict[str, Any] = {
        "texts": texts_digest(job.ids, parts.each()),
        "llm": Path(job.files.name).name,  # a local folder may move
        "revision": llm.revision,
        "weights": weights_digest(job.files, job.cache_dir),
        "pooling": llm.pooling.value,
        "max_tokens": llm.max_tokens,
        "dtype": str(choose_dtype(llm.dtype, device, has_fast_bfloat16(device))),
    }
    if llm.num_layers is not None:
        made_from["num_layers"] = llm.num_layers
    if llm.positions is not Positions.start:
        made_from["positions"] = llm.positions.value
    if job.selection is not Selection.head:
        made_from["selection"] = selection_identity(parts, corpus, job.selection)
    return made_from


def _fill(store: EmbeddingStore, job: _Job, parts: TextParts, corpus: TextParts | None) -> int:
    """Embed what is missing; returns how many items were there already."""
    backbone = job.load()
    log.info("embedding %d items with %s on %s in %s", len(parts), backbone.name, backbone.device, backbone.dtype)
    texts = select_texts(parts, corpus, job.selection, backbone.tokenizer, job.llm.max_tokens)
    encoder = Encoder(backbone, job.llm, texts, store.ids)
    shards = store.missing(encoder.order(), backbone.dim, backbone.dtype, job.llm.shard_items)
    resumed = len(texts) - sum(len(rows) for _, rows in shards)
    # on a terminal only: in a log file the lines before and after say the same
    with tqdm(total=len(texts), initial=resumed, desc="embedding", unit="items", disable=None) as bar:
        for shard, rows in shards:
            store.write(shard, rows, encoder.encode(rows, bar.update))
    return resumed
