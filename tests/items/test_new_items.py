"""Fused and selected texts through training and recommending, with items that were not in training."""

from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import Run

from hllm.data.delimited import read_catalog
from hllm.evaluate import checkpoint_config
from hllm.recommend import Recommendations


@pytest.mark.parametrize(("items", "fusion"), [("cached", "concat"), ("cached", "sum"), ("fused", "sum")])
def test_new_items_are_fused_and_selected_as_the_catalogue_was(
    run_training: Callable[..., Run], tmp_path: Path, items: str, fusion: str
) -> None:
    flags = [f"dataset.text.fusion={fusion}", "dataset.text.selection=bm25_words", "llm.max_tokens=20"]
    run = run_training(f"items={items}", "trainer.max_epochs=1", *flags)
    path = tmp_path / "new.csv"
    path.write_text(f'id,title,genres\n900,"{"word1 " * 30}",Drama\n901,word2,\n')
    model = Recommendations(checkpoint_config(run.best, None, None), run.best, read_catalog(path))
    vectors = model.module.items.table.vectors
    assert vectors.shape == (32, 64 if fusion == "concat" else 32)
    assert vectors[30:].isfinite().all()
    assert not vectors[31, 32:].any(), "901 has no genres"
    ranked = model.rank(model.history_of_titles(["901"]), k=100)
    assert len(ranked) == 31
