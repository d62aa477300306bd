"""python -m hllm.train: compose -> check -> train, with Hydra overrides.

The command hands Hydra the metric that a sweep optimises, so that any Hydra sweeper can drive it.
"""

from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from hllm.cli import report_errors
from hllm.config import CONF_DIR, check
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


main = hydra.main(version_base="1.3", config_path=CONF_DIR, config_name="train")(_run)

if __name__ == "__main__":
    main()
