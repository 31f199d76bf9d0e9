"""The depthwise causal convolution and SiLU: shapes, checks, autograd, and the op every model calls.

Sizes: b images, k directions, l tokens, d channels, w taps. `torch.ops.vim.causal_conv1d` takes every tensor with its k
directions; :func:`causal_conv1d` also takes them without.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from .. import autograd
from ..backends import DTYPES, choose_backend, implementation
from ..checks import check, check_dim
from ..directions import MOST_DIRECTIONS, as_rows, empty_rows
from . import reference

_SCHEMA = "Tensor x, Tensor weight, Tensor? bias=None, *, int[] reverse, bool silu=True, str backend='auto'"
_LIB = torch.library.Library("vim", "FRAGMENT")
_LIB.define(f"causal_conv1d({_SCHEMA}) -> Tensor")
_LIB.define(f"causal_conv1d_backward(Tensor grad_y, {_SCHEMA}) -> (Tensor, Tensor, Tensor)")


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    silu: bool = True,
    reverse: bool | Sequence[bool] = False,
    backend: str = "auto",
) -> Tensor:
    """Convolve each channel over a token and the w - 1 before it, with zeros before the first token; then apply SiLU.

    The sum is float32, or float64 if x is.

    Args:
        x: (b, l, d), or (b, k, l, d) for k directions. A tensor expanded to k directions is not copied.
        weight: (d, w) or (k, d, w), in x's dtype or float32; the last tap is for the current token.
        bias: (d,) or (k, d), in x's dtype or float32.
        silu: apply the SiLU.
        reverse: convolve over a token and the w - 1 after it; for k directions, k booleans.
        backend: "auto", "reference", "chunked", "cpu" or "triton". A backend named here runs or raises.

    Returns:
        A tensor of x's shape and dtype.

    Raises:
        ValueError: a shape, dtype or device is not as above, or the backend does not take it.
        RuntimeError: the backend named is not built or not installed.
    """
    if x.dim() not in (3, 4):
        raise ValueError(f"x must be (b, l, d) or (b, k, l, d), got {tuple(x.shape)}")
    several = x.dim() == 4
    if isinstance(reverse, bool):
        if several:
            raise ValueError(f"reverse must hold a bool for each of the {x.shape[1]} directions, got {reverse}")
        reverse = (reverse,)
    if not several:
        x, weight, bias = x.unsqueeze(1), weight.unsqueeze(0), None if bias is None else bias.unsqueeze(0)
    y = torch.ops.vim.causal_conv1d(x, weight, bias, reverse=list(reverse), silu=silu, backend=backend)
    return y if several else y.squeeze(1)


def _check(x: Tensor, weight: Tensor, bias: Tensor | None, reverse: Sequence[bool]) -> None:
    check_dim("x", x, "b, k, l, d")
    check_dim("weight", weight, "k, d, w")
    b, k, l, d = x.shape
    if k > MOST_DIRECTIONS:
        raise ValueError(f"x must have at most {MOST_DIRECTIONS} directions, got {k}")
    if len(reverse) != k:
        raise ValueError(f"reverse must hold a bool for each of the {k} directions, got {list(reverse)}")
    wide = x.dtype in (torch.float32, torch.float64)
    dtypes = (x.dtype,) if wide else (x.dtype, torch.float32)
    check("x", x, "b, k, l, d", (b, k, l, d), DTYPES, x.device)
    check("weight", weight, "k, d, w", (k, d, weight.shape[2]), dtypes, x.device)
    check("bias", bias, "k, d", (k, d), dtypes, x.device)


def _forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    reverse: Sequence[bool],
    silu: bool = True,
    backend: str = "auto",
) -> Tensor:
    _check(x, weight, bias, reverse)
    backend = choose_backend(backend, x)
    y = implementation("conv1d", backend).causal_conv1d(x, weight, bias, silu, reverse)
    return y if backend in ("cpu", "triton") else as_rows(y, x.dtype)


def _forward_fake(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    reverse: Sequence[bool],
    silu: bool = True,
    backend: str = "auto",
) -> Tensor:
    _check(x, weight, bias, reverse)
    choose_backend(backend, x)
    return empty_rows(x, *x.shape)


def _backward(
    grad_y: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    reverse: Sequence[bool],
    silu: bool = True,
    backend: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    run = implementation("conv1d", choose_backend(backend, x)).causal_conv1d_backward
    dx, dweight, dbias = run(grad_y, x, weight, bias, silu, reverse)
    return (
        as_rows(dx, x.dtype),
        dweight.to(weight.dtype),
        weight.new_empty(0) if bias is None else dbias.to(bias.dtype),
    )


def _backward_fake(
    grad_y: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None = None, **options: object
) -> tuple[Tensor, Tensor, Tensor]:
    return empty_rows(x, *x.shape), weight.new_empty(weight.shape), weight.new_empty(0 if bias is None else bias.shape)


def _saving(*tensors: Tensor | None, save: bool, **options: object) -> tuple[Tensor, ...]:
    return (torch.ops.vim.causal_conv1d(*tensors, **options),)


def _differentiate(
    grads: Sequence[Tensor], kept: Sequence[Tensor], tensors: Sequence[Tensor | None], options: Mapping[str, object]
) -> tuple[Tensor, ...]:
    return torch.ops.vim.causal_conv1d_backward(*grads, *tensors, **options)


def _reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    reverse: Sequence[bool],
    silu: bool = True,
    backend: str = "auto",
) -> Tensor:
    _check(x, weight, bias, reverse)
    choose_backend(backend, x)
    return reference.causal_conv1d(x, weight, bias, silu, reverse)


_LIB.impl("causal_conv1d", _forward, "CompositeExplicitAutograd")
_LIB.impl("causal_conv1d_backward", _backward, "CompositeExplicitAutograd")
torch.library.register_fake("vim::causal_conv1d", _forward_fake, lib=_LIB)
torch.library.register_fake("vim::causal_conv1d_backward", _backward_fake, lib=_LIB)
autograd.register(_LIB, "causal_conv1d", autograd.Op(_saving, _differentiate, _reference, outputs=1))
autograd.register_backward(_LIB, "causal_conv1d_backward")
