"""How fast an Item LLM is trained, in the curves: items and tokens a second, and memory."""

import resource
import sys
import time
from typing import Any

import lightning as L
import torch

from hllm.items.llm import LLMItems


class Throughput(L.Callback):
    """Logs train/items_per_second, train/tokens_per_second and train/peak_memory_gb at logged steps.

    Items and tokens are those that the first process encoded; the time is that of its training steps alone, without
    loading and evaluation. Memory is the GPU's largest so far, or the process's on a CPU, in 10^9 bytes.
    """

    def __init__(self) -> None:
        self._seconds = self._started = 0.0

    def on_train_batch_start(self, trainer: L.Trainer, module: L.LightningModule, batch: Any, batch_index: int) -> None:
        self._started = time.perf_counter()

    def on_train_batch_end(
        self, trainer: L.Trainer, module: L.LightningModule, outputs: Any, batch: Any, batch_index: int
    ) -> None:
        self._seconds += time.perf_counter() - self._started
        if trainer.global_step % trainer.log_every_n_steps:  # type: ignore[attr-defined]
            return
        tower = module.items
        assert isinstance(tower, LLMItems)
        items, tokens = tower.take_counts()
        module.log("train/items_per_second", items / self._seconds)
        module.log("train/tokens_per_second", tokens / self._seconds)
        module.log("train/peak_memory_gb", peak_memory(module.device) / 1e9)
        self._seconds = 0.0


def peak_memory(device: torch.device) -> int:
    """Bytes held at most so far: by torch on a GPU, by this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
