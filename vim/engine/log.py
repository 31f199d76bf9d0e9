"""What a run shows and keeps: a progress bar, a CSV log, pictures."""

import importlib.util
import logging
import platform
import shlex
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from accelerate.tracking import TensorBoardTracker, WandBTracker
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor

import vim
from vim.errors import UserError

TRACKERS = {"tensorboard": TensorBoardTracker, "wandb": WandBTracker}


@contextmanager
def progress_bar(total: int, done: int, *, shown: bool) -> Iterator["Bar"]:
    """A bar over all steps of a run, with loss, accuracy and time left."""
    progress = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed}/{task.total}"),
        TextColumn("loss {task.fields[loss]}  top-1 {task.fields[top1]}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(elapsed_when_finished=True),
        console=Console(soft_wrap=True),
        disable=not shown,
    )
    with progress:
        yield Bar(progress, progress.add_task("training", total=total, completed=done, loss="-", top1="-"))


class Bar:
    """One task of a progress bar."""

    def __init__(self, progress: Progress, task: object) -> None:
        self.progress, self.task = progress, task

    def step(self, epoch: int, loss: float) -> None:
        """A training step has ended."""
        self.progress.update(self.task, advance=1, description=f"epoch {epoch}", loss=f"{loss:.3f}")  # type: ignore[arg-type]

    def evaluated(self, top1: float) -> None:
        """A held-out accuracy is known."""
        self.progress.update(self.task, top1=f"{top1:.2%}")  # type: ignore[arg-type]


class Trackers:
    """TensorBoard and Weights & Biases, as accelerate writes to them; a context for the run.

    Args:
        names: "tensorboard", "wandb".
        shown: whether this process is the one that writes.

    Raises:
        UserError: a name that is unknown, or whose package is not installed.
    """

    def __init__(self, names: Sequence[str], folder: Path, config: Any, *, shown: bool) -> None:
        self.names, self.folder, self.config = list(names) if shown else [], folder, config
        for name in self.names:
            if name not in TRACKERS:
                raise UserError(f"train.trackers has {name!r}: expected {' or '.join(TRACKERS)}")
            if importlib.util.find_spec(name) is None:
                raise UserError(f"train.trackers has {name}, which is not installed: pip install {name}")

    def __enter__(self) -> "Trackers":
        self.trackers: list[Any] = []
        for name in self.names:
            options = {"logging_dir": str(self.folder)} if name == "tensorboard" else {}
            self.trackers.append(TRACKERS[name](self.folder.name, **options))
            self.trackers[-1].start()
            self.trackers[-1].store_init_configuration(_flat(self.config.to_dict()))
        return self

    def __exit__(self, *error: object) -> None:
        for tracker in self.trackers:
            tracker.finish()

    def add(self, values: dict[str, float], step: int) -> None:
        """Figures after so many updates."""
        for tracker in self.trackers:
            tracker.log(values, step=step)


def _flat(config: dict[str, Any], prefix: str = "") -> dict[str, str]:
    """A nested config as one level, as TensorBoard wants it."""
    flat: dict[str, str] = {}
    for key, value in config.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": str(value)}
    return flat


def write_environment(path: Path, accelerator: Any) -> None:
    """What the run is started with: the command, versions, devices."""
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
    """Keep in a file what the package's loggers say, which is also shown."""
    logger = logging.getLogger("vim")
    handlers: list[logging.Handler] = [logging.FileHandler(path, delay=True), logging.StreamHandler()]
    for handler in handlers:
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        logger.addHandler(handler)
    try:
        yield
    finally:
        for handler in handlers:
            logger.removeHandler(handler)
            handler.close()


def plot_curves(path: Path, rows: list[dict[str, float]]) -> None:
    """Loss and accuracy over the epochs."""
    import matplotlib.pyplot as plt

    epochs = [row["epoch"] for row in rows]
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    left.plot(epochs, [row["train_loss"] for row in rows], label="training")
    left.plot(epochs, [row["loss"] for row in rows], label="held out")
    left.set(xlabel="epoch", ylabel="loss")
    left.legend()
    right.plot(epochs, [100 * row["top1"] for row in rows], color="tab:green")
    right.set(xlabel="epoch", ylabel="held-out top-1, %")
    for axes in (left, right):
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def plot_confusion(path: Path, confusion: Tensor, classes: list[str]) -> None:
    """How often each class (rows) was taken for each (columns); counts are written where they fit."""
    import matplotlib.pyplot as plt

    shares = confusion / confusion.sum(1, keepdim=True).clamp(min=1)
    figure, axes = plt.subplots(figsize=(6, 5), layout="constrained")
    picture = axes.imshow(shares.numpy(), cmap="Blues", vmin=0, vmax=1)
    figure.colorbar(picture, label="share of the actual class")
    axes.set(xlabel="predicted", ylabel="actual")
    if len(classes) <= 20:
        axes.set_xticks(range(len(classes)), classes, rotation=90 if max(map(len, classes)) > 2 else 0)
        axes.set_yticks(range(len(classes)), classes)
        for actual, predicted in confusion.nonzero().tolist():
            shade = "white" if shares[actual, predicted] > 0.5 else "black"
            count = int(confusion[actual, predicted])
            axes.text(predicted, actual, str(count), ha="center", va="center", color=shade, fontsize=8)
    figure.savefig(path, dpi=120)
    plt.close(figure)
