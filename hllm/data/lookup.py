"""A title or id as a person types it -> the item."""

import difflib

from hllm.data.schema import Catalog
from hllm.errors import ConfigError


def find_row(catalog: Catalog, name: str, flag: str) -> int:
    """Catalogue row of a title or an original id; case and outer spaces do not matter, titles go before ids.

    Args:
        flag: what the name was given as, for the message.

    Raises:
        ConfigError: no such item; the message suggests near titles.
    """
    wanted = name.strip().casefold()
    for names in (catalog.titles, catalog.ids):
        for row, candidate in enumerate(names):
            if candidate.strip().casefold() == wanted:
                return row
    by_name = {title.casefold(): title for title in catalog.titles}
    near = [by_name[title] for title in difflib.get_close_matches(wanted, by_name, n=3, cutoff=0.5)]
    near += [title for key, title in by_name.items() if wanted in key and title not in near][:2]
    hint = f"did you mean {' or '.join(repr(title) for title in near)}?" if near else "no title is like it"
    raise ConfigError(f"{flag}: {name.strip()!r} is not in the catalogue; {hint}")
