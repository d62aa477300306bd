"""A training run from data files to run folder."""

import csv
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from conftest import NUM_MOVIES, NUM_USERS, Run

from hllm.config import Config, from_plain, to_plain
from hllm.data.schema import Batch
from hllm.errors import CheckpointError, ConfigError
from hllm.evaluate import load_checkpoint
from hllm.fit import train
from hllm.module import Recommender


@pytest.fixture(params=["id", "cached"])
def run(request: pytest.FixtureRequest) -> Run:
    finished: Run = request.getfixturevalue(f"{request.param}_run")
    return finished


def columns(path: Path) -> dict[str, list[float]]:
    """metrics.csv by column, without empty cells."""
    with path.open() as file:
        rows = list(csv.DictReader(file))
    return {name: [float(row[name]) for row in rows if row[name]] for name in rows[0]}


def test_the_run_folder_holds_everything_that_a_number_is_traced_by(run: Run) -> None:
    found = {str(path.relative_to(run.folder)) for path in run.folder.rglob("*") if path.is_file()}
    wanted = {"config.yaml", "environment.json", "metrics.csv", "metrics.json", "report.md", "ranks.parquet"}
    assert wanted | {"checkpoints/best.ckpt", "checkpoints/last.ckpt"} <= found


def test_config_yaml_is_the_resolved_config(run: Run) -> None:
    assert from_plain(yaml.safe_load((run.folder / "config.yaml").read_text())) == run.config


def test_environment_json_holds_revision_and_versions(run: Run) -> None:
    environment = json.loads((run.folder / "environment.json").read_text())
    assert environment["torch"] == torch.__version__
    assert {"git", "python", "hllm", "lightning", "transformers"} <= set(environment)


def test_metrics_json_holds_what_train_returned(run: Run) -> None:
    stored = json.loads((run.folder / "metrics.json").read_text())
    assert stored["results"] == run.evaluation.results
    assert set(stored["results"]) == {"val", "test", "popularity"}
    assert stored["results"]["test"]["all"]["users"] == NUM_USERS
    assert stored["epochs"] == 3


def test_metrics_csv_holds_the_curve_and_the_result(run: Run) -> None:
    found = columns(run.folder / "metrics.csv")
    assert len(found["val/ndcg@10"]) == 4  # each epoch's, and the best checkpoint's again
    assert max(found["val/ndcg@10"]) == found["val/ndcg@10"][-1]
    assert found["test/hr@10"] == [pytest.approx(run.evaluation.results["test"]["all"]["hr@10"])]


def test_the_report_names_data_protocol_and_popularity(run: Run) -> None:
    report = (run.folder / "report.md").read_text()
    assert "protocol leave_one_out" in report
    assert f"data {run.evaluation.identity['interactions']}" in report
    assert "| popularity" in report
    assert f"| {run.config.system} ce" in report


@pytest.mark.parametrize("name", ["best", "last"])
def test_checkpoints_load_safely_and_hold_no_item_vectors(cached_run: Run, name: str) -> None:
    checkpoint = torch.load(getattr(cached_run, name), weights_only=True)
    assert checkpoint["identity"] == cached_run.evaluation.identity
    assert all(NUM_MOVIES not in value.shape for value in checkpoint["state_dict"].values())


def test_a_checkpoint_of_the_id_table_holds_the_table(id_run: Run) -> None:
    state = torch.load(id_run.best, weights_only=True)["state_dict"]
    assert state["items.table.weight"].shape == (NUM_MOVIES + 1, id_run.config.user.dim)


def test_how_alike_items_are_is_logged_before_and_after_the_transform(cached_run: Run) -> None:
    found = columns(cached_run.folder / "metrics.csv")
    assert abs(found["items/mean_cosine"][0]) < abs(found["items/mean_cosine_raw"][0])


def test_one_seed_gives_the_same_numbers_twice(id_run: Run, run_training: Callable[..., Run]) -> None:
    assert run_training("items=id").evaluation == id_run.evaluation
    assert run_training("items=id", "seed=1").evaluation.results != id_run.evaluation.results


@pytest.mark.parametrize("loss", ["ce", "nce"])
@pytest.mark.parametrize("items", ["id", "cached"])
def test_one_batch_can_be_learned_by_heart(run_training: Callable[..., Run], loss: str, items: str) -> None:
    run = run_training("debug=overfit", f"items={items}", f"loss={loss}", "trainer.max_epochs=40")
    losses = columns(run.folder / "metrics.csv")["train/loss"]
    assert losses[-1] < 0.5 * losses[0]


def test_the_model_learns_which_item_follows(run_training: Callable[..., Run]) -> None:
    results = run_training("items=id", "trainer.max_epochs=25", "user.dropout=0.0").evaluation.results
    assert results["test"]["all"]["hr@5"] > results["popularity"]["all"]["hr@5"] + 0.3


@pytest.mark.parametrize(
    "overrides",
    [
        ["dataset.train_rows=prefixes", "user.time_buckets=sqrt", "user.time_reference=end"],
        ["user.relative_position_bias=true", "user.attention_dropout=0.1", "head.learned=true"],
        ["dataset.max_history=3", "loss=nce", "loss.in_batch=false", "loss.num_negatives=8"],
        ["trainer.precision=bf16-mixed", "optimizer.schedule=constant", "trainer.accumulate_grad_batches=2"],
        ["items=cached", "items.adaptor=mlp", "items.transform=center", "head=dot"],
    ],
    ids=lambda overrides: overrides[0],
)
def test_other_choices_train_too(run_training: Callable[..., Run], overrides: list[str]) -> None:
    run = run_training("items=id", "trainer.max_epochs=1", *overrides)
    assert run.evaluation.results["test"]["all"]["mrr"] > 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU trains so")
def test_flex_attention_is_refused_by_the_first_step_on_a_cpu(run_training: Callable[..., Run]) -> None:
    with pytest.raises(ConfigError, match=r"^user\.attention=flex: has no backward pass on a CPU; set auto$"):
        run_training("items=id", "user.attention=flex", "user.num_heads=1", "user.relative_position_bias=true")


def test_early_stopping_ends_a_run_that_no_longer_improves(run_training: Callable[..., Run]) -> None:
    run = run_training("items=id", "trainer.max_epochs=50", "callbacks.patience=1", "optimizer.lr=1e-8")
    assert json.loads((run.folder / "metrics.json").read_text())["epochs"] < 10


class Killed(Exception):
    pass


def _forgets(module: Recommender, batch: Batch, index: int) -> torch.Tensor:
    """A training step after which the model knows nothing."""
    module.items.table.weight.data.zero_()
    return (module.items.table.weight * 0).sum()


def best_score(run: Run) -> float:
    callbacks = torch.load(run.last, weights_only=True)["callbacks"]
    return next(state["best_model_score"].item() for name, state in callbacks.items() if "ModelCheckpoint" in name)


@pytest.fixture(scope="module")
def stopped_run(run_config: Callable[..., Config], tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run that died in its third epoch of three."""
    config, folder = run_config("items=id"), tmp_path_factory.mktemp("stopped")
    with pytest.MonkeyPatch.context() as patch:
        step = Recommender.training_step

        def dies(self: Recommender, batch: object, index: int) -> object:
            if self.current_epoch == 2 and index == 1:
                raise Killed
            return step(self, batch, index)

        patch.setattr(Recommender, "training_step", dies)
        with pytest.raises(Killed):
            train(config, folder)
    return Run(config, folder, None)


def test_a_stopped_run_resumes_to_the_numbers_of_an_unbroken_one(
    stopped_run: Run, id_run: Run, run_training: Callable[..., Run]
) -> None:
    again = run_training("items=id", f"ckpt={stopped_run.last}")
    assert again.evaluation.results == id_run.evaluation.results
    weights, expected = (torch.load(run.last, weights_only=True)["state_dict"] for run in (again, id_run))
    assert all(torch.equal(weights[name], expected[name]) for name in expected)


def test_the_best_checkpoint_so_far_counts_on_after_a_resume(
    stopped_run: Run, run_training: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever is worse later does not replace it, so the numbers stay the best ones."""
    monkeypatch.setattr("hllm.module.Recommender.training_step", _forgets)
    again = run_training("items=id", f"ckpt={stopped_run.last}")
    assert (
        torch.load(again.best, weights_only=True)["epoch"] == torch.load(stopped_run.best, weights_only=True)["epoch"]
    )
    assert again.evaluation.results["val"]["all"]["ndcg@10"] == pytest.approx(best_score(stopped_run))


def test_a_last_checkpoint_alone_is_resumed_with_a_new_best(
    stopped_run: Run, run_training: Callable[..., Run], tmp_path: Path
) -> None:
    (tmp_path / "last.ckpt").write_bytes(stopped_run.last.read_bytes())
    again = run_training("items=id", f"ckpt={tmp_path / 'last.ckpt'}")
    assert torch.load(again.best, weights_only=True)["epoch"] == 2


def test_a_finished_run_resumes_to_its_own_result(id_run: Run, run_training: Callable[..., Run]) -> None:
    assert run_training("items=id", f"ckpt={id_run.last}").evaluation == id_run.evaluation


def test_resuming_under_another_config_names_the_keys(stopped_run: Run, run_training: Callable[..., Run]) -> None:
    message = r"last\.ckpt belongs to another config: seed was 0, now 1; user\.num_layers was 1, now 2$"
    with pytest.raises(CheckpointError, match=message):
        run_training("items=id", f"ckpt={stopped_run.last}", "user.num_layers=2", "seed=1")


def test_a_checkpoint_of_an_earlier_version_is_resumed(
    stopped_run: Run, id_run: Run, run_training: Callable[..., Run], tmp_path: Path
) -> None:
    checkpoint = torch.load(stopped_run.last, weights_only=True)
    config = checkpoint["hyper_parameters"]["config"]
    del config["dataset"]["eval_history"], config["loss"]["chunk_size"], config["callbacks"]["collapse_patience"]
    torch.save(checkpoint, tmp_path / "last.ckpt")
    shutil.copy(stopped_run.best, tmp_path)
    again = run_training("items=id", f"ckpt={tmp_path / 'last.ckpt'}")
    assert again.evaluation.results == id_run.evaluation.results


def test_a_folder_is_not_resumed(stopped_run: Run, run_training: Callable[..., Run]) -> None:
    with pytest.raises(CheckpointError, match=r"ckpt=.*checkpoints: is a folder; .*deepspeed"):
        run_training("items=id", f"ckpt={stopped_run.last.parent}")


@pytest.mark.parametrize("content", [b"", b"torn", None])
def test_resuming_from_a_torn_or_missing_checkpoint_is_refused(
    stopped_run: Run, run_training: Callable[..., Run], tmp_path: Path, content: bytes | None
) -> None:
    path = tmp_path / "last.ckpt"
    path.write_bytes(stopped_run.last.read_bytes()[:5000] if content is None else content)
    with pytest.raises(CheckpointError, match=r"ckpt=.*last\.ckpt: torn, or not a checkpoint of hllm\.train"):
        run_training("items=id", f"ckpt={path}")


def test_a_diverging_run_says_so(run_training: Callable[..., Run]) -> None:
    with pytest.raises(FloatingPointError, match=r"training diverged; lower optimizer\.lr"):
        run_training("items=id", "optimizer.lr=1e30", "trainer.gradient_clip_val=null")


def test_the_config_that_was_checked_is_the_one_that_is_stored(id_run: Run) -> None:
    assert torch.load(id_run.best, weights_only=True)["hyper_parameters"]["config"] == to_plain(id_run.config)


def test_a_checkpoint_says_which_dtype_its_vectors_have(cached_run: Run) -> None:
    stored = load_checkpoint(cached_run.folder / "checkpoints" / "best.ckpt")["hyper_parameters"]["config"]
    assert stored["llm"]["dtype"] in ("float32", "bfloat16", "float16")


@pytest.mark.skipif(torch.cuda.is_available(), reason="asks for a GPU that is not there")
def test_a_device_that_is_not_there_is_named(run_training: Callable[..., Run]) -> None:
    with pytest.raises(ConfigError, match=r"trainer\.accelerator=gpu trainer\.devices=1: "):
        run_training("items=id", "trainer.accelerator=gpu")
