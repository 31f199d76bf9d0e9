"""The ops in slow, obvious PyTorch: the definition every backend is tested against.

Sizes: b images, k directions, l tokens, d channels, g groups of B and C, n states, w taps.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    initial_state: Tensor | None,
    delta_softplus: bool,
    reverse: Sequence[bool],
    combine: str,
) -> tuple[Tensor, Tensor]:
    """Mamba's recurrence, one token after the other (https://arxiv.org/abs/2312.00752, algorithm 2).

    Args:
        u, delta: (b, k, l, d). A: (k, d, n). B, C: (b, k, l, g, n). D, delta_bias: (k, d). z: like y.

    Returns:
        y, (b, k, l, d), or (b, 1, l, d) for the sum or mean of the directions; and the last states, (b, k, d, n).
    """
    dtype = torch.promote_types(u.dtype, torch.float32)
    ys, states = [], []
    for k, backwards in enumerate(reverse):
        state = None if initial_state is None else initial_state[:, k].to(dtype)
        y, state = _one_direction(
            u[:, k].to(dtype),
            delta[:, k].to(dtype),
            A[k].to(dtype),
            B[:, k].to(dtype),
            C[:, k].to(dtype),
            None if D is None else D[k].to(dtype),
            None if delta_bias is None else delta_bias[k].to(dtype),
            state,
            delta_softplus,
            backwards,
        )
        ys.append(y)
        states.append(state)
    y = torch.stack(ys, 1)  # (b, k, l, d)
    if combine != "none":
        y = y.sum(1, keepdim=True) if combine == "sum" else y.mean(1, keepdim=True)
    if z is not None:
        y = y * F.silu(z.to(dtype))
    return y.to(u.dtype), torch.stack(states, 1)


def _one_direction(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    delta_bias: Tensor | None,
    state: Tensor | None,
    delta_softplus: bool,
    backwards: bool,
) -> tuple[Tensor, Tensor]:
    b, l, d = u.shape
    dt = delta if delta_bias is None else delta + delta_bias
    dt = F.softplus(dt) if delta_softplus else dt
    B, C = (t.repeat_interleave(d // t.shape[2], 2) for t in (B, C))  # (b, l, d, n)
    decay = torch.exp(dt.unsqueeze(-1) * A)  # (b, l, d, n)
    drive = dt.unsqueeze(-1) * B * u.unsqueeze(-1)  # (b, l, d, n)
    state = u.new_zeros(b, d, A.shape[1]) if state is None else state
    ys = [u.new_zeros(b, d)] * l
    for t in reversed(range(l)) if backwards else range(l):
        state = decay[:, t] * state + drive[:, t]
        ys[t] = (state * C[:, t]).sum(-1)
    y = torch.stack(ys, 1)  # (b, l, d)
    return y if D is None else y + D * u, state


def causal_conv1d(x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool, reverse: Sequence[bool]) -> Tensor:
    """Depthwise convolution over a token and the w - 1 before it (after it, where reversed), then SiLU.

    Args:
        x: (b, k, l, d). weight: (k, d, w), its last tap for the current token. bias: (k, d).

    Returns:
        (b, k, l, d) in x's dtype.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    d, width = weight.shape[1:]
    ys = []
    for k, backwards in enumerate(reverse):
        row = x[:, k].to(dtype).transpose(1, 2)  # (b, d, l)
        row = F.pad(row.flip(-1) if backwards else row, (width - 1, 0))
        y = F.conv1d(row, weight[k].to(dtype).unsqueeze(1), None if bias is None else bias[k].to(dtype), groups=d)
        ys.append((y.flip(-1) if backwards else y).transpose(1, 2))
    y = torch.stack(ys, 1)  # (b, k, l, d)
    return (F.silu(y) if silu else y).to(x.dtype)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """``x / sqrt(mean(x^2) + eps) * weight`` over the last dimension."""
    wide, weight = (t.to(torch.promote_types(x.dtype, torch.float32)) for t in (x, weight))
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * weight).to(x.dtype)


def differentiate(
    run: Callable[..., Any], inputs: Sequence[Tensor | None], options: Sequence[Any], grads_out: tuple[Tensor, ...]
) -> list[Tensor | None]:
    """The gradients of the inputs that are given, by PyTorch's own differentiation of `run(*inputs, *options)`.

    Inside an op autograd is off, and only a transform of torch.func differentiates.
    """
    given = [i for i, tensor in enumerate(inputs) if tensor is not None]

    def run_given(*tensors: Tensor) -> tuple[Tensor, ...]:
        every: list[Any] = [*[None] * len(inputs), *options]
        for i, tensor in zip(given, tensors, strict=True):
            every[i] = tensor
        out = run(*every)
        return out if isinstance(out, tuple) else (out,)

    _, vjp, *_ = torch.func.vjp(run_given, *(inputs[i] for i in given))
    found = dict(zip(given, vjp(grads_out), strict=True))
    return [found.get(i) for i in range(len(inputs))]
