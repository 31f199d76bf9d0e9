"""`mamba_ssm.ops.selective_scan_interface` and `selective_scan`: the scan, and Mamba's inner functions made of it.

Sizes: b images, d channels, l tokens, n states, g groups of B and C, r the rank of the step size, w taps.
"""

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from .conv import convolve
from .layout import by_channel, op_inputs, without_autocast
from .norm import rms_norm_fn

__all__ = [
    "BiMambaInnerFn",
    "MambaInnerFn",
    "MambaInnerFnNoOutProj",
    "SelectiveScanFn",
    "bimamba_inner_fn",
    "bimamba_inner_ref",
    "core_scan_fn",
    "mamba_inner_fn",
    "mamba_inner_fn_no_out_proj",
    "mamba_inner_ref",
    "selective_scan_fn",
    "selective_scan_ref",
]


def selective_scan_fn(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool | None = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Scan (b, d, l), and gate with silu(z); see :func:`vim.kernels.selective_scan`.

    Args:
        u, delta, z: (b, d, l), of any floating dtype and any strides.
        A: (d, n).
        B, C: (d, n), (b, n, l) or (b, g, n, l).
        D, delta_bias: (d,).
        return_last_state: also return the state, without gradient.

    Returns:
        A contiguous (b, d, l) in u's dtype; with `return_last_state` also (b, d, n), float32.

    Raises:
        ValueError: a shape is not as above, u holds integers, or A, B or C is complex.
    """
    y, state = _scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus, return_last_state=bool(return_last_state))
    return (y, state) if return_last_state else y


def core_scan_fn(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    nrows: int = 1,
    **options: Any,
) -> Tensor | tuple[Tensor, Tensor]:
    """Run :func:`selective_scan_fn` with the arguments of VMamba's package `selective_scan`, which has no gate.

    Args:
        nrows: without effect.
        options: `z` and `return_last_state`, by name.
    """
    return selective_scan_fn(u, delta, A, B, C, D, delta_bias=delta_bias, delta_softplus=delta_softplus, **options)


@without_autocast
def _scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    *,
    reverse: bool = False,
    return_last_state: bool = False,
) -> tuple[Tensor, Tensor]:
    inputs = op_inputs(u, delta, A, B, C, D, z, delta_bias)
    y, state = torch.ops.vim.selective_scan(
        *inputs, reverse=[int(reverse)], delta_softplus=delta_softplus, return_last_state=return_last_state
    )
    return by_channel(y).to(u.dtype), state.squeeze(1).detach() if return_last_state else state


def mamba_inner_fn_no_out_proj(
    xz: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor | None,
    x_proj_weight: Tensor,
    delta_proj_weight: Tensor,
    A: Tensor,
    B: Tensor | None = None,
    C: Tensor | None = None,
    D: Tensor | None = None,
    delta_bias: Tensor | None = None,
    B_proj_bias: Tensor | None = None,
    C_proj_bias: Tensor | None = None,
    delta_softplus: bool = True,
    checkpoint_lvl: int = 1,
) -> Tensor:
    """Convolve, project, scan and gate: all of a Mamba mixer between its projections in and out.

    Args:
        xz: (b, 2d, l), the values to scan and their gate.
        conv1d_weight: (d, 1, w).
        x_proj_weight: (r + 2n, d), or fewer rows for B or C that are given.
        delta_proj_weight: (d, r).
        B, C: None to project them; otherwise as in :func:`selective_scan_fn`.
        B_proj_bias, C_proj_bias: (n,), added to the projected B and C.
        checkpoint_lvl: without effect; the kernels always compute again what is cheap.

    Returns:
        (b, d, l).
    """
    return _inner(
        (xz, conv1d_weight, conv1d_bias, x_proj_weight, delta_proj_weight),
        *((A,), B, C, D, delta_bias, B_proj_bias, C_proj_bias, delta_softplus),
    )


def mamba_inner_fn(
    xz: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor | None,
    x_proj_weight: Tensor,
    delta_proj_weight: Tensor,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    A: Tensor,
    B: Tensor | None = None,
    C: Tensor | None = None,
    D: Tensor | None = None,
    delta_bias: Tensor | None = None,
    B_proj_bias: Tensor | None = None,
    C_proj_bias: Tensor | None = None,
    delta_softplus: bool = True,
    checkpoint_lvl: int = 1,
    b_rms_weight: Tensor | None = None,
    c_rms_weight: Tensor | None = None,
    dt_rms_weight: Tensor | None = None,
    b_c_dt_rms_eps: float = 1e-6,
) -> Tensor:
    """Run :func:`mamba_inner_fn_no_out_proj`, and project with `out_proj_weight`, (out, d): return (b, l, out).

    Args:
        b_rms_weight, c_rms_weight: (n,), to divide the projected B and C by their root mean square over n.
        dt_rms_weight: (d,), of the projected steps, over d.

    The gradients go through these norms. In the published code they do not, and the weights have none.
    """
    y = _inner(
        (xz, conv1d_weight, conv1d_bias, x_proj_weight, delta_proj_weight),
        *((A,), B, C, D, delta_bias, B_proj_bias, C_proj_bias, delta_softplus),
        norms=(b_rms_weight, c_rms_weight, dt_rms_weight),
        eps=b_c_dt_rms_eps,
    )
    return _project(y, out_proj_weight, out_proj_bias)


def bimamba_inner_fn(
    xz: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor | None,
    x_proj_weight: Tensor,
    delta_proj_weight: Tensor,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    A: Tensor,
    A_b: Tensor,
    B: Tensor | None = None,
    C: Tensor | None = None,
    D: Tensor | None = None,
    delta_bias: Tensor | None = None,
    B_proj_bias: Tensor | None = None,
    C_proj_bias: Tensor | None = None,
    delta_softplus: bool = True,
    checkpoint_lvl: int = 1,
) -> Tensor:
    """Run :func:`mamba_inner_fn` with a second scan of the same tokens backwards, with decays `A_b`; return the sum.

    The gradient of the gate has both scans' parts. In the published code it lacks the backward scan's.
    """
    y = _inner(
        (xz, conv1d_weight, conv1d_bias, x_proj_weight, delta_proj_weight),
        *((A, A_b), B, C, D, delta_bias, B_proj_bias, C_proj_bias, delta_softplus),
    )
    return _project(y, out_proj_weight, out_proj_bias)


def _inner(
    tensors: tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor],
    decays: tuple[Tensor, ...],
    B: Tensor | None,
    C: Tensor | None,
    D: Tensor | None,
    delta_bias: Tensor | None,
    B_proj_bias: Tensor | None,
    C_proj_bias: Tensor | None,
    delta_softplus: bool,
    *,
    norms: tuple[Tensor | None, Tensor | None, Tensor | None] = (None, None, None),
    eps: float = 1e-6,
) -> Tensor:
    """Return the sum of a scan forwards with the first decays and one backwards with the second, if there is one."""
    xz, conv1d_weight, conv1d_bias, x_proj_weight, delta_proj_weight = tensors
    x, z = xz.chunk(2, dim=1)
    x = convolve(x, conv1d_weight.flatten(1), conv1d_bias, silu=True)
    projected = F.linear(x.transpose(1, 2), x_proj_weight)  # (b, l, r + 2n)
    r, n = delta_proj_weight.shape[1], decays[0].shape[1]
    delta = _normed(F.linear(projected[..., :r], delta_proj_weight), norms[2], eps).transpose(1, 2)
    if B is None:
        B = _normed(_with_bias(projected[..., r : r + n], B_proj_bias), norms[0], eps).transpose(1, 2)
    if C is None:
        C = _normed(_with_bias(projected[..., -n:], C_proj_bias), norms[1], eps).transpose(1, 2)
    scans = [
        _scan(x, delta, A, B, C, D, z, delta_bias, delta_softplus, reverse=i == 1)[0] for i, A in enumerate(decays)
    ]
    return sum(scans[1:], scans[0])


def _with_bias(projected: Tensor, bias: Tensor | None) -> Tensor:
    return projected if bias is None else projected + bias.to(projected.dtype)


def _normed(projected: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    return projected if weight is None else cast(Tensor, rms_norm_fn(projected, weight, None, eps=eps))


def _project(y: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.linear(y.transpose(1, 2), weight.to(y.dtype), None if bias is None else bias.to(y.dtype))


selective_scan_ref, mamba_inner_ref, bimamba_inner_ref = selective_scan_fn, mamba_inner_fn, bimamba_inner_fn


class SelectiveScanFn(torch.autograd.Function):
    """The published autograd function: `SelectiveScanFn.apply` is :func:`selective_scan_fn`."""

    apply = staticmethod(selective_scan_fn)


class MambaInnerFn(torch.autograd.Function):
    """`MambaInnerFn.apply` is :func:`mamba_inner_fn`."""

    apply = staticmethod(mamba_inner_fn)


class MambaInnerFnNoOutProj(torch.autograd.Function):
    """`MambaInnerFnNoOutProj.apply` is :func:`mamba_inner_fn_no_out_proj`."""

    apply = staticmethod(mamba_inner_fn_no_out_proj)


class BiMambaInnerFn(torch.autograd.Function):
    """`BiMambaInnerFn.apply` is :func:`bimamba_inner_fn`."""

    apply = staticmethod(bimamba_inner_fn)
