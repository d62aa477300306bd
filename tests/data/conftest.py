"""What the tests of several data sets share."""

from collections.abc import Callable
from pathlib import Path

import pytest

from hllm.build import build_datamodule
from hllm.config import compose
from hllm.data.base import SequenceDataModule


@pytest.fixture
def build(tmp_path: Path) -> Callable[..., SequenceDataModule]:
    """The data module of a composed config, on the files of ``tmp_path``."""

    def module(*overrides: str) -> SequenceDataModule:
        data = build_datamodule(compose([*overrides, f"dataset.root={tmp_path}", f"cache_dir={tmp_path / 'cache'}"]))
        assert isinstance(data, SequenceDataModule)
        return data

    return module
