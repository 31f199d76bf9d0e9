"""Tune: the fastest configuration of both scans in every layer, as tables to paste into their triton.py."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from vim.kernels.scan import triton as scan
from vim.kernels.scan import tune as scan_tune
from vim.kernels.ssd import triton as ssd
from vim.kernels.ssd import tune as ssd_tune
from vim.measure.gpu import card
from vim.measure.gpu.shapes import Scan, Ssd
from vim.measure.gpu.stage import Stage, read

WORTH = 0.98  # of the default's time: a configuration that gains less is not worth a line


@dataclass(frozen=True)
class Tuned:
    """The fastest configuration of a layer's scan, and the default one. Times are of forward and backward.

    Attributes:
        op: "scan" or "ssd".
        key: (b k, l, d, g, n), of ssd (b k, l, h, p, g, n).
        best, default: the channels of a program, of ssd the tokens of a chunk; and the tokens of a segment.
    """

    card: str
    op: str
    layer: str
    key: tuple[int, ...]
    best: tuple[int, ...]
    milliseconds: float
    default: tuple[int, ...]
    default_milliseconds: float


def run(stage: Stage) -> None:
    """Search the configurations of every layer, then write `tuned_scan.py` and `tuned_ssd.py`."""
    layers: dict[str, Scan | Ssd] = {**stage.shapes.layers, **stage.shapes.ssd_layers}
    cases: dict[str, Callable[[], Tuned]] = {
        f"tune {layer}": partial(search, stage.clock, layer, shape) for layer, shape in layers.items()
    }
    stage.each(cases)
    if not stage.warm:
        for op in ("scan", "ssd"):
            rows = [row for row in read(stage.file, Tuned) if row.op == op]
            write_table(stage.file.with_name(f"tuned_{op}.py"), rows)


def search(clock: card.Clock, layer: str, shape: Scan | Ssd) -> Tuned:
    """Time every configuration of a layer."""
    key: tuple[int, ...]
    if isinstance(shape, Ssd):
        b, k, l, h, p, g, n, *_ = shape
        op, key = "ssd", (b * k, l, h, p, g, n)
        default = ssd.configuration(torch.bfloat16, *key)
        found = ssd_tune.tune(b=b, k=k, l=l, h=h, p=p, n=n, device=card.DEVICE, time=clock)
    else:
        b, k, l, d, g, n, *_ = shape
        op, key, default = "scan", (b * k, l, d, g, n), scan.configuration(b * k, l, d, g, n)
        found = scan_tune.tune(b=b, k=k, l=l, d=d, n=n, device=card.DEVICE, time=clock)
    times = {tuple(configuration): milliseconds for milliseconds, *configuration in found}
    milliseconds, *best = found[0]
    return Tuned(card.name(), op, layer, key, tuple(best), milliseconds, default, times[default])


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
