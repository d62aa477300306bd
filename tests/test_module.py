"""The LightningModule wires towers, head and loss as a step written out plainly does."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from hllm.build import build_datamodule, build_module
from hllm.config import Config, OptimizerConfig, Schedule
from hllm.data.schema import Batch
from hllm.module import Recommender, _lookup


@pytest.fixture(scope="module")
def config(run_config: Any) -> Config:
    made: Config = run_config("items=id", "user.dropout=0.0")
    return made


@pytest.fixture
def module(config: Config, monkeypatch: pytest.MonkeyPatch) -> Recommender:
    torch.manual_seed(0)
    module = build_module(config, build_datamodule(config))
    torch.nn.init.normal_(module.items.table.weight)
    monkeypatch.setattr(module, "log", lambda *args, **kwargs: None)
    return module


@pytest.fixture
def batch(config: Config) -> Batch:
    torch.manual_seed(0)
    made: Batch = next(iter(build_datamodule(config).train_dataloader()))
    return made


def test_the_training_loss_is_the_mean_over_all_supervised_positions(module: Recommender, batch: Batch) -> None:
    catalogue, total, count = module.items.all(), 0.0, 0
    for row in range(len(batch)):
        events = int(batch.mask[row].sum())
        items, times = batch.items[row : row + 1, :events], batch.timestamps[row : row + 1, :events]
        users = module.users(catalogue[items - 1], torch.ones_like(items, dtype=torch.bool), times)
        scores = F.cosine_similarity(users[0, :, None], catalogue[None], dim=-1) / 0.07
        total += F.cross_entropy(scores, batch.targets[row, :events] - 1, reduction="sum").item()
        count += events
    assert module.training_step(batch, 0).item() == pytest.approx(total / count, rel=1e-5)


def test_scores_are_those_of_the_last_event(module: Recommender, batch: Batch) -> None:
    module.eval()
    scores = module.scores(batch)
    for row in range(len(batch)):
        events = int(batch.mask[row].sum())
        items, times, targets, mask = (
            getattr(batch, name)[row : row + 1, :events] for name in ("items", "timestamps", "targets", "mask")
        )
        alone = Batch(batch.users[row : row + 1], items, times, targets, mask, batch.seen)
        torch.testing.assert_close(module.scores(alone)[0], scores[row], atol=1e-5, rtol=1e-5)


def test_padding_gets_no_gradient(module: Recommender, batch: Batch) -> None:
    module.training_step(batch, 0).backward()
    gradient = module.items.table.weight.grad
    assert gradient is not None
    assert not gradient[0].any()
    assert gradient[1:].any(dim=1).all()


def test_matrices_are_decayed_and_nothing_else(module: Recommender) -> None:
    module._trainer = SimpleNamespace(estimated_stepping_batches=100, precision="32-true")
    decayed, rest = module.configure_optimizers()["optimizer"].param_groups
    assert (decayed["weight_decay"], rest["weight_decay"]) == (0.01, 0.0)
    assert {parameter.ndim for parameter in decayed["params"]} == {2}
    assert {parameter.ndim for parameter in rest["params"]} == {1}
    assert len(decayed["params"]) + len(rest["params"]) == len(list(module.parameters()))


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [(Schedule.cosine, [1 / 3, 2 / 3, 1.0, 0.853553, 0.5, 0.146447]), (Schedule.constant, [1 / 3, 2 / 3, 1, 1, 1, 1])],
)
def test_the_rate_warms_up_and_follows_its_schedule(
    module: Recommender, schedule: Schedule, expected: list[float]
) -> None:
    module.optimizer_config = OptimizerConfig(lr=1.0, schedule=schedule, warmup_ratio=1 / 3)
    module._trainer = SimpleNamespace(estimated_stepping_batches=6, precision="32-true")
    made = module.configure_optimizers()
    rates = []
    for _ in range(6):
        rates.append(made["optimizer"].param_groups[0]["lr"])
        made["optimizer"].step()
        made["lr_scheduler"]["scheduler"].step()
    assert rates == pytest.approx(expected, abs=1e-5)


def test_lookup_gathers_by_id() -> None:
    ids, vectors = torch.tensor([2, 5, 9]), torch.eye(3)
    wanted = torch.tensor([[9, 2], [5, 5]])
    assert _lookup(wanted, ids, vectors).argmax(-1).tolist() == [[2, 0], [1, 1]]
