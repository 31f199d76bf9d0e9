# mypy: ignore-errors
"""Depthwise causal convolution and SiLU on a GPU, in Triton: all directions in one launch, nothing flipped.

A program computes a tile of tokens and channels; its taps read the tile again, shifted, from the nearest cache.

Sizes: b images, k directions, l tokens, d channels, w taps.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..directions import dense, empty_rows, pack, unit_stride
from ..tiles import grid, on_its_device, sigmoid, tile

TOKENS, CHANNELS = 32, 64  # of a tile
LAUNCH = {"num_warps": 4, "TOKENS": TOKENS, "CHANNELS": CHANNELS, "enable_fp_fusion": True}


@on_its_device
def causal_conv1d(x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool, reverse: Sequence[bool]) -> Tensor:
    """See :func:`vim.kernels.conv1d.reference.causal_conv1d`."""
    x, weight, bias = unit_stride(x), dense(weight), dense(bias)
    y = empty_rows(x, *x.shape)
    forward_kernel[grid(x, TOKENS, CHANNELS)](
        *(x, x.stride(), weight, bias, y, y.stride(), *x.shape[1:], pack(reverse)),
        W=weight.shape[2],
        SILU=silu,
        **LAUNCH,
    )
    return y


@on_its_device
def causal_conv1d_backward(
    grad_y: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool, reverse: Sequence[bool]
) -> list[Tensor | None]:
    """Return the gradients of x, weight and bias. That of x is a convolution in the opposite direction."""
    x, weight, bias, grad_y = unit_stride(x), dense(weight), dense(bias), unit_stride(grad_y)
    (b, k, l, d), width = x.shape, weight.shape[2]
    ungated = empty_rows(x, *x.shape) if silu else grad_y
    # partial sums of a tile, for dweight and dbias
    sums = weight.new_empty(b, triton.cdiv(l, TOKENS), k, width + 1, d, dtype=torch.float32)
    backward_kernel[grid(x, TOKENS, CHANNELS)](
        *(grad_y, grad_y.stride(), x, x.stride(), weight, bias, ungated, ungated.stride(), sums),
        *(*x.shape[1:], pack(reverse)),
        W=width,
        SILU=silu,
        **LAUNCH,
    )
    dx = causal_conv1d(ungated, weight, None, False, [not backwards for backwards in reverse])
    total = sums.sum((0, 1))  # (k, w + 1, d)
    return [dx, total[:, :-1].transpose(1, 2).contiguous(), None if bias is None else total[:, -1].contiguous()]


@triton.jit
def forward_kernel(
    x, x_at, weight, bias, y, y_at, k, l, d, reverse,
    W: tl.constexpr, SILU: tl.constexpr, TOKENS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    row, token, channel, inside = tile(l, d, TOKENS, CHANNELS)
    direction = row % k
    x += row // k * x_at[0] + direction * x_at[1]
    taps = _taps(x, x_at[2], token, channel, inside, l, reverse >> direction & 1, W)
    out = _convolve(taps, weight, bias, direction * d + channel, channel < d, inside, W)
    if SILU:
        out *= sigmoid(out)
    tl.store(y + row // k * y_at[0] + direction * y_at[1] + token * y_at[2] + channel, out, inside)


@triton.jit
def backward_kernel(
    grad_y, grad_y_at, x, x_at, weight, bias, ungated, ungated_at, sums, k, l, d, reverse,
    W: tl.constexpr, SILU: tl.constexpr, TOKENS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """The gradient before the SiLU, and the sums over the tile's tokens that dweight and dbias are made of."""
    row, token, channel, inside = tile(l, d, TOKENS, CHANNELS)
    image, direction = row // k, row % k
    x += image * x_at[0] + direction * x_at[1]
    taps = _taps(x, x_at[2], token, channel, inside, l, reverse >> direction & 1, W)
    grad_y += image * grad_y_at[0] + direction * grad_y_at[1]
    grad = tl.load(grad_y + token * grad_y_at[2] + channel, inside, 0.0).to(tl.float32)
    if SILU:
        out = _convolve(taps, weight, bias, direction * d + channel, channel < d, inside, W)
        slope = sigmoid(out)
        grad *= slope * (1 + out * (1 - slope))
        ungated += image * ungated_at[0] + direction * ungated_at[1]
        tl.store(ungated + token * ungated_at[2] + channel, grad, inside)
    tiles = tl.cdiv(l, TOKENS)
    sums += ((image * tiles + tl.program_id(0) % tiles) * k + direction) * (W + 1) * d
    for w in tl.static_range(W):
        tl.store(sums + w * d + channel, tl.sum(grad * taps[w], 0, keep_dims=True), channel < d)
    tl.store(sums + W * d + channel, tl.sum(grad, 0, keep_dims=True), channel < d)


@triton.jit
def _taps(x, x_at, token, channel, inside, l, backwards, W: tl.constexpr):
    """What each tap reads: the tokens w - 1 before, ..., the tokens themselves; where reversed, after."""
    taps = ()
    for w in tl.static_range(W):
        source = token - (1 - 2 * backwards) * (W - 1 - w)
        there = inside & (source >= 0) & (source < l)
        taps = taps + (tl.load(x + source * x_at + channel, there, 0.0).to(tl.float32),)
    return taps


@triton.jit
def _convolve(taps, weight, bias, channel, there, inside, W: tl.constexpr):
    out = tl.zeros(inside.shape, tl.float32)
    if bias is not None:
        out += tl.load(bias + channel, there, 0.0).to(tl.float32)
    for w in tl.static_range(W):
        out += tl.load(weight + channel * W + w, there, 0.0).to(tl.float32) * taps[w]
    return out
