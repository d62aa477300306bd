"""Going on from a last.ckpt in a run folder of its own, as if the run had never stopped."""

import io
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import lightning as L
import torch

from hllm.config import Config, to_plain
from hllm.disk import write_whole
from hllm.errors import CheckpointError
from hllm.evaluate import load_checkpoint

FREE = ("cache_dir", "ckpt", "init", "logger.", "trainer.enable_progress_bar", "trainer.accelerator", "dataset.root")
"Flags that may differ: they change neither weights nor schedule."


class RandomState(L.Callback):
    """Keeps torch's random state in checkpoints: a resumed run shuffles, drops and samples as the unbroken one.

    Of several processes the first one's state is kept, and given to all.
    """

    def state_dict(self) -> dict[str, Any]:
        cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
        return {"torch": torch.get_rng_state(), "cuda": cuda}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        torch.set_rng_state(state_dict["torch"].cpu())
        if len(state_dict["cuda"]) == torch.cuda.device_count():
            torch.cuda.set_rng_state_all([state.cpu() for state in state_dict["cuda"]])


def take_over(ckpt: Path, config: Config, run_dir: Path) -> Path:
    """Copy a run's checkpoints into the folder of the run that goes on from it; returns the one to resume from.

    Lightning forgets the best checkpoint so far when the folder changes, so the paths it keeps are moved as well.

    Raises:
        CheckpointError: missing, torn, or from another config, whose weights or schedule would not fit.
    """
    last = load_checkpoint(ckpt)
    found = differences(last["hyper_parameters"]["config"], to_plain(config))
    if changed := [difference for difference in found if not difference.startswith(FREE)]:
        raise CheckpointError(f"ckpt={ckpt} belongs to another config: {'; '.join(changed)}")
    folder = run_dir / "checkpoints"
    folder.mkdir(parents=True, exist_ok=True)
    best = ckpt.with_name("best.ckpt")
    if has_best := best.is_file():
        _write_moved(load_checkpoint(best), folder, "best.ckpt")
    return _write_moved(last, folder, "last.ckpt", has_best)


def _write_moved(checkpoint: dict[str, Any], folder: Path, name: str, has_best: bool = True) -> Path:
    """Write a checkpoint into a run's folder with the paths in it moved there; forget a best one that is not."""
    best = str(folder / "best.ckpt")
    moved = {"dirpath": str(folder), "best_model_path": best, "kth_best_model_path": best, "last_model_path": ""}
    for callback, state in checkpoint["callbacks"].items():
        if callback.startswith("ModelCheckpoint") and has_best:
            state |= {**moved, "best_k_models": {best: state["best_model_score"]}}
        elif callback.startswith("ModelCheckpoint"):
            state |= {**moved, "best_model_path": "", "kth_best_model_path": "", "best_k_models": {}}
            state |= {"best_model_score": None, "kth_value": None}
    buffer = io.BytesIO()
    torch.save(checkpoint, buffer)
    write_whole(folder / name, buffer.getvalue())
    return folder / name


def differences(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """Each key whose value differs: 'user.num_layers was 2, now 3'."""
    for key in sorted({*old, *new}):
        before, after = old.get(key), new.get(key)
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            yield from differences(before, after, f"{prefix}{key}.")
        elif before != after:
            yield f"{prefix}{key} was {before}, now {after}"
