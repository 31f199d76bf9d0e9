"""The ops in vectorised PyTorch: any device, any dtype, no compiler.

The scan works on segments of 256 tokens. In a segment, all chunks of 16 tokens take their 16 steps side by side, and
the states at their borders follow in 16 more: 32 steps in the place of 256. Where a segment would not stay in a
processor's cache it is one chunk, since there memory costs more than steps. The backward pass, written out, keeps
nothing but the state at the start of each segment.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

SEGMENT, CHUNK = 256, 16  # tokens
CACHED = 2**19  # floats that stay in a processor's cache: larger segments are cut to single chunks


@dataclass
class _Scan:
    """A scan whose directions all run forwards. u, dt, y: (b, k, l, g, e), e = d / g. B, C: (b, k, l, g, n)."""

    u: Tensor
    raw_dt: Tensor  # before softplus
    dt: Tensor
    A: Tensor  # (k, 1, g, n, e): channels last, where elementwise operations are fast
    B: Tensor
    C: Tensor
    D: Tensor | None  # (k, 1, g, e)
    initial_state: Tensor  # (b, k, g, n, e)
    reverse: Sequence[bool]

    def segments(self) -> list[tuple[slice, int]]:
        """The tokens of each segment, and how many of them make a chunk."""
        l = self.u.shape[2]
        segment = self.segment_length()
        whole = l // CHUNK * CHUNK
        spans = [(slice(t, min(t + segment, whole)), CHUNK) for t in range(0, whole, segment)]
        return spans if whole == l else [*spans, (slice(whole, l), l - whole)]

    def segment_length(self) -> int:
        a_token = self.initial_state.numel()
        return SEGMENT if self.u.device.type != "cpu" or SEGMENT * a_token <= CACHED else CHUNK

    def workspace(self) -> Tensor:
        """Memory for the states of a segment, (b, k, s, g, n, e), to be used again: new pages cost more than sums."""
        b, k, l, g, e = self.u.shape
        return self.u.new_empty(b, k, min(self.segment_length(), l), g, self.A.shape[-2], e)

    def states(self, span: slice, chunk: int, state: Tensor, decay: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        """The decay and the states of a segment, written into the memory given, from the state before it."""
        dt, length = self.dt[:, :, span], span.stop - span.start
        decay, h = decay[:, :, :length], h[:, :, :length]
        torch.mul(dt.unsqueeze(-2), self.A, out=decay).exp_()
        torch.mul((dt * self.u[:, :, span]).unsqueeze(-2), self.B[:, :, span].unsqueeze(-1), out=h)
        _linear_scan(decay, h, state, chunk)
        return decay, h

    def readout(self, span: slice, h: Tensor) -> Tensor:
        y = _over_states(h, self.C[:, :, span])
        return y if self.D is None else y + self.D * self.u[:, :, span]


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
    """See :func:`vim.kernels.reference.selective_scan`."""
    scan = prepare(u, delta, A, B, C, D, delta_bias, initial_state, delta_softplus, reverse)
    y, state = _forward(scan)
    y = add_up(turn(y, reverse), combine)
    if z is not None:
        y = y * F.silu(z.to(y.dtype))
    return y.to(u.dtype), state.transpose(3, 4).flatten(2, 3)


def selective_scan_backward(
    grad_y: Tensor,
    grad_state: Tensor | None,
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
) -> list[Tensor | None]:
    """The gradients of u, delta, A, B, C, D, z, delta_bias and initial_state, in the state's dtype."""
    scan = prepare(u, delta, A, B, C, D, delta_bias, initial_state, delta_softplus, reverse)
    dy, dz = grad_y.to(scan.u.dtype), None
    if z is not None:
        gate = z.to(dy.dtype)
        sigmoid = torch.sigmoid(gate)
        ungated = add_up(turn(_forward(scan)[0], reverse), combine)
        dz = dy * ungated * sigmoid * (1 + gate * (1 - sigmoid))
        dy = dy * gate * sigmoid
    if combine != "none":
        dy = (dy if combine == "sum" else dy / len(reverse)).expand(u.shape)
    dy = turn(dy, reverse).unflatten(-1, scan.u.shape[-2:])

    starts = []
    state = scan.initial_state
    decays, states, gradients, pulls = (scan.workspace() for _ in range(4))
    for span, chunk in scan.segments():
        starts.append(state)
        state = scan.states(span, chunk, state, decays, states)[1][:, :, -1].clone()
    du, ddt = torch.empty_like(scan.u), torch.empty_like(scan.u)
    dB, dC = torch.empty_like(scan.B), torch.empty_like(scan.C)
    dA = torch.zeros_like(scan.A)
    # carry: the gradient of the state a segment starts from
    carry = torch.zeros_like(state) if grad_state is None else _grouped_states(grad_state, state)
    for (span, chunk), start in zip(reversed(scan.segments()), reversed(starts), strict=True):
        u, dt = scan.u[:, :, span], scan.dt[:, :, span]
        decay, h = scan.states(span, chunk, start, decays, states)
        g, pull = (t[:, :, : h.shape[2]] for t in (gradients, pulls))
        torch.mul(dy[:, :, span].unsqueeze(-2), scan.C[:, :, span].unsqueeze(-1), out=g)
        # pull[t] = decay[t] (g[t] + pull[t + 1]) reaches the state before t: the same scan from the other end
        _linear_scan(decay, torch.mul(decay, g, out=pull), carry, chunk, backwards=True)
        g[:, :, :-1] += pull[:, :, 1:]
        g[:, :, -1] += carry
        carry = pull[:, :, 0].clone()
        dC[:, :, span] = _over_channels(dy[:, :, span], h)
        dB[:, :, span] = _over_channels(dt * u, g)
        dx = _over_states(g, scan.B[:, :, span])
        pull[:, :, 1:] *= h[:, :, :-1]
        pull[:, :, 0] *= start
        dA += torch.mul(pull, dt.unsqueeze(-2), out=g).sum((0, 2)).unsqueeze(1)
        du[:, :, span] = dx * dt
        ddt[:, :, span] = dx * u + pull.mul_(scan.A).sum(-2)
    dD = None
    if scan.D is not None:
        du += scan.D * dy
        dD = (dy * scan.u).sum((0, 2)).flatten(1)
    if delta_softplus:
        ddt *= torch.sigmoid(scan.raw_dt)
    return [
        turn(du.flatten(-2), reverse),
        turn(ddt.flatten(-2), reverse),
        dA.squeeze(1).transpose(2, 3).flatten(1, 2),
        turn(dB, reverse),
        turn(dC, reverse),
        dD,
        dz,
        None if delta_bias is None else ddt.sum((0, 2)).flatten(1),
        None if initial_state is None else carry.transpose(3, 4).flatten(2, 3),
    ]


def prepare(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    delta_bias: Tensor | None,
    initial_state: Tensor | None,
    delta_softplus: bool,
    reverse: Sequence[bool],
) -> _Scan:
    dtype = torch.promote_types(u.dtype, torch.float32)
    (b, k, _, d), g, n = u.shape, B.shape[3], A.shape[-1]
    groups = (g, d // g)
    u, delta, B, C = (turn(t.to(dtype), reverse) for t in (u, delta, B, C))
    if delta_bias is not None:
        delta = delta + delta_bias.to(dtype).unsqueeze(1)
    delta = delta.unflatten(-1, groups)
    zeros = u.new_zeros(b, k, g, n, d // g)
    return _Scan(
        u=u.unflatten(-1, groups),
        raw_dt=delta,
        dt=F.softplus(delta) if delta_softplus else delta,
        A=A.to(dtype).reshape(k, 1, *groups, n).transpose(3, 4).contiguous(),
        B=B,
        C=C,
        D=None if D is None else D.to(dtype).view(k, 1, *groups),
        initial_state=zeros if initial_state is None else _grouped_states(initial_state, zeros),
        reverse=reverse,
    )


def _forward(scan: _Scan) -> tuple[Tensor, Tensor]:
    state, ys = scan.initial_state, []
    decays, states = scan.workspace(), scan.workspace()
    for span, chunk in scan.segments():
        _, h = scan.states(span, chunk, state, decays, states)
        ys.append(scan.readout(span, h))
        state = h[:, :, -1].clone()
    return torch.cat(ys, 2).flatten(-2), state


def turn(x: Tensor, reverse: Sequence[bool]) -> Tensor:
    """(b, k, l, ...): the tokens of the reversed directions in the opposite order."""
    if not any(reverse):
        return x
    return torch.stack([x[:, k].flip(1) if backwards else x[:, k] for k, backwards in enumerate(reverse)], 1)


def add_up(y: Tensor, combine: str) -> Tensor:
    """(b, k, l, d), or its directions' sum or mean, (b, 1, l, d)."""
    if combine == "none":
        return y
    return y.sum(1, keepdim=True) if combine == "sum" else y.mean(1, keepdim=True)


def _grouped_states(state: Tensor, like: Tensor) -> Tensor:
    """(b, k, d, n) to (b, k, g, n, e)."""
    b, k, g, n, e = like.shape
    return state.to(like.dtype).reshape(b, k, g, e, n).transpose(3, 4)


def _over_states(h: Tensor, C: Tensor) -> Tensor:
    """(b, k, s, g, n, e) with (b, k, s, g, n) to (b, k, s, g, e)."""
    return torch.matmul(C.unsqueeze(-2), h).squeeze(-2)


def _over_channels(y: Tensor, h: Tensor) -> Tensor:
    """(b, k, s, g, e) with (b, k, s, g, n, e) to (b, k, s, g, n)."""
    return torch.matmul(h, y.unsqueeze(-1)).squeeze(-1)


def _linear_scan(decay: Tensor, h: Tensor, state: Tensor, chunk: int, backwards: bool = False) -> None:
    """h[t] = decay[t] h[t-1] + h[t] in place along dimension 2 of (b, k, s, ...), from h[-1] = state.

    Backwards: h[t] = decay[t] h[t+1] + h[t], from the state after the last token. s is a multiple of the chunk.
    """
    turn = -1 if backwards else 1
    if h.shape[2] == chunk:
        for decay_t, h_t in zip(decay.unbind(2)[::turn], h.unbind(2)[::turn], strict=True):
            state = h_t.addcmul_(decay_t, state)
        return
    total = decay.unflatten(2, (-1, chunk)).clone()  # the decay since the start of the chunk
    decay, h = decay.unflatten(2, (-1, chunk)), h.unflatten(2, (-1, chunk))
    steps = list(zip(decay.unbind(3), h.unbind(3), total.unbind(3), strict=True))[::turn]
    for (_, h_before, total_before), (decay_t, h_t, total_t) in itertools.pairwise(steps):
        h_t.addcmul_(decay_t, h_before)
        total_t.mul_(total_before)
    for total_c, h_c in zip(total.unbind(2)[::turn], h.unbind(2)[::turn], strict=True):
        h_c.addcmul_(total_c, state.unsqueeze(2))
        state = h_c[:, :, 0 if backwards else -1]


def causal_conv1d(x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool, reverse: Sequence[bool]) -> Tensor:
    """See :func:`vim.kernels.reference.causal_conv1d`."""
    y = _convolve(turn(x, reverse).to(torch.promote_types(x.dtype, torch.float32)), weight, bias)
    return turn(F.silu(y) if silu else y, reverse).to(x.dtype)


def causal_conv1d_backward(
    grad_y: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool, reverse: Sequence[bool]
) -> list[Tensor | None]:
    """The gradients of x, weight and bias."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    x, dy = (turn(t.to(dtype), reverse) for t in (x, grad_y))
    if silu:
        y = _convolve(x, weight, bias)
        sigmoid = torch.sigmoid(y)
        dy = dy * sigmoid * (1 + y * (1 - sigmoid))
    length, width = x.shape[2], weight.shape[-1]
    dx, dweight = torch.zeros_like(x), torch.zeros_like(weight, dtype=dtype)
    for tap in range(width):
        back = width - 1 - tap  # how many tokens before the current one this tap reads
        if back >= length:
            continue
        dx[:, :, : length - back] += dy[:, :, back:] * weight[:, None, :, tap]
        dweight[:, :, tap] = (dy[:, :, back:] * x[:, :, : length - back]).sum((0, 2))
    return [turn(dx, reverse), dweight, None if bias is None else dy.sum((0, 2))]


def _convolve(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    length, width = x.shape[2], weight.shape[-1]
    y = x * weight[:, None, :, -1].to(x.dtype)
    for back in range(1, min(width, length)):
        y[:, :, back:].addcmul_(x[:, :, : length - back], weight[:, None, :, width - 1 - back].to(x.dtype))
    return y if bias is None else y + bias.to(x.dtype).unsqueeze(1)
