"""The progress bar, the log file and the record of the environment of a run."""

import importlib.util
import logging
import math
import platform
import shlex
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sized
from contextlib import contextmanager, suppress
from datetime import timedelta
from importlib.metadata import version
from pathlib import Path
from typing import TypeVar

import torch
from accelerate import Accelerator
from rich.console import Console
from rich.progress import BarColumn, Progress, Task, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text

import vim
from vim.engine.files import write_text
from vim.errors import printable

B = TypeVar("B")
SECONDS = 30  # between two lines

_logger = logging.getLogger(__name__)


@contextmanager
def progress_bar(total: int, done: int, *, shown: bool) -> Iterator["Bar"]:
    """Show a bar over all updates of a run, with the loss, the last held-out figures and the time left.

    Where the output is no terminal, a line now and then takes its place; the log file has these lines in any case.
    """
    progress = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed}/{task.total}"),
        TextColumn("loss {task.fields[loss]}{task.fields[figures]}"),
        TimeElapsedColumn(),
        _TimeLeft(),
        console=Console(soft_wrap=True),
        disable=not (shown and on_terminal()),
    )
    bar = Bar(progress, progress.add_task("training", total=total, completed=done, loss="-", figures=""), shown=shown)
    if shown:
        _logger.info("training from update %d of %d", done, total)
    progress.start()
    try:
        yield bar
    finally:
        with suppress(OSError):  # the terminal is gone
            progress.stop()


class _TimeLeft(TimeRemainingColumn):
    """The time left, until there is none left."""

    def render(self, task: Task) -> Text:
        return Text("") if task.finished else Text.assemble(super().render(task), " left")


class Bar:
    """One task of a progress bar."""

    def __init__(self, progress: Progress, task: TaskID, *, shown: bool) -> None:
        self.progress, self.task, self.shown = progress, task, shown
        self.pace = Pace()

    def step(self, epoch: int, loss: float) -> None:
        """Advance by one update and show its loss."""
        self.progress.update(self.task, advance=1, description=f"epoch {epoch}", loss=f"{loss:.3f}")
        self.pace.count()
        if self.shown and self.pace.is_due():
            task = self.progress.tasks[self.task]
            left = self.pace.left(int(task.total or 0) - int(task.completed))
            _logger.info("epoch %d, update %d of %d, loss %.4g, %s left", epoch, task.completed, task.total, loss, left)

    def evaluated(self, figures: Mapping[str, float]) -> None:
        """Show the first held-out figure that is no loss, if there is one: a line has little room."""
        name = next((name for name in figures if name != "loss"), "loss")
        self.progress.update(self.task, figures=f"  {name} {figures[name]:.4f}")


class Pace:
    """How fast something goes, and when the next line about it is due: at its start, then every half a minute."""

    def __init__(self, *, at_start: bool = True) -> None:
        self.start = time.monotonic()
        self.last = -math.inf if at_start else self.start
        self.done = 0

    def count(self) -> None:
        """Count one more."""
        self.done += 1

    def is_due(self) -> bool:
        """Return whether a line is due, and take it as written."""
        now = time.monotonic()
        due = now - self.last >= SECONDS
        self.last = now if due else self.last
        return due

    def left(self, number: int) -> timedelta:
        """Return how long so many more will take."""
        return timedelta(seconds=round(number * (time.monotonic() - self.start) / max(self.done, 1)))


def reporting(batches: Iterable[B], what: str) -> Iterator[B]:
    """Yield the batches, and log now and then how many of them are done."""
    pace, total = Pace(at_start=False), len(batches) if isinstance(batches, Sized) else None
    for batch in batches:
        yield batch
        pace.count()
        if pace.is_due():
            left = f" of {total}, {pace.left(total - pace.done)} left" if total is not None else ""
            _logger.info("%s: %d batches%s", what, pace.done, left)


def on_terminal() -> bool:
    """Return whether standard output is a terminal."""
    return Console().is_terminal


def write_environment(path: Path, accelerator: Accelerator) -> None:
    """Write what the run was started with: the command, versions, devices."""
    packages = ("torch", "torchvision", "timm", "accelerate", "triton", "numpy")
    lines = [
        f"command: {shlex.join(sys.argv)}",
        f"python: {platform.python_version()} on {platform.platform()}",
        f"vim: {vim.__version__}",
        *(f"{name}: {version(name)}" for name in packages if importlib.util.find_spec(name)),
        f"processes: {accelerator.num_processes} ({accelerator.distributed_type.value}), {accelerator.mixed_precision}",
        f"device: {torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or 'CPU'}",
        f"threads: {torch.get_num_threads()}",
    ]
    write_text(path, "\n".join(lines) + "\n")


@contextmanager
def logging_to(path: Path | None, *, shown: bool = False) -> Iterator[None]:
    """Show what the package logs, warnings on standard error, and write it to a file, from INFO on.

    Args:
        path: the file; None for none.
        shown: show the rest on standard output.

    Raises:
        OSError: within the context, when the file cannot be written.
    """
    logger = logging.getLogger("vim")
    handlers: list[logging.Handler] = [_Screen(sys.stderr)]
    handlers[0].setLevel(logging.WARNING)
    if path is not None:
        handlers.append(_File(path, delay=True))
    if shown:
        handlers.append(_Screen(sys.stdout))
        handlers[-1].addFilter(lambda record: record.levelno < logging.WARNING)
    before = logger.level
    logger.setLevel(logging.INFO)
    for handler in handlers:
        handler.setFormatter(_OneLine("%(asctime)s %(levelname)s %(message)s"))
        logger.addHandler(handler)
    try:
        yield
    finally:
        logger.setLevel(before)
        for handler in handlers:
            logger.removeHandler(handler)
            with suppress(OSError):
                handler.close()


class _OneLine(logging.Formatter):
    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802
        return printable(super().formatMessage(record))


class _Screen(logging.StreamHandler):  # type: ignore[type-arg]
    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802
        """Go on: a terminal that is gone ends no run."""


class _File(logging.FileHandler):
    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802
        raise  # the exception being handled: a full disk
