"""Wrong keys, types, ranges and combinations fail while composing, by the name of the flag."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from hllm.config import CustomConfig, EvaluationConfig, compose, from_plain, to_plain
from hllm.errors import ConfigError

HUB = "llm=tinyllama"


@pytest.mark.parametrize(
    ("override", "named"),
    [
        # keys
        ("user.num_layer=2", "num_layer"),
        ("loss.num_negatives=8", "num_negatives"),  # a key of the other loss
        ("optimizer.learning_rate=1", "learning_rate"),
        ("nonsense=1", "nonsense"),
        ("loss=hinge", "hinge"),
        ("dataset=netflix", "netflix"),
        # types
        ("user.num_layers=two", "user.num_layers"),
        ("user.num_layers=1.5", "user.num_layers"),
        ("optimizer.lr=fast", "optimizer.lr"),
        ("items.transform=bleach", "items.transform"),
        ("llm.dtype=int8", "llm.dtype"),
        ("head.learned=perhaps", "head.learned"),
        ("evaluation.ks=ten", "evaluation.ks"),
    ],
)
def test_wrong_keys_and_types_are_named(override: str, named: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(named)):
        compose([override])


@pytest.mark.parametrize(
    "override",
    [
        "dataset.max_history=0",
        "dataset.eval_history=0",
        "dataset.eval_history=51",
        "dataset.batch_size=0",
        "dataset.batch_events=0",
        "dataset.eval_batch_size=-1",
        "dataset.num_workers=-1",
        "llm.max_tokens=0",
        "llm.num_layers=0",
        "llm.shard_items=0",
        "llm.token_budget=100",
        "llm.device=gpu",
        "llm.device=cuda:one",
        "items.whiten_epsilon=0.0",
        "items.hidden_dim=0",
        "items.dropout=1.0",
        "user.num_layers=0",
        "user.dim=0",
        "user.num_heads=0",
        "user.num_heads=3",
        "user.ffn_dim=0",
        "user.norm_eps=0.0",
        "user.time_feature_dim=0",
        "user.length_groups=0",
        "user.dropout=-0.1",
        "user.attention_dropout=1.0",
        "user.num_time_buckets=1",
        "head.temperature=0.0",
        "loss.chunk_size=0",
        "optimizer.lr=0.0",
        "optimizer.lr=nan",
        "optimizer.lr=inf",
        "optimizer.llm_lr=0.0",
        "optimizer.weight_decay=-1.0",
        "optimizer.warmup_ratio=1.0",
        "trainer.max_epochs=0",
        "trainer.devices=0",
        "trainer.accumulate_grad_batches=0",
        "trainer.overfit_batches=-1",
        "trainer.log_every_n_steps=0",
        "trainer.limit_train_batches=0",
        "trainer.limit_val_batches=0",
        "trainer.limit_test_batches=0",
        "trainer.accelerator=tpu",
        "trainer.precision=64",
        "trainer.profiler=wishful",
        "trainer.gradient_clip_val=0.0",
        "callbacks.monitor=val/accuracy",
        "callbacks.patience=0",
        "callbacks.checkpoint_steps=0",
        "callbacks.collapse_cosine=1.1",
        "callbacks.collapse_negatives=1.0",
        "callbacks.collapse_patience=0",
        "evaluation.ks=[]",
        "evaluation.ks=[50,10]",
        "evaluation.ks=[0,10]",
        "evaluation.bucket_edges=[5,5]",
        "evaluation.history_edges=[1,5]",
        "dataset.cold_items=1.0",
        "seed=-1",
        "seed=4294967296",
        "optimized_metric=train/loss",
    ],
)
def test_values_out_of_range_are_refused_with_flag_value_and_rule(override: str) -> None:
    flag, value = override.split("=")
    with pytest.raises(ConfigError, match=rf"^{re.escape(flag)}={re.escape(value[:3])}.*: \S+"):
        compose([override])


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["head.learned=true", "head.temperature=2.0"], "head.temperature=2.0: a learned temperature starts within"),
        (["loss=nce", "loss.num_negatives=0", "loss.in_batch=false"], "loss.num_negatives=0: no negatives at all"),
        (["loss=nce", "loss.num_negatives=-1"], "loss.num_negatives=-1: must be at least 0"),
        (["loss=nce", "loss.similarity_threshold=1.0"], "loss.similarity_threshold=1.0: is a cosine"),
        (["head.score_dtype=bfloat16"], "head.score_dtype=bfloat16: loss=ce computes in float32"),
        (["llm.pretrained=false"], "llm.pretrained=False: items=cached stores the vectors of a trained model"),
        (["init=a.ckpt", "ckpt=b.ckpt"], "init=a.ckpt: gives the weights that a new run starts from"),
        (["trainer.strategy=fsdp", "trainer.precision=16-mixed"], "trainer.precision=16-mixed: trainer.strategy=fsdp"),
        (["items=llm", "dataset.text.fusion=sum"], "dataset.text.fusion=sum: joins stored vectors"),
        (["items=llm", "llm.dtype=bfloat16"], "llm.dtype=bfloat16: is that of stored vectors"),
        (
            ["items=llm", "items.tuning.freeze=[all]"],
            r"items.tuning.freeze=\[all\]: would read items at an \[ITEM\] token",
        ),
        (["items=llm", "items.tuning.lora.rank=0"], "items.tuning.lora.rank=0: must be at least 1"),
        (["user=llm", "user.tuning.lora.alpha=0.0"], "user.tuning.lora.alpha=0.0: must be above 0"),
        (
            ["items=llm", "items.tuning.lora.dropout=1.0"],
            "items.tuning.lora.dropout=1.0: must be at least 0 and below 1",
        ),
        (["items=id", "items.dim=0"], "items.dim=0: must be at least 1"),
        (["items=fused", "items.id_dropout=1.0"], "items.id_dropout=1.0: must be at least 0 and below 1"),
        (["loss=gbce", "loss.calibration=1.5"], "loss.calibration=1.5: must be within"),
        (["loss=bce", "loss.num_negatives=0"], "loss.num_negatives=0: must be at least 1"),
        (["loss.kernel=liger", "loss.mask_seen=true"], "loss.mask_seen=True: .* choose loss.kernel=chunked"),
        (["loss.kernel=liger", "loss.chunk_size=64"], "loss.chunk_size=64: .* choose loss.kernel=chunked"),
        (["loss=nce", "loss.per_position=true"], "loss.in_batch=True: loss.per_position=true has uniform"),
        (["loss=nce_official_ids", "loss.distinct=true"], "loss.distinct=True: .* set false"),
        (["loss=nce_official_ids", "loss.similarity_threshold=0.9"], "loss.similarity_threshold=0.9: .* set null"),
        (["user=llm", "user.num_layers=0"], "user.num_layers=0: must be at least 1"),
        (["user.attention=flex", "user.attention_dropout=0.1"], "user.attention_dropout=0.1: attention=flex drops no"),
        (["user.attention=flex", "user.num_heads=8"], "user.num_heads=8: attention=flex .* at most 4 of user.dim=64"),
        (["user=hstu", "user.dim=7", "user.num_heads=2"], "user.num_heads=2: must divide user.dim=7"),
        (["user=hstu", "user.qk_dim=0"], "user.qk_dim=0: must be at least 1"),
        (["user=hstu", "user.num_time_buckets=1"], "user.num_time_buckets=1: must be at least 2"),
        (["user=hstu", "user.input_dropout=1.0"], "user.input_dropout=1.0: must be at least 0 and below 1"),
        (
            ["user=sasrec", "user.target_time=true"],
            "user.target_time=True: nothing reads times: set user.time_features",
        ),
        (["user=hstu_bytedance", "user.target_time=true"], "user.target_time=True: nothing reads times"),
        (["user.length_groups=2", "trainer.strategy=fsdp"], "user.length_groups=2: trainer.strategy=fsdp wants"),
        (["user=llm", "llm@user.llm=tinyllama", "user.llm.num_layers=2"], "user.llm.num_layers=2: give it as user.num"),
        (
            ["user=llm", "llm@user.llm=tinyllama", "user.llm.pretrained=false"],
            "user.llm.pretrained=False: give it as user",
        ),
        (
            ["user.time_buckets=log", "user.time_reference=end"],
            "user.time_reference=end: .*dataset.train_rows=prefixes",
        ),
        (["llm.wheel=null"], "llm.model=None: give either"),
        (["llm.model=/folder"], "llm.model=/folder: give either"),
        (
            [HUB, "llm.max_tokens=5000", "llm.token_budget=4096"],
            "llm.token_budget=4096: must hold at least one text of llm.max_tokens=5000",
        ),
        (["user.dim=7"], "user.num_heads=.*must divide user.dim=7"),
        (["evaluation.ks=[5]"], r"callbacks.monitor=val/ndcg@10: choose of val/hr@5, val/ndcg@5, val/mrr"),
        (["cache_dir=???"], "cache_dir: has no value; give cache_dir="),
    ],
)
def test_values_that_do_not_go_together_are_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=f"^{message}"):
        compose(overrides)


@pytest.mark.parametrize(
    "overrides",
    [
        ["user.time_buckets=log", "user.time_reference=end", "dataset.train_rows=prefixes"],
        ["user.time_reference=end", "user.time_buckets=none"],  # without time buckets it means nothing
        ["head=dot", "head.temperature=2.0"],
        ["loss=nce", "loss.num_negatives=0"],
        ["loss.kernel=liger", "loss.products=bfloat16"],
        ["trainer.gradient_clip_val=null"],
        ["evaluation.ks=[5]", "callbacks.monitor=val/ndcg@5", "optimized_metric=val/mrr"],
        [HUB, "llm.model=/some/folder"],
    ],
)
def test_values_at_the_edge_of_the_rules_are_taken(overrides: list[str]) -> None:
    assert from_plain(to_plain(compose(overrides))) == compose(overrides)


def test_the_system_is_named_after_what_tells_items_apart() -> None:
    assert compose(["llm=minilm"]).system == "hllm-minilm"
    assert compose(["items=id"]).system == "sasrec"


def test_metric_names_follow_the_list_lengths() -> None:
    assert EvaluationConfig(ks=[1, 5]).metric_names() == ["hr@1", "ndcg@1", "hr@5", "ndcg@5", "mrr"]


def test_the_cache_folder_follows_its_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HLLM_CACHE", "/somewhere")
    assert compose([]).cache_dir == "/somewhere"
    monkeypatch.delenv("HLLM_CACHE")
    assert compose([]).cache_dir == "~/.cache/hllm"


@pytest.mark.parametrize("dataset", ["movielens_100k", "amazon_books", "pixelrec_200k", "custom", "sharded"])
def test_keys_that_an_earlier_version_did_not_store_get_their_defaults(dataset: str) -> None:
    own = ["dataset.interactions=events.csv"] if dataset == "custom" else []
    own = ["dataset.root=shards"] if dataset == "sharded" else own
    config = compose([f"dataset={dataset}", *own, "items=llm", "user=llm", "loss=nce"])
    stored = to_plain(config)
    for group, key in (
        ("dataset", "eval_history"),
        ("llm", "revision"),
        ("items", "grad_cache"),
        ("user", "tuning"),
        ("loss", "similarity_threshold"),
        ("trainer", "profiler"),
    ):
        del stored[group][key]
    del stored["dataset"]["text"]["weights"]
    assert from_plain(stored) == config


def test_a_name_of_ones_own_chooses_no_other_schema() -> None:
    stored = to_plain(compose(["dataset=custom", "dataset.interactions=events.csv", "dataset.name=amazon"]))
    del stored["dataset"]["eval_history"]
    assert isinstance(from_plain(stored).dataset, CustomConfig)


@pytest.mark.parametrize(
    ("group", "change", "named"),
    [
        ("user", {"num_wings": 2, "num_tails": 1}, "it knows no user.num_tails, user.num_wings"),
        ("trainer", {"wings": 2}, "wings"),
        ("user", {"_target_": "???"}, "user._target_ is missing"),
    ],
)
def test_what_does_not_fit_in_a_stored_config_is_named(group: str, change: dict[str, object], named: str) -> None:
    stored = to_plain(compose([]))
    stored[group] |= change
    with pytest.raises(ConfigError, match=f"does not fit this version of hllm: .*{named}"):
        from_plain(stored)


@pytest.mark.parametrize("change", [{"user": {}}, {"seed": "many"}, {"left_over": 1}, {"loss": {"name": "ce", "x": 1}}])
def test_a_stored_config_of_another_version_is_refused(change: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match="does not fit this version of hllm"):
        from_plain(to_plain(compose([])) | change)


@pytest.mark.parametrize(
    ("override", "named"),
    [("user.num_heads=5", "user.num_heads=5: must divide user.dim="), ("user.num_layer=2", "num_layer")],
)
def test_the_command_line_fails_without_a_traceback_and_starts_no_run(
    override: str, named: str, tmp_path: Path
) -> None:
    command = [sys.executable, "-m", "hllm.train", "debug=smoke", override, f"hydra.run.dir={tmp_path / 'run'}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode != 0
    assert named in done.stderr
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.glob("run/*.json")) + list(tmp_path.glob("run/checkpoints"))
