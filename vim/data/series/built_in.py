"""Series that come with packages or are simulated, and the names by which a config chooses one."""

from importlib.resources import files
from pathlib import Path

import numpy as np

from vim.data.series.csv import from_table, read_series
from vim.data.series.table import Series
from vim.errors import UserError, require


def victoria_electricity() -> Series:
    """The electricity demand of Victoria, Australia: 3,600 hours of January to May 2012.

    Each value is the sum of two half-hourly readings, so twice their mean.

    Source: the R package tsibbledata (AEMO), as packed by statsmodels for its tests of MSTL.

    Raises:
        UserError: statsmodels is not installed.
    """
    purpose = "the series vic_elec"
    path = files(require("statsmodels", purpose)) / "tsa/stl/tests/results/mstl_elec_vic.csv"
    table = require("pandas", purpose).read_csv(str(path))
    return from_table(table.rename(columns={"ds": "date", "y": "demand"}), "vic_elec")


def seattle_temperature() -> Series:
    """The temperature of Seattle, in °F: 8,759 hours of 2010; usual values, not the weather of one year.

    Source: NOAA's climate normals, as packed by vega-datasets.

    Raises:
        UserError: vega-datasets is not installed.
    """
    purpose = "the series seattle_temps"
    path = files(require("vega_datasets", purpose)) / "_data/seattle-temps.csv"
    return from_table(require("pandas", purpose).read_csv(str(path)), "seattle_temps")


def lorenz(n: int = 6000, step: float = 0.05) -> Series:
    """Lorenz's system in its chaotic state, three variates, simulated by the fourth-order Runge-Kutta method.

    The rows are 0.05 time units apart, about fifteen to an oscillation, and dated a minute apart. The solver is written
    out here: a library's next release may round differently, and a chaotic system then gives another series.

    Source: E. N. Lorenz, Deterministic Nonperiodic Flow, 1963.
    """

    def velocity(state: np.ndarray) -> np.ndarray:
        x, y, z = state
        return np.array([10 * (y - x), x * (28 - z) - y, x * y - 8 / 3 * z])

    substeps, unsettled = 10, 100  # the first rows are not yet on the attractor
    dt, state, values = step / substeps, np.array([1.0, 1.0, 1.0]), np.empty((n + unsettled, 3))
    for i in range(len(values) * substeps):
        k1 = velocity(state)
        k2 = velocity(state + dt / 2 * k1)
        k3 = velocity(state + dt / 2 * k2)
        k4 = velocity(state + dt * k3)
        state = state + dt / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
        values[i // substeps] = state
    dates = np.datetime64("2000-01-01", "ns") + np.arange(n) * np.timedelta64(1, "m")
    return Series(dates, values[unsettled:], ["x", "y", "z"], "lorenz")


BUILT_IN = {"vic_elec": victoria_electricity, "seattle_temps": seattle_temperature, "lorenz": lorenz}


def load_series(dataset: str, file: str | None = None, only: list[str] | None = None) -> Series:
    """Load the series that a config names.

    Args:
        dataset: a name in BUILT_IN, or "csv".
        file: the path of the CSV file.
        only: the columns to read from the CSV file; by default all.

    Raises:
        UserError: there is no such data set, or `file` is missing or cannot be read; see :func:`read_series`.
    """
    if dataset in BUILT_IN:
        return BUILT_IN[dataset]()
    if dataset != "csv":
        raise UserError(f"data.dataset must be 'csv' or one of {', '.join(map(repr, BUILT_IN))}, got {dataset!r}")
    if not file:
        raise UserError("data.file must name the CSV file: --cfg-options data.file=PATH")
    return read_series(Path(file), only)
