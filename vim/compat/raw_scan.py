"""`selective_scan_cuda` and its variants: the compiled extensions, as autograd functions of published code call them.

`SelectiveScan` has a gate z. `Core` has none; `Oflex` also chooses the dtype of its output, and takes steps for groups
of channels. Nothing here is differentiated: it runs inside the caller's autograd function.

Sizes: b images, d channels, l tokens, n states, g groups of B and C.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.nn.functional import silu

from vim.kernels.scan.reference import Options
from vim.kernels.scan.states import longest_run

from .layout import (
    Maybe,
    OpInputs,
    by_channel,
    by_token,
    check_shape,
    check_tokens,
    op_inputs,
    state_dtype,
    without_autocast,
)

MaybeTensor = TypeVar("MaybeTensor", Tensor, Maybe)


class _Part(NamedTuple):
    """What the backward pass of a run of tokens needs besides its inputs, which the caller keeps or computes again."""

    before: Tensor | None  # the state (b, 1, d, n)
    ungated: Tensor
    saved: Tensor


@torch.no_grad()
@without_autocast
def _forward(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Maybe,
    z: Maybe,
    delta_bias: Maybe,
    softplus: bool,
    *,
    state: Maybe = None,
    save: bool | None = None,
) -> tuple[Tensor, Tensor, Maybe]:
    """Return the output before the gate, (b, d, l), the states, (b, d, chunks, 2n), and the gated output if there is z.

    `state`, (b, d, n), is before the first token; by default zeros.
    The states are float32, one for every 2048 tokens: after each product of the decays so far, the state. With `save`,
    what the backward pass needs goes with them, as an attribute. By default it does if it looks as if there will be a
    backward pass; otherwise :func:`_backward` computes it again.
    """
    if save is None:
        save = any(t is not None and t.requires_grad for t in (u, delta, A, B, C, z))
    inputs = op_inputs(u, delta, A, B, C, D, z, delta_bias)
    check_shape(state, "the state", "b, d, n", (u.shape[0], *A.shape))
    parts, outputs, before = [], [], None if state is None else state.to(inputs[2].dtype).unsqueeze(1)
    chunks: list[tuple[Tensor, Tensor]] = []  # sums of step sizes from the first token on, and states
    options = Options(reverse=[False], delta_softplus=softplus)
    for _, cut in _runs(inputs):
        y, states, elapsed, ungated, saved = torch.ops.vim.selective_scan_with_states(
            *cut, before, **options._asdict(), save=save
        )
        parts.append(_Part(before, ungated, saved))
        outputs.append((y, y if z is None else _without_gate(cut, ungated, before, options).to(y.dtype)))
        chunks.append((elapsed if not chunks else chunks[-1][0][:, :, -1:] + elapsed, states))
        before = states[:, :, -1]
    elapsed, states = (torch.cat(each, dim=2).squeeze(1) for each in zip(*chunks, strict=True))
    x = _chunk_states(elapsed, states, inputs[2])
    if save:
        x._parts = parts  # type: ignore[attr-defined]
    gated, out = (_join([by_channel(y) for y in ys]) for ys in zip(*outputs, strict=True))
    return out, x, None if z is None else gated


def _chunk_states(elapsed: Tensor, states: Tensor, A: Tensor) -> Tensor:
    """Return (b, d, c, 2n) in float32, of step sizes that were added up, (b, c, d), and states, (b, c, d, n).

    A is (1, d, n).
    """
    x = states.new_empty(*states.shape, 2, dtype=torch.float32)  # torch.stack takes many times as long
    x[..., 0] = torch.exp(elapsed.unsqueeze(3) * A)
    x[..., 1] = states
    return x.flatten(3).transpose(1, 2).contiguous()


def _without_gate(inputs: OpInputs, ungated: Tensor, state: Maybe, options: Options) -> Tensor:
    """Return the output before the gate: what the kernel kept, or, from a backend that keeps nothing, another scan."""
    if ungated.numel():
        return ungated
    *before, _, delta_bias = inputs
    scan = torch.ops.vim.selective_scan_forward
    return scan(*before, None, delta_bias, state, **options._asdict(), save=False)[0]


def _runs(inputs: OpInputs) -> Iterator[tuple[slice, OpInputs]]:
    """Yield the tokens in runs, and the inputs of each."""
    length = longest_run(inputs[0])
    for start in range(0, max(inputs[0].shape[2], 1), length):
        tokens = slice(start, start + length)
        cut = (t if t is None or t.dim() < 4 else t[:, :, tokens] for t in inputs)
        yield tokens, tuple(cut)  # type: ignore[misc]


def _join(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), dim=2)


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
    x: Maybe,
    softplus: bool,
    state: Maybe = None,
) -> list[Maybe]:
    """Return the gradients of the eight inputs, in their shapes and dtypes.

    If the states `x` are not those of :func:`_forward`, as after activation checkpointing, they are computed again.
    """
    parts = getattr(x, "_parts", None)
    if parts is None:
        x = _forward(u, delta, A, B, C, D, z, delta_bias, softplus, state=state, save=True)[1]
        parts = x._parts  # type: ignore[attr-defined]
    grads, dstate = [], None
    inputs = op_inputs(u, delta, A, B, C, D, z, delta_bias)
    for part, (tokens, cut) in zip(reversed(parts), reversed(list(_runs(inputs))), strict=True):
        *given, dstate = torch.ops.vim.selective_scan_backward(
            by_token(dout[:, :, tokens], inputs[0].dtype),
            *(dstate, part.ungated, part.saved, *cut, part.before),
            reverse=[0],
            delta_softplus=softplus,
            return_last_state=dstate is not None,
        )
        grads.append(given)
    du, ddelta, dA, dB, dC, dD, dz, dbias = zip(*reversed(grads), strict=True)
    return [
        _join([by_channel(grad) for grad in du]).to(u.dtype),
        _join([by_channel(grad) for grad in ddelta]).to(delta.dtype),
        sum(dA).squeeze(0).to(A.dtype),
        _ungrouped(_join(dB), B),
        _ungrouped(_join(dC), C),
        None if D is None else sum(dD).squeeze(0).to(D.dtype),
        None if z is None else _join([by_channel(grad) for grad in dz]).to(z.dtype),
        None if delta_bias is None else sum(dbias).squeeze(0).to(delta_bias.dtype),
    ]


def _ungrouped(grad: Tensor, B: Tensor) -> Tensor:
    """Return the gradient (b, 1, l, g, n) of B or C in the published shape."""
    groups = {2: B.shape[0], 3: 1, 4: B.shape[1]}[B.dim()]
    grad = grad.squeeze(1)
    grad = grad if grad.shape[2] == groups else grad.unflatten(2, (groups, -1)).sum(3)
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
        state: Tensor | int | None = None,
    ) -> list[Tensor]:
        """Return [out, x], or [out, x, out_z] with a gate: the output, the states, the gated output.

        See :func:`vim.compat.scan.selective_scan_fn` for the shapes. out and out_z are in u's dtype. `state` is
        MambaByte's, before the first token, (b, d, n). VMamba's first build has a number there, without effect.
        """
        before = state if isinstance(state, Tensor) else None
        out, x, gated = _forward(u, delta, A, B, C, D, z, delta_bias, delta_softplus, state=before)
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
        state: Maybe = None,
    ) -> list[Maybe]:
        """Return the gradients of u, delta, A, B, C, D and delta_bias; with a gate also dz, and out_z if it is wanted.

        dz is written in place if it is given: callers read it through the tensor of which it is a part.
        """
        *grads, grad_z, grad_bias = _backward(u, delta, A, B, C, D, z, delta_bias, dout, x, delta_softplus, state)
        result = [*grads, grad_bias]
        if grad_z is not None and z is not None:
            result.append(grad_z if dz is None else dz.copy_(grad_z))
            if recompute_out_z and out is not None:
                result.append((out * silu(z.to(out.dtype))).to(u.dtype))
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
        nrows: int = 1,
    ) -> list[Tensor]:
        """Return [out, x]; `nrows`, which VMamba's first build does not have, is without effect."""
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
        delta_softplus: bool | None,
        nrows: int = 1,
    ) -> list[Maybe]:
        """Return the gradients of u, delta, A, B, C, D and delta_bias.

        VMamba's first build ends with `out`, which is None, and then `delta_softplus`.
        """
        delta_softplus = bool(nrows if delta_softplus is None else delta_softplus)
        return SelectiveScan.bwd(*(u, delta, A, B, C, D, None, delta_bias, dout, x, None, None, delta_softplus, False))


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
        check_tokens(u, "u")
        r = _channels_of_a_step(u, delta)
        dtype = state_dtype(u.dtype) if out_float else u.dtype  # of the scan too: 16 bits in between lose the digits
        out, x, _ = _forward(u.to(dtype), _repeat(delta, r), A, B, C, D, None, _repeat(delta_bias, r), delta_softplus)
        return [out.to(dtype), x]

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
        r = _channels_of_a_step(u, delta)
        u_like_dout = u.to(dout.dtype)
        du, ddelta, dA, dB, dC, dD, _, dbias = _backward(
            *(u_like_dout, _repeat(delta, r), A, B, C, D, None, _repeat(delta_bias, r), dout, x, delta_softplus)
        )
        return [None if du is None else du.to(u.dtype), _add_up(ddelta, r), dA, dB, dC, dD, _add_up(dbias, r)]


def _channels_of_a_step(u: Tensor, delta: Tensor) -> int:
    return max(u.shape[1] // delta.shape[1], 1)


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
