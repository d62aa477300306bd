"""Exact softmax over a catalogue, forward and backward: ours beside plain linear + cross entropy, and torch's own.

    python scripts/bench/loss.py --record
    python scripts/bench/loss.py --positions 8192 --width 256 --items 3706 100000 1000000        # a GPU

Plain is F.cross_entropy(users @ items.T) under autograd, in float32; where its scores would take more than --plain-gb
three times over it is left out. ``frozen`` has item vectors that are not trained. torch has chunks of its own from
2.13 on; here they are as long as ours. Liger's kernel stands beside ours on a GPU that has the extra ``liger``. The
losses and gradients are compared before anything is timed. ``of peak``: three products with the items, two where they
are frozen, over what the device's large products reach in the way's dtype.
"""

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent))
from measure import Table, finish, in_turns, of_peak, parser

from hllm.config import HeadConfig, Similarity
from hllm.head import SimilarityHead
from hllm.losses import default_chunk_size, liger_softmax_loss, softmax_loss


def main() -> None:
    flags = parser(__doc__, rounds=5)
    flags.add_argument("--positions", type=int, default=1024)
    flags.add_argument("--width", type=int, default=256)
    flags.add_argument("--items", type=int, nargs="+", default=[3_706, 12_101, 100_000, 1_000_000])
    flags.add_argument("--plain-gb", type=float, default=8.0)
    args = flags.parse_args()
    tables = [measure(args, num_items) for num_items in args.items]
    finish("loss", args, tables)


def measure(args, num_items: int) -> Table:  # type: ignore[no-untyped-def]
    device = torch.device(args.device)
    generator = torch.Generator().manual_seed(0)
    users = (torch.randn(args.positions, args.width, generator=generator) / 4).to(device).requires_grad_()
    items = (torch.randn(num_items, args.width, generator=generator) / 4).to(device).requires_grad_()
    labels = torch.randint(num_items, (args.positions,), generator=generator).to(device)
    head = SimilarityHead(HeadConfig(similarity=Similarity.dot, temperature=1.0)).to(device)

    def ours(
        products: torch.dtype, frozen: bool = False, loss: Callable[..., Tensor] = softmax_loss
    ) -> Callable[[], Tensor]:
        table = items.detach() if frozen else items
        chunk = default_chunk_size(num_items, device, products)
        return lambda: step(loss(users, table, labels, head, chunk, products))

    def autocast_plain() -> Tensor:
        with torch.autocast(device.type, torch.bfloat16):
            return F.cross_entropy(users @ items.T, labels)

    def step(loss: Tensor) -> Tensor:
        users.grad = items.grad = None
        loss.backward()  # type: ignore[no-untyped-call]
        return loss.detach()

    ways: dict[str, Callable[[], Tensor]] = {}
    scores_gb = 4 * args.positions * num_items / 1e9
    if 3 * scores_gb <= args.plain_gb:
        ways["plain, float32"] = lambda: step(F.cross_entropy(users @ items.T, labels))
        ways["plain, autocast to bfloat16"] = lambda: step(autocast_plain())
    if hasattr(F, "linear_cross_entropy"):  # torch 2.13
        from torch.nn import LinearCrossEntropyOptions

        chunks = LinearCrossEntropyOptions(batch_chunk_size=default_chunk_size(num_items, device))
        ways["torch's chunks, as long as ours, float32"] = lambda: step(
            F.linear_cross_entropy(users, items, labels, options=chunks)
        )
    ways["ours, float32"] = ours(torch.float32)
    ways["ours, bfloat16 products"] = ours(torch.bfloat16)
    ways["ours, float32, frozen"] = ours(torch.float32, frozen=True)
    ways["ours, bfloat16 products, frozen"] = ours(torch.bfloat16, frozen=True)
    if device.type == "cuda" and importlib.util.find_spec("liger_kernel") is not None:
        ways["Liger's kernel, float32"] = ours(torch.float32, loss=liger_softmax_loss)
        ways["Liger's kernel, bfloat16 products"] = ours(torch.bfloat16, loss=liger_softmax_loss)
        ways["Liger's kernel, bfloat16 products, frozen"] = ours(torch.bfloat16, True, liger_softmax_loss)
    check(ways, users, items)
    seconds, megabytes = in_turns(ways, args)
    product = 2 * args.positions * args.width * num_items
    flops = {
        way: ((2 if "frozen" in way else 3) * product, torch.bfloat16 if "bfloat16" in way else torch.float32)
        for way in ways
    }
    cells = {"of peak": of_peak(seconds, flops, args)}
    title = f"N={args.positions}, d={args.width}, {num_items:,} items"
    table = Table(title, "positions", args.positions, seconds, megabytes, cells)
    print(f"{table.title}\n\n{table.text()}\n", flush=True)
    return table


def check(ways: dict[str, Callable[[], Tensor]], users: Tensor, items: Tensor) -> None:
    """All ways give the loss of the first, and its gradients to 16 bits."""
    found = {}
    for way, turn in ways.items():
        loss = turn()
        assert users.grad is not None
        found[way] = loss, users.grad
    (loss, grad), *others = found.values()
    for other_loss, other in others:
        assert (other_loss - loss).abs() < 2e-3 * loss.abs(), found
        assert (other - grad).norm() < 0.01 * grad.norm(), found


if __name__ == "__main__":
    main()
