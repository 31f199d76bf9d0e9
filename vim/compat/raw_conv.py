"""`causal_conv1d_cuda` and `causal_conv1d.cpp_functions`: the compiled extension of every version.

The versions are told apart by the number of arguments. Sizes: b images, d channels, l tokens, w taps.
"""

from typing import Any, cast

import torch
from torch import Tensor

from .conv import causal_conv1d_fn, causal_conv1d_update
from .layout import by_channel, by_token, widest, without_autocast

Maybe = Tensor | None


def _refuse(function: str, args: tuple[Any, ...], known: str) -> TypeError:
    return TypeError(f"{function} of vim.compat takes {known} arguments, got {len(args)}")


@torch.no_grad()
def causal_conv1d_fwd(*args: Any) -> Maybe:
    """Convolve (b, d, l) and, with the last argument, apply SiLU.

    Version 1.0: (x, weight, bias, silu). 1.1: seq_idx before silu. 1.2: (..., seq_idx, initial_states,
    final_states_out, silu). 1.5: (..., seq_idx, initial_states, out, final_states_out, silu), which writes `out` and
    returns None.

    Raises:
        TypeError: another number of arguments.
    """
    if len(args) not in (4, 5, 7, 8):
        raise _refuse("causal_conv1d_fwd", args, "4, 5, 7 or 8")
    x, weight, bias, *rest, silu = args
    seq_idx, initial, *outputs = (*rest, None, None) if len(rest) < 2 else rest
    final = outputs[-1] if outputs and len(args) > 5 else None
    return_final = final is not None
    y = causal_conv1d_fn(x, weight, bias, seq_idx, initial, return_final, final, "silu" if silu else None)
    y = y[0] if isinstance(y, tuple) else y
    if len(args) < 8:
        return y
    outputs[0].copy_(y)
    return None


@without_autocast
def causal_conv1d_bwd(*args: Any) -> tuple[Maybe, ...] | None:
    """Return the gradients of x, weight and bias; those that come with memory are written there.

    Version 1.0: (x, weight, bias, dout, dx, silu). 1.1: seq_idx before dx. 1.2: (x, weight, bias, dout, seq_idx,
    initial_states, dfinal_states, dx, return_dinitial_states, silu), which also returns the gradient of the initial
    states. 1.5: (..., dfinal_states, dx, dweight, dbias, dinitial_states, silu), which returns None.

    Raises:
        TypeError: another number of arguments.
    """
    if len(args) not in (6, 7, 10, 12):
        raise _refuse("causal_conv1d_bwd", args, "6, 7, 10 or 12")
    x, weight, bias, dout, *rest, silu = args
    seq_idx = rest[0] if len(args) > 6 else None
    if len(args) < 10:
        return _gradients(x, weight, bias, dout, rest[-1], silu, seq_idx, None, None, False)[:3]
    _, initial, dfinal, dx, *last = rest
    if len(args) == 10:
        return _gradients(x, weight, bias, dout, dx, silu, seq_idx, initial, dfinal, bool(last[0]))
    grads = _gradients(x, weight, bias, dout, dx, silu, seq_idx, initial, dfinal, last[2] is not None)
    for memory, grad in zip(last, grads[1:], strict=True):
        if memory is not None and grad is not None:
            memory.copy_(grad)
    return None


def _gradients(
    x: Tensor,
    weight: Tensor,
    bias: Maybe,
    dout: Tensor,
    dx: Maybe,
    silu: bool,
    seq_idx: Maybe,
    initial: Maybe,
    dfinal: Maybe,
    want_initial: bool,
) -> tuple[Maybe, Maybe, Maybe, Maybe]:
    """Return the gradients of x, weight, bias and the initial states; dx is written in place if it is given."""
    if seq_idx is not None:
        return _of_sequences(x, weight, bias, dout, dx, silu, seq_idx)
    before, l = weight.shape[1] - 1, x.shape[2]
    dtype = widest(x, weight, bias) if x.dtype.itemsize > 2 else x.dtype
    tokens = x if initial is None else torch.cat([initial.to(x.dtype), x], dim=2)
    grad = dout if initial is None else torch.nn.functional.pad(dout, (before, 0))
    with torch.no_grad():
        taps, shift = (None if t is None else t.to(dtype).unsqueeze(0) for t in (weight, bias))
        dtokens, dweight, dbias = torch.ops.vim.causal_conv1d_backward(
            by_token(grad, dtype), by_token(tokens, dtype), taps, shift, reverse=[0], silu=bool(silu)
        )
        dtokens = by_channel(dtokens).to(x.dtype)
        if dfinal is not None:
            reached = min(before, dtokens.shape[2])
            dtokens[:, :, dtokens.shape[2] - reached :] += dfinal[:, :, before - reached :]
        grad_x, grad_initial = dtokens[:, :, dtokens.shape[2] - l :], dtokens[:, :, :before]
        return (
            grad_x if dx is None else dx.copy_(grad_x),
            dweight.squeeze(0).to(weight.dtype),
            None if bias is None else dbias.squeeze(0).to(bias.dtype),
            grad_initial if want_initial and initial is not None else None,
        )


def _of_sequences(
    x: Tensor, weight: Tensor, bias: Maybe, dout: Tensor, dx: Maybe, silu: bool, seq_idx: Tensor
) -> tuple[Maybe, Maybe, Maybe, Maybe]:
    with torch.enable_grad():
        x, weight = x.detach().requires_grad_(), weight.detach().requires_grad_()
        bias = None if bias is None else bias.detach().requires_grad_()
        y = cast(Tensor, causal_conv1d_fn(x, weight, bias, seq_idx, activation="silu" if silu else None))
    grad_x, *others = torch.autograd.grad(y, [t for t in (x, weight, bias) if t is not None], dout)
    dweight, dbias = (*others, None)[:2]
    return grad_x if dx is None else dx.copy_(grad_x), dweight, dbias, None


@torch.no_grad()
def causal_conv1d_update_raw(*args: Any) -> Maybe:
    """Convolve the next tokens: (x, conv_state, weight, bias, silu).

    Since version 1.4 with `cache_seqlens` and `conv_state_indices`; since 1.5 with `out`, which is written.

    Raises:
        TypeError: another number of arguments.
    """
    if len(args) not in (5, 6, 7, 8):
        raise _refuse("causal_conv1d_update", args, "5 to 8")
    x, state, weight, bias, silu, *rest = args
    out = None
    if len(args) == 8:  # out is fifth
        out, silu, *rest = args[4:]
    y = causal_conv1d_update(x, state, weight, bias, "silu" if silu else None, *rest)
    if out is None:
        return y
    out.copy_(y)
    return None
