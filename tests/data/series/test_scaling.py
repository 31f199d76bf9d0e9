import numpy as np
import pytest
import torch

from tests.tiny import make_series
from vim.data.series import Scaler, build_windows


def test_scaling_is_the_training_parts():
    values = np.random.default_rng(0).normal(5, 3, (100, 2))
    windows, scaler = build_windows(make_series(values), lookback=4, horizon=2)
    np.testing.assert_allclose(scaler.mean, values[:70].mean(0))
    np.testing.assert_allclose(scaler.std, values[:70].std(0))
    batch = windows["test"].batch(torch.tensor([0, 3]))
    np.testing.assert_allclose(scaler.unscale(batch.x[1]), values[79:83], rtol=1e-5)
    np.testing.assert_allclose(scaler.unscale(batch.y[1]), values[83:85], rtol=1e-5)
    assert batch.observed.all()
    other, _ = build_windows(make_series(10 * values), lookback=4, horizon=2, scaler=scaler)
    np.testing.assert_allclose(scaler.unscale(other["train"].values), 10 * values, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("value", [0.0, 0.1, -1e9])
def test_a_constant_column(value, caplog):
    values = np.stack([np.arange(100.0), np.full(100, value)], 1)
    windows, scaler = build_windows(make_series(values), lookback=4, horizon=2)
    assert scaler.std[1] == 1
    assert windows["train"].values[:, 1].abs().max() < 1e-6
    assert "training part: constant, and only shifted: b" in caplog.text


@pytest.mark.parametrize("spread, is_constant", [(1e-13, True), (1e-11, False), (1e-7, False)])
def test_a_column_is_constant_if_its_deviation_is_rounding(spread, is_constant):
    values = 1 + spread * np.tile([-1.0, 1.0], 50)[:, None]
    scaler = Scaler.of(values, ["a"], "it")
    assert scaler.std.item() == (1 if is_constant else pytest.approx(spread, rel=1e-3))


def test_a_small_but_varying_column_is_not_constant():
    scaler = Scaler.of(1e-9 * np.arange(10.0)[:, None], ["a"], "it")
    assert scaler.std.item() == pytest.approx(1e-9 * np.arange(10.0).std())
