"""What several processes tell one another in a step; on one process each of these does nothing.

W processes. All of them must call in the same order, also one that has nothing to tell.
"""

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor


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


def mean(values: Tensor) -> Tensor:
    """Over the processes; without gradient."""
    values = values.detach()
    if world_size() == 1:
        return values
    averaged = values.clone()
    dist.all_reduce(averaged)
    return averaged / world_size()


def most(count: int, device: torch.device) -> int:
    """Largest over the processes."""
    if world_size() == 1:
        return count
    largest = torch.tensor(count, device=device)
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    return int(largest)


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


def shard(tower: nn.Module, mesh: DeviceMesh, layer_dtype: torch.dtype | None) -> None:
    """Shard a tower's weights, gradients and optimizer state over the processes, in place (FSDP2).

    Each layer is gathered when it runs; what lies around the layers stays gathered from the tower's forward to the end
    of its backward, because an item token or an embedding is also read where activations are computed again.

    Args:
        mesh: of one dimension.
        layer_dtype: in which layers are gathered and compute, for mixed precision; gradients are summed in float32, and
            what lies between layers keeps its dtype, as under plain autocast.
    """
    if isinstance(tower, FSDPModule) or next(tower.parameters(), None) is None:
        return
    policy = MixedPrecisionPolicy(layer_dtype, torch.float32, cast_forward_inputs=False)
    for layer in outer_layers(tower):
        fully_shard(layer, mesh=mesh, mp_policy=policy if layer_dtype else MixedPrecisionPolicy())
    fully_shard(tower, mesh=mesh, mp_policy=MixedPrecisionPolicy(cast_forward_inputs=False))


def outer_layers(module: nn.Module) -> Iterable[nn.Module]:
    """The members of the outermost lists of modules."""
    for child in module.children():
        if isinstance(child, nn.ModuleList):
            yield from child
        else:
            yield from outer_layers(child)


def is_sharded(parameter: Tensor) -> bool:
    return isinstance(parameter, DTensor)


def average_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Mean over the processes of the gradients of parameters that no strategy looks after: those outside of shards."""
    for parameter in parameters:
        if parameter.requires_grad and not is_sharded(parameter):
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            dist.all_reduce(parameter.grad)
            parameter.grad /= world_size()


def clip_gradient_norm(parameters: Iterable[nn.Parameter], limit: float) -> None:
    """Scale all gradients so that their norm is at most ``limit``; torch's own cannot mix shards with whole ones."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    parts = [gradient.to_local() for gradient in gradients if isinstance(gradient, DTensor)]
    whole = [gradient for gradient in gradients if not isinstance(gradient, DTensor)]
    device = (parts + whole)[0].device
    squares = torch.zeros((), device=device)
    for part in parts:
        squares += part.float().square().sum()
    dist.all_reduce(squares)
    for gradient in whole:
        squares += gradient.float().square().sum()
    factor = (limit / (squares.sqrt() + 1e-6)).clamp(max=1)  # as torch.nn.utils.clip_grad_norm_
    for gradient in parts + whole:
        gradient *= factor.to(gradient.dtype)
