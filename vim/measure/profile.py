"""What each part of a model takes of its time on a CPU, and what the scan takes beside its exponentials."""

import itertools
from collections.abc import Mapping
from functools import partial
from statistics import median

import torch
from torch.autograd.profiler import profile
from torch.autograd.profiler_util import FunctionEvent

from vim.kernels import selective_scan
from vim.kernels.native.library import call
from vim.measure.compare import Row, compare
from vim.measure.models import PASSES, build, call_of
from vim.measure.ops import PASSES as OP_PASSES
from vim.measure.ops import run_op
from vim.measure.timing import Run, seconds

# a part's ops by the start of their names; what they call belongs to them
PARTS: Mapping[str, tuple[str, ...]] = {
    "products of matrices": ("aten::mm", "aten::addmm"),
    "step projections": ("aten::bmm",),
    "convolutions": ("vim::causal_conv1d",),
    "scans": ("vim::selective_scan",),
    "norms": ("vim::rms_norm",),
    "additions": ("aten::add",),
    "A, stacks of parameters": ("aten::exp", "aten::neg", "aten::stack", "aten::cat", "ExpB", "NegB", "StackB", "CatB"),
    "patches": ("aten::conv2d", "aten::convolution_backward"),
    "optimizer": ("Optimizer.",),
}
OTHER, BETWEEN, BOUND = "other ops", "between ops", "scans / their exponentials"
BLOCK, DEPTH = (197, 768, 16, 2), 24  # of Vim-Small: tokens, channels, states and directions; blocks


def parts_of(run: Run) -> dict[str, float]:
    """Return the seconds that each part of one call takes."""
    with profile() as profiler:
        whole = seconds(run)
    times = dict.fromkeys([*PARTS, OTHER], 0.0)
    for event in profiler.function_events or ():
        times[_part_of(event)] += 1e-6 * event.self_cpu_time_total
    return times | {BETWEEN: max(whole - sum(times.values()), 0.0)}


def _part_of(event: FunctionEvent) -> str:
    """Return the part of the outermost op around an event that belongs to one."""
    above = OTHER if event.cpu_parent is None else _part_of(event.cpu_parent)
    if above != OTHER:
        return above
    return next((part for part, names in PARTS.items() if event.name.startswith(names)), OTHER)


def profile_small(rounds: int) -> str:
    """Return what the parts of Vim-Small take in percent, and how much longer its scans take than their exponentials.

    A column is a pass and a batch size; the figures are medians.
    """
    model, columns = build("vim_small", 224), {}
    for run, b in itertools.product(PASSES, (1, 8)):
        step = call_of(model, run, img_size=224, batch_size=b)
        step()
        taken = [parts_of(step) | {BOUND: seconds(partial(exponentials, b, DEPTH))} for _ in range(rounds)]
        columns[f"{run}, {b}"] = {part: median(times[part] for times in taken) for part in taken[0]}
    bounds = [times.pop(BOUND) for times in columns.values()]
    totals = [sum(times.values()) for times in columns.values()]
    table = {"vim_small": [*columns], "milliseconds": [f"{1e3 * total:.1f}" for total in totals]}
    for part in (*PARTS, OTHER, BETWEEN):
        table[part] = [f"{times[part] / total:.1%}" for times, total in zip(columns.values(), totals, strict=True)]
    table[BOUND] = [f"{times['scans'] / least:.2f} x" for times, least in zip(columns.values(), bounds, strict=True)]
    return "\n".join(f"{name:<26}" + "".join(f"{cell:>18}" for cell in cells) for name, cells in table.items())


def compare_with_exponentials(batch_size: int, *, rounds: int) -> list[Row]:
    """Compare the native scan of a block of Vim-Small, both directions, with its exponentials alone, the baseline.

    They are one for each decay, step size and gate, computed in registers.
    """
    l, d, n, k = BLOCK
    u, delta = torch.randn(2, batch_size, k, l, d)
    B, C = torch.randn(2, batch_size, k, l, n)
    A, (D, bias) = -torch.arange(1.0, n + 1).repeat(k, d, 1), torch.randn(2, k, d)
    inputs = {"u": u, "delta": delta, "A": A, "B": B, "C": C, "D": D, "delta_bias": bias - 3, "z": u[:, 0]}
    scan = partial(selective_scan, delta_softplus=True, reverse=(False, True), combine="mean", backend="cpu")
    rows = []
    for run in OP_PASSES:
        calls = {
            "scan of vim_small, cpu": partial(run_op, scan, inputs, run != "forward"),
            "its exponentials": partial(exponentials, batch_size),
        }
        rows += compare(calls, run=run, batch_size=batch_size, size=l, rounds=rounds)
    return rows


def exponentials(batch_size: int, blocks: int = 1) -> None:
    """Compute as many exponentials as the scans of that many blocks of Vim-Small, in registers."""
    l, d, n, k = BLOCK
    call("vim_exponentials", blocks * batch_size * l * d * (k * (n + 1) + 1))
