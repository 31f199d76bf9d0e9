"""Profile: NVIDIA's Nsight Compute on forward and backward of the scan of the first layer."""

import csv
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from vim.errors import one_line
from vim.measure.gpu.stage import Failure, Stage

SECTIONS = (
    *("SpeedOfLight", "LaunchStats", "Occupancy", "SchedulerStats", "WarpStateStats"),
    *("ComputeWorkloadAnalysis", "MemoryWorkloadAnalysis"),
)
# our names for the profiler's
FIGURES = {
    "microseconds": "gpu__time_duration.sum",  # nanoseconds there
    "occupancy": "sm__warps_active.avg.pct_of_peak_sustained_active",
    "issue": "smsp__issue_active.avg.per_cycle_active",
    "memory": "gpu__compute_memory_throughput.avg.pct_of_peak_sustained_elapsed",
    "exponential_unit": "sm__inst_executed_pipe_xu.avg.pct_of_peak_sustained_active",
    "registers": "launch__registers_per_thread",
}
STALL = re.compile(r"issue_stalled_(\w+?)_per_(?:issue_active|warp_active)")


@dataclass(frozen=True)
class Profiled:
    """One kernel.

    Attributes:
        figures: by the names of `FIGURES`; one that the profiler did not give is missing.
        stalls: average warps that wait, for each reason.
        metrics: everything that the profiler gave.
    """

    kernel: str
    figures: dict[str, float]
    stalls: dict[str, float]
    metrics: dict[str, float]


def run(stage: Stage) -> None:
    """Profile the kernels. Without the profiler, write a failure."""
    target = [sys.executable, "-m", "vim.measure.gpu.profiled", *(["--rehearse"] if stage.rehearse else [])]
    profiler = find_profiler()
    if profiler is None:
        stage.write(Failure("profile", "left out: ncu is not installed"))
        if not stage.rehearse:
            return
        command = target
    else:
        options = ["--clock-control", "none", "--profile-from-start", "off", "--print-units", "base"]
        sections = [word for section in SECTIONS for word in ("--section", section)]
        command = [profiler, *options, *sections, "--csv", "--page", "raw", *target]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=max(stage.left(), 1))
    except subprocess.TimeoutExpired:
        stage.write(Failure("profile", "not reached in the stage's time"))
        return
    if done.returncode:
        output = (done.stdout + done.stderr)[-400:]
        stage.write(Failure("profile", one_line(f"ended with status {done.returncode}: {output}")))
    for row in parse(done.stdout):
        stage.write(row)


def find_profiler() -> str | None:
    """Return the path of ncu, on the PATH or where NVIDIA installs it."""
    installed = sorted(Path("/opt/nvidia/nsight-compute").glob("*/ncu"))
    return shutil.which("ncu") or (str(installed[-1]) if installed else None)


def parse(output: str) -> list[Profiled]:
    """Read the profiler's table, a line a kernel, from among its other output. The line below the names has units."""
    rows = list(csv.DictReader(line for line in output.splitlines() if line.startswith('"')))
    return [_profiled(row) for row in rows if row["ID"]]


def _profiled(row: Mapping[str, str]) -> Profiled:
    metrics = {}
    for name, value in row.items():
        try:
            metrics[name] = float(value.replace(",", ""))
        except ValueError:  # a name
            continue
    figures = {ours: metrics[theirs] for ours, theirs in FIGURES.items() if theirs in metrics}
    if "microseconds" in figures:
        figures["microseconds"] /= 1e3
    stalls = {found[1]: metrics[name] for name in metrics if (found := STALL.search(name))}
    stalls.pop("selected", None)  # not a stall: the warp that issues
    return Profiled(row["Kernel Name"], figures, stalls, metrics)
