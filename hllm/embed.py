"""python -m hllm.embed: item text -> EmbeddingStore, alone. Takes the same groups as hllm.train.

``python -m hllm.embed show`` shows the texts instead, without loading the model.
"""

import sys

import hydra
from omegaconf import DictConfig

from hllm.build import build_datamodule, cache_dir
from hllm.cli import quiet_libraries, report_errors
from hllm.config import CONF_DIR, check
from hllm.items.cache import embed_catalog
from hllm.items.tower import mean_cosine
from hllm.show import show


@report_errors
def _run(cfg: DictConfig) -> None:
    quiet_libraries()
    config = check(cfg)
    catalog = build_datamodule(config).catalog
    table = embed_catalog(catalog, config.dataset.text, config.llm, cache_dir(config))
    items, width = table.vectors.shape
    print(
        f"{config.dataset.name}: {items} items x {width} by {config.llm.name}, "
        f"mean cosine {mean_cosine(table.vectors.float()):.3f}, fingerprint {table.fingerprint}"
    )


_embed = hydra.main(version_base="1.3", config_path=CONF_DIR, config_name="train")(_run)


def main() -> None:
    if sys.argv[1:2] == ["show"]:
        show(sys.argv[2:])
    else:
        _embed()


if __name__ == "__main__":
    main()
