"""Checked config -> datamodule, module, callbacks, trainer: the one place that knows which config makes which class."""

import importlib.util
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning as L
import torch
from hydra.utils import get_class
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Callback, EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import Logger
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, ModelParallelStrategy
from lightning.pytorch.strategies import Strategy as LightningStrategy
from torch import nn

from hllm.collapse import CollapseGuard, FiniteLoss
from hllm.compiling import compile_layers
from hllm.config import (
    AutoLossConfig,
    BinaryLossConfig,
    CachedItemsConfig,
    CELossConfig,
    Config,
    Dtype,
    FusedItemsConfig,
    HSTUConfig,
    IdItemsConfig,
    LLMItemsConfig,
    LLMUserConfig,
    LossConfig,
    LossKernel,
    NCELossConfig,
    Strategy,
    TrainerConfig,
    TransformerConfig,
    to_plain,
)
from hllm.data.base import DataModule
from hllm.data.schema import Catalog
from hllm.errors import ConfigError
from hllm.head import SimilarityHead
from hllm.items.backbone import choose_device, choose_dtype, has_fast_bfloat16, load_pair, load_trainable
from hllm.items.cache import ItemEmbeddingCache
from hllm.items.encoder import check_fit, check_vocabulary
from hllm.items.files import locate
from hllm.items.llm import LLMItems
from hllm.items.text import default_template
from hllm.items.tokens import catalog_tokens
from hllm.items.tower import CachedItems, FusedItems, IdItems, ItemTower
from hllm.losses import Loss
from hllm.module import Recommender
from hllm.throughput import Throughput
from hllm.users.llm import UserLLM
from hllm.users.time import EventTimes

log = logging.getLogger(__name__)

MANY_ITEMS = 10_000
"More than a step should encode."


def cache_dir(config: Config) -> Path:
    return Path(config.cache_dir).expanduser()


def pin_dtype(config: Config) -> Config:
    """The config with ``llm.dtype=auto`` replaced by what that is here.

    Item vectors depend on it: a checkpoint that says auto could not be used on a machine where it is another dtype.
    """
    if not isinstance(config.items, CachedItemsConfig):
        return config
    device = choose_device(config.llm.device)
    dtype = Dtype(str(choose_dtype(config.llm.dtype, device, has_fast_bfloat16(device))).removeprefix("torch."))
    return replace(config, llm=replace(config.llm, dtype=dtype))


def pin_template(config: Config, catalog: Catalog) -> Config:
    """The config with an unset text template replaced by what that is for this catalogue.

    New items are read by it too, and their file may have other columns.
    """
    text = config.dataset.text
    if text.template is not None or isinstance(config.items, IdItemsConfig):
        return config
    return replace(config, dataset=replace(config.dataset, text=replace(text, template=default_template(catalog))))


def build_datamodule(config: Config) -> DataModule:
    """The data set, read and ready: fetches what is missing."""
    datamodule: DataModule = get_class(config.dataset._target_)(config.dataset, cache_dir(config))
    datamodule.prepare_data()
    datamodule.setup()
    return datamodule


def build_module(config: Config, datamodule: DataModule, read_weights: bool = True) -> Recommender:
    """The model, with fresh or pretrained weights. Cached item vectors are attached later, by ``ItemEmbeddingCache``.

    Args:
        read_weights: False where others replace them all: of language models only config and tokenizer are then read.

    Raises:
        ConfigError, LLMError: a language model cannot be had, or does not fit its place.
    """
    hyperparameters = to_plain(config)
    if not read_weights:
        config = _drawn(config)
    users: nn.Module
    if isinstance(config.user, TransformerConfig | HSTUConfig):
        # items first: published numbers come from weights drawn in this order
        dim = config.user.dim
        items = _build_items(config, datamodule, dim)
        users = get_class(config.user._target_)(config.user, config.dataset.max_history)
    else:
        assert isinstance(config.user, LLMUserConfig)
        user_model, item_model = _load_models(config)
        assert config.user_llm is not None
        users = UserLLM(user_model, config.user, config.dataset.max_history, config.user_llm.packing)
        dim = users.dim
        items = _build_items(config, datamodule, dim, item_model)
    if config.user.compile:
        compile_layers(users, "user.compile")
    return Recommender(
        items=items,
        users=users,
        user=config.user,
        head=SimilarityHead(config.head, getattr(config.items, "neighbours", 0)),
        loss=_build_loss(config, _pool_counts(datamodule), users, dim),
        optimizer=config.optimizer,
        evaluation=config.evaluation,
        train_counts=datamodule.train_counts,
        data_identity=data_identity(config, datamodule),
        hyperparameters=hyperparameters,
        pool=datamodule.pool,
        times=EventTimes(config.user, dim) if config.user.time_features or config.user.time_gaps else None,
    )


def _build_loss(config: Config, train_counts: torch.Tensor, users: nn.Module, dim: int) -> Loss:
    """``train_counts`` is (I + 1,), of the items that the loss may know; the user model is ``dim`` wide."""
    chosen = config.loss
    if isinstance(chosen, AutoLossConfig):
        chosen = _cheaper_loss(chosen, len(train_counts) - 1, users, dim, isinstance(config.items, LLMItemsConfig))
    loss: Loss = get_class(chosen._target_)(chosen, train_counts)
    return loss


def _cheaper_loss(config: AutoLossConfig, num_items: int, users: nn.Module, dim: int, encodes: bool) -> LossConfig:
    """Exact softmax over (I,) items costs 6 I D operations a position, the user model's P weights 6 P: even at P / D.

    Args:
        encodes: the item tower encodes what a step reads, which cannot be the catalogue.
    """
    weights = sum(layer.weight.numel() for layer in users.modules() if isinstance(layer, nn.Linear))
    most = max(config.exact_items, weights // dim)
    if num_items <= most and not encodes:
        log.info("loss=auto: exact softmax, %d items of at most %d", num_items, most)
        return CELossConfig("ce", "hllm.losses.CrossEntropyLoss", products=config.products)
    why = "items=llm encodes what is scored" if encodes else f"{num_items} items, exact up to {most}"
    log.info("loss=auto: softmax over a sample, %d negatives and the batch's: %s", config.num_negatives, why)
    return NCELossConfig("nce", "hllm.losses.NCELoss", num_negatives=config.num_negatives, logq=True)


def data_identity(config: Config, datamodule: DataModule) -> dict[str, str]:
    """What two runs must share for their numbers to be of the same thing."""
    return {
        "dataset": config.dataset.name,
        "protocol": config.dataset.protocol_name,
        "catalogue": datamodule.catalog.fingerprint,
        "interactions": datamodule.fingerprint,
    }


def _pool_counts(datamodule: DataModule) -> torch.Tensor:
    """(P + 1,) training events of each item that a loss may know, by its place among them."""
    counts = datamodule.train_counts
    return counts if datamodule.pool is None else torch.cat([counts[:1], counts[datamodule.pool]])


def _drawn(config: Config) -> Config:
    """The config with trained language models drawn anew; one that only embeds, for items=cached, stays as it is."""
    if isinstance(config.items, LLMItemsConfig):
        config = replace(config, llm=replace(config.llm, pretrained=False))
    if isinstance(config.user, LLMUserConfig):
        config = replace(config, user=replace(config.user, pretrained=False))
    return config


def _load_models(config: Config) -> tuple[Any, tuple[Any, Any] | None]:
    """The User LLM's body; the Item LLM's and its tokenizer too, where both begin with the same weights."""
    llm = config.user_llm
    assert llm is not None
    files = locate(llm, cache_dir(config), weights=llm.pretrained)
    joint = isinstance(config.items, LLMItemsConfig) and llm.pretrained and config.llm.pretrained
    if joint and locate(config.llm, cache_dir(config)) == files:
        user_model, *item_model = load_pair(files, llm, config.llm)
        return user_model, (item_model[0], item_model[1])
    return load_trainable(files, llm)[0], None


def _build_items(config: Config, datamodule: DataModule, dim: int, loaded: tuple[Any, Any] | None = None) -> ItemTower:
    """``loaded`` is the Item LLM's body and tokenizer, where they are there already."""
    if isinstance(config.items, FusedItemsConfig):
        return FusedItems(config.items, dim, datamodule.train_counts)
    if isinstance(config.items, CachedItemsConfig):
        return CachedItems(config.items, dim)
    if isinstance(config.items, IdItemsConfig):
        return IdItems(config.items, datamodule.num_items, dim)
    assert isinstance(config.items, LLMItemsConfig)
    llm, cache = config.llm, cache_dir(config)
    files = locate(llm, cache, weights=llm.pretrained)
    model, tokenizer = loaded or load_trainable(files, llm)
    check_fit(files.name, model, tokenizer, llm)
    own_negatives = isinstance(config.loss, NCELossConfig) and config.loss.per_position
    reads_all = isinstance(config.loss, CELossConfig | BinaryLossConfig) or own_negatives
    if reads_all and datamodule.num_items > MANY_ITEMS:
        log.warning(
            "loss=%s reads all %d items in each step, and items=llm encodes what is read: loss=nce draws some",
            config.loss.name,
            datamodule.num_items,
        )
    tokens = catalog_tokens(datamodule.catalog, config.dataset.text, llm, files, tokenizer, cache)
    check_vocabulary(files.name, model, tokens)
    return LLMItems(model, tokens, llm, config.items, dim)


def item_callbacks(config: Config) -> list[Callback]:
    """What an item tower needs done: vectors cached before weights are restored or optimizers exist; a guard."""
    if isinstance(config.items, CachedItemsConfig):
        return [ItemEmbeddingCache(config.dataset.text, config.llm, cache_dir(config))]
    if not isinstance(config.items, LLMItemsConfig):
        return []
    # vectors of a frozen model cannot collapse, and those of an untuned one are alike from the beginning
    trained = "all" not in config.items.tuning.freeze
    return [CollapseGuard(config), Throughput()] if trained else [Throughput()]


def build_checkpoint(config: Config, run_dir: Path) -> ModelCheckpoint:
    """best.ckpt by the monitored metric."""
    return ModelCheckpoint(
        dirpath=run_dir / "checkpoints",
        filename="best",
        monitor=config.callbacks.monitor,
        mode="max",
        enable_version_counter=False,
    )


def build_strategy(config: TrainerConfig) -> LightningStrategy | str:
    """How the processes of a run share the work.

    Raises:
        ConfigError: the package that trainer.strategy needs is not installed.
    """
    num_processes = config.devices * config.num_nodes
    if config.strategy is Strategy.auto and num_processes == 1:
        return "auto"
    if config.strategy in (Strategy.auto, Strategy.ddp):
        # our buffers are constants; sending them would also hang where a process has fewer batches to evaluate
        return DDPStrategy(broadcast_buffers=False)
    if config.strategy is Strategy.fsdp:
        # whole checkpoints, which hllm.evaluate and hllm.recommend read on one device
        return ModelParallelStrategy(num_processes, tensor_parallel_size=1, save_distributed_checkpoint=False)
    if importlib.util.find_spec("deepspeed") is None:
        raise ConfigError(f"trainer.strategy={config.strategy.name}: needs deepspeed; pip install hllm[deepspeed]")
    return DeepSpeedStrategy(stage=2 if config.strategy is Strategy.deepspeed_stage_2 else 3)


def check_kernel(config: Config) -> None:
    """Called before a run that trains; evaluation computes no loss.

    Raises:
        ConfigError: what loss.kernel needs is not there.
    """
    if not isinstance(config.loss, CELossConfig) or config.loss.kernel is LossKernel.chunked:
        return
    flag = f"loss.kernel={config.loss.kernel.name}"
    if importlib.util.find_spec("liger_kernel") is None:
        raise ConfigError(f"{flag}: needs liger-kernel; pip install hllm[liger]")
    if config.trainer.accelerator == "cpu" or not torch.cuda.is_available():
        raise ConfigError(f"{flag}: needs a CUDA device, and this run is on a CPU; choose loss.kernel=chunked")


def build_trainer(config: Config, run_dir: Path, loggers: list[Logger], callbacks: list[Callback]) -> L.Trainer:
    """A trainer with early stopping and what the item tower needs.

    Args:
        callbacks: further ones, such as the checkpoint.
    """
    stopping = EarlyStopping(
        config.callbacks.monitor, mode="max", patience=config.callbacks.patience, check_finite=True
    )
    c = config.trainer
    # not Lightning's auto: it would take Apple's GPU, which lacks the metrics' float64
    auto = "gpu" if torch.cuda.is_available() else "cpu"
    try:
        return L.Trainer(
            default_root_dir=run_dir,
            max_epochs=c.max_epochs,
            accelerator=auto if c.accelerator == "auto" else c.accelerator,
            devices=c.devices,
            num_nodes=c.num_nodes,
            strategy=build_strategy(c),
            inference_mode=c.strategy is not Strategy.fsdp,  # sharded weights are gathered in place
            precision=c.precision,  # type: ignore[arg-type]  # checked against the schema's list
            gradient_clip_val=c.gradient_clip_val,
            accumulate_grad_batches=c.accumulate_grad_batches,
            limit_train_batches=c.limit_train_batches,
            limit_val_batches=c.limit_val_batches,
            limit_test_batches=c.limit_test_batches,
            overfit_batches=c.overfit_batches,
            log_every_n_steps=c.log_every_n_steps,
            enable_progress_bar=c.enable_progress_bar,
            enable_model_summary=False,
            profiler=c.profiler,
            detect_anomaly=c.detect_anomaly,
            num_sanity_val_steps=0,
            use_distributed_sampler=False,  # the datamodule brings samplers that count each user once
            logger=loggers,
            callbacks=[*item_callbacks(config), FiniteLoss(config), stopping, *callbacks],
        )
    except MisconfigurationException as error:
        raise ConfigError(f"trainer.accelerator={c.accelerator} trainer.devices={c.devices}: {error}") from error
