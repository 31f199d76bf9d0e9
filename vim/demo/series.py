"""The tab of time series: the end of a table, held out and forecast."""

from dataclasses import replace
from pathlib import Path

import gradio as gr
import numpy as np
from PIL import Image

from vim.demo import samples
from vim.demo.files import sentences
from vim.demo.models import COMMANDS, Models, chosen
from vim.demo.parts import ONE_AT_A_TIME, model_list, picture, upload
from vim.demo.pictures import drawn
from vim.errors import UserError
from vim.tasks.forecasting.build import Forecaster
from vim.tasks.forecasting.predict import forecast_next
from vim.tasks.forecasting.report import plot_forecast

Table = list[list[str | float]]


def forecast(forecaster: Forecaster, path: str) -> tuple[Image.Image, Table]:
    """Forecast the last rows of a table from those before; return the plot, and each variate's mean absolute error.

    Raises:
        UserError: the table cannot be read, lacks a column, or is too short.
    """
    series, h = forecaster.series(Path(path)), forecaster.model.horizon
    m, most = len(series.variates), len(series.values) - h
    if most < forecaster.model.seq_len:
        needed = forecaster.model.seq_len + h
        raise UserError(f"{path} has {len(series.values)} rows: {needed} expected, of which the last {h} are forecast")
    held_out = series.values[most:, :m]
    if series.num_known:  # these columns stay known in the rows to forecast
        values = series.values.copy()
        values[most:, :m] = np.nan
        seen = replace(series, values=values)
    else:
        seen = replace(series, dates=series.dates[:most], values=series.values[:most])
    _, values = forecast_next(forecaster, seen)
    errors = np.nanmean(np.abs(values - held_out), axis=0)
    table: Table = [[name, float(f"{error:.4g}")] for name, error in zip(series.variates, errors, strict=True)]
    return drawn(lambda out: plot_forecast(out, series, series.dates[most:], values)), table


def tab(models: Models, folder: Path) -> None:
    """Add the tab.

    Args:
        folder: where samples are written.
    """
    paths = [path for one in models.series.values() for path in samples.write_series(folder, one)]
    with gr.Row():
        with gr.Column(scale=1):
            name = model_list(list(models.series), "series", COMMANDS["series"])
            file = upload("Table (CSV, with the columns that the model was trained on)", paths)
            button = gr.Button("Forecast the last rows", variant="primary")
            table = gr.Dataframe(headers=["column", "mean absolute error"], label="Errors", interactive=False)
        with gr.Column(scale=2):
            plot = picture("The held-out end and its forecast")

    def predict(name: str | None, path: str | None) -> tuple[Image.Image, Table]:
        with sentences(path):
            if path is None:
                raise UserError("a CSV file is needed: drop one, or pick a sample")
            return forecast(chosen(models.series, name), path)

    button.click(predict, [name, file], [plot, table], api_name="series", **ONE_AT_A_TIME)
