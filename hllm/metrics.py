"""HR@K, NDCG@K and MRR over the whole catalogue: the one place where they are defined.

One target a user. Its rank r (0 is best) is the number of unseen items that score higher, plus half of those that
score exactly the same (mid-rank): identical item texts give identical scores, and no order of storage should decide
among them. HR@K = [r < K], NDCG@K = [r < K] / log2(r + 2), MRR = 1 / (r + 1).

B users, I catalogue items, G groups.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics import Metric

from hllm.config import EvaluationConfig
from hllm.errors import DivergedError


def target_ranks(scores: Tensor, targets: Tensor, seen: Tensor) -> tuple[Tensor, Tensor]:
    """Ranks by counting, never by sorting.

    Args:
        scores: (B, I) score of item i + 1 in column i.
        targets: (B,) item ids.
        seen: (2, S) pairs of row and item id left out of the ranking. A target among its own user's seen items is
            ranked against the unseen ones.

    Returns:
        (B,) float mid-ranks, and (B,) int64 how many unseen items tie with the target.

    Raises:
        DivergedError: a score is NaN, which would rank its target first.
    """
    if scores.isnan().any():
        raise DivergedError("item scores are NaN: training diverged; lower optimizer.lr")
    column = (targets - 1)[:, None]
    target_score = scores.gather(1, column)
    scores = scores.index_put((seen[0], seen[1] - 1), scores.new_tensor(float("-inf")))
    scores = scores.scatter(1, column, float("-inf"))  # the target is no rival of itself
    higher, tied = (scores > target_score).sum(1), (scores == target_score).sum(1)
    # not the default dtype, which in a step under bf16-true is too coarse for a rank
    return higher.float() + tied.float() / 2, tied


def rank_metrics(ranks: Tensor, ks: Sequence[int]) -> Tensor:
    """(B,) mid-ranks -> (B, M) float64 metrics, in the order of ``EvaluationConfig.metric_names``."""
    ranks = ranks.double()
    hits = ranks[:, None] < torch.tensor(list(ks), device=ranks.device)  # (B, K)
    gains = hits / torch.log2(ranks + 2)[:, None]
    return torch.cat([torch.stack([hits, gains], dim=2).flatten(1), 1 / (ranks + 1)[:, None]], dim=1)


def group_labels(edges: Sequence[int], first: int = 0) -> list[str]:
    """Names of the groups that increasing edges make of whole numbers from ``first`` on: '0', '1-9', '10+'."""
    starts, ends = [first, *edges], [edge - 1 for edge in edges]
    spans = [str(a) if a == b else f"{a}-{b}" for a, b in zip(starts, ends, strict=False)]
    return [*spans, f"{edges[-1]}+"]


class RankingMetrics(Metric):
    """Sums of the metrics over users, kept apart by how often the target was seen in training; exact under DDP.

    Args:
        ks: list lengths.
        bucket_edges: increasing; group 0 holds targets seen less often than the first edge, the last those seen at
            least as often as the last edge.
    """

    full_state_update = False
    sums: Tensor
    users: Tensor
    ties: Tensor

    def __init__(self, ks: Sequence[int], bucket_edges: Sequence[int]) -> None:
        super().__init__()
        self.ks, self.edges = list(ks), list(bucket_edges)
        self.names = EvaluationConfig(self.ks, self.edges).metric_names()
        groups = len(self.edges) + 1
        zeros = torch.zeros(groups, len(self.names), dtype=torch.float64)
        self.add_state("sums", zeros, dist_reduce_fx="sum")
        self.add_state("users", torch.zeros(groups, dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("ties", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, ranks: Tensor, ties: Tensor, target_counts: Tensor) -> None:
        """(B,) mid-ranks and ties as ``target_ranks`` gives them; (B,) occurrences of the targets in training."""
        values = rank_metrics(ranks, self.ks)
        group = torch.bucketize(target_counts, torch.tensor(self.edges, device=ranks.device), right=True)
        # a product, because adding by index is not deterministic on a GPU
        self.sums += F.one_hot(group, len(self.users)).double().T @ values
        self.users += torch.bincount(group, minlength=len(self.users))
        self.ties += (ties > 0).sum()

    def compute(self) -> dict[str, dict[str, float]]:
        """Group of targets -> metric -> mean over its users, as fractions; ``users`` is their number.

        The first group is ``all``; it also holds ``ties``, the share of users whose target tied with another item.
        Groups without users are left out.
        """
        table = {
            "all": {
                **self._means(self.sums.sum(0), self.users.sum()),
                "ties": float(self.ties.float() / self.users.sum()),
            }
        }
        for label, sums, users in zip(group_labels(self.edges), self.sums, self.users, strict=True):
            if users > 0:
                table[label] = self._means(sums, users)
        return table

    def _means(self, sums: Tensor, users: Tensor) -> dict[str, float]:
        return {"users": int(users), **dict(zip(self.names, (sums / users).tolist(), strict=True))}
