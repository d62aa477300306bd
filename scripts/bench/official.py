"""A training step of HLLM in the way of the official code (bytedance/HLLM, read at 2deed17), written anew.

What it does and ours does not: short histories are filled up with random items, which are encoded and then masked;
every occurrence of an item is encoded, positives in one call and negatives in another; the vocabulary head is
evaluated on every token of the items and every position of the users and turned into float32, for nothing; every
layer's hidden states are kept. The mathematics is that of ours, and so are weights and attention kernels.

Kinder to it than the code itself: padding stands behind the events, which frees the User LLM of a mask, similarities
are in float32, and texts are tokens already. Where items cannot be packed (CPUs), they run in our batches by length.

B users, S positions, K negatives, T tokens, D width, V words.
"""

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from synthetic import Step
from torch import Tensor, nn

from hllm.config import Packing
from hllm.items.encoder import model_inputs
from hllm.items.llm import LLMItems, divide
from hllm.items.varlen import packed_hidden
from hllm.module import Recommender

SIMILARITY_THRESHOLD = 0.99


class OfficialWay(nn.Module):
    """Shares all weights with ``module``; only the two vocabulary heads are its own, and get no gradient."""

    def __init__(self, module: Recommender, vocabulary: int) -> None:
        super().__init__()
        self.module = module
        width = module.users.dim
        self.item_head, self.user_head = (nn.Linear(width, vocabulary, bias=False) for _ in range(2))

    def forward(self, step: Step, num_negatives: int) -> Tensor:
        """() the loss of a batch."""
        head = self.module.head
        negatives = torch.randint(1, self.items.num_items + 1, (num_negatives,), device=step.filled.device)
        positives = self.encode(step.filled.flatten()).unflatten(0, step.filled.shape)  # (B, S + 1, D)
        negative = self.encode(negatives)  # (K, D)
        output = self.users_model(inputs_embeds=positives[:, :-1], use_cache=False, output_hidden_states=True)
        self.user_head(output.last_hidden_state).float()  # (B, S, V)
        users = F.normalize(output.last_hidden_state[step.valid].float(), dim=-1)  # (N, D)
        targets = F.normalize(positives[:, 1:][step.valid].float(), dim=-1)
        negative = F.normalize(negative.float(), dim=-1)
        with torch.autocast(step.filled.device.type, enabled=False):
            scores = users @ negative.T  # (N, K)
            alike = targets @ negative.T > SIMILARITY_THRESHOLD
            scores = scores.masked_fill(alike, torch.finfo(scores.dtype).min)
            scores = torch.cat([(users * targets).sum(-1, keepdim=True), scores], dim=1) * head.scale()
        return F.cross_entropy(scores, scores.new_zeros(len(scores), dtype=torch.long))

    @property
    def items(self) -> LLMItems:
        items = self.module.items
        assert isinstance(items, LLMItems)
        return items

    @property
    def users_model(self) -> Any:
        return self.module.users.model

    def encode(self, ids: Tensor) -> Tensor:
        """(n,) item ids, each occurrence for itself -> (n, D)."""
        rows = ids.cpu().numpy() - 1
        if self.items.packs(ids.device):
            return self._packed(rows, ids.device)
        work = divide(self.items.tokens.lengths[rows] + 1, self.items._budget(ids.device), 1)
        vectors = torch.cat([self._padded(rows[part], ids.device) for part in work.parts(0)])
        return vectors[torch.from_numpy(work.places).to(ids.device)]

    def _packed(self, rows: Any, device: torch.device) -> Tensor:
        model, items = self.items.model, self.items
        ids, lengths = items.tokens.packed(rows, 1)
        ends = lengths.cumsum(0)
        positions = torch.arange(len(ids)) - (ends - lengths).repeat_interleave(lengths)
        embeds = model.get_input_embeddings()(ids.to(device))  # (T, D)
        last = (ends - 1).to(device)
        embeds = embeds.index_put((last,), items.item_token.to(embeds.dtype))
        kept: list[Any] = []

        def keep(layer: nn.Module, inputs: Any, output: Any) -> None:
            kept.append(output)

        hooks = [layer.register_forward_hook(keep) for layer in model.layers]
        hidden = packed_hidden(model, embeds, lengths, positions.to(device))
        for hook in hooks:
            hook.remove()
        self.item_head(hidden).float()  # (T, V)
        return hidden[last]

    def _padded(self, rows: Any, device: torch.device) -> Tensor:
        ids, mask = (part.to(device) for part in self.items.tokens.padded(rows, 1))
        inputs = model_inputs(self.items.model, ids, mask, self.items.llm, self.items.item_token)
        output = self.items.model(**inputs, output_hidden_states=True)
        self.item_head(output.last_hidden_state[mask]).float()  # (T, V)
        hidden: Tensor = output.last_hidden_state
        return hidden[torch.arange(len(ids), device=device), mask.sum(1) - 1]


def packing(items: LLMItems, device: torch.device) -> Packing:
    """What ``llm.packing=auto`` is here."""
    return Packing.packed if items.packs(device) else Packing.padded


def encoded_lengths(items: LLMItems, rows: Any, packed: bool, device: torch.device) -> list[tuple[int, int]]:
    """(items, tokens of each) of what goes through the Item LLM, padding included."""
    lengths = items.tokens.lengths[rows] + 1
    if packed:
        tokens, counts = np.unique(lengths, return_counts=True)
        return list(zip(counts.tolist(), tokens.tolist(), strict=True))
    parts = divide(lengths, items._budget(device), 1).parts(0)
    return [(len(part), int(lengths[part].max())) for part in parts]
