"""Loaders that every data set shares."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from hllm.config import DatasetConfig
from hllm.data.base import SequenceDataModule
from hllm.data.schema import Batch, Catalog, Interactions
from hllm.errors import DataError

NUM_USERS, LENGTH = 9, 8
CONFIG = DatasetConfig(name="made", _target_="", max_history=4, batch_size=3, eval_batch_size=5)


class Made(SequenceDataModule):
    """Nine users with 8 different items each."""

    length = LENGTH

    def read(self, folder: Path) -> tuple[Interactions, Catalog]:
        total = NUM_USERS * self.length
        items, times = np.arange(1, total + 1, dtype=np.int32), np.arange(total, dtype=np.int64)
        offsets = np.arange(0, total + 1, self.length)
        return Interactions(items, times, offsets, np.arange(NUM_USERS).astype(str)), Catalog(items.astype(str), {})


@pytest.fixture
def data(tmp_path: Path) -> SequenceDataModule:
    module = Made(replace(CONFIG, root=str(tmp_path)), tmp_path)
    module.setup()
    return module


def targets(loader: DataLoader[Batch]) -> list[int]:
    return torch.cat([batch.targets[batch.targets > 0] for batch in loader]).tolist()


def test_an_epoch_trains_each_transition_once(data: SequenceDataModule) -> None:
    expected = [u * LENGTH + event for u in range(NUM_USERS) for event in range(2, LENGTH - 1)]
    assert sorted(targets(data.train_dataloader())) == expected


def test_training_order_follows_the_seed_and_changes_between_epochs(data: SequenceDataModule) -> None:
    loader = data.train_dataloader()
    torch.manual_seed(3)
    first, second = targets(loader), targets(loader)
    torch.manual_seed(3)
    assert targets(data.train_dataloader()) == first
    assert first != second


def test_each_user_is_evaluated_once_in_order(data: SequenceDataModule) -> None:
    ends = [LENGTH * (user + 1) for user in range(NUM_USERS)]
    assert targets(data.val_dataloader()) == [end - 1 for end in ends]
    assert targets(data.test_dataloader()) == ends
    assert [len(batch) for batch in data.test_dataloader()] == [5, 4]


def test_only_evaluation_batches_carry_seen_items(data: SequenceDataModule) -> None:
    assert [next(iter(loader)).seen.shape[1] for loader in (data.train_dataloader(), data.test_dataloader())] == [
        0,
        5 * (LENGTH - 1),
    ]


def test_loader_workers_give_the_same_batches(data: SequenceDataModule) -> None:
    alone = targets(data.test_dataloader())
    data.config.num_workers = 1
    assert targets(data.test_dataloader()) == alone


def test_a_data_set_without_a_user_to_evaluate_is_refused(tmp_path: Path) -> None:
    module = Made(replace(CONFIG, root=str(tmp_path)), tmp_path)
    module.length = 2
    module.setup()
    with pytest.raises(DataError, match="made: no user has the 3 events that leave_one_out needs"):
        module.val_dataloader()


def test_a_batch_moves_to_a_device_with_all_its_parts(data: SequenceDataModule) -> None:
    moved = next(iter(data.test_dataloader())).to("meta")
    assert {tensor.device.type for tensor in vars(moved).values()} == {"meta"}
