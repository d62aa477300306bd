"""The tables of docs/results.md that are written from records: what the record keeps, and what the page says of it."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np
import polars as pl
import pytest
import yaml

from hllm.compare import read_run
from hllm.config import CONF_DIR, compose, to_plain
from hllm.significance import paired

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "scripts" / "reproduce"))
import records
import sweep_plot
import table

ROOT = Path(__file__).resolve().parents[1]
USERS = [f"u{number}" for number in range(30)]
TOY = table.Table("Toy", "ids", {"ids": "on ids", "text": "on text", "never": "not run"}, pairs=[["text", "other"]])


def save_run(
    folder: Path, experiment: str, seed: int, *overrides: str, data: str = "abc", protocol: str = "leave_one_out"
) -> Path:
    """What a finished run leaves: better ranks for ``text``, different ones each seed."""
    run = folder / experiment / str(seed)
    run.mkdir(parents=True)
    config = replace(compose(list(overrides)), experiment_name=experiment, seed=seed)
    (run / "config.yaml").write_text(yaml.safe_dump(to_plain(config)))
    draw = np.random.default_rng([seed, len(experiment)])
    ranks = draw.integers(0, 8 if experiment == "text" else 60, len(USERS)).astype(np.float64)
    hits = (ranks < 10).mean()
    values = {"users": 30, **dict.fromkeys(table.METRICS, float(hits)), "ties": 0.0}
    cold = " cold " in protocol
    groups = {"all": values, "cold" if cold else "0": values | {"users": 10}, "history 1-19": values | {"users": 20}}
    record = {
        "results": {"val": {"all": values}, "test": groups, "popularity": groups},
        "identity": {"dataset": "toy", "protocol": protocol, "catalogue": "9 items", "interactions": data},
        "epochs": 4,
        "seconds": {"fit": 10.0 + seed, "total": 20.0},
    }
    record["identity"]["item vectors"] = experiment  # type: ignore[index]
    (run / "metrics.json").write_text(json.dumps(record))
    environment = {"git": f"c{seed}", "machine": "x86_64", "threads": 1, "gpu": None, "torch": "2"}
    (run / "environment.json").write_text(json.dumps(environment))
    counts = np.where(np.arange(30) < 10, 0, 20)
    columns = {"user": USERS, "target": USERS, "rank": ranks, "target_count": counts, "history": counts + 5}
    columns["cold"] = cold & (np.arange(30) < 7)  # three targets that nobody has in training were not held out
    pl.DataFrame(columns).write_parquet(run / "ranks.parquet")
    return run


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    for experiment in ("ids", "text", "other"):
        for seed in (0, 1, 10):
            save_run(tmp_path, experiment, seed)
    return tmp_path


def measured(folder: Path, record: records.Record | None = None) -> records.Record:
    return records.update(record or records.empty(), [folder], TOY.baseline, TOY.pairs)


def cells(text: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]


def section(record: records.Record) -> str:
    return table.section("toy", TOY, record, {})


def test_a_row_is_mean_and_deviation_of_its_seeds(runs: Path) -> None:
    rows = {row[0]: row for row in cells(section(measured(runs)).partition("### ")[0])}
    hits = [(read_run(runs / "text" / seed).metric("hr@10")).mean() for seed in ("0", "1", "10")]
    assert rows["`text`"][1:5] == ["on text", "hidden", "3", f"{mean(hits):.4f} ± {stdev(hits):.4f}"]
    assert rows["`never`"][4] == "not measured"
    assert list(rows)[2:] == ["popularity", "`ids`", "`text`", "`never`", "`other`"]


def test_a_row_that_is_told_the_targets_time_says_so(tmp_path: Path) -> None:
    save_run(tmp_path, "text", 0, "user.target_time=true", "user.time_gaps=true")
    assert {row[0]: row[2] for row in cells(section(measured(tmp_path)).partition("### ")[0])}["`text`"] == "known"


def test_differences_are_paired_over_users_of_means_over_seeds(runs: Path) -> None:
    record = measured(runs)
    pairs = [(gap["experiment"], gap["against"], gap["metric"]) for gap in record["differences"]]
    assert pairs == [
        (a, b, metric)
        for a, b in (("other", "ids"), ("text", "ids"), ("text", "other"))
        for metric in ("hr@10", "ndcg@10")
    ]
    means = [
        np.mean([read_run(runs / name / seed).metric("ndcg@10") for seed in ("0", "1", "10")], axis=0)
        for name in ("text", "ids")
    ]
    expected = paired(*means)
    gap = record["differences"][3]
    assert gap["difference"] == pytest.approx(expected.difference, abs=1e-6)
    assert gap["p"] == pytest.approx(expected.p, abs=1e-6)
    by_seed = [
        read_run(runs / "text" / seed).metric("ndcg@10").mean() - read_run(runs / "ids" / seed).metric("ndcg@10").mean()
        for seed in ("0", "1", "10")
    ]
    assert gap["seeds"]["sd"] == pytest.approx(stdev(by_seed), abs=1e-6)


def test_the_page_is_written_from_the_record_alone(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records, "FOLDER", runs / "records")
    record = measured(runs)
    records.save("toy", record)
    assert records.load("toy") == record
    assert section(records.load("toy")) == section(record)
    assert "u1" not in records.path_of("toy").read_text()


def test_a_table_has_a_plot(runs: Path) -> None:
    record = measured(runs)
    rows = [row for row in table.rows_of(TOY, record) if row.runs]
    table.plot(rows, record, runs / "plot.png")
    assert (runs / "plot.png").stat().st_size > 5000
    assert f"]({table.picture('toy')})" in section(record)
    assert table.picture("toy") not in section(records.empty())


def test_a_new_seed_joins_those_of_the_record(runs: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    record, later = measured(runs), tmp_path_factory.mktemp("later")
    save_run(later, "text", 2)
    joined = measured(later, record)
    assert [run["seed"] for run in joined["runs"] if run["experiment"] == "text"] == [0, 1, 2, 10]
    # the ranks of its other seeds are not at hand
    assert "text" not in joined["intervals"]
    assert {gap["experiment"] for gap in joined["differences"]} == {"other"}
    again = measured(runs, joined)
    assert [run["seed"] for run in again["runs"] if run["experiment"] == "text"] == [0, 1, 2, 10]


def test_numbers_of_other_data_or_protocol_do_not_enter_a_table(runs: Path) -> None:
    record = measured(runs)
    for number, other in enumerate(({"data": "x"}, {"protocol": "temporal"})):
        folder = runs.parent / f"{runs.name}_{number}"
        save_run(folder, "text", 5, **other)  # type: ignore[arg-type]
        with pytest.raises(SystemExit, match="the table on toy, protocol leave_one_out"):
            measured(folder, record)


@pytest.mark.parametrize(
    ("seed", "overrides", "message"),
    [(3, ["loss.chunk_size=77"], "not a seed of .*: loss.chunk_size was 77"), (1, [], "are both text seed 1")],
)
def test_runs_that_are_no_seeds_of_one_experiment_are_refused(
    runs: Path, seed: int, overrides: list[str], message: str
) -> None:
    save_run(runs / "more", "text", seed, *overrides)
    with pytest.raises(SystemExit, match=message):
        measured(runs)


def test_a_later_seed_of_another_config_is_refused_unless_all_are_measured_again(
    runs: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(records, "FOLDER", runs / "records")
    records.save("toy", measured(runs))
    record, later = records.load("toy"), tmp_path_factory.mktemp("later")
    save_run(later, "text", 2, "loss.chunk_size=77", "dataset.num_workers=1")
    with pytest.raises(SystemExit, match=r"of the record's text: loss\.chunk_size was None, now 77"):
        measured(later, record)
    for seed in (0, 1, 10):
        save_run(later, "text", seed, "loss.chunk_size=77")
    again = measured(later, record)
    assert again["configs"]["text"]["loss"]["chunk_size"] == 77
    assert again["configs"]["ids"]["loss"]["chunk_size"] is None


def test_a_record_older_than_a_key_has_its_default(runs: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    record, later = measured(runs), tmp_path_factory.mktemp("later")
    del record["configs"]["text"]["loss"]["chunk_size"]
    save_run(later, "text", 2)
    assert len(measured(later, record)["runs"]) == 10


def test_cold_targets_are_compared_apart(tmp_path: Path) -> None:
    for experiment in ("ids", "text"):
        save_run(tmp_path, experiment, 0, protocol="leave_one_out cold 10% seed 0")
    record = measured(tmp_path)
    assert [gap["group"] for gap in record["differences"]] == ["all", "all", "cold", "cold"]
    ranked = [read_run(tmp_path / name / "0").metric("hr@10")[np.argsort(USERS) < 7] for name in ("text", "ids")]
    assert record["differences"][2]["difference"] == pytest.approx((ranked[0] - ranked[1]).mean(), abs=1e-6)
    text = section(record)
    assert "hr@10, cold targets" in text
    assert "cold (10)" in text


def test_published_numbers_stand_apart_under_their_protocol() -> None:
    published = table.read_published()
    text = table.section("toy", replace(TOY, published="ml1m"), records.empty(), published)
    rows = cells(text.partition("### Published")[2])
    assert ["HSTU-large", "P-RecTools", "known", "0.3642", "0.2164"] in [row[:5] for row in rows]
    for entries in published["tables"].values():
        for entry in entries:
            assert entry["protocol"] in published["protocols"]
            assert entry["target_time"] in ("known", "hidden")
            assert entry["source"]
    assert "HSTU-large" not in text.partition("### Published")[0]


@pytest.mark.parametrize("name", list(table.read_tables()))
def test_a_tables_section_is_what_its_record_says(name: str) -> None:
    one = table.read_tables()[name]
    page = (ROOT / "docs" / "results.md").read_text()
    written = page.partition(f"<!-- table {name}: scripts/reproduce -->")[2].partition(f"<!-- end of table {name} -->")[
        0
    ]
    assert written.strip() == table.section(name, one, records.load(name), table.read_published())
    assert (ROOT / "docs" / table.picture(name)).is_file() is (f"({table.picture(name)})" in written)
    assert {row for pair in one.pairs for row in pair} | {one.baseline} <= one.rows.keys()
    experiments = {path.stem for path in Path(CONF_DIR).glob("experiment/*.yaml")}
    floors = {table.FLOOR + floor for floor in table.FLOORS}
    assert {run["experiment"] for run in records.load(name)["runs"]} <= experiments | floors


@pytest.mark.parametrize("name", sorted(set(table.told_by().values())))
def test_an_experiments_file_says_what_was_measured(name: str) -> None:
    for row in table.rows_of(table.read_tables()[name], records.load(name)):
        if table.told_by().get(row.name) == name and row.runs:
            assert table.expectation(row) in (table.EXPERIMENTS / f"{row.name}.yaml").read_text().splitlines()


@pytest.mark.parametrize("name", list(sweep_plot.SWEEPS))
def test_a_sweep_has_one_key_with_values(name: str) -> None:
    assert "." in sweep_plot.swept_key(name)


def test_a_sweep_is_a_line_a_system_over_the_values(tmp_path: Path) -> None:
    for layers in (1, 2):
        for seed in (0, 1):
            save_run(tmp_path / str(layers), "text", seed, f"user.num_layers={layers}")
    points, gaps = sweep_plot.read_points([tmp_path], "user.num_layers")
    assert [(point["value"], point["seed"]) for point in points] == [(1, 0), (1, 1), (2, 0), (2, 1)]
    rows = cells(sweep_plot.section("layers", "user.num_layers", points, gaps))
    hits = [read_run(tmp_path / "2" / "text" / seed).metric("hr@10").mean() for seed in ("0", "1")]
    assert rows[3][:4] == ["`text`", "2", "2", f"{mean(hits):.4f} ± {stdev(hits):.4f}"]
    sweep_plot.plot("layers", "user.num_layers", points, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 5000


def test_each_value_of_a_sweep_is_compared_with_the_one_below_and_the_last_with_the_first(tmp_path: Path) -> None:
    """Shares of training users, which the protocol names: what is ranked is the same."""
    for share, system in ((0.5, "ids"), (1.0, "text"), (0.1, "other")):
        for seed in (0, 1):
            trained = f" trained on {100 * share:g}% of users seed 0" if share < 1 else ""
            run = save_run(
                tmp_path / str(share), system, seed, f"dataset.train_users={share}", protocol=f"leave_one_out{trained}"
            )
            config = (run / "config.yaml").read_text()
            (run / "config.yaml").write_text(config.replace(f"experiment_name: {system}", "experiment_name: toy"))
    points, gaps = sweep_plot.read_points([tmp_path], "dataset.train_users")
    key = "toy dataset.train_users"
    assert [(gap["experiment"], gap["against"]) for gap in gaps[::2]] == [
        (f"{key}=0.5", f"{key}=0.1"),
        (f"{key}=1", f"{key}=0.5"),
        (f"{key}=1", f"{key}=0.1"),
    ]
    sides = [
        np.mean([read_run(tmp_path / folder / str(seed)).metric("hr@10") for seed in (0, 1)], axis=0)
        for folder in ("1.0/text", "0.5/ids")
    ]
    assert gaps[2]["p"] == pytest.approx(paired(*sides).p, abs=1e-6)
    text = sweep_plot.section("data_scaling", "dataset.train_users", points, gaps)
    assert "protocol leave_one_out" in text.partition(". ")[0]
    assert cells(text.partition("###")[2])[2][0] == f"`{key}=0.5` - `{key}=0.1`"


def test_a_sweep_over_another_protocol_is_refused(tmp_path: Path) -> None:
    save_run(tmp_path / "a", "text", 0)
    save_run(tmp_path / "b", "text", 1, protocol="leave_one_out cold 10% seed 0")
    with pytest.raises(SystemExit, match="different data"):
        sweep_plot.read_points([tmp_path], "user.num_layers")


def test_a_sweep_over_different_data_is_refused(tmp_path: Path) -> None:
    save_run(tmp_path / "a", "text", 0)
    save_run(tmp_path / "b", "text", 1, data="other")
    with pytest.raises(SystemExit, match="different data"):
        sweep_plot.read_points([tmp_path], "user.num_layers")


def test_a_table_is_run_row_by_row_and_its_floors_on_the_same_data(tmp_path: Path) -> None:
    """run_table with a python that notes what it is asked for."""
    python = tmp_path / "venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(
        f'#!/usr/bin/env bash\necho "$@" >> {tmp_path}/asked\n'
        'case "$*" in *--overrides) echo dataset.cold_items=0.1;; *--floors) echo dataset=x;; esac\n'
    )
    python.chmod(0o755)
    script = str(ROOT / "scripts" / "reproduce" / "cold")
    command = [script, str(tmp_path / "runs"), "0", "user.dim=8", "dataset.max_history=9"]
    environment = os.environ | {"VENV": str(tmp_path / "venv"), "EXPERIMENTS": "a b"}
    for _ in range(2):
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
        assert done.returncode == 0, done.stderr
    asked = (tmp_path / "asked").read_text().splitlines()
    assert [line for line in asked if "hllm.floors" in line] == [
        f"-m hllm.floors dataset=x hydra.run.dir={tmp_path}/runs/floors dataset.max_history=9"
    ] * 2  # which skips what is finished
    trained = sorted(line for line in asked if "hllm.train" in line)
    assert [line.split()[2] for line in trained] == ["experiment=a"] * 2 + ["experiment=b"] * 2
    assert all(line.endswith("logger=csv dataset.cold_items=0.1 user.dim=8 dataset.max_history=9") for line in trained)
    assert asked[-1] == f"scripts/reproduce/table.py beauty_cold {tmp_path}/runs"


def test_a_real_runs_folder_becomes_a_row(id_run: Any) -> None:
    record = records.update(records.empty(), [id_run.folder], "none")
    (run,) = record["runs"]
    everyone = id_run.evaluation.results["test"]["all"]
    assert run["test"]["all"]["ndcg@10"] == pytest.approx(everyone["ndcg@10"], abs=1e-6)
    assert record["popularity"]["all"]["hr@10"] > 0
