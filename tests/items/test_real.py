"""The pinned models themselves, on a handful of items."""

from pathlib import Path

import pytest
import torch

from hllm.config import Dtype, compose
from hllm.data.schema import Catalog
from hllm.items.backbone import load_backbone
from hllm.items.cache import embed_catalog
from hllm.items.encoder import Encoder
from hllm.items.files import locate
from hllm.items.text import item_texts

pytestmark = pytest.mark.real

TITLES = ["Toy Story (1995)", "Alien (1979)", "Aliens (1986)", "Postino, Il (1994)", "", "Star Wars (1977)"]
GENRES = ["Animation|Comedy", "Action|Horror|Sci-Fi|Thriller", "Action|Sci-Fi", "Drama|Romance", "", "Sci-Fi|War"]
CATALOG = Catalog([str(row) for row in range(6)], {"title": TITLES, "genres": GENRES})


@pytest.mark.parametrize(("name", "dim"), [("smollm2_135m", 576), ("minilm", 384)])
def test_pinned_model_gives_each_item_its_vector(name: str, dim: int, shared_cache: Path, tmp_path: Path) -> None:
    config = compose([f"llm={name}", "llm.dtype=float32"])
    files = locate(config.llm, shared_cache)
    backbone = load_backbone(files, config.llm)
    encoder = Encoder(backbone, config.llm, item_texts(CATALOG, config.dataset.text), CATALOG.ids)
    single = torch.cat([encoder.encode([row]) for row in range(len(CATALOG))])
    order = encoder.order()
    torch.testing.assert_close(encoder.encode(order), single[order], atol=1e-3, rtol=1e-3)
    assert single.shape == (6, dim)
    assert len(single.unique(dim=0)) == 6


def test_related_films_are_nearer_than_unrelated_ones(shared_cache: Path) -> None:
    config = compose(["llm=minilm"])
    config.llm.dtype = Dtype.float32
    vectors = torch.nn.functional.normalize(
        embed_catalog(CATALOG, config.dataset.text, config.llm, shared_cache).vectors, dim=1
    )
    similarity = vectors @ vectors.T
    assert similarity[1, 2] > similarity[1, 3] + 0.1
