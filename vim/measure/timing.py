"""Time and peak memory of calls, compared within one process."""

import time
from collections.abc import Callable, Mapping
from statistics import median

import torch
from torch.autograd.profiler import profile

Run = Callable[[], object]
LONG = 0.5  # seconds; the caches matter little to a call that takes longer


def seconds(run: Run) -> float:
    """The wall-clock time of one call, including the GPU work that it launches."""
    start = time.perf_counter()
    run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def side_by_side(
    runs: Mapping[str, Run], rounds: int, of_all: Callable[[list[float]], float] = median
) -> dict[str, float]:
    """Median seconds of each run, or another figure `of_all` rounds.

    The runs take turns, so that a slow phase of the machine slows all of them.

    In its turn a short run is called twice, and the second call is timed: the caches then hold its own data, not
    another run's.
    """
    times: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        run()
    for _ in range(rounds):
        for name, run in runs.items():
            first = seconds(run)
            times[name].append(seconds(run) if first < LONG else first)
    return {name: of_all(taken) for name, taken in times.items()}


def peak_memory(run: Run) -> int:
    """The most bytes that PyTorch allocates at once during a call, beyond those allocated before it."""
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
        if event.name() == "[memory]":  # an allocation; a release has a negative size
            held += event.nbytes()
            most = max(most, held)
    return most
