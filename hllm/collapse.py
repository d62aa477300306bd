"""Stops a training run that cannot recover: a loss that is no number, item vectors that are all alike.

Both look only at steps that are logged: reading a number off a GPU makes it wait.
"""

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from hllm.config import Config, NCELossConfig
from hllm.errors import CollapsedError, DivergedError
from hllm.items.tower import mean_cosine
from hllm.module import Recommender


class LoggedSteps(L.Callback, ABC):
    """Calls ``look`` after each optimizer step that Lightning logs, in all processes."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self._last = 0

    def on_train_batch_end(
        self, trainer: L.Trainer, module: L.LightningModule, outputs: Any, batch: Any, batch_index: int
    ) -> None:
        step = trainer.global_step
        if step % self.config.trainer.log_every_n_steps == 0 and step != self._last:
            self._last = step  # with accumulated gradients several batches share a step
            assert isinstance(module, Recommender)
            self.look(trainer, module, outputs["loss"])

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self._last = trainer.global_step

    @abstractmethod
    def look(self, trainer: L.Trainer, module: Recommender, loss: Tensor) -> None:
        """The () loss is of this process alone."""


class FiniteLoss(LoggedSteps):
    """Raises DivergedError for a training loss that is NaN or infinite, where the next validation would find NaN."""

    def look(self, trainer: L.Trainer, module: Recommender, loss: Tensor) -> None:
        if not (value := _mean(trainer, loss)[0]) < float("inf"):
            raise DivergedError(
                f"step {trainer.global_step}: the training loss is {value}: training diverged; lower optimizer.lr"
                f"{' or optimizer.llm_lr' if module.optimizer_config.llm_lr else ''}"
                f"{' or set trainer.gradient_clip_val=1' if trainer.gradient_clip_val is None else ''}{kept(trainer)}"
            )


class CollapseGuard(LoggedSteps):
    """Stops when a step's item vectors all point one way, or hardly any negatives are left, several times in a row.

    An Item LLM that is trained can fall into a state where every item is the same to it. With
    ``loss.similarity_threshold``, the official code's mask, that state is final: every negative is masked, and the loss
    and its gradient are 0. An untuned LLM begins close to it, so the guard waits for the end of the warm-up. Logs
    train/item_cosine, the mean cosine over all pairs of the step's items.

    Raises:
        CollapsedError: from a training step, in all processes; says what was seen and what to change.
    """

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.in_a_row = 0

    def look(self, trainer: L.Trainer, module: Recommender, loss: Tensor) -> None:
        last, limits = module.last_step, self.config.callbacks
        assert last is not None
        cosine, negatives = _mean(trainer, torch.tensor(mean_cosine(last.vectors), device=loss.device), last.negatives)
        offered = int(last.offered)
        module.log("train/item_cosine", cosine)
        warmup = self.config.optimizer.warmup_ratio * float(trainer.estimated_stepping_batches)
        alike, lost = cosine > limits.collapse_cosine, negatives < limits.collapse_negatives * offered
        self.in_a_row = self.in_a_row + 1 if (alike or lost) and trainer.global_step > warmup else 0
        if self.in_a_row >= limits.collapse_patience:
            seen = [
                f"the mean cosine between items is {cosine:.4f} (callbacks.collapse_cosine={limits.collapse_cosine})"
                if alike
                else "",
                f"{negatives:.1f} of {offered} negatives are left (callbacks.collapse_negatives="
                f"{limits.collapse_negatives})"
                if lost
                else "",
            ]
            raise CollapsedError(
                f"step {trainer.global_step}: the item vectors collapsed, for {self.in_a_row} logged steps in a row: "
                f"{', '.join(filter(None, seen))}; {self._advice()}{kept(trainer)}"
            )

    def _advice(self) -> str:
        """What to change, of what this config leaves to change."""
        config, loss = self.config, self.config.loss
        rate = "optimizer.lr" if config.optimizer.llm_lr is None else "optimizer.llm_lr and optimizer.lr"
        parts = [f"lower {rate}", "raise optimizer.warmup_ratio"]
        if isinstance(loss, NCELossConfig) and loss.similarity_threshold is not None:
            parts.append("set loss.similarity_threshold=null, which makes a collapse final")
        if config.trainer.precision == "bf16-true":
            parts.append("set trainer.precision=bf16-mixed")
        return ", or ".join(parts)


def _mean(trainer: L.Trainer, *values: Tensor) -> list[float]:
    """Numbers averaged over the processes, so that all of them decide alike; NaN where one is."""
    stacked = torch.stack([value.detach().float() for value in values])
    reduced: Tensor = trainer.strategy.reduce(stacked, reduce_op="mean")
    return reduced.tolist()


def kept(trainer: L.Trainer) -> str:
    """Where the best checkpoint so far is, as the end of a message."""
    callback = trainer.checkpoint_callback
    best = callback.best_model_path if isinstance(callback, ModelCheckpoint) else ""
    return f". The best checkpoint so far is kept: {best}" if best and Path(best).is_file() else ""
