"""`selective_scan_cuda` and its variants: the compiled extensions, as autograd functions of published code call them.

`SelectiveScan` has a gate z. `Core` has none; `Oflex` also chooses the dtype of its output, and takes steps for groups
of channels. Nothing here is differentiated: it runs inside the caller's autograd function.

Sizes: b images, d channels, l tokens, n states, g groups of B and C.
"""

from typing import TypeVar

import torch
from torch import Tensor

from .layout import Maybe, by_channel, by_token, op_inputs, state_dtype, without_autocast

CHUNK = 2048  # tokens between two states that are returned

MaybeTensor = TypeVar("MaybeTensor", Tensor, Maybe)


@torch.no_grad()
@without_autocast
def _forward(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Maybe, z: Maybe, delta_bias: Maybe, softplus: bool
) -> tuple[Tensor, Tensor, Maybe]:
    """Return the output before the gate, (b, d, l), the states, (b, d, chunks, 2n), and the gated output if there is z.

    The states are float32, one for every 2048 tokens: after each product of the decays so far, the state.
    """
    inputs = op_inputs(u, delta, A, B, C, D, z, delta_bias)
    b, _, l, d = inputs[0].shape
    n, dtype = A.shape[1], inputs[0].dtype
    x = inputs[2].new_empty(b, d, max(-(-l // CHUNK), 1), 2 * n)
    out = u.new_empty(b, d, l, dtype=dtype)
    gated = None if z is None else u.new_empty(b, d, l, dtype=dtype)
    state, elapsed = None, x.new_zeros(b, d)
    for i, start in enumerate(range(0, max(l, 1), CHUNK)):
        tokens = slice(start, start + CHUNK)
        part = [t if t is None or t.dim() < 4 else t[:, :, tokens] for t in inputs]
        y, state, ungated, _ = torch.ops.vim.selective_scan_forward(
            *part, state, reverse=[0], delta_softplus=softplus, return_last_state=True, save=z is not None
        )
        elapsed = elapsed + _elapsed(inputs[1][:, :, tokens], inputs[7], softplus)
        x[:, :, i, ::2] = torch.exp(elapsed.unsqueeze(2) * inputs[2])
        x[:, :, i, 1::2] = state.squeeze(1)
        out[:, :, tokens] = (y if z is None else ungated).squeeze(1).transpose(1, 2)
        if gated is not None:
            gated[:, :, tokens] = y.squeeze(1).transpose(1, 2)
    return out, x.float(), gated


def _elapsed(delta: Tensor, delta_bias: Maybe, softplus: bool) -> Tensor:
    """Return the sums of the steps (b, 1, l, d) over the tokens, (b, d)."""
    dt = delta.to(state_dtype(delta.dtype))
    dt = dt if delta_bias is None else dt + delta_bias
    return (torch.nn.functional.softplus(dt) if softplus else dt).sum(2).squeeze(1)


@torch.no_grad()
@without_autocast
def _backward(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Maybe,
    z: Maybe,
    delta_bias: Maybe,
    dout: Tensor,
    softplus: bool,
) -> tuple[list[Maybe], Tensor]:
    """Return the gradients of the eight inputs in their own shapes and dtypes, and the gated output.

    The states that the forward pass returned are not needed: activation checkpointing may have lost them.
    """
    inputs = op_inputs(u, delta, A, B, C, D, z, delta_bias)
    options = {"reverse": [0], "delta_softplus": softplus}
    y, _, ungated, saved = torch.ops.vim.selective_scan_forward(*inputs, **options, save=True)
    grads = torch.ops.vim.selective_scan_backward(
        by_token(dout, inputs[0].dtype), None, ungated, saved, *inputs, **options
    )
    du, ddelta, dA, dB, dC, dD, dz, dbias, _ = grads
    return [
        by_channel(du).to(u.dtype),
        by_channel(ddelta).to(delta.dtype),
        dA.squeeze(0).to(A.dtype),
        _ungrouped(dB, B),
        _ungrouped(dC, C),
        None if D is None else dD.squeeze(0),
        None if z is None else by_channel(dz).to(z.dtype),
        None if delta_bias is None else dbias.squeeze(0),
    ], by_channel(y)


def _ungrouped(grad: Tensor, B: Tensor) -> Tensor:
    """Return the gradient (b, 1, l, g, n) of B or C in the published shape."""
    groups = {2: B.shape[0], 3: 1, 4: B.shape[1]}[B.dim()]
    grad = grad.squeeze(1).unflatten(2, (groups, -1)).sum(3)
    if B.dim() == 2:
        return grad.sum((0, 1)).to(B.dtype)
    grad = grad.permute(0, 2, 3, 1)
    return (grad.squeeze(1) if B.dim() == 3 else grad).to(B.dtype).contiguous()


class SelectiveScan:
    """`selective_scan_cuda`."""

    @staticmethod
    def fwd(
        u: Tensor,
        delta: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Maybe,
        z: Maybe,
        delta_bias: Maybe,
        delta_softplus: bool,
    ) -> list[Tensor]:
        """Return [out, x], or [out, x, out_z] with a gate: the output, the states, the gated output.

        See :func:`vim.compat.scan.selective_scan_fn` for the shapes. out and out_z are in u's dtype.
        """
        out, x, gated = _forward(u, delta, A, B, C, D, z, delta_bias, delta_softplus)
        return [out.to(u.dtype), x] if gated is None else [out.to(u.dtype), x, gated.to(u.dtype)]

    @staticmethod
    def bwd(
        u: Tensor,
        delta: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Maybe,
        z: Maybe,
        delta_bias: Maybe,
        dout: Tensor,
        x: Maybe,
        out: Maybe,
        dz: Maybe,
        delta_softplus: bool,
        recompute_out_z: bool,
    ) -> list[Maybe]:
        """Return the gradients of u, delta, A, B, C, D and delta_bias; with a gate also dz, and out_z if it is wanted.

        dz is written in place if it is given: callers read it through the tensor of which it is a part.
        """
        grads, gated = _backward(u, delta, A, B, C, D, z, delta_bias, dout, delta_softplus)
        *grads, grad_z, grad_bias = grads
        result = [*grads, grad_bias]
        if grad_z is not None:
            result.append(grad_z if dz is None else dz.copy_(grad_z))
            if recompute_out_z:
                result.append(gated.to(u.dtype))
        return result


class Core:
    """`selective_scan_cuda_core`, `_ndstate` and `_nrow`."""

    @staticmethod
    def fwd(
        u: Tensor,
        delta: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Maybe,
        delta_bias: Maybe,
        delta_softplus: bool,
        nrows: int,
    ) -> list[Tensor]:
        """Return [out, x]; `nrows` is without effect."""
        return SelectiveScan.fwd(u, delta, A, B, C, D, None, delta_bias, delta_softplus)

    @staticmethod
    def bwd(
        u: Tensor,
        delta: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Maybe,
        delta_bias: Maybe,
        dout: Tensor,
        x: Maybe,
        delta_softplus: bool,
        nrows: int,
    ) -> list[Maybe]:
        """Return the gradients of u, delta, A, B, C, D and delta_bias."""
        return SelectiveScan.bwd(
            *(u, delta, A, B, C, D, None, delta_bias, dout, None, None, None, delta_softplus, False)
        )


class Oflex:
    """`selective_scan_cuda_oflex`: delta may be (b, d / r, l) and delta_bias (d / r,), shared by r channels each."""

    @staticmethod
    def fwd(
        u: Tensor,
        delta: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Maybe,
        delta_bias: Maybe,
        delta_softplus: bool,
        nrows: int,
        out_float: bool,
    ) -> list[Tensor]:
        """Return [out, x]; out is float32 with `out_float`, otherwise in u's dtype."""
        r = u.shape[1] // delta.shape[1]
        out, x, _ = _forward(u, _repeat(delta, r), A, B, C, D, None, _repeat(delta_bias, r), delta_softplus)
        return [out.float() if out_float and out.dtype != torch.float64 else out.to(u.dtype), x]

    @staticmethod
    def bwd(
        u: Tensor,
        delta: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Maybe,
        delta_bias: Maybe,
        dout: Tensor,
        x: Maybe,
        delta_softplus: bool,
        nrows: int,
    ) -> list[Maybe]:
        """Return the gradients of u, delta, A, B, C, D and delta_bias, each in its tensor's shape and dtype."""
        r = u.shape[1] // delta.shape[1]
        (du, ddelta, dA, dB, dC, dD, _, dbias), _ = _backward(
            *(u, _repeat(delta, r), A, B, C, D, None, _repeat(delta_bias, r), dout, delta_softplus)
        )
        return [du, _add_up(ddelta, r), dA, dB, dC, dD, _add_up(dbias, r)]


def _repeat(x: MaybeTensor, r: int) -> MaybeTensor:
    """Repeat each channel of (b, d / r, l) or (d / r,) r times."""
    return x if x is None or r == 1 else x.repeat_interleave(r, dim=0 if x.dim() == 1 else 1)


def _add_up(grad: Maybe, r: int) -> Maybe:
    """Undo :func:`_repeat` for a gradient."""
    return (
        grad
        if grad is None or r == 1
        else grad.unflatten(0 if grad.dim() == 1 else 1, (-1, r)).sum(1 if grad.dim() == 1 else 2)
    )
