"""Going on from a last.ckpt in a run folder of its own, as if the run had never stopped."""

import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import lightning as L
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.trainer.states import TrainerFn

from hllm.config import Config, from_plain, to_plain
from hllm.disk import whole_file
from hllm.distributed import rank, world_size
from hllm.errors import CheckpointError
from hllm.evaluate import load_checkpoint

FREE = (
    "cache_dir",
    "callbacks.checkpoint_steps",
    "ckpt",
    "init",
    "logger.",
    "trainer.enable_progress_bar",
    "trainer.accelerator",
    "dataset.root",
)
"Flags that may differ: they change neither weights nor schedule."


class RandomState(L.Callback):
    """Keeps torch's random state in checkpoints, each process's own: a resumed run shuffles, drops and samples as the
    unbroken one.
    """

    def state_dict(self) -> dict[str, Any]:
        cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
        own = {"torch": torch.get_rng_state(), "cuda": cuda}
        if world_size() == 1:
            return own
        ranks: list[Any] = [None] * world_size()
        dist.all_gather_object(ranks, own)
        return {"ranks": ranks}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        ranks = state_dict.get("ranks", [state_dict])
        own = ranks[min(rank(), len(ranks) - 1)]  # earlier versions kept the first process's state for all
        torch.set_rng_state(own["torch"].cpu())
        if len(own["cuda"]) == torch.cuda.device_count():
            torch.cuda.set_rng_state_all([state.cpu() for state in own["cuda"]])


class LastCheckpoint(Checkpoint):
    """Writes the checkpoint to resume from after every epoch and, if asked, within; goes on from it.

    Lightning's own would be written only in epochs that improve. It must stand behind the checkpoint of the best epoch
    in the list of callbacks, whose state it keeps.

    Args:
        path: of last.ckpt.
        every_steps: optimizer steps.
        resumed: the checkpoint that the run goes on from. It and the best one beside it are copied into the run's
            folder, by one process.
    """

    def __init__(self, path: Path, every_steps: int | None, resumed: Path | None = None) -> None:
        self.path, self.every_steps, self.resumed = path, every_steps, resumed
        self._steps_before = 0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        # Lightning hands a loader its state when it makes it; ours is made before the state is read, because the
        # schedule asks for the number of steps
        trainer.fit_loop._load_combined_loader_states()

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        self._steps_before = trainer.global_step

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        stepped = trainer.global_step > self._steps_before  # gradients that are still being summed are not kept
        # the last batch is followed by the validation and the checkpoint of the epoch
        within = not (trainer.is_last_batch or trainer.should_stop)
        if self.every_steps and stepped and within and trainer.global_step % self.every_steps == 0:
            self._write(trainer)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._write(trainer)

    def _write(self, trainer: L.Trainer) -> None:
        # with the optimizer too; this says what is written, and files are only ever read as plain tensors
        trainer.save_checkpoint(self.path, weights_only=False)

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        checkpoint["stopped"] = trainer.should_stop

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        # a run that was stopped early is finished
        trainer.should_stop = checkpoint.get("stopped", False)
        if self.resumed is None:
            return
        # not that of self.path: processes that were not started by one another may each have named a folder
        (folder,) = [str(c.dirpath) for c in trainer.checkpoint_callbacks if isinstance(c, ModelCheckpoint)]
        best = self.resumed.with_name("best.ckpt")
        _move_paths(checkpoint, folder, has_best=best.is_file())
        if trainer.state.fn is TrainerFn.FITTING and trainer.is_global_zero:
            # the others read these files after training only
            if best.is_file():
                _copy(best, Path(folder, "best.ckpt"))
            _copy(self.resumed, Path(folder, "last.ckpt"))


class WholeCheckpoints(TorchCheckpointIO):
    """Writes a checkpoint so that a kill leaves the old one or the new one.

    Lightning moves it from the system's temporary folder: a copy, and torn by a kill, where that is another disk.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Raises CheckpointError where the disk is full or the folder cannot be written."""
        with _whole_checkpoint(Path(path)) as file:
            torch.save(checkpoint, file)


@contextmanager
def _whole_checkpoint(path: Path) -> Iterator[BinaryIO]:
    """``whole_file``, its errors being CheckpointErrors that say what to do."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(path) as file:
            yield file
    except (OSError, RuntimeError) as error:
        # torch finds its file cut short and raises an error of its own instead
        reason = error if isinstance(error, OSError) else error.__context__
        if not isinstance(reason, OSError):
            raise
        raise CheckpointError(
            f"cannot write {path}: {reason.strerror or reason}. Free space or mend the rights there, or choose "
            "another folder with hydra.run.dir=; the checkpoint before is kept"
        ) from error


def check_resumable(ckpt: Path, config: Config) -> None:
    """Raises CheckpointError: missing, torn, or from another config, whose weights or schedule would not fit.

    What an earlier version did not store counts as this version's default.
    """
    stored = from_plain(load_checkpoint(ckpt)["hyper_parameters"]["config"])
    found = differences(to_plain(stored), to_plain(config))
    if changed := [difference for difference in found if not difference.startswith(FREE)]:
        raise CheckpointError(f"ckpt={ckpt} belongs to another config: {'; '.join(changed)}")


def _move_paths(checkpoint: dict[str, Any], folder: str, has_best: bool) -> None:
    """Let the best checkpoint so far be the one in ``folder``: Lightning forgets it when the folder changes."""
    best = str(Path(folder, "best.ckpt"))
    moved = {"dirpath": folder, "best_model_path": best, "kth_best_model_path": best, "last_model_path": ""}
    for callback, state in checkpoint["callbacks"].items():
        if not callback.startswith("ModelCheckpoint"):
            continue
        # within the first epoch there is no score yet, whatever best.ckpt was written before the kill
        if has_best and state["best_model_score"] is not None:
            state |= {**moved, "best_k_models": {best: state["best_model_score"]}}
        else:
            state |= {**moved, "best_model_path": "", "kth_best_model_path": "", "best_k_models": {}}
            state |= {"best_model_score": None, "kth_value": None}


def _copy(source: Path, target: Path) -> None:
    if not (target.exists() and source.samefile(target)):
        with _whole_checkpoint(target) as file, source.open("rb") as content:
            shutil.copyfileobj(content, file, 1 << 24)


def differences(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """Each key whose value differs: 'user.num_layers was 2, now 3'."""
    for key in sorted({*old, *new}):
        before, after = old.get(key), new.get(key)
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            yield from differences(before, after, f"{prefix}{key}.")
        elif before != after:
            yield f"{prefix}{key} was {before}, now {after}"
