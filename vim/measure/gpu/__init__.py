"""The GPU command: six stages that check, time, tune and profile the Triton backend on one card.

Each stage is a file of this package with a function `run(stage)`. It runs in processes of its own and appends each
result to `STAGE.jsonl` at once: a stage that fails or takes too long loses only what it had not reached. The files need
triton; this one does not.
"""

from typing import NamedTuple


class Plan(NamedTuple):
    """How a stage is run.

    Attributes:
        seconds: its part of nine minutes. The last stage gets what is left.
        processes: how many share its cases; several where results are checked and not timed.
        warmers: how many compile its kernels before one process times them.
    """

    seconds: float
    processes: int = 1
    warmers: int = 0


MINUTES = 9.0
STAGES = {  # most important first
    "correct": Plan(90, processes=6),
    "ops": Plan(120, warmers=8),
    "models": Plan(120, warmers=4),
    "tune": Plan(120, warmers=8),
    "train": Plan(60, processes=2),
    "profile": Plan(30),
}
