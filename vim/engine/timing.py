"""How long things take, compared within one run."""

import time
from collections.abc import Callable, Mapping
from statistics import median


def seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
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
