"""Dropout with masks that are cheap on a CPU.

torch draws 53 random bits for each element there, on one core unless it is Intel's: a tenth of a training step of a
small user model. Sixteen are enough.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

BITS = 16
WORD = 64


def dropout(x: Tensor, p: float, training: bool = True) -> Tensor:
    """Each element 0 with probability p, to the nearest 2^-16 on a CPU, else over the probability that it is kept."""
    if not training or p == 0:
        return x
    if x.device.type != "cpu" or torch.compiler.is_compiling():
        return F.dropout(x, p)
    return x * _mask(x, p)


def _mask(x: Tensor, p: float) -> Tensor:
    """As x: 0 or one over the share that is kept."""
    values = 2**BITS
    dropped = min(round(p * values), values - 1)  # of all values
    words = torch.empty(-(-x.numel() * BITS // WORD), dtype=torch.int64)
    drawn = words.random_(-(2 ** (WORD - 1)), None).view(torch.int16)[: x.numel()]
    kept: Tensor = drawn >= dropped - values // 2
    return kept.to(x.dtype).mul_(values / (values - dropped)).view(x.shape)


class Dropout(nn.Dropout):
    """``dropout`` as a layer."""

    def forward(self, x: Tensor) -> Tensor:
        return dropout(x, self.p, self.training)
