import argparse
from dataclasses import fields

import pytest

from tests.tiny import ROOT
from vim.data.series import SPLITS
from vim.engine.config import add_config_arguments
from vim.errors import UserError
from vim.options import (
    ImageData,
    ImageRecipe,
    ImageTrainOptions,
    SeriesData,
    SeriesRecipe,
    describe,
    markdown_table,
    read,
)

SERIES = {"dataset": "csv", "lookback": 8, "horizon": 2, "batch_size": 4}


def train(**values):
    return read(ImageTrainOptions, "train", values, "the config a.py")


def test_defaults():
    assert train() == train(seed=None, trackers=None, keep=None) == ImageTrainOptions()
    assert (ImageTrainOptions().seed, ImageTrainOptions().clip_grad, ImageTrainOptions().max_skipped) == (0, None, 10)
    data = read(SeriesData, "data", SERIES, "it")
    assert (data.lookback, data.split, data.known, data.season) == (8, "ratio", (), None)


def test_defaults_are_not_shared():
    one, two = (ImageData(dataset="digits", batch_size=1, num_workers=0) for _ in range(2))
    one.video["num_frames"] = 3
    assert two.video == {}


@pytest.mark.parametrize(
    ("name", "good", "bad"),
    [
        ("seed", (0, 7), (-1, 1.0, True, "1")),
        ("accumulate", (1,), (0, 0.5)),
        ("clip_grad", (1, 1e-9, None), (0, -1.0, "1", True, float("nan"))),
        ("ema_decay", (0, 0.9999, None), (1, 1.0, -1e-9, float("nan"), [0.5])),
        ("smoothing", (0, 0.1), (1, "0.1", False)),
        ("compile", (True, False), (1, 0, "True")),
        ("amp", ("no", "bf16", "fp16"), ("fp8", True, [])),
        ("trackers", ((), ("a",), ["a", "b"]), ("a", [1], {"a": 1}, 3)),
    ],
)
def test_types_and_ranges(name, good, bad):
    for value in good:
        wanted = tuple(value) if isinstance(value, list) else value
        assert getattr(train(**{name: value}), name) == wanted
    for value in bad:
        with pytest.raises(UserError, match=f"train.{name} must be .* in the config a.py, got "):
            train(**{name: value})


def test_messages():
    for values, message in (
        ({"keep": 0}, "train.keep must be a whole number >= 1 in the config a.py, got 0"),
        ({"amp": "fp8"}, "train.amp must be 'no', 'bf16' or 'fp16' in the config a.py, got 'fp8'"),
        ({"clip_grad": -1}, "train.clip_grad must be None or a number > 0 in the config a.py, got -1"),
        ({"smoothing": 2}, "train.smoothing must be a number >= 0 and < 1 in the config a.py, got 2"),
        ({"trackers": "a"}, "train.trackers must be a list of names in the config a.py, got 'a'"),
        ({"kep": 1}, f"train has no option kep in the config a.py, only {', '.join(vars(ImageTrainOptions()))}"),
    ):
        with pytest.raises(UserError) as caught:
            train(**values)
        assert str(caught.value) == message


def test_a_required_option():
    with pytest.raises(UserError, match="data.horizon must be a whole number >= 1 in it, got None"):
        read(SeriesData, "data", SERIES | {"horizon": None}, "it")


def test_a_string_that_looks_like_a_number():
    message = r"data.file must be None or a string in it, got 12 \(put a number in quotes\)"
    with pytest.raises(UserError, match=message):
        read(SeriesData, "data", SERIES | {"file": 12}, "it")


def test_a_season_is_seen_whole():
    assert read(SeriesData, "data", SERIES | {"season": 8}, "it").season == 8
    with pytest.raises(UserError, match="data.season must be at most data.lookback, 8, got 9"):
        read(SeriesData, "data", SERIES | {"season": 9}, "it")


def test_the_splits_of_the_data():
    split = next(one for one in fields(SeriesData) if one.name == "split")
    assert sorted(describe(split).replace(" or ", ", ").split(", ")) == sorted(map(repr, SPLITS))


@pytest.mark.parametrize(
    ("page", "kind"),
    [("training", ImageData), ("training", ImageTrainOptions), ("forecasting", SeriesData)],
)
def test_the_tables_in_the_docs(page, kind):
    assert markdown_table(kind) in (ROOT / f"docs/{page}.md").read_text()


def test_a_table():
    lines = markdown_table(SeriesData).splitlines()
    assert lines[:2] == ["| option | value | default | |", "|---|---|---|---|"]
    assert lines[4] == "| `split` | 'ratio', 'etth' or 'ettm' | 'ratio' | which rows train, validate and test |"
    assert lines[5] == "| `lookback` | a whole number >= 1 | required | rows the model sees |"
    assert [line.split("`")[1] for line in lines[2:]] == [one.name for one in fields(SeriesData)]


@pytest.mark.parametrize(("kind", "count"), [(ImageRecipe, 29), (SeriesRecipe, 27)])
def test_help_options(kind, count, capsys):
    parser = argparse.ArgumentParser()
    add_config_arguments(parser, kind)
    with pytest.raises(SystemExit) as ended:
        parser.parse_args(["--help-options"])
    lines = capsys.readouterr().out.splitlines()
    assert (ended.value.code, len(lines)) == (0, 2 * count + 1)
    assert "train.trackers: a list of names; default: []" in lines
    assert "schedule.num_epochs: a whole number >= 1; default: required" in lines
    assert "data.batch_size: a whole number >= 1; default: required" in lines
