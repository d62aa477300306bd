"""The User LLM: what goes in, what each output may depend on, and what is left of the language model."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import encode_rows
from safetensors.torch import load_file
from torch import Tensor, nn

from hllm.build import build_datamodule, build_module, cache_dir
from hllm.config import Config, LLMConfig, LLMUserConfig, TuningConfig
from hllm.data.schema import Batch
from hllm.errors import ConfigError
from hllm.items import backbone
from hllm.items.backbone import load_pair, load_trainable
from hllm.items.cache import embed_catalog
from hllm.items.files import LLMFiles
from hllm.items.llm import LLMItems
from hllm.items.tower import CachedItems
from hllm.module import Recommender
from hllm.users.llm import UserLLM

DECODERS = ["llama", "mistral", "qwen2", "qwen3"]
B, L, D = 3, 7, 32

Family = Callable[[str], Path]
LLM = Callable[..., LLMConfig]
RunConfig = Callable[..., Config]


@pytest.fixture
def users(tiny_family: Family, llm_config: LLM) -> Callable[..., UserLLM]:
    def tower(family: str, max_history: int = 64, **tuning: Any) -> UserLLM:
        folder = tiny_family(family)
        model, _ = load_trainable(LLMFiles("tiny", folder), llm_config(folder))
        return UserLLM(model, LLMUserConfig(name="llm", tuning=TuningConfig(**tuning)), max_history).eval()

    return tower


@pytest.fixture
def make_module(run_config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[Recommender, Batch]]:
    """A module and its first training batch; the same seed for both."""

    def make(*overrides: str) -> tuple[Recommender, Batch]:
        torch.manual_seed(0)
        config = run_config("dataset.batch_size=6", *overrides)
        data = build_datamodule(config)
        module = build_module(config, data)
        monkeypatch.setattr(Recommender, "log", lambda *args, **kwargs: None)
        torch.manual_seed(1)
        return module, next(iter(data.train_dataloader()))

    return make


def vectors(seed: int = 0) -> Tensor:
    return torch.randn(B, L, D, generator=torch.Generator().manual_seed(seed))


def run(tower: UserLLM, x: Tensor, lengths: list[int] | None = None) -> Tensor:
    mask = torch.arange(x.shape[1]) < torch.tensor(lengths or [x.shape[1]] * len(x))[:, None]
    return encode_rows(tower, x, mask, torch.zeros(mask.shape, dtype=torch.int64))


@pytest.mark.parametrize("family", DECODERS)
def test_item_vectors_go_in_as_they_are(users: Callable[..., UserLLM], family: str) -> None:
    """Input is the raw item vector, no norm, no projection; output is the state after the final norm."""
    tower = users(family)
    seen: list[Tensor] = []
    tower.model.layers[0].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    ended: list[Tensor] = []
    tower.model.norm.register_forward_hook(lambda *args: ended.append(args[2]))
    encoded = run(tower, vectors())
    assert torch.equal(seen[0], vectors())
    assert torch.equal(ended[0], encoded)


@pytest.mark.parametrize("family", DECODERS)
def test_an_output_depends_on_events_up_to_its_own(users: Callable[..., UserLLM], family: str) -> None:
    """Causal: changing event 3 leaves outputs 0..2 as they were and changes output 3."""
    tower, x = users(family), vectors()
    changed = x.clone()
    changed[:, 3] = vectors(1)[:, 3]
    difference = (run(tower, x) - run(tower, changed)).abs().amax(dim=(0, 2))
    assert difference[:3].max() < 1e-6
    assert difference[3:].min() > 1e-3


@pytest.mark.parametrize("family", DECODERS)
def test_padding_on_the_right_changes_nothing(users: Callable[..., UserLLM], family: str) -> None:
    """Neither its amount nor its content."""
    tower, x = users(family), vectors()
    for noise in (torch.zeros(B, 5, D), torch.randn(B, 9, D)):
        longer = run(tower, torch.cat([x, noise], dim=1), [L] * B)[:, :L]
        torch.testing.assert_close(longer, run(tower, x), atol=5e-6, rtol=5e-6)


@pytest.mark.parametrize("padding", [1, 6])
@pytest.mark.parametrize("family", DECODERS)
def test_equals_the_official_left_padded_form(users: Callable[..., UserLLM], family: str, padding: int) -> None:
    """Left padding invisible; result independent of the amount of left padding (rotary positions) within 1e-4.

    The official code pads on the left, positions are those of the padded row, and transformers makes the mask.
    """
    tower, x, lengths = users(family), vectors(), [L, 4, 1]
    left = torch.randn(B, L + padding, D)
    mask = torch.zeros(B, L + padding, dtype=torch.int64)
    for row, length in enumerate(lengths):
        left[row, -length:], mask[row, -length:] = x[row, :length], 1
    official = tower.model(inputs_embeds=left, attention_mask=mask, use_cache=False).last_hidden_state
    ours = run(tower, x, lengths)
    for row, length in enumerate(lengths):
        torch.testing.assert_close(ours[row, :length], official[row, -length:], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", DECODERS)
def test_the_vocabulary_is_gone(
    users: Callable[..., UserLLM], tiny_family: Family, llm_config: LLM, family: str
) -> None:
    """No language-model head, no word embeddings: neither modules nor memory."""
    whole, _ = load_trainable(LLMFiles("tiny", tiny_family(family)), llm_config(tiny_family(family)))
    tower = users(family)
    assert tower.model.embed_tokens is None
    assert not any("embed_tokens" in name or "lm_head" in name for name in tower.state_dict())
    saved = sum(p.numel() for p in whole.parameters()) - sum(p.numel() for p in tower.parameters())
    assert saved == whole.config.vocab_size * D


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("family", DECODERS)
def test_every_weight_and_the_input_get_a_gradient(users: Callable[..., UserLLM], family: str, recompute: bool) -> None:
    tower = users(family, gradient_checkpointing=recompute).train()
    x = vectors().requires_grad_()
    run(tower, x).square().mul(torch.linspace(-1, 1, D)).sum().backward()
    assert x.grad is not None
    assert x.grad.any(dim=2).all()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in tower.parameters())


def test_recomputed_activations_give_the_same_gradients(users: Callable[..., UserLLM]) -> None:
    found = []
    for recompute in (False, True):
        tower = users("llama", gradient_checkpointing=recompute).train()
        calls: list[int] = []
        tower.model.layers[0].self_attn.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        run(tower, vectors().requires_grad_()).sin().sum().backward()
        assert len(calls) == 1 + recompute
        found.append([parameter.grad for parameter in tower.parameters()])
    for plain, again in zip(*found, strict=True):
        torch.testing.assert_close(plain, again, atol=1e-6, rtol=1e-6)


def test_an_encoder_is_refused(users: Callable[..., UserLLM]) -> None:
    with pytest.raises(ConfigError, match=r"user=llm: bert is not causal; choose a decoder"):
        users("bert")


def test_a_longer_history_than_the_model_reads_is_refused(users: Callable[..., UserLLM]) -> None:
    users("llama", max_history=64)
    with pytest.raises(ConfigError, match=r"dataset\.max_history=65: the User LLM reads at most 64 events"):
        users("llama", max_history=65)


def test_cast_to_bfloat16_rotary_frequencies_stay_exact(users: Callable[..., UserLLM]) -> None:
    tower, exact = users("llama").to(torch.bfloat16), users("llama")
    assert torch.equal(tower.model.rotary_emb.inv_freq, exact.model.rotary_emb.inv_freq)
    encoded = run(tower, vectors())
    assert encoded.dtype == torch.bfloat16
    assert torch.cosine_similarity(encoded.float(), run(exact, vectors()), dim=-1).min() > 0.995


@pytest.mark.parametrize("recompute", [False, True])
def test_a_frozen_model_has_no_dropout_and_computes_its_layers_again_if_told_to(
    tiny_family: Family, llm_config: LLM, recompute: bool
) -> None:
    folder = tiny_family("llama")
    model, _ = load_trainable(LLMFiles("tiny", folder), llm_config(folder))
    model.layers[0].mlp.dropout = nn.Dropout()
    tuning = TuningConfig(freeze=["all"], gradient_checkpointing=recompute)
    tower = UserLLM(model, LLMUserConfig(name="llm", tuning=tuning), 64)
    calls: list[int] = []
    model.layers[0].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    for mode in (True, False, True):
        assert tower.train(mode).training is mode
        assert not model.layers[0].mlp.dropout.training
    x = vectors().requires_grad_()
    run(tower, x).sum().backward()
    assert len(calls) == 1 + recompute
    assert x.grad is not None
    assert x.grad.any(), "a gradient for the items passes"


def test_from_the_start_a_frozen_model_is_in_eval_mode_and_a_trained_one_is_not(
    make_module: Callable[..., tuple[Recommender, Batch]],
) -> None:
    frozen, _ = make_module("items=id", "user=llm", "user.tuning.freeze=[all]")
    trained, _ = make_module("items=id", "user=llm")
    assert [module.users.model.training for module in (frozen, trained)] == [False, True]


# together with the item tower

JOINT = ("items=llm", "user=llm", "loss=nce_official", "head=cosine_learned", "loss.num_negatives=20")


def test_one_folder_gives_two_models(make_module: Callable[..., tuple[Recommender, Batch]]) -> None:
    """Two separate full models without weight sharing, from the same weights."""
    module, batch = make_module(*JOINT, "llm.num_layers=2", "user.num_layers=2")
    items, users = dict(module.items.model.named_parameters()), dict(module.users.model.named_parameters())
    assert set(items) - set(users) == {"embed_tokens.weight"}
    for name, parameter in users.items():
        assert torch.equal(parameter, items[name])
        assert parameter.untyped_storage().data_ptr() != items[name].untyped_storage().data_ptr()
    module.training_step(batch, 0).backward()
    torch.optim.SGD(module.parameters(), lr=0.1).step()
    assert all(not torch.equal(parameter, items[name]) for name, parameter in users.items())


def test_weights_that_both_begin_with_are_read_once(
    make_module: Callable[..., tuple[Recommender, Batch]], tiny_family: Family, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []
    load = backbone._load_pretrained
    monkeypatch.setattr(backbone, "_load_pretrained", lambda *args: read.append(args[0].name) or load(*args))
    make_module(*JOINT)
    assert len(read) == 1
    make_module(*JOINT, "llm@user.llm=custom", f"user.llm.model={tiny_family('qwen3')}")
    assert len(read) == 3, "another User LLM"


@pytest.mark.parametrize(("first", "second"), [(None, 1), (1, None), (2, 2)])
def test_a_pair_equals_two_models_read_alone(
    tiny_family: Family, llm_config: LLM, first: int | None, second: int | None
) -> None:
    files = LLMFiles("tiny", tiny_family("qwen3"))
    wanted = [llm_config(files.folder, num_layers=layers) for layers in (first, second)]
    for model, llm in zip(load_pair(files, *wanted)[:2], wanted, strict=True):
        reference = load_trainable(files, llm)[0]
        assert model.config.num_hidden_layers == reference.config.num_hidden_layers
        assert model.training
        state, expected = model.state_dict(), reference.state_dict()
        assert state.keys() == expected.keys()
        assert all(torch.equal(state[name], expected[name]) for name in state)


def test_item_and_user_llm_may_differ(
    make_module: Callable[..., tuple[Recommender, Batch]], tiny_family: Family, save_llama: Any, tmp_path: Path
) -> None:
    """No projection where widths match, a linear map without bias where they differ."""
    bert = f"llm.model={tiny_family('bert')}"
    module, _ = make_module(*JOINT, bert, "llm@user.llm=custom", f"user.llm.model={tiny_family('qwen3')}")
    kinds = [tower.model.config.model_type for tower in (module.items, module.users)]
    assert kinds == ["bert", "qwen3"]
    assert not hasattr(module.items, "projector")
    wide = save_llama(tmp_path / "wide", dim=48)
    module, _ = make_module(*JOINT, bert, "llm@user.llm=custom", f"user.llm.model={wide}")
    assert module.items.projector.weight.shape == (48, 32)
    assert module.items.projector.bias is None
    assert not any(isinstance(part, nn.Linear) for name, part in module.users.named_children())


def test_padded_slots_affect_neither_loss_nor_scores(make_module: Callable[..., tuple[Recommender, Batch]]) -> None:
    """Content of padded slots (random items or zeros) does not affect loss or metrics."""
    module, batch = make_module(*JOINT)
    module.eval()
    assert not batch.mask.all()
    noise = torch.randint(1, module.items.num_items + 1, batch.items.shape)
    other = replace(batch, items=torch.where(batch.mask, batch.items, noise))
    losses = []
    for given in (batch, other):
        torch.manual_seed(0)
        losses.append(module.training_step(given, 0).item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    with torch.no_grad():
        torch.testing.assert_close(module.scores(batch), module.scores(other), atol=5e-6, rtol=5e-6)


def test_stage_two_equals_training_beside_a_frozen_item_llm(
    make_module: Callable[..., tuple[Recommender, Batch]], run_config: RunConfig
) -> None:
    """Cached item table: user-only training equals end-to-end with the Item LLM frozen and in eval mode.

    Same loss, same user-side gradients.
    """
    users = ("user=llm", "loss=nce_official", "head=cosine_learned", "loss.num_negatives=20", "llm.pooling=last")
    live, batch = make_module("items=llm", *users, "items.tuning.freeze=[all]", "llm.max_tokens=60")
    stored = ("items=cached", *users, "items.transform=raw", "items.adaptor=none", "llm.max_tokens=60")
    cached, _ = make_module(*stored)
    config = run_config(*stored)
    table = embed_catalog(build_datamodule(config).catalog, config.dataset.text, config.llm, cache_dir(config))
    assert isinstance(live.items, LLMItems)
    assert isinstance(cached.items, CachedItems)
    torch.testing.assert_close(live.items.all(), table.vectors, atol=5e-6, rtol=5e-6)
    cached.items.attach(replace(table, vectors=live.items.all()))
    found = []
    for module in (live, cached):
        torch.manual_seed(2)
        loss = module.training_step(batch, 0)
        loss.backward()
        found.append((loss.item(), {name: p.grad for name, p in module.named_parameters() if p.grad is not None}))
    (loss, gradients), (expected_loss, expected) = found
    assert loss == pytest.approx(expected_loss, rel=1e-6)
    assert gradients.keys() == expected.keys() > {"head.log_scale", "users.model.norm.weight"}
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[name], atol=1e-5, rtol=1e-4)


def test_sasrec_1b_reads_and_scores_ids_through_one_linear_map(
    make_module: Callable[..., tuple[Recommender, Batch]], tiny_llama: Path
) -> None:
    """The official LLMIDRec: a random LLM; inputs, positives and negatives are rows of one table, mapped alike."""
    module, batch = make_module(
        "items=id", "items.dim=24", "user=llm", "user.pretrained=false", "loss=nce_official_ids", "loss.num_negatives=7"
    )
    stored = load_file(tiny_llama / "model.safetensors")
    assert not torch.equal(module.users.model.layers[0].mlp.up_proj.weight, stored["layers.0.mlp.up_proj.weight"])
    assert module.items.table.weight[1:].std().item() == pytest.approx(0.02, rel=0.1)
    assert module.items.projector.weight.shape == (D, 24)
    assert module.items.projector.bias is None
    assert module.head.scale().item() == pytest.approx(20)
    ids = torch.arange(1, 31)
    mapped = module.items.table.weight[1:] @ module.items.projector.weight.T
    for side in module.items.sides(ids):
        torch.testing.assert_close(side, mapped)
    module.training_step(batch, 0).backward()
    for weight in (module.items.table.weight, module.items.projector.weight, *module.users.parameters()):
        assert weight.grad is not None
        assert weight.grad.any()
