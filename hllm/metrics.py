"""HR@K, NDCG@K, MRR and coverage over the whole catalogue: the one place where they are defined.

One target a user. Its rank r (0 is best) is the number of unseen items that score higher, plus half of those that
score exactly the same (mid-rank): identical item texts give identical scores, and no order of storage should decide
among them. HR@K = [r < K], NDCG@K = [r < K] / log2(r + 2), MRR = 1 / (r + 1). Coverage@K is the share of the catalogue
that stands among the K best of any user.

B users, I catalogue items, G groups.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics import Metric

from hllm.config import EvaluationConfig
from hllm.errors import DivergedError

CACHED_SCORES = 2**19
"What two MiB hold."


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
    if scores.amax(1).isnan().any():  # NaN where any of a row is
        raise DivergedError("item scores are NaN: training diverged; lower optimizer.lr")
    column = targets - 1
    target_score = scores.gather(1, column[:, None])
    # a few rows at a time on a CPU, so that they are in a core's cache when they are read again
    step = max(CACHED_SCORES // scores.shape[1], 1) if scores.device.type == "cpu" else len(scores)
    parts = list(zip(scores.split(step), target_score.split(step), strict=True))
    higher = torch.cat([_count(part > own) for part, own in parts])
    tied = torch.cat([_count(part == own) for part, own in parts])
    # then without what is no rival, each once: for few of them no second (B, I) table is made
    width, own = scores.shape[1], torch.arange(len(column), device=column.device)
    places = torch.cat([seen[0] * width + seen[1] - 1, own * width + column]).unique()
    rows = places // width
    score, against = scores[rows, places % width], target_score[rows, 0]
    higher.index_add_(0, rows, (score > against).int(), alpha=-1)
    tied.index_add_(0, rows, (score == against).int(), alpha=-1)
    # not the default dtype, which in a step under bf16-true is too coarse for a rank
    return higher.float() + tied.float() / 2, tied.long()


def _count(true: Tensor) -> Tensor:
    """(B, I) bool -> (B,) int32 how many; on a CPU a sum of bools takes six times as long as one of bytes."""
    return true.view(torch.uint8).sum(1, dtype=torch.int32)


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
    """Sums of the metrics over users, kept apart by how often the target was seen in training and by how long the
    history is; exact under DDP.

    Args:
        ks: list lengths.
        bucket_edges: increasing; group 0 holds targets seen less often than the first edge, the last those seen at
            least as often as the last edge.
        history_edges: likewise of the events before the target; none breaks nothing down by them.
        cold: items are held out of training; they are a group of their own, ``cold``, and in none by training events.
    """

    full_state_update = False
    sums: Tensor
    users: Tensor
    ties: Tensor

    def __init__(
        self, ks: Sequence[int], bucket_edges: Sequence[int], history_edges: Sequence[int] = (), cold: bool = False
    ) -> None:
        super().__init__()
        self.ks, self.edges, self.history_edges, self.cold = list(ks), list(bucket_edges), list(history_edges), cold
        self.names = EvaluationConfig(self.ks, self.edges).metric_names()
        self.labels = group_labels(self.edges)
        if cold:
            self.edges, self.labels = [0, *self.edges], ["cold", *self.labels]
        if history_edges:
            self.labels += [f"history {label}" for label in group_labels(history_edges, first=1)]
        zeros = torch.zeros(len(self.labels), len(self.names), dtype=torch.float64)
        self.add_state("sums", zeros, dist_reduce_fx="sum")
        self.add_state("users", torch.zeros(len(self.labels), dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("ties", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(
        self,
        ranks: Tensor,
        ties: Tensor,
        target_counts: Tensor,
        histories: Tensor | None = None,
        cold: Tensor | None = None,
    ) -> None:
        """Count users in.

        Args:
            ranks, ties: (B,) as ``target_ranks`` gives them.
            target_counts: (B,) occurrences of the targets in training.
            histories: (B,) events before the target, where there are ``history_edges``.
            cold: (B,) bool, which targets are held out of training, where items are.
        """
        values = rank_metrics(ranks, self.ks)
        if self.cold:
            assert cold is not None
            target_counts = target_counts.masked_fill(cold, -1)  # below the edge 0
        members = _one_hot(target_counts, self.edges)  # (B, G)
        if self.history_edges:
            assert histories is not None
            members = torch.cat([members, _one_hot(histories, self.history_edges)], dim=1)
        # a product, because adding by index is not deterministic on a GPU
        self.sums += members.double().T @ values
        self.users += members.sum(0)
        self.ties += (ties > 0).sum()

    def compute(self) -> dict[str, dict[str, float]]:
        """Group -> metric -> mean over its users, as fractions; ``users`` is their number.

        The first group is ``all``; it also holds ``ties``, the share of users whose target tied with another item.
        Then the groups of targets, and those of histories. Groups without users are left out.
        """
        by_target = slice(len(self.edges) + 1)  # every user is in one of these
        users = self.users[by_target].sum()
        table = {
            "all": {**self._means(self.sums[by_target].sum(0), users), "ties": float(self.ties.float() / users)},
        }
        for label, sums, number in zip(self.labels, self.sums, self.users, strict=True):
            if number > 0:
                table[label] = self._means(sums, number)
        return table

    def _means(self, sums: Tensor, users: Tensor) -> dict[str, float]:
        return {"users": int(users), **dict(zip(self.names, (sums / users).tolist(), strict=True))}


def _one_hot(counts: Tensor, edges: Sequence[int]) -> Tensor:
    """(B,) whole numbers -> (B, groups) 1 at the group that each is in."""
    group = torch.bucketize(counts, torch.tensor(list(edges), device=counts.device), right=True)
    return F.one_hot(group, len(edges) + 1)


class Coverage(Metric):
    """How much of the catalogue anybody is shown: for each item its best place in the list of any user; exact under
    DDP.

    Items that score alike stand in the order that ``topk`` gives them.

    Args:
        ks: list lengths.
        num_items: of the catalogue.
    """

    full_state_update = False
    places: Tensor

    def __init__(self, ks: Sequence[int], num_items: int) -> None:
        super().__init__()
        self.ks = list(ks)
        self.add_state("places", torch.full((num_items,), ks[-1]), dist_reduce_fx="min")

    def update(self, scores: Tensor, seen: Tensor) -> None:
        """(B, I) scores, and (2, S) pairs of row and item id that are not shown, as of ``target_ranks``."""
        scores = scores.index_put((seen[0], seen[1] - 1), scores.new_tensor(float("-inf")))
        best = scores.topk(min(self.ks[-1], scores.shape[1]), dim=1)
        places = torch.arange(best.indices.shape[1], device=scores.device).expand_as(best.indices)
        # the lowest number is that of items which a model does not know
        shown = best.values > torch.finfo(scores.dtype).min
        places = places.where(shown, self.ks[-1])
        self.places = self.places.scatter_reduce(0, best.indices.flatten(), places.flatten(), "amin")

    def compute(self) -> dict[str, float]:
        """coverage@k for each k, as fractions."""
        return {f"coverage@{k}": float((self.places < k).double().mean()) for k in self.ks}
