"""python -m hllm.shard: a data set -> a folder of Parquet shards, for dataset=sharded."""

import sys
from collections.abc import Sequence
from pathlib import Path

from hllm.build import build_datamodule
from hllm.cli import report_errors, split_own
from hllm.config import ShardedConfig, compose
from hllm.data.base import SequenceDataModule
from hllm.data.shards import SHARD_EVENTS, write_shards
from hllm.errors import ConfigError

USAGE = """usage: python -m hllm.shard out=FOLDER [shards=N] [flags as of hllm.train]

Writes a prepared data set as Parquet files of whole histories, a file a shard, and its catalogue: what
`dataset=sharded dataset.root=FOLDER` trains on.
  out     a new folder
  shards  how many files of histories; unset: one for each 16.8 million events. Any number of processes can share them

  python -m hllm.shard dataset=movielens_100k out=shards/movielens_100k shards=4"""


@report_errors
def main(arguments: Sequence[str] | None = None) -> None:
    arguments = sys.argv[1:] if arguments is None else arguments
    if any(argument in ("-h", "--help") for argument in arguments):
        print(USAGE)
        return
    own, overrides = split_own(arguments, ("out", "shards"))
    if not own["out"]:
        raise ConfigError(f"out= is missing\n{USAGE}")
    if own["shards"] and not (own["shards"].isdecimal() and int(own["shards"]) > 0):
        raise ConfigError(f"shards={own['shards']}: must be a whole number above 0")
    config = compose(overrides)
    dataset = config.dataset
    if isinstance(dataset, ShardedConfig):
        raise ConfigError("dataset=sharded: is in shards already; give the data set they are to be made from")
    datamodule = build_datamodule(config)
    assert isinstance(datamodule, SequenceDataModule)
    interactions = datamodule.interactions
    num_shards = int(own["shards"] or -(-len(interactions) // SHARD_EVENTS))
    made_from = {
        "dataset": dataset.name,
        "protocol": dataset.protocol.name,
        "legacy_sort": dataset.legacy_sort,
        "filter": {name: getattr(value, "name", value) for name, value in vars(dataset.filter).items()},
        "fingerprint": datamodule.fingerprint,
    }
    manifest = write_shards(interactions, datamodule.catalog, Path(own["out"]), num_shards, made_from)
    sizes = [shard.num_events for shard in manifest.shards]
    print(
        f"{own['out']}: {manifest.num_events} interactions, {manifest.num_users} users, {manifest.num_items} items in "
        f"{num_shards} shards of {min(sizes)} to {max(sizes)} interactions; fingerprint {manifest.fingerprint}"
    )


if __name__ == "__main__":
    main()
