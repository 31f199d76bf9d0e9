"""State space duality as products of matrices: any device, any dtype, no compiler.

The tokens are cut into chunks. In a chunk, y is a matrix of decays and products of B and C, times x; between chunks the
state is carried. A reversed direction has other decays: nothing is flipped. Only sums of steps that decay are taken to
the power, and only where a token sees another.

Sizes: b images, l tokens, h heads, p channels of a head, g groups of r heads, n states; c chunks of q tokens.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..checks import differentiate
from ..directions import add_up
from .reference import Inputs, Options

CHUNK = 64  # tokens


def ssd(inputs: Inputs, options: Options) -> tuple[Tensor, Tensor]:
    """See :func:`vim.kernels.ssd.reference.ssd`."""
    dtype = torch.promote_types(inputs.x.dtype, torch.float32)
    wide = Inputs(*(t if t is None else t.to(dtype) for t in inputs))  # type: ignore[arg-type]
    directions = [_run_direction(wide, k, bool(backwards), options) for k, backwards in enumerate(options.reverse)]
    ys, states = zip(*directions, strict=True)
    y = add_up(torch.stack(ys, 1), options.combine)
    if wide.z is not None:
        y = y * F.silu(wide.z)
    return y.to(inputs.x.dtype).contiguous(), torch.stack(states, 1)


def _run_direction(inputs: Inputs, k: int, backwards: bool, options: Options) -> tuple[Tensor, Tensor]:
    x, dt, B, C = inputs.x[:, k], inputs.dt[:, k], inputs.B[:, k], inputs.C[:, k]
    (b, l, h, p), (g, n) = x.shape, B.shape[2:]
    q = min(options.chunk_size or CHUNK, l)
    c, r = -(-l // q), h // g
    dt = dt if inputs.dt_bias is None else dt + inputs.dt_bias[k]
    dt = (F.softplus(dt) if options.dt_softplus else dt).clamp(options.dt_min, options.dt_max)

    def chunks(t: Tensor, *sizes: int) -> Tensor:
        return F.pad(t.flatten(2), (0, 0, 0, c * q - l)).view(b, c, q, *sizes)

    a = chunks(dt * inputs.A[k], g, r).permute(0, 3, 4, 1, 2)  # (b, g, r, c, q)
    s = a.flip(-1).cumsum(-1).flip(-1) if backwards else a.cumsum(-1)
    total = s[..., 0] if backwards else s[..., -1]  # (b, g, r, c)
    mask = torch.ones(q, q, dtype=torch.bool, device=x.device).tril()
    mask = mask.T if backwards else mask
    L = (s.unsqueeze(-1) - s.unsqueeze(-2)).masked_fill(~mask, -torch.inf).exp()
    X = chunks(dt.unsqueeze(-1) * x, g, r, p).permute(0, 3, 4, 1, 2, 5)  # (b, g, r, c, q, p)
    B, C = (chunks(t, g, n).permute(0, 3, 1, 2, 4) for t in (B, C))  # (b, g, c, q, n)
    y = (L * (C @ B.mT).unsqueeze(2)) @ X
    new = ((total.unsqueeze(-1) - s).exp().unsqueeze(-1) * X).mT @ B.unsqueeze(2)  # (b, g, r, c, p, n)
    state = (
        x.new_zeros(b, g, r, p, n) if inputs.initial_state is None else inputs.initial_state[:, k].view(b, g, r, p, n)
    )
    starts = [state] * c
    decay = total.exp()[..., None, None]
    for i in reversed(range(c)) if backwards else range(c):
        starts[i] = state
        state = decay[:, :, :, i] * state + new[:, :, :, i]
    y = y + s.exp().unsqueeze(-1) * (C.unsqueeze(2) @ torch.stack(starts, 3).mT)
    y = y.permute(0, 3, 4, 1, 2, 5).reshape(b, c * q, h, p)[:, :l]
    y = y if inputs.D is None else y + inputs.D[k] * x
    return y, state.reshape(b, h, p, n)


def ssd_backward(grad_y: Tensor, grad_state: Tensor | None, inputs: Inputs, options: Options) -> Inputs:
    """Return the gradients of the inputs."""
    if grad_state is None:
        b, k, _, h, p = inputs.x.shape
        grad_state = inputs.A.new_zeros(b, k, h, p, inputs.B.shape[4])
    grads = differentiate(lambda *tensors: ssd(Inputs(*tensors), options), inputs, (grad_y, grad_state))
    return Inputs(*grads)  # type: ignore[arg-type]  # those of the tensors that are always given are no None
