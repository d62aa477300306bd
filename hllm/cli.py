"""What the entry points share: errors as one line, and ``key=value`` arguments that take any text."""

import logging
import sys
import warnings
from collections.abc import Callable, Sequence
from errno import EACCES, EDQUOT, ENOSPC, EPERM, EROFS
from functools import wraps
from typing import Any, ParamSpec, TypeVar, cast

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from hllm.errors import ConfigError, HllmError

P = ParamSpec("P")
R = TypeVar("R")
T = TypeVar("T")


def report_errors(function: Callable[P, R]) -> Callable[P, R]:
    """Print an error that a person can mend as one line and exit with status 1; others keep their traceback.

    Mendable are ours, and a full disk or missing rights anywhere. In a multirun it is raised on, so that Hydra marks
    the job as failed and goes on with the others.
    """

    @wraps(function)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return function(*args, **kwargs)
        except (HllmError, OSError) as error:
            mendable = isinstance(error, HllmError) or error.errno in (ENOSPC, EDQUOT, EACCES, EPERM, EROFS)
            if not mendable:
                raise
            print(f"error: {error}", file=sys.stderr)
            if HydraConfig.initialized() and HydraConfig.get().mode is RunMode.MULTIRUN:
                raise
            raise SystemExit(1) from error

    return wrapper


def quiet_libraries() -> None:
    """Mute what Lightning says on every run and nobody acts on."""
    for name in ("lightning.pytorch.utilities.rank_zero", "lightning.pytorch.accelerators.cuda", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    # one batch gather takes less than a millisecond: loader workers would only cost memory
    warnings.filterwarnings("ignore", ".*does not have many workers.*")
    warnings.filterwarnings("ignore", ".*Checkpoint directory .* exists and is not empty.*")
    # metrics.csv stands in the run folder, beside config.yaml
    warnings.filterwarnings("ignore", ".*Experiment logs directory .* exists and is not empty.*")
    # evaluation needs neither early stopping nor checkpointing
    warnings.filterwarnings("ignore", ".*callbacks used to create the checkpoint need to be provided.*")
    # a frozen language model
    warnings.filterwarnings("ignore", ".*module\\(s\\) in eval mode at the start of training.*")
    # every process logs the same value: metrics were summed over all of them, losses averaged
    warnings.filterwarnings("ignore", ".*It is recommended to use `self.log.*sync_dist=True.*")
    # Lightning 2.6 with torch 2.13
    warnings.filterwarnings("ignore", ".*isinstance\\(treespec, LeafSpec\\).*")
    warnings.filterwarnings("ignore", ".*The number of training batches .* is smaller than the logging interval.*")
    # torch 2.13 to itself, when it gathers a checkpoint under fsdp
    warnings.filterwarnings("ignore", ".*_get_pg_default_device. will be deprecated.*")
    warnings.filterwarnings("ignore", ".*Multiple backends are registered with this ProcessGroup.*")


def split_own(arguments: Sequence[str], names: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """An entry point's own ``key=value`` arguments, "" where one is not given, and the others, which are Hydra's.

    Own values are taken as they stand: Hydra's grammar would read the commas and brackets of titles.
    """
    own, overrides = dict.fromkeys(names, ""), []
    for argument in arguments:
        key, _, value = argument.partition("=")
        if key in own:
            own[key] = value
        else:
            overrides.append(argument)
    return own, overrides


def parse(schema: type[T], arguments: Sequence[str], usage: str) -> T:
    """``key=value`` arguments as a dataclass; a value is taken as it stands.

    Hydra's own grammar would read the commas, colons, brackets and equals signs of titles and paths.

    Raises:
        ConfigError: an unknown key, a wrong type, or a required key left out; the message ends with the usage.
        SystemExit: after printing the usage, for ``--help``.
    """
    if any(argument in ("-h", "--help") for argument in arguments):
        print(usage)
        raise SystemExit(0)
    values: dict[str, Any] = {}
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if not equals:
            raise ConfigError(f"{argument!r} is not of the form key=value\n{usage}")
        values[key.lstrip("-")] = value.replace("${", r"\${")  # else OmegaConf would look it up
    try:
        config = OmegaConf.merge(OmegaConf.structured(schema), values)
    except OmegaConfBaseException as error:
        raise ConfigError(f"{str(error).splitlines()[0]}\n{usage}") from error
    if missing := sorted(str(key) for key in OmegaConf.missing_keys(config)):
        raise ConfigError(f"{missing[0]}= is missing\n{usage}")
    return cast(T, OmegaConf.to_object(config))
