"""The scripts that make docs/results.md: their rows are experiments, their numbers are the runs'."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from hllm.config import CONF_DIR

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "scripts" / "reproduce"))
import joint_table
import pages
import sweep_plot
import table

ROOT = Path(__file__).resolve().parents[1]

JOINT, FROZEN = "ml100k_joint_pretrained", "ml100k_joint_frozen"
VALUES = {
    (JOINT, 0): 0.20,
    (JOINT, 1): 0.22,
    (JOINT, 10): 0.24,
    (FROZEN, 0): 0.10,
    (FROZEN, 1): 0.15,
    (FROZEN, 10): 0.11,
}


def save_run(folder: Path, experiment: str, seed: int, value: float, data: str = "abc") -> None:
    """What a finished run leaves, with one value for all metrics."""
    run = folder / experiment / str(seed)
    run.mkdir(parents=True)
    metrics = {"all": dict.fromkeys(joint_table.METRICS, value)}
    record = {
        "results": {"test": metrics, "popularity": metrics},
        "identity": {"dataset": "toy", "protocol": "leave_one_out", "interactions": data},
        "seconds": {"total": 100.0},
    }
    (run / "metrics.json").write_text(json.dumps(record))
    versions = dict.fromkeys(("git", "python", "torch", "transformers", "gpu", "threads"), "1")
    (run / "environment.json").write_text(json.dumps(versions))
    (run / "config.yaml").write_text(f"experiment_name: {experiment}\nseed: {seed}\n")
    ranks = {"user": ["b", "a"], "rank": [0.0, 50.0 if experiment == FROZEN else 0.0]}
    pl.DataFrame(ranks).write_parquet(run / "ranks.parquet")


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    for (experiment, seed), value in VALUES.items():
        save_run(tmp_path, experiment, seed, value)
    return tmp_path


def cells(table: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]


def rows_of(folder: Path) -> dict[str, joint_table.Row]:
    found, _, _ = joint_table.read_rows(sorted(folder.iterdir()))
    return {row.name: row for row in found}


@pytest.mark.parametrize("name", list(joint_table.SECTIONS))
def test_every_row_of_the_joint_tables_is_an_experiment(name: str) -> None:
    section = joint_table.SECTIONS[name]
    assert {f"{row}.yaml" for row in section.experiments} <= {path.name for path in Path(CONF_DIR).glob("experiment/*")}
    assert {row for pair in section.pairs for row in pair} <= set(section.experiments)


def test_rows_are_the_experiments_on_these_data_sets() -> None:
    rows = {row for section in joint_table.SECTIONS.values() for row in section.experiments}
    rows |= {row for one in table.read_tables().values() for row in one.rows}
    files = {path.stem for path in Path(CONF_DIR).glob("experiment/*.yaml")}
    assert {name for name in files if name.startswith(("ml1m_", "beauty_", "ml100k_"))} == rows


def test_values_keep_their_seeds(runs: Path) -> None:
    """Seed 10's folder sorts between those of 1 and 2, which must not pair it with another's."""
    row = rows_of(runs)[JOINT]
    assert dict(zip(row.seeds, row.values("ndcg@10"), strict=True)) == {0: 0.20, 1: 0.22, 10: 0.24}


def test_differences_are_taken_seed_by_seed(runs: Path) -> None:
    rows = rows_of(runs)
    line = cells(joint_table.difference_table([(rows[JOINT], rows[FROZEN])]))[3]
    assert line[:4] == [f"`{JOINT}` - `{FROZEN}`", "ndcg@10", "+0.1000, +0.0700, +0.1300", "+0.1000 ± 0.0300"]
    assert line[4:6] == [f"{np.std([0.10, 0.15, 0.11], ddof=1):.4f}", "yes"]
    gaps = [1.0, 0.0]  # of user a, who is found at once or never, and of user b
    assert line[6] == f"{np.std(gaps, ddof=1) / np.sqrt(2):.4f}"


def test_a_difference_within_the_spread_of_seeds_is_not_called_one(tmp_path: Path) -> None:
    for seed, (first, second) in enumerate([(0.20, 0.19), (0.10, 0.11), (0.15, 0.14)]):
        save_run(tmp_path, JOINT, seed, first)
        save_run(tmp_path, FROZEN, seed, second)
    rows = rows_of(tmp_path)
    assert [row[5] for row in cells(joint_table.difference_table([(rows[JOINT], rows[FROZEN])]))[2:]] == ["no", "no"]


def test_only_seeds_that_both_rows_have_are_compared(runs: Path) -> None:
    save_run(runs, "ml100k_joint_scratch", 1, 0.02)
    rows = rows_of(runs)
    assert cells(joint_table.difference_table([(rows[JOINT], rows["ml100k_joint_scratch"])]))[2][2] == "+0.2000"


def test_a_row_without_a_run_is_not_measured(runs: Path) -> None:
    text = joint_table.section_text(joint_table.SECTIONS["ml100k"], rows_of(runs), "about")
    table = {row[0]: row[2:4] for row in cells(text.partition("### On a CPU")[2].partition("###")[0]) if len(row) > 3}
    assert table["`ml100k_joint_scratch`"] == ["", "not measured"]
    assert table[f"`{JOINT}`"] == ["3", "0.2200 ± 0.0200"]


def test_rows_on_different_data_are_refused(runs: Path) -> None:
    save_run(runs, "ml100k_joint_scratch", 0, 0.1, data="other")
    with pytest.raises(SystemExit, match="different data"):
        rows_of(runs)


def test_a_run_found_twice_is_refused(runs: Path) -> None:
    (runs / JOINT / "1").rename(runs / JOINT / "again")
    save_run(runs, JOINT, 1, 0.3)
    with pytest.raises(SystemExit, match="are both ml100k_joint_pretrained seed 1"):
        rows_of(runs)


def test_a_section_is_replaced_and_the_rest_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "results.md"
    path.write_text("top\n<!-- joint a: scripts/reproduce -->old<!-- end of joint a -->\nbottom")
    pages.write_between(path, "joint a", "new")
    pages.write_between(path, "joint a", "newer")
    written = "top <!-- joint a: scripts/reproduce --> newer <!-- end of joint a --> bottom"
    assert " ".join(path.read_text().split()) == written
    with pytest.raises(SystemExit, match="needs the markers"):
        pages.write_between(path, "joint b", "new")


def test_the_results_page_has_the_markers_of_all_sections() -> None:
    text = (ROOT / "docs" / "results.md").read_text()
    found = re.findall(r"<!-- ([\w ]+): scripts/reproduce -->\n.*?<!-- end of \1 -->", text, re.S)
    tables = [f"table {name}" for name in table.read_tables()]
    sweeps = [f"sweep {name}" for name in sweep_plot.SWEEPS]
    assert found == [*tables, *sweeps, "peers", *(f"joint {name}" for name in joint_table.SECTIONS)]


def run_script(tmp_path: Path, experiments: str) -> subprocess.CompletedProcess[str]:
    """queue with a python that only notes what it is asked for, and fails for the experiment ``bad``."""
    python = tmp_path / "venv" / "bin" / "python"
    python.parent.mkdir(parents=True, exist_ok=True)
    python.write_text(f'#!/usr/bin/env bash\necho "$@" >> {tmp_path}/asked\n[[ "$*" != *experiment=bad* ]]\n')
    python.chmod(0o755)
    command = [
        str(ROOT / "scripts" / "reproduce" / "queue"),
        str(tmp_path / "runs"),
        experiments,
        "0 1",
        "user.num_layers=3",
    ]
    environment = os.environ | {"VENV": str(tmp_path / "venv")}
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


def test_finished_runs_are_skipped_and_cut_ones_go_on(tmp_path: Path) -> None:
    for path in ("runs/a/0/metrics.json", "runs/a/1/checkpoints/last.ckpt"):
        (tmp_path / path).parent.mkdir(parents=True)
        (tmp_path / path).touch()
    done = run_script(tmp_path, "a")
    assert done.returncode == 0, done.stderr
    run = tmp_path / "runs/a/1"
    expected = f"-m hllm.train experiment=a seed=1 hydra.run.dir={run} trainer.enable_progress_bar=false"
    expected += f" ckpt={run}/checkpoints/last.ckpt user.num_layers=3"
    assert (tmp_path / "asked").read_text().splitlines() == [expected]


def test_a_failed_run_is_named_and_stops_no_other(tmp_path: Path) -> None:
    done = run_script(tmp_path, "bad good")
    assert done.returncode == 1
    assert done.stderr.startswith(f"error: failed: {tmp_path}/runs/bad/0 {tmp_path}/runs/bad/1;")
    asked = (tmp_path / "asked").read_text().split()
    assert [word for word in asked if word.startswith("experiment=")] == [
        f"experiment={e}" for e in ("bad", "good")
    ] * 2
