"""The User LLM: a causal language model that reads item vectors in place of words (HLLM, arXiv 2409.12740, 3.1).

T events of a batch, D width.
"""

from typing import Any

import torch
from torch import Tensor

from hllm.config import LLMUserConfig, Packing
from hllm.errors import ConfigError
from hllm.items.backbone import HoldsLLM
from hllm.items.encoder import packs
from hllm.items.varlen import packed_hidden, product_dtype
from hllm.tuning import tune
from hllm.users.layout import Layout


class UserLLM(HoldsLLM):
    """Item vectors -> the final-norm hidden state at every event, which predicts the item that follows.

    Item vectors go in as they are. The vocabulary's embeddings are dropped, the head was never loaded. Rows run end to
    end where a fused kernel keeps them apart, else as rectangles.

    Args:
        model: a transformers body, float32, as ``load_trainable`` gives it.
        max_history: longest row.
        packing: whether rows run end to end.

    Raises:
        ConfigError: the model is not causal, or reads fewer positions than max_history.
    """

    def __init__(self, model: Any, config: LLMUserConfig, max_history: int, packing: Packing = Packing.auto) -> None:
        super().__init__()
        self.packing = packing
        self.model, self.dim = model, int(model.config.hidden_size)
        model.set_input_embeddings(None)
        limit = getattr(model.config, "max_position_embeddings", None)
        if limit is not None and max_history > limit:
            raise ConfigError(f"dataset.max_history={max_history}: the User LLM reads at most {limit} events")
        _check_causal(model)
        tune(model, config.tuning, "user.tuning")
        self.train()  # Lightning leaves modes as it finds them

    def forward(self, x: Tensor, layout: Layout, timestamps: Tensor, target_times: Tensor | None = None) -> Tensor:
        """(T, D) item vectors -> (T, D); an output depends on the events of its row up to its own only."""
        x = x.to(self.model.dtype)
        if packs(self.model, self.packing, x.device, product_dtype(x.device, x.dtype)):
            return packed_hidden(self.model, x, layout.lengths, layout.place)
        encoded: Tensor = layout.by_row(self._padded, x)
        return encoded

    def _padded(self, x: Tensor) -> Tensor:
        """(b, l, D) -> (b, l, D): the causal mask alone keeps padding unseen, which is behind the events."""
        encoded: Tensor = self.model(inputs_embeds=x, use_cache=False).last_hidden_state
        return encoded


@torch.no_grad()
def _check_causal(model: Any) -> None:
    """Change the second of two events: a causal model's first output stays."""
    training = model.training
    model.eval()
    x = torch.linspace(-1, 1, 2 * model.config.hidden_size).reshape(1, 2, -1)
    changed = torch.cat([x[:, :1], -x[:, 1:]], dim=1)
    first, second = (model(inputs_embeds=given, use_cache=False).last_hidden_state[:, 0] for given in (x, changed))
    model.train(training)
    if not torch.allclose(first, second, atol=1e-4):
        raise ConfigError(f"user=llm: {model.config.model_type} is not causal; choose a decoder (Llama family)")
