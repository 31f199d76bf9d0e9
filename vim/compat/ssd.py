"""`mamba_ssm.ops.triton.ssd_combined` and `selective_state_update`: Mamba-2's scan, and one step of either scan.

Sizes: b images, l tokens, h heads of p channels, g groups of B and C, n states, w taps.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vim.kernels import ssd

from .conv import causal_conv1d_fn
from .layout import state_dtype, widest, without_autocast
from .norm import rmsnorm_fn

Limit = tuple[float, float]
NO_LIMIT = (0.0, math.inf)


@without_autocast
def mamba_chunk_scan_combined(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    chunk_size: int,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    initial_states: Tensor | None = None,
    seq_idx: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: Limit = NO_LIMIT,
    return_final_states: bool = False,
    return_varlen_states: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Scan with one decay a head (https://arxiv.org/abs/2405.21060).

    Args:
        x, z: (b, l, h, p).
        dt: (b, l, h); dt_bias: (h,); `dt_limit` is applied last.
        A: (h,).
        B, C: (b, l, g, n).
        chunk_size: without effect on the result.
        D: (h,) or (h, p).
        initial_states: (b, h, p, n).

    Returns:
        (b, l, h, p) in x's dtype; with `return_final_states` also the state (b, h, p, n), float32.

    Raises:
        NotImplementedError: several sequences in one: `seq_idx` or `cu_seqlens`.
    """
    if seq_idx is not None or cu_seqlens is not None or return_varlen_states:
        raise NotImplementedError(
            "vim.compat serves Mamba-2's scan without seq_idx and cu_seqlens: give one sequence a row"
        )
    if 0 in x.shape:
        raise ValueError(f"x must be (b, l, h, p), not empty, got {tuple(x.shape)}")
    dtype = widest(x, dt, B, C, z)
    wide = state_dtype(dtype)
    y, state = ssd(
        *(x.to(dtype), dt.to(dtype), A.to(wide), B.to(dtype), C.to(dtype)),
        D=None if D is None else D.to(wide),
        z=None if z is None else z.to(dtype),
        dt_bias=None if dt_bias is None else dt_bias.to(wide),
        dt_softplus=dt_softplus,
        dt_limit=dt_limit,
        initial_state=None if initial_states is None else initial_states.to(wide),
        return_last_state=True,
    )
    y = y.to(x.dtype)
    return (y, state) if return_final_states else y


def mamba_split_conv1d_scan_combined(
    zxbcdt: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor | None,
    dt_bias: Tensor,
    A: Tensor,
    D: Tensor,
    chunk_size: int,
    initial_states: Tensor | None = None,
    seq_idx: Tensor | None = None,
    dt_limit: Limit = NO_LIMIT,
    return_final_states: bool = False,
    activation: str | None = "silu",
    rmsnorm_weight: Tensor | None = None,
    rmsnorm_eps: float = 1e-6,
    outproj_weight: Tensor | None = None,
    outproj_bias: Tensor | None = None,
    headdim: int | None = None,
    ngroups: int = 1,
    norm_before_gate: bool = True,
) -> Tensor | tuple[Tensor, Tensor]:
    """Run all of a Mamba-2 mixer behind its projection in: convolution, scan, gate or gated norm, projection out.

    Args:
        zxbcdt: (b, l, 2m + 2e + 2gn + h), with e = h p: a gated MLP's halves if m > 0, the gate, the values, B, C, dt.
        conv1d_weight: (e + 2gn, w).
        D: (h,) or (h, p). With one number a head, `headdim` says p.
        rmsnorm_weight: (e,), for a gated norm in place of the gate.
        outproj_weight: (out, m + e).

    Returns:
        (b, l, out), or (b, l, m + e) without `outproj_weight`; with `return_final_states` also (b, h, p, n).

    Raises:
        NotImplementedError: `seq_idx` is given.
    """
    heads = A.shape[0]
    p = D.shape[1] if D.dim() == 2 else headdim
    if p is None:
        raise ValueError("mamba_split_conv1d_scan_combined needs headdim where D is (heads,)")
    e = heads * p
    width = conv1d_weight.shape[0] - e  # of B and C
    extra = (zxbcdt.shape[-1] - 2 * e - width - heads) // 2
    z0, x0, z, xbc, dt = zxbcdt.split([extra, extra, e, e + width, heads], dim=-1)
    xbc = causal_conv1d_fn(xbc.transpose(1, 2), conv1d_weight, conv1d_bias, activation=activation)
    x, B, C = xbc.transpose(1, 2).split([e, width // 2, width // 2], dim=-1)  # type: ignore[union-attr]
    scanned = mamba_chunk_scan_combined(
        x.unflatten(-1, (heads, p)),
        dt,
        A,
        B.unflatten(-1, (ngroups, -1)),
        C.unflatten(-1, (ngroups, -1)),
        chunk_size,
        D=D,
        z=z.unflatten(-1, (heads, p)) if rmsnorm_weight is None else None,
        dt_bias=dt_bias,
        initial_states=initial_states,
        seq_idx=seq_idx,
        dt_softplus=True,
        dt_limit=dt_limit,
        return_final_states=return_final_states,
    )
    y, state = scanned if isinstance(scanned, tuple) else (scanned, None)
    y = y.flatten(2)
    if rmsnorm_weight is not None:
        y = rmsnorm_fn(y, rmsnorm_weight, None, z, rmsnorm_eps, e // ngroups, norm_before_gate)
    if extra > 0:
        y = torch.cat([F.silu(z0) * x0, y], dim=-1)
    if outproj_weight is not None:
        y = F.linear(y, outproj_weight, outproj_bias)
    return y if state is None else (y, state)


class MambaChunkScanCombinedFn(torch.autograd.Function):
    """`MambaChunkScanCombinedFn.apply` is :func:`mamba_chunk_scan_combined`."""

    @staticmethod
    def apply(*args: Any, **options: Any) -> Any:
        """Run it, without `cu_seqlens` in the order of version 2.0."""
        if len(args) > 11 and isinstance(args[11], bool):
            args = *args[:11], None, *args[11:]
        return mamba_chunk_scan_combined(*args, **options)


class MambaSplitConv1dScanCombinedFn(torch.autograd.Function):
    """`MambaSplitConv1dScanCombinedFn.apply` is :func:`mamba_split_conv1d_scan_combined`."""

    apply = staticmethod(mamba_split_conv1d_scan_combined)


@torch.no_grad()
@without_autocast
def selective_state_update(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    state_batch_indices: Tensor | None = None,
) -> Tensor:
    """Take one token into a state, in place, and return its output.

    Args:
        state: (b, d, n); or (b, h, p, n), and then d is (h, p) below.
        x, dt, z: (b, d).
        A: (d, n).
        B, C: (b, n), or (b, g, n) for g groups of heads.
        D, dt_bias: (d,).
        state_batch_indices: (b,), the row of `state` for each sequence.
    """
    if state_batch_indices is not None:
        rows = state[state_batch_indices]
        y = selective_state_update(rows, x, dt, A, B, C, D, z, dt_bias, dt_softplus)
        state[state_batch_indices] = rows
        return y
    wide = state_dtype(state.dtype)
    dt = dt.to(wide) if dt_bias is None else dt.to(wide) + dt_bias
    dt = F.softplus(dt) if dt_softplus else dt
    if state.dim() == 3 or B.dim() == 2:
        B, C = (t.view(t.shape[0], *[1] * (state.dim() - 2), t.shape[-1]) for t in (B, C))
    else:
        B, C = (t.repeat_interleave(state.shape[1] // t.shape[1], dim=1).unsqueeze(2) for t in (B, C))
    new = state.to(wide) * torch.exp(dt.unsqueeze(-1) * A) + (dt * x.to(wide)).unsqueeze(-1) * B
    state.copy_(new)
    y = (new * C).sum(-1)
    y = y if D is None else y + D * x
    return (y if z is None else y * F.silu(z.to(wide))).to(x.dtype)


def ssd_minimal_discrete(
    X: Tensor, A: Tensor, B: Tensor, C: Tensor, block_len: int, initial_states: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Scan values that are multiplied by their steps already, block by block: listing 1 of the paper.

    Args:
        X: (b, l, h, p).
        A: (b, l, h), the logarithms of the decays.
        B, C: (b, l, h, n).
        block_len: the tokens of a block.
        initial_states: (b, 1, h, p, n).

    Returns:
        (b, l, h, p), and the state (b, h, p, n).
    """
    state = X.new_zeros(*X.shape[::2], X.shape[3], B.shape[3]) if initial_states is None else initial_states.squeeze(1)
    ys = []
    for x, a, b, c in zip(*(t.split(block_len, dim=1) for t in (X, A, B, C)), strict=True):
        total = a.cumsum(1)
        later = torch.ones(len(total[0]), len(total[0]), dtype=torch.bool, device=X.device).triu(1)
        decay = (total.unsqueeze(2) - total.unsqueeze(1)).masked_fill(later[..., None], -math.inf).exp()
        from_state = torch.einsum("bihn,bhpn,bih->bihp", c, state, total.exp())
        ys.append(torch.einsum("bihn,bjhn,bijh,bjhp->bihp", c, b, decay, x) + from_state)
        kept = state * total[:, -1].exp()[..., None, None]
        state = kept + torch.einsum("bjhn,bjh,bjhp->bhpn", b, (total[:, -1:] - total).exp(), x)
    return torch.cat(ys, 1), state
