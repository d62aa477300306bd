"""RecTools 0.19: seconds of its TorchRanker over some users and the whole catalogue, seen items left out.

RECTOOLS_RANK.py VECTORS OUT. VECTORS has users (U, D), items (I, D), seen (U, S) item numbers from 0, and best,
batch_size and turns, (). OUT gets wall and cpu seconds of each turn, the first of which warms up.
"""

import json
import sys
import time
from pathlib import Path

import numpy as np
from rectools.models.rank import Distance, TorchRanker
from scipy import sparse


def main(vectors: Path, out: Path) -> None:
    given = np.load(vectors)
    users, items, seen = given["users"], given["items"], given["seen"]
    rows = np.repeat(np.arange(len(users)), seen.shape[1])
    pairs = sparse.csr_matrix((np.ones(seen.size, np.float32), (rows, seen.ravel())), (len(users), len(items)))
    ranker = TorchRanker(Distance.DOT, "cpu", users, items, batch_size=int(given["batch_size"]))
    wall, cpu = [], []
    for _ in range(1 + int(given["turns"])):
        started = time.perf_counter(), time.process_time()
        ranker.rank(np.arange(len(users)), k=int(given["best"]), filter_pairs_csr=pairs)
        wall.append(time.perf_counter() - started[0])
        cpu.append(time.process_time() - started[1])
    out.write_text(json.dumps({"wall": wall[1:], "cpu": cpu[1:]}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
