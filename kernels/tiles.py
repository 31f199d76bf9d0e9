# mypy: ignore-errors
"""What the Triton kernels of several ops share."""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

LOG2E = tl.constexpr(1.4426950408889634)


def on_its_device(run):
    """Run a function with the GPU of its first tensor as the current one, on which Triton launches.

    The first argument is that tensor, or a tuple that starts with it.
    """

    @functools.wraps(run)
    def launch(first, *args, **options):
        with torch.cuda.device_of(first if isinstance(first, Tensor) else first[0]):
            return run(first, *args, **options)

    return launch


def grid(x: Tensor, tokens: int, channels: int) -> tuple[int, int]:
    """Return the grid of programs that each take a :func:`tile` of x, (b, k, l, d)."""
    b, k, l, d = x.shape
    return b * k * triton.cdiv(l, tokens), triton.cdiv(d, channels)  # only the first can be above 65,535


@triton.jit
def tile(l, d, TOKENS: tl.constexpr, CHANNELS: tl.constexpr):
    """Return a program's row (one of b k), its tokens and channels, and the mask of those inside (l, d)."""
    tiles = tl.cdiv(l, TOKENS)
    token = (tl.program_id(0) % tiles * TOKENS + tl.arange(0, TOKENS)).to(tl.int64)[:, None]
    channel = (tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS))[None, :]
    return (tl.program_id(0) // tiles).to(tl.int64), token, channel, (token < l) & (channel < d)


@triton.jit
def sigmoid(x):
    return 1 / (1 + tl.exp2(x * -LOG2E))


@triton.jit
def step_size(delta, bias, SOFTPLUS: tl.constexpr):
    """Return dt and its derivative by delta, without overflow, and to all digits where log(1 + e) would lose some."""
    x = delta.to(tl.float32) + bias
    dt, slope = x, tl.full(x.shape, 1.0, tl.float32)
    if SOFTPLUS:
        e = tl.exp2(tl.abs(x) * -LOG2E)
        # log(1 + e) / e for e in [0, 1], a polynomial fitted to the least relative error: 3e-8
        log = 0.00523267664 * e - 0.0295051682
        log = log * e + 0.0782258369
        log = log * e - 0.13663236
        log = log * e + 0.191060022
        log = log * e - 0.24842981
        log = log * e + 0.333190967
        log = log * e - 0.499994931
        log = log * e + 0.99999997
        dt = tl.maximum(x, 0.0) + log * e
        slope = tl.where(x < 0, e, 1.0) / (1 + e)
    return dt, slope
