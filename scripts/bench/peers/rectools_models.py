"""RecTools 0.19: SASRec, HSTU with and without time, and UniSRec on our text vectors."""

import time
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback, EarlyStopping, ModelCheckpoint
from rectools import Columns
from rectools.dataset import Dataset
from rectools.fast_transformers import UniSRecModel
from rectools.models import HSTUModel, SASRecModel
from rectools.models.nn.transformers.utils import leave_one_out_mask
from split import TRAIN, VALIDATION, Outcome, Split, left_padded, main, ndcg, rank_all

SELECTION = "its validation loss, every user's last known event held out"


def make_trainer(folder: str, epochs: int, patience: int) -> pl.Trainer:
    best = ModelCheckpoint(folder, monitor="val_loss", save_weights_only=True)
    return pl.Trainer(
        max_epochs=epochs,
        callbacks=[best, EarlyStopping("val_loss", patience=patience)],
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


def dataset_of(split: Split, events: np.ndarray | slice = slice(None)) -> Dataset:
    """Of some of the split's events."""
    frame = pd.DataFrame(
        {
            Columns.User: split.users[events],
            Columns.Item: split.items[events],
            Columns.Weight: 1.0,
            Columns.Datetime: pd.to_datetime(split.times[events], unit="s"),
        }
    )
    return Dataset.construct(frame)


def dials_of(split: Split) -> dict[str, object]:
    """What all peers share, by this library's names."""
    dials = split.settings
    return {
        "n_blocks": dials["num_layers"],
        "n_heads": dials["num_heads"],
        "n_factors": dials["dim"],
        "dropout_rate": dials["dropout"],
        "session_max_len": dials["max_history"],
        "batch_size": dials["batch_size"],
        "lr": dials["lr"],
    }


def sequential(kind: type, options: dict[str, object], split: Split, seed: int, out: Path) -> Outcome:
    """SASRec or HSTU; HSTU with time attention is told when the target happens, as its time bias needs."""
    dials = split.settings
    pl.seed_everything(seed)
    dataset = dataset_of(split)
    model = kind(
        **dials_of(split),
        loss="softmax",
        get_val_mask_func=leave_one_out_mask,
        get_trainer_func=make_trainer,
        get_trainer_func_kwargs={"folder": str(out), "epochs": dials["epochs"], "patience": dials["patience"]},
        recommend_torch_device="cpu",
        **options,
    )
    started = time.perf_counter()
    model.fit(dataset)
    seconds = time.perf_counter() - started
    trainer = model.fit_trainer
    model.load_weights_from_checkpoint(trainer.checkpoint_callback.best_model_path)
    context = None
    if getattr(model, "relative_time_attention", False):
        asked = pd.to_datetime(split.test_times, unit="s")
        context = pd.DataFrame({Columns.User: split.test_users, Columns.Datetime: asked, Columns.Weight: 1.0})
    found = model.recommend(split.test_users, dataset, dials["top"], filter_viewed=True, context=context)
    rows = pd.Series(np.arange(len(split.test_users)), index=split.test_users).loc[found[Columns.User]].to_numpy()
    items = np.zeros((len(split.test_users), dials["top"]), dtype=np.int64)
    scores = np.full(items.shape, -np.inf, dtype=np.float32)
    items[rows, found[Columns.Rank] - 1] = found[Columns.Item]
    scores[rows, found[Columns.Rank] - 1] = found[Columns.Score]
    parameters = sum(p.numel() for p in model.torch_model.parameters() if p.requires_grad)
    return Outcome(items, scores, seconds, trainer.current_epoch, parameters, SELECTION)


class KeepBest(Callback):
    """Keeps the epoch with the best NDCG@10 of held-out events: UniSRecModel itself validates on training data."""

    def __init__(self, model: UniSRecModel, split: Split) -> None:
        self.model, self.split, self.best, self.epoch, self.trained = model, split, -1.0, 0, 0
        self.users, self.targets = split.validation()
        self.weights: dict[str, torch.Tensor] = {}
        self.unique = torch.from_numpy(np.unique(split.items[split.part == TRAIN]))

    def on_train_epoch_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self.trained += 1
        self.model._net, self.model._unique_items = module.net, self.unique
        value = ndcg(unisrec_top(self.model, self.split, self.users, TRAIN, 10)[0], self.targets)
        if value > self.best:
            self.best, self.epoch = value, trainer.current_epoch
            self.weights = {name: weight.clone() for name, weight in module.net.state_dict().items()}
        trainer.should_stop = trainer.current_epoch - self.epoch >= self.split.settings["patience"]


def unisrec_top(
    model: UniSRecModel, split: Split, users: np.ndarray, last: int, k: int
) -> tuple[np.ndarray, np.ndarray]:
    known = model.item_id_mapping

    def score(batch: list[np.ndarray]) -> np.ndarray:
        rows = left_padded([split.items[places] for places in batch], split.settings["max_history"])
        values, items = model.predict_topk(model.map_item_ids(torch.from_numpy(rows)), k=len(known))
        scores = torch.full((len(batch), split.num_items + 1), float("-inf"))
        return scores.scatter(1, items, values).numpy()

    return rank_all(split, users, last, score, k)


def unisrec(split: Split, seed: int, out: Path) -> Outcome:
    dials = split.settings
    pl.seed_everything(seed)
    # the user model's rate and dropout are the shared dials; the library multiplies lr by 3 for its transformer
    model = UniSRecModel(
        torch.from_numpy(split.vectors()),
        n_factors=dials["dim"],
        n_blocks=dials["num_layers"],
        n_heads=dials["num_heads"],
        session_max_len=dials["max_history"],
        dropout=dials["dropout"],
        lr=dials["lr"] / 3,
        batch_size=dials["batch_size"],
        epochs=dials["epochs"],
        loss="softmax",
        device="cpu",
    )
    keep = KeepBest(model, split)
    plain = model._make_trainer

    def with_selection(*args: object, **kwargs: object) -> pl.Trainer:
        trainer = plain(*args, **kwargs)
        trainer.callbacks.append(keep)
        return trainer

    model._make_trainer = with_selection
    train = split.part == TRAIN
    columns = (torch.from_numpy(column[train]) for column in (split.users, split.items, split.times))
    started = time.perf_counter()
    model.fit(*columns)
    seconds = time.perf_counter() - started
    model.net.load_state_dict(keep.weights)
    items, scores = unisrec_top(model, split, split.test_users, VALIDATION, dials["top"])
    parameters = sum(p.numel() for p in model.net.parameters() if p.requires_grad)
    return Outcome(items, scores, seconds, keep.trained, parameters, "NDCG@10 of held-out events; added by the runner")


COSINE = {"lightning_module_kwargs": {"logits_t": 0.05}}
MODELS = {
    "sasrec": lambda *args: sequential(SASRecModel, {}, *args),
    "hstu_time": lambda *args: sequential(HSTUModel, COSINE, *args),
    "hstu": lambda *args: sequential(HSTUModel, {**COSINE, "relative_time_attention": False}, *args),
    "unisrec": unisrec,
}

if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    main(MODELS)
