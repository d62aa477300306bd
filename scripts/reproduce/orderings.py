"""Which orderings of the literature hold here: orderings.yaml and the records -> a section of docs/results.md.

    python scripts/reproduce/orderings.py

table.py and sweep_plot.py write it too.
"""

from pathlib import Path
from typing import Any

import records
import yaml
from pages import ROOT, write_between

from hllm.report import text_table
from hllm.significance import holm

HERE = Path(__file__).resolve().parent
LEVEL = 0.05
ABOUT = (
    "What the HLLM paper and others say is better, as the tables and sweeps below have it: the first row beside the "
    "second, user by user, with bootstrap intervals over users; p-values corrected by Holm over this table. A "
    "row's own scores, and differences over seeds, are in its table."
)


def read_orderings() -> list[dict[str, Any]]:
    content: list[dict[str, Any]] = yaml.safe_load((HERE / "orderings.yaml").read_text())
    return content


def find(ordering: dict[str, Any]) -> tuple[list[str], dict[str, dict[str, Any]]]:
    """The names of the two rows, and metric -> their difference; none where they were not measured."""
    record = records.load(ordering["record"])
    gaps = [gap for gap in record["differences"] if gap["group"] == ordering.get("group", "all")]
    if experiment := ordering.get("experiment"):  # a sweep's last difference is of its largest value and its smallest
        gaps = [gap for gap in gaps if gap["experiment"].partition(" ")[0] == experiment]
        pair = [gaps[-1]["experiment"], gaps[-1]["against"]] if gaps else [experiment]
    else:
        pair = ordering["rows"]
    found: dict[str, dict[str, Any]] = {}
    for gap in gaps:
        if [gap["experiment"], gap["against"]] == pair:
            found[gap["metric"]] = gap
        elif [gap["against"], gap["experiment"]] == pair:
            found[gap["metric"]] = gap | {"difference": -gap["difference"], "low": -gap["high"], "high": -gap["low"]}
    return pair, found


def num_seeds(record: dict[str, Any], row: str) -> int:
    """Runs of a table's row, or of a value of a sweep, which its row ends with."""
    if "points" not in record:
        return sum(run["experiment"] == row for run in record["runs"])
    system, _, value = row.partition(" ")
    return sum(point["system"] == system and value.endswith(f"={point['value']:g}") for point in record["points"])


def section(orderings: list[dict[str, Any]]) -> str:
    found = [find(ordering) for ordering in orderings]
    metrics = records.COMPARED
    corrected = iter(holm([gaps[metric]["p"] for _, gaps in found for metric in metrics if metric in gaps]))
    lines = []
    for ordering, (pair, gaps) in zip(orderings, found, strict=True):
        names = " - ".join(f"`{name}`" for name in pair)
        if not gaps:
            lines.append([ordering["claim"], names, "", *["not measured", ""] * len(metrics), ""])
            continue
        record = records.load(ordering["record"])
        seeds = " and ".join(str(num_seeds(record, name)) for name in pair)
        cells, verdicts = [], []
        for metric in metrics:
            gap, p = gaps[metric], next(corrected)
            cells += [f"{gap['difference']:+.4f} [{gap['low']:+.4f}, {gap['high']:+.4f}]", f"{p:.4f}"]
            verdicts.append("not told apart" if p >= LEVEL else "yes" if gap["difference"] > 0 else "no")
        lines.append([ordering["claim"], names, seeds, *cells, " / ".join(dict.fromkeys(verdicts))])
    header = ["", "rows", "seeds", *(cell for metric in metrics for cell in (metric, "p")), "holds here"]
    return f"## Orderings\n\n{ABOUT}\n\n{text_table(header, lines)}"


def write() -> None:
    write_between(ROOT / "docs" / "results.md", "orderings", section(read_orderings()))


if __name__ == "__main__":
    write()
