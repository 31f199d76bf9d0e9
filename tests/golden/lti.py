"""The golden numbers of time-invariant state-space models, and the noise that they were made from."""

import json
import zlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.golden.weights import generate

GOLDEN: dict[str, Any] = json.loads((Path(__file__).parent / "lti.json").read_text())
DIGITS = 2e-8  # of the largest value: how exactly the numbers were written down


def noise(name: str, shape: tuple[int, ...]) -> Tensor:
    """Standard normal numbers as a function of a name, float64."""
    return generate(zlib.crc32(name.encode()), shape).double()


def deviation(got: Tensor, want: Tensor | list[Any]) -> float:
    """The largest difference, relative to the largest value."""
    want = torch.as_tensor(want, dtype=torch.float64)
    return ((got.double() - want).abs().max() / want.abs().max()).item()
