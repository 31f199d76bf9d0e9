"""Forecasts of pandas frames: those of tools/forecast.py on the same rows."""

import re
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pandas
import pytest

from tests.tasks.test_forecasting import BASE, SMALL, make
from tests.tiny import ROOT, run_of
from vim.data.series import series_of_frame
from vim.engine.config import load_recipe
from vim.engine.weights import read_run
from vim.errors import UserError
from vim.forecasting import FrameForecaster
from vim.options import SeriesRecipe
from vim.tasks.forecasting.build import load_forecaster
from vim.tasks.forecasting.predict import forecast_next

OPTIONS = {**SMALL, "schedule.num_epochs": 1}


def wide_frame(n=400):
    series = make(n)
    return pandas.DataFrame(series.values, pandas.DatetimeIndex(series.dates), series.columns)


def long_frame(wide=None):
    wide = wide_frame() if wide is None else wide
    return wide.rename_axis(index="ds", columns="unique_id").unstack().rename("y").reset_index()


@pytest.fixture(scope="module")
def fitted():
    return FrameForecaster(BASE, OPTIONS).fit(wide_frame())


def test_its_numbers_are_the_tools(fitted, tmp_path):
    """The table as a file, and as a frame, long or wide; the checkpoint of each serves the other."""
    frame, table, run = long_frame(), tmp_path / "table.csv", tmp_path / "run"
    frame.to_csv(table, index=False)
    run_of(load_recipe(BASE, SeriesRecipe, {**OPTIONS, "data.dataset": "csv", "data.file": str(table)}), run).fit()
    tool = load_forecaster(run / "best.pth")
    dates, values = forecast_next(tool, tool.series())

    one = FrameForecaster(BASE, OPTIONS).fit(frame, tmp_path / "own")
    got = one.predict()
    assert (tmp_path / "own/log.csv").read_text() == (run / "log.csv").read_text()
    assert list(got.columns) == ["unique_id", "ds", "TSM2"]
    for wide in (got.pivot(index="ds", columns="unique_id", values="TSM2"), fitted.predict()):
        assert list(wide.columns) == ["c0", "c1"]
        np.testing.assert_array_equal(wide.index, dates)
        np.testing.assert_array_equal(wide.to_numpy(), values)

    one.save(tmp_path / "saved.pth")
    assert "training" not in read_run(tmp_path / "saved.pth")
    saved = load_forecaster(tmp_path / "saved.pth")
    np.testing.assert_array_equal(forecast_next(saved, saved.series(table))[1], values)
    for path in (tmp_path / "saved.pth", run / "best.pth"):
        pandas.testing.assert_frame_equal(FrameForecaster.load(path).predict(frame), got)


@pytest.mark.parametrize("column", ["ds", "date"])
def test_a_frame_comes_back_in_its_form(column, fitted):
    wide = wide_frame()
    expected = fitted.predict(wide)
    assert list(expected.index) == list(pandas.date_range(wide.index[-1], periods=5, freq="h")[1:])
    got = fitted.predict(wide.reset_index(names=column))
    pandas.testing.assert_frame_equal(got, expected.reset_index(names=column))
    texts = wide.reset_index(names=column).astype({column: str})
    pandas.testing.assert_frame_equal(fitted.predict(texts), got)
    shuffled = long_frame().sample(frac=1, random_state=0).assign(other="x").astype({"unique_id": "category"})
    long = fitted.predict(shuffled)
    assert long["unique_id"].dtype == "category"
    np.testing.assert_array_equal(long["TSM2"], expected.to_numpy().T.flatten())


def test_numbers_as_names():
    frame = wide_frame().set_axis([7, 12], axis=1)
    got = FrameForecaster(BASE, OPTIONS).fit(long_frame(frame)).predict()
    assert got["unique_id"].tolist() == [7] * 4 + [12] * 4


def test_series_of_different_starts(caplog):
    """The rows that all have are learned from, as if there were no others."""
    whole = wide_frame()
    late = long_frame().drop(range(400, 500))  # of c1
    series = series_of_frame(late)
    np.testing.assert_array_equal(series.values, whole.to_numpy()[100:])
    assert series.dates[0] == whole.index[100]
    assert "the frame: 100 rows left out, which are before the first of c1" in caplog.text
    got, expected = (FrameForecaster(BASE, OPTIONS).fit(frame).predict() for frame in (late, long_frame(whole[100:])))
    pandas.testing.assert_frame_equal(got, expected)


def test_a_column_known_beforehand():
    options = {**OPTIONS, "data.known": ["c1"]}
    known = wide_frame()
    one = FrameForecaster(BASE, options).fit(known[:396])
    known.iloc[396:, 0] = np.nan
    got = one.predict(known)
    assert list(got.columns) == ["c0"] and list(got.index) == list(known.index[396:])
    known.iloc[390, 0] = np.nan
    with pytest.raises(UserError, match="the frame has no value of c0 at 2020-01-17T06:00:00: fill it"):
        one.predict(known)


def without(name):
    return long_frame().drop(columns=name)


def changed(column, row, value):
    return long_frame().assign(**{column: lambda frame: frame[column].mask(frame.index == row, value)})


@pytest.mark.parametrize(
    ("make_frame", "message"),
    [
        (lambda: without("y"), "the frame has a unique_id and no column y: a long frame has unique_id, ds, y"),
        (lambda: without("ds"), "the frame has a unique_id and no column ds: a long frame"),
        (lambda: without("unique_id"), "the frame, row 401: its date 2020-01-01 00:00:00 comes before"),
        (lambda: wide_frame().reset_index(drop=True), "the frame has no column ds, only c0, c1"),
        (lambda: wide_frame().drop(wide_frame().index[9]), "irregular dates: 2020-01-01T10:00:00 follows 2020"),
        (lambda: wide_frame().iloc[[*range(9), 8, *range(9, 99)]], "irregular dates: 2020-01-01T08:00:00 follows 20"),
        (lambda: changed("ds", 1, long_frame()["ds"][0]), "has no unique_id, or several rows, for c0 at 2020-01"),
        (lambda: changed("unique_id", 1, None), "has no unique_id, or several rows, for .* at 2020-01-01 01:00"),
        (lambda: changed("y", 9, np.nan), "the frame has no value of c0 at 2020-01-01T09:00:00: fill it, or drop"),
        (lambda: wide_frame().assign(c0=np.nan), "the frame has no value of c0 at 2020-01-01T00:00:00"),
        (lambda: wide_frame().assign(c0="x"), "the frame, row 1, column c0: a number up to 1e.30 expected, got x"),
        (lambda: wide_frame(20), "the frame has 20 rows: the model sees 48"),
        (lambda: wide_frame(2), "the frame has 2 rows: expected three at least"),
        (lambda: wide_frame().assign(c2=1.0), "the frame has an unknown column, c2: expected c0, c1"),
        (lambda: long_frame(wide_frame().assign(c2=1.0)), "the frame has an unknown unique_id, c2: expected c0, c1"),
        (lambda: wide_frame()[["c0"]], "the frame has no column c1: expected c0, c1"),
        (lambda: wide_frame().tz_localize("UTC"), "dates in the time zone UTC: take it off, by tz_localize.None."),
        (lambda: wide_frame().set_axis(["c0", "c0"], axis=1), "several columns or series of one name, among c0, c0"),
        (lambda: wide_frame().reset_index(names="ds").assign(date=1.0), "a column or a series named date beside"),
        (lambda: long_frame(wide_frame().set_axis(["c0", "date"], axis=1)), "a column or a series named date beside"),
        (lambda: wide_frame().to_numpy(), "a pandas.DataFrame expected, got numpy.ndarray"),
    ],
)  # fmt: skip
def test_a_frame_that_does_not_fit(make_frame, message, fitted):
    with pytest.raises(UserError, match=message):
        fitted.predict(make_frame())


def test_a_thread_may_learn(fitted):
    """As programs with a window and notebooks' servers do; signals are the main thread's."""
    with ThreadPoolExecutor(1) as pool:
        got = pool.submit(FrameForecaster(BASE, OPTIONS).fit, wide_frame()).result().predict()
    pandas.testing.assert_frame_equal(got, fitted.predict(wide_frame()))


def test_too_short_to_learn_from():
    with pytest.raises(
        UserError, match="the frame: the train part has 42 rows .of 60, .* lower data.horizon or data.l"
    ):
        FrameForecaster(BASE, OPTIONS).fit(wide_frame(60))


def test_calls_out_of_order(fitted, tmp_path):
    new = FrameForecaster(BASE, OPTIONS)
    for call in (new.predict, lambda: new.predict(wide_frame()), lambda: new.save(tmp_path / "a.pth")):
        with pytest.raises(UserError, match=r"there is nothing to (forecast|save): call fit\(df\) first"):
            call()
    fitted.save(tmp_path / "a.pth")
    loaded = FrameForecaster.load(tmp_path / "a.pth")
    with pytest.raises(UserError, match="or after load.path. predict.df."):
        loaded.predict()
    with pytest.raises(UserError, match="a loaded forecaster has no recipe to train by: make a new"):
        loaded.fit(wide_frame())
    with pytest.raises(UserError, match="no such checkpoint: nothing.pth"):
        FrameForecaster.load("nothing.pth")
    FrameForecaster(BASE, OPTIONS).fit(wide_frame(), tmp_path / "run")
    with pytest.raises(UserError, match="run holds a run: go on with it by --resume, or name another folder"):
        FrameForecaster(BASE, OPTIONS).fit(wide_frame(), tmp_path / "run")


def test_the_comparison_of_the_docs(monkeypatch, capsys):
    """As it is written, but for what takes long."""
    pytest.importorskip("statsforecast")
    (code,) = re.findall(r"```python\n(import pandas.*?)```", (ROOT / "docs/forecasting.md").read_text(), re.DOTALL)
    for slow, quick in (
        ("n_windows=10", "n_windows=1"),
        ("AutoETS(24)", 'AutoETS(24, model="ANN")'),
        ('_24.py"', '_24.py", OPTIONS'),
    ):
        assert code.count(slow) == 1
        code = code.replace(slow, quick)
    monkeypatch.chdir(ROOT)
    exec(code, {"OPTIONS": {**OPTIONS, "data.horizon": 24}})
    printed = capsys.readouterr().out
    assert [line.split()[0] for line in printed.splitlines()[-5:-1]] == ["AutoETS", "SeasonalNaive", "TSM2", "week"]
