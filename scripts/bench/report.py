"""docs/benchmarks.md from the records of the benchmarks.

python scripts/bench/report.py
"""

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
from measure import RECORDS, read_record

PAGE = Path(__file__).resolve().parents[2] / "docs" / "benchmarks.md"
TITLES = {
    "embed": "Item embedding",
    "loss": "Exact softmax",
    "user": "User models",
    "rank": "Ranking",
    "startup": "Start-up",
}
DEVICES = {"cpu": "CPU", "cuda": "GPU"}
ABOUT = """# Benchmarks

Written by `scripts/bench/report.py` from `scripts/bench/records/`. Within a table all ways ran in turns in one process:
`times as fast` is the median over the rounds of the first way's seconds over this one's, the range that of the rounds.
Machines are shared: compare within a table, not between tables. Each script's `--help` says what it compares.
"""


def main() -> None:
    parts = [ABOUT.strip()]
    for name, title in TITLES.items():
        parts.append(f"## {title}\n\n`scripts/bench/{name}.py`")
        for device, label in DEVICES.items():
            path = RECORDS / f"{name}-{device}.json"
            if not path.is_file():
                parts.append(f"{label}: not measured.")
                continue
            record, tables = read_record(path)
            parts.append(about(record))
            parts += [f"**{table.title}**\n\n{table.text()}" for table in tables]
    PAGE.write_text("\n\n".join(parts) + "\n")


def about(record: dict[str, Any]) -> str:
    found = record["environment"]
    hardware = found["gpu"] if found["device"] == "cuda" else f"{found['cpu']}, {found['threads']} threads"
    versions = f"torch {found['torch']}, Python {found['python']}, commit `{found['git']}`"
    return f"`{record['command']}`; {hardware}; {versions}; {record['date']}."


if __name__ == "__main__":
    main()
