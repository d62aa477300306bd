"""Ranking every user's target among the whole catalogue: ours beside a sort, and beside lists of the best.

    python scripts/bench/rank.py --record
    python scripts/bench/rank.py --users 100000 --items 100000 687000 --width 256        # a GPU

All ways multiply the same float32 user and item vectors, a batch of users at a time, and leave out the same seen items.
Ours counts (hllm.metrics.target_ranks); ``sort`` orders each user's catalogue and looks its target up, as evaluation
code commonly does; ``topk 200`` makes the lists that HR@200 needs, and of other targets knows nothing; so does
RecTools' ranker, which runs in an environment of its own, on a CPU, its turns one after the other. Of --users only
--timed are ranked a turn; the ranks of both exact ways are compared before anything is timed.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from statistics import median

import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent))
from measure import Table, finish, in_turns, parser
from peers import RUNNERS, install

from hllm.metrics import target_ranks

SEEN, BEST = 50, 200


def main() -> None:
    flags = parser(__doc__, rounds=5)
    flags.add_argument("--users", type=int, default=100_000, help="(default: %(default)s)")
    flags.add_argument("--timed", type=int, default=512, help="users of a turn (default: %(default)s)")
    flags.add_argument("--batch-size", type=int, default=128)
    flags.add_argument("--width", type=int, default=64)
    flags.add_argument("--items", type=int, nargs="+", default=[3_706, 100_000])
    flags.add_argument("--environments", type=Path, default=Path("~/.cache/hllm/peers").expanduser())
    flags.add_argument("--no-peer", action="store_true", help="without RecTools' ranker")
    args = flags.parse_args()
    finish("rank", args, [measure(args, num_items) for num_items in args.items])


def measure(args: argparse.Namespace, num_items: int) -> Table:
    generator, device = torch.Generator().manual_seed(0), torch.device(args.device)
    users = torch.randn(args.timed, args.width, generator=generator).to(device)
    items = torch.randn(num_items, args.width, generator=generator).to(device)
    targets = torch.randint(1, num_items + 1, (args.timed,), generator=generator).to(device)
    seen = torch.randint(1, num_items + 1, (args.timed, SEEN), generator=generator).to(device)
    batches = [slice(begin, begin + args.batch_size) for begin in range(0, args.timed, args.batch_size)]

    def pairs(part: slice) -> Tensor:
        own = seen[part]
        return torch.stack([torch.arange(len(own), device=device).repeat_interleave(SEEN), own.flatten()])

    def unseen(part: slice) -> Tensor:
        scores, (rows, ids) = users[part] @ items.T, pairs(part)
        own = scores.gather(1, targets[part, None] - 1)
        scores[rows, ids - 1] = float("-inf")
        return scores.scatter_(1, targets[part, None] - 1, own)

    def each(rank: Callable[[slice], Tensor]) -> Callable[[], Tensor]:
        return lambda: torch.cat([rank(part) for part in batches])

    def sorted_rank(part: slice) -> Tensor:
        order = unseen(part).argsort(1, descending=True)
        return (order == targets[part, None] - 1).int().argmax(1).float()

    buffer = torch.empty(args.batch_size, num_items, device=device)

    def ours(part: slice) -> Tensor:
        own = users[part]
        return target_ranks(torch.mm(own, items.T, out=buffer[: len(own)]), targets[part], pairs(part))[0]

    ways = {
        "sort": each(sorted_rank),
        "topk 200": each(lambda part: unseen(part).topk(min(BEST, num_items), 1).indices),
        "ours": each(ours),
    }
    apart = (ways["ours"]() - ways["sort"]()).abs().max()
    assert apart <= 1, f"ranks are up to {apart} apart"  # a sort puts ties in some order, ours in their middle
    seconds, megabytes = in_turns(ways, args)
    if device.type == "cpu" and not args.no_peer:
        seconds["RecTools 0.19, top 200"] = rectools(args, users, items, seen)
    whole = {way: f"{args.users / args.timed * median(turns):,.0f}" for way, turns in seconds.items()}
    cells = {f"s for {args.users:,} users": whole}
    table = Table(f"{num_items:,} items, width {args.width}", "users", args.timed, seconds, megabytes, cells)
    print(f"{table.title}\n\n{table.text()}\n", flush=True)
    return table


def rectools(args: argparse.Namespace, users: Tensor, items: Tensor, seen: Tensor) -> list[float]:
    """Seconds of each turn, by --clock."""
    python = install("rectools", args.environments)
    with tempfile.TemporaryDirectory() as name:
        vectors, out = Path(name) / "vectors.npz", Path(name) / "out.json"
        dials = {"best": BEST, "batch_size": args.batch_size, "turns": args.rounds}
        np.savez(vectors, users=users.numpy(), items=items.numpy(), seen=seen.numpy() - 1, **dials)
        subprocess.run([str(python), str(RUNNERS / "rectools_rank.py"), str(vectors), str(out)], check=True)
        seconds: list[float] = json.loads(out.read_text())[args.clock]
    return seconds


if __name__ == "__main__":
    main()
