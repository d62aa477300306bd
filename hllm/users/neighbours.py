"""How near an item's text is to those of the newest items, beside what the user tower says of it.

Item-to-item neighbours on text need no training and find rare and cold items that a trained tower has no room for
(``hllm.floors``). Here they are a part of the score, so that the towers learn what is left to explain. L history
length, K width of the anchors: a fixed vector of unit length of each item's text.
"""

import torch
from torch import Tensor, nn


class NeighbourHistory(nn.Module):
    """At every position the sum of the anchors up to it, each a learned factor less than the next newer one."""

    def __init__(self) -> None:
        super().__init__()
        self.decay = nn.Parameter(torch.zeros(()))  # as a logit

    def forward(self, anchors: Tensor) -> Tensor:
        """(b, l, K) -> (b, l, K) in float32; at position i a function of events up to i."""
        places = torch.arange(anchors.shape[1], device=anchors.device)
        back = places[:, None] - places  # (L, L)
        with torch.autocast(anchors.device.type, enabled=False):
            weights = (back.clamp(min=0) * nn.functional.logsigmoid(self.decay.float())).exp().masked_fill(back < 0, 0)
            return weights @ anchors.float()
