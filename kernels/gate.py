# mypy: ignore-errors
"""The sum or mean of directions and the gate silu(z) on a GPU, in Triton, with their gradients.

Sizes: b images, k directions of x, l tokens, d channels.
"""

import triton
import triton.language as tl
from torch import Tensor

from .tiles import grid, sigmoid, tile

TOKENS, CHANNELS = 8, 128  # of a program
LAUNCH: dict[str, object] = {"num_warps": 4, "TOKENS": TOKENS, "CHANNELS": CHANNELS, "enable_fp_fusion": True}


def combine_directions(x: Tensor, z: Tensor | None, combine: str, y: Tensor) -> None:
    """Write the sum or mean of x's directions, (b, k, l, d), times silu(z), to y, (b, 1, l, d)."""
    b, k, l, d = x.shape
    scale = 1 / k if combine == "mean" else 1.0
    combine_kernel[grid(y, TOKENS, CHANNELS)](x, z, None if z is None else z.stride(), y, 1, l, d, scale, K=k, **LAUNCH)


def differentiate_combined(
    grad_y: Tensor, x: Tensor, z: Tensor | None, combine: str, k: int, dx: Tensor, dz: Tensor | None
) -> None:
    """Write the gradients of x, (b, k, l, d), and of z, from that of y, (b, 1, l, d).

    All directions have the same gradient, which dx, (b, 1, l, d), receives once. With combine "none" nothing is added
    up, and y, z, dx and dz are (b, k, l, d).
    """
    scale = 1 / k if combine == "mean" else 1.0
    each = 1 if combine == "none" else k
    differentiate_kernel[grid(grad_y, TOKENS, CHANNELS)](
        *(grad_y, grad_y.stride(), x, z, None if z is None else z.stride(), dx, dz),
        *(None if dz is None else dz.stride(), *grad_y.shape[1:], scale),
        K=each,
        **LAUNCH,
    )


@triton.jit
def combine_kernel(
    x, z, z_at, y, sums, l, d, scale, K: tl.constexpr, TOKENS: tl.constexpr, CHANNELS: tl.constexpr
):  # fmt: skip
    """y = silu(z) scale sum(x): x (b, sums K, l, d), y (b, sums, l, d)."""
    row, token, channel, inside = tile(l, d, TOKENS, CHANNELS)
    total = _sum_directions(x, row, l, d, token, channel, inside, K) * scale
    if z is not None:
        gate = tl.load(_rows(z, z_at, row, sums, token) + channel, inside, 0.0).to(tl.float32)
        total *= gate * sigmoid(gate)
    tl.store(y + row * l * d + token * d + channel, total, inside)


@triton.jit
def differentiate_kernel(
    grad_y, grad_y_at, x, z, z_at, dx, dz, dz_at, sums, l, d, scale,
    K: tl.constexpr, TOKENS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    row, token, channel, inside = tile(l, d, TOKENS, CHANNELS)
    grad = tl.load(_rows(grad_y, grad_y_at, row, sums, token) + channel, inside, 0.0).to(tl.float32) * scale
    if z is not None:
        total = _sum_directions(x, row, l, d, token, channel, inside, K)
        gate = tl.load(_rows(z, z_at, row, sums, token) + channel, inside, 0.0).to(tl.float32)
        opening = sigmoid(gate)
        slope = opening * (1 + gate * (1 - opening))
        tl.store(_rows(dz, dz_at, row, sums, token) + channel, grad * total * slope, inside)
        grad *= gate * opening
    tl.store(dx + row * l * d + token * d + channel, grad, inside)


@triton.jit
def _rows(x, x_at, row, sums, token):
    """Return the addresses of the tokens of one of b sums rows, in a tensor of strides x_at."""
    return x + row // sums * x_at[0] + row % sums * x_at[1] + token * x_at[2]


@triton.jit
def _sum_directions(x, row, l, d, token, channel, inside, K: tl.constexpr):
    total = tl.zeros(inside.shape, tl.float32)
    for k in tl.static_range(K):
        total += tl.load(x + (row * K + k) * l * d + token * d + channel, inside, 0.0).to(tl.float32)
    return total
