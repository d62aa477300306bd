"""What every user tower keeps to, in the module that feeds it: no future, no padding, no time it must not know."""

import functools
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

import hllm.users.groups
from hllm.build import build_datamodule, build_module
from hllm.config import Config
from hllm.data.schema import Batch
from hllm.module import Recommender
from hllm.users.groups import length_groups
from hllm.users.layout import Layout

LENGTH = 6
LATER = 10_000_000
"Seconds: four months."
TIMED = ["user.time_features=true", "user.time_gaps=true", "user.time_feature_dim=4"]
TOWERS = {
    "transformer": ["user=transformer"],
    "transformer without times": ["user=transformer", "user.time_buckets=none"],
    "transformer with position bias": ["user=transformer", "user.relative_position_bias=true"],
    "transformer with event times": ["user=transformer", *TIMED],
    "sasrec": ["user=sasrec"],
    "sasrec with event times": ["user=sasrec", *TIMED],
    "sasrec_bytedance": ["user=sasrec_bytedance"],
    "esasrec": ["user=esasrec"],
    "esasrec with event times": ["user=esasrec", *TIMED],
    "hstu": ["user=hstu", "user.num_layers=2"],
    "hstu without position bias": ["user=hstu", "user.relative_position_bias=false"],
    "hstu without time bias": ["user=hstu", "user.relative_time_bias=false"],
    "hstu with event times": ["user=hstu", *TIMED],
    "hstu_large": ["user=hstu_large"],
    "hstu_bytedance": ["user=hstu_bytedance"],
    "hstu_1b": ["user=hstu_1b", "user.num_heads=4"],
    "llm": ["user=llm"],
    "llm with event times": ["user=llm", *TIMED],
}
KNOWING = ["hstu", "hstu_large", "hstu with event times", "transformer with event times", "sasrec with event times"]
KNOWING += ["esasrec with event times", "llm with event times", "hstu without position bias"]
TIMELESS = ["transformer without times", "sasrec", "sasrec_bytedance", "esasrec", "hstu without time bias"]
TIMELESS += ["hstu_bytedance", "hstu_1b", "llm"]


@pytest.fixture(scope="module")
def module(run_config: Callable[..., Config]) -> Callable[..., Recommender]:
    """The module of a tower by its name above, on ids, with weights spread so that nothing is nearly 0 or uniform."""
    data = build_datamodule(run_config("items=id", f"dataset.max_history={LENGTH}"))

    @functools.cache
    def build(name: str, *more: str) -> Recommender:
        torch.manual_seed(0)
        config = run_config("items=id", *TOWERS[name], f"dataset.max_history={LENGTH}", *more)
        made = build_module(config, data).eval()
        for part in (made.users, made.times, made.items):
            for parameter in [] if part is None else part.parameters():
                nn.init.normal_(parameter, std=0.3)
        return made

    return build


@pytest.fixture
def batch() -> Batch:
    """Rows of 6, 3 and 1 events, hours to days apart; what follows each event follows in time too."""
    generator = torch.Generator().manual_seed(1)
    mask = torch.arange(LENGTH) < torch.tensor([[6], [3], [1]])
    times = 900_000_000 + torch.randint(3_000, 200_000, (3, LENGTH + 1), generator=generator).cumsum(1)
    items = torch.randint(1, 31, (3, LENGTH + 1), generator=generator)
    return Batch(
        users=torch.arange(3),
        items=items[:, :-1] * mask,
        timestamps=times[:, :-1] * mask,
        targets=items[:, 1:] * mask,
        target_times=times[:, 1:] * mask,
        mask=mask,
        seen=torch.zeros(2, 0, dtype=torch.int64),
    )


def encode(module: Recommender, batch: Batch) -> Tensor:
    """(B, L, D) user vectors."""
    ids = torch.arange(1, module.items.num_items + 1)
    return Layout.of(batch.mask).rows(module(batch, ids, module.items(ids)))


def assert_same(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def differs(found: Tensor, expected: Tensor) -> bool:
    return not torch.allclose(found, expected, atol=1e-3)


def later(times: Tensor, event: int) -> Tensor:
    """With all times from an event on moved."""
    moved = times.clone()
    moved[:, event:] += LATER
    return moved


@pytest.mark.parametrize("name", TOWERS)
def test_no_output_depends_on_later_items(name: str, module: Callable[..., Recommender], batch: Batch) -> None:
    model = module(name)
    before = encode(model, batch)
    for event in range(LENGTH):
        items = batch.items.clone()
        items[:, event:] = items[:, event:] % 30 + 1
        after = encode(model, replace(batch, items=items))
        assert_same(after[:, :event], before[:, :event])
        assert all(differs(after[0, place], before[0, place]) for place in range(event, LENGTH))


@pytest.mark.parametrize(("name", "known"), [*((name, False) for name in TOWERS), *((name, True) for name in KNOWING)])
def test_no_output_depends_on_later_times(
    name: str, known: bool, module: Callable[..., Recommender], batch: Batch
) -> None:
    """Hidden: on none after its own event's. Known: on none after its own target's."""
    model = module(name, f"user.target_time={known}")
    before = encode(model, batch)
    for event in range(LENGTH):
        times = later(batch.timestamps, event)
        targets = later(batch.target_times, event if known else max(event - 1, 0))
        after = encode(model, replace(batch, timestamps=times, target_times=targets))
        assert_same(after[:, :event], before[:, :event])


@pytest.mark.parametrize("name", KNOWING)
def test_a_known_target_time_is_read_at_its_own_place(
    name: str, module: Callable[..., Recommender], batch: Batch
) -> None:
    """From the second event on: of one event and one head, HSTU's norm leaves nothing of what attention weighed it."""
    model, blind = module(name, "user.target_time=True"), module(name, "user.target_time=False")
    before, unseeing = encode(model, batch), encode(blind, batch)
    for event in range(1, LENGTH):
        targets = batch.target_times.clone()
        targets[:, event] += LATER
        changed = replace(batch, target_times=targets)
        after = encode(model, changed)
        assert_same(after[:, :event], before[:, :event])
        assert differs(after[0, event], before[0, event])
        assert torch.equal(encode(blind, changed), unseeing)


@pytest.mark.parametrize("name", TOWERS)
def test_times_of_events_are_read_or_not_as_the_config_says(
    name: str, module: Callable[..., Recommender], batch: Batch
) -> None:
    model = module(name)
    before, after = (encode(model, replace(batch, timestamps=later(batch.timestamps, event))) for event in (LENGTH, 2))
    if name in TIMELESS:
        assert torch.equal(before, after)
    else:
        assert all(differs(after[0, place], before[0, place]) for place in range(2, LENGTH))


@pytest.mark.parametrize("name", TOWERS)
def test_what_stands_at_padding_changes_nothing(name: str, module: Callable[..., Recommender], batch: Batch) -> None:
    model = module(name)
    noise = torch.randint(1, 31, batch.items.shape, generator=torch.Generator().manual_seed(2))
    noisy = replace(
        batch,
        items=torch.where(batch.mask, batch.items, noise),
        timestamps=torch.where(batch.mask, batch.timestamps, noise * LATER),
        target_times=torch.where(batch.mask, batch.target_times, noise * LATER),
    )
    assert_same(encode(model, noisy)[batch.mask], encode(model, batch)[batch.mask])


def cut(batch: Batch, row: int, length: int) -> Batch:
    """The first events of one row alone, without padding."""
    names = ("items", "timestamps", "targets", "target_times", "mask")
    parts = {name: getattr(batch, name)[row : row + 1, :length] for name in names}
    return replace(batch, users=batch.users[row : row + 1], **parts)


@pytest.mark.parametrize("name", TOWERS)
def test_the_amount_of_padding_changes_nothing(name: str, module: Callable[..., Recommender], batch: Batch) -> None:
    model = module(name)
    whole = encode(model, batch)
    for row, length in ((1, 3), (2, 1)):
        assert_same(whole[row : row + 1, :length], encode(model, cut(batch, row, length)))


@pytest.mark.parametrize("name", TOWERS)
def test_an_appended_event_changes_no_earlier_output(
    name: str, module: Callable[..., Recommender], batch: Batch
) -> None:
    """But where positions count from the row's end, as in ByteDance's code."""
    model = module(name)
    whole, begun = encode(model, batch)[:1, :4], encode(model, cut(batch, 0, 4))
    if name in ("sasrec_bytedance", "hstu_bytedance", "hstu_1b"):
        assert differs(whole, begun)
    else:
        assert_same(whole, begun)


@pytest.mark.parametrize("name", TOWERS)
def test_reading_by_length_groups_changes_nothing(
    name: str, module: Callable[..., Recommender], batch: Batch, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = module(name, "user.length_groups=1")
    whole = encode(model, batch)[batch.mask]
    monkeypatch.setattr(hllm.users.groups, "GAIN", 0.0)
    monkeypatch.setattr(hllm.users.groups, "PART_COSTS", 1)
    assert len(length_groups(batch.mask.sum(1), batch.mask.shape[1], None)) > 1
    for groups in (2, 3, 4, None):
        monkeypatch.setattr(model, "length_groups", groups)
        assert_same(encode(model, batch)[batch.mask], whole)


@pytest.mark.parametrize("name", TOWERS)
def test_every_weight_and_every_table_is_used(name: str, module: Callable[..., Recommender], batch: Batch) -> None:
    model = module(name, f"user.target_time={name in KNOWING}")
    weights = {"users." + name: weight for name, weight in model.users.named_parameters()}
    if model.times is not None:
        weights |= {"times." + name: weight for name, weight in model.times.named_parameters()}
    model.zero_grad()
    encoded = encode(model, batch)[batch.mask]
    (encoded * torch.linspace(-1, 1, encoded.shape[-1])).sin().sum().backward()
    assert all(weight.grad is not None for weight in weights.values())
    assert [name for name, weight in weights.items() if not weight.grad.any()] == []


@pytest.mark.parametrize("name", TOWERS)
def test_in_mixed_precision_it_is_nearly_the_same_and_trains(
    name: str, module: Callable[..., Recommender], batch: Batch
) -> None:
    model = module(name)
    exact = encode(model, batch)[batch.mask]
    with torch.autocast("cpu", torch.bfloat16):
        rounded = encode(model, batch)[batch.mask]
    assert torch.cosine_similarity(exact, rounded.float(), dim=-1).min() > 0.98
    model.zero_grad()
    rounded.float().square().mean().backward()
    assert all(weight.grad is not None and weight.grad.isfinite().all() for weight in model.users.parameters())
