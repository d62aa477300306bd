"""The LightningModule: wires item tower, user tower, head and loss; steps, optimizer, and what is logged.

Every system is a config of this one class. B users, L history length, N supervised positions, I items, D width.
"""

import math
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn

from hllm.config import EvaluationConfig, OptimizerConfig, Schedule
from hllm.data.schema import Batch
from hllm.errors import CheckpointError
from hllm.head import SimilarityHead
from hllm.items.tower import ItemTower
from hllm.losses import Loss
from hllm.metrics import RankingMetrics, target_ranks


class Recommender(L.LightningModule):
    """Predicts the next item of a history.

    Args:
        items: item tower, (n,) ids -> (n, D).
        users: user tower, (B, L, D), mask, timestamps -> (B, L, D).
        train_counts: (I + 1,) occurrences of each item in training: the popularity floor, and what metrics are
            broken down by.
        data_identity: what a checkpoint must share with the data it is used on, by name (fingerprint, protocol).
        hyperparameters: the run's config as plain values; stored in checkpoints.
    """

    train_counts: Tensor

    def __init__(
        self,
        items: ItemTower,
        users: nn.Module,
        head: SimilarityHead,
        loss: Loss,
        optimizer: OptimizerConfig,
        evaluation: EvaluationConfig,
        train_counts: Tensor,
        data_identity: dict[str, str],
        hyperparameters: dict[str, Any],
    ) -> None:
        super().__init__()
        self.save_hyperparameters({"config": hyperparameters})
        self.items, self.users, self.head, self.loss = items, users, head, loss
        self.optimizer_config, self.data_identity = optimizer, data_identity
        self.register_buffer("train_counts", train_counts, persistent=False)
        self.val_metrics, self.test_metrics, self.popularity_metrics = (
            RankingMetrics(evaluation.ks, evaluation.bucket_edges) for _ in range(3)
        )
        self.results: dict[str, dict[str, dict[str, float]]] = {}
        "Split -> group of targets -> metric, after each evaluation; the splits are val, test and popularity."
        self.test_ranks: list[tuple[Tensor, Tensor, Tensor]] = []
        "(B,) user numbers, target ids and target ranks of each test batch of all processes, for paired comparisons."
        self._catalogue: Tensor | None = None

    def forward(self, batch: Batch, ids: Tensor, vectors: Tensor) -> Tensor:
        """User vectors at every event: (B, L, D), from the (n, D) vectors of the (n,) ascending ids of the batch."""
        encoded: Tensor = self.users(_lookup(batch.items, ids, vectors), batch.mask, batch.timestamps)
        return encoded

    def training_step(self, batch: Batch, batch_index: int) -> Tensor:
        supervised = batch.targets > 0
        targets = batch.targets[supervised]  # (N,)
        candidates = self.loss.candidates(targets, self.items.num_items)
        ids = torch.cat([batch.items[batch.mask], candidates.ids]).unique()
        vectors = self.items(ids)
        users = self(batch, ids, vectors)[supervised]  # (N, D)
        loss: Tensor = self.loss(users, _lookup(candidates.ids, ids, vectors), candidates, targets, self.head)
        self.log("train/loss", loss, prog_bar=True, batch_size=len(targets))
        # a target among the negatives is none for its own position
        own = _lookup(targets, candidates.ids, candidates.negative[:, None].float()).mean()
        self.log("train/negatives", candidates.negative.sum() - own, batch_size=len(targets))
        if self.head.learned:
            self.log("train/temperature", 1 / self.head.scale(), batch_size=len(targets))
        return loss

    def scores(self, batch: Batch) -> Tensor:
        """(B, I) score of every catalogue item after each history; item i + 1 in column i."""
        catalogue = self.catalogue()
        ids = torch.arange(1, len(catalogue) + 1, device=catalogue.device)
        encoded = self(batch, ids, catalogue)
        last = batch.mask.sum(1) - 1
        scores: Tensor = self.head(encoded[torch.arange(len(batch), device=last.device), last], catalogue)
        return scores

    def catalogue(self) -> Tensor:
        """(I, D) item vectors, encoded once an evaluation."""
        if self._catalogue is None:
            self._catalogue = self.items.all()
        return self._catalogue

    def on_validation_epoch_start(self) -> None:
        self._catalogue = None

    def on_test_epoch_start(self) -> None:
        self._catalogue = None
        self.test_ranks = []

    def validation_step(self, batch: Batch, batch_index: int) -> None:
        self._rank(batch, self.scores(batch), self.val_metrics)

    def test_step(self, batch: Batch, batch_index: int) -> None:
        targets, ranks = self._rank(batch, self.scores(batch), self.test_metrics)
        self.test_ranks.append((batch.users.cpu(), targets.cpu(), ranks.cpu()))
        popularity = self.train_counts[1 : self.items.num_items + 1].float().expand(len(batch), -1)
        self._rank(batch, popularity, self.popularity_metrics)

    def _rank(self, batch: Batch, scores: Tensor, metrics: RankingMetrics) -> tuple[Tensor, Tensor]:
        """Count a batch into the metrics; (B,) target ids and (B,) ranks."""
        targets = batch.targets.max(dim=1).values
        ranks, ties = target_ranks(scores, targets, batch.seen)
        metrics.update(ranks, ties, self.train_counts[targets])
        return targets, ranks

    def on_validation_epoch_end(self) -> None:
        self._log_metrics("val", self.val_metrics)

    def on_test_epoch_end(self) -> None:
        if self.trainer.world_size > 1:
            parts: list[Any] = [None] * self.trainer.world_size
            torch.distributed.all_gather_object(parts, self.test_ranks)
            self.test_ranks = [batch for part in parts for batch in part]
        self._log_metrics("test", self.test_metrics)
        self._log_metrics("popularity", self.popularity_metrics)

    def _log_metrics(self, split: str, metrics: RankingMetrics) -> None:
        self.results[split] = metrics.compute()
        metrics.reset()
        self.log_dict({f"{split}/{name}": value for name, value in self.results[split]["all"].items()})

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """AdamW, decaying matrices only; the rate rises over the warm-up and then follows the schedule to 0."""
        config = self.optimizer_config
        parameters = [p for p in self.parameters() if p.requires_grad]
        groups = [
            {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": config.weight_decay},
            {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
        ]
        # under mixed precision a fused step would unscale gradients itself, and Lightning then refuses to clip them
        fused = not str(self.trainer.precision).endswith("mixed")
        optimizer = torch.optim.AdamW(groups, lr=config.lr, fused=fused)
        total = int(self.trainer.estimated_stepping_batches)
        warmup = round(config.warmup_ratio * total)

        def factor(step: int) -> float:
            if step < warmup:
                return (step + 1) / (warmup + 1)
            if config.schedule is Schedule.constant:
                return 1.0
            return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(total - warmup, 1)))

        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    @property
    def identity(self) -> dict[str, str]:
        return {**self.data_identity, "item vectors": self.items.fingerprint}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["identity"] = self.identity

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        for name, expected in checkpoint["identity"].items():
            if (found := self.identity.get(name)) != expected:
                raise CheckpointError(
                    f"the checkpoint was trained with {name} {expected}, here it is {found}: "
                    "use the data, text template and LLM it was trained with, or train again"
                )


def _lookup(wanted: Tensor, ids: Tensor, vectors: Tensor) -> Tensor:
    """Rows of ``vectors`` for ids anywhere in a tensor: (...,), (n,) ascending, (n, D) -> (..., D).

    Padding, id 0, gets some real item's vector: no model looks at it.
    """
    return F.embedding(torch.searchsorted(ids, wanted), vectors)
