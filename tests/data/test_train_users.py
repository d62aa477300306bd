"""dataset.train_users: fewer users to train on, the same to be evaluated."""

from collections.abc import Callable

import pytest
import torch

from hllm.build import build_datamodule
from hllm.config import Config, compose
from hllm.data.base import SequenceDataModule
from hllm.errors import ConfigError


def module(config: Config) -> SequenceDataModule:
    data = build_datamodule(config)
    assert isinstance(data, SequenceDataModule)
    return data


@pytest.mark.parametrize("cold", ["0", "0.2"])
def test_who_is_evaluated_on_what_does_not_change(run_config: Callable[..., Config], cold: str) -> None:
    few, all_users = (
        module(run_config(f"dataset.cold_items={cold}", f"dataset.train_users={share}")) for share in (0.25, 1)
    )
    trained = torch.cat([batch.users for batch in few.train_dataloader()]).unique()
    assert len(trained) == 10
    assert few.train_counts.sum() < 0.5 * all_users.train_counts.sum()
    for loader in ("val_dataloader", "test_dataloader"):
        for one, other in zip(getattr(few, loader)(), getattr(all_users, loader)(), strict=True):
            assert torch.equal(one.items, other.items)
            assert torch.equal(one.targets, other.targets)


def test_the_protocol_says_so(run_config: Callable[..., Config]) -> None:
    assert run_config("dataset.train_users=0.25").dataset.protocol_name == (
        "leave_one_out trained on 25% of users seed 0"
    )
    assert run_config().dataset.protocol_name == "leave_one_out"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["dataset.train_users=0"], r"dataset\.train_users=0.0: must be above 0 and at most 1"),
        (["dataset=sharded", "dataset.root=x", "dataset.train_users=.5"], r"dataset\.train_users=0.5: dataset=sharded"),
    ],
)
def test_shares_that_cannot_be_are_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        compose(overrides)
