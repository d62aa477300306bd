"""Item texts -> vectors: tokenise once, batch by length, pool the last hidden states.

B texts in a batch, T tokens of its longest, P tokens of a shared prefix, D width of the Item LLM.
"""

import contextlib
import logging
from array import array
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from itertools import takewhile
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from hllm.compiling import compile_layers
from hllm.config import LLMConfig, Packing, Pooling, Positions
from hllm.errors import ConfigError, LLMError
from hllm.items.backbone import Backbone
from hllm.items.files import ITEM_TOKEN, read_item_token
from hllm.items.last import LastFeedForward
from hllm.items.varlen import FAMILIES, can_pack, packed_hidden

log = logging.getLogger(__name__)

PREFIX_FAMILIES = {"llama", "mistral", "qwen2", "qwen3"}
"Causal decoders: keys and values can be shared, the last feed-forward left out; all others take the plain path."
MIN_PREFIX = 4
"Shorter prefixes are not worth a forward pass of their own."
PREFIX_SHARE = 0.1
"Of a batch's tokens: what a prefix has to save before the batch is padded for it where it could be packed."
CHUNK = 500
"Texts in the tokenizer at a time: while it holds them, a token is two hundred bytes."
DEVICE_BUDGET = {"cpu": 1024, "cuda": 16384}
"Tokens a batch: a CPU is fastest while activations stay in its cache, a GPU wants large products."


class Encoder:
    """The texts of a catalogue as tokens, and the model that turns any rows of them into vectors.

    Longer texts than ``llm.max_tokens`` keep their first tokens, which is counted in the log. An empty text is read
    as the tokenizer's special tokens, or as a single bos, eos or pad token, so that every item has a vector.

    Args:
        backbone: the loaded model.
        llm: pooling, max_tokens, token_budget, packing, save_work and compile.
        texts: one a catalogue row.
        names: what to call each row in errors: the original item ids.

    Raises:
        ConfigError: llm.pooling, llm.max_tokens or llm.packing does not fit the model.
        LLMError: the tokenizer is not the model's.
    """

    def __init__(self, backbone: Backbone, llm: LLMConfig, texts: Sequence[str], names: Sequence[str]) -> None:
        check_fit(backbone.name, backbone.model, backbone.tokenizer, llm)
        self.backbone, self.llm, self.names = backbone, llm, names
        self.item_token = _stored_item_token(backbone) if llm.pooling is Pooling.item else None
        self.tokens = tokenize(backbone.tokenizer, texts, llm)
        check_vocabulary(backbone.name, backbone.model, self.tokens)
        family = backbone.model.config.model_type
        self.token_budget = llm.token_budget or max(DEVICE_BUDGET[backbone.device.type], llm.max_tokens)
        saves = llm.save_work and not llm.compile
        one_token = saves and llm.pooling in (Pooling.last, Pooling.item) and family in PREFIX_FAMILIES
        self.share_prefix = one_token and llm.positions is Positions.start
        self.packs = packs(backbone.model, llm.packing, backbone.device, backbone.dtype)
        self._last = backbone.last if one_token else None
        if llm.compile:
            compile_layers(backbone.model, "llm.compile")

    def order(self) -> list[int]:
        """Rows, longest text first: too large a batch shows at once, and neighbours pad little."""
        rows: list[int] = np.argsort(-self.tokens.lengths, kind="stable").tolist()
        return rows

    def encode(self, rows: Sequence[int], advance: Callable[[int], object] = lambda done: None) -> Tensor:
        """Vectors of some rows, in batches of at most token_budget tokens, padding included.

        Args:
            rows: catalogue rows, longest first as in ``order``.
            advance: called with the number of items of each finished batch.

        Returns:
            (len(rows), D) on the CPU, in the model's dtype.

        Raises:
            LLMError: a vector is not finite.
        """
        vectors = []
        for batch in self._batches(rows):
            vectors.append(self._forward(batch).cpu())
            self._check_finite(vectors[-1], batch)
            advance(len(batch))
        return torch.cat(vectors)

    def _batches(self, rows: Sequence[int]) -> list[list[int]]:
        extra = int(self.item_token is not None)
        batches: list[list[int]] = []
        for row in rows:
            if batches and (self.tokens.lengths[batches[-1][0]] + extra) * (len(batches[-1]) + 1) <= self.token_budget:
                batches[-1].append(row)
            else:
                batches.append([row])
        return batches

    @torch.inference_mode()
    def _forward(self, rows: list[int]) -> Tensor:
        batch = [self.tokens[row] for row in rows]
        prefix = shared_prefix(batch) if self.share_prefix else []
        saved = len(prefix) * len(batch) / sum(map(len, batch))
        if self.packs and (self.llm.packing is Packing.packed or saved < PREFIX_SHARE):
            flat, lengths = self.tokens.packed(np.array(rows), int(self.item_token is not None))
            embeds = self.backbone.model.get_input_embeddings()(flat.to(self.backbone.device))  # (T, E)
            return packed_vectors(self.backbone.model, embeds, lengths, self.llm, self.item_token, self._last)
        ids, mask = pad([tokens[len(prefix) :] for tokens in batch], self.backbone.device)  # (B, T - P)
        if self.item_token is not None:
            ids, mask = F.pad(ids, (0, 1)), F.pad(mask, (1, 0), value=1)
        inputs = model_inputs(self.backbone.model, ids, mask, self.llm, self.item_token)
        inputs["attention_mask"] = mask
        if prefix:
            inputs |= self._run_prefix(prefix, mask)
        places = torch.arange(len(batch), device=mask.device), mask.sum(1) - 1
        with contextlib.nullcontext() if self._last is None else self._last.only(*places):
            hidden: Tensor = self.backbone.model(**inputs).last_hidden_state  # (B, T - P, D)
        return pool(hidden, mask, self.llm.pooling)

    def _run_prefix(self, prefix: list[int], mask: Tensor) -> dict[str, Any]:
        """Keys and values of the prefix, computed once and repeated over the batch."""
        from transformers import DynamicCache

        cache = DynamicCache(config=self.backbone.model.config)
        ids = torch.tensor([prefix], device=self.backbone.device)  # (1, P)
        self.backbone.model(input_ids=ids, past_key_values=cache, use_cache=True)
        cache.batch_repeat_interleave(len(mask))
        mask = torch.cat([mask.new_ones(len(mask), len(prefix)), mask], dim=1)  # (B, T)
        return {"past_key_values": cache, "use_cache": True, "attention_mask": mask}

    def _check_finite(self, vectors: Tensor, rows: list[int]) -> None:
        finite = vectors.isfinite().all(dim=1)
        if not finite.all():
            row = rows[int(finite.logical_not().nonzero()[0])]
            raise LLMError(
                f"item {self.names[row]!r}: its vector is not finite under llm.dtype={self.backbone.dtype}; "
                "set llm.dtype=float32"
            )


class Tokens:
    """The token ids of each text, end to end: four bytes a token, where a list of lists takes many times that."""

    def __init__(self) -> None:
        self._flat, self._lengths = array("i"), array("q")

    @classmethod
    def of(cls, ids: npt.NDArray[np.int32], lengths: npt.NDArray[np.int64]) -> Self:
        """Ids and lengths that are there already, mapped from files say; nothing can be appended to them."""
        tokens = cls()
        tokens.ids, tokens.lengths = ids, lengths
        return tokens

    def append(self, ids: Sequence[int]) -> None:
        self._flat.extend(ids)
        self._lengths.append(len(ids))

    @cached_property
    def ids(self) -> npt.NDArray[np.int32]:
        """All ids; from the first look at them on, nothing can be appended."""
        return np.frombuffer(self._flat, dtype=np.int32) if self._flat else np.empty(0, dtype=np.int32)

    @cached_property
    def lengths(self) -> npt.NDArray[np.int64]:
        """(texts,) as ``ids``."""
        return np.frombuffer(self._lengths, dtype=np.int64) if self._lengths else np.empty(0, dtype=np.int64)

    def padded(self, rows: npt.NDArray[np.int64], extra: int = 0) -> tuple[Tensor, Tensor]:
        """(B, T) int64 ids and mask of some texts, padded on the right, after each ``extra`` places of id 0."""
        lengths = self.lengths[rows]
        columns = np.arange(int(lengths.max()) + extra)
        real = columns < lengths[:, None]
        places = (self._ends[rows] - lengths)[:, None] + columns
        ids = np.where(real, self.ids[np.minimum(places, len(self.ids) - 1)], 0).astype(np.int64)
        return torch.from_numpy(ids), torch.from_numpy(columns < (lengths + extra)[:, None])

    def packed(self, rows: npt.NDArray[np.int64], extra: int = 0) -> tuple[Tensor, Tensor]:
        """(T,) int64 ids of some texts end to end, after each ``extra`` places of id 0, and their (B,) lengths."""
        ids, mask = self.padded(rows, extra)
        return ids[mask], mask.sum(1)

    @cached_property
    def _ends(self) -> npt.NDArray[np.int64]:
        return self.lengths.cumsum()

    def __len__(self) -> int:
        return len(self.lengths) if "lengths" in self.__dict__ else len(self._lengths)

    def __getitem__(self, row: int) -> list[int]:
        if row >= len(self):
            raise IndexError(row)  # which ends a loop
        ids: list[int] = self.ids[self._ends[row] - self.lengths[row] : self._ends[row]].tolist()
        return ids


def tokenize(tokenizer: Any, texts: Sequence[str], llm: LLMConfig) -> Tokens:
    """Token ids of each text with the tokenizer's own special tokens, at most ``llm.max_tokens``, at least one.

    A longer text keeps its first tokens and the special ones at its end; before an [ITEM] token, which ends every
    text, it keeps its first tokens alone, as in the official code.
    """
    max_tokens = llm.max_tokens
    tokenizer.truncation_side = "right"
    specials = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id, 0)
    blank = next(token for token in specials if token is not None)
    tokens, num_long = Tokens(), 0
    for chunk in chunks(texts):
        whole: list[list[int]] = token_ids(tokenizer, chunk)["input_ids"]
        long = [row for row, ids in enumerate(whole) if len(ids) > max_tokens]
        num_long += len(long)
        if llm.pooling is Pooling.item:
            whole = [ids[:max_tokens] for ids in whole]
        elif long:  # cut by the tokenizer, which keeps its special tokens at the end
            again = [chunk[row] for row in long]
            cut = token_ids(tokenizer, again, truncation=True, max_length=max_tokens)["input_ids"]
            for row, ids in zip(long, cut, strict=True):
                whole[row] = ids
        for ids in whole:
            tokens.append(ids or [blank])
    if num_long:
        log.warning("%d of %d item texts are longer than llm.max_tokens=%d: cut", num_long, len(texts), max_tokens)
    return tokens


def token_ids(tokenizer: Any, texts: Sequence[str], **options: Any) -> Any:
    """What the tokenizer says of some texts, as the encoder asks it: ``input_ids``, and what the options add."""
    return tokenizer(list(texts), return_attention_mask=False, return_token_type_ids=False, verbose=False, **options)


def token_lengths(tokenizer: Any, texts: Sequence[str]) -> list[int]:
    """Tokens of each text, special ones included, before any is cut; in chunks, so that no ids are held."""
    lengths: list[int] = []
    for chunk in chunks(texts):
        lengths += map(len, token_ids(tokenizer, chunk)["input_ids"])
    return lengths


def chunks(texts: Sequence[str]) -> Iterator[Sequence[str]]:
    """The texts in order, ``CHUNK`` at a time."""
    return (texts[start : start + CHUNK] for start in range(0, len(texts), CHUNK))


def pad(batch: list[list[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Token lists as (B, T) ids and mask, padded on the right whatever the tokenizer would do."""
    length = max(len(tokens) for tokens in batch)
    ids = torch.zeros(len(batch), length, dtype=torch.long)
    mask = torch.zeros(len(batch), length, dtype=torch.long)
    for row, tokens in enumerate(batch):
        ids[row, : len(tokens)] = torch.tensor(tokens)
        mask[row, : len(tokens)] = 1
    return ids.to(device), mask.to(device)


def model_inputs(model: Any, ids: Tensor, mask: Tensor, llm: LLMConfig, item_token: Tensor | None) -> dict[str, Any]:
    """What a model is called with for (B, T) right-padded ids and their mask, but for the attention mask.

    Args:
        item_token: (E,) the learned [ITEM] token; it takes the last real place of each row, whatever id stands there.
    """
    if item_token is None and llm.positions is Positions.start:
        return {"input_ids": ids}
    return embedded_inputs(model.get_input_embeddings()(ids), mask, llm, item_token)


def embedded_inputs(embeds: Tensor, mask: Tensor, llm: LLMConfig, item_token: Tensor | None) -> dict[str, Any]:
    """``model_inputs`` from (B, T, E) token embeddings."""
    lengths = mask.sum(dim=1)  # (B,)
    if item_token is not None:
        places = torch.arange(len(embeds), device=embeds.device), lengths - 1
        embeds = embeds.index_put(places, item_token.to(embeds.dtype))
    inputs: dict[str, Any] = {"inputs_embeds": embeds}
    if llm.positions is Positions.end:
        texts = lengths if item_token is None else lengths - 1
        # of padding they only have to be within the model's table
        positions = torch.arange(embeds.shape[1], device=embeds.device) + (llm.max_tokens - texts)[:, None]
        inputs["position_ids"] = positions.clamp(max=llm.max_tokens - (item_token is None))
    return inputs


def pool(hidden: Tensor, mask: Tensor, pooling: Pooling) -> Tensor:
    """(B, T, D) hidden states of right-padded texts -> (B, D): last real token, mean of the real ones, or first.

    The [ITEM] token is a text's last.
    """
    if pooling is Pooling.cls:
        return hidden[:, 0]
    if pooling in (Pooling.last, Pooling.item):
        return hidden[torch.arange(len(hidden), device=hidden.device), mask.sum(dim=1) - 1]
    weights = mask.unsqueeze(-1).float()  # (B, T, 1)
    return ((hidden.float() * weights).sum(dim=1) / weights.sum(dim=1)).to(hidden.dtype)


def packs(model: Any, packing: Packing, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether texts, or histories of vectors, go through a model end to end."""
    if packing is not Packing.auto:
        return packing is Packing.packed
    return can_pack(model, device, dtype)


def packed_vectors(
    model: Any,
    embeds: Tensor,
    lengths: Tensor,
    llm: LLMConfig,
    item_token: Tensor | None,
    last: LastFeedForward | None,
) -> Tensor:
    """What ``model_inputs`` and ``pool`` make of padded texts, of texts end to end.

    Args:
        embeds: (T, E) token embeddings. lengths: (b,) tokens of each text, on the CPU.
        item_token: (E,) takes the last place of each text.
        last: the last layer's feed-forward, to be run at those places alone; or None.

    Returns:
        (b, D).
    """
    device, ends = embeds.device, lengths.cumsum(0)
    starts = ends - lengths
    positions = torch.arange(len(embeds)) - starts.repeat_interleave(lengths)
    if llm.positions is Positions.end:
        positions += (llm.max_tokens + (item_token is not None) - lengths).repeat_interleave(lengths)
    places = (ends - 1).to(device)
    if item_token is not None:
        embeds = embeds.index_put((places,), item_token.to(embeds.dtype))
    with contextlib.nullcontext() if last is None else last.only(torch.zeros_like(places), places):
        hidden = packed_hidden(model, embeds, lengths, positions.to(device))  # (T, D)
    if llm.pooling is Pooling.mean:
        owner = torch.arange(len(lengths)).repeat_interleave(lengths).to(device)
        summed = hidden.new_zeros(len(lengths), hidden.shape[1], dtype=torch.float32)
        summed = summed.index_add(0, owner, hidden.float())
        return (summed / lengths.to(device)[:, None]).to(hidden.dtype)
    return hidden[starts.to(device) if llm.pooling is Pooling.cls else places]


def shared_prefix(batch: list[list[int]]) -> list[int]:
    """The tokens that all texts begin with, leaving each at least one of its own; [] where it is not worth while."""
    if len(batch) < 2:
        return []
    same = takewhile(lambda column: len(set(column)) == 1, zip(*batch, strict=False))
    prefix = [column[0] for column in same]
    prefix = prefix[: min(len(tokens) for tokens in batch) - 1]
    return prefix if len(prefix) >= MIN_PREFIX else []


def check_fit(name: str, model: Any, tokenizer: Any, llm: LLMConfig) -> None:
    """Raises ConfigError where llm.pooling, max_tokens or packing does not fit the model called ``name``."""
    if llm.packing is Packing.packed and (family := model.config.model_type) not in FAMILIES:
        raise ConfigError(
            f"llm.packing=packed: {name} is {family}, not of {', '.join(sorted(FAMILIES))}; choose auto or padded"
        )
    if llm.pooling is Pooling.cls and tokenizer.cls_token_id is None:
        raise ConfigError(f"llm.pooling=cls: the tokenizer of {name} has no [CLS] token; choose last or mean")
    # what a tokenizer does not know it gives as a huge number
    limits = (getattr(model.config, "max_position_embeddings", None), tokenizer.model_max_length)
    limit = min(int(value) for value in limits if value is not None)
    if llm.pooling is Pooling.item:
        limit -= 1  # the [ITEM] token comes behind the text
    if llm.max_tokens > limit:
        raise ConfigError(f"llm.max_tokens={llm.max_tokens}: {name} reads at most {limit} tokens")


def check_vocabulary(name: str, model: Any, tokens: Tokens) -> None:
    """Raises LLMError where a token is not in the model's table."""
    embedding = model.get_input_embeddings()
    largest = int(tokens.ids.max(initial=0))
    if largest >= embedding.num_embeddings:
        raise LLMError(
            f"llm.model={name}: the tokenizer gives token {largest}, the model has "
            f"{embedding.num_embeddings}; they do not belong together"
        )


def _stored_item_token(backbone: Backbone) -> Tensor:
    token = None if backbone.folder is None else read_item_token(backbone.folder)
    if token is None or len(token) != backbone.dim:
        raise ConfigError(
            f"llm.pooling=item: {backbone.name} has no {ITEM_TOKEN} of width {backbone.dim}; it needs an Item LLM that "
            "was trained with items=llm and written by hllm.embed ckpt= or hllm.export. Choose last or mean"
        )
    return token.to(backbone.device, backbone.dtype)
