"""python -m hllm.embed: item text -> EmbeddingStore, alone. Takes the same groups as hllm.train.

``python -m hllm.embed show`` shows the texts instead, without loading the model. ``python -m hllm.embed ckpt=...``
embeds with the Item LLM that a run of items=llm has tuned: stage II of HLLM (arXiv 2409.12740, 4.4) trains a user model
on those vectors.
"""

import re
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from enum import Enum
from pathlib import Path
from typing import Any

import hydra
from omegaconf import MISSING, DictConfig

from hllm.build import build_datamodule, cache_dir
from hllm.cli import parse, quiet_libraries, report_errors
from hllm.config import CONF_DIR, Config, Dtype, LLMConfig, LLMUserConfig, check, compose
from hllm.evaluate import checkpoint_config
from hllm.export import cached_item_llm
from hllm.items.backbone import choose_device, choose_dtype, has_fast_bfloat16
from hllm.items.cache import embed_catalog
from hllm.items.store import ItemTable
from hllm.items.tower import mean_cosine
from hllm.show import show
from hllm.weights import read_weights

USAGE = """usage: python -m hllm.embed ckpt=RUN/checkpoints/best.ckpt [root=FOLDER] [cache_dir=FOLDER]

Embeds the catalogue with the Item LLM that a run of items=llm has tuned, and prints the flags that train and serve on
the vectors. The Item LLM is exported into the cache first.
  ckpt       a checkpoint of hllm.train or hllm.official
  root       the data set's raw files, if not where the run read them
  cache_dir  downloads and item embeddings, if not where the run kept them
  dtype      of the vectors: auto, float32, bfloat16, float16
  device     auto, cpu, cuda, cuda:N"""


SOURCE = ("name", "model", "wheel", "gguf_file", "revision")
"Of an LLM's flags, those that say which one it is."


@dataclass
class Options:
    ckpt: str = MISSING
    root: str | None = None
    cache_dir: str | None = None
    dtype: Dtype = Dtype.auto
    device: str = "auto"


@report_errors
def _run(cfg: DictConfig) -> None:
    quiet_libraries()
    config = check(cfg)
    catalog = build_datamodule(config).catalog
    table = embed_catalog(catalog, config.dataset.text, config.llm, cache_dir(config))
    _report(config, config.llm, table)


def _report(config: Config, llm: LLMConfig, table: ItemTable) -> None:
    items, width = table.vectors.shape
    print(
        f"{config.dataset.name}: {items} items x {width} by {llm.name}, "
        f"mean cosine {mean_cosine(table.vectors.float()):.3f}, fingerprint {table.fingerprint}"
    )


def tuned_llm(ckpt: Path, config: Config, dtype: Dtype = Dtype.auto, device: str = "auto") -> LLMConfig:
    """The Item LLM of a checkpoint for ``items=cached``: exported into the cache, to be read as it was trained.

    Args:
        config: as ``checkpoint_config`` gives it.
        dtype: of the vectors; auto is settled for this machine, so that others make the same table.

    Raises:
        ConfigError, CheckpointError, LLMError, CacheError: as ``cached_item_llm``.
    """
    folder, place = cached_item_llm(ckpt, config), choose_device(device)
    chosen = Dtype(str(choose_dtype(dtype, place, has_fast_bfloat16(place))).removeprefix("torch."))
    return replace(
        config.llm,
        name=f"{config.llm.name}-tuned",
        model=str(folder),
        wheel=None,
        gguf_file=None,
        revision=None,
        pretrained=True,
        num_layers=None,  # the folder has no more
        dtype=chosen,
        device=device,
    )


def stage_two_flags(config: Config, llm: LLMConfig, ckpt: Path) -> list[str]:
    """Flags of hllm.train for a run like a checkpoint's, on the vectors of its Item LLM; its data set's come beside.

    Args:
        config: the checkpoint's.
        llm: as ``tuned_llm`` gives it.
    """
    weights = read_weights(ckpt)
    adaptor = "linear" if "items.projector.weight" in weights.tensors else "none"
    flags = ["items=cached", "items.transform=raw", f"items.adaptor={adaptor}", "llm=custom"]
    flags += differences("llm", LLMConfig(name="custom", model=""), llm)
    flags += [f"user={config.user.name}", f"init={quoted(str(ckpt))}"]
    base = compose(flags)
    user = config.user
    if isinstance(user, LLMUserConfig):
        given = user.llm or config.llm  # llm= is the tuned Item LLM now
        known = LLMConfig(name="custom", model="")
        if _in_conf("llm", given.name):
            known = compose([f"llm={given.name}"]).llm
        flags.append(f"llm@user.llm={known.name}")
        flags += differences("user.llm", known, replace(known, **{name: getattr(given, name) for name in SOURCE}))
        user = replace(user, llm=None)
    flags += differences("user", base.user, user)
    flags += differences("head", base.head, config.head)
    name = config.dataset.name  # a data set of one's own has no file, and all is said of it
    known_text = compose([f"dataset={name}"]).dataset.text if _in_conf("dataset", name) else None
    return flags + differences("dataset.text", known_text, config.dataset.text)


def differences(prefix: str, base: Any, wanted: Any) -> list[str]:
    """Flags that turn one dataclass of the config into another of its kind; all flags where the first is None."""
    flags = []
    for field in fields(wanted):
        before, value = None if base is None else getattr(base, field.name), getattr(wanted, field.name)
        if base is not None and before == value:
            continue
        if is_dataclass(value):
            flags += differences(f"{prefix}.{field.name}", before, value)
        elif not isinstance(value, dict):
            flags.append(f"{prefix}.{field.name}={quoted(value)}")
    return flags


def quoted(value: Any) -> str:
    """A value as Hydra's grammar reads it."""
    if value is None:
        return "null"
    if isinstance(value, list):
        return "[" + ",".join(map(quoted, value)) + "]"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, Enum):
        return value.name
    text = str(value)
    if re.fullmatch(r"[\w./+-]+", text):
        return text
    return '"' + text.replace('"', r"\"").replace("${", r"\${") + '"'


def _in_conf(group: str, name: str) -> bool:
    return (Path(CONF_DIR) / group / f"{name}.yaml").is_file()


_embed = hydra.main(version_base="1.3", config_path=CONF_DIR, config_name="train")(_run)


@report_errors
def embed_checkpoint(arguments: Sequence[str]) -> None:
    """The command's ``ckpt=`` form."""
    options = parse(Options, arguments, USAGE)
    quiet_libraries()
    ckpt = Path(options.ckpt)
    config = checkpoint_config(ckpt, options.root, options.cache_dir)
    llm = tuned_llm(ckpt, config, options.dtype, options.device)
    catalog = build_datamodule(config).catalog
    table = embed_catalog(catalog, config.dataset.text, llm, cache_dir(config))
    _report(config, llm, table)
    flags = stage_two_flags(config, llm, ckpt)
    print("\nStage II, with the run's flags of dataset=:\n\npython -m hllm.train " + shlex.join(flags))


def main() -> None:
    if sys.argv[1:2] == ["show"]:
        show(sys.argv[2:])
    elif any(argument.startswith("ckpt=") for argument in sys.argv[1:]):
        embed_checkpoint(sys.argv[1:])
    else:
        _embed()


if __name__ == "__main__":
    main()
