"""The tables of a multirun."""

import csv
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from hllm.sweep import sweep_rows, write_tables


def job(folder: Path, number: int, overrides: list[str], hit_rate: float | None) -> None:
    """What Hydra and a run leave of a job; one without a hit rate has failed."""
    (folder / str(number) / ".hydra").mkdir(parents=True)
    OmegaConf.save(OmegaConf.create(overrides), folder / str(number) / ".hydra" / "overrides.yaml")
    if hit_rate is not None:
        values = {"all": {"users": 9, "hr@10": hit_rate, "mrr": 0.5, "ties": 0.0}}
        floor = {"all": values["all"] | {"hr@10": 0.05}}
        identity = {"dataset": "toy", "protocol": "leave_one_out", "catalogue": "7 items", "interactions": "abc"}
        results = {"results": {"val": values, "test": values, "popularity": floor}, "identity": identity}
        (folder / str(number) / "metrics.json").write_text(json.dumps(results))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for seed, hit_rate in enumerate([0.1, 0.2, None, 0.6]):
        job(tmp_path, seed, ["loss=nce", f"seed={seed}"], hit_rate)
    job(tmp_path, 10, ["loss=ce", "seed=0"], 0.4)
    write_tables(tmp_path)
    return tmp_path


def table(folder: Path) -> list[list[str]]:
    lines = (folder / "sweep.md").read_text().splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_every_job_has_a_row_in_the_order_of_the_sweep(folder: Path) -> None:
    rows = table(folder)[2:7]
    assert [row[0] for row in rows] == ["0", "1", "2", "3", "10"]
    assert rows[0] == ["0", "loss=nce", "0", "0.1000", "0.5000"]


def test_a_failed_job_is_not_hidden(folder: Path) -> None:
    assert table(folder)[4] == ["2", "loss=nce", "2", "failed", "failed"]


def test_the_popularity_floor_stands_below_the_jobs(folder: Path) -> None:
    assert table(folder)[7] == ["", "popularity", "", "0.0500", "0.5000"]


def test_a_sweeps_table_says_what_it_was_measured_on(folder: Path) -> None:
    last = (folder / "sweep.md").read_text().splitlines()[-1]
    assert last == "All on toy, protocol leave_one_out, 7 items, data abc."


def test_means_and_deviations_are_over_the_seeds_that_finished(folder: Path) -> None:
    means = table(folder)[9:-2]
    assert means[0][0] == "mean ± sd over seeds"
    assert [row[:3] for row in means[2:]] == [["loss=nce", "3", "0.3000 ± 0.2646"]]


def test_the_csv_holds_every_digit_and_both_splits(folder: Path) -> None:
    with (folder / "sweep.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["test/hr@10"] for row in rows] == ["0.1", "0.2", "", "0.6", "0.4", "0.05"]
    assert rows[0]["val/mrr"] == "0.5"


def test_a_sweep_without_a_finished_job_still_has_its_table(tmp_path: Path) -> None:
    job(tmp_path, 0, ["loss=nce"], None)
    write_tables(tmp_path)
    assert sweep_rows(tmp_path) == [{"job": "0", "overrides": "loss=nce", "seed": ""}]
    assert "loss=nce" in (tmp_path / "sweep.md").read_text()


def sweep(folder: Path, data: Path, *overrides: str) -> subprocess.CompletedProcess[str]:
    command: list[Any] = [sys.executable, "-m", "hllm.train", "-m", "debug=smoke", f"dataset.root={data}"]
    command += ["dataset.check_counts=false", f"hydra.sweep.dir={folder}", "trainer.max_epochs=1", *overrides]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_a_failed_job_stops_neither_the_others_nor_the_table(tmp_path: Path, movielens_folder: Path) -> None:
    done = sweep(tmp_path, movielens_folder, "callbacks.patience=0,1")
    assert done.returncode != 0
    assert "error: callbacks.patience=0: must be at least 1" in done.stderr
    assert [(row["job"], "test/hr@10" in row) for row in sweep_rows(tmp_path)][:2] == [("0", False), ("1", True)]
    assert table(tmp_path)[2][3] == "failed"


def test_a_sweep_ends_with_its_table(tmp_path: Path, movielens_folder: Path) -> None:
    done = sweep(tmp_path, movielens_folder, "loss=nce,ce", "optimized_metric=val/mrr")
    assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path / "sweep.md").read_text() in done.stdout
    assert len({row["test/mrr"] for row in sweep_rows(tmp_path)}) == 3  # two jobs and the floor


def test_a_sweep_over_several_devices_is_refused(tmp_path: Path, movielens_folder: Path) -> None:
    done = sweep(tmp_path, movielens_folder, "trainer.devices=2", "trainer.accelerator=cpu")
    assert done.returncode != 0
    assert "error: trainer.devices=2: a sweep runs each job on one device" in done.stderr
