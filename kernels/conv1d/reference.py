"""The depthwise causal convolution in slow, obvious PyTorch: the definition every backend is tested against."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..checks import differentiate


def causal_conv1d(x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool, reverse: Sequence[bool]) -> Tensor:
    """Convolve over a token and the w - 1 before it (after it in a reversed direction), then apply SiLU.

    Args:
        x: (b, k, l, d).
        weight: (k, d, w); the last tap is for the current token.
        bias: (k, d).

    Returns:
        (b, k, l, d) in x's dtype.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    d, width = weight.shape[1:]
    ys = []
    for k, backwards in enumerate(reverse):
        row = x[:, k].to(dtype).transpose(1, 2)  # (b, d, l)
        row = F.pad(row.flip(-1) if backwards else row, (width - 1, 0))
        y = F.conv1d(row, weight[k].to(dtype).unsqueeze(1), None if bias is None else bias[k].to(dtype), groups=d)
        ys.append((y.flip(-1) if backwards else y).transpose(1, 2))
    y = torch.stack(ys, 1)  # (b, k, l, d)
    return (F.silu(y) if silu else y).to(x.dtype)


def causal_conv1d_backward(
    grad_y: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool, reverse: Sequence[bool]
) -> list[Tensor | None]:
    """Return the gradients of x, weight and bias by PyTorch's own differentiation."""

    def run(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return causal_conv1d(x, weight, bias, silu, reverse)

    return differentiate(run, (x, weight, bias), grad_y)
