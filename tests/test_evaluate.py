"""A checkpoint's numbers again, and checkpoints that do not fit."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import polars as pl
import pytest
import torch
from conftest import Run

from hllm.compare import Comparison, read_runs
from hllm.embed import embed_checkpoint
from hllm.errors import CheckpointError, ConfigError
from hllm.evaluate import checkpoint_config, load_checkpoint, main
from hllm.export import main as export
from hllm.recommend import main as recommend
from hllm.resume import differences


def fails(arguments: list[str], capsys: pytest.CaptureFixture[str], entry: Callable[[list[str]], None] = main) -> str:
    """What the command prints when it refuses; its exit status is 1."""
    with pytest.raises(SystemExit) as exit_:
        entry(arguments)
    assert exit_.value.code == 1
    return capsys.readouterr().err


@pytest.mark.parametrize("fixture", ["id_run", "cached_run"])
def test_evaluate_prints_the_report_of_the_run(
    fixture: str, request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str]
) -> None:
    run: Run = request.getfixturevalue(fixture)
    capsys.readouterr()  # the run's own
    main([f"ckpt={run.best}", "accelerator=cpu"])
    assert capsys.readouterr().out.strip() == (run.folder / "report.md").read_text().strip()


@pytest.fixture(scope="module")
def timed_run(run_training: Callable[..., Run]) -> Run:
    """Fused items, times of events and targets, cold items."""
    times = ["user.target_time=true", "user.time_features=true", "user.time_gaps=true", "user.length_groups=2"]
    return run_training("items=fused", "user=hstu", *times, "dataset.cold_items=0.2", "trainer.max_epochs=2")


def test_users_whose_target_was_held_out_are_a_group_of_their_own(timed_run: Run) -> None:
    found = timed_run.evaluation.results["test"]
    ranks = pl.read_parquet(timed_run.folder / "ranks.parquet")
    cold = ranks.filter("cold")
    assert 0 < len(cold) < len(ranks)
    assert (cold["target_count"] == 0).all()
    assert found["cold"]["users"] == len(cold)
    assert found["cold"]["mrr"] == pytest.approx((1 / (cold["rank"] + 1)).mean(), rel=1e-6)
    assert "| cold " in (timed_run.folder / "report.md").read_text()
    assert "target cold" in [name for name, _ in Comparison(*[read_runs(timed_run.folder)] * 2).groups()]


@pytest.mark.parametrize("fixture", ["id_run", "cached_run", "timed_run"])
def test_evaluate_gives_the_numbers_of_the_run_to_the_last_digit(
    fixture: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    run: Run = request.getfixturevalue(fixture)
    found = []
    monkeypatch.setattr("hllm.evaluate.full_report", lambda results, *_: found.append(results))
    main([f"ckpt={run.best}", "accelerator=cpu"])
    assert found == [json.loads((run.folder / "metrics.json").read_text())["results"]]


def test_evaluate_reads_the_data_from_another_folder(
    id_run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = shutil.copytree(str(id_run.config.dataset.root), tmp_path / "moved")
    main([f"ckpt={id_run.best}", f"root={root}", "accelerator=cpu"])
    assert capsys.readouterr().out.strip() == (id_run.folder / "report.md").read_text().strip()


def test_other_data_than_in_training_is_refused(
    id_run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = shutil.copytree(str(id_run.config.dataset.root), tmp_path / "changed")
    with (root / "u.data").open("a") as file:
        file.write("1\t1\t5\t1\n")
    message = fails([f"ckpt={id_run.best}", f"root={root}"], capsys)
    assert "the checkpoint was trained with interactions" in message


def test_another_item_llm_than_in_training_is_refused(
    cached_run: Run, save_llama: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = torch.load(cached_run.best, weights_only=True)
    checkpoint["hyper_parameters"]["config"]["llm"]["model"] = str(save_llama(tmp_path / "llm", template="<s> $A"))
    torch.save(checkpoint, tmp_path / "best.ckpt")
    assert "the checkpoint was trained with item vectors" in fails([f"ckpt={tmp_path / 'best.ckpt'}"], capsys)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "ckpt= is missing"),
        (["ckpt=/no/where.ckpt"], "ckpt=/no/where.ckpt: no such file"),
        (["best.ckpt"], "'best.ckpt' is not of the form key=value"),
        (["ckpt=x", "kk=3"], "kk"),
    ],
)
def test_wrong_arguments_are_named_and_the_usage_shown(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert message in fails(arguments, capsys)


def test_help_shows_the_usage(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(["--help"])
    assert exit_.value.code == 0
    assert "usage: python -m hllm.evaluate ckpt=" in capsys.readouterr().out


@pytest.mark.parametrize("size", [0, 1, 100, 5_000, -1])
def test_a_torn_checkpoint_is_refused(id_run: Run, tmp_path: Path, size: int) -> None:
    path = tmp_path / "best.ckpt"
    path.write_bytes(id_run.best.read_bytes()[:size])
    with pytest.raises(CheckpointError, match=r"ckpt=.*best\.ckpt: torn, or not a checkpoint of hllm\.train"):
        load_checkpoint(path)


def test_another_programs_checkpoint_is_refused(tmp_path: Path) -> None:
    torch.save({"state_dict": {}}, tmp_path / "model.pt")
    with pytest.raises(CheckpointError, match="not a checkpoint of hllm"):
        load_checkpoint(tmp_path / "model.pt")


def test_a_checkpoints_weights_are_mapped_and_not_read(tmp_path: Path) -> None:
    path, marked = tmp_path / "best.ckpt", torch.full((1 << 16,), 1.25)
    torch.save({"hyper_parameters": {"config": {}}, "weights": marked}, path)
    checkpoint = load_checkpoint(path)
    content, old = path.read_bytes(), marked.numpy().tobytes()
    with path.open("r+b") as file:  # in place: what was read before would not change
        file.write(content.replace(old, torch.full((1 << 16,), 2.5).numpy().tobytes()))
    assert (checkpoint["weights"] == 2.5).all()


@pytest.mark.parametrize("command", [main, recommend, embed_checkpoint, export])
def test_a_folder_is_refused_as_one(
    command: Callable[[list[str]], None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = ["user=1"] if command is recommend else [f"out={tmp_path / 'out'}"] if command is export else []
    message = fails([f"ckpt={tmp_path}", *more], capsys, command)
    assert f"ckpt={tmp_path}: is a folder" in message
    assert "deepspeed" in message


class _Runs:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[Path]]:
        return Path.touch, (self.path,)


def test_no_code_is_run_out_of_a_checkpoint(tmp_path: Path) -> None:
    torch.save({"hyper_parameters": {"config": {}}, "x": _Runs(tmp_path / "ran")}, tmp_path / "evil.ckpt")
    with pytest.raises(CheckpointError):
        load_checkpoint(tmp_path / "evil.ckpt")
    assert not (tmp_path / "ran").exists()


def test_a_checkpoint_of_another_version_of_the_schema_is_refused(id_run: Run, tmp_path: Path) -> None:
    checkpoint = torch.load(id_run.best, weights_only=True)
    checkpoint["hyper_parameters"]["config"]["user"]["num_wings"] = 2
    torch.save(checkpoint, tmp_path / "best.ckpt")
    with pytest.raises(ConfigError, match=r"(?s)does not fit this version of hllm: .*num_wings"):
        checkpoint_config(tmp_path / "best.ckpt", None, None)


def test_differences_name_keys_in_depth() -> None:
    old, new = {"a": 1, "b": {"c": 2, "d": 3}}, {"a": 1, "b": {"c": 4}, "e": 5}
    assert list(differences(old, new)) == ["b.c was 2, now 4", "b.d was 3, now None", "e was None, now 5"]
