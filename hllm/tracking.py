"""What a run leaves behind: names and tags for dashboards, loggers, and the files of the run folder."""

import json
import logging
import netrc
import os
import platform
import subprocess
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch
from lightning.pytorch.loggers import CSVLogger, Logger
from lightning.pytorch.utilities import rank_zero_only
from omegaconf import OmegaConf
from torch import Tensor

from hllm import __version__
from hllm.config import Config, WandbMode, to_plain
from hllm.data.base import DataModule

log = logging.getLogger(__name__)

PACKAGES = ("torch", "lightning", "transformers", "torchmetrics", "hydra-core", "polars", "numpy")


def run_name(config: Config) -> str:
    """Dataset, system, loss, layers and seed: enough to tell two runs of a sweep apart."""
    return f"{config.dataset.name}-{config.system}-{config.loss.name}-{config.user_layers}layers-seed{config.seed}"


def run_tags(config: Config) -> list[str]:
    """What dashboards group and filter by."""
    tags = [
        f"dataset:{config.dataset.name}",
        f"system:{config.system}",
        f"loss:{config.loss.name}",
        f"layers:{config.user_layers}",
    ]
    if config.system.startswith("hllm"):
        tags.append(f"llm:{config.llm.name}")
    if config.experiment_name:
        tags.append(f"experiment:{config.experiment_name}")
    return tags


def wandb_offline(mode: WandbMode) -> bool:
    """Whether to log offline: as told, else unless a wandb key is at hand. Looks at files only, never at a network."""
    if mode is not WandbMode.auto:
        return mode is WandbMode.offline
    if (chosen := os.environ.get("WANDB_MODE")) is not None:
        return chosen != "online"
    if os.environ.get("WANDB_API_KEY"):
        return False
    try:
        logins = netrc.netrc(os.environ.get("NETRC"))
    except (OSError, netrc.NetrcParseError):
        return True
    return not any("wandb" in host for host in logins.hosts)


def build_loggers(config: Config, run_dir: Path) -> list[Logger]:
    """metrics.csv in the run folder always, and wandb unless disabled."""
    loggers: list[Logger] = [CSVLogger(run_dir, name="", version="")]
    if config.logger.wandb is not WandbMode.disabled and os.environ.get("WANDB_MODE") != "disabled":
        wandb_logger = rank_zero_only(_wandb_logger)(config, run_dir)  # one of several processes
        loggers += [] if wandb_logger is None else [wandb_logger]
    return loggers


def _wandb_logger(config: Config, run_dir: Path) -> Logger:
    import wandb  # half a second, and only runs that log to it need it
    from lightning.pytorch.loggers import WandbLogger

    def start(offline: bool) -> wandb.Run:
        return wandb.init(
            project=config.logger.project,
            name=run_name(config),
            group=config.logger.group or f"{config.dataset.name}-{config.system}",
            tags=run_tags(config),
            config=to_plain(config),
            dir=run_dir,
            mode="offline" if offline else "online",
            settings=wandb.Settings(silent=True, init_timeout=20),
        )

    wandb.finish()  # the jobs of a sweep share a process: without this they would all go on with the first one's run
    offline = wandb_offline(config.logger.wandb)
    try:
        run = start(offline)
    except Exception as error:  # wandb raises many kinds; losing a run to its tracker would be worse
        log.warning("wandb cannot be reached (%s): logging offline; `wandb sync` uploads the run later", error)
        wandb.teardown()
        run = start(offline := True)
    log.info("wandb run, %s: %s", "offline" if offline else "online", Path(run.dir).parent if offline else run.url)
    return WandbLogger(experiment=run)


def git_revision() -> str | None:
    """Commit of the checkout this package runs from, with '-dirty' for uncommitted changes; None outside of one."""
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        # a package installed somewhere below another project's checkout is not of that project's revision
        subprocess.run([*git, "ls-files", "--error-unmatch", Path(__file__).name], capture_output=True, check=True)
        describe = [*git, "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
        return subprocess.run(describe, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def environment() -> dict[str, Any]:
    """Versions and machine, so that a number can be traced."""
    return {
        "git": git_revision(),
        "hllm": __version__,
        "python": platform.python_version(),
        **{package: version(package) for package in PACKAGES},
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def write_run_info(config: Config, run_dir: Path) -> None:
    """config.yaml, resolved, and environment.json."""
    run_dir.mkdir(parents=True, exist_ok=True)
    (run_dir / "config.yaml").write_text(OmegaConf.to_yaml(OmegaConf.create(to_plain(config))))
    write_json(run_dir / "environment.json", environment())


def write_ranks(path: Path, test_ranks: Sequence[tuple[Tensor, ...]], datamodule: DataModule) -> None:
    """Each test user's target and its rank, by original ids: ``hllm.compare`` can then set two runs side by side.

    Beside them stand what results are broken down by: the target's events in training, whether it was held out of it,
    and the user's events before it.

    Args:
        test_ranks: batches of (B,) users, targets, ranks and events before the target, as ``Recommender.test_ranks``.
    """
    users, targets, ranks, histories = (torch.cat(column).numpy() for column in zip(*test_ranks, strict=True))
    order = np.argsort(users, kind="stable")
    columns = {
        "user": datamodule.user_ids(users[order]),
        "target": datamodule.catalog.ids[targets[order] - 1],
        "rank": ranks[order],
        "target_count": datamodule.train_counts.numpy()[targets[order]],
        "cold": datamodule.is_cold(torch.from_numpy(targets[order])).numpy(),
        "history": histories[order],
    }
    pl.DataFrame(columns).write_parquet(path)


def write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")
