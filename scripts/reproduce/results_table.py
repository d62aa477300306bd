"""Finished runs -> the results table: means over seeds, differences user by user, and a plot.

    python scripts/reproduce/results_table.py runs/reproduce/ml100k/ce runs/reproduce/ml100k/nce

Writes docs/<data set>.png, and the tables between the markers of docs/results.md, the short one between README.md's.
"""

import argparse
import json
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from statistics import mean, stdev

import numpy as np
import numpy.typing as npt
import polars as pl
import yaml

from hllm.report import text_table

ROOT = Path(__file__).resolve().parents[2]
METRICS = ("hr@10", "ndcg@10", "hr@50", "ndcg@50", "hr@200", "ndcg@200", "mrr")
BASELINE = "sasrec"
KNOWN = {
    "movielens_100k": """Known points on the same split, candidates and masking, from a run of torch-rechub 0.9.0 on 2
CPU cores: popularity hr@10 .0848, ndcg@10 .0435 (ties broken by sort order); its light HLLM on MiniLM vectors (mean
pooling, 2 layers, L=50) after two epochs over a random quarter of its prefix rows, .1060 / .0533, which is not its
converged accuracy."""
}
ABOUT_BASELINE = (
    "`sasrec` is the same user transformer on a learned vector an item instead of LLM vectors: causal, pre-norm, with "
    "positions and the time since the previous event, a cosine head and the named loss. The SASRec of the paper has "
    "no time, a dot product and binary cross entropy. Each row is one config; what was tried for each is in "
    "[the log](log.md)."
)


@dataclass(frozen=True)
class Row:
    """All seeds of one experiment, in order; ``ndcg`` (U,) is each user's NDCG@10, mean over seeds."""

    name: str
    seeds: list[int]
    metrics: list[dict[str, dict[str, dict[str, float]]]]
    ndcg: npt.NDArray[np.float64]
    seconds: float

    def spread(self, metric: str, group: str = "all", split: str = "test") -> str:
        values = self.values(metric, group, split)
        return f"{mean(values):.4f} ± {stdev(values):.4f}" if len(set(values)) > 1 else f"{values[0]:.4f}"

    def values(self, metric: str, group: str = "all", split: str = "test") -> list[float]:
        return [results[split][group][metric] for results in self.metrics]

    @property
    def loss(self) -> str:
        return self.name.rpartition("_")[2]


def user_ndcg(run: Path) -> npt.NDArray[np.float64]:
    """(U,) NDCG@10 of each test user, in order of user id."""
    ranks = pl.read_parquet(run / "ranks.parquet").sort("user")["rank"].to_numpy()
    return np.where(ranks < 10, 1 / np.log2(ranks + 2), 0)


def read_rows(folders: list[Path], same_seeds: bool = True) -> tuple[list[Row], dict[str, str], dict[str, str]]:
    """Rows by experiment, the data's identity, and the environment, with the commits of all runs.

    Raises:
        SystemExit: rows of different seeds, or on different data: their means could not be compared.
    """
    runs: dict[str, dict[int, Path]] = {}
    for path in sorted(path for folder in folders for path in folder.glob("*/metrics.json")):
        config = yaml.safe_load((path.parent / "config.yaml").read_text())
        found = runs.setdefault(config["experiment_name"], {})
        if config["seed"] in found:
            raise SystemExit(
                f"error: {found[config['seed']]} and {path.parent} are both {config['experiment_name']} "
                f"seed {config['seed']}: move one of them"
            )
        found[config["seed"]] = path.parent
    if not runs:
        raise SystemExit(f"error: no finished run in {', '.join(map(str, folders))}")
    if same_seeds and len({tuple(sorted(found)) for found in runs.values()}) != 1:
        seeds = {name: sorted(found) for name, found in runs.items()}
        raise SystemExit(f"error: every experiment needs the same seeds, found {seeds}")
    rows, data, commits = [], set(), set()
    for name, found in runs.items():
        paths = [found[seed] for seed in sorted(found)]
        records = [json.loads((path / "metrics.json").read_text()) for path in paths]
        environments = [json.loads((path / "environment.json").read_text()) for path in paths]
        data |= {record["identity"]["interactions"] for record in records}
        commits |= {str(environment["git"]) for environment in environments}
        ndcg = np.mean([user_ndcg(path) for path in paths], axis=0)
        seconds = mean(record["seconds"]["total"] for record in records)
        rows.append(Row(name, sorted(found), [record["results"] for record in records], ndcg, seconds))
    if len(data) != 1:
        raise SystemExit(f"error: the runs are on different data: {data}")
    rows.sort(key=lambda row: (row.loss, BASELINE not in row.name, row.name))
    return rows, records[-1]["identity"], environments[-1] | {"git": ", ".join(sorted(commits))}


def main_table(rows: list[Row], metrics: tuple[str, ...]) -> str:
    floor = ["popularity", *(rows[0].spread(metric, split="popularity") for metric in metrics)]
    return text_table(
        ["experiment", *metrics], [floor, *([f"`{row.name}`", *map(row.spread, metrics)] for row in rows)]
    )


def difference_table(rows: list[Row]) -> str:
    """Each row against the id baseline of its loss, user by user: standard errors are over users, not over seeds."""
    lines = []
    for row in rows:
        baseline = next(other for other in rows if other.loss == row.loss and BASELINE in other.name)
        if row is not baseline:
            gap = row.ndcg - baseline.ndcg
            error = gap.std(ddof=1) / np.sqrt(len(gap))
            lines.append(
                [
                    f"`{row.name}`",
                    f"`{baseline.name}`",
                    f"{gap.mean():+.4f}",
                    f"{error:.4f}",
                    f"{gap.mean() / error:+.1f}",
                ]
            )
    return text_table(["experiment", "against", "ndcg@10 difference", "standard error", "in errors"], lines)


def group_table(rows: list[Row], metric: str) -> str:
    groups = [group for group in rows[0].metrics[0]["test"] if group != "all"]
    header = [f"{metric} of targets seen", *(f"{g} times ({rows[0].metrics[0]['test'][g]['users']})" for g in groups)]
    floor = ["popularity", *(rows[0].spread(metric, group, "popularity") for group in groups)]
    return text_table(header, [floor, *([f"`{row.name}`", *(row.spread(metric, g) for g in groups)] for row in rows)])


def plot(rows: list[Row], path: Path) -> None:
    """NDCG@10 overall, and by how often the target was seen in training."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    groups = [group for group in rows[0].metrics[0]["test"] if group != "all"]
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), width_ratios=(1, 1.6))
    names = [row.name.partition("_")[2] for row in rows]
    colours = [plt.get_cmap("tab10")(index) for index in range(len(rows))]
    floor = rows[0].values("ndcg@10", split="popularity")[0]
    for place, row in enumerate(rows):
        values = row.values("ndcg@10")
        left.barh(place, mean(values), xerr=stdev(values), color=colours[place])
    left.axvline(floor, color="black", linestyle=":", label="popularity")
    left.set_yticks(range(len(rows)), names)
    left.invert_yaxis()
    left.set_xlabel("NDCG@10, mean and sd over seeds")
    left.legend(loc="lower left", bbox_to_anchor=(0, 1), frameon=False)
    width = 0.8 / len(rows)
    for place, row in enumerate(rows):
        means = [mean(row.values("ndcg@10", group)) for group in groups]
        right.bar(np.arange(len(groups)) + place * width, means, width, color=colours[place], label=names[place])
    right.set_xticks(np.arange(len(groups)) + 0.4 - width / 2, groups)
    right.set_xlabel("occurrences of the target in training")
    right.set_ylabel("NDCG@10")
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def write_between(path: Path, name: str, text: str) -> None:
    """Replace what stands between the markers of that name.

    Raises:
        SystemExit: the file has no such markers.
    """
    begin, end = f"<!-- {name}: scripts/reproduce -->", f"<!-- end of {name} -->"
    before, found, rest = path.read_text().partition(begin)
    _, closed, after = rest.partition(end)
    if not found or not closed:
        raise SystemExit(f"error: {path.name} needs the markers {begin} and {end}, with what is between to be replaced")
    path.write_text(f"{before}{begin}\n\n{text}\n\n{end}{after}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folders", nargs="+", type=Path, help="sweep folders")
    rows, identity, environment = read_rows(parser.parse_args().folders)
    users, seeds = len(rows[0].ndcg), len(rows[0].metrics)
    rate = mean(rows[0].values("hr@10"))
    about = (
        f"{identity['dataset']}, protocol `{identity['protocol']}`: whole catalogue ranked, history masked, ties at "
        f"mid-rank; {users} test users; data `{identity['interactions']}`. Mean ± sd over {seeds} seeds. "
        f"One standard error of hr@10 over users is {np.sqrt(rate * (1 - rate) / users):.3f}, whatever the seeds. "
        f"{date.today()}, commit `{environment['git']}`."
    )
    versions = ", ".join(
        f"{name} {value}" for name, value in environment.items() if name not in ("git", "gpu", "threads")
    )
    picture = ROOT / "docs" / f"{identity['dataset']}.png"
    plot(rows, picture)
    times = ", ".join(f"`{row.name}` {row.seconds:.0f} s" for row in rows)
    parts = [
        about,
        main_table(rows, METRICS),
        ABOUT_BASELINE,
        KNOWN.get(identity["dataset"], ""),
        f"![NDCG@10 overall and by target frequency]({picture.name})",
        "## What the differences are worth",
        "NDCG@10 of each user, mean over seeds, minus the same user's under the id baseline with the same loss.",
        difference_table(rows),
        "## Cold and warm targets",
        "Targets by occurrences in training; the number of users in brackets.",
        group_table(rows, "ndcg@10"),
        group_table(rows, "hr@10"),
        "## Cost",
        f"Seconds of one run on one thread of a machine shared by two, embeddings cached: {times}. {versions}.",
    ]
    write_between(ROOT / "docs" / "results.md", "results", "\n\n".join(parts))
    write_between(ROOT / "README.md", "results", f"{about}\n\n{main_table(rows, METRICS[:3])}")


if __name__ == "__main__":
    main()
