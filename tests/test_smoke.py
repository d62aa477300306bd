"""The commands as a person types them."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import polars as pl
import pytest
from conftest import NUM_USERS, Run

from hllm.config import CONF_DIR, Config, compose
from hllm.fit import train

EXPERIMENTS = sorted(path.stem for path in Path(CONF_DIR).glob("experiment/*.yaml"))


def run(module: str, folder: Path, *overrides: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", module, f"hydra.run.dir={folder}", *overrides]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_train_prints_its_report_and_nothing_that_nobody_acts_on(movielens_folder: Path, tmp_path: Path) -> None:
    done = run("hllm.train", tmp_path, "debug=smoke", f"dataset.root={movielens_folder}", "dataset.check_counts=false")
    assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path / "report.md").read_text() in done.stdout
    assert f"run folder: {tmp_path}" in done.stdout
    assert "arning" not in done.stdout + done.stderr


def test_two_processes_count_every_user_once(movielens_folder: Path, id_run: Run, tmp_path: Path) -> None:
    """Popularity does not depend on training, so its numbers are those of one process to the last digits."""
    overrides = [
        "debug=smoke",
        f"dataset.root={movielens_folder}",
        "dataset.check_counts=false",
        "evaluation.ks=[5,10]",
    ]
    done = run("hllm.train", tmp_path, *overrides, "trainer.devices=2", "trainer.accelerator=cpu")
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads((tmp_path / "metrics.json").read_text())["results"]["popularity"]["all"]
    assert found == pytest.approx(id_run.evaluation.results["popularity"]["all"], rel=1e-12)
    assert pl.read_parquet(tmp_path / "ranks.parquet")["user"].to_list() == [str(u) for u in range(1, NUM_USERS + 1)]
    assert done.stdout.count("run folder:") == 1


def test_a_data_error_is_one_line(tmp_path: Path) -> None:
    done = run("hllm.train", tmp_path / "run", "debug=smoke", f"dataset.root={tmp_path}")
    assert done.returncode == 1
    assert done.stderr.startswith(f"error: dataset.root={tmp_path}: needs u.data and u.item or ")
    assert "Traceback" not in done.stderr


def test_embed_fills_the_cache_alone(movielens_folder: Path, tiny_llama: Path, tmp_path: Path) -> None:
    overrides = [f"dataset.root={movielens_folder}", "dataset.check_counts=false", f"cache_dir={tmp_path / 'cache'}"]
    overrides += [f"llm.model={tiny_llama}", "llm.wheel=null", "llm.gguf_file=null", "llm.max_tokens=64"]
    done = run("hllm.embed", tmp_path / "run", *overrides)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "movielens_100k: 30 items x 32 by smollm2_135m, mean cosine" in done.stdout
    assert len(list((tmp_path / "cache" / "embeddings").glob("*/manifest.json"))) == 1


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_runs_two_steps(name: str, run_config: Callable[..., Config], tmp_path: Path) -> None:
    """Each with its own towers, loss, head, optimizer and rows, but on one small data set and one device."""
    own = compose([f"experiment={name}"])
    towers = [f"items={own.items.name}", f"user={own.user.name}"]
    data = ["dataset=movielens_100k", "trainer.devices=1", "trainer.num_nodes=1", "loss.num_negatives=20"]
    short = ["trainer.max_epochs=1", "trainer.limit_train_batches=2", "evaluation.ks=[10]"]
    metric = ["callbacks.monitor=val/ndcg@10", "optimized_metric=val/ndcg@10"]
    layers = [] if own.llm.num_layers is None else ["llm.num_layers=1"]  # the tiny model has two
    heads = ["user.num_heads=4"] if getattr(own.user, "num_heads", 1) > 16 else []  # the tiny one is 16 wide
    narrow = ["items.neighbours=8"] if getattr(own.items, "neighbours", 0) > 8 else []  # its vectors are 32 wide
    given = [f"experiment={name}", *towers, *data, *short, *metric, *layers, *heads, *narrow]
    config = run_config(*(flag for flag in given if own.loss.name != "ce" or not flag.startswith("loss.")))
    assert train(config, tmp_path).results["test"]["all"]["users"] == 40
