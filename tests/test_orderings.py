"""Which orderings hold: rows found in either direction and in sweeps, verdicts, and the page as the records have it."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "scripts" / "reproduce"))
import orderings
import records
import table

ROOT = Path(__file__).resolve().parents[1]


def gap(experiment: str, against: str, difference: float, p: float, group: str = "all") -> list[dict[str, Any]]:
    ends = {"difference": difference, "low": difference - 0.01, "high": difference + 0.02, "p": p}
    both = {"experiment": experiment, "against": against, "group": group}
    return [{**both, "metric": metric, **ends} for metric in records.COMPARED]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(records, "FOLDER", tmp_path)
    return tmp_path


def cells(ordering: dict[str, Any]) -> list[str]:
    line = orderings.section([{"claim": "better", **ordering}]).splitlines()[-1]
    return [cell.strip() for cell in line.strip("|").split("|")]


@pytest.mark.parametrize(
    ("rows", "shown", "verdict"),
    [
        (["a", "b"], "+0.0300 [+0.0200, +0.0500]", "yes"),
        (["b", "a"], "-0.0300 [-0.0500, -0.0200]", "no"),
        (["c", "a"], "+0.0300 [+0.0200, +0.0500]", "not told apart"),
    ],
)
def test_a_difference_is_read_in_either_direction(folder: Path, rows: list[str], shown: str, verdict: str) -> None:
    runs = [{"experiment": name} for name in ("a", "a", "b", "c")]
    gaps = gap("a", "b", 0.03, 0.001) + gap("c", "a", 0.03, 0.04) + gap("a", "b", -0.5, 0.001, "cold")
    (folder / "toy.json").write_text(json.dumps({"runs": runs, "differences": gaps}))
    found = cells({"record": "toy", "rows": rows})
    assert (found[3], found[-1]) == (shown, verdict)
    assert found[2] == " and ".join(str(sum(run["experiment"] == row for run in runs)) for row in rows)


def test_a_group_of_targets_is_compared_by_itself(folder: Path) -> None:
    gaps = gap("a", "b", 0.03, 0.001) + gap("a", "b", -0.5, 0.001, "cold")
    (folder / "toy.json").write_text(json.dumps({"runs": [], "differences": gaps}))
    assert cells({"record": "toy", "rows": ["a", "b"], "group": "cold"})[3].startswith("-0.5000")


def test_of_a_sweep_the_largest_value_is_compared_with_the_smallest(folder: Path) -> None:
    points = [{"system": "a", "value": value} for value in (1, 1, 2, 12, 12)]
    gaps = gap("a k=2", "a k=1", 0.1, 0.9) + gap("a k=12", "a k=2", 0.1, 0.9) + gap("a k=12", "a k=1", 0.2, 0.001)
    (folder / "sweep_toy.json").write_text(json.dumps({"points": points, "differences": gaps}))
    found = cells({"record": "sweep_toy", "experiment": "a"})
    assert found[1:4] == ["`a k=12` - `a k=1`", "2 and 2", "+0.2000 [+0.1900, +0.2200]"]


def test_what_was_not_measured_says_so(folder: Path) -> None:
    assert "not measured" in cells({"record": "none", "rows": ["a", "b"]})


def test_the_page_is_what_the_records_say() -> None:
    page = (ROOT / "docs" / "results.md").read_text()
    written = page.partition("<!-- orderings: scripts/reproduce -->")[2].partition("<!-- end of orderings -->")[0]
    assert written.strip() == orderings.section(orderings.read_orderings())


def test_every_ordering_is_compared_somewhere() -> None:
    """Its rows are a pair of the table, or one of them is the baseline, with which all are compared."""
    tables = table.read_tables()
    for ordering in orderings.read_orderings():
        if "rows" in ordering:
            one = tables[ordering["record"]]
            assert set(ordering["rows"]) <= one.rows.keys()
            assert one.baseline in ordering["rows"] or ordering["rows"] in one.pairs
