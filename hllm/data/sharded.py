"""ShardedData: a folder of Parquet shards as a data set. Each process reads its own stretch of them, a shard at a time.

A shard becomes ``Interactions``, so that what is trained and evaluated is cut by the same functions as everywhere. How
many rows it gives is known from the manifest's history lengths: no process reads data to know how long an epoch is.
S shards, R rows.
"""

import logging
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.utils.data import DataLoader, Dataset

from hllm.config import DatasetConfig, ShardedConfig
from hllm.data.base import DataModule, EpochSampler, RowBatches
from hllm.data.schema import Array32, Array64, Batch, Interactions
from hllm.data.sequences import SequenceDataset
from hllm.data.shards import ShardFolder
from hllm.data.splits import Rows, split, train_rows
from hllm.errors import DataError

log = logging.getLogger(__name__)


class ShardedData(DataModule):
    """Histories that lie in shards, cut by a leave-one-out protocol into train, validation and test batches.

    Args:
        config: the dataset group; ``root`` is the folder.
        cache_dir: for a lock.
    """

    shards: ShardFolder

    def __init__(self, config: DatasetConfig, cache_dir: Path) -> None:
        super().__init__(config, cache_dir)
        assert isinstance(config, ShardedConfig)
        self.num_open = config.shards_in_memory
        self._open: OrderedDict[tuple[int, str], SequenceDataset] = OrderedDict()

    def setup(self, stage: str | None = None) -> None:
        if hasattr(self, "shards"):
            return
        self.shards = ShardFolder(self.folder(), self.cache_dir)
        self.catalog, manifest = self.shards.catalog, self.shards.manifest
        self.train_counts = torch.from_numpy(self.shards.train_counts.copy())
        log.info(
            "%s: %d interactions, %d users, %d items in %d shards; protocol %s; fingerprint %s",
            *(self.config.name, manifest.num_events, manifest.num_users, manifest.num_items, len(manifest.shards)),
            *(self.config.protocol_name, manifest.fingerprint),
        )

    @property
    def num_users(self) -> int:
        return self.shards.manifest.num_users

    @property
    def fingerprint(self) -> str:
        return self.shards.manifest.fingerprint

    def user_ids(self, numbers: Array64) -> pl.Series:
        return self.shards.user_ids(numbers)

    def history(self, user: str) -> tuple[Array32, Array64] | None:
        return self.shards.history(user)

    def newest_time(self) -> int:
        return self.shards.newest_time()

    def train_dataloader(self) -> DataLoader[Batch]:
        return self._rows_loader("train", self.config.batch_size)

    def val_dataloader(self) -> DataLoader[Batch]:
        return self._rows_loader("validation", self.config.eval_batch_size)

    def test_dataloader(self) -> DataLoader[Batch]:
        return self._rows_loader("test", self.config.eval_batch_size)

    def _rows_loader(self, part: str, batch_size: int) -> DataLoader[Batch]:
        sizes = self.sizes(part)
        rank, world = 0, 1
        if dist.is_available() and dist.is_initialized():
            rank, world = dist.get_rank(), dist.get_world_size()
        if sizes.sum() < world:
            raise DataError(
                f"{self.config.name}: {sizes.sum()} {part} rows for {world} processes; {self.config.protocol_name} "
                "evaluates users with 3 events"
            )
        training = part == "train"
        if training and sizes.sum() % world:
            log.info(
                "%s: %d of %d training rows are left out of each epoch, others each time, so that %d processes have "
                "equally many",
                *(self.config.name, sizes.sum() % world, sizes.sum(), world),
            )
        seed = torch.initial_seed() % 2**32 if training else None
        sampler = ShardSampler(sizes, rank, world, seed, self.num_open)
        dataset = ShardedRows(sizes, lambda number: self._opened(number, part))
        return self._loader(dataset, RowBatches(sampler, batch_size))

    def sizes(self, part: str) -> Array64:
        """(S,) rows that each shard gives: those of one made-up user a history length, times how many have it."""
        shards = self.shards.manifest.shards
        lengths = np.unique(np.concatenate([shard.lengths for shard in shards])).astype(np.int64)
        nothing, offsets = np.empty(0, np.int64), np.concatenate([[0], np.cumsum(lengths)])
        made_up = Interactions(nothing.astype(np.int32), nothing, offsets, pl.Series([], dtype=pl.String))
        rows = np.bincount(self._rows(made_up, part).users, minlength=len(lengths))
        return np.array(
            [rows[np.searchsorted(lengths, shard.lengths)] @ np.array(shard.users_of_length) for shard in shards]
        )

    def _rows(self, interactions: Interactions, part: str) -> Rows:
        splits = split(interactions, self.config)
        if part == "train":
            return train_rows(interactions, splits.train_ends, self.config.max_history, self.config.rows)
        return splits.validation if part == "validation" else splits.test

    def _opened(self, number: int, part: str) -> tuple[SequenceDataset, int]:
        """A shard's rows, and the number of its first user. Training and evaluation share the open shards."""
        key = (number, part)
        if key not in self._open:
            while len(self._open) >= self.num_open:
                self._open.popitem(last=False)
            interactions = self.shards.read(number)
            self._open[key] = SequenceDataset(interactions, self._rows(interactions, part), with_seen=part != "train")
        self._open.move_to_end(key)
        return self._open[key], int(self.shards.first_users[number])


class ShardSampler(EpochSampler):
    """Numbers of the rows that one process reads, shard by shard.

    All R rows stand in one line. In training every epoch shuffles the order of the shards, and the rows within
    ``mixed`` neighbouring shards. The line is cut into a stretch a process, so that a process reads its own shards
    and the ends of the stretch are shared with a neighbour. Training stretches are equally long, since a process with
    a step more would wait for the others for ever: the last R mod world rows of the line are left out, evaluation
    leaves out none.

    Args:
        sizes: (S,) rows of each shard.
        seed: of the shuffle, the same in all processes; None keeps the order of the shards.
    """

    def __init__(self, sizes: Array64, rank: int, world: int, seed: int | None, mixed: int) -> None:
        self.sizes, self.seed, self.mixed = sizes, seed, mixed
        total = int(sizes.sum())
        if seed is not None:
            total -= total % world
        self.begin, self.end = total * rank // world, total * (rank + 1) // world

    def __len__(self) -> int:
        return self.end - self.begin

    def __iter__(self) -> Iterator[int]:
        firsts = np.cumsum(self.sizes) - self.sizes
        order = np.arange(len(self.sizes))
        if self.seed is not None:
            order = np.random.default_rng([self.seed, self.epoch]).permutation(order)
        line = 0
        for place in range(0, len(order), self.mixed):
            group = order[place : place + self.mixed]
            begin, line = line, line + int(self.sizes[group].sum())
            if line <= self.begin or begin >= self.end:
                continue
            rows = np.concatenate([np.arange(firsts[shard], firsts[shard] + self.sizes[shard]) for shard in group])
            if self.seed is not None:
                np.random.default_rng([self.seed, self.epoch, place + 1]).shuffle(rows)
            yield from map(int, rows[max(self.begin - begin, 0) : self.end - begin])


class ShardedRows(Dataset[Batch]):
    """Batches of rows that are numbered through all shards; a batch may span shards.

    Args:
        sizes: (S,) rows of each shard.
        open_shard: number of a shard -> its rows, and the number of its first user.
    """

    def __init__(self, sizes: Array64, open_shard: Callable[[int], tuple[SequenceDataset, int]]) -> None:
        self.ends = np.cumsum(sizes)
        self.sizes, self.open_shard = sizes, open_shard

    def __len__(self) -> int:
        return int(self.ends[-1])

    def __getitems__(self, indices: list[int]) -> Batch:
        """Gather rows into one Batch, those of a shard side by side."""
        index = np.asarray(indices, dtype=np.int64)
        shards = np.searchsorted(self.ends, index, side="right")
        # in the order of the rows, so that each shard is opened once
        return join([self._gather(shard, index[shards == shard]) for shard in dict.fromkeys(shards.tolist())])

    def _gather(self, shard: int, index: Array64) -> Batch:
        rows, first_user = self.open_shard(shard)
        batch = rows.__getitems__((index - (self.ends[shard] - self.sizes[shard])).tolist())
        return replace(batch, users=batch.users + first_user)


def join(batches: Sequence[Batch]) -> Batch:
    """Batches as one, padded to the longest history of all."""
    longest = max(batch.items.shape[1] for batch in batches)
    first_rows = np.cumsum([0, *map(len, batches)])
    return Batch(
        users=torch.cat([batch.users for batch in batches]),
        seen=torch.cat(
            [batch.seen + torch.tensor([[row], [0]]) for row, batch in zip(first_rows, batches, strict=False)], dim=1
        ),
        **{
            name: torch.cat([F.pad(getattr(batch, name), (0, longest - batch.items.shape[1])) for batch in batches])
            for name in ("items", "timestamps", "targets", "target_times", "mask")
        },
    )
