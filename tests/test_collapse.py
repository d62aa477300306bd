"""Runs that cannot recover stop, and say why; runs that can go on."""

import csv
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import Run
from torch import Tensor

from hllm.build import item_callbacks
from hllm.collapse import CollapseGuard
from hllm.config import Config
from hllm.data.schema import Batch
from hllm.errors import CollapsedError, DivergedError
from hllm.module import LastStep, Recommender

JOINT = ["items=llm", "user=llm", "loss=nce_official", "head=cosine_learned", "optimizer=hllm", "trainer.max_epochs=6"]
TOO_FAST = ["optimizer.lr=0.3", "loss.similarity_threshold=0.99"]


def columns(folder: Path) -> dict[str, list[float]]:
    """metrics.csv by column, without empty cells."""
    with (folder / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    return {name: [float(row[name]) for row in rows if row[name]] for name in rows[0]}


def test_a_collapsing_run_ends_in_one_line(movielens_folder: Path, tiny_llama: Path, tmp_path: Path) -> None:
    """The official mask and too high a rate: all items become alike, all negatives are masked, the loss stays 0."""
    overrides = [
        f"hydra.run.dir={tmp_path}",
        f"cache_dir={tmp_path / 'cache'}",
        f"dataset.root={movielens_folder}",
        "dataset.check_counts=false",
        "dataset.batch_size=8",
        *(f"llm.model={tiny_llama}", "llm.wheel=null", "llm.gguf_file=null", "llm.max_tokens=63", "llm.device=cpu"),
        *("user.num_layers=1", "logger=csv"),
        *("trainer.accelerator=cpu", "trainer.enable_progress_bar=false", "trainer.log_every_n_steps=1"),
    ]
    command = [sys.executable, "-m", "hllm.train", *overrides, *JOINT, *TOO_FAST]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stderr[-2000:]
    (line,) = [line for line in done.stderr.splitlines() if "Writing model" not in line]
    assert line.startswith("error: step ")
    assert "the item vectors collapsed, for 5 logged steps in a row: the mean cosine between items is " in line
    assert "0.0 of 512 negatives are left (callbacks.collapse_negatives=0.05); lower optimizer.lr, or raise " in line
    assert "or set loss.similarity_threshold=null, which makes a collapse final" in line
    assert line.endswith(f"The best checkpoint so far is kept: {tmp_path / 'checkpoints' / 'best.ckpt'}")
    curves = columns(tmp_path)
    assert curves["train/loss"][-3:] == [0, 0, 0]
    assert min(curves["train/item_cosine"][-3:]) > 0.99


def test_a_healthy_run_goes_on(run_training: Callable[..., Run], monkeypatch: pytest.MonkeyPatch) -> None:
    """The mean cosine that is logged is that of all pairs of the step's items."""
    expected, step = [], Recommender.training_step

    def remembers(self: Recommender, batch: Batch, index: int) -> Tensor:
        loss = step(self, batch, index)
        assert self.last_step is not None
        vectors = self.last_step.vectors
        pairs = F.cosine_similarity(vectors[:, None], vectors[None], dim=-1)
        expected.append(pairs[~torch.eye(len(pairs), dtype=torch.bool)].mean().item())
        return loss

    monkeypatch.setattr(Recommender, "training_step", remembers)
    run = run_training(*JOINT, "optimizer.lr=0.001")
    assert run.evaluation.results["test"]["all"]["mrr"] > 0
    found = columns(run.folder)["train/item_cosine"]
    assert len(found) == 30
    assert found == pytest.approx(expected, abs=1e-5)


def test_the_guard_looks_at_the_steps_that_are_logged(
    run_training: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once each, also where several batches share a step: 2 epochs of 5 batches are 2 x 3 steps."""
    looked, look = [], CollapseGuard.look

    def remembers(self: CollapseGuard, trainer: Any, module: Recommender, loss: Tensor) -> None:
        looked.append(trainer.global_step)
        look(self, trainer, module, loss)

    monkeypatch.setattr(CollapseGuard, "look", remembers)
    short = ["trainer.max_epochs=2", "trainer.accumulate_grad_batches=2", "trainer.log_every_n_steps=2"]
    run = run_training(*JOINT, *short, "optimizer.lr=0.001")
    assert looked == [2, 4, 6]
    assert len(columns(run.folder)["train/item_cosine"]) >= 3


@pytest.mark.parametrize(("items", "guards"), [("llm", 1), ("cached", 0), ("id", 0)])
def test_only_items_that_a_language_model_makes_are_guarded(
    run_config: Callable[..., Config], items: str, guards: int
) -> None:
    found = item_callbacks(run_config(f"items={items}"))
    assert sum(isinstance(callback, CollapseGuard) for callback in found) == guards


ALIKE, VARIED = torch.ones(4, 3), torch.eye(3)


@pytest.fixture
def look(run_config: Callable[..., Config]) -> Callable[..., None]:
    """Shows a guard one step after another, of 100; the last one raises."""

    def show(*steps: tuple[int, Tensor, float], overrides: tuple[str, ...] = ()) -> None:
        guard = CollapseGuard(run_config(*JOINT, "callbacks.collapse_patience=3", *overrides))
        for step, vectors, negatives in steps:
            strategy = SimpleNamespace(reduce=lambda values, reduce_op: values)
            trainer: Any = SimpleNamespace(
                global_step=step, estimated_stepping_batches=100, strategy=strategy, checkpoint_callback=None
            )
            seen = LastStep(vectors, torch.tensor(negatives), torch.tensor(512))
            module: Any = SimpleNamespace(last_step=seen, log=lambda name, value: None)
            guard.look(trainer, module, torch.zeros(()))

    return show


@pytest.mark.parametrize("bad", [(ALIKE, 500.0), (VARIED, 25.0)])
def test_the_guard_waits_for_the_warm_up_and_its_patience(look: Callable[..., None], bad: tuple[Tensor, float]) -> None:
    """optimizer=hllm warms up for 10 steps of 100; 25 of 512 negatives are less than a twentieth."""
    look(*((step, *bad) for step in range(1, 13)))
    with pytest.raises(CollapsedError, match=r"^step 13: the item vectors collapsed, for 3 logged steps in a row: "):
        look(*((step, *bad) for step in range(1, 14)))


def test_a_good_step_between_begins_the_count_anew(look: Callable[..., None]) -> None:
    bad, good = [(step, ALIKE, 0.0) for step in (20, 21)], (22, VARIED, 26.0)
    look(*bad, good, *bad)
    with pytest.raises(CollapsedError):
        look(*bad, good, *bad, (23, ALIKE, 500.0))


def test_limits_that_cannot_be_reached_turn_the_guard_off(look: Callable[..., None]) -> None:
    off = ("callbacks.collapse_cosine=1", "callbacks.collapse_negatives=0")
    look(*((step, torch.full((7, 3), 0.3), 0.0) for step in range(20, 40)), overrides=off)


@pytest.mark.parametrize(
    ("overrides", "advice"),
    [
        ((), "lower optimizer.lr, or raise optimizer.warmup_ratio"),
        (("optimizer.llm_lr=1e-4",), "lower optimizer.llm_lr and optimizer.lr, or raise optimizer.warmup_ratio"),
        (
            ("loss.similarity_threshold=0.99", "trainer.precision=bf16-true"),
            "lower optimizer.lr, or raise optimizer.warmup_ratio, or set loss.similarity_threshold=null, which makes a "
            "collapse final, or set trainer.precision=bf16-mixed",
        ),
    ],
)
def test_the_advice_names_what_the_config_leaves_to_change(
    look: Callable[..., None], overrides: tuple[str, ...], advice: str
) -> None:
    with pytest.raises(CollapsedError) as raised:
        look(*((step, ALIKE, 500.0) for step in (20, 30, 40)), overrides=overrides)
    expected = "the mean cosine between items is 1.0000 (callbacks.collapse_cosine=0.999); " + advice
    assert str(raised.value).endswith(expected)


@pytest.mark.parametrize(
    ("value", "interval", "found"),
    [("nan", 1, "step 6: the training loss is nan"), ("inf", 1, "step 6: .* inf"), ("nan", 4, "step 8: .* nan")],
)
def test_a_training_loss_that_is_no_number_stops_the_run(
    run_training: Callable[..., Run], monkeypatch: pytest.MonkeyPatch, value: str, interval: int, found: str
) -> None:
    """At the first logged step that has it, long before a validation would meet it."""
    step = Recommender.training_step

    def breaks(self: Recommender, batch: Batch, index: int) -> Tensor:
        return step(self, batch, index) * (float(value) if self.global_step >= 5 else 1)

    monkeypatch.setattr(Recommender, "training_step", breaks)
    with pytest.raises(DivergedError, match=rf"^{found}: training diverged; lower optimizer\.lr"):
        run_training("items=id", f"trainer.log_every_n_steps={interval}")
