"""Convolutions with kernels as long as the sequence, by FFT.

The FFT runs in float32, or in float64 for such inputs: in half precision it would need sizes that are powers of two,
and a CPU has none.
"""

import torch
from timm.layers import register_notrace_function
from torch import Tensor

from .norm import residual_dtype


def fft_size(n: int) -> int:
    """Return the smallest 2^a 3^b that is at least n: sizes with large prime factors are slow."""
    best, power = 1, 1
    while best < n:
        best *= 2
    while power < n:
        size = power
        while size < n:
            size *= 2
        best = min(best, size)
        power *= 3
    return min(best, power)


@register_notrace_function
def convolve(x: Tensor, kernel: Tensor, backward: Tensor | None = None, dim: int = -1) -> Tensor:
    """Convolve x with a causal kernel, and with one that looks ahead, along one dimension.

    ``y[t] = sum_j kernel[j] x[t - j] + sum_j backward[j] x[t + 1 + j]``: a token's own value is in the first sum only.

    Args:
        x: l long in `dim`. Its other sizes and the kernels' are broadcast against one another.
        kernel, backward: m long in `dim`, m at most l. `backward` is as large as `kernel`.
        dim: counted from the last dimension: negative.

    Returns:
        l long in `dim`, in the precision of x.
    """
    l, m = x.shape[dim], kernel.shape[dim]
    n = fft_size(l + m)
    dtype = residual_dtype(x)
    kernel = kernel.to(dtype)
    if backward is not None:
        between = list(kernel.shape)
        between[dim] = n - 2 * m
        kernel = torch.cat([kernel, kernel.new_zeros(between), backward.to(dtype).flip(dim)], dim=dim)
    spectrum = torch.fft.rfft(x.to(dtype), n=n, dim=dim) * torch.fft.rfft(kernel, n=n, dim=dim)
    return torch.fft.irfft(spectrum, n=n, dim=dim).narrow(dim, 0, l).to(x.dtype)
