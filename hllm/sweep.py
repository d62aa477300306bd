"""The tables of a multirun, written when its last job ends: each run, and means over seeds."""

import csv
import json
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from hydra.core.utils import JobReturn, JobStatus
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from hllm.report import measured_on, text_table

Row = dict[str, str | float]


class SweepTable(Callback):
    """Hydra callback: sweep.csv and sweep.md in the sweep folder, and the table on the terminal.

    The files are written after every job, because Hydra never calls ``on_multirun_end`` once a job has failed. A
    failed job has a row without numbers: a sweep never hides what it lost.
    """

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **kwargs: Any) -> None:
        if config.hydra.mode is not RunMode.MULTIRUN:
            return
        folder = Path(config.hydra.sweep.dir)
        write_tables(folder)
        if job_return.status is JobStatus.FAILED:
            print(f"job {config.hydra.job.num} failed; the other jobs go on, their table is {folder / 'sweep.md'}")

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        folder = Path(config.hydra.sweep.dir)
        print(f"\n{(folder / 'sweep.md').read_text()}\nsweep folder: {folder}")


def write_tables(folder: Path) -> None:
    """sweep.csv and sweep.md of the jobs that have begun so far."""
    rows = sweep_rows(folder)
    header = list(dict.fromkeys(key for row in rows for key in row))
    with (folder / "sweep.csv").open("w", newline="") as file:
        csv.writer(file).writerows([header, *([row.get(key, "") for key in header] for row in rows)])
    (folder / "sweep.md").write_text(sweep_report(header, rows) + "\n")


def sweep_rows(folder: Path) -> list[Row]:
    """A row for each job's folder: number, overrides, seed, and metrics where it finished; then the popularity floor.

    The floor has a row for each data set, protocol, catalogue and data fingerprint among the jobs.
    """
    jobs = [path.parents[1] for path in folder.glob("*/.hydra/overrides.yaml")]
    rows, floors = [], {}
    for job in sorted(jobs, key=lambda path: (len(path.name), path.name)):
        overrides = [str(override) for override in OmegaConf.load(job / ".hydra" / "overrides.yaml")]
        row: Row = {"job": job.name, "overrides": " ".join(o for o in overrides if not o.startswith("seed="))}
        row["seed"] = next((o.removeprefix("seed=") for o in overrides if o.startswith("seed=")), "")
        metrics = job / "metrics.json"
        if metrics.is_file():
            record = json.loads(metrics.read_text())
            results, identity = record["results"], record["identity"]
            row |= _metrics("val", results["val"]) | _metrics("test", results["test"])
            row["data"] = measured_on(identity)
            floor = _metrics("test", results["popularity"])
            floors[row["data"]] = {"job": "", "overrides": "popularity", "seed": "", **floor, "data": row["data"]}
        rows.append(row)
    return [*rows, *floors.values()]


def _metrics(split: str, groups: dict[str, dict[str, float]]) -> Row:
    return {f"{split}/{name}": value for name, value in groups["all"].items() if name not in ("users", "ties")}


def sweep_report(header: list[str], rows: list[Row]) -> str:
    """Every run as a row of test metrics, and below it mean and standard deviation over seeds where there are some."""
    names = [key for key in header if key.startswith("test/")]
    data = list(dict.fromkeys(str(row["data"]) for row in rows if "data" in row))
    # said once, below, where all jobs share it
    columns = ["job", "overrides", "seed", *names, *(["data"] if len(data) > 1 else [])]
    runs = []
    for row in rows:
        absent = "" if any(name in row for name in names) else "failed"
        runs.append([_cell(row.get(key, absent)) for key in columns])
    groups: dict[str, list[Row]] = {}
    for row in rows:
        if names and names[0] in row and row["overrides"] != "popularity":
            groups.setdefault(str(row["overrides"]), []).append(row)
    means = [
        [overrides, str(len(group)), *(_spread([float(row[name]) for row in group]) for name in names)]
        for overrides, group in groups.items()
        if len(group) > 1
    ]
    tables = [text_table(columns, runs)]
    if means:
        tables.append(text_table(["mean ± sd over seeds", "seeds", *names], means))
    if len(data) == 1:
        tables.append(f"All on {data[0]}.")
    return "\n\n".join(tables)


def _cell(value: str | float) -> str:
    return value if isinstance(value, str) else f"{value:.4f}"


def _spread(values: list[float]) -> str:
    return f"{mean(values):.4f} ± {stdev(values):.4f}"
