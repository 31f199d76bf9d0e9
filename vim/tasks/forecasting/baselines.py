"""Errors of forecasts, and the simple forecasts that a model is compared with."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from vim.data.series import DAY, Batch, Series, Windows
from vim.models import TSM2
from vim.options import SeriesData
from vim.tasks.forecasting.build import forecast_with

RIDGES = (0.1, 1.0, 10.0, 100.0, 1e3, 1e4, 1e5)
ROWS_AT_ONCE = 2**20  # of a matrix of windows

Forecast = Callable[[Batch], Tensor]  # windows to values (b, h, m)


@dataclass
class Score:
    """Mean squared and absolute errors on scaled values, for each step ahead, (h,)."""

    squared: Tensor
    absolute: Tensor
    weights: Tensor  # (h,): the number of values in each mean

    @property
    def mse(self) -> float:
        """Return the mean squared error over all steps."""
        return float((self.squared * self.weights).sum() / self.weights.sum())

    @property
    def mae(self) -> float:
        """Return the mean absolute error over all steps."""
        return float((self.absolute * self.weights).sum() / self.weights.sum())


@torch.no_grad()
def score(forecast: Forecast, windows: Windows, batch_size: int, accelerator: Accelerator | None = None) -> Score:
    """Return the errors over all windows. Filled-in values do not count.

    With an accelerator each process takes a part of the windows, and all return the whole result.
    """
    rank, world = (accelerator.process_index, accelerator.num_processes) if accelerator else (0, 1)
    sums = torch.zeros(3, windows.horizon, dtype=torch.float64)
    for indices in torch.arange(rank, len(windows), world).split(batch_size):
        batch = windows.batch(indices)
        error = (forecast(batch).cpu().double() - batch.y.double()).masked_fill(~batch.observed, 0)
        sums += torch.stack([error**2, error.abs(), batch.observed.double()]).sum((1, 3))
    if accelerator is not None:
        sums = accelerator.reduce(sums.to(accelerator.device)).cpu()
    counts = sums[2].clamp(min=1)
    return Score(sums[0] / counts, sums[1] / counts, sums[2])


class LinearMap:
    """One linear map from lookback to horizon for all variates, fitted by ridge regression in closed form.

    Each window is first shifted by its last value, as in NLinear (https://arxiv.org/abs/2205.13504). The penalty is
    the one of RIDGES with the smallest validation error. Filled-in values count as observed.
    """

    def __init__(self, train: Windows, val: Windows, batch_size: int) -> None:
        # the normal equations of all training windows, with a column of ones for the constant
        t, h = train.lookback, train.horizon
        gram, moments = torch.zeros(t + 1, t + 1, dtype=torch.float64), torch.zeros(t + 1, h, dtype=torch.float64)
        for indices in torch.arange(len(train)).split(max(1, ROWS_AT_ONCE // (t * train.values.shape[1]))):
            batch = train.batch(indices)
            last = batch.x[:, -1:]
            x, y = (part.double().transpose(1, 2).flatten(0, 1) for part in (batch.x - last, batch.y - last))
            x = torch.cat([x, torch.ones_like(x[:, :1])], 1)
            gram += x.T @ x
            moments += x.T @ y

        # the solution whose penalty does best on the validation part
        best = math.inf
        for ridge in RIDGES:
            penalty = torch.full((t + 1,), ridge, dtype=torch.float64)
            penalty[-1] = 1e-6  # of the constant
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
    """Load the fitted map, without its constant, into a model's linear map, and freeze it."""
    weight = linear.weight[:-1].T.clone()
    weight[:, -1] += 1 - weight.sum(1)  # the fitted map takes windows shifted by their last value
    skip.load_state_dict({"weight": weight})
    skip.requires_grad_(False)


def repeat(batch: Batch, period: int) -> Tensor:
    """Forecast the last `period` steps of each window over and over."""
    h = batch.y.shape[1]
    return batch.x[:, -period:].repeat(1, -(-h // period), 1)[:, :h]


def simple_forecasts(
    series: Series, windows: Mapping[str, Windows], batch_size: int, season: int | None = None
) -> dict[str, Forecast]:
    """Return simple forecasts by name: the last value, day, week and season repeated, and a linear map.

    A day or a week is left out if it is no whole number of rows, does not fit into a window, or if more than one row
    in a hundred is not evenly spaced.
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


@dataclass
class Comparison:
    """Errors of a model and of simple forecasts on the test part, by name, the model first."""

    scores: dict[str, Score]
    forecasts: dict[str, Forecast]
    windows: Windows


def compare(model: TSM2, name: str, series: Series, windows: Mapping[str, Windows], data: SeriesData) -> Comparison:
    """Score a model and the simple forecasts on the test part."""
    test, batch_size = windows["test"], data.batch_size
    forecasts: dict[str, Forecast] = {name: lambda batch: forecast_with(model, batch).cpu()}
    forecasts |= simple_forecasts(series, windows, batch_size, data.season)
    scores = {key: score(forecast, test, batch_size) for key, forecast in forecasts.items()}
    return Comparison(scores, forecasts, test)
