import importlib.resources
import logging
import sys

import numpy as np
import pytest
import torch

from vim.data import series as module
from vim.data.series import (
    Scaler,
    Series,
    borders,
    build_windows,
    calendar,
    dates_after,
    fill_gaps,
    last_window,
    load_series,
    read_series,
    read_static,
    select,
)
from vim.errors import UserError

pytest.importorskip("pandas")
NAN = float("nan")


def make(values, step="h", start="2020-01-01"):
    """Columns a, b, ... of values (n, m) or (n,)."""
    values = np.asarray(values, float)
    values = values[:, None] if values.ndim == 1 else values
    dates = np.datetime64(start, "ns") + np.arange(len(values)) * np.timedelta64(1, step)
    return Series(dates, values, [chr(97 + i) for i in range(values.shape[1])], "it")


def write(path, *lines):
    path.write_text("\n".join(lines) + "\n")
    return path


HOURS = [f"2020-01-01 0{i}:00:00" for i in range(5)]


def rows(*values):
    return [f"{date},{value}" for date, value in zip(HOURS, values, strict=False)]


# Reading


def test_a_table(tmp_path):
    series = read_series(write(tmp_path / "a.csv", "date,HUFL,OT", *rows("5.827,1", "5.693,", "-1e2,3")))
    assert series.columns == ["HUFL", "OT"]
    assert series.dates[1] == np.datetime64("2020-01-01T01")
    np.testing.assert_array_equal(series.values, [[5.827, 1], [5.693, NAN], [-100, 3]])
    assert series.step == np.timedelta64(1, "h")


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["time,a", *rows(1, 2, 3)], "has no column named date, only time, a"),
        (["date", *HOURS], "has no column beside date"),
        (["date,a", *rows(1, 2)], "has 2 rows: expected three at least"),
        (["date,a", *rows("1,2,3,4", 2, "3,4,5")], "cannot read .* as a CSV file"),
        (["date;a", *HOURS], "has one column, date;a: is it separated by semicolons"),
        (["date;a", *rows(1, 2, 3)], "has one column, date;a: is it separated by semicolons"),
        (["Date,a", *rows(1, 2, 3)], "no column named date, only Date, a: rename 'Date' to date"),
        ([",date,a", *(f"{i},{row}" for i, row in enumerate(rows(1, 2, 3)))], "column 1 has no name: leave it out"),
        (["date,a,a", *rows("1,2", "2,3", "3,4")], "has 2 columns named a: rename"),
        (["date,a,b", *rows("1,2", "2,x", "3,4")], "row 2, column b: a number up to 1e\\+30 expected, got x"),
        (["date,a,b", *rows("1,2", "2,4", "inf,4")], "row 3, column a: a number up to 1e\\+30 expected, got inf"),
        (["date,a", *rows(1, "-1.797e308", 3)], "row 2, column a: a number up to 1e\\+30 expected, got -1.797e"),
        (["date,a", *rows(1, 2), "whenever,3"], "row 3: a date .* written as that of row 1, expected, got whenever"),
        (["date,a", "1,1", "2,2", "3,3"], "row 1: a date with the year first.* got 1: write it as 2020-01-31 23:00"),
        (["date,a", ",1", ",2", ",3"], "row 1: a date with the year first"),
        (["date,a", "2020-01-13,1", "2020-13-01,1", "2020-01-14,1"], "row 2: a date with the year first"),
        (["date,a", *rows(1, 2), ",3"], "row 3: a date .* got nan"),
        (["date,a", *(f"{hour[:16]}+0{i}:00,1" for i, hour in enumerate(HOURS))], r"offsets from UTC \(\+00:00, \+01"),
        (
            ["date,a", f"{HOURS[1]},1", f"{HOURS[0]},1", f"{HOURS[2]},1"],
            "row 2: its date 2020-01-01 00:00:00 comes before that of row 1: sort the rows .* in UTC",
        ),
        (["date,a", *rows(1), *rows(2), *rows(3), "2020-01-02,3"], "row 4: a date"),
        (["date,a", *rows(1), *rows(2, 3), *rows(2, 3)[1:]], "most rows have the date of the row before"),
    ],
)
def test_a_table_that_is_none(tmp_path, lines, message):
    path = write(tmp_path / "a.csv", *lines)
    with pytest.raises(UserError, match=message) as error:
        read_series(path)
    assert str(path) in str(error.value)


def test_no_file(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        read_series(tmp_path / "a.csv")
    with pytest.raises(UserError, match="data.file must name the CSV file"):
        load_series("csv", "")
    with pytest.raises(
        UserError, match="data.dataset must be 'csv' or one of 'vic_elec', 'seattle_temps', 'lorenz', got"
    ):
        load_series("etth1")
    (tmp_path / "empty.csv").touch()
    with pytest.raises(UserError, match="cannot read .*empty.csv as a CSV file"):
        read_series(tmp_path / "empty.csv")
    (tmp_path / "binary.csv").write_bytes(b"\xff\xfe\x00date")
    with pytest.raises(UserError, match="cannot read .*binary.csv as a CSV file"):
        read_series(tmp_path / "binary.csv")


@pytest.mark.parametrize(
    ("name", "package", "count", "first"),
    [("vic_elec", "statsmodels", 3600, 7926.529), ("seattle_temps", "vega_datasets", 8759, 39.4)],
)
def test_built_in(name, package, count, first):
    pytest.importorskip(package)
    series = load_series(name)
    assert series.values.shape == (count, 1)
    assert series.values[0, 0] == pytest.approx(first, abs=1e-3)
    assert series.step == np.timedelta64(1, "h")


def test_lorenz_is_a_solution():
    from scipy.integrate import solve_ivp

    def velocity(_, state):
        x, y, z = state
        return [10 * (y - x), x * (28 - z) - y, x * y - 8 / 3 * z]

    series = load_series("lorenz")
    assert series.values.shape == (6000, 3)
    for start in (0, 3000):
        times = 0.05 * np.arange(20)
        path = solve_ivp(velocity, (0, 1), series.values[start], "DOP853", times, rtol=1e-10, atol=1e-10).y.T
        np.testing.assert_allclose(series.values[start : start + 20], path, atol=1e-3)


def test_what_is_not_installed(monkeypatch):
    def missing(package):
        raise ModuleNotFoundError(package)

    monkeypatch.setattr(module, "files", missing)
    with pytest.raises(UserError, match=r"comes with vega-datasets: pip install 'vim-zoo\[series\]'"):
        load_series("seattle_temps")
    monkeypatch.setattr(module, "files", importlib.resources.files)
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(UserError, match=r"takes pandas: pip install 'vim-zoo\[series\]'"):
        load_series("vic_elec")


@pytest.mark.parametrize(
    ("text", "unit"),
    [
        ("2020/1/{} 0:00", "D"),  # as Exchange has them
        ("2020-01-0{}T00:00:00Z", "D"),
        ("2020-01-0{} 00:00+02:00", "D"),
        ("2020-01-01 00:00:00.{:03}", "ms"),
        ("202001{:02}", "D"),
        ("2020-{:02}", "M"),
        ("1{:03}", "Y"),
        ("300{}-01-01", "Y"),
    ],
)
def test_other_ways_to_write_a_date(tmp_path, text, unit):
    series = read_series(write(tmp_path / "a.csv", "date,a", *(f"{text.format(i)},{i}" for i in (1, 2, 3))))
    first = {"1{:03}": "1001", "300{}-01-01": "3001", "2020-01-01 00:00:00.{:03}": "2020-01-01T00:00:00.001"}
    expected = np.datetime64(first.get(text, "2020-01-01"), unit) + np.arange(3)
    np.testing.assert_array_equal(series.dates, expected)


@pytest.mark.parametrize("text", ["0{}/01/2020", "{}/13/2020", "0{}.01.2020 00:00", "0{}-01-20", "Jan {} 2020"])
def test_the_year_comes_first(tmp_path, text):
    """01/02/2020 is one day here and another there."""
    with pytest.raises(UserError, match="row 1: a date with the year first.* write it as 2020-01-31 23:00"):
        read_series(write(tmp_path / "a.csv", "date,a", *(f"{text.format(i)},{i}" for i in (1, 2, 3))))


def test_a_date_that_comes_twice(tmp_path, caplog):
    """As in the Weather benchmark."""
    series = read_series(write(tmp_path / "a.csv", "date,a", *rows(1, 2, 3), f"{HOURS[2]},4", f"{HOURS[3]},5"))
    assert series.values[:, 0].tolist() == [1, 2, 3, 4, 5]
    scaler = Scaler(torch.zeros(1).double(), torch.ones(1).double())
    last_window(series, scaler, 2, 0)
    assert caplog.text == ""
    last_window(series, scaler, 4, 0)
    assert "1 rows have the date of the one before" in caplog.text
    assert "are not 1 hours" not in caplog.text


def test_only_some_columns(tmp_path):
    path = write(tmp_path / "a.csv", "date,town,a", *rows("Oslo,1", "Oslo,2", "Oslo,3"))
    assert load_series("csv", str(path), ["a"]).columns == ["a"]
    with pytest.raises(UserError, match="column town: a number"):
        load_series("csv", str(path))


# Covariates


def test_static_covariates(tmp_path):
    """In the order of the variates, scaled over them; what is of no variate is left out."""
    path = write(tmp_path / "a.csv", "area,column,height", "1,b,5", "9,x,9", "3,a,5")
    torch.testing.assert_close(read_static(path, ["a", "b"]), torch.tensor([[1.0, 0.0], [-1.0, 0.0]]))
    with pytest.raises(UserError, match="a row for each variate expected, 0 found for c"):
        read_static(path, ["a", "c"])
    with pytest.raises(UserError, match="column height: 1 values are missing"):
        read_static(write(tmp_path / "b.csv", "column,height", "a,1", "b,"), ["a", "b"])
    with pytest.raises(UserError, match="has no column named column, only date, a"):
        read_static(write(tmp_path / "c.csv", "date,a", *rows(1)), ["a"])


@pytest.mark.parametrize("with_calendar", [False, True])
def test_what_is_known_beforehand_is_of_the_rows_to_come(with_calendar):
    values = np.random.default_rng(0).normal(5, 3, (100, 3))
    series = select(make(values), ["c", "a", "b"], 1)
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
        select(make(values), ["c", "a", "b"], 1)


# Splits


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
    windows, _ = build_windows(make(np.arange(17420.0)), lookback=512, horizon=96, split="etth")
    assert [len(part) for part in windows.values()] == [8033, 2785, 2785]
    test = windows["test"]
    assert (test.starts[0], test.starts[-1]) == (11520 - 512, 14400 - 608)


def test_a_split_that_does_not_fit():
    with pytest.raises(UserError, match="it has 100 rows: data.split='etth' takes 14400"):
        build_windows(make(np.arange(100)), lookback=4, horizon=2, split="etth")
    with pytest.raises(UserError, match="data.split must be one of 'etth', 'ettm', 'ratio', got 'half'"):
        build_windows(make(np.arange(100)), lookback=4, horizon=2, split="half")


@pytest.mark.parametrize(("lookback", "horizon", "part"), [(60, 11, "train"), (30, 11, "val"), (69, 2, "train")])
def test_a_horizon_longer_than_the_data(lookback, horizon, part):
    with pytest.raises(UserError, match=rf"the {part} part has \d+ rows .* a window takes {lookback} \+ {horizon}"):
        build_windows(make(np.arange(100)), lookback=lookback, horizon=horizon)


# Scaling and windows


def test_scaling_is_the_training_parts():
    values = np.random.default_rng(0).normal(5, 3, (100, 2))
    windows, scaler = build_windows(make(values), lookback=4, horizon=2)
    np.testing.assert_allclose(scaler.mean, values[:70].mean(0))
    np.testing.assert_allclose(scaler.std, values[:70].std(0))
    batch = windows["test"].batch(torch.tensor([0, 3]))
    np.testing.assert_allclose(scaler.unscale(batch.x[1]), values[79:83], rtol=1e-5)
    np.testing.assert_allclose(scaler.unscale(batch.y[1]), values[83:85], rtol=1e-5)
    assert batch.observed.all()
    other, _ = build_windows(make(10 * values), lookback=4, horizon=2, scaler=scaler)
    np.testing.assert_allclose(scaler.unscale(other["train"].values), 10 * values, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("value", [0.0, 0.1, -1e9])
def test_a_constant_column(value, caplog):
    values = np.stack([np.arange(100.0), np.full(100, value)], 1)
    windows, scaler = build_windows(make(values), lookback=4, horizon=2)
    assert scaler.std[1] == 1
    assert windows["train"].values[:, 1].abs().max() < 1e-6
    assert "training part: constant, and only shifted: b" in caplog.text


def test_a_small_but_varying_column_is_not_constant():
    scaler = Scaler.of(1e-9 * np.arange(10.0)[:, None], ["a"], "it")
    assert scaler.std.item() == pytest.approx(1e-9 * np.arange(10.0).std())


def test_no_part_sees_what_it_must_not():
    """A training window ends with the training part; what a test window asks for, no other part has."""
    n, lookback, horizon = 200, 16, 8
    windows, _ = build_windows(make(np.arange(n)), lookback=lookback, horizon=horizon)
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
    windows, _ = build_windows(make(np.arange(100.0)), lookback=4, horizon=3, with_calendar=True)
    batch = windows["val"].batch(torch.tensor([2]))
    torch.testing.assert_close(batch.future[0], calendar(make(np.arange(100.0)).dates[72:75]))


# Missing values


def test_gaps_are_filled_up_to_a_length():
    values = np.array([[NAN, 1], [2, NAN], [NAN, NAN], [NAN, NAN], [5, 6], [NAN, 7]])
    expected = np.array([[NAN, 1], [2, NAN], [2, NAN], [2, NAN], [5, 6], [5, 7]])
    np.testing.assert_array_equal(fill_gaps(values, 2), expected)
    np.testing.assert_array_equal(fill_gaps(values, 0), values)
    assert fill_gaps(values, 3)[3, 1] == 1


def test_filled_values_are_seen_and_not_asked_for(caplog):
    values = np.arange(100.0)
    values[[30, 31]] = NAN
    windows, scaler = build_windows(make(values), lookback=4, horizon=2, max_gap=2)
    assert windows["train"].left_out == 0
    assert "2 missing values filled" in caplog.text
    batch = windows["train"].batch(torch.tensor([26, 29]))
    assert batch.observed[..., 0].tolist() == [[False, False], [True, True]]
    np.testing.assert_allclose(scaler.unscale(batch.x[1, :, 0]), [29, 29, 29, 32], rtol=1e-6)
    np.testing.assert_allclose(scaler.mean.item(), np.nanmean(values[:70]))


def test_windows_that_touch_a_long_gap_are_left_out(caplog):
    values = np.stack([np.arange(100.0), np.arange(100.0)], 1)
    values[30:34, 1] = NAN
    windows, _ = build_windows(make(values), lookback=4, horizon=2, max_gap=3)
    train = windows["train"]
    assert train.starts.tolist() == [*range(25), *range(34, 65)]
    assert train.left_out == 9
    assert train.batch(torch.arange(len(train))).x.isfinite().all()
    assert "9 windows of the train part left out: they touch a gap of more than 3 rows or at the start" in caplog.text


def test_gaps_that_leave_nothing():
    values = np.arange(100.0)
    values[2:70:5] = NAN
    with pytest.raises(UserError, match=r"leave the train part no window of 4 \+ 2 rows .* a gap of more than 0 rows"):
        build_windows(make(values), lookback=4, horizon=2, max_gap=0)
    values[:70] = NAN
    with pytest.raises(UserError, match="training part: column a has no value"):
        build_windows(make(values), lookback=4, horizon=2)


def test_a_part_that_asks_for_nothing():
    values = np.arange(100.0)
    values[70:80] = NAN
    with pytest.raises(UserError, match="leave the val part no window .* with a value to forecast"):
        build_windows(make(values), lookback=4, horizon=2, max_gap=10)
    values[75] = 0
    build_windows(make(values), lookback=4, horizon=2, max_gap=10)


def test_rows_that_are_missing_are_told(caplog):
    series = make(np.arange(100.0))
    series.dates[50:] += np.timedelta64(3, "h")
    build_windows(series, lookback=4, horizon=2)
    assert "1 rows are not 1 hours after the one before" in caplog.text


@pytest.mark.parametrize("step", ["h", "M", "Y"])
def test_a_whole_series_tells_nothing(step, caplog):
    series = make(np.arange(100.0))
    series.dates = (np.datetime64("1900", step) + np.arange(100)).astype("datetime64[us]")
    with caplog.at_level(logging.INFO):
        build_windows(series, lookback=4, horizon=2)
    assert caplog.text == ""


# The end


def test_the_last_window():
    values = np.arange(20.0)
    values[18] = NAN
    scaler = Scaler(torch.zeros(1).double(), torch.ones(1).double())
    assert last_window(make(values), scaler, 4, 1)[0, :, 0].tolist() == [16, 17, 17, 19]
    with pytest.raises(UserError, match="column a: the last 4 rows, .* touch a gap of more than 0 rows"):
        last_window(make(values), scaler, 4, 0)
    assert last_window(make(values), scaler, 1, 0).shape == (1, 1, 1)
    with pytest.raises(UserError, match="it has 20 rows: the model sees 21"):
        last_window(make(values), scaler, 21, 1)


@pytest.mark.parametrize(
    ("dates", "expected"),
    [
        (["2020-02-28 22:00", "2020-02-28 23:00", "2020-02-29 00:00"], ["2020-02-29T01:00", "2020-02-29T02:00"]),
        (["2020-11-01", "2020-12-01", "2021-01-01"], ["2021-02-01", "2021-03-01"]),
        (["2020-01-31", "2020-02-29", "2020-03-31"], ["2020-04-30", "2020-05-31"]),
        (["2020-01-01", "2020-01-02", "2020-01-03", "2020-01-06"], ["2020-01-07", "2020-01-08"]),
        (["1500-01-01", "1501-01-01", "1502-01-01"], ["1503-01-01", "1504-01-01"]),
        (["2020-01-15", "2020-02-15", "2020-04-15", "2020-05-15"], ["2020-06-15", "2020-07-15"]),
        (["2018-03-15", "2019-03-15", "2020-03-15"], ["2021-03-15", "2022-03-15"]),
        (["2020-01-01", "2020-01-02", "2020-01-03", "2020-01-07", "2020-01-10"], ["2020-01-13", "2020-01-14"]),
        (["2020-01-01", "2020-01-02", "2020-01-03", "2020-01-05", "2020-01-10"], ["2020-01-11", "2020-01-12"]),
        (
            [f"2020-01-0{day} {hour}:00" for day in (3, 4, 5) for hour in range(10, 18)],
            ["2020-01-05T18", "2020-01-05T19"],
        ),
    ],
)
def test_the_dates_to_come(dates, expected):
    dates = np.array(dates, "datetime64[us]")
    series = Series(dates, np.zeros((len(dates), 1)), ["a"], "it")
    np.testing.assert_array_equal(dates_after(series, 2), np.array(expected, "datetime64[us]"))


def test_columns_are_found_by_name():
    series = make(np.arange(30.0).reshape(10, 3))
    np.testing.assert_array_equal(select(series, ["c", "a"]).values, series.values[:, [2, 0]])
    with pytest.raises(UserError, match="it has no column d: expected a, d"):
        select(series, ["a", "d"])
