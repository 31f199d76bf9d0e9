"""Tune: the fastest configuration of the scan in every layer, as a table to paste into vim/kernels/scan/triton.py."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from vim.kernels.scan.triton import configuration
from vim.kernels.scan.tune import tune
from vim.measure.gpu import card
from vim.measure.gpu.shapes import Scan
from vim.measure.gpu.stage import Stage, read

WORTH = 0.98  # of the default's time: a configuration that gains less is not worth a line


@dataclass(frozen=True)
class Tuned:
    """The fastest configuration of a layer's scan, and the default one. Times are of forward and backward.

    Attributes:
        key: (b k, l, d, g, n).
        best, default: the channels of a program and the tokens of a segment.
    """

    card: str
    layer: str
    key: tuple[int, ...]
    best: tuple[int, ...]
    milliseconds: float
    default: tuple[int, ...]
    default_milliseconds: float


def run(stage: Stage) -> None:
    """Search the configurations of every layer, then write `tuned.py`."""
    layers = stage.shapes.layers
    cases: dict[str, Callable[[], Tuned]] = {
        f"tune {layer}": partial(search, stage.clock, layer, shape) for layer, shape in layers.items()
    }
    stage.each(cases)
    if not stage.warm:
        write_table(stage.file.with_name("tuned.py"), read(stage.file, Tuned))


def search(clock: card.Clock, layer: str, shape: Scan) -> Tuned:
    """Time every configuration of a layer."""
    b, k, l, d, g, n, *_ = shape
    found = tune(b=b, k=k, l=l, d=d, n=n, device=card.DEVICE, time=clock)
    key = (b * k, l, d, g, n)
    default = configuration(*key)
    times = {(block, segment): milliseconds for milliseconds, block, segment in found}
    milliseconds, *best = found[0]
    return Tuned(card.name(), layer, key, tuple(best), milliseconds, default, times[default])


def write_table(file: Path, rows: Sequence[Tuned]) -> None:
    """Write the configurations that are faster than the default ones, with the card's name and the times."""
    lines = [
        f"# {card.name()}, bfloat16; milliseconds of forward and backward, and those of the default configuration",
        "TUNED = {",
    ]
    for row in rows:
        if row.milliseconds <= WORTH * row.default_milliseconds:
            times = f"{row.milliseconds:.3f}, {row.default_milliseconds:.3f}"
            lines.append(f"    {tuple(row.key)}: {tuple(row.best)},  # {row.layer}: {times}")
    file.write_text("\n".join([*lines, "}", ""]))
