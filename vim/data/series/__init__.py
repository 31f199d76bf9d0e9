"""Time series: tables in, scaled windows out."""

from vim.data.series.built_in import BUILT_IN, load_series
from vim.data.series.csv import read_series, read_static
from vim.data.series.frames import frame_like, is_long, series_of_frame
from vim.data.series.scaling import Scaler
from vim.data.series.table import DAY, Series, dates_after, select
from vim.data.series.windows import (
    CALENDAR,
    SPLITS,
    Batch,
    Windows,
    build_windows,
    calendar,
    known_beforehand,
    last_window,
)

__all__ = [
    "BUILT_IN",
    "CALENDAR",
    "DAY",
    "SPLITS",
    "Batch",
    "Scaler",
    "Series",
    "Windows",
    "build_windows",
    "calendar",
    "dates_after",
    "frame_like",
    "is_long",
    "known_beforehand",
    "last_window",
    "load_series",
    "read_series",
    "read_static",
    "select",
    "series_of_frame",
]
