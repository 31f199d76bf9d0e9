"""What a checkpoint may hold: each case changes one entry of a sound one, and is refused by a line that names it."""

import copy
import re
import reprlib
from functools import partial

import pytest
import torch

from tests.tiny import few_digits, run_of, tiny_recipe
from vim.engine import schema
from vim.engine.weights import load_trained, read_run
from vim.errors import UserError

NAN = float("nan")
LONG = [["a"] * 10] * 10  # lists that hold one another many times
for _ in range(4):
    LONG = [LONG] * 10
ENDLESS = []
ENDLESS.append(ENDLESS)


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """The checkpoint of a run of one epoch."""
    folder = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patch:
        few_digits(patch)
        run_of(tiny_recipe(schedule__num_epochs=1), folder).fit()
    return read_run(folder / "last.pth")


def save(state, path, where, value):
    """Save a checkpoint with one entry changed; `where` are its keys, joined by dots."""
    state = copy.deepcopy(state)
    *keys, last = where.split(".")
    entry = state
    for key in keys:
        entry = entry[key]
    entry[last] = value
    torch.save(state, path)
    return path


def repr_of(value):
    return reprlib.repr(value)[:40]  # of an endless list too


def assert_refused(read, path, message):
    with pytest.raises(UserError) as caught:
        read(path)
    assert re.search(message, str(caught.value)), str(caught.value)
    assert str(path) in str(caught.value)


def test_a_sound_one_is_read(sound, tmp_path):
    torch.save(sound, tmp_path / "a.pth")
    model, state = load_trained(tmp_path / "a.pth")
    assert model.num_classes == len(state["meta"]["classes"])


META = [
    ("meta.model.pretrained", True, "cannot hold the option pretrained of a Vim"),
    ("meta.model.checkpoint_path", "/etc/passwd", "cannot hold the option checkpoint_path"),
    ("meta.model.pretrained_cfg_overlay", {"url": "http://127.0.0.1"}, "cannot hold the option pretrained_cfg_overlay"),
    ("meta.model.device", "cpu", "cannot hold the option device"),
    ("meta.model.dept", 2, r"cannot hold the option dept of a Vim \(the closest: depth"),
    ("meta.model.depth", 10**9, "the option depth of a Vim must be an identifier, a finite number of at most 100000"),
    ("meta.model.depth", 99_999, "it has more than .* parts, and the weights are of fewer"),
    ("meta.model.embed_dim", 65_536, r"cls_token is \(1, 1, 16\) there and \(1, 1, 65536\) in the model"),
    ("meta.model.class_token", "../a", "the option class_token of a Vim must be an identifier"),
    ("meta.model.model_name", "hf-hub:timm/resnet18", "no such model: hf-hub:timm/resnet18"),
    ("meta.model.model_name", "local-dir:/etc", "no such model: local-dir:/etc"),
    ("meta.model.model_name", "vim_tinny", r"no such model: vim_tinny \(the closest: vim_tiny"),
    ("meta.model.model_name", "resnet18", "cannot hold the option .* of a ResNet"),
    ("meta.model.model_name", None, "no such model: None"),
    ("meta.model", None, "meta.model must be a dict, got None"),
    ("meta.classes", 10, "meta.classes must be a list, got 10"),
    ("meta.classes", None, "meta.classes must be a list, got None"),
    ("meta.classes", ["a"] * 9 + [3], r"meta.classes\[9\] must be a string of at most 4096 characters, got 3"),
    ("meta.classes", ["a" * 5000], r"meta.classes\[0\] must be a string"),
    ("meta.classes", LONG, r"meta.classes\[0\] must be a string"),
    ("meta.classes", ["a"] * 9, "is of 10 classes, and its classes are of others"),
    ("meta.classes", [], "is of 10 classes, and its classes are of others"),
    ("meta.thresholds", [0.5], "is of 10 classes, and its thresholds are of others"),
    ("meta.thresholds", [1.5] * 10, r"meta.thresholds\[0\] must be a number from 0 to 1, got 1.5"),
    ("meta.thresholds", [0.5] * 10, "has a task and thresholds that do not fit one another"),
    ("meta.task", "multilabel", "has a task and thresholds that do not fit one another"),
    ("meta.eval_transform", {"input_size": (3, 16, 16)}, "it makes images of 3 channels, and the model takes 1$"),
    ("meta.eval_transform", None, "meta.eval_transform must be a dict"),
    ("meta.eval_transform", {"mean": LONG}, "must be a plain value|within more than 5 lists|more than 1000000 values"),
    ("meta.eval_transform", {"mean": ENDLESS}, "is within more than 5 lists"),
    ("meta.eval_transform", {"nothing": 1}, "meta.eval_transform has no option nothing in"),
    ("meta.eval_transform", {"crop_pct": NAN}, r"eval_transform\['crop_pct'\] must be a number from .*, got nan"),
    ("meta.eval_transform", {"crop_pct": 1e-9}, "with crop_pct 1e-09 are resized to more than 4194304 pixels"),
    ("meta.eval_transform", {"input_size": (1, 10**6, 10**6)}, "it makes images of .* pixels, and the model takes"),
    ("meta.eval_transform", {"std": (0.0,)}, "meta.eval_transform.std must be"),
    ("meta.eval_transform", {"normalize": False}, "it makes images of torch.uint8"),
    ("meta.columns", "ab", "meta.columns must be a list, got 'ab'"),
    ("meta.nothing", 1, "meta has an entry 'nothing', and only model, classes"),
    ("meta", [], "it lacks 'model' or 'meta'"),
    ("model", [1], r"model must be a dict, got a list"),
    ("nothing", 1, "it has an entry 'nothing', and only model, meta, training are known"),
]


@pytest.mark.parametrize(("where", "value", "message"), META, ids=repr_of)
def test_what_a_model_is(where, value, message, sound, tmp_path):
    assert_refused(load_trained, save(sound, tmp_path / "a.pth", where, value), message)


TRAINING = [
    ("training", {}, "training lacks model"),
    ("training.student", 1, "training.student must be True or False, got 1"),
    ("training.position.epoch", 10**9, "training.position.epoch must be a whole number from 0 to 1e"),
    ("training.position.epoch", True, "training.position.epoch must be a whole number .*, got True"),
    ("training.position.epoch", 2, "it is at epoch 2, and its log has 1 rows"),
    ("training.position.update", -1, "training.position.update must be .*, got -1"),
    ("training.position.update", 5, "it is at update 5 with 0 losses, in an epoch of 4 updates"),
    ("training.position.counted", 1, "it is at update 0 with 1 losses"),
    ("training.position.losses", NAN, "training.position.losses must be a number .*, got nan"),
    ("training.position.epoch", 1 << 1000, "got a number of 1001 bits"),
    ("training.position", {"epoch": 1}, "training.position lacks update"),
    ("training.rows", [{}], "row 1 of its log is not of epoch 1"),
    ("training.rows", [{"epoch": 2, "lr": 1, "train_loss": 1, "top1": 1}], "row 1 of its log is not of epoch 1"),
    ("training.rows", [{"epoch": 1, "lr": 1, "train_loss": 1}], "its log lacks 'top1'"),
    ("training.rows", 3, "training.rows must be a list, got 3"),
    ("training.notes", {"a": []}, "the notes has the entries a, and the run train, val"),
    ("training.notes", {"train": [1]}, r"training.notes\['train'\]\[0\] must be a string"),
    (
        "training.identity",
        {"a": torch.ones(1)},
        r"training.identity\['a'\] must be a plain value, got a tensor of shape",
    ),
    ("training.optimizer", None, "training.optimizer must be a dict"),
    ("training.optimizer.param_groups", [1], r"training.optimizer.param_groups\[0\] must be a dict"),
    ("training.optimizer.param_groups", [], "was trained with another optimizer"),
    ("training.optimizer.param_groups", [{"params": None}], "the optimizer's params must be names, in a list"),
    ("training.optimizer.param_groups", [{"params": 5}], "the optimizer's params must be names, in a list"),
    ("training.optimizer.state", {}, "the optimizer's state has the entries none, and the run cls_token"),
]


@pytest.mark.parametrize(("where", "value", "message"), TRAINING, ids=repr_of)
def test_where_a_run_is(where, value, message, sound, tmp_path, monkeypatch):
    few_digits(monkeypatch)
    resume = partial(run_of, tiny_recipe(schedule__num_epochs=1), tmp_path / "run")
    assert_refused(resume, save(sound, tmp_path / "a.pth", where, value), message)


MOMENTS = [
    ("exp_avg", None, "has the entries exp_avg_sq, step, and the run exp_avg, exp_avg_sq, step"),
    ("exp_avg", 1.0, r"exp_avg of cls_token must be torch.float32 \(1, 1, 16\), finite, got a float"),
    ("exp_avg", torch.zeros(16), r"must be torch.float32 \(1, 1, 16\), finite, got torch.float32 \(16,\)"),
    ("exp_avg", torch.zeros(1, 1, 16, dtype=torch.float64), r"got torch.float64 \(1, 1, 16\)"),
    ("exp_avg_sq", torch.full((1, 1, 16), NAN), "exp_avg_sq of cls_token must be .*, finite"),
    ("exp_avg", torch.zeros(1).expand(1, 1, 16), r"exp_avg of cls_token must be torch.float32 \(1, 1, 16\), finite"),
    ("exp_avg_sq", torch.full((1, 1, 16), -1.0), "exp_avg_sq of cls_token is negative"),
    ("step", torch.tensor(-1.0), "step of cls_token is negative"),
    ("step", torch.ones(2), r"step of cls_token must be torch.float32 \(\), finite, got torch.float32 \(2,\)"),
    ("other", torch.ones(2), "has the entries exp_avg, exp_avg_sq, other, step, and the run"),
]


@pytest.mark.parametrize(("key", "value", "message"), MOMENTS)
def test_the_moments_of_an_optimizer(key, value, message, sound, tmp_path, monkeypatch):
    few_digits(monkeypatch)
    moments = {**sound["training"]["optimizer"]["state"]["cls_token"], key: value}
    state = {name: part for name, part in moments.items() if part is not None}
    path = save(sound, tmp_path / "a.pth", "training.optimizer.state.cls_token", state)
    assert_refused(partial(run_of, tiny_recipe(schedule__num_epochs=1), tmp_path / "run"), path, message)


def test_the_options_of_an_optimizer(sound, tmp_path, monkeypatch):
    few_digits(monkeypatch)
    group = {**sound["training"]["optimizer"]["param_groups"][0], "betas": "x"}
    groups = [group, *sound["training"]["optimizer"]["param_groups"][1:]]
    path = save(sound, tmp_path / "a.pth", "training.optimizer.param_groups", groups)
    resume = partial(run_of, tiny_recipe(schedule__num_epochs=1), tmp_path / "run")
    assert_refused(resume, path, "the optimizer's betas must be a tuple, finite, got a str")


def test_tensors_that_share_their_numbers(sound, tmp_path):
    numbers = torch.zeros(1000)
    path = save(sound, tmp_path / "a.pth", "model", {f"a{i}": numbers for i in range(100)})
    assert_refused(load_trained, path, "its tensors share their numbers")


def test_the_number_of_values_is_bounded(monkeypatch):
    monkeypatch.setattr(schema, "MOST_VALUES", 10)
    schema.check(["a"] * 9, list[schema.Text], "it", "a.pth")
    with pytest.raises(UserError, match="a.pth is no sound checkpoint: it holds more than 10 values"):
        schema.check(["a"] * 10, list[schema.Text], "it", "a.pth")
