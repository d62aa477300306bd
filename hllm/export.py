"""python -m hllm.export: a checkpoint's language models -> plain Hugging Face folders, and what stands beside them.

``FOLDER/item_llm`` and ``FOLDER/user_llm`` are read by ``transformers.AutoModel.from_pretrained``; ``hllm.safetensors``
holds the other weights by their names in a checkpoint, and ``hllm.json`` how texts become vectors. The data set is not
read. E width of the Item LLM, D width of the user model.
"""

import contextlib
import json
import os
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from omegaconf import MISSING
from torch import Tensor, nn

import hllm
from hllm.build import cache_dir
from hllm.cli import parse, quiet_libraries, report_errors
from hllm.config import Config, LLMConfig, LLMItemsConfig, LLMUserConfig, to_plain
from hllm.disk import TEMPORARY, file_digests, locked, sync_tree
from hllm.errors import CacheError, ConfigError
from hllm.evaluate import checkpoint_config, load_checkpoint
from hllm.items.backbone import load_trainable, quiet_transformers
from hllm.items.files import ITEM_TOKEN, locate
from hllm.weights import check_fit, lora_scales, merge_lora

USAGE = """usage: python -m hllm.export ckpt=RUN/checkpoints/best.ckpt out=FOLDER [cache_dir=FOLDER]

Writes the language models of a checkpoint as Hugging Face folders: FOLDER/item_llm and FOLDER/user_llm.
  ckpt       a checkpoint of hllm.train or hllm.official
  out        a new folder
  cache_dir  downloads, if not where the run kept them"""

ITEM_LLM, USER_LLM = "item_llm", "user_llm"


@dataclass
class Options:
    ckpt: str = MISSING
    out: str = MISSING
    cache_dir: str | None = None


def export(ckpt: Path, config: Config, out: Path) -> list[str]:
    """Write all there is of a checkpoint, whole or not at all; low-rank updates are merged.

    Args:
        config: as ``checkpoint_config`` gives it.
        out: new or empty.

    Returns:
        What stands in the folder.

    Raises:
        ConfigError: there is something in the folder, or the checkpoint has no language model of its own.
        CheckpointError: torn, or the language model's configuration is not what it was at training.
        LLMError: configuration or tokenizer of a language model cannot be had.
        CacheError: the folder cannot be written.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"out={out}: is there already, and not an empty folder; give a new one, or remove it")
    if not isinstance(config.items, LLMItemsConfig) and not isinstance(config.user, LLMUserConfig):
        raise ConfigError(
            f"ckpt={ckpt}: items={config.items.name} user={config.user.name} train no language model, so there is none "
            "to export; items=llm and user=llm do"
        )
    checkpoint = load_checkpoint(ckpt)
    state = _merged(checkpoint, config)
    with _appearing(out) as folder:
        if isinstance(config.items, LLMItemsConfig):
            _export_item_llm(ckpt, config, state, folder / ITEM_LLM)
        if isinstance(config.user, LLMUserConfig):
            _export_user_llm(ckpt, config, state, folder / USER_LLM)
        rest = {name: tensor for name, tensor in state.items() if not _in_folders(name)}
        rest.setdefault("head.log_scale", -torch.tensor(config.head.temperature).log())
        _save_tensors(rest, folder / "hllm.safetensors")
        (folder / "hllm.json").write_text(json.dumps(_description(config, checkpoint, state), indent=2) + "\n")
    return sorted(path.name for path in out.iterdir())


def cached_item_llm(ckpt: Path, config: Config) -> Path:
    """The Item LLM of a checkpoint as a folder below ``cache_dir``, written once however often it is asked for.

    Raises:
        ConfigError: the checkpoint has no Item LLM of its own.
        CheckpointError, LLMError, CacheError: as ``export``.
    """
    if not isinstance(config.items, LLMItemsConfig):
        raise ConfigError(f"ckpt={ckpt}: items={config.items.name} trains no Item LLM; its items are embedded by llm=")
    checkpoint = load_checkpoint(ckpt)
    home = cache_dir(config) / "exports" / file_digests([ckpt], cache_dir(config))[0][:20]
    with locked(home / ".lock", f"exporting {ckpt}"):
        folder = home / ITEM_LLM
        if not folder.is_dir():
            for stale in home.glob(f"{TEMPORARY}*"):
                shutil.rmtree(stale)
            with _appearing(folder) as temporary:
                _export_item_llm(ckpt, config, _merged(checkpoint, config), temporary)
    return folder


def _merged(checkpoint: dict[str, Any], config: Config) -> dict[str, Tensor]:
    state = dict(checkpoint["state_dict"])
    for tower, scale in lora_scales(config).items():
        merge_lora(state, tower, scale)
    return state


def _in_folders(name: str) -> bool:
    return name.startswith(("items.model.", "users.model.")) or name == "items.item_token"


def _export_item_llm(ckpt: Path, config: Config, state: dict[str, Tensor], folder: Path) -> None:
    model, tokenizer = _body(config.llm, config)
    _fill(model, state, "items.model.", ckpt, config.llm)
    if hasattr(model, "pooler") and model.pooler is None:
        # a BERT's: no vector goes through it, but programs that load the folder look for it
        with torch.random.fork_rng(devices=[]):
            model.pooler = type(model)(model.config).pooler.to(model.dtype)
        for parameter in model.pooler.parameters():
            nn.init.zeros_(parameter)
    _save(model, folder)
    for option in ("local_files_only", "trust_remote_code"):  # how it was read here
        tokenizer.init_kwargs.pop(option, None)
    tokenizer.save_pretrained(folder)
    if "items.item_token" in state:
        _save_tensors({"item_token": state["items.item_token"]}, folder / ITEM_TOKEN)


def _export_user_llm(ckpt: Path, config: Config, state: dict[str, Tensor], folder: Path) -> None:
    assert config.user_llm is not None
    model, _ = _body(config.user_llm, config)
    # it reads vectors; a vocabulary of one word that nobody uses makes it a model that every program loads
    table = nn.Embedding(1, model.config.hidden_size, _weight=torch.zeros(1, model.config.hidden_size))
    model.set_input_embeddings(table)
    model.config.vocab_size = 1
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        setattr(model.config, name, None)
    name = next(name for name, module in model.named_modules() if module is table)
    state = {**state, f"users.model.{name}.weight": table.weight.detach()}
    _fill(model, state, "users.model.", ckpt, config.user_llm)
    _save(model, folder)


def _body(llm: LLMConfig, config: Config) -> tuple[Any, Any]:
    """A model of the right shape, its weights to be filled in, and the tokenizer."""
    files = locate(llm, cache_dir(config), weights=False)
    with torch.random.fork_rng(devices=[]):
        return load_trainable(files, replace(llm, pretrained=False))


def _fill(model: Any, state: dict[str, Tensor], prefix: str, ckpt: Path, llm: LLMConfig) -> None:
    given = {name: tensor for name, tensor in state.items() if name.startswith(prefix)}
    expected = {prefix + name: tensor for name, tensor in model.state_dict().items()}
    remedy = f"the model at {llm.model or llm.name} is not the one it was trained from: put that back"
    check_fit(expected, given, {}, f"ckpt={ckpt}", lambda _: remedy)
    model.to(next(iter(given.values())).dtype)  # as it was trained
    model.load_state_dict({name.removeprefix(prefix): tensor for name, tensor in given.items()})


def _save(model: Any, folder: Path) -> None:
    with quiet_transformers():
        model.save_pretrained(folder)


def _save_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    # each with memory of its own: safetensors refuses views of one
    safetensors.torch.save_file({name: tensor.clone().contiguous() for name, tensor in tensors.items()}, path)


def _description(config: Config, checkpoint: dict[str, Any], state: dict[str, Tensor]) -> dict[str, Any]:
    """How item texts become vectors and vectors scores, and what the weights were trained on."""
    plain = to_plain(config)
    llm = {key: plain["llm"][key] for key in ("name", "pooling", "positions", "max_tokens")}
    user = {"kind": config.user.name, "max_history": config.dataset.max_history}
    if (user_llm := config.user_llm) is not None:
        user["llm"] = user_llm.name
    return {
        "format": 1,
        "hllm": hllm.__version__,
        "items": {"kind": config.items.name, "llm": llm, "projector": "items.projector.weight" in state},
        "user": user,
        "head": plain["head"],
        "text": plain["dataset"]["text"],
        "trained_on": checkpoint["identity"],
    }


@contextlib.contextmanager
def _appearing(out: Path) -> Iterator[Path]:
    """A folder to write into that becomes ``out`` at the end; on an error nothing is left."""
    temporary = out.parent / f"{TEMPORARY}{os.getpid()}-{out.name}"
    try:
        temporary.mkdir(parents=True)
        yield temporary
        for folder in [temporary, *(path for path in temporary.rglob("*") if path.is_dir())]:
            sync_tree(folder)
        temporary.replace(out)
    except (OSError, safetensors.SafetensorError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise CacheError(f"cannot write {temporary}: {reason}. Free space or mend the rights there") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@report_errors
def main(arguments: list[str] | None = None) -> None:
    options = parse(Options, sys.argv[1:] if arguments is None else arguments, USAGE)
    quiet_libraries()
    path, out = Path(options.ckpt), Path(options.out)
    names = export(path, checkpoint_config(path, None, options.cache_dir), out)
    print(f"{out}: {', '.join(names)}")


if __name__ == "__main__":
    main()
