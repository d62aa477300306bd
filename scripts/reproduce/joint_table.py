"""Finished runs of the joint form -> its tables in docs/results.md: means over seeds, and differences seed by seed.

    python scripts/reproduce/joint_table.py ml100k runs/reproduce/joint      # also ml1m, beauty
    python scripts/reproduce/joint_table.py ml1m --experiments               # names of the rows

Runs lie in FOLDER/EXPERIMENT/SEED. A row without a finished run is written as not measured.
"""

import argparse
import json
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from statistics import mean, median, stdev

import numpy as np
import numpy.typing as npt
import polars as pl
import yaml
from pages import ROOT, write_between

from hllm.report import text_table

METRICS = tuple(f"{name}@{k}" for name in ("hr", "ndcg") for k in (5, 10, 50, 200))
COMPARED = ("hr@10", "ndcg@10")


@dataclass(frozen=True)
class Line:
    """A row of a table: its experiment, what it is, and the paper's R@10 and N@10 on Pixel200K."""

    experiment: str
    label: str
    paper: tuple[float, float] | None = None


@dataclass(frozen=True)
class Section:
    """What is written for one data set.

    Args:
        missing: what stands in a row of the paper without runs.
        tables: heading -> its rows; a row may stand in several.
        pairs: differences of interest, first minus second.
    """

    title: str
    missing: str
    tables: dict[str, list[Line]]
    pairs: list[tuple[str, str]]

    @property
    def experiments(self) -> list[str]:
        return list(dict.fromkeys(line.experiment for lines in self.tables.values() for line in lines))


def paper_tables(data: str) -> dict[str, list[Line]]:
    both = Line(f"{data}_joint_pre_pre", "both pretrained, both trained", (5.581, 3.100))
    transformer = Line(f"{data}_joint_transformer", "SmolLM2 items, transformer users", (5.239, 2.883))
    return {
        "Pre-training (the paper's Table 2)": [
            Line(f"{data}_joint_scratch_scratch", "items scratch, users scratch", (5.063, 2.755)),
            Line(f"{data}_joint_scratch_pre", "items scratch, users pretrained", (5.416, 2.969)),
            Line(f"{data}_joint_pre_scratch", "items pretrained, users scratch", (5.331, 2.940)),
            both,
        ],
        "What is trained (Table 4)": [
            Line(f"{data}_item_frozen", "items frozen, users trained", (0.945, 0.486)),
            Line(f"{data}_user_frozen", "items trained, users frozen", (2.470, 1.343)),
            both,
            Line(f"{data}_sasrec_llm", "ids, a User LLM from scratch (SASRec-1B)", (2.868, 1.640)),
            Line(f"{data}_light", "light form: cached vectors, user transformer, ce"),
            Line(f"{data}_sasrec", "SASRec: ids, user transformer, ce"),
        ],
        "Item model (Table 5; users: a transformer from scratch)": [
            Line(f"{data}_joint_bert", "BERT-base items", (4.020, 2.158)),
            transformer,
        ],
        "User model (Table 6; items pretrained, users from scratch)": [
            transformer,
            Line(f"{data}_joint_2l", "a User LLM of 2 layers", (5.233, 2.898)),
            Line(f"{data}_joint_pre_scratch", "a whole User LLM", (5.331, 2.940)),
        ],
    }


def paper_pairs(data: str) -> list[tuple[str, str]]:
    joint = f"{data}_joint_pre_pre"
    others = ("item_frozen", "user_frozen", "joint_scratch_scratch", "light", "sasrec")
    return [(joint, f"{data}_{other}") for other in others]


SECTIONS = {
    "ml100k": Section(
        "Joint training on MovieLens-100k",
        "not measured",
        {
            "On a CPU": [
                Line("ml100k_joint_scratch", "joint, Item LLM (MiniLM, 3 layers) from scratch"),
                Line("ml100k_joint_pretrained", "joint, Item LLM (MiniLM, 3 layers) pretrained"),
                Line("ml100k_joint_frozen", "the same Item LLM frozen, the User LLM trained"),
                Line("ml100k_joint_light", "light form: cached vectors, user transformer, ce"),
                Line("ml100k_joint_sasrec", "SASRec: ids, user transformer, ce"),
            ]
        },
        [
            ("ml100k_joint_pretrained", "ml100k_joint_frozen"),
            ("ml100k_joint_pretrained", "ml100k_joint_scratch"),
            ("ml100k_joint_pretrained", "ml100k_joint_light"),
            ("ml100k_joint_pretrained", "ml100k_joint_sasrec"),
        ],
    ),
    "ml1m": Section(
        "Joint training on MovieLens-1M", "not measured: needs a GPU", paper_tables("ml1m"), paper_pairs("ml1m")
    ),
    "beauty": Section(
        "Joint training on Amazon Beauty", "not measured: needs a GPU", paper_tables("beauty"), paper_pairs("beauty")
    ),
}


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


def user_ndcg(run: Path) -> npt.NDArray[np.float64]:
    """(U,) NDCG@10 of each test user, in order of user id."""
    ranks = pl.read_parquet(run / "ranks.parquet").sort("user")["rank"].to_numpy()
    return np.where(ranks < 10, 1 / np.log2(ranks + 2), 0)


def read_rows(folders: list[Path]) -> tuple[list[Row], dict[str, str], dict[str, str]]:
    """Rows by experiment, the data's identity, and the environment, with the commits of all runs.

    Raises:
        SystemExit: a seed found twice, no run at all, or rows on different data.
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
    return rows, records[-1]["identity"], environments[-1] | {"git": ", ".join(sorted(commits))}


def section_text(section: Section, rows: dict[str, Row], about: str) -> str:
    parts = [f"## {section.title}", about]
    for heading, lines in section.tables.items():
        parts += [f"### {heading}", lines_table(section, lines, rows)]
    pairs = [pair for pair in section.pairs if set(pair) <= rows.keys()]
    if pairs:
        parts += ["### Differences", ABOUT_DIFFERENCES, difference_table([(rows[a], rows[b]) for a, b in pairs])]
    return "\n\n".join(parts)


ABOUT_DIFFERENCES = (
    "First minus second, seed by seed: all seeds that both rows have. The spread is the larger standard deviation of "
    "the two rows over their seeds; beyond it, a difference is more than the luck of a seed. The standard error is "
    "over users, of the same users' differences, means over seeds."
)


def lines_table(section: Section, lines: list[Line], rows: dict[str, Row]) -> str:
    with_paper = any(line.paper for line in lines)
    header = ["experiment", "what", "seeds", *METRICS, *(["paper, Pixel200K: R@10, N@10 x100"] if with_paper else [])]
    table = []
    if measured := next(iter(rows.values()), None):
        floor = [measured.spread(metric, split="popularity") for metric in METRICS]
        table.append(["popularity", "", "", *floor, *([""] if with_paper else [])])
    for line in lines:
        row = rows.get(line.experiment)
        missing = section.missing if line.paper else "not measured"
        values = [missing, *[""] * (len(METRICS) - 1)] if row is None else list(map(row.spread, METRICS))
        seeds = "" if row is None else str(len(row.seeds))
        paper = [f"{line.paper[0]:.3f}, {line.paper[1]:.3f}" if line.paper else ""] if with_paper else []
        table.append([f"`{line.experiment}`", line.label, seeds, *values, *paper])
    return text_table(header, table)


def difference_table(pairs: list[tuple[Row, Row]]) -> str:
    """Each pair's differences by seed, beside what seeds alone do."""
    lines = []
    for first, second in pairs:
        seeds = [seed for seed in first.seeds if seed in second.seeds]
        for metric in COMPARED:
            a, b = (dict(zip(row.seeds, row.values(metric), strict=True)) for row in (first, second))
            gaps = [a[seed] - b[seed] for seed in seeds]
            spreads = [stdev(values.values()) for values in (a, b) if len(values) > 1]
            users = first.ndcg - second.ndcg if metric == "ndcg@10" and len(first.ndcg) == len(second.ndcg) else None
            lines.append(
                [
                    f"`{first.name}` - `{second.name}`",
                    metric,
                    ", ".join(f"{gap:+.4f}" for gap in gaps) or "no seed in common",
                    f"{mean(gaps):+.4f}" + (f" ± {stdev(gaps):.4f}" if len(gaps) > 1 else "") if gaps else "",
                    f"{max(spreads):.4f}" if spreads else "one seed",
                    ("yes" if abs(mean(gaps)) > max(spreads) else "no") if gaps and spreads else "",
                    "" if users is None else f"{users.std(ddof=1) / np.sqrt(len(users)):.4f}",
                ]
            )
    header = ["difference", "metric", "by seed", "mean ± sd", "spread", "beyond the spread", "standard error"]
    return text_table(header, lines)


def speed(folder: Path) -> str:
    """Of an experiment's runs that trained an Item LLM: items encoded a second, and memory at most; else nothing."""
    curves = [pl.read_csv(path, infer_schema_length=None) for path in folder.glob("*/metrics.csv")]
    curves = [curve for curve in curves if "train/items_per_second" in curve.columns]
    if not curves:
        return ""
    rate, memory = (
        [value for curve in curves for value in curve[f"train/{name}"].drop_nulls()]
        for name in ("items_per_second", "peak_memory_gb")
    )
    return f" ({median(rate):.0f} items/s in training, {max(memory):.1f} GB)"


def describe(identity: dict[str, str], environment: dict[str, str], rows: dict[str, Row], folder: Path) -> str:
    users = len(next(iter(rows.values())).ndcg)
    times = ", ".join(f"`{row.name}` {row.seconds:.0f} s{speed(folder / row.name)}" for row in rows.values())
    versions = ", ".join(f"{key} {environment[key]}" for key in ("python", "torch", "transformers", "gpu", "threads"))
    return (
        f"{identity['dataset']}, protocol `{identity['protocol']}`: whole catalogue ranked, history masked, ties at "
        f"mid-rank; {users} test users; data `{identity['interactions']}`. Mean ± sd over the seeds. {date.today()}, "
        f"commit `{environment['git']}`.\n\nSeconds of one run: {times}. {versions}."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("section", choices=SECTIONS)
    parser.add_argument("folder", nargs="?", type=Path, help="FOLDER/EXPERIMENT/SEED holds a run; none: an empty table")
    parser.add_argument("--experiments", action="store_true", help="print the rows' experiments and stop")
    args = parser.parse_args()
    section = SECTIONS[args.section]
    if args.experiments:
        print("\n".join(section.experiments))
        return
    about, rows = "No row was measured.", {}
    if args.folder is not None:
        found, identity, environment = read_rows([args.folder / name for name in section.experiments])
        rows = {name: row for name in section.experiments for row in found if row.name == name}
        about = describe(identity, environment, rows, args.folder)
    write_between(ROOT / "docs" / "results.md", f"joint {args.section}", section_text(section, rows, about))


if __name__ == "__main__":
    main()
