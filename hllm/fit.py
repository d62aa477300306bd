"""One run: build -> fit -> test, and what it leaves in its folder."""

import time
from pathlib import Path

import lightning as L

from hllm.build import (
    build_checkpoint,
    build_datamodule,
    build_module,
    build_trainer,
    check_kernel,
    pin_dtype,
    pin_template,
)
from hllm.cli import quiet_libraries
from hllm.config import Config
from hllm.errors import HllmError
from hllm.evaluate import Evaluation, evaluate
from hllm.items.tower import CachedItems
from hllm.report import full_report
from hllm.resume import LastCheckpoint, RandomState, WholeCheckpoints, check_resumable
from hllm.tracking import build_loggers, write_json, write_ranks, write_run_info
from hllm.weights import InitialWeights, read_weights


def train(config: Config, run_dir: Path) -> Evaluation:
    """Train, then evaluate the best checkpoint; everything is left in the run folder.

    Args:
        config: checked.
        run_dir: gets config.yaml, environment.json, metrics.csv (the curves), metrics.json and report.md (the best
            checkpoint's results), ranks.parquet (each test user's rank) and checkpoints/.
    """
    quiet_libraries()
    check_kernel(config)
    config = pin_dtype(config)
    started = time.perf_counter()
    initial = None if config.init is None else read_weights(Path(config.init))  # a wrong file shows at once
    L.seed_everything(config.seed, workers=True, verbose=False)
    datamodule = build_datamodule(config)
    config = pin_template(config, datamodule.catalog)
    write_run_info(config, run_dir)
    module = build_module(config, datamodule, read_weights=initial is None or not initial.replace_all(config))
    resumed = None if config.ckpt is None else Path(config.ckpt)
    if resumed is not None:
        check_resumable(resumed, config)
    checkpoint = build_checkpoint(config, run_dir)
    last = LastCheckpoint(run_dir / "checkpoints" / "last.ckpt", config.callbacks.checkpoint_steps, resumed)
    callbacks = [checkpoint, last, RandomState(), *([] if initial is None else [InitialWeights(initial)])]
    trainer = build_trainer(config, run_dir, build_loggers(config, run_dir), callbacks)
    trainer.strategy.checkpoint_io = WholeCheckpoints()
    trainer.fit(module, datamodule, ckpt_path=resumed, weights_only=True)
    if not checkpoint.best_model_path:
        raise HllmError(f"training stopped before the first validation; nothing to evaluate in {run_dir}")
    fitted = time.perf_counter()
    evaluation = evaluate(trainer, module, datamodule, Path(checkpoint.best_model_path))
    if isinstance(module.items, CachedItems):
        for logger in trainer.loggers:
            logger.log_metrics({f"items/{name}": value for name, value in module.items.statistics.items()})
    for logger in trainer.loggers:
        logger.finalize("success")
    if trainer.is_global_zero:
        seconds = {"fit": fitted - started, "total": time.perf_counter() - started}
        report = full_report(evaluation.results, evaluation.identity, f"{config.system} {config.loss.name}")
        # not trainer.current_epoch, which is behind by one where an early stopped run was resumed
        epochs = trainer.fit_loop.epoch_progress.current.processed  # type: ignore[attr-defined]  # its class is not told
        content = {**evaluation.plain(), "epochs": epochs, "seconds": seconds}
        write_json(run_dir / "metrics.json", content)
        write_ranks(run_dir / "ranks.parquet", module.test_ranks, datamodule)
        (run_dir / "report.md").write_text(report + "\n")
        print(f"\n{report}\n\nrun folder: {run_dir}")
    return evaluation
