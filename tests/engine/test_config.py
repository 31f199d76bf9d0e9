import argparse
import re

import pytest

from tests.tiny import DIGITS
from vim.engine.config import add_config_arguments, load_config, work_dir_of, write_config
from vim.errors import UserError

SECTIONS = "model = dict()\ndata = dict()\noptimizer = dict()\nschedule = dict()\ntrain = dict()\n"


def parse(*words):
    parser = argparse.ArgumentParser()
    add_config_arguments(parser)
    return parser.parse_args(list(words))


def write(path, text):
    path.write_text(text)
    return path


def test_options_are_merged():
    config = load_config(DIGITS, {"model.depth": 3, "data.train_transform.scale": [0.5, 1.0], "mixup.mixup_alpha": 0.8})
    assert (config.model.model_name, config.model.depth) == ("vim_nano", 3)
    assert config.data.train_transform.scale == [0.5, 1.0]
    assert config.data.train_transform.hflip == 0.0
    assert config.mixup == {"mixup_alpha": 0.8}


def test_what_is_written_reads_the_same(tmp_path):
    config = load_config(DIGITS, {"model.depth": 3, "mixup.mixup_alpha": 0.8})
    write_config(config, tmp_path / "config.py")
    assert load_config(tmp_path / "config.py").to_dict() == config.to_dict()


def test_arguments():
    arguments = parse("a/b.py", "--cfg-options", "model.depth=3", "optimizer.lr=1e-3", "train.amp=bf16")
    assert arguments.cfg_options == {"model.depth": 3, "optimizer.lr": 1e-3, "train.amp": "bf16"}
    assert str(work_dir_of(arguments)) == "work_dirs/b"
    assert str(work_dir_of(parse("a/b.py", "--work-dir", "c"))) == "c"


def test_an_argument_behind_the_options():
    with pytest.raises(UserError, match="takes KEY=VALUE, got 'best.pth': other arguments go before it"):
        parse("a.py", "--cfg-options", "model.depth=3", "best.pth")


def test_missing_file(tmp_path):
    with pytest.raises(UserError, match=re.escape(f"no such config: {tmp_path / 'a.py'}")):
        load_config(tmp_path / "a.py")


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
        load_config(path)


def test_missing_sections(tmp_path):
    path = write(tmp_path / "a.py", "model = dict()\ntrain = dict()\n")
    with pytest.raises(UserError, match=re.escape(f"the config {path} lacks data, optimizer, schedule: a config has")):
        load_config(path)


def test_a_section_that_is_no_dict(tmp_path):
    path = write(tmp_path / "a.py", SECTIONS + "model = 'vim_nano'\n")
    with pytest.raises(UserError, match=re.escape(f"model must be a dict in the config {path}, got 'vim_nano'")):
        load_config(path)


def test_missing_values(tmp_path):
    with pytest.raises(UserError, match="data.batch_size must be a whole number from 1 in the config .*, got None"):
        load_config(write(tmp_path / "a.py", SECTIONS))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"modle.depth": 3}, "modle.depth: a config has no such section, only model, data"),
        ({"model.model_name.depth": 3}, "--cfg-options does not fit the config"),
        ({"model": "vim_nano"}, "model must be a dict"),
        ({"data.batchsize": 8}, "data has no option batchsize .*, only dataset, root, video, train_options"),
        ({"train.clip_gard": 1.0}, "train has no option clip_gard .*, only seed, amp, clip_grad"),
        ({"data.batch_size": 0}, "data.batch_size must be a whole number from 1 .*, got 0"),
        ({"data.num_workers": -1}, "data.num_workers must be a whole number from 0 .*, got -1"),
        ({"schedule.num_epochs": 0}, "schedule.num_epochs must be a whole number from 1 .*, got 0"),
        ({"schedule.num_epochs": 1.5}, "schedule.num_epochs must be a whole number from 1 .*, got 1.5"),
        ({"train.seed": "abc"}, "train.seed must be a whole number from 0 .*, got 'abc'"),
        ({"train.amp": "fp8"}, "train.amp must be 'no', 'bf16' or 'fp16' .*, got 'fp8'"),
        ({"train.clip_grad": -1}, "train.clip_grad must be None or a number above 0 .*, got -1"),
        ({"train.trackers": [["x"]]}, "train.trackers must be a list of names"),
        ({"schedule.warmup_epochs": -3}, "schedule.warmup_epochs must be a whole number from 0 .*, got -3"),
        ({"train.ema_decay": 1}, "train.ema_decay must be a number from 0 to below 1 .*, got 1"),
        ({"train.smoothing": "abc"}, "train.smoothing must be a number from 0 to below 1 .*, got 'abc'"),
    ],
    ids=str,
)
def test_an_option_that_does_not_fit(options, message):
    with pytest.raises(UserError, match=message):
        load_config(DIGITS, options)
