"""Depthwise causal convolution and SiLU: shapes, checks, autograd, and the op every model calls.

Sizes: b images, k directions, l tokens, d channels, w taps.
"""

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

from . import chunked, cpu, reference
from .backends import DTYPES, choose_backend
from .checks import MOST_DIRECTIONS, as_rows, check, check_dim, empty_rows, refuse_to_differentiate_again

_INPUTS = "Tensor x, Tensor weight, Tensor? bias, bool silu, bool[] reverse, str backend"
_LIB = torch.library.Library("vim", "FRAGMENT")
_LIB.define(f"causal_conv1d({_INPUTS}) -> Tensor")
_LIB.define(f"causal_conv1d_backward(Tensor grad_y, {_INPUTS}) -> (Tensor, Tensor, Tensor)")


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    silu: bool = True,
    reverse: bool | Sequence[bool] = False,
    backend: str = "auto",
) -> Tensor:
    """Convolve each channel over a token and the w - 1 before it, zeros before the first; then SiLU.

    Args:
        x: (b, l, d), or (b, k, l, d) for k directions; one tensor expanded to all of them is not copied.
        weight: (d, w) or (k, d, w), its last tap for the current token. bias: (d,) or (k, d).
            Both in x's dtype or float32; the sum is float32 (float64 for float64).
        reverse: over a token and the w - 1 after it; a bool for each direction where there are several.
        backend: "auto", "reference", "chunked", "cpu" or "triton"; a named one runs or raises.

    Returns:
        Like x, in its dtype.

    Raises:
        ValueError: a shape, dtype or device is not as above, or not one the backend takes.
        RuntimeError: the backend asked for is not built.
    """
    if x.dim() not in (3, 4):
        raise ValueError(f"x must be (b, l, d) or (b, k, l, d), got {tuple(x.shape)}")
    if isinstance(reverse, bool):
        if x.dim() == 4:
            raise ValueError(f"reverse must hold a bool for each of the {x.shape[1]} directions, got {reverse}")
        reverse = (reverse,)
    if x.dim() == 4:
        return torch.ops.vim.causal_conv1d(x, weight, bias, silu, list(reverse), backend)
    bias = bias if bias is None else bias.unsqueeze(0)
    y = torch.ops.vim.causal_conv1d(x.unsqueeze(1), weight.unsqueeze(0), bias, silu, list(reverse), backend)
    return y.squeeze(1)


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


def _module(backend: str) -> Any:
    if backend == "triton":
        from . import triton_conv1d  # late: where there is no GPU there may be no triton

        return triton_conv1d
    return {"reference": reference, "chunked": chunked, "cpu": cpu}[backend]


def _forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool, reverse: Sequence[bool], backend: str
) -> Tensor:
    _check(x, weight, bias, reverse)
    backend = choose_backend(backend, x)
    if backend == "cpu":
        return cpu.causal_conv1d(x, weight, bias, silu, reverse)
    return as_rows(_module(backend).causal_conv1d(x, weight, bias, silu, reverse), x.dtype)


def _forward_fake(
    x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool, reverse: Sequence[bool], backend: str
) -> Tensor:
    _check(x, weight, bias, reverse)
    choose_backend(backend, x)
    return empty_rows(x, *x.shape)


def _backward(
    grad_y: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    silu: bool,
    reverse: Sequence[bool],
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    chosen = choose_backend(backend, x)
    if chosen == "reference":
        grads = reference.differentiate(reference.causal_conv1d, (x, weight, bias), (silu, reverse), (grad_y,))
    else:
        grads = _module(chosen).causal_conv1d_backward(grad_y, x, weight, bias, silu, reverse)
    dx, dweight, dbias = cast(tuple[Tensor, Tensor, Tensor], grads)
    return (
        as_rows(dx, x.dtype),
        dweight.to(weight.dtype),
        weight.new_empty(0) if bias is None else dbias.to(bias.dtype),
    )


def _backward_fake(
    grad_y: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    silu: bool,
    reverse: Sequence[bool],
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    return empty_rows(x, *x.shape), weight.new_empty(weight.shape), weight.new_empty(0 if bias is None else bias.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:3])
    ctx.options = inputs[3:]


def _differentiate(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, bias = ctx.saved_tensors
    dx, dweight, dbias = torch.ops.vim.causal_conv1d_backward(grad_y, x, weight, bias, *ctx.options)
    return dx, dweight, None if bias is None else dbias, None, None, None


_LIB.impl("causal_conv1d", _forward, "CompositeExplicitAutograd")
_LIB.impl("causal_conv1d_backward", _backward, "CompositeExplicitAutograd")
torch.library.register_fake("vim::causal_conv1d", _forward_fake, lib=_LIB)
torch.library.register_fake("vim::causal_conv1d_backward", _backward_fake, lib=_LIB)
torch.library.register_autograd("vim::causal_conv1d", _differentiate, setup_context=_setup_context, lib=_LIB)
torch.library.register_autograd("vim::causal_conv1d_backward", refuse_to_differentiate_again, lib=_LIB)
