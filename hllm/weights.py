"""Weights of a file into a model, name by name: the official code's pytorch_model.bin, or a checkpoint of hllm.train.

Nothing is left to chance: a weight that the file lacks, one that has no place in the model and one of another shape
are errors. What the official file holds for nothing is dropped by an explicit list. D width, E width of the Item LLM.
"""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor

from hllm.config import (
    Adaptor,
    CachedItemsConfig,
    Config,
    FusedItemsConfig,
    LLMItemsConfig,
    LLMUserConfig,
    LoraConfig,
    Transform,
    from_plain,
)
from hllm.errors import CheckpointError
from hllm.items.baichuan import llama_weights
from hllm.items.llm import LLMItems
from hllm.items.tower import CachedItems, FusedItems, ItemTower
from hllm.module import Recommender

log = logging.getLogger(__name__)

BODIES = {"item_llm.": "items.model.", "user_llm.": "users.model."}
"The official file's beginnings of names, and ours."
UNUSED = ("lm_head.", "pooler.")
"Parts of the official models that no item vector and no user vector goes through: vocabulary heads, a BERT's pooler."
COMPUTED = "rotary_emb.inv_freq"
"The model computes it from its configuration."
TUNING = {"items.": "items.tuning", "users.": "user.tuning"}
"Flags of how the weights that begin so are tuned."
VOCABULARY = "embed_tokens."
"The User LLM reads vectors, never words."


@dataclass
class Weights:
    """What a file holds for a Recommender.

    Args:
        path: the file.
        tensors: by their names in a Recommender; mapped from the file, not read yet.
        names: what the file calls those that it calls otherwise.
        items: kind of the item tower: llm, fused, cached or id.
        identity: what they were trained on; the official file does not say.
        lora_scales: factor on the low-rank updates, by beginning of the names.
    """

    path: Path
    tensors: dict[str, Tensor]
    names: dict[str, str] = field(default_factory=dict)
    items: str = "llm"
    identity: dict[str, str] = field(default_factory=dict)
    lora_scales: dict[str, float] = field(default_factory=dict)

    def replace_all(self, config: Config) -> bool:
        """Whether they replace every weight of the language models that a config trains."""
        return self.items == _kind(config.items) or not isinstance(config.items, LLMItemsConfig)


class InitialWeights(L.Callback):
    """Starts a run from the weights of a file: after item vectors are attached, before optimizers exist."""

    def __init__(self, weights: Weights) -> None:
        self.weights = weights

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        assert isinstance(pl_module, Recommender)
        if stage == "fit":
            load_weights(pl_module, self.weights)
            self.weights.tensors.clear()  # lets go of the file


def read_weights(path: Path) -> Weights:
    """A file's weights; no code of the file is run.

    Raises:
        CheckpointError: no such file, a folder, torn, of neither form, or with a part that hllm cannot use.
    """
    refuse_folder("init", path)
    if not path.is_file():
        raise CheckpointError(f"init={path}: no such file; give a pytorch_model.bin or RUN/checkpoints/best.ckpt")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # there is hardly an error that unpickling torn bytes does not raise
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise CheckpointError(f"init={path}: torn, or not a file of weights ({reason})") from error
    if isinstance(content, dict) and {"state_dict", "hyper_parameters", "identity"} <= content.keys():
        return _own_weights(path, content)
    plain = isinstance(content, dict) and all(isinstance(part, Tensor) for part in content.values())
    if plain and any(str(name).startswith(tuple(BODIES)) for name in content):
        return _official_weights(path, content)
    raise CheckpointError(f"init={path}: neither a checkpoint of hllm.train nor the official code's pytorch_model.bin")


def refuse_folder(flag: str, path: Path) -> None:
    """Raises CheckpointError where a checkpoint is a folder: DeepSpeed's, or one that checkpoints lie in."""
    if path.is_dir():
        raise CheckpointError(
            f"{flag}={path}: is a folder; give a file, RUN/checkpoints/best.ckpt. Under trainer.strategy=deepspeed_* a "
            "run writes folders, which hllm does not read (docs/scale.md); ddp and fsdp write files"
        )


def _own_weights(path: Path, content: dict[str, Any]) -> Weights:
    config = from_plain(content["hyper_parameters"]["config"])
    return Weights(path, dict(content["state_dict"]), {}, _kind(config.items), content["identity"], lora_scales(config))


def _official_weights(path: Path, content: dict[str, Any]) -> Weights:
    weights = Weights(path, {})
    num_unused = 0
    for theirs, ours in BODIES.items():
        for name in [name for name in content if name.startswith(theirs)]:
            parts = llama_weights({name: content[name]}) if "W_pack" in name else {name: content[name]}
            for part, tensor in parts.items():
                body = part.removeprefix(theirs).removeprefix("model.").removeprefix("bert.")
                unused = body.startswith(UNUSED) or body.endswith(COMPUTED)
                if unused or (theirs == "user_llm." and body.startswith(VOCABULARY)):
                    num_unused += 1
                    continue
                weights.tensors[ours + body] = tensor
                weights.names[ours + body] = name
    for name, tensor in content.items():
        if name == "item_emb_tokens":
            if tensor.ndim != 3 or tensor.shape[:2] != (1, 1):
                shape = tuple(tensor.shape)
                raise CheckpointError(f"init={path}: {name} is {shape}, expected (1, 1, E): one [ITEM] token is read")
            weights.tensors["items.item_token"] = tensor[0, 0]  # (E,)
            weights.names["items.item_token"] = name
        elif name == "logit_scale":
            weights.tensors["head.log_scale"] = tensor  # () the logarithm of the scale, as ours
            weights.names["head.log_scale"] = name
        elif not name.startswith(tuple(BODIES)):
            weights.tensors[name] = tensor  # has no place, and is reported
    log.info("init=%s: official weights; %d that are not used are left out", path, num_unused)
    return weights


def load_weights(module: Recommender, weights: Weights) -> None:
    """Put weights into a model, in its own dtype; item vectors must be attached.

    Where the file's item tower is of another kind (a joint model's, for ``items=cached``: stage II), the model keeps
    its own and takes users and head; a joint model's projector becomes the linear adaptor of raw vectors. Low-rank
    updates that the model does not have are merged; those that only the model has start anew.

    Raises:
        CheckpointError: a weight is missing, has no place or is of another shape; or items are not the same.
    """
    own, given = module.state_dict(), dict(weights.tensors)
    kind = _kind(module.items)
    if weights.items != kind:
        log.info("init=%s: of items=%s; the weights of items=%s here start anew", weights.path, weights.items, kind)
        projector = given.get("items.projector.weight")
        given = {name: tensor for name, tensor in given.items() if not name.startswith("items.")}
        given |= {name: tensor for name, tensor in own.items() if name.startswith("items.")}
        if weights.items == "llm" and projector is not None:
            _project(given, module.items, projector, weights.path)
    elif kind != "llm":
        _check_items(module, weights, kind)
    scales = lora_scales(from_plain(module.hparams["config"]))
    for tower in ("items.", "users."):
        theirs, ours = weights.lora_scales.get(tower), scales.get(tower)
        if theirs is not None and ours is None:
            merge_lora(given, tower, theirs)
        elif theirs is None and ours is not None:
            _beside_fresh_adapters(given, own, tower, weights.names)
        elif theirs != ours:
            raise CheckpointError(
                f"init={weights.path}: {TUNING[tower]}.lora has alpha / rank {theirs} in the file, {ours} "
                "here: give the alpha and rank that they were trained with"
            )
    check_fit(own, given, weights.names, f"init={weights.path}", _remedy)
    module.load_state_dict(given)
    log.info("init=%s: started from its weights", weights.path)


def check_fit(
    expected: Mapping[str, Tensor],
    given: Mapping[str, Tensor],
    names: Mapping[str, str],
    what: str,
    remedy: Callable[[str], str],
) -> None:
    """Raises CheckpointError unless both have the same names and shapes.

    Args:
        names: what the file calls a weight, where that is not the same.
        what: the flag and file, for the message.
        remedy: what to do about a weight, by its name.
    """
    for name in sorted(expected.keys() & given.keys()):
        there, here = tuple(given[name].shape), tuple(expected[name].shape)
        if there != here:
            raise CheckpointError(
                f"{what}: {names.get(name, name)} is {there} in the file, {here} in the model; {remedy(name)}"
            )
    for found, problem in (
        (sorted(given.keys() - expected.keys()), "has no place in the model"),
        (sorted(expected.keys() - given.keys()), "is not in the file"),
    ):
        if found:
            more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
            raise CheckpointError(f"{what}: {names.get(found[0], found[0])}{more} {problem}; {remedy(found[0])}")


def _project(given: dict[str, Tensor], items: ItemTower, projector: Tensor, path: Path) -> None:
    """Let a linear adaptor of raw vectors begin as a joint model's (D, E) projector, which reads the same vectors."""
    if not isinstance(items, CachedItems) or items.config.adaptor is not Adaptor.linear:
        return
    if items.config.transform is not Transform.raw or given["items.adaptor.1.weight"].shape != projector.shape:
        return
    given["items.adaptor.1.weight"] = projector
    given["items.adaptor.1.bias"] = torch.zeros_like(given["items.adaptor.1.bias"])
    log.info("init=%s: its items.projector is the adaptor here", path)


def _remedy(name: str) -> str:
    if name == "items.item_token":
        return "llm.pooling=item has an [ITEM] token, llm.pooling=mean has none"
    if name == "head.log_scale":
        return "head=cosine_learned has a learned scale, head=cosine has none"
    if name.startswith("items.projector."):
        return "it is there where the Item LLM and the user model differ in width: see llm= and user="
    if name.startswith("items.model."):
        return "choose the Item LLM that they were trained from, with as many layers: llm= llm.model= llm.num_layers="
    if name.startswith("users.model."):
        return "choose the User LLM that they were trained from, with as many layers: llm@user.llm= user.num_layers="
    if name.startswith("times."):
        return "user.time_features, user.time_gaps and user.target_time say which of them there are"
    return "choose the items=, user= and head= that they were trained with"


def _check_items(module: Recommender, weights: Weights, kind: str) -> None:
    for name in ("catalogue", "item vectors"):
        there, here = weights.identity.get(name), module.identity[name]
        if there != here:
            raise CheckpointError(
                f"init={weights.path}: items={kind} was trained with {name} {there}, here it is {here}: use the same "
                "data, text template and LLM; only items=llm starts from the weights of another catalogue"
            )


def lora_scales(config: Config) -> dict[str, float]:
    """Factor on the low-rank updates of a config's towers, alpha / rank, by beginning of the weights' names."""
    tuned: dict[str, LoraConfig] = {}
    if isinstance(config.items, LLMItemsConfig):
        tuned["items."] = config.items.tuning.lora
    if isinstance(config.user, LLMUserConfig):
        tuned["users."] = config.user.tuning.lora
    return {tower: lora.alpha / lora.rank for tower, lora in tuned.items() if lora.rank is not None}


def merge_lora(tensors: dict[str, Tensor], tower: str, scale: float) -> None:
    """Add low-rank updates to the weights they stand beside, in place: W + scale B A (arXiv 2106.09685, eq. 3)."""
    for name in [name for name in tensors if name.startswith(tower) and ".base_layer." in name]:
        layer, _, kind = name.rpartition(".base_layer.")
        weight = tensors.pop(name)
        if kind == "weight":
            down = tensors.pop(f"{layer}.lora_A.default.weight").float()  # (rank, in)
            up = tensors.pop(f"{layer}.lora_B.default.weight").float()  # (out, rank)
            weight = (weight.float() + scale * (up @ down)).to(weight.dtype)
        tensors[f"{layer}.{kind}"] = weight


def _beside_fresh_adapters(
    given: dict[str, Tensor], own: Mapping[str, Tensor], tower: str, names: dict[str, str]
) -> None:
    """Rename plain weights to those that low-rank updates stand beside, and take the updates as they were drawn."""
    for name in [name for name in own if name.startswith(tower)]:
        if ".lora_" in name:
            given[name] = own[name]
        elif ".base_layer." in name and (plain := name.replace(".base_layer", "")) in given:
            given[name] = given.pop(plain)
            names[name] = names.get(plain, plain)


def _kind(items: object) -> str:
    """Of an item tower or its config: llm, fused, cached or id."""
    if isinstance(items, LLMItems | LLMItemsConfig):
        return "llm"
    if isinstance(items, FusedItems | FusedItemsConfig):
        return "fused"
    return "cached" if isinstance(items, CachedItems | CachedItemsConfig) else "id"
