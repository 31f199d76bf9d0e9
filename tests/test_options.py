import argparse
import inspect
import math
from dataclasses import MISSING, fields

import pytest
from timm.data import Mixup, create_transform
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2

from tests.tiny import ROOT
from vim.data.series import SPLITS
from vim.data.video.reading import DECODERS
from vim.data.video.sampling import SAMPLINGS
from vim.engine.config import add_config_arguments
from vim.errors import UserError
from vim.fields import check, describe, markdown_table, read
from vim.options import (
    CHECKED,
    ImageData,
    ImageRecipe,
    ImageTrainOptions,
    MaskingOptions,
    MixupOptions,
    ModelOptions,
    OptimizerOptions,
    ScheduleOptions,
    SeriesData,
    SeriesRecipe,
    TransformOptions,
    VideoOptions,
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
        ("class_weights", (None, "balanced", [1, 0.5], {"a": 3}), ("even", [0.0], [True], {"a": "1"}, 2, [math.inf])),
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
        (
            {"kep": 1},
            "train has no option kep in the config a.py (the closest: keep), only "
            f"{', '.join(vars(ImageTrainOptions()))}",
        ),
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


@pytest.mark.parametrize(
    ("kind", "name", "known"),
    [(SeriesData, "split", SPLITS), (VideoOptions, "sampling", SAMPLINGS), (VideoOptions, "decoder", DECODERS)],
)
def test_the_names_that_an_option_takes(kind, name, known):
    choices = next(one for one in fields(kind) if one.name == name)
    assert sorted(describe(choices).replace(" or ", ", ").split(", ")) == sorted(map(repr, known))


SET_HERE = {
    *("model_or_params", "optimizer", "fallback_list", "fallback_no_weight_decay", "param_group_fn", "kwargs"),
    *("updates_per_epoch", "patience_epochs", "plateau_mode", "decay_fn", "stable_timescale"),  # of other schedules
    *("label_smoothing", "num_classes", "multi_label"),
    *("is_training", "use_prefetcher", "separate", "tf_preprocessing", "naflex", "patch_size", "max_seq_len"),
    *("patchify", "patchify_channels_last", "patchify_flatten"),
}


@pytest.mark.parametrize(
    ("kind", "function", "own"),
    [
        (OptimizerOptions, create_optimizer_v2, {"published_decay", "betas", "eps", "nesterov"}),
        (ScheduleOptions, create_scheduler_v2, set()),
        (MixupOptions, Mixup, set()),
        (TransformOptions, create_transform, set()),
    ],
)
def test_the_options_of_a_function_of_timm(kind, function, own):
    taken = inspect.signature(function).parameters
    assert {one.name for one in fields(kind)} == set(taken) - SET_HERE | own
    for one in fields(kind):
        if one.name in taken and one.default_factory is not MISSING:
            default, theirs = one.default_factory(), taken[one.name].default
            assert default is None or default == (tuple(theirs) if isinstance(theirs, list) else theirs), one.name


NAN, INF = float("nan"), float("inf")
RANGES = [
    (ModelOptions, "depth", (1, [2, 2], None), (0, -1, 1.5, [2, 0], "2", True)),
    (ModelOptions, "embed_dim", (1, (8, 16)), (0, [0], {})),
    (ModelOptions, "d_state", (1,), (0, INF)),
    (ModelOptions, "img_size", (32, [32, 64]), (0, [32, -1], "32")),
    (ModelOptions, "drop_path_rate", (0, 0.9), (1, 2, -0.1, NAN, "a")),
    (ModelOptions, "drop_rate", (0, 0.9), (1, -0.1, NAN)),
    (ModelOptions, "num_classes", (0, 10), (-1, 2.0)),
    (ModelOptions, "not_known_here", (-1, "a", [1]), (NAN, INF, -INF)),
    (OptimizerOptions, "lr", (1e-9, 1), (0, -1, NAN, INF, "1e-3")),
    (OptimizerOptions, "weight_decay", (0, 0.05), (-1, NAN, INF, "a")),
    (OptimizerOptions, "betas", ((0.9, 0.999), [0, 0.5]), ((0.9, 1.0), 0.9, (-0.1, 0.9), (NAN, 0.9))),
    (OptimizerOptions, "momentum", (0, 0.9), (1, -0.1)),
    (OptimizerOptions, "eps", (1e-8, (1e-30, 1e-3)), (0, -1e-8, NAN)),
    (OptimizerOptions, "layer_decay", (0.75, 1), (0, 1.1, -1)),
    (ScheduleOptions, "min_lr", (0, 1e-5), (-1e-5, NAN)),
    (ScheduleOptions, "warmup_lr", (0, 1e-5), (-1e-5, INF)),
    (ScheduleOptions, "warmup_epochs", (0, 9), (-1, 10, 11, 0.5)),
    (ScheduleOptions, "decay_epochs", (1, 2.5), (0, -1)),
    (ScheduleOptions, "sched", ("cosine",), ("plateau", "cosin", 1)),
    (
        TransformOptions,
        "scale",
        ((0.08, 1.0), [1, 1]),
        ((1.0, 0.08), (0, 1), (0.5, 1.5), 0.5, (0.1, 0.2, 0.3), (NAN, 1)),
    ),
    (TransformOptions, "ratio", ((0.75, 1.33),), ((1.33, 0.75), (0, 1), (1, INF))),
    (TransformOptions, "hflip", (0, 1), (7, -0.1, 1.1, NAN)),
    (TransformOptions, "vflip", (0, 1), (1.1,)),
    (TransformOptions, "re_prob", (0, 1), (5, -1)),
    (TransformOptions, "color_jitter", (0, 0.4, (0.4, 0.4, 0.4)), (-1, 7, (0.4, -1))),
    (TransformOptions, "crop_pct", (1, 0.875), (0, 1.1, -1, NAN)),
    (TransformOptions, "std", ((0.5,),), ((0.0,), 0.5)),
    (TransformOptions, "interpolation", ("bicubic",), ("cubic", 3)),
    (MixupOptions, "mixup_alpha", (0, 0.8), (-0.8, NAN, INF)),
    (MixupOptions, "cutmix_alpha", (0, 1), (-1,)),
    (MixupOptions, "prob", (0, 1), (1.1, -0.1)),
    (MixupOptions, "switch_prob", (0.5,), (2,)),
    (MixupOptions, "mode", ("elem",), ("all",)),
    (MaskingOptions, "ratio", (0, 0.8), (1, -0.1, NAN, None)),
    (VideoOptions, "num_frames", (1, 64), (0, 1.5)),
    (VideoOptions, "time_limit", (0.5, 30), (0, INF, -1)),
    (VideoOptions, "prefix", ("a",), (3, "a\0b")),
]


@pytest.mark.parametrize(("kind", "name", "good", "bad"), RANGES, ids=lambda value: str(value)[:40])
def test_the_range_of_an_option(kind, name, good, bad):
    base = {"num_epochs": 10} if kind is ScheduleOptions else {"ratio": 0.5} if kind is MaskingOptions else {}
    for value in good:
        check(kind, "it", {**base, name: value}, "the config a.py")
    for value in bad:
        with pytest.raises(UserError, match=f"{name} must be"):
            check(kind, "it", {**base, name: value}, "the config a.py")


def test_options_of_another_kind_of_section_go_to_what_takes_them():
    assert check(ModelOptions, "model", {"directions": "v1", "depth": None}, "it") == {"directions": "v1"}
    assert check(OptimizerOptions, "optimizer", {"caution": True}, "it") == {"caution": True}
    for kind, name in ((ScheduleOptions, "warmup_epoch"), (TransformOptions, "crop_pc"), (VideoOptions, "num_frame")):
        with pytest.raises(UserError, match=rf"it has no option {name} in it \(the closest: {name[:-1]}"):
            check(kind, "it", {name: 1}, "it")


def test_sections_that_do_not_fit_one_another():
    def recipe(lr, **schedule):
        sections = {"model": {}, "data": None, "train": ImageTrainOptions()}
        return ImageRecipe(**sections, optimizer={"lr": lr}, schedule=schedule)

    recipe(1e-5, min_lr=1e-5, warmup_lr=1)
    recipe(None, min_lr=1)
    for name, schedule in (("min_lr", {"min_lr": 1e-4}), ("warmup_lr", {"warmup_lr": 1e-4, "warmup_epochs": 1})):
        with pytest.raises(UserError, match=f"schedule.{name} must be at most optimizer.lr, 1e-05, got 0.0001: set"):
            recipe(1e-5, **schedule)


def test_options_of_a_part_of_videos():
    options = {"dataset": "videos", "batch_size": 1, "num_workers": 0}
    read(ImageData, "data", options | {"train_options": {"num_frames": 3}})
    read(ImageData, "data", options | {"dataset": "wds/a", "train_options": {"split": "a"}})
    with pytest.raises(UserError, match=r"data.val_options has no option num_frame .*closest: num_frames"):
        read(ImageData, "data", options | {"val_options": {"num_frame": 3}})


@pytest.mark.parametrize(
    ("page", "kind"),
    [
        ("training", ImageData),
        ("training", ImageTrainOptions),
        ("forecasting", SeriesData),
        ("video", VideoOptions),
        *(("options", kind) for kind in dict.fromkeys([*CHECKED.values(), TransformOptions])),
    ],
)
def test_the_tables_in_the_docs(page, kind):
    assert markdown_table(kind) in (ROOT / f"docs/{page}.md").read_text()


def test_a_table():
    lines = markdown_table(SeriesData).splitlines()
    assert lines[:2] == ["| option | value | default | |", "|---|---|---|---|"]
    assert lines[4] == "| `split` | 'ratio', 'etth' or 'ettm' | 'ratio' | which rows train, validate and test |"
    assert lines[5] == "| `lookback` | a whole number >= 1 | required | rows the model sees |"
    assert [line.split("`")[1] for line in lines[2:]] == [one.name for one in fields(SeriesData)]


@pytest.mark.parametrize(("kind", "others"), [(ImageRecipe, "mixup.mode"), (SeriesRecipe, "data.lookback")])
def test_help_options(kind, others, capsys):
    parser = argparse.ArgumentParser()
    add_config_arguments(parser, kind)
    with pytest.raises(SystemExit) as ended:
        parser.parse_args(["--help-options"])
    lines = capsys.readouterr().out.splitlines()
    assert ended.value.code == 0
    assert "train.trackers: a list of names; default: []" in lines
    assert "schedule.num_epochs: a whole number >= 1; default: required" in lines
    assert "data.batch_size: a whole number >= 1; default: required" in lines
    assert "optimizer.betas: None or a list of numbers >= 0 and < 1; default: None" in lines
    scale = "data.train_transform.scale: None or two numbers > 0 and <= 1, the smaller first; default: None"
    assert (scale in lines) == (kind is ImageRecipe)
    assert any(line.startswith(f"{others}: ") for line in lines)
