"""Pictures of a run."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from vim.engine.files import written_whole
from vim.errors import printable

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from vim.engine.loop import Loop

MOST_COUNTED, MOST_NAMED = 30, 100  # classes of a confusion matrix whose cells have counts, and which have names
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


def name_of(loop: "Loop[Any]") -> str:
    """A run's model and its work dir, which is named after the config."""
    return f"{loop.recipe.model.get('model_name')}, {loop.work_dir.resolve().name}"


def plot_curves(loop: "Loop[Any]") -> None:
    """Draw `curves.png`: training loss, and held-out loss or error, and one of SCORES if there is one, over the epochs.

    A line marks the epoch of best.pth, and the legend has its figures.
    """
    import matplotlib.pyplot as plt

    rows = loop.rows
    best = max(reversed(rows), key=loop.task.score)  # of equal epochs, the last replaced best.pth
    panels = [{"train_loss": "training", "loss": "held out", "mse": "held out"}]
    panels += [{name: f"held-out {label}"} for name, label in SCORES.items() if name in best]
    figure, columns = plt.subplots(1, len(panels), figsize=(5 * len(panels), 4), layout="constrained", squeeze=False)
    figure.suptitle(label(name_of(loop)))
    for axes, labels in zip(columns[0], panels, strict=True):
        for name in (name for name in labels if name in best):
            text = f"{labels[name]}, {best[name]:.4g}"
            (line,) = axes.plot([row["epoch"] for row in rows], [row[name] for row in rows], label=text)
            axes.plot(best["epoch"], best[name], "o", color=line.get_color())
        axes.axvline(best["epoch"], color="gray", linestyle="--", label=f"best epoch, {best['epoch']:g}")
        axes.set(xlabel="epoch", ylabel=next((SCORES[name] for name in labels if name in SCORES), "loss"))
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
        axes.legend()
    save_figure(figure, loop.work_dir / "curves.png")


def plot_confusion(path: Path, confusion: Tensor, classes: Sequence[str], run: str) -> None:
    """Draw how often each class (rows) was predicted as each class (columns), with the accuracy in the title.

    Up to MOST_COUNTED classes have counts, up to MOST_NAMED have names.

    Args:
        confusion: counts, (actual, predicted).
        run: what predicted, for the title.
    """
    import matplotlib.pyplot as plt
    from matplotlib.colors import PowerNorm

    n, images = len(classes), int(confusion.sum())
    fractions = confusion / confusion.sum(1, keepdim=True).clamp(min=1)
    side = min(max(6, 3 + 0.4 * n), 16)  # inches
    figure, axes = plt.subplots(figsize=(side + 1, side), layout="constrained")
    # the colours of the square root: few errors among many images would not show
    picture = axes.imshow(fractions.numpy(), cmap="Blues", norm=PowerNorm(0.5, 0, 1), interpolation="nearest")
    figure.colorbar(picture, label="fraction of the actual class", shrink=0.8)
    accuracy = 100 * int(confusion.trace()) / max(images, 1)
    axes.set_title(f"{label(run)}\ntop-1 accuracy {accuracy:.2f} % of {images:,} images")
    axes.set(xlabel="predicted", ylabel="actual")
    if n <= MOST_NAMED:
        names = [label(name if len(name) <= 24 else f"{name[:23]}…") for name in classes]
        size = 10 if n <= MOST_COUNTED else 6
        turned = {"rotation": 90} if n > MOST_COUNTED else {"rotation": 45, "ha": "right", "rotation_mode": "anchor"}
        axes.set_xticks(range(n), names, fontsize=size, **(turned if max(map(len, names)) > 2 else {}))
        axes.set_yticks(range(n), names, fontsize=size)
    for actual, predicted in confusion.nonzero().tolist() if n <= MOST_COUNTED else ():
        shade = "white" if fractions[actual, predicted] > 0.3 else "black"
        count = int(confusion[actual, predicted])
        axes.text(predicted, actual, str(count), ha="center", va="center", color=shade, fontsize=8)
    save_figure(figure, path)
