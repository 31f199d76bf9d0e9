"""Runs compared side by side: a row a run, and the plot of the rows."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from vim.errors import require
from vim.measure.timing import Run, peak_memory, side_by_side


@dataclass(frozen=True)
class Row:
    """The figures of one run.

    Attributes:
        run: "forward", "training step", ...
        size: pixels a side for a model, tokens for an op.
        per_second: images, clips or frames.
        baseline: the name of the row that `speed` is relative to.
    """

    name: str
    run: str
    batch_size: int
    size: int
    milliseconds: float
    per_second: float
    peak_mb: float
    baseline: str
    speed: float


def compare(runs: Mapping[str, Run], *, run: str, batch_size: int, size: int, rounds: int) -> list[Row]:
    """Measure runs that take turns; the last one is the baseline."""
    medians = side_by_side(runs, rounds)
    memory = {name: peak_memory(call) for name, call in runs.items()}
    baseline = list(runs)[-1]
    return [
        Row(
            name,
            run,
            batch_size,
            size,
            milliseconds=1e3 * taken,
            per_second=batch_size / taken,
            peak_mb=memory[name] / 1e6,
            baseline=baseline,
            speed=medians[baseline] / taken,
        )
        for name, taken in medians.items()
    ]


def show(rows: Sequence[Row]) -> None:
    """Print the rows as a table."""
    require("rich", "the table")
    from rich.box import ASCII2
    from rich.console import Console
    from rich.table import Table

    table = Table(box=ASCII2, show_edge=False)
    for header in ("", "", "batch", "size", "ms", "images/s", "peak MB", "time", "speed"):
        table.add_column(header, justify="right" if header else "left")
    for row in rows:
        sizes = (str(row.batch_size), str(row.size))
        figures = (f"{row.milliseconds:.2f}", f"{row.per_second:.1f}", f"{row.peak_mb:.1f}")
        ratios = (f"{1 / row.speed:.2f} x", f"{row.speed:.2f} x")
        table.add_row(row.name, row.run, *sizes, *figures, *ratios, end_section=row.name == row.baseline)
    console = Console(width=110, highlight=False)  # a narrow terminal would have the numbers cut
    console.print(table)
    console.print(
        "size: pixels a side, of the scan: tokens. time, speed: relative to the last of a group. peak MB: what\n"
        "PyTorch allocates in a run, on top of weights, images and the optimizer's state."
    )


def plot(rows: Sequence[Row], out: Path) -> None:
    """Draw time and memory over size, a line for each name, run and batch size."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for name, run, batch_size in sorted({(row.name, row.run, row.batch_size) for row in rows}):
        own = [row for row in rows if (row.name, row.run, row.batch_size) == (name, run, batch_size)]
        own.sort(key=lambda row: row.size)
        sizes, label = [row.size for row in own], f"{name}, {run}, batch {batch_size}"
        axes[0].plot(sizes, [row.milliseconds for row in own], "o-", label=label)
        axes[1].plot(sizes, [row.peak_mb for row in own], "o-", label=label)
    for axis, ylabel in zip(axes, ("milliseconds", "peak memory, MB"), strict=True):
        axis.set(xlabel="pixels a side, or tokens of an op", ylabel=ylabel, xscale="log", yscale="log")
        axis.grid(alpha=0.3, which="both")
    axes[1].legend(fontsize="x-small")
    figure.savefig(out, dpi=100)
    plt.close(figure)
