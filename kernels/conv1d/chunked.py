"""The depthwise causal convolution in vectorised PyTorch: any device, any dtype, no compiler."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..directions import turn


def causal_conv1d(x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool, reverse: Sequence[bool]) -> Tensor:
    """See :func:`vim.kernels.conv1d.reference.causal_conv1d`."""
    y = _convolve(turn(x, reverse).to(torch.promote_types(x.dtype, torch.float32)), weight, bias)
    return turn(F.silu(y) if silu else y, reverse).to(x.dtype)


def causal_conv1d_backward(
    grad_y: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool, reverse: Sequence[bool]
) -> list[Tensor | None]:
    """Return the gradients of x, weight and bias, at least float32."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    x, dy = (turn(t.to(dtype), reverse) for t in (x, grad_y))
    if silu:
        y = _convolve(x, weight, bias)
        sigmoid = torch.sigmoid(y)
        dy = dy * sigmoid * (1 + y * (1 - sigmoid))
    length, width = x.shape[2], weight.shape[-1]
    dx, dweight = torch.zeros_like(x), torch.zeros_like(weight, dtype=dtype)
    for tap in range(width):
        back = width - 1 - tap  # how many tokens before the current one this tap reads
        if back >= length:
            continue
        dx[:, :, : length - back] += dy[:, :, back:] * weight[:, None, :, tap]
        dweight[:, :, tap] = (dy[:, :, back:] * x[:, :, : length - back]).sum((0, 2))
    return [turn(dx, reverse), dweight, None if bias is None else dy.sum((0, 2))]


def _convolve(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Convolve x, (b, k, l, d), forwards in all directions, without SiLU."""
    length, width = x.shape[2], weight.shape[-1]
    y = x * weight[:, None, :, -1].to(x.dtype)
    for back in range(1, min(width, length)):
        y[:, :, back:].addcmul_(x[:, :, : length - back], weight[:, None, :, width - 1 - back].to(x.dtype))
    return y if bias is None else y + bias.to(x.dtype).unsqueeze(1)
