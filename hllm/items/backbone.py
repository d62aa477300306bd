"""Any Hugging Face text model as a body that turns tokens into hidden states: decoders and BERTs, GGUF included.

transformers is imported inside the functions: it takes seconds that a cache hit must not pay. Code that comes with a
model is never run.
"""

import contextlib
import io
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from hllm.config import Dtype, LLMConfig
from hllm.errors import ConfigError, LLMError
from hllm.items.baichuan import baichuan_tokenizer, load_baichuan
from hllm.items.files import LLMFiles


@dataclass
class Backbone:
    """A loaded model in eval mode.

    Args:
        name: for messages.
        model: a transformers model; with input_ids and attention_mask it gives ``last_hidden_state`` (B, T, D).
        tokenizer: a transformers tokenizer.
        dim: D, the width of its hidden states.
    """

    name: str
    model: Any
    tokenizer: Any
    device: torch.device
    dtype: torch.dtype
    dim: int


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
        if files.settings().get("model_type") == "baichuan":
            model, tokenizer = load_baichuan(files, dtype)
        else:
            model, tokenizer = _load(files, dtype)
    model.config.use_cache = False  # keys and values are kept for generation only
    model = model.eval().requires_grad_(False).to(device)
    return Backbone(files.name, model, tokenizer, device, dtype, int(model.config.hidden_size))


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
    with _quiet_transformers():
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


def _load(files: LLMFiles, dtype: torch.dtype) -> tuple[Any, Any]:
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
def _quiet_transformers() -> Iterator[None]:
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
