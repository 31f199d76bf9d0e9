"""Root-mean-square normalisation on the CPU: calls of norm.h."""

import struct

import torch
from torch import Tensor

from ..native.library import as_dense_floats, call, constant, pointer

# Norm and NormGrads of common.h, field by field
_NORM = struct.Struct("2q f 3q")
_NORM_GRADS = struct.Struct("3q")


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """See :func:`vim.kernels.norm.reference.rms_norm`."""
    dtype, x, weight = x.dtype, as_dense_floats(x), as_dense_floats(weight)
    y = torch.empty_like(x)
    call("vim_norm", _pack_norm(x, weight, eps, y))
    return y.to(dtype)


def rms_norm_backward(grad_y: Tensor, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return the gradients of x and weight, in their dtype."""
    dtype = x.dtype
    grad_y, x, weight = (as_dense_floats(t) for t in (grad_y, x, weight))
    rows, d = x.numel() // x.shape[-1], x.shape[-1]
    dx, dweight = torch.empty_like(x), x.new_empty(-(-rows // constant("vim_norm_rows")), d)
    grads = _NORM_GRADS.pack(grad_y.data_ptr(), dx.data_ptr(), dweight.data_ptr())
    call("vim_norm_backward", _pack_norm(x, weight, eps, None), grads)
    return dx.to(dtype), dweight.sum(0).to(dtype)


def _pack_norm(x: Tensor, weight: Tensor, eps: float, y: Tensor | None) -> bytes:
    """Return the fields of `Norm`; a backward pass has no y to write."""
    d = x.shape[-1]
    return _NORM.pack(x.numel() // d, d, eps, x.data_ptr(), weight.data_ptr(), pointer(y))
