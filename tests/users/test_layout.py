"""Events end to end and in parts are the same events, in value and in gradient, however the rows are cut."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import hllm.users.groups
from hllm.users.layout import Layout

LENGTHS = torch.tensor([2, 6, 1, 6, 3, 1])
MASK = torch.arange(6) < LENGTHS[:, None]
NUM_EVENTS = int(LENGTHS.sum())
CUTS = [1, 2, 3, 6, None]


@pytest.fixture(params=CUTS, ids=lambda cut: f"{cut} parts")
def layout(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Layout:
    monkeypatch.setattr(hllm.users.groups, "GAIN", 0.0)
    monkeypatch.setattr(hllm.users.groups, "PART_COSTS", 1)
    return Layout.of(MASK, num_parts=request.param)


def events() -> Tensor:
    return torch.randn(NUM_EVENTS, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def by_hand(values: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
    """Each row alone, without padding."""
    return torch.cat([function(row[None])[0] for row in values.split(LENGTHS.tolist())])


def sums(rows: Tensor) -> Tensor:
    """At each event the sum over the row up to it."""
    return rows.sin().cumsum(1)


def test_a_function_of_rows_is_that_of_each_row_alone(layout: Layout) -> None:
    found = [events().requires_grad_(), events().requires_grad_()]
    outputs = [layout.by_row(sums, found[0]), by_hand(found[1], sums)]
    torch.testing.assert_close(*outputs)
    for output in outputs:
        (output * torch.arange(1, NUM_EVENTS + 1)[:, None]).square().sum().backward()
    torch.testing.assert_close(found[0].grad, found[1].grad)


def test_what_is_given_for_each_part_comes_with_it(layout: Layout) -> None:
    values = events()
    shifted = layout.by_row(lambda rows, numbers: rows + numbers, values, layout.parts(2 * values))
    torch.testing.assert_close(shifted, 3 * values)


def test_padding_is_of_the_rows_own_events(layout: Layout) -> None:
    """So that whatever is computed there is finite and in range where the row's is."""
    for part in layout.parts(layout.row):
        assert (part == part[:, :1]).all()


def test_several_parts_have_less_padding(layout: Layout) -> None:
    places = sum(rows * length for rows, length in layout.shapes)
    assert places >= NUM_EVENTS
    assert places < MASK.numel() or len(layout.shapes) == 1


def test_rows_without_padding_are_taken_as_they_are() -> None:
    layout, values = Layout.of(torch.ones(4, 5, dtype=torch.bool)), torch.randn(20, 3)
    (part,) = layout.parts(values)
    assert layout.index is None
    assert part.shape == (4, 5, 3)
    assert part.data_ptr() == values.data_ptr()


def test_each_event_knows_its_row_its_place_and_what_is_before_it(layout: Layout) -> None:
    expected = [(row, place) for row, length in enumerate(LENGTHS.tolist()) for place in range(length)]
    assert list(zip(layout.row.tolist(), layout.place.tolist(), strict=True)) == expected
    numbers = torch.arange(NUM_EVENTS)
    before = layout.previous(numbers).tolist()
    assert before == [n - 1 if place else n for n, (_, place) in enumerate(expected)]
    assert layout.newest.tolist() == (LENGTHS.cumsum(0) - 1).tolist()
    assert layout.borders.tolist() == [0, *LENGTHS.cumsum(0).tolist()]


@pytest.mark.parametrize("cut", CUTS)
def test_few_sizes_put_events_behind_which_the_batchs_do_not_see(cut: int | None) -> None:
    lengths = torch.randint(1, 8, (90,), generator=torch.Generator().manual_seed(0))
    lengths[-1] += lengths.sum() % 2 == 0  # an odd number of events, in eights
    mask = torch.arange(8) < lengths[:, None]
    plain, filled = (Layout.of(mask, num_parts=cut, few_sizes=few) for few in (False, True))
    count, filler = len(plain.row), len(filled.row) - len(plain.row)
    assert len(filled.row) % 8 == 0
    assert 0 < filler < count / 32
    assert torch.equal(filled.row[:count], plain.row)
    assert torch.equal(filled.place[:count], plain.place)
    assert filled.row[count:].min() == len(mask)
    values = torch.randn(len(filled.row), 3, dtype=torch.float64, requires_grad=True)
    found, expected = filled.by_row(sums, values)[:count], plain.by_row(sums, values[:count])
    torch.testing.assert_close(found, expected)
    grads = [torch.autograd.grad(out.square().sum(), values)[0] for out in (found, expected)]
    torch.testing.assert_close(*grads)
    assert not grads[0][count:].any()


def test_a_thousand_batches_have_few_sizes() -> None:
    sizes = {len(Layout.of(torch.ones(1, n, dtype=torch.bool), few_sizes=True).row) for n in range(2000, 3000)}
    assert len(sizes) < 30
    assert max(size for size in sizes) <= 3000 * 33 / 32


def test_as_rows_there_are_zeros_at_padding(layout: Layout) -> None:
    values = events()
    rows = layout.rows(values)
    assert torch.equal(rows[MASK], values)
    assert not rows[~MASK].any()
