"""Root-mean-square normalisation: checks, autograd, and the op every model calls.

PyTorch composes it of six passes over memory; the compiled backends take one.
"""

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import autograd
from ..backends import DTYPES, choose_backend, implementation
from ..checks import check
from . import reference

WIDEST = 8192  # channels of a row that fit in the registers of a GPU's program

_SCHEMA = "Tensor x, Tensor weight, *, float eps=1e-5, str backend='auto'"
_LIB = torch.library.Library("vim", "FRAGMENT")
_LIB.define(f"rms_norm({_SCHEMA}) -> Tensor")
_LIB.define(f"rms_norm_backward(Tensor grad_y, {_SCHEMA}) -> (Tensor, Tensor)")


def rms_norm(x: Tensor, weight: Tensor, *, eps: float = 1e-5, backend: str = "auto") -> Tensor:
    """``x / sqrt(mean(x^2) + eps) * weight`` over the last dimension (https://arxiv.org/abs/1910.07467).

    Args:
        x: (..., d), of any floating dtype.
        weight: (d,), in x's dtype.
        eps: added to the mean of the squares.
        backend: "auto", "reference", "chunked", "cpu" or "triton"; "chunked" is PyTorch's own, with the reference's
            gradients. A backend named here runs or raises.

    Returns:
        A tensor of x's shape and dtype.

    Raises:
        ValueError: a shape, dtype or device is not as above, or the backend does not take it.
        RuntimeError: the backend named is not built or not installed.
    """
    return torch.ops.vim.rms_norm(x, weight, eps=eps, backend=backend)


def _choose(x: Tensor, weight: Tensor, backend: str) -> str:
    """Check the tensors and return the backend. "auto" takes "chunked" where a row is too wide for Triton."""
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


def _forward(x: Tensor, weight: Tensor, *, eps: float = 1e-5, backend: str = "auto") -> Tensor:
    backend = _choose(x, weight, backend)
    if backend == "chunked":
        return F.rms_norm(x, weight.shape, weight, eps)
    return implementation("norm", backend).rms_norm(x, weight, eps)


def _forward_fake(x: Tensor, weight: Tensor, *, eps: float = 1e-5, backend: str = "auto") -> Tensor:
    _choose(x, weight, backend)
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _backward(
    grad_y: Tensor, x: Tensor, weight: Tensor, *, eps: float = 1e-5, backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    backend = _choose(x, weight, backend)
    run = implementation("norm", "reference" if backend == "chunked" else backend).rms_norm_backward
    dx, dweight = run(grad_y, x, weight, eps)
    return dx, dweight


def _backward_fake(grad_y: Tensor, x: Tensor, weight: Tensor, **options: object) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x, memory_format=torch.contiguous_format), torch.empty_like(weight)


def _saving(x: Tensor, weight: Tensor, *, save: bool, **options: object) -> tuple[Tensor, ...]:
    return (torch.ops.vim.rms_norm(x, weight, **options),)


def _differentiate(
    grads: Sequence[Tensor], kept: Sequence[Tensor], tensors: Sequence[Tensor], options: Mapping[str, object]
) -> tuple[Tensor, Tensor]:
    return torch.ops.vim.rms_norm_backward(*grads, *tensors, **options)


def _reference(x: Tensor, weight: Tensor, *, eps: float = 1e-5, backend: str = "auto") -> Tensor:
    _choose(x, weight, backend)
    return reference.rms_norm(x, weight, eps)


_LIB.impl("rms_norm", _forward, "CompositeExplicitAutograd")
_LIB.impl("rms_norm_backward", _backward, "CompositeExplicitAutograd")
torch.library.register_fake("vim::rms_norm", _forward_fake, lib=_LIB)
torch.library.register_fake("vim::rms_norm_backward", _backward_fake, lib=_LIB)
autograd.register(_LIB, "rms_norm", autograd.Op(_saving, _differentiate, _reference, outputs=1))
autograd.register_backward(_LIB, "rms_norm_backward")
