"""Both file forms of MovieLens-100k, and what malformed files get."""

import logging
from collections.abc import Callable
from pathlib import Path

import polars as pl
import pytest
import torch

from hllm.config import Config, DatasetConfig, TextConfig, compose
from hllm.data.movielens import GENRES, MOVIES, RATINGS, MovieLens100K
from hllm.data.schema import Batch
from hllm.errors import DataError
from hllm.metrics import RankingMetrics, target_ranks

DRAMA, WAR = GENRES.index("Drama"), GENRES.index("War")
FLAGS = [int(genre in (DRAMA, WAR)) for genre in range(len(GENRES))]
MOVIE_ROWS = [
    (20, "Misérables, Les (1995)", "01-Jan-1995", "", "http://x", *FLAGS),
    (3, "", "", "", "", 1, *[0] * 18),
    (10, "Alien (1979)", "", "", "", *[0] * 19),
]
RATING_ROWS = [(2, 20, 5, 100), (1, 3, 1, 50), (1, 10, 2, 40), (2, 10, 3, 90), (1, 20, 4, 60)]


def write_official(folder: Path, movies: list[tuple] = MOVIE_ROWS, ratings: list[tuple] = RATING_ROWS) -> Path:
    for name, separator, rows in (("u.item", "|", movies), ("u.data", "\t", ratings)):
        text = "".join(separator.join(map(str, row)) + "\n" for row in rows)
        (folder / name).write_bytes(text.encode("iso-8859-1"))
    return folder


def tables() -> tuple[pl.DataFrame, pl.DataFrame]:
    movies = pl.DataFrame(MOVIE_ROWS, schema=list(MOVIES), orient="row")
    return movies, pl.DataFrame(RATING_ROWS, schema=list(RATINGS), orient="row")


def write_parquet(folder: Path, movies: pl.DataFrame, ratings: pl.DataFrame) -> Path:
    movies.write_parquet(folder / "MovieLens100k_items.parquet.brotli")
    ratings.write_parquet(folder / "MovieLens100k_data.parquet.brotli")
    return folder


@pytest.fixture
def read(tmp_path: Path) -> Callable[[], MovieLens100K]:
    """Reads ``tmp_path``, whatever its counts."""

    def module(check_counts: bool = False) -> MovieLens100K:
        config = DatasetConfig(
            name="movielens_100k", _target_="", root=str(tmp_path), check_counts=check_counts, text=TextConfig()
        )
        data = MovieLens100K(config, tmp_path)
        data.prepare_data()
        data.setup()
        return data

    return module


def test_the_official_files_become_catalogue_and_histories(read: Callable[..., MovieLens100K], tmp_path: Path) -> None:
    write_official(tmp_path)
    data = read()
    assert data.catalog.ids == ["20", "3", "10"]
    assert data.catalog.fields == {
        "title": ["Misérables, Les (1995)", "", "Alien (1979)"],
        "genres": ["Drama|War", "", ""],
    }
    assert data.catalog.titles == ["Misérables, Les (1995)", "3", "Alien (1979)"]
    assert data.interactions.items.tolist() == [3, 2, 1, 3, 1]
    assert data.interactions.users.tolist() == ["1", "2"]
    assert data.train_counts.tolist() == [0, 1, 0, 2]


def test_both_file_forms_read_the_same(read: Callable[..., MovieLens100K], tmp_path: Path) -> None:
    write_official(tmp_path)
    official = read()
    for name in ("u.data", "u.item"):
        (tmp_path / name).unlink()
    write_parquet(tmp_path, *tables())
    parquet = read()
    assert parquet.catalog == official.catalog
    assert parquet.interactions.fingerprint() == official.interactions.fingerprint()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("u.data", b"1\t3\t5\n", r"u\.data: row 1 has 3 values, expected 4 \(user_id, movie_id"),
        ("u.data", b"1\t3\t5\t9\n1\t3\n", r"u\.data: row 2 has 2 values"),
        ("u.data", b"1\t3\t5\t9\n\n1\t3\t5\t8\n", r"u\.data: row 2 has 1 values"),
        ("u.data", b"1\t3\t5\t9\n1\tthree\t5\t9\n", r"u\.data: row 2 has movie_id='three', which is not a whole"),
        ("u.data", b"1\t3\t5\t9.5\n", r"u\.data: row 1 has timestamp='9.5', which is not a whole number"),
        ("u.data", b"1\t3\t\t9\n", r"u\.data: row 1 has rating='', which is not a whole number"),
        ("u.data", b"", r"u\.data: is empty"),
        ("u.data", b"\n", r"u\.data: is empty"),
        ("u.data", b"1\t3\t5\t9\n1\t3\t\xff\t9\n", r"u\.data: row 2 is not UTF-8 text"),
        ("u.data", b"1\t3\t5\t9\n1\t4\t5\t9\n", r"u\.data: row 2 names item '4', which is not in the catalogue"),
        ("u.item", b"", r"u\.item: is empty"),
        ("u.item", b"3|Four Rooms|x\n", r"u\.item: row 1 has 3 values, expected 24"),
    ],
)
def test_a_malformed_file_is_refused_by_name_and_row(
    read: Callable[..., MovieLens100K], tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    write_official(tmp_path)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        read()


def test_a_movie_id_that_occurs_twice_is_refused(read: Callable[..., MovieLens100K], tmp_path: Path) -> None:
    write_official(tmp_path, movies=[*MOVIE_ROWS, MOVIE_ROWS[1]])
    with pytest.raises(DataError, match=r"u\.item: movie_id 3 occurs twice"):
        read()


def test_repeated_ratings_are_skipped_and_counted(
    read: Callable[..., MovieLens100K], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_official(tmp_path, ratings=[*RATING_ROWS, *RATING_ROWS[:2]])
    with caplog.at_level(logging.WARNING):
        assert len(read().interactions) == 5
    assert "u.data: skipped 2 rows" in caplog.text


def test_windows_line_ends_are_read(read: Callable[..., MovieLens100K], tmp_path: Path) -> None:
    write_official(tmp_path)
    expected = read().interactions.fingerprint()
    for name in ("u.data", "u.item"):
        (tmp_path / name).write_bytes((tmp_path / name).read_bytes().replace(b"\n", b"\r\n"))
    assert read().interactions.fingerprint() == expected


def test_a_title_of_ten_thousand_characters_is_kept_whole(read: Callable[..., MovieLens100K], tmp_path: Path) -> None:
    write_official(tmp_path, movies=[*MOVIE_ROWS, (4, "x" * 10_000, *MOVIE_ROWS[2][2:])])
    assert read().catalog.titles[3] == "x" * 10_000


def test_a_torn_parquet_file_is_refused(read: Callable[..., MovieLens100K], tmp_path: Path) -> None:
    path = write_parquet(tmp_path, *tables()) / "MovieLens100k_data.parquet.brotli"
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(DataError, match=r"MovieLens100k_data\.parquet\.brotli: cannot be read as Parquet"):
        read()


def test_a_missing_column_is_named(read: Callable[..., MovieLens100K], tmp_path: Path) -> None:
    movies, ratings = tables()
    write_parquet(tmp_path, movies, ratings.drop("timestamp"))
    with pytest.raises(DataError, match=r"data\.parquet\.brotli: has no column 'timestamp'; expected"):
        read()


def test_no_ratings_at_all_are_refused(read: Callable[..., MovieLens100K], tmp_path: Path) -> None:
    movies, ratings = tables()
    write_parquet(tmp_path, movies, ratings.clear())
    with pytest.raises(DataError, match=r"data\.parquet\.brotli: holds no interactions"):
        read()


def test_an_empty_value_in_parquet_is_refused_by_row(read: Callable[..., MovieLens100K], tmp_path: Path) -> None:
    movies, ratings = tables()
    write_parquet(tmp_path, movies, ratings.with_columns(user_id=pl.Series([1, None, 1, 1, 1])))
    with pytest.raises(DataError, match=r"row 2 has user_id=None, which is not a whole number"):
        read()


def test_a_fraction_in_parquet_is_refused_by_row(read: Callable[..., MovieLens100K], tmp_path: Path) -> None:
    movies, ratings = tables()
    write_parquet(tmp_path, movies, ratings.with_columns(timestamp=pl.Series([1.0, 2.0, 2.5, 3.0, 4.0])))
    with pytest.raises(DataError, match=r"row 3 has timestamp=2\.5, which is not a whole number"):
        read()


def test_a_title_that_is_not_utf8_is_refused_by_row(read: Callable[..., MovieLens100K], tmp_path: Path) -> None:
    movies, ratings = tables()
    titles = pl.Series([b"Alien", "Misérables".encode("iso-8859-1"), b"Toy Story"], dtype=pl.Binary)
    write_parquet(tmp_path, movies.with_columns(movie_title=titles), ratings)
    with pytest.raises(DataError, match=r"items\.parquet\.brotli: row 2 has a movie_title that is not UTF-8 text"):
        read()


def test_other_counts_than_published_name_the_flag(read: Callable[..., MovieLens100K], tmp_path: Path) -> None:
    write_official(tmp_path)
    with pytest.raises(DataError, match=r"expected Counts\(interactions=100000.*found.*=5, users=2, items=3.*"
                       r"dataset\.check_counts=false"):  # fmt: skip
        read(check_counts=True)


def test_a_folder_with_neither_file_form_is_refused(read: Callable[..., MovieLens100K], tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"dataset\.root=.*: holds neither u\.data and u\.item nor MovieLens100k_data"):
        read()


def test_a_root_that_is_no_folder_is_refused(tmp_path: Path) -> None:
    config = DatasetConfig(name="movielens_100k", _target_="", root=str(tmp_path / "nowhere"))
    with pytest.raises(DataError, match=r"dataset\.root=.*nowhere: no such folder"):
        MovieLens100K(config, tmp_path).prepare_data()


def test_without_root_and_wheel_the_error_asks_for_root(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"movielens_100k: set dataset\.root="):
        MovieLens100K(DatasetConfig(name="movielens_100k", _target_=""), tmp_path).prepare_data()


@pytest.fixture(scope="module")
def real(shared_cache: Path) -> MovieLens100K:
    config: Config = compose([f"cache_dir={shared_cache}"])
    data = MovieLens100K(config.dataset, shared_cache)
    data.prepare_data()
    data.setup()
    return data


@pytest.mark.real
def test_the_real_data_set_has_its_published_size(real: MovieLens100K) -> None:
    assert (len(real.interactions), real.interactions.num_users, real.num_items) == (100_000, 943, 1_682)
    assert "Toy Story (1995)" in real.catalog.titles


@pytest.mark.real
def test_popularity_on_the_real_data_set_scores_as_known(real: MovieLens100K) -> None:
    metrics = RankingMetrics([10], [1])
    batch: Batch
    for batch in real.test_dataloader():
        targets = batch.targets.max(1).values
        scores = real.train_counts[1:].float().expand(len(batch), -1)
        metrics.update(*target_ranks(scores, targets, batch.seen), real.train_counts[targets])
    found = metrics.compute()["all"]
    assert found["users"] == 943
    assert found["hr@10"] * 943 == pytest.approx(80, abs=1.001)  # torch-rechub's protocol, history masked
    assert found["ndcg@10"] == pytest.approx(0.0435, abs=0.001)


@pytest.mark.real
def test_real_training_trains_each_transition_once(real: MovieLens100K) -> None:
    trained = sum(int((batch.targets > 0).sum()) for batch in real.train_dataloader())
    assert trained == 100_000 - 3 * 943
    assert torch.tensor([len(batch) for batch in real.val_dataloader()]).sum() == 943
