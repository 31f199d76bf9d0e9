"""The selective scan in vectorised PyTorch: any device, any dtype, no compiler.

The tokens are cut into segments of 256. In a segment, all chunks of 16 tokens take their 16 steps side by side, and 16
more steps carry the state across the chunks' borders: 32 steps instead of 256. A segment too large for the processor's
cache is a single chunk, because there memory costs more than steps. The backward pass keeps only the state at the start
of each segment.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..directions import add_up, before_the_gate, turn
from .reference import Inputs, Options

SEGMENT, CHUNK = 256, 16  # tokens
OF_IMAGES = ("u", "delta", "B", "C", "z", "initial_state")  # the tensors that each image has its own of
CACHED = 2**19  # floats that stay in a processor's cache: larger segments are cut into single chunks


@dataclass
class _Scan:
    """A scan whose directions all run forwards, with d split into g groups of e channels: u, dt, y (b, k, l, g, e)."""

    u: Tensor
    raw_dt: Tensor  # before softplus
    dt: Tensor
    A: Tensor  # (k, 1, g, n, e): channels last, where elementwise operations are fast
    B: Tensor  # (b, k, l, g, n)
    C: Tensor
    D: Tensor | None  # (k, 1, g, e)
    initial_state: Tensor  # (b, k, g, n, e)
    reverse: Sequence[bool]  # which directions were turned

    def segments(self) -> list[tuple[slice, int]]:
        """Return the tokens of each segment, and the length of its chunks."""
        l = self.u.shape[2]
        segment = self.segment_length()
        whole = l // CHUNK * CHUNK
        spans = [(slice(t, min(t + segment, whole)), CHUNK) for t in range(0, whole, segment)]
        return spans if whole == l else [*spans, (slice(whole, l), l - whole)]

    def segment_length(self) -> int:
        """Return the tokens of a segment; one chunk if more would not stay in the processor's cache."""
        a_token = self.initial_state.numel()
        return SEGMENT if self.u.device.type != "cpu" or SEGMENT * a_token <= CACHED else CHUNK

    def workspace(self) -> Tensor:
        """Return a buffer for the states of a segment, (b, k, s, g, n, e).

        All segments share it: fresh memory pages cost more than the arithmetic.
        """
        b, k, l, g, e = self.u.shape
        return self.u.new_empty(b, k, min(self.segment_length(), l), g, self.A.shape[-2], e)

    def states(self, span: slice, chunk: int, state: Tensor, decay: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        """Write the decays and the states of a segment into two buffers, from the state before it, and return both."""
        dt, length = self.dt[:, :, span], span.stop - span.start
        decay, h = decay[:, :, :length], h[:, :, :length]
        torch.mul(dt.unsqueeze(-2), self.A, out=decay).exp_()
        torch.mul((dt * self.u[:, :, span]).unsqueeze(-2), self.B[:, :, span].unsqueeze(-1), out=h)
        _linear_scan(decay, h, state, chunk)
        return decay, h

    def readout(self, span: slice, h: Tensor) -> Tensor:
        """Return y of a segment from its states."""
        y = _over_states(h, self.C[:, :, span])
        return y if self.D is None else y + self.D * self.u[:, :, span]


def selective_scan(inputs: Inputs, options: Options) -> tuple[Tensor, Tensor]:
    """See :func:`vim.kernels.scan.reference.selective_scan`."""
    scan = prepare(inputs, options)
    y, state, _ = _forward(scan)
    y = add_up(turn(y, scan.reverse), options.combine)
    if inputs.z is not None:
        y = y * F.silu(inputs.z.to(y.dtype))
    return y.to(inputs.u.dtype), _plain_states(state)


def selective_scan_backward(grad_y: Tensor, grad_state: Tensor | None, inputs: Inputs, options: Options) -> Inputs:
    """Return the gradients of the inputs, at least float32.

    On a CPU as many images at a time as stay in the cache.
    """
    (b, k, _, d), n = inputs.u.shape, inputs.A.shape[2]
    images = max(CACHED // max(CHUNK * k * d * n, 1), 1) if inputs.u.device.type == "cpu" else b
    if b <= images:
        return _backward(grad_y, grad_state, inputs, options)
    parts = []
    for i in range(0, b, images):
        own = {name: t if t is None else t[i : i + images] for name, t in inputs._asdict().items() if name in OF_IMAGES}
        state = grad_state if grad_state is None else grad_state[i : i + images]
        part = inputs._replace(**own)  # type: ignore[arg-type]
        parts.append(_backward(grad_y[i : i + images], state, part, options))
    return Inputs(*(_join(name, [part[j] for part in parts]) for j, name in enumerate(Inputs._fields)))  # type: ignore[arg-type]


def _join(name: str, grads: Sequence[Tensor | None]) -> Tensor | None:
    """Return the gradient of a tensor from those of its images."""
    if grads[0] is None:
        return None
    return torch.cat(grads) if name in OF_IMAGES else torch.stack(grads).sum(0)  # type: ignore[arg-type]


def _backward(grad_y: Tensor, grad_state: Tensor | None, inputs: Inputs, options: Options) -> Inputs:
    scan = prepare(inputs, options)
    y, state, starts = _forward(scan)
    ungated = None if inputs.z is None else add_up(turn(y, scan.reverse), options.combine)
    dy, dz = before_the_gate(grad_y.to(scan.u.dtype), inputs.z, ungated, options.combine, inputs.u.shape)
    dy = turn(dy, scan.reverse).unflatten(-1, scan.u.shape[-2:])

    # backwards; carry: the gradient of the state at the start of the segment that comes after
    decays, states, gradients, pulls = (scan.workspace() for _ in range(4))
    du, ddt = torch.empty_like(scan.u), torch.empty_like(scan.u)
    dB, dC = torch.empty_like(scan.B), torch.empty_like(scan.C)
    dA = torch.zeros_like(scan.A)
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

    # from the scan's layout to the inputs'
    if scan.D is not None:
        du += scan.D * dy
    if options.delta_softplus:
        ddt *= torch.sigmoid(scan.raw_dt)
    return Inputs(
        u=turn(du.flatten(-2), scan.reverse),
        delta=turn(ddt.flatten(-2), scan.reverse),
        A=dA.squeeze(1).transpose(2, 3).flatten(1, 2),
        B=turn(dB, scan.reverse),
        C=turn(dC, scan.reverse),
        D=None if scan.D is None else (dy * scan.u).sum((0, 2)).flatten(1),
        z=dz,
        delta_bias=None if inputs.delta_bias is None else ddt.sum((0, 2)).flatten(1),
        initial_state=None if inputs.initial_state is None else _plain_states(carry),
    )


def prepare(inputs: Inputs, options: Options) -> _Scan:
    """Bring a scan into the form in which all directions run forwards."""
    dtype = torch.promote_types(inputs.u.dtype, torch.float32)
    (b, k, _, d), g, n = inputs.u.shape, inputs.B.shape[3], inputs.A.shape[-1]
    groups = (g, d // g)
    u, delta, B, C = (turn(t.to(dtype), options.reverse) for t in (inputs.u, inputs.delta, inputs.B, inputs.C))
    if inputs.delta_bias is not None:
        delta = delta + inputs.delta_bias.to(dtype).unsqueeze(1)
    delta = delta.unflatten(-1, groups)
    zeros = u.new_zeros(b, k, g, n, d // g)
    return _Scan(
        u=u.unflatten(-1, groups),
        raw_dt=delta,
        dt=F.softplus(delta) if options.delta_softplus else delta,
        A=inputs.A.to(dtype).reshape(k, 1, *groups, n).transpose(3, 4).contiguous(),
        B=B,
        C=C,
        D=None if inputs.D is None else inputs.D.to(dtype).view(k, 1, *groups),
        initial_state=zeros if inputs.initial_state is None else _grouped_states(inputs.initial_state, zeros),
        reverse=options.reverse,
    )


def _forward(scan: _Scan) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Return y, (b, k, l, d), the last state, (b, k, g, n, e), and the state before each segment.

    The tokens of y are in the scan's order.
    """
    state, ys, starts = scan.initial_state, [], []
    decays, states = scan.workspace(), scan.workspace()
    for span, chunk in scan.segments():
        starts.append(state)
        _, h = scan.states(span, chunk, state, decays, states)
        ys.append(scan.readout(span, h))
        state = h[:, :, -1].clone()
    return torch.cat(ys, 2).flatten(-2), state, starts


def _plain_states(state: Tensor) -> Tensor:
    """(b, k, g, n, e) to (b, k, d, n)."""
    return state.transpose(3, 4).flatten(2, 3)


def _grouped_states(state: Tensor, like: Tensor) -> Tensor:
    """(b, k, d, n) to (b, k, g, n, e)."""
    b, k, g, n, e = like.shape
    return state.to(like.dtype).reshape(b, k, g, e, n).transpose(3, 4)


def _over_states(h: Tensor, C: Tensor) -> Tensor:
    """Sum h, (b, k, s, g, n, e), times C, (b, k, s, g, n), over the states: (b, k, s, g, e)."""
    return torch.matmul(C.unsqueeze(-2), h).squeeze(-2)


def _over_channels(y: Tensor, h: Tensor) -> Tensor:
    """Sum y, (b, k, s, g, e), times h, (b, k, s, g, n, e), over the channels: (b, k, s, g, n).

    The vector comes first: the product with it as last factor takes up to ten times as long.
    """
    return torch.matmul(y.unsqueeze(-2), h.mT).squeeze(-2)


def _linear_scan(decay: Tensor, h: Tensor, state: Tensor, chunk: int, backwards: bool = False) -> None:
    """Run h[t] = decay[t] h[t-1] + h[t] in place along dimension 2 of (b, k, s, ...), from h[-1] = state.

    Backwards it is h[t] = decay[t] h[t+1] + h[t], from h[s] = state. s must be a multiple of the chunk.
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
