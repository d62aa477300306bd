"""What of the language models is trained: frozen prefixes and low-rank updates, seen in weights after real steps."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim import AdamW

from hllm.build import build_datamodule, build_module
from hllm.config import Config, LoraConfig, TuningConfig
from hllm.errors import ConfigError
from hllm.items.backbone import load_trainable
from hllm.items.files import LLMFiles
from hllm.module import Recommender
from hllm.tuning import is_trained, tune

JOINT = ("items=llm", "user=llm", "loss=nce_official", "head=cosine_learned", "loss.num_negatives=20")
FLAG = "items.tuning"


@pytest.fixture
def changed_by_training(
    run_config: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[set[str], set[str]]]:
    """Names of parameters that a few steps changed, and of those that they did not."""

    def train(*overrides: str) -> tuple[set[str], set[str]]:
        torch.manual_seed(0)
        config = run_config(*JOINT, *overrides)
        data = build_datamodule(config)
        module = build_module(config, data)
        monkeypatch.setattr(Recommender, "log", lambda *args, **kwargs: None)
        before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
        # decay too would move what an optimizer is given
        optimizer = AdamW([p for p in module.parameters() if p.requires_grad], lr=0.01, weight_decay=0.1)
        for batch in list(data.train_dataloader())[:2]:
            module.training_step(batch, 0).backward()
            optimizer.step()
            optimizer.zero_grad()
        after = module.state_dict()
        changed = {name for name, tensor in before.items() if not torch.equal(tensor, after[name])}
        return changed, set(before) - changed

    return train


@pytest.fixture
def body(tiny_llama: Path, llm_config: Callable[..., Any]) -> Any:
    return load_trainable(LLMFiles("tiny", tiny_llama), llm_config(tiny_llama))[0]


def test_by_default_everything_is_trained(changed_by_training: Callable[..., tuple[set[str], set[str]]]) -> None:
    changed, kept = changed_by_training()
    assert not kept
    assert {"items.item_token", "head.log_scale", "items.model.norm.weight", "users.model.norm.weight"} < changed


def test_frozen_prefixes_stay_as_they_are(changed_by_training: Callable[..., tuple[set[str], set[str]]]) -> None:
    frozen = ("items.tuning.freeze=[embed_tokens,layers.0.self_attn]", "user.tuning.freeze=[norm]")
    changed, kept = changed_by_training(*frozen)
    assert kept == {
        "items.model.embed_tokens.weight",
        *(f"items.model.layers.0.self_attn.{part}_proj.weight" for part in "qkvo"),
        "users.model.norm.weight",
    }
    assert "items.model.layers.0.mlp.up_proj.weight" in changed


def test_a_frozen_item_llm_leaves_projector_and_user_model_to_train(
    changed_by_training: Callable[..., tuple[set[str], set[str]]], save_llama: Callable[..., Path], tmp_path: Path
) -> None:
    wide = save_llama(tmp_path / "wide", dim=48)
    other = ("llm@user.llm=custom", f"user.llm.model={wide}", "items.tuning.freeze=[all]", "llm.pooling=last")
    changed, kept = changed_by_training(*other)
    assert {name.split(".")[1] for name in kept} == {"model"}
    assert all(name.startswith("items.") for name in kept)
    assert "items.projector.weight" in changed


def test_lora_trains_adapters_item_projector_and_head_only(
    changed_by_training: Callable[..., tuple[set[str], set[str]]], save_llama: Callable[..., Path], tmp_path: Path
) -> None:
    """Base weights are unchanged after steps, in both towers."""
    pytest.importorskip("peft")
    wide = save_llama(tmp_path / "wide", dim=48)
    lora = ("items.tuning.lora.rank=2", "user.tuning.lora.rank=2", "llm@user.llm=custom", f"user.llm.model={wide}")
    changed, kept = changed_by_training(*lora)
    assert changed - {name for name in changed if "lora_" in name} == {
        "items.item_token",
        "items.projector.weight",
        "head.log_scale",
    }
    assert not any("lora_" in name for name in kept)
    adapted = {name.partition(".lora_")[0] for name in changed if ".lora_" in name}
    assert len(adapted) == 7 * (2 + 1), "every linear layer: 7 in each of 2 and 1 layers"


def hidden(model: Any) -> Tensor:
    states: Tensor = model.eval()(input_ids=torch.tensor([[5, 9, 12, 40]])).last_hidden_state
    return states


def test_an_untrained_adapter_changes_nothing_and_rank_and_alpha_are_those_asked_for(body: Any) -> None:
    pytest.importorskip("peft")
    before = hidden(body)
    tune(body, TuningConfig(lora=LoraConfig(rank=3, alpha=6.0)), FLAG)
    torch.testing.assert_close(hidden(body), before, atol=1e-6, rtol=1e-6)
    layer = body.layers[0].mlp.up_proj
    assert layer.lora_A["default"].weight.shape == (3, 32)
    assert layer.scaling["default"] == 2.0


def test_a_prefix_that_names_nothing_is_refused(body: Any) -> None:
    with pytest.raises(ConfigError, match=r"items\.tuning\.freeze=layer\.0: no parameter begins so; .*embed_tokens"):
        tune(body, TuningConfig(freeze=["norm", "layer.0"]), FLAG)


def test_adapters_in_a_frozen_model_are_refused(body: Any) -> None:
    with pytest.raises(ConfigError, match=r"items\.tuning\.freeze=\[all\]: leaves items\.tuning\.lora\.rank=2 nothing"):
        tune(body, TuningConfig(freeze=["all"], lora=LoraConfig(rank=2)), FLAG)


def test_without_peft_lora_says_how_to_install_it(body: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ConfigError, match=r"items\.tuning\.lora\.rank=2: needs peft; pip install hllm\[lora\]"):
        tune(body, TuningConfig(lora=LoraConfig(rank=2)), FLAG)


def test_all_freezes_the_whole_model(body: Any) -> None:
    assert is_trained(body)
    tune(body, TuningConfig(freeze=["all"]), FLAG)
    assert not is_trained(body)
