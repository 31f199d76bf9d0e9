"""`causal_conv1d`: the depthwise causal convolution in the published layout.

Sizes: b images, d channels, l tokens, w taps.
"""

from typing import Any

import torch
from torch import Tensor

from .layout import by_channel, by_token, check_shape, check_tokens, state_dtype, widest, without_autocast

__all__ = [
    "causal_conv1d_fn",
    "causal_conv1d_ref",
    "causal_conv1d_update",
    "causal_conv1d_update_ref",
    "causal_conv1d_varlen_states",
]


@without_autocast
def causal_conv1d_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    seq_idx: Tensor | str | None = None,
    initial_states: Tensor | None = None,
    return_final_states: bool = False,
    final_states_out: Tensor | None = None,
    activation: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Convolve (b, d, l) with (d, w), and apply the activation; see :func:`vim.kernels.causal_conv1d`.

    Args:
        seq_idx: (b, l), integers: the sequence of each token, which takes in no token of another one; below 0 for
            padding, whose output is 0. Or the activation, which was the fourth argument in version 1.0.
        initial_states: (b, d, w - 1), the tokens before the first; by default zeros.
        return_final_states: also return the last w - 1 tokens, (b, d, w - 1).
        final_states_out: where to write them.
        activation: None, "silu" or "swish".

    Returns:
        A contiguous (b, d, l) in x's dtype.

    Raises:
        ValueError: another shape or activation; integers; or `seq_idx` with states.
    """
    if isinstance(seq_idx, str):
        seq_idx, activation = None, seq_idx
    silu = is_silu(activation)
    _check(x, weight, bias)
    b, d, l = x.shape
    check_shape(seq_idx, "seq_idx", "b, l", (b, l))
    for states, name in ((initial_states, "initial_states"), (final_states_out, "final_states_out")):
        check_shape(states, name, "b, d, w - 1", (b, d, weight.shape[1] - 1))
    if seq_idx is not None:
        if initial_states is not None or return_final_states:
            raise ValueError("seq_idx goes without initial_states and return_final_states: give one or the others")
        return _convolve_sequences(x, weight, bias, seq_idx, silu)
    before = weight.shape[1] - 1
    tokens = x if initial_states is None else torch.cat([initial_states.to(x.dtype), x], dim=2)
    y = convolve(tokens, weight, bias, silu)
    if initial_states is not None:
        y = y[:, :, before:].contiguous()
    if not return_final_states:
        return y
    known = torch.nn.functional.pad(tokens, (max(before - tokens.shape[2], 0), 0))
    last = known[:, :, known.shape[2] - before :]
    return y, last.clone() if final_states_out is None else final_states_out.copy_(last)


@without_autocast
def causal_conv1d_update(
    x: Tensor,
    conv_state: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    cache_seqlens: Tensor | None = None,
    conv_state_indices: Tensor | None = None,
) -> Tensor:
    """Convolve the next tokens of a sequence, (b, d) or (b, d, l); `conv_state`, (b, d, >= w - 1), is updated in place.

    Args:
        cache_seqlens: (b,), how many tokens came before: `conv_state` is a ring, and token t is at t modulo its length.
            By default the last token is last in it.
        conv_state_indices: (b,), the row of `conv_state` for each sequence; below 0 for padding, whose output is 0.
    """
    if conv_state_indices is not None:
        real = conv_state_indices >= 0
        rows, seen = conv_state_indices[real].long(), None if cache_seqlens is None else cache_seqlens[real]
        states, y = conv_state[rows], torch.zeros_like(x)
        y[real] = causal_conv1d_update(x[real], states, weight, bias, activation, seen)
        conv_state[rows] = states
        return y
    tokens = x.unsqueeze(2) if x.dim() == 2 else x
    _check(tokens, weight, bias)
    if conv_state.shape[:2] != tokens.shape[:2] or conv_state.shape[2] < weight.shape[1] - 1:
        expected = (*tokens.shape[:2], weight.shape[1] - 1)
        raise ValueError(f"conv_state must be (b, d, >= w - 1) = {expected}, got {tuple(conv_state.shape)}")
    l, before = tokens.shape[2], weight.shape[1] - 1
    if cache_seqlens is None:
        known = torch.cat([conv_state.to(x.dtype), tokens], dim=2)
        conv_state.copy_(known[:, :, l:])
    else:
        place = cache_seqlens.unsqueeze(1) + torch.arange(-before, l, device=x.device)
        place = (place % conv_state.shape[2]).unsqueeze(1).expand(-1, x.shape[1], -1)
        known = torch.cat([conv_state.gather(2, place[:, :, :before]).to(x.dtype), tokens], dim=2)
        conv_state.scatter_(2, place[:, :, before:], tokens.to(conv_state.dtype))
    y = convolve(known, weight, bias, is_silu(activation))[:, :, known.shape[2] - l :]
    return y.squeeze(2) if x.dim() == 2 else y.contiguous()


def _check(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    check_tokens(x, "x")
    d = x.shape[1]
    check_shape(weight, "weight", "d, w", (d, weight.shape[-1]))
    check_shape(bias, "bias", "d,", (d,))


def causal_conv1d_varlen_states(x: Tensor, cu_seqlens: Tensor, state_len: int) -> Tensor:
    """Return the last tokens of sequences that stand one after the other: states for :func:`causal_conv1d_update`.

    Args:
        x: (l, d), all sequences.
        cu_seqlens: (b + 1,), where each sequence starts, and where the last one ends.

    Returns:
        (b, d, state_len), with zeros before a sequence that is shorter.
    """
    states = x.new_zeros(len(cu_seqlens) - 1, x.shape[1], state_len)
    ends = cu_seqlens.tolist()
    for state, start, end in zip(states, ends, ends[1:], strict=False):
        last = x[max(start, end - state_len) : end]
        state[:, state_len - len(last) :] = last.T
    return states


def _convolve_sequences(x: Tensor, weight: Tensor, bias: Tensor | None, seq_idx: Tensor, silu: bool) -> Tensor:
    """Convolve (b, d, l) tap by tap, without the taps that reach into another sequence."""
    wide = state_dtype(x.dtype)
    before, l = weight.shape[1] - 1, x.shape[2]
    tokens = torch.nn.functional.pad(x.to(wide), (before, 0))
    owners = torch.nn.functional.pad(seq_idx, (before, 0), value=-1)
    y = x.new_zeros(x.shape, dtype=wide) if bias is None else bias.to(wide).view(1, -1, 1).expand(x.shape)
    for tap in range(before + 1):
        own = (owners[:, tap : tap + l] == seq_idx).unsqueeze(1)
        y = y + weight[:, tap].to(wide).view(1, -1, 1) * tokens[:, :, tap : tap + l] * own
    y = torch.nn.functional.silu(y) if silu else y
    return (y * (seq_idx >= 0).unsqueeze(1)).to(x.dtype)


def convolve(x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool) -> Tensor:
    """Convolve (b, d, l) with (d, w) and (d,) of any floating dtypes."""
    dtype = widest(x, weight, bias) if x.dtype.itemsize > 2 else x.dtype  # the sum is float32 anyway
    taps = weight if weight.dtype == torch.float32 else weight.to(dtype)
    shift = bias if bias is None or bias.dtype == torch.float32 else bias.to(dtype)
    if dtype == torch.float64:
        taps, shift = taps.double(), None if shift is None else shift.double()
    y = torch.ops.vim.causal_conv1d(
        by_token(x, dtype), taps.unsqueeze(0), None if shift is None else shift.unsqueeze(0), reverse=[0], silu=silu
    )
    return by_channel(y).to(x.dtype)


def is_silu(activation: str | None) -> bool:
    """Return whether the activation is the SiLU, or raise ValueError where it is no known one."""
    if activation not in (None, "silu", "swish"):
        raise ValueError(f"activation must be None, 'silu' or 'swish', got {activation!r}")
    return activation is not None


def causal_conv1d_ref(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    initial_states: Tensor | str | None = None,
    *args: Any,
    **options: Any,
) -> Tensor | tuple[Tensor, Tensor]:
    """Run :func:`causal_conv1d_fn`, whose `seq_idx` the published reference lacks, or with the activation as fourth."""
    if isinstance(initial_states, str):
        return causal_conv1d_fn(x, weight, bias, activation=initial_states)
    return causal_conv1d_fn(x, weight, bias, None, initial_states, *args, **options)


causal_conv1d_update_ref = causal_conv1d_update
