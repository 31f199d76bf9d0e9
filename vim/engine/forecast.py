"""Forecasting of time series: training with early stopping, evaluation against simple forecasts, the steps to come."""

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.config import Config
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from torch import Tensor, nn
from torch.nn.functional import mse_loss
from torch.nn.utils import clip_grad_norm_

import vim
from vim.checkpoints import read_checkpoint
from vim.data.loading import seed_all
from vim.data.series import (
    CALENDAR,
    DAY,
    SPLITS,
    Batch,
    Scaler,
    Series,
    Windows,
    build_windows,
    dates_after,
    known_beforehand,
    last_window,
    load_series,
    read_static,
    select,
)
from vim.engine.config import OPTIONAL_SECTIONS, VALUES, load_config, reading, write_config
from vim.engine.files import link_whole, make_folder, write_csv
from vim.engine.log import logging_to
from vim.engine.weights import check_unused, load_weights, save_whole
from vim.errors import UserError, describe

MODELS = {"tsm2": vim.models.TSM2}
COUNT = VALUES["data.batch_size"]
PATH = (lambda value: value is None or isinstance(value, str), "a path, in quotes where it is a number")
RESUMED = (
    "dataset",
    "split",
    "lookback",
    "horizon",
    "max_gap",
    "calendar",
    "batch_size",
)  # a run goes on with the same
RATES = ("drop_rate", "drop_path_rate")  # what a run may go on with another of
FORECAST_KEYS = {
    "data": (*RESUMED, "file", "season", "known", "static"),
    "train": ("seed", "clip_grad", "patience"),
}
FORECAST_VALUES = {
    **{name: VALUES[name] for name in ("data.batch_size", "schedule.num_epochs", "train.seed", "train.clip_grad")},
    "data.lookback": COUNT,
    "data.horizon": COUNT,
    "data.max_gap": VALUES["train.seed"],
    "data.split": (lambda value: value in SPLITS, f"one of {', '.join(map(repr, SPLITS))}"),
    "data.calendar": (lambda value: isinstance(value, bool), "True or False"),
    "data.file": PATH,
    "data.season": VALUES["data.samples"],
    "data.known": VALUES["train.trackers"],
    "data.static": PATH,
    "optimizer.weight_decay": (
        lambda value: value is None or (isinstance(value, int | float) and value >= 0),
        "a number from 0",
    ),
    "schedule.sched": (lambda value: value != "plateau", "one that follows from the epoch, such as 'cosine'"),
    "train.patience": COUNT,
}
RESULTS = ("curves", "log", "steps", "test", "windows")  # of a run, as tables or pictures
RIDGES = (0.1, 1.0, 10.0, 100.0, 1e3, 1e4, 1e5)
ROWS_AT_ONCE = 2**20  # of a matrix of windows

Forecast = Callable[[Batch], Tensor]

_logger = logging.getLogger(__name__)
_logger.setLevel(logging.INFO)  # a line an epoch


def load_forecast_config(path: Path, options: dict[str, Any] | None = None) -> Config:
    """Read a config of a forecast; see :func:`vim.engine.config.load_config`."""
    config = load_config(path, options, keys=FORECAST_KEYS, values=FORECAST_VALUES)
    for section in OPTIONAL_SECTIONS:
        if section in config:
            raise UserError(f"the config {path} has {section}, which is for images: a forecast takes none")
    season, lookback = config.data.get("season"), config.data.lookback
    if season and season > lookback:
        raise UserError(f"data.season must be at most data.lookback, {lookback}, in the config {path}, got {season}")
    return config


def build_model(options: dict[str, Any], data: dict[str, Any], num_variates: int, static: Tensor | None) -> Any:
    """The model of a config's `model` section, its sizes as its `data` section asks for.

    Raises:
        UserError: no such model, or an option it does not take.
    """
    name, rest = options.get("model_name"), {key: value for key, value in options.items() if key != "model_name"}
    if name not in MODELS:
        raise UserError(f"model.model_name must be one of {', '.join(map(repr, MODELS))}, got {name!r}")
    sizes = {
        "num_variates": num_variates,
        "seq_len": data["lookback"],
        "horizon": data["horizon"],
        "future_dim": len(CALENDAR) * data["calendar"] + len(data.get("known") or ()),
        "static_dim": 0 if static is None else static.shape[1],
    }
    if sizes.keys() & rest:
        raise UserError(f"model.{min(sizes.keys() & rest)} follows from the config's data section: leave it out")
    with reading("model"):
        return MODELS[name](**sizes, **rest)


def series_of(data: dict[str, Any]) -> Series:
    """The table that a config's `data` section asks for, with its covariates.

    Raises:
        UserError: it cannot be read, or lacks a covariate, or has nothing else.
    """
    series, known = load_series(data.get("dataset", ""), data.get("file")), list(data.get("known") or ())
    variates = [name for name in series.columns if name not in known]
    for name in known:
        if name not in series.columns or known.count(name) > 1:
            raise UserError(f"data.known: columns of {series.source}, each once, expected, got {name}")
    if not variates:
        raise UserError(f"data.known names every column of {series.source}: nothing is left to forecast")
    series = select(series, variates + known, len(known))
    return replace(series, static=read_static(Path(data["static"]), variates)) if data.get("static") else series


def windows_of(data: dict[str, Any], series: Series, scaler: Scaler | None = None) -> tuple[dict[str, Windows], Scaler]:
    """The windows that a config's `data` section asks for; see :func:`vim.data.series.build_windows`."""
    options = {key: data[key] for key in ("lookback", "horizon", "split", "max_gap")}
    return build_windows(series, scaler=scaler, with_calendar=data["calendar"], **options)


def forecast_with(model: Any, batch: Batch) -> Tensor:
    """What a model makes of windows, (b, h, m), on its device, and of the covariates it takes."""
    device = next(model.parameters()).device
    future = static = None
    if model.future_dim:
        future = batch.future.to(device)[:, None].expand(-1, model.num_variates, -1, -1)
    if batch.static is not None:
        static = batch.static.to(device)
    return model(batch.x.to(device), future, static)


@dataclass
class Score:
    """Mean squared and absolute errors on scaled values, of each step ahead, (h,)."""

    squared: Tensor
    absolute: Tensor
    weights: Tensor  # (h,): how many values each is the mean of

    @property
    def mse(self) -> float:
        return float((self.squared * self.weights).sum() / self.weights.sum())

    @property
    def mae(self) -> float:
        return float((self.absolute * self.weights).sum() / self.weights.sum())


@torch.no_grad()
def score(forecast: Forecast, windows: Windows, batch_size: int) -> Score:
    """Errors over all windows; values that were filled in do not count."""
    sums = torch.zeros(3, windows.horizon, dtype=torch.float64)
    for indices in torch.arange(len(windows)).split(batch_size):
        batch = windows.batch(indices)
        error = (forecast(batch).cpu().double() - batch.y.double()).masked_fill(~batch.observed, 0)
        sums += torch.stack([error**2, error.abs(), batch.observed.double()]).sum((1, 3))
    counts = sums[2].clamp(min=1)
    return Score(sums[0] / counts, sums[1] / counts, sums[2])


class LinearMap:
    """One linear map from lookback to horizon for all variates, fitted by ridge regression, in closed form.

    Windows are shifted by their last value first, as NLinear's (https://arxiv.org/abs/2205.13504). The penalty is the
    one of RIDGES that does best on the validation part. Filled-in values count as observed.
    """

    def __init__(self, train: Windows, val: Windows, batch_size: int) -> None:
        t, h = train.lookback, train.horizon
        gram, moments = torch.zeros(t + 1, t + 1, dtype=torch.float64), torch.zeros(t + 1, h, dtype=torch.float64)
        for indices in torch.arange(len(train)).split(max(1, ROWS_AT_ONCE // (t * train.values.shape[1]))):
            batch = train.batch(indices)
            last = batch.x[:, -1:]
            x, y = (part.double().transpose(1, 2).flatten(0, 1) for part in (batch.x - last, batch.y - last))
            x = torch.cat([x, torch.ones_like(x[:, :1])], 1)
            gram += x.T @ x
            moments += x.T @ y
        best = math.inf
        for ridge in RIDGES:
            penalty = torch.full((t + 1,), ridge, dtype=torch.float64)
            penalty[-1] = 1e-6  # not the constant's
            candidate = torch.linalg.solve(gram + penalty.diag(), moments).float()
            mse = score(partial(self._apply, weight=candidate), val, batch_size).mse
            if mse < best:
                best, self.ridge, self.weight = mse, ridge, candidate

    @staticmethod
    def _apply(batch: Batch, weight: Tensor) -> Tensor:
        last = batch.x[:, -1:]
        return ((batch.x - last).transpose(1, 2) @ weight[:-1] + weight[-1]).transpose(1, 2) + last

    def __call__(self, batch: Batch) -> Tensor:
        """Forecast windows, (b, h, m)."""
        return self._apply(batch, self.weight)


def fit_skip(skip: nn.Module, linear: LinearMap) -> None:
    """Make a model's linear map the one fitted in closed form, but its constant, and leave it so in training."""
    weight = linear.weight[:-1].T.clone()
    weight[:, -1] += 1 - weight.sum(1)  # the fitted one is of windows shifted by their last value
    skip.load_state_dict({"weight": weight})
    skip.requires_grad_(False)


def repeat(batch: Batch, period: int) -> Tensor:
    """The last `period` steps seen, over and over."""
    h = batch.y.shape[1]
    return batch.x[:, -period:].repeat(1, -(-h // period), 1)[:, :h]


def simple_forecasts(
    series: Series, windows: dict[str, Windows], batch_size: int, season: int | None = None
) -> dict[str, Forecast]:
    """What a model is measured against: the last value, day, week and season repeated, and a linear map.

    Days and weeks must be seen whole, a number of rows, and at most one row in a hundred be uneven.
    """
    forecasts: dict[str, Forecast] = {"last value": partial(repeat, period=1)}
    even = np.mean(np.diff(series.dates) != series.step) <= 0.01
    for name, days in (("last day", 1), ("last week", 7)):
        period = days * DAY / series.step
        if even and period == round(period) and 2 <= period <= windows["test"].lookback:
            forecasts[name] = partial(repeat, period=round(period))
    if season:
        forecasts["last season"] = partial(repeat, period=season)
    forecasts["linear"] = LinearMap(windows["train"], windows["val"], batch_size)
    return forecasts


class ForecastTrainer:
    """Train a model on a series until its validation error stops falling; `best.pth` has the weights of the least.

    An epoch's order and dropout follow from the seed and its number, so a run goes on exactly where it was cut off.

    Args:
        resume: go on from `last.pth` in the work dir, where there is one; else the work dir must hold no run.

    Raises:
        UserError: the config, its data or the checkpoint does not fit.
    """

    def __init__(self, config: Config, work_dir: Path, *, resume: bool = False) -> None:
        self.config, self.work_dir = config, work_dir
        self.data, self.options = config.data, config.train
        self.series = series_of(self.data)
        if not resume:
            check_unused(work_dir)
        make_folder(work_dir)
        with logging_to(work_dir / "train.log"):
            self.windows, self.scaler = windows_of(self.data, self.series)
        seed_all(self.options.seed)
        self.model = build_model(config.model, self.data, len(self.series.variates), self.series.static)
        if self.model.skip is not None:
            fit_skip(self.model.skip, LinearMap(self.windows["train"], self.windows["val"], self.data.batch_size))
        self.model.to("cuda" if torch.cuda.is_available() else "cpu")
        self.updates = max(1, len(self.windows["train"]) // self.data.batch_size)  # without a short last one
        with reading("optimizer"):
            self.optimizer = create_optimizer_v2(self.model, **config.optimizer)
        with reading("schedule"):
            self.scheduler, self.num_epochs = create_scheduler_v2(
                self.optimizer, **config.schedule, updates_per_epoch=self.updates
            )
            self._set_rate(self.num_epochs - 1, self.num_epochs * self.updates - 1)  # raises what it may
        self.meta = {  # what a checkpoint says of the run, but for the weights
            "model": config.model.to_dict(),
            "data": self.data.to_dict(),
            "columns": self.series.columns,
            "mean": self.scaler.mean,
            "std": self.scaler.std,
            "static": self.series.static,
            "seconds": self.series.seconds,
            "digest": self.series.digest(),
        }
        self.rows: list[dict[str, float]] = []
        last = work_dir / "last.pth"
        if resume and last.exists():
            self._resume(last)

    def fit(self) -> None:
        """Train; the model has the best weights afterwards.

        Raises:
            UserError: the loss is not finite.
        """
        write_config(self.config, self.work_dir / "config.py")
        with logging_to(self.work_dir / "train.log"):
            for epoch in range(len(self.rows), self.num_epochs):
                if self._epochs_without_gain() >= self.options.patience:
                    _logger.info("the validation error has not fallen for %d epochs", self.options.patience)
                    break
                self._train_epoch(epoch)
        load_weights(self.model, read_checkpoint(self.work_dir / "best.pth")["model"], self.work_dir / "best.pth")
        self.model.eval()

    def _set_rate(self, epoch: int, number: int) -> None:
        """Have the learning rate that the schedule has in that epoch, or at that update of the run."""
        if self.scheduler is not None:
            self.scheduler.step(epoch)
            self.scheduler.step_update(number)

    def _epochs_without_gain(self) -> int:
        errors = [row["mse"] for row in self.rows]
        return len(errors) - 1 - errors.index(min(errors)) if errors else 0

    def _train_epoch(self, epoch: int) -> None:
        seed_all(self.options.seed, epoch)
        self.model.train()
        losses = 0.0
        order = torch.randperm(len(self.windows["train"])).split(self.data.batch_size)[: self.updates]
        for number, indices in enumerate(order, start=epoch * self.updates):
            self._set_rate(epoch, number)
            loss = self._step(self.windows["train"].batch(indices))
            if not math.isfinite(loss):
                before = f"; best.pth in {self.work_dir} is from before" if self.rows else ""
                raise UserError(
                    f"the loss of update {number + 1} is {loss}: lower optimizer.lr, or set train.clip_grad{before}"
                )
            losses += loss
        self.model.eval()
        held_out = score(lambda batch: forecast_with(self.model, batch), self.windows["val"], self.data.batch_size)
        row = {"epoch": epoch + 1, "lr": self.optimizer.param_groups[0]["lr"], "train_loss": losses / self.updates}
        self.rows.append({**row, "mse": held_out.mse, "mae": held_out.mae})
        _logger.info(
            "epoch %d: training loss %.4f, validation MSE %.4f, MAE %.4f",
            epoch + 1,
            row["train_loss"],
            held_out.mse,
            held_out.mae,
        )
        if not math.isfinite(held_out.mse):
            raise UserError(f"the validation error of epoch {epoch + 1} is {held_out.mse}: lower optimizer.lr")
        self._save()

    def _step(self, batch: Batch) -> float:
        y = forecast_with(self.model, batch)
        observed, target = batch.observed.to(y.device), batch.y.to(y.device)
        loss = mse_loss(torch.where(observed, y, target), target, reduction="sum") / observed.sum().clamp(min=1)
        self.optimizer.zero_grad()
        loss.backward()
        if self.options.get("clip_grad"):
            clip_grad_norm_(self.model.parameters(), self.options.clip_grad)
        self.optimizer.step()
        return loss.item()

    def _save(self) -> None:
        training = {"optimizer": self.optimizer.state_dict(), "rows": self.rows}
        state = {"model": self.model.state_dict(), "meta": self.meta, "training": training}
        save_whole(state, self.work_dir / "last.pth")
        self._finish_epoch()

    def _finish_epoch(self) -> None:
        """What follows from `last.pth`, which a kill may have kept from being written."""
        if self._epochs_without_gain() == 0:
            link_whole(self.work_dir / "last.pth", self.work_dir / "best.pth")
        write_csv(self.work_dir / "log.csv", self.rows)

    def _resume(self, path: Path) -> None:
        state = read_forecaster(path)
        meta, training = state["meta"], state.get("training")
        if not isinstance(training, dict):
            raise UserError(f"{path} holds weights only, not a run to go on with")
        changed = [key for key in (*RESUMED, "known") if meta["data"].get(key) != self.data.get(key)]
        if meta["columns"] != self.series.columns or meta.get("digest") != self.meta["digest"]:
            changed.append("file or data.static, or other rows in it")
        if changed:
            raise UserError(f"{path} was trained with another data.{changed[0]}: resume with the same")
        old, new = ({k: v for k, v in one.items() if k not in RATES} for one in (meta["model"], self.config.model))
        if old != new:
            raise UserError(f"{path} was trained with other options of the model: resume with {old}")
        if [set(group) for group in training["optimizer"]["param_groups"]] != [
            set(group) for group in self.optimizer.state_dict()["param_groups"]
        ]:
            raise UserError(
                f"{path} was trained with another optimizer: resume with the same optimizer.opt and weight_decay"
            )
        load_weights(self.model, state["model"], path)
        self.optimizer.load_state_dict(training["optimizer"])
        self.rows = training["rows"]
        self._finish_epoch()


def read_forecaster(path: Path) -> dict[str, Any]:
    """Read what :class:`ForecastTrainer` saved; nothing in the file is executed.

    Raises:
        UserError: the file is missing, damaged, or not such a checkpoint.
    """
    state = read_checkpoint(path)
    meta = state.get("meta")
    if (
        "model" not in state
        or not isinstance(meta, dict)
        or not {"model", "data", "columns", "mean", "std"} <= set(meta)
        or not isinstance(meta["data"], dict)
        or not set(RESUMED) <= set(meta["data"])
    ):
        raise UserError(f"{path} is not a checkpoint of tools/forecast.py: it does not say what columns it is of")
    shapes = [tuple(getattr(meta[key], "shape", ())) for key in ("mean", "std")]
    if shapes != 2 * [(len(meta["columns"]),)]:
        raise UserError(f"{path} is broken: it has {len(meta['columns'])} columns, and means and deviations {shapes}")
    return state


def load_forecaster(path: Path) -> tuple[nn.Module, dict[str, Any], Scaler]:
    """The model of a checkpoint, in evaluation mode; what the checkpoint says of it; its scaler.

    Raises:
        UserError: the checkpoint cannot be read, or names a model that does not exist or fit.
    """
    state = read_forecaster(path)
    meta = state["meta"]
    try:
        num_variates = len(meta["columns"]) - len(meta["data"].get("known") or ())
        model = build_model(meta["model"], meta["data"], num_variates, meta.get("static"))
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} names a model that cannot be built: {describe(error)}") from error
    load_weights(model, state["model"], path)
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    return model.eval(), meta, Scaler(meta["mean"], meta["std"])


@dataclass
class Comparison:
    """Errors of a model and of simple forecasts on the test part, by name, the model first."""

    scores: dict[str, Score]
    forecasts: dict[str, Forecast]
    windows: Windows


def compare(
    model: nn.Module, name: str, series: Series, windows: dict[str, Windows], data: dict[str, Any]
) -> Comparison:
    """Measure a model, and simple forecasts, on the test part."""
    test, batch_size = windows["test"], data["batch_size"]
    forecasts: dict[str, Forecast] = {name: lambda batch: forecast_with(model, batch).cpu()}
    forecasts |= simple_forecasts(series, windows, batch_size, data.get("season"))
    scores = {key: score(forecast, test, batch_size) for key, forecast in forecasts.items()}
    return Comparison(scores, forecasts, test)


def write_comparison(comparison: Comparison, series: Series, scaler: Scaler, folder: Path) -> list[str]:
    """Write test.csv, steps.png and windows.png; return their names."""
    make_folder(folder)
    rows = [{"forecast": name, "mse": score.mse, "mae": score.mae} for name, score in comparison.scores.items()]
    write_csv(folder / "test.csv", rows)
    plot_steps(folder / "steps.png", comparison.scores)
    plot_windows(folder / "windows.png", comparison, series, scaler)
    return ["test.csv", "steps.png", "windows.png"]


@torch.no_grad()
def forecast_next(model: Any, series: Series, scaler: Scaler, data: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """The dates (h,) and values (h, m), in the series' own units, that a model expects after the last row.

    Where columns are known beforehand, after the last row but h, which have these columns only.

    Raises:
        UserError: the table's last rows are no such rows, or too few.
    """
    h, m = model.horizon, model.num_variates
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
    x = last_window(series, scaler, model.seq_len, data["max_gap"])
    future = known_beforehand(dates, scaler.scale(coming)[:, m:], data["calendar"])
    empty = torch.empty(1, h, m)
    batch = Batch(x, empty, empty, future[None], series.static)
    values = scaler.unscale(forecast_with(model, batch)[0].cpu()).numpy()
    if not np.isfinite(values).all():
        raise UserError(f"{series.source}: the forecast is not finite: is a value in its last rows far from others?")
    return dates, values


def check_out(path: Path, run: Path, series: Series, data: dict[str, Any]) -> None:
    """See that a forecast can be written there: to a CSV file, over no table that is read and no result in `run`.

    Raises:
        UserError: it cannot.
    """
    if path.suffix.lower() != ".csv":
        raise UserError(f"{path}: name a file that ends in .csv; a picture that ends in .png goes beside it")
    tables = [name for name in (series.source, data.get("file"), data.get("static")) if name]
    if path.resolve() in [Path(name).resolve() for name in tables]:
        raise UserError(f"{path} is a table to read, which the forecast would replace: name another file")
    if path.parent.resolve() == run.resolve() and path.stem in RESULTS:
        raise UserError(f"{path} is for results of the run, which the forecast would replace: name another file")


def write_forecast(path: Path, series: Series, dates: np.ndarray, values: np.ndarray) -> list[Path]:
    """Write a table like those that are read, and a picture of it beside; return their paths."""
    make_folder(path.parent)
    for kind in ("datetime64[s]", "datetime64[D]"):  # as short as all of them can be written
        if all((own == own.astype(kind)).all() for own in (dates, series.dates)):
            dates = dates.astype(kind)
    texts = np.datetime_as_string(dates)
    rows = [dict(zip(series.variates, row, strict=True)) for row in values.tolist()]
    write_csv(path, [{"date": text.replace("T", " "), **row} for text, row in zip(texts, rows, strict=True)])
    picture = path.with_suffix(".png")
    plot_forecast(picture, series, dates, values)
    return [path, picture]


def series_for(meta: dict[str, Any], file: Path | None = None) -> Series:
    """The table a checkpoint was trained on, or another file with its columns.

    Raises:
        UserError: it cannot be read, or lacks a column.
    """
    data, columns = meta["data"], meta["columns"]
    dataset, path = ("csv", str(file)) if file else (data["dataset"], data.get("file"))
    series = select(load_series(dataset, path, columns), columns, len(data.get("known") or ()))
    learned = meta.get("seconds", series.seconds)
    if learned != series.seconds:
        _logger.warning("%s: its rows are %g s apart, those learned from %g s", series.source, series.seconds, learned)
    return replace(series, static=meta.get("static"))


def plot_curves(path: Path, rows: list[dict[str, float]]) -> None:
    """Errors over the epochs."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    for key, label in (("train_loss", "training"), ("mse", "validation")):
        axes.plot([row["epoch"] for row in rows], [row[key] for row in rows], label=label)
    axes.set(xlabel="epoch", ylabel="MSE")
    _finish(figure, axes, path)


def plot_steps(path: Path, scores: dict[str, Score]) -> None:
    """Errors over the steps ahead."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    for name, one in scores.items():
        axes.plot(range(1, len(one.squared) + 1), one.squared, label=name)
    axes.set(xlabel="steps ahead", ylabel="MSE")
    _finish(figure, axes, path)


@torch.no_grad()
def plot_windows(path: Path, comparison: Comparison, series: Series, scaler: Scaler, count: int = 3) -> None:
    """The last variate in some windows, what came after, the model's forecast and the linear one."""
    import matplotlib.pyplot as plt

    windows = comparison.windows
    indices = torch.linspace(0, len(windows) - 1, count).long()
    batch = windows.batch(indices)
    names = list(comparison.forecasts)
    forecasts = {name: scaler.unscale(comparison.forecasts[name](batch))[..., -1] for name in (names[0], names[-1])}
    seen = min(windows.lookback, 3 * windows.horizon)
    history, truth = scaler.unscale(batch.x)[:, -seen:, -1], scaler.unscale(batch.y)[..., -1]
    figure, panels = plt.subplots(count, figsize=(8, 2.5 * count), layout="constrained", squeeze=False)
    for i, axes in enumerate(panels[:, 0]):
        dates = series.dates[int(windows.starts[indices[i]]) :][: windows.lookback + windows.horizon]
        axes.plot(dates[-seen - windows.horizon :], torch.cat([history[i], truth[i]]), color="gray", label="observed")
        for name, values in forecasts.items():
            axes.plot(dates[-windows.horizon :], values[i], label=name)
        axes.set(ylabel=series.variates[-1])
        axes.tick_params(axis="x", labelrotation=20)
    panels[0, 0].legend()
    _close(figure, path)


def plot_forecast(path: Path, series: Series, dates: np.ndarray, values: np.ndarray, most: int = 6) -> None:
    """The end of each variate, of the last few where there are many, and what is expected next."""
    import matplotlib.pyplot as plt

    shown = range(max(0, len(series.variates) - most), len(series.variates))
    figure, panels = plt.subplots(len(shown), figsize=(8, 2.2 * len(shown)), layout="constrained", squeeze=False)
    for axes, i in zip(panels[:, 0], shown, strict=True):
        axes.plot(series.dates[-4 * len(dates) :], series.values[-4 * len(dates) :, i], color="gray", label="observed")
        axes.plot(dates, values[:, i], label="forecast")
        axes.set(ylabel=series.columns[i])
        axes.tick_params(axis="x", labelrotation=20)
    panels[0, 0].legend()
    _close(figure, path)


def _finish(figure: Any, axes: Any, path: Path) -> None:
    axes.grid(alpha=0.3)
    axes.legend()
    _close(figure, path)


def _close(figure: Any, path: Path) -> None:
    import matplotlib.pyplot as plt

    figure.savefig(path, dpi=120)
    plt.close(figure)
