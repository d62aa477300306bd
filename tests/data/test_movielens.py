"""MovieLens in all sizes and file forms, what malformed files get, and sequences of 1M checked by hand."""

import logging
from collections.abc import Callable
from pathlib import Path

import polars as pl
import pytest
import torch

from hllm.build import build_datamodule
from hllm.config import Config, DatasetConfig, TextConfig, compose
from hllm.data.base import SequenceDataModule
from hllm.data.delimited import read_delimited_chunks
from hllm.data.movielens import GENRES, MOVIES, RATINGS, MovieLens1M, MovieLens20M, MovieLens100K, MovieLensLatestSmall
from hllm.data.schema import Batch, Catalog
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


def columns(catalog: Catalog) -> dict[str, list[str]]:
    return {name: values.to_list() for name, values in catalog.fields.items()}


def tables() -> tuple[pl.DataFrame, pl.DataFrame]:
    movies = pl.DataFrame(MOVIE_ROWS, schema=list(MOVIES), orient="row")
    return movies, pl.DataFrame(RATING_ROWS, schema=list(RATINGS), orient="row")


def write_parquet(folder: Path, movies: pl.DataFrame, ratings: pl.DataFrame) -> Path:
    movies.write_parquet(folder / "MovieLens100k_items.parquet.brotli")
    ratings.write_parquet(folder / "MovieLens100k_data.parquet.brotli")
    return folder


@pytest.fixture
def read(tmp_path: Path) -> Callable[..., SequenceDataModule]:
    """Reads ``tmp_path``, whatever its counts."""

    def module(check_counts: bool = False, kind: type[SequenceDataModule] = MovieLens100K) -> SequenceDataModule:
        config = DatasetConfig(
            name="movielens", _target_="", root=str(tmp_path), check_counts=check_counts, text=TextConfig()
        )
        data = kind(config, tmp_path / "cache")
        data.prepare_data()
        data.setup()
        return data

    return module


def test_the_official_files_become_catalogue_and_histories(
    read: Callable[..., SequenceDataModule], tmp_path: Path
) -> None:
    write_official(tmp_path)
    data = read()
    assert data.catalog.ids.to_list() == ["20", "3", "10"]
    assert columns(data.catalog) == {
        "title": ["Misérables, Les (1995)", "", "Alien (1979)"],
        "genres": ["Drama|War", "", ""],
    }
    assert data.catalog.titles == ["Misérables, Les (1995)", "3", "Alien (1979)"]
    assert data.interactions.items.tolist() == [3, 2, 1, 3, 1]
    assert data.interactions.users.to_list() == ["1", "2"]
    assert data.train_counts.tolist() == [0, 1, 0, 2]


def test_both_file_forms_read_the_same(read: Callable[..., SequenceDataModule], tmp_path: Path) -> None:
    write_official(tmp_path)
    official = read()
    for name in ("u.data", "u.item"):
        (tmp_path / name).unlink()
    write_parquet(tmp_path, *tables())
    parquet = read()
    assert columns(parquet.catalog) == columns(official.catalog)
    assert parquet.interactions.fingerprint == official.interactions.fingerprint


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("u.data", b"1\t3\t5\n", r"u\.data: row 1 has 3 values, expected 4 \(user_id, movie_id"),
        ("u.data", b"1\t3\t5\t9\n1\t3\n", r"u\.data: row 2 has 2 values"),
        ("u.data", b"1\t3\t5\t9\n\n1\t3\t5\t8\n", r"u\.data: row 2 has 1 values"),
        ("u.data", b"1\t3\t5\t9\n1\tthree\t5\t9\n", r"u\.data: row 2 names item 'three', which is not in"),
        ("u.data", b"1\t3\t5\t9.5\n", r"u\.data: row 1 has timestamp='9.5', which is not a whole number"),
        ("u.data", b"1\t3\t\t9\n", r"u\.data: row 1 has rating='', which is not a number"),
        ("u.data", b"", r"u\.data: is empty"),
        ("u.data", b"\n", r"u\.data: is empty"),
        ("u.data", b"1\t3\t5\t9\n1\t3\t\xff\t9\n", r"u\.data: row 2 is not UTF-8 text"),
        ("u.data", b"1\t3\t5\t9\n1\t4\t5\t9\n", r"u\.data: row 2 names item '4', which is not in the catalogue"),
        ("u.item", b"", r"u\.item: is empty"),
        ("u.item", b"3|Four Rooms|x\n", r"u\.item: row 1 has 3 values, expected 24"),
    ],
)
def test_a_malformed_file_is_refused_by_name_and_row(
    read: Callable[..., SequenceDataModule], tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    write_official(tmp_path)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        read()


def test_a_movie_id_that_occurs_twice_is_refused(read: Callable[..., SequenceDataModule], tmp_path: Path) -> None:
    write_official(tmp_path, movies=[*MOVIE_ROWS, MOVIE_ROWS[1]])
    with pytest.raises(DataError, match=r"u\.item: row 4 repeats movie_id '3'"):
        read()


def test_repeated_ratings_are_skipped_and_counted(
    read: Callable[..., SequenceDataModule], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_official(tmp_path, ratings=[*RATING_ROWS, *RATING_ROWS[:2]])
    with caplog.at_level(logging.WARNING):
        assert len(read().interactions) == 5
    assert "u.data: skipped 2 rows" in caplog.text


def test_windows_line_ends_are_read(read: Callable[..., SequenceDataModule], tmp_path: Path) -> None:
    write_official(tmp_path)
    expected = read().interactions.fingerprint
    for name in ("u.data", "u.item"):
        (tmp_path / name).write_bytes((tmp_path / name).read_bytes().replace(b"\n", b"\r\n"))
    assert read().interactions.fingerprint == expected


def test_a_title_of_ten_thousand_characters_is_kept_whole(
    read: Callable[..., SequenceDataModule], tmp_path: Path
) -> None:
    write_official(tmp_path, movies=[*MOVIE_ROWS[:2], (10, "x" * 10_000, *MOVIE_ROWS[2][2:])])
    assert read().catalog.titles[2] == "x" * 10_000


def test_a_torn_parquet_file_is_refused(read: Callable[..., SequenceDataModule], tmp_path: Path) -> None:
    path = write_parquet(tmp_path, *tables()) / "MovieLens100k_data.parquet.brotli"
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(DataError, match=r"MovieLens100k_data\.parquet\.brotli: cannot be read as Parquet"):
        read()


def test_a_missing_column_is_named(read: Callable[..., SequenceDataModule], tmp_path: Path) -> None:
    movies, ratings = tables()
    write_parquet(tmp_path, movies, ratings.drop("timestamp"))
    with pytest.raises(DataError, match=r"data\.parquet\.brotli: has no column 'timestamp'; expected"):
        read()


def test_no_ratings_at_all_are_refused(read: Callable[..., SequenceDataModule], tmp_path: Path) -> None:
    movies, ratings = tables()
    write_parquet(tmp_path, movies, ratings.clear())
    with pytest.raises(DataError, match=r"data\.parquet\.brotli: holds no interactions"):
        read()


def test_an_empty_value_in_parquet_is_refused_by_row(read: Callable[..., SequenceDataModule], tmp_path: Path) -> None:
    movies, ratings = tables()
    write_parquet(tmp_path, movies, ratings.with_columns(user_id=pl.Series([1, None, 1, 1, 1])))
    with pytest.raises(DataError, match=r"row 2 has no user id \(found None\)"):
        read()


def test_a_fraction_in_parquet_is_refused_by_row(read: Callable[..., SequenceDataModule], tmp_path: Path) -> None:
    movies, ratings = tables()
    write_parquet(tmp_path, movies, ratings.with_columns(timestamp=pl.Series([1.0, 2.0, 2.5, 3.0, 4.0])))
    with pytest.raises(DataError, match=r"row 3 has timestamp=2\.5, which is not a whole number"):
        read()


def test_a_title_that_is_not_utf8_is_refused_by_row(read: Callable[..., SequenceDataModule], tmp_path: Path) -> None:
    movies, ratings = tables()
    titles = pl.Series([b"Alien", "Misérables".encode("iso-8859-1"), b"Toy Story"], dtype=pl.Binary)
    write_parquet(tmp_path, movies.with_columns(movie_title=titles), ratings)
    with pytest.raises(DataError, match=r"items\.parquet\.brotli: row 2 has a movie_title that is not UTF-8 text"):
        read()


def test_other_counts_than_published_name_the_flag(read: Callable[..., SequenceDataModule], tmp_path: Path) -> None:
    write_official(tmp_path)
    with pytest.raises(DataError, match=r"expected Counts\(interactions=100000.*found.*=5, users=2, items=3.*"
                       r"dataset\.check_counts=false"):  # fmt: skip
        read(check_counts=True)


def test_a_folder_with_neither_file_form_is_refused(read: Callable[..., SequenceDataModule], tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"dataset\.root=.*: needs u\.data and u\.item or MovieLens100k_data"):
        read()


def test_a_root_that_is_no_folder_is_refused(tmp_path: Path) -> None:
    config = DatasetConfig(name="movielens_100k", _target_="", root=str(tmp_path / "nowhere"))
    with pytest.raises(DataError, match=r"dataset\.root=.*nowhere: no such folder"):
        MovieLens100K(config, tmp_path).prepare_data()


def test_without_root_and_wheel_the_error_asks_for_root(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"movielens_100k: set dataset\.root="):
        MovieLens100K(DatasetConfig(name="movielens_100k", _target_=""), tmp_path).prepare_data()


def write_1m(folder: Path, ratings: bytes = b"2::20::5::90\n1::3::4::50\n1::20::4::40\n") -> Path:
    (folder / "movies.dat").write_bytes(
        "20::Misérables, Les (1995)::Drama|Musical\n3::M: I::\n7::Nobody's (2000)::Drama\n".encode("iso-8859-1")
    )
    (folder / "ratings.dat").write_bytes(ratings)
    return folder


CSV_RATINGS = b"userId,movieId,rating,timestamp\n1,2,3.5,1112486027\n1,29,3.5,1112484676\n2,2,4.0,1112484819\n"
CSV_MOVIES = (
    "movieId,title,genres\n2,Jumanji (1995),Adventure|Children|Fantasy\n"
    '29,"City of Lost Children, The (Cité des enfants perdus, La) (1995)",Adventure|Drama\n'
    "131260,Rentun Ruusu (2001),(no genres listed)\n9,Nobody (2000),Drama\n"
)


def write_csv(folder: Path, ratings: bytes = CSV_RATINGS, movies: str = CSV_MOVIES) -> Path:
    (folder / "ratings.csv").write_bytes(ratings)
    (folder / "movies.csv").write_text(movies, encoding="utf-8")
    return folder


def test_the_files_of_1m_are_read(read: Callable[..., SequenceDataModule], tmp_path: Path) -> None:
    write_1m(tmp_path)
    data = read(kind=MovieLens1M)
    assert data.catalog.ids.to_list() == ["20", "3"]  # nobody rated 7
    assert columns(data.catalog) == {
        "title": ["Misérables, Les (1995)", "M: I"],
        "genres": ["Drama|Musical", ""],
    }
    assert data.interactions.users.to_list() == ["1", "2"]
    assert data.interactions.items.tolist() == [1, 2, 1]


def test_the_folder_that_the_archive_unpacks_to_is_found(
    read: Callable[..., SequenceDataModule], tmp_path: Path
) -> None:
    (tmp_path / "ml-1m").mkdir()
    write_1m(tmp_path / "ml-1m")
    assert len(read(kind=MovieLens1M).interactions) == 3


@pytest.mark.parametrize(
    ("ratings", "message"),
    [
        (b"2::20::5::90\n1::3::4\n", r"ratings\.dat: row 2 has 3 values, expected 4 .*: '1::3::4'"),
        (b"2::20::5::90\n1::3::4::5::6\n", r"row 2 has 5 values"),
        (b"2::20::5::90\n1::x::4::5\n", r"row 2 names item 'x', which is not in the catalogue"),
        (b"2::20::5::90\n1::3::4::5.5\n", r"row 2 has timestamp='5\.5', which is not a whole number"),
        (b"2::20::good::90\n", r"row 1 has rating='good', which is not a number"),
        (b"2::20::5::90\n\n1::3::4::5\n", r"row 2 has 1 values"),
        (b"", r"ratings\.dat: is empty"),
    ],
)
def test_a_malformed_line_of_1m_is_refused_by_row(
    read: Callable[..., SequenceDataModule], tmp_path: Path, ratings: bytes, message: str
) -> None:
    write_1m(tmp_path, ratings)
    with pytest.raises(DataError, match=message):
        read(kind=MovieLens1M)


def test_lines_are_numbered_through_chunks(tmp_path: Path) -> None:
    (tmp_path / "ratings.dat").write_bytes(b"1::3::4::50\n" * 9 + b"1::3\n")
    with pytest.raises(DataError, match="row 10 has 2 values"):
        list(read_delimited_chunks(tmp_path / "ratings.dat", "::", RATINGS, size=30))


def test_no_genres_listed_is_no_genre(read: Callable[..., SequenceDataModule], tmp_path: Path) -> None:
    write_csv(tmp_path, CSV_RATINGS + b"2,131260,0.5,1112484820\n")
    data = read(kind=MovieLens20M)
    assert columns(data.catalog) == {
        "title": [
            "Jumanji (1995)",
            "City of Lost Children, The (Cité des enfants perdus, La) (1995)",
            "Rentun Ruusu (2001)",
        ],
        "genres": ["Adventure|Children|Fantasy", "Adventure|Drama", ""],
    }
    assert data.interactions.items.tolist() == [2, 1, 1, 3]


@pytest.mark.parametrize(
    ("ratings", "message"),
    [
        (CSV_RATINGS + b"2,x,4.0,1112484820\n", r"ratings\.csv: row 5 names item 'x', which is not in"),
        (CSV_RATINGS + b"2,2,4.0\n", r"ratings\.csv: row 5 has 3 values, expected 4 \(userId, movieId"),
        (CSV_RATINGS.replace(b"movieId", b"item"), r"has no column 'movieId'; expected .*, found \['userId', 'item'"),
        (CSV_RATINGS + b"2,77,4.0,1112484820\n", r"row 5 names item '77', which is not in the catalogue"),
    ],
)
def test_a_malformed_csv_is_refused_by_row(
    read: Callable[..., SequenceDataModule], tmp_path: Path, ratings: bytes, message: str
) -> None:
    write_csv(tmp_path, ratings)
    with pytest.raises(DataError, match=message):
        read(kind=MovieLensLatestSmall)


def test_rows_of_movies_are_lines_of_the_file(read: Callable[..., SequenceDataModule], tmp_path: Path) -> None:
    write_csv(tmp_path, movies=CSV_MOVIES + '10,"a title\nof two lines",Drama\n2,again,Drama\n')
    with pytest.raises(DataError, match=r"movies\.csv: row 8 repeats movieId '2'"):
        read(kind=MovieLensLatestSmall)


def test_a_missing_file_is_named(read: Callable[..., SequenceDataModule], tmp_path: Path) -> None:
    (write_csv(tmp_path) / "movies.csv").unlink()
    with pytest.raises(
        DataError, match=r"dataset\.root=.*: needs ratings\.csv and movies\.csv or ml.*only ratings\.csv"
    ):
        read(kind=MovieLens20M)


@pytest.mark.parametrize("name", ["movielens_1m", "movielens_20m", "movielens_latest_small"])
def test_downloads_name_the_publisher_and_the_files_that_are_read(name: str) -> None:
    dataset = compose([f"dataset={name}"]).dataset
    (download,) = dataset.downloads
    assert download.url.startswith("https://files.grouplens.org/datasets/movielens/ml-")
    suffix = "dat" if name == "movielens_1m" else "csv"
    assert [Path(file).name for file in download.files] == [f"ratings.{suffix}", f"movies.{suffix}"]


SHARED = Path(__file__).parents[2].parent / "shared" / "data"


def shared(name: str, folder: str, tmp_path: Path) -> SequenceDataModule:
    """A published data set in the folder of shared data beside the checkout, its counts checked."""
    if not (SHARED / folder).is_dir():
        pytest.skip(f"the files of {folder} are not in ../shared/data")
    config = compose([f"dataset={name}", f"dataset.root={SHARED / folder}", f"cache_dir={tmp_path}"])
    return build_datamodule(config)


@pytest.fixture(scope="module")
def million(tmp_path_factory: pytest.TempPathFactory) -> SequenceDataModule:
    return shared("movielens_1m", "ml-1m", tmp_path_factory.mktemp("cache"))


def test_1m_has_its_published_size(million: SequenceDataModule) -> None:
    assert (len(million.interactions), million.interactions.num_users, million.num_items) == (1_000_209, 6_040, 3_706)
    assert "Misérables, Les (1995)" in million.catalog.titles


def test_latest_small_has_its_published_size(tmp_path: Path) -> None:
    data = shared("movielens_latest_small", "ml-latest-small", tmp_path)
    assert (len(data.interactions), data.interactions.num_users, data.num_items) == (100_836, 610, 9_724)
    assert sum(genres == "" for genres in data.catalog.fields["genres"]) == 34


# Twenty users of ratings.dat: number of ratings, first five and last five movies, oldest first; the last is the test
# target, the one before it the validation target. First and last users (1, 2, 6037, 6040), the fewest (98, 160, 311,
# 356, 5258) and most ratings (1680, 4169), few equal times (201, 768) and many (731, 941, 3354, 5258), and others.
# They were not computed by this project: for each user, `grep "^USER::" ratings.dat | sort -s -n -t: -k7,7 | cut -d:
# -f3` (a stable sort by time) and a sort in plain Python agreed; users 2, 98, 5258 and 6040 were read line by line.
SEQUENCES = [
    (1, 53, [3186, 1270, 1721, 1022, 2340], [2294, 783, 1566, 1907, 48]),
    (2, 129, [1198, 1210, 1217, 2717, 1293], [95, 1687, 434, 1544, 1917]),
    (98, 20, [3244, 1210, 2028, 2302, 920], [3821, 593, 527, 318, 296]),
    (160, 20, [1097, 1210, 260, 1387, 1396], [3510, 3916, 3598, 3185, 3798]),
    (201, 87, [527, 2028, 1197, 2689, 1358], [1958, 3897, 3408, 3538, 3901]),
    (311, 20, [1721, 1210, 2762, 1968, 527], [296, 1196, 1198, 260, 457]),
    (356, 21, [2672, 480, 60, 2617, 3927], [2676, 3175, 1779, 3461, 2505]),
    (731, 642, [2245, 858, 1089, 2971, 1411], [3921, 1625, 1682, 15, 2297]),
    (768, 48, [1619, 1617, 3624, 3755, 3535], [2687, 2686, 2028, 2628, 3911]),
    (941, 28, [908, 2268, 1483, 1869, 1366], [2683, 2699, 2555, 2707, 3593]),
    (1234, 24, [1722, 1210, 1270, 1127, 1997], [2858, 589, 1673, 3481, 2291]),
    (1680, 1850, [3940, 858, 2395, 3051, 2628], [1266, 3508, 553, 416, 3921]),
    (2004, 109, [1282, 2804, 3675, 2536, 529], [2448, 3401, 2643, 3931, 3593]),
    (3000, 106, [2990, 737, 356, 2236, 1193], [1088, 1381, 3394, 2942, 2950]),
    (3354, 33, [420, 1379, 2182, 2393, 1918], [1301, 2571, 3702, 2968, 1097]),
    (4169, 2314, [1268, 2617, 2628, 2653, 423], [3754, 1413, 494, 1804, 1548]),
    (4500, 28, [1230, 2617, 2817, 1193, 1286], [3753, 3755, 3752, 3317, 3515]),
    (5258, 20, [3037, 963, 2857, 2515, 2568], [3267, 2692, 457, 2307, 1788]),
    (6037, 202, [1882, 3508, 702, 1267, 2028], [2527, 2641, 1019, 968, 435]),
    (6040, 341, [858, 593, 2384, 1961, 2019], [2917, 1921, 1784, 161, 1221]),
]


@pytest.mark.parametrize(("user", "length", "first", "last"), SEQUENCES, ids=[f"user{row[0]}" for row in SEQUENCES])
def test_sequences_of_1m_are_those_checked_by_hand(
    million: SequenceDataModule, user: int, length: int, first: list[int], last: list[int]
) -> None:
    data, splits = million.interactions, million.splits
    row = user - 1  # users are numbered by their ids, and 1 to 6040 are all there
    start, end = data.offsets[row], data.offsets[row + 1]
    original = [int(million.catalog.ids[int(item) - 1]) for item in data.items[start:end]]
    assert (len(original), original[:5], original[-5:]) == (length, first, last)
    held_out = [rows.ends[rows.users == row] for rows in (splits.validation, splits.test)]
    assert [original[int(target) - start] for (target,) in held_out] == last[-2:]


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
