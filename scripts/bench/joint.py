"""A training step of the joint model, Item LLM and User LLM: ours beside the official way of doing it.

    python scripts/bench/joint.py --record                                        # a tiny model on a CPU
    python scripts/bench/joint.py --preset tinyllama_1.1b --rounds 10 --record    # a GPU of 80 GB

Both ways train the same random weights on the same made-up batches, in turns within one run, with the same attention
kernels, optimizer and precision; so what differs is the work that ``official.py`` names. Before anything is timed, the
two losses and their gradients are compared in float32. What devices tell one another is not in it: one device does its
share of the official run.

A turn is a step: forward, backward, optimizer. Columns: ``useful items/s``, each item that the loss needs once;
``items`` that were encoded, and ``of a useful one``; ``tokens/s`` through the Item LLM, padding included; ``mfu``,
FLOPs that the mathematics needs over the device's peak (each item once, no padding, no vocabulary, of the last layer
what is read, nothing computed twice); ``hfu``, the same of all FLOPs that were computed; ``peak MB`` on top of weights
and optimizer, and ``GB in all``.
"""

import argparse
import gc
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor
from torch.utils.checkpoint import checkpoint

sys.path.insert(0, str(Path(__file__).resolve().parent))
from measure import CLOCKS, Table, device_peak, finish, forward_flops, parser, peak_memory, synchronize
from official import SIMILARITY_THRESHOLD, OfficialWay, encoded_lengths, packing
from synthetic import SHAPES, Shape, Step, make_step, make_tokens

from hllm.config import (
    EvaluationConfig,
    HeadConfig,
    LLMConfig,
    LLMItemsConfig,
    LLMUserConfig,
    NCELossConfig,
    OptimizerConfig,
    Packing,
    Pooling,
    Similarity,
    TuningConfig,
)
from hllm.head import SimilarityHead
from hllm.items.llm import LLMItems
from hllm.losses import NCELoss
from hllm.module import Recommender
from hllm.users.llm import UserLLM

MODELS: dict[str, dict[str, Any]] = {
    # a head of 7 % of the body, as TinyLlama's: a real vocabulary would be most of so small a model
    "tiny": {"hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 4, "num_attention_heads": 4}
    | {"num_key_value_heads": 2, "vocab_size": 448},
    "smollm2_135m": {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9}
    | {"num_key_value_heads": 3, "vocab_size": 49_152},
    "tinyllama_1.1b": {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22}
    | {"num_attention_heads": 32, "num_key_value_heads": 4, "vocab_size": 32_000},
}
PRECISIONS = ("32-true", "bf16-mixed", "bf16-true")


@dataclass(frozen=True)
class Way:
    """How a step is computed; packing None takes what llm.packing=auto takes."""

    official: bool = False
    packing: Packing | None = None
    grad_cache: bool = False
    checkpointing: bool = False


WAYS = {
    "official": Way(official=True),
    "official, checkpointing": Way(official=True, checkpointing=True),
    "ours": Way(),
    "ours, packed": Way(packing=Packing.packed),
    "ours, padded": Way(packing=Packing.padded),
    "ours, grad_cache": Way(grad_cache=True),
    "ours, checkpointing": Way(checkpointing=True),
}


class Quiet(Recommender):
    """Without a trainer, to which the values would be logged."""

    def log(self, *args: Any, **kwargs: Any) -> None:
        pass


class Bench:
    """One model on one data set: its weights and optimizer serve all ways.

    Raises:
        AssertionError: the two ways' losses differ.
    """

    def __init__(self, model: dict[str, Any], shape: Shape, device: torch.device, precision: str, seed: int) -> None:
        self.shape, self.device, self.precision = shape, device, precision
        self.random = np.random.default_rng(seed)
        torch.manual_seed(seed)
        self.module = build(model, shape, self.random).to(device)
        self.last = self.items._last
        self.official = OfficialWay(self.module, model["vocab_size"]).to(device)
        self.check = self.compare()
        if precision == "bf16-true":
            self.official.bfloat16()
        self.optimizer = torch.optim.AdamW(self.module._parameter_groups(), lr=1e-5, fused=True)

    @property
    def layers(self) -> list[Any]:
        return [layer for tower in (self.items, self.module.users) for layer in tower.model.layers]

    @property
    def items(self) -> LLMItems:
        items = self.module.items
        assert isinstance(items, LLMItems)
        return items

    def compare(self) -> dict[str, float]:
        """Loss and gradient of [ITEM], both ways, in float32 on a small batch."""
        step = make_step(self.shape, self.random, batch_size=2).to(self.device)
        assert isinstance(self.module.loss, NCELoss)
        usual = self.module.loss.config
        self.module.loss.config = replace(usual, similarity_threshold=SIMILARITY_THRESHOLD)
        losses, gradients = [], []
        for official in (True, False):
            torch.manual_seed(0)  # both draw the same negatives
            loss = self.loss(Way(official=official), step)
            loss.backward()  # type: ignore[no-untyped-call]
            losses.append(loss.item())
            assert self.items.item_token.grad is not None
            gradients.append(self.items.item_token.grad.clone())
            self.official.zero_grad()
        assert self.module.last_step is not None
        kept = (self.module.last_step.negatives / self.module.last_step.offered).item()
        self.module.loss.config = usual
        gap = ((gradients[0] - gradients[1]).norm() / gradients[0].norm()).item()
        found = {"official": losses[0], "ours": losses[1], "gradient_gap": gap, "negatives_kept": kept}
        assert abs(losses[0] - losses[1]) <= 1e-4 * max(1, abs(losses[0])), f"the losses differ: {found}"
        assert gap < 1e-3, f"the gradients differ: {found}"
        assert kept > 0.5, f"most negatives are masked, which compares nothing: {found}"
        return found

    def loss(self, way: Way, step: Step) -> Tensor:
        if way.official:
            official: Tensor = self.official(step, self.shape.negatives)
            return official
        return self.module.training_step(step.batch, 0)

    def set_up(self, way: Way) -> None:
        self.items.config = replace(self.items.config, grad_cache=way.grad_cache)
        self.items.llm = replace(self.items.llm, packing=way.packing or Packing.auto)
        self.items._last = None if way.checkpointing else self.last  # as the tower itself has it
        for layer in self.layers:
            layer.gradient_checkpointing = way.checkpointing
            layer._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16-mixed")

    def run(self, way: Way, step: Step, seed: int) -> None:
        """One training step; ours with its default of clipped gradients, which the official code has not."""
        torch.manual_seed(seed)
        self.optimizer.zero_grad()
        with self.autocast():
            loss = self.loss(way, step)
        loss.backward()  # type: ignore[no-untyped-call]
        if not way.official:
            torch.nn.utils.clip_grad_norm_(self.module.parameters(), 1.0, foreach=True)
        self.optimizer.step()

    def measure(self, names: list[str], rounds: int, clock: Callable[[], float]) -> dict[str, dict[str, Any]]:
        """Way -> what was found, the ways in turns; the first round is to warm up, and its memory is measured."""
        with self.autocast():
            usual = packing(self.items, self.device)
        names = [name for name in names if WAYS[name].packing is not usual]  # which is plain ours
        found: dict[str, dict[str, Any]] = {name: {"packing": usual.value, "seconds": []} for name in names}
        counts: dict[str, list[dict[str, float]]] = {name: [] for name in names}
        for number in range(rounds + 1):
            step = make_step(self.shape, self.random).to(self.device)
            for name in names:
                if "failed" in found[name]:
                    continue
                try:
                    self.set_up(WAYS[name])
                    with peak_memory(self.device) as memory:
                        started = clock()
                        self.run(WAYS[name], step, seed=number)
                        synchronize(self.device)
                        elapsed = clock() - started
                except torch.OutOfMemoryError:
                    found[name]["failed"] = "out of memory"
                    self.optimizer.zero_grad()
                    gc.collect()
                    torch.cuda.empty_cache()
                    continue
                if number == 0:
                    found[name] |= memory
                else:
                    found[name]["seconds"].append(elapsed)
                    counts[name].append(self.count(WAYS[name], step, number))
        for name in names:
            if "failed" not in found[name]:
                found[name] |= {key: statistics.mean(count[key] for count in counts[name]) for key in counts[name][0]}
        return found

    def count(self, way: Way, step: Step, seed: int) -> dict[str, float]:
        """Items, tokens and FLOPs of a step that was run with this seed."""
        torch.manual_seed(seed)
        num_items = self.items.num_items
        negatives = torch.randint(1, num_items + 1, (self.shape.negatives,), device=self.device)
        batch, width = step.batch, self.module.users.dim
        needed = torch.cat([batch.items[batch.mask], batch.targets[batch.targets > 0], negatives]).unique()
        distinct, histories = needed.cpu().numpy() - 1, batch.mask.sum(1).tolist()
        num_targets = int((batch.targets > 0).sum())
        useful = 3 * (
            forward_flops(self.items.model, encoded_lengths(self.items, distinct, True, self.device), read_last=True)
            + forward_flops(self.module.users.model, [(1, length) for length in histories])
            + 2 * num_targets * (self.shape.negatives + 1) * width
        )
        self.set_up(way)
        with self.autocast():
            packed = packing(self.items, self.device) is Packing.packed
        if way.official:
            calls = [step.filled.flatten().cpu().numpy() - 1, negatives.cpu().numpy() - 1]
            users = [(len(batch), self.shape.positions)]
        else:
            calls, users = [distinct], [(1, length) for length in histories] if packed else [tuple(batch.mask.shape)]
        encoded = [group for rows in calls for group in encoded_lengths(self.items, rows, packed, self.device)]
        tokens = sum(items * length for items, length in encoded)
        items_forward = forward_flops(self.items.model, encoded, not way.official and self.items._last is not None)
        users_forward = forward_flops(self.module.users.model, users)
        again = way.checkpointing
        flops = items_forward * (3 + (again or way.grad_cache)) + users_forward * (3 + again)
        flops += 6 * num_targets * (self.shape.negatives + 1) * width
        if way.official:
            real = sum(int((self.items.tokens.lengths[rows] + 1).sum()) for rows in calls)
            flops += 2 * (real + step.filled[:, 1:].numel()) * self.official.item_head.weight.numel()
            flops += 2 * num_targets * self.shape.negatives * width  # the mask by similarity
        return {
            "items": sum(len(rows) for rows in calls),
            "useful_items": len(distinct),
            "tokens": tokens,
            "flops": flops,
            "useful_flops": useful,
        }


def build(model: dict[str, Any], shape: Shape, random: np.random.Generator) -> Recommender:
    """The joint model of the official settings, through the project's own classes, with random weights."""
    bodies = [llama(model, max(shape.text.most + 1, shape.positions)) for _ in range(2)]
    llm = LLMConfig(name="random", model="random", pooling=Pooling.item, max_tokens=shape.text.most)
    user = LLMUserConfig(name="llm", tuning=TuningConfig())
    users = UserLLM(bodies[1], user, shape.positions)
    tokens = make_tokens(shape, model["vocab_size"], random)
    head = HeadConfig(similarity=Similarity.cosine, temperature=0.07, learned=True)
    loss = NCELossConfig(name="nce_official", in_batch=False, num_negatives=shape.negatives, distinct=False)
    return Quiet(
        items=LLMItems(bodies[0], tokens, llm, LLMItemsConfig(name="llm"), users.dim),
        users=users,
        user=user,
        head=SimilarityHead(head),
        loss=NCELoss(loss),
        optimizer=OptimizerConfig(),
        evaluation=EvaluationConfig(),
        train_counts=torch.zeros(shape.items + 1),
        data_identity={},
        hyperparameters={},
    ).train()


def llama(model: dict[str, Any], max_positions: int) -> Any:
    """A random Llama; its weights are large enough for item vectors to differ, or all negatives would be masked."""
    config = transformers.LlamaConfig(
        **model, max_position_embeddings=max_positions, initializer_range=model["hidden_size"] ** -0.5, use_cache=False
    )
    return transformers.LlamaModel(config)


def as_table(title: str, found: dict[str, dict[str, Any]], peak: float) -> Table:
    """What ``Bench.measure`` found, with what follows from seconds and counts."""
    done = {name: row for name, row in found.items() if "failed" not in row}
    medians = {name: statistics.median(row["seconds"]) for name, row in done.items()}
    columns: dict[str, Callable[[str, dict[str, Any]], str]] = {
        "items": lambda name, row: f"{row['items']:.0f}",
        "of a useful one": lambda name, row: f"{row['items'] / row['useful_items']:.2f}",
        "tokens/s": lambda name, row: f"{row['tokens'] / medians[name]:,.0f}",
        "mfu": lambda name, row: f"{row['useful_flops'] / medians[name] / peak:.1%}",
        "hfu": lambda name, row: f"{row['flops'] / medians[name] / peak:.1%}",
        "GB in all": lambda name, row: f"{row['peak_bytes'] / 1e9:.2f}",
    }
    return Table(
        title,
        "useful items",
        statistics.mean(row["useful_items"] for row in done.values()),
        {name: row["seconds"] for name, row in done.items()},
        {name: row["step_bytes"] / 1e6 for name, row in done.items()},
        {column: {name: cell(name, row) for name, row in done.items()} for column, cell in columns.items()},
        " ".join(f"{name}: {row['failed']}." for name, row in found.items() if "failed" in row),
    )


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    flags = parser(__doc__, rounds=3)
    flags.add_argument("--preset", default="tiny", choices=MODELS, help="shape of both models (default: %(default)s)")
    flags.add_argument("--data", nargs="+", default=list(SHAPES), choices=SHAPES, help="lengths of (default: all)")
    flags.add_argument("--ways", nargs="+", default=list(WAYS), choices=WAYS, help="(default: all)")
    flags.add_argument("--share", type=float, help="of a device's rows and negatives (default: 1; tiny takes 0.25)")
    flags.add_argument("--layers", type=int, help="of both models (default: the preset's)")
    flags.add_argument("--items", type=int, help="in the catalogue (default: the data set's)")
    flags.add_argument("--precision", choices=PRECISIONS, help="(default: bf16-mixed on a GPU, 32-true elsewhere)")
    flags.add_argument("--seed", type=int, default=0)
    return flags.parse_args(arguments)


def main(arguments: list[str] | None = None) -> list[Table]:
    args = parse_args(arguments)
    device = torch.device(args.device)
    precision = args.precision or ("bf16-mixed" if device.type == "cuda" else "32-true")
    model = MODELS[args.preset] | ({} if args.layers is None else {"num_hidden_layers": args.layers})
    clock = CLOCKS[args.clock]
    peak, source = device_peak(device, torch.float32 if precision == "32-true" else torch.bfloat16, clock)
    tables = []
    for name in args.data:
        shape = SHAPES[name]
        share = (0.25 if args.preset == "tiny" else 1) if args.share is None else args.share
        shape = replace(
            shape,
            batch_size=max(round(share * shape.batch_size), 1),
            negatives=max(round(share * shape.negatives), 1),
            items=args.items or shape.items,
        )
        bench = Bench(model, shape, device, precision, args.seed)
        size = f"{shape.batch_size} histories, {shape.negatives} negatives, {shape.items:,} items"
        table = as_table(f"{name}: {args.preset}, {size}", bench.measure(args.ways, args.rounds, clock), peak)
        check = bench.check
        print(f"{table.title}: loss {check['official']:.5f} official, {check['ours']:.5f} ours (float32, 2 rows)\n")
        print(f"{table.text()}\n", flush=True)
        tables.append(table)
        # each time: a run that is cut off keeps what it has
        finish("joint", args, tables, precision=precision, peak_flops=peak, peak_source=source)
        del bench
        gc.collect()
    return tables


if __name__ == "__main__":
    main()
