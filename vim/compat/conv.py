"""`causal_conv1d`: the depthwise causal convolution in the published layout.

Sizes: b images, d channels, l tokens, w taps.
"""

import torch
from torch import Tensor

from .layout import by_channel, by_token, widest, without_autocast

__all__ = ["causal_conv1d_fn", "causal_conv1d_ref", "causal_conv1d_update", "causal_conv1d_update_ref"]


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
        seq_idx: None; or the activation, which was the fourth argument in version 1.0.
        initial_states: (b, d, w - 1), the tokens before the first; by default zeros.
        return_final_states: also return the last w - 1 tokens, (b, d, w - 1).
        final_states_out: where to write them.
        activation: None, "silu" or "swish".

    Returns:
        A contiguous (b, d, l) in x's dtype.

    Raises:
        NotImplementedError: `seq_idx` holds indices.
        ValueError: another activation.
    """
    if isinstance(seq_idx, str):
        seq_idx, activation = None, seq_idx
    if seq_idx is not None:
        raise NotImplementedError(
            "vim.compat serves causal_conv1d_fn without seq_idx: convolve each sequence by itself"
        )
    silu = is_silu(activation)
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

    Raises:
        NotImplementedError: `cache_seqlens` or `conv_state_indices` are given.
    """
    if cache_seqlens is not None or conv_state_indices is not None:
        raise NotImplementedError("vim.compat serves causal_conv1d_update without cache_seqlens and conv_state_indices")
    tokens = x.unsqueeze(2) if x.dim() == 2 else x
    known = torch.cat([conv_state.to(x.dtype), tokens], dim=2)
    y = convolve(known, weight, bias, is_silu(activation))[:, :, conv_state.shape[2] :]
    conv_state.copy_(known[:, :, tokens.shape[2] :])
    return y.squeeze(2) if x.dim() == 2 else y.contiguous()


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


causal_conv1d_ref, causal_conv1d_update_ref = causal_conv1d_fn, causal_conv1d_update
