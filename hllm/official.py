"""python -m hllm.official: weights of the official code -> a run's checkpoint, without training.

Takes the groups and flags of hllm.train; ``init=`` names the file. The commands that read a checkpoint then work on it.
"""

from dataclasses import replace
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from hllm.build import build_datamodule, build_module, build_trainer, cache_dir, pin_dtype, pin_template
from hllm.cli import quiet_libraries, report_errors
from hllm.config import CONF_DIR, Config, Strategy, check
from hllm.errors import ConfigError
from hllm.items.cache import embed_catalog
from hllm.items.tower import CachedItems
from hllm.tracking import write_run_info
from hllm.weights import load_weights, read_weights


def write_checkpoint(config: Config, run_dir: Path) -> Path:
    """Write ``run_dir``/checkpoints/best.ckpt with the weights of ``init``; its path.

    Args:
        config: checked; its data set is read, because a checkpoint says what it is evaluated on.

    Raises:
        ConfigError: no ``init``.
        CheckpointError: the file is torn, or does not fit the config.
    """
    if config.init is None:
        raise ConfigError("init= is missing: the official code's pytorch_model.bin, whose weights are to be taken")
    weights = read_weights(Path(config.init))  # a wrong file shows before the data is read
    config = pin_dtype(config)
    datamodule = build_datamodule(config)
    config = pin_template(config, datamodule.catalog)
    write_run_info(config, run_dir)
    module = build_module(config, datamodule, read_weights=False)
    if isinstance(module.items, CachedItems):
        table = embed_catalog(datamodule.catalog, config.dataset.text, config.llm, cache_dir(config))
        module.items.attach(table)
    load_weights(module, weights)
    alone = replace(config.trainer, devices=1, num_nodes=1, strategy=Strategy.auto, accelerator="cpu")
    trainer = build_trainer(replace(config, trainer=alone), run_dir, loggers=[], callbacks=[])
    trainer.strategy.connect(module)
    path = run_dir / "checkpoints" / "best.ckpt"
    trainer.save_checkpoint(path, weights_only=True)
    return path


@report_errors
def _run(cfg: DictConfig) -> None:
    quiet_libraries()
    path = write_checkpoint(check(cfg), Path(HydraConfig.get().runtime.output_dir))
    print(f"{path}\n\npython -m hllm.evaluate ckpt={path}")


main = hydra.main(version_base="1.3", config_path=CONF_DIR, config_name="train")(_run)

if __name__ == "__main__":
    main()
