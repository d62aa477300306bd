"""The data path: raw CSV to first batch at growing sizes, and batches a second beside torch-rechub's.

    python scripts/bench/data.py scale --rows 1e6 1e7 5e7 158488652 --folder /big/disk    # 158 M rows need 15 GB there
    python scripts/bench/data.py batches --record       # pip install -e ".[bench]" brings torch-rechub

scale: a generated file with the shape of Pixel8M (17.8 events a user and 389 an item on average, both heavy-tailed;
rows in order of time, as a log is), read through ``dataset=custom`` as a person's own file would be. Each size runs
in a process of its own: seconds from the command to the first training batch, and again with the prepared form on disk.

batches: the same windows of 50 events, shuffled, through each side's own DataLoader, in turns, on one core.
"""

import argparse
import json
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np
import polars as pl
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))
from measure import Table, finish, in_turns, parser

from hllm.build import build_datamodule
from hllm.config import TrainRows, compose
from hllm.data.base import SequenceDataModule
from hllm.data.schema import Interactions
from hllm.data.sequences import SequenceDataset
from hllm.data.splits import train_rows
from hllm.report import text_table

PIXEL8M = {"rows": 158_488_652, "users": 8_886_078, "items": 407_082}
LENGTH = 50


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = flags.add_subparsers(dest="command", required=True)
    scale = commands.add_parser("scale")
    scale.add_argument("--rows", type=float, nargs="+", default=[1e6, 1e7])
    scale.add_argument(
        "--folder", type=Path, default=Path(tempfile.gettempdir()), help="for files (default: %(default)s)"
    )
    one = commands.add_parser("one", help="one size, in this process; what scale runs")
    one.add_argument("file", type=Path)
    one.add_argument("cache", type=Path)
    batches = commands.add_parser("batches", parents=[parser(None, rounds=5, add_help=False)])
    batches.add_argument("--sequences", type=int, default=100_000)
    batches.add_argument("--batch-size", type=int, default=512)
    args = flags.parse_args()
    if args.command == "scale":
        measure_scale([int(rows) for rows in args.rows], args.folder)
    elif args.command == "one":
        print(json.dumps(first_batch(args.file, args.cache)))
    else:
        measure_batches(args)


def generate(path: Path, rows: int) -> None:
    """A CSV file of item_id,user_id,timestamp; users and items are heavy-tailed: the top item has 1 % of it."""
    random = np.random.default_rng(0)
    users = max(round(rows * PIXEL8M["users"] / PIXEL8M["rows"]), 1)
    items = max(round(PIXEL8M["items"] * min(rows / PIXEL8M["rows"] * 10, 1)), 1)
    with path.open("wb") as file:
        file.write(b"item_id,user_id,timestamp\n")
        for begin in range(0, rows, 1 << 22):
            count = min(1 << 22, rows - begin)
            user = (users * random.random(count) ** 2.5).astype(np.int64) * 7919 % users
            item = (items * random.random(count) ** 3).astype(np.int64)
            second = 1_600_000_000 + begin // 4 + np.sort(random.integers(0, count // 4 + 1, count))
            table = pl.DataFrame({"item": item, "user": user, "time": second})
            table.select(pl.format("v{}", "item"), pl.format("u{}", "user"), "time").write_csv(
                file, include_header=False
            )


def first_batch(file: Path, cache: Path) -> dict[str, float]:
    started = time.perf_counter()
    data = datamodule(file, cache)
    batch = next(iter(data.train_dataloader()))
    return {
        "seconds": time.perf_counter() - started,
        "gigabytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
        "rows": len(data.interactions),
        "users": data.interactions.num_users,
        "items": data.num_items,
        "batch": len(batch),
    }


def datamodule(file: Path, cache: Path) -> SequenceDataModule:
    overrides = ["dataset=custom", f"dataset.interactions={file}", "dataset.max_history=10", f"cache_dir={cache}"]
    return build_datamodule(compose(overrides))


def measure_scale(sizes: list[int], folder: Path) -> None:
    print(hardware(), flush=True)
    header = ["rows", "users", "items", "CSV GB", "first run s", "M rows/s", "peak GB", "second run s", "peak GB"]
    lines = []
    for rows in sizes:
        file, cache = folder / f"hllm-bench-{rows}.csv", folder / f"hllm-bench-{rows}-cache"
        try:
            generate(file, rows)
            command = [sys.executable, __file__, "one", str(file), str(cache)]
            first, second = (
                json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
                for _ in range(2)
            )
            speed = rows / first["seconds"] / 1e6
            lines.append(
                [
                    *(f"{first[name]:,.0f}" for name in ("rows", "users", "items")),
                    *(f"{file.stat().st_size / 1e9:.2f}", f"{first['seconds']:.1f}", f"{speed:.2f}"),
                    *(f"{first['gigabytes']:.2f}", f"{second['seconds']:.1f}", f"{second['gigabytes']:.2f}"),
                ]
            )
            print(text_table(header, lines[-1:]), flush=True)
        finally:
            file.unlink(missing_ok=True)
            shutil.rmtree(cache, ignore_errors=True)
    print(text_table(header, lines))


def measure_batches(args: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    data = histories(args.sequences)
    rows = train_rows(data, data.offsets[1:], LENGTH, TrainRows.windows)
    dataset = SequenceDataset(data, rows)
    sampler = torch.utils.data.BatchSampler(torch.utils.data.RandomSampler(dataset), args.batch_size, drop_last=False)
    order = np.random.default_rng(0).permutation(len(rows))
    places = [order[begin : begin + args.batch_size] for begin in range(0, len(order), args.batch_size)]

    def through(loader: Iterable[object]) -> Callable[[], None]:
        def epoch() -> None:
            for _ in loader:
                pass

        return epoch

    ways = {}
    try:
        ways[f"torch-rechub {version('torch-rechub')}"] = through(rechub(data, args.batch_size))
    except PackageNotFoundError:
        print('torch-rechub is not installed (pip install -e ".[bench]"): ours alone')
    loader = torch.utils.data.DataLoader(dataset, batch_sampler=sampler, collate_fn=lambda batch: batch)
    ways["ours"] = through(loader)
    ways["ours, without DataLoader"] = lambda: deque(map(dataset.__getitems__, places), maxlen=0)
    seconds, megabytes = in_turns(ways, args)
    title = f"{len(rows):,} sequences of {LENGTH}, batches of {args.batch_size}"
    table = Table(title, "sequences", len(rows), seconds, megabytes)
    print(f"{title}\n\n{table.text()}")
    finish("data", args, [table])


def histories(num_users: int) -> Interactions:
    """A user for each sequence, with exactly one full window: the same rows for both sides."""
    random = np.random.default_rng(0)
    total = num_users * (LENGTH + 1)
    return Interactions(
        items=random.integers(1, 3_707, total).astype(np.int32),
        timestamps=np.sort(random.integers(0, 10**9, total)),
        offsets=np.arange(0, total + 1, LENGTH + 1),
        users=pl.Series(range(num_users)).cast(pl.String),
    )


def rechub(data: Interactions, batch_size: int) -> Iterable[object]:
    """Their generator, on the arrays that their preprocessing leaves: one padded row a sequence."""
    from torch_rechub.utils.data import SequenceDataGenerator

    items = data.items.reshape(-1, LENGTH + 1)
    times = data.timestamps.reshape(-1, LENGTH + 1)
    positions = np.broadcast_to(np.arange(LENGTH), items[:, :-1].shape).copy()
    generator = SequenceDataGenerator(items[:, :-1].copy(), positions, items[:, -1], np.diff(times))
    (loader,) = generator.generate_dataloader(batch_size=batch_size, shuffle=True)
    return loader  # type: ignore[no-any-return]


def hardware() -> str:
    info = Path("/proc/cpuinfo")
    names = [line.split(":")[1].strip() for line in info.read_text().splitlines() if "model name" in line]
    return f"{names[0]}, {len(names)} cores; polars {pl.__version__}, numpy {np.__version__}, torch {torch.__version__}"


if __name__ == "__main__":
    main()
