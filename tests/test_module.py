"""The LightningModule wires towers, head and loss as a step written out plainly does."""

import math
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import Run, encode_rows
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from hllm.build import build_datamodule, build_module
from hllm.config import Config, NCELossConfig, OptimizerConfig, Schedule
from hllm.data.schema import Batch
from hllm.errors import ConfigError
from hllm.losses import CrossEntropyLoss, NCELoss
from hllm.metrics import target_ranks
from hllm.module import Recommender, _lookup
from hllm.users.layout import Layout


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
        users = encode_rows(module.users, catalogue[items - 1], torch.ones_like(items, dtype=torch.bool), times)
        scores = F.cosine_similarity(users[0, :, None], catalogue[None], dim=-1) / 0.07
        total += F.cross_entropy(scores, batch.targets[row, :events] - 1, reduction="sum").item()
        count += events
    assert module.training_step(batch, 0).item() == pytest.approx(total / count, rel=1e-5)


def test_with_mask_seen_a_position_does_not_score_what_stands_before_it(
    module: Recommender, batch: Batch, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module.loss, "mask_seen", True)
    catalogue, total = module.items.all(), 0.0
    users = encode_rows(module.users, module.items.table.weight[batch.items], batch.mask, batch.timestamps)
    for row, place in (batch.targets > 0).nonzero().tolist():
        target = int(batch.targets[row, place])
        scores = F.cosine_similarity(users[row, place], catalogue, dim=-1) / 0.07
        for item in batch.items[row, : place + 1].tolist():
            if item != target:
                scores[item - 1] = float("-inf")
        total += F.cross_entropy(scores[None], torch.tensor([target - 1])).item()
    assert module.training_step(batch, 0).item() == pytest.approx(total / int((batch.targets > 0).sum()), rel=1e-5)


def test_scores_are_those_of_the_last_event(module: Recommender, batch: Batch) -> None:
    module.eval()
    scores = module.scores(batch)
    for row in range(len(batch)):
        events = int(batch.mask[row].sum())
        items, times, targets, mask = (
            getattr(batch, name)[row : row + 1, :events] for name in ("items", "timestamps", "targets", "mask")
        )
        alone = Batch(batch.users[row : row + 1], items, times, targets, times, mask, batch.seen)
        torch.testing.assert_close(module.scores(alone)[0], scores[row], atol=1e-5, rtol=1e-5)


def test_what_is_scored_may_be_another_vector_than_what_is_read(
    module: Recommender, batch: Batch, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in items=fused with target=text: histories read one side, loss and scores take the other."""
    torch.manual_seed(1)
    read, scored = torch.randn(2, module.items.num_items, 16)
    monkeypatch.setattr(module.items, "sides", lambda ids: (read[ids - 1], scored[ids - 1]))
    monkeypatch.setattr(module.items, "catalogue", lambda: (read, scored))
    module.eval()
    supervised = batch.targets > 0
    users = Layout.of(batch.mask).rows(module(batch, torch.arange(1, len(read) + 1), read))
    plain = F.cosine_similarity(users[:, :, None], scored, dim=-1) / 0.07
    expected = F.cross_entropy(plain[supervised], batch.targets[supervised] - 1)
    assert module.training_step(batch, 0).item() == pytest.approx(expected.item(), rel=1e-5)
    last = batch.mask.sum(1) - 1
    torch.testing.assert_close(module.scores(batch), plain[torch.arange(len(batch)), last], atol=1e-4, rtol=1e-4)


def test_items_that_were_not_in_training_stand_below_all_others_where_only_ids_are_known(
    module: Recommender, batch: Batch
) -> None:
    module.eval()
    before = module.scores(batch)
    module.train_counts[[4, 9]] = 0
    scores, others = module.scores(batch), [i for i in range(before.shape[1]) if i not in (3, 8)]
    assert torch.equal(scores[:, others], before[:, others])
    assert (scores[:, [3, 8]] < scores[:, others].min()).all()
    cold = torch.full((len(batch),), 4)
    ranks, ties = target_ranks(scores, cold, torch.tensor([[0], [1]]))
    assert ranks.tolist() == [len(others) - 0.5, *[len(others) + 0.5] * (len(batch) - 1)], "user 0 has seen item 1"
    assert ties.tolist() == [1] * len(batch)
    module.items.knows_cold = True
    assert torch.equal(module.scores(batch), before)


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


OFFICIAL = ["items=llm", "user=llm", "loss=nce_official", "head=cosine_learned", "optimizer=hllm_official"]


def rates(module: Recommender, steps: int) -> list[float]:
    """The learning rate of each step."""
    module._trainer = SimpleNamespace(estimated_stepping_batches=steps, precision="32-true")
    made, found = module.configure_optimizers(), []
    for _ in range(steps):
        found.append(made["optimizer"].param_groups[0]["lr"])
        made["optimizer"].step()
        made["lr_scheduler"]["scheduler"].step()
    return found


def test_the_official_rate_begins_at_0_and_is_the_base_at_the_end_of_the_warm_up(
    module: Recommender, run_config: Callable[..., Config]
) -> None:
    """Reference 8, Optimisation: lr 1e-4; cosine to 0; warm-up 0.1; step 0 lr = 0; lr at end of warm-up = base."""
    module.optimizer_config = run_config(*OFFICIAL, "optimizer.lr=1e-4").optimizer
    found = rates(module, 100)
    assert found[:11] == pytest.approx([1e-5 * step for step in range(11)], abs=1e-12)
    assert found[55] == pytest.approx(0.5e-4)
    assert found[99] == pytest.approx(0.5e-4 * (1 + math.cos(math.pi * 89 / 90)))
    assert found[99] < 1e-7


@pytest.fixture(scope="module")
def joint(run_config: Callable[..., Config]) -> Recommender:
    """The full HLLM of two tiny Llamas, with every kind of parameter."""
    config = run_config(*OFFICIAL, "optimizer.lr=1e-4")
    module = build_module(config, build_datamodule(config))
    module._trainer = SimpleNamespace(estimated_stepping_batches=100, precision="32-true")
    return module


def groups(module: Recommender) -> dict[str, tuple[float, float]]:
    """Rate and decay of each trained parameter, by name."""
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    return {
        names[id(parameter)]: (group["initial_lr"], group["weight_decay"])
        for group in module.configure_optimizers()["optimizer"].param_groups
        for parameter in group["params"]
    }


def test_the_official_optimizer_decays_all_parameters(joint: Recommender, run_config: Callable[..., Config]) -> None:
    """Reference 8, Optimisation: AdamW, wd 0.01 on all parameters, betas (0.9, 0.999), eps 1e-8."""
    joint.optimizer_config = run_config(*OFFICIAL, "optimizer.lr=1e-4").optimizer
    found = groups(joint)
    assert set(found) == {name for name, _ in joint.named_parameters()}
    assert {"items.item_token", "head.log_scale", "items.model.norm.weight"} < set(found)
    assert set(found.values()) == {(1e-4, 0.01)}
    optimizer = joint.configure_optimizers()["optimizer"]
    assert isinstance(optimizer, torch.optim.AdamW)
    assert (optimizer.defaults["betas"], optimizer.defaults["eps"]) == ((0.9, 0.999), 1e-8)


def test_by_default_norms_the_item_token_and_the_scale_are_not_decayed(joint: Recommender) -> None:
    joint.optimizer_config = OptimizerConfig(lr=1e-4)
    found = groups(joint)
    rest = {name for name, (_, decay) in found.items() if decay == 0}
    assert rest == {"items.item_token", "head.log_scale"} | {name for name in found if "norm" in name}
    assert {decay for name, (_, decay) in found.items() if name not in rest} == {0.01}
    assert "items.model.embed_tokens.weight" not in rest


def test_llm_lr_is_the_rate_of_language_models_own_weights(joint: Recommender) -> None:
    joint.optimizer_config = OptimizerConfig(lr=1e-3, llm_lr=1e-5)
    found = groups(joint)
    assert {name for name, (lr, _) in found.items() if lr == 1e-3} == {"items.item_token", "head.log_scale"}
    assert {lr for name, (lr, _) in found.items() if ".model." in name} == {1e-5}


@pytest.fixture
def norms() -> Iterator[list[float]]:
    """Of all gradients, as each optimizer step took them."""
    found: list[float] = []

    def remember(optimizer: torch.optim.Optimizer, *_: object) -> None:
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        found.append(nn.utils.get_total_norm(gradients).item())

    handle = register_optimizer_step_post_hook(remember)
    yield found
    handle.remove()


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_gradients_are_clipped_in_training(
    run_training: Callable[..., Run], norms: list[float], precision: str
) -> None:
    """Reference 8, Optimisation, bettered: the official setting is read and never used."""
    short = ["trainer.max_epochs=1", f"trainer.precision={precision}", "trainer.gradient_clip_val=0.05"]
    run_training(*OFFICIAL, *short)
    assert len(norms) == 5
    assert norms == pytest.approx([0.05] * 5, rel=1e-2)


def test_without_a_limit_no_gradient_is_clipped(run_training: Callable[..., Run], norms: list[float]) -> None:
    run_training(*OFFICIAL, "trainer.max_epochs=1", "trainer.gradient_clip_val=null", "head.temperature=0.01")
    assert len(norms) == 5
    assert max(norms) > 1.5


def test_mixed_precision_leaves_loss_and_scores_in_float32(
    joint: Recommender, batch: Batch, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reference 8, Optimisation: fp32 loss and scores, while the language models compute in bfloat16."""
    logged: dict[str, Tensor] = {}
    given: list[tuple[Tensor, Tensor]] = []
    score = joint.head.score
    monkeypatch.setattr(joint, "log", lambda name, value, **_: logged.update({name: value}))
    monkeypatch.setattr(joint, "_catalogue", None)
    with torch.no_grad():
        with torch.autocast("cpu", torch.bfloat16):
            loss = joint.training_step(batch, 0)
            monkeypatch.setattr(joint.head, "score", lambda *vectors: given.append(vectors) or score(*vectors))
            scores = joint.scores(batch)
            catalogue, _ = joint.catalogue()
        exact = joint.items.all()
    ((users, *_),) = given
    assert not torch.equal(catalogue.float(), exact)
    torch.testing.assert_close(catalogue.float(), exact, atol=0.1, rtol=0.1)
    assert torch.equal(scores, joint.head(users, catalogue))  # as outside of autocast
    assert loss.dtype == scores.dtype == logged["train/loss"].dtype == torch.float32
    assert loss.item() != loss.bfloat16().item()


def test_scores_of_an_evaluation_are_written_over_the_last_batchs(run_config: Any, module: Recommender) -> None:
    batches = list(build_datamodule(run_config("items=id", "dataset.eval_batch_size=9")).test_dataloader())
    assert len(batches[-1]) < len(batches[0])
    with torch.inference_mode():
        held = module._scored(batches[0])
        for batch in batches:
            scores = module._scored(batch)
            assert torch.equal(scores, module.scores(batch))
            assert scores.data_ptr() == held.data_ptr()


def test_the_catalogue_is_prepared_once_an_evaluation(
    module: Recommender, batch: Batch, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepared: list[int] = []
    prepare = module.head.prepare
    monkeypatch.setattr(module.head, "prepare", lambda vectors: prepared.append(len(vectors)) or prepare(vectors))
    first, again = module.scores(batch), module.scores(batch)
    assert prepared == [module.items.num_items, len(batch), len(batch)]
    assert torch.equal(first, again) or module.users.training
    module._trainer = SimpleNamespace(
        num_val_batches=[1], precision_plugin=SimpleNamespace(forward_context=nullcontext)
    )
    with torch.no_grad():
        module.items.table.weight *= -1
    module.on_validation_epoch_start()
    assert not torch.equal(module.catalogue()[1], module.head.table(-module.items.all()))
    assert torch.equal(module.catalogue()[1], module.head.table(module.items.all()))


def test_under_bf16_true_the_temperature_is_learned(run_training: Callable[..., Run]) -> None:
    run = run_training(*OFFICIAL, "trainer.precision=bf16-true", "trainer.max_epochs=1", "optimizer.lr=1e-5")
    state = torch.load(run.last, weights_only=True)["state_dict"]
    assert state["head.log_scale"].dtype == torch.float32
    assert 1e-6 < abs(state["head.log_scale"].item() - math.log(1 / 0.07)) < 1e-3


@pytest.mark.parametrize("strategy", ["auto", "ddp"])
def test_a_run_with_nothing_to_train_is_refused(run_training: Callable[..., Run], strategy: str) -> None:
    frozen = ["items=cached", "items.adaptor=none", "user=llm", "user.tuning.freeze=[all]"]
    with pytest.raises(ConfigError, match=r"^nothing is trained: every part is frozen; leave .* user\.tuning\.freeze$"):
        run_training(*frozen, f"trainer.strategy={strategy}")


def test_a_users_own_items_are_no_negatives_of_theirs_but_of_others(
    module: Recommender, batch: Batch, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reference 8, Loss, bettered: loss.mask_history, row by row."""
    seen: list[tuple[Any, ...]] = []
    module.loss = NCELoss(NCELossConfig(name="nce", _target_="", num_negatives=200, mask_history=True))
    forward = module.loss.forward
    monkeypatch.setattr(module.loss, "forward", lambda *given: seen.append(given) or forward(*given))
    module.training_step(batch, 0)
    ((_, _, candidates, targets, _, excluded),) = seen
    rows = (batch.targets > 0).nonzero()[:, 0].tolist()
    assert len(rows) == len(targets) == len(excluded)
    for row, found in zip(rows, excluded, strict=True):
        own = set(batch.items[row].tolist() + batch.targets[row].tolist()) - {0}
        assert set(candidates.ids[found].tolist()) == own
    assert module.last_step is not None
    own_sizes = [len(set(batch.items[r].tolist() + batch.targets[r].tolist()) - {0}) for r in rows]
    expected = len(candidates.ids) - sum(own_sizes) / len(rows)
    assert module.last_step.negatives.item() == pytest.approx(expected)
    assert int(module.last_step.offered) == len(candidates.ids)


def test_a_step_without_a_supervised_position_is_a_loss_of_0(module: Recommender, batch: Batch) -> None:
    loss = module.training_step(replace(batch, targets=torch.zeros_like(batch.targets)), 0)
    loss.backward()
    assert loss.item() == 0
    gradient = module.items.table.weight.grad
    assert gradient is not None
    assert not gradient.any()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="only a CUDA device can be waited for")
def test_a_step_of_the_exact_softmax_does_not_wait_for_the_device(
    run_config: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Recommender, "log", lambda *args, **kwargs: None)
    config = run_config("items=id")
    data = build_datamodule(config)
    module, batch = build_module(config, data).to("cuda"), next(iter(data.train_dataloader())).to("cuda")
    module.training_step(batch, 0).backward()  # makes what is made once
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.autocast("cuda", torch.bfloat16):
            loss = module.training_step(batch, 0)
        loss.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert loss.isfinite()


def test_lookup_gathers_by_id() -> None:
    ids, vectors = torch.tensor([2, 5, 9]), torch.eye(3)
    wanted = torch.tensor([[9, 2], [5, 5]])
    assert _lookup(wanted, ids, vectors).argmax(-1).tolist() == [[2, 0], [1, 1]]


@pytest.mark.parametrize(("exact_items", "dim", "exact"), [(30, 2, True), (29, 2, False), (29, 4, True)])
def test_the_automatic_loss_is_exact_where_that_is_cheap(
    run_config: Any, caplog: pytest.LogCaptureFixture, exact_items: int, dim: int, exact: bool
) -> None:
    caplog.set_level("INFO")
    # a block has 12 dim^2 weights: as much as 12 dim items
    flags = [f"loss.exact_items={exact_items}", f"user.dim={dim}", "user.num_heads=1"]
    config = run_config("items=id", "loss=auto", "user.num_layers=1", *flags)
    data = build_datamodule(config)
    assert 12 * 2 < data.num_items < 12 * 4
    loss = build_module(config, data).loss
    assert isinstance(loss, CrossEntropyLoss if exact else NCELoss)
    assert f"{data.num_items} items" in caplog.text


def test_the_automatic_loss_does_not_score_a_catalogue_that_it_would_have_to_encode(run_config: Any) -> None:
    config = run_config("items=llm", "loss=auto", "loss.num_negatives=5")
    loss = build_module(config, build_datamodule(config)).loss
    assert isinstance(loss, NCELoss)
    assert loss.config.logq
    assert loss.config.num_negatives == 5
