"""State space duality in slow, obvious PyTorch: the definition every backend is tested against, and its arguments.

Sizes: b images, k directions, l tokens, h heads, p channels of a head, g groups of B and C, n states.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..checks import differentiate
from ..directions import add_up


class Inputs(NamedTuple):
    """The tensors of the op, in the order of its schema; also their gradients, None for each that is not given."""

    x: Tensor  # (b, k, l, h, p)
    dt: Tensor  # (b, k, l, h)
    A: Tensor  # (k, h)
    B: Tensor  # (b, k, l, g, n)
    C: Tensor  # (b, k, l, g, n)
    D: Tensor | None = None  # (k, h, p)
    z: Tensor | None = None  # like y
    dt_bias: Tensor | None = None  # (k, h)
    initial_state: Tensor | None = None  # (b, k, h, p, n)


class Options(NamedTuple):
    """The options of the op, with the defaults of its schema."""

    reverse: Sequence[bool]  # k of them: whether a direction runs from the last token to the first
    dt_softplus: bool = False
    dt_min: float = 0.0  # the step sizes are clamped to [dt_min, dt_max]
    dt_max: float = torch.finfo(torch.float32).max
    combine: str = "none"  # "sum" or "mean": add the directions up
    return_last_state: bool = False
    chunk_size: int = 0  # tokens of a chunk; 0 for the backend's choice
    backend: str = "auto"


def shape_of_y(inputs: Inputs, options: Options) -> tuple[int, int, int, int, int]:
    """Return (b, k, l, h, p), or (b, 1, l, h, p) if the directions are added up."""
    b, k, l, h, p = inputs.x.shape
    return b, k if options.combine == "none" else 1, l, h, p


def ssd(inputs: Inputs, options: Options) -> tuple[Tensor, Tensor]:
    """Run Mamba-2's recurrence, one token after the other.

    Returns:
        y, (b, k, l, h, p) or (b, 1, l, h, p), in x's dtype; and the last states, (b, k, h, p, n), at least float32.
    """
    dtype = torch.promote_types(inputs.x.dtype, torch.float32)
    wide = Inputs(*(t if t is None else t.to(dtype) for t in inputs))  # type: ignore[arg-type]
    directions = [_run_direction(wide, k, backwards, options) for k, backwards in enumerate(options.reverse)]
    ys, states = zip(*directions, strict=True)
    y = add_up(torch.stack(ys, 1), options.combine)
    if wide.z is not None:
        y = y * F.silu(wide.z)
    return y.to(inputs.x.dtype), torch.stack(states, 1)


def _run_direction(inputs: Inputs, k: int, backwards: bool, options: Options) -> tuple[Tensor, Tensor]:
    """Return y before the gate, (b, l, h, p), and the last state, (b, h, p, n), of direction k."""
    x, dt = inputs.x[:, k], inputs.dt[:, k]  # (b, l, h, p), (b, l, h)
    b, l, h, p = x.shape
    dt = dt if inputs.dt_bias is None else dt + inputs.dt_bias[k]
    dt = F.softplus(dt) if options.dt_softplus else dt
    dt = torch.where(dt < options.dt_min, options.dt_min, dt)  # clamp has no gradient at its limits
    dt = torch.where(dt > options.dt_max, options.dt_max, dt)
    B, C = (t[:, k].repeat_interleave(h // t.shape[3], 2) for t in (inputs.B, inputs.C))  # (b, l, h, n)
    decay = torch.exp(dt * inputs.A[k])  # (b, l, h)
    state = x.new_zeros(b, h, p, B.shape[3]) if inputs.initial_state is None else inputs.initial_state[:, k]
    ys = [x.new_zeros(b, h, p)] * l
    for t in reversed(range(l)) if backwards else range(l):
        drive = (dt[:, t, :, None] * x[:, t]).unsqueeze(-1) * B[:, t].unsqueeze(-2)  # (b, h, p, n)
        state = decay[:, t, :, None, None] * state + drive
        ys[t] = (state * C[:, t].unsqueeze(-2)).sum(-1)
    y = torch.stack(ys, 1)
    return y if inputs.D is None else y + inputs.D[k] * x, state


def ssd_backward(grad_y: Tensor, grad_state: Tensor | None, inputs: Inputs, options: Options) -> Inputs:
    """Return the gradients of the inputs by PyTorch's own differentiation."""
    if grad_state is None:
        b, k, _, h, p = inputs.x.shape
        grad_state = inputs.A.new_zeros(b, k, h, p, inputs.B.shape[4])
    grads = differentiate(lambda *tensors: ssd(Inputs(*tensors), options), inputs, (grad_y, grad_state))
    return Inputs(*grads)  # type: ignore[arg-type]  # those of the tensors that are always given are no None
