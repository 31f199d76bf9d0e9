"""Time series from tables: read, checked, split, scaled, and cut into windows.

The splits and the scaling are those of the long-horizon benchmarks (Informer, https://arxiv.org/abs/2012.07436).
"""

import hashlib
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
from torch.nn.functional import pad

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
LARGEST = 1e30  # its square overflows no float64
CLOCK = r"[T ]\d\d?(?::\d\d){0,2}(?:\.\d+)?"
OFFSET = r"Z|[+-]\d\d:?\d\d"
YEAR_FIRST = rf"\d{{4}}(?:(?:-\d\d?){{1,2}}|(?:/\d\d?){{2}}|\d{{4}})?(?:{CLOCK})?(?: ?(?:{OFFSET}))?"

_logger = logging.getLogger(__name__)


@dataclass
class Series:
    """A table of m variates, and k covariates, at n dates in order.

    Attributes:
        dates: (n,), numpy's datetime64.
        values: (n, m + k) float64; NaN where nothing was observed.
        columns: the names of the m variates, then of the k covariates.
        source: what to call it in messages.
        num_known: k, columns that are known beforehand, and not forecast.
        static: covariates of the variates, (m, s), scaled.
    """

    dates: np.ndarray
    values: np.ndarray
    columns: list[str]
    source: str
    num_known: int = 0
    static: Tensor | None = None

    @property
    def variates(self) -> list[str]:
        """The names of the m columns to forecast."""
        return self.columns[: len(self.columns) - self.num_known]

    @property
    def seconds(self) -> float:
        """The usual time from one row to the next."""
        return float(self.step / np.timedelta64(1, "s"))

    @property
    def step(self) -> np.timedelta64:
        """The usual time from one row to the next."""
        steps, counts = np.unique(np.diff(self.dates), return_counts=True)
        return steps[counts.argmax()]

    def digest(self) -> str:
        """Of dates, values and static covariates: a table with another digest is another table."""
        content = hashlib.sha256()
        for part in (self.dates.astype("datetime64[us]"), self.values, self.static):
            content.update(b"" if part is None else np.asarray(part).tobytes())
        return content.hexdigest()

    @property
    def frequency(self) -> str | None:
        """What pandas calls the distance of all rows, which months or working days have too; None for none."""
        pandas = _pandas()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # pandas 3 announces another type for pandas 4; either will do
            name = pandas.infer_freq(pandas.DatetimeIndex(self.dates))
            if name:  # business hours, it says of any eight hours a day
                again = pandas.date_range(self.dates[0], periods=len(self.dates), freq=name)
                return name if (again == self.dates).all() else None
            return None


class Batch(NamedTuple):
    """Some windows, with t steps to see and h to forecast; `observed` says which of the latter were not filled in.

    `future` is what is known beforehand of the latter, `static` of the variates.
    """

    x: Tensor  # (b, t, m)
    y: Tensor  # (b, h, m)
    observed: Tensor  # (b, h, m)
    future: Tensor  # (b, h, c)
    static: Tensor | None  # (m, s)


def read_series(path: Path, only: list[str] | None = None) -> Series:
    """Read a CSV file with a column `date` and columns of numbers, an empty field being a missing value.

    Args:
        only: leave out columns that are none of these, whatever is in them.

    Raises:
        UserError: no such file, or no such table: without dates, with other than numbers, dates out of order.
    """
    return from_table(_read_table(path, "date"), str(path), only)


def _read_table(path: Path, text: str) -> Any:
    """A pandas table, whose column `text` is not made into numbers."""
    pandas = _pandas()
    if not path.is_file():
        raise UserError(f"no such file: {path}")
    header = _read_csv(path, header=None, nrows=1, dtype=str, keep_default_na=False).iloc[0].tolist()
    if len(header) == 1 and ";" in header[0]:
        raise UserError(f"{path} has one column, {header[0][:200]}: is it separated by semicolons? Commas are expected")
    table = _read_csv(path, dtype={text: str})
    if not isinstance(table.index, pandas.RangeIndex):  # pandas takes what is too much for an index
        raise UserError(f"cannot read {path} as a CSV file: its rows have more fields than its header has names")
    if "" in header:
        raise UserError(f"{path}, column {header.index('') + 1} has no name: leave it out (index=False in pandas)")
    twice = [name for name in header if header.count(name) > 1]
    if twice:  # pandas would rename one
        raise UserError(
            f"{path} has {header.count(twice[0])} columns named {twice[0]}: rename or leave out all but one"
        )
    return table


def _read_csv(path: Path, **options: Any) -> Any:
    try:
        return _pandas().read_csv(path, **options)
    except (ValueError, UnicodeDecodeError) as error:  # pandas's own errors are ValueErrors
        raise UserError(f"cannot read {path} as a CSV file: {one_line(str(error))}") from error


def from_table(table: Any, source: str, only: list[str] | None = None) -> Series:
    """Check a pandas table, as :func:`read_series` does."""
    columns = _without("date", table, source)
    dates = _dates(table["date"], source)
    columns = [name for name in columns if only is None or name in only]
    series = Series(dates, _numbers(table, columns, source), columns, source)
    if not series.step:
        raise UserError(f"{source}: most rows have the date of the row before: expected a row for each date")
    return series


def _without(label: str, table: Any, source: str) -> list[str]:
    """The names of the columns of numbers, beside the one of labels."""
    names = [str(name) for name in table.columns]
    if label not in names:
        alike = [name for name in names if name.strip().lower() == label]
        advice = f": rename {alike[0]!r} to {label}" if alike else ""
        raise UserError(f"{source} has no column named {label}, only {', '.join(names)[:200]}{advice}")
    if len(names) == 1:
        raise UserError(f"{source} has no column beside {label}: expected columns of numbers")
    return [name for name in names if name != label]


def _numbers(table: Any, columns: list[str], source: str) -> np.ndarray:
    pandas = _pandas()
    values = np.empty((len(table), len(columns)))
    for i, name in enumerate(columns):
        numbers = pandas.to_numeric(table[name], errors="coerce").to_numpy(float, na_value=np.nan)
        wrong = (np.isnan(numbers) & table[name].notna().to_numpy()) | (np.abs(numbers) > LARGEST)
        if wrong.any():
            row = int(wrong.argmax())
            raise UserError(
                f"{source}, row {row + 1}, column {name}: a number up to {LARGEST:g} expected, got "
                f"{table[name].iloc[row]}; mend it, or leave the column out"
            )
        values[:, i] = numbers
    return values


def _dates(texts: Any, source: str) -> np.ndarray:
    pandas = _pandas()
    texts = texts.astype(str).str.strip()
    if len(texts) < 3:
        raise UserError(f"{source} has {len(texts)} rows: expected three at least")
    offsets = texts.str.extract(rf"(?:{CLOCK}) ?({OFFSET})$", expand=False).dropna().unique()
    if len(offsets) > 1:
        raise UserError(
            f"{source} has dates of several offsets from UTC ({', '.join(offsets[:3])}), as daylight saving makes "
            "them: write all of them in UTC"
        )
    try:
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            dates = pandas.to_datetime(texts, errors="coerce").dt.tz_localize(None).to_numpy()
        guessed = any("Could not infer" in str(warning.message) for warning in told)  # each date by itself
    except (ValueError, TypeError, AttributeError):
        guessed, dates = True, np.full(len(texts), np.datetime64("NaT"))
    wrong = np.isnat(dates) | ~texts.str.fullmatch(YEAR_FIRST).to_numpy(bool) | guessed
    if wrong.any():
        row = int(wrong.argmax())
        alike = ", written as that of row 1," if row else ""
        raise UserError(
            f"{source}, row {row + 1}: a date with the year first{alike} expected, got {texts.iloc[row]}: "
            "write it as 2020-01-31 23:00"
        )
    back = np.diff(dates) < np.timedelta64(0)
    if back.any():
        row = int(back.argmax()) + 1
        raise UserError(
            f"{source}, row {row + 1}: its date {texts.iloc[row]} comes before that of row {row}: sort the rows by "
            "date, and where clocks were set back, write dates in UTC"
        )
    return dates


def _pandas() -> Any:
    try:
        import pandas
    except ImportError:
        raise UserError(f"reading series takes pandas: {EXTRA}") from None
    return pandas


def victoria_electricity() -> Series:
    """The electricity demand of Victoria, Australia: 3,600 hours of January to May 2012.

    Each is the sum of two half-hourly readings, twice their mean.

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

    The rows are 0.05 apart, some fifteen to an oscillation, and dated as if they were minutes. By hand, and not by a
    library's solver, whose next release would round otherwise: of a chaotic system, that makes another series.

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


def load_series(dataset: str, file: str | None = None, only: list[str] | None = None) -> Series:
    """The table named `dataset`: one of BUILT_IN, or "csv", of which `only` these columns are read from `file`.

    Raises:
        UserError: no such table; or see :func:`read_series`.
    """
    if dataset in BUILT_IN:
        return BUILT_IN[dataset]()
    if dataset != "csv":
        raise UserError(f"data.dataset must be 'csv' or one of {', '.join(map(repr, BUILT_IN))}, got {dataset!r}")
    if not file:
        raise UserError("data.file must name the CSV file: --cfg-options data.file=PATH")
    return read_series(Path(file), only)


def read_static(path: Path, variates: list[str]) -> Tensor:
    """Read covariates (m, s) of m variates, scaled over these, from a CSV file.

    It has a row for each variate, whose name is in the column `column`, and columns of numbers.

    Raises:
        UserError: no such file or table, a variate without its one row, or a missing value.
    """
    table = _read_table(path, "column")
    columns = _without("column", table, str(path))
    names = table["column"].tolist()
    for name in variates:
        if names.count(name) != 1:
            raise UserError(f"{path}: a row for each variate expected, {names.count(name)} found for {name}")
    values = _numbers(table, columns, str(path))[[names.index(name) for name in variates]]
    _check_whole(values, columns, str(path))
    return Scaler.of(values, columns, str(path)).scale(values)


def _check_whole(values: np.ndarray, columns: list[str], source: str) -> None:
    """Refuse covariates with missing values."""
    missing = np.isnan(values)
    for i in np.flatnonzero(missing.any(0)):
        count = missing[:, i].sum()
        raise UserError(
            f"{source}, column {columns[i]}: {count} values are missing: a covariate must be known everywhere"
        )


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


def known_beforehand(dates: np.ndarray, known: Tensor, with_calendar: bool) -> Tensor:
    """What a model may know of dates (n,): the scaled covariates (n, k), after the calendar if wanted."""
    return torch.cat([calendar(dates), known], 1) if with_calendar else known


class Scaler(NamedTuple):
    """Means and standard deviations of the columns, float64."""

    mean: Tensor
    std: Tensor

    @classmethod
    def of(cls, values: np.ndarray, columns: list[str], source: str) -> "Scaler":
        """Those of rows (n, m), missing values aside; a constant column is only shifted.

        Raises:
            UserError: a column without any value.
        """
        missing = np.isnan(values)
        for i in np.flatnonzero(missing.all(0)):
            raise UserError(f"{source}: column {columns[i]} has no value: leave it out")
        count = (~missing).sum(0)
        mean = np.where(missing, 0.0, values).sum(0) / count
        std = np.sqrt(np.where(missing, 0.0, (values - mean) ** 2).sum(0) / count)
        constant = std <= 1e-12 * np.abs(mean).clip(1e-300)
        if constant.any():
            names = ", ".join(columns[i] for i in np.flatnonzero(constant)[:5])
            _logger.warning("%s: constant, and only shifted: %s", source, names)
        return cls(torch.from_numpy(mean), torch.from_numpy(np.where(constant, 1.0, std)))

    def scale(self, values: np.ndarray) -> Tensor:
        """Values (n, m) as float32, with mean 0 and standard deviation 1 where they were taken from."""
        return ((torch.from_numpy(values) - self.mean) / self.std).float()

    def unscale(self, values: Tensor) -> Tensor:
        """Scaled values of the first columns, (..., m), in their own units, float64."""
        m = values.shape[-1]
        return values.double() * self.std[:m] + self.mean[:m]


class Windows:
    """Every stretch of lookback + horizon rows between two borders, one row apart, that has no long gap.

    Attributes:
        starts: the first row of each window.
        left_out: how many windows touch a gap.
        asks: whether any value to forecast was observed.
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
        gaps, seen = (pad(rows.any(1).long().cumsum(0), (1, 0)) for rows in (values.isnan(), observed))
        whole = gaps[starts + length] == gaps[starts]
        self.starts, self.left_out = starts[whole], int((~whole).sum())
        self.asks = bool((seen[self.starts + length] > seen[self.starts + lookback]).any())

    def __len__(self) -> int:
        return len(self.starts)

    def batch(self, indices: Tensor) -> Batch:
        """The windows of these indices, (b,)."""
        rows = self.starts[indices][:, None]
        seen = rows + torch.arange(self.lookback)
        ahead = rows + self.lookback + torch.arange(self.horizon)
        return Batch(self.values[seen], self.values[ahead], self.observed[ahead], self.future[ahead], self.static)


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
    with_calendar: bool = False,
    scaler: Scaler | None = None,
) -> tuple[dict[str, Windows], Scaler]:
    """The windows of each part, scaled by the training part's, or another run's, means and standard deviations.

    Up to `max_gap` missing values in a row are filled with the one before; they are seen, and not asked for. Windows
    that touch a longer gap are left out.

    Raises:
        UserError: a part has no window, or none that asks for a value that was observed.
    """
    parts = borders(split, len(series.values), lookback, series.source)
    m = len(series.variates)
    filled = fill_gaps(series.values, max_gap)
    observed = torch.from_numpy(~np.isnan(series.values[:, :m]))
    if scaler is None:
        scaler = Scaler.of(series.values[slice(*parts[0])], series.columns, f"{series.source}, training part")
    scaled = scaler.scale(filled)
    values, future = scaled[:, :m], known_beforehand(series.dates, scaled[:, m:], with_calendar)
    windows = {}
    for name, rows in zip(PARTS, parts, strict=True):
        if rows[1] - rows[0] < lookback + horizon:
            raise UserError(
                f"{series.source}: the {name} part has {rows[1] - rows[0]} rows (of {len(scaled)}, the lookback before "
                f"it included), and a window takes {lookback} + {horizon}: lower data.horizon or data.lookback"
            )
        part = Windows(values, observed, future, series.static, rows, lookback=lookback, horizon=horizon)
        if not part.asks:
            raise UserError(
                f"{series.source}: missing values leave the {name} part no window of {lookback} + {horizon} rows with "
                f"a value to forecast and without {_gap(max_gap)}: fill them, raise data.max_gap, or leave columns out"
            )
        windows[name] = part
    _tell(series, filled, slice(None))
    for name, part in windows.items():
        if part.left_out:
            _logger.warning(
                "%s: %d windows of the %s part left out: they touch %s",
                series.source,
                part.left_out,
                name,
                _gap(max_gap),
            )
    return windows, scaler


def _gap(max_gap: int) -> str:
    """What is not filled, in words."""
    return f"a gap of more than {max_gap} rows or at the start of the table"


def _tell(series: Series, filled: np.ndarray, rows: slice) -> None:
    """What was mended in these rows, and which of them are not as far apart as the others."""
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


def last_window(series: Series, scaler: Scaler, lookback: int, max_gap: int) -> Tensor:
    """The last `lookback` rows, scaled, (1, lookback, m), to forecast what comes after them.

    Raises:
        UserError: fewer rows, or a long gap in them.
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
    _tell(series, filled, slice(-lookback, None))
    return window[None]


def dates_after(series: Series, count: int) -> np.ndarray:
    """The dates of the rows to come: as pandas infers them (months, working days), else the usual step apart.

    Days without any weekend are working days, though some may be missing, and steps from four weeks are months.
    """
    pandas = _pandas()
    frequency: Any = series.frequency
    if frequency is None:
        frequency = pandas.Timedelta(series.step)
        if series.step == DAY and np.is_busday(series.dates.astype("datetime64[D]")).all():
            frequency = "B"
        elif series.step >= 28 * DAY:
            frequency = pandas.DateOffset(months=round(series.step / DAY / 30.44))
    return pandas.date_range(series.dates[-1], periods=count + 1, freq=frequency)[1:].to_numpy()


def select(series: Series, columns: list[str], num_known: int = 0) -> Series:
    """These columns of a table, in this order, the last of which are known beforehand.

    Raises:
        UserError: one is missing; or a value is, in what is known beforehand.
    """
    missing = [name for name in columns if name not in series.columns]
    if missing:
        raise UserError(f"{series.source} has no column {missing[0]}: expected {', '.join(columns)[:200]}")
    values = series.values[:, [series.columns.index(name) for name in columns]]
    m = len(columns) - num_known
    _check_whole(values[:, m:], columns[m:], series.source)
    return Series(series.dates, values, columns, series.source, num_known)
