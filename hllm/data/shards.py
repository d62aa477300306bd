"""A data set as a folder of Parquet files, one row a user, for histories that no machine holds at once.

histories/*.parquet    user, items (catalogue row + 1) and timestamps, from the oldest event to the newest
catalog.parquet        id and text fields of the items; the writer's last file, so that its absence tells a torn folder
manifest.json          what the histories were found to be: names, sizes, lengths and fingerprints
train_counts.parquet   how often each item occurs in training

Anything that writes Parquet can write the first two. The last two are made by one pass over the histories, by
``write_shards`` or by the first run that opens the folder. Every value is checked whenever it is read: that costs less
than decoding it. I items, U users, E events.
"""

import hashlib
import io
import json
import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl
from tqdm import tqdm

from hllm.data.schema import Array32, Array64, Catalog, Interactions
from hllm.data.splits import leave_one_out_ends, ranges, train_counts
from hllm.data.tables import check_header, to_catalog
from hllm.data.values import LATEST, to_ids
from hllm.disk import locked, write_whole, writing
from hllm.errors import CacheError, ConfigError, DataError

log = logging.getLogger(__name__)

COLUMNS = ("user", "items", "timestamps")
SHARD_EVENTS = 1 << 24
"Events of a shard where nobody says how many shards: 200 MB in memory."
STRIPS = 16
"Runs of neighbouring users that make up a shard."
CHECKED_USERS = 1 << 22
"Users looked for in more than one shard; of more users, a sample this large."
LAYOUT = 2
"Of the manifest."


@dataclass(frozen=True)
class Shard:
    """One file of histories, as the manifest has it: ``users_of_length[n]`` users have ``lengths[n]`` events."""

    name: str
    num_bytes: int
    num_users: int
    num_events: int
    fingerprint: str
    lengths: Sequence[int]
    users_of_length: Sequence[int]


@dataclass(frozen=True)
class Manifest:
    """What a folder of histories was found to be.

    Args:
        catalog: fingerprint of the item ids.
        fingerprint: of the item ids and of all shards' events.
        made_from: the data set it was written from; None where another program wrote it.
    """

    num_items: int
    num_users: int
    num_events: int
    catalog: str
    fingerprint: str
    made_from: dict[str, Any] | None
    shards: Sequence[Shard]
    layout: int = LAYOUT


class ShardFolder:
    """A sharded data set, opened: names and sizes are checked, histories only when they are read.

    Args:
        folder: holds what the module's head lists.
        cache_dir: for a lock, so that of several processes one surveys a folder and the others wait.

    Raises:
        DataError: something is missing, torn, foreign or not what the manifest says.
    """

    def __init__(self, folder: Path, cache_dir: Path) -> None:
        self.folder = folder
        if not (folder / "catalog.parquet").is_file():
            raise DataError(
                f"{folder}: has no catalog.parquet: not a sharded data set, or its writing was cut short. "
                "python -m hllm.shard out=FOLDER writes one"
            )
        self.catalog = _read_catalog(folder / "catalog.parquet")
        found = _load_manifest(folder)
        if found is None:
            with locked(cache_dir / "shards" / f"{_digest(str(folder.resolve()))}.lock", f"surveying {folder}"):
                # another process may have done it while this one waited
                found = _load_manifest(folder) or survey(folder, self.catalog)
        self.manifest, self.train_counts = found
        self._check_files()
        self.paths = [folder / "histories" / shard.name for shard in self.manifest.shards]
        "(S,) files, by name."
        self.first_users = np.cumsum([0, *(shard.num_users for shard in self.manifest.shards)])
        "(S + 1,) number of each shard's first user."

    def _check_files(self) -> None:
        manifest = self.manifest
        if manifest.num_items != len(self.catalog):
            raise self._differs("catalog.parquet", f"{len(self.catalog)} items, not {manifest.num_items}")
        if manifest.catalog != self.catalog.fingerprint:
            raise self._differs("catalog.parquet", "other items, or in another order")
        expected = {shard.name: shard.num_bytes for shard in manifest.shards}
        found = {path.name: path.stat().st_size for path in history_files(self.folder)}
        for name in sorted({*expected, *found}):
            if name not in found:
                raise self._differs(f"histories/{name}", "is missing")
            if name not in expected:
                raise self._differs(f"histories/{name}", "is not in it")
            if found[name] != expected[name]:
                raise self._differs(f"histories/{name}", f"{found[name]} bytes, not {expected[name]}")

    def _differs(self, name: str, what: str) -> DataError:
        return DataError(
            f"{self.folder / name}: not as manifest.json has it ({what}). Restore the file, or delete manifest.json to "
            "take the folder as it now is"
        )

    def read(self, number: int) -> Interactions:
        """The histories of one shard.

        Raises:
            DataError: the file is not what was surveyed.
        """
        interactions = read_shard(self.paths[number], len(self.catalog))
        if interactions.fingerprint != self.manifest.shards[number].fingerprint:
            raise self._differs(f"histories/{self.paths[number].name}", "other events")
        return interactions

    def user_ids(self, numbers: Array64) -> pl.Series:
        """(n,) ids of (n,) user numbers, in any order."""
        shards = np.searchsorted(self.first_users, numbers, side="right") - 1
        order = np.argsort(shards, kind="stable")
        found = [pl.Series("user", [], pl.String)]
        for shard in np.unique(shards):
            found.append(self._shard_user_ids(shard)[numbers[shards == shard] - self.first_users[shard]])
        back = np.empty_like(order)
        back[order] = np.arange(len(order))
        return pl.concat(found)[back]

    def _shard_user_ids(self, number: int) -> pl.Series:
        return to_ids(_read(self.paths[number], ["user"])["user"])

    def history(self, user: str) -> tuple[Array32, Array64] | None:
        """Item ids and times of one user, by id; None where no shard has it."""
        for number, path in enumerate(self.paths):
            rows = (self._shard_user_ids(number) == user).arg_true()
            if len(rows):
                found = pl.scan_parquet(path, glob=False).select("items", "timestamps").slice(rows[0], 1).collect()
                return found["items"][0].to_numpy().astype(np.int32), found["timestamps"][0].to_numpy().astype(np.int64)
        return None

    def newest_time(self) -> int:
        """Of all events, in seconds; a column of every file is read."""
        newest = pl.col("timestamps").list.last().max()
        return max(int(pl.scan_parquet(path, glob=False).select(newest).collect().item()) for path in self.paths)


def _read(path: Path, columns: Sequence[str] | None = None) -> pl.DataFrame:
    # without glob=False, Polars takes a [ in the name for a pattern
    return pl.read_parquet(path, columns=list(columns) if columns else None, glob=False)


def _read_catalog(path: Path) -> Catalog:
    try:
        return to_catalog(_read(path), "id", path, first_row=1)
    except (pl.exceptions.PolarsError, OSError) as error:
        raise _torn(path, error) from error


def _torn(path: Path, error: Exception) -> DataError:
    return DataError(f"{path}: torn, or not Parquet ({error}); write it again")


def history_files(folder: Path) -> list[Path]:
    """The Parquet files of ``histories``, by name."""
    return sorted((folder / "histories").glob("[!._]*.parquet"))


def read_shard(path: Path, num_items: int) -> Interactions:
    """One file of histories, every value of it checked.

    Raises:
        DataError: names the file, and the row and user of the first history that is not as it must be.
    """
    try:
        schema = pl.scan_parquet(path, glob=False).collect_schema()
        check_header(path, COLUMNS, list(schema))
        for name in COLUMNS:
            kind = schema[name] if name == "user" else getattr(schema[name], "inner", pl.Null())
            if not (kind.is_integer() or (name == "user" and kind == pl.String)):
                expected = "text or whole numbers" if name == "user" else "lists of whole numbers"
                raise DataError(f"{path}: column {name!r} is {schema[name]}, expected {expected}")
        table = _read(path, COLUMNS)
    except (pl.exceptions.PolarsError, OSError) as error:
        raise _torn(path, error) from error
    if table.is_empty():
        raise DataError(f"{path}: holds no user; leave out files without rows")
    users = to_ids(table["user"])
    lengths, times_of_user = (table[name].list.len().fill_null(0) for name in ("items", "timestamps"))

    def refuse(wrong: pl.Series, message: str) -> None:
        """Of a mask over users."""
        if wrong.any():
            row = int(wrong.arg_max() or 0)
            raise DataError(f"{path}: row {row + 1} (user {users[row]!r}) {message}")

    def refuse_event(wrong: npt.NDArray[np.bool_], message: str) -> None:
        """Of a mask over events."""
        if wrong.any():
            row = np.searchsorted(offsets, np.argmax(wrong), side="right") - 1
            refuse(pl.Series(np.arange(len(users)) == row), message)

    refuse(users.is_null() | (users == ""), "has no user id")
    refuse(~users.is_first_distinct(), "repeats a user; a user's whole history belongs in one row")
    refuse(lengths == 0, "has no items; leave out users without events")
    refuse(lengths != times_of_user, "has not as many timestamps as items")
    offsets = np.concatenate([[0], np.cumsum(lengths.to_numpy(), dtype=np.int64)])
    arrays = []
    for name in ("items", "timestamps"):
        values = table[name].explode()
        if values.has_nulls():
            refuse_event(values.is_null().to_numpy(), f"has an empty value among its {name}")
        arrays.append(values.to_numpy())
    items, times = arrays
    refuse_event(
        (items < 1) | (items > num_items),
        f"names an item outside 1..{num_items}, the rows of catalog.parquet counted from 1",
    )
    refuse_event((times < 0) | (times > LATEST), "has a time outside the years 1970 to 9999 in seconds")
    falls = times[1:] < times[:-1]
    falls[offsets[1:-1] - 1] = False  # from a user's last event to the next one's first
    refuse_event(np.append(False, falls), "goes back in time; sort each user's events from the oldest to the newest")
    return Interactions(items.astype(np.int32, copy=False), times.astype(np.int64, copy=False), offsets, users)


def survey(
    folder: Path, catalog: Catalog, made_from: dict[str, Any] | None = None
) -> tuple[Manifest, npt.NDArray[np.int64]]:
    """Read and check all histories once, one shard in memory at a time; keeps the manifest and the counts there.

    Returns:
        The manifest, and (I + 1,) int64 how often each item occurs in the training events of leave-one-out.

    Raises:
        DataError: no file, a file that is not as it must be, or a user who is in two of them.
    """
    paths = history_files(folder)
    if not paths:
        raise DataError(f"{folder / 'histories'}: holds no .parquet file; python -m hllm.shard out=FOLDER writes them")
    counts = np.zeros(len(catalog) + 1, np.int64)
    shards, known, stride = [], pl.DataFrame(schema={"user": pl.String, "shard": pl.String}), 1
    for path in tqdm(paths, desc="surveying", unit="shards", disable=None):
        data = read_shard(path, len(catalog))
        counts += train_counts(data, leave_one_out_ends(data), len(catalog))
        lengths, users = np.unique(np.diff(data.offsets), return_counts=True)
        shards.append(
            Shard(
                *(path.name, path.stat().st_size, data.num_users, len(data), data.fingerprint),
                *(lengths.tolist(), users.tolist()),
            )
        )
        # split by anything but users, all of them are in many files, which a sample shows as well
        known = pl.concat([known, data.users.to_frame("user").with_columns(shard=pl.lit(path.name))])
        while len(known := known.filter(pl.col("user").hash() % stride == 0)) > CHECKED_USERS:
            stride *= 2
    twice = known.filter(pl.col("user").is_duplicated()).sort("user", "shard")
    if len(twice):
        (user, first), (_, second) = twice.rows()[:2]
        raise DataError(
            f"{folder / 'histories' / second}: user {user!r} is in {first} as well; a user's whole history belongs in "
            "one row of one file"
        )
    manifest = Manifest(
        *(len(catalog), sum(shard.num_users for shard in shards), sum(shard.num_events for shard in shards)),
        *(catalog.fingerprint, _digest(catalog.fingerprint, *(shard.fingerprint for shard in shards))),
        *(made_from, shards),
    )
    try:
        _write(folder / "train_counts.parquet", pl.DataFrame({"count": counts}))
        write_whole(folder / "manifest.json", _json(manifest).encode())
    except CacheError as error:
        log.warning("%s; so the next run reads all histories again", error)
    return manifest, counts


def _json(manifest: Manifest) -> str:
    """A line a shard."""
    content = asdict(manifest)
    shards = ",\n  ".join(json.dumps(shard) for shard in content.pop("shards"))
    return f'{json.dumps(content, indent=1)[:-2]},\n "shards": [\n  {shards}\n ]\n}}\n'


def _load_manifest(folder: Path) -> tuple[Manifest, npt.NDArray[np.int64]] | None:
    path = folder / "manifest.json"
    if not path.exists():
        return None
    try:
        content = json.loads(path.read_text())
        if content["layout"] != LAYOUT:
            raise ValueError(f"layout {content['layout']}, not {LAYOUT}")
        manifest = Manifest(**{**content, "shards": [Shard(**shard) for shard in content["shards"]]})
        counts = _read(folder / "train_counts.parquet")["count"].to_numpy()
        if len(counts) != manifest.num_items + 1:
            raise ValueError("the counts are of another catalogue")
    except (OSError, ValueError, LookupError, TypeError, pl.exceptions.PolarsError) as error:
        raise DataError(f"{path}: torn or altered ({error}); delete it, and the next run makes it again") from error
    return manifest, counts


def write_shards(
    interactions: Interactions, catalog: Catalog, folder: Path, num_shards: int, made_from: dict[str, Any]
) -> Manifest:
    """Write a data set in this form, one shard in memory at a time, and read it back.

    Each shard takes ``STRIPS`` runs of neighbouring users from all over the data set, of about as many events each:
    shards are alike, whatever order the users stand in, and the source is read nearly in order.

    Args:
        folder: new or empty.

    Raises:
        ConfigError: there is something in the folder, or there are more shards than users for them.
        DataError: a text field is called ``id``, the name of the item ids in the folder.
        CacheError: the disk is full or the folder cannot be written.
    """
    if "id" in catalog.fields:
        raise DataError(
            f"out={folder}: the items have a text field 'id', and in catalog.parquet that is the item ids. Rename the "
            "column in the items file, or leave it out (dataset.text_fields= of dataset=custom)"
        )
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"out={folder}: is there already, and not an empty folder; give a new one, or remove it")
    first = interactions.offsets[:-1]
    shard_of_user = first * (num_shards * STRIPS) // len(interactions) % num_shards
    if len(np.unique(shard_of_user)) < num_shards:
        raise ConfigError(f"shards={num_shards}: too many for the histories of {interactions.num_users} users")
    with writing(folder):
        (folder / "histories").mkdir(parents=True, exist_ok=True)
    for number in tqdm(range(num_shards), desc="writing", unit="shards", disable=None):
        users = np.flatnonzero(shard_of_user == number)
        user, event = ranges(users, first[users], interactions.offsets[users + 1])
        columns = {"user": user, "items": interactions.items[event], "timestamps": interactions.timestamps[event]}
        table = pl.DataFrame(columns).group_by("user", maintain_order=True).agg("items", "timestamps")
        table = table.with_columns(interactions.users[users].alias("user"))
        _write(folder / "histories" / f"{number:05d}.parquet", table)
    _write(folder / "catalog.parquet", pl.DataFrame({"id": catalog.ids, **catalog.fields}))
    return survey(folder, catalog, made_from)[0]


def _write(path: Path, table: pl.DataFrame) -> None:
    buffer = io.BytesIO()
    table.write_parquet(buffer)
    write_whole(path, buffer.getvalue())


def _digest(*parts: str) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]
