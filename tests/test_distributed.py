"""Two real processes do what one does: gradients, negatives, catalogue, metrics, checkpoints, under each strategy."""

import json
import multiprocessing
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import polars as pl
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader

from hllm import evaluate
from hllm.build import build_datamodule, build_module, build_strategy, build_trainer
from hllm.cli import quiet_libraries
from hllm.config import Config, Strategy, TrainerConfig
from hllm.data.base import SequenceDataModule
from hllm.data.schema import Batch
from hllm.distributed import gather_ids, gather_vectors, most, total
from hllm.errors import ConfigError
from hllm.fit import train
from hllm.losses import Candidates
from hllm.module import Recommender

SECONDS = 240
"Until a test gives up on other processes; what they do takes ten or twenty."


def in_two(work: Callable[..., None], folder: Path, *arguments: Any) -> None:
    """Run ``work(rank, folder, *arguments)`` in two processes that are connected by gloo."""
    multiprocessing.get_context("forkserver").set_forkserver_preload(["hllm.build", "hllm.fit", "transformers"])
    started = mp.start_processes(
        _connected, (work, folder, *arguments), nprocs=2, join=False, start_method="forkserver"
    )
    try:
        deadline = time.monotonic() + SECONDS
        while not started.join(timeout=1):  # raises what a process raised
            assert time.monotonic() < deadline, "the processes wait for one another"
    finally:
        for process in started.processes:
            process.kill()


def _connected(rank: int, work: Callable[..., None], folder: Path, *arguments: Any) -> None:
    torch.set_num_threads(1)
    quiet_libraries()
    dist.init_process_group(
        "gloo", f"file://{folder / 'store'}", rank=rank, world_size=2, timeout=timedelta(seconds=SECONDS)
    )
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        patch.setenv("LOCAL_RANK", str(rank))  # Lightning then starts no processes of its own
        work(rank, folder, *arguments)
        dist.barrier()
    dist.destroy_process_group()


# What is told


def ids_go_to_all_and_gradients_come_back_from_all(rank: int) -> None:
    torch.manual_seed(rank)
    own = torch.arange(3 * rank)  # the first process has nothing to tell
    assert gather_ids(own).tolist() == [0, 1, 2]
    assert total(rank, torch.device("cpu")) == most(rank, torch.device("cpu")) == 1
    vectors = torch.randn(2, 4, requires_grad=True)
    weight = torch.full((2, 2, 4), rank + 1.0)
    gathered = gather_vectors(vectors)
    assert torch.equal(gathered[rank], vectors)
    (gathered * weight).sum().backward()
    assert torch.equal(vectors.grad, torch.full((2, 4), 3.0))  # 1 of the first process's loss, 2 of the second's


# Training


class Record(L.Callback):
    """What training did, step by step.

    Args:
        losses: (steps,) mean over all positions of the step, in this process's share.
        logged: of each step, train/loss and train/negatives.
        gradients: of each step, as the optimizer got them.
        offered: of each step, ids and counts of the negatives.
        catalogue: (I, D) before the first step.
        encoded: how many texts this process read for it.
    """

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.logged: list[list[float]] = []
        self.gradients: list[dict[str, Tensor]] = []
        self.offered: list[tuple[list[int], list[int]]] = []

    def on_train_start(self, trainer: L.Trainer, module: Recommender) -> None:
        trainer.optimizers[0].register_step_post_hook(lambda *_: self.gradients.append(_gradients(module)))
        offer, encode, self.encoded = module.loss.candidates, getattr(module.items, "_encode", None), 0

        def candidates(targets: Tensor, num_items: int) -> Candidates:
            made = offer(targets, num_items)
            counts = made.negative.long() if made.counts is None else made.counts
            self.offered.append((made.ids[made.negative].tolist(), counts[made.negative].tolist()))
            return made

        def counted(rows: Any, device: torch.device) -> Tensor:
            self.encoded += len(rows)
            return encode(rows, device)

        module.loss.candidates = candidates
        module.items._encode = counted
        with torch.no_grad(), trainer.precision_plugin.forward_context():
            self.catalogue = module.items.all().clone()
        module.items._encode = encode
        torch.manual_seed(3)

    def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, outputs: Any, *_: Any) -> None:
        self.losses.append(outputs["loss"].item())
        logged = trainer.callback_metrics
        self.logged.append([float(logged[f"train/{name}"]) for name in ("loss", "negatives")])


def _gradients(module: Recommender) -> dict[str, Tensor]:
    named = {name: weight.grad for name, weight in module.named_parameters() if weight.requires_grad}
    assert all(gradient is not None for gradient in named.values())
    return {
        name: (gradient.full_tensor() if isinstance(gradient, DTensor) else gradient).float().clone()
        for name, gradient in named.items()
    }


ROWS = [list(range(6)), list(range(6, 12)), list(range(12, 18))]
"Rows of each step, the first half of them the first process's."


def steps(config: Config, rank: int | None) -> list[Batch]:
    """The batches of one process, or of one that has all; in the second step the second half has no target."""
    data = build_datamodule(config)
    assert isinstance(data, SequenceDataModule)
    rows = data.train_dataloader().dataset
    batches = []
    for number, chosen in enumerate(ROWS):
        batch = rows.__getitems__(chosen if rank is None else chosen[3 * rank : 3 * rank + 3])
        if number == 1:
            targets = batch.targets.clone()
            targets[3 if rank is None else 3 * (1 - rank) :] = 0
            batch = replace(batch, targets=targets)
        batches.append(batch)
    return batches


def record(config: Config, folder: Path, rank: int | None = None) -> Record:
    L.seed_everything(0, verbose=False)
    module = build_module(config, build_datamodule(config))
    kept = Record()
    trainer = build_trainer(config, folder, [], [kept])
    trainer.callbacks = [kept]  # nothing is evaluated or saved
    trainer.fit(module, train_dataloaders=DataLoader(steps(config, rank), batch_size=None))
    return kept


JOINT = ["items=llm", "user=llm", "optimizer=hllm", "trainer.max_epochs=1", "llm.token_budget=64"]
OFFICIAL = [*JOINT, "loss=nce_official", "loss.num_negatives=12", "head=cosine_learned"]
CASES = {
    "official": [*OFFICIAL, "trainer.gradient_clip_val=null"],
    "in_batch": [*JOINT, "loss=nce", "loss.num_negatives=6", "loss.logq=true", "trainer.gradient_clip_val=null"],
    "ce": [*JOINT, "loss=ce", "trainer.gradient_clip_val=null"],
    "clipped": [*OFFICIAL, "trainer.gradient_clip_val=0.05"],
    "accumulated": [*OFFICIAL, "trainer.accumulate_grad_batches=2"],
    "checkpointed": [
        *(*OFFICIAL, "items.grad_cache=true"),
        *("items.tuning.gradient_checkpointing=true", "user.tuning.gradient_checkpointing=true"),
    ],
    "packed": [*OFFICIAL, "llm.packing=packed", "items.tuning.gradient_checkpointing=true"],
    "frozen_prefix": [*OFFICIAL, "items.tuning.freeze=[embed_tokens,layers.0.]", "user.tuning.freeze=[layers.0.]"],
    "lora": [*OFFICIAL, "items.tuning.lora.rank=2", "user.tuning.lora.rank=2"],
    "id_items": ["items=id", "loss=nce", "user.dropout=0", "items.dropout=0", "trainer.max_epochs=1"],
    "times": [
        *("items=id", "loss=nce", "items.dropout=0", "trainer.max_epochs=1", "dataset.cold_items=0.2"),
        *("user=hstu", "user.dropout=0", "user.input_dropout=0", "user.target_time=true", "user.time_gaps=true"),
    ],
    "mixed": [*OFFICIAL, "trainer.precision=bf16-mixed"],
    "half": [*OFFICIAL, "trainer.precision=bf16-true"],
}
EXACT = [name for name in CASES if name not in ("mixed", "half")]
FIELDS = ("losses", "logged", "gradients", "offered", "catalogue", "encoded")
STRATEGIES = [Strategy.ddp, Strategy.fsdp]


@pytest.fixture(scope="module")
def configs(run_config: Callable[..., Config]) -> dict[str, Config]:
    return {name: run_config(*overrides) for name, overrides in CASES.items()}


def _record_all(rank: int, folder: Path, configs: dict[str, Config]) -> None:
    ids_go_to_all_and_gradients_come_back_from_all(rank)
    for strategy in STRATEGIES:
        for name, config in configs.items():
            trainer = replace(config.trainer, devices=2, strategy=strategy)
            kept = record(replace(config, trainer=trainer), folder, rank)
            torch.save({key: getattr(kept, key) for key in FIELDS}, folder / f"{strategy.name}-{name}-{rank}.pt")


@pytest.fixture(scope="module")
def alone(configs: dict[str, Config], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Record]:
    """Each case in one process, which has the rows of both."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return {name: record(config, tmp_path_factory.mktemp("alone")) for name, config in configs.items()}


Both = Callable[[Strategy, str], list[Record]]


@pytest.fixture(scope="module")
def both(configs: dict[str, Config], alone: object, tmp_path_factory: pytest.TempPathFactory) -> Both:
    """What each of two processes recorded of a case."""
    folder = tmp_path_factory.mktemp("both")
    in_two(_record_all, folder, configs)

    def records(strategy: Strategy, name: str) -> list[Record]:
        kept = [Record(), Record()]
        for rank in range(2):
            vars(kept[rank]).update(torch.load(folder / f"{strategy.name}-{name}-{rank}.pt", weights_only=True))
        return kept

    return records


def relative(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Norm of the difference over the norm, of the parameter where it is largest; tiny gradients do not count."""
    assert found.keys() == expected.keys()
    floor = 1e-4 * torch.stack([value.norm() for value in expected.values()]).norm()
    return max(
        ((found[name] - value).norm() / value.norm().clamp(min=floor)).item() for name, value in expected.items()
    )


@pytest.mark.parametrize("name", EXACT)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_two_processes_give_the_gradients_of_one(
    both: Both, alone: dict[str, Record], strategy: Strategy, name: str
) -> None:
    """The mean over all positions, though the processes have unequally many, and one of them none in a step."""
    for kept in both(strategy, name):
        assert len(kept.gradients) == len(alone[name].gradients) > 1
        assert relative(kept.gradients[0], alone[name].gradients[0]) < 1e-5
        for found, expected in zip(kept.gradients, alone[name].gradients, strict=True):
            assert relative(found, expected) < 1e-2  # AdamW's first steps enlarge what is near 0


@pytest.mark.parametrize("name", EXACT)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_loss_of_all_positions_is_that_of_one_process(
    both: Both, alone: dict[str, Record], strategy: Strategy, name: str
) -> None:
    first, second = both(strategy, name)
    assert second.losses[1] == 0  # no position, and no NaN
    losses = (np.array(first.losses) + np.array(second.losses)) / 2
    assert losses == pytest.approx(np.array(alone[name].losses), rel=1e-4)


@pytest.mark.parametrize("name", EXACT)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_curves_are_of_all_positions(both: Both, alone: dict[str, Record], strategy: Strategy, name: str) -> None:
    first, second = both(strategy, name)
    assert first.logged == second.logged
    assert np.array(first.logged) == pytest.approx(np.array(alone[name].logged), rel=1e-4)


@pytest.mark.parametrize("name", ["mixed", "half"])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_sixteen_bits_follow_one_process(both: Both, alone: dict[str, Record], strategy: Strategy, name: str) -> None:
    first, second = both(strategy, name)
    losses = (np.array(first.losses) + np.array(second.losses)) / 2
    assert losses == pytest.approx(np.array(alone[name].losses), rel=0.05)


def test_negatives_are_the_same_in_both_processes_and_as_many_as_in_one(both: Both, alone: dict[str, Record]) -> None:
    for name in ("official", "in_batch"):
        first, second = both(Strategy.ddp, name)
        assert first.offered == second.offered == alone[name].offered
    assert [sum(counts) for _, counts in both(Strategy.ddp, "official")[0].offered] == [12] * len(ROWS)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_catalogue_is_shared_out_and_comes_back_in_order(
    both: Both, alone: dict[str, Record], strategy: Strategy
) -> None:
    expected = alone["official"]
    for kept in both(strategy, "official"):
        torch.testing.assert_close(kept.catalogue, expected.catalogue, rtol=0, atol=1e-5)
        assert kept.encoded <= 0.7 * expected.encoded


# Whole runs


@pytest.fixture(scope="module")
def odd_folder(movielens_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny MovieLens without its last user: 39, so that one process has a batch more than the other."""
    folder = tmp_path_factory.mktemp("odd")
    (folder / "u.item").write_bytes((movielens_folder / "u.item").read_bytes())
    lines = (movielens_folder / "u.data").read_text().splitlines(keepends=True)
    (folder / "u.data").write_text("".join(line for line in lines if not line.startswith("40\t")))
    return folder


TIMES = ["user=hstu", "user.target_time=true"]
RUNS = {
    "ddp": ["trainer.strategy=auto", *OFFICIAL],
    "fsdp": ["trainer.strategy=fsdp", *OFFICIAL],
    "fsdp_mixed": ["trainer.strategy=fsdp", *OFFICIAL, "trainer.precision=bf16-mixed"],
    "fsdp_id": ["trainer.strategy=fsdp", "items=id", "loss=gbce", "head=dot"],
    "fsdp_fused": ["trainer.strategy=fsdp", "items=fused", "items.target=text", "items.id_dropout=0.5"],
    "fsdp_times": ["trainer.strategy=fsdp", "items=id", *TIMES, "user.time_gaps=true"],
    "ddp_groups": ["items=id", *TIMES, "user.time_features=true", "user.length_groups=2", "dataset.cold_items=0.2"],
}


class Stopped(Exception):
    pass


def _stop_in_second_epoch(module: Recommender) -> None:
    if module.current_epoch == 1:
        raise Stopped


def _keep_weights(module: Recommender) -> None:
    weights = module.trainer.strategy.lightning_module_state_dict()
    if module.trainer.is_global_zero:
        torch.save(weights, Path(module.trainer.default_root_dir) / "final.pt")


def _train_and_resume(rank: int, folder: Path, configs: dict[str, Config]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Recommender, "on_train_end", _keep_weights)
        for name, config in configs.items():
            train(config, folder / name)
        with pytest.MonkeyPatch.context() as inner:
            inner.setattr(Recommender, "on_train_epoch_start", _stop_in_second_epoch)
            with pytest.raises(Stopped):
                train(configs["fsdp"], folder / "stopped")
        last = folder / "stopped" / "checkpoints" / "last.ckpt"
        # processes of torchrun or SLURM each name a run folder; the first one's is that of all
        train(replace(configs["fsdp"], ckpt=str(last)), folder / ("resumed", "second")[rank])


@pytest.fixture(scope="module")
def runs(
    run_config: Callable[..., Config], odd_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """Run folders of two processes each."""
    common = [f"dataset.root={odd_folder}", "dataset.eval_batch_size=19", "trainer.devices=2", "trainer.max_epochs=2"]
    folder = tmp_path_factory.mktemp("runs")
    configs = {name: run_config(*overrides, *common) for name, overrides in RUNS.items()}
    for config in configs.values():
        build_module(config, build_datamodule(config))  # what both would make at once is there
    in_two(_train_and_resume, folder, configs)
    return {name: folder / name for name in [*RUNS, "resumed"]}


@pytest.mark.parametrize("name", ["ddp", "fsdp", "fsdp_id", "fsdp_fused", "fsdp_times", "ddp_groups", "resumed"])
def test_one_process_reads_the_checkpoint_of_two_and_reports_the_same(
    runs: dict[str, Path], name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    evaluate.main([f"ckpt={runs[name] / 'checkpoints' / 'best.ckpt'}", "accelerator=cpu"])
    assert capsys.readouterr().out.strip() == (runs[name] / "report.md").read_text().strip()


@pytest.mark.parametrize("name", [*RUNS, "resumed"])
def test_each_user_is_counted_once_though_one_process_has_a_batch_more(runs: dict[str, Path], name: str) -> None:
    stored = json.loads((runs[name] / "metrics.json").read_text())["results"]
    assert stored["test"]["all"]["users"] == 39
    if name != "ddp_groups":  # users whose target is cold are not validated on
        assert stored["val"]["all"]["users"] == 39
    ranks = pl.read_parquet(runs[name] / "ranks.parquet")
    assert sorted(ranks["user"], key=int) == [str(user) for user in range(1, 40)]


@pytest.mark.parametrize(("name", "expected", "tolerance"), [("fsdp", "ddp", 1e-4), ("resumed", "fsdp", 0)])
def test_runs_end_with_the_same_weights(runs: dict[str, Path], name: str, expected: str, tolerance: float) -> None:
    """Resuming also gives the optimizer its state back."""
    found, other = (torch.load(runs[run] / "final.pt", weights_only=True) for run in (name, expected))
    assert found.keys() == other.keys()
    difference = max((found[key] - weight).abs().max().item() for key, weight in other.items())
    assert difference <= tolerance


# Strategies


def strategy(name: str, devices: int = 1) -> Any:
    return build_strategy(TrainerConfig(strategy=Strategy[name], devices=devices))


def test_more_devices_mean_ddp_that_sends_no_buffers() -> None:
    assert strategy("auto") == "auto"
    for chosen in (strategy("auto", 2), strategy("ddp")):
        assert isinstance(chosen, DDPStrategy)
        assert chosen._ddp_kwargs == {"broadcast_buffers": False}


@pytest.mark.parametrize("name", ["deepspeed_stage_2", "deepspeed_stage_3"])
def test_deepspeed_that_is_not_there_is_named(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda package: None)
    with pytest.raises(
        ConfigError, match=rf"^trainer\.strategy={name}: needs deepspeed; pip install hllm\[deepspeed\]$"
    ):
        strategy(name)
