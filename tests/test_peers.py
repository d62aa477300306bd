"""The side-by-side run: what peers are given, and how what they hand back is ranked."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch

from hllm.build import build_datamodule
from hllm.config import Config, compose
from hllm.data.base import SequenceDataModule
from hllm.metrics import target_ranks

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "scripts" / "bench" / "peers"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "scripts" / "bench"))
import peers
import split


@pytest.fixture
def exported(
    run_config: Callable[..., Config], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[split.Split, SequenceDataModule]:
    config = run_config()
    datamodule = build_datamodule(config)
    assert isinstance(datamodule, SequenceDataModule)
    vectors = torch.ones(datamodule.num_items, 3)
    monkeypatch.setattr(peers, "embed_catalog", lambda *_: SimpleNamespace(vectors=vectors))
    peers.export(config, datamodule, tmp_path, {"max_history": 4})
    return split.load(tmp_path), datamodule


def test_no_test_target_is_exported(exported: tuple[split.Split, SequenceDataModule]) -> None:
    found, data = exported
    events = data.interactions
    tested = set(data.splits.test.ends.tolist())
    expected = [place for place in range(len(events)) if place not in tested]
    assert found.items.tolist() == events.items[expected].tolist()
    assert found.times.tolist() == events.timestamps[expected].tolist()
    assert found.test_times.tolist() == events.timestamps[data.splits.test.ends].tolist()
    assert found.vectors()[0].tolist() == [0, 0, 0]


def test_the_validation_event_is_the_last_exported_one(exported: tuple[split.Split, SequenceDataModule]) -> None:
    found, _ = exported
    users, targets = found.validation()
    history, train = found.histories(split.VALIDATION), found.histories(split.TRAIN)
    assert [found.items[history[user][-1]] for user in users.tolist()] == targets.tolist()
    assert all(len(history[user]) == len(train[user]) + 1 for user in users.tolist())


@pytest.mark.parametrize(("cut", "values"), [(3, 1000), (200, 9)], ids=["distinct scores", "ties"])
def test_ranks_from_a_peers_best_are_those_of_all_scores(
    exported: tuple[split.Split, SequenceDataModule], tmp_path: Path, cut: int, values: int
) -> None:
    found, data = exported
    draw = np.random.default_rng(0).permuted
    scores = draw(np.tile(np.arange(data.num_items + 1) % values, (len(found.test_users), 1)), axis=1).astype("f4")
    rows = iter(scores)
    items, best = split.rank_all(
        found, found.test_users, split.VALIDATION, lambda batch: np.stack([next(rows) for _ in batch]), cut
    )
    np.savez(tmp_path / "top.npz", items=items, scores=best)
    batch = next(iter(data.test_dataloader()))
    full, _ = target_ranks(torch.from_numpy(scores[:, 1:]), batch.targets.max(dim=1).values, batch.seen)
    ranks = peers.peer_ranks(tmp_path, data)
    within = full.numpy() < cut
    assert (ranks[within] == full.numpy()[within]).all()
    assert (ranks[~within] >= cut).all()
    assert within.any()


def test_the_newest_events_stand_on_the_right() -> None:
    rows = split.left_padded([np.array([1, 2, 3]), np.array([4])], 2)
    assert rows.tolist() == [[2, 3], [0, 4]]


def row(name: str, seed: int, **values: Any) -> dict[str, Any]:
    about = {"name": name, "label": name, "items": "ids", "epoch": "all", "target_time": False, "seed": seed}
    return about | {"selection": "s", "peak_mb": 9.0, **values}


def test_a_peer_is_compared_with_ours_that_is_told_as_much(tmp_path: Path) -> None:
    models = {
        "rectools_sasrec": ("sasrec", "ids", False),
        "rectools_hstu": ("hstu", "ids", False),
        "rectools_hstu_time": ("hstu_time", "ids", True),
        "rectools_unisrec": ("unisrec", "text", False),
        "ours_sasrec": ("transformer", "ids", False),
        "ours_hstu": ("hstu", "ids", False),
        "ours_hstu_time": ("hstu", "ids", True),
    }
    rows = []
    for name, (model, items, told) in models.items():
        metrics = {"metrics": dict.fromkeys(peers.METRICS, 0.5), "epochs": 2, "seconds": {"fit": 3.0, "total": 4.0}}
        rows.append(row(name, 0, model=model, **metrics) | {"items": items, "target_time": told})
        (tmp_path / name / "0").mkdir(parents=True)
        pl.DataFrame({"user": ["a", "b"], "rank": [0.0, 3.0]}).write_parquet(tmp_path / name / "0" / "ranks.parquet")
    found = peers.compare(rows, tmp_path)
    assert {gap["name"]: gap["against"] for gap in found} == {
        "rectools_sasrec": "ours_sasrec",
        "rectools_hstu": "ours_hstu",
        "rectools_hstu_time": "ours_hstu_time",
    }
    identity = {"dataset": "toy", "protocol": "p", "interactions": "abc", "users": 3, "items": 5}
    record = {"identity": identity, "settings": {}, "environment": {"git": "c"}, "date": "d", "rows": rows}
    differences = peers.section({**record, "differences": found}).partition("User by user")[2]
    told = [[cell.strip() for cell in line.split("|")[1:4]] for line in differences.splitlines() if "hstu_time" in line]
    assert told == [["rectools_hstu_time", "ours_hstu_time", "known"]]


@pytest.mark.parametrize("data", list(peers.OURS))
def test_rows_of_ours_are_known_experiments_of_every_kind(data: str) -> None:
    kinds = []
    for name in peers.OURS[data]:
        experiment, *changes = name.split(",")
        config = compose([f"experiment={experiment}", *changes])
        assert config.dataset.name == data
        kinds.append((config.items.name, config.user.name, config.user.target_time))
    assert kinds == [
        ("id", "transformer", False),
        ("id", "hstu", False),
        ("id", "hstu", True),
        ("cached", "transformer", False),
    ]


def test_a_peer_that_fails_is_a_row_that_says_why(tmp_path: Path) -> None:
    (tmp_path / "log").write_text("Traceback\nImportError: no name (/somewhere/x.py)\n")
    failed = peers.failure(1, tmp_path / "log")
    done = {"metrics": dict.fromkeys(peers.METRICS, 0.5), "epochs": 2, "seconds": {"fit": 3.0, "total": 4.0}}
    identity = {"dataset": "toy", "protocol": "p", "interactions": "abc", "users": 3, "items": 5}
    record = {"identity": identity, "settings": {"dim": 8}, "environment": {"git": "c"}, "date": "d"}
    rows = [row("good", 0, **done), row("good", 1, **done), row("bad", 0, failed=failed)]
    text = peers.section(json.loads(json.dumps({**record, "rows": rows, "differences": []})))
    assert "- bad, seed 0: exits 1: ImportError: no name ...." in text
    assert "/root" not in text
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]
    assert lines[2][:5] == ["good", "ids", "hidden", "2", "0.5000 ± 0.0000"]
    assert lines[3][:4] == ["bad", "ids", "hidden", "did not run"]
    assert ["good", "1.50 ± 0.00", "2 ± 0"] in [line[:3] for line in lines]
