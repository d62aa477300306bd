"""python -m hllm.floors: what a table's systems must beat, without any training; overrides as of hllm.train.

popularity: events in training. recent: those of the days before the user's last known event; the target's own time is
never looked at. text: cosine of item vectors to those of the newest items. co_occurrence: likewise of the users that
items share in training. The last three have settings, chosen by callbacks.monitor on some of the validation users.
Each floor leaves a run folder as hllm.train does, so that tables and hllm.compare take it for any other row.

B rows, L longest history of the batch, I catalogue items, E training events, W width of the Item LLM.
"""

import json
import logging
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import hydra
import numpy as np
import torch
import torch.nn.functional as F
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig
from torch import Tensor

from hllm.build import build_datamodule, cache_dir, data_identity, pin_dtype, pin_template
from hllm.cli import quiet_libraries, report_errors
from hllm.config import CONF_DIR, CachedItemsConfig, Config, Transform, check
from hllm.data.base import SequenceDataModule
from hllm.data.schema import Array64, Batch
from hllm.data.splits import ranges
from hllm.errors import ConfigError
from hllm.items.cache import embed_catalog
from hllm.items.tower import fit_transform
from hllm.metrics import Coverage, RankingMetrics, target_ranks
from hllm.report import full_report
from hllm.tracking import write_json, write_ranks, write_run_info

log = logging.getLogger(__name__)

DAYS = (1, 7, 30, 90, 365)
"Of recent popularity."
NEWEST, DECAYS = (1, 5, 20, 100), (0.5, 0.8, 0.9, 1.0)
"Of item-to-item floors: how many items of the history count, and how much less each counts than the next newer one."
TUNED_ON = 16
"Validation batches at most that settings are chosen on, spread over all users."
MOST_ITEMS = 20_000
"Of co-occurrence, which keeps a number for each pair of items: 1.6 GB."

Groups = dict[str, dict[str, float]]
"Group of users -> metric -> value."


@dataclass(frozen=True)
class Floor:
    """A way to score all items after each history of a batch, with one choice of its settings.

    Args:
        score: batch -> (B, I), item i + 1 in column i.
    """

    settings: dict[str, Any]
    score: Callable[[Batch], Tensor]


def popularity(data: SequenceDataModule) -> list[Floor]:
    """Training events of each item."""
    counts = data.train_counts[1:].float()
    return [Floor({}, lambda batch: counts.expand(len(batch), -1))]


def recent_popularity(data: SequenceDataModule) -> list[Floor]:
    """Training events of each item, of all users, in the days up to the user's last known event.

    Items that are level there go by all their training events.
    """
    _, items, times = _training_events(data)
    order = np.argsort(times, kind="stable")
    items, times = items[order] - 1, times[order]
    overall = data.train_counts[1:].double()
    overall = overall / (overall.max() + 1)

    def score(batch: Batch, days: int) -> Tensor:
        now = batch.timestamps.gather(1, batch.mask.sum(1, keepdim=True) - 1)[:, 0].numpy()
        ends = np.searchsorted(times, np.concatenate([now, now - days * 86_400]), side="right")  # (2 B,)
        ends, place = np.unique(ends, return_inverse=True)
        # an event counts at every end behind it: put it at the first of them, and sum
        first = np.repeat(np.arange(len(ends)), np.diff(ends, prepend=0))
        cells = first * data.num_items + items[: len(first)]
        before = np.bincount(cells, minlength=len(ends) * data.num_items).reshape(len(ends), -1)
        before.cumsum(0, out=before)
        return torch.from_numpy(before[place[: len(now)]] - before[place[len(now) :]]) + overall

    return [Floor({"days": days}, partial(score, days=days)) for days in DAYS]


def text_neighbours(data: SequenceDataModule, vectors: Tensor, whiten_epsilon: float) -> list[Floor]:
    """Cosine of (I, W) item vectors, raw or whitened, to those of the newest items of the history, summed."""
    floors = []
    for transform in (Transform.raw, Transform.whiten):
        mean, matrix = fit_transform(vectors, transform, whiten_epsilon)
        table = F.pad(F.normalize((vectors - mean) @ matrix, dim=1), (0, 0, 1, 0))  # (I + 1, W)
        floors += _item_to_item(table, {"transform": transform.name}, table[1:].T)
    return floors


def co_occurrence(data: SequenceDataModule) -> list[Floor]:
    """Cosine of items as sets of training users (ItemKNN), to the newest items of the history, summed."""
    users, items, _ = _training_events(data)
    pairs = torch.from_numpy(np.unique(np.stack([items, users]), axis=1))
    size = (data.num_items + 1, data.num_users)
    by_item = torch.sparse_coo_tensor(pairs, torch.ones(pairs.shape[1]), size, is_coalesced=True, check_invariants=True)
    scale = torch.bincount(pairs[0], minlength=size[0]).clamp(min=1).float().rsqrt()
    table = torch.empty(size[0], size[0])
    for columns in torch.arange(size[0]).split(max(1, 2**25 // data.num_users)):
        chosen = pairs[:, (pairs[0] >= columns[0]) & (pairs[0] <= columns[-1])]
        block = torch.zeros(data.num_users, len(columns))
        block[chosen[1], chosen[0] - columns[0]] = 1
        table[:, columns] = torch.sparse.mm(by_item, block) * scale[columns]
    return _item_to_item((table * scale[:, None])[:, 1:].contiguous(), {})


def _item_to_item(table: Tensor, settings: dict[str, Any], columns: Tensor | None = None) -> list[Floor]:
    """Floors that sum (I + 1, ...) rows of the newest items, by weight; row 0 is padding's.

    Args:
        columns: (W, I) what the sums are multiplied with; None where rows are similarities already.
    """

    def score(batch: Batch, newest: int, decay: float) -> Tensor:
        back = batch.mask.sum(1, keepdim=True) - 1 - torch.arange(batch.items.shape[1])  # (B, L) 0 at the newest
        weights = decay ** back.clamp(min=0).float() * ((back >= 0) & (back < newest))
        summed = F.embedding_bag(batch.items, table, per_sample_weights=weights, mode="sum")
        return summed if columns is None else summed @ columns

    return [
        Floor({**settings, "newest": newest, "decay": decay}, partial(score, newest=newest, decay=decay))
        for newest, decay in product(NEWEST, DECAYS)
        if newest > 1 or decay == 1  # one item's weight orders nothing
    ]


def _training_events(data: SequenceDataModule) -> tuple[Array64, Array64, Array64]:
    """(E,) user numbers, item ids and times of the training events, user by user."""
    events, ends = data.events, data.splits.train_ends
    users, places = ranges(np.arange(data.num_users, dtype=np.int64), events.offsets[:-1], ends)
    return users, events.items[places].astype(np.int64), events.timestamps[places]


def measure(
    floor: Floor, batches: Iterable[Batch], config: Config, data: SequenceDataModule
) -> tuple[Groups, list[tuple[Tensor, ...]]]:
    """Metrics over evaluation batches, coverage included, and the ranks as ``write_ranks`` wants them."""
    c = config.evaluation
    metrics = RankingMetrics(c.ks, c.bucket_edges, c.history_edges, data.pool is not None)
    coverage = Coverage(c.ks, data.num_items)
    ranked: list[tuple[Tensor, ...]] = []
    for batch in batches:
        scores, targets = floor.score(batch), batch.targets.max(dim=1).values
        ranks, ties = target_ranks(scores, targets, batch.seen)
        metrics.update(ranks, ties, data.train_counts[targets], batch.history_lengths, data.is_cold(targets))
        coverage.update(scores, batch.seen)
        ranked.append((batch.users, targets, ranks, batch.history_lengths))
    groups: Groups = metrics.compute()
    groups["all"] |= coverage.compute()
    return groups, ranked


def choose(floors: list[Floor], data: SequenceDataModule, config: Config) -> Floor:
    """The settings that are best by ``callbacks.monitor`` on at most ``TUNED_ON`` validation batches."""
    if len(floors) == 1:
        return floors[0]
    loader = data.val_dataloader()
    step = -(-len(loader) // TUNED_ON)
    batches = [batch for number, batch in enumerate(loader) if number % step == 0]
    name = config.callbacks.monitor.removeprefix("val/")
    values = []
    for floor in floors:
        groups, _ = measure(floor, batches, config, data)
        values.append(groups["all"][name])
        log.info("%s: %s %.4f", floor.settings, name, values[-1])
    return floors[int(np.argmax(values))]


def all_floors(data: SequenceDataModule, config: Config) -> Iterator[tuple[str, str, list[Floor]]]:
    """Name, fingerprint of the item vectors, and choices of settings, of each floor that the config allows."""
    yield "popularity", "none", popularity(data)
    yield "recent", "none", recent_popularity(data)
    if isinstance(config.items, CachedItemsConfig):
        table = embed_catalog(data.catalog, config.dataset.text, config.llm, cache_dir(config))
        yield "text", table.fingerprint, text_neighbours(data, table.vectors.float(), config.items.whiten_epsilon)
    else:
        log.warning("items=%s stores no item vectors: no text floor; items=cached gives one", config.items.name)
    if data.num_items <= MOST_ITEMS:
        yield "co_occurrence", "none", co_occurrence(data)
    else:
        log.warning("%d items: no floor of co-occurrence, which takes at most %d", data.num_items, MOST_ITEMS)


def run_floors(config: Config, folder: Path) -> list[Path]:
    """Measure every floor that ``folder`` has not on the same data; returns all run folders, ``folder/floor_NAME``.

    Raises:
        ConfigError: dataset=sharded, whose training events no process holds.
    """
    quiet_libraries()
    config = pin_dtype(replace(config, seed=0))  # nothing is drawn
    data = build_datamodule(config)
    if not isinstance(data, SequenceDataModule):
        raise ConfigError(f"dataset={config.dataset.name}: floors count over all events, and no process holds them all")
    config = pin_template(config, data.catalog)
    folders: list[Path] = []
    popular: Groups = {}
    for name, vectors, floors in all_floors(data, config):
        identity = {**data_identity(config, data), "item vectors": vectors}
        folders.append(folder / f"floor_{name}")
        if (finished := folders[-1] / "metrics.json").is_file():
            content = json.loads(finished.read_text())
            if content["identity"] == identity:
                popular = popular or content["results"]["test"]
                log.info("%s: finished before", folders[-1])
                continue
            finished.unlink()
        started = time.perf_counter()
        floor = choose(floors, data, config)
        fitted = time.perf_counter()
        val, _ = measure(floor, data.val_dataloader(), config, data)
        test, ranked = measure(floor, data.test_dataloader(), config, data)
        popular = popular or test  # the first floor
        results = {"val": val, "test": test, "popularity": popular}
        seconds = {"fit": fitted - started, "total": time.perf_counter() - started}
        write_run_info(replace(config, experiment_name=folders[-1].name), folders[-1])
        write_ranks(folders[-1] / "ranks.parquet", ranked, data)
        report = full_report(results, identity, name)
        if floor.settings:
            settings = ", ".join(f"{key}={value}" for key, value in floor.settings.items())
            report += f"\n\nChosen by {config.callbacks.monitor}: {settings}."
        (folders[-1] / "report.md").write_text(report + "\n")
        content = {"results": results, "identity": identity, "epochs": 0, "seconds": seconds}
        write_json(finished, content | {"settings": floor.settings})  # last: with it the floor is finished
        print(f"\n{report}\n\nrun folder: {folders[-1]}")
    return folders


@report_errors
def _run(cfg: DictConfig) -> None:
    run_floors(check(cfg), Path(HydraConfig.get().runtime.output_dir))


main = hydra.main(version_base="1.3", config_path=CONF_DIR, config_name="train")(_run)

if __name__ == "__main__":
    main()
