import argparse
import re
from pathlib import Path

import pytest

from tests.tiny import DIGITS, ROOT, told
from vim.engine.config import add_config_arguments, load_recipe, recipe_of, work_dir_of, write_recipe
from vim.errors import UserError
from vim.options import ImageRecipe, ImageTrainOptions, SeriesRecipe

SECTIONS = "model = dict()\ndata = dict()\noptimizer = dict()\nschedule = dict()\ntrain = dict()\n"


def parse(*words):
    parser = argparse.ArgumentParser()
    add_config_arguments(parser)
    return parser.parse_args(list(words))


def write(path, text):
    path.write_text(text)
    return path


def test_options_are_merged():
    options = {"model.depth": 3, "data.train_transform.scale": [0.5, 1.0], "mixup.mixup_alpha": 0.8}
    recipe = load_recipe(DIGITS, ImageRecipe, options)
    assert (recipe.model["model_name"], recipe.model["depth"]) == ("vim_nano", 3)
    assert recipe.data.train_transform["scale"] == [0.5, 1.0]
    assert recipe.data.train_transform["hflip"] == 0.0
    assert recipe.mixup == {"mixup_alpha": 0.8}
    assert recipe.teacher is None


def test_none_is_the_default():
    recipe = load_recipe(DIGITS, ImageRecipe, {"train.clip_grad": None, "train.keep": None, "data.samples": None})
    assert recipe.train == ImageTrainOptions(smoothing=0.1)
    assert recipe.data.samples == 1


@pytest.mark.parametrize(
    ("path", "kind"), [(DIGITS, ImageRecipe), (ROOT / "configs/tsm2/tsm2_lorenz_24.py", SeriesRecipe)]
)
def test_what_is_written_reads_the_same(path, kind, tmp_path):
    options = {"model.depth": 3, "train.trackers": ["a"], "optimizer.betas": (0.9, 0.95), "schedule.min_lr": 1e-5 / 3}
    recipe = load_recipe(path, kind, options)
    write_recipe(recipe, tmp_path / "config.py")
    assert load_recipe(tmp_path / "config.py", kind) == recipe
    assert recipe.train.trackers == ("a",)
    assert recipe.optimizer["betas"] == (0.9, 0.95)


def test_arguments():
    arguments = parse("a/b.py", "--cfg-options", "model.depth=3", "optimizer.lr=1e-3", "train.amp=bf16")
    assert arguments.cfg_options == {"model.depth": 3, "optimizer.lr": 1e-3, "train.amp": "bf16"}
    assert str(work_dir_of(arguments)) == "work_dirs/b"
    assert str(work_dir_of(parse("a/b.py:row.1"))) == "work_dirs/row.1"
    assert str(work_dir_of(parse("a/b.py:row", "--work-dir", "c"))) == "c"


def test_the_recipe_of_arguments():
    recipe = recipe_of(
        parse(str(DIGITS), "--amp", "bf16", "--cfg-options", "model.depth=3", "train.amp=no"), ImageRecipe
    )
    assert (recipe.model["depth"], recipe.train.amp) == (3, "bf16")
    assert recipe_of(parse(str(DIGITS), "--cfg-options", "train.amp=bf16"), ImageRecipe).train.amp == "bf16"


def test_an_argument_behind_the_options():
    with pytest.raises(UserError, match="takes KEY=VALUE, got 'best.pth': other arguments go before it"):
        parse("a.py", "--cfg-options", "model.depth=3", "best.pth")


def test_missing_file(tmp_path):
    (tmp_path / "recipe_tiny.py").touch()
    with pytest.raises(UserError, match=r"no such config: .*recipe_tinny.py \(the closest: recipe_tiny.py\)"):
        load_recipe(tmp_path / "recipe_tinny.py", ImageRecipe)
    with pytest.raises(UserError, match=re.escape(f"no such config: {tmp_path / 'a.py'}")):
        load_recipe(tmp_path / "a.py", ImageRecipe)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model = dict(\n", "SyntaxError: '(' was never closed"),
        ("model = nothing\n", "NameError: name 'nothing' is not defined"),
        ("_base_ = ['nothing.py']\n", "nothing.py"),
    ],
)
def test_a_file_that_cannot_be_read(text, message, tmp_path):
    path = write(tmp_path / "a.py", text)
    with pytest.raises(UserError, match=f"cannot read the config {re.escape(str(path))}: .*{re.escape(message)}"):
        load_recipe(path, ImageRecipe)


def test_missing_sections(tmp_path):
    path = write(tmp_path / "a.py", "model = dict()\ntrain = dict()\n")
    with pytest.raises(UserError, match=re.escape(f"the config {path} lacks data, optimizer, schedule: a config has")):
        load_recipe(path, ImageRecipe)


def test_a_section_that_is_no_dict(tmp_path):
    path = write(tmp_path / "a.py", SECTIONS + "model = 'vim_nano'\n")
    with pytest.raises(UserError, match=re.escape(f"model must be a dict in the config {path}, got 'vim_nano'")):
        load_recipe(path, ImageRecipe)


def test_missing_values(tmp_path):
    with pytest.raises(UserError, match="data.dataset must be a string in the config .*, got None"):
        load_recipe(write(tmp_path / "a.py", SECTIONS), ImageRecipe)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"modle.depth": 3},
            r"--cfg-options has modle: a config has no such section \(the closest: model.*, only model, ",
        ),
        ({"model.model_name.depth": 3}, "--cfg-options does not fit the config"),
        ({"model": "vim_nano"}, "model must be a dict"),
        (
            {"data.batchsize": 8},
            r"data has no option batchsize .*\(the closest: batch_size.*, only dataset, root, labels",
        ),
        (
            {"train.clip_gard": 1.0},
            r"train has no option clip_gard .*\(the closest: clip_grad\), only seed, amp, clip_grad",
        ),
        ({"data.batch_size": 0}, "data.batch_size must be a whole number >= 1 .*, got 0"),
        ({"data.num_workers": -1}, "data.num_workers must be a whole number >= 0 .*, got -1"),
        ({"schedule.num_epochs": 0}, "schedule.num_epochs must be a whole number >= 1 .*, got 0"),
        ({"schedule.num_epochs": 1.5}, "schedule.num_epochs must be a whole number >= 1 .*, got 1.5"),
        ({"train.seed": "abc"}, "train.seed must be a whole number >= 0 .*, got 'abc'"),
        ({"train.amp": "fp8"}, "train.amp must be 'no', 'bf16' or 'fp16' .*, got 'fp8'"),
        ({"train.clip_grad": -1}, "train.clip_grad must be None or a number > 0 .*, got -1"),
        ({"train.trackers": [["x"]]}, "train.trackers must be a list of names"),
        ({"schedule.warmup_epochs": -3}, "schedule.warmup_epochs must be a whole number >= 0 .*, got -3"),
        ({"train.ema_decay": 1}, "train.ema_decay must be None or a number >= 0 and < 1 .*, got 1"),
        ({"train.smoothing": "abc"}, "train.smoothing must be a number >= 0 and < 1 .*, got 'abc'"),
        ({"optimizer.weight_decay": "a"}, "optimizer.weight_decay must be a number >= 0 .*, got 'a'"),
        ({"optimizer.lr": 1e-7}, "schedule.min_lr must be at most optimizer.lr, 1e-07, got 1e-05"),
        ({"schedule.num_epochs": 5}, "schedule.warmup_epochs must be less than schedule.num_epochs, 5, got 5"),
        ({"schedule.warmup_epoch": 5}, r"schedule has no option warmup_epoch .*\(the closest: warmup_epochs"),
        ({"mixup.mixup_alfa": 1}, r"mixup has no option mixup_alfa .*\(the closest: mixup_alpha"),
        ({"masking.rate": 1}, r"masking has no option rate .*\(the closest: ratio"),
        ({"data.video.sampel": 1}, r"data.video has no option sampel .*\(the closest: sampling"),
        ({"data.eval_transform.crop": 1}, r"data.eval_transform has no option crop .*\(the closest: crop_pct"),
        ({"data.train_transform.scale": [1, 0.5]}, "data.train_transform.scale must be .* smaller first in .*, got"),
        ({"teacher.depth": 0}, "teacher.depth must be .*, got 0"),
        ({"model.depth": float("nan")}, "model.depth must be .*, got nan"),
    ],
    ids=str,
)
def test_an_option_that_does_not_fit(options, message):
    with pytest.raises(UserError, match=message):
        load_recipe(DIGITS, ImageRecipe, options)


TABLE = (
    SECTIONS.replace(
        "data = dict()",
        "data = dict(dataset='digits', batch_size=8, num_workers=0, video=dict(num_frames=1, num_clips=2))",
    )
    + "schedule = dict(num_epochs=5)\ntrain = dict(seed=1)\n"
    + """
def row(depth, **data):
    return dict(model=dict(depth=depth), data=data)

rows = {
    "small": row(1),
    "large": row(2, batch_size=4, video=dict(num_clips=3)),
    "only-c": dict(data=dict(video=dict(_delete_=True, num_crops=3)), train=dict(seed=2)),
}
"""
)


def test_rows_of_a_table(tmp_path):
    path = write(tmp_path / "table.py", TABLE)
    small, large, only = (load_recipe(Path(f"{path}:{row}"), ImageRecipe) for row in ("small", "large", "only-c"))
    assert (small.model, small.data.batch_size, small.data.video) == (
        {"depth": 1},
        8,
        {"num_frames": 1, "num_clips": 2},
    )
    assert (large.model, large.data.batch_size, large.data.video) == (
        {"depth": 2},
        4,
        {"num_frames": 1, "num_clips": 3},
    )
    assert (only.model, only.data.video, only.train.seed) == ({}, {"num_crops": 3}, 2)
    assert small.train.seed == 1


def test_options_come_after_the_row(tmp_path):
    path = Path(f"{write(tmp_path / 'table.py', TABLE)}:large")
    recipe = load_recipe(path, ImageRecipe, {"model.depth": 7, "data.video.num_frames": 4})
    assert (recipe.model["depth"], recipe.data.video, recipe.data.batch_size) == (
        7,
        {"num_frames": 4, "num_clips": 3},
        4,
    )


def test_a_table_is_inherited(tmp_path):
    write(tmp_path / "table.py", TABLE)
    path = write(tmp_path / "own.py", "_base_ = ['table.py']\nschedule = dict(num_epochs=9)\n")
    recipe = load_recipe(Path(f"{path}:large"), ImageRecipe)
    assert (recipe.schedule["num_epochs"], recipe.model["depth"]) == (9, 2)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (":lagre", "table.py has no row lagre; its rows are large, small, only-c"),
        ("", "table.py is a table of configs: name a row, .*table.py:ROW; its rows are "),
    ],
)
def test_a_row_that_does_not_exist(row, message, tmp_path):
    with pytest.raises(UserError, match=message):
        load_recipe(Path(f"{write(tmp_path / 'table.py', TABLE)}{row}"), ImageRecipe)


def test_a_row_of_a_file_without_rows():
    with pytest.raises(UserError, match="vim-nano_1xb64_digits.py is one config, not a table: leave out :tiny"):
        load_recipe(Path(f"{DIGITS}:tiny"), ImageRecipe)


@pytest.mark.parametrize(
    ("text", "name", "hint"),
    [
        (SECTIONS + "optimzer = dict(lr=1)\n", "a.py has optimzer", "(the closest: optimizer), only model, data"),
        (SECTIONS + "shedule = 3\n", "a.py has shedule", "(the closest: schedule)"),
        ("_base_ = ['base.py']\n", "a.py has optimzer", "(the closest: optimizer)"),
        (TABLE + "rows['small']['optimzer'] = dict(lr=1)\n", "the row small of", "(the closest: optimizer)"),
        (
            TABLE + "tiny = dict(depth=1)\n",
            "a.py has tiny",
            "; a variable of the file's own has a name that begins with _",
        ),
    ],
)
def test_a_section_that_does_not_exist(text, name, hint, tmp_path):
    write(tmp_path / "base.py", SECTIONS + "optimzer = dict(lr=1)\n")
    row = ":small" if "rows" in text else ""
    with pytest.raises(UserError, match=told(name, "a config has no such section ", hint)):
        load_recipe(Path(f"{write(tmp_path / 'a.py', text)}{row}"), ImageRecipe)


def test_variables_and_functions_of_a_file_and_its_base(tmp_path):
    write(tmp_path / "base.py", TABLE + "_spare = dict(a=1)\n")
    own = "_base_ = ['base.py']\n_epochs = 9\nschedule = dict(num_epochs=_epochs)\n"
    recipe = load_recipe(Path(f"{write(tmp_path / 'own.py', own)}:small"), ImageRecipe)
    assert recipe.schedule["num_epochs"] == 9


@pytest.mark.parametrize("row", ["dict(data=dict(batch_size=dict(a=1)))", "3"])
def test_a_row_that_does_not_fit(row, tmp_path):
    path = write(tmp_path / "table.py", TABLE + f"rows['bad'] = {row}\n")
    with pytest.raises(UserError, match="the row bad does not fit the table .*table.py: "):
        load_recipe(Path(f"{path}:bad"), ImageRecipe)


def test_errors_name_the_row(tmp_path):
    path = write(tmp_path / "table.py", TABLE + "rows['bad'] = dict(data=dict(batch_size=0))\n")
    with pytest.raises(
        UserError, match="data.batch_size must be a whole number >= 1 in the config .*table.py:bad, got 0"
    ):
        load_recipe(Path(f"{path}:bad"), ImageRecipe)


@pytest.mark.parametrize(
    ("path", "kind", "tool"),
    [
        (DIGITS, SeriesRecipe, "tools/train.py"),
        (ROOT / "configs/tsm2/tsm2_lorenz_24.py", ImageRecipe, "tools/forecast.py"),
    ],
)
def test_a_config_for_the_other_tool(path, kind, tool):
    with pytest.raises(UserError, match=f"{path} is for another kind of task: use python {tool}"):
        load_recipe(path, kind)


def test_none_is_the_default_of_every_checked_option():
    options = {"optimizer.weight_decay": None, "schedule.warmup_epochs": None, "train.keep": None}
    recipe = load_recipe(DIGITS, ImageRecipe, options)
    assert recipe.train.keep == 1
    assert "weight_decay" not in recipe.optimizer and "warmup_epochs" not in recipe.schedule
