"""python -m hllm.embed: item text -> EmbeddingStore, alone. Takes the same groups as hllm.train."""

import hydra
from omegaconf import DictConfig

from hllm.build import build_datamodule, cache_dir
from hllm.cli import quiet_libraries, report_errors
from hllm.config import CONF_DIR, check
from hllm.items.cache import embed_catalog
from hllm.items.tower import mean_cosine


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


main = hydra.main(version_base="1.3", config_path=CONF_DIR, config_name="train")(_run)

if __name__ == "__main__":
    main()
