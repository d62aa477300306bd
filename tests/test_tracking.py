"""Names, tags, loggers and files of a run; no network is asked."""

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import wandb
from conftest import Run
from lightning.pytorch.loggers import CSVLogger

from hllm.config import WandbMode, compose
from hllm.tracking import build_loggers, environment, git_revision, run_name, run_tags, wandb_offline


@pytest.fixture
def logged_out(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """No wandb key anywhere; returns the netrc file to write one to."""
    for name in ("WANDB_MODE", "WANDB_API_KEY"):
        monkeypatch.setenv(name, "")  # so that what Lightning sets is taken back
        monkeypatch.delenv(name)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    return tmp_path / "netrc"


def test_run_names_tell_runs_of_a_sweep_apart() -> None:
    config = compose(["llm=minilm", "loss=nce", "user.num_layers=3", "seed=7"])
    assert run_name(config) == "movielens_100k-hllm-minilm-nce-3layers-seed7"


def test_tags_are_what_dashboards_filter_by() -> None:
    tags = run_tags(compose(["llm=minilm", "loss=nce", "user.num_layers=3", "experiment_name=row"]))
    expected = ["dataset:movielens_100k", "system:hllm-minilm", "loss:nce", "layers:3", "llm:minilm", "experiment:row"]
    assert tags == expected


def test_a_run_without_llm_has_no_llm_tag() -> None:
    assert not [tag for tag in run_tags(compose(["items=id"])) if tag.startswith("llm:")]


def test_wandb_is_offline_without_a_key(logged_out: Path) -> None:
    assert wandb_offline(WandbMode.auto)
    logged_out.write_text("machine example.org login me password secret\n")
    logged_out.chmod(0o600)
    assert wandb_offline(WandbMode.auto)


def test_wandb_is_online_with_a_key_in_netrc(logged_out: Path) -> None:
    logged_out.write_text("machine api.wandb.ai login user password secret\n")
    logged_out.chmod(0o600)
    assert not wandb_offline(WandbMode.auto)


def test_wandb_is_online_with_a_key_in_the_environment(logged_out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
    assert not wandb_offline(WandbMode.auto)


@pytest.mark.parametrize(("mode", "offline"), [("online", False), ("offline", True), ("disabled", True)])
def test_wandbs_own_variable_decides_for_auto(
    logged_out: Path, monkeypatch: pytest.MonkeyPatch, mode: str, offline: bool
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
    monkeypatch.setenv("WANDB_MODE", mode)
    assert wandb_offline(WandbMode.auto) is offline


def test_the_flag_wins_over_key_and_variable(logged_out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "online")
    assert wandb_offline(WandbMode.offline)
    assert not wandb_offline(WandbMode.online)


def test_without_wandb_there_is_the_csv_file_alone(tmp_path: Path) -> None:
    assert [type(logger) for logger in build_loggers(compose(["logger=csv"]), tmp_path)] == [CSVLogger]


def test_a_run_logs_to_wandb_offline_inside_its_folder(
    run_training: Callable[..., Run], logged_out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    configs: list[dict[str, Any]] = []
    start = wandb.init
    monkeypatch.setattr(wandb, "init", lambda **kw: configs.append(kw) or start(**kw))
    for seed in (0, 1):  # as the jobs of a sweep, in one process
        run = run_training("items=id", "logger=wandb", "trainer.max_epochs=1", f"seed={seed}")
        assert len(list(run.folder.glob("wandb/offline-run-*/*.wandb"))) == 1
    assert configs[0]["mode"] == "offline"
    assert configs[0]["group"] == "movielens_100k-sasrec"
    assert configs[0]["config"]["user"]["num_layers"] == 1


def test_a_run_goes_on_offline_when_wandb_cannot_be_reached(
    run_training: Callable[..., Run],
    logged_out: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    init = wandb.init

    def unreachable(**kwargs: Any) -> Any:
        if kwargs["mode"] == "online":
            raise wandb.errors.CommError("no route to host")
        return init(**kwargs)

    monkeypatch.setattr(wandb, "init", unreachable)
    with caplog.at_level(logging.WARNING):
        run = run_training("items=id", "logger=wandb", "logger.wandb=online", "trainer.max_epochs=1")
    assert "wandb cannot be reached (no route to host): logging offline" in caplog.text
    assert len(list(run.folder.glob("wandb/offline-run-*/*.wandb"))) == 1


def test_the_environment_names_revision_and_machine() -> None:
    found = environment()
    assert json.loads(json.dumps(found)) == found
    assert found["git"] == git_revision()
    assert found["threads"] >= 1


def test_outside_of_a_checkout_there_is_no_revision(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert git_revision() is None


def test_wandb_switched_off_by_its_own_variable_stays_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert [type(logger) for logger in build_loggers(compose([]), tmp_path)] == [CSVLogger]
