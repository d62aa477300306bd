"""Raw rows -> Interactions, at any size: memory is bounded by the users, the items and one block of rows.

Rows arrive in chunks, in file order. They are encoded to integers and spilled (16 bytes a row), dealt out to blocks of
neighbouring users, and each block is sorted by itself. Every step is one pass, so the cost grows linearly. U users,
I items, E events.
"""

import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl
from tqdm import tqdm

from hllm.config import CatalogItems, FilterConfig, UnknownItems
from hllm.data.schema import Array32, Array64, Catalog
from hllm.data.values import check_events
from hllm.disk import write_array
from hllm.errors import DataError

log = logging.getLogger(__name__)

CHUNK_ROWS = 1 << 22
"Rows held in memory at a time while passing over a spilled file."
BLOCK_ROWS = 1 << 24
"Rows sorted at a time."


class RawEvents:
    """The encoded rows of the interactions file, in file order, on disk.

    Args:
        folder: for the spilled columns.
        source: the interactions file, for messages.
        first_row: line of its first record.
    """

    def __init__(self, folder: Path, source: Path, first_row: int) -> None:
        self.folder, self.source, self.first_row = folder, source, first_row
        self.user_ids, self.item_ids = Codes(), Codes()
        self.first_rows: list[Array64] = []
        self.num_rows = self.num_read = 0

    def fill(self, chunks: Iterable[pl.DataFrame], min_rating: float | None) -> None:
        """Encode and spill all rows.

        Args:
            chunks: columns user, item, timestamp and, with ``min_rating``, rating, in file order.

        Raises:
            DataError: no rows, an empty id, or a time or rating that is none; names file and row.
        """
        with (
            (self.folder / "raw-users").open("wb") as users,
            (self.folder / "raw-items").open("wb") as items,
            (self.folder / "raw-times").open("wb") as times,
            # disable=None: no bar where nobody looks at a terminal
            tqdm(desc=f"reading {self.source.name}", unit=" rows", leave=False, disable=None) as bar,
        ):
            for chunk in chunks:
                row = self.first_row + self.num_read
                self.num_read += len(chunk)
                bar.update(len(chunk))
                checked = check_events(chunk, self.source, row)
                rows = np.arange(row, row + len(checked))
                if min_rating is not None:
                    if "rating" not in checked.columns:
                        raise DataError(f"{self.source}: has no ratings for dataset.filter.min_rating={min_rating}")
                    kept = (checked["rating"] >= min_rating).to_numpy()
                    checked, rows = checked.filter(kept), rows[kept]
                self.num_rows += len(checked)
                # One select: Polars encodes the two columns on two cores. In one piece: it would encode the pieces of a
                # column side by side, and codes would come by chance instead of by first appearance.
                encoded = checked.rechunk().select(user=self.user_ids.encode("user"), item=self.item_ids.encode("item"))
                write_array(users, self.user_ids.codes(encoded["user"])[0])
                codes, first = self.item_ids.codes(encoded["item"])
                self.first_rows.append(rows[first])
                write_array(items, codes)
                write_array(times, checked["timestamp"].to_numpy())
        if not self.num_read:
            raise DataError(f"{self.source}: holds no interactions; download the file again")
        if not self.num_rows:
            raise DataError(f"{self.source}: no row is rated at least dataset.filter.min_rating={min_rating}")

    def row_of_item(self, code: int) -> int:
        """The row in the file at which an item first occurs."""
        return int(np.concatenate(self.first_rows)[code])

    def chunks(self, order: Array64 | None = None) -> Iterator[tuple[Array32, Array32, Array64]]:
        """User codes, item codes and times again, in file order or in ``order``."""
        paths = ((self.folder / f"raw-{name}", kind) for name, kind in _COLUMNS)
        columns = [np.memmap(path, kind, mode="r") for path, kind in paths]
        for begin in range(0, self.num_rows, CHUNK_ROWS):
            place = slice(begin, begin + CHUNK_ROWS) if order is None else order[begin : begin + CHUNK_ROWS]
            users, items, times = (np.array(column[place]) for column in columns)
            yield users, items, times

    def delete(self) -> None:
        """Free the disk: the rows are elsewhere by now."""
        for name, _ in _COLUMNS:
            (self.folder / f"raw-{name}").unlink()

    def legacy_order(self) -> Array64:
        """All rows by time alone, sorted as pandas' default does: not stable, held in memory.

        That is ``sort_values("timestamp")`` in the official code and in generative-recommenders; ties come out as
        NumPy's quicksort leaves them, which depends on its version and on the machine.
        """
        times = np.fromfile(self.folder / "raw-times", np.int64)
        return np.argsort(times, kind="quicksort")


_COLUMNS: tuple[tuple[str, Any], ...] = (("users", np.int32), ("items", np.int32), ("times", np.int64))


class Codes:
    """Original ids -> int32 codes 0, 1, 2, ... by first appearance, over any number of chunks."""

    def __init__(self) -> None:
        self.categories = pl.Categories.random()
        self.type = pl.Categorical(self.categories)
        self.anchor = pl.Series(dtype=self.type)  # Polars forgets the mapping with the last series that uses it
        self.size = 0

    def encode(self, column: str) -> pl.Expr:
        """An expression that encodes a column of strings, for ``codes``."""
        return pl.col(column).cast(self.type)

    def codes(self, encoded: pl.Series) -> tuple[Array32, Array64]:
        """(n,) encoded -> (n,) int32, and the places at which new codes first occur."""
        codes = encoded.to_physical().to_numpy().astype(np.int32)
        first = first_places(codes, self.size)
        if len(codes):
            self.anchor = encoded[:1]
            size = max(self.size, int(codes.max()) + 1)
            assert len(first) == size - self.size, "codes are not by first appearance"
            self.size = size
        return codes, first

    def __len__(self) -> int:
        return self.size

    def ids(self) -> pl.Series:
        """(n,) the ids by code."""
        every = pl.Series(np.arange(self.size, dtype=np.uint32)).cat.to(self.type)
        return every.cast(pl.String)


def first_places(codes: Array32, known: int) -> Array64:
    """Where each new code first occurs: codes from ``known`` on come in rising order, each seen first below the next.

    >>> first_places(np.array([1, 4, 0, 4, 5, 4], np.int32), known=4)
    array([1, 4])
    """
    highest = np.maximum.accumulate(np.concatenate([[known - 1], codes]))
    return np.flatnonzero(np.diff(highest))


@dataclass(frozen=True)
class Numbering:
    """Codes -> the numbers that the arrays hold.

    Args:
        users: (raw users,) int32 user numbers by code.
        user_ids: (U,) original ids by number.
        items: (raw items,) int32 catalogue row + 1 by code; 0 where the item's events are left out.
    """

    users: Array32
    user_ids: pl.Series
    items: Array32


def number_users(ids: pl.Series, by_appearance: bool) -> tuple[Array32, pl.Series]:
    """(U,) ids by code -> (U,) user numbers by code, and (U,) the ids by number.

    Users are numbered in ascending order of their ids (as numbers, if all are whole numbers of 64 bits) or by first
    appearance.
    """
    if by_appearance:
        return np.arange(len(ids), dtype=np.int32), ids
    numbers = ids.cast(pl.Int64, strict=False)
    keys = ["id"] if numbers.has_nulls() else ["number", "id"]  # "7" and "07" are two users
    ordered = pl.DataFrame({"id": ids, "number": numbers}).sort(keys)["id"]
    return _places(ids, ordered), ordered


def _places(ids: pl.Series, among: pl.Series) -> Array32:
    """(n,) int32 row of each id in ``among``; -1 where it is not there."""
    table = pl.DataFrame({"id": among, "place": np.arange(len(among), dtype=np.int32)})
    found = pl.DataFrame({"id": ids}).join(table, on="id", how="left", maintain_order="left")["place"]
    return found.fill_null(-1).to_numpy().astype(np.int32)


def number_items(
    raw: RawEvents, catalog: Catalog, unknown: UnknownItems, items_file: Path | None
) -> tuple[Array32, Catalog]:
    """Item codes -> catalogue row + 1 (0: left out), and the catalogue, with rows added for unknown items to keep.

    Raises:
        DataError: an item of the interactions is not in the catalogue and must be.
    """
    ids = raw.item_ids.ids()
    numbers = _places(ids, catalog.ids) + 1
    missing = np.flatnonzero(numbers == 0)
    if not len(missing):
        return numbers, catalog
    if unknown is UnknownItems.error:
        code = int(missing[0])
        raise DataError(
            f"{raw.source}: row {raw.row_of_item(code)} names item {ids[code]!r}, which is not in the catalogue "
            f"{items_file} ({len(missing)} such items); take both files from the same release, or set "
            "dataset.filter.unknown_items=drop or =keep"
        )
    log.warning(
        "%s: %d items are not in %s, %r for one: %s",
        *(raw.source, len(missing), items_file, ids[int(missing[0])]),
        "their events are left out" if unknown is UnknownItems.drop else "kept, without text",
    )
    if unknown is UnknownItems.drop:
        return numbers, catalog
    added = ids[missing]
    grown = Catalog(
        pl.concat([catalog.ids, added]),
        {name: pl.concat([values, pl.repeat("", len(added), eager=True)]) for name, values in catalog.fields.items()},
    )
    return _places(ids, grown.ids) + 1, grown


def sort_events(
    raw: RawEvents, numbering: Numbering, drop_duplicates: bool, legacy_sort: bool, folder: Path
) -> Array64:
    """Write events by (user, time, file order) to the files sorted-items and sorted-times of ``folder``.

    Returns:
        (U + 1,) int64 offsets of the users' events.
    """
    order = raw.legacy_order() if legacy_sort else None
    counts = np.zeros(len(numbering.user_ids), np.int64)
    for users, items, _ in raw.chunks():
        known = numbering.items[items] > 0
        counts += np.bincount(numbering.users[users[known]], minlength=len(counts))
    offsets = np.concatenate([[0], np.cumsum(counts)])
    if not offsets[-1]:
        raise DataError(f"{raw.source}: no event names an item of the catalogue")
    # users whose blocks are sorted together: neighbours with about BLOCK_ROWS events
    block_of_user = (offsets[:-1] // BLOCK_ROWS).astype(np.uint16)
    blocks = _deal(raw, numbering, order, block_of_user, folder)
    raw.delete()
    dropped = 0
    with (folder / "sorted-items").open("wb") as items_file, (folder / "sorted-times").open("wb") as times_file:
        for path in blocks:
            rows = np.fromfile(path, _ROW)
            path.unlink()
            if not len(rows):  # beside a user of several blocks
                continue
            rows = rows[sorted_order(rows["user"], None if legacy_sort else rows["time"])]
            if drop_duplicates:
                kept = ~repeats(rows["user"], rows["time"], rows["item"])
                counts -= np.bincount(rows["user"][~kept], minlength=len(counts))
                dropped += len(rows) - int(kept.sum())
                rows = rows[kept]
            write_array(items_file, rows["item"])
            write_array(times_file, rows["time"])
    if dropped:
        log.warning("%s: skipped %d rows that repeat an earlier user, item and timestamp", raw.source, dropped)
    return np.concatenate([[0], np.cumsum(counts)])


_ROW = np.dtype([("user", np.int32), ("item", np.int32), ("time", np.int64)])


def _deal(
    raw: RawEvents, numbering: Numbering, order: Array64 | None, block_of_user: npt.NDArray[np.uint16], folder: Path
) -> list[Path]:
    """Write each row to the file of its user's block, keeping their order."""
    paths = [folder / f"block-{block}" for block in range(int(block_of_user[-1]) + 1)]
    files = [path.open("wb") for path in paths]
    try:
        for users, items, times in raw.chunks(order):
            rows = np.empty(len(users), _ROW)
            rows["user"], rows["item"], rows["time"] = numbering.users[users], numbering.items[items], times
            rows = rows[rows["item"] > 0]
            block = block_of_user[rows["user"]]
            rows = rows[np.argsort(block, kind="stable")]  # 16 bits: a radix sort
            ends = np.cumsum(np.bincount(block, minlength=len(paths)))
            for file, part in zip(files, np.split(rows, ends[:-1]), strict=True):
                write_array(file, part)
    finally:
        for file in files:
            file.close()
    return paths


def sorted_order(users: Array32, times: Array64 | None) -> Array64:
    """The stable order by (user, time), or by user alone."""
    if times is None:
        return np.argsort(users, kind="stable")
    low, span = int(times.min()), int(times.max()) - int(times.min()) + 1
    first = int(users.min())
    if (int(users.max()) - first + 1) * span < 2**63:  # one key sorts three times faster than two
        return np.argsort((users - first).astype(np.int64) * span + (times - low), kind="stable")
    return np.lexsort((times, users))


def repeats(users: Array32, times: Array64, items: Array32) -> npt.NDArray[np.bool_]:
    """(n,) true at rows, sorted by (user, time), that repeat an earlier row's user, time and item."""
    same = (users[1:] == users[:-1]) & (times[1:] == times[:-1])
    tied = np.flatnonzero(np.concatenate([[False], same]) | np.concatenate([same, [False]]))  # others cannot repeat
    rows = pl.DataFrame({"user": users[tied], "time": times[tied], "item": items[tied]})
    repeated = np.zeros(len(users), dtype=np.bool_)
    repeated[tied[~rows.select(pl.struct(pl.all()).is_first_distinct()).to_series().to_numpy()]] = True
    return repeated


def core(items: Array32, offsets: Array64, num_items: int, rules: FilterConfig) -> npt.NDArray[np.bool_] | None:
    """(E,) which events stay where users and items need a minimum of events; None where all do.

    Counted once, as ByteDance's process_books.py: events go whose item or whose user has too few in the raw file, then
    those of users who have too few left. With ``iterated``, until nothing changes: the k-core.
    """
    if not has_core(rules):
        return None
    lengths = np.diff(offsets)
    kept = np.ones(len(items), dtype=np.bool_)
    while True:
        before = int(kept.sum())
        enough = count_items(items, kept, num_items) >= rules.min_item_events
        kept &= np.repeat(count_users(kept, offsets) >= rules.min_user_events, lengths)
        for part in _parts(len(items)):
            kept[part] &= enough[items[part]]
        if not rules.iterated:
            return kept & np.repeat(count_users(kept, offsets) >= rules.min_user_events, lengths)
        if int(kept.sum()) == before:
            return kept


def has_core(rules: FilterConfig) -> bool:
    return rules.min_user_events > 1 or rules.min_item_events > 1


def count_items(items: Array32, kept: npt.NDArray[np.bool_] | None, num_items: int) -> Array64:
    """(I + 1,) events of each item among those kept; None: all."""
    counts = np.zeros(num_items + 1, np.int64)
    for part in _parts(len(items)):  # bincount makes a wider copy of what it counts
        counts += np.bincount(items[part] if kept is None else items[part][kept[part]], minlength=num_items + 1)
    return counts


def count_users(kept: npt.NDArray[np.bool_], offsets: Array64) -> Array64:
    """(U,) events of each user among those kept."""
    counts: Array64 = np.add.reduceat(np.append(kept, False), offsets[:-1], dtype=np.int64)
    counts[np.diff(offsets) == 0] = 0  # reduceat gives the next one's first value
    return counts


def _parts(length: int) -> Iterator[slice]:
    return (slice(begin, begin + CHUNK_ROWS) for begin in range(0, length, CHUNK_ROWS))


Prepared = tuple[Array64, pl.Series, Catalog]
"(U + 1,) offsets, (U,) user ids and the catalogue; the events are in files."


def prepare(
    raw: RawEvents,
    catalog: Catalog,
    rules: FilterConfig,
    folder: Path,
    items_file: Path | None = None,
    by_appearance: bool = False,
    legacy_sort: bool = False,
) -> Prepared:
    """Number, sort and filter; the events go to the files ``items`` (int32) and ``timestamps`` (int64) of ``folder``.

    Args:
        raw: filled.
        catalog: all rows of the items file.
        folder: for results and what is written on the way.
        items_file: for messages.
        by_appearance: number users and items by first appearance in the interactions, as the official code does;
            else users in ascending order of their ids and items in the order of the catalogue.

    Returns:
        (U + 1,) offsets, (U,) user ids and the catalogue, of the users and items that are left.

    Raises:
        DataError: unknown items, or nothing left.
    """
    if legacy_sort and has_core(rules):
        raise DataError(
            "dataset.legacy_sort: papers that sort so filtered their file before, and other rows have other ties; use "
            "the filtered file with dataset.filter.min_user_events=0 dataset.filter.min_item_events=0"
        )
    items, catalog = number_items(raw, catalog, rules.unknown_items, items_file)
    numbering = Numbering(*number_users(raw.user_ids.ids(), by_appearance), items)
    offsets = sort_events(raw, numbering, rules.drop_duplicates, legacy_sort, folder)
    sorted_items = np.memmap(folder / "sorted-items", np.int32, mode="r", shape=(int(offsets[-1]),))
    kept = core(sorted_items, offsets, len(catalog), rules)
    counts = count_items(sorted_items, kept, len(catalog))
    if not counts.sum():
        raise DataError(
            f"{raw.source}: nothing is left of {offsets[-1]} events under dataset.filter.min_user_events="
            f"{rules.min_user_events} and min_item_events={rules.min_item_events}"
        )
    ranked = np.flatnonzero(counts[1:]) if rules.catalog is CatalogItems.interacted else np.arange(len(catalog))
    if by_appearance:
        place = _places(catalog.ids[ranked], raw.item_ids.ids())
        ranked = ranked[np.argsort(np.where(place < 0, len(catalog) + len(raw.item_ids), place), kind="stable")]
    number = np.zeros(len(catalog) + 1, np.int32)
    number[ranked + 1] = np.arange(1, len(ranked) + 1, dtype=np.int32)
    sorted_times = np.memmap(folder / "sorted-times", np.int64, mode="r", shape=(int(offsets[-1]),))
    with (folder / "items").open("wb") as items_out, (folder / "timestamps").open("wb") as times_out:
        for part in _parts(len(sorted_items)):
            stay = slice(None) if kept is None else kept[part]
            write_array(items_out, number[sorted_items[part][stay]])
            write_array(times_out, sorted_times[part][stay])
    lengths = np.diff(offsets) if kept is None else count_users(kept, offsets)
    users = numbering.user_ids.filter(pl.Series(lengths > 0))
    fields = {name: values[ranked] for name, values in catalog.fields.items()}
    return np.concatenate([[0], np.cumsum(lengths[lengths > 0])]), users, Catalog(catalog.ids[ranked], fields)
