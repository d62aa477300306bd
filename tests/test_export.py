"""Checkpoints as plain Hugging Face folders, and stage II on the vectors of a tuned Item LLM."""

import errno
import json
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from conftest import NUM_MOVIES, Run, encode_rows
from torch import Tensor
from transformers import AutoModel, AutoTokenizer

from hllm.build import build_datamodule, cache_dir
from hllm.config import CachedItemsConfig, Config, Dtype, LLMConfig, LLMUserConfig, Pooling, compose
from hllm.data.delimited import read_catalog
from hllm.embed import embed_checkpoint, quoted, stage_two_flags, tuned_llm
from hllm.errors import CacheError, CheckpointError, ConfigError
from hllm.evaluate import checkpoint_config, load_checkpoint
from hllm.evaluate import main as evaluate
from hllm.export import export, main
from hllm.items.cache import embed_catalog
from hllm.items.text import item_texts
from hllm.recommend import Recommendations

EXACT = 5e-6
"Of float32 vectors, whatever the batch."


def config_of(run: Run) -> Config:
    return checkpoint_config(run.best, None, None)


def load(run: Run) -> Recommendations:
    return Recommendations(config_of(run), run.best)


@pytest.fixture(scope="module")
def folder(joint_run: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("export") / "folder"
    assert export(joint_run.best, config_of(joint_run), out) == [
        "hllm.json",
        "hllm.safetensors",
        "item_llm",
        "user_llm",
    ]
    return out


def plain(folder: Path) -> Any:
    """As any program reads it; nothing may be missing."""
    model, report = AutoModel.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values()), report
    return model.eval()


@torch.no_grad()
def plain_vectors(folder: Path, texts: list[str]) -> Tensor:
    model, tokenizer = plain(folder), AutoTokenizer.from_pretrained(folder)
    item_token = safetensors.torch.load_file(folder / "item_token.safetensors")["item_token"]
    vectors = []
    for text in texts:
        embeds = model.get_input_embeddings()(tokenizer(text, return_tensors="pt")["input_ids"])
        embeds = torch.cat([embeds, item_token[None, None]], dim=1)
        vectors.append(model(inputs_embeds=embeds).last_hidden_state[0, -1])
    return torch.stack(vectors)


@torch.no_grad()
def test_plain_transformers_gives_our_item_vectors(joint_run: Run, folder: Path) -> None:
    model = load(joint_run)
    texts = item_texts(model.catalog, model.config.dataset.text)
    found = plain_vectors(folder / "item_llm", texts)
    torch.testing.assert_close(found, model.module.items.all(), atol=EXACT, rtol=0)


@torch.no_grad()
def test_plain_transformers_gives_our_user_vectors(joint_run: Run, folder: Path) -> None:
    model = load(joint_run)
    vectors = torch.randn(1, 6, 32)
    found = plain(folder / "user_llm")(inputs_embeds=vectors).last_hidden_state
    expected = encode_rows(model.module.users, vectors, torch.ones(1, 6, dtype=torch.bool), torch.zeros(1, 6))
    torch.testing.assert_close(found, expected, atol=EXACT, rtol=0)


def test_what_stands_beside_the_models_is_written(joint_run: Run, folder: Path) -> None:
    state = load_checkpoint(joint_run.best)["state_dict"]
    rest = safetensors.torch.load_file(folder / "hllm.safetensors")
    assert rest == {"head.log_scale": state["head.log_scale"]}
    content = json.loads((folder / "hllm.json").read_text())
    assert content["items"]["llm"] == {"name": "tiny", "pooling": "item", "positions": "start", "max_tokens": 63}
    assert content["text"]["template"] == "title: {title}genres: {genres}"
    assert content["head"]["learned"] is True


def test_no_path_of_this_machine_is_written(joint_run: Run, folder: Path) -> None:
    for path in folder.rglob("*.json"):
        assert str(joint_run.config.llm.model) not in path.read_text(), path


@torch.no_grad()
def test_low_rank_updates_are_merged(run_training: Callable[..., Run], tmp_path: Path) -> None:
    lora = ["items.tuning.lora.rank=2", "user.tuning.lora.rank=2", "optimizer.lr=0.1", "trainer.max_epochs=1"]
    run = run_training("items=llm", "user=llm", *lora)
    model = load(run)
    export(run.best, config_of(run), tmp_path / "out")
    found = plain_vectors(tmp_path / "out" / "item_llm", item_texts(model.catalog, model.config.dataset.text))
    torch.testing.assert_close(found, model.module.items.all(), atol=2e-5, rtol=0)
    plain(tmp_path / "out" / "user_llm")


def test_a_bert_and_a_projector_are_written(run_training: Callable[..., Run], tiny_bert: Path, tmp_path: Path) -> None:
    run = run_training("items=llm", f"llm.model={tiny_bert}", "trainer.max_epochs=1")
    assert export(run.best, config_of(run), tmp_path / "out") == ["hllm.json", "hllm.safetensors", "item_llm"]
    plain(tmp_path / "out" / "item_llm")
    rest = safetensors.torch.load_file(tmp_path / "out" / "hllm.safetensors")
    assert rest["items.projector.weight"].shape == (16, 32)
    assert any(name.startswith("users.") for name in rest)
    assert rest["head.log_scale"].exp() == pytest.approx(1 / 0.07)


def test_a_user_llm_over_ids_is_written_with_its_table(run_training: Callable[..., Run], tmp_path: Path) -> None:
    run = run_training("items=id", "user=llm", "trainer.max_epochs=1")
    assert export(run.best, config_of(run), tmp_path / "out") == ["hllm.json", "hllm.safetensors", "user_llm"]
    rest = safetensors.torch.load_file(tmp_path / "out" / "hllm.safetensors")
    assert rest["items.table.weight"].shape == (NUM_MOVIES + 1, 32)


def test_a_run_without_a_language_model_of_its_own_has_nothing_to_export(cached_run: Run, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="items=cached user=transformer train no language model"):
        export(cached_run.best, config_of(cached_run), tmp_path / "out")
    with pytest.raises(ConfigError, match="items=cached trains no Item LLM"):
        tuned_llm(cached_run.best, config_of(cached_run))


def test_a_folder_with_something_in_it_is_left_alone(
    joint_run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine").touch()
    with pytest.raises(SystemExit):
        main([f"ckpt={joint_run.best}", f"out={tmp_path}"])
    assert "is there already, and not an empty folder" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_a_full_disk_leaves_nothing(joint_run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("hllm.export._save_tensors", full)
    with pytest.raises(CacheError, match=r"cannot write .*: No space left on device"):
        export(joint_run.best, config_of(joint_run), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_an_empty_folder_is_filled(joint_run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main([f"ckpt={joint_run.best}", f"out={tmp_path}"])
    assert capsys.readouterr().out.strip() == f"{tmp_path}: hllm.json, hllm.safetensors, item_llm, user_llm"


@pytest.mark.parametrize(("dtype", "tolerance"), [(Dtype.float32, EXACT), (Dtype.bfloat16, 0.1)])
def test_an_exported_item_llm_embeds_the_vectors_of_the_live_tower(
    joint_run: Run, folder: Path, tmp_path: Path, dtype: Dtype, tolerance: float
) -> None:
    model = load(joint_run)
    llm = LLMConfig(name="x", model=str(folder / "item_llm"), pooling=Pooling.item, max_tokens=63, dtype=dtype)
    table = embed_catalog(model.catalog, model.config.dataset.text, llm, tmp_path)
    with torch.no_grad():
        expected = model.module.items.all()
    torch.testing.assert_close(table.vectors.float(), expected, atol=tolerance, rtol=0)


def flags_of(printed: str) -> list[str]:
    return shlex.split(printed.strip().splitlines()[-1])[3:]


@pytest.fixture
def stage_two(
    run_training: Callable[..., Run], capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[Run, list[str]]]:
    """A run with the flags that hllm.embed ckpt= prints, beside those of the data set, and these flags."""

    def trained(run: Run, *more: str) -> tuple[Run, list[str]]:
        capsys.readouterr()
        embed_checkpoint([f"ckpt={run.best}", "dtype=float32"])
        flags = flags_of(capsys.readouterr().out)
        return run_training("loss=nce_official", "loss.num_negatives=8", *flags, *more), flags

    return trained


def assert_alike(joint: Run, stage_two: Run) -> None:
    """Scores of one history, and all test metrics."""
    first, second = (load(each) for each in (joint, stage_two))
    history = first.history_of_titles(["3", "4", "5"])
    with torch.no_grad():
        expected = first.module.scores(history)
        torch.testing.assert_close(second.module.scores(history), expected, atol=1e-4, rtol=0)
    assert stage_two.evaluation.results["test"]["all"] == pytest.approx(joint.evaluation.results["test"]["all"])


def test_stage_two_begins_where_joint_training_ended(
    joint_run: Run, stage_two: Callable[..., tuple[Run, list[str]]]
) -> None:
    run, _ = stage_two(joint_run, "trainer.max_epochs=1", "optimizer.lr=1e-12")
    before, after = (load_checkpoint(each.best)["state_dict"] for each in (joint_run, run))
    for name, tensor in after.items():
        if not name.startswith("items."):
            torch.testing.assert_close(tensor, before[name])
    assert_alike(joint_run, run)


def test_the_vectors_in_the_store_are_the_live_towers(joint_run: Run) -> None:
    model = load(joint_run)
    llm = tuned_llm(joint_run.best, model.config, Dtype.float32)
    table = embed_catalog(model.catalog, model.config.dataset.text, llm, cache_dir(model.config))
    with torch.no_grad():
        torch.testing.assert_close(table.vectors, model.module.items.all(), atol=EXACT, rtol=0)


@pytest.mark.parametrize(
    "flags",
    [
        [],
        [
            "llm.positions=end",
            "llm.max_tokens=40",
            "llm.num_layers=1",
            "head.temperature=0.1",
            "dataset.text.clean=true",
        ],
        [
            "dataset.text.selection=bm25_words",
            'dataset.text.template="{title} is: \\"{genres}\\""',
            "user.num_layers=2",
        ],
        ["llm.pooling=mean", "dataset.text.prompt='Say = {x}, '", "user.tuning.freeze=[layers.0.,norm]"],
    ],
)
def test_the_printed_flags_make_the_same_table(
    run_config: Callable[..., Config], joint_run: Run, flags: list[str]
) -> None:
    config = run_config("items=llm", "user=llm", "head=cosine_learned", *flags)
    llm = LLMConfig(**{**vars(config.llm), "model": "/some folder/item_llm", "num_layers": None, "name": "tiny-tuned"})
    printed = stage_two_flags(config, llm, joint_run.best)
    again = compose([*shlex.split(shlex.join(printed)), f"dataset.root={config.dataset.root}"])
    assert (again.llm, again.head, again.dataset.text) == (llm, config.head, config.dataset.text)
    assert again.user_llm is not None
    assert again.user_llm.model == config.llm.model
    assert isinstance(again.user, LLMUserConfig)
    assert isinstance(config.user, LLMUserConfig)
    assert (again.user.num_layers, again.user.tuning) == (config.user.num_layers, config.user.tuning)
    assert isinstance(again.items, CachedItemsConfig)
    assert (again.items.transform.name, again.items.adaptor.name) == ("raw", "none")


def test_models_in_conf_are_named_in_the_flags(run_config: Callable[..., Config], joint_run: Run) -> None:
    config = compose(["items=llm", "user=llm", "llm=tinyllama"])
    printed = stage_two_flags(config, LLMConfig(name="tuned", model="folder"), joint_run.best)
    assert "llm@user.llm=tinyllama" in printed
    assert not any(flag.startswith("user.llm.") for flag in printed)


@pytest.mark.parametrize(
    ("value", "expected"),
    [(None, "null"), (True, "true"), (3, "3"), ("a/b-1.x", "a/b-1.x"), ("a b", '"a b"'), (["a", "b c"], '[a,"b c"]')],
)
def test_values_are_quoted_for_hydra(value: object, expected: str) -> None:
    assert quoted(value) == expected


def test_stage_two_begins_with_the_projector_of_joint_training(
    run_training: Callable[..., Run], stage_two: Callable[..., tuple[Run, list[str]]]
) -> None:
    joint = run_training("items=llm", "trainer.max_epochs=1")
    run, flags = stage_two(joint, "trainer.max_epochs=1", "optimizer.lr=1e-12")
    adaptor = {"items.transform=raw", "items.adaptor=linear"}
    assert adaptor | {"user=transformer", "user.dim=16"} <= set(flags)
    assert_alike(joint, run)


@pytest.mark.parametrize("adaptor", ["transform=whiten", "adaptor=mlp"])
def test_a_projector_is_no_adaptor_of_another_form(
    run_training: Callable[..., Run], stage_two: Callable[..., tuple[Run, list[str]]], adaptor: str
) -> None:
    joint = run_training("items=llm", "trainer.max_epochs=1")
    run, _ = stage_two(joint, "trainer.max_epochs=1", "optimizer.lr=1e-12", f"items.{adaptor}")
    projector = load_checkpoint(joint.best)["state_dict"]["items.projector.weight"]
    items = [tensor for name, tensor in load_checkpoint(run.best)["state_dict"].items() if name.startswith("items.")]
    assert items
    assert not any(tensor.shape == projector.shape and torch.allclose(tensor, projector) for tensor in items)


def test_the_export_is_made_once_and_swept_after_a_kill(
    run_training: Callable[..., Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = run_training("items=llm", "user=llm", "trainer.max_epochs=1", "optimizer.lr=0.02", "seed=1")
    config = checkpoint_config(run.best, None, str(tmp_path))
    folder = Path(str(tuned_llm(run.best, config).model))
    shutil.rmtree(folder)
    killed = folder.parent / ".tmp-1-item_llm"
    killed.mkdir()
    assert tuned_llm(run.best, config).model == str(folder)
    assert not killed.exists()
    monkeypatch.setattr("hllm.export._export_item_llm", lambda *_: pytest.fail("written again"))
    assert tuned_llm(run.best, config).model == str(folder)


def test_embedding_takes_no_flags_of_training_beside_a_checkpoint(
    joint_run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        embed_checkpoint([f"ckpt={joint_run.best}", "dataset.max_history=3"])
    assert "usage: python -m hllm.embed ckpt=" in capsys.readouterr().err


def test_new_items_stand_beside_the_catalogue_of_a_tuned_item_llm(joint_run: Run, tmp_path: Path) -> None:
    catalog = build_datamodule(joint_run.config).catalog
    path = tmp_path / "new.csv"
    path.write_text('id,title,genres\n900,word5 word6,Drama\n901,"word5, it\'s back",\n')
    model = Recommendations(config_of(joint_run), joint_run.best, read_catalog(path))
    assert model.module.items.num_items == len(catalog) + 2
    history = model.history_of_titles(["Word5 word6", "901", "3"])
    assert history.items.tolist() == [[NUM_MOVIES + 1, NUM_MOVIES + 2, 3]]
    ranked = model.rank(model.history_of_user("2"), k=100)
    assert {"word5 word6", "word5, it's back"} <= {title for title, _ in ranked}
    with torch.no_grad():
        vectors = model.module.items.all()
        torch.testing.assert_close(vectors[:NUM_MOVIES], load(joint_run).module.items.all(), atol=EXACT, rtol=0)
    texts = item_texts(model.catalog, model.config.dataset.text)[NUM_MOVIES:]
    export(joint_run.best, config_of(joint_run), tmp_path / "out")
    torch.testing.assert_close(
        vectors[NUM_MOVIES:], plain_vectors(tmp_path / "out" / "item_llm", texts), atol=EXACT, rtol=0
    )


def test_a_checkpoint_needs_no_pretrained_weights(
    run_training: Callable[..., Run], tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    llm = shutil.copytree(tiny_llama, tmp_path / "llm")
    run = run_training("items=llm", "user=llm", "trainer.max_epochs=1", f"llm.model={llm}")
    (llm / "model.safetensors").unlink()
    capsys.readouterr()
    evaluate([f"ckpt={run.best}", "accelerator=cpu"])
    assert capsys.readouterr().out.strip() == (run.folder / "report.md").read_text().strip()
    export(run.best, config_of(run), tmp_path / "out")


def test_another_model_in_the_place_of_the_trained_one_is_named(
    run_training: Callable[..., Run], save_llama: Callable[..., Path], tiny_llama: Path, tmp_path: Path
) -> None:
    llm = shutil.copytree(tiny_llama, tmp_path / "llm")
    run = run_training("items=llm", "user=llm", "trainer.max_epochs=1", f"llm.model={llm}")
    shutil.rmtree(llm)
    save_llama(llm, dim=16)
    message = r"ckpt=.*: items\.model\.embed_tokens\.weight is \(64, 32\) in the file, \(64, 16\) in .*put that back"
    with pytest.raises(CheckpointError, match=message):
        export(run.best, config_of(run), tmp_path / "out")
    assert not (tmp_path / "out").exists()
