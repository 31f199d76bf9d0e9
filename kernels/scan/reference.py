"""The selective scan in slow, obvious PyTorch: the definition every backend is tested against, and its arguments.

Sizes: b images, k directions, l tokens, d channels, g groups of B and C, n states.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..checks import differentiate
from ..directions import add_up


class Inputs(NamedTuple):
    """The tensors of a scan, in the order of the op's schema; also their gradients, None for each that is not given."""

    u: Tensor  # (b, k, l, d)
    delta: Tensor  # (b, k, l, d)
    A: Tensor  # (k, d, n)
    B: Tensor  # (b, k, l, g, n)
    C: Tensor  # (b, k, l, g, n)
    D: Tensor | None = None  # (k, d)
    z: Tensor | None = None  # like y
    delta_bias: Tensor | None = None  # (k, d)
    initial_state: Tensor | None = None  # (b, k, d, n)


class Options(NamedTuple):
    """The options of a scan, with the defaults of the op's schema."""

    reverse: Sequence[bool]  # k of them: whether a direction runs from the last token to the first
    delta_softplus: bool = False
    combine: str = "none"  # "sum" or "mean": add the directions up
    return_last_state: bool = False
    backend: str = "auto"


def shape_of_y(inputs: Inputs, options: Options) -> tuple[int, int, int, int]:
    """Return (b, k, l, d), or (b, 1, l, d) if the directions are added up."""
    b, k, l, d = inputs.u.shape
    return b, k if options.combine == "none" else 1, l, d


def selective_scan(inputs: Inputs, options: Options) -> tuple[Tensor, Tensor]:
    """Run Mamba's recurrence, one token after the other (https://arxiv.org/abs/2312.00752, algorithm 2).

    Returns:
        y, (b, k, l, d) or (b, 1, l, d), in u's dtype; and the last states, (b, k, d, n), at least float32.
    """
    dtype = torch.promote_types(inputs.u.dtype, torch.float32)
    wide = Inputs(*(t if t is None else t.to(dtype) for t in inputs))  # type: ignore[arg-type]
    directions = [
        _scan_direction(wide, k, backwards, options.delta_softplus) for k, backwards in enumerate(options.reverse)
    ]
    ys, states = zip(*directions, strict=True)
    y = add_up(torch.stack(ys, 1), options.combine)
    if wide.z is not None:
        y = y * F.silu(wide.z)
    return y.to(inputs.u.dtype), torch.stack(states, 1)


def _scan_direction(inputs: Inputs, k: int, backwards: bool, delta_softplus: bool) -> tuple[Tensor, Tensor]:
    """Return y before the gate, (b, l, d), and the last state, (b, d, n), of direction k."""
    u, dt, A = inputs.u[:, k], inputs.delta[:, k], inputs.A[k]  # (b, l, d), (b, l, d), (d, n)
    b, l, d = u.shape
    dt = dt if inputs.delta_bias is None else dt + inputs.delta_bias[k]
    dt = F.softplus(dt) if delta_softplus else dt
    B, C = (t[:, k].repeat_interleave(d // t.shape[3], 2) for t in (inputs.B, inputs.C))  # (b, l, d, n)
    decay = torch.exp(dt.unsqueeze(-1) * A)  # (b, l, d, n)
    drive = dt.unsqueeze(-1) * B * u.unsqueeze(-1)  # (b, l, d, n)
    state = u.new_zeros(b, *A.shape) if inputs.initial_state is None else inputs.initial_state[:, k]
    ys = [u.new_zeros(b, d)] * l
    for t in reversed(range(l)) if backwards else range(l):
        state = decay[:, t] * state + drive[:, t]
        ys[t] = (state * C[:, t]).sum(-1)
    y = torch.stack(ys, 1)  # (b, l, d)
    return y if inputs.D is None else y + inputs.D[k] * u, state


def selective_scan_backward(grad_y: Tensor, grad_state: Tensor | None, inputs: Inputs, options: Options) -> Inputs:
    """Return the gradients of the inputs by PyTorch's own differentiation."""
    b, k, _, d = inputs.u.shape
    if grad_state is None:
        grad_state = inputs.A.new_zeros(b, k, d, inputs.A.shape[2])
    grads = differentiate(lambda *tensors: selective_scan(Inputs(*tensors), options), inputs, (grad_y, grad_state))
    return Inputs(*grads)  # type: ignore[arg-type]  # those of the tensors that are always given are no None
