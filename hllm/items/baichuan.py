"""Baichuan2-7B, the Item LLM of HLLM-7B, as the Llama that it is: its own code is never run.

Its attention keeps query, key and value in one matrix ``W_pack``, which is split here. The vocabulary head
(NormHead) is the only other difference, and embeddings do not use it. Baichuan2-13B has other positions (ALiBi) and
is refused.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hllm.errors import LLMError
from hllm.items.files import LLMFiles

DROPPED = ("lm_head.", "rotary_emb.inv_freq")
"Parts that the body does not have, or computes itself."


def load_baichuan(files: LLMFiles, dtype: torch.dtype) -> tuple[Any, Any]:
    """A LlamaModel and its tokenizer from a folder in Baichuan2's layout, one weight file in memory at a time.

    Raises:
        LLMError: not the 7B's architecture, or weights are missing.
    """
    from transformers import LlamaModel

    # _from_config, not the constructor: it applies the dtype and the attention implementation
    model = LlamaModel._from_config(baichuan_config(files, dtype), dtype=dtype)
    wanted = set(model.state_dict())
    for path in files.weights():
        weights = llama_weights(_read(path))
        model.load_state_dict(weights, strict=False)
        wanted -= weights.keys()
    if wanted:
        raise LLMError(f"llm.model={files.name}: the weights lack {min(wanted)} and {len(wanted) - 1} more")
    return model, baichuan_tokenizer(files)


def baichuan_config(files: LLMFiles, dtype: torch.dtype) -> Any:
    """The folder's architecture as a LlamaConfig; raises LLMError for the 13B."""
    from transformers import LlamaConfig

    settings = files.settings()
    if "max_position_embeddings" not in settings:
        raise LLMError(f"llm.model={files.name}: only the rotary Baichuan2-7B can be read as a Llama, not the 13B")
    return LlamaConfig(
        vocab_size=settings["vocab_size"],
        hidden_size=settings["hidden_size"],
        intermediate_size=settings["intermediate_size"],
        num_hidden_layers=settings["num_hidden_layers"],
        num_attention_heads=settings["num_attention_heads"],
        max_position_embeddings=settings["max_position_embeddings"],
        rms_norm_eps=settings["rms_norm_eps"],
        pad_token_id=settings.get("pad_token_id"),
        dtype=dtype,
    )


def llama_weights(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename Baichuan2's weights to those of a LlamaModel, each ``W_pack`` (3D, D) cut into q, k and v (D, D)."""
    renamed: dict[str, Tensor] = {}
    for name, tensor in weights.items():
        name = name.removeprefix("model.")
        if any(part in name for part in DROPPED):
            continue
        if "W_pack" in name:
            for part, piece in zip(("q_proj", "k_proj", "v_proj"), tensor.chunk(3), strict=True):
                renamed[name.replace("W_pack", part)] = piece
        else:
            renamed[name] = tensor
    return renamed


def _read(path: Path) -> dict[str, Tensor]:
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(path)
    weights: dict[str, Tensor] = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    return weights


def baichuan_tokenizer(files: LLMFiles) -> Any:
    """The folder's fast tokenizer where it has one; else its sentencepiece model, read as a Llama's."""
    from transformers import LlamaTokenizer, PreTrainedTokenizerFast

    fast = files.folder / "tokenizer.json"
    if fast.is_file():
        return PreTrainedTokenizerFast(tokenizer_file=str(fast), bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    return LlamaTokenizer.from_pretrained(str(files.folder), local_files_only=True)
