"""The catalogue's vectors: from the store when they are there, else out of the Item LLM, which is freed again."""

import gc
import logging
import time
from pathlib import Path
from typing import Any

import lightning as L
import torch
from tqdm import tqdm

from hllm.config import LLMConfig, TextConfig
from hllm.data.schema import Catalog
from hllm.items.backbone import choose_device, choose_dtype, has_fast_bfloat16, load_backbone
from hllm.items.encoder import Encoder
from hllm.items.files import LLMFiles, locate, weights_digest
from hllm.items.store import EmbeddingStore, ItemTable, texts_digest
from hllm.items.text import item_texts

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


def embed_catalog(catalog: Catalog, text: TextConfig, llm: LLMConfig, cache_dir: Path) -> ItemTable:
    """The vectors of a catalogue; a finished table is read back in well under a second, without the LLM.

    The global random state is left as it was.

    Args:
        cache_dir: holds downloads and tables, shared by all runs.

    Raises:
        ConfigError: the template or an llm flag does not fit the catalogue or the model.
        LLMError: the model cannot be had, loaded or used.
        CacheError: the cache cannot be written; finished shards are kept.
    """
    started = time.perf_counter()
    texts = item_texts(catalog, text)
    files = locate(llm, cache_dir)
    store = EmbeddingStore(cache_dir, _parts(catalog, texts, llm, files, cache_dir), catalog.ids)
    table = store.load()
    source = "from the cache"
    if table is None:
        with store.lock():
            table = store.load()  # another run may have finished it while this one waited
            if table is None:
                resumed = _fill(store, texts, llm, files)
                source = f"embedded, {resumed} of them resumed"
                table = store.load()
    assert table is not None, "a table that was just written reads back"
    log.info(
        "item table %s: %d items %s, %d wide, %s, %.1f s",
        *(table.fingerprint, len(table.ids), source, table.vectors.shape[1], table.vectors.dtype),
        time.perf_counter() - started,
    )
    return table


def _parts(catalog: Catalog, texts: list[str], llm: LLMConfig, files: LLMFiles, cache_dir: Path) -> dict[str, Any]:
    """Everything that the vectors depend on. Prompt and template are in through the texts."""
    device = choose_device(llm.device)
    return {
        "texts": texts_digest(catalog.ids, texts),
        "llm": Path(files.name).name,  # a local folder may move
        "revision": llm.revision,
        "weights": weights_digest(files, cache_dir),
        "pooling": llm.pooling.value,
        "max_tokens": llm.max_tokens,
        "dtype": str(choose_dtype(llm.dtype, device, has_fast_bfloat16(device))),
    }


def _fill(store: EmbeddingStore, texts: list[str], llm: LLMConfig, files: LLMFiles) -> int:
    """Embed what is missing; returns how many items were there already. The LLM is gone when it returns."""
    backbone = load_backbone(files, llm)
    log.info("embedding %d items with %s on %s in %s", len(texts), backbone.name, backbone.device, backbone.dtype)
    encoder = Encoder(backbone, llm, texts, store.ids)
    shards = store.missing(encoder.order(), backbone.dim, backbone.dtype, llm.shard_items)
    resumed = len(texts) - sum(len(rows) for _, rows in shards)
    # on a terminal only: in a log file the lines before and after say the same
    with tqdm(total=len(texts), initial=resumed, desc="embedding", unit="items", disable=None) as bar:
        for shard, rows in shards:
            store.write(shard, rows, encoder.encode(rows, bar.update))
    del backbone, encoder
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return resumed
