"""Where the events of a batch lie: end to end, so that nothing is computed at padding, and in whole rows for attention.

All of a user model but its attention treats each event alone. Attention runs over rows: by sequence in one kernel where
there is one, else over parts, rectangles of rows of like length with padding behind the shorter ones.

B rows, T events of them all, L events of the longest row, P places of all parts' rectangles, C channels.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from hllm.users.groups import length_groups


@dataclass(frozen=True)
class Layout:
    """The events of a batch, row after row, oldest first.

    Args:
        lengths: (B,) events of each row. longest: L.
        row, place: (T,) the row of an event, and its place there.
        shapes: rows and length of each part.
        index: (P,) the event at each place of the parts, at padding some event of the same row; None where the one part
            has no padding, and its places are the events.
        inverse: (T,) at which of those places an event is; None likewise.
    """

    lengths: Tensor
    longest: int
    row: Tensor
    place: Tensor
    shapes: list[tuple[int, int]]
    index: Tensor | None
    inverse: Tensor | None

    @classmethod
    def of(cls, mask: Tensor, places: Tensor | None = None, num_parts: int | None = 1, few_sizes: bool = False) -> Self:
        """From a (B, L) mask, true at real events, which come first in their rows.

        Args:
            places: (T,) where the mask is true among its B L places; what a device need not wait for, if it is given.
            num_parts: as ``length_groups`` has it; any other number than 1 is for masks on the CPU.
            few_sizes: T is rounded up by at most a 32nd, with events in rows behind the batch's, so that batches have
                few different numbers of events.
        """
        num_rows, longest = mask.shape
        if places is None:
            places = mask.flatten().nonzero().flatten()
        lengths = mask.sum(1)
        if few_sizes and (filler := -len(places) % _granularity(len(places))):
            more = torch.arange(filler, device=mask.device)
            places = torch.cat([places, mask.numel() + more])
            lengths = torch.cat([lengths, torch.bincount(more // longest)])
            num_rows = len(lengths)
        row, place = places // longest, places % longest
        last = lengths.cumsum(0) - 1  # (B,) the newest event of each row
        parts = [torch.arange(num_rows, device=mask.device)] if num_parts == 1 else []
        parts = parts or length_groups(lengths, longest, num_parts)
        if len(parts) == 1:
            if len(places) == num_rows * longest:
                return cls(lengths, longest, row, place, [(num_rows, longest)], None, None)
            ends = [longest]
        else:
            ends = [int(lengths[rows[-1]]) for rows in parts]
        begins, indices, num_places = torch.empty_like(last), [], 0
        for rows, end in zip(parts, ends, strict=True):
            columns = torch.arange(end, device=mask.device)
            events = last[rows, None] - (lengths[rows, None] - 1 - columns).clamp(min=0)
            indices.append(events.flatten())
            begins[rows] = num_places + end * torch.arange(len(rows), device=mask.device)
            num_places += end * len(rows)
        shapes = [(len(rows), end) for rows, end in zip(parts, ends, strict=True)]
        return cls(lengths, longest, row, place, shapes, torch.cat(indices), begins[row] + place)

    @property
    def newest(self) -> Tensor:
        """(B,) the newest event of each row."""
        return self.borders[1:].long() - 1

    @cached_property
    def borders(self) -> Tensor:
        """(B + 1,) int32 the first event of each row, and T."""
        return F.pad(self.lengths.cumsum(0), (1, 0)).int()

    def parts(self, values: Tensor) -> list[Tensor]:
        """(T, ...) -> (b, l, ...) for each part, in which what stands at padding is another event's of the row."""
        padded = values if self.index is None else _Padded.apply(values, self.index, self.inverse)  # type: ignore[no-untyped-call]
        sizes = [rows * length for rows, length in self.shapes]
        split = padded.split(sizes) if len(sizes) > 1 else [padded]
        return [part.unflatten(0, shape) for part, shape in zip(split, self.shapes, strict=True)]

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def by_row(self, function: Callable[..., Tensor], values: Tensor, *given: Sequence[Any]) -> Tensor:
        """(T, C) -> (T, C'), by a function of (b, l, C), and of what is given for each part, to (b, l, C').

        The function must not let an event see what comes after it: padding does.
        """
        outputs = [function(*part).flatten(0, 1) for part in zip(self.parts(values), *given, strict=True)]
        joined = torch.cat(outputs) if len(outputs) > 1 else outputs[0]
        return joined if self.index is None else _Events.apply(joined, self.inverse)  # type: ignore[no-untyped-call]

    def previous(self, values: Tensor) -> Tensor:
        """(T,) -> (T,) of the event before; of a row's first, its own."""
        before = torch.cat([values[:1], values[:-1]])
        return torch.where(self.place == 0, values, before)

    def rows(self, values: Tensor) -> Tensor:
        """(T, C) -> (B, L, C), zeros at padding."""
        return values.new_zeros(len(self.lengths), self.longest, *values.shape[1:]).index_put(
            (self.row, self.place), values
        )


def _granularity(count: int) -> int:
    """A power of 2, of which a count holds 32 to 63; of a smaller count 1."""
    return 1 << max((count // 32).bit_length() - 1, 0)


class _Padded(torch.autograd.Function):
    """Events at the places of parts. No gradient comes back from padding: no event looks at it, and it is not read."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, index: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(inverse)
        return values.index_select(0, index)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (inverse,) = ctx.saved_tensors
        return grad.index_select(0, inverse), None, None


class _Events(torch.autograd.Function):
    """Places of parts back to events."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(inverse)
        ctx.num_places = len(values)
        return values.index_select(0, inverse)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (inverse,) = ctx.saved_tensors
        padded = grad.new_zeros(ctx.num_places, *grad.shape[1:])
        return padded.index_copy_(0, inverse, grad), None
