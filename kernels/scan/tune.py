"""Search for the fastest configuration of the scan on a GPU: see :mod:`vim.kernels.tune`.

from vim.kernels.scan.tune import tune
tune(b=64, k=2, l=197, d=768, n=16)
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
    d: int,
    n: int,
    dtype: torch.dtype = torch.bfloat16,
    device: str = "cuda",
    time: Callable[[Callable[[], None]], float] = triton.testing.do_bench,
) -> list[tuple[float, int, int]]:
    """Time the forward and backward pass in every configuration.

    Args:
        b, k, l, d, n: sizes of the scan: images, directions, tokens, channels, states.
        dtype: of u, delta, B, C and z.
        device: where to run.
        time: returns the milliseconds of a function.

    Returns:
        (milliseconds, channels of a program, tokens of a segment) of each configuration, the fastest first.
    """
    draw = torch.Generator(device).manual_seed(0)

    def normal(*shape: int, of: torch.dtype = dtype) -> torch.Tensor:
        return torch.randn(shape, generator=draw, device=device, dtype=of)

    A, D, bias = (
        -normal(k, d, n, of=torch.float32).exp(),
        normal(k, d, of=torch.float32),
        normal(k, d, of=torch.float32),
    )
    u, delta, B, C = normal(b, k, l, d), normal(b, k, l, d), normal(b, k, l, 1, n), normal(b, k, l, 1, n)
    inputs = Inputs(u, delta, A, B, C, D=D, z=normal(b, 1, l, d), delta_bias=bias)
    options = Options([i % 2 == 1 for i in range(k)], delta_softplus=True, combine="mean")

    def run() -> None:
        y, _, ungated, saved = backend.selective_scan(inputs, options, save=True)
        backend.selective_scan_backward(y, None, ungated, saved, inputs, options)

    key = (b * k, l, d, 1, n)
    lengths = sorted(segments(l, backend.CHUNK) | {backend.configuration(*key)[1]})
    candidates = [(block, length) for block in (32, 64) for length in lengths]
    return search(backend.TUNED, key, candidates, lambda: time(run))
