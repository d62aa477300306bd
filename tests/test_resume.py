"""A run that is killed anywhere and goes on from its last.ckpt ends as if nothing had happened."""

import csv
import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import Run
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.trainer.states import TrainerFn

from hllm.build import build_datamodule
from hllm.config import Config
from hllm.data.shards import write_shards
from hllm.disk import TEMPORARY
from hllm.errors import CheckpointError
from hllm.evaluate import load_checkpoint
from hllm.fit import train
from hllm.module import Recommender
from hllm.resume import LastCheckpoint, WholeCheckpoints

FLAGS = ("items=id", "loss=nce", "user.dropout=0.2", "dataset.batch_size=4", "trainer.max_epochs=2")
"Ten batches an epoch, in which dropout and negatives are drawn."


class Killed(Exception):
    pass


@contextmanager
def killed_at(epoch: int, batch: int) -> Iterator[None]:
    """Training dies in the batch's step."""
    step = Recommender.training_step

    def dies(self: Recommender, content: Any, index: int) -> Any:
        if (self.current_epoch, index) == (epoch, batch):
            raise Killed
        return step(self, content, index)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Recommender, "training_step", dies)
        with pytest.raises(Killed):
            yield


@pytest.fixture
def killed(run_config: Callable[..., Config], tmp_path: Path) -> Callable[..., Path]:
    """The last.ckpt of a run that died."""

    def run(epoch: int, batch: int, *overrides: str) -> Path:
        with killed_at(epoch, batch):
            train(run_config(*FLAGS, *overrides), tmp_path / "killed")
        return tmp_path / "killed" / "checkpoints" / "last.ckpt"

    return run


@pytest.fixture(scope="module")
def shards(run_config: Callable[..., Config], tmp_path_factory: pytest.TempPathFactory) -> Path:
    plain = build_datamodule(run_config("items=id"))
    folder = tmp_path_factory.mktemp("sharded") / "shards"
    write_shards(plain.interactions, plain.catalog, folder, 3, {})
    return folder


def losses(folder: Path) -> dict[int, str]:
    """train/loss by step, to the last digit."""
    rows = csv.DictReader((folder / "metrics.csv").read_text().splitlines())
    return {int(row["step"]): row["train/loss"] for row in rows if row["train/loss"]}


def last(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)
    return found


def assert_same_end(again: Path, unbroken: Path, first_step: int) -> None:
    """Each loss from a step on, the final weights, what the optimizer, the schedule and the callbacks keep."""
    expected = {step: loss for step, loss in losses(unbroken).items() if step >= first_step}
    assert losses(again) == expected
    assert len(set(expected.values())) > 1
    found, wanted = last(again), last(unbroken)
    for part in ("state_dict", "optimizer_states", "lr_schedulers", "global_step"):
        torch.testing.assert_close(found[part], wanted[part], rtol=0, atol=0)
    for name, state in wanted["callbacks"].items():
        if not name.startswith("ModelCheckpoint"):  # it keeps paths
            torch.testing.assert_close(found["callbacks"][name], state, rtol=0, atol=0)
    results = [json.loads((folder / "metrics.json").read_text())["results"] for folder in (again, unbroken)]
    assert results[0] == results[1]


@pytest.mark.parametrize(
    ("flags", "batch", "step"),
    [
        ([], 7, 15),
        (["dataset.num_workers=2"], 7, 15),
        (["dataset.num_workers=2"], 0, 10),
        (["dataset.batch_events=32"], 7, 15),
        (["dataset=sharded"], 7, 15),
        (["trainer.accumulate_grad_batches=2"], 3, 6),  # dies between the two halves of a step
        (["trainer.limit_train_batches=6"], 4, 9),
    ],
    ids=["sequences", "workers", "workers at the end", "events", "sharded", "accumulated", "limited"],
)
def test_a_run_killed_within_an_epoch_goes_on_within_it(
    flags: list[str],
    batch: int,
    step: int,
    shards: Path,
    killed: Callable[..., Path],
    run_training: Callable[..., Run],
) -> None:
    if "dataset=sharded" in flags:
        flags = [*flags, f"dataset.root={shards}", "dataset.check_counts=true"]
    ckpt = killed(1, batch, *flags, "callbacks.checkpoint_steps=3")
    assert torch.load(ckpt, weights_only=True)["global_step"] == step
    again = run_training(*FLAGS, *flags, f"ckpt={ckpt}")
    assert_same_end(again.folder, run_training(*FLAGS, *flags).folder, step)


def test_a_run_killed_twice_within_an_epoch_goes_on(
    killed: Callable[..., Path], run_config: Callable[..., Config], run_training: Callable[..., Run], tmp_path: Path
) -> None:
    flags = [*FLAGS, "callbacks.checkpoint_steps=2"]
    ckpt = killed(0, 4, "callbacks.checkpoint_steps=2")
    with killed_at(0, 7):
        train(run_config(*flags, f"ckpt={ckpt}"), tmp_path / "again")
    assert last(tmp_path / "again")["global_step"] == 6
    again = run_training(*FLAGS, f"ckpt={tmp_path / 'again' / 'checkpoints' / 'last.ckpt'}")
    assert_same_end(again.folder, run_training(*FLAGS).folder, 6)


def test_a_run_killed_in_a_validation_validates_again(
    run_config: Callable[..., Config], run_training: Callable[..., Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = Recommender.validation_step

    def dies(self: Recommender, content: Any, index: int) -> None:
        if self.current_epoch == 1:
            raise Killed
        step(self, content, index)

    monkeypatch.setattr(Recommender, "validation_step", dies)
    with pytest.raises(Killed):
        train(run_config(*FLAGS, "callbacks.checkpoint_steps=5"), tmp_path)
    monkeypatch.undo()
    again = run_training(*FLAGS, f"ckpt={tmp_path / 'checkpoints' / 'last.ckpt'}")
    assert_same_end(again.folder, run_training(*FLAGS).folder, 15)


def test_checkpoints_within_epochs_change_no_number(run_training: Callable[..., Run]) -> None:
    assert_same_end(run_training(*FLAGS, "callbacks.checkpoint_steps=1").folder, run_training(*FLAGS).folder, 0)


TWO = """
import sys
from pathlib import Path

from test_resume import killed_at

from hllm.config import compose
from hllm.fit import train

for runs in sys.argv[1].split("|"):
    folder, *flags = runs.split()
    train(compose(flags), Path(folder, "unbroken"))
    with killed_at(1, 4):
        train(compose([*flags, "callbacks.checkpoint_steps=2"]), Path(folder, "killed"))
    train(compose([*flags, f"ckpt={folder}/killed/checkpoints/last.ckpt"]), Path(folder, "again"))
"""


def test_two_processes_go_on_within_an_epoch(movielens_folder: Path, shards: Path, tmp_path: Path) -> None:
    """Their random states part as soon as their batches differ in their number of events."""
    common = [*FLAGS, "user.num_layers=1", "user.dim=16", "trainer.devices=2", "trainer.accelerator=cpu"]
    common += ["trainer.enable_progress_bar=false", "trainer.log_every_n_steps=1", "logger=csv"]
    common += ["evaluation.ks=[5,10]", f"cache_dir={tmp_path / 'cache'}"]
    sequences = [f"dataset.root={movielens_folder}", "dataset.check_counts=false", "dataset.num_workers=1"]
    sharded = ["dataset=sharded", f"dataset.root={shards}"]
    events = [*sequences, "dataset.batch_events=32"]
    data = {"sequences": sequences, "sharded": sharded, "events": events}
    folders = [tmp_path / name for name in data]
    runs = [" ".join([str(folder), *data[folder.name], *common]) for folder in folders]
    script = tmp_path / "two.py"
    script.write_text(TWO)
    done = subprocess.run(
        [sys.executable, script, "|".join(runs)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    for folder in folders:
        killed = last(folder / "killed")
        assert killed["global_step"] == 8
        first, second = killed["callbacks"]["RandomState"]["ranks"]
        assert not torch.equal(first["torch"], second["torch"])
        assert_same_end(folder / "again", folder / "unbroken", 8)


def test_last_is_written_in_an_epoch_that_does_not_improve(
    killed: Callable[..., Path], run_training: Callable[..., Run]
) -> None:
    flags = ["optimizer.lr=1e-8", "trainer.max_epochs=4"]
    ckpt = killed(3, 0, *flags)
    assert torch.load(ckpt.with_name("best.ckpt"), weights_only=True)["epoch"] == 0
    assert torch.load(ckpt, weights_only=True)["epoch"] == 2
    again = run_training(*FLAGS, *flags, f"ckpt={ckpt}")
    assert_same_end(again.folder, run_training(*FLAGS, *flags).folder, 30)


def test_a_run_that_was_stopped_early_stays_stopped(run_training: Callable[..., Run]) -> None:
    flags = [*FLAGS, "trainer.max_epochs=50", "callbacks.patience=1", "optimizer.lr=1e-8"]
    stopped = run_training(*flags)
    again = run_training(*flags, f"ckpt={stopped.last}")
    assert again.evaluation == stopped.evaluation
    first, second = (json.loads((run.folder / "metrics.json").read_text()) for run in (stopped, again))
    assert first["epochs"] == second["epochs"] < 10


def test_a_best_checkpoint_that_last_knows_nothing_of_is_forgotten(
    killed: Callable[..., Path], run_training: Callable[..., Run]
) -> None:
    """The run died when it had written the best, but not yet the last one of its first epoch."""
    ckpt = killed(0, 7, "callbacks.checkpoint_steps=3")
    unbroken = run_training(*FLAGS)
    ckpt.with_name("best.ckpt").write_bytes(unbroken.best.read_bytes())
    assert_same_end(run_training(*FLAGS, f"ckpt={ckpt}").folder, unbroken.folder, 6)


@pytest.mark.parametrize("first", [True, False])
def test_one_of_many_processes_copies_the_checkpoints(first: bool, killed: Callable[..., Path], tmp_path: Path) -> None:
    ckpt, folder = killed(1, 2), tmp_path / "again"
    best = ModelCheckpoint(dirpath=folder)  # the folder of all; a process may have been given another
    trainer: Any = SimpleNamespace(
        checkpoint_callbacks=[best], state=SimpleNamespace(fn=TrainerFn.FITTING), is_global_zero=first
    )
    checkpoint = load_checkpoint(ckpt)
    model: Any = None
    LastCheckpoint(tmp_path / "own" / "last.ckpt", None, ckpt).on_load_checkpoint(trainer, model, checkpoint)
    (state,) = [state for name, state in checkpoint["callbacks"].items() if name.startswith("ModelCheckpoint")]
    assert state["best_model_path"] == str(folder / "best.ckpt")
    assert state["dirpath"] == best.dirpath
    copies = {path.name: path.read_bytes() for path in folder.glob("*")}
    assert copies == ({name: ckpt.with_name(name).read_bytes() for name in ("best.ckpt", "last.ckpt")} if first else {})


def test_a_run_goes_on_in_its_own_folder(killed: Callable[..., Path], run_config: Callable[..., Config]) -> None:
    ckpt = killed(1, 2)
    train(run_config(*FLAGS, f"ckpt={ckpt}"), ckpt.parent.parent)
    assert torch.load(ckpt, weights_only=True)["epoch"] == 1
    assert sorted(path.name for path in ckpt.parent.iterdir()) == ["best.ckpt", "last.ckpt"]


def test_a_kill_while_writing_leaves_the_checkpoint_before(
    run_config: Callable[..., Config], run_training: Callable[..., Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save, saved = torch.save, []

    def dies(content: Any, file: Any) -> None:
        saved.append(Path(file.name))
        if content["global_step"] == 6:
            file.write(b"torn")
            raise Killed
        save(content, file)

    monkeypatch.setattr(torch, "save", dies)
    with pytest.raises(Killed):
        train(run_config(*FLAGS, "callbacks.checkpoint_steps=3"), tmp_path)
    monkeypatch.undo()
    folder = tmp_path / "checkpoints"
    assert {path.parent for path in saved} == {folder}  # elsewhere may be another disk, and a copy can be torn
    assert [path.name for path in folder.iterdir()] == ["last.ckpt"]
    again = run_training(*FLAGS, f"ckpt={folder / 'last.ckpt'}")
    assert_same_end(again.folder, run_training(*FLAGS).folder, 3)


def test_a_full_disk_is_one_line_and_leaves_the_checkpoint_before(tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    WholeCheckpoints().save_checkpoint({"step": 1}, path)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, limits[1]))
    try:
        with pytest.raises(CheckpointError, match=r"cannot write .*last\.ckpt: File too large\. Free space"):
            WholeCheckpoints().save_checkpoint({"step": torch.zeros(1 << 20)}, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert torch.load(path, weights_only=True) == {"step": 1}
    assert not list(tmp_path.glob(f"{TEMPORARY}*"))
