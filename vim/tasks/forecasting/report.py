"""Tables and pictures of forecasts."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch

from vim.data.series import Scaler, Series
from vim.engine.files import make_folder, write_csv
from vim.engine.plots import save_figure
from vim.tasks.forecasting.baselines import Comparison, Score


def write_comparison(comparison: Comparison, series: Series, scaler: Scaler, folder: Path) -> list[str]:
    """Write test.csv, steps.png and windows.png. Return their names."""
    make_folder(folder)
    rows = [{"forecast": name, "mse": score.mse, "mae": score.mae} for name, score in comparison.scores.items()]
    write_csv(folder / "test.csv", rows)
    plot_steps(folder / "steps.png", comparison.scores)
    plot_windows(folder / "windows.png", comparison, series, scaler)
    return ["test.csv", "steps.png", "windows.png"]


def plot_steps(path: Path, scores: Mapping[str, Score]) -> None:
    """Draw the errors over the steps ahead."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    for name, one in scores.items():
        axes.plot(range(1, len(one.squared) + 1), one.squared, label=name)
    axes.set(xlabel="steps ahead", ylabel="MSE")
    axes.grid(alpha=0.3)
    axes.legend()
    save_figure(figure, path)


@torch.no_grad()
def plot_windows(path: Path, comparison: Comparison, series: Series, scaler: Scaler, count: int = 3) -> None:
    """Draw the last variate of some test windows, the values that followed, the model's and the linear forecast."""
    import matplotlib.pyplot as plt

    # values in the series' own units
    windows = comparison.windows
    indices = torch.linspace(0, len(windows) - 1, count).long()
    batch = windows.batch(indices)
    names = list(comparison.forecasts)
    forecasts = {name: scaler.unscale(comparison.forecasts[name](batch))[..., -1] for name in (names[0], names[-1])}
    seen = min(windows.lookback, 3 * windows.horizon)
    history, truth = scaler.unscale(batch.x)[:, -seen:, -1], scaler.unscale(batch.y)[..., -1]

    # a panel a window
    figure, panels = plt.subplots(count, figsize=(8, 2.5 * count), layout="constrained", squeeze=False)
    for i, axes in enumerate(panels[:, 0]):
        dates = series.dates[int(windows.starts[indices[i]]) :][: windows.lookback + windows.horizon]
        axes.plot(dates[-seen - windows.horizon :], torch.cat([history[i], truth[i]]), color="gray", label="observed")
        for name, values in forecasts.items():
            axes.plot(dates[-windows.horizon :], values[i], label=name)
        axes.set(ylabel=series.variates[-1])
        axes.tick_params(axis="x", labelrotation=20)
    panels[0, 0].legend()
    save_figure(figure, path)


def plot_forecast(path: Path, series: Series, dates: np.ndarray, values: np.ndarray, most: int = 6) -> None:
    """Draw the end of each variate (of the last `most`) and its forecast."""
    import matplotlib.pyplot as plt

    shown = range(max(0, len(series.variates) - most), len(series.variates))
    figure, panels = plt.subplots(len(shown), figsize=(8, 2.2 * len(shown)), layout="constrained", squeeze=False)
    for axes, i in zip(panels[:, 0], shown, strict=True):
        axes.plot(series.dates[-4 * len(dates) :], series.values[-4 * len(dates) :, i], color="gray", label="observed")
        axes.plot(dates, values[:, i], label="forecast")
        axes.set(ylabel=series.columns[i])
        axes.tick_params(axis="x", labelrotation=20)
    panels[0, 0].legend()
    save_figure(figure, path)
