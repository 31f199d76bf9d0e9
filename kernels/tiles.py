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
