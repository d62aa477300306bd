"""What the benchmarks share: ways of doing one thing in turns, their memory, and a record of what was found.

A benchmark writes its tables to ``records/NAME.json``; ``report.py`` writes docs/benchmarks.md from all records.
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
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
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
    """

    title: str
    unit: str
    work: float
    seconds: dict[str, list[float]]
    megabytes: dict[str, float] = field(default_factory=dict)
    cells: dict[str, dict[str, str]] = field(default_factory=dict)
    note: str = ""

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
    """

    title: str
    size: str
    seconds: dict[str, dict[int, float]]

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


CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": cpu_seconds}


def in_turns(ways: Ways, args: argparse.Namespace) -> tuple[dict[str, list[float]], dict[str, float]]:
    """Seconds of each round, and MB of each way's first turn, which warms up and is not timed."""
    device, clock = torch.device(args.device), CLOCKS[args.clock]
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    megabytes = {}
    for way, turn in ways.items():
        with peak_memory(device) as memory:
            turn()
        megabytes[way] = memory["step_bytes"] / 1e6
    for _ in range(args.rounds):
        for way, turn in ways.items():
            synchronize(device)
            started = clock()
            turn()
            synchronize(device)
            seconds[way].append(clock() - started)
    return seconds, megabytes


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
    made.add_argument("--rounds", type=int, default=rounds, help="turns of each way (default: %(default)s)")
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
    record = {
        "command": " ".join(["python", f"scripts/bench/{name}.py", *map(without_folders, sys.argv[1:])]),
        "date": date.today().isoformat(),
        "environment": environment() | {"cpu": cpu_name(), "device": device.type},
        "tables": [asdict(table) for table in tables],
        "curves": [asdict(curve) for curve in curves],
        **more,
    }
    write_json(RECORDS / f"{name}-{device.type}.json", record)


def read_record(path: Path) -> tuple[dict[str, Any], list[Table], list[Curve]]:
    record = json.loads(path.read_text())
    curves = [Curve(**curve) for curve in record["curves"]]
    for curve in curves:
        named = curve.seconds.items()
        curve.seconds = {way: {int(size): value for size, value in points.items()} for way, points in named}
    return record, [Table(**table) for table in record["tables"]], curves
