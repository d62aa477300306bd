"""The main job from its command to its test scores: hllm.train on MovieLens-100k with SmolLM2-135M, as `make train`.

    python scripts/bench/end_to_end.py --record
    python scripts/bench/end_to_end.py loss=nce trainer.max_epochs=5        # overrides of all ways

Each turn is a process of its own, none of them a warm-up. ``plain`` has no cached vectors, and every fast path that has
a flag is forbidden: float32 texts without a shared prefix, batches read whole, torch's attention kernel. ``nothing
cached`` prepares the data and embeds the catalogue as well; ``vectors cached`` finds both. The model's files are there
in all of them. ``training`` is the fit's part of the seconds, embedding and evaluations included.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
from measure import CLOCKS, Table, finish, parser

from hllm.config import compose

PLAIN = ["llm.dtype=float32", "llm.save_work=false", "llm.packing=padded", "user.attention=kernel"]
WAYS = {
    "plain": (False, [*PLAIN, "user.length_groups=1"]),
    "ours, nothing cached": (False, []),
    "ours, vectors cached": (True, []),
}
MADE = {"embeddings", "prepared", "tokens"}
"What a run adds to the cache; all else in it was fetched."


def main() -> None:
    flags = parser(__doc__, rounds=2)
    flags.add_argument("overrides", nargs="*")
    args = flags.parse_args()
    fetched = Path(compose([]).cache_dir).expanduser()
    with tempfile.TemporaryDirectory() as folder:
        table = measure(args, fetched, Path(folder))
    print(f"{table.title}\n\n{table.text()}\n", flush=True)
    finish("end_to_end", args, [table])


def measure(args: argparse.Namespace, fetched: Path, folder: Path) -> Table:
    accelerator = "gpu" if args.device.startswith("cuda") else "cpu"
    clock, cache, log = CLOCKS[args.clock], folder / "cache", folder / "log.txt"
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    results: dict[str, dict[str, Any]] = {}
    for _ in range(args.rounds):
        for way, (cached, overrides) in WAYS.items():
            if not cached:  # else what the way before left there
                shutil.rmtree(cache, ignore_errors=True)
                cache.mkdir()
                for part in fetched.iterdir():
                    if part.name not in MADE:
                        (cache / part.name).symlink_to(part)
            out = folder / "run"
            shutil.rmtree(out, ignore_errors=True)
            command = [sys.executable, "-m", "hllm.train", *overrides, *args.overrides, "logger=csv"]
            command += [f"hydra.run.dir={out}", f"cache_dir={cache}", f"trainer.accelerator={accelerator}"]
            started = clock()
            with log.open("w") as file:
                status = subprocess.run([*command, "trainer.enable_progress_bar=false"], stdout=file, stderr=file)
            seconds[way].append(clock() - started)
            if status.returncode:
                raise SystemExit(f"{' '.join(command)}\n{log.read_text()}")
            results[way] = json.loads((out / "metrics.json").read_text())
            print(f"{way}: {seconds[way][-1]:.1f} s", flush=True)
    cells = {
        "training, s": {way: f"{found['seconds']['fit']:.1f}" for way, found in results.items()},
        "epochs": {way: str(found["epochs"]) for way, found in results.items()},
        "ndcg@10": {way: f"{found['results']['test']['all']['ndcg@10']:.4f}" for way, found in results.items()},
    }
    return Table(" ".join(["hllm.train", *args.overrides]), "runs", 1, seconds, cells=cells)


if __name__ == "__main__":
    main()
