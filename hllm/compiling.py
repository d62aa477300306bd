"""torch.compile: of a model's layers, one by one, and of single functions. What lies between products is fused.

Attention and whatever else knows of rows stays outside of what is compiled, so that the number of events alone changes
from batch to batch, and one compilation serves all. It takes half a minute, and brings nothing on a CPU (docs/log.md).
"""

import functools
import os
import shutil
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from hllm.distributed import outer_layers
from hllm.errors import ConfigError


def compile_layers(model: nn.Module, flag: str) -> None:
    """Compile the members of the model's outermost lists of modules, in place; names of weights stay as they are.

    Args:
        flag: of the config, for the message.

    Raises:
        ConfigError: there is no C++ compiler, which torch.compile asks for.
    """
    compiler = os.environ.get("CXX")
    if not any(shutil.which(name) for name in ([compiler] if compiler else ["g++", "clang++", "c++"])):
        raise ConfigError(f"{flag}=true: torch.compile needs a C++ compiler; install g++, or set CXX")
    for layer in outer_layers(model):
        layer.compile(dynamic=True)


@functools.cache
def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """For tensors of any size; compiled once in a process, when it is first called."""
    import torch._dynamo.config as limits  # seconds to import

    # tiles that begin elsewhere, single users and evaluations are a form each, some ten; torch gives up after eight
    limits.recompile_limit = max(limits.recompile_limit, 32)
    found: Callable[..., Any] = torch.compile(function, dynamic=True)
    return found
