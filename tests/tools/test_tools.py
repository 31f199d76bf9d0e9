import argparse
import importlib.util
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.tiny import DIGITS, FOLDER, ROOT, WORDS, few_digits, write_folder, write_image, write_truncated
from vim.errors import UserError, run


def load(name):
    """The tool as a module."""
    spec = importlib.util.spec_from_file_location(f"tools_{name}", ROOT / f"tools/{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


TOOLS = {name: load(name) for name in ("train", "test", "predict")}


@pytest.fixture
def call(monkeypatch, capsys):
    """Run a tool here: its exit status, output and errors."""

    def call(name, *words):
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, words)])
        try:
            run(TOOLS[name].main)
        except SystemExit as stop:
            return stop.code, *capsys.readouterr()
        return 0, *capsys.readouterr()

    return call


def start(*words):
    """Run a command line in a process of its own, from the root of the checkout."""
    return subprocess.run([sys.executable, *map(str, words)], cwd=ROOT, capture_output=True, text=True, timeout=120)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The work dir of tools/train.py, whose name holds a blank, and what it printed."""
    work_dir = tmp_path_factory.mktemp("runs") / "a run"
    options = [*WORDS, "schedule.num_epochs=1", "data.batch_size=64", "model.patch_size=8"]
    process = start("tools/train.py", DIGITS, "--work-dir", work_dir, "--cfg-options", *options)
    assert process.returncode == 0, process.stderr
    return work_dir, process


def commands(trained):
    lines = [line.strip() for line in trained[1].stdout.splitlines()]
    return [shlex.split(line) for line in lines if line.startswith("python tools/")]


def assert_told(result, message):
    status, _, errors = result
    assert status == 2
    assert re.fullmatch(f"error: .*{message}.*\n", errors), errors


def test_train(trained):
    work_dir, process = trained
    assert process.stderr == ""
    assert re.fullmatch(r"top-1 \d\d?\.\d\d %", process.stdout.splitlines()[-1])
    assert (work_dir / "best.pth").exists()
    assert [command[1] for command in commands(trained)] == ["tools/predict.py", "tools/test.py", "tools/train.py"]


def test_the_next_commands_run(trained, call, monkeypatch):
    monkeypatch.chdir(ROOT)
    predict, test, train = commands(trained)
    process = start(*predict[1:])
    assert (process.returncode, process.stderr) == (0, "")
    assert process.stdout.count(".png\n") == 10
    assert len(re.findall(r"^ +\d+\.\d\d %  \d$", process.stdout, re.MULTILINE)) == 50

    status, output, errors = call("test", *test[2:])
    assert (status, errors) == (0, "")
    assert output.splitlines()[-1] == trained[1].stdout.splitlines()[-1]

    few_digits(monkeypatch)
    status, output, errors = call("train", *train[2:], "data.batch_size=64")
    assert (status, errors) == (0, "")
    assert len((trained[0] / "log.csv").read_text().splitlines()) == 3
    assert re.search(r"top-1 \d\d?\.\d\d %\n$", output)


def test_the_next_commands_of_a_config_as_it_is():
    arguments = argparse.Namespace(config=DIGITS.relative_to(ROOT), work_dir=None, cfg_options={}, amp=None)
    lines = TOOLS["train"].next_commands(arguments, Path("work_dirs/a"), 30, "IMAGES")
    assert lines == [
        "python tools/predict.py work_dirs/a/best.pth IMAGES",
        "python tools/test.py configs/vim/vim-nano_1xb64_digits.py work_dirs/a/best.pth",
        "python tools/train.py configs/vim/vim-nano_1xb64_digits.py --resume --cfg-options schedule.num_epochs=60",
    ]


def test_predict_draws(trained, call, tmp_path):
    image = write_image(tmp_path / "a.png")
    status, output, errors = call("predict", trained[0] / "best.pth", image, "--top-k", 2, "--draw", tmp_path / "out")
    assert (status, errors) == (0, "")
    assert output.startswith(f"{image}\n")
    assert len(output.splitlines()) == 3
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["0000_a.png"]


def test_a_mistake_is_one_line(tmp_path):
    process = start("tools/train.py", tmp_path / "nothing.py")
    assert process.stdout == ""
    assert_told((process.returncode, "", process.stderr), f"no such config: {tmp_path / 'nothing.py'}")


def test_mistakes_in_training(call, trained, tmp_path, monkeypatch):
    few_digits(monkeypatch)
    work_dir = ["--work-dir", tmp_path / "run"]
    missing = tmp_path / "nothing"
    assert_told(call("train", missing), "no such config")
    assert_told(call("train", FOLDER, *work_dir, "--cfg-options", f"data.root={missing}"), f"no such folder: {missing}")
    assert_told(call("train", FOLDER, *work_dir), "data.root must name the folder")
    tiny = ["--cfg-options", *WORDS]
    assert_told(call("train", DIGITS, *work_dir, "--resume", missing, *tiny), "no such checkpoint")
    last = trained[0] / "last.pth"
    assert_told(call("train", DIGITS, *work_dir, "--resume", last, *tiny, "model.depth=1"), "is of another model")
    assert_told(call("train", DIGITS, *work_dir, *tiny, "model.num_classes=3"), "model.num_classes=10")
    assert_told(call("train", DIGITS, *work_dir, *tiny, "modle.depth=1"), "modle.depth: a config has no such section")
    assert_told(call("train", DIGITS, *work_dir, *tiny, "depth"), "takes KEY=VALUE, got 'depth'")
    (tmp_path / "file").write_text("")
    assert_told(call("train", DIGITS, "--work-dir", tmp_path / "file", *tiny), "cannot make the folder")


@pytest.mark.parametrize("num_workers", [0, 1])
def test_an_unreadable_image_in_training(num_workers, call, tmp_path):
    root = write_folder(tmp_path / "data")
    path = write_truncated(root / "train/cat/0.png")
    options = [*WORDS, f"data.root={root}", f"data.num_workers={num_workers}", "data.batch_size=8"]
    options += ["model.num_classes=2", "data.max_unreadable=0.1"]  # of 8
    words = ("train", FOLDER, "--work-dir", tmp_path / "run", "--cfg-options", *options)
    status, _, errors = call(*words)
    assert status == 2
    told = f"error: 1 of 8 images cannot be read, more than data.max_unreadable.*cannot read {path} as an image"
    assert re.match(told, errors.splitlines()[-1])
    assert (tmp_path / "run/unreadable.txt").read_text().startswith(f"cannot read {path} as an image")

    status, _, errors = call(*words, "data.max_unreadable=0.2")
    assert status == 0
    assert errors.count(f"left out: cannot read {path} as an image") == 1


def test_mistakes_in_testing(call, trained, tmp_path):
    best, work_dir = trained[0] / "best.pth", ["--work-dir", tmp_path / "run"]
    assert_told(call("test", DIGITS, tmp_path / "nothing.pth", *work_dir), "no such checkpoint")
    root = write_folder(tmp_path / "data")
    result = call("test", FOLDER, best, *work_dir, "--cfg-options", f"data.root={root}")
    assert_told(result, "trained on other classes .* than the config's data has")


def test_mistakes_in_predicting(call, trained, tmp_path):
    best, image = trained[0] / "best.pth", write_image(tmp_path / "a.png")
    assert_told(call("predict", best, tmp_path / "nothing"), "no such file or folder")
    assert_told(call("predict", best, write_truncated(tmp_path / "b.png")), "cannot read .*b.png as an image")
    assert_told(call("predict", best, image, "--top-k", 0), "--top-k must be at least 1, got 0")
    assert_told(call("predict", best, image, "--draw", image), "cannot make the folder")
    assert_told(call("predict", best, image, "--model", "test_vim"), "best.pth is of another model: cls_token is")
    assert_told(call("predict", image, image), "cannot read .*a.png as a checkpoint")


def test_an_interrupt_is_no_traceback(capsys):
    def main():
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as stop:
        run(main)
    assert (stop.value.code, capsys.readouterr().err) == (130, "interrupted\n")


def test_a_message_is_one_line():
    assert str(UserError("a\n  b\n")) == "a b"
    assert len(str(UserError("a" * 10_000))) < 1000
