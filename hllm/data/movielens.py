"""MovieLens: 100k ratings by 943 users of 1,682 movies (GroupLens; Harper and Konstan 2015).

Two file forms are read, by the names in the folder: the Parquet pair of the pinned wheel, and the official
``u.data`` and ``u.item``.
"""

from pathlib import Path

import polars as pl

from hllm.data.base import Counts, SequenceDataModule
from hllm.data.prepare import build_interactions
from hllm.data.schema import Catalog, Interactions
from hllm.data.tables import read_delimited, read_parquet, to_integers, to_text
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

    def read(self, folder: Path) -> tuple[Interactions, Catalog]:
        ratings_path, ratings, movies_path, movies = _read_files(folder)
        ids = to_integers(movies, "movie_id", movies_path)
        if ids.is_duplicated().any():
            raise DataError(f"{movies_path}: movie_id {ids.filter(ids.is_duplicated())[0]} occurs twice")
        item_ids = ids.cast(pl.String)
        catalog = Catalog(
            ids=item_ids.to_list(),
            fields={"title": to_text(movies, "movie_title", movies_path), "genres": _genres(movies)},
        )
        to_integers(ratings, "rating", ratings_path)  # not used, but a row without one is a torn row
        events = pl.DataFrame(
            {
                "user": to_integers(ratings, "user_id", ratings_path),
                "item": to_integers(ratings, "movie_id", ratings_path).cast(pl.String),
                "timestamp": to_integers(ratings, "timestamp", ratings_path),
            }
        )
        return build_interactions(events, item_ids, str(ratings_path)), catalog


def _read_files(folder: Path) -> tuple[Path, pl.DataFrame, Path, pl.DataFrame]:
    parquet = folder / "MovieLens100k_data.parquet.brotli", folder / "MovieLens100k_items.parquet.brotli"
    official = folder / "u.data", folder / "u.item"
    if all(path.is_file() for path in official):
        ratings = read_delimited(official[0], "\t", RATINGS)
        # the official file is ISO-8859-1: "Misérables, Les (1995)"
        movies = read_delimited(official[1], "|", MOVIES, encoding="iso-8859-1")
        return official[0], ratings, official[1], movies
    if all(path.is_file() for path in parquet):
        return parquet[0], read_parquet(parquet[0], RATINGS), parquet[1], read_parquet(parquet[1], MOVIES)
    raise DataError(
        f"dataset.root={folder}: holds neither {official[0].name} and {official[1].name} "
        f"nor {parquet[0].name} and {parquet[1].name}"
    )


def _genres(movies: pl.DataFrame) -> list[str]:
    """Names of the genres flagged 1, joined by '|' as MovieLens writes them; 'unknown' counts as none."""
    flagged = [
        pl.when(pl.col(genre).cast(pl.String) == "1").then(pl.lit(genre)).otherwise(None)
        for genre in GENRES
        if genre != "unknown"
    ]
    return movies.select(pl.concat_str(flagged, separator="|", ignore_nulls=True)).to_series().fill_null("").to_list()
