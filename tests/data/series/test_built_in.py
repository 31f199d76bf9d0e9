import sys

import numpy as np
import pytest
from scipy.integrate import solve_ivp

from vim.data.series import load_series
from vim.errors import UserError


@pytest.mark.parametrize(("name", "count", "first"), [("vic_elec", 3600, 7926.529), ("seattle_temps", 8759, 39.4)])
def test_built_in(name, count, first):
    series = load_series(name)
    assert series.values.shape == (count, 1)
    assert series.values[0, 0] == pytest.approx(first, abs=1e-3)
    assert series.step == np.timedelta64(1, "h")


def test_lorenz_is_a_solution():
    def velocity(_, state):
        x, y, z = state
        return [10 * (y - x), x * (28 - z) - y, x * y - 8 / 3 * z]

    series = load_series("lorenz")
    assert series.values.shape == (6000, 3)
    start = solve_ivp(velocity, (0, 5.05), [1.0, 1.0, 1.0], "DOP853", rtol=1e-10, atol=1e-10).y[:, -1]
    np.testing.assert_allclose(series.values[0], start, atol=1e-3)  # the 101st row
    for start in (0, 3000):
        times = 0.05 * np.arange(20)
        path = solve_ivp(velocity, (0, 1), series.values[start], "DOP853", times, rtol=1e-10, atol=1e-10).y.T
        np.testing.assert_allclose(series.values[start : start + 20], path, atol=1e-3)


@pytest.mark.parametrize(
    ("name", "package", "pip_name"),
    [
        ("vic_elec", "statsmodels", "statsmodels"),
        ("vic_elec", "pandas", "pandas"),
        ("seattle_temps", "vega_datasets", "vega-datasets"),
    ],
)
def test_a_package_that_is_not_installed(name, package, pip_name, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    message = rf"the series {name} needs {pip_name}, which is not installed: pip install -e '\.\[series\]'"
    with pytest.raises(UserError, match=message):
        load_series(name)
