"""pandas' frames as series, and forecasts as frames.

A wide frame has dates in a column `ds` or `date`, or as its index, and a column of numbers for each variate. A long
frame has the columns `unique_id`, `ds` and `y`, one series below the other, as in Nixtla's packages.
"""

import logging
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from vim.data.series.csv import LONG, from_table
from vim.data.series.table import Series
from vim.errors import UserError, require

if TYPE_CHECKING:
    import pandas

SOURCE = "the frame"  # in messages

_logger = logging.getLogger(__name__)


def is_long(frame: "pandas.DataFrame") -> bool:
    """Return whether a frame has its series one below the other."""
    return "unique_id" in frame.columns


def _date_column(frame: "pandas.DataFrame") -> str | None:
    """Return the name of a frame's column of dates, None if they are its index.

    Raises:
        UserError: it has no dates, or is long and lacks `ds` or `y`.
    """
    for name in LONG if is_long(frame) else ():
        if name not in frame.columns:
            raise UserError(f"{SOURCE} has a unique_id and no column {name}: a long frame has {', '.join(LONG)}")
    for name in ("ds", "date"):
        if name in frame.columns:
            return name
    if frame.index.dtype.kind == "M":
        return None
    raise UserError(f"{SOURCE} has no column ds, only {', '.join(map(str, frame.columns))[:200]}")


def _widen(frame: "pandas.DataFrame") -> "pandas.DataFrame":
    """Return a frame with a column `date` and a column for each series, whose names are strings."""
    if not isinstance(frame, require("pandas", "a frame").DataFrame):
        raise UserError(f"a pandas.DataFrame expected, got {type(frame).__module__}.{type(frame).__name__}")
    column = _date_column(frame)
    dates = frame.index if column is None else frame[column]
    if getattr(dates.dtype, "tz", None) is not None:
        raise UserError(f"{SOURCE} has dates in the time zone {dates.dtype.tz}: take it off, by tz_localize(None)")
    wide = frame if column is None else frame.set_index(column)
    if is_long(frame):
        wrong = frame["unique_id"].isna() | frame.duplicated(["unique_id", "ds"])
        if wrong.any():
            row = frame[wrong].iloc[0]
            raise UserError(f"{SOURCE} has no unique_id, or several rows, for {row['unique_id']} at {row['ds']}")
        wide = frame.pivot(index="ds", columns="unique_id", values="y")
    names = [str(name) for name in wide.columns]
    if len(set(names)) < len(names):
        raise UserError(f"{SOURCE} has several columns or series of one name, among {', '.join(names)[:200]}")
    if "date" in names:
        raise UserError(f"{SOURCE} has a column or a series named date beside its dates: rename it, or leave it out")
    return wide.set_axis(names, axis=1).reset_index(names="date")


def series_of_frame(frame: "pandas.DataFrame", without_values: int = 0) -> Series:
    """Return a frame as a series, from the first row on that has a value of every column.

    Args:
        without_values: this many rows at the end may lack values.

    Raises:
        UserError: it lacks a column or a value, or its dates are not those of one frequency, each once.
    """
    series = from_table(_widen(frame), SOURCE)
    uneven = np.flatnonzero(np.diff(series.dates) != series.step)
    if len(uneven) and series.frequency is None:
        before, after = series.dates[uneven[0] :][:2].astype("datetime64[s]")
        raise UserError(
            f"{SOURCE} has irregular dates: {after} follows {before}, and most rows are {series.seconds:g} s apart: "
            "add the missing rows, such as by asfreq, and merge those with the same date"
        )
    missing = np.isnan(series.values)
    first, end = int(missing.argmin(0).max()), len(missing) - without_values
    for row, i in np.argwhere(missing[first:end])[:1] + [first, 0]:
        date = series.dates[row].astype("datetime64[s]")
        raise UserError(f"{SOURCE} has no value of {series.columns[i]} at {date}: fill it, or drop the series")
    if first:
        late = series.columns[int(missing.argmin(0).argmax())]
        _logger.warning("%s: %d rows left out, which are before the first of %s", SOURCE, first, late)
    return replace(series, dates=series.dates[first:], values=series.values[first:])


def frame_like(frame: "pandas.DataFrame", dates: np.ndarray, forecasts: Mapping[str, np.ndarray]) -> "pandas.DataFrame":
    """Return forecasts by name, (h,) each, at dates (h,), in the form of a frame."""
    pandas, column = require("pandas", "a frame"), _date_column(frame)
    names = {str(name): name for name in (frame["unique_id"].unique() if is_long(frame) else frame.columns)}
    index = pandas.DatetimeIndex(dates, name=column or frame.index.name)
    wide = pandas.DataFrame({names[name]: values for name, values in forecasts.items()}, index=index)
    if is_long(frame):
        long = wide.rename_axis("unique_id", axis=1).unstack().rename("TSM2").reset_index()
        return long.astype({"unique_id": frame["unique_id"].dtype})
    return wide if column is None else wide.reset_index()
