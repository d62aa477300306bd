"""RePlay 0.22: SasRec with full cross entropy, batches out of Parquet as its own examples have it."""

import time
import warnings
from pathlib import Path

import lightning as L
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from replay.data import FeatureHint, FeatureSource, FeatureType
from replay.data.nn import ParquetModule, TensorFeatureInfo, TensorFeatureSource, TensorSchema
from replay.nn.lightning import LightningModule
from replay.nn.lightning.callback import ComputeMetricsCallback
from replay.nn.lightning.optimizer import OptimizerFactory
from replay.nn.lightning.postprocessor import SeenItemsFilter
from replay.nn.sequential import SasRec
from replay.nn.transform.template import make_default_sasrec_transforms
from split import TRAIN, VALIDATION, Outcome, Split, left_padded, main, rank_all


def write_rows(path: Path, columns: dict[str, list[np.ndarray]]) -> str:
    pq.write_table(pa.table({name: pa.array(values) for name, values in columns.items()}), path)
    return str(path)


def sasrec(split: Split, seed: int, out: Path) -> Outcome:
    """Items are 0..I-1 here, and I is padding."""
    dials, padding = split.settings, split.num_items
    L.seed_everything(seed)
    length = dials["max_history"]
    schema = TensorSchema(
        TensorFeatureInfo(
            "item_id",
            FeatureType.CATEGORICAL,
            is_seq=True,
            feature_hint=FeatureHint.ITEM_ID,
            feature_sources=[TensorFeatureSource(FeatureSource.INTERACTIONS, "item_id")],
            cardinality=padding,
            padding_value=padding,
            embedding_dim=dials["dim"],
        )
    )
    histories = split.histories(TRAIN)
    users, targets = split.validation()
    training = [split.items[places] - 1 for places in histories.values() if len(places) > 1]
    validated = [split.items[histories[user]] - 1 for user in users.tolist()]
    longest = max(map(len, validated))
    data = ParquetModule(
        dials["batch_size"],
        metadata={
            "train": {"item_id": {"shape": length + 1, "padding": padding}},
            "validate": {
                "item_id": {"shape": length, "padding": padding},
                "seen_ids": {"shape": longest, "padding": padding},
                "ground_truth": {"shape": 1, "padding": -1},
            },
        },
        transforms=make_default_sasrec_transforms(schema),
        # rows are shuffled within a partition, here all of them
        config={"train": {"generator": torch.default_generator}},
        train_path=write_rows(out / "train.parquet", {"item_id": training}),
        validate_path=write_rows(
            out / "validate.parquet",
            {"item_id": validated, "seen_ids": validated, "ground_truth": [np.array([t - 1]) for t in targets]},
        ),
    )
    model = SasRec.from_params(
        schema,
        dials["dim"],
        dials["num_heads"],
        dials["num_layers"],
        max_sequence_length=length,
        dropout=dials["dropout"],
    )
    best = ModelCheckpoint(out, monitor="ndcg@10", mode="max", save_weights_only=True)
    trainer = L.Trainer(
        max_epochs=dials["epochs"],
        callbacks=[
            ComputeMetricsCallback(["ndcg"], ks=[10], postprocessors=[SeenItemsFilter(padding)], verbose=False),
            best,
            EarlyStopping("ndcg@10", mode="max", patience=dials["patience"]),
        ],
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
    module = LightningModule(model, OptimizerFactory(learning_rate=dials["lr"]))
    started = time.perf_counter()
    trainer.fit(module, data)
    seconds = time.perf_counter() - started
    with torch.serialization.safe_globals([OptimizerFactory]):  # stands among its hyperparameters
        module.load_state_dict(torch.load(best.best_model_path, weights_only=True)["state_dict"])
    model.eval()

    @torch.no_grad()
    def score(batch: list[np.ndarray]) -> np.ndarray:
        rows = left_padded([split.items[places] for places in batch], length)
        known = torch.from_numpy(rows > 0)
        items = torch.from_numpy(np.where(rows > 0, rows - 1, padding))
        logits = model(feature_tensors={"item_id": items}, padding_mask=known)["logits"]
        return np.pad(logits.numpy(), ((0, 0), (1, 0)))

    items, scores = rank_all(split, split.test_users, VALIDATION, score, dials["top"])
    parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return Outcome(items, scores, seconds, trainer.current_epoch, parameters, "its NDCG@10 of held-out events")


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    main({"sasrec": sasrec})
