"""In which parts a batch is read: rows of like length together, so that little is computed at padding."""

import torch
from torch import Tensor

RATIO = 0.75
"From one length at which a part may end to the next below."
PART_COSTS = 256
"What a part costs a CPU beside its places, in places: some milliseconds, whatever is in it."
GAIN = 0.25
"A batch is read as one unless parts leave out as large a share of its places."


def length_groups(lengths: Tensor, longest: int, groups: int | None) -> list[Tensor]:
    """Row numbers of each part, every row in one; of several parts the longest rows in the last.

    Args:
        lengths: (B,) events of each row, on the CPU where ``groups`` is None.
        longest: places of a row.
        groups: as many parts of as many rows; None cuts where all places, and ``PART_COSTS`` for a part, sum to least.
    """
    everything = [torch.arange(len(lengths), device=lengths.device)]
    if groups is not None:
        return everything if groups == 1 else list(lengths.argsort().tensor_split(min(groups, len(lengths))))
    ascending, order = lengths.sort(stable=True)
    ends = [longest]
    while (end := int(RATIO * ends[-1])) > 0:
        ends.append(end)
    ends.reverse()
    rows = torch.searchsorted(ascending, torch.tensor(ends), right=True).tolist()
    # the least cost of all rows up to each end, and the end at which its last part begins
    best: list[tuple[float, int]] = []
    for last, end in enumerate(ends):
        options = [(rows[last] * end + PART_COSTS, -1)]
        options += [(best[k][0] + (rows[last] - rows[k]) * end + PART_COSTS, k) for k in range(last)]
        best.append(min(options) if rows[last] else (0.0, -1))
    if best[-1][0] > (1 - GAIN) * len(lengths) * longest:
        return everything
    cuts, place = [], best[-1][1]
    while place >= 0:
        cuts.append(rows[place])
        place = best[place][1]
    return [part for part in order.tensor_split(cuts[::-1]) if len(part)]
