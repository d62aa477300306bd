"""What several processes tell one another in a step; on one process each of these does nothing.

W processes. All of them must call in the same order.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable


def world_size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if world_size() > 1 else 0


def gather_ids(ids: Tensor) -> Tensor:
    """(n,) ids of this process, n its own -> those of all processes, end to end in the order of ranks."""
    if world_size() == 1:
        return ids
    lengths = [torch.zeros((), dtype=torch.int64, device=ids.device) for _ in range(world_size())]
    dist.all_gather(lengths, torch.tensor(len(ids), device=ids.device))
    longest = int(max(int(length) for length in lengths))
    padded = ids.new_zeros(longest)
    padded[: len(ids)] = ids
    parts = [torch.empty_like(padded) for _ in lengths]
    dist.all_gather(parts, padded)
    return torch.cat([part[: int(length)] for part, length in zip(parts, lengths, strict=True)])


def from_first(tensor: Tensor) -> Tensor:
    """The first process's values, in all of them: what is drawn once a step must not depend on how many draw."""
    if world_size() > 1:
        dist.broadcast(tensor, 0)
    return tensor


def total(count: int, device: torch.device) -> int:
    """Sum over the processes."""
    if world_size() == 1:
        return count
    summed = torch.tensor(count, device=device)
    dist.all_reduce(summed)
    return int(summed)


def gather_vectors(vectors: Tensor) -> Tensor:
    """(m, D), m the same everywhere -> (W, m, D); a vector's gradients in all processes come back to its maker."""
    if world_size() == 1:
        return vectors[None]
    gathered: Tensor = _Gather.apply(vectors)  # type: ignore[no-untyped-call]
    return gathered


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, vectors: Tensor) -> Tensor:
        parts = [torch.empty_like(vectors) for _ in range(world_size())]
        dist.all_gather(parts, vectors.contiguous())
        return torch.stack(parts)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        # gloo does not scatter sums of every type, so all sums go everywhere
        grad = grad.contiguous()
        dist.all_reduce(grad)
        return grad[rank()]
