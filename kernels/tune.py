"""The search for the fastest configuration of an op on a GPU, by hand or from `python -m vim.measure.gpu`.

The result goes into `TUNED` of the op's triton.py by hand, with the GPU's name. Nothing is tuned at run time, because
results differ in the last bit between configurations. If no measured configuration beats the default, the op's tune.py
and its `TUNED` go.
"""

from collections.abc import Callable, Iterable
from typing import TypeVar

import triton

Key = TypeVar("Key")


def search(
    tuned: dict[Key, tuple[int, int]], key: Key, candidates: Iterable[tuple[int, int]], time: Callable[[], float]
) -> list[tuple[float, int, int]]:
    """Return what `time` returns with each candidate as `tuned[key]`, and the candidate; the fastest first.

    `tuned` stays as it was.
    """
    before, found = dict(tuned), []
    try:
        for candidate in candidates:
            tuned[key] = candidate
            found.append((float(time()), *candidate))
    finally:
        tuned.clear()
        tuned.update(before)
    return sorted(found)


def segments(l: int, chunk: int) -> set[int]:
    """Return the tokens of a segment, whole chunks, with l tokens cut into 1, 2, 4, 8 and 16 segments."""
    chunks = triton.cdiv(l, chunk)
    return {triton.cdiv(chunks, parts) * chunk for parts in (1, 2, 4, 8, 16)}
