"""python -m hllm.evaluate ckpt=...: the numbers of a checkpoint again, to the last digit."""

import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, cast

import lightning as L
import torch
from omegaconf import MISSING

from hllm.build import build_datamodule, build_module, build_trainer
from hllm.cli import parse, quiet_libraries, report_errors
from hllm.config import Config, Strategy, from_plain
from hllm.data.base import DataModule
from hllm.errors import CheckpointError
from hllm.module import Recommender
from hllm.report import full_report
from hllm.weights import refuse_folder

USAGE = """usage: python -m hllm.evaluate ckpt=RUN/checkpoints/best.ckpt [root=FOLDER] [cache_dir=FOLDER]

Ranks the whole catalogue for every validation and test user again and prints the table of the run.
  ckpt         a checkpoint of hllm.train
  root         the data set's raw files, if not where the run read them
  cache_dir    downloads and item embeddings, if not where the run kept them
  accelerator  auto, cpu, gpu"""


@dataclass
class Options:
    ckpt: str = MISSING
    root: str | None = None
    cache_dir: str | None = None
    accelerator: str = "auto"


@dataclass(frozen=True)
class Evaluation:
    """Metrics of a checkpoint: split -> group of targets -> metric, and what they were measured on."""

    results: dict[str, dict[str, dict[str, float]]]
    identity: dict[str, str]

    def plain(self) -> dict[str, Any]:
        return asdict(self)


def evaluate(trainer: L.Trainer, module: Recommender, datamodule: DataModule, ckpt: Path) -> Evaluation:
    """Validation and test metrics of a checkpoint, and the popularity floor."""
    for run in (trainer.validate, trainer.test):
        run(module, datamodule, ckpt_path=ckpt, verbose=False, weights_only=True)
    return Evaluation(module.results, module.identity)


def load_checkpoint(path: Path) -> dict[str, Any]:
    """A checkpoint's content; never runs code from the file. Tensors are mapped, and read when they are used.

    Raises:
        CheckpointError: no such file, a folder, torn, or not one of hllm.train's.
    """
    refuse_folder("ckpt", path)
    if not path.is_file():
        raise CheckpointError(f"ckpt={path}: no such file; runs keep theirs in RUN/checkpoints/best.ckpt")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        assert isinstance(checkpoint["hyper_parameters"]["config"], dict)
    except Exception as error:  # there is hardly an error that unpickling torn bytes does not raise
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise CheckpointError(f"ckpt={path}: torn, or not a checkpoint of hllm.train ({reason})") from error
    return cast(dict[str, Any], checkpoint)


def checkpoint_config(path: Path, root: str | None, cache_dir: str | None) -> Config:
    """The config a checkpoint was trained with, reading data and cache from where they are now."""
    config = from_plain(load_checkpoint(path)["hyper_parameters"]["config"])
    dataset = config.dataset if root is None else replace(config.dataset, root=root)
    return replace(config, dataset=dataset, cache_dir=cache_dir or config.cache_dir)


@report_errors
def main(arguments: list[str] | None = None) -> None:
    options = parse(Options, sys.argv[1:] if arguments is None else arguments, USAGE)
    quiet_libraries()
    path = Path(options.ckpt)
    config = checkpoint_config(path, options.root, options.cache_dir)
    alone = replace(config.trainer, accelerator=options.accelerator, devices=1, num_nodes=1, strategy=Strategy.auto)
    config = replace(config, trainer=alone)
    datamodule = build_datamodule(config)
    module = build_module(config, datamodule, read_weights=False)
    trainer = build_trainer(config, path.parent, loggers=[], callbacks=[])
    evaluation = evaluate(trainer, module, datamodule, path)
    print(full_report(evaluation.results, evaluation.identity, f"{config.system} {config.loss.name}"))


if __name__ == "__main__":
    main()
