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

from .checks import empty_rows, on_its_device
from .triton_gate import sigmoid, tile

TOKENS, CHANNELS = 32, 64  # of a tile
LAUNCH = {"num_warps": 4, "TOKENS": TOKENS, "CHANNELS": CHANNELS, "enable_fp_fusion": True}


@on_its_device
def causal_conv1d(x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool, reverse: Sequence[bool]) -> Tensor:
    """The convolution, in x's dtype."""
    x, weight = x if x.stride(-1) == 1 else x.contiguous(), weight.contiguous()
    y = empty_rows(x, *x.shape)
    bias = bias if bias is None else bias.contiguous()
    forward_kernel[_grid(x)](
        *(x, x.stride(), weight, bias, y, y.stride(), *x.shape[1:], _bits(reverse)),
        W=weight.shape[2],
        SILU=silu,
        **LAUNCH,
    )
    return y


@on_its_device
def causal_conv1d_backward(
    grad_y: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool, reverse: Sequence[bool]
) -> list[Tensor | None]:
    """The gradients of x, weight and bias; that of x is the convolution run the other way."""
    x, grad_y = (t if t.stride(-1) == 1 else t.contiguous() for t in (x, grad_y))
    weight, bias = weight.contiguous(), bias if bias is None else bias.contiguous()
    (b, k, l, d), width = x.shape, weight.shape[2]
    ungated = empty_rows(x, *x.shape) if silu else grad_y
    # of a tile: dweight, dbias
    sums = weight.new_empty(b, triton.cdiv(l, TOKENS), k, width + 1, d, dtype=torch.float32)
    backward_kernel[_grid(x)](
        *(grad_y, grad_y.stride(), x, x.stride(), weight, bias, ungated, ungated.stride(), sums),
        *(*x.shape[1:], _bits(reverse)),
        W=width,
        SILU=silu,
        **LAUNCH,
    )
    dx = causal_conv1d(ungated, weight, None, False, [not backwards for backwards in reverse])
    total = sums.sum((0, 1))  # (k, w + 1, d)
    return [dx, total[:, :-1].transpose(1, 2).contiguous(), None if bias is None else total[:, -1].contiguous()]


def _grid(x: Tensor) -> tuple[int, int]:
    b, k, l, d = x.shape
    return b * k * triton.cdiv(l, TOKENS), triton.cdiv(d, CHANNELS)  # only the first can be above 65,535


def _bits(reverse: Sequence[bool]) -> int:
    return sum(1 << i for i, backwards in enumerate(reverse) if backwards)


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
