"""A training step of the user model alone, forward and backward: as it is beside the plain ways to do it.

    python scripts/bench/user.py --record
    python scripts/bench/user.py --dim 1024 --layers 8 --length 200 1000 --batch-size 64        # a GPU

Histories have lognormal lengths (MovieLens-1M's: median 96, up to --length). ``plain`` runs them as one rectangle,
padded behind: the transformer on torch's fused causal kernel, HSTU with the (B, H, L, L) scores, biases and gradients
under autograd. Ours runs the events end to end, and attention by sequence where a fused kernel does, else over the
rectangle or, as a CPU does by itself, over parts of like length (user.length_groups). Outputs are compared before
anything is timed. ``of peak``, model FLOPs utilisation: what the events and half of their pairs need, forward and
backward, over what the device's large products reach.
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
from hllm.users.hstu import HSTU, time_buckets
from hllm.users.layout import Layout
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
    """The same unit with its scores, (B, H, L, L), as one tensor under autograd; reads (B, L, D) and its padding."""

    def forward(  # type: ignore[override]
        self, x: Tensor, mask: Tensor, timestamps: Tensor, target_times: Tensor | None = None
    ) -> Tensor:
        buckets = time_buckets(timestamps, timestamps, self.num_buckets) if self.timed else None
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


class PlainTransformer(UserTransformer):
    """The same blocks over (B, L, D), padding included, with torch's fused causal kernel."""

    def forward(  # type: ignore[override]
        self, x: Tensor, mask: Tensor, timestamps: Tensor, target_times: Tensor | None = None
    ) -> Tensor:
        x = self.dropout(x + self.position.weight[: x.shape[1]])
        for block in self.blocks:
            heads = block.qkv(block.attention_norm(x)).unflatten(-1, (3, block.num_heads, -1))
            q, k, v = heads.permute(2, 0, 3, 1, 4)
            attended = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
            x = x + F.dropout(block.out(attended), block.dropout, block.training)
            x = x + F.dropout(block.ffn(block.ffn_norm(x)), block.dropout, block.training)
        normed: Tensor = self.norm(x)
        return normed


KINDS: dict[str, tuple[type, type, type]] = {
    "transformer": (TransformerConfig, UserTransformer, PlainTransformer),
    "hstu": (HSTUConfig, HSTU, PlainHSTU),
}


def measure(args: argparse.Namespace, length: int, name: str) -> Table:
    device = torch.device(args.device)
    torch.manual_seed(0)
    size: dict[str, Any] = {"dim": args.dim, "num_layers": args.layers, "num_heads": args.heads}
    lengths = (96 * torch.randn(args.batch_size).exp()).long().clamp(2, length)
    mask = torch.arange(length) < lengths[:, None]
    x = torch.randn(args.batch_size, length, args.dim) * mask[..., None]
    times = (torch.rand(args.batch_size, length) * 1e8).long().cumsum(1)
    places = mask.flatten().nonzero().flatten()
    x, mask, times, places = (part.to(device) for part in (x, mask, times, places))
    config, kind, plain_kind = KINDS[name]
    model = kind(config(name=name, **size), length).to(device)
    plain = plain_kind(config(name=name, **size), length).to(device)
    plain.load_state_dict(model.state_dict())

    def padded() -> Tensor:
        out: Tensor = plain(x, mask, times)[mask]
        return out

    def flat(num_parts: int | None) -> Callable[[], Tensor]:
        def run() -> Tensor:
            layout = Layout.of(mask, places, num_parts)
            out: Tensor = model(x.flatten(0, 1)[places], layout, times.flatten()[places])
            return out

        return run

    def step(run: Callable[[], Tensor], model: nn.Module) -> Callable[[], None]:
        def turn() -> None:
            model.zero_grad(set_to_none=True)
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                out = run()
            out.float().square().mean().backward()

        return turn

    model.eval()
    plain.eval()
    num_parts = None if device.type == "cpu" else 1
    with torch.no_grad():
        torch.testing.assert_close(flat(num_parts)(), padded(), rtol=1e-3, atol=1e-4)
    model.train()
    plain.train()
    ways = {"plain, padded": step(padded, plain), "ours": step(flat(1), model)}
    if device.type == "cpu":
        ways["ours, attention in parts"] = step(flat(None), model)
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
