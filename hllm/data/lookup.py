"""A title or id as a person types it -> the item.

Of a large catalogue difflib, at tens of microseconds a title, sees only the few hundred that are most alike.
"""

import difflib
from collections.abc import Sequence

import polars as pl

from hllm.data.schema import Catalog
from hllm.errors import ConfigError

NUM_CANDIDATES = 500
"Titles that difflib compares with a name that is not in the catalogue."
NUM_PARTS = 24
"Pairs of letters by which they are found; each is a pass over the titles."


def find_row(catalog: Catalog, name: str, flag: str) -> int:
    """Catalogue row of a title or an original id, titles before ids; best as it is written, else in any case.

    Outer spaces do not matter.

    Args:
        flag: what the name was given as, for the message.

    Raises:
        ConfigError: no such item; the message suggests near titles.
    """
    name = name.strip()
    row = _row(catalog.titles, name)
    row = _row(catalog.ids.to_list(), name) if row is None else row
    if row is not None:
        return row
    near = near_titles(catalog.titles, name.casefold())
    hint = f"did you mean {' or '.join(repr(title) for title in near)}?" if near else "no title is like it"
    raise ConfigError(f"{flag}: {name!r} is not in the catalogue; {hint}")


def _row(names: list[str], name: str) -> int | None:
    if name in names:  # at C's speed: most names are copied
        return names.index(name)
    wanted = name.casefold()
    return next((row for row, candidate in enumerate(names) if candidate.strip().casefold() == wanted), None)


def near_titles(titles: Sequence[str], wanted: str) -> list[str]:
    """Up to three titles spelled like a case-folded name, then up to two more that contain it."""
    by_name = {title.casefold(): title for title in titles}
    candidates = pl.DataFrame({"name": by_name.keys()}).top_k(NUM_CANDIDATES, by=_likeness(wanted))["name"].to_list()
    near = [by_name[title] for title in difflib.get_close_matches(wanted, candidates, n=3, cutoff=0.5)]
    return near + [title for key, title in by_name.items() if wanted in key and title not in near][:2]


def _likeness(wanted: str) -> pl.Expr:
    """Nearly what difflib measures: the share of pairs of letters, of few ones also of letters, in common."""
    parts = sorted({wanted[at : at + 2] for at in range(len(wanted) - 1)})
    parts = parts[:: len(parts) // NUM_PARTS + 1] if len(parts) > NUM_PARTS // 2 else parts + sorted(set(wanted))
    common = [pl.col("name").str.contains(part, literal=True).cast(pl.Int32) for part in parts]
    return pl.sum_horizontal(pl.lit(0), *common) / (pl.col("name").str.len_chars() + len(wanted))
