"""Dropped as often as asked, scaled so that means stay, other masks each time, and nothing in evaluation."""

import pytest
import torch

from hllm.dropout import Dropout, dropout

SHAPE = (401, 503)  # no multiple of a word


@pytest.mark.parametrize("p", [0.1, 0.2, 0.5, 0.9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_elements_are_dropped_with_probability_p_and_the_others_scaled(p: float, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x = torch.ones(SHAPE, dtype=dtype, requires_grad=True)
    out = dropout(x, p)
    assert out.dtype is dtype
    values = out.detach().unique().tolist()
    assert values == pytest.approx([0, 1 / (1 - p)], rel=1e-2 if dtype is torch.bfloat16 else 1e-3)
    deviation = (p * (1 - p) / out.numel()) ** 0.5
    assert (out == 0).float().mean().item() == pytest.approx(p, abs=4 * deviation + 2**-17)
    out.sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, out.detach()), "the gradient passes where the value did"


def test_neighbours_in_rows_and_columns_are_independent() -> None:
    torch.manual_seed(0)
    kept = (dropout(torch.ones(1000, 1000), 0.5) > 0).float()
    for shift in range(1, 9):  # also within a word, of which four elements are drawn
        agree = (kept[:, shift:] == kept[:, :-shift]).float().mean().item()
        assert agree == pytest.approx(0.5, abs=2.5e-3)
    assert (kept[1:] == kept[:-1]).float().mean().item() == pytest.approx(0.5, abs=2.5e-3)
    assert kept.mean(0).std().item() == pytest.approx((0.25 / 1000) ** 0.5, rel=0.1)


def test_masks_follow_the_seed() -> None:
    x, masks = torch.ones(SHAPE), []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        masks.append([dropout(x, 0.3), dropout(x, 0.3)])
    assert torch.equal(masks[0][0], masks[1][0])
    assert not torch.equal(masks[0][0], masks[0][1])
    assert not torch.equal(masks[0][0], masks[2][0])


def test_nothing_is_dropped_in_evaluation_or_at_0() -> None:
    x, layer = torch.randn(SHAPE), Dropout(0.4)
    assert not torch.equal(layer(x), x)
    assert layer.eval()(x) is x
    assert dropout(x, 0.0) is x
    assert dropout(torch.empty(0, 3), 0.5).shape == (0, 3)
