"""Peers beside ours on one split: RecTools, RePlay and torch-rechub, each in an environment of its own.

    python scripts/bench/peers.py                       # MovieLens-100k: installs the peers, runs all, writes the table
    python scripts/bench/peers.py --peers rectools_sasrec replay_sasrec --epochs 1 --no-docs       # a try
    python scripts/bench/peers.py --data movielens_1m --seeds 0 1 2

One stable leave-one-out split is exported as arrays: the events up to each test target, the times of the targets but
not their items, and the catalogue's text vectors. Each peer trains on it with the same width, depth, history length,
rate, dropout and batch, one thread, and the rest as its library has it; it chooses its epoch by its library's own means
and hands back the 200 best unseen items of every test user. All are ranked here, by hllm.metrics. Ours is hllm.train.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl
import torch

from hllm.build import build_datamodule
from hllm.config import Config, compose
from hllm.data.base import SequenceDataModule
from hllm.errors import DivergedError
from hllm.items.cache import embed_catalog
from hllm.metrics import rank_metrics, target_ranks
from hllm.report import text_table
from hllm.significance import holm, paired
from hllm.tracking import environment, write_json

ROOT = Path(__file__).resolve().parents[2]
RUNNERS = Path(__file__).resolve().parent / "peers"
RECORD = ROOT / "scripts" / "reproduce" / "records" / "peers.json"
sys.path.insert(0, str(ROOT / "scripts" / "reproduce"))
TOP = 200
KS = (10, 50, 200)
METRICS = [f"{name}@{k}" for k in KS for name in ("hr", "ndcg")]


@dataclass(frozen=True)
class Peer:
    """A model of another library.

    Args:
        library: name of its requirements file and environment.
        runner: its file in scripts/bench/peers.
        model: as the runner knows it.
        items: what an item is to it.
        epoch: what an epoch trains.
        target_time: whether it is told when the target happens.
    """

    library: str
    runner: str
    model: str
    label: str
    items: str
    epoch: str
    target_time: bool = False


NEWEST = "the newest L + 1 events a user"
PEERS = {
    "rectools_sasrec": Peer("rectools", "rectools_models", "sasrec", "RecTools 0.19 SASRec", "ids", NEWEST),
    "rectools_hstu": Peer("rectools", "rectools_models", "hstu", "RecTools 0.19 HSTU, positions only", "ids", NEWEST),
    "rectools_hstu_time": Peer("rectools", "rectools_models", "hstu_time", "RecTools 0.19 HSTU", "ids", NEWEST, True),
    "rectools_unisrec": Peer("rectools", "rectools_models", "unisrec", "RecTools 0.19 UniSRec", "text", NEWEST),
    "replay_sasrec": Peer("replay", "replay_models", "sasrec", "RePlay 0.22 SasRec", "ids", NEWEST),
    "rechub_hllm": Peer("rechub", "rechub_models", "hllm", "torch-rechub 0.9 HLLM", "text", "every transition once"),
    "rechub_hllm_pca": Peer(
        "rechub", "rechub_models", "hllm_pca", "torch-rechub 0.9 HLLM, PCA to dim", "text", "every transition once"
    ),
}
HSTU = (",user=hstu", ",user=hstu,user.target_time=true")
OURS = {
    data: (ids, *(ids + flags for flags in HSTU), text)
    for data, ids, text in (
        ("movielens_100k", "ml100k_sasrec_ce", "ml100k_hllm_minilm_ce"),
        ("movielens_1m", "ml1m_sasrec", "ml1m_light"),
        ("amazon_beauty", "beauty_sasrec", "beauty_light"),
    )
}
"Rows of ours with the same loss, on ids and on the same text vectors: an experiment, with what is changed of it."


def export(config: Config, datamodule: SequenceDataModule, folder: Path, settings: dict[str, Any]) -> None:
    """events.npz, test.npz, vectors.npy and settings.json; ``peers/split.py`` says what is in them."""
    folder.mkdir(parents=True, exist_ok=True)
    data, splits = datamodule.events, datamodule.splits
    users = np.repeat(np.arange(data.num_users), np.diff(data.offsets))
    places = np.arange(len(data))
    # ends of rows are their targets
    validated = np.zeros(len(data), dtype=bool)
    validated[splits.validation.ends] = True
    trained = places < splits.train_ends[users]
    known = trained | validated
    events = {"user": users, "item": data.items, "time": data.timestamps, "part": validated.astype(np.int64)}
    np.savez(folder / "events.npz", **{name: values[known].astype(np.int64) for name, values in events.items()})
    np.savez(folder / "test.npz", user=splits.test.users, time=data.timestamps[splits.test.ends])
    table = embed_catalog(datamodule.catalog, config.dataset.text, config.llm, Path(config.cache_dir).expanduser())
    vectors = table.vectors.float().numpy()
    np.save(folder / "vectors.npy", np.concatenate([np.zeros_like(vectors[:1]), vectors]))
    write_json(folder / "settings.json", {**settings, "num_items": len(datamodule.catalog), "top": TOP})


def install(library: str, folder: Path) -> Path:
    """The Python of a peer's environment, made where it is not there yet.

    Raises:
        subprocess.CalledProcessError: it cannot be installed.
    """
    wanted, python = RUNNERS / f"{library}.txt", folder / library / "bin" / "python"
    done = folder / library / "installed.txt"
    if not done.is_file() or done.read_text() != wanted.read_text():
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder / library)], check=True)
        subprocess.run([str(python), "-m", "pip", "install", "--quiet", "-r", str(wanted)], check=True)
        done.write_text(wanted.read_text())
    return python


def run(command: list[str], log: Path) -> tuple[int, float]:
    """Exit status and peak memory in MB of a command on one thread; what it prints goes to ``log``."""
    threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "ARROW_NUM_THREADS"), "1")
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=os.environ | threads, cwd=ROOT)
        _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    return process.returncode, usage.ru_maxrss / 1024


def failure(status: int, log: Path) -> str:
    """Status and last line of a command that failed, without this machine's paths."""
    last = "".join(log.read_text().strip().splitlines()[-1:])
    return f"exits {status}: " + re.sub(r"\(?/[\w./-]+\)?", "...", last)


def peer_ranks(out: Path, datamodule: SequenceDataModule) -> npt.NDArray[np.float64]:
    """(U,) mid-ranks of the test targets among all unseen items; those outside a peer's best share the last places."""
    top = np.load(out / "top.npz")
    ranks, begin = [], 0
    for batch in datamodule.test_dataloader():
        rows = slice(begin, begin := begin + len(batch))
        items, values = torch.from_numpy(top["items"][rows]), torch.from_numpy(top["scores"][rows]).float()
        # lower than any score, and not -inf, which the ranking gives to seen items
        scores = torch.full((len(batch), datamodule.num_items + 1), torch.finfo(torch.float32).min)
        scores.scatter_(1, items, values)
        targets = batch.targets.max(dim=1).values
        ranks.append(target_ranks(scores[:, 1:], targets, batch.seen)[0].numpy())
    found = np.concatenate(ranks).astype(np.float64)
    if len(found) != len(top["items"]):
        raise DivergedError(f"{out}: {len(top['items'])} ranked users for {len(found)} test users")
    return found


def metrics_of(ranks: npt.NDArray[np.float64]) -> dict[str, float]:
    """Means over users; without MRR, which ranks beyond a peer's best would blur."""
    return dict(zip(METRICS, rank_metrics(torch.from_numpy(ranks), KS).mean(0).tolist(), strict=False))


def run_peer(
    name: str, args: argparse.Namespace, split: Path, seed: int, datamodule: SequenceDataModule
) -> dict[str, Any]:
    peer, out = PEERS[name], args.folder / name / str(seed)
    row = {
        "name": name,
        "model": peer.model,
        "label": peer.label,
        "items": peer.items,
        "epoch": peer.epoch,
        "target_time": peer.target_time,
    }
    try:
        python = install(peer.library, args.environments)
    except subprocess.CalledProcessError as error:
        return {**row, "seed": seed, "failed": f"cannot be installed here: {error.cmd[-1]} exits {error.returncode}"}
    command = [str(python), str(RUNNERS / f"{peer.runner}.py"), peer.model, str(split), str(out), "--seed", str(seed)]
    status, peak = run(command, out / "log.txt")
    if status != 0:
        return {**row, "seed": seed, "failed": failure(status, out / "log.txt")}
    ranks = peer_ranks(out, datamodule)
    users = datamodule.user_ids(datamodule.splits.test.users)
    pl.DataFrame({"user": users, "rank": ranks}).write_parquet(out / "ranks.parquet")
    return {
        **row,
        "seed": seed,
        "peak_mb": peak,
        "metrics": metrics_of(ranks),
        **json.loads((out / "run.json").read_text()),
    }


def run_ours(row_of_ours: str, args: argparse.Namespace, seed: int, overrides: list[str]) -> dict[str, Any]:
    """A row of ``OURS``: EXPERIMENT, or EXPERIMENT,KEY=VALUE,..."""
    experiment, *changes = row_of_ours.split(",")
    name = re.sub(r"\W+", "_", row_of_ours)  # a folder
    out = args.folder / name / str(seed)
    overrides = [f"experiment={experiment}", *changes, *overrides]
    config = compose(overrides)
    row = {
        "name": name,
        "model": config.user.name,
        "label": f"ours, `{' '.join([experiment, *changes])}`",
        "items": "ids" if config.items.name == "id" else "text",
        "epoch": "every transition once",
        "target_time": config.user.target_time,
        "seed": seed,
    }
    command = [
        sys.executable,
        "-m",
        "hllm.train",
        f"seed={seed}",
        f"hydra.run.dir={out}",
        *overrides,
    ]
    status, peak = run(command, out / "log.txt")
    if status != 0:
        return {**row, "failed": failure(status, out / "log.txt")}
    record = json.loads((out / "metrics.json").read_text())
    test = {metric: record["results"]["test"]["all"][metric] for metric in METRICS}
    about = {"epochs": record["epochs"], "seconds": record["seconds"], "selection": "NDCG@10 of held-out events"}
    return {**row, "peak_mb": peak, "metrics": test, **about}


def compare(rows: list[dict[str, Any]], folder: Path) -> list[dict[str, Any]]:
    """Each peer minus ours: NDCG@10 user by user, mean over seeds.

    Against the row that sees as much of an item and is as much told of the target's time: that of the same user model,
    else the first.
    """
    ndcg: dict[str, list[npt.NDArray[np.float64]]] = {}
    about = {row["name"]: row for row in rows}
    for row in rows:
        if "failed" not in row:
            ranks = pl.read_parquet(folder / row["name"] / str(row["seed"]) / "ranks.parquet").sort("user")["rank"]
            values = rank_metrics(torch.from_numpy(ranks.to_numpy(writable=True)), [10])[:, 1].numpy()
            ndcg.setdefault(row["name"], []).append(values)
    found = []
    for name in ndcg:
        if name not in PEERS:
            continue
        peer = about[name]
        alike = [
            ours
            for ours in ndcg
            if ours not in PEERS and all(about[ours][key] == peer[key] for key in ("items", "target_time"))
        ]
        if alike:
            against = next((ours for ours in alike if peer["model"].startswith(about[ours]["model"])), alike[0])
            gap = paired(np.mean(ndcg[name], axis=0), np.mean(ndcg[against], axis=0))
            found.append({"name": name, "against": against, **asdict(gap)})
    return found


def spread(values: list[float], digits: int = 4) -> str:
    return f"{mean(values):.{digits}f}" + (f" ± {stdev(values):.{digits}f}" if len(values) > 1 else "")


def section(record: dict[str, Any]) -> str:
    """The page's part of a record: quality, then cost; a peer that did not run says why."""
    rows: dict[str, list[dict[str, Any]]] = {}
    for row in record["rows"]:
        rows.setdefault(row["name"], []).append(row)
    quality, cost, failures = [], [], []
    for runs in rows.values():
        first, done = runs[0], [run for run in runs if "failed" not in run]
        failures += [f"- {run['label']}, seed {run['seed']}: {run['failed']}." for run in runs if "failed" in run]
        told = "known" if first["target_time"] else "hidden"
        about = [first["label"], first["items"], told]
        if not done:
            quality.append([*about, "did not run", *[""] * len(METRICS)])
            continue
        values = [spread([run["metrics"][metric] for run in done]) for metric in METRICS]
        quality.append([*about, str(len(done)), *values])
        cost.append(
            [
                first["label"],
                spread([run["seconds"]["fit"] / run["epochs"] for run in done], 2),
                spread([float(run["epochs"]) for run in done], 0),
                spread([run["seconds"]["total"] for run in done], 0),
                spread([run["peak_mb"] for run in done], 0),
                first["epoch"],
                done[0]["selection"],
            ]
        )
    identity, dials = record["identity"], record["settings"]
    shared = ", ".join(f"{name} {value}" for name, value in dials.items() if name not in ("num_items", "top"))
    parts = [
        "## Side by side",
        f"{identity['dataset']}, protocol `{identity['protocol']}`, {identity['users']} test users, "
        f"{identity['items']} items, data `{identity['interactions']}`: one exported split, every library in an "
        "environment of its own, all ranked by our evaluator over the whole catalogue with the history masked. Shared "
        f"by all: {shared}; the loss is full softmax; the rest is each library's default. torch-rechub's model is as "
        "wide as the text vectors, or as many of their principal components as dim. Mean ± sd over seeds; "
        f"{record['date']}, commit `{record['environment']['git']}`; `scripts/bench/peers.py`.",
        text_table(["", "items", "target time", "seeds", *METRICS], quality),
        "Cost on one thread of a CPU, validation within the epochs counted; memory is the process's peak, its imports "
        "included. An epoch is not the same everywhere, hence the column.",
        text_table(
            ["", "seconds an epoch", "epochs", "seconds in all", "peak MB", "an epoch trains", "epoch chosen by"], cost
        ),
    ]
    if gaps := record["differences"]:
        lines = [
            [
                rows[gap["name"]][0]["label"],
                rows[gap["against"]][0]["label"].removeprefix("ours, "),
                "known" if rows[gap["name"]][0]["target_time"] else "hidden",
                f"{gap['difference']:+.4f}",
                f"{gap['low']:+.4f} to {gap['high']:+.4f}",
                f"{p:.4f}",
            ]
            for gap, p in zip(gaps, holm([gap["p"] for gap in gaps]), strict=True)
        ]
        header = ["", "minus ours", "target time", "ndcg@10", "95 % over users", "p (Holm)"]
        parts += [
            "User by user, mean over seeds, against ours on the same input, target time included:",
            text_table(header, lines),
        ]
    return "\n\n".join([*parts, *(["\n".join(failures)] if failures else [])])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="movielens_100k")
    parser.add_argument("--peers", nargs="*", choices=PEERS, default=list(PEERS))
    parser.add_argument("--ours", nargs="*", help="EXPERIMENT or EXPERIMENT,KEY=VALUE,...; default: by data set")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--llm", default="minilm")
    parser.add_argument("--epochs", type=int, default=200, help="at most")
    parser.add_argument("--patience", type=int, default=10)
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--history", type=int, help="L; default: the data set's")
    parser.add_argument("--folder", type=Path, default=ROOT / "runs" / "peers")
    parser.add_argument("--environments", type=Path, default=Path("~/.cache/hllm/peers").expanduser())
    parser.add_argument("--no-docs", action="store_true", help="print the section and leave record and page alone")
    args = parser.parse_args()
    config = compose([f"dataset={args.data}", f"llm={args.llm}"])
    datamodule = build_datamodule(config)
    assert isinstance(datamodule, SequenceDataModule)
    settings = {
        "dim": args.dim,
        "num_layers": 2,
        "num_heads": 2,
        "max_history": args.history or config.dataset.max_history,
        "dropout": 0.2,
        "batch_size": 128,
        "lr": 1e-3,
        "epochs": args.epochs,
        "patience": args.patience,
    }
    overrides = [
        f"llm={args.llm}",  # the vectors that are exported
        f"user.dim={settings['dim']}",
        f"user.num_layers={settings['num_layers']}",
        f"user.num_heads={settings['num_heads']}",
        f"user.dropout={settings['dropout']}",
        f"dataset.max_history={settings['max_history']}",
        f"dataset.batch_size={settings['batch_size']}",
        f"optimizer.lr={settings['lr']}",
        "optimizer.schedule=constant",  # as theirs: all stop when validation does
        f"trainer.max_epochs={settings['epochs']}",
        f"callbacks.patience={settings['patience']}",
        "trainer.accelerator=cpu",
        "trainer.enable_progress_bar=false",
        "logger=csv",
    ]
    split = args.folder / "split"
    export(config, datamodule, split, settings)
    rows = []
    for seed in args.seeds:
        for name in args.peers:
            started = time.perf_counter()
            rows.append(run_peer(name, args, split, seed, datamodule))
            print(f"{name} seed {seed}: {time.perf_counter() - started:.0f} s {rows[-1].get('failed', '')}", flush=True)
        for name in args.ours if args.ours is not None else OURS.get(args.data, ()):
            rows.append(run_ours(name, args, seed, overrides))
            print(f"{name} seed {seed}: {rows[-1].get('failed', 'done')}", flush=True)
    identity = {
        "dataset": config.dataset.name,
        "protocol": config.dataset.protocol_name,
        "interactions": datamodule.fingerprint,
        "users": len(datamodule.splits.test),
        "items": datamodule.num_items,
    }
    record = {
        "identity": identity,
        "settings": settings,
        "environment": environment(),
        "date": str(date.today()),
        "rows": rows,
        "differences": compare(rows, args.folder),
    }
    if args.no_docs:
        print(section(record))
        return
    from pages import write_between

    write_json(RECORD, record)
    write_between(ROOT / "docs" / "results.md", "peers", section(record))


if __name__ == "__main__":
    main()
