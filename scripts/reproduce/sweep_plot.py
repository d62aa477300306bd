"""The runs of a sweep of conf/sweep -> a plot and a table: a metric against the value swept, a line a system.

Each value is compared with the next smaller one of the same system, and the largest with the smallest, user by user.

    python -m hllm.train -m sweep=data_scaling experiment=ml1m_sasrec,ml1m_light seed=0,1,2
    python scripts/reproduce/sweep_plot.py data_scaling runs/sweeps/...      # any number of sweep folders
    python scripts/reproduce/sweep_plot.py data_scaling                      # again, from its record

Writes docs/sweep_NAME.png and the section of docs/results.md. A system is an experiment, or a config's parts.
"""

import argparse
import json
import re
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import orderings
import records
import yaml
from pages import ROOT, write_between
from table import ABOUT_DIFFERENCES, gap_table

from hllm.compare import DATA, Comparison, Run, read_run
from hllm.config import CONF_DIR
from hllm.report import measured_on, text_table
from hllm.significance import seed_interval

SWEEPS = {
    "data_scaling": "Data scaling: shares of the training users",
    "history_length": "History length",
    "negatives": "Negatives",
    "layers": "Layers of the user model",
}
METRICS = ("hr@10", "ndcg@10")
Point = dict[str, Any]


def swept_key(name: str) -> str:
    """The key of the config that a sweep has several values of."""
    content = yaml.safe_load((Path(CONF_DIR) / "sweep" / f"{name}.yaml").read_text())
    (key,) = [key for key, values in content["hydra"]["sweeper"]["params"].items() if "," in str(values)]
    return str(key)


def read_points(folders: list[Path], key: str) -> tuple[list[Point], list[Point]]:
    """A point a run: system, value, seed and metrics; and the differences of values, as of a table's rows.

    Raises:
        SystemExit: two runs are of one system, value and seed, or rank other candidates than the rest.
    """
    points: dict[tuple[str, float, int], Point] = {}
    runs: dict[str, dict[float, list[Run]]] = {}
    for path in records.find_runs(folders):
        run, found = read_run(path), json.loads((path / "metrics.json").read_text())
        config = run.config
        value: Any = config
        for part in key.split("."):
            value = value[part]
        identity = {name: run.identity[name] for name in DATA}
        # what data_scaling sweeps: who is trained on, not what is ranked
        identity["protocol"] = re.sub(r" trained on \S+% of users seed \d+", "", identity["protocol"])
        system = (
            config["experiment_name"] or f"{config['items']['name']} {config['user']['name']} {config['loss']['name']}"
        )
        test = found["results"]["test"]["all"]
        point = {"system": system, "value": value, "seed": config["seed"], "identity": identity}
        point |= {metric: round(test[metric], 6) for metric in METRICS}
        point["git"] = json.loads((path / "environment.json").read_text())["git"]
        place = (system, value, config["seed"])
        if place in points:
            raise SystemExit(f"error: {path} is {system}, {key}={value}, seed {config['seed']} for the second time")
        points[place] = point
        runs.setdefault(system, {}).setdefault(value, []).append(replace(run, identity=identity))
    data = {json.dumps(point["identity"]) for point in points.values()}
    if len(data) > 1:
        raise SystemExit(f"error: the runs are on different data: {', '.join(sorted(data))}")
    gaps = []
    for system, values in sorted(runs.items()):
        swept = sorted(values)
        for below, value in [*pairwise(swept), *([(swept[0], swept[-1])] if len(swept) > 2 else [])]:
            sides = (sorted(values[one], key=lambda run: run.seed) for one in (value, below))
            names = (f"{system} {key}={one:g}" for one in (value, below))
            gaps += records.differences_of(*names, Comparison(*sides))
    return [points[place] for place in sorted(points)], gaps


def lines_of(points: list[Point]) -> dict[str, dict[float, list[Point]]]:
    """System -> value, in order -> its seeds."""
    lines: dict[str, dict[float, list[Point]]] = {}
    for point in points:
        lines.setdefault(point["system"], {}).setdefault(point["value"], []).append(point)
    return lines


def section(name: str, key: str, points: list[Point], gaps: list[Point]) -> str:
    title = f"## {SWEEPS.get(name, name)}"
    if not points:
        return f"{title}\n\nNot measured."
    rows = []
    for system, values in lines_of(points).items():
        for value, seeds in values.items():
            spreads = [seed_interval([point[metric] for point in seeds]) for metric in METRICS]
            cells = [f"{one.mean:.4f}" + (f" ± {one.sd:.4f}" if len(seeds) > 1 else "") for one in spreads]
            rows.append([f"`{system}`", f"{value:g}", str(len(seeds)), *cells])
    commits = ", ".join(sorted({str(point["git"]) for point in points}))
    data = measured_on(points[0]["identity"])
    about = f"{data}. `{key}` is swept by `sweep={name}`; mean ± sd over seeds; commit `{commits}`."
    picture = f"![{SWEEPS.get(name, name)}](sweep_{name}.png)"
    parts = [title, about, picture, text_table(["experiment", key, "seeds", *METRICS], rows)]
    if gaps:
        compared = "### Each value against the one below, the largest against the smallest"
        parts += [compared, ABOUT_DIFFERENCES, gap_table(gaps)]
    return "\n\n".join(parts)


def plot(name: str, key: str, points: list[Point], path: Path) -> None:
    """Mean and standard deviation over seeds of each metric; a logarithmic axis where values grow by factors."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(METRICS), figsize=(10, 3.8))
    for metric, axis in zip(METRICS, axes, strict=True):
        for system, values in lines_of(points).items():
            spreads = [seed_interval([point[metric] for point in seeds]) for seeds in values.values()]
            deviations = [one.sd if one.sd == one.sd else 0.0 for one in spreads]  # one seed has none
            means = [one.mean for one in spreads]
            axis.errorbar(list(values), means, yerr=deviations, marker="o", capsize=3, label=system)
        swept = sorted({point["value"] for point in points})
        if swept[0] > 0 and swept[-1] >= 8 * swept[0]:
            axis.set_xscale("log")
        axis.set_xticks(swept, [f"{value:g}" for value in swept])
        axis.minorticks_off()
        axis.set_xlabel(key)
        axis.set_ylabel(f"test {metric}")
        axis.grid(alpha=0.3)
    axes[0].legend(frameon=False)
    figure.suptitle(SWEEPS.get(name, name))
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sweep", choices=SWEEPS)
    parser.add_argument("folders", nargs="*", type=Path, help="with finished runs, at any depth")
    args = parser.parse_args()
    key, path = swept_key(args.sweep), records.path_of(f"sweep_{args.sweep}")
    if args.folders:
        points, gaps = read_points(args.folders, key)
        records.FOLDER.mkdir(exist_ok=True)
        lists = (",\n".join(f"    {json.dumps(one)}" for one in values) for values in (points, gaps))
        path.write_text('{{\n  "points": [\n{}\n  ],\n  "differences": [\n{}\n  ]\n}}\n'.format(*lists))
    else:
        record = json.loads(path.read_text()) if path.is_file() else {"points": [], "differences": []}
        points, gaps = record["points"], record["differences"]
    if points:
        plot(args.sweep, key, points, ROOT / "docs" / f"sweep_{args.sweep}.png")
    write_between(ROOT / "docs" / "results.md", f"sweep {args.sweep}", section(args.sweep, key, points, gaps))
    orderings.write()


if __name__ == "__main__":
    main()
