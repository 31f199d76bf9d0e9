"""Runs killed for real, at any moment: nothing is lost, and what follows is as if nothing had happened."""

import multiprocessing
import os
import random
import signal
import threading

import pytest
import torch

from tests.engine.test_loop import assert_same, load
from tests.tiny import FewDigits, run_of, tiny_recipe
from vim.data.datasets import BUILT_IN
from vim.engine import weights
from vim.engine.loop import Loop

# a server that has imported everything, and from which runs are forked
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["vim.tasks.build", "sklearn.model_selection", "tests.engine.test_kills"])
OPTIONS = {
    "data__batch_size": 8,
    "schedule__num_epochs": 6,
    "train__save_updates": 1,
    "train__keep": 2,
    "train__ema_decay": 0.9,
    "mixup__mixup_alpha": 0.8,
    "model__drop_path_rate": 0.2,
}
UPDATES = 6 * 8


def die(*ignored):
    os.kill(os.getpid(), signal.SIGKILL)


def train(work_dir, arrange, number):
    """Go on with a run, in a process that `arrange` has made die, or stop, at some point."""
    torch.set_num_threads(1)
    BUILT_IN["digits"] = FewDigits
    arrange(number)
    run_of(tiny_recipe(**OPTIONS), work_dir, weights.find_last(work_dir)).fit()


def live(number):
    """Die at no point."""


def die_in_an_update(number):
    """Die in the second update of this process, or a little later."""
    update, seen = Loop._update, []

    def dying(self, batches, at):
        seen.append(at)
        if len(seen) == 2:
            threading.Timer(random.Random(number).uniform(0, 0.02), die).start()
        return update(self, batches, at)

    Loop._update = dying


def die_in_a_save(number):
    """Die in the second save of this process, at the first, second, ... of the calls that change the disk."""
    save, calls = weights.save_last, []

    def counted(call):
        def counting(*args, **kwargs):
            calls.append(call)
            if len(calls) == 1 + number % 17:
                die()
            return call(*args, **kwargs)

        return counting

    def dying(state, folder, keep, saves=[]):  # noqa: B006  it counts its calls
        saves.append(folder)
        if len(saves) == 2:
            write = torch.save

            def in_pieces(state, file):
                with open(os.devnull, "wb") as nothing:
                    write(state, nothing)
                file.write(b"half of it")
                file.flush()
                counted(os.fsync)(file.fileno())
                file.seek(0)
                write(state, file)

            torch.save = in_pieces
            os.fsync, os.link = counted(os.fsync), counted(os.link)
            weights.Path.replace, weights.Path.unlink = counted(weights.Path.replace), counted(weights.Path.unlink)
        return save(state, folder, keep)

    Loop._save.__globals__["save_last"] = dying


def stop(number):
    """Get SIGTERM in the second update."""
    update, seen = Loop._update, []

    def stopping(self, batches, at):
        seen.append(at)
        if len(seen) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return update(self, batches, at)

    Loop._update = stopping


def run(work_dir, arrange, number=0):
    process = CONTEXT.Process(target=train, args=(work_dir, arrange, number))
    process.start()
    process.join(120)
    return process.exitcode


def updates_done(work_dir):
    save = weights.find_last(work_dir)
    if save is None:
        return 0
    position = save.state["training"]["position"]
    return position["epoch"] * 8 + position["update"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that nothing happens to."""
    work_dir = tmp_path_factory.mktemp("whole")
    assert run(work_dir, live) == 0
    return work_dir


def assert_as_if_nothing_had_happened(work_dir, whole):
    assert (work_dir / "log.csv").read_text() == (whole / "log.csv").read_text()
    for name in ("last.pth", "best.pth"):
        assert_same(load(work_dir / name), load(whole / name))


@pytest.mark.parametrize("arrange, kills", [(die_in_an_update, 10), (die_in_a_save, 17)])
def test_many_kills(arrange, kills, whole, tmp_path):
    done = 0
    for number in range(kills):
        assert run(tmp_path, arrange, number) == -signal.SIGKILL
        assert updates_done(tmp_path) >= done
        done = updates_done(tmp_path)
    assert 0 < done <= UPDATES
    assert run(tmp_path, live) == 0
    assert_as_if_nothing_had_happened(tmp_path, whole)


def test_sigterm_saves_and_ends_well(whole, tmp_path):
    assert run(tmp_path, stop) == 0
    assert updates_done(tmp_path) == 2
    assert not (tmp_path / "log.csv").exists()
    assert run(tmp_path, live) == 0
    assert_as_if_nothing_had_happened(tmp_path, whole)
