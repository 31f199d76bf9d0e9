"""Long convolutions against their sums."""

import pytest
import torch

from tests.golden.lti import deviation
from vim.layers.long_convolution import convolve, fft_size


def sums(x, kernel, backward):
    """The definition along the last dimension, term by term."""
    y = torch.zeros(torch.broadcast_shapes(x.shape[:-1], kernel.shape[:-1]) + x.shape[-1:], dtype=x.dtype)
    l, m = x.shape[-1], kernel.shape[-1]
    for t in range(l):
        for j in range(m):
            if t - j >= 0:
                y[..., t] += kernel[..., j] * x[..., t - j]
            if backward is not None and t + 1 + j < l:
                y[..., t] += backward[..., j] * x[..., t + 1 + j]
    return y


@pytest.mark.parametrize("both", [False, True])
@pytest.mark.parametrize(("l", "m"), [(1, 1), (2, 2), (8, 8), (13, 13), (13, 5), (16, 1), (27, 27)])
def test_against_sums(l, m, both):
    x, kernel, backward = (torch.randn(2, 3, n, dtype=torch.float64) for n in (l, m, m))
    backward = backward if both else None
    assert deviation(convolve(x, kernel, backward), sums(x, kernel, backward)) < 1e-13


@pytest.mark.parametrize("dim", [-1, -2, -3])
def test_any_axis_and_any_broadcast(dim):
    x = torch.randn(2, 1, 3, 5, 6, 7, dtype=torch.float64)
    size = [4, 3, 1, 1, 1]
    size[dim] = x.shape[dim]
    kernel, backward = torch.randn(size, dtype=torch.float64), torch.randn(size, dtype=torch.float64)
    y = convolve(x, kernel, backward, dim)
    assert y.shape == (2, 4, 3, 5, 6, 7)
    want = sums(x.transpose(dim, -1), kernel.transpose(dim, -1), backward.transpose(dim, -1)).transpose(dim, -1)
    assert deviation(y, want) < 1e-13


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_precision_is_that_of_the_input_or_float32(dtype):
    x, kernel = torch.randn(3, 100).to(dtype), torch.randn(3, 100)
    with torch.autocast("cpu", torch.bfloat16):
        y = convolve(x, kernel, kernel)
    assert y.dtype == dtype
    want = convolve(x.double(), kernel.double(), kernel.double())
    assert deviation(y, want) < {torch.bfloat16: 4e-3, torch.float16: 5e-4, torch.float32: 1e-6}.get(dtype, 1e-13)


def test_sizes():
    sizes = sorted(2**a * 3**b for a in range(12) for b in range(8))
    for n in range(1, 2048):
        assert fft_size(n) == next(size for size in sizes if size >= n)
