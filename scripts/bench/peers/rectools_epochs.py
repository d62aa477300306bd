"""RecTools 0.19: seconds of training epochs of SASRec and HSTU, by its own fit, without validation.

RECTOOLS_EPOCHS.py MODEL SPLIT OUT. The loss is settings' ``loss`` with ``num_negatives`` for each position.
"""

import time
import warnings

import numpy as np
import pytorch_lightning as pl
from pytorch_lightning.callbacks import Callback
from rectools.models import HSTUModel, SASRecModel
from rectools_models import dataset_of, dials_of
from split import TRAIN, Epochs, Split, main_epochs

WALL: list[float] = []
CPU: list[float] = []


class Clock(Callback):
    """Its times are kept outside it, because fit trains with a copy."""

    def on_train_epoch_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self.started = time.perf_counter(), time.process_time()

    def on_train_epoch_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        WALL.append(time.perf_counter() - self.started[0])
        CPU.append(time.process_time() - self.started[1])


def epochs(kind: type, split: Split) -> Epochs:
    dials, train = split.settings, split.part == TRAIN
    model = kind(
        **dials_of(split),
        loss=dials["loss"],
        n_negatives=dials["num_negatives"],
        get_trainer_func=lambda: pl.Trainer(
            max_epochs=dials["epochs"],
            callbacks=[Clock()],
            accelerator="cpu",
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            enable_checkpointing=False,
        ),
    )
    model.fit(dataset_of(split, train))
    # it trains the newest L + 1 events of a user
    trained = np.minimum(np.unique(split.users[train], return_counts=True)[1] - 1, dials["max_history"]).sum()
    return Epochs(WALL, CPU, int(trained), int(trained))


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    main_epochs({"sasrec": lambda split: epochs(SASRecModel, split), "hstu": lambda split: epochs(HSTUModel, split)})
