"""What the curves say of speed is what was encoded."""

import csv
from collections.abc import Callable

import pytest
import torch
from conftest import Run
from lightning import LightningModule, Trainer

from hllm.data.schema import Batch
from hllm.items.llm import LLMItems
from hllm.module import Recommender
from hllm.throughput import Throughput, peak_memory


def test_items_and_tokens_of_logged_steps_are_those_encoded(
    run_training: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Unique items of a step, and the tokens of their texts; evaluation does not count."""
    expected: list[tuple[int, int]] = []
    taken: list[tuple[int, int]] = []
    take = LLMItems.take_counts

    def count(self: Throughput, trainer: Trainer, module: LightningModule, batch: Batch, index: int) -> None:
        original(self, trainer, module, batch, index)
        assert isinstance(module, Recommender)
        assert isinstance(module.items, LLMItems)
        # with the exact softmax every item is scored in every step
        expected.append((module.items.num_items, int(module.items.tokens.lengths.sum())))

    original = Throughput.on_train_batch_start
    monkeypatch.setattr(Throughput, "on_train_batch_start", count)
    monkeypatch.setattr(LLMItems, "take_counts", lambda self: taken.append(take(self)) or taken[-1])
    run = run_training("items=llm", "user.dim=16", "user.num_layers=1", "loss=ce", "optimizer.lr=0.001")
    assert taken == expected
    assert len(taken) == 15
    with (run.folder / "metrics.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["train/loss"]]
    for row, (items, tokens) in zip(rows, expected, strict=True):
        ratio = float(row["train/tokens_per_second"]) / float(row["train/items_per_second"])
        assert ratio == pytest.approx(tokens / items, rel=1e-5)


def test_peak_memory_is_in_bytes() -> None:
    before = peak_memory(torch.device("cpu"))
    held = torch.ones(before // 4 + 50_000_000)  # twice what was held at most
    assert peak_memory(torch.device("cpu")) - before > 100_000_000
    assert held[0] == 1
