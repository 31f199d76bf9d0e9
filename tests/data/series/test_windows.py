import logging

import numpy as np
import pytest
import torch

from tests.tiny import make_series
from vim.data.series import Scaler, build_windows, calendar, last_window, select
from vim.data.series.windows import borders, fill_gaps
from vim.errors import UserError

NAN = float("nan")


@pytest.mark.parametrize("with_calendar", [False, True])
def test_what_is_known_beforehand_is_of_the_rows_to_come(with_calendar):
    values = np.random.default_rng(0).normal(5, 3, (100, 3))
    series = select(make_series(values), ["c", "a", "b"], 1)
    assert series.variates == ["c", "a"]
    windows, scaler = build_windows(series, lookback=4, horizon=2, with_calendar=with_calendar)
    batch = windows["test"].batch(torch.tensor([3]))
    assert batch.x.shape == (1, 4, 2) and batch.observed.shape == (1, 2, 2)
    assert batch.future.shape == (1, 2, 5 * with_calendar + 1)
    known = (values[83:85, 1] - values[:70, 1].mean()) / values[:70, 1].std()
    np.testing.assert_allclose(batch.future[0, :, -1], known, rtol=1e-5)
    np.testing.assert_allclose(scaler.unscale(batch.y[0]), values[83:85][:, [2, 0]], rtol=1e-5)
    values[50, 1] = NAN
    with pytest.raises(UserError, match="it, column b: 1 values are missing"):
        select(make_series(values), ["c", "a", "b"], 1)


@pytest.mark.parametrize(
    ("split", "n", "expected"),
    [
        ("etth", 17420, [(0, 8640), (8640 - 512, 11520), (11520 - 512, 14400)]),
        ("ettm", 69680, [(0, 34560), (34560 - 512, 46080), (46080 - 512, 57600)]),
        ("ratio", 52696, [(0, 36887), (36887 - 512, 42157), (42157 - 512, 52696)]),  # Weather
        ("ratio", 26304, [(0, 18412), (18412 - 512, 21044), (21044 - 512, 26304)]),  # Electricity
        ("ratio", 17544, [(0, 12280), (12280 - 512, 14036), (14036 - 512, 17544)]),  # Traffic
        ("ratio", 7588, [(0, 5311), (5311 - 512, 6071), (6071 - 512, 7588)]),  # Exchange
    ],
)
def test_the_splits_of_the_benchmarks(split, n, expected):
    """As in the code of Informer and of what followed: 12, 4 and 4 months of 30 days; 70, 10 and 20 %."""
    assert borders(split, n, 512, "it") == expected


def test_the_windows_of_etth():
    """8,033, 2,785 and 2,785 windows of 512 + 96, as the literature counts them."""
    windows, _ = build_windows(make_series(np.arange(17420.0)), lookback=512, horizon=96, split="etth")
    assert [len(part) for part in windows.values()] == [8033, 2785, 2785]
    test = windows["test"]
    assert (test.starts[0], test.starts[-1]) == (11520 - 512, 14400 - 608)


def test_a_split_that_does_not_fit():
    with pytest.raises(UserError, match="it has 100 rows: data.split='etth' takes 14400"):
        build_windows(make_series(np.arange(100)), lookback=4, horizon=2, split="etth")
    with pytest.raises(UserError, match="data.split must be one of 'etth', 'ettm', 'ratio', got 'half'"):
        build_windows(make_series(np.arange(100)), lookback=4, horizon=2, split="half")


@pytest.mark.parametrize(("lookback", "horizon", "part"), [(60, 11, "train"), (30, 11, "val"), (69, 2, "train")])
def test_a_horizon_longer_than_the_data(lookback, horizon, part):
    with pytest.raises(UserError, match=rf"the {part} part has \d+ rows .* a window takes {lookback} \+ {horizon}"):
        build_windows(make_series(np.arange(100)), lookback=lookback, horizon=horizon)


def test_no_part_sees_what_it_must_not():
    """A training window ends with the training part; what a test window asks for, no other part has."""
    n, lookback, horizon = 200, 16, 8
    windows, _ = build_windows(make_series(np.arange(n)), lookback=lookback, horizon=horizon)
    asked = {
        name: {int(row) for start in part.starts for row in range(start + lookback, start + lookback + horizon)}
        for name, part in windows.items()
    }
    assert asked["train"] == set(range(lookback, 140))
    assert asked["val"] == set(range(140, 160))
    assert asked["test"] == set(range(160, 200))


def test_calendar():
    dates = np.array(["2024-03-01T18:00", "2024-03-02T00:00", "2024-03-04T12:00"], "datetime64[ns]")  # Fri, Sat, Mon
    week = 2 * np.pi * np.array([4.75, 5, 0.5]) / 7
    expected = np.stack([[-1, 0, 0], [0, 1, -1], np.sin(week), np.cos(week), [0, 1, 0]], 1)
    np.testing.assert_allclose(calendar(dates), expected, atol=1e-6)
    windows, _ = build_windows(make_series(np.arange(100.0)), lookback=4, horizon=3, with_calendar=True)
    batch = windows["val"].batch(torch.tensor([2]))
    torch.testing.assert_close(batch.future[0], calendar(make_series(np.arange(100.0)).dates[72:75]))


def test_gaps_are_filled_up_to_a_length():
    values = np.array([[NAN, 1], [2, NAN], [NAN, NAN], [NAN, NAN], [5, 6], [NAN, 7]])
    expected = np.array([[NAN, 1], [2, NAN], [2, NAN], [2, NAN], [5, 6], [5, 7]])
    np.testing.assert_array_equal(fill_gaps(values, 2), expected)
    np.testing.assert_array_equal(fill_gaps(values, 0), values)
    assert fill_gaps(values, 3)[3, 1] == 1


def test_filled_values_are_seen_and_not_asked_for(caplog):
    values = np.arange(100.0)
    values[[30, 31]] = NAN
    windows, scaler = build_windows(make_series(values), lookback=4, horizon=2, max_gap=2)
    assert windows["train"].left_out == 0
    assert "2 missing values filled" in caplog.text
    batch = windows["train"].batch(torch.tensor([26, 29]))
    assert batch.observed[..., 0].tolist() == [[False, False], [True, True]]
    np.testing.assert_allclose(scaler.unscale(batch.x[1, :, 0]), [29, 29, 29, 32], rtol=1e-6)
    np.testing.assert_allclose(scaler.mean.item(), np.nanmean(values[:70]))


def test_windows_that_touch_a_long_gap_are_left_out(caplog):
    values = np.stack([np.arange(100.0), np.arange(100.0)], 1)
    values[30:34, 1] = NAN
    windows, _ = build_windows(make_series(values), lookback=4, horizon=2, max_gap=3)
    train = windows["train"]
    assert train.starts.tolist() == [*range(25), *range(34, 65)]
    assert train.left_out == 9
    assert train.batch(torch.arange(len(train))).x.isfinite().all()
    assert "9 windows of the train part left out: they touch a gap of more than 3 rows or at the start" in caplog.text


def test_gaps_that_leave_nothing():
    values = np.arange(100.0)
    values[2:70:5] = NAN
    with pytest.raises(UserError, match=r"leave the train part no window of 4 \+ 2 rows .* a gap of more than 0 rows"):
        build_windows(make_series(values), lookback=4, horizon=2, max_gap=0)
    values[:70] = NAN
    with pytest.raises(UserError, match="training part: column a has no value"):
        build_windows(make_series(values), lookback=4, horizon=2)


def test_a_part_that_asks_for_nothing():
    values = np.arange(100.0)
    values[70:80] = NAN
    with pytest.raises(UserError, match="leave the val part no window .* with a value to forecast"):
        build_windows(make_series(values), lookback=4, horizon=2, max_gap=10)
    values[75] = 0
    build_windows(make_series(values), lookback=4, horizon=2, max_gap=10)


def test_rows_that_are_missing_are_told(caplog):
    series = make_series(np.arange(100.0))
    series.dates[50:] += np.timedelta64(3, "h")
    build_windows(series, lookback=4, horizon=2)
    assert "1 rows are not 1 hours after the one before" in caplog.text


@pytest.mark.parametrize("step", ["h", "M", "Y"])
def test_a_whole_series_tells_nothing(step, caplog):
    series = make_series(np.arange(100.0))
    series.dates = (np.datetime64("1900", step) + np.arange(100)).astype("datetime64[us]")
    with caplog.at_level(logging.INFO):
        build_windows(series, lookback=4, horizon=2)
    assert caplog.text == ""


def test_the_last_window():
    values = np.arange(20.0)
    values[18] = NAN
    scaler = Scaler(torch.zeros(1).double(), torch.ones(1).double())
    assert last_window(make_series(values), scaler, 4, 1)[0, :, 0].tolist() == [16, 17, 17, 19]
    with pytest.raises(UserError, match="column a: the last 4 rows, .* touch a gap of more than 0 rows"):
        last_window(make_series(values), scaler, 4, 0)
    assert last_window(make_series(values), scaler, 1, 0).shape == (1, 1, 1)
    with pytest.raises(UserError, match="it has 20 rows: the model sees 21"):
        last_window(make_series(values), scaler, 21, 1)
