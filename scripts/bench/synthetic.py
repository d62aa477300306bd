"""Made-up catalogues and histories with the lengths of known data sets: what scripts/bench/joint.py runs on.

Text and history lengths are lognormal, cut to a range; items are drawn by Zipf's law. MovieLens's text lengths are
those that SmolLM2's tokenizer gives MovieLens-100k (median 26, 11 to 45). History lengths follow the published counts
of users, items and interactions; the texts of Books and PixelRec were not measured, their lengths are assumptions.

B users, S positions of a training row, K negatives, I items.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from hllm.data.schema import Batch
from hllm.items.encoder import Tokens


@dataclass(frozen=True)
class Lengths:
    """Lognormal around a median, cut to least..most."""

    median: float
    sigma: float
    least: int
    most: int

    def draw(self, random: np.random.Generator, count: int) -> npt.NDArray[np.int64]:
        drawn = self.median * np.exp(self.sigma * random.standard_normal(count))
        return np.clip(drawn.round(), self.least, self.most).astype(np.int64)


@dataclass(frozen=True)
class Shape:
    """A data set as a training step sees it, and one device's share of the official run on it.

    Args:
        items: I, of the catalogue.
        zipf: an item's share of the events is its rank + 10 to the power of minus this.
        text: tokens of an item, without [ITEM].
        events: items of a training row, the last of them a target only.
        positions: S; rows hold at most S + 1 items, and the official code fills each up to that.
        batch_size: B a device. negatives: K a device.
    """

    items: int
    zipf: float
    text: Lengths
    events: Lengths
    positions: int
    batch_size: int
    negatives: int


SHAPES = {
    # 10,053,086 events of 694,898 users, two of each held out; 16 devices share batch 128 and 512 negatives
    "books": Shape(686_624, 0.7, Lengths(150, 0.7, 12, 256), Lengths(7, 0.9, 3, 51), 50, 8, 32),
    # 158,488,652 events of 8,886,078 users; 32 devices share batch 512 and 5,632 negatives
    "pixel8m": Shape(407_082, 0.9, Lengths(60, 0.5, 12, 256), Lengths(14, 0.7, 3, 11), 10, 16, 176),
    # 1,000,209 events of 6,040 users; nothing official, so one device with 512 negatives
    "movielens_1m": Shape(3_706, 0.7, Lengths(26, 0.15, 11, 45), Lengths(96, 1.0, 18, 201), 200, 8, 512),
}


def make_tokens(shape: Shape, vocabulary: int, random: np.random.Generator) -> Tokens:
    """A text of random tokens for each item of the catalogue."""
    lengths = shape.text.draw(random, shape.items)
    return Tokens.of(random.integers(0, vocabulary, int(lengths.sum()), dtype=np.int32), lengths)


@dataclass(frozen=True)
class Step:
    """One training batch, as both ways want it.

    Args:
        batch: ours: rows as long as the longest history.
        filled: (B, S + 1) the same rows filled up with random items.
        valid: (B, S) bool, positions with a target.
    """

    batch: Batch
    filled: Tensor
    valid: Tensor

    def to(self, device: torch.device) -> "Step":
        return Step(self.batch.to(device), self.filled.to(device), self.valid.to(device))


def make_step(shape: Shape, random: np.random.Generator, batch_size: int | None = None) -> Step:
    """Histories of distinct items; random items behind them where the official code pads."""
    counts = shape.events.draw(random, batch_size or shape.batch_size)
    shares = np.cumsum((np.arange(shape.items) + 10.0) ** -shape.zipf)
    filled = random.integers(1, shape.items + 1, (len(counts), shape.positions + 1))
    for row, count in zip(filled, counts, strict=True):
        row[:count] = _distinct(shares, int(count), random)
    longest = int(counts.max()) - 1
    valid = np.arange(shape.positions) < counts[:, None] - 1
    mask = torch.from_numpy(valid[:, :longest])
    items = torch.from_numpy(filled)
    batch = Batch(
        users=torch.arange(len(counts)),
        items=items[:, :longest] * mask,
        timestamps=torch.zeros(len(counts), longest, dtype=torch.long),
        targets=items[:, 1 : longest + 1] * mask,
        target_times=torch.zeros(len(counts), longest, dtype=torch.long),
        mask=mask,
        seen=torch.empty(2, 0, dtype=torch.long),
    )
    return Step(batch, items, torch.from_numpy(valid))


def _distinct(shares: npt.NDArray[np.float64], count: int, random: np.random.Generator) -> npt.NDArray[np.int64]:
    found = np.empty(0, dtype=np.int64)
    while len(found) < count:
        drawn = np.searchsorted(shares, random.random(2 * count) * shares[-1]) + 1
        found, first = np.unique(np.concatenate([found, drawn]), return_index=True)
        found = found[np.argsort(first)]  # as they were drawn
    return found[:count]
