"""How long things take and how much memory, compared within one run."""

import time
from collections.abc import Callable, Mapping
from statistics import median

import torch
from torch.autograd.profiler import profile


def seconds(run: Callable[[], object]) -> float:
    """The time of one call, with what it started on a GPU."""
    start = time.perf_counter()
    run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def side_by_side(runs: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median seconds of each, taken in turns, so that what slows the machine for a while slows all of them.

    What is short is timed the second time of two: the one before it has taken the caches.
    """
    times: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        run()
    for _ in range(rounds):
        for name, run in runs.items():
            first = seconds(run)
            times[name].append(seconds(run) if first < 0.5 else first)
    return {name: median(taken) for name, taken in times.items()}


def peak_memory(run: Callable[[], object]) -> int:
    """Bytes that PyTorch holds at most during a call, on top of what it held before."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before
    with profile(profile_memory=True) as profiler:
        run()
    held = most = 0
    assert profiler.kineto_results is not None  # the profiler has run
    for event in profiler.kineto_results.events():
        if event.name() == "[memory]":  # an allocation, or a negative one
            held += event.nbytes()
            most = max(most, held)
    return most
