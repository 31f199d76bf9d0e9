"""The table at the end: what was checked and measured beside what is wanted, in at most 60 lines."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from vim.measure.gpu.check import Check
from vim.measure.gpu.models import ModelTime
from vim.measure.gpu.ops import Ceilings, OpTime
from vim.measure.gpu.profile import Profiled
from vim.measure.gpu.shapes import TINY
from vim.measure.gpu.stage import Failure, read
from vim.measure.gpu.train import Resumed
from vim.measure.gpu.tune import WORTH, Tuned

LAYER, LONG, LONG_SSD = "Vim-Small, b 64", "16384 tokens", "4096 tokens, ssd"  # the layers that have targets
COMPOSITIONS = ("chunked", "reference", "compiled")  # backends made of PyTorch's own operations


class Results:
    """The rows of all stages, as far as they came."""

    def __init__(self, out: Path) -> None:
        self.ceilings = read(out / "ops.jsonl", Ceilings)
        self.checks = read(out / "correct.jsonl", Check)
        self.ops = read(out / "ops.jsonl", OpTime)
        self.models = read(out / "models.jsonl", ModelTime)
        self.tuned = read(out / "tune.jsonl", Tuned)
        self.resumed = read(out / "train.jsonl", Resumed)
        self.profiled = read(out / "profile.jsonl", Profiled)
        self.failures = {file.stem: read(file, Failure) for file in sorted(out.glob("*.jsonl"))}

    def op(self, layer: str, run: str, op: str = "scan", by: str = "triton") -> OpTime:
        """The row of an op; a LookupError where it was not reached."""
        return [row for row in self.ops if (row.op, row.layer, row.by, row.run) == (op, layer, by, run)][0]

    def model(self, name: str, attention: str = "fused") -> ModelTime:
        """The row of a model at 1248 pixels in inference; a LookupError where it was not reached."""
        wanted = (name, 1248, "forward", attention, "eager")
        return [r for r in self.models if (r.name, r.img_size, r.run, r.attention, r.mode) == wanted][0]

    def failed_checks(self) -> int:
        """How many checks failed, raised or were not reached; a LookupError where none was to be made."""
        return sum(not check.passed for check in self.checks) + len(self.failures["correct"])

    def slowness(self) -> list[tuple[float, OpTime]]:
        """Each of our times over that of PyTorch's fastest composition, the largest first."""
        ratios = []
        for row in (row for row in self.ops if row.by == "triton"):
            same = [r for r in self.ops if (r.op, r.layer, r.run) == (row.op, row.layer, row.run)]
            theirs = [r.milliseconds for r in same if r.by in COMPOSITIONS]
            ratios += [(row.milliseconds / min(theirs), row)] if theirs else []
        return sorted(ratios, key=lambda pair: -pair[0])

    def memory_a_token(self) -> list[float]:
        """Vim-Tiny's memory in training for each token of a batch, at each size."""
        rows = [r for r in self.models if (r.name, r.run, r.batch, r.mode) == (TINY[0], "training step", 8, "eager")]
        return [row.peak_mb / ((row.img_size // 16) ** 2 + 1) for row in rows]


class Target(NamedTuple):
    """A figure that must be at least or at most so much; `measured` raises where its rows are missing."""

    what: str
    sign: str
    wanted: float
    measured: Callable[[Results], float]


TARGETS = (
    Target("checks failed", "<=", 0, Results.failed_checks),
    Target(f"scan, {LAYER}: part of the exponential rate", ">=", 0.6, lambda r: r.op(LAYER, "forward").exponentials),
    Target(f"scan, {LONG}: part of the exponential rate", ">=", 0.6, lambda r: r.op(LONG, "forward").exponentials),
    Target(f"scan, {LAYER}, two directions: ms", "<=", 0.18, lambda r: r.op(LAYER, "forward").milliseconds),
    Target(f"scan, {LAYER}: forward+backward over forward", "<=", 4, lambda r: _over_forward(r, LAYER)),
    Target(f"scan, {LONG}: forward+backward over forward", "<=", 4, lambda r: _over_forward(r, LONG)),
    Target("ssd, 4096 tokens: speed over the scan, 64 states", ">=", 4, lambda r: _over_scan(r)),
    Target("our slowest op over PyTorch's composition", "<=", 1, lambda r: r.slowness()[0][0]),
    Target("vim_tiny, 1248 pixels: speed over deit_tiny", ">=", 1, lambda r: _speed(r, "fused")),
    Target("vim_tiny, 1248 pixels: speed over plain attention", ">=", 2.8, lambda r: _speed(r, "plain")),
    Target("vim_tiny, 1248 pixels: memory saved over plain", ">=", 0.868, lambda r: _memory_saved(r)),
    Target(
        "vim_tiny, training: memory a token, most over least",
        "<=",
        1.05,
        lambda r: max(r.memory_a_token()) / min(r.memory_a_token()),
    ),
    Target("resumed runs that differ", "<=", 0, lambda r: sum(not x.same for x in r.resumed) / min(len(r.resumed), 1)),
)


def _over_forward(results: Results, layer: str) -> float:
    return results.op(layer, "forward+backward").milliseconds / results.op(layer, "forward").milliseconds


def _over_scan(results: Results) -> float:
    return results.op(LONG_SSD, "forward").milliseconds / results.op(LONG_SSD, "forward", "ssd").milliseconds


def _speed(results: Results, attention: str) -> float:
    return results.model(TINY[1], attention).milliseconds / results.model(TINY[0]).milliseconds


def _memory_saved(results: Results) -> float:
    ours, theirs = results.model(TINY[0]), results.model(TINY[1], "plain")
    return 1 - (ours.held_mb + ours.peak_mb) / (theirs.held_mb + theirs.peak_mb)


def passed(out: Path) -> bool:
    """Whether every check passed and every stage ended by itself."""
    results = Results(out)
    ended = not any(row.case.startswith("stage ") for rows in results.failures.values() for row in rows)
    return ended and ("correct" not in results.failures or results.failed_checks() == 0)


def table(out: Path) -> list[str]:
    """The lines of the table."""
    results = Results(out)
    return [
        *_card(results),
        *_targets(results),
        *_capped(_checks(results), 12, "correct.jsonl"),
        *_capped(_ops(results), 9, "ops.jsonl"),
        *_capped(_models(results), 10, "models.jsonl"),
        *_capped(_rest(results), 8, "the other files"),
        *_capped(_failures(results), 6, "the files"),
    ]


def _capped(lines: Sequence[str], most: int, file: str) -> list[str]:
    if len(lines) <= most:
        return list(lines)
    return [*lines[: most - 1], f"  {len(lines) - most + 1} more in {file}"]


def _card(results: Results) -> list[str]:
    return [
        f"{c.card}: copies {c.copied_bytes / 1e12:.2f} TB/s, {c.exponentials / 1e12:.2f} T exponentials/s"
        for c in results.ceilings
    ]


def _targets(results: Results) -> list[str]:
    lines = [f"  {'':58}wanted  measured"]
    for what, sign, wanted, measured in TARGETS:
        try:
            figure = measured(results)
            reached = figure >= wanted if sign == ">=" else figure <= wanted
            found = f"{figure:8.3f}{'' if reached else '  MISSED'}"
        except (LookupError, ValueError, ZeroDivisionError):  # of rows that are missing
            found = "       -"
        lines.append(f"  {what:56}{sign} {wanted:5g}  {found}")
    return lines


def _checks(results: Results) -> list[str]:
    """The worst check of every kind and dtype, then those that failed."""
    kinds: dict[tuple[str, str], list[Check]] = {}
    for check in results.checks:
        kinds.setdefault((check.case.split()[0].rstrip(","), check.dtype), []).append(check)
    worst = {kind: max(checks, key=lambda check: check.error) for kind, checks in kinds.items()}
    failed = [f"  FAILED {c.case}: {c.worst} {c.error:.2g}, seed {c.seed}" for c in results.checks if not c.passed]
    summary = [f"{name} {dtype} {worst[name, dtype].error:.2f}" for name, dtype in kinds]
    lines = [f"errors in units of their tolerance: {len(results.checks)} checks, {len(failed)} failed; the largest:"]
    lines += ["  " + "; ".join(summary[i : i + 5]) for i in range(0, len(summary), 5)]
    return [*lines, *failed] if results.checks else []


def _ops(results: Results) -> list[str]:
    """A line a layer: the scan's parts of the measured rates, forward, then milliseconds."""
    columns = {
        "scan": ("scan", "triton", "forward"),
        "f+b": ("scan", "triton", "forward+backward"),
        "ssd": ("ssd", "triton", "forward"),
        "conv": ("conv", "triton", "forward"),
        "norm": ("norm", "triton", "forward"),
        "attention": ("attention", "pytorch", "forward"),
        "chunked": ("scan", "chunked", "forward"),
    }
    lines = [f"  {'milliseconds':32}  exp  copy" + "".join(f"{name:>10}" for name in columns)]
    for layer in dict.fromkeys(row.layer for row in results.ops):
        rows = {(row.op, row.by, row.run): row for row in results.ops if row.layer == layer}
        scan = rows.get(columns["scan"])
        rates = f"{scan.exponentials:5.0%} {scan.bandwidth:5.0%}" if scan else f"{'-':>5} {'-':>5}"
        times = [f"{rows[key].milliseconds:10.3f}" if key in rows else f"{'-':>10}" for key in columns.values()]
        lines.append(f"  {layer:32}{rates}{''.join(times)}")
    return lines if len(lines) > 1 else []


def _models(results: Results) -> list[str]:
    lines = []
    for r in results.models:
        how = ", ".join(word for word in (r.run, r.attention, r.mode) if word not in ("forward", "fused", "eager"))
        figures = f"{r.milliseconds:9.2f} ms {r.per_second:9.1f}/s {r.held_mb + r.peak_mb:9.0f} MB"
        lines.append(f"  {f'{r.name}, {r.img_size} pixels, b {r.batch} {how}':58}{figures}")
    return lines


def _rest(results: Results) -> list[str]:
    """Tuning, training, profile."""
    lines = []
    if results.tuned:
        gains = [row.default_milliseconds / row.milliseconds for row in results.tuned]
        better = sum(row.milliseconds <= WORTH * row.default_milliseconds for row in results.tuned)
        lines.append(f"tuned: {better} of {len(gains)} layers gain, at most {max(gains):.2f} x; in tuned_*.py")
    for run in results.resumed:
        log = "the same log" if run.same else "ANOTHER log"
        lines.append(f"trained in {run.amp}, resumed after {run.stopped} epochs: {log}")
    for kernel in results.profiled:
        figures = ", ".join(f"{name} {value:.4g}" for name, value in kernel.figures.items())
        stall = max(kernel.stalls, key=lambda name: kernel.stalls[name], default="-")
        lines.append(f"  {kernel.kernel[:24]}: {figures}, stalls on {stall}")
    return lines


def _failures(results: Results) -> list[str]:
    return [f"  {row.case}: {row.error[:100]}" for rows in results.failures.values() for row in rows]
