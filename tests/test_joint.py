"""Language models in either tower: each run trains, evaluates, and gives the same digits out of its checkpoint."""

import csv
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import Run

from hllm.evaluate import main

FULL = ("items=llm", "user=llm", "loss=nce_official", "head=cosine_learned", "loss.num_negatives=20")
RUNS = {
    "full": FULL,
    "full-packed-cache": (*FULL, "llm.packing=packed", "items.grad_cache=true", "user.tuning.lora.rank=2"),
    "full-bf16": (*FULL, "trainer.precision=bf16-true"),
    "full-mixed": (*FULL, "trainer.precision=bf16-mixed", "llm.pooling=mean"),
    "bert-and-transformer": ("items=llm", "user=transformer", "user.dim=16", "user.num_heads=2", "loss=nce"),
    "frozen": (*FULL, "items.tuning.freeze=[all]", "llm.pooling=last"),
    "sasrec-1b": ("items=id", "items.dim=8", "user=llm", "user.pretrained=false"),
    "stage-two": ("items=cached", "user=llm", "items.transform=raw", "items.adaptor=none"),
}


@pytest.fixture(scope="module", params=list(RUNS))
def run(request: pytest.FixtureRequest, run_training: Callable[..., Run], tiny_bert: Path) -> Run:
    bert = [f"llm.model={tiny_bert}"] if request.param == "bert-and-transformer" else []
    return run_training(*RUNS[request.param], *bert, "trainer.max_epochs=2")


def losses(run: Run) -> list[float]:
    with (run.folder / "metrics.csv").open() as file:
        return [float(row["train/loss"]) for row in csv.DictReader(file) if row["train/loss"]]


def test_the_loss_falls(run: Run) -> None:
    found = losses(run)
    assert len(found) == 2 * 5
    assert sum(found[-5:]) < sum(found[:5])


def test_weights_are_those_of_the_precision(run: Run) -> None:
    state = torch.load(run.best, weights_only=True)["state_dict"]
    dtype = torch.bfloat16 if run.config.trainer.precision == "bf16-true" else torch.float32
    assert {tensor.dtype for name, tensor in state.items() if name.startswith(("items.", "users."))} == {dtype}
    assert not any("inv_freq" in name or "pooler" in name or "lm_head" in name for name in state)
    assert not any(name.startswith("users.") and "embed_tokens" in name for name in state)


def test_evaluate_gives_the_numbers_of_the_run_to_the_last_digit(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    monkeypatch.setattr("hllm.evaluate.full_report", lambda results, *_: found.append(results))
    main([f"ckpt={run.best}", "accelerator=cpu"])
    assert found == [json.loads((run.folder / "metrics.json").read_text())["results"]]
    metrics = found[0]["test"]["all"]
    assert 0 < metrics["mrr"] < 1
