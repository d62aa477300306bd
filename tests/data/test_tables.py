"""A catalogue of a person's own, as CSV."""

from pathlib import Path

import pytest

from hllm.data.tables import read_catalog
from hllm.errors import DataError


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "new.csv"


def test_values_stay_text_and_missing_ones_are_empty(path: Path) -> None:
    path.write_text('id,title,genres\n007,"Bond, James",\n1.50,,Drama\n')
    catalog = read_catalog(path)
    assert catalog.ids == ["007", "1.50"]
    assert catalog.fields == {"title": ["Bond, James", ""], "genres": ["", "Drama"]}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "cannot be read as CSV"),
        (b"id,title\n1,a,b,c\n", "cannot be read as CSV"),
        (b"id,title\n1,\xff\xfe\n", "cannot be read as CSV"),
        (b"name,title\n1,a\n", r"has no column 'id'; its header is \['name', 'title'\]"),
        (b"id,title\n", "row 2 has no id of its own"),
        (b"id,title\n1,a\n,b\n", "row 3 has no id of its own"),
        (b"id,title\n1,a\n2,b\n1,c\n", "row 2 has no id of its own; ids must be there and unique"),
    ],
)
def test_a_malformed_catalogue_is_refused_by_name_and_row(path: Path, content: bytes, message: str) -> None:
    path.write_bytes(content)
    with pytest.raises(DataError, match=rf"new\.csv: {message}"):
        read_catalog(path)


def test_a_missing_catalogue_is_refused(path: Path) -> None:
    with pytest.raises(DataError, match=r"new\.csv: cannot be read as CSV"):
        read_catalog(path)
