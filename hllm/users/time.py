"""When events happened, as something to add to their item vectors: for any user tower.

At every position the time of its own event is read. The time of the event to be predicted is read only where the config
says that it is known (``user.target_time``): HSTU's published numbers know it, a recommender asked "what next?" may
not.

T events of a batch, F width of a calendar table, D width.
"""

import torch
from torch import Tensor, nn

from hllm.config import UserConfig

CALENDAR_SIZES = (2100, 13, 32, 24, 60, 60)
"Rows of the tables of years, months, days, hours, minutes and seconds (HLLM, arXiv 2409.12740, Algorithm 1)."
NUM_GAPS = 64
"Buckets of a gap: 2 ^ 32 seconds, 136 years, are in the last."


def calendar_fields(timestamps: Tensor) -> Tensor:
    """Year, month 1..12, day 1..31, hour, minute, second of times since 1970, in UTC: (...) int64 -> (..., 6).

    Days become dates by H. Hinnant's civil_from_days, in whole numbers, so that it runs where the model does. Years
    stop at 0 and 2099, the ends of their table.
    """
    days = timestamps.div(86400, rounding_mode="floor")
    second_of_day = timestamps - days * 86400
    shifted = days + 719468  # since 1 March of year 0: leap days come last in a year
    era = shifted.div(146097, rounding_mode="floor")
    day_of_era = shifted - era * 146097
    year_of_era = (day_of_era - day_of_era // 1460 + day_of_era // 36524 - day_of_era // 146096) // 365
    day_of_year = day_of_era - (365 * year_of_era + year_of_era // 4 - year_of_era // 100)
    shifted_month = (5 * day_of_year + 2) // 153
    day = day_of_year - (153 * shifted_month + 2) // 5 + 1
    month = torch.where(shifted_month < 10, shifted_month + 3, shifted_month - 9)
    year = year_of_era + era * 400 + (month <= 2).long()
    hour, minute, second = second_of_day // 3600, second_of_day // 60 % 60, second_of_day % 60
    return torch.stack([year.clamp(0, CALENDAR_SIZES[0] - 1), month, day, hour, minute, second], dim=-1)


def gap_bucket(seconds: Tensor) -> Tensor:
    """Bucket of a time between two events: (...) int64 -> (...) int64.

    0 for none, 2 for a second, then two to a doubling of the seconds and one more: no whole number of them is in 1.
    """
    return (2 * (seconds.clamp(min=0).float() + 1).log2()).long().clamp(max=NUM_GAPS - 1)


class CalendarEmbedding(nn.Module):
    """Six tables side by side and an MLP to the user model's width (HLLM, Algorithm 1)."""

    def __init__(self, feature_dim: int, dim: int) -> None:
        super().__init__()
        self.tables = nn.ModuleList(nn.Embedding(size, feature_dim) for size in CALENDAR_SIZES)
        self.mlp = nn.Sequential(nn.Linear(len(CALENDAR_SIZES) * feature_dim, dim), nn.GELU(), nn.Linear(dim, dim))

    def forward(self, timestamps: Tensor) -> Tensor:
        """(T,) int64 seconds -> (T, D)."""
        fields = calendar_fields(timestamps).unbind(-1)
        embedded: Tensor = self.mlp(torch.cat([table(f) for table, f in zip(self.tables, fields, strict=True)], dim=-1))
        return embedded


class EventTimes(nn.Module):
    """Sum of what the config wants to be known of an event's time, and of its target's.

    Args:
        config: the user group; ``time_features`` or ``time_gaps`` is set.
        dim: D.
    """

    def __init__(self, config: UserConfig, dim: int) -> None:
        super().__init__()
        times = 2 if config.target_time else 1
        self.calendars = nn.ModuleList(
            CalendarEmbedding(config.time_feature_dim, dim) for _ in range(times * config.time_features)
        )
        self.gaps = nn.ModuleList(nn.Embedding(NUM_GAPS, dim) for _ in range(times * config.time_gaps))
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)

    def forward(self, timestamps: Tensor, previous: Tensor, target_times: Tensor | None) -> Tensor:
        """What is added to the item vectors.

        Args:
            timestamps: (T,) int64 seconds of the events.
            previous: (T,) of the events before them in their rows; of a row's first, its own.
            target_times: (T,) int64 seconds of the events that follow them; None where they are not known.

        Returns:
            (T, D); at an event a function of times up to it, and of the target's where it is given.
        """
        known = [timestamps] if target_times is None else [timestamps, target_times]
        gaps = [timestamps - previous] if target_times is None else [timestamps - previous, target_times - timestamps]
        parts = [calendar(times) for calendar, times in zip(self.calendars, known, strict=False)]
        parts += [table(gap_bucket(gap)) for table, gap in zip(self.gaps, gaps, strict=False)]
        return torch.stack(parts).sum(0)
