"""torch-rechub 0.9: seconds of training epochs of HLLMModel on our text vectors, by its SeqTrainer.

RECHUB_EPOCHS.py MODEL SPLIT OUT. ``hllm`` has the rows of its own preparation, one of every prefix, all of whose
positions are trained; ``hllm_windows`` has windows with each transition once. Some ``steps`` are timed, at random rows,
and stand for the epoch.
"""

import math
import os
import time

import numpy as np
import torch
from rechub_models import loader, model_of, rows_of, train_pairs
from split import TRAIN, Epochs, Split, main_epochs
from torch_rechub.trainers import SeqTrainer


def prefixes(split: Split) -> list[tuple[np.ndarray, int]]:
    """A row of every prefix of a history, as its preparation makes them."""
    histories = split.histories(TRAIN).values()
    return [(places[:end], int(split.items[places[end]])) for places in histories for end in range(1, len(places))]


def epochs(split: Split, windows: bool) -> Epochs:
    dials = split.settings
    length, batch_size = dials["max_history"], dials["batch_size"]
    torch.manual_seed(0)
    model = model_of(split, torch.from_numpy(split.vectors()))
    trainer = SeqTrainer(model, optimizer_params={"lr": dials["lr"], "weight_decay": 1e-5}, n_epoch=1)
    rows = train_pairs(split, length) if windows else prefixes(split)
    drawn = np.random.default_rng(0).permutation(len(rows))[: dials["steps"] * batch_size]
    timed = loader(rows_of(split, [rows[row] for row in drawn], length), batch_size, shuffle=False)
    trainer.train_one_epoch(timed)  # warms up
    wall, cpu = [], []
    for _ in range(max(dials["epochs"] - 1, 1)):
        started = time.perf_counter(), time.process_time()
        trainer.train_one_epoch(timed)
        share = len(timed) / math.ceil(len(rows) / batch_size)
        wall.append((time.perf_counter() - started[0]) / share)
        cpu.append((time.process_time() - started[1]) / share)
    transitions = sum(len(places) - 1 for places in split.histories(TRAIN).values())
    return Epochs(wall, cpu, transitions, sum(min(len(places), length) for places, _ in rows))


if __name__ == "__main__":
    os.environ["TQDM_DISABLE"] = "1"
    main_epochs({"hllm": lambda split: epochs(split, False), "hllm_windows": lambda split: epochs(split, True)})
