"""python -m hllm.train: compose -> check -> train, with Hydra overrides.

The command hands Hydra the metric that a sweep optimises, so that any Hydra sweeper can drive it.
"""

import sys
from pathlib import Path
from string import Template

import hydra
from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from hllm.cli import report_errors
from hllm.config import CONF_DIR, check, composition_message
from hllm.errors import ConfigError


@report_errors
def _run(cfg: DictConfig) -> float:
    config = check(cfg)
    if config.trainer.devices * config.trainer.num_nodes > 1 and HydraConfig.get().mode is RunMode.MULTIRUN:
        raise ConfigError(
            f"trainer.devices={config.trainer.devices}: a sweep runs each job on one device, because the other "
            "processes of a job would start the whole sweep again"
        )
    from hllm.fit import train  # here, because help and a wrong flag need not wait for torch and Lightning

    results = train(config, Path(HydraConfig.get().runtime.output_dir)).results
    split, name = config.optimized_metric.split("/")
    return results[split]["all"][name]


_hydra_main = hydra.main(version_base="1.3", config_path=CONF_DIR, config_name="train")(_run)


def main() -> None:
    """The command: ``key=value`` overrides and Hydra's flags, from ``sys.argv``."""
    arguments = sys.argv[1:]
    if {"-h", "--help"} & set(arguments):
        _print_help([argument for argument in arguments if not argument.startswith("-")])
    else:
        _hydra_main()


@report_errors
def _print_help(overrides: list[str]) -> None:
    """conf/train.yaml's help text. Hydra itself would first list all groups, which takes three times as long."""
    with initialize_config_dir(CONF_DIR, version_base="1.3"):
        try:
            cfg = compose("train", overrides, return_hydra_config=True)
        except (HydraException, OmegaConfBaseException) as error:
            raise ConfigError(composition_message(error)) from error
    template = Template(cfg.hydra.help.template)
    with open_dict(cfg):
        del cfg["hydra"]
    print(template.substitute(CONFIG=OmegaConf.to_yaml(cfg)))


if __name__ == "__main__":
    main()
