"""Time features and relative position bias."""

import math

import pytest
import torch

from hllm.config import TimeBuckets, TimeReference
from hllm.users.layout import Layout
from hllm.users.position import RelativePositionBias, TimeEmbedding, elapsed_minutes, time_bucket

TIMES = torch.tensor([60, 60, 180, 600])
LAYOUT = Layout.of(torch.tensor([[True, True, True, False], [True, False, False, False]]))


def test_minutes_since_the_previous_event() -> None:
    assert elapsed_minutes(TIMES, LAYOUT, TimeReference.previous).tolist() == [0, 0, 2, 0]


def test_minutes_until_the_end_of_the_row() -> None:
    assert elapsed_minutes(TIMES, LAYOUT, TimeReference.end).tolist() == [2, 2, 0, 0]


@pytest.mark.parametrize("kind", [TimeBuckets.sqrt, TimeBuckets.log])
def test_buckets_are_the_floor_of_the_scaled_minutes(kind: TimeBuckets) -> None:
    minutes = [0.0, 0.5, 1.0, 3.9, 4.0, 100.0, 1e6]
    scale = math.sqrt if kind is TimeBuckets.sqrt else math.log1p
    expected = [min(math.floor(scale(m)), 12) for m in minutes]
    assert time_bucket(torch.tensor(minutes), kind, 13).tolist() == expected


def test_decades_fall_into_the_last_bucket() -> None:
    century = torch.tensor([100 * 365.25 * 24 * 60])
    assert time_bucket(century, TimeBuckets.sqrt, 2048).item() == 2047


def test_every_time_bucket_is_trained_also_the_first() -> None:
    embedding = TimeEmbedding(TimeBuckets.sqrt, TimeReference.previous, 4, 3)
    embedding(TIMES, LAYOUT).sum().backward()
    assert embedding.table.weight.grad is not None
    assert (embedding.table.weight.grad[:2] != 0).all()


def test_relative_bias_depends_on_head_and_distance_and_hides_the_future() -> None:
    bias = RelativePositionBias(max_history=5, num_heads=2)
    found = bias(4)
    for head in range(2):
        for query in range(4):
            for key in range(4):
                expected = bias.table[head, query - key].item() if key <= query else -math.inf
                assert found[head, query, key].item() == expected
