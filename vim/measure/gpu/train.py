"""Train: a run on the digits in mixed precision, and the same run stopped and resumed: their logs must be the same."""

import importlib.util
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from vim.errors import IN_A_CLONE
from vim.measure.gpu.stage import Failure, Stage

ROOT = Path(__file__).parents[3]
PROGRAM = "tools/train.py" if IN_A_CLONE else "vim_zoo/train.py"
CONFIG = "vim/vim-nano_1xb64_digits.py"


@dataclass(frozen=True)
class Resumed:
    """A run that was stopped and resumed, beside one that was not.

    Attributes:
        stopped: after how many epochs.
        same: whether the logs have the same bytes: losses and accuracies of every epoch.
        last: the last line of the log.
    """

    amp: str
    stopped: int
    same: bool
    last: str


def run(stage: Stage) -> None:
    """Train in each precision. Without the packages that training needs, write a failure."""
    missing = [name for name in ("mmengine", "accelerate", "sklearn") if importlib.util.find_spec(name) is None]
    if missing:
        stage.write(Failure("train", f"left out: {', '.join(missing)} not installed"))
        return
    cases: dict[str, Callable[[], Resumed]] = {
        f"train, {amp}": partial(train, amp, stage.shapes.train_options, stage.left) for amp in stage.shapes.amps
    }
    stage.each(cases)


def train(amp: str, options: tuple[str, ...], left: Callable[[], float]) -> Resumed:
    """Train twice, once with a stop after an epoch.

    Raises:
        RuntimeError: a run failed, ended before it could be stopped, or takes more seconds than are left.
    """
    with tempfile.TemporaryDirectory() as folder, ExitStack() as started:
        whole, parted = Path(folder, "whole"), Path(folder, "parted")

        def start(work_dir: Path, *resume: str) -> subprocess.Popen[str]:
            words = ["--amp", amp, "--work-dir", str(work_dir), *resume, "--cfg-options", *options]
            process = _start([sys.executable, PROGRAM, CONFIG, *words])
            started.callback(process.wait)
            started.callback(process.kill)
            return process

        together, first = start(whole), start(parted)
        while epochs(parted) < 1 and first.poll() is None and left() > 0:
            time.sleep(0.01)
        first.send_signal(signal.SIGTERM)
        output = finish(first, left())
        if "stopped by SIGTERM" not in output:
            raise RuntimeError(f"the run ended before it was stopped: {output[-200:]}")
        stopped = epochs(parted)
        finish(start(parted, "--resume"), left())
        finish(together, left())
        logs = [(run / "log.csv").read_text() for run in (whole, parted)]
        return Resumed(amp, stopped, logs[0] == logs[1], logs[1].splitlines()[-1])


def _start(command: list[str]) -> subprocess.Popen[str]:
    """Start a tool from the folder that `vim` is in: a clone's root, which need not be installed, or site-packages."""
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, "PYTHONPATH": path}
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def finish(process: subprocess.Popen[str], seconds: float) -> str:
    """Wait for a process and return its output.

    Raises:
        RuntimeError: it failed, or takes too long.
    """
    try:
        output, _ = process.communicate(timeout=max(seconds, 1))
    except subprocess.TimeoutExpired:
        raise RuntimeError("not reached in the stage's time") from None
    if process.returncode:
        raise RuntimeError(output[-400:])
    return output


def epochs(work_dir: Path) -> int:
    """The epochs that a run has logged."""
    log = work_dir / "log.csv"
    return len(log.read_text().splitlines()) - 1 if log.exists() else 0
