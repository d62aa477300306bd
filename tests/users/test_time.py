"""What is added to item vectors of when their events happened."""

import math
from datetime import UTC, datetime, timedelta

import pytest
import torch

from hllm.config import UserConfig
from hllm.users.time import NUM_GAPS, CalendarEmbedding, EventTimes, calendar_fields, gap_bucket

EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
MOMENTS = [
    datetime(1970, 1, 1, tzinfo=UTC),
    datetime(1969, 12, 31, 23, 59, 59, tzinfo=UTC),
    datetime(1900, 3, 1, 0, 0, 1, tzinfo=UTC),  # no leap year, as 2100 is none
    datetime(2000, 2, 29, 12, 34, 56, tzinfo=UTC),
    datetime(2000, 12, 31, 23, 59, 59, tzinfo=UTC),
    datetime(2001, 1, 1, tzinfo=UTC),
    datetime(2024, 2, 29, 23, 0, 0, tzinfo=UTC),
    datetime(2099, 12, 31, 23, 59, 59, tzinfo=UTC),
]


def seconds(moments: list[datetime]) -> torch.Tensor:
    return torch.tensor([round((moment - EPOCH).total_seconds()) for moment in moments])


def fields(moments: list[datetime]) -> list[list[int]]:
    return [[m.year, m.month, m.day, m.hour, m.minute, m.second] for m in moments]


def test_calendar_fields_are_those_of_pythons_calendar() -> None:
    days = [
        datetime(1899, 12, 30, 1, 2, 3, tzinfo=UTC) + timedelta(days=61 * step, seconds=step) for step in range(1198)
    ]
    assert days[-1].year == 2099
    for moments in (MOMENTS, days):
        assert calendar_fields(seconds(moments)).tolist() == fields(moments)


def test_years_stop_at_the_end_of_their_table() -> None:
    late = calendar_fields(seconds([datetime(2500, 6, 7, 8, 9, 10, tzinfo=UTC)]))
    assert late.tolist() == [[2099, 6, 7, 8, 9, 10]]


@pytest.mark.parametrize("gap", [0, 1, 2, 3, 59, 60, 3_600, 86_400, 31_557_600, 2**33])
def test_gaps_have_two_buckets_to_a_doubling(gap: int) -> None:
    expected = min(math.floor(2 * math.log2(gap + 1) + 1e-9), NUM_GAPS - 1)
    assert gap_bucket(torch.tensor([gap])).item() == expected


def test_a_time_that_goes_back_is_no_gap() -> None:
    assert gap_bucket(torch.tensor([-5])).item() == 0


def test_the_calendar_is_six_tables_side_by_side_and_an_mlp() -> None:
    """Algorithm 1 of the HLLM paper: embed each field, concatenate, map to the model's width."""
    embedding = CalendarEmbedding(feature_dim=3, dim=5)
    times = seconds(MOMENTS)[None]
    first, _, second = embedding.mlp
    for place, moment in enumerate(fields(MOMENTS)):
        row = torch.cat([table.weight[value] for table, value in zip(embedding.tables, moment, strict=True)])
        inner = row @ first.weight.T + first.bias
        inner = inner * (1 + torch.erf(inner / math.sqrt(2))) / 2
        torch.testing.assert_close(embedding(times)[0, place], inner @ second.weight.T + second.bias)


@pytest.mark.parametrize("known", [False, True])
def test_event_times_are_the_sum_of_what_is_known(known: bool) -> None:
    config = UserConfig(time_features=True, time_gaps=True, time_feature_dim=3, target_time=known)
    times = EventTimes(config, dim=4)
    events, targets = torch.tensor([0, 60, 4_000]), torch.tensor([60, 4_000, 90_000])
    own, *target = times.calendars
    before, *after = times.gaps
    expected = own(events) + before(gap_bucket(torch.tensor([0, 60, 3_940])))
    if known:
        expected = expected + target[0](targets) + after[0](gap_bucket(torch.tensor([60, 3_940, 86_000])))
    assert (len(target), len(after)) == (known, known)
    torch.testing.assert_close(times(events, torch.tensor([0, 0, 60]), targets if known else None), expected)


def test_each_table_learns() -> None:
    config = UserConfig(time_features=True, time_gaps=True, time_feature_dim=3, target_time=True)
    times = EventTimes(config, dim=4)
    events = torch.tensor([[0, 60, 4_000]])
    times(events, events - 60, events + 86_400).sin().sum().backward()
    assert all(weight.grad is not None and weight.grad.any() for weight in times.parameters())
