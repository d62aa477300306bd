"""docs/benchmarks.md from the records of the benchmarks.

python scripts/bench/report.py
"""

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
from measure import RECORDS, Curve, Table, read_record

PAGE = Path(__file__).resolve().parents[2] / "docs" / "benchmarks.md"
TITLES = {
    "embed": "Item embedding",
    "loss": "Exact softmax",
    "user": "User models",
    "epoch": "Training epochs, beside the peers",
    "joint": "Both language models trained together",
    "rank": "Ranking",
    "data": "Batches of the loader",
    "startup": "Start-up",
    "end_to_end": "From the command to the test scores",
    "curves": "Cost curves",
}
DEVICES = {"cpu": "CPU", "cuda": "GPU"}
ABOUT = """# Benchmarks

Written by `scripts/bench/report.py` from `scripts/bench/records/`. Within a table all ways ran in turns in one process:
`times as fast` is the median over the rounds of the first way's seconds over this one's, the range that of the rounds.
Machines are shared: compare within a table, not between tables. Each script's `--help` says what it compares.
"""


def main() -> None:
    parts = [ABOUT.strip()]
    for name, title in TITLES.items():
        parts.append(f"## {title}\n\n`scripts/bench/{name}.py`")
        for device, label in DEVICES.items():
            path = RECORDS / f"{name}-{device}.json"
            if not path.is_file():
                parts.append(f"{label}: not measured.")
                continue
            record, tables, curves = read_record(path)
            parts.append(about(record["environment"]))
            for part in (*tables, *curves):
                parts.append(f"**{part.title}**\n\n{measured(part)}\n\n{part.text()}")
            if curves:
                parts.append(f"![cost curves]({draw(curves, device).name})")
    PAGE.write_text("\n\n".join(parts) + "\n")


def draw(curves: list[Curve], device: str) -> Path:
    """All curves beside one another, logarithmic on both axes."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(curves), figsize=(5 * len(curves), 4), layout="constrained", squeeze=False)
    for axis, curve in zip(axes[0], curves, strict=True):
        for (way, points), exponent in zip(curve.seconds.items(), curve.exponents().values(), strict=True):
            axis.loglog(*zip(*sorted(points.items()), strict=True), marker="o", label=f"{way}: {exponent:.2f}")
        axis.set(title=curve.title, xlabel=curve.size, ylabel="seconds")
        axis.legend(title="exponent", fontsize="small")
    path = PAGE.parent / f"bench_curves-{device}.png"
    figure.savefig(path, dpi=100, metadata={"Software": None})
    pyplot.close(figure)
    return path


def about(found: dict[str, Any]) -> str:
    hardware = found["gpu"] if found["device"] == "cuda" else f"{found['cpu']}, {found['threads']} threads"
    return f"{hardware}; torch {found['torch']}, Python {found['python']}."


def measured(part: Table | Curve) -> str:
    return "`{command}`; {date}, commit `{git}`".format(**part.measured)


if __name__ == "__main__":
    main()
