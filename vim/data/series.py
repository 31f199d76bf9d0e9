"""Time series from tables: read, checked, split, scaled, and cut into windows.

The splits and the scaling are those of the long-horizon benchmarks (Informer, https://arxiv.org/abs/2012.07436).
"""

import logging
import warnings
from dataclasses import dataclass
from importlib.resources import files
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from vim.errors import UserError, one_line

EXTRA = "pip install 'vim-zoo[series]'"
MONTH = 30 * 24  # hours
SPLITS = {
    "etth": (12 * MONTH, 4 * MONTH, 4 * MONTH),  # rows of training, validation and test; later rows are left alone
    "ettm": (48 * MONTH, 16 * MONTH, 16 * MONTH),
    "ratio": (0.7, 0.1, 0.2),
}
PARTS = ("train", "val", "test")
DAY = np.timedelta64(1, "D")

_logger = logging.getLogger(__name__)


@dataclass
class Series:
    """A table of m variates at n dates in order.

    Attributes:
        dates: (n,), numpy's datetime64.
        values: (n, m) float64; NaN where nothing was observed.
        source: what to call it in messages.
    """

    dates: np.ndarray
    values: np.ndarray
    columns: list[str]
    source: str

    @property
    def step(self) -> np.timedelta64:
        """The usual time from one row to the next."""
        steps, counts = np.unique(np.diff(self.dates), return_counts=True)
        return steps[counts.argmax()]


class Batch(NamedTuple):
    """Some windows, with t steps to see and h to forecast; `observed` says which of the latter were not filled in."""

    x: Tensor  # (b, t, m)
    y: Tensor  # (b, h, m)
    observed: Tensor  # (b, h, m)
    calendar: Tensor  # (b, h, c)


def read_series(path: Path) -> Series:
    """Read a CSV file with a column `date` and columns of numbers, an empty field being a missing value.

    Raises:
        UserError: no such file, or no such table: without dates, with other than numbers, dates out of order or twice.
    """
    pandas = _pandas()
    if not path.is_file():
        raise UserError(f"no such file: {path}")
    try:
        table = pandas.read_csv(path, dtype={"date": str})
    except (ValueError, UnicodeDecodeError) as error:  # pandas's own errors are ValueErrors
        raise UserError(f"cannot read {path} as a CSV file: {one_line(str(error))}") from error
    if not isinstance(table.index, pandas.RangeIndex):  # pandas takes what is too much for an index
        raise UserError(f"cannot read {path} as a CSV file: its rows have more fields than its header has names")
    return from_table(table, str(path))


def from_table(table: Any, source: str) -> Series:
    """Check a pandas table, as :func:`read_series` does."""
    pandas = _pandas()
    if "date" not in table:
        raise UserError(f"{source} has no column named date, only {', '.join(map(str, table.columns))[:200]}")
    dates = _dates(table["date"], source)
    columns = [str(name) for name in table.columns if name != "date"]
    if not columns:
        raise UserError(f"{source} has no column beside date: expected columns of numbers")
    values = np.empty((len(table), len(columns)))
    for i, name in enumerate(columns):
        numbers = pandas.to_numeric(table[name], errors="coerce").to_numpy(float, na_value=np.nan)
        wrong = (np.isnan(numbers) & table[name].notna().to_numpy()) | np.isinf(numbers)
        if wrong.any():
            row = int(wrong.argmax())
            raise UserError(
                f"{source}, row {row + 1}, column {name}: a finite number expected, got {table[name].iloc[row]}; "
                "mend it, or leave the column out"
            )
        values[:, i] = numbers
    return Series(dates, values, columns, source)


def _dates(texts: Any, source: str) -> np.ndarray:
    pandas = _pandas()
    try:
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            dates = pandas.to_datetime(texts, errors="coerce").dt.tz_localize(None).to_numpy("datetime64[ns]")
        if any("Could not infer" in str(warning.message) for warning in told):  # it guessed each date by itself
            raise ValueError
    except (ValueError, TypeError, AttributeError):
        raise UserError(f"{source}: dates such as 2020-01-31 23:00 expected, got {texts.iloc[0]}") from None
    missing = np.isnat(dates)
    if missing.any():
        row = int(missing.argmax())
        raise UserError(f"{source}, row {row + 1}: a date written as that of row 1 expected, got {texts.iloc[row]}")
    steps = np.diff(dates).astype(int)
    if (steps <= 0).any():
        row = int((steps <= 0).argmax()) + 1
        problem, advice = "comes before", "sort the rows by date"
        if steps[row - 1] == 0:
            problem, advice = "is the same as", "keep one of the two rows"
        raise UserError(f"{source}, row {row + 1}: its date {texts.iloc[row]} {problem} that of row {row}: {advice}")
    if len(dates) < 3:
        raise UserError(f"{source} has {len(dates)} rows: expected three at least")
    return dates


def _pandas() -> Any:
    try:
        import pandas
    except ImportError:
        raise UserError(f"reading series takes pandas: {EXTRA}") from None
    return pandas


def victoria_electricity() -> Series:
    """The electricity demand of Victoria, Australia, in MW: 3,600 hours of January to May 2012.

    Source: the R package tsibbledata (AEMO), as packed by statsmodels for its tests of MSTL.

    Raises:
        UserError: statsmodels is not installed.
    """
    table = _packed("statsmodels", "tsa/stl/tests/results/mstl_elec_vic.csv")
    return from_table(table.rename(columns={"ds": "date", "y": "demand"}), "vic_elec")


def seattle_temperature() -> Series:
    """The temperature of Seattle, in °F: 8,759 hours of 2010; usual values, not a year's weather.

    Source: NOAA's climate normals, as packed by vega-datasets.

    Raises:
        UserError: vega-datasets is not installed.
    """
    return from_table(_packed("vega_datasets", "_data/seattle-temps.csv"), "seattle_temps")


def _packed(package: str, path: str) -> Any:
    """A table in an installed package, which is not run."""
    pandas = _pandas()
    try:
        return pandas.read_csv(str(files(package) / path))
    except (ImportError, FileNotFoundError):
        raise UserError(f"this data comes with {package.replace('_', '-')}: {EXTRA}") from None


def lorenz(n: int = 6000, step: float = 0.05) -> Series:
    """Lorenz's system in its chaotic state, three variates, simulated by the fourth-order Runge-Kutta method.

    The rows are 0.05 apart, some fifteen to an oscillation, and dated as if they were minutes.

    Source: E. N. Lorenz, Deterministic Nonperiodic Flow, 1963.
    """

    def velocity(state: np.ndarray) -> np.ndarray:
        x, y, z = state
        return np.array([10 * (y - x), x * (28 - z) - y, x * y - 8 / 3 * z])

    substeps = 10
    dt, state, values = step / substeps, np.array([1.0, 1.0, 1.0]), np.empty((n + 100, 3))
    for i in range(len(values) * substeps):
        k1 = velocity(state)
        k2 = velocity(state + dt / 2 * k1)
        k3 = velocity(state + dt / 2 * k2)
        k4 = velocity(state + dt * k3)
        state = state + dt / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
        values[i // substeps] = state
    dates = np.datetime64("2000-01-01", "ns") + np.arange(n) * np.timedelta64(1, "m")
    return Series(dates, values[100:], ["x", "y", "z"], "lorenz")  # the first are not yet on the attractor


BUILT_IN = {"vic_elec": victoria_electricity, "seattle_temps": seattle_temperature, "lorenz": lorenz}


def load_series(dataset: str, file: str | None = None) -> Series:
    """The table named `dataset`: one of BUILT_IN, or "csv", which is read from `file`.

    Raises:
        UserError: no such table; or see :func:`read_series`.
    """
    if dataset in BUILT_IN:
        return BUILT_IN[dataset]()
    if dataset != "csv":
        raise UserError(f"data.dataset must be 'csv' or one of {', '.join(map(repr, BUILT_IN))}, got {dataset!r}")
    if not file:
        raise UserError("data.file must name the CSV file: --cfg-options data.file=PATH")
    return read_series(Path(file))


def fill_gaps(values: np.ndarray, max_gap: int) -> np.ndarray:
    """Fill up to so many missing values in a row with the last one before them; longer gaps stay NaN, whole."""
    n = len(values)
    rows, missing = np.arange(n)[:, None], np.isnan(values)
    before = np.maximum.accumulate(np.where(missing, -1, rows), axis=0)
    after = np.minimum.accumulate(np.where(missing, n, rows)[::-1], axis=0)[::-1]
    fillable = missing & (before >= 0) & (after - before - 1 <= max_gap)
    return np.where(fillable, np.take_along_axis(values, before.clip(0), axis=0), values)


CALENDAR = ("sine of the day", "cosine of the day", "sine of the week", "cosine of the week", "weekend")


def calendar(dates: np.ndarray) -> Tensor:
    """What is known of dates (n,) beforehand, as CALENDAR, (n, 5)."""
    days = (dates - np.datetime64("1970-01-05")) / DAY  # from a Monday
    day, week = 2 * np.pi * (days % 1), 2 * np.pi * (days / 7 % 1)
    weekend = (days % 7 >= 5).astype(float)
    return torch.from_numpy(np.stack([np.sin(day), np.cos(day), np.sin(week), np.cos(week), weekend], 1)).float()


class Scaler(NamedTuple):
    """Means and standard deviations of the m columns, float64."""

    mean: Tensor
    std: Tensor

    @classmethod
    def of(cls, values: np.ndarray, columns: list[str], source: str) -> "Scaler":
        """Those of the training part, (n, m), missing values aside; a constant column is only shifted.

        Raises:
            UserError: a column without any value.
        """
        missing = np.isnan(values)
        for i in np.flatnonzero(missing.all(0)):
            raise UserError(f"{source}: column {columns[i]} has no value in the training part: leave it out")
        count = (~missing).sum(0)
        mean = np.where(missing, 0.0, values).sum(0) / count
        std = np.sqrt(np.where(missing, 0.0, (values - mean) ** 2).sum(0) / count)
        constant = std <= 1e-12 * np.abs(mean).clip(1e-300)
        if constant.any():
            names = ", ".join(columns[i] for i in np.flatnonzero(constant)[:5])
            _logger.warning("%s: constant in the training part, and only shifted: %s", source, names)
        return cls(torch.from_numpy(mean), torch.from_numpy(np.where(constant, 1.0, std)))

    def scale(self, values: np.ndarray) -> Tensor:
        """Values (n, m) as float32, with the training part's mean 0 and standard deviation 1."""
        return ((torch.from_numpy(values) - self.mean) / self.std).float()

    def unscale(self, values: Tensor) -> Tensor:
        """Scaled values (..., m) in their own units, float64."""
        return values.double() * self.std + self.mean


class Windows:
    """Every stretch of lookback + horizon rows between two borders, one row apart, that has no long gap.

    Attributes:
        starts: the first row of each window.
        left_out: how many windows touch a gap.
    """

    def __init__(
        self,
        values: Tensor,
        observed: Tensor,
        dates: np.ndarray,
        borders: tuple[int, int],
        *,
        lookback: int,
        horizon: int,
    ) -> None:
        self.values, self.observed, self.calendar = values, observed, calendar(dates)
        self.lookback, self.horizon = lookback, horizon
        length = lookback + horizon
        starts = torch.arange(borders[0], borders[1] - length + 1)
        gaps = values.isnan().any(1).long().cumsum(0)
        gaps = torch.cat([gaps.new_zeros(1), gaps])
        whole = gaps[starts + length] == gaps[starts]
        self.starts, self.left_out = starts[whole], int((~whole).sum())

    def __len__(self) -> int:
        return len(self.starts)

    def batch(self, indices: Tensor) -> Batch:
        """The windows of these indices, (b,)."""
        rows = self.starts[indices][:, None]
        seen = rows + torch.arange(self.lookback)
        ahead = rows + self.lookback + torch.arange(self.horizon)
        return Batch(self.values[seen], self.values[ahead], self.observed[ahead], self.calendar[ahead])


def borders(split: str, n: int, lookback: int, source: str) -> list[tuple[int, int]]:
    """The rows of the training, the validation and the test part; the latter two with the `lookback` rows before them.

    Raises:
        UserError: no such split, or fewer rows than it takes.
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
    scaler: Scaler | None = None,
) -> tuple[dict[str, Windows], Scaler]:
    """The windows of each part, scaled by the training part's, or another run's, means and standard deviations.

    Up to `max_gap` missing values in a row are filled with the one before; they are seen, and not asked for. Windows
    that touch a longer gap are left out.

    Raises:
        UserError: a part has no window.
    """
    parts = borders(split, len(series.values), lookback, series.source)
    filled = fill_gaps(series.values, max_gap)
    observed = torch.from_numpy(~np.isnan(series.values))
    if scaler is None:
        scaler = Scaler.of(series.values[slice(*parts[0])], series.columns, series.source)
    scaled = scaler.scale(filled)
    windows = {}
    for name, rows in zip(PARTS, parts, strict=True):
        if rows[1] - rows[0] < lookback + horizon:
            raise UserError(
                f"{series.source}: the {name} part has {rows[1] - rows[0]} rows (of {len(scaled)}, the lookback before "
                f"it included), and a window takes {lookback} + {horizon}: lower data.horizon or data.lookback"
            )
        windows[name] = Windows(scaled, observed, series.dates, rows, lookback=lookback, horizon=horizon)
        if not len(windows[name]):
            raise UserError(
                f"{series.source}: gaps of more than {max_gap} missing values leave the {name} part no window of "
                f"{lookback} + {horizon} rows: fill them, raise data.max_gap, or leave the column out"
            )
    _tell(series, filled, windows)
    return windows, scaler


def _tell(series: Series, filled: np.ndarray, windows: dict[str, Windows]) -> None:
    """What was mended or left out."""
    count = int(np.isnan(series.values).sum() - np.isnan(filled).sum())
    left_out = {name: part.left_out for name, part in windows.items() if part.left_out}
    uneven = int((np.diff(series.dates) != series.step).sum())
    if count:
        _logger.warning("%s: %d missing values filled with the one before", series.source, count)
    for name, number in left_out.items():
        _logger.warning("%s: %d windows of the %s part left out: they touch a long gap", series.source, number, name)
    if uneven:
        hours = series.step / np.timedelta64(1, "h")
        _logger.warning(
            "%s: %d rows are not %g hours after the one before; taken as if they were", series.source, uneven, hours
        )


def last_window(series: Series, scaler: Scaler, lookback: int, max_gap: int) -> Tensor:
    """The last `lookback` rows, scaled, (1, lookback, m), to forecast what comes after them.

    Raises:
        UserError: fewer rows, or a long gap in them.
    """
    if len(series.values) < lookback:
        raise UserError(f"{series.source} has {len(series.values)} rows: the model sees {lookback}")
    window = scaler.scale(fill_gaps(series.values, max_gap))[-lookback:]
    gaps = window.isnan().any(0)
    if gaps.any():
        name = series.columns[int(gaps.int().argmax())]
        raise UserError(
            f"{series.source}, column {name}: more than {max_gap} values in a row are missing in the last {lookback} "
            "rows: fill them"
        )
    return window[None]


def dates_after(series: Series, count: int) -> np.ndarray:
    """The dates of the rows to come: as pandas infers them (months, working days), else the usual step apart."""
    pandas = _pandas()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # pandas 3 announces another type for pandas 4; either will do
        frequency = pandas.infer_freq(pandas.DatetimeIndex(series.dates)) or pandas.Timedelta(series.step)
    return pandas.date_range(series.dates[-1], periods=count + 1, freq=frequency)[1:].to_numpy()


def select(series: Series, columns: list[str]) -> Series:
    """These columns of a table, in this order.

    Raises:
        UserError: one is missing.
    """
    missing = [name for name in columns if name not in series.columns]
    if missing:
        raise UserError(
            f"{series.source} has no column {missing[0]}: the model was trained on {', '.join(columns)[:200]}"
        )
    indices = [series.columns.index(name) for name in columns]
    return Series(series.dates, series.values[:, indices], columns, series.source)
