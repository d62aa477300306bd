"""The Item LLM as an item tower: text tokens -> vectors in every step, with gradient (HLLM, arXiv 2409.12740, 3.1).

n ids, T tokens, E width of the Item LLM, D width of the user model, W processes.
"""

import contextlib
import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

from hllm.compiling import compile_layers
from hllm.config import LLMConfig, LLMItemsConfig, Pooling
from hllm.data.schema import Array64
from hllm.distributed import gather_vectors, rank, world_size
from hllm.items.backbone import HoldsLLM
from hllm.items.encoder import PREFIX_FAMILIES, Tokens, embedded_inputs, packed_vectors, packs, pool
from hllm.items.last import LastFeedForward
from hllm.items.tokens import tokens_digest
from hllm.items.tower import ItemTower
from hllm.items.varlen import product_dtype
from hllm.tuning import is_trained, tune

BUDGET = {"cpu": 2048, "cuda": 65536}
"Tokens a pack: a CPU is fastest while activations stay in its cache, a GPU wants large products."

MANY_ITEMS = 2**15
"So many items are taken to use the whole vocabulary."


class LLMItems(HoldsLLM, ItemTower):
    """A language model that reads item texts; its hidden state at a learned [ITEM] token is the vector.

    The token is a parameter, N(0, 0.02) at first, that is put behind the text's embeddings: the vocabulary stays as it
    is. There is no vocabulary head. Several processes ask for the same ids, and each encodes a part of them.

    Args:
        model: a transformers body, float32, as ``load_trainable`` gives it.
        tokens: of each item's text; row r is item r + 1.
        llm: pooling, positions, max_tokens, token_budget, packing, save_work and compile.
        dim: D; where it is not E, a linear map without bias comes behind the model.

    Raises:
        ConfigError: config.tuning does not fit the model, or peft is not installed.
    """

    collective = True

    def __init__(self, model: Any, tokens: Tokens, llm: LLMConfig, config: LLMItemsConfig, dim: int) -> None:
        super().__init__()
        self.model, self.tokens, self.llm, self.config = model, tokens, llm, config
        family = model.config.model_type
        self.num_items, width = len(tokens), int(model.config.hidden_size)
        self._counts = 0, 0
        made_from = f"{tokens_digest(tokens)} {llm.pooling.value} {llm.positions.value} {llm.max_tokens}"
        self.fingerprint = "llm " + hashlib.sha256(made_from.encode()).hexdigest()[:20]
        if llm.pooling is Pooling.item:
            self.item_token = nn.Parameter(torch.empty(width).normal_(std=0.02))
        if dim != width:
            self.projector = nn.Linear(width, dim, bias=False)
            nn.init.normal_(self.projector.weight, std=width**-0.5)
        tune(model, config.tuning, "items.tuning")
        if llm.pooling is Pooling.item and "all" in config.tuning.freeze:
            self.item_token.requires_grad_(False)
        self.trained = is_trained(model) or (llm.pooling is Pooling.item and self.item_token.requires_grad)
        # causal models cannot see right padding, and without a mask they run on fused kernels
        self._causal = family in PREFIX_FAMILIES
        saves = llm.save_work and not llm.compile
        one_token = self._causal and llm.pooling in (Pooling.item, Pooling.last) and saves
        self._last = LastFeedForward(model) if one_token and not config.tuning.gradient_checkpointing else None
        if llm.compile:
            compile_layers(model, "llm.compile")
        self.train()  # Lightning leaves modes as it finds them

    def forward(self, ids: Tensor, show_progress: bool = False) -> Tensor:
        """(n,) unique item ids -> (n, D). Every process must ask for the same ids, in the same order."""
        rows: Array64 = ids.cpu().numpy() - 1
        work = divide(self.tokens.lengths[rows] + self._extra, self._budget(ids.device), world_size())
        parts = work.parts(rank())
        own = rows[np.concatenate(parts)]
        words = self._words(own, ids.device)
        if self.training:
            self._counts = self._counts[0] + len(own), self._counts[1] + int(self.tokens.lengths[own].sum())
        if show_progress:  # on a terminal only
            parts = tqdm(parts, desc="items", unit="packs", leave=False, disable=None)
        vectors = torch.cat([self._encode(rows[part], words) for part in parts])
        gathered = gather_vectors(vectors).flatten(0, 1)  # (W * m, E)
        wanted = gathered[torch.from_numpy(work.places).to(ids.device)]
        return self.projector(wanted) if hasattr(self, "projector") else wanted

    def all(self) -> Tensor:
        ids = torch.arange(1, self.num_items + 1, device=self.model.device)
        vectors: Tensor = self(ids, show_progress=True)
        return vectors

    def take_counts(self) -> tuple[int, int]:
        """Items and text tokens that this process encoded in training since the last call."""
        counts, self._counts = self._counts, (0, 0)
        return counts

    def append(self, tokens: Tokens) -> None:
        """Take further items, behind those that are there."""
        both = [np.concatenate(pair) for pair in zip(*((t.ids, t.lengths) for t in (self.tokens, tokens)), strict=True)]
        self.tokens = Tokens.of(*both)
        self.num_items = len(self.tokens)

    @property
    def _extra(self) -> int:
        return int(self.llm.pooling is Pooling.item)

    def _budget(self, device: torch.device) -> int:
        return self.llm.token_budget or max(BUDGET[device.type], self.llm.max_tokens + self._extra)

    def _words(self, rows: Array64, device: torch.device) -> "Words":
        embeddings = self.model.get_input_embeddings()
        if len(rows) < MANY_ITEMS:
            words = self.tokens.packed(rows, self._extra)[0].unique()
        else:
            words = torch.arange(embeddings.num_embeddings)
        return Words(words, embeddings(words.to(device)))

    def _encode(self, rows: Array64, words: "Words") -> Tensor:
        """(b,) rows -> (b, E), in one call of the model; under grad_cache its activations are not kept."""
        encode: Callable[[Array64, Words], Tensor] = self._padded
        if self.packs(words.vectors.device):
            encode = self._packed
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.trained):
            if self.config.grad_cache and torch.is_grad_enabled():
                # a GPU's random state, for dropout, is kept if a tensor among the arguments is on it
                again: Tensor = checkpoint(
                    lambda ids, vectors: encode(rows, Words(ids, vectors)),
                    words.ids,
                    words.vectors,
                    use_reentrant=False,
                )
                return again
            return encode(rows, words)

    def packs(self, device: torch.device) -> bool:
        """Whether texts go through the model end to end there."""
        return packs(self.model, self.llm.packing, device, product_dtype(device, self.model.dtype))

    def _padded(self, rows: Array64, words: "Words") -> Tensor:
        device = words.vectors.device
        ids, mask = self.tokens.padded(rows, self._extra)  # (b, T)
        mask = mask.to(device)
        inputs = embedded_inputs(words.embed(ids), mask, self.llm, self._item_token)
        ends = torch.arange(len(rows), device=device), mask.sum(1) - 1
        with contextlib.nullcontext() if self._last is None else self._last.only(*ends):
            hidden = self.model(**inputs, attention_mask=None if self._causal else mask).last_hidden_state  # (b, T, E)
        return pool(hidden, mask, self.llm.pooling)

    def _packed(self, rows: Array64, words: "Words") -> Tensor:
        ids, lengths = self.tokens.packed(rows, self._extra)  # (T,), (b,)
        return packed_vectors(self.model, words.embed(ids), lengths, self.llm, self._item_token, self._last)

    @property
    def _item_token(self) -> Tensor | None:
        return self.item_token if self.llm.pooling is Pooling.item else None


@dataclass(frozen=True)
class Words:
    """The embeddings of the tokens that occur in a step, looked up once.

    Each lookup in the whole vocabulary has a gradient as large as the vocabulary; a lookup in these has a small one.

    Args:
        ids: (v,) ascending, on the CPU.
        vectors: (v, E).
    """

    ids: Tensor
    vectors: Tensor

    def embed(self, ids: Tensor) -> Tensor:
        """(...,) ids on the CPU, each among those that occur -> (..., E)."""
        return F.embedding(torch.searchsorted(self.ids, ids).to(self.vectors.device), self.vectors)


@dataclass(frozen=True)
class Work:
    """Who encodes what: the items in packs of like length, each pack dealt out to the processes.

    All processes run as many packs, and as many items in each, because some of them may only go through a model
    together; where the items of a pack do not divide, its last one is encoded more than once.

    Args:
        packs: numbers of the items, each in one pack; (W, m) with m items a process.
        places: (n,) where item number i is among all results, as they are gathered.
    """

    packs: list[npt.NDArray[np.int64]]
    places: Array64

    def parts(self, own_rank: int) -> list[Array64]:
        """The packs of one process."""
        return [pack[own_rank] for pack in self.packs]


def divide(lengths: Array64, budget: int, num_ranks: int) -> Work:
    """Deal out items of (n,) tokens: packs of at most ``budget`` tokens a process, padding included, longest first."""
    order = np.argsort(-lengths, kind="stable")
    packs: list[npt.NDArray[np.int64]] = []
    places = np.empty(len(order), dtype=np.int64)
    begin = 0
    while begin < len(order):
        size = max(budget // int(lengths[order[begin]]), 1) * num_ranks
        pack = order[begin : begin + size]
        begin += len(pack)
        missing = -len(pack) % num_ranks
        packs.append(np.concatenate([pack, np.repeat(pack[-1:], missing)]).reshape(-1, num_ranks).T)
    total = sum(pack.shape[1] for pack in packs)
    done = 0
    for pack in packs:
        where = np.arange(num_ranks)[:, None] * total + done + np.arange(pack.shape[1])
        places[pack] = where
        done += pack.shape[1]
    return Work(packs, places)
