"""torch-rechub 0.9: HLLMModel on our text vectors, trained by its SeqTrainer.

Its own data script makes a row of every prefix and trains all positions of each, which repeats a transition up to N
times an epoch; here rows are windows that train each transition once, as ours do. The model's width is that of the
vectors.
"""

import os
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
from split import TRAIN, VALIDATION, Outcome, Split, left_padded, main, rank_all
from torch_rechub.models.generative.hllm import HLLMModel
from torch_rechub.trainers import SeqTrainer
from torch_rechub.utils.data import SequenceDataGenerator

Rows = tuple[np.ndarray, np.ndarray, np.ndarray]


def gaps(split: Split, places: list[np.ndarray], length: int) -> np.ndarray:
    """(B, L) seconds from each event to the row's last one, as its preparation has it; 0 at padding."""
    return left_padded([split.times[row[-1]] - split.times[row] for row in places], length)


def rows_of(split: Split, histories: list[tuple[np.ndarray, int]], length: int) -> Rows:
    """Tokens, gaps and targets of (places of events, target item) pairs."""
    places = [row[-length:] for row, _ in histories]
    tokens = left_padded([split.items[row] for row in places], length)
    return tokens, gaps(split, places, length), np.array([target for _, target in histories])


def train_pairs(split: Split, length: int) -> list[tuple[np.ndarray, int]]:
    """Windows from the newest training event back; every transition is in one of them."""
    pairs = []
    for places in split.histories(TRAIN).values():
        for end in range(len(places) - 1, 0, -length):
            pairs.append((places[max(end - length, 0) : end], int(split.items[places[end]])))
    return pairs


def loader(rows: Rows, batch_size: int, shuffle: bool) -> torch.utils.data.DataLoader:
    tokens, times, targets = rows
    positions = np.broadcast_to(np.arange(tokens.shape[1]), tokens.shape)
    return SequenceDataGenerator(tokens, positions, targets, times).generate_dataloader(batch_size, shuffle=shuffle)[0]


def leading_components(vectors: np.ndarray, dim: int) -> np.ndarray:
    """(I + 1, dim) the items' principal components; row 0, padding, stays zero."""
    centred = vectors[1:] - vectors[1:].mean(0)
    _, _, directions = np.linalg.svd(centred, full_matrices=False)
    return np.concatenate([np.zeros((1, dim), np.float32), centred @ directions[:dim].T])


def model_of(split: Split, vectors: torch.Tensor) -> HLLMModel:
    """As wide as the (I + 1, E) vectors."""
    dials = split.settings
    return HLLMModel(
        vectors,
        vocab_size=len(vectors),
        d_model=vectors.shape[1],
        n_heads=dials["num_heads"],
        n_layers=dials["num_layers"],
        max_seq_len=dials["max_history"],
        dropout=dials["dropout"],
    )


def hllm(split: Split, seed: int, out: Path, reduced: bool = False) -> Outcome:
    """As wide as the vectors, as it must be, or on as many of their principal components as the others are wide."""
    dials = split.settings
    vectors = torch.from_numpy(leading_components(split.vectors(), dials["dim"]) if reduced else split.vectors())
    torch.manual_seed(seed)
    length = dials["max_history"]
    model = model_of(split, vectors)
    trainer = SeqTrainer(
        model,
        optimizer_params={"lr": dials["lr"], "weight_decay": 1e-5},
        n_epoch=dials["epochs"],
        earlystop_patience=dials["patience"],
        model_path=str(out),
    )
    histories = split.histories(TRAIN)
    held_out = [
        (histories[user], target) for user, target in zip(*map(np.ndarray.tolist, split.validation()), strict=True)
    ]
    batch_size = dials["batch_size"]
    training = loader(rows_of(split, train_pairs(split, length), length), batch_size, shuffle=True)
    validation = loader(rows_of(split, held_out, length), batch_size, shuffle=False)
    started = time.perf_counter()
    history = trainer.fit(training, validation)
    seconds = time.perf_counter() - started
    # the trainer goes back to its best weights only where it stops early
    model.load_state_dict(trainer.early_stopper.best_weights or model.state_dict())
    model.eval()

    @torch.no_grad()
    def score(batch: list[np.ndarray]) -> np.ndarray:
        places = [row[-length:] for row in batch]
        tokens = left_padded([split.items[row] for row in places], length)
        return model(torch.from_numpy(tokens), torch.from_numpy(gaps(split, places, length)))[:, -1].numpy()

    items, scores = rank_all(split, split.test_users, VALIDATION, score, dials["top"])
    parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return Outcome(items, scores, seconds, len(history["train_loss"]), parameters, "its top-1 of held-out events")


if __name__ == "__main__":
    os.environ["TQDM_DISABLE"] = "1"
    torch.set_num_threads(1)
    main({"hllm": hllm, "hllm_pca": partial(hllm, reduced=True)})
