"""How results are compared with a reference in float64."""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from vim.measure.gpu.inputs import Named

# the part of the reference's norm that an error may have; of the largest element, any element may be off ten times that
TOLERANCE = {"float64": 1e-10, "float32": 1e-4, "bfloat16": 1e-2, "float16": 2e-3}
LEAST = 1e-3  # a reference that is smaller, or zero, counts as this large
LOOSE = {("float32", "grad A"): 1e-3}  # sums that cancel cost it digits


@dataclass(frozen=True)
class Check:
    """One comparison.

    Attributes:
        error: the largest error of a tensor in units of its tolerance; at most 1 is right.
        worst: the tensor that has it.
        repeatable: whether all runs gave the same bits.
        seed: the seed of the inputs.
    """

    case: str
    dtype: str
    error: float
    worst: str
    repeatable: bool
    seed: int

    @property
    def passed(self) -> bool:
        """Whether the results are right and repeatable. NaN is not right."""
        return self.error <= 1 and self.repeatable


def compare(
    case: str, dtype: str, seed: int, runs: Sequence[Named], want: Named, *, tolerance: float | None = None
) -> Check:
    """Compare the first run's tensors with the reference, and all runs with each other.

    Args:
        dtype: what the results were computed in; the tolerance follows from it unless one is given.
    """
    errors = {}
    for name, reference in want.items():
        reference = reference.double()
        difference = runs[0][name].to(reference) - reference
        relative = difference.norm() / reference.norm().clamp_min(LEAST)
        largest = difference.abs().max() / reference.abs().max().clamp_min(LEAST)
        error = torch.maximum(relative, largest / 10).item()  # NaN stays NaN
        errors[name] = error / (tolerance or LOOSE.get((dtype, name), TOLERANCE[dtype]))
    worst = max(errors, key=lambda name: math.inf if math.isnan(errors[name]) else errors[name])
    same = all(torch.equal(tensor, run[name]) for run in runs[1:] for name, tensor in runs[0].items())
    return Check(case, dtype, errors[worst], worst, same, seed)


def new_seed() -> int:
    """Return a seed from the operating system, so that each run checks other values."""
    return random.SystemRandom().randrange(2**31)
