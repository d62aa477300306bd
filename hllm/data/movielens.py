"""MovieLens in four sizes, each in its publisher's own file form (GroupLens; Harper and Konstan 2015).

Every rating is an interaction, whatever its value. Only the 100k form has a second source: the Parquet pair of the
pinned wheel, so that a first run needs no download from the publisher.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import polars as pl

from hllm.data.base import Counts, RawFiles, SequenceDataModule
from hllm.data.delimited import read_csv_catalog, read_csv_chunks, read_delimited, read_delimited_chunks
from hllm.data.schema import Catalog
from hllm.data.tables import find_pair, read_parquet, to_catalog, to_text

GENRES = (
    "unknown", "Action", "Adventure", "Animation", "Children's", "Comedy", "Crime", "Documentary", "Drama", "Fantasy",
    "Film-Noir", "Horror", "Musical", "Mystery", "Romance", "Sci-Fi", "Thriller", "War", "Western",
)  # fmt: skip
RATINGS = ("user_id", "movie_id", "rating", "timestamp")
MOVIES = ("movie_id", "movie_title", "release_date", "video_release_date", "IMDb_URL", *GENRES)
CSV_RATINGS = ("userId", "movieId", "rating", "timestamp")
CSV_MOVIES = ("movieId", "title", "genres")
NO_GENRES = "(no genres listed)"


class MovieLens100K(SequenceDataModule):
    """The official u.data and u.item, or the Parquet pair of the pinned wheel, by the names in the folder."""

    counts = Counts(interactions=100_000, users=943, items=1_682)

    def find(self, folder: Path) -> RawFiles:
        pairs = [("u.data", "u.item"), ("MovieLens100k_data.parquet.brotli", "MovieLens100k_items.parquet.brotli")]
        return RawFiles(*find_pair(folder, pairs))

    def read_events(self, files: RawFiles) -> Iterator[pl.DataFrame]:
        return _events([_read(files.interactions, "\t", RATINGS)], RATINGS)

    def read_items(self, files: RawFiles, wanted: pl.Series) -> Catalog:
        assert files.items is not None
        # the official file is ISO-8859-1: "Misérables, Les (1995)"
        movies = _read(files.items, "|", MOVIES, encoding="iso-8859-1")
        table = pl.DataFrame(
            {
                "movie_id": movies["movie_id"],
                "title": to_text(movies, "movie_title", files.items),
                "genres": _flagged(movies),
            }
        )
        return to_catalog(table, "movie_id", files.items, first_row=1)


class MovieLens1M(SequenceDataModule):
    """ratings.dat and movies.dat; 177 of the 3,883 movies are rated by nobody."""

    counts = Counts(interactions=1_000_209, users=6_040, items=3_706)

    def find(self, folder: Path) -> RawFiles:
        return _pair(folder, "ratings.dat", "movies.dat", inside="ml-1m")

    def read_events(self, files: RawFiles) -> Iterator[pl.DataFrame]:
        return _events(read_delimited_chunks(files.interactions, "::", RATINGS), RATINGS)

    def read_items(self, files: RawFiles, wanted: pl.Series) -> Catalog:
        assert files.items is not None
        movies = read_delimited(files.items, "::", ("movie_id", "title", "genres"), encoding="iso-8859-1")
        return _named_genres(to_catalog(movies, "movie_id", files.items, first_row=1))


class MovieLens20M(SequenceDataModule):
    """ratings.csv and movies.csv; 534 of the 27,278 movies are rated by nobody."""

    counts = Counts(interactions=20_000_263, users=138_493, items=26_744)
    inside = "ml-20m"

    def find(self, folder: Path) -> RawFiles:
        return _pair(folder, "ratings.csv", "movies.csv", inside=self.inside, first_row=2)

    def read_events(self, files: RawFiles) -> Iterator[pl.DataFrame]:
        return _events(read_csv_chunks(files.interactions, {name: name for name in CSV_RATINGS}), CSV_RATINGS)

    def read_items(self, files: RawFiles, wanted: pl.Series) -> Catalog:
        assert files.items is not None
        return _named_genres(read_csv_catalog(files.items, CSV_MOVIES, "movieId"))


class MovieLensLatestSmall(MovieLens20M):
    """The form of 20M. The publisher changes this set now and then; the counts are those of its 2018 release."""

    counts = Counts(interactions=100_836, users=610, items=9_724)
    inside = "ml-latest-small"


def _pair(folder: Path, ratings: str, movies: str, inside: str, first_row: int = 1) -> RawFiles:
    """Both files, in the folder or in the one that the publisher's archive unpacks to."""
    pairs = [(ratings, movies), (f"{inside}/{ratings}", f"{inside}/{movies}")]
    return RawFiles(*find_pair(folder, pairs), first_row)


def _read(path: Path, separator: str, columns: Sequence[str], encoding: str = "utf-8") -> pl.DataFrame:
    if path.name.endswith(".parquet.brotli"):
        return read_parquet(path, columns)
    return read_delimited(path, separator, columns, encoding)


def _events(chunks: Iterable[pl.DataFrame], columns: Sequence[str]) -> Iterator[pl.DataFrame]:
    """Chunks as ``read_events`` gives them.

    Args:
        columns: of user, item, rating and timestamp.
    """
    names = dict(zip(("user", "item", "rating", "timestamp"), columns, strict=True))
    return (chunk.select(**names) for chunk in chunks)


def _named_genres(movies: Catalog) -> Catalog:
    """Without what 1M's successors write for none."""
    return replace(movies, fields={**movies.fields, "genres": movies.fields["genres"].replace(NO_GENRES, "")})


def _flagged(movies: pl.DataFrame) -> list[str]:
    """Names of the genres flagged 1, joined by '|' as MovieLens writes them; 'unknown' counts as none."""
    flagged = [
        pl.when(pl.col(genre).cast(pl.String) == "1").then(pl.lit(genre)).otherwise(None)
        for genre in GENRES
        if genre != "unknown"
    ]
    return movies.select(pl.concat_str(flagged, separator="|", ignore_nulls=True)).to_series().fill_null("").to_list()
