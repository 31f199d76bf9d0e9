"""Cutting a time series into training, validation and test parts, and each part into windows.

The splits are those of the long-horizon benchmarks (Informer, https://arxiv.org/abs/2012.07436).
"""

import logging
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from vim.data.series.scaling import Scaler
from vim.data.series.table import DAY, Series
from vim.errors import UserError

MONTH = 30 * 24  # hours
SPLITS = {  # rows, or fractions of all rows, for training, validation and test; any later rows are not used
    "etth": (12 * MONTH, 4 * MONTH, 4 * MONTH),
    "ettm": (48 * MONTH, 16 * MONTH, 16 * MONTH),
    "ratio": (0.7, 0.1, 0.2),
}
PARTS = ("train", "val", "test")
CALENDAR = ("sine of the day", "cosine of the day", "sine of the week", "cosine of the week", "weekend")

_logger = logging.getLogger(__name__)


class Batch(NamedTuple):
    """b windows with t steps of m variates to see and h steps to forecast."""

    x: Tensor  # (b, t, m): the steps to see
    y: Tensor  # (b, h, m): the steps to forecast
    observed: Tensor  # (b, h, m): whether a value of y was observed, not filled in
    future: Tensor  # (b, h, c): what is known beforehand of the steps to forecast
    static: Tensor | None  # (m, s): covariates of the variates


class Windows:
    """All windows of lookback + horizon consecutive rows inside the borders, stride 1, without an unfilled gap.

    Args:
        values: (n, m), scaled; NaN in unfilled gaps.
        observed: (n, m): whether a value was observed, not filled in.
        future: (n, c): what is known beforehand of each row.
        static: (m, s): covariates of the variates.
        borders: the first row, and the row after the last.

    Attributes:
        starts: the first row of each window.
        left_out: the number of windows that touch a gap.
        has_targets: whether at least one value to forecast was observed.
    """

    def __init__(
        self,
        values: Tensor,
        observed: Tensor,
        future: Tensor,
        static: Tensor | None,
        borders: tuple[int, int],
        *,
        lookback: int,
        horizon: int,
    ) -> None:
        self.values, self.observed, self.future, self.static = values, observed, future, static
        self.lookback, self.horizon = lookback, horizon
        length = lookback + horizon
        starts = torch.arange(borders[0], borders[1] - length + 1)
        # (n + 1,): counts over the rows before each row, so that a difference counts within a window
        gaps, seen = (pad(rows.any(1).long().cumsum(0), (1, 0)) for rows in (values.isnan(), observed))
        whole = gaps[starts + length] == gaps[starts]
        self.starts, self.left_out = starts[whole], int((~whole).sum())
        self.has_targets = bool((seen[self.starts + length] > seen[self.starts + lookback]).any())

    def __len__(self) -> int:
        return len(self.starts)

    def batch(self, indices: Tensor) -> Batch:
        """The windows with these indices, (b,)."""
        rows = self.starts[indices][:, None]
        seen = rows + torch.arange(self.lookback)
        ahead = rows + self.lookback + torch.arange(self.horizon)
        return Batch(self.values[seen], self.values[ahead], self.observed[ahead], self.future[ahead], self.static)


def borders(split: str, n: int, lookback: int, source: str) -> list[tuple[int, int]]:
    """The first row and the row after the last, of the training, validation and test part of n rows.

    The validation and the test part start `lookback` rows early, so that their first row can be forecast.

    Raises:
        UserError: there is no such split, or it needs more than n rows.
    """
    if split not in SPLITS:
        raise UserError(f"data.split must be one of {', '.join(map(repr, SPLITS))}, got {split!r}")
    train, val, test = SPLITS[split]
    if split == "ratio":
        train, test = int(train * n), int(test * n)
        val = n - train - test
    ends = [0, int(train), int(train + val), int(train + val + test)]
    if ends[-1] > n:
        raise UserError(f"{source} has {n} rows: data.split={split!r} takes {ends[-1]}; data.split='ratio' takes any")
    return [(max(start - lookback, 0), end) for start, end in pairwise(ends)]


def build_windows(
    series: Series,
    *,
    lookback: int,
    horizon: int,
    split: str = "ratio",
    max_gap: int = 6,
    with_calendar: bool = False,
    scaler: Scaler | None = None,
) -> tuple[dict[str, Windows], Scaler]:
    """Cut a series into the windows of each part, scaled.

    Args:
        lookback, horizon: a window's rows to see and rows to forecast.
        split: a name in SPLITS.
        max_gap: up to so many consecutive missing values are filled with the value before them. A filled value is seen,
            but not scored as a target. Windows that touch a longer gap are left out.
        with_calendar: whether the calendar of the rows to forecast is known; see :func:`calendar`.
        scaler: by default that of the training part.

    Returns:
        The windows by the names in PARTS, and the scaler.

    Raises:
        UserError: the split does not fit, or a part has no window with an observed value to forecast.
    """
    # Scale all rows.
    rows_of = dict(zip(PARTS, borders(split, len(series.values), lookback, series.source), strict=True))
    m = len(series.variates)
    filled = fill_gaps(series.values, max_gap)
    observed = torch.from_numpy(~np.isnan(series.values[:, :m]))
    if scaler is None:
        scaler = Scaler.of(series.values[slice(*rows_of["train"])], series.columns, f"{series.source}, training part")
    scaled = scaler.scale(filled)
    values, future = scaled[:, :m], known_beforehand(series.dates, scaled[:, m:], with_calendar)

    # Cut each part.
    windows = {}
    for name, rows in rows_of.items():
        if rows[1] - rows[0] < lookback + horizon:
            raise UserError(
                f"{series.source}: the {name} part has {rows[1] - rows[0]} rows (of {len(scaled)}, the lookback before "
                f"it included), and a window takes {lookback} + {horizon}: lower data.horizon or data.lookback"
            )
        part = Windows(values, observed, future, series.static, rows, lookback=lookback, horizon=horizon)
        if not part.has_targets:
            raise UserError(
                f"{series.source}: missing values leave the {name} part no window of {lookback} + {horizon} rows with "
                f"a value to forecast and without {_gap(max_gap)}: fill them, raise data.max_gap, or leave columns out"
            )
        windows[name] = part

    # Warn of all that was filled, assumed or left out.
    _warn_of_rows(series, filled, slice(None))
    for name, part in windows.items():
        if part.left_out:
            text = "%s: %d windows of the %s part left out: they touch %s"
            _logger.warning(text, series.source, part.left_out, name, _gap(max_gap))
    return windows, scaler


def last_window(series: Series, scaler: Scaler, lookback: int, max_gap: int) -> Tensor:
    """The last `lookback` rows, scaled, (1, lookback, m): what a model sees to forecast the rows after the table.

    Raises:
        UserError: the table has fewer rows, or a long gap in the last ones.
    """
    if len(series.values) < lookback:
        raise UserError(f"{series.source} has {len(series.values)} rows: the model sees {lookback}")
    filled = fill_gaps(series.values, max_gap)
    window = scaler.scale(filled)[-lookback:, : len(series.variates)]
    gaps = window.isnan().any(0)
    if gaps.any():
        name = series.columns[int(gaps.int().argmax())]
        raise UserError(
            f"{series.source}, column {name}: the last {lookback} rows, which the model sees, touch {_gap(max_gap)}: "
            "fill it"
        )
    _warn_of_rows(series, filled, slice(-lookback, None))
    return window[None]


def fill_gaps(values: np.ndarray, max_gap: int) -> np.ndarray:
    """Fill up to `max_gap` consecutive missing values with the value before them; a longer gap stays NaN throughout."""
    n = len(values)
    rows, missing = np.arange(n)[:, None], np.isnan(values)
    before = np.maximum.accumulate(np.where(missing, -1, rows), axis=0)
    after = np.minimum.accumulate(np.where(missing, n, rows)[::-1], axis=0)[::-1]
    fillable = missing & (before >= 0) & (after - before - 1 <= max_gap)
    return np.where(fillable, np.take_along_axis(values, before.clip(0), axis=0), values)


def calendar(dates: np.ndarray) -> Tensor:
    """The features named in CALENDAR, of dates (n,): (n, 5)."""
    days = (dates - np.datetime64("1970-01-05")) / DAY  # since a Monday
    day, week = 2 * np.pi * (days % 1), 2 * np.pi * (days / 7 % 1)
    weekend = (days % 7 >= 5).astype(float)
    return torch.from_numpy(np.stack([np.sin(day), np.cos(day), np.sin(week), np.cos(week), weekend], 1)).float()


def known_beforehand(dates: np.ndarray, known: Tensor, with_calendar: bool) -> Tensor:
    """What is known of dates (n,) before they come: the calendar, if wanted, and the scaled covariates (n, k)."""
    return torch.cat([calendar(dates), known], 1) if with_calendar else known


def _gap(max_gap: int) -> str:
    """The gaps that are not filled, in words."""
    return f"a gap of more than {max_gap} rows or at the start of the table"


def _warn_of_rows(series: Series, filled: np.ndarray, rows: slice) -> None:
    """Log a warning if, among these rows, values were filled in, dates repeat, or rows are unevenly spaced."""
    count = int(np.isnan(series.values[rows]).sum() - np.isnan(filled[rows]).sum())
    if count:
        _logger.warning("%s: %d missing values filled with the one before", series.source, count)
    steps = np.diff(series.dates[rows])
    again = int((steps == np.timedelta64(0)).sum())
    if again:
        _logger.warning("%s: %d rows have the date of the one before; taken as rows of their own", series.source, again)
    uneven = int((steps != series.step).sum()) - again
    if uneven and not series.frequency:
        hours = series.step / np.timedelta64(1, "h")
        _logger.warning(
            "%s: %d rows are not %g hours after the one before; taken as if they were", series.source, uneven, hours
        )
