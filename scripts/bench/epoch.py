"""Training epochs: ours beside RecTools' SASRec and HSTU, and torch-rechub's HLLM, of the same width, depth and length.

    OMP_NUM_THREADS=2 python scripts/bench/epoch.py --record        # installs the peers, as scripts/bench/peers.py does

Each turn is a process of its own in the environment of its library: some epochs of training without validation, the
first of which warms up. Rows of a table are compared by seconds per distinct transition, because an epoch is not the
same everywhere: RecTools trains the newest L + 1 events of a user, ours all, but for the way named "the same
transitions"; torch-rechub has a row of every prefix of a history, and trains all positions of each, which repeats a
transition up to L times. ``positions/s`` counts repeats too. RecTools' loss is its sampled softmax, 128 negatives for
each position; torch-rechub's, which it calls NCE, is the full softmax, between frozen vectors and a user model as
wide with ReLU; ours by default has GELU, and a trained adaptor between. Of torch-rechub's epoch, and of no other, only
--steps steps are timed.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback

sys.path.insert(0, str(Path(__file__).resolve().parent))
from measure import Table, finish, parser
from peers import ROOT, RUNNERS, export, install

from hllm.build import build_datamodule, build_module, item_callbacks, pin_dtype
from hllm.config import compose
from hllm.data.base import SequenceDataModule

SHARED = ["loss=nce_official", "loss.num_negatives=128"]
EACH = [*SHARED, "loss.distinct=false", "loss.per_position=true"]
BF16 = ["trainer.precision=bf16-mixed", "loss.products=bfloat16"]


@dataclass(frozen=True)
class Match:
    """A peer's ways and ours.

    Args:
        peers: label -> (library, runner, model); the first is what all are compared with.
        ours: label -> overrides.
        dials: what all share beside the data's history length.
    """

    peers: dict[str, tuple[str, str, str]]
    ours: dict[str, list[str]]
    dials: dict[str, Any]


def rectools(model: str, user: list[str]) -> Match:
    ours = {
        "ours, 128 negatives a position": [*user, *EACH],
        "ours, 128 negatives a position, the same transitions": [*user, *EACH, "dataset.train_rows=latest"],
        "ours, 128 negatives a step": [*user, *SHARED],
        "ours, exact softmax": [*user, "loss=ce"],
        "ours, exact softmax, bf16": [*user, "loss=ce", *BF16],
    }
    ours = {label: ["items=id", *overrides] for label, overrides in ours.items()}
    dials = {"dim": 50, "num_layers": 2, "num_heads": 1, "batch_size": 128, "loss": "sampled_softmax"}
    return Match({f"RecTools 0.19 {model}": ("rectools", "rectools_epochs", model.lower())}, ours, dials)


RECHUB = {
    "torch-rechub 0.9 HLLM": ("rechub", "rechub_epochs", "hllm"),
    "torch-rechub 0.9 HLLM, each transition once": ("rechub", "rechub_epochs", "hllm_windows"),
}
SAME = ["loss=ce", "items.adaptor=none", "user.activation=relu"]
LIGHT = {
    "ours, their model": SAME,
    "ours, their model, bf16": [*SAME, *BF16],
    "ours, adaptor trained": ["loss=ce"],
    "ours, adaptor trained, bf16": ["loss=ce", *BF16],
}
MATCHES = {
    "SASRec": rectools("SASRec", ["user=sasrec"]),
    "HSTU": rectools("HSTU", ["user=hstu"]),
    "light HLLM": Match(RECHUB, LIGHT, {"dim": 384, "num_layers": 2, "num_heads": 4, "batch_size": 64}),
}


def main() -> None:
    flags = parser(__doc__, rounds=3)
    flags.add_argument("--data", nargs="+", default=["movielens_100k", "movielens_1m"])
    flags.add_argument("--matches", nargs="+", choices=MATCHES, default=list(MATCHES))
    flags.add_argument("--epochs", type=int, default=2, help="of a turn; the first is timed only if it is alone")
    flags.add_argument("--steps", type=int, default=8, help="of torch-rechub's epoch (default: %(default)s)")
    flags.add_argument("--environments", type=Path, default=Path("~/.cache/hllm/peers").expanduser())
    flags.add_argument("--dataset-root", help="folder of movielens_1m's files, where they are here already")
    flags.add_argument("--ours", nargs="+", help=argparse.SUPPRESS)  # OUT OVERRIDES: a turn of ours
    args = flags.parse_args()
    if args.ours:
        Path(args.ours[0]).write_text(json.dumps(our_epochs(args.ours[1:])))
        return
    tables = []
    with tempfile.TemporaryDirectory() as folder:
        for data in args.data:
            for name in args.matches:
                tables.append(measure(args, data, name, Path(folder) / f"{data}-{name.replace(' ', '-')}"))
    finish("epoch", args, tables)


def measure(args: argparse.Namespace, data: str, name: str, folder: Path) -> Table:
    match = MATCHES[name]
    overrides = [f"dataset={data}", "llm=minilm"]
    if data == "movielens_1m" and args.dataset_root:
        overrides.append(f"dataset.root={args.dataset_root}")
    config = compose(overrides)
    datamodule = build_datamodule(config)
    assert isinstance(datamodule, SequenceDataModule)
    more = {"num_negatives": 128, "epochs": args.epochs, "steps": args.steps, "dropout": 0.2, "lr": 1e-3}
    dials = {**match.dials, **more, "max_history": config.dataset.max_history}
    export(config, datamodule, folder, dials)
    overrides += [f"user.{dial}={dials[dial]}" for dial in ("dim", "num_layers", "num_heads", "dropout")]
    overrides += [f"dataset.batch_size={dials['batch_size']}", f"trainer.max_epochs={args.epochs}"]
    out, commands = folder / "out.json", {}
    for label, (library, runner, model) in match.peers.items():
        python = install(library, args.environments)
        commands[label] = [str(python), str(RUNNERS / f"{runner}.py"), model, str(folder), str(out)]
    for label, own in match.ours.items():
        groups = [flag for flag in own if "=" in flag and "." not in flag.split("=")[0]]  # before their own dials
        dials_of = [flag for flag in own if flag not in groups]
        commands[label] = [sys.executable, __file__, "--ours", str(out), *groups, *overrides, *dials_of]
    seconds: dict[str, list[float]] = {label: [] for label in commands}
    found: dict[str, list[dict[str, Any]]] = {label: [] for label in commands}
    megabytes: dict[str, float] = {}
    for _ in range(args.rounds):
        for label, command in commands.items():
            peak = run(command, folder / "log.txt")
            turn = json.loads(out.read_text())
            turn["epoch"] = median(turn[args.clock][-max(args.epochs - 1, 1) :])
            seconds[label].append(turn["epoch"] / turn["transitions"] * 1e6)
            found[label].append(turn)
            megabytes[label] = max(peak, megabytes.get(label, 0.0))
            print(f"{data} {label}: {turn['epoch']:.1f} s an epoch, {peak:,.0f} MB", flush=True)
    cells = {
        "seconds an epoch": {label: f"{median(turn['epoch'] for turn in turns):.3g}" for label, turns in found.items()},
        "transitions of an epoch": {label: f"{turns[0]['transitions']:,}" for label, turns in found.items()},
        "positions/s": {
            label: f"{turns[0]['positions'] / median(turn['epoch'] for turn in turns):,.0f}"
            for label, turns in found.items()
        },
    }
    shape = ", ".join(
        f"{dial} {dials[dial]}" for dial in ("dim", "num_layers", "num_heads", "max_history", "batch_size")
    )
    note = "Seconds are for a million transitions; peak MB is the process's, its imports included."
    table = Table(f"{name} on {data}: {shape}", "transitions", 1e6, seconds, megabytes, cells, note)
    print(f"\n{table.title}\n\n{table.text()}\n", flush=True)
    return table


def run(command: list[str], log: Path) -> float:
    """Peak memory of a command in MB; what it prints goes to ``log``, and on where it fails."""
    with log.open("w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, cwd=ROOT)
        _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode != 0:
        print(log.read_text(), file=sys.stderr)
        raise subprocess.CalledProcessError(process.returncode, command)
    return usage.ru_maxrss / 1024


class Clock(Callback):
    """Seconds of each training epoch, wall and of all threads; and the supervised positions of the first."""

    def __init__(self) -> None:
        self.wall: list[float] = []
        self.cpu: list[float] = []
        self.positions = 0

    def on_train_epoch_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self.started = time.perf_counter(), time.process_time()

    def on_train_batch_start(self, trainer: L.Trainer, module: L.LightningModule, batch: Any, index: int) -> None:
        if trainer.current_epoch == 0:
            self.positions += int((batch.targets > 0).sum())

    def on_train_epoch_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self.wall.append(time.perf_counter() - self.started[0])
        self.cpu.append(time.process_time() - self.started[1])


def our_epochs(overrides: list[str]) -> dict[str, Any]:
    """What ``peers/split.py`` has as Epochs, of hllm.train's model, data and steps."""
    config = pin_dtype(compose(overrides))
    L.seed_everything(0, workers=True, verbose=False)
    datamodule = build_datamodule(config)
    module, clock = build_module(config, datamodule), Clock()
    trainer = L.Trainer(
        max_epochs=config.trainer.max_epochs,
        callbacks=[*item_callbacks(config), clock],
        accelerator="cpu",
        precision=config.trainer.precision,  # type: ignore[arg-type]
        gradient_clip_val=config.trainer.gradient_clip_val,
        limit_val_batches=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, datamodule)
    return {"wall": clock.wall, "cpu": clock.cpu, "transitions": clock.positions, "positions": clock.positions}


if __name__ == "__main__":
    main()
