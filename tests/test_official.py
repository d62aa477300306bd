"""Weights of the official code's form: the same scores as its forward pass, and files that do not fit."""

import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import Run
from torch import Tensor
from transformers import AutoTokenizer, BertModel, LlamaForCausalLM

from hllm.config import Config
from hllm.errors import CheckpointError, ConfigError
from hllm.evaluate import checkpoint_config, load_checkpoint
from hllm.evaluate import main as evaluate
from hllm.items.text import item_texts
from hllm.official import write_checkpoint
from hllm.recommend import Recommendations
from hllm.weights import load_weights, merge_lora, read_weights

JOINT = ("items=llm", "user=llm", "loss=nce_official", "head=cosine_learned", "user.num_layers=2")
Weights = dict[str, Tensor]


@pytest.fixture(scope="module")
def official(tiny_llama: Path) -> Weights:
    """What the official code saves of two Llamas: bfloat16, with vocabulary heads."""
    torch.manual_seed(1)
    weights = {"item_emb_tokens": torch.randn(1, 1, 32), "logit_scale": torch.tensor(2.5)}
    for llm in ("item_llm", "user_llm"):
        model = LlamaForCausalLM.from_pretrained(tiny_llama)
        for name, tensor in model.state_dict().items():
            weights[f"{llm}.{name}"] = tensor + 0.1 * torch.randn_like(tensor)
    return {name: tensor.bfloat16() for name, tensor in weights.items()}


@pytest.fixture
def save(tmp_path: Path) -> Callable[[Weights], Path]:
    def saved(weights: Weights) -> Path:
        torch.save(weights, tmp_path / "pytorch_model.bin")
        return tmp_path / "pytorch_model.bin"

    return saved


@pytest.fixture
def imported(
    run_config: Callable[..., Config], save: Callable[[Weights], Path], tmp_path: Path
) -> Callable[..., Recommendations]:
    """The model out of the checkpoint that hllm.official writes."""

    def loaded(weights: Weights, *flags: str) -> Recommendations:
        ckpt = write_checkpoint(run_config(*JOINT, *flags, f"init={save(weights)}"), tmp_path / "run")
        return Recommendations(checkpoint_config(ckpt, None, None), ckpt)

    return loaded


def part(weights: Weights, prefix: str) -> Weights:
    return {name.removeprefix(prefix): tensor.float() for name, tensor in weights.items() if name.startswith(prefix)}


def expected_scores(weights: Weights, item_llm: Any, tokenizer: Any, model: Recommendations, first: int) -> Tensor:
    """The official forward pass, an item at a time, and its ranking of the catalogue after items 3, 4, 5."""
    vectors = []
    for text in item_texts(model.catalog, model.config.dataset.text):
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
        embeds = torch.cat([item_llm.get_input_embeddings()(ids), weights["item_emb_tokens"].float()], dim=1)
        start = first - ids.shape[1] if first else 0
        positions = torch.arange(start, start + embeds.shape[1])[None]
        states = item_llm(inputs_embeds=embeds, position_ids=positions, output_hidden_states=True).hidden_states
        vectors.append(states[-1][0, -1])
    items = torch.stack(vectors)
    assert model.config.user_llm is not None
    users = LlamaForCausalLM.from_pretrained(model.config.user_llm.model)
    users.load_state_dict(part(weights, "user_llm."))
    history = items[None, 2:5]
    last = users(inputs_embeds=history, output_hidden_states=True).hidden_states[-1][0, -1]
    return F.cosine_similarity(last[None], items) * weights["logit_scale"].float().exp()


@torch.no_grad()
def test_scores_are_those_of_the_official_forward_pass(
    official: Weights, imported: Callable[..., Recommendations], tiny_llama: Path
) -> None:
    model = imported(official)
    item_llm = LlamaForCausalLM.from_pretrained(tiny_llama)
    item_llm.load_state_dict(part(official, "item_llm."))
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    expected = expected_scores(official, item_llm, tokenizer, model, first=0)
    found = model.module.scores(model.history_of_titles(["3", "4", "5"]))[0]
    assert expected.std() > 0.1
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("prefix", ["", "bert."])
def test_a_bert_reads_items_at_the_official_positions(
    official: Weights, imported: Callable[..., Recommendations], tiny_llama: Path, tiny_bert: Path, prefix: str
) -> None:
    item_llm = BertModel.from_pretrained(tiny_bert).eval()
    weights = {name: tensor for name, tensor in official.items() if not name.startswith("item_llm.")}
    weights |= {f"item_llm.{prefix}{name}": tensor for name, tensor in item_llm.state_dict().items()}
    user = ["llm@user.llm=custom", f"user.llm.model={tiny_llama}"]
    model = imported(weights, f"llm.model={tiny_bert}", "llm.positions=end", "llm.max_tokens=40", *user)
    tokenizer = AutoTokenizer.from_pretrained(tiny_bert)
    expected = expected_scores(weights, item_llm, tokenizer, model, first=40)
    found = model.module.scores(model.history_of_titles(["3", "4", "5"]))[0]
    assert expected.std() > 0.1
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


def test_baichuans_fused_attention_is_cut_into_three(
    official: Weights, imported: Callable[..., Recommendations]
) -> None:
    fused = dict(official)
    for name in [name for name in official if "q_proj" in name]:
        pieces = [fused.pop(name.replace("q_proj", piece)) for piece in ("q_proj", "k_proj", "v_proj")]
        fused[name.replace("q_proj", "W_pack")] = torch.cat(pieces)
    plain = imported(official).module.state_dict()
    assert not any("W_pack" in name for name in plain)
    torch.testing.assert_close(imported(fused).module.state_dict(), plain, atol=0, rtol=0)


def test_weights_become_float32_and_unused_ones_are_counted(
    official: Weights, imported: Callable[..., Recommendations], caplog: pytest.LogCaptureFixture
) -> None:
    weights = official | {"user_llm.model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(4)}
    with caplog.at_level(logging.INFO, "hllm.weights"):
        state = imported(weights).module.state_dict()
    assert {tensor.dtype for tensor in state.values()} == {torch.float32}
    assert "4 that are not used are left out" in caplog.text, "two heads, the users' vocabulary, frequencies"


def test_the_commands_work_on_imported_weights(
    official: Weights,
    run_config: Callable[..., Config],
    save: Callable[[Weights], Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    ckpt = write_checkpoint(run_config(*JOINT, f"init={save(official)}"), tmp_path / "run")
    evaluate([f"ckpt={ckpt}", "accelerator=cpu"])
    assert "hllm-joint-tiny nce_official" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "flags", "message"),
    [
        ({"item_llm.model.norm.weight": None}, [], r"items\.model\.norm\.weight is not in the file; choose the Item"),
        ({"item_llm.model.extra": torch.ones(1)}, [], r"item_llm\.model\.extra has no place in the model"),
        ({"user_embedding": torch.ones(1)}, [], r"user_embedding has no place in the model"),
        (
            {"user_llm.model.norm.weight": torch.ones(16)},
            [],
            r"user_llm\.model\.norm\.weight is \(16,\) in the file, \(32,\) in the model; .* User LLM",
        ),
        ({}, ["llm.num_layers=1"], r"item_llm\.model\.layers\.1\.\S+ \(and 8 more\) has no place.*llm\.num_layers="),
        ({}, ["user.num_layers=1"], r"user_llm\.model\.layers\.1\.\S+ \(and 8 more\) has no place.*user\.num_layers="),
        ({}, ["head=cosine"], r"logit_scale has no place in the model; head=cosine_learned has a learned scale"),
        ({"logit_scale": None}, [], r"head\.log_scale is not in the file; .*head=cosine has none"),
        ({"item_emb_tokens": None}, [], r"items\.item_token is not in the file; .*llm\.pooling=mean has none"),
        ({}, ["llm.pooling=mean"], r"item_emb_tokens has no place in the model; llm\.pooling=item"),
        ({"item_emb_tokens": torch.ones(1, 2, 32)}, [], r"item_emb_tokens is \(1, 2, 32\), expected \(1, 1, E\)"),
    ],
)
def test_weights_that_do_not_fit_are_named(
    official: Weights, imported: Callable[..., Recommendations], change: dict[str, Any], flags: list[str], message: str
) -> None:
    weights = {name: tensor for name, tensor in (official | change).items() if tensor is not None}
    with pytest.raises(CheckpointError, match=r"init=\S+pytorch_model\.bin: " + message):
        imported(weights, *flags)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "torn, or not a file of weights"),
        (b"PK\x03\x04 half", "torn, or not a file of weights"),
        ({"epoch": 1}, "neither a checkpoint of hllm.train nor"),
        ({"item_llm.norm": 1}, "neither a checkpoint of hllm.train nor"),
        ([torch.ones(1)], "neither a checkpoint of hllm.train nor"),
    ],
)
def test_other_files_are_refused(tmp_path: Path, content: Any, message: str) -> None:
    path = tmp_path / "pytorch_model.bin"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    with pytest.raises(CheckpointError, match=message):
        read_weights(path)


def test_a_missing_file_is_named_before_the_data_is_read(run_config: Callable[..., Config], tmp_path: Path) -> None:
    config = run_config(*JOINT, "init=/no/where.bin", "dataset.root=/no/data")
    with pytest.raises(CheckpointError, match=r"init=/no/where\.bin: no such file"):
        write_checkpoint(config, tmp_path)
    with pytest.raises(ConfigError, match="init= is missing"):
        write_checkpoint(run_config(*JOINT), tmp_path)


def test_a_folder_is_refused_as_one(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"^init=.*: is a folder; .*deepspeed"):
        read_weights(tmp_path)


class _Runs:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[Path]]:
        return Path.touch, (self.path,)


def test_no_code_is_run_out_of_the_file(tmp_path: Path) -> None:
    torch.save({"item_llm.x": _Runs(tmp_path / "ran")}, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError):
        read_weights(tmp_path / "pytorch_model.bin")
    assert not (tmp_path / "ran").exists()


STILL = ("trainer.max_epochs=1", "optimizer.lr=1e-12")


def test_a_run_starts_from_official_weights(
    official: Weights, run_training: Callable[..., Run], save: Callable[[Weights], Path]
) -> None:
    run = run_training(*JOINT, *STILL, f"init={save(official)}")
    checkpoint = load_checkpoint(run.best)
    state = checkpoint["state_dict"]
    name = "layers.1.mlp.up_proj.weight"
    torch.testing.assert_close(state[f"items.model.{name}"], official[f"item_llm.model.{name}"].float())
    torch.testing.assert_close(state[f"users.model.{name}"], official[f"user_llm.model.{name}"].float())
    assert state["head.log_scale"] == pytest.approx(2.5)
    assert checkpoint["epoch"] == 0


def test_a_joint_run_starts_from_a_checkpoint_of_other_data(
    joint_run: Run, run_training: Callable[..., Run], tmp_path: Path
) -> None:
    root = shutil.copytree(str(joint_run.config.dataset.root), tmp_path / "data")
    with (root / "u.data").open("a") as file:
        file.write("1\t30\t5\t1\n")
    flags = ("user.num_layers=1", "loss.num_negatives=8", f"dataset.root={root}")
    run = run_training(*JOINT, *STILL, *flags, f"init={joint_run.best}")
    before, after = (load_checkpoint(each.best) for each in (joint_run, run))
    assert before["identity"] != after["identity"]
    torch.testing.assert_close(after["state_dict"], before["state_dict"])


def test_weights_of_item_ids_start_on_the_same_catalogue_only(
    id_run: Run, run_training: Callable[..., Run], tmp_path: Path
) -> None:
    again = run_training("items=id", *STILL, f"init={id_run.best}")
    before, after = (load_checkpoint(run.best)["state_dict"] for run in (id_run, again))
    torch.testing.assert_close(after, before)
    root = shutil.copytree(str(id_run.config.dataset.root), tmp_path / "data")
    with (root / "u.item").open("a") as items, (root / "u.data").open("a") as events:
        items.write(f"31|new|01-Jan-1995||http://m|{'0|' * 18}0\n")
        events.write("1\t31\t5\t1\n")
    with pytest.raises(CheckpointError, match="items=id was trained with catalogue"):
        run_training("items=id", *STILL, f"dataset.root={root}", f"init={id_run.best}")


def test_another_kind_of_items_starts_anew_from_pretrained_weights(
    id_run: Run, run_training: Callable[..., Run], tiny_llama: Path
) -> None:
    run = run_training("items=llm", "user.dim=16", *STILL, f"init={id_run.best}")
    state, before = (load_checkpoint(each.best)["state_dict"] for each in (run, id_run))
    users = {name: tensor for name, tensor in before.items() if name.startswith("users.")}
    assert users
    torch.testing.assert_close({name: state[name] for name in users}, users)
    pretrained = LlamaForCausalLM.from_pretrained(tiny_llama).model.norm.weight
    torch.testing.assert_close(state["items.model.norm.weight"], pretrained.detach())


LORA = ("items.tuning.lora.rank=2", "user.tuning.lora.rank=2")


def test_low_rank_updates_begin_beside_the_weights_of_a_file(joint_run: Run, run_training: Callable[..., Run]) -> None:
    same = ("user.num_layers=1", "loss.num_negatives=8")
    run = run_training(*JOINT, *STILL, *same, *LORA, f"init={joint_run.best}")
    # the updates are 0 at first, so the first results are those of the file
    assert run.evaluation.results["test"]["all"] == pytest.approx(joint_run.evaluation.results["test"]["all"])
    assert any("lora_A" in name for name in load_checkpoint(run.best)["state_dict"])


def test_low_rank_updates_are_merged_where_the_model_has_none(
    run_training: Callable[..., Run], run_config: Callable[..., Config], tmp_path: Path
) -> None:
    tuned = ("trainer.max_epochs=1", "optimizer.lr=0.1", "loss.num_negatives=8")
    run = run_training(*JOINT, *tuned, *LORA)
    ckpt = write_checkpoint(run_config(*JOINT, *tuned, f"init={run.best}"), tmp_path)
    models = [Recommendations(checkpoint_config(path, None, None), path) for path in (run.best, ckpt)]
    adapted, merged = (model.module.scores(model.history_of_titles(["3", "4"])) for model in models)
    assert not any("lora" in name for name in models[1].module.state_dict())
    torch.testing.assert_close(merged, adapted, atol=1e-4, rtol=0)
    with pytest.raises(CheckpointError, match=r"items\.tuning\.lora has alpha / rank 8\.0 in the file, 1\.0 here"):
        write_checkpoint(run_config(*JOINT, *tuned, *LORA, "items.tuning.lora.alpha=2", f"init={run.best}"), tmp_path)


def test_an_update_is_scaled_and_added() -> None:
    tensors = {
        "items.model.q.base_layer.weight": torch.zeros(3, 2),
        "items.model.q.base_layer.bias": torch.ones(3),
        "items.model.q.lora_A.default.weight": torch.tensor([[1.0, 2.0]]),
        "items.model.q.lora_B.default.weight": torch.tensor([[1.0], [0.0], [-1.0]]),
    }
    merge_lora(tensors, "items.", 0.5)
    assert tensors.keys() == {"items.model.q.weight", "items.model.q.bias"}
    assert tensors["items.model.q.weight"].tolist() == [[0.5, 1.0], [0.0, 0.0], [-0.5, -1.0]]


def test_a_run_that_began_with_init_resumes_without_it(
    joint_run: Run, run_training: Callable[..., Run], run_config: Callable[..., Config]
) -> None:
    flags = (*JOINT, "user.num_layers=1", "loss.num_negatives=8", "trainer.max_epochs=1")
    run = run_training(*flags, f"init={joint_run.best}")
    again = run_training(*flags, f"ckpt={run.last}")
    assert again.evaluation.results == run.evaluation.results
    with pytest.raises(ConfigError, match="give one of them"):
        run_config(*flags, f"ckpt={run.last}", f"init={joint_run.best}")


def test_weights_are_checked_before_any_is_written(
    official: Weights, imported: Callable[..., Recommendations], save: Callable[[Weights], Path]
) -> None:
    module = imported(official).module
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    changed = {name: tensor + 1 for name, tensor in official.items() if name != "logit_scale"}
    with pytest.raises(CheckpointError):
        load_weights(module, read_weights(save(changed)))
    torch.testing.assert_close(module.state_dict(), before, atol=0, rtol=0)
