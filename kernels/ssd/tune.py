"""Search for the fastest configuration of state space duality on a GPU: see :mod:`vim.kernels.tune`.

from vim.kernels.ssd.tune import tune
tune(b=64, k=2, l=197, h=12, p=64, n=64)
"""

from collections.abc import Callable

import torch
import triton

from ..tune import search, segments
from . import triton as backend
from .reference import Inputs, Options


def tune(
    *,
    b: int,
    k: int,
    l: int,
    h: int,
    p: int,
    n: int,
    dtype: torch.dtype = torch.bfloat16,
    device: str = "cuda",
    time: Callable[[Callable[[], None]], float] = triton.testing.do_bench,
) -> list[tuple[float, int, int]]:
    """Time the forward and backward pass in every configuration.

    Args:
        b, k, l, h, p, n: sizes of the op: images, directions, tokens, heads, channels of a head, states.
        dtype: of x, dt, B and C.
        device: where to run.
        time: returns the milliseconds of a function.

    Returns:
        (milliseconds, tokens of a chunk, tokens of a segment) of each configuration, the fastest first.
    """
    draw = torch.Generator(device).manual_seed(0)

    def normal(*shape: int, of: torch.dtype = dtype) -> torch.Tensor:
        return torch.randn(shape, generator=draw, device=device, dtype=of)

    A, bias, D = (-normal(k, h, of=torch.float32).exp(), normal(k, h, of=torch.float32), normal(k, h, p).float())
    x, dt, B, C = normal(b, k, l, h, p), normal(b, k, l, h), normal(b, k, l, 1, n), normal(b, k, l, 1, n)
    inputs = Inputs(x, dt, A, B, C, D=D, dt_bias=bias)
    options = Options([i % 2 == 1 for i in range(k)], dt_softplus=True, combine="mean")

    def run() -> None:
        y, _, ungated, saved = backend.ssd(inputs, options, save=True)
        backend.ssd_backward(y, None, ungated, saved, inputs, options)

    key = (b * k, l, h, p, 1, n)
    default = backend.configuration(dtype, *key)
    chunk = backend.CHUNK[dtype]  # longer ones spill registers, and so do shorter ones of some sizes
    candidates = {(chunk, length) for length in segments(l, chunk)}
    return search(backend.TUNED, key, sorted(candidates | {default}), lambda: time(run))
