import multiprocessing
from pathlib import Path

import numpy as np
import pytest

from tests.tiny import image_data
from vim.data import Digits, build_datasets
from vim.data.video import motion

FEW = {"train": 8, "val": 4}


@pytest.fixture
def few(monkeypatch):
    monkeypatch.setattr(motion, "PARTS", FEW)


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_the_folder_is_written_once_and_always_the_same(few, tmp_path):
    motion.ensure(tmp_path / "a")
    motion.ensure(tmp_path / "b")
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    assert len(contents(tmp_path / "a")) == 12 + 3
    (tmp_path / "a/classes.txt").write_text("kept")
    motion.ensure(tmp_path / "a")
    assert (tmp_path / "a/classes.txt").read_text() == "kept"


def test_processes_that_write_it_at_a_time(few, tmp_path):
    context = multiprocessing.get_context("fork")  # they have few videos too
    processes = [context.Process(target=motion.ensure, args=(tmp_path / "a",)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert len(contents(tmp_path / "a")) == 12 + 3


def test_nothing_is_left_of_a_failure(few, tmp_path, monkeypatch):
    monkeypatch.setattr(motion, "encode", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        motion.ensure(tmp_path / "a")
    assert not list(tmp_path.iterdir())


def test_an_empty_folder_is_filled(few, tmp_path):
    motion.ensure(tmp_path)
    assert len(contents(tmp_path)) == 12 + 3


def test_the_parts_have_other_digits_and_other_motions(few, tmp_path, monkeypatch):
    parts, draws = [], []
    monkeypatch.setattr(motion, "Digits", lambda train: parts.append(train) or Digits(train=train))
    monkeypatch.setattr(motion, "moving", lambda digit, direction, rng: draws.append(rng.random()))
    monkeypatch.setattr(motion, "encode", lambda path, frames: path.touch())
    motion.ensure(tmp_path / "a")
    assert parts == [True, False]
    assert len(set(draws)) == 12


def test_the_data_set(few, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    splits = build_datasets(image_data({"dataset": "digit_motion", "video": {"num_frames": 5}}), "L")
    assert motion.default_folder() == tmp_path / "vim/digit_motion"
    assert splits.classes == ["up", "down", "left", "right"]
    assert [len(splits.train), len(splits.held_out)] == [8, 4]
    frames, label = splits.held_out[3]
    assert label == 3
    assert [(frame.mode, frame.size) for frame in frames] == [("L", (32, 32))] * 5


def test_the_home_folder(monkeypatch):
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert motion.default_folder() == Path.home() / ".cache/vim/digit_motion"


@pytest.mark.parametrize("name", motion.CLASSES)
def test_a_digit_moves_its_way(name):
    digit = np.zeros((16, 16), np.uint8)
    digit[3, 5] = 255
    direction = motion.CLASSES[name]
    for seed in range(5):
        frames = motion.moving(digit, direction, np.random.default_rng(seed))
        y, x = np.array([np.argwhere(frame == 255)[0] for frame in frames]).T
        steps = (np.diff(np.stack([x, y], 1), axis=0) + 16) % 32 - 16  # the shorter way round
        assert (steps * np.array(direction)).sum(1).min() >= 1
        assert (steps * np.array(direction)).sum(1).max() <= 2
        assert not (steps * (1 - np.abs(direction))).any()


def test_no_frame_tells_the_class():
    """At any time, the digit is everywhere equally often, whatever its direction."""
    digit = np.zeros((16, 16), np.uint8)
    digit[0, 0] = 255
    for direction in motion.CLASSES.values():
        rng = np.random.default_rng(0)
        clips = np.stack([motion.moving(digit, direction, rng) for _ in range(2000)])
        for time in (0, 7, 15):
            for axis in (1, 2):
                counts = (clips[:, time] == 255).any(axis=axis).sum(0)
                assert counts.min() > 30 and counts.max() < 100  # of 62.5 expected
