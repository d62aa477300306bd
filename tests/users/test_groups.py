"""Parts by length hold each row once, and are made where they leave out enough padding."""

import pytest
import torch

import hllm.users.groups
from hllm.users.groups import length_groups


@pytest.mark.parametrize("groups", [None, 1, 2, 3, 50])
@pytest.mark.parametrize("longest", [1, 7, 50, 200])
def test_every_row_is_in_one_part_and_the_longest_in_the_last(
    groups: int | None, longest: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hllm.users.groups, "GAIN", 0.0)
    monkeypatch.setattr(hllm.users.groups, "PART_COSTS", 1)
    lengths = torch.randint(1, longest + 1, (40,), generator=torch.Generator().manual_seed(0))
    lengths[17] = longest
    parts = length_groups(lengths, longest, groups)
    assert torch.cat(parts).sort().values.tolist() == list(range(40))
    assert len(parts) == min(groups or len(parts), 40)
    ends = [int(lengths[part].max()) for part in parts]
    assert ends == sorted(ends)
    if groups is None and longest == 200:
        assert len(parts) > 3
        assert ends == sorted(set(ends))


def test_by_itself_it_cuts_where_the_cost_is_least() -> None:
    """100 rows of 4 events beside 20 of 50: one cut, between them."""
    lengths = torch.tensor([50] * 20 + [4] * 100)
    short, long = length_groups(lengths, 50, None)
    assert short.tolist() == list(range(20, 120))
    assert long.tolist() == list(range(20))


@pytest.mark.parametrize("lengths", [[50] * 60 + [30] * 40, [50, 3, 3]])
def test_a_batch_with_little_padding_or_little_at_all_stays_whole(lengths: list[int]) -> None:
    (part,) = length_groups(torch.tensor(lengths), 50, None)
    assert part.tolist() == list(range(len(lengths)))
