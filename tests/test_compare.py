"""Two runs side by side, from the files that they left."""

import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import yaml
from conftest import Run

from hllm.compare import Comparison, comparable, main, read_run, read_runs
from hllm.config import compose, to_plain
from hllm.errors import ConfigError
from hllm.significance import paired, seed_interval

USERS = 60
IDENTITY = {"dataset": "d", "protocol": "leave_one_out", "catalogue": "9 items ab", "interactions": "ff"}
EVALUATION = {"ks": [1, 10], "bucket_edges": [1, 10], "history_edges": [5]}
Save = Callable[..., Path]


@pytest.fixture
def save(tmp_path: Path) -> Save:
    """Writes the folder of a made-up run; ranks are drawn by ``draw``, a little better for ``gain`` above 0."""

    def write(
        name: str,
        draw: int = 0,
        gain: float = 0.0,
        seed: int = 0,
        identity: dict[str, str] | None = None,
        lr: float = 1.0,
    ) -> Path:
        folder = tmp_path / name
        folder.mkdir(parents=True)
        ranks = np.floor(np.random.default_rng(draw).exponential(8, USERS) * (1 - gain))
        columns = {
            "user": [f"u{user:02}" for user in range(USERS)],
            "target": [f"i{user % 7}" for user in range(USERS)],
            "rank": ranks.astype(np.float32),
            "target_count": np.arange(USERS) % 12,
            "history": np.arange(USERS) % 9 + 1,
        }
        pl.DataFrame(columns).sample(fraction=1, shuffle=True, seed=draw).write_parquet(folder / "ranks.parquet")
        config = {
            "seed": seed,
            "evaluation": EVALUATION,
            "optimizer": {"lr": lr},
            "experiment_name": name.split("/")[0],
        }
        (folder / "config.yaml").write_text(yaml.safe_dump(config))
        (folder / "metrics.json").write_text(json.dumps({"identity": IDENTITY | (identity or {})}))
        return folder

    return write


def ndcg(folder: Path) -> np.ndarray:
    ranks = pl.read_parquet(folder / "ranks.parquet").sort("user")["rank"].to_numpy()
    return np.where(ranks < 10, 1 / np.log2(ranks + 2), 0)


def lines(capsys: pytest.CaptureFixture[str]) -> dict[str, list[str]]:
    """Cells of each table row, by the first of them."""
    rows = [line.strip("| ").split("|") for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    return {row[0].strip(): [cell.strip() for cell in row[1:]] for row in rows}


def fails(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit):
        main(arguments)
    return capsys.readouterr().err


def test_users_are_paired_whatever_their_order_in_the_files(save: Save, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = save("a", draw=1, gain=0.5), save("b", draw=2)
    main([str(a), str(b)])
    expected = paired(ndcg(a), ndcg(b))
    row = lines(capsys)["ndcg@10"]
    assert row[:3] == [f"{expected.a:.4f}", f"{expected.b:.4f}", f"{expected.difference:+.4f}"]
    assert row[3:] == [f"[{expected.low:+.4f}, {expected.high:+.4f}]", f"{expected.p:.4f}"]


def test_the_difference_is_broken_down_by_target_and_history(save: Save, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = save("a", draw=1, gain=0.5), save("b", draw=2)
    main([str(a), str(b), "metric=ndcg@10"])
    found, chosen = lines(capsys), np.arange(USERS) % 9 + 1 < 5
    assert {"target 0", "target 1-9", "target 10+", "history 1-4", "history 5+"} <= found.keys()
    means = [f"{ndcg(folder)[chosen].mean():.4f}" for folder in (a, b)]
    assert found["history 1-4"][:3] == [str(chosen.sum()), *means]


def test_seeds_are_paired_and_averaged_user_by_user(save: Save, capsys: pytest.CaptureFixture[str]) -> None:
    runs = {side: [save(f"{side}/{s}", draw=10 * s + (side == "b"), seed=s) for s in range(3)] for side in "ab"}
    main([str(runs["a"][0].parent), str(runs["b"][0].parent), "ks=10"])
    values = {side: [ndcg(folder) for folder in folders] for side, folders in runs.items()}
    over_users = paired(np.mean(values["a"], 0), np.mean(values["b"], 0))
    over_seeds = seed_interval([a.mean() - b.mean() for a, b in zip(*values.values(), strict=True)])
    row = lines(capsys)["ndcg@10"]
    assert row[2] == f"{over_users.difference:+.4f}"
    assert row[5:] == [
        f"{over_seeds.mean:+.4f} ± {over_seeds.sd:.4f}",
        f"[{over_seeds.low:+.4f}, {over_seeds.high:+.4f}]",
    ]


def test_one_run_stands_against_each_seed_of_the_other_side(save: Save) -> None:
    floor = save("floor", draw=5)
    for seed in range(3):
        save(f"a/{seed}", draw=seed, seed=seed + 1)
    spread = Comparison(read_runs(floor.parent / "a"), read_runs(floor)).seeds("mrr")
    runs = [read_run(floor.parent / "a" / str(seed)).metric("mrr").mean() for seed in range(3)]
    assert spread is not None
    assert spread.mean == pytest.approx(np.mean(runs) - read_run(floor).metric("mrr").mean())
    assert spread.sd == pytest.approx(np.std(runs, ddof=1))


def test_other_seeds_on_each_side_give_no_interval_over_seeds(save: Save) -> None:
    for side, first in (("a", 0), ("b", 1)):
        for seed in (first, first + 1):
            last = save(f"{side}/{seed}", draw=seed, seed=seed)
    sides = [read_runs(last.parents[1] / side) for side in "ab"]
    assert Comparison(*sides).seeds("mrr") is None


def test_several_predictions_of_a_user_are_drawn_together(save: Save) -> None:
    a, b = (save(name, draw=draw) for name, draw in (("a", 1), ("b", 2)))
    for folder in (a, b):
        frame = pl.read_parquet(folder / "ranks.parquet")
        frame.with_columns(user=pl.col("user").str.slice(0, 2)).write_parquet(folder / "ranks.parquet")
    found = Comparison([read_run(a)], [read_run(b)]).paired("mrr")
    once = paired(read_run(a).metric("mrr"), read_run(b).metric("mrr"))
    assert found.difference == pytest.approx(once.difference)
    assert (found.low, found.high, found.p) != (once.low, once.high, once.p)


@pytest.mark.parametrize("part", list(IDENTITY))
def test_runs_on_other_data_protocols_or_candidates_are_refused(
    part: str, save: Save, capsys: pytest.CaptureFixture[str]
) -> None:
    a, b = save("a"), save("b", identity={part: "another"})
    message = fails([str(a), str(b)], capsys)
    assert f"cannot be compared: their {part} is {IDENTITY[part]} and another" in message


def test_runs_of_other_users_are_refused(save: Save, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = save("a"), save("b")
    pl.read_parquet(b / "ranks.parquet").head(50).write_parquet(b / "ranks.parquet")
    assert "they ranked 60 and 50 targets" in fails([str(a), str(b)], capsys)


def test_a_folder_of_several_systems_is_refused(save: Save) -> None:
    folder = save("a/0", lr=1.0).parent
    save("a/1", seed=1, lr=2.0)
    with pytest.raises(ConfigError, match=r"runs of several systems: 1 and 0 differ, optimizer.lr was 1.0, now 2.0"):
        read_runs(folder)
    save("b/0")
    save("b/1")
    with pytest.raises(ConfigError, match=r"holds seeds \[0, 0\]: give one run a seed"):
        read_runs(folder.parent / "b")


def test_a_run_that_was_resumed_or_made_elsewhere_is_of_the_same_system(save: Save) -> None:
    first = save("a/0")
    for seed, changed in enumerate([["ckpt=last.ckpt"], ["cache_dir=c", "dataset.root=d", "logger=csv"]]):
        config = to_plain(compose([f"seed={seed}", "trainer.accelerator=cpu", *changed]))
        folder = first if seed == 0 else save("a/1", seed=seed)
        (folder / "config.yaml").write_text(yaml.safe_dump(config))
    assert [run.seed for run in read_runs(first.parent)] == [0, 1]


def test_an_older_runs_config_has_the_defaults_of_keys_that_came_later() -> None:
    config = to_plain(compose([]))
    older = config | {"user": {key: value for key, value in config["user"].items() if key != "time_gaps"}}
    assert comparable(older) == comparable(config)
    assert comparable(config | {"optimizer": config["optimizer"] | {"lr": 1.0}}) != comparable(config)


def test_what_is_no_finished_run_is_named(save: Save, tmp_path: Path) -> None:
    unfinished = save("a")
    (unfinished / "ranks.parquet").unlink()
    for folder, message in (
        (unfinished, r"has no ranks\.parquet: not a run folder, or the run is not finished"),
        (tmp_path / "nowhere", "no such folder"),
        (tmp_path / "a" / "empty", "holds no run folder"),
    ):
        if folder.name == "empty":
            folder.mkdir()
        with pytest.raises(ConfigError, match=message):
            read_runs(folder)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["a"], "give two folders, not 1"),
        (["a", "a", "metric=auc"], "metric=auc: choose of hr@K, ndcg@K, mrr"),
        (["a", "a", "ks=ten"], "ks=ten: must be whole numbers"),
        (["a", "a", "ks=10,5"], "evaluation.ks="),
    ],
)
def test_wrong_arguments_are_named(
    arguments: list[str], message: str, save: Save, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(save("a").parent)
    assert message in fails(arguments, capsys)


def test_help_shows_the_usage(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--help"])
    assert "usage: python -m hllm.compare RUN_A RUN_B" in capsys.readouterr().out


def test_runs_as_training_leaves_them_are_compared(
    id_run: Run, cached_run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    main([str(id_run.folder), str(cached_run.folder)])
    found = lines(capsys)
    for place, run in enumerate((id_run, cached_run)):
        results = run.evaluation.results["test"]
        assert found["mrr"][place] == f"{results['all']['mrr']:.4f}"
        assert found["history 10-19"][place + 1] == f"{results['history 10-19']['ndcg@5']:.4f}"
    assert not math.isnan(float(found["mrr"][4]))
