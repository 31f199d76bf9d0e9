"""What a run shows and keeps: a progress bar, a CSV log, pictures."""

import csv
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor


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


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write a table anew, under the names in its rows."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


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
