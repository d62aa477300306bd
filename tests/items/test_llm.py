"""The Item LLM as a tower: what of a text is read, which hidden state is the vector, and whom a gradient reaches."""

import itertools
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import GPT2Config, GPT2Model

from hllm.build import build_datamodule, build_module
from hllm.config import Config, LLMConfig, LLMItemsConfig, LoraConfig, Packing, Pooling, Positions, TuningConfig
from hllm.errors import ConfigError
from hllm.head import MAX_LOG_SCALE
from hllm.items import llm as llm_tower
from hllm.items.backbone import load_backbone, load_trainable
from hllm.items.encoder import Encoder, Tokens, check_fit, tokenize
from hllm.items.files import ITEM_TOKEN, LLMFiles
from hllm.items.llm import LLMItems, divide

FAMILIES = ["llama", "mistral", "qwen2", "qwen3", "bert"]
FORMS = [Packing.padded, Packing.packed]
TEXTS = ["title: word1", "", "word3 word4", " ".join(f"word{n}" for n in range(20)), "word4 word3", "word3 word4 word5"]
TOLERANCE = {"atol": 5e-6, "rtol": 5e-6}

Family = Callable[[str], Path]
LLM = Callable[..., LLMConfig]
Build = Callable[..., LLMItems]


@pytest.fixture
def build(tiny_family: Family, llm_config: LLM) -> Build:
    """A tower of a family's tiny model; of options, those of LLMConfig go there, the others to LLMItemsConfig."""

    def tower(family: str, texts: list[str] = TEXTS, dim: int = 32, **options: Any) -> LLMItems:
        torch.manual_seed(0)
        own = {name: options.pop(name) for name in ("grad_cache", "tuning") if name in options}
        llm = llm_config(tiny_family(family), **{"pooling": Pooling.item, **options})
        model, tokenizer = load_trainable(LLMFiles("tiny", tiny_family(family)), llm)
        return LLMItems(model, tokenize(tokenizer, texts, llm), llm, LLMItemsConfig(name="llm", **own), dim)

    return tower


def alone(items: LLMItems, item: int) -> Tensor:
    """(T, E) what the model says of one item's tokens and [ITEM], in a call of its own, unpadded."""
    ids = torch.tensor(items.tokens[item - 1])
    embeds = torch.cat([items.model.get_input_embeddings()(ids), items.item_token[None]])
    hidden: Tensor = items.model(inputs_embeds=embeds[None], attention_mask=torch.ones(1, len(embeds)))
    return hidden.last_hidden_state[0]  # type: ignore[attr-defined]


def all_ids(items: LLMItems) -> Tensor:
    return torch.arange(1, items.num_items + 1)


# text


@pytest.mark.parametrize("family", FAMILIES)
def test_ids_are_the_first_the_tokenizer_gives(build: Build, tiny_family: Family, family: str) -> None:
    """Ids = tokenizer.encode(text)[:max_tokens]; nothing is added that the tokenizer does not add."""
    items = build(family, max_tokens=8)
    _, tokenizer = load_trainable(LLMFiles("tiny", tiny_family(family)), items.llm)
    blank = tokenizer.pad_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    for text, tokens in zip(TEXTS, items.tokens, strict=True):
        assert tokens == (tokenizer.encode(text)[:8] or [blank])
    assert items.tokens.lengths.max() == 8
    assert (items.tokens[0][0] == tokenizer.bos_token_id) == (family == "llama"), "BOS where the tokenizer adds it"


def test_an_empty_item_is_bos_and_item(build: Build) -> None:
    """Empty item = BOS + [ITEM] (2 tokens)."""
    items = build("llama").eval()
    ids, mask = items.tokens.padded(np.array([1]), extra=1)
    assert (ids.tolist(), mask.tolist()) == ([[0, 0]], [[True, True]])  # <s> has id 0 here
    torch.testing.assert_close(items(torch.tensor([2]))[0], alone(items, 2)[1], **TOLERANCE)


@pytest.mark.parametrize("extra", [0, 1])
def test_padded_and_packed_rows_hold_the_texts_tokens(extra: int) -> None:
    """Item length = len(ids) + 1 where there is an [ITEM] token."""
    texts = [[5, 6, 7], [8], [9, 10], [11, 12, 13, 14]]
    tokens = Tokens.of(np.array(list(itertools.chain(*texts)), np.int32), np.array([len(text) for text in texts]))
    rows = np.array([3, 1, 2, 1])
    wanted = [texts[row] + [0] * extra for row in rows]
    ids, mask = tokens.padded(rows, extra)
    assert [row[real].tolist() for row, real in zip(ids, mask, strict=True)] == wanted
    assert not ids[~mask].any()
    flat, lengths = tokens.packed(rows, extra)
    assert [part.tolist() for part in flat.split(lengths.tolist())] == wanted


def test_tokens_can_be_appended_after_the_empty_ones_were_counted() -> None:
    tokens = Tokens()
    assert len(tokens) == 0
    tokens.append([1, 2])
    assert (len(tokens), tokens.lengths.tolist()) == (1, [2])


# the vector


@pytest.mark.parametrize("packing", FORMS)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_vector_is_the_last_hidden_state_at_item_of_the_item_alone(
    build: Build, family: str, packing: Packing
) -> None:
    """Vector equals last_hidden_state after final norm at [ITEM]; equals running the item alone, unpadded."""
    items = build(family, packing=packing).eval()
    vectors = items(all_ids(items))
    assert vectors.std(dim=0).mean() > 0.01, "items differ"
    for item in range(1, len(TEXTS) + 1):
        torch.testing.assert_close(vectors[item - 1], alone(items, item)[-1], **TOLERANCE)


@pytest.mark.parametrize("packing", FORMS)
@pytest.mark.parametrize("budget", [32, 2048])
def test_the_vector_is_the_same_in_any_company(build: Build, packing: Packing, budget: int) -> None:
    items = build("llama", packing=packing, token_budget=budget).eval()
    whole = items.all()
    for asked in ([4], [6, 2], [1, 3, 5], [5, 4, 3, 2, 1]):
        torch.testing.assert_close(items(torch.tensor(asked)), whole[torch.tensor(asked) - 1], **TOLERANCE)


@pytest.mark.parametrize("packing", FORMS)
@pytest.mark.parametrize("family", FAMILIES)
def test_another_items_text_never_changes_a_vector(build: Build, family: str, packing: Packing) -> None:
    """Changing item B's text never changes item A's vector in the same batch (the official eager path fails this)."""
    changed = [*TEXTS[:2], "word30 word31 word32", *TEXTS[3:]]
    before, after = (build(family, texts, packing=packing, token_budget=2048).eval() for texts in (TEXTS, changed))
    kept = torch.tensor([1, 2, 4, 5, 6])
    torch.testing.assert_close(before.all()[kept - 1], after.all()[kept - 1], **TOLERANCE)
    assert (before.all() - after.all())[2].abs().max() > 0.01


@pytest.mark.parametrize("family", FAMILIES)
def test_the_last_token_counts(build: Build, family: str) -> None:
    """Changing the last text token changes the vector."""
    items = build(family, ["word1 word2 word3", "word1 word2 word9"]).eval()
    first, second = items.all()
    assert (first - second).abs().max() > 0.01


@pytest.mark.parametrize("packing", FORMS)
@pytest.mark.parametrize("family", FAMILIES)
def test_under_positions_end_item_stands_at_max_tokens(build: Build, family: str, packing: Packing) -> None:
    """Position of [ITEM] = MAX_TEXT_LENGTH. A rotary model does not see the shift (1e-4), BERT does."""
    shifted, plain = (
        build(family, packing=packing, positions=positions, max_tokens=24, token_budget=2048).eval()
        for positions in (Positions.end, Positions.start)
    )
    seen: list[Tensor] = []
    shifted.model.register_forward_pre_hook(
        lambda _, args, options: seen.append(options["position_ids"]), with_kwargs=True
    )
    vectors = shifted.all()
    (positions,) = seen
    if packing is Packing.padded:
        assert positions.max() == 24
        assert (positions == 24).any(dim=1).all(), "each item's last token"
    else:
        assert (positions == 24).sum() == len(TEXTS)
    difference = (vectors - plain.all()).abs().max()
    assert difference > 0.01 if family == "bert" else difference < 1e-4


@pytest.mark.parametrize("packing", FORMS)
@pytest.mark.parametrize("pooling", [Pooling.mean, Pooling.last])
def test_under_positions_end_a_text_may_fill_the_table(build: Build, pooling: Pooling, packing: Packing) -> None:
    options: dict[str, Any] = {"pooling": pooling, "packing": packing, "positions": Positions.end}
    items = build("bert", max_tokens=64, token_budget=2048, **options).eval()
    assert items.all().isfinite().all()


@pytest.mark.parametrize("packing", FORMS)
@pytest.mark.parametrize("family", ["llama", "bert"])
def test_mean_pooling_is_over_all_tokens(build: Build, family: str, packing: Packing) -> None:
    """n=0 = mean over all tokens, special ones and prompt included."""
    items = build(family, packing=packing, pooling=Pooling.mean).eval()
    assert not hasattr(items, "item_token")
    vectors = items.all()
    for row, tokens in enumerate(items.tokens):
        hidden = items.model(input_ids=torch.tensor([tokens])).last_hidden_state[0]
        torch.testing.assert_close(vectors[row], hidden.mean(0), **TOLERANCE)


def test_the_cached_form_reads_the_same_vector_out_of_a_tuned_folder(
    build: Build, save_llama: Callable[..., Path], llm_config: LLM, tmp_path: Path
) -> None:
    """What training sees at [ITEM] is what hllm.embed stores, also where a prefix is shared by a batch."""
    folder = save_llama(tmp_path / "tuned", template="<s> $A")
    texts = [f"Compress the following: title: {text}" for text in TEXTS]
    llm = llm_config(folder, pooling=Pooling.item, max_tokens=20)
    model, tokenizer = load_trainable(LLMFiles("tiny", folder), llm)
    items = LLMItems(model, tokenize(tokenizer, texts, llm), llm, LLMItemsConfig(name="llm"), 32).eval()
    save_file({"item_token": items.item_token.detach()}, folder / ITEM_TOKEN)
    encoder = Encoder(load_backbone(LLMFiles("tiny", folder), llm), llm, texts, TEXTS)
    order = encoder.order()
    assert max(map(len, encoder._batches(order))) > 1
    torch.testing.assert_close(encoder.encode(order), items.all()[order].detach(), **TOLERANCE)


# parameters and gradients


@pytest.mark.parametrize("family", FAMILIES)
def test_item_is_one_parameter_and_the_vocabulary_stays(build: Build, tiny_family: Family, family: str) -> None:
    """[ITEM] is one parameter, receives gradient, vocabulary size unchanged; there is no vocabulary head."""
    items = build(family)
    assert items.item_token.shape == (32,)
    assert items.model.get_input_embeddings().num_embeddings == items.model.config.vocab_size == 64
    of_vocabulary = [name for name, parameter in items.named_parameters() if 64 in parameter.shape[:1]]
    assert sorted(of_vocabulary) == sorted(
        ["model.embed_tokens.weight"]
        if family != "bert"
        else ["model.embeddings.word_embeddings.weight", "model.embeddings.position_embeddings.weight"]
    )
    assert not any("head" in name or "pooler" in name for name, _ in items.named_modules())
    items(all_ids(items)).square().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in items.parameters())


def test_item_is_drawn_with_deviation_002(build: Build) -> None:
    """[ITEM] is one parameter N(0, 0.02)."""
    drawn = torch.cat([build("llama").item_token for _ in range(1)] + [_item_token(seed) for seed in range(100)])
    assert drawn.std().item() == pytest.approx(0.02, rel=0.05)
    assert abs(drawn.mean().item()) < 0.002


def _item_token(seed: int) -> Tensor:
    torch.manual_seed(seed)
    model = GPT2Model(GPT2Config(vocab_size=8, n_embd=32, n_layer=1, n_head=2))
    tokens = Tokens.of(np.array([1], np.int32), np.array([1]))
    llm = LLMConfig(name="tiny", model="tiny", pooling=Pooling.item)
    return LLMItems(model, tokens, llm, LLMItemsConfig(name="llm"), 32).item_token


@pytest.mark.parametrize("dim", [32, 16])
def test_a_projector_stands_where_widths_differ(build: Build, dim: int) -> None:
    items = build("llama", dim=dim).eval()
    assert hasattr(items, "projector") == (dim != 32)
    expected = torch.stack([alone(items, item)[-1] for item in range(1, len(TEXTS) + 1)])
    if dim != 32:
        expected = expected @ items.projector.weight.T
    torch.testing.assert_close(items.all(), expected, **TOLERANCE)


def gradients(module: nn.Module) -> dict[str, Tensor]:
    found = {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}
    module.zero_grad()
    return found


def assert_same_gradients(first: dict[str, Tensor], second: dict[str, Tensor], tolerance: float = 1e-5) -> None:
    assert first.keys() == second.keys() != set()
    for name, gradient in first.items():
        worst = (gradient - second[name]).abs().max() / gradient.abs().max().clamp(min=1e-3)
        assert worst < tolerance, f"{name}: {worst:.1e}"


@pytest.mark.parametrize("recompute", [False, True], ids=["", "layers-again"])
@pytest.mark.parametrize("packing", FORMS)
@pytest.mark.parametrize("family", ["llama", "bert"])
def test_grad_cache_gives_the_gradients_of_one_pass(
    build: Build, family: str, packing: Packing, recompute: bool
) -> None:
    """Gradients per pack equal those of all packs held at once; a BERT's dropout is the same both times."""
    found = []
    for grad_cache in (False, True):
        tuning = TuningConfig(gradient_checkpointing=recompute and grad_cache)
        items = build(family, packing=packing, grad_cache=grad_cache, tuning=tuning).train()
        assert len(divide(items.tokens.lengths + 1, 64, 1).packs) > 1
        calls: list[int] = []
        items.model.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        torch.manual_seed(1)
        vectors = items(all_ids(items))
        packs = len(calls)
        (vectors @ torch.linspace(-1, 1, 32)).sin().sum().backward()
        assert len(calls) == packs * (2 if grad_cache else 1)
        found.append((vectors.detach(), gradients(items)))
    torch.testing.assert_close(found[0][0], found[1][0], **TOLERANCE)
    assert_same_gradients(found[0][1], found[1][1], 1e-5)


def test_grad_cache_shows_its_device_to_the_checkpoint(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch keeps the random state of the devices of tensors that it is given, and of no other."""
    given: list[tuple[Any, ...]] = []
    kept = llm_tower.checkpoint
    monkeypatch.setattr(
        llm_tower, "checkpoint", lambda run, *args, **rest: given.append(args) or kept(run, *args, **rest)
    )
    items = build("llama", grad_cache=True).to("cpu", torch.float64)
    items(all_ids(items))
    assert given
    for args in given:
        assert any(isinstance(arg, Tensor) and arg.dtype == torch.float64 for arg in args), "the embeddings"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="a GPU has a random state of its own")
def test_grad_cache_repeats_dropout_on_a_gpu(build: Build) -> None:
    found = []
    for grad_cache in (False, True):
        items = build("bert", packing=Packing.padded, token_budget=64, grad_cache=grad_cache).cuda()
        torch.manual_seed(1)
        vectors = items(all_ids(items).cuda())
        (vectors @ torch.linspace(-1, 1, 32).cuda()).sin().sum().backward()
        found.append((vectors.detach(), gradients(items)))
    torch.testing.assert_close(found[0][0], found[1][0], atol=1e-5, rtol=1e-5)
    assert_same_gradients(found[0][1], found[1][1], 1e-4)


@pytest.mark.parametrize(
    ("llm", "packing", "grad_cache"),
    [("llama", "padded", False), ("llama", "packed", True), ("qwen3", "packed", False)],
)
def test_a_step_equals_one_that_encodes_every_occurrence(
    run_config: Callable[..., Config],
    tiny_family: Family,
    monkeypatch: pytest.MonkeyPatch,
    llm: str,
    packing: str,
    grad_cache: bool,
) -> None:
    """De-duplicated encoding gives the same loss and the same gradients as encoding every occurrence (fp32, 1e-5).

    The reference is the official form written out: each occurrence of a history, target or negative is a text of its
    own in a call of its own; output i predicts item i + 1; loss as in section 1.8, masked by id.
    """
    config = run_config(
        *("items=llm", "user=llm", "loss=nce_official", "head=cosine_learned", "loss.num_negatives=20"),
        *(
            "dataset.batch_size=4",
            f"llm.model={tiny_family(llm)}",
            f"llm.packing={packing}",
            f"items.grad_cache={grad_cache}",
        ),
    )
    torch.manual_seed(0)
    data = build_datamodule(config)
    module = build_module(config, data)
    monkeypatch.setattr(module, "log", lambda *args, **kwargs: None)
    batch = next(iter(data.train_dataloader()))
    encoded = 0

    def encode(items: Iterable[int]) -> Tensor:
        nonlocal encoded
        vectors = [alone(module.items, item)[-1] for item in items]
        encoded += len(vectors)
        return torch.stack(vectors)

    torch.manual_seed(3)
    loss = module.training_step(batch, 0)
    loss.backward()
    ours = gradients(module)
    torch.manual_seed(3)
    negatives = torch.randint(1, data.num_items + 1, (20,))
    scale = module.head.log_scale.clamp(0, MAX_LOG_SCALE).exp()
    losses = []
    unit_negatives = F.normalize(encode(negatives.tolist()), dim=-1)
    for row in range(len(batch)):
        events = int(batch.mask[row].sum())
        targets = batch.targets[row, :events]
        outputs = module.users.model(inputs_embeds=encode(batch.items[row, :events].tolist())[None]).last_hidden_state
        outputs, positives = F.normalize(outputs[0], dim=-1), F.normalize(encode(targets.tolist()), dim=-1)
        scores = scale * (outputs @ unit_negatives.T)
        scores = scores.masked_fill(negatives == targets[:, None], -torch.inf)
        logits = torch.cat([scale * (outputs * positives).sum(1, keepdim=True), scores], dim=1)
        losses.append(-logits.log_softmax(dim=1)[:, 0])
    reference = torch.cat(losses).mean()
    reference.backward()
    assert encoded > 2 * data.num_items, "far more texts than there are items"
    torch.testing.assert_close(loss, reference, atol=1e-5, rtol=1e-5)
    assert_same_gradients(gradients(module), ours)


def test_a_frozen_tower_is_in_eval_mode_and_has_no_gradient(build: Build) -> None:
    frozen = build("bert", tuning=TuningConfig(freeze=["all"]), dim=16)
    assert torch.equal(frozen.all(), frozen.all()), "no dropout, from the start on: Lightning leaves modes alone"
    frozen.train()
    assert torch.equal(frozen.all(), frozen.all())
    frozen.all().sum().backward()
    assert gradients(frozen).keys() == {"projector.weight"}
    trained = build("bert").train()
    assert not torch.equal(trained.all(), trained.all())


def test_lora_keeps_the_tower_in_training_mode(build: Build) -> None:
    items = build("bert", tuning=TuningConfig(lora=LoraConfig(rank=2)))
    assert items.train().model.training
    assert items.trained


# arithmetic


def test_cast_to_bfloat16_rotary_frequencies_stay_exact(build: Build) -> None:
    items, reference = build("llama").to(torch.bfloat16), build("llama")
    assert items.item_token.dtype == items.model.dtype == torch.bfloat16
    for name in ("inv_freq", "original_inv_freq"):
        kept = getattr(items.model.rotary_emb, name)
        assert kept.dtype == torch.float32
        assert torch.equal(kept, getattr(reference.model.rotary_emb, name))


@pytest.mark.parametrize("pooling", [Pooling.item, Pooling.mean])
@pytest.mark.parametrize("packing", FORMS)
@pytest.mark.parametrize("precision", ["bf16-true", "bf16-mixed"])
def test_bfloat16_stays_near_float32(build: Build, precision: str, packing: Packing, pooling: Pooling) -> None:
    exact = build("llama", pooling=pooling).eval().all()
    items = build("llama", pooling=pooling, packing=packing).eval()
    if precision == "bf16-true":
        items.to(torch.bfloat16)
        torch.set_default_dtype(torch.bfloat16)  # as Lightning does in a step
    try:
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16-mixed"):
            rounded = items.all().float()
    finally:
        torch.set_default_dtype(torch.float32)
    assert not torch.equal(rounded, exact)
    assert torch.cosine_similarity(rounded, exact).min() > 0.995


# the division of work


@pytest.mark.parametrize("num_ranks", [1, 2, 3])
@pytest.mark.parametrize("num_items", [1, 2, 7, 50])
def test_work_is_divided_evenly_within_the_budget(num_items: int, num_ranks: int) -> None:
    lengths = np.random.default_rng(num_items).integers(1, 30, num_items)
    work = divide(lengths, 64, num_ranks)
    parts = [work.parts(rank) for rank in range(num_ranks)]
    assert {tuple(map(len, own)) for own in parts} == {tuple(map(len, parts[0]))}, "as many packs of as many items"
    assert all(len(pack) * lengths[pack].max() <= 64 for own in parts for pack in own)
    gathered = np.concatenate([np.concatenate(own) for own in parts])
    assert gathered[work.places].tolist() == list(range(num_items))
    assert len(gathered) < num_items + num_ranks * len(work.packs)


def test_a_model_that_cannot_be_packed_is_refused() -> None:
    model = GPT2Model(GPT2Config(vocab_size=8, n_embd=32, n_layer=1, n_head=2))
    llm = LLMConfig(name="tiny", model="tiny", packing=Packing.packed)
    with pytest.raises(ConfigError, match=r"llm\.packing=packed: tiny is gpt2, not of .*choose auto or padded"):
        check_fit("tiny", model, None, llm)
