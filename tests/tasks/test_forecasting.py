import csv
import functools
import re
from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.engine.test_loop import assert_same, load
from tests.tiny import ROOT, run_of
from vim.data.series import BUILT_IN, Series, build_windows, calendar, read_series
from vim.engine.config import load_recipe
from vim.engine.weights import choose_save
from vim.errors import UserError
from vim.options import SeriesRecipe
from vim.tasks.forecasting import train as training
from vim.tasks.forecasting.baselines import RIDGES, LinearMap, Score, compare, repeat, score, simple_forecasts
from vim.tasks.forecasting.build import Forecaster, forecast_with, load_forecaster, read_forecaster
from vim.tasks.forecasting.predict import forecast_next, write_forecast

BASE = ROOT / "configs/tsm2/tsm2_vic-elec_24.py"
BENCHMARK = f"{ROOT}/configs/tsm2/benchmarks.py:tsm2_etth1_96"
SMALL = {
    "data.lookback": 48,
    "data.horizon": 4,
    "data.batch_size": 64,
    "model.embed_dim": 8,
    "model.depth": 1,
    "model.d_state": 2,
    "model.linear_skip": False,
    "model.mixer_len": None,
    "schedule.num_epochs": 2,
    "schedule.warmup_epochs": 0,
}


def make(n=400, m=2, seed=0):
    """Hours with a daily swing."""
    noise = np.random.default_rng(seed).normal(0, 0.1, (n, m))
    values = 10 * np.arange(1, m + 1) + np.sin(2 * np.pi * np.arange(n) / 24)[:, None] + noise
    dates = np.datetime64("2020-01-01", "ns") + np.arange(n) * np.timedelta64(1, "h")
    return Series(dates, values, [f"c{i}" for i in range(m)], "it")


@pytest.fixture(autouse=True)
def made(monkeypatch):
    """The demand of Victoria is one made here."""
    monkeypatch.setitem(BUILT_IN, "vic_elec", make)


def write(path, series, missing=()):
    lines = [",".join(["date", *series.columns])]
    for i, (date, row) in enumerate(zip(series.dates, series.values, strict=True)):
        lines.append(",".join([str(date)[:19], *("" if i in missing else str(value) for value in row)]))
    path.write_text("\n".join(lines) + "\n")
    return path


def small_recipe(**options):
    options = {key.replace("__", "."): value for key, value in options.items()}
    return load_recipe(BASE, SeriesRecipe, {**SMALL, **options})


def trainer(folder, resume=False, **options):
    return run_of(small_recipe(**options), folder, choose_save("auto" if resume else None, folder))


def forecaster_of(loop):
    """The forecaster of a run, as its checkpoint would have it."""
    task = loop.task
    series = task.series
    return Forecaster(task.model.eval(), "tsm2", task.data, series.columns, task.scaler, series.static, series.seconds)


def step(loop, batch):
    return loop._update([batch], 0)[0]["loss"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"data.horizon": 0}, "data.horizon must be a whole number >= 1"),
        ({"data.num_workers": 1}, "data has no option num_workers"),
        ({"data.calendar": "yes"}, "data.calendar must be True or False"),
        ({"train.smoothing": 0.1}, "train has no option smoothing in the config .*, only seed, amp"),
        ({"data.split": "half"}, "data.split must be 'ratio', 'etth' or 'ettm' in the config"),
        ({"mixup.prob": 1}, "has mixup, which is for images"),
        ({"data.file": 12}, "data.file must be None or a string .*, got 12 .put a number in quotes"),
        ({"data.known": "a"}, "data.known must be a list of names"),
        ({"data.season": 0}, "data.season must be None or a whole number >= 1"),
        ({"data.season": 400}, "data.season must be at most data.lookback, 336, got 400"),
        ({"schedule.sched": "plateau"}, "schedule.sched must be 'cosine', .* or 'tanh'"),
        ({"optimizer.weight_decay": "a"}, "optimizer.weight_decay must be a number >= 0"),
    ],
)
def test_a_config_that_does_not_fit(options, message):
    with pytest.raises(UserError, match=message):
        load_recipe(BASE, SeriesRecipe, options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model__model_name": "vim_tiny"}, "model.model_name must be one of 'tsm2', got 'vim_tiny'"),
        ({"model__horizon": 3}, "model.horizon follows from the config's data section: leave it out"),
        ({"model__static_dim": 3}, "model.static_dim follows from the config's data section: leave it out"),
        ({"model__d_state": 0}, "model.d_state must be None or a whole number >= 1"),
        ({"schedule__sched": "step", "schedule__decay_rate": "a"}, "schedule.decay_rate must be a number > 0"),
        ({"data__known": ["x"]}, "data.known: columns of it, each once, expected, got x"),
        ({"data__known": ["c0", "c1"]}, "data.known names every column of it"),
        ({"data__static": "nothing.csv"}, "no such file: nothing.csv"),
        ({"model__variate_mixer": "x"}, "the config's model does not fit: variate_mixer must be one of"),
        ({"optimizer__opt": "none"}, "the config's optimizer does not fit"),
        ({"data__horizon": 300}, "the train part has 280 rows"),
        ({"data__dataset": "csv"}, "data.file must name the CSV file"),
        ({"data__split": "etth"}, "it has 400 rows: data.split='etth' takes 14400"),
    ],
)
def test_options_that_do_not_fit(options, message, tmp_path):
    with pytest.raises(UserError, match=message):
        trainer(tmp_path, **options)


# Errors and simple forecasts


def test_errors_are_those_of_what_was_observed():
    series = make(200)
    series.values[150:152, 1] = np.nan
    windows, _ = build_windows(series, lookback=24, horizon=4, max_gap=2)
    test = windows["val"]

    def zero(batch):
        return torch.zeros_like(batch.y)

    got = score(zero, test, 7)
    batch = test.batch(torch.arange(len(test)))
    kept = [batch.y[:, i][batch.observed[:, i]].double() for i in range(4)]
    assert sum(map(len, kept)) == batch.y.numel() - 2 * 4
    torch.testing.assert_close(got.squared, torch.stack([y.square().mean() for y in kept]))
    torch.testing.assert_close(got.absolute, torch.stack([y.abs().mean() for y in kept]))
    every = torch.cat(kept)
    assert got.mse == pytest.approx(every.square().mean().item())
    assert got.mae == pytest.approx(every.abs().mean().item())


def test_repeating():
    windows, _ = build_windows(make(200), lookback=24, horizon=7)
    batch = windows["test"].batch(torch.tensor([0, 3]))
    assert torch.equal(repeat(batch, 1), batch.x[:, -1:].expand(-1, 7, -1))
    assert torch.equal(repeat(batch, 3), batch.x[:, [21, 22, 23, 21, 22, 23, 21]])


@pytest.mark.parametrize(
    ("minutes", "lookback", "names"),
    [
        (60, 336, ["last day", "last week"]),
        (60, 100, ["last day"]),
        (15, 512, ["last day"]),
        (1440, 10, ["last week"]),
        (7 * 1440, 10, []),
        (1001, 100, []),
    ],
)
def test_the_seasons_follow_from_the_step(minutes, lookback, names):
    series = make(1000 + 9 * lookback)
    series.dates = series.dates[0] + np.arange(len(series.dates)) * np.timedelta64(minutes, "m")
    windows, _ = build_windows(series, lookback=lookback, horizon=2)
    assert list(simple_forecasts(series, windows, 512)) == ["last value", *names, "linear"]
    season = simple_forecasts(series, windows, 512, 5)
    assert list(season) == ["last value", *names, "last season", "linear"]
    batch = windows["test"].batch(torch.tensor([1]))
    assert torch.equal(season["last season"](batch), batch.x[:, -5:-3])
    series.dates[len(series.dates) // 2 :: 50] += 1  # one row in a hundred, and the step to and from it
    assert list(simple_forecasts(series, windows, 512)) == ["last value", "linear"]


def test_the_linear_map_is_ridge_regression():
    from sklearn.linear_model import Ridge

    windows, _ = build_windows(make(300), lookback=30, horizon=5)
    linear = LinearMap(windows["train"], windows["val"], 64)
    batch = windows["train"].batch(torch.arange(len(windows["train"])))
    x, y = ((part - batch.x[:, -1:]).transpose(1, 2).flatten(0, 1).double().numpy() for part in (batch.x, batch.y))
    val = windows["val"].batch(torch.arange(len(windows["val"])))
    held_out = (val.x - val.x[:, -1:]).transpose(1, 2).flatten(0, 1).numpy()
    wanted = (val.y - val.x[:, -1:]).transpose(1, 2).flatten(0, 1).numpy()
    errors = [((Ridge(alpha=alpha).fit(x, y).predict(held_out) - wanted) ** 2).mean() for alpha in RIDGES]
    assert linear.ridge == RIDGES[np.argmin(errors)] != RIDGES[0]
    ridge = Ridge(alpha=linear.ridge).fit(x, y)
    np.testing.assert_allclose(linear.weight[:-1], ridge.coef_.T, atol=1e-4)
    np.testing.assert_allclose(linear.weight[-1], ridge.intercept_, atol=1e-4)
    test = windows["test"].batch(torch.arange(9))
    last = test.x[:, -1:]
    want = ridge.predict((test.x - last).transpose(1, 2).flatten(0, 1).numpy()).reshape(9, 2, 5).transpose(0, 2, 1)
    np.testing.assert_allclose(linear(test), want + last.numpy(), atol=1e-4)


def test_the_linear_map_finds_a_linear_series():
    dates = make(300).dates
    series = Series(dates, np.stack([np.sin(np.arange(300) / 3), np.cos(np.arange(300) / 5)], 1), ["a", "b"], "it")
    windows, _ = build_windows(series, lookback=20, horizon=5)
    assert score(LinearMap(windows["train"], windows["val"], 64), windows["test"], 64).mse < 1e-4


# Training


@pytest.mark.parametrize("norm", ["layer", "batch"])
def test_it_learns_and_its_checkpoint_says_all(norm, tmp_path):
    one = trainer(tmp_path / "a", schedule__num_epochs=6, optimizer__lr=0.01, model__norm=norm)
    one.fit()
    errors = [row["mse"] for row in one.rows]
    assert errors[-1] < 0.5 * errors[0]
    comparison = compare(one.task.model, "tsm2", one.task.series, one.task.windows, one.task.data)
    assert list(comparison.scores) == ["tsm2", "last value", "last day", "linear"]
    assert comparison.scores["tsm2"].mse < comparison.scores["last value"].mse
    test = score(lambda batch: forecast_with(one.task.model, batch), one.task.windows["test"], 64)
    assert comparison.scores["tsm2"].mse == test.mse

    found = load_forecaster(tmp_path / "a/best.pth")
    assert not found.model.training
    assert found.columns == ["c0", "c1"]
    assert torch.equal(found.scaler.mean, one.task.scaler.mean)
    batch = one.task.windows["test"].batch(torch.arange(3))
    assert torch.equal(forecast_with(found.model, batch), forecast_with(one.task.model, batch))
    again = compare(found.model, "tsm2", one.task.series, one.task.windows, one.task.data)
    assert again.scores["tsm2"].mse == comparison.scores["tsm2"].mse


def test_the_best_is_kept_and_training_stops(tmp_path, monkeypatch):
    errors = iter([3.0, 2.0, 2.5, 2.1, 4.0, 1.0])
    weights = []

    def scored(*ignored):
        weights.append({key: value.clone() for key, value in one.task.model.state_dict().items()})
        ones = torch.ones(4).double()
        return Score(next(errors) * ones, ones, ones)

    monkeypatch.setattr(training, "score", scored)
    one = trainer(tmp_path, schedule__num_epochs=6, train__patience=3)
    assert one.fit()
    assert [row["mse"] for row in one.rows] == [3.0, 2.0, 2.5, 2.1, 4.0]
    best = load_forecaster(tmp_path / "best.pth").model.state_dict()
    assert all(torch.equal(value, weights[1][key]) for key, value in best.items())
    assert "stopped early: the last 3 epochs were no better" in (tmp_path / "train.log").read_text()
    with (tmp_path / "log.csv").open() as file:
        assert [float(row["mse"]) for row in csv.DictReader(file)] == [3.0, 2.0, 2.5, 2.1, 4.0]


def first_epoch(loop):
    """Train an epoch and end as if killed."""
    loop.num_epochs = 1
    assert loop.fit()


def test_a_run_goes_on_exactly(tmp_path):
    options = {"schedule__num_epochs": 3, "model__drop_rate": 0.5}
    whole, cut = trainer(tmp_path / "whole", **options), trainer(tmp_path / "cut", **options)
    whole.fit()
    first_epoch(cut)
    with pytest.raises(UserError, match="cut holds a run: go on with it by --resume, or"):
        trainer(tmp_path / "cut", **options)
    (tmp_path / "cut/best.pth").unlink()  # a kill before it was written
    resumed = trainer(tmp_path / "cut", resume=True, **options)
    assert len(resumed.rows) == 1
    resumed.fit()
    assert (tmp_path / "cut/best.pth").exists()
    assert resumed.rows == whole.rows
    for key, value in whole.task.model.state_dict().items():
        assert torch.equal(value, resumed.task.model.state_dict()[key]), key
    with pytest.raises(UserError, match="another data.horizon: it was 4, and is now 3; resume with the same"):
        trainer(tmp_path / "cut", resume=True, **options, data__horizon=3)
    assert trainer(tmp_path / "new", resume=True, **options).rows == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seed": 1}, "was trained with another data.file or data.static, or other rows"),
        ({"columns": ["c0", "c2"]}, "was trained with another list of columns"),
        ({"rows": 399}, "was trained with another data.file or data.static, or other rows"),
        ({"data__known": ["c1"]}, "was trained with another data.known: it was .., and is now .'c1',.; resume with"),
        ({"data__static": "static.csv"}, "was trained with another data.file or data.static, or other rows"),
        ({"model__patch_stride": 9}, "was trained with another model.patch_stride: it was .*, and is now 9"),
        ({"optimizer__opt": "sgd"}, "was trained with another optimizer.opt: it was adamw, and is now sgd"),
    ],
)
def test_a_run_does_not_go_on_with_something_else(options, message, tmp_path, monkeypatch):
    first_epoch(trainer(tmp_path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "static.csv").write_text("column,area\nc0,1\nc1,2\n")
    other = make(options.pop("rows", 400), seed=options.pop("seed", 0))
    other.columns = options.pop("columns", other.columns)
    monkeypatch.setitem(BUILT_IN, "vic_elec", lambda: other)
    with pytest.raises(UserError, match=message):
        trainer(tmp_path, resume=True, **options)


@pytest.mark.usefixtures("fresh_accelerate")
@pytest.mark.parametrize("number", [4, 2])
def test_a_run_with_everything_goes_on_exactly_from_any_update(number, tmp_path):
    options = {"amp": "bf16", "ema_decay": 0.9, "accumulate": 2, "save_updates": 1, "keep": 9}
    recipe = small_recipe(model__drop_rate=0.5, data__batch_size=16, **{f"train__{k}": v for k, v in options.items()})
    run_of(recipe, tmp_path / "whole").fit()
    save = tmp_path / f"whole/last.{number}.pth"
    assert load(save)["training"]["position"]["update"] > 0
    run_of(recipe, tmp_path / "other", save).fit()
    assert_same(load(tmp_path / "other/last.pth"), load(tmp_path / "whole/last.pth"))


def test_weights_alone_are_no_run(tmp_path):
    first_epoch(trainer(tmp_path))
    state = read_forecaster(tmp_path / "last.pth")
    del state["training"]
    torch.save(state, tmp_path / "last.pth")
    with pytest.raises(UserError, match="holds weights only, not a run to resume"):
        trainer(tmp_path, resume=True)


@pytest.mark.parametrize("step_on_epochs", [False, True])
def test_the_rate_is_the_schedules(step_on_epochs, tmp_path):
    """A cosine from 1e-3 to 1e-5."""
    one = trainer(tmp_path, schedule__num_epochs=4, schedule__step_on_epochs=step_on_epochs)
    one.fit()
    done = np.arange(4) / 4 if step_on_epochs else np.arange(1, 5) / 4
    expected = 1e-5 + 0.5 * (1e-3 - 1e-5) * (1 + np.cos(np.pi * done))
    np.testing.assert_allclose([row["lr"] for row in one.rows], expected)


def test_a_model_with_a_linear_map_starts_from_the_fitted_one(tmp_path):
    one = trainer(tmp_path, model__linear_skip=True, model__mixer_len=24, model__variate_mixer="s6", optimizer__lr=0.01)
    linear = LinearMap(one.task.windows["train"], one.task.windows["val"], 64)
    linear.weight[-1] = 0  # the constant
    batch = one.task.windows["test"].batch(torch.arange(20))
    torch.testing.assert_close(forecast_with(one.task.model.eval(), batch), linear(batch), rtol=1e-4, atol=1e-4)
    before = one.task.model.skip.weight.clone()
    one.fit()
    assert torch.equal(one.task.model.skip.weight, before)
    assert (forecast_with(one.task.model, batch) - linear(batch)).abs().max() > 1e-3
    loaded = load_forecaster(tmp_path / "last.pth").model
    torch.testing.assert_close(forecast_with(loaded, batch), forecast_with(one.task.model.eval(), batch))


def test_the_seed_is_all_that_decides(tmp_path):
    rows = []
    for i, seed in enumerate((0, 0, 1)):
        torch.manual_seed(i)
        one = trainer(tmp_path / str(i), train__seed=seed, schedule__num_epochs=1)
        one.fit()
        rows.append(one.rows)
    assert rows[0] == rows[1] != rows[2]


def test_a_short_last_batch_is_left_out(tmp_path):
    """As in the benchmarks; one window of one variate would have no statistics to norm by."""
    one = trainer(tmp_path, model__norm="batch", data__batch_size=76, schedule__num_epochs=1)
    assert (len(one.task.windows["train"]), one.updates) == (229, 3)
    one.fit()


def test_a_loss_that_is_not_finite(tmp_path):
    with pytest.raises(
        UserError, match="the held-out mse of epoch 1 is (nan|inf): lower optimizer.lr, or set"
    ) as error:
        trainer(tmp_path, optimizer__lr=9e5, train__clip_grad=None).fit()
    assert "is saved up to before" not in str(error.value)


def test_what_was_filled_in_is_not_learnt(tmp_path):
    """The error of a filled-in target has no gradient."""
    task = trainer(tmp_path).task
    batch = task.windows["train"].batch(torch.arange(4))
    assert task.loss(task.model, batch._replace(observed=torch.zeros_like(batch.observed))) == 0
    some = batch.observed.clone()
    some[:, 1:] = False
    task.model.eval()
    part = task.loss(task.model, batch._replace(observed=some, y=torch.where(some, batch.y, 1e9)))
    y = forecast_with(task.model, batch)
    assert part.item() == pytest.approx((y - batch.y)[:, 0].square().mean().item(), rel=1e-4)


def test_the_next_steps(tmp_path):
    one = trainer(tmp_path, schedule__num_epochs=8, optimizer__lr=0.01)
    one.fit()
    dates, values = forecast_next(forecaster_of(one), one.task.series)
    assert dates[0] == one.task.series.dates[-1] + np.timedelta64(1, "h")
    assert values.shape == (4, 2)
    np.testing.assert_allclose(values, np.broadcast_to([10.5, 20.5], (4, 2)), atol=2)  # in the units of the series


def test_the_calendar_is_that_of_the_next_steps(tmp_path):
    one = trainer(tmp_path)
    one.task.model.eval()
    dates, values = forecast_next(forecaster_of(one), one.task.series)
    x = one.task.scaler.scale(one.task.series.values)[None, -48:]
    future = calendar(one.task.series.dates[-1] + np.arange(1, 5) * np.timedelta64(1, "h"))
    with torch.no_grad():
        want = one.task.model(x, future[None, None].expand(1, 2, -1, -1))
    np.testing.assert_allclose(values, one.task.scaler.unscale(want[0]))


def test_covariates(tmp_path, monkeypatch, caplog):
    """What decides the next steps is seen beforehand, in training, from the checkpoint, and after the table's end."""
    series = make(404)
    driver = np.random.default_rng(1).normal(50, 7, 404)
    series.values[:, 0] += driver - 50
    series.values = np.insert(series.values, 1, driver, axis=1)
    series.columns = ["c0", "heat", "c1"]
    truth = series.values[400:, 0].copy()
    series.values[400:, [0, 2]] = np.nan
    monkeypatch.setitem(BUILT_IN, "vic_elec", lambda: series)
    (tmp_path / "static.csv").write_text("column,area\nc1,1\nc0,3\n")
    options = {"data__known": ["heat"], "data__static": str(tmp_path / "static.csv"), "schedule__num_epochs": 30}
    one = trainer(tmp_path / "run", **options, optimizer__lr=0.01, data__calendar=False)
    assert (one.task.model.num_variates, one.task.model.future_dim, one.task.model.static_dim) == (2, 1, 1)
    one.fit()
    (tmp_path / "static.csv").unlink()
    found = load_forecaster(tmp_path / "run/best.pth")
    dates, values = forecast_next(found, found.series())
    np.testing.assert_array_equal(dates, series.dates[400:])
    assert np.abs(values[:, 0] - truth).mean() < 0.5 * np.abs(truth - truth.mean()).mean()
    series.values[401:, 1] += 30
    other = forecast_next(found, found.series())[1]
    assert (np.abs(other - values)[:, 0] > 1).any()
    series.dates[400:] += np.timedelta64(1, "D")
    caplog.clear()
    forecast_next(found, found.series())
    assert "it: its last 4 rows do not follow as the others do" in caplog.text
    series.values[403, 1] = 1e30
    with pytest.raises(UserError, match="it: the forecast is not finite: is a value in its last rows far from others"):
        forecast_next(found, found.series())
    series.values[403, 0] = 1
    with pytest.raises(UserError, match="it: its last 4 rows must have heat and nothing else: they are what is fore"):
        forecast_next(found, found.series())


@pytest.mark.parametrize(
    ("dates", "first"),
    [
        (["2020-01-01T00:00:00.25", "2020-01-01T00:00:00.50"], "2020-01-01 00:00:00.250000"),
        (["3020-01-01", "3020-01-02"], "3020-01-01"),
        (["1500-01-01T12", "1501-01-01T12"], "1500-01-01 12:00:00"),
    ],
)
def test_dates_are_written_whole_and_read_again(dates, first, tmp_path):
    dates = np.array(dates, "datetime64[us]")
    dates = dates[0] + np.arange(4) * (dates[1] - dates[0])
    series = Series(dates, np.zeros((4, 1)), ["a"], "it")
    paths = write_forecast(tmp_path / "a.csv", series, dates, np.zeros((4, 1)))
    assert paths == [tmp_path / "a.csv", tmp_path / "a.png"] and paths[1].exists()
    assert paths[0].read_text().splitlines()[1] == f"{first},0.0"
    np.testing.assert_array_equal(read_series(paths[0]).dates, dates)


def test_a_checkpoint_of_something_else(tmp_path):
    torch.save({"model": {}, "meta": {"model": {}, "classes": []}}, tmp_path / "a.pth")
    with pytest.raises(UserError, match="is not a checkpoint of a forecasting run"):
        read_forecaster(tmp_path / "a.pth")
    with pytest.raises(UserError, match="no such checkpoint"):
        read_forecaster(tmp_path / "b.pth")
    data = {"dataset": "csv", "lookback": 4, "horizon": 2, "batch_size": 1}
    meta = {
        "model": {"model_name": "tsm3"},
        "data": data,
        "columns": ["a"],
        "mean": torch.ones(1),
        "std": torch.ones(1),
    }
    torch.save({"model": {}, "meta": meta}, tmp_path / "c.pth")
    with pytest.raises(UserError, match="names a model that cannot be built: model.model_name must be one of 'tsm2'"):
        load_forecaster(tmp_path / "c.pth")
    wrong = {"std": torch.zeros(1), "mean": torch.ones(1, dtype=torch.complex64), "static": torch.ones(1, 0)}
    for key, value in wrong.items():
        torch.save({"model": {}, "meta": {**meta, key: value}}, tmp_path / "e.pth")
        with pytest.raises(UserError, match="e.pth is broken: "):
            read_forecaster(tmp_path / "e.pth")
    for key, value in {"mean": torch.ones(2), "std": torch.ones(()), "columns": ["a", "b"]}.items():
        torch.save({"model": {}, "meta": {**meta, key: value}}, tmp_path / "d.pth")
        with pytest.raises(UserError, match="d.pth is broken: it has . columns, and means and deviations"):
            load_forecaster(tmp_path / "d.pth")


def test_a_checkpoint_opens_no_other_file_than_a_table(tmp_path):
    run_of(small_recipe(), tmp_path).fit()
    forecaster = load_forecaster(tmp_path / "last.pth")
    other = forecaster._replace(data=replace(forecaster.data, dataset="csv", file="/etc/passwd"))
    with pytest.raises(UserError, match="the run's table is /etc/passwd, which is no .csv file: name it by --file"):
        other.series()


# The tool


@pytest.fixture
def call(call):
    """Run the tool here: its exit status, output and errors."""
    return functools.partial(call, "forecast")


def test_the_tool(call, tmp_path):
    table = write(tmp_path / "table.csv", make(), missing=[100, 101])
    work_dir = tmp_path / "a run"
    options = [*(f"{key}={value}" for key, value in SMALL.items()), "data.dataset=csv", f"data.file={table}"]
    status, output, errors = call("train", BASE, "--work-dir", work_dir, "--cfg-options", *options)
    assert status == 0, errors
    assert "4 missing values filled" in errors
    assert re.search(r"        tsm2: MSE \d\.\d{4}, MAE \d\.\d{4}\n$", output)
    files = {path.name for path in work_dir.iterdir()}
    tables = {"config.py", "environment.txt", "log.csv", "train.log", "test.csv", "best.pth", "last.pth"}
    assert files == tables | {"curves.png", "steps.png", "windows.png"}

    again = call("evaluate", work_dir / "best.pth", "--work-dir", tmp_path / "again")
    assert again[0] == 0
    assert again[1].splitlines()[1:] == output.splitlines()[-5:]
    assert (tmp_path / "again/test.csv").read_text() == (work_dir / "test.csv").read_text()

    status, output, errors = call("predict", work_dir / "best.pth", tmp_path / "new/next.csv", "--file", table)
    assert (status, errors) == (0, "")
    lines = (tmp_path / "new/next.csv").read_text().splitlines()
    assert lines[0] == "date,c0,c1"
    assert [line.split(",")[0] for line in lines[1:]] == [f"2020-01-17 {hour}:00:00" for hour in (16, 17, 18, 19)]
    assert (tmp_path / "new/next.png").exists()

    status, _, errors = call("predict", work_dir / "best.pth", tmp_path / "b.csv", "--file", write_short(tmp_path))
    assert (status, errors) == (2, f"error: {tmp_path / 'short.csv'} has 20 rows: the model sees 48\n")
    other = write(tmp_path / "other.csv", make(m=1))
    to_other = ["--work-dir", tmp_path / "other"]
    status, _, errors = call("evaluate", work_dir / "best.pth", "--file", other, *to_other)
    assert (status, errors) == (2, f"error: {other} has no column c1: expected c0, c1\n")
    assert call("evaluate", work_dir / "best.pth", "--file", table)[0] == 2
    assert (work_dir / "test.csv").read_text() == (tmp_path / "again/test.csv").read_text()

    series = read_series(table)  # in tenths, and errors are scaled as the run's
    series.values *= 10
    tenths = write(tmp_path / "tenths.csv", series, missing=[100, 101])
    assert call("evaluate", work_dir / "best.pth", "--file", tenths, *to_other)[0] == 0
    errors = [
        [float(row["mse"]) for row in csv.DictReader((folder / "test.csv").open())]
        for folder in (work_dir, tmp_path / "other")
    ]
    np.testing.assert_allclose(errors[1][:3], 100 * np.array(errors[0][:3]), rtol=1e-3)


def test_a_forecast_replaces_no_table(call, tmp_path):
    table = write(tmp_path / "table.csv", make())
    before = table.read_text()
    one = trainer(tmp_path / "run", data__dataset="csv", data__file=str(table))
    first_epoch(one)
    best = tmp_path / "run/best.pth"
    other = write(tmp_path / "other.csv", make())
    for words in ([table], [other, "--file", other], [table, "--file", other], [tmp_path / "run/../table.csv"]):
        status, _, errors = call("predict", best, *words)
        assert (status, "is a table to read, which the forecast would replace" in errors) == (2, True)
    status, _, errors = call("predict", best, tmp_path / "run/log.csv")
    assert (status, "is for results of the run, which the forecast would replace" in errors) == (2, True)
    for out in (tmp_path / "next.png", tmp_path, "."):
        status, _, errors = call("predict", best, out)
        assert (status, "name a file that ends in .csv" in errors) == (2, True)
    assert table.read_text() == before


def write_short(folder):
    return write(folder / "short.csv", make(20))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["train", "nothing.py"], "no such config: nothing.py"),
        (["train", BASE, "--cfg-options", "data.dataset=csv", "data.file=nothing.csv"], "no such file: nothing.csv"),
        (["train", BENCHMARK], "data.file must name the CSV file: --cfg-options data.file=PATH"),
        (["evaluate", "nothing.pth"], "no such checkpoint: nothing.pth"),
    ],
)
def test_mistakes(words, message, call, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    status, output, errors = call(*words)
    assert (status, output) == (2, "")
    assert errors == f"error: {message}\n"


def test_a_table_of_other_steps_is_told(tmp_path, caplog):
    one = trainer(tmp_path / "run")
    first_epoch(one)
    found, series = load_forecaster(tmp_path / "run/best.pth"), make()
    found.series(write(tmp_path / "hours.csv", series))
    assert "apart" not in caplog.text
    series.dates = series.dates[0] + (series.dates - series.dates[0]) // 6
    found.series(write(tmp_path / "minutes.csv", series))
    assert "minutes.csv: its rows are 600 s apart, those learned from 3600 s" in caplog.text
