"""python -m hllm.recommend: checkpoint + one history -> top-k titles, also of items that were not in training."""

import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl
import torch
from omegaconf import MISSING
from torch import Tensor

from hllm.build import build_datamodule, build_module, cache_dir
from hllm.cli import parse, quiet_libraries, report_errors
from hllm.config import Config, Selection
from hllm.data.delimited import read_catalog
from hllm.data.lookup import find_row
from hllm.data.schema import Batch, Catalog
from hllm.errors import ConfigError
from hllm.evaluate import checkpoint_config, load_checkpoint
from hllm.items.backbone import load_tokenizer
from hllm.items.cache import embed_catalog
from hllm.items.encoder import tokenize
from hllm.items.files import locate
from hllm.items.llm import LLMItems
from hllm.items.selection import select_texts
from hllm.items.store import ItemTable
from hllm.items.text import text_parts
from hllm.items.tower import CachedItems
from hllm.report import text_table

USAGE = """usage: python -m hllm.recommend ckpt=RUN/checkpoints/best.ckpt (history="TITLE|TITLE|..." | user=ID) [k=10]

Prints the k items to come next, with their scores. Items of the history are left out.
  ckpt       a checkpoint of hllm.train
  history    titles from oldest to newest, separated by |, as the catalogue writes them
  user       instead of a history: a user of the data set, by original id
  k          length of the list
  now        when the list is for, in seconds since 1970; for models with user.target_time, which otherwise take the
             time of the newest event
  new_items  a CSV file with the columns id and those of the text template: items to rank beside the catalogue,
             embedded now and ranked without training again (not items=id); a history may name them
  root       the data set's raw files, if not where the run read them
  cache_dir  downloads and item embeddings, if not where the run kept them"""


@dataclass
class Options:
    ckpt: str = MISSING
    history: str | None = None
    user: str | None = None
    k: int = 10
    now: int | None = None
    new_items: str | None = None
    root: str | None = None
    cache_dir: str | None = None

    def __post_init__(self) -> None:
        if (self.history is None) == (self.user is None):
            raise ConfigError('give either history="TITLE|TITLE" or user=ID')
        if self.k < 1:
            raise ConfigError(f"k={self.k}: must be at least 1")


class Recommendations:
    """A trained model with its catalogue, ready to rank.

    Args:
        config: as ``checkpoint_config`` gives it.
        ckpt: the checkpoint.
        new_items: items to rank beside those of the data set.
        now: seconds since 1970, for models that read the time of what they predict; None is that of the newest event.

    Raises:
        CheckpointError: the checkpoint does not fit the data or the item vectors found here.
        ConfigError: new items for a model that knows items by id only; ``now`` for one that does not read it.
    """

    def __init__(self, config: Config, ckpt: Path, new_items: Catalog | None = None, now: int | None = None) -> None:
        if now is not None and not config.user.target_time:
            raise ConfigError(f"now={now}: only a model with user.target_time=true reads when the list is for")
        self.config, self.now = config, now
        self.datamodule = build_datamodule(config)
        self.catalog = self.datamodule.catalog
        self.module = build_module(config, self.datamodule, read_weights=False)
        if isinstance(self.module.items, CachedItems):
            self.module.items.attach(self._embed(self.catalog))
        checkpoint = load_checkpoint(ckpt)
        self.module.on_load_checkpoint(checkpoint)
        self.module.load_state_dict(checkpoint["state_dict"])
        self.module.eval()
        if new_items is not None:
            self._add(new_items)

    def _embed(self, catalog: Catalog, corpus: Catalog | None = None) -> ItemTable:
        return embed_catalog(catalog, self.config.dataset.text, self.config.llm, cache_dir(self.config), corpus)

    def _add(self, new: Catalog) -> None:
        """Rank further items: read by the same LLM, mapped by what was fitted on the training catalogue."""
        items = self.module.items
        if not isinstance(items, CachedItems | LLMItems):
            raise ConfigError(f"new_items: items={self.config.items.name} knows only the items it was trained on")
        if known := set(self.catalog.ids) & set(new.ids):
            raise ConfigError(f"new_items: id {min(known)} is in the catalogue already")
        try:
            if isinstance(items, CachedItems):
                self._add_vectors(items, new)
            else:
                self._add_tokens(items, new)
        except ConfigError as error:  # a column of the template is not in the file
            raise ConfigError(f"new_items: {error}") from error
        self.catalog = Catalog(
            pl.concat([self.catalog.ids, new.ids]),
            {
                name: pl.concat([column, new.fields.get(name, pl.repeat("", len(new), eager=True))])
                for name, column in self.catalog.fields.items()
            },
        )

    def _add_vectors(self, items: CachedItems, new: Catalog) -> None:
        added, old = self._embed(new, self.catalog), items.table
        assert old is not None
        vectors = torch.cat([old.vectors, added.vectors.to(old.vectors.dtype)])
        items.attach(ItemTable([*old.ids, *added.ids], vectors, f"{old.fingerprint}+{added.fingerprint}"))

    def _add_tokens(self, items: LLMItems, new: Catalog) -> None:
        text, llm = self.config.dataset.text, self.config.llm
        parts = text_parts(new, text)
        corpus = None if text.selection is Selection.head else text_parts(self.catalog, text)
        tokenizer = load_tokenizer(locate(llm, cache_dir(self.config), weights=False))
        texts = select_texts(parts, corpus, text.selection, tokenizer, llm.max_tokens)
        items.append(tokenize(tokenizer, texts, llm))

    def history_of_titles(self, titles: list[str]) -> Batch:
        """One row of the items with these titles, oldest first; all events at one time.

        That is ``now``, or the time of the data set's newest event: a calendar was not trained on other years.

        Raises:
            ConfigError: a title is not in the catalogue; the message suggests near ones.
        """
        items = torch.tensor([find_row(self.catalog, title, "history") + 1 for title in titles])
        when = self.now
        if when is None:  # of shards it takes a pass over them, so only where it is read
            when = self.datamodule.newest_time() if self.config.user.time_features else 0
        return self._history(items, torch.full_like(items, when))

    def _history(self, items: Tensor, timestamps: Tensor, read: Tensor | None = None) -> Batch:
        """One row of the newest of (E,) item ids and their times in seconds.

        Args:
            read: (E,) bool, which of them the model sees, at least one; none of the others is recommended either.
        """
        now = timestamps[-1:] if self.now is None else torch.tensor([self.now])
        seen = torch.stack([torch.zeros_like(items), items])
        if read is not None:
            items, timestamps = items[read], timestamps[read]
        window = items[None, -self.config.dataset.window :]
        return Batch(
            users=torch.zeros(1, dtype=torch.int64),
            items=window,
            timestamps=timestamps[None, -self.config.dataset.window :],
            targets=torch.zeros_like(window),
            target_times=torch.cat([timestamps[1:], now])[None, -self.config.dataset.window :],
            mask=torch.ones_like(window, dtype=torch.bool),
            seen=seen,
        )

    def history_of_user(self, user: str) -> Batch:
        """One row of everything the data set knows of a user; of cold items nothing is read, as in evaluation.

        Raises:
            ConfigError: no such user, or one of cold items alone.
        """
        history = self.datamodule.history(user)
        if history is None:
            num_users = self.datamodule.num_users
            examples = ", ".join(self.datamodule.user_ids(np.arange(min(3, num_users))))
            raise ConfigError(f"user={user}: not among the {num_users} users ({examples}, ...)")
        items, timestamps = torch.from_numpy(history[0].astype("int64")), torch.from_numpy(history[1])
        read = ~self.datamodule.is_cold(items)
        if not read.any():
            raise ConfigError(f"user={user}: dataset.cold_items holds out every item of the history: nothing to read")
        return self._history(items, timestamps, read)

    @torch.inference_mode()
    def rank(self, history: Batch, k: int) -> list[tuple[str, float]]:
        """The k best unseen items: title and score (similarity over temperature)."""
        scores = self.module.scores(history)[0]
        scores[history.seen[1] - 1] = float("-inf")
        # what was not in training stands at the lowest number where the model knows items by training only
        best = scores.topk(min(k, int((scores > torch.finfo(scores.dtype).min).sum())))
        return [
            (self.catalog.titles[row], score) for row, score in zip(best.indices, best.values.tolist(), strict=True)
        ]


@report_errors
def main(arguments: list[str] | None = None) -> None:
    options = parse(Options, sys.argv[1:] if arguments is None else arguments, USAGE)
    quiet_libraries()
    config = checkpoint_config(Path(options.ckpt), options.root, options.cache_dir)
    new_items = read_catalog(Path(options.new_items)) if options.new_items else None
    model = Recommendations(config, Path(options.ckpt), new_items, options.now)
    if options.user is not None:
        history = model.history_of_user(options.user)
    else:
        history = model.history_of_titles((options.history or "").split("|"))
    ranked = model.rank(history, options.k)
    rows = [[str(place), title, f"{score:.4f}"] for place, (title, score) in enumerate(ranked, start=1)]
    print(text_table(["", "title", "score"], rows))


if __name__ == "__main__":
    main()
