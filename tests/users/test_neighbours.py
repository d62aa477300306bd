"""Text neighbours as a part of the score: what is summed, that no later event is read, what the head makes of it."""

import torch
import torch.nn.functional as F
from torch import Tensor

from hllm.config import HeadConfig
from hllm.head import SimilarityHead
from hllm.items.tower import fit_components
from hllm.users.neighbours import NeighbourHistory

NEIGHBOURS = NeighbourHistory()


def test_each_event_counts_a_factor_less_than_the_next_newer_one() -> None:
    anchors = torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        NEIGHBOURS.decay.fill_(0.4)
    factor = torch.sigmoid(torch.tensor(0.4))
    state, expected = torch.zeros(2, 3), []
    for place in range(5):
        state = factor * state + anchors[:, place]
        expected.append(state)
    torch.testing.assert_close(NEIGHBOURS(anchors), torch.stack(expected, dim=1))


def test_no_position_reads_a_later_event() -> None:
    anchors = torch.randn(1, 6, 3, requires_grad=True)
    (gradient,) = torch.autograd.grad(NEIGHBOURS(anchors)[0, 2].sum(), anchors)
    assert (gradient[0, 3:] == 0).all()
    assert (gradient[0, :3] != 0).all()


def test_the_score_is_a_cosine_beside_a_weighted_cosine() -> None:
    head = SimilarityHead(HeadConfig(temperature=0.1), neighbours=3)
    users, items = torch.randn(4, 8), torch.randn(7, 8)

    def cosines(part: slice) -> Tensor:
        return F.normalize(users[:, part], dim=1) @ F.normalize(items[:, part], dim=1).T

    expected = 10 * (cosines(slice(5)) + head.log_weight.exp() * cosines(slice(5, 8)))
    torch.testing.assert_close(head(users, items), expected)


def test_components_are_uncorrelated_and_the_leading_ones() -> None:
    vectors = torch.randn(200, 6) * torch.tensor([5.0, 4, 3, 0.5, 0.4, 0.3])
    mean, components = fit_components(vectors, 3, 1e-9)
    x = (vectors - mean) @ components
    torch.testing.assert_close(x.T @ x / len(x), torch.eye(3), atol=1e-4, rtol=0)
    assert (components[3:].abs() < 0.1).all()
