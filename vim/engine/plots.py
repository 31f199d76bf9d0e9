"""Pictures of a run."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from vim.engine.files import written_whole
from vim.errors import printable

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SCORES = {"top1": "top-1 accuracy", "map": "mean average precision"}


def label(name: str) -> str:
    """A class's name for a figure: matplotlib reads dollar signs as formulas, and draws no half characters."""
    return printable(name).replace("$", r"\$")


def save_figure(figure: "Figure", path: Path, dpi: int = 120) -> None:
    """Write a figure and free its memory."""
    import matplotlib.pyplot as plt

    with written_whole(path) as beside:
        figure.savefig(beside, dpi=dpi, format=path.suffix[1:])
    plt.close(figure)


def plot_curves(path: Path, rows: Sequence[Mapping[str, float]]) -> None:
    """Draw the training loss and the held-out loss or error over the epochs, and one of SCORES if there is one."""
    import matplotlib.pyplot as plt

    panels = [{"train_loss": "training", "loss": "held out", "mse": "held out"}]
    panels += [{name: f"held-out {label}"} for name, label in SCORES.items() if name in rows[0]]
    figure, columns = plt.subplots(1, len(panels), figsize=(5 * len(panels), 4), layout="constrained", squeeze=False)
    for axes, labels in zip(columns[0], panels, strict=True):
        for name in (name for name in labels if name in rows[0]):
            axes.plot([row["epoch"] for row in rows], [row[name] for row in rows], label=labels[name])
        axes.set(xlabel="epoch", ylabel=next((SCORES[name] for name in labels if name in SCORES), "loss"))
        axes.grid(alpha=0.3)
        axes.legend()
    save_figure(figure, path)


def plot_confusion(path: Path, confusion: Tensor, classes: Sequence[str]) -> None:
    """Draw how often each class (rows) was predicted as each class (columns); up to 20 classes, with counts."""
    import matplotlib.pyplot as plt

    fractions = confusion / confusion.sum(1, keepdim=True).clamp(min=1)
    figure, axes = plt.subplots(figsize=(6, 5), layout="constrained")
    picture = axes.imshow(fractions.numpy(), cmap="Blues", vmin=0, vmax=1)
    figure.colorbar(picture, label="fraction of the actual class")
    axes.set(xlabel="predicted", ylabel="actual")
    if len(classes) <= 20:
        names = [label(name) for name in classes]
        axes.set_xticks(range(len(classes)), names, rotation=90 if max(map(len, classes)) > 2 else 0)
        axes.set_yticks(range(len(classes)), names)
        for actual, predicted in confusion.nonzero().tolist():
            shade = "white" if fractions[actual, predicted] > 0.5 else "black"
            count = int(confusion[actual, predicted])
            axes.text(predicted, actual, str(count), ha="center", va="center", color=shade, fontsize=8)
    save_figure(figure, path)
