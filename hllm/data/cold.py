"""Items held out of training: how well is ranked what nobody has touched yet.

A share of the items is drawn by number, without a look at the data. Training knows none of their events: they are
neither read nor predicted, and what stood around one stands side by side. Test keeps every target, so that the cold
items among them are found among all items or not at all. Its histories leave cold items out as well: no system could
have a trained vector of one, and then all read the same. They stay out of the ranking as everything a user did.
"""

import logging
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from hllm.data.schema import Interactions
from hllm.data.splits import Rows, Splits
from hllm.errors import ConfigError

log = logging.getLogger(__name__)

Mask = npt.NDArray[np.bool_]


def draw_cold(num_items: int, share: float, seed: int) -> Mask:
    """(I + 1,) which items are cold: ``share`` of them, rounded. Entry 0, padding, is not.

    Raises:
        ConfigError: that is none of them, or all.
    """
    num_cold = round(share * num_items)
    if not 0 < num_cold < num_items:
        raise ConfigError(f"dataset.cold_items={share}: rounds to {num_cold} of {num_items} items: hold out some")
    cold = np.zeros(num_items + 1, dtype=np.bool_)
    cold[1 + np.random.default_rng(seed).permutation(num_items)[:num_cold]] = True
    return cold


def hold_out(interactions: Interactions, splits: Splits, cold: Mask, max_history: int) -> tuple[Interactions, Splits]:
    """The events of items that are not cold, and the splits as ranges into these; targets stay those of the whole.

    Validation leaves out users whose target is cold, since a model is not to be chosen by what it is tested on. Test
    and validation leave out users of whose history nothing is left to read.

    Args:
        cold: (I + 1,) bool.
        max_history: newest events that an evaluation row reads, counted without cold ones.
    """
    kept = ~cold[interactions.items]
    places = np.concatenate([[0], np.cumsum(kept, dtype=np.int64)])  # (E + 1,) of each bound among what is kept
    warm = replace(
        interactions,
        items=interactions.items[kept],
        timestamps=interactions.timestamps[kept],
        offsets=places[interactions.offsets],
    )

    def rows(whole: Rows, chosen: Mask) -> Rows:
        ends = places[whole.ends]
        starts = np.maximum(warm.offsets[whole.users], ends - max_history)
        chosen = chosen & (ends > starts)
        return Rows(whole.users[chosen], starts[chosen], ends[chosen], whole.last_only, whole.ends[chosen])

    validation = rows(splits.validation, ~cold[interactions.items[splits.validation.ends]])
    test = rows(splits.test, np.ones(len(splits.test), np.bool_))
    log.info(
        "%d of %d items are cold, and with them %d of %d events; they are the target of %d of %d test rows; left out: "
        "%d test rows with nothing to read, %d validation rows with that or a cold target",
        *(cold.sum(), len(cold) - 1, len(interactions) - len(warm), len(interactions)),
        *(cold[interactions.items[splits.test.ends]].sum(), len(splits.test)),
        *(len(splits.test) - len(test), len(splits.validation) - len(validation)),
    )
    return warm, replace(splits, train_ends=places[splits.train_ends], validation=validation, test=test)
