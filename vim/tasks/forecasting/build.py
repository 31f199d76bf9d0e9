"""A recipe's forecaster: its series, its windows, its model; and the same out of a checkpoint."""

import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple, cast

import torch
from torch import Tensor

from vim.data.series import (
    CALENDAR,
    Batch,
    Scaler,
    Series,
    Windows,
    build_windows,
    load_series,
    read_static,
    select,
)
from vim.engine.config import reading
from vim.engine.rebuild import building, rebuild
from vim.engine.weights import State, read_run
from vim.errors import UserError
from vim.fields import read
from vim.models import TSM2
from vim.options import SeriesData
from vim.registry import check_options

MODELS = {"tsm2": TSM2}

_logger = logging.getLogger(__name__)


def build_model(options: Mapping[str, object], data: SeriesData, num_variates: int, static: Tensor | None) -> TSM2:
    """Return the model of a recipe's `model` section. Its sizes follow from the `data` section.

    Raises:
        UserError: no such model, or an option that it does not take.
    """
    name, rest = options.get("model_name"), {key: value for key, value in options.items() if key != "model_name"}
    if name not in MODELS:
        raise UserError(f"model.model_name must be one of {', '.join(map(repr, MODELS))}, got {name!r}")
    sizes = {
        "num_variates": num_variates,
        "seq_len": data.lookback,
        "horizon": data.horizon,
        "future_dim": len(CALENDAR) * data.calendar + len(data.known),
        "static_dim": 0 if static is None else static.shape[1],
    }
    if sizes.keys() & rest:
        raise UserError(f"model.{min(sizes.keys() & rest)} follows from the config's data section: leave it out")
    with reading("model"):
        return MODELS[name](**sizes, **rest)  # type: ignore[arg-type]


def series_of(data: SeriesData, table: Series | None = None) -> Series:
    """Return the table of a recipe's `data` section, or another table, with the section's covariates.

    Raises:
        UserError: the table cannot be read, lacks a covariate, or has nothing but covariates.
    """
    series, known = table or load_series(data.dataset, data.file), list(data.known)
    variates = [name for name in series.columns if name not in known]
    for name in known:
        if name not in series.columns or known.count(name) > 1:
            raise UserError(f"data.known: columns of {series.source}, each once, expected, got {name}")
    if not variates:
        raise UserError(f"data.known names every column of {series.source}: nothing is left to forecast")
    series = select(series, variates + known, len(known))
    return replace(series, static=read_static(Path(data.static), variates)) if data.static else series


def windows_of(data: SeriesData, series: Series, scaler: Scaler | None = None) -> tuple[dict[str, Windows], Scaler]:
    """Return the windows of each part, and the scaler; see :func:`vim.data.series.build_windows`."""
    return build_windows(
        series,
        lookback=data.lookback,
        horizon=data.horizon,
        split=data.split,
        max_gap=data.max_gap,
        scaler=scaler,
        with_calendar=data.calendar,
    )


def inputs_of(model: TSM2, batch: Batch) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Return what a model takes of windows, on its device: the values seen, and covariates or None."""
    device = next(model.parameters()).device
    future = static = None
    if model.future_dim:
        future = batch.future.to(device)[:, None].expand(-1, model.num_variates, -1, -1)
    if batch.static is not None:
        static = batch.static.to(device)
    return batch.x.to(device), future, static


def forecast_with(model: TSM2, batch: Batch) -> Tensor:
    """Forecast windows: (b, h, m), on the model's device."""
    return model(*inputs_of(model, batch))


class Forecaster(NamedTuple):
    """What a checkpoint of a forecaster holds; the model is in evaluation mode."""

    model: TSM2
    name: str
    data: SeriesData
    columns: list[str]
    scaler: Scaler
    static: Tensor | None
    seconds: float | None  # between rows

    def series(self, file: Path | None = None) -> Series:
        """Return the table that the model was trained on, or another file with its columns.

        Raises:
            UserError: the table cannot be read, or lacks a column; or no file was named, and the run's is no .csv file.
        """
        own = self.data.file or ""
        if file is None and own and not own.lower().endswith(".csv"):  # a checkpoint could name any file
            raise UserError(f"the run's table is {own}, which is no .csv file: name it by --file")
        dataset, path = ("csv", str(file)) if file else (self.data.dataset, self.data.file)
        series = select(load_series(dataset, path, self.columns), self.columns, len(self.data.known))
        if self.seconds not in (None, series.seconds):
            _logger.warning(
                "%s: its rows are %g s apart, those learned from %g s", series.source, series.seconds, self.seconds
            )
        return replace(series, static=self.static)


def read_forecaster(path: Path) -> State:
    """Read a checkpoint of a forecaster; nothing in the file is executed.

    Raises:
        UserError: the file is missing, damaged, or not such a checkpoint.
    """
    state = read_run(path)
    meta = state["meta"]
    if not {"data", "columns", "mean", "std"} <= meta.keys():
        raise UserError(f"{path} is not a checkpoint of a forecasting run: it does not say what columns it is of")
    columns = meta["columns"]
    known = read(SeriesData, "data", meta["data"], str(path)).known
    variates = [name for name in columns if name not in known]
    if len(set(columns)) < len(columns) or not variates or columns != [*variates, *known]:
        raise UserError(f"{path} is broken: its columns must be variates and data.known, each once, got {columns}")
    static, scaling = meta.get("static"), (meta["mean"], meta["std"])
    shapes = [tuple(value.shape) for value in scaling]
    if shapes != 2 * [(len(columns),)] or (static is not None and (static.dim() != 2 or len(static) != len(variates))):
        raise UserError(f"{path} is broken: it has {len(columns)} columns, and means and deviations {shapes}")
    for value in (*scaling, *([] if static is None else [static])):
        if not value.is_floating_point() or not value.isfinite().all() or not value.numel():
            raise UserError(f"{path} is broken: means, deviations and covariates must be finite numbers")
    if not (meta["std"] > 0).all():
        raise UserError(f"{path} is broken: deviations must be above 0")
    return state


def load_forecaster(path: Path) -> Forecaster:
    """Return what a checkpoint holds, with the model built and its weights loaded.

    Raises:
        UserError: the checkpoint cannot be read, or names a model that does not exist or fit.
    """
    state = read_forecaster(path)
    meta = state["meta"]
    data = read(SeriesData, "data", meta["data"], str(path))
    options, columns, static = meta["model"], meta["columns"], meta.get("static")
    with building(path):
        check_options(TSM2, {name: value for name, value in options.items() if name != "model_name"}, own=True)
    variates = len(columns) - len(data.known)
    model = rebuild(lambda: build_model(options, data, variates, static), state["model"], path)
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    name, scaler = cast(str, options["model_name"]), Scaler(meta["mean"], meta["std"])
    return Forecaster(model.eval(), name, data, columns, scaler, static, meta.get("seconds"))
