"""PixelRec in its layouts, and what malformed files get."""

from collections.abc import Callable
from pathlib import Path

import pytest

from hllm.build import build_datamodule
from hllm.config import ConfigError, compose, from_plain, to_plain
from hllm.data.base import SequenceDataModule
from hllm.errors import DataError

EVENTS = [("v3", "u9", 30), ("v1", "u9", 10), ("v2", "u9", 20), ("v2", "u4", 7), ("v3", "u4", 6)]
INTERACTIONS = "item_id,user_id,timestamp\n" + "".join(f"{item},{user},{time}\n" for item, user, time in EVENTS)
INFORMATION = """item_id,view_number,comment_number,title,tag,description
v1,100,3,"A cat, asleep",animals,"It sleeps.
It wakes."
v2,7,0,Rain,weather,
v3,8,1,Noodles,food,Boil them.
"""
LAYOUTS = [("dataset/Pixel200K.csv", "information/Pixel200K.csv"), ("Pixel200K.csv", "item_info.csv")]
SMALL = ["dataset=pixelrec_200k", "dataset.check_counts=false"]

Build = Callable[..., SequenceDataModule]


def write(
    folder: Path, names: tuple[str, str] = LAYOUTS[0], texts: tuple[str, str] = (INTERACTIONS, INFORMATION)
) -> None:
    for name, text in zip(names, texts, strict=True):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)


@pytest.mark.parametrize("names", LAYOUTS)
def test_both_layouts_become_catalogue_and_histories(build: Build, tmp_path: Path, names: tuple[str, str]) -> None:
    write(tmp_path, names)
    data = build(*SMALL)
    assert data.catalog.ids.to_list() == ["v1", "v2", "v3"]
    assert {name: values.to_list() for name, values in data.catalog.fields.items()} == {
        "title": ["A cat, asleep", "Rain", "Noodles"],
        "tag": ["animals", "weather", "food"],
        "description": ["It sleeps.\nIt wakes.", "", "Boil them."],
    }
    assert data.interactions.users.to_list() == ["u4", "u9"]
    assert data.interactions.items.tolist() == [3, 2, 1, 2, 3]
    assert [batch.targets.max().item() for batch in data.test_dataloader()] == [3]


def test_columns_are_found_by_name_in_any_order(build: Build, tmp_path: Path) -> None:
    rows = "".join(f"{user},{time},{item},x\n" for item, user, time in EVENTS)
    write(tmp_path, texts=("user_id,timestamp,item_id,more\n" + rows, INFORMATION))
    assert build(*SMALL).interactions.items.tolist() == [3, 2, 1, 2, 3]


@pytest.mark.parametrize("size", ["200K", "1M", "8M"])
def test_each_size_has_its_name_files_and_counts(build: Build, tmp_path: Path, size: str) -> None:
    option = f"dataset=pixelrec_{size.lower()}"
    config = compose([option])
    assert (config.dataset.name, config.dataset.max_history) == (f"pixelrec_{size.lower()}", 10)
    assert from_plain(to_plain(config)) == config
    write(tmp_path, (f"dataset/Pixel{size}.csv", f"information/Pixel{size}.csv"))
    with pytest.raises(DataError, match=r"Pixel\w+\.csv: expected Counts\(interactions=\d{7,}, .*found.*=5, users=2"):
        build(option)


def test_another_size_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"dataset\.size=50K: choose of 200K, 1M, 8M"):
        compose(["dataset=pixelrec_200k", "dataset.size=50K"])


def test_without_a_root_the_error_says_where_to_get_which_files(tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=r"pixelrec_8m: set dataset\.root=.*westlake-repl/PixelRec.*Pixel8M\.csv.*dataset and"
    ):
        build_datamodule(compose(["dataset=pixelrec_8m", f"cache_dir={tmp_path}"]))  # fmt: skip


def test_missing_files_are_named_with_where_to_get_them(build: Build, tmp_path: Path) -> None:
    write(tmp_path)
    (tmp_path / LAYOUTS[0][1]).unlink()
    with pytest.raises(DataError, match=r"needs dataset/Pixel200K\.csv and information/Pixel200K\.csv or Pixel200K"
                       r"\.csv and item_info\.csv; of these there is only dataset/Pixel200K\.csv.*Google"):  # fmt: skip
        build(*SMALL)


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (("a,b,c\nv1,u1,5\n", INFORMATION), r"dataset/Pixel200K\.csv: .*'item_id', 'timestamp'\].*\['a', 'b', 'c'\]"),
        ((INTERACTIONS, "item_id,title\nv1,x\n"), r"information/Pixel200K\.csv: .*'tag'.*\['item_id', 'title'\]"),
        ((INTERACTIONS + "v1,u1\n", INFORMATION), r"dataset/Pixel200K\.csv: row 7 has 2 values, expected 3"),
        ((INTERACTIONS + "v1,u1,now\n", INFORMATION), r"dataset/Pixel200K\.csv: row 7 has timestamp='now'"),
        ((INTERACTIONS + "v7,u1,1\n", INFORMATION), r"row 7 names item 'v7', which is not in the catalogue"),
        ((INTERACTIONS, INFORMATION + "v1,1,2,x,y,z\n"), r"information/Pixel200K\.csv: row 6 repeats item_id 'v1'"),
        ((INTERACTIONS, INFORMATION + "v4,1,2\n"), r"information/Pixel200K\.csv: row 6 has 3 values, expected 6"),
        ((INTERACTIONS, ""), r"information/Pixel200K\.csv: is empty; fetch the file again"),
    ],
)
def test_a_malformed_file_is_refused_by_file_and_row(
    build: Build, tmp_path: Path, texts: tuple[str, str], message: str
) -> None:
    write(tmp_path, texts=texts)
    with pytest.raises(DataError, match=message):
        build(*SMALL)


def test_a_table_of_many_parts_reads_as_one(build: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hllm.data.delimited.TABLE_ROWS", 1)
    write(tmp_path)
    assert build(*SMALL).catalog.titles == ["A cat, asleep", "Rain", "Noodles"]
