"""TSM2's recipes: each is what its name says, and trains."""

import numpy as np
import pytest
import torch

from tests.tiny import ROOT, configs_of, run_of
from vim.data.series import BUILT_IN, Series
from vim.engine.config import load_recipe
from vim.options import SeriesRecipe

CONFIGS = configs_of("tsm2")
BENCHMARKS = ("etth1", "etth2", "ettm1", "ettm2", "electricity", "exchange", "traffic", "weather")
ROWS = [f"tsm2_{name}_{horizon}" for name in BENCHMARKS for horizon in (96, 192, 336, 720)]


def waves(n, m=2):
    """Hours with a daily swing."""
    noise = np.random.default_rng(0).normal(0, 0.1, (n, m))
    dates = np.datetime64("2020-01-01", "ns") + np.arange(n) * np.timedelta64(1, "h")
    return Series(dates, np.sin(np.arange(n) / 4)[:, None] + noise, [f"c{i}" for i in range(m)], "it")


def test_every_benchmark_has_its_rows():
    assert set(CONFIGS) == {*ROWS, "tsm2_lorenz_24", "tsm2_vic-elec_24"}
    docstring = (ROOT / "configs/tsm2/benchmarks.py").read_text().split('"""')[1]
    errors = {line.split()[0]: len(line.split()[1:]) for line in docstring.splitlines() if line.startswith("    ")}
    assert errors == {"96": 3, **dict.fromkeys(BENCHMARKS, 4)}


@pytest.mark.parametrize("name", ROWS)
def test_a_row_is_what_its_name_says(name):
    recipe = load_recipe(CONFIGS[name], SeriesRecipe)
    benchmark, horizon = name.split("_")[1:]
    assert (recipe.data.dataset, recipe.data.lookback, recipe.data.horizon) == ("csv", 512, int(horizon))
    assert recipe.data.split == (benchmark[:4] if benchmark.startswith("ett") else "ratio")
    assert recipe.data.batch_size == {"electricity": 16, "traffic": 4}.get(benchmark, 32)
    assert recipe.model.get("expand") == (1 if benchmark == "traffic" else None)
    assert recipe.train.patience == 5


@pytest.mark.parametrize("name", CONFIGS)
def test_it_trains(name, tmp_path, monkeypatch):
    """Two updates, on windows of its own shape: a head may start at 0."""
    monkeypatch.setitem(BUILT_IN, "lorenz", lambda: waves(10 * (512 + int(name.split("_")[-1]))))
    options = {"data.dataset": "lorenz", "data.split": "ratio", "data.batch_size": 2, "schedule.warmup_epochs": 0}
    recipe = load_recipe(CONFIGS[name], SeriesRecipe, options)
    loop = run_of(recipe, tmp_path)
    before = {key: value.clone() for key, value in loop.task.model.state_dict().items()}
    batch = loop.task.windows["train"].batch(torch.tensor([0, 5]))
    losses = [loop._update([batch], 0)[0]["loss"] for _ in range(2)]
    assert 0 < losses[1] < losses[0] < 10
    same = [key for key, value in loop.task.model.state_dict().items() if torch.equal(value, before[key])]
    assert same == (["skip.weight"] if recipe.model.get("linear_skip") else [])
