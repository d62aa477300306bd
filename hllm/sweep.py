"""One table of the runs of a multirun, written when the last job ends."""

import csv
import json
from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf

from hllm.report import metric_names, text_table


class SweepTable(Callback):
    """Hydra callback: sweep.csv and sweep.md in the sweep folder, and the table on the terminal.

    A failed job has a row without numbers: a sweep never hides what it lost.
    """

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        folder = Path(config.hydra.sweep.dir)
        if rows := sweep_rows(folder):
            header = list(dict.fromkeys(key for row in rows for key in row))
            cells = [[row.get(key, "failed") for key in header] for row in rows]
            with (folder / "sweep.csv").open("w", newline="") as file:
                csv.writer(file).writerows([header, *cells])
            table = text_table(header, cells)
            (folder / "sweep.md").write_text(table + "\n")
            print(f"\n{table}\n\nsweep folder: {folder}")


def sweep_rows(folder: Path) -> list[dict[str, str]]:
    """A row for each job's folder: number, overrides, and test metrics where the job finished."""
    jobs = [path.parents[1] for path in folder.glob("*/.hydra/overrides.yaml")]
    rows = []
    for job in sorted(jobs, key=lambda path: (len(path.name), path.name)):
        row = {"job": job.name, "overrides": " ".join(OmegaConf.load(job / ".hydra" / "overrides.yaml"))}
        metrics = job / "metrics.json"
        if metrics.is_file():
            results = json.loads(metrics.read_text())["results"]
            row |= {f"val/{name}": f"{results['val']['all'][name]:.4f}" for name in ("ndcg@10",)}
            row |= {f"test/{name}": f"{results['test']['all'][name]:.4f}" for name in metric_names(results)}
        rows.append(row)
    return rows
