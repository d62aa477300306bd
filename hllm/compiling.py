"""torch.compile of a model's layers, one by one: what lies between its products is fused, and each layer is small.

Attention and whatever else knows of rows stays outside of what is compiled, so that the number of events alone changes
from batch to batch, and one compilation serves all. It takes half a minute, and brings nothing on a CPU (docs/log.md).
"""

import os
import shutil

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
