"""A time series as a table: its columns at its dates, and the dates that come after it."""

import hashlib
import warnings
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from vim.errors import UserError, require

DAY = np.timedelta64(1, "D")


@dataclass
class Series:
    """A table of m variates and k covariates at n dates in ascending order.

    Attributes:
        dates: (n,), numpy's datetime64.
        values: (n, m + k) float64; NaN where nothing was observed.
        columns: the names of the m variates, then of the k covariates.
        source: the table's name in messages: a path or a built-in name.
        num_known: k, the number of columns that are known beforehand and not forecast.
        static: scaled covariates of the variates, (m, s).
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
        """The most frequent time between consecutive rows, in seconds."""
        return float(self.step / np.timedelta64(1, "s"))

    @property
    def step(self) -> np.timedelta64:
        """The most frequent time between consecutive rows."""
        steps, counts = np.unique(np.diff(self.dates), return_counts=True)
        return steps[counts.argmax()]

    def digest(self) -> str:
        """A hash of dates, values and static covariates, by which a resumed run recognises its table."""
        content = hashlib.sha256()
        for part in (self.dates.astype("datetime64[us]"), self.values, self.static):
            content.update(b"" if part is None else np.asarray(part).tobytes())
        return content.hexdigest()

    @property
    def frequency(self) -> str | None:
        """pandas' name for the spacing of the rows, such as "MS" for months; None if no one spacing fits all rows."""
        pandas = require("pandas", "a time series")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # pandas 3 announces another result type for pandas 4; either will do
            name = pandas.infer_freq(pandas.DatetimeIndex(self.dates))
            if name is None:
                return None
            # pandas takes any eight hours a day for business hours, so check that its name gives back the dates
            unit = np.datetime_data(self.dates.dtype)[0]  # pandas 2 takes nanoseconds, which end in 2262
            again = pandas.date_range(self.dates[0], periods=len(self.dates), freq=name, unit=unit)
            return name if (again == self.dates).all() else None


def select(series: Series, columns: list[str], num_known: int = 0) -> Series:
    """A table of these columns, in this order; the last `num_known` of them are known beforehand.

    Raises:
        UserError: a column is missing, or a column known beforehand has a missing value.
    """
    missing = [name for name in columns if name not in series.columns]
    if missing:
        raise UserError(f"{series.source} has no column {missing[0]}: expected {', '.join(columns)[:200]}")
    values = series.values[:, [series.columns.index(name) for name in columns]]
    m = len(columns) - num_known
    check_complete(values[:, m:], columns[m:], series.source)
    return Series(series.dates, values, columns, series.source, num_known)


def check_complete(values: np.ndarray, columns: list[str], source: str) -> None:
    """Refuse covariates (n, k) with missing values."""
    missing = np.isnan(values)
    for i in np.flatnonzero(missing.any(0)):
        count = missing[:, i].sum()
        raise UserError(
            f"{source}, column {columns[i]}: {count} values are missing: a covariate must be known everywhere"
        )


def dates_after(series: Series, count: int) -> np.ndarray:
    """The next `count` dates after a table's last row.

    They continue the spacing that pandas infers, such as months or working days. Where pandas infers none, they are the
    usual step apart; but a daily table without any weekend continues with working days, since single days may be
    missing in it, and a step of four weeks or more counts as months.
    """
    pandas = require("pandas", "a time series")
    frequency = series.frequency
    if frequency is None:
        frequency = pandas.Timedelta(series.step)
        if series.step == DAY and np.is_busday(series.dates.astype("datetime64[D]")).all():
            frequency = "B"
        elif series.step >= 28 * DAY:
            frequency = pandas.DateOffset(months=round(series.step / DAY / 30.44))  # the mean length of a month in days
    unit = np.datetime_data(series.dates.dtype)[0]
    return pandas.date_range(series.dates[-1], periods=count + 1, freq=frequency, unit=unit)[1:].to_numpy()
