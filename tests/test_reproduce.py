"""The scripts that make docs/results.md: their rows are experiments, their numbers are the runs'."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from hllm.config import CONF_DIR

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "scripts" / "reproduce"))
import pages
import sweep_plot
import table

ROOT = Path(__file__).resolve().parents[1]


def test_rows_are_the_experiments_on_these_data_sets() -> None:
    rows = {row for one in table.read_tables().values() for row in one.rows}
    files = {path.stem for path in Path(CONF_DIR).glob("experiment/*.yaml")}
    assert files == rows


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
    assert sorted(found) == sorted(["orderings", *tables, *sweeps, "peers"])


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
