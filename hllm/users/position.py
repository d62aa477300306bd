"""What tells the user model where and when an event stands: time features and relative position bias.

T events of a batch, L history length, H heads, D width.
"""

import torch
from torch import Tensor, nn

from hllm.config import HistoryPositions, TimeBuckets, TimeReference
from hllm.users.layout import Layout


def place_vectors(table: nn.Embedding, layout: Layout, counted_from: HistoryPositions) -> Tensor:
    """(T, D) what is learned of each event's place in its row.

    Args:
        table: a row a place, as many as the longest history has events.
    """
    places = layout.place
    if counted_from is HistoryPositions.last:
        places = places + (table.num_embeddings - layout.lengths)[layout.row]
    vectors: Tensor = table(places)
    return vectors


def elapsed_minutes(timestamps: Tensor, layout: Layout, reference: TimeReference) -> Tensor:
    """Minutes between each event and its reference event.

    previous: since the event before (0 for the first). Causal: position i knows nothing after event i.
    end: until the row's last event, as the light form's original (torch-rechub ``HLLMModel``). Position i then knows
    how far away the end of the row is, so this is only for rows whose last position alone is trained.

    Args:
        timestamps: (T,) int64 seconds.

    Returns:
        (T,) float32, at least 0.
    """
    if reference is TimeReference.previous:
        gap = timestamps - layout.previous(timestamps)
    else:
        gap = timestamps[layout.newest][layout.row] - timestamps
    return gap.clamp(min=0).float() / 60


def time_bucket(minutes: Tensor, kind: TimeBuckets, num_buckets: int) -> Tensor:
    """Bucket number of a time: floor of sqrt(minutes), or of ln(1 + minutes); the last bucket takes all beyond."""
    scaled = minutes.sqrt() if kind is TimeBuckets.sqrt else minutes.log1p()
    return scaled.long().clamp(max=num_buckets - 1)


class TimeEmbedding(nn.Module):
    """A learned vector for the time bucket of each event; bucket 0 is trained like any other."""

    def __init__(self, kind: TimeBuckets, reference: TimeReference, num_buckets: int, dim: int) -> None:
        super().__init__()
        self.kind, self.reference = kind, reference
        self.table = nn.Embedding(num_buckets, dim)

    def forward(self, timestamps: Tensor, layout: Layout) -> Tensor:
        """(T,) seconds -> (T, D)."""
        minutes = elapsed_minutes(timestamps, layout, self.reference)
        embedded: Tensor = self.table(time_bucket(minutes, self.kind, self.table.num_embeddings))
        return embedded


class RelativePositionBias(nn.Module):
    """A learned attention bias for each head and distance, shared by all layers (T5's form, one bucket a distance).

    Attention then leaves the kernels that run by sequence; on a GPU ``user.attention=flex`` looks the bias up in one.
    """

    def __init__(self, max_history: int, num_heads: int) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(num_heads, max_history) * 0.02)

    def forward(self, length: int) -> Tensor:
        """(H, L, L) additive bias; -inf where the key comes after the query."""
        index = torch.arange(length, device=self.table.device)
        distance = index[:, None] - index[None, :]
        bias = self.table[:, distance.clamp(min=0)]
        return bias.masked_fill(distance < 0, float("-inf"))
