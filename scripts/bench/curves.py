"""Cost curves: what the catalogue, the histories and the users cost as they grow, with exponents and a plot.

    python scripts/bench/curves.py --record
    python scripts/bench/curves.py --largest 10000        # a try

Catalogue: a step of the losses on 256 positions (forward and backward, trained items, width 64), and ranking 128 users.
Histories: a training step of both user models on 12,800 events, in however many rows that are. Users: the training rows
of histories of 50 events cut, shuffled and gathered, batch by batch, which is an epoch of the loader.
"""

import argparse
import sys
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent))
from data import LENGTH, histories
from measure import Curve, finish, in_turns, parser

from hllm.config import HeadConfig, HSTUConfig, NCELossConfig, Similarity, TrainRows, TransformerConfig
from hllm.data.sequences import SequenceDataset
from hllm.data.splits import train_rows
from hllm.head import SimilarityHead
from hllm.losses import NCELoss, default_chunk_size, softmax_loss
from hllm.metrics import target_ranks
from hllm.users.hstu import HSTU
from hllm.users.transformer import UserTransformer

WIDTH, POSITIONS, RANKED, EVENTS, BATCH = 64, 256, 128, 12_800, 512
CATALOGUES = (1_000, 3_000, 10_000, 30_000, 100_000, 300_000, 1_000_000)
LENGTHS = (10, 30, 100, 300, 1_000)
USERS = (1_000, 10_000, 100_000, 1_000_000)

Turn = Callable[[], object]


def main() -> None:
    flags = parser(__doc__, rounds=3)
    flags.add_argument("--largest", type=int, default=1_000_000, help="catalogue and number of users")
    args = flags.parse_args()
    curves = [
        measure(args, "Catalogue", "items", CATALOGUES, catalogue),
        measure(args, f"Histories, {EVENTS:,} events in all", "events a row", LENGTHS, rows_of_events),
        measure(args, f"Users with {LENGTH} training events each", "users", USERS, users),
    ]
    finish("curves", args, [], curves)


def measure(
    args: argparse.Namespace,
    title: str,
    size: str,
    sizes: Iterable[int],
    ways_of: Callable[[int, torch.device], dict[str, Turn]],
) -> Curve:
    curve = Curve(title, size, {})
    for value in sizes:
        if value <= args.largest:
            seconds, _ = in_turns(ways_of(value, torch.device(args.device)), args)
            for way, turns in seconds.items():
                curve.seconds.setdefault(way, {})[value] = median(turns)
    print(f"{title}\n\n{curve.text()}\n", flush=True)
    return curve


def catalogue(num_items: int, device: torch.device) -> dict[str, Turn]:
    users, items = (torch.randn(n, WIDTH, device=device, requires_grad=True) for n in (POSITIONS, num_items))
    targets = torch.randint(1, num_items + 1, (POSITIONS,), device=device)
    head = SimilarityHead(HeadConfig(similarity=Similarity.cosine)).to(device)
    sampled = NCELoss(NCELossConfig("nce", num_negatives=512))

    def step(loss: Tensor) -> None:
        users.grad = items.grad = None
        loss.backward()  # type: ignore[no-untyped-call]

    def exact(products: torch.dtype) -> Turn:
        chunk = default_chunk_size(num_items, device, products)
        return lambda: step(softmax_loss(users, items, targets - 1, head, chunk, products))

    def some() -> None:
        candidates = sampled.candidates(targets, num_items)
        vectors = items[candidates.ids - 1].detach().requires_grad_()  # a tower's own gradient is not the loss's cost
        step(sampled(users, vectors, candidates, targets, head)[0])

    buffer = torch.empty(RANKED, num_items, device=device)
    own = torch.arange(RANKED, device=device)

    def rank() -> None:
        with torch.inference_mode():
            scores = torch.mm(users[:RANKED], items.T, out=buffer)
            target_ranks(scores, targets[:RANKED], torch.stack([own, targets[:RANKED].flip(0)]))

    return {
        "exact softmax": exact(torch.float32),
        "exact softmax, bfloat16 products": exact(torch.bfloat16),
        "softmax over 512 and the batch": some,
        f"ranking {RANKED} users": rank,
    }


def rows_of_events(length: int, device: torch.device) -> dict[str, Turn]:
    rows = EVENTS // length
    x = torch.randn(rows, length, WIDTH, device=device)
    mask = torch.ones(rows, length, dtype=torch.bool, device=device)
    times = torch.randint(10**8, (rows, length), device=device).cumsum(1)
    models = {
        "transformer": UserTransformer(TransformerConfig(name="transformer", dim=WIDTH), length),
        "HSTU": HSTU(HSTUConfig(name="hstu", dim=WIDTH), length),
    }

    def step(model: torch.nn.Module) -> None:
        model.zero_grad(set_to_none=True)
        model(x, mask, times).square().mean().backward()

    return {name: partial(step, model.to(device)) for name, model in models.items()}


def users(num_users: int, device: torch.device) -> dict[str, Turn]:
    events = histories(num_users)

    def epoch() -> None:
        dataset = SequenceDataset(events, train_rows(events, events.offsets[1:], LENGTH, TrainRows.windows))
        for places in torch.randperm(len(dataset)).split(BATCH):
            dataset.__getitems__(places.numpy())

    return {"an epoch of the loader": epoch}


if __name__ == "__main__":
    main()
