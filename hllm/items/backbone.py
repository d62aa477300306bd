"""Any Hugging Face text model as a body that turns tokens into hidden states: decoders and BERTs, GGUF included.

transformers is imported inside the functions: it takes seconds that a cache hit must not pay. Code that comes with a
model is never run.
"""

import contextlib
import copy
import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from hllm.config import Dtype, LLMConfig
from hllm.errors import ConfigError, LLMError
from hllm.items.baichuan import baichuan_config, baichuan_tokenizer, load_baichuan
from hllm.items.files import LLMFiles
from hllm.items.last import LastFeedForward
from hllm.tuning import is_trained


class HoldsLLM(nn.Module):
    """Base of towers around a language model, ``model``.

    Rotary frequencies stay in float32 whatever the tower is cast to: rounded to bfloat16 they are off by 2^-9, which at
    position 256 is half a radian of the faster angles. A model of which nothing is trained stays in eval mode.
    """

    model: Any

    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        if not is_trained(self.model):
            self.model.eval()  # its dropout would only be noise
            for module in self.model.modules():
                # in eval mode a layer keeps its activations; what has dropout is below the layer
                if getattr(module, "gradient_checkpointing", False):
                    module.training = mode
        return self

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        exact = [
            (module, name, buffer)
            for module in self.modules()
            for name, buffer in module.named_buffers(recurse=False)
            if name.endswith("inv_freq")
        ]
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for module, name, buffer in exact:
            setattr(module, name, buffer.to(getattr(module, name).device))
        return self


@dataclass
class Backbone:
    """A loaded model in eval mode.

    Args:
        name: for messages.
        model: a transformers model; with input_ids and attention_mask it gives ``last_hidden_state`` (B, T, D).
        tokenizer: a transformers tokenizer.
        dim: D, the width of its hidden states.
        folder: where it was loaded from.
    """

    name: str
    model: Any
    tokenizer: Any
    device: torch.device
    dtype: torch.dtype
    dim: int
    folder: Path | None = None

    @cached_property
    def last(self) -> LastFeedForward:
        """The feed-forward of a decoder's last layer, to be run where it is read."""
        return LastFeedForward(self.model)


def choose_device(flag: str) -> torch.device:
    """The device that llm.device names; auto takes the GPU where there is one.

    Raises:
        ConfigError: no such device on this machine.
    """
    if flag == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(flag)
    except RuntimeError as error:
        raise ConfigError(f"llm.device={flag}: no such device; choose auto, cpu, cuda or cuda:N") from error
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"llm.device={flag}: choose auto, cpu, cuda or cuda:N")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(f"llm.device={flag}: this machine has {torch.cuda.device_count()} CUDA devices")
    return device


def choose_dtype(flag: Dtype, device: torch.device, fast_bfloat16: bool) -> torch.dtype:
    """The arithmetic for llm.dtype: auto takes 16 bits where the device is fast at them, and float32 elsewhere."""
    if flag is not Dtype.auto:
        dtype: torch.dtype = getattr(torch, flag.value)
        return dtype
    if fast_bfloat16:
        return torch.bfloat16
    return torch.float16 if device.type == "cuda" else torch.float32


def has_fast_bfloat16(device: torch.device) -> bool:
    """Whether bfloat16 products run in hardware: any GPU since Ampere, CPUs with AMX or AVX512-BF16."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    probes = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")
    return device.type == "cpu" and any(bool(getattr(torch.cpu, probe, lambda: False)()) for probe in probes)


def load_backbone(files: LLMFiles, llm: LLMConfig) -> Backbone:
    """Load body and tokenizer, without touching the global random state.

    Raises:
        LLMError: the folder holds no text model that can be loaded, or weights are missing from it.
        ConfigError: llm.device is not on this machine.
    """
    device = choose_device(llm.device)
    dtype = choose_dtype(llm.dtype, device, has_fast_bfloat16(device))
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), _loading(files):
        model, tokenizer = _load(files, llm, dtype)
    model = model.eval().requires_grad_(False).to(device)
    return Backbone(files.name, model, tokenizer, device, dtype, int(model.config.hidden_size), files.folder)


def load_trainable(files: LLMFiles, llm: LLMConfig) -> tuple[Any, Any]:
    """Body and tokenizer of a model that is to be trained: float32, on the CPU, in training mode.

    ``llm.pretrained=false`` draws the weights from the global random state; otherwise that is left alone.

    Raises:
        LLMError: as ``load_backbone``.
        ConfigError: llm.num_layers is more than a pretrained model has.
    """
    with _loading(files):
        if not llm.pretrained:
            model, tokenizer = _load(files, llm, torch.float32)
        else:
            with torch.random.fork_rng(devices=[]):
                model, tokenizer = _load(files, llm, torch.float32)
    return model.train(), tokenizer


def load_pair(files: LLMFiles, first: LLMConfig, second: LLMConfig) -> tuple[Any, Any, Any]:
    """Two bodies as ``load_trainable`` gives them, and the tokenizer; their common weights are read once.

    Reading dominates: a GGUF file's weights are computed anew each time.
    """
    assert (first.pretrained, second.pretrained) == (True, True), "drawn models have nothing in common"
    model, tokenizer = load_trainable(files, replace(first, num_layers=None))
    models = [copy.deepcopy(model), model]
    for body, llm in zip(models, (first, second), strict=True):
        if llm.num_layers is not None:
            _cut(body, llm.num_layers, files)
    return models[0], models[1], tokenizer


def _load(files: LLMFiles, llm: LLMConfig, dtype: torch.dtype) -> tuple[Any, Any]:
    """The body, with as many layers as are wanted, and the tokenizer."""
    baichuan = files.settings().get("model_type") == "baichuan"
    if not llm.pretrained:
        model, tokenizer = _draw(files, llm, dtype, baichuan)
    elif baichuan:
        model, tokenizer = load_baichuan(files, dtype)
    else:
        model, tokenizer = _load_pretrained(files, dtype)
    if getattr(model, "pooler", None) is not None:
        model.pooler = None  # a BERT's; item vectors do not go through it, and it would never get a gradient
    if llm.pretrained and llm.num_layers is not None:
        _cut(model, llm.num_layers, files)
    model.config.use_cache = False  # keys and values are kept for generation only
    return model, tokenizer


def _draw(files: LLMFiles, llm: LLMConfig, dtype: torch.dtype, baichuan: bool) -> tuple[Any, Any]:
    """The architecture alone, initialised as its configuration says."""
    import transformers

    if baichuan:
        config, tokenizer = baichuan_config(files, dtype), baichuan_tokenizer(files)
    else:
        config, tokenizer, _ = _load_tokenizer(files)
    if llm.num_layers is not None:
        config.num_hidden_layers = llm.num_layers
        if (kinds := getattr(config, "layer_types", None)) is not None:
            config.layer_types = [kinds[layer % len(kinds)] for layer in range(llm.num_layers)]
    config.dtype = dtype
    return transformers.AutoModel.from_config(config, dtype=dtype, trust_remote_code=False), tokenizer


def _cut(model: Any, num_layers: int, files: LLMFiles) -> None:
    """Keep the first layers."""
    owner, name = (model, "layers") if hasattr(model, "layers") else (getattr(model, "encoder", None), "layer")
    layers = getattr(owner, name, None)
    if layers is None:
        raise LLMError(f"llm.model={files.name}: {model.config.model_type} has no list of layers to cut")
    if num_layers > len(layers):
        raise ConfigError(
            f"num_layers={num_layers}: {files.name} has {len(layers)} pretrained layers; more need pretrained=false"
        )
    setattr(owner, name, layers[:num_layers])
    model.config.num_hidden_layers = num_layers
    if getattr(model.config, "layer_types", None) is not None:
        model.config.layer_types = model.config.layer_types[:num_layers]


def load_tokenizer(files: LLMFiles) -> Any:
    """The tokenizer alone, as ``load_backbone`` has it: of the weights only a GGUF file's header is read.

    Raises:
        LLMError: as ``load_backbone``.
    """
    with _loading(files):
        if files.settings().get("model_type") == "baichuan":
            return baichuan_tokenizer(files)
        return _load_tokenizer(files)[1]


@contextlib.contextmanager
def _loading(files: LLMFiles) -> Iterator[None]:
    """What goes wrong in transformers, as one line that names the model."""
    with quiet_transformers():
        try:
            yield
        except (OSError, ValueError, KeyError, RuntimeError, ImportError) as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise LLMError(f"llm.model={files.name}: cannot be loaded from {files.folder}: {reason}") from error


def _load_tokenizer(files: LLMFiles) -> tuple[Any, Any, dict[str, Any]]:
    """Config and tokenizer, and the options that the model is to be loaded with too."""
    import transformers

    options: dict[str, Any] = {"trust_remote_code": False, "local_files_only": True}
    if files.gguf_file is not None:
        options["gguf_file"] = files.gguf_file
    config = transformers.AutoConfig.from_pretrained(files.folder, **options)
    _check_text_model(files, config)
    return config, transformers.AutoTokenizer.from_pretrained(files.folder, config=config, **options), options


def _load_pretrained(files: LLMFiles, dtype: torch.dtype) -> tuple[Any, Any]:
    import transformers

    config, tokenizer, options = _load_tokenizer(files)
    if files.gguf_file is not None and hasattr(transformers, "GgufConfig"):
        # the packed form would fetch compiled kernels from the hub, and computes in float32
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    model, report = transformers.AutoModel.from_pretrained(
        files.folder, config=config, dtype=dtype, output_loading_info=True, **options
    )
    # a BERT's pooler is not used here, and many a checkpoint lacks it
    if missing := sorted(key for key in report["missing_keys"] if not key.startswith("pooler.")):
        raise LLMError(f"llm.model={files.name}: the weights lack {missing[0]} and {len(missing) - 1} more")
    return model, tokenizer


def _check_text_model(files: LLMFiles, config: Any) -> None:
    if config.is_encoder_decoder:
        raise LLMError(
            f"llm.model={files.name}: {config.model_type} is an encoder-decoder; choose a decoder (Llama family) or "
            "an encoder (BERT family)"
        )
    if not hasattr(config, "hidden_size") or not hasattr(config, "vocab_size"):
        raise LLMError(f"llm.model={files.name}: {config.model_type} is not a plain text model")


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Keep transformers' own bars and notes off the screen while a model loads; errors are raised all the same."""
    from transformers.utils import logging as verbosity

    level, bars = verbosity.get_verbosity(), verbosity.is_progress_bar_enabled()
    verbosity.set_verbosity_error()
    verbosity.disable_progress_bar()
    try:
        # its GGUF reader draws a bar that no setting turns off
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        verbosity.set_verbosity(level)
        if bars:
            verbosity.enable_progress_bar()
