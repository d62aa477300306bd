"""The LightningModule: wires item tower, user tower, head and loss; steps, optimizer, and what is logged.

Every system is a config of this one class. B users, L history length, T events of a batch, N supervised positions, I
items, D width.
"""

import math
from dataclasses import dataclass
from typing import Any, cast

import lightning as L
import torch
import torch.nn.functional as F
from lightning.pytorch.plugins.precision import MixedPrecision
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn

from hllm.config import Decay, EvaluationConfig, OptimizerConfig, Schedule, UserConfig
from hllm.data.schema import Batch
from hllm.distributed import (
    average_gradients,
    clip_gradient_norm,
    gather_ids,
    is_sharded,
    mean,
    most,
    shard,
    total,
    world_size,
)
from hllm.errors import CheckpointError, ConfigError
from hllm.head import SimilarityHead
from hllm.items.tower import ItemTower
from hllm.items.varlen import HALF, product_dtype
from hllm.losses import Loss
from hllm.metrics import Coverage, RankingMetrics, target_ranks
from hllm.tuning import is_trained
from hllm.users.layout import Layout
from hllm.users.neighbours import NeighbourHistory
from hllm.users.time import EventTimes

LLM_WEIGHTS = ("items.model.", "users.model.")
"Beginnings of the names of language models' own weights, which optimizer.llm_lr is for."


class Recommender(L.LightningModule):
    """Predicts the next item of a history.

    Args:
        items: item tower, (n,) ids -> (n, D).
        users: user tower, (T, D), layout, timestamps, target times or None -> (T, D).
        user: its config.
        train_counts: (I + 1,) occurrences of each item in training: the popularity floor, and what metrics are
            broken down by.
        data_identity: what a checkpoint must share with the data it is used on, by name (fingerprint, protocol).
        hyperparameters: the run's config as plain values; stored in checkpoints.
        times: what is added to item vectors of when their events happened.
        pool: (P,) ascending ids of the items that training may know, where others are not even to be negatives; None:
            all.
    """

    train_counts: Tensor
    pool: Tensor | None

    def __init__(
        self,
        items: ItemTower,
        users: nn.Module,
        user: UserConfig,
        head: SimilarityHead,
        loss: Loss,
        optimizer: OptimizerConfig,
        evaluation: EvaluationConfig,
        train_counts: Tensor,
        data_identity: dict[str, str],
        hyperparameters: dict[str, Any],
        times: EventTimes | None = None,
        pool: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.save_hyperparameters({"config": hyperparameters})
        self.items, self.users, self.head, self.loss = items, users, head, loss
        self.target_time, self.length_groups = user.target_time, user.length_groups
        self.times = times
        self.neighbours = NeighbourHistory() if head.neighbours else None
        self.optimizer_config, self.data_identity = optimizer, data_identity
        self.register_buffer("train_counts", train_counts, persistent=False)
        self.register_buffer("pool", pool, persistent=False)
        self.val_metrics, self.test_metrics, self.popularity_metrics = (
            RankingMetrics(evaluation.ks, evaluation.bucket_edges, evaluation.history_edges, pool is not None)
            for _ in range(3)
        )
        self.test_coverage, self.popularity_coverage = (
            Coverage(evaluation.ks, len(train_counts) - 1) for _ in range(2)
        )
        self.results: dict[str, dict[str, dict[str, float]]] = {}
        "Split -> group of targets -> metric, after each evaluation; the splits are val, test and popularity."
        self.test_ranks: list[tuple[Tensor, ...]] = []
        "(B,) user numbers, target ids, target ranks and events before the target, of each test batch of all processes."
        self.last_step: LastStep | None = None
        "What the newest training step tells of a collapse."
        self._catalogue: tuple[Tensor, Tensor] | None = None
        self._scores: Tensor | None = None
        self._idle_batches = 0

    def setup(self, stage: str) -> None:
        """Raises ConfigError where there is nothing to train."""
        if stage == "fit" and not is_trained(self):
            raise ConfigError(
                "nothing is trained: every part is frozen; leave something out of items.tuning.freeze or "
                "user.tuning.freeze"
            )

    def configure_model(self) -> None:
        """Shard both towers where the strategy asks for it; Lightning calls this before each fit and evaluation."""
        if self.device_mesh is None:
            return
        mixed = torch.bfloat16 if self.trainer.precision == "bf16-mixed" else None
        for tower in (self.items, self.users):
            shard(tower, self.device_mesh["data_parallel"], mixed)

    def forward(self, batch: Batch, ids: Tensor, vectors: Tensor) -> Tensor:
        """User vectors at every event: (T, D), from the (n, D) vectors of the (n,) ascending ids of the batch.

        Both are D + K wide where the head has K neighbours.
        """
        # parts only where lengths are known without waiting for a device, and no other process has as many to make
        on_cpu = batch.mask.device.type == "cpu"
        num_parts = self.length_groups or (None if on_cpu and self.device_mesh is None else 1)
        # a CPU's products in 16 bits are made for one size each, and those of a thousand sizes are kept: gigabytes
        few_sizes = on_cpu and product_dtype(vectors.device, vectors.dtype) in HALF
        layout = Layout.of(batch.mask, batch.places, num_parts, few_sizes)

        def events(values: Tensor) -> Tensor:
            """(B, L) -> (T,), and 0 at what few sizes add."""
            return F.pad(batch.of_events(values), (0, len(layout.row) - len(batch.places)))

        x = _lookup(events(batch.items), ids, vectors)
        if self.neighbours is not None:
            x, anchors = x.split([x.shape[-1] - self.head.neighbours, self.head.neighbours], dim=-1)
        timestamps = events(batch.timestamps)
        target_times = events(batch.target_times) if self.target_time else None
        if self.times is not None:
            x = x + self.times(timestamps, layout.previous(timestamps), target_times)
        encoded: Tensor = self.users(x, layout, timestamps, target_times)
        if self.neighbours is not None:
            encoded = torch.cat([encoded.float(), layout.by_row(self.neighbours, anchors)], dim=-1)
        return encoded[: len(batch.places)]

    def training_step(self, batch: Batch, batch_index: int) -> Tensor:
        targets = batch.of_events(batch.targets)[batch.supervised]  # (N,)
        num_items = self.items.num_items
        if self.pool is not None:  # the loss knows items by their places in it
            targets, num_items = torch.searchsorted(self.pool, targets) + 1, len(self.pool)
        candidates = self.loss.candidates(gather_ids(targets), num_items)
        offered = candidates.ids if self.pool is None else self.pool[candidates.ids - 1]
        whole, ids = len(offered) == self.items.num_items, offered
        if not whole:
            ids = torch.cat([batch.of_events(batch.items), offered]).unique()
            if self.items.collective:
                ids = gather_ids(ids).unique()
        vectors, scored = self.items.sides(ids)
        users = self(batch, ids, vectors)[batch.supervised]  # (N, D)
        excluded = _history_mask(batch, offered)[self._rows(batch)] if self.loss.mask_history else None
        items = scored if whole else _lookup(offered, ids, scored)
        seen = {"seen": self._seen(batch)} if self.loss.mask_seen else {}
        loss, negatives = self.loss(users, items, candidates, targets, self.head, excluded, **seen)
        # the processes' gradients are averaged; weighed so, that is the gradient of the mean over all positions
        weight = len(targets) * world_size() / max(total(len(targets), loss.device), 1)
        loss = cast(Tensor, loss * weight)
        # not Lightning's sync_dist: it would hold all processes up at a barrier, once a value
        mean_loss, mean_negatives = mean(torch.stack([loss.float(), negatives.float() * weight]))
        self.log("train/loss", mean_loss, prog_bar=True, batch_size=len(targets))
        self.log("train/negatives", mean_negatives, batch_size=len(targets))
        if self.head.learned:
            self.log("train/temperature", 1 / self.head.scale(), batch_size=len(targets))
        self.last_step = LastStep(vectors.detach(), mean_negatives, candidates.offered())
        return loss

    def _rows(self, batch: Batch) -> Tensor:
        """(N,) the row of each supervised position."""
        return batch.places[batch.supervised] // batch.mask.shape[1]

    def _seen(self, batch: Batch) -> Tensor:
        """(N, L) the items up to each of N supervised positions, as the loss numbers them; the first fills up."""
        rows, columns = self._rows(batch), torch.arange(batch.mask.shape[1], device=batch.mask.device)
        places = batch.places[batch.supervised, None] % len(columns)
        items = torch.where(columns <= places, batch.items[rows], batch.items[rows, :1])
        return items if self.pool is None else torch.searchsorted(self.pool, items) + 1

    def scores(self, batch: Batch, out: Tensor | None = None) -> Tensor:
        """(B, I) score of every catalogue item after each history; item i + 1 in column i; in ``out`` if it is given.

        Where the tower knows an item by training only, those that were not in training stand below all others.
        """
        vectors, table = self.catalogue()
        ids = torch.arange(1, len(vectors) + 1, device=vectors.device)
        newest = batch.mask.sum(1).cumsum(0) - 1
        scores = self.head.score(self(batch, ids, vectors)[newest], table, out)
        if not self.items.knows_cold:
            # finite, so that they still stand above what is left out of a ranking, and tie with one another
            scores.masked_fill_(self.train_counts[1 : len(table) + 1] == 0, torch.finfo(scores.dtype).min)
        return scores

    def catalogue(self) -> tuple[Tensor, Tensor]:
        """(I, D) item vectors, for histories, and (I, D) as the head scores them; made once an evaluation."""
        if self._catalogue is None:
            vectors, scored = self.items.catalogue()
            self._catalogue = vectors, self.head.table(scored)
        return self._catalogue

    def on_validation_epoch_start(self) -> None:
        self._begin_evaluation(self.trainer.num_val_batches)

    def on_test_epoch_start(self) -> None:
        self._begin_evaluation(self.trainer.num_test_batches)
        self.test_ranks = []

    def _begin_evaluation(self, num_batches: list[int | float]) -> None:
        self._catalogue = None
        with self.trainer.precision_plugin.forward_context():
            self.catalogue()  # at once: all processes share the work, and batches come to each in its own time
        own = int(sum(num_batches))
        self._idle_batches = most(own, self.device) - own

    def _end_evaluation(self) -> None:
        """Wait for processes with more batches: where weights are sharded, a user tower only runs in all at once."""
        x = self.catalogue()[0][:1]  # (1, D)
        x = x[:, : x.shape[-1] - self.head.neighbours]
        layout, times = Layout.of(x.new_ones(1, 1, dtype=torch.bool)), x.new_zeros(1, dtype=torch.int64)
        with self.trainer.precision_plugin.forward_context():
            for _ in range(self._idle_batches):
                self.users(x, layout, times, times if self.target_time else None)
        self._catalogue = self._scores = None  # training needs the memory

    def _scored(self, batch: Batch) -> Tensor:
        """As ``scores``, in memory that the next batch's overwrite: to have as much new each time costs as much as the
        product.
        """
        table = self.catalogue()[1]
        if self._scores is None or len(self._scores) < len(batch):
            self._scores = table.new_empty(len(batch), len(table), dtype=self.head.score_dtype)
        return self.scores(batch, self._scores[: len(batch)])

    def validation_step(self, batch: Batch, batch_index: int) -> None:
        self._rank(batch, self._scored(batch), self.val_metrics)

    def test_step(self, batch: Batch, batch_index: int) -> None:
        scores = self._scored(batch)
        ranked = self._rank(batch, scores, self.test_metrics)
        self.test_ranks.append((batch.users.cpu(), *(column.cpu() for column in ranked)))
        self.test_coverage.update(scores, batch.seen)
        popularity = self.train_counts[1 : self.items.num_items + 1].float().expand(len(batch), -1)
        self._rank(batch, popularity, self.popularity_metrics)
        self.popularity_coverage.update(popularity, batch.seen)

    def _rank(self, batch: Batch, scores: Tensor, metrics: RankingMetrics) -> tuple[Tensor, Tensor, Tensor]:
        """Count a batch into the metrics; (B,) target ids, (B,) ranks and (B,) events before the target."""
        targets, histories = batch.targets.max(dim=1).values, batch.history_lengths
        ranks, ties = target_ranks(scores, targets, batch.seen)
        cold = None if self.pool is None else torch.isin(targets, self.pool, invert=True)
        metrics.update(ranks, ties, self.train_counts[targets], histories, cold)
        return targets, ranks, histories

    def on_validation_epoch_end(self) -> None:
        self._end_evaluation()
        self._log_metrics("val", self.val_metrics)

    def on_test_epoch_end(self) -> None:
        self._end_evaluation()
        if self.trainer.world_size > 1:
            parts: list[Any] = [None] * self.trainer.world_size
            torch.distributed.all_gather_object(parts, self.test_ranks)
            self.test_ranks = [batch for part in parts for batch in part]
        self._log_metrics("test", self.test_metrics, self.test_coverage)
        self._log_metrics("popularity", self.popularity_metrics, self.popularity_coverage)

    def _log_metrics(self, split: str, metrics: RankingMetrics, coverage: Coverage | None = None) -> None:
        self.results[split] = metrics.compute()
        metrics.reset()
        if coverage is not None:
            self.results[split]["all"] |= coverage.compute()
            coverage.reset()
        self.log_dict({f"{split}/{name}": value for name, value in self.results[split]["all"].items()})

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        if self.device_mesh is not None:
            average_gradients(self.parameters())

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: int | float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        plugin = self.trainer.precision_plugin
        if self.device_mesh is not None:
            if gradient_clip_val is not None:
                clip_gradient_norm(self.parameters(), gradient_clip_val)
        elif isinstance(plugin, MixedPrecision) and plugin.scaler is None:
            # which Lightning refuses to any fused optimizer, though nothing is scaled in bfloat16
            if gradient_clip_val is not None:
                nn.utils.clip_grad_norm_(self.parameters(), gradient_clip_val)
        else:
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """AdamW; the rate rises over the warm-up and then follows the schedule to 0."""
        config = self.optimizer_config
        # a fused step unscales gradients itself, behind clipping
        fused = self.trainer.precision != "16-mixed"
        optimizer = torch.optim.AdamW(self._parameter_groups(), lr=config.lr, fused=fused)
        steps = int(self.trainer.estimated_stepping_batches)
        warmup = round(config.warmup_ratio * steps)

        def factor(step: int) -> float:
            if step < warmup:
                return step / warmup if config.first_step_zero else (step + 1) / (warmup + 1)
            if config.schedule is Schedule.constant:
                return 1.0
            return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(steps - warmup, 1)))

        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def _parameter_groups(self) -> list[dict[str, Any]]:
        """Trained parameters by rate and decay: language models' own beside the others, matrices beside the rest."""
        config = self.optimizer_config
        groups: dict[tuple[float, float, bool], list[nn.Parameter]] = {}
        named = [(name, parameter) for name, parameter in self.named_parameters() if parameter.requires_grad]
        for matrix in (True, False):
            for name, parameter in named:
                if (parameter.ndim >= 2) is matrix:
                    own = config.llm_lr is not None and name.startswith(LLM_WEIGHTS)
                    decayed = matrix or config.decay is Decay.all
                    lr, decay = (
                        config.llm_lr or config.lr if own else config.lr,
                        config.weight_decay if decayed else 0.0,
                    )
                    # one step of the optimizer does not mix shards with whole tensors
                    groups.setdefault((lr, decay, is_sharded(parameter)), []).append(parameter)
        return [{"params": group, "lr": lr, "weight_decay": decay} for (lr, decay, _), group in groups.items()]

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


@dataclass(frozen=True)
class LastStep:
    """(n, D) item vectors of a step; () the mean number of negatives of a position, of all processes; () how many were
    offered.
    """

    vectors: Tensor
    negatives: Tensor
    offered: Tensor


def _history_mask(batch: Batch, ids: Tensor) -> Tensor:
    """(B, M) bool: which of the (M,) ascending ids are in a row, as history or as target."""
    items = torch.cat([batch.items, batch.targets], dim=1)  # (B, 2L)
    places = torch.searchsorted(ids, items).clamp(max=len(ids) - 1)
    rows = torch.arange(len(batch), device=ids.device)[:, None].expand_as(places)
    found = ids[places] == items
    mask = torch.zeros(len(batch), len(ids), dtype=torch.bool, device=ids.device)
    mask[rows[found], places[found]] = True
    return mask


def _lookup(wanted: Tensor, ids: Tensor, vectors: Tensor) -> Tensor:
    """Rows of ``vectors`` for ids anywhere in a tensor: (...,), (n,) ascending, (n, D) -> (..., D).

    Padding, id 0, gets some real item's vector: no model looks at it.
    """
    return F.embedding(torch.searchsorted(ids, wanted), vectors)
