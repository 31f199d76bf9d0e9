"""The progress bar, the log file and the record of the environment of a run."""

import importlib.util
import logging
import platform
import shlex
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

import torch
from accelerate import Accelerator
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

import vim


@contextmanager
def progress_bar(total: int, done: int, *, shown: bool) -> Iterator["Bar"]:
    """Show a bar over all updates of a run, with the loss, the last held-out figures and the time left."""
    progress = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed}/{task.total}"),
        TextColumn("loss {task.fields[loss]}{task.fields[figures]}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(elapsed_when_finished=True),
        console=Console(soft_wrap=True),
        disable=not shown,
    )
    with progress:
        yield Bar(progress, progress.add_task("training", total=total, completed=done, loss="-", figures=""))


class Bar:
    """One task of a progress bar."""

    def __init__(self, progress: Progress, task: TaskID) -> None:
        self.progress, self.task = progress, task

    def step(self, epoch: int, loss: float) -> None:
        """Advance by one update and show its loss."""
        self.progress.update(self.task, advance=1, description=f"epoch {epoch}", loss=f"{loss:.3f}")

    def evaluated(self, figures: Mapping[str, float]) -> None:
        """Show the first held-out figure that is no loss, if there is one: a line has little room."""
        name = next((name for name in figures if name != "loss"), "loss")
        self.progress.update(self.task, figures=f"  {name} {figures[name]:.4f}")


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
    path.write_text("\n".join(lines) + "\n")


@contextmanager
def logging_to(path: Path) -> Iterator[None]:
    """Write what the package logs to a file, from INFO on, and show it on standard error, from WARNING on."""
    logger = logging.getLogger("vim")
    file, screen = logging.FileHandler(path, delay=True), logging.StreamHandler()
    screen.setLevel(logging.WARNING)
    before = logger.level
    logger.setLevel(logging.INFO)
    for handler in (file, screen):
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        logger.addHandler(handler)
    try:
        yield
    finally:
        logger.setLevel(before)
        for handler in (file, screen):
            logger.removeHandler(handler)
            handler.close()
