"""PixelRec: short videos with titles, tags and descriptions (Cheng et al. 2023, arXiv 2309.06789), in three sizes.

Its publisher asks that nobody passes it on, so that it is read out of a folder and never fetched.
"""

from collections.abc import Iterator
from pathlib import Path

import polars as pl

from hllm.config import FilterConfig, PixelRecConfig
from hllm.data.base import Counts, RawFiles, SequenceDataModule
from hllm.data.delimited import read_csv_catalog, read_csv_chunks
from hllm.data.schema import Catalog
from hllm.data.tables import find_pair

COUNTS = {
    "200K": Counts(interactions=3_965_656, users=200_000, items=96_282),
    "1M": Counts(interactions=19_886_579, users=1_001_822, items=100_541),
    "8M": Counts(interactions=158_488_652, users=8_886_078, items=407_082),
}
"Table 1 of the HLLM paper (arXiv 2409.12740)."


class PixelRec(SequenceDataModule):
    """Comments on videos in order of time. Columns are found by name: the official code takes them by position."""

    config: PixelRecConfig
    published_filter = FilterConfig(drop_duplicates=False)

    def __init__(self, config: PixelRecConfig, cache_dir: Path) -> None:
        super().__init__(config, cache_dir)
        self.counts = COUNTS[config.size]

    def find(self, folder: Path) -> RawFiles:
        name = f"Pixel{self.config.size}.csv"
        pairs = [
            (f"dataset/{name}", f"information/{name}"),  # as ByteDance has them
            (name, "item_info.csv"),
        ]
        return RawFiles(*find_pair(folder, pairs, self.config.where), first_row=2)

    def read_events(self, files: RawFiles) -> Iterator[pl.DataFrame]:
        columns = {"user": "user_id", "item": "item_id", "timestamp": "timestamp"}
        return read_csv_chunks(files.interactions, columns)

    def read_items(self, files: RawFiles, wanted: pl.Series) -> Catalog:
        assert files.items is not None
        return read_csv_catalog(files.items, ("item_id", "title", "tag", "description"), "item_id")
