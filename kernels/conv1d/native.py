"""The depthwise causal convolution on the CPU: calls of conv.h."""

import struct
from collections.abc import Sequence

from torch import Tensor

from ..directions import empty_rows, pack
from ..native.library import ROWS, as_dense_floats, as_floats, call, constant, pointer, rows

# Conv and ConvGrads of common.h, field by field
_CONV = struct.Struct(f"7q {ROWS * 2} 2q")
_CONV_GRADS = struct.Struct(f"{ROWS * 2} 2q")


def causal_conv1d(x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool, reverse: Sequence[bool]) -> Tensor:
    """See :func:`vim.kernels.conv1d.reference.causal_conv1d`."""
    floats, weight, bias = as_floats(x), as_dense_floats(weight), as_dense_floats(bias)
    y = empty_rows(floats, *x.shape)
    call("vim_conv", _pack_conv(floats, y, weight, bias, silu, reverse))
    return y.type_as(x)


def causal_conv1d_backward(
    grad_y: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool, reverse: Sequence[bool]
) -> list[Tensor | None]:
    """Return the gradients of x, weight and bias, float32."""
    b, k, l, d = x.shape
    x, weight, bias, grad_y = as_floats(x), as_dense_floats(weight), as_dense_floats(bias), as_floats(grad_y)
    dx = empty_rows(x, b, k, l, d)
    # partial sums, one for each chunk of tokens
    chunks = b * -(-l // constant("vim_conv_tokens"))
    dweight, dbias = x.new_empty(chunks, k, d, weight.shape[2]), x.new_empty(chunks, k, d)
    grads = _CONV_GRADS.pack(*rows(grad_y), *rows(dx), pointer(dweight), pointer(dbias))
    call("vim_conv_backward", _pack_conv(x, None, weight, bias, silu, reverse), grads)
    return [dx, dweight.sum(0), dbias.sum(0)]


def _pack_conv(
    x: Tensor, y: Tensor | None, weight: Tensor, bias: Tensor | None, silu: bool, reverse: Sequence[bool]
) -> bytes:
    """Return the fields of `Conv`; a backward pass has no y to write."""
    b, k, l, d = x.shape
    return _CONV.pack(
        *(b, k, l, d, weight.shape[2], pack(reverse), silu),
        *(*rows(x), *rows(y), pointer(weight), pointer(bias)),
    )
