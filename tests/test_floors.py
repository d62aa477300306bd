"""Each floor against plain loops over histories, and its run folder."""

import json
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from itertools import pairwise
from pathlib import Path

import polars as pl
import pytest
import torch
import torch.nn.functional as F
import yaml
from conftest import NUM_MOVIES, Run
from torch import Tensor

from hllm import floors
from hllm.build import build_datamodule
from hllm.compare import read_runs
from hllm.config import Config
from hllm.data.base import SequenceDataModule
from hllm.data.schema import Batch
from hllm.errors import ConfigError
from hllm.floors import Floor, choose, co_occurrence, popularity, recent_popularity, run_floors, text_neighbours

DAY = 86_400


@pytest.fixture(scope="module")
def config(run_config: Callable[..., Config]) -> Config:
    return run_config("dataset.eval_batch_size=9")


@pytest.fixture(scope="module")
def data(config: Config) -> SequenceDataModule:
    made = build_datamodule(config)
    assert isinstance(made, SequenceDataModule)
    return made


def trained(data: SequenceDataModule) -> list[list[tuple[int, int]]]:
    """Each user's training events, item and time: all but the last two."""
    events = list(zip(data.interactions.items.tolist(), data.interactions.timestamps.tolist(), strict=True))
    bounds = data.interactions.offsets.tolist()
    return [events[begin : end - 2] for begin, end in pairwise(bounds)]


def scored(data: SequenceDataModule, floor: Floor) -> Iterator[tuple[list[int], int, Tensor]]:
    """History, time of its last event and (I,) scores of each test row."""
    for batch in data.test_dataloader():
        for row, scores in enumerate(floor.score(batch)):
            own = batch.mask[row]
            yield batch.items[row][own].tolist(), int(batch.timestamps[row][own][-1]), scores


def test_popularity_is_the_number_of_training_events(data: SequenceDataModule) -> None:
    counts = Counter(item for own in trained(data) for item, _ in own)
    for _, _, scores in scored(data, popularity(data)[0]):
        assert scores.tolist() == [counts[item] for item in range(1, NUM_MOVIES + 1)]


def test_recent_popularity_counts_the_days_up_to_the_last_known_event(
    data: SequenceDataModule, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(floors, "DAYS", (600 * 3 / DAY, 1))  # events are ten minutes apart
    short, day = recent_popularity(data)
    events = [event for own in trained(data) for event in own]
    assert {floor.settings["days"] for floor in (short, day)} == {600 * 3 / DAY, 1}
    for floor in (short, day):
        for _, now, scores in scored(data, floor):
            seconds = floor.settings["days"] * DAY
            counts = Counter(item for item, time in events if now - seconds < time <= now)
            assert scores.floor().tolist() == [counts[item] for item in range(1, NUM_MOVIES + 1)]


def test_recent_popularity_falls_back_on_all_training_events(data: SequenceDataModule) -> None:
    floor, overall = recent_popularity(data)[0], data.train_counts[1:]
    for _, _, scores in scored(data, floor):
        part = (scores - scores.floor()).float()  # the sums are not exact
        assert ((part[:, None] > part) == (overall[:, None] > overall)).all()


def nearest(history: list[int], similarity: Tensor, settings: dict[str, float]) -> Tensor:
    """Sum over the newest items, the k-th newest weighed by decay ** k."""
    total = torch.zeros(NUM_MOVIES)
    for back, item in enumerate(history[::-1][: int(settings["newest"])]):
        total += settings["decay"] ** back * similarity[item - 1]
    return total


def test_text_neighbours_sum_the_cosines_to_the_newest_items(data: SequenceDataModule) -> None:
    vectors = torch.randn(NUM_MOVIES, 8, generator=torch.Generator().manual_seed(0)) + 1
    found = text_neighbours(data, vectors, 0.01)
    assert len(found) == 26
    raw = F.cosine_similarity(vectors[:, None], vectors[None], dim=-1)
    for floor in (one for one in found if one.settings["transform"] == "raw"):
        for history, _, scores in scored(data, floor):
            torch.testing.assert_close(scores, nearest(history, raw, floor.settings), atol=1e-5, rtol=1e-5)
    centred = vectors - vectors.mean(0)
    covariance = centred.T @ centred / NUM_MOVIES
    inverse = torch.linalg.inv(covariance + 0.01 * covariance.trace() / 8 * torch.eye(8))
    products = centred @ inverse @ centred.T
    whitened = products / (products.diag()[:, None] * products.diag()).sqrt()
    for floor in found[-2:]:
        assert floor.settings["transform"] == "whiten"
        for history, _, scores in scored(data, floor):
            torch.testing.assert_close(scores, nearest(history, whitened, floor.settings), atol=1e-4, rtol=1e-4)


def test_co_occurrence_is_the_cosine_of_items_as_sets_of_users(data: SequenceDataModule) -> None:
    users = [{user for user, own in enumerate(trained(data)) if item in dict(own)} for item in range(1, NUM_MOVIES + 1)]
    similarity = torch.tensor(
        [[len(a & b) / max(len(a) * len(b), 1) ** 0.5 for b in users] for a in users], dtype=torch.float32
    )
    for floor in co_occurrence(data)[:4]:
        for history, _, scores in scored(data, floor):
            torch.testing.assert_close(scores, nearest(history, similarity, floor.settings), atol=1e-5, rtol=1e-5)


def test_no_floor_looks_at_the_target_or_its_time(data: SequenceDataModule) -> None:
    batch = next(iter(data.test_dataloader()))
    blind = Batch(
        batch.users, batch.items, batch.timestamps, *[torch.zeros_like(batch.targets)] * 2, batch.mask, batch.seen
    )
    vectors = torch.randn(NUM_MOVIES, 8)
    for floor in (
        *popularity(data),
        *recent_popularity(data),
        *text_neighbours(data, vectors, 0.01),
        *co_occurrence(data),
    ):
        assert torch.equal(floor.score(batch), floor.score(blind))


def test_settings_are_chosen_on_validation(data: SequenceDataModule, config: Config) -> None:
    validated = {
        int(u): int(t)
        for batch in data.val_dataloader()
        for u, t in zip(batch.users, batch.targets.max(1)[0], strict=True)
    }

    def told(batch: Batch, value: float) -> Tensor:
        """Best or last is what each user's validation target was, whatever is asked for."""
        rows = torch.tensor([[validated[int(user)] - 1] for user in batch.users])
        return torch.zeros(len(batch), NUM_MOVIES).scatter(1, rows, value)

    worst, best = (Floor({"value": value}, partial(told, value=value)) for value in (-1.0, 1.0))
    assert choose([worst, best], data, config) is best
    assert choose([best, worst], data, config) is best


def test_every_floor_leaves_the_folder_of_a_run(
    id_run: Run, run_config: Callable[..., Config], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folders = run_floors(run_config("items=cached"), tmp_path)
    printed = capsys.readouterr().out
    assert [folder.name.removeprefix("floor_") for folder in folders] == [
        "popularity",
        "recent",
        "text",
        "co_occurrence",
    ]
    record = json.loads((id_run.folder / "metrics.json").read_text())
    targets = pl.read_parquet(id_run.folder / "ranks.parquet").drop("rank")
    for folder in folders:
        own = json.loads((folder / "metrics.json").read_text())
        ranks = pl.read_parquet(folder / "ranks.parquet")
        assert (folder / "report.md").read_text().strip() in printed
        assert yaml.safe_load((folder / "config.yaml").read_text())["experiment_name"] == folder.name
        assert own["results"].keys() == record["results"].keys()
        assert own["results"]["popularity"] == record["results"]["popularity"]
        assert {**own["identity"], "item vectors": ""} == {**record["identity"], "item vectors": ""}
        assert ranks.drop("rank").equals(targets)
        assert own["results"]["test"]["all"]["mrr"] == pytest.approx((1 / (ranks["rank"] + 1)).mean(), rel=1e-6)
        assert len(read_runs(folder)) == 1


def test_without_stored_vectors_there_is_no_text_floor(run_config: Callable[..., Config], tmp_path: Path) -> None:
    names = [folder.name for folder in run_floors(run_config("items=id"), tmp_path)]
    assert names == ["floor_popularity", "floor_recent", "floor_co_occurrence"]


def test_finished_floors_are_skipped_and_cut_ones_measured(run_config: Callable[..., Config], tmp_path: Path) -> None:
    config = run_config("items=id")
    folders = run_floors(config, tmp_path)
    written = [(folder / "metrics.json").read_text() for folder in folders]
    (folders[1] / "metrics.json").unlink()
    (folders[0] / "ranks.parquet").unlink()  # would be back if it were measured again
    assert run_floors(config, tmp_path) == folders
    again = [json.loads((folder / "metrics.json").read_text()) for folder in folders]
    assert [one["results"] for one in again] == [json.loads(one)["results"] for one in written]
    assert not (folders[0] / "ranks.parquet").exists()
    run_floors(run_config("items=id", "dataset.cold_items=0.2"), tmp_path)
    assert (folders[0] / "ranks.parquet").exists()


def test_shards_are_refused(config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(floors, "build_datamodule", lambda config: object())
    with pytest.raises(ConfigError, match="no process holds them all"):
        run_floors(config, tmp_path)
