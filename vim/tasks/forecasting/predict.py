"""Forecasts of the steps after a table's last row."""

import logging
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from vim.data.series import Batch, Series, dates_after, known_beforehand, last_window
from vim.engine.files import make_folder, write_csv
from vim.errors import UserError
from vim.tasks.forecasting.build import Forecaster, forecast_with
from vim.tasks.forecasting.report import plot_forecast

RESULTS = ("curves", "log", "steps", "test", "windows")  # names of tables and pictures that a run writes

_logger = logging.getLogger(__name__)


@torch.no_grad()
def forecast_next(forecaster: Forecaster, series: Series) -> tuple[np.ndarray, np.ndarray]:
    """Return the dates (h,) and values (h, m), in the series' own units, of the steps after the last row.

    If some columns are known beforehand, the table ends with h rows that have these columns only; they are forecast.

    Raises:
        UserError: the table has too few rows, its last rows are not as above, or the forecast is not finite.
    """
    model, scaler, data = forecaster.model, forecaster.scaler, forecaster.data
    h, m = model.horizon, model.num_variates

    # what is known beforehand
    dates, coming = dates_after(series, h), np.zeros((h, m))
    if series.num_known:
        dates, coming = series.dates[-h:], series.values[-h:]
        series = replace(series, dates=series.dates[:-h], values=series.values[:-h])
        if not np.isnan(coming[:, :m]).all():
            raise UserError(
                f"{series.source}: its last {h} rows must have {', '.join(series.columns[m:])[:200]} and nothing else: "
                "they are what is forecast"
            )
        if (dates != dates_after(series, h)).any():
            _logger.warning("%s: its last %d rows do not follow as the others do; taken as if", series.source, h)

    # the forecast
    x = last_window(series, scaler, model.seq_len, data.max_gap)
    future = known_beforehand(dates, scaler.scale(coming)[:, m:], data.calendar)
    empty = torch.empty(1, h, m)
    batch = Batch(x, empty, empty, future[None], series.static)
    values = scaler.unscale(forecast_with(model, batch)[0].cpu()).numpy()
    if not np.isfinite(values).all():
        raise UserError(f"{series.source}: the forecast is not finite: is a value in its last rows far from others?")
    return dates, values


def check_out(path: Path, run: Path, series: Series, forecaster: Forecaster) -> None:
    """Check that a forecast can be written to a path.

    Raises:
        UserError: the path is not of a CSV file, or the forecast would replace a table or a result of `run`.
    """
    if path.suffix.lower() != ".csv":
        raise UserError(f"{path}: name a file that ends in .csv; a picture that ends in .png goes beside it")
    tables = [name for name in (series.source, forecaster.data.file, forecaster.data.static) if name]
    if path.resolve() in [Path(name).resolve() for name in tables]:
        raise UserError(f"{path} is a table to read, which the forecast would replace: name another file")
    if path.parent.resolve() == run.resolve() and path.stem in RESULTS:
        raise UserError(f"{path} is for results of the run, which the forecast would replace: name another file")


def write_forecast(path: Path, series: Series, dates: np.ndarray, values: np.ndarray) -> list[Path]:
    """Write a table that can be read again, and a picture beside it. Return their paths."""
    make_folder(path.parent)
    for kind in ("datetime64[s]", "datetime64[D]"):  # the shortest form that all dates can be written in
        if all((own == own.astype(kind)).all() for own in (dates, series.dates)):
            dates = dates.astype(kind)
    texts = np.datetime_as_string(dates)
    rows = [dict(zip(series.variates, row, strict=True)) for row in values.tolist()]
    write_csv(path, [{"date": text.replace("T", " "), **row} for text, row in zip(texts, rows, strict=True)])
    picture = path.with_suffix(".png")
    plot_forecast(picture, series, dates, values)
    return [path, picture]
