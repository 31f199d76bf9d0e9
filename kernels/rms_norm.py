"""Root-mean-square normalisation: checks, autograd, and the op every model calls.

PyTorch composes it of six passes over memory; here it is one, where a backend has it.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import cpu, reference
from .backends import DTYPES, choose_backend
from .checks import check, refuse_to_differentiate_again

_INPUTS = "Tensor x, Tensor weight, float eps, str backend"
WIDEST = 8192  # channels of a row that the registers of a GPU's program hold

_LIB = torch.library.Library("vim", "FRAGMENT")
_LIB.define(f"rms_norm({_INPUTS}) -> Tensor")
_LIB.define(f"rms_norm_backward(Tensor grad_y, {_INPUTS}) -> (Tensor, Tensor)")


def rms_norm(x: Tensor, weight: Tensor, *, eps: float = 1e-5, backend: str = "auto") -> Tensor:
    """``x / sqrt(mean(x^2) + eps) * weight`` over the last dimension (https://arxiv.org/abs/1910.07467).

    Args:
        x: (..., d), of any floating dtype. weight: (d,), in x's dtype.
        backend: "auto", "reference", "chunked" (PyTorch's own, with the reference's gradients), "cpu" or "triton"; a
            named one runs or raises.

    Returns:
        Like x.

    Raises:
        ValueError: a shape, dtype or device is not as above, or not one the backend takes.
        RuntimeError: the backend asked for is not built.
    """
    return torch.ops.vim.rms_norm(x, weight, eps, backend)


def _choose(x: Tensor, weight: Tensor, backend: str) -> str:
    check("x", x, "..., d", tuple(x.shape), DTYPES, x.device)
    if x.dim() == 0:
        raise ValueError("x must be (..., d), got a scalar")
    check("weight", weight, "d", (x.shape[-1],), (x.dtype,), x.device)
    if x.shape[-1] == 0:
        raise ValueError(f"x must have at least one channel, got {tuple(x.shape)}")
    chosen = choose_backend(backend, x)
    if chosen == "triton" and x.shape[-1] > WIDEST:
        if backend == "triton":
            raise ValueError(f"backend 'triton' takes at most {WIDEST} channels, got {x.shape[-1]}: use 'chunked'")
        return "chunked"
    return chosen


def _native(backend: str) -> Any:
    if backend == "cpu":
        return cpu
    from . import triton_rms_norm  # late: where there is no GPU there may be no triton

    return triton_rms_norm


def _forward(x: Tensor, weight: Tensor, eps: float, backend: str) -> Tensor:
    chosen = _choose(x, weight, backend)
    if chosen in ("cpu", "triton"):
        return _native(chosen).rms_norm(x, weight, eps)
    if chosen == "reference":
        return reference.rms_norm(x, weight, eps)
    return F.rms_norm(x, weight.shape, weight, eps)


def _backward(grad_y: Tensor, x: Tensor, weight: Tensor, eps: float, backend: str) -> Any:
    chosen = _choose(x, weight, backend)
    if chosen in ("cpu", "triton"):
        return _native(chosen).rms_norm_backward(grad_y, x, weight, eps)
    return reference.differentiate(reference.rms_norm, (x, weight), (eps,), (grad_y,))


def _forward_fake(x: Tensor, weight: Tensor, eps: float, backend: str) -> Tensor:
    _choose(x, weight, backend)
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _backward_fake(grad_y: Tensor, x: Tensor, weight: Tensor, eps: float, backend: str) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x, memory_format=torch.contiguous_format), torch.empty_like(weight)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:2])
    ctx.options = inputs[2:]


def _differentiate(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
    return *torch.ops.vim.rms_norm_backward(grad_y, *ctx.saved_tensors, *ctx.options), None, None


_LIB.impl("rms_norm", _forward, "CompositeExplicitAutograd")
_LIB.impl("rms_norm_backward", _backward, "CompositeExplicitAutograd")
torch.library.register_fake("vim::rms_norm", _forward_fake, lib=_LIB)
torch.library.register_fake("vim::rms_norm_backward", _backward_fake, lib=_LIB)
torch.library.register_autograd("vim::rms_norm", _differentiate, setup_context=_setup_context, lib=_LIB)
torch.library.register_autograd("vim::rms_norm_backward", refuse_to_differentiate_again, lib=_LIB)
