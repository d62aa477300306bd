"""Similarity over a temperature: how a user vector scores item vectors (HLLM, arXiv 2409.12740, section 3.2).

N user vectors, M item vectors, D width.
"""

import math
from collections.abc import Callable
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from hllm.config import HeadConfig, Similarity

MAX_LOG_SCALE = math.log(100)


class SimilarityHead(nn.Module):
    """Dot product or cosine, times a scale of 1 / temperature.

    A learned scale is kept as its logarithm and clamped to [0, ln 100] where it is used, as CLIP and the official
    HLLM do. They clamp the weight in place; here only what is used is clamped, because a sharded weight is no place
    to write to, and the gradient keeps the weight from drifting off.

    The scale stays in float32 whatever the head is cast to: in bfloat16 a learned one is off by up to 2^-7, and a step
    of AdamW at a rate of 1e-4 is rounded away.
    """

    def __init__(self, config: HeadConfig, neighbours: int = 0) -> None:
        super().__init__()
        self.neighbours = neighbours
        if neighbours:
            self.log_weight = nn.Parameter(torch.tensor(math.log(0.3)))
        self.cosine = config.similarity is Similarity.cosine
        self.score_dtype: torch.dtype = getattr(torch, config.score_dtype.value)
        log_scale = torch.tensor(-math.log(config.temperature))
        self.learned = config.learned
        if config.learned:
            self.log_scale = nn.Parameter(log_scale)
        else:
            self.register_buffer("log_scale", log_scale, persistent=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        def moved(tensor: Tensor) -> Tensor:
            made = fn(tensor)
            return made if made.dtype == tensor.dtype else tensor.to(made.device)

        super()._apply(moved, recurse)  # type: ignore[no-untyped-call]
        return self

    def scale(self) -> Tensor:
        """() the factor on the similarity."""
        log_scale: Tensor = _Clamp.apply(self.log_scale) if self.learned else self.log_scale  # type: ignore[no-untyped-call]
        return log_scale.exp()

    def prepare(self, vectors: Tensor) -> Tensor:
        """(..., D) -> (..., D) as the inner product needs them: of unit length for cosine; zero vectors stay zero.

        With neighbours the last K of D + K are anchors: theirs is a cosine of its own, times a learned weight.
        """
        if self.neighbours:
            main, anchors = vectors.split([vectors.shape[-1] - self.neighbours, self.neighbours], dim=-1)
            weight = (self.log_weight / 2).exp().to(vectors.dtype)
            return torch.cat([self._sized(main), weight * F.normalize(anchors, dim=-1, eps=1e-6)], dim=-1)
        return self._sized(vectors)

    def _sized(self, vectors: Tensor) -> Tensor:
        return F.normalize(vectors, dim=-1, eps=1e-6) if self.cosine else vectors

    def forward(self, users: Tensor, items: Tensor) -> Tensor:
        """Every user with every item: (N, D), (M, D) -> (N, M) in ``score_dtype``, under mixed precision as well.

        Scores rounded to bfloat16 tie: over 1,682 items a random target ties for three users of four.
        """
        return self.score(users, self.table(items))

    def table(self, items: Tensor) -> Tensor:
        """(M, D) -> (M, D) what of the items ``score`` needs: the same for any users."""
        with torch.autocast(items.device.type, enabled=False):
            return self.prepare(items.to(self.score_dtype))

    def score(self, users: Tensor, table: Tensor, out: Tensor | None = None) -> Tensor:
        """As ``forward``, for items that went through ``table``; written to ``out``, (N, M), where that is given."""
        with torch.autocast(users.device.type, enabled=False):
            dtype = self.score_dtype
            return torch.mm(self.prepare(users.to(dtype)) * self.scale().to(dtype), table.T, out=out)


class _Clamp(torch.autograd.Function):
    """Clamp to [0, ln 100]. Outside, only a gradient that leads back passes.

    The clamp of torch passes none, so a weight that a step carried out of the range would stay there for good; one
    that passed all would let it wander ever further off.
    """

    @staticmethod
    def forward(ctx: Any, log_scale: Tensor) -> Tensor:
        ctx.save_for_backward(log_scale)
        return log_scale.clamp(0, MAX_LOG_SCALE)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (log_scale,) = ctx.saved_tensors
        outward = ((log_scale < 0) & (grad > 0)) | ((log_scale > MAX_LOG_SCALE) & (grad < 0))
        return grad.masked_fill(outward, 0)
