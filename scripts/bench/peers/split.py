"""What the runner of every peer reads and writes: numpy arrays and JSON, so that it runs in that peer's environment.

A runner is called as ``RUNNER.py MODEL SPLIT OUT --seed N``. SPLIT is what scripts/bench/peers.py exported; the items
of the test targets are not in it. U test users, I items, K ranked items, L history length.
"""

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

TRAIN, VALIDATION = 0, 1


@dataclass(frozen=True)
class Split:
    """An exported split.

    Args:
        users, items, times, part: (E,) int64 events before the test targets, sorted by user, time and file order; items
            are 1..I, times in seconds, ``part`` is TRAIN or VALIDATION.
        test_users: (U,) whom to rank for.
        test_times: (U,) seconds at which their targets happen, for models that are told.
        settings: num_items, and the dials that all peers share.
    """

    folder: Path
    users: np.ndarray
    items: np.ndarray
    times: np.ndarray
    part: np.ndarray
    test_users: np.ndarray
    test_times: np.ndarray
    settings: dict[str, Any]

    @property
    def num_items(self) -> int:
        return self.settings["num_items"]

    def vectors(self) -> np.ndarray:
        """(I + 1, E) float32 text vectors; row 0, padding, is zero."""
        return np.load(self.folder / "vectors.npy")

    def histories(self, last: int) -> dict[int, np.ndarray]:
        """User -> places of the events of parts up to ``last``, oldest first."""
        places = np.flatnonzero(self.part <= last)
        users, starts = np.unique(self.users[places], return_index=True)
        return dict(zip(users.tolist(), np.split(places, starts[1:]), strict=True))

    def validation(self) -> tuple[np.ndarray, np.ndarray]:
        """Validated users and their target items."""
        held_out = self.part == VALIDATION
        return self.users[held_out], self.items[held_out]


@dataclass(frozen=True)
class Outcome:
    """What a peer did.

    Args:
        items: (U, K) the best items of each test user, best first, history left out; 0 where there are fewer.
        scores: (U, K) their scores.
        epochs: trained, the ones after the best included.
        parameters: trained ones.
        selection: how the epoch was chosen.
    """

    items: np.ndarray
    scores: np.ndarray
    fit_seconds: float
    epochs: int
    parameters: int
    selection: str


@dataclass(frozen=True)
class Epochs:
    """What training epochs of a peer cost.

    Args:
        wall, cpu: seconds of each epoch; of all threads, ``cpu``.
        transitions: different ones that an epoch trains.
        positions: how many it trains in all.
    """

    wall: list[float]
    cpu: list[float]
    transitions: int
    positions: int


def load(folder: Path) -> Split:
    events, test = np.load(folder / "events.npz"), np.load(folder / "test.npz")
    settings = json.loads((folder / "settings.json").read_text())
    columns = (events[name] for name in ("user", "item", "time", "part"))
    return Split(folder, *columns, test["user"], test["time"], settings)


def left_padded(histories: list[np.ndarray], length: int) -> np.ndarray:
    """(B, L) the newest ``length`` values of each, zeros before them."""
    rows = np.zeros((len(histories), length), dtype=np.int64)
    for row, values in zip(rows, histories, strict=True):
        newest = values[-length:]
        row[length - len(newest) :] = newest
    return rows


def best_unseen(scores: np.ndarray, seen: list[np.ndarray], k: int) -> tuple[np.ndarray, np.ndarray]:
    """(B, k) items and scores, best first, of (B, I + 1) scores whose column is the item; column 0 is padding."""
    scores = scores.astype(np.float32)
    scores[:, 0] = -np.inf
    for row, items in zip(scores, seen, strict=True):
        row[items] = -np.inf
    order = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    values = np.take_along_axis(scores, order, axis=1)
    return np.where(np.isfinite(values), order, 0), values


def rank_all(
    split: Split, users: np.ndarray, last: int, score: Callable[[list[np.ndarray]], np.ndarray], k: int
) -> tuple[np.ndarray, np.ndarray]:
    """(U, k) items and scores, with ``score``: places of the events of each user of a batch -> (B, I + 1)."""
    histories = split.histories(last)
    parts = []
    for begin in range(0, len(users), 256):
        batch = [histories[user] for user in users[begin : begin + 256].tolist()]
        parts.append(best_unseen(score(batch), [split.items[places] for places in batch], k))
    items, scores = zip(*parts, strict=True)
    return np.concatenate(items), np.concatenate(scores)


def ndcg(items: np.ndarray, targets: np.ndarray, k: int = 10) -> float:
    """Mean NDCG@k of (U, K) ranked items, one target a user."""
    hit = items[:, :k] == targets[:, None]
    return float((hit / np.log2(np.arange(2, hit.shape[1] + 2))).sum(1).mean())


def main(models: dict[str, Callable[[Split, int, Path], Outcome]]) -> None:
    """Run one model; writes OUT/top.npz and OUT/run.json."""
    parser = argparse.ArgumentParser()
    parser.add_argument("model", choices=models)
    parser.add_argument("split", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    split = load(args.split)
    args.out.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    outcome = models[args.model](split, args.seed, args.out)
    np.savez(args.out / "top.npz", items=outcome.items, scores=outcome.scores)
    about = {
        "epochs": outcome.epochs,
        "seconds": {"fit": outcome.fit_seconds, "total": time.perf_counter() - started},
        "parameters": outcome.parameters,
        "selection": outcome.selection,
    }
    (args.out / "run.json").write_text(json.dumps(about, indent=2) + "\n")


def main_epochs(models: dict[str, Callable[[Split], Epochs]]) -> None:
    """Time one model; writes OUT."""
    parser = argparse.ArgumentParser()
    parser.add_argument("model", choices=models)
    parser.add_argument("split", type=Path)
    parser.add_argument("out", type=Path)
    args = parser.parse_args()
    args.out.write_text(json.dumps(asdict(models[args.model](load(args.split)))) + "\n")
