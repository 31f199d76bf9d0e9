"""The selective scan of Mamba: shapes, checks, autograd, and the op every model calls.

Upper case: the paper's tensors. Sizes: b images, k directions, l tokens, d channels, g groups of B and C, n states.

`torch.ops.vim.selective_scan` is one opaque op to autograd, autocast, torch.compile, torch.export and TorchScript. It
takes every tensor with its k directions and B and C with their g groups; :func:`selective_scan` is the same for people.
"""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from . import chunked, cpu, reference
from .backends import DTYPES, choose_backend
from .checks import MOST_DIRECTIONS, as_rows, check, check_dim, empty_rows, refuse_to_differentiate_again

Combine = Literal["none", "sum", "mean"]

_INPUTS = (
    "Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, Tensor? delta_bias, "
    "Tensor? initial_state, bool delta_softplus, bool[] reverse, str combine, bool return_last_state, str backend"
)
_LIB = torch.library.Library("vim", "FRAGMENT")
_LIB.define(f"selective_scan({_INPUTS}) -> (Tensor y, Tensor last_state)")
_LIB.define(
    f"selective_scan_forward({_INPUTS}, bool save) -> (Tensor y, Tensor last_state, Tensor ungated, Tensor saved)"
)
_LIB.define(
    f"selective_scan_backward(Tensor grad_y, Tensor? grad_state, Tensor ungated, Tensor saved, {_INPUTS}) -> Tensor[]"
)
_NAMES = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias", "initial_state")


def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    *,
    delta_softplus: bool = False,
    reverse: bool | Sequence[bool] = False,
    combine: Combine = "none",
    initial_state: Tensor | None = None,
    return_last_state: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Run ``h[t] = exp(dt[t] A) h[t-1] + dt[t] B[t] u[t]``, ``y[t] = C[t] h[t] + D u[t]``, then ``y * silu(z)``.

    ``dt = softplus(delta + delta_bias)``, the softplus if `delta_softplus`. The state is float32 (float64 for float64).
    Source: https://arxiv.org/abs/2312.00752.

    Args:
        u, delta, z: (b, l, d). All of u, delta, B, C, z in one dtype.
        A: (d, n). D, delta_bias: (d,).
        B, C: (b, l, n), or (b, l, g, n): d / g channels share a group.
        reverse: run from the last token to the first; nothing is flipped in memory.
        combine: "sum" or "mean" adds the directions up, before the gate; y and z are then (b, l, d).
        initial_state: (b, d, n), float32.
        backend: "auto", "reference", "chunked", "cpu" or "triton"; a named one runs or raises.

    Several directions in one call: k after b (u (b, k, l, d), B (b, k, l, n), initial_state (b, k, d, n)), a leading
    k for the rest (A (k, d, n), D (k, d)), and k booleans in `reverse`. A tensor that all share may be expanded: it
    is not copied.

    Returns:
        y, (b, l, d) or (b, k, l, d), in u's dtype; with `return_last_state` also the last state,
        (b, d, n) or (b, k, d, n).

    Raises:
        ValueError: a shape, dtype or device is not as above, or not one the backend takes.
        RuntimeError: the backend asked for is not built.
    """
    if u.dim() not in (3, 4):
        raise ValueError(f"u must be (b, l, d) or (b, k, l, d), got {tuple(u.shape)}")
    several = u.dim() == 4
    if isinstance(reverse, bool):
        if several:
            raise ValueError(f"reverse must hold a bool for each of the {u.shape[1]} directions, got {reverse}")
        reverse = (reverse,)
    if not several:
        u, delta, B, C = (t.unsqueeze(1) for t in (u, delta, B, C))
        A = A.unsqueeze(0)
        D, delta_bias = (t if t is None else t.unsqueeze(0) for t in (D, delta_bias))
        initial_state = initial_state if initial_state is None else initial_state.unsqueeze(1)
    if B.dim() == 4:
        B = B.unsqueeze(3)
    if C.dim() == 4:
        C = C.unsqueeze(3)
    one_y = not several or combine != "none"
    if z is not None and one_y:
        z = z.unsqueeze(1)
    y, state = torch.ops.vim.selective_scan(
        u,
        delta,
        A,
        B,
        C,
        D,
        z,
        delta_bias,
        initial_state,
        delta_softplus,
        list(reverse),
        combine,
        return_last_state,
        backend,
    )
    y = y.squeeze(1) if one_y else y
    if not return_last_state:
        return y
    return y, (state if several else state.squeeze(1))


def _check(tensors: Sequence[Tensor | None], reverse: Sequence[bool], combine: str) -> None:
    u, delta, A, B, C, D, z, delta_bias, initial_state = tensors
    assert u is not None and A is not None and B is not None  # the schema's
    for name, tensor, letters in (("u", u, "b, k, l, d"), ("A", A, "k, d, n"), ("B", B, "b, k, l, g, n")):
        check_dim(name, tensor, letters)
    if combine not in ("none", "sum", "mean"):
        raise ValueError(f"combine must be 'none', 'sum' or 'mean', got {combine!r}")
    b, k, l, d = u.shape
    n, g = A.shape[2], B.shape[3]
    if k > MOST_DIRECTIONS:
        raise ValueError(f"u must have at most {MOST_DIRECTIONS} directions, got {k}")
    if len(reverse) != k:
        raise ValueError(f"reverse must hold a bool for each of the {k} directions, got {list(reverse)}")
    if d % g:
        raise ValueError(f"B must have a number of groups that divides d = {d}, got {g}")
    device, dtype = u.device, (u.dtype,)
    state = (torch.float64,) if u.dtype == torch.float64 else (torch.float32,)
    check("u", u, "b, k, l, d", (b, k, l, d), DTYPES, device)
    check("delta", delta, "b, k, l, d", (b, k, l, d), dtype, device)
    check("A", A, "k, d, n", (k, d, n), state, device)
    check("B", B, "b, k, l, g, n", (b, k, l, g, n), dtype, device)
    check("C", C, "b, k, l, g, n", (b, k, l, g, n), dtype, device)
    check("D", D, "k, d", (k, d), state, device)
    if combine == "none":
        check("z", z, "b, k, l, d", (b, k, l, d), dtype, device)
    else:
        check("z", z, "b, 1, l, d", (b, 1, l, d), dtype, device)
    check("delta_bias", delta_bias, "k, d", (k, d), state, device)
    check("initial_state", initial_state, "b, k, d, n", (b, k, d, n), state, device)


def _native(backend: str) -> Any:
    if backend == "cpu":
        return cpu
    from . import triton_scan  # late: where there is no GPU there may be no triton

    return triton_scan


def _forward(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    *inputs, return_last_state, backend, save = args  # inputs: the nine tensors, delta_softplus, reverse, combine
    _check(inputs[:9], *inputs[10:])
    backend = choose_backend(backend, inputs[0])
    if backend in ("cpu", "triton"):
        return _native(backend).selective_scan(*inputs, return_last_state=return_last_state, save=save)
    run = reference.selective_scan if backend == "reference" else chunked.selective_scan
    y, state = run(*inputs)
    return y, state if return_last_state else state.new_empty(0), y.new_empty(0), y.new_empty(0)


def _forward_fake(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    tensors, (_, reverse, combine, return_last_state, backend, save) = args[:9], args[9:]
    _check(tensors, reverse, combine)
    u, A = tensors[0], tensors[2]
    b, k, l, d = u.shape
    y = u.new_empty(b, k if combine == "none" else 1, l, d)
    state = A.new_empty(b, k, d, A.shape[2]) if return_last_state else A.new_empty(0)
    backend = choose_backend(backend, u)
    if backend in ("cpu", "triton"):
        return y, state, *_native(backend).kept_for_backward(u, A, tensors[6], combine, save)
    return y, state, y.new_empty(0), y.new_empty(0)


def _backward(grad_y: Tensor, grad_state: Tensor | None, ungated: Tensor, saved: Tensor, *args: Any) -> list[Tensor]:
    *inputs, return_last_state, backend = args
    grad_state = grad_state if return_last_state else None
    tensors, options = inputs[:9], inputs[9:]
    backend = choose_backend(backend, tensors[0])
    if backend in ("cpu", "triton"):
        grads = _native(backend).selective_scan_backward(grad_y, grad_state, ungated, saved, *inputs)
    elif backend == "chunked":
        grads = chunked.selective_scan_backward(grad_y, grad_state, *inputs)
    else:
        if grad_state is None:
            u, A = tensors[0], tensors[2]
            grad_state = A.new_zeros(*u.shape[:2], *A.shape[1:])
        grads = reference.differentiate(reference.selective_scan, tensors, options, (grad_y, grad_state))
    return [
        grad_y.new_empty(0) if tensor is None or grad is None else _like_grad(grad, tensor)
        for grad, tensor in zip(grads, tensors, strict=True)
    ]


def _like_grad(grad: Tensor, tensor: Tensor) -> Tensor:
    """The gradient in its tensor's dtype and in the layout the fake kernel promises."""
    return as_rows(grad, tensor.dtype) if tensor.dim() >= 4 else grad.to(tensor.dtype).contiguous()


def _backward_fake(
    grad_y: Tensor, grad_state: Tensor | None, ungated: Tensor, saved: Tensor, *args: Any
) -> list[Tensor]:
    return [
        grad_y.new_empty(0)
        if tensor is None
        else empty_rows(tensor, *tensor.shape)
        if tensor.dim() >= 4
        else tensor.new_empty(tensor.shape)
        for tensor in args[:9]
    ]


class _SelectiveScan(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, Tensor]:
        y, state, ungated, saved = torch.ops.vim.selective_scan_forward(*args, True)
        ctx.save_for_backward(ungated, saved, *args[:9])
        ctx.options = args[9:]
        ctx.set_materialize_grads(False)
        return y, state

    @staticmethod
    def backward(ctx: Any, *grads_out: Tensor | None) -> tuple[Tensor | None, ...]:
        grad_y, grad_state = grads_out
        ungated, saved, *tensors = ctx.saved_tensors
        if grad_y is None:
            shape = list(tensors[0].shape)
            shape[1] = 1 if ctx.options[2] != "none" else shape[1]
            grad_y = tensors[0].new_zeros(shape)
        grads = torch.ops.vim.selective_scan_backward(grad_y, grad_state, ungated, saved, *tensors, *ctx.options)
        needed = ctx.needs_input_grad
        return *(grad if needs else None for grad, needs in zip(grads, needed[:9], strict=True)), *(None,) * 5


def _infer(*args: Any) -> tuple[Tensor, Tensor]:
    y, state, _, _ = torch.ops.vim.selective_scan_forward(*args, False)
    return y, state


def _differentiable(*args: Any) -> tuple[Tensor, Tensor]:
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in args[:9]):
        return _SelectiveScan.apply(*args)
    return _infer(*args)


def _autocast(*args: Any) -> tuple[Tensor, Tensor]:
    """u, delta, B, C, z in the autocast dtype; what the state is made of stays float32."""
    device = args[0].device.type
    low = torch.get_autocast_dtype(device)
    cast = [
        t
        if t is None or t.dtype == torch.float64
        else t.to(low if name in ("u", "delta", "B", "C", "z") else torch.float32)
        for name, t in zip(_NAMES, args[:9], strict=True)
    ]
    with torch.autocast(device, enabled=False):
        return torch.ops.vim.selective_scan(*cast, *args[9:])


_LIB.impl("selective_scan", _infer, "CompositeExplicitAutograd")
_LIB.impl("selective_scan", _differentiable, "Autograd")
_LIB.impl("selective_scan", _autocast, "AutocastCPU")
_LIB.impl("selective_scan", _autocast, "AutocastCUDA")
_LIB.impl("selective_scan_forward", _forward, "CompositeExplicitAutograd")
_LIB.impl("selective_scan_backward", _backward, "CompositeExplicitAutograd")
torch.library.register_fake("vim::selective_scan", lambda *args: _forward_fake(*args, False)[:2], lib=_LIB)
torch.library.register_fake("vim::selective_scan_forward", _forward_fake, lib=_LIB)
torch.library.register_fake("vim::selective_scan_backward", _backward_fake, lib=_LIB)
torch.library.register_autograd("vim::selective_scan_backward", refuse_to_differentiate_again, lib=_LIB)
