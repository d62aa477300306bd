"""What of a language model is trained: frozen parts, low-rank updates, and recomputed activations."""

from typing import Any

from torch import nn

from hllm.config import TuningConfig
from hllm.errors import ConfigError


def tune(model: Any, config: TuningConfig, flag: str) -> None:
    """Set up a transformers body for training, in place.

    Args:
        flag: of the config, for messages: items.tuning or user.tuning.

    Raises:
        ConfigError: nothing of the model begins with a name in freeze, or peft is not installed.
    """
    if config.lora.rank is not None:
        if "all" in config.freeze:
            raise ConfigError(f"{flag}.freeze=[all]: leaves {flag}.lora.rank={config.lora.rank} nothing to train")
        _inject_lora(model, config, flag)
    names = [name for name, _ in model.named_parameters()]
    for prefix in config.freeze:
        if prefix != "all" and not any(name.startswith(prefix) for name in names):
            raise ConfigError(f"{flag}.freeze={prefix}: no parameter begins so; they are {names[0]}, ..., {names[-1]}")
    for name, parameter in model.named_parameters():
        if "all" in config.freeze or name.startswith(tuple(config.freeze)):
            parameter.requires_grad_(False)
    if config.gradient_checkpointing:
        # transformers renamed it in 5.23
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable(**{enable.__name__.replace("_enable", "_kwargs"): {"use_reentrant": False}})


def is_trained(model: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in model.parameters())


def _inject_lora(model: Any, config: TuningConfig, flag: str) -> None:
    """Adapters in place: the body stays the transformers class it was, its own weights are frozen."""
    try:
        import peft
    except ImportError as error:
        raise ConfigError(f"{flag}.lora.rank={config.lora.rank}: needs peft; pip install hllm[lora]") from error
    assert config.lora.rank is not None
    lora = peft.LoraConfig(
        r=config.lora.rank,
        lora_alpha=config.lora.alpha,  # type: ignore[arg-type]  # only divided by the rank
        lora_dropout=config.lora.dropout,
        target_modules=[name for name, module in model.named_modules() if isinstance(module, nn.Linear)],
    )
    model.requires_grad_(False)
    peft.inject_adapter_in_model(lora, model)
