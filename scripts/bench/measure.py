"""What the benchmarks share: ways of doing one thing in turns, their memory, and a record of what was found.

A benchmark writes its tables to ``records/NAME-DEVICE.json``, where tables of other titles stay as long as machine and
versions are the same; ``report.py`` writes docs/benchmarks.md from all records.
Machines are shared and noisy: the ways take turns, a ratio is the median over the rounds of that round's ratio.
"""

import argparse
import contextlib
import ctypes
import gc
import json
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import date
from pathlib import Path
from typing import Any

import torch

from hllm.report import text_table
from hllm.tracking import environment, write_json

RECORDS = Path(__file__).resolve().parent / "records"
Ways = Mapping[str, Callable[[], object]]
"Name -> one turn of it; the first is the plain one, which the others are compared with."


@dataclass
class Table:
    """What some ways of doing one thing cost.

    Args:
        work: how many ``unit`` a turn does.
        seconds: of each round, by way; the first way is the plain one.
        megabytes: peak memory that a way's first turn took beyond what was there before, where it was measured.
        cells: further columns, by name and then by way.
        measured: by which command, when, and at which commit.
    """

    title: str
    unit: str
    work: float
    seconds: dict[str, list[float]]
    megabytes: dict[str, float] = field(default_factory=dict)
    cells: dict[str, dict[str, str]] = field(default_factory=dict)
    note: str = ""
    measured: dict[str, str] = field(default_factory=dict)

    def text(self) -> str:
        """Markdown: the median of a turn, ``unit`` a second, the ratio to the plain way and its range."""
        header = ["", "seconds", f"{self.unit}/s", "times as fast", "range"]
        if self.megabytes:
            header.append("peak MB")
        plain = next(iter(self.seconds.values()))
        lines = []
        for way, seconds in self.seconds.items():
            median = statistics.median(seconds)
            ratios = [before / own for before, own in zip(plain, seconds, strict=True)]
            row = [way, f"{median:.3g}", f"{self.work / median:,.0f}", f"{statistics.median(ratios):.2f}"]
            row.append(f"{min(ratios):.2f} to {max(ratios):.2f}")
            if self.megabytes:
                row.append(f"{self.megabytes[way]:,.0f}" if way in self.megabytes else "")
            lines.append([*row, *(column.get(way, "") for column in self.cells.values())])
        return "\n\n".join([text_table([*header, *self.cells], lines), *([self.note] if self.note else [])])


@dataclass
class Curve:
    """What something costs as one size grows.

    Args:
        size: what grows.
        seconds: way -> size -> the median of its turns; a way need not have all sizes.
        measured: as of a table.
    """

    title: str
    size: str
    seconds: dict[str, dict[int, float]]
    measured: dict[str, str] = field(default_factory=dict)

    def exponents(self) -> dict[str, float]:
        """Way -> e of seconds ~ size^e over its last decade or more, by least squares; small sizes cost a constant."""
        found = {}
        for way, points in self.seconds.items():
            largest = max(points)
            last = [size for size in points if 10 * size >= largest]
            x, y = (torch.tensor(values).log() for values in (list(map(float, last)), [points[size] for size in last]))
            x, y = x - x.mean(), y - y.mean()
            found[way] = float((x * y).sum() / (x * x).sum())
        return found

    def text(self) -> str:
        """Markdown: a row a size, and the exponents."""
        sizes = sorted({size for points in self.seconds.values() for size in points})
        lines = [
            [f"{size:,}", *(f"{points[size]:.3g}" if size in points else "" for points in self.seconds.values())]
            for size in sizes
        ]
        lines.append(["exponent", *(f"{exponent:.2f}" for exponent in self.exponents().values())])
        return text_table([self.size, *(f"{way}, s" for way in self.seconds)], lines)


def cpu_seconds() -> float:
    """Of all threads of this process, and of the processes that it ran."""
    found = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in found)


ROUNDS = "turns of each way that are timed, behind one that warms up; 0: that one, of minutes (default: %(default)s)"
CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": cpu_seconds}


def in_turns(ways: Ways, args: argparse.Namespace) -> tuple[dict[str, list[float]], dict[str, float]]:
    """Seconds of each round, and MB of each way's first turn, which only warms up where there are rounds."""
    device, clock = torch.device(args.device), CLOCKS[args.clock]

    def timed(turn: Callable[[], object]) -> float:
        synchronize(device)
        started = clock()
        turn()
        synchronize(device)
        return clock() - started

    first, megabytes = {}, {}
    for way, turn in ways.items():
        with peak_memory(device) as memory:
            first[way] = timed(turn)
        megabytes[way] = memory["step_bytes"] / 1e6
    rounds = [{way: timed(turn) for way, turn in ways.items()} for _ in range(args.rounds)] or [first]
    return {way: [seconds[way] for seconds in rounds] for way in ways}, megabytes


@contextlib.contextmanager
def peak_memory(device: torch.device) -> Iterator[dict[str, int]]:
    """Bytes at most, and how many of them came within the block; of a CPU's process where the kernel tells."""
    found: dict[str, int] = {}
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        yield found
        found["peak_bytes"] = torch.cuda.max_memory_allocated(device)
    else:
        gc.collect()
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).malloc_trim(0)  # what earlier steps freed would hide this one's
            Path("/proc/self/clear_refs").write_text("5")  # sets the peak back
        before = resident("VmRSS")
        yield found
        found["peak_bytes"] = resident("VmHWM")
    found["step_bytes"] = found["peak_bytes"] - before


def resident(name: str) -> int:
    """Bytes of this process, as the kernel calls them: VmRSS now, VmHWM at most."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return 0
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith(name)), 0)


BF16_PEAKS = {"H100 PCIe": 756e12, "H100 NVL": 835e12, "H100": 989e12, "H200": 989e12, "A100": 312e12}
"Dense bfloat16 FLOP/s that the makers state, by a part of the GPU's name; the first that fits."


def device_peak(device: torch.device, dtype: torch.dtype, clock: Callable[[], float]) -> tuple[float, str]:
    """FLOP/s, and where the number is from: the maker's, or a large product timed here."""
    if device.type == "cuda" and dtype is torch.bfloat16:
        name = torch.cuda.get_device_name(device)
        for part, peak in BF16_PEAKS.items():
            if part in name:
                return peak, f"the maker's for {part}, dense bfloat16"
    size = 8192 if device.type == "cuda" else 2048
    a = torch.randn(size, size, device=device, dtype=dtype)
    times = []
    for _ in range(5):
        started = clock()
        a @ a
        synchronize(device)
        times.append(clock() - started)
    source = f"best of 5 products of {size} x {size} in this run, {str(dtype).removeprefix('torch.')}"
    return 2 * size**3 / min(times), source


def of_peak(
    seconds: Mapping[str, Sequence[float]], flops: Mapping[str, tuple[float, torch.dtype]], args: argparse.Namespace
) -> dict[str, str]:
    """Way -> its share of the device's peak: the FLOPs that its mathematics needs, in the dtype it computes in.

    What a way computes beyond that, such as at padding or twice, lowers its share.
    """
    device, clock = torch.device(args.device), CLOCKS[args.clock]
    peaks = {dtype: device_peak(device, dtype, clock)[0] for dtype in {dtype for _, dtype in flops.values()}}
    return {
        way: f"{needed / statistics.median(seconds[way]) / peaks[dtype]:.0%}" for way, (needed, dtype) in flops.items()
    }


def forward_flops(model: Any, groups: Iterable[tuple[int, int]], read_last: bool = False) -> int:
    """Of a transformers decoder over (items, tokens of each): products with weights, and attention's half square.

    Args:
        read_last: one token of each item is read, and the last layer's feed-forward is computed for it alone.
    """
    weights = matrix_weights(model.layers)
    config, unread = model.config, matrix_weights(model.layers[-1].mlp) if read_last else 0
    attention = 2 * config.num_hidden_layers * config.num_attention_heads * config.head_dim
    return sum(
        items * (2 * weights * tokens + attention * tokens**2 - 2 * unread * (tokens - 1)) for items, tokens in groups
    )


def matrix_weights(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters() if parameter.ndim == 2)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return "a CPU"
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "a CPU")


def parser(description: str | None, rounds: int, **options: Any) -> argparse.ArgumentParser:
    """The flags that all benchmarks have."""
    formatter = argparse.RawDescriptionHelpFormatter
    made = argparse.ArgumentParser(description=description, formatter_class=formatter, **options)
    made.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    made.add_argument("--rounds", type=int, default=rounds, help=ROUNDS)
    made.add_argument(
        "--clock",
        default="wall",
        choices=CLOCKS,
        help="cpu: seconds of this process's threads, for a CPU that others use too, with OMP_NUM_THREADS=1",
    )
    made.add_argument("--record", action="store_true", help="write scripts/bench/records/NAME-DEVICE.json")
    return made


def without_folders(argument: str) -> str:
    """A command's argument, but of a folder of this machine only that it is one."""
    return "FOLDER" if argument.startswith("/") else argument


def finish(name: str, args: argparse.Namespace, tables: list[Table], curves: Sequence[Curve] = (), **more: Any) -> None:
    """Write the record where it is asked for; the tables were printed as they came."""
    device = torch.device(args.device)
    if not args.record:
        return
    RECORDS.mkdir(exist_ok=True)
    path, found = RECORDS / f"{name}-{device.type}.json", environment() | {"cpu": cpu_name(), "device": device.type}
    measured = {
        "command": " ".join(["python", f"scripts/bench/{name}.py", *map(without_folders, sys.argv[1:])]),
        "date": date.today().isoformat(),
        "git": found.pop("git"),
    }
    record = {"environment": found, "tables": [], "curves": [], **more}
    before = json.loads(path.read_text()) if path.is_file() else record
    for kind, new in (("tables", tables), ("curves", curves)):
        same = before[kind] if before["environment"] == found else []
        parts = {part["title"]: part for part in same}  # which keep their places
        parts |= {part.title: asdict(replace(part, measured=measured)) for part in new}
        record[kind] = list(parts.values())
    write_json(path, record)


def read_record(path: Path) -> tuple[dict[str, Any], list[Table], list[Curve]]:
    record = json.loads(path.read_text())
    curves = [Curve(**curve) for curve in record["curves"]]
    for curve in curves:
        named = curve.seconds.items()
        curve.seconds = {way: {int(size): value for size, value in points.items()} for way, points in named}
    return record, [Table(**table) for table in record["tables"]], curves
