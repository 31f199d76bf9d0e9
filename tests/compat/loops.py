"""The published functions from their definitions: float64, one token after the other."""

import torch
import torch.nn.functional as F


def scan(u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False):
    """Return the gated output, the output before the gate, and the last state."""
    u, delta, A, B, C, D, z, delta_bias = (
        None if t is None else t.double() for t in (u, delta, A, B, C, D, z, delta_bias)
    )
    b, d, l = u.shape
    dt = delta.repeat_interleave(d // delta.shape[1], 1)
    if delta_bias is not None:
        dt = dt + delta_bias.repeat_interleave(d // len(delta_bias)).view(-1, 1)
    dt = F.softplus(dt) if delta_softplus else dt
    B, C = (each_channel(t, d, b, l) for t in (B, C))  # (b, d, n, l)
    h, ys = u.new_zeros(b, d, A.shape[1]), []
    for t in range(l):
        h = torch.exp(dt[:, :, t, None] * A) * h + dt[:, :, t, None] * B[..., t] * u[:, :, t, None]
        ys.append((h * C[..., t]).sum(-1))
    y = torch.stack(ys, 2)
    y = y if D is None else y + D.view(-1, 1) * u
    return (y if z is None else y * F.silu(z)), y, h


def each_channel(B, d, b, l):
    if B.dim() == 2:
        return B.view(1, *B.shape, 1).expand(b, -1, -1, l)
    B = B.unsqueeze(1) if B.dim() == 3 else B
    return B.repeat_interleave(d // B.shape[1], 1)


def conv(x, weight, bias=None, silu=False, before=None):
    x, weight = x.double(), weight.double()
    w = weight.shape[1]
    before = x.new_zeros(*x.shape[:2], w - 1) if before is None else before.double()
    x = torch.cat([before, x], 2)
    y = sum(x[:, :, i : x.shape[2] - w + 1 + i] * weight[:, i, None] for i in range(w))
    y = y if bias is None else y + bias.double().view(-1, 1)
    return F.silu(y) if silu else y


def ssd(x, dt, A, B, C, D=None, z=None, state=None):
    """dt is the step itself."""
    x, dt, A, B, C = (t.double() for t in (x, dt, A, B, C))
    b, l, heads, p = x.shape
    B, C = (t.repeat_interleave(heads // t.shape[2], 2) for t in (B, C))
    h, ys = x.new_zeros(b, heads, p, B.shape[3]) if state is None else state.double(), []
    for t in range(l):
        decay = torch.exp(dt[:, t] * A)[..., None, None]
        h = decay * h + (dt[:, t, :, None] * x[:, t])[..., None] * B[:, t, :, None]
        ys.append((h * C[:, t, :, None]).sum(-1))
    y = torch.stack(ys, 1)
    if D is not None:
        y = y + x * (D.double() if D.dim() == 2 else D.double().unsqueeze(1))
    return (y if z is None else y * F.silu(z.double())), h
