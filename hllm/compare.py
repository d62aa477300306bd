"""python -m hllm.compare RUN_A RUN_B: is one run better than another, on the same users, from their stored ranks.

The statistics are those of ``hllm.significance``. N predictions: one a user, but under temporal ... successive.
"""

import json
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl
import torch
from omegaconf import OmegaConf

from hllm.cli import report_errors, split_own
from hllm.config import EvaluationConfig, from_plain, to_plain
from hllm.errors import ConfigError
from hllm.metrics import group_labels, rank_metrics
from hllm.report import measured_on, text_table
from hllm.resume import differences
from hllm.significance import DRAWS, Paired, Spread, holm, paired, seed_interval

USAGE = """usage: python -m hllm.compare RUN_A RUN_B [metric=ndcg@10] [ks=10,50]

Compares two systems on the test users that both ranked: metrics of each, their difference a - b with its 95 % interval
and p-value over users, and over seeds where a side has several; then by target popularity and history length.
  RUN_A RUN_B  a run folder of hllm.train or hllm.floors, or a folder of such: one system's runs, a seed each
  metric       what is broken down (unset: ndcg of the first length)
  ks           list lengths (unset: evaluation.ks of the first run)"""

Array = npt.NDArray[np.float64]
DATA = ("dataset", "protocol", "catalogue", "interactions")
"Parts of a run's identity that two runs must share for their numbers to be of the same thing."


@dataclass(frozen=True)
class Run:
    """A finished run, as it lies in its folder.

    Args:
        config: the run's config as plain values.
        identity: what it was measured on.
        ranks: user, target, rank and, of newer runs, target_count, cold and history; in the order of user and target.
    """

    folder: Path
    config: dict[str, Any]
    identity: dict[str, str]
    ranks: pl.DataFrame

    @property
    def seed(self) -> int:
        return int(self.config["seed"])

    @property
    def data(self) -> dict[str, str]:
        return {name: self.identity[name] for name in DATA}

    def metric(self, name: str) -> Array:
        """(N,) hr@k, ndcg@k or mrr of each prediction."""
        ks = [int(name.partition("@")[2] or 1)]
        values = rank_metrics(torch.from_numpy(self.ranks["rank"].to_numpy(writable=True)), ks)
        column: Array = values[:, EvaluationConfig(ks).metric_names().index(name)].numpy()
        return column


def read_run(folder: Path) -> Run:
    """Raises ConfigError where a file of a finished run is missing."""
    for name in ("config.yaml", "metrics.json", "ranks.parquet"):
        if not (folder / name).is_file():
            raise ConfigError(f"{folder}: has no {name}: not a run folder, or the run is not finished")
    config = OmegaConf.to_container(OmegaConf.load(folder / "config.yaml"))
    assert isinstance(config, dict)
    ranks = pl.read_parquet(folder / "ranks.parquet").sort("user", "target", maintain_order=True)
    return Run(folder, config, json.loads((folder / "metrics.json").read_text())["identity"], ranks)  # type: ignore[arg-type]  # keys are strings


def read_runs(folder: Path) -> list[Run]:
    """A run folder, or the run folders right below a folder: one system's runs, by seed.

    Raises:
        ConfigError: there is none; one is not finished; two have one seed, or differ in what ``comparable`` keeps.
    """
    if not folder.is_dir():
        raise ConfigError(f"{folder}: no such folder; give a run folder, or one that holds a system's runs")
    if (folder / "config.yaml").is_file():
        return [read_run(folder)]
    folders = sorted(path.parent for path in folder.glob("*/config.yaml"))
    if not folders:
        raise ConfigError(f"{folder}: holds no run folder, which would have a config.yaml")
    runs = sorted((read_run(path) for path in folders), key=lambda run: run.seed)
    first = runs[0]
    for run in runs[1:]:
        changed = next(differences(comparable(first.config), comparable(run.config)), None)
        if changed is not None:
            raise ConfigError(
                f"{folder}: holds runs of several systems: {run.folder.name} and {first.folder.name} differ, "
                f"{changed}; give the folder of one system's runs"
            )
    seeds = [run.seed for run in runs]
    if len(set(seeds)) < len(seeds):
        raise ConfigError(f"{folder}: holds seeds {seeds}: give one run a seed")
    return runs


def comparable(config: dict[str, Any]) -> dict[str, Any]:
    """What the seeds of one system share of a config: keys that came later have their defaults, and where a run was
    made, logged and resumed from does not count.
    """
    try:
        config = to_plain(from_plain(config))
    except ConfigError:  # of another version: as it was written
        config = dict(config)
    left_out = {
        "dataset": ("root", "num_workers"),
        "trainer": ("accelerator", "enable_progress_bar", "devices"),
        "callbacks": ("checkpoint_steps",),
    }
    plain = {key: value for key, value in config.items() if key not in ("seed", "cache_dir", "ckpt", "logger")}
    for group in left_out.keys() & plain.keys():
        plain[group] = {key: value for key, value in plain[group].items() if key not in left_out[group]}
    return plain


def check_comparable(a: Run, b: Run) -> None:
    """Raises ConfigError unless two runs rank the same candidates for the same targets."""
    for name in DATA:
        if a.identity[name] != b.identity[name]:
            raise ConfigError(
                f"{a.folder} and {b.folder} cannot be compared: their {name} is {a.identity[name]} and "
                f"{b.identity[name]}"
            )
    if not a.ranks.select("user", "target").equals(b.ranks.select("user", "target")):
        raise ConfigError(
            f"{a.folder} and {b.folder} cannot be compared: they ranked {len(a.ranks)} and {len(b.ranks)} targets, "
            "not the same ones; was one run with trainer.limit_test_batches?"
        )


@dataclass(frozen=True)
class Comparison:
    """Two systems, each with its runs; all are of the same users and candidates."""

    a: list[Run]
    b: list[Run]

    def __post_init__(self) -> None:
        for run in (*self.a, *self.b):
            check_comparable(self.a[0], run)

    def paired(self, metric: str, chosen: npt.NDArray[np.bool_] | None = None) -> Paired:
        """The difference over users, of each user's mean over seeds.

        Args:
            chosen: (N,) which predictions; unset takes all.
        """
        means = [np.mean([run.metric(metric) for run in side], axis=0) for side in (self.a, self.b)]
        users = self.a[0].ranks["user"].to_numpy()
        where = slice(None) if chosen is None else chosen
        return paired(means[0][where], means[1][where], users[where])

    def seeds(self, metric: str) -> Spread | None:
        """The difference over seeds: of the runs of one seed, or of each run and the other side's only one.

        None where both sides have several runs, of other seeds, or one run each.
        """
        a, b = ({run.seed: float(run.metric(metric).mean()) for run in side} for side in (self.a, self.b))
        if len(a) == len(b) == 1 or (min(len(a), len(b)) > 1 and a.keys() != b.keys()):
            return None
        longer = a if len(a) >= len(b) else b
        return seed_interval([_of(a, seed) - _of(b, seed) for seed in longer])

    def groups(self) -> list[tuple[str, npt.NDArray[np.bool_]]]:
        """Name and (N,) members of each group of targets or histories that has any; none for runs that lack them."""
        ranks, config = self.a[0].ranks, self.a[0].config["evaluation"]
        cold = ranks["cold"].to_numpy() if "cold" in ranks.columns else np.zeros(len(ranks), np.bool_)
        groups = [("target cold", cold)] if cold.any() else []
        for column, edges, first, prefix in (
            ("target_count", config.get("bucket_edges"), 0, "target "),
            ("history", config.get("history_edges"), 1, "history "),
        ):
            if column in ranks.columns and edges:
                place = np.searchsorted(edges, ranks[column].to_numpy(), side="right")
                if column == "target_count":
                    place[cold] = -1
                for number, label in enumerate(group_labels(edges, first)):
                    if (place == number).any():
                        groups.append((prefix + label, place == number))
        return groups


def _of(runs: dict[int, float], seed: int) -> float:
    return runs[seed] if len(runs) > 1 else next(iter(runs.values()))


def comparison_report(comparison: Comparison, ks: Sequence[int], metric: str) -> str:
    """What the comparison says, as Markdown."""
    a, b = comparison.a, comparison.b
    names = EvaluationConfig(list(ks)).metric_names()
    rows = []
    for name in names:
        spread = comparison.seeds(name)
        seeds = [] if spread is None else [f"{spread.mean:+.4f} ± {spread.sd:.4f}", _interval(spread.low, spread.high)]
        rows.append([name, *_cells(comparison.paired(name)), *seeds])
    header = ["metric", "a", "b", "a - b", "95 % over users", "p"]
    if len(rows[0]) > len(header):
        header += ["a - b over seeds, ± sd", "95 % over seeds"]
    tables = ["\n".join(f"{side}: {_described(runs)}" for side, runs in (("a", a), ("b", b)))]
    several = "" if a[0].ranks["user"].is_unique().all() else ", several of a user"
    tables.append(f"{measured_on(a[0].identity)}: {len(a[0].ranks)} predictions{several}")
    tables.append(text_table(header, rows))
    if groups := comparison.groups():
        found = [comparison.paired(metric, chosen) for _, chosen in groups]
        adjusted = holm([one.p for one in found])
        lines = [
            [label, str(chosen.sum()), *_cells(one)[:-1], _p(p)]
            for (label, chosen), one, p in zip(groups, found, adjusted, strict=True)
        ]
        tables.append(
            text_table([f"{metric} by group", "predictions", "a", "b", "a - b", "95 % over users", "p (Holm)"], lines)
        )
    tables.append(f"Intervals: bootstrap over users. p: sign-flip test over users, two-sided, {DRAWS} draws.")
    return "\n\n".join(tables)


def _described(runs: list[Run]) -> str:
    name = runs[0].config.get("experiment_name") or runs[0].folder.name
    folder = runs[0].folder if len(runs) == 1 else runs[0].folder.parent
    return f"{name}, seed {', '.join(str(run.seed) for run in runs)} ({folder})"


def _cells(found: Paired) -> list[str]:
    means = [f"{found.a:.4f}", f"{found.b:.4f}", f"{found.difference:+.4f}"]
    return [*means, _interval(found.low, found.high), _p(found.p)]


def _interval(low: float, high: float) -> str:
    return f"[{low:+.4f}, {high:+.4f}]"


def _p(p: float) -> str:
    return f"{p:.4f}"


@report_errors
def main(arguments: list[str] | None = None) -> None:
    arguments = sys.argv[1:] if arguments is None else arguments
    if any(argument in ("-h", "--help") for argument in arguments):
        print(USAGE)
        return
    own, folders = split_own(arguments, ("metric", "ks"))
    if len(folders) != 2:
        raise ConfigError(f"give two folders, not {len(folders)}\n{USAGE}")
    comparison = Comparison(*(read_runs(Path(folder)) for folder in folders))
    try:
        chosen = [int(k) for k in own["ks"].split(",")] if own["ks"] else comparison.a[0].config["evaluation"]["ks"]
    except ValueError as error:
        raise ConfigError(f"ks={own['ks']}: must be whole numbers with commas between, as ks=10,50") from error
    ks = EvaluationConfig(chosen).ks
    metric = own["metric"] or f"ndcg@{ks[0]}"
    if re.fullmatch(r"mrr|(hr|ndcg)@[1-9]\d*", metric) is None:
        raise ConfigError(f"metric={metric}: choose of hr@K, ndcg@K, mrr")
    print(comparison_report(comparison, ks, metric))


if __name__ == "__main__":
    main()
