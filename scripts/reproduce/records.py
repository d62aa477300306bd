"""Finished runs -> the record of a table: a small JSON file that the table is written from, now and later.

Run folders are not committed. A record keeps what its page says of every run, and what only the ranks of all users can
tell: intervals over users, and paired differences from the table's baseline.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from hllm.compare import DATA, Comparison, comparable, read_run
from hllm.compare import Run as RankedRun
from hllm.report import measured_on
from hllm.resume import differences
from hllm.significance import user_interval

FOLDER = Path(__file__).resolve().parent / "records"
COMPARED = ("hr@10", "ndcg@10")
MACHINE = ("git", "hllm", "python", "torch", "machine", "threads", "gpu")
Record = dict[str, Any]


def path_of(name: str) -> Path:
    return FOLDER / f"{name}.json"


def empty() -> Record:
    return {"identity": None, "popularity": {}, "configs": {}, "runs": [], "intervals": {}, "differences": []}


def load(name: str) -> Record:
    """The record of that name; an empty one where nothing was measured."""
    if not path_of(name).is_file():
        return empty()
    record: Record = json.loads(path_of(name).read_text())
    return record


def save(name: str, record: Record) -> None:
    """One line a config, a run and a difference, so that a change shows as one."""

    def lines(values: Iterable[Any]) -> str:
        return ",\n".join(f"    {json.dumps(value)}" for value in values)

    FOLDER.mkdir(exist_ok=True)
    parts = [f'  "{key}": {json.dumps(record[key])}' for key in ("identity", "popularity", "intervals")]
    configs = ",\n".join(f"    {json.dumps(name)}: {json.dumps(config)}" for name, config in record["configs"].items())
    parts.append(f'  "configs": {{\n{configs}\n  }}')
    parts += [f'  "{key}": [\n{lines(record[key])}\n  ]' for key in ("runs", "differences")]
    path_of(name).write_text("{\n" + ",\n".join(parts) + "\n}\n")


def find_runs(folders: Sequence[Path]) -> list[Path]:
    """The finished run folders anywhere below."""
    found = sorted(path.parent for folder in folders for path in folder.rglob("metrics.json"))
    if not found:
        raise SystemExit(f"error: no finished run in {', '.join(map(str, folders))}")
    return found


def summary(folder: Path) -> dict[str, Any]:
    """What a record keeps of a run."""
    record = json.loads((folder / "metrics.json").read_text())
    environment = json.loads((folder / "environment.json").read_text())
    run = read_run(folder)
    day = date.fromtimestamp((folder / "metrics.json").stat().st_mtime)
    return {
        "experiment": run.config["experiment_name"] or folder.parent.name,
        "seed": run.seed,
        "target_time": bool(run.config["user"].get("target_time", False)),
        "date": day.isoformat(),
        "epochs": record["epochs"],
        "seconds": {name: round(value, 1) for name, value in record["seconds"].items()},
        "environment": {name: environment.get(name) for name in MACHINE},
        "settings": record.get("settings", {}),
        "speed": _speed(folder / "metrics.csv"),
        "val": _rounded(record["results"]["val"])["all"] if "val" in record["results"] else {},
        "test": _rounded(record["results"]["test"]),
    }


def _speed(curves: Path) -> dict[str, float]:
    """Of a run that trained an Item LLM: items encoded a second, and memory at most; nothing of others."""
    if not curves.is_file():
        return {}
    found = pl.read_csv(curves, infer_schema_length=None)
    if "train/items_per_second" not in found.columns:
        return {}
    rate, memory = (found[f"train/{name}"].drop_nulls() for name in ("items_per_second", "peak_memory_gb"))
    return {"items_per_second": round(rate.median(), 1), "peak_memory_gb": round(memory.max(), 2)}


def _rounded(groups: dict[str, dict[str, float]]) -> dict[str, dict[str, float]]:
    return {group: {name: round(value, 6) for name, value in values.items()} for group, values in groups.items()}


def update(record: Record, folders: Sequence[Path], baseline: str, pairs: Sequence[Sequence[str]] = ()) -> Record:
    """The record with the runs of these folders; a run of an experiment and seed that it has takes that one's place.

    Every experiment is compared with ``baseline``, and the first of each of ``pairs`` with the second. Intervals and
    differences need the ranks of all seeds that the record has of an experiment. Where they are not in the folders,
    earlier ones stay if no run of theirs is new, and go if one is. What seeds share of a config is kept, so that a seed
    measured later is known to be one.

    Raises:
        SystemExit: a run is on other data than the record, found twice, or of another config than its other seeds, be
            they in the folders or of the record.
    """
    paths = find_runs(folders)
    identity, popularity = record["identity"], record["popularity"]
    ranked: dict[str, dict[int, RankedRun]] = {}
    runs = {(run["experiment"], run["seed"]): run for run in record["runs"]}
    for path in paths:
        kept, run = summary(path), read_run(path)
        own = {name: run.identity[name] for name in DATA}
        identity = identity or own
        if own != identity:
            raise SystemExit(f"error: {path} is on {measured_on(own)}, the table on {measured_on(identity)}")
        seeds = ranked.setdefault(kept["experiment"], {})
        if run.seed in seeds:
            raise SystemExit(
                f"error: {seeds[run.seed].folder} and {path} are both {kept['experiment']} seed {run.seed}"
            )
        for other in seeds.values():
            for change in differences(comparable(other.config), comparable(run.config)):
                raise SystemExit(f"error: {path} is not a seed of {other.folder}: {change}")
        seeds[run.seed] = run
        runs[kept["experiment"], kept["seed"]] = kept
        if "popularity" in (results := json.loads((path / "metrics.json").read_text())["results"]):
            popularity = _rounded(results["popularity"])
    configs = dict(record["configs"])
    for name, seeds in ranked.items():
        first = next(iter(seeds.values()))
        if {seed for experiment, seed in runs if experiment == name} > seeds.keys():  # some of the record's stay
            for change in differences(comparable(configs[name]), comparable(first.config)):
                raise SystemExit(
                    f"error: {first.folder} is not a seed of the record's {name}: {change}; measure its other seeds "
                    "again too, or forget all runs of the record with --fresh"
                )
        configs[name] = comparable(first.config)
    whole = {
        name: [seeds[seed] for seed in sorted(seeds)]
        for name, seeds in ranked.items()
        if set(seeds) == {seed for experiment, seed in runs if experiment == name}
    }
    kept_intervals = {name: value for name, value in record["intervals"].items() if name not in ranked}
    intervals = kept_intervals | {name: _intervals(seeds) for name, seeds in whole.items()}
    gaps = [gap for gap in record["differences"] if not {gap["experiment"], gap["against"]} & ranked.keys()]
    wanted = [(name, baseline) for name in whole if name != baseline] + [(a, b) for a, b in pairs]
    for name, against in dict.fromkeys(wanted):
        if name in whole and against in whole:
            gaps += differences_of(name, against, Comparison(whole[name], whole[against]))
    return {
        "identity": identity,
        "popularity": popularity,
        "configs": dict(sorted(configs.items())),
        "runs": [runs[key] for key in sorted(runs)],
        "intervals": dict(sorted(intervals.items())),
        "differences": gaps,
    }


def _intervals(seeds: list[RankedRun]) -> dict[str, list[float]]:
    """95 % over users of each user's mean over seeds."""
    users = seeds[0].ranks["user"].to_numpy()
    values = {metric: np.mean([run.metric(metric) for run in seeds], axis=0) for metric in COMPARED}
    return {metric: [round(end, 6) for end in user_interval(own, users)] for metric, own in values.items()}


def differences_of(name: str, against: str, comparison: Comparison) -> list[dict[str, Any]]:
    """Of all users, and of cold items where the protocol has some; over seeds where both have the same."""
    groups: list[tuple[str, Any]] = [("all", None)]
    groups += [("cold", chosen) for group, chosen in comparison.groups() if group == "target cold"]
    found = []
    for group, chosen in groups:
        for metric in COMPARED:
            gap = {key: round(value, 6) for key, value in asdict(comparison.paired(metric, chosen)).items()}
            found.append({"experiment": name, "against": against, "group": group, "metric": metric, **gap})
            spread = comparison.seeds(metric) if chosen is None else None
            if spread is not None and np.isfinite(spread.sd):
                found[-1]["seeds"] = {key: round(value, 6) for key, value in asdict(spread).items()}
    return found
