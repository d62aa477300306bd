"""Seconds from a command to what it is for: the help text, and the first training step of a warm run.

    python scripts/bench/startup.py --record

Each turn is a process of its own. ``one step`` is hllm.train on MovieLens-100k with vectors and prepared data in the
cache (a first run makes them, and is not timed): one training step, a batch of each evaluation, and the end.
"""

import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
from measure import Table, finish, in_turns, parser

ONE_STEP = [
    "trainer.max_epochs=1",
    *(f"trainer.limit_{split}_batches=1" for split in ("train", "val", "test")),
    "trainer.enable_progress_bar=false",
    "logger=csv",
]


def main() -> None:
    flags = parser(__doc__, rounds=5)
    args = flags.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        ways = {
            "import torch": lambda: run("-c", "import torch"),
            "import lightning": lambda: run("-c", "import lightning"),
            "help": lambda: run("-m", "hllm.train", "--help"),
            "one step": lambda: run("-m", "hllm.train", *ONE_STEP, f"hydra.run.dir={folder}"),
        }
        seconds, _ = in_turns(ways, args)
    table = Table("Start-up", "runs", 1, seconds)
    print(table.text())
    finish("startup", args, [table])


def run(*arguments: str) -> None:
    subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


if __name__ == "__main__":
    main()
