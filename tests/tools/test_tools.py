import argparse
import csv
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch

from tests.tiny import DIGITS, FOLDER, ROOT, WORDS, few_digits, load_tool, write_folder, write_image, write_truncated
from vim.engine.launch import holding
from vim.errors import UserError, run


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
    status, output, errors = call("predict", *predict[2:])
    assert (status, errors) == (0, "")
    assert output.count(".png\n") == 10
    assert len(re.findall(r"^ +\d+\.\d\d %  \d$", output, re.MULTILINE)) == 50

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
    of_videos = load_tool("train").next_commands(arguments, Path("work_dirs/a"), 30, "VIDEOS")
    assert of_videos[1].startswith("python tools/test_video.py ")
    lines = load_tool("train").next_commands(arguments, Path("work_dirs/a"), 30, "IMAGES")
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
    assert_told(call("train", DIGITS, "--work-dir", trained[0], *tiny), "holds a run: go on with it by --resume")
    last = trained[0] / "last.pth"
    assert_told(call("train", DIGITS, "--work-dir", trained[0], "--resume", FOLDER, *tiny), "or name another folder")
    assert_told(
        call("train", DIGITS, *work_dir, "--resume", last, *tiny, "model.patch_size=8", "model.depth=1"),
        "another model.depth",
    )
    assert_told(call("train", DIGITS, *work_dir, *tiny, "model.num_classes=3"), "model.num_classes=10")
    assert_told(call("train", DIGITS, *work_dir, *tiny, "modle.depth=1"), "has modle: a config has no such section")
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


def results(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_a_sweep_over_sizes(trained, call, tmp_path, monkeypatch):
    few_digits(monkeypatch)
    work_dir = tmp_path / "run"
    words = [DIGITS, trained[0] / "best.pth", "--work-dir", work_dir, "--raw"]
    first = call("test", *words, "--img-size", 32, 64)
    second = call("test", *words, "--img-size", 32, "--csv", work_dir / "results.csv")
    assert (first[0], first[2], second[0], second[2]) == (0, "", 0, "")
    rows = results(work_dir / "results.csv")
    assert [row["img_size"] for row in rows] == ["32", "64", "32"]
    assert (rows[0]["loss"], rows[0]["top1"]) == (rows[2]["loss"], rows[2]["top1"])
    assert rows[0]["loss"] != rows[1]["loss"]
    assert {(row["images"], row["weights"], row["labels"], row["config"]) for row in rows} == {
        ("64", "raw", "none", str(DIGITS))
    }
    names = ["classes_test_32.csv", "classes_test_64.csv", "confusion_test_32.png", "confusion_test_64.png"]
    assert sorted(path.name for path in work_dir.iterdir()) == [*names, "results.csv", "sizes_test.png"]
    shares = [float(row["top1"]) * int(row["count"]) for row in results(work_dir / "classes_test_64.csv")]
    assert sum(shares) == pytest.approx(64 * float(rows[1]["top1"]))


def test_published_weights_and_an_unreadable_image(call, tmp_path):
    root = write_folder(tmp_path / "data", val=["a", "b", "c"])
    broken = write_truncated(root / "val/b/1.png")
    model = timm.create_model("test_vim", num_classes=3)
    torch.save({"model_ema": model.state_dict()}, tmp_path / "a.pth")
    options = ["--cfg-options", f"data.root={root}", "data.num_workers=0"]
    words = ["--model", "test_vim", "--ema", "--work-dir", tmp_path / "run", *options]
    status, output, errors = call("test", FOLDER, tmp_path / "a.pth", *words)
    assert (status, errors) == (0, "")
    assert output.startswith("64 pixels, 11 images, 1 more cannot be read; in ")
    assert str(broken) in (tmp_path / "run/unreadable_test.txt").read_text()
    (row,) = results(tmp_path / "run/results.csv")
    assert (row["weights"], row["images"], row["unreadable"]) == ("ema", "11", "1")


def test_two_processes_find_what_one_does(trained, call, tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")  # without, and without a GPU, accelerate lets each run alone
    root = write_folder(tmp_path / "data", val=list("0123456789"), count=3)
    write_truncated(root / "val/1/2.png")
    words = [FOLDER, trained[0] / "best.pth"]
    options = ["--cfg-options", f"data.root={root}", "data.num_workers=0", "data.batch_size=4"]
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    process = start(*launch, "tools/test.py", *words, "--work-dir", tmp_path / "two", *options)
    assert process.returncode == 0, process.stderr
    assert call("test", *words, "--work-dir", tmp_path / "one", *options)[0] == 0
    (two,), (one,) = (results(tmp_path / f"{name}/results.csv") for name in ("two", "one"))
    assert float(two["loss"]) == pytest.approx(float(one["loss"]), rel=1e-5)
    for key in ("images", "unreadable", "top1", "top5"):
        assert two[key] == one[key]
    for name in ("classes_test.csv", "unreadable_test.txt"):
        assert (tmp_path / "two" / name).read_text() == (tmp_path / "one" / name).read_text()


def test_mistakes_in_testing(call, trained, tmp_path):
    best, work_dir = trained[0] / "best.pth", ["--work-dir", tmp_path / "run"]
    assert_told(call("test", DIGITS, tmp_path / "nothing.pth", *work_dir), "no such checkpoint")
    root = write_folder(tmp_path / "data")
    result = call("test", FOLDER, best, *work_dir, "--cfg-options", f"data.root={root}")
    assert_told(result, "trained on other classes .* than the config's data has")
    assert_told(call("test", DIGITS, best, *work_dir, "--labels", "v2"), "best.pth has 10")
    assert_told(call("test", DIGITS, best, *work_dir, "--img-size", 64, 4), "--img-size 4 does not fit the model")
    assert_told(call("test", DIGITS, best, *work_dir, "--ema"), "holds no running average")
    assert not (tmp_path / "run").exists()
    (tmp_path / "other.csv").write_text("a,b\n")
    assert_told(call("test", DIGITS, best, *work_dir, "--csv", tmp_path / "other.csv"), "other.csv has other columns")


def test_mistakes_in_predicting(call, trained, tmp_path):
    best, image = trained[0] / "best.pth", write_image(tmp_path / "a.png")
    assert_told(call("predict", best, tmp_path / "nothing"), "no such file or folder")
    assert_told(call("predict", best, write_truncated(tmp_path / "b.png")), "cannot read .*b.png as an image")
    assert_told(call("predict", best, image, "--top-k", 0), "--top-k must be at least 1, got 0")
    assert_told(call("predict", best, image, "--draw", image), "cannot make the folder")
    assert_told(call("predict", best, image, "--model", "test_vim"), "best.pth is of another model: cls_token is")
    assert_told(call("predict", image, image), "cannot read .*a.png as a checkpoint")


def test_outputs_that_are_not_finite(call, trained, tmp_path):
    state = torch.load(trained[0] / "best.pth", weights_only=True)
    state["model"]["head.weight"].fill_(3e38)
    del state["training"]
    torch.save(state, tmp_path / "large.pth")
    work_dir = ["--work-dir", tmp_path / "run"]
    assert_told(call("test", DIGITS, tmp_path / "large.pth", *work_dir), "outputs of .*large.pth are not finite")
    assert len(results(tmp_path / "run/results.csv")) == 0
    result = call("predict", tmp_path / "large.pth", write_image(tmp_path / "a.png"))
    assert_told(result, "outputs of the model are not finite")


@pytest.mark.parametrize("tool", sorted(path.stem for path in (ROOT / "tools").glob("[!_]*.py")))
def test_words_that_a_tool_does_not_know(tool, call):
    assert_told(call(tool, "--hlp", "a"), "(--hlp|required|invalid choice)")
    status, output, errors = call(tool, "--help")
    assert (status, errors) == (0, "") and output.startswith("usage: ")


def test_a_run_in_a_folder_that_another_holds(call, tmp_path):
    with holding(tmp_path / "run"):
        words = [DIGITS, "--work-dir", tmp_path / "run", "--cfg-options", *WORDS]
        process = start("tools/train.py", *words)
    assert process.returncode == 2
    assert f"error: {tmp_path / 'run'} is in use by process {os.getpid()} on " in process.stderr


def test_an_interrupt_is_no_traceback(capsys):
    def main():
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as stop:
        run(main)
    assert (stop.value.code, capsys.readouterr().err) == (130, "interrupted\n")


def test_a_message_is_one_line():
    assert str(UserError("a\n  b\n")) == "a b"
    assert len(str(UserError("a" * 10_000))) < 1000
