"""A training step of the user model alone, forward and backward: as it is beside the plain ways to do it.

    python scripts/bench/user.py --record
    python scripts/bench/user.py --dim 1024 --layers 8 --length 200 1000 --batch-size 64        # a GPU

Histories have lognormal lengths (MovieLens-1M's: median 96, up to --length) and are padded behind. ``padded`` runs each
batch as one rectangle; ``in parts`` cuts it by length as a CPU's default does (user.length_groups). HSTU's plain way
makes the (B, H, L, L) scores, biases and gradients under autograd; its outputs are compared with ours before anything
is timed. ``of peak``, model FLOPs utilisation: what the real events and half of their pairs need, forward and backward,
over what the device's large products reach.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent))
from measure import Table, finish, in_turns, matrix_weights, of_peak, parser

from hllm.config import HSTUConfig, TransformerConfig
from hllm.users.groups import length_groups
from hllm.users.hstu import HSTU, time_buckets
from hllm.users.transformer import UserTransformer


def main() -> None:
    flags = parser(__doc__, rounds=5)
    flags.add_argument("--length", type=int, nargs="+", default=[50, 200])
    flags.add_argument("--batch-size", type=int, default=64)
    flags.add_argument("--dim", type=int, default=64)
    flags.add_argument("--layers", type=int, default=2)
    flags.add_argument("--heads", type=int, default=1)
    args = flags.parse_args()
    finish("user", args, [measure(args, length, name) for length in args.length for name in ("transformer", "hstu")])


class PlainHSTU(HSTU):
    """The same unit with its scores, (B, H, L, L), as one tensor under autograd."""

    def forward(self, x: Tensor, mask: Tensor, timestamps: Tensor, target_times: Tensor | None = None) -> Tensor:
        buckets = time_buckets(timestamps, target_times, self.num_buckets) if self.timed else None
        length = x.shape[1]
        x = self.dropout(x * self.scale + self.position.weight[:length])
        place = torch.arange(length, device=x.device)
        distance = (place[:, None] - place).clamp(min=0)
        for block in self.blocks:
            u, *vqk = F.silu(block.uvqk(F.layer_norm(x, x.shape[-1:], eps=1e-6))).split(block.sizes, dim=-1)
            v, q, k = (part.unflatten(-1, (block.num_heads, -1)).transpose(1, 2) for part in vqk)
            scores = q @ k.mT
            if block.position_bias is not None:
                scores = scores + block.position_bias[distance]
            if buckets is not None:
                scores = scores + block.time_bias[buckets.long()][:, None]
            weights = (F.silu(scores) / block.max_history).tril()
            attended = (weights @ v).transpose(1, 2).flatten(2)
            gated = u * F.layer_norm(attended, attended.shape[-1:], eps=1e-6)
            x = x + block.out(F.dropout(gated, block.dropout, block.training))
        return x


def measure(args: argparse.Namespace, length: int, name: str) -> Table:
    device = torch.device(args.device)
    torch.manual_seed(0)
    size: dict[str, Any] = {"dim": args.dim, "num_layers": args.layers, "num_heads": args.heads}
    lengths = (96 * torch.randn(args.batch_size).exp()).long().clamp(2, length)
    mask = torch.arange(length) < lengths[:, None]
    x = torch.randn(args.batch_size, length, args.dim) * mask[..., None]
    times = (torch.rand(args.batch_size, length) * 1e8).long().cumsum(1)
    x, mask, times, lengths = (part.to(device) for part in (x, mask, times, lengths))
    if name == "hstu":
        model: HSTU | UserTransformer = HSTU(HSTUConfig(name="hstu", **size), length).to(device)
        plain: HSTU | UserTransformer = PlainHSTU(HSTUConfig(name="hstu", **size), length).to(device)
        plain.load_state_dict(model.state_dict())
    else:
        model = plain = UserTransformer(TransformerConfig(name="transformer", **size), length).to(device)
    groups = length_groups(lengths.cpu(), length, None)

    def whole(model: nn.Module) -> Tensor:
        out: Tensor = model(x, mask, times)
        return out[mask]

    def grouped(model: nn.Module) -> Tensor:
        parts = []
        for rows in groups:
            columns = slice(int(lengths[rows].max()))
            parts.append(model(x[rows, columns], mask[rows, columns], times[rows, columns])[mask[rows, columns]])
        return torch.cat(parts)

    def step(run: Callable[[nn.Module], Tensor], model: nn.Module) -> Callable[[], None]:
        def turn() -> None:
            model.zero_grad(set_to_none=True)
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                out = run(model)
            out.float().square().mean().backward()

        return turn

    model.eval()
    plain.eval()
    with torch.no_grad():
        torch.testing.assert_close(whole(model), whole(plain), rtol=1e-3, atol=1e-4)
    model.train()
    plain.train()
    ways = {"plain, padded": step(whole, plain)} if name == "hstu" else {}
    ways |= {"ours, padded": step(whole, model), "ours, in parts": step(grouped, model)}
    seconds, megabytes = in_turns(ways, args)
    weights, squares = matrix_weights(model.blocks), int((lengths**2).sum())
    needed = 3 * (2 * weights * int(lengths.sum()) + 2 * args.layers * args.dim * squares)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    cells = {"of peak": of_peak(seconds, dict.fromkeys(ways, (needed, dtype)), args)}
    title = f"{name}: {args.layers} layers, width {args.dim}, {args.batch_size} histories of up to {length} events"
    table = Table(title, "events", float(lengths.sum()), seconds, megabytes, cells)
    print(f"{title}\n\n{table.text()}\n", flush=True)
    return table


if __name__ == "__main__":
    main()
