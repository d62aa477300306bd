"""MovieLens: 100k ratings by 943 users of 1,682 movies (GroupLens; Harper and Konstan 2015).

Two file forms are read, by the names in the folder: the Parquet pair of the pinned wheel, and the official
``u.data`` and ``u.item``.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

import polars as pl

from hllm.data.base import Counts, RawFiles, SequenceDataModule
from hllm.data.schema import Catalog
from hllm.data.tables import read_delimited, read_parquet, to_catalog, to_text
from hllm.errors import DataError

GENRES = (
    "unknown", "Action", "Adventure", "Animation", "Children's", "Comedy", "Crime", "Documentary", "Drama", "Fantasy",
    "Film-Noir", "Horror", "Musical", "Mystery", "Romance", "Sci-Fi", "Thriller", "War", "Western",
)  # fmt: skip
RATINGS = ("user_id", "movie_id", "rating", "timestamp")
MOVIES = ("movie_id", "movie_title", "release_date", "video_release_date", "IMDb_URL", *GENRES)


class MovieLens100K(SequenceDataModule):
    """All ratings are interactions: the rating's value is not used."""

    counts = Counts(interactions=100_000, users=943, items=1_682)

    def find(self, folder: Path) -> RawFiles:
        for interactions, items in (
            ("u.data", "u.item"),
            ("MovieLens100k_data.parquet.brotli", "MovieLens100k_items.parquet.brotli"),
        ):
            if all((folder / name).is_file() for name in (interactions, items)):
                return RawFiles(folder / interactions, folder / items)
        raise DataError(
            f"dataset.root={folder}: holds neither u.data and u.item nor MovieLens100k_data.parquet.brotli and "
            "MovieLens100k_items.parquet.brotli"
        )

    def read_events(self, files: RawFiles) -> Iterator[pl.DataFrame]:
        table = _read(files.interactions, "\t", RATINGS)
        yield table.select(user="user_id", item="movie_id", timestamp="timestamp", rating="rating")

    def read_items(self, files: RawFiles, wanted: pl.Series) -> Catalog:
        assert files.items is not None
        # the official file is ISO-8859-1: "Misérables, Les (1995)"
        movies = _read(files.items, "|", MOVIES, encoding="iso-8859-1")
        table = pl.DataFrame(
            {
                "id": movies["movie_id"],
                "title": to_text(movies, "movie_title", files.items),
                "genres": _genres(movies),
            }
        )
        return to_catalog(table, "id", files.items, first_row=1)


def _read(path: Path, separator: str, columns: Sequence[str], encoding: str = "utf-8") -> pl.DataFrame:
    if path.name.endswith(".parquet.brotli"):
        return read_parquet(path, columns)
    return read_delimited(path, separator, columns, encoding)


def _genres(movies: pl.DataFrame) -> list[str]:
    """Names of the genres flagged 1, joined by '|' as MovieLens writes them; 'unknown' counts as none."""
    flagged = [
        pl.when(pl.col(genre).cast(pl.String) == "1").then(pl.lit(genre)).otherwise(None)
        for genre in GENRES
        if genre != "unknown"
    ]
    return movies.select(pl.concat_str(flagged, separator="|", ignore_nulls=True)).to_series().fill_null("").to_list()
