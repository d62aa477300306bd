"""The joint step's benchmark: both ways compute one thing, and what it counts is what is done."""

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "scripts" / "bench"))
import joint
import measure
import synthetic

MINUTE: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "vocab_size": 40} | {
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}
SHAPE = synthetic.Shape(
    60, 0.7, synthetic.Lengths(6, 0.5, 2, 12), synthetic.Lengths(4, 0.5, 3, 7), positions=6, batch_size=4, negatives=9
)
WAYS = list(joint.WAYS)


@pytest.fixture
def bench() -> joint.Bench:
    return joint.Bench(MINUTE, SHAPE, torch.device("cpu"), "32-true", seed=0)


def test_the_two_ways_agree_on_loss_and_gradient(bench: joint.Bench) -> None:
    """Same weights and negatives; the official one over random items in place of padding, which must not matter."""
    assert bench.check["official"] == pytest.approx(bench.check["ours"], abs=1e-4)
    assert bench.check["gradient_gap"] < 1e-4
    assert bench.check["negatives_kept"] > 0.8
    assert bench.check["official"] > 0.1


def test_a_way_that_computes_something_else_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(joint.OfficialWay, "encode", lambda way, ids: 2 + way._padded(ids.numpy() - 1, ids.device))
    with pytest.raises(AssertionError, match="the losses differ"):
        joint.Bench(MINUTE, SHAPE, torch.device("cpu"), "32-true", seed=0)


@pytest.mark.parametrize("name", WAYS)
def test_a_way_encodes_the_items_that_it_counts(name: str, bench: joint.Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows and padded tokens, as they go through the Item LLM's last norm; once more where they are encoded twice."""
    way = joint.WAYS[name]
    step = synthetic.make_step(SHAPE, np.random.default_rng(1))
    seen: list[int] = []
    bench.items.model.norm.register_forward_hook(lambda norm, inputs, output: seen.append(output[..., 0].numel()))
    bench.set_up(way)
    bench.run(way, step, seed=3)
    counted = bench.count(way, step, seed=3)
    assert sum(seen) == counted["tokens"] * (2 if way.grad_cache else 1)
    assert counted["useful_items"] <= counted["items"]
    assert counted["useful_flops"] <= counted["flops"]


def test_all_ways_train_alike(bench: joint.Bench) -> None:
    """A step from the same weights on the same batch gives the same gradients, to rounding; nothing is left out."""
    step = synthetic.make_step(SHAPE, np.random.default_rng(2))
    bench.optimizer = torch.optim.SGD(bench.module.parameters(), lr=0.0)
    gradients = []
    for name in WAYS:
        bench.set_up(joint.WAYS[name])
        torch.manual_seed(5)
        bench.official.zero_grad()
        bench.loss(joint.WAYS[name], step).backward()  # type: ignore[no-untyped-call]
        gradients.append(torch.cat([p.grad.flatten() for p in bench.module.parameters() if p.grad is not None]))
    for gradient in gradients[1:]:
        assert torch.allclose(gradient, gradients[0], atol=1e-4 * float(gradients[0].abs().max()))


def test_histories_are_as_long_as_stated() -> None:
    step = synthetic.make_step(SHAPE, np.random.default_rng(0), batch_size=500)
    lengths = step.batch.mask.sum(1) + 1
    assert (int(lengths.min()), int(lengths.max())) == (3, 7)
    assert float(lengths.float().median()) == 4
    assert step.filled.shape == (500, 7)
    for items, length in zip(step.filled.tolist(), lengths.tolist(), strict=True):
        assert len(set(items[:length])) == length
    assert bool((step.batch.targets[:, :-1] == step.batch.items[:, 1:])[step.batch.mask[:, 1:]].all())
    assert bool(step.valid.sum(1).eq(step.batch.mask.sum(1)).all())


def test_the_script_writes_what_it_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measure, "RECORDS", tmp_path)
    arguments = ["--data", "pixel8m", "--layers", "1", "--items", "50", "--rounds", "1", "--share", "0.1"]
    (table,) = joint.main([*arguments, "--device", "cpu", "--ways", "official", "ours", "--record"])
    record, tables, _ = measure.read_record(tmp_path / "joint-cpu.json")
    assert tables == [replace(table, measured=tables[0].measured)]
    assert {"command", "date", "git"} == tables[0].measured.keys()
    assert table.cells["items"]["official"] == str(2 * 11 + 18)
    assert table.cells["of a useful one"]["ours"] == "1.00"
    assert {"torch", "cpu", "threads"} <= record["environment"].keys()
    assert "| ours " in capsys.readouterr().out


def test_a_record_keeps_what_is_not_measured_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the same machine and versions; a number of another one never stands beside it."""
    monkeypatch.setattr(measure, "RECORDS", tmp_path)
    args = measure.parser(None, 1).parse_args(["--device", "cpu", "--record"])
    for title, seconds in (("a", 1.0), ("b", 2.0), ("a", 3.0)):
        measure.finish("some", args, [measure.Table(title, "things", 1, {"plain": [seconds]})])
    _, tables, _ = measure.read_record(tmp_path / "some-cpu.json")
    assert [(table.title, table.seconds["plain"]) for table in tables] == [("a", [3.0]), ("b", [2.0])]
    monkeypatch.setattr(measure, "cpu_name", lambda: "another")
    measure.finish("some", args, [measure.Table("b", "things", 1, {"plain": [4.0]})])
    _, tables, _ = measure.read_record(tmp_path / "some-cpu.json")
    assert [table.title for table in tables] == ["b"]
