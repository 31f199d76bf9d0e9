"""State space duality as products of matrices: any device, any dtype, no compiler.

The tokens are cut into chunks. In a chunk, y is a matrix of decays times products of B and C, times x; from chunk to
chunk the state is carried. A reversed direction has the mirrored matrix: nothing is flipped. Where a token does not see
another, the exponent of the decay is minus infinity before its exponential is taken: none overflows. The backward pass
keeps nothing: it computes decays and states again.

Sizes: b images, k directions, l tokens, h heads of p channels, g groups of r heads, n states; c chunks of q tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..directions import add_up, before_the_gate
from .reference import Inputs, Options

CHUNK = 32  # tokens, at most


@dataclass
class _Direction:
    """One direction in chunks. Behind the last token are tokens without effect, whose steps and x are zero."""

    backwards: bool
    x: Tensor  # (b, c, q, g, r, p)
    dt: Tensor  # (b, c, q, g, r), the steps
    A: Tensor  # (g, r)
    B: Tensor  # (b, g, c, q, n)
    C: Tensor  # (b, g, c, q, n)
    state: Tensor  # (b, g, n, r, p), before the first token

    def __post_init__(self) -> None:
        a = (self.dt * self.A).permute(0, 3, 4, 1, 2)  # (b, g, r, c, q), the exponents of the decays
        self.sums = a.flip(-1).cumsum(-1).flip(-1) if self.backwards else a.cumsum(-1)  # with the token's own
        self.total = self.sums[..., 0 if self.backwards else -1]  # (b, g, r, c)
        mask = torch.ones(2 * a.shape[-1:], dtype=torch.bool, device=a.device)
        self.unseen = mask.tril(-1) if self.backwards else mask.triu(1)  # (q, q): token i comes before token j

    def chunks(self) -> Sequence[int]:
        """Return the numbers of the chunks in the order of the direction."""
        return range(self.x.shape[1])[:: -1 if self.backwards else 1]

    def decays(self) -> Tensor:
        """Return the decays from token j to token i of a chunk, (b, g, r, c, q, q), zero if i does not see j."""
        exponents = self.sums.unsqueeze(-1) - self.sums.unsqueeze(-2)
        return exponents.masked_fill(self.unseen, -torch.inf).exp()  # not in place: it is exported

    def since_start(self) -> Tensor:
        """Return the decay from the state before the chunk to each token, (b, c, q, g, r, 1)."""
        return _by_token(self.sums.exp()).unsqueeze(-1)

    def until_end(self) -> Tensor:
        """Return the decay from each token to the end of the chunk, (b, c, q, g, r, 1)."""
        return _by_token((self.total.unsqueeze(-1) - self.sums).exp()).unsqueeze(-1)

    def starts(self, entering: Tensor) -> tuple[Tensor, Tensor]:
        """Return the state before each chunk, (b, g, c, n, r p), and the last one, (b, g, n, r, p).

        Args:
            entering: dt x, decayed until the end of the chunk, (b, g, c, q, r p).
        """
        return _carry(self.B.mT @ entering, self.total, self.state, self.chunks())

    def y(self) -> tuple[Tensor, Tensor]:
        """Return y without D, (b, c, q, g, r, p), and the last state."""
        driven = self.x * self.dt.unsqueeze(-1)
        starts, state = self.starts(_by_group(driven * self.until_end()))
        y = _by_head(_of_group(self.C @ starts, self.x) * self.since_start())
        weights = self.decays() * (self.C @ self.B.mT).unsqueeze(2)
        y = torch.baddbmm(*(t.reshape(-1, *t.shape[-2:]) for t in (y, weights, _by_head(driven)))).view(y.shape)
        return _by_chunk(y), state


def ssd(inputs: Inputs, options: Options) -> tuple[Tensor, Tensor]:
    """See :func:`vim.kernels.ssd.reference.ssd`."""
    y, state = _before_the_gate(inputs, options)
    if inputs.z is not None:
        y = y * F.silu(inputs.z.to(y.dtype))
    return y.to(inputs.x.dtype).contiguous(), state


def ssd_backward(grad_y: Tensor, grad_state: Tensor | None, inputs: Inputs, options: Options) -> Inputs:
    """Return the gradients of the inputs, at least float32."""
    ungated = None if inputs.z is None else _before_the_gate(inputs, options)[0]
    dtype = torch.promote_types(inputs.x.dtype, torch.float32)
    dy, dz = before_the_gate(grad_y.to(dtype), inputs.z, ungated, options.combine, inputs.x.shape)
    directions = []
    for k in range(len(options.reverse)):
        pull = None if grad_state is None else grad_state[:, k].to(dtype)
        directions.append(_differentiate(dy[:, k], pull, inputs, options, k))
    gradients = zip(*directions, strict=True)
    dx, ddt, dB, dC, dA, dD, dstate = (torch.stack(each, 1 if each[0].dim() > 2 else 0) for each in gradients)
    return Inputs(
        x=dx,
        dt=ddt,
        A=dA,
        B=dB,
        C=dC,
        D=None if inputs.D is None else dD,
        z=dz,
        dt_bias=None if inputs.dt_bias is None else ddt.sum((0, 2)),
        initial_state=None if inputs.initial_state is None else dstate,
    )


def _before_the_gate(inputs: Inputs, options: Options) -> tuple[Tensor, Tensor]:
    """Return y before the gate, its directions added up if the options say so, and the last states."""
    ys, states = [], []
    l = inputs.x.shape[2]
    for k in range(len(options.reverse)):
        direction = _prepare(inputs, options, k)
        y, state = direction.y()
        if inputs.D is not None:
            y = torch.addcmul(y, inputs.D[k].to(y.dtype).view(y.shape[3:]), direction.x)
        ys.append(_plain(y, l))
        states.append(_plain_state(state))
    return add_up(torch.stack(ys, 1), options.combine), torch.stack(states, 1)


def _differentiate(
    dy: Tensor, pull: Tensor | None, inputs: Inputs, options: Options, k: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of x, dt, B, C, A, D and the initial state of direction k.

    Args:
        dy: the gradient of y before the gate, (b, l, h, p).
        pull: the gradient of the last state, (b, h, p, n), or None for zeros.
    """
    d = _prepare(inputs, options, k)
    (b, l, h, _), sizes = dy.shape, d.x.shape
    dy = _chunks(dy, *sizes[1:])
    driven = d.x * d.dt.unsqueeze(-1)

    # through the states: what enters one, with its gradient at the end of the chunk, and what reads one at its start
    entering = _by_group(driven * d.until_end())
    leaving = _by_group(dy * d.since_start())
    starts, _ = d.starts(entering)
    last = torch.zeros_like(d.state) if pull is None else _grouped_state(pull, d.state)
    ends, dstate = _carry(d.C.mT @ leaving, d.total, last, d.chunks()[::-1])
    pulled = d.B @ ends  # (b, g, c, q, r p)
    dB, dC = entering @ ends.mT, leaving @ starts.mT
    read = _over_channels(leaving * (d.C @ starts), d.x)
    kept = _over_channels(entering * pulled, d.x)
    passed = d.total.exp() * _over_channels((ends * starts).sum(3, keepdim=True), d.x).squeeze(-1)

    # within the chunk: `each` is the gradient of each product of B and C, and then of each exponent of a decay
    products = (d.C @ d.B.mT).unsqueeze(2)  # (b, g, 1, c, q, q)
    decays, dy_by_head = d.decays(), _by_head(dy).contiguous()
    each = (dy_by_head @ _by_head(driven).mT).mul_(decays)
    shared = each.sum(2)
    dB, dC = dB + shared.mT @ d.C, dC + shared @ d.B
    each.mul_(products)
    ddriven = decays.mul_(products).mT @ dy_by_head
    ddriven = torch.addcmul(_by_chunk(ddriven), _of_group(pulled, d.x), d.until_end())

    # the step of a token is in every decay across it: those from a token before it to itself or one behind it
    before = d.unseen.to(dy.dtype)  # (q, q), whether token i comes before token j
    across = (each @ before).masked_fill_(d.unseen, 0).sum(-2)
    da = across + read @ (1 - before) + kept @ before + passed.unsqueeze(-1)
    da = _by_token(da)
    ddt = torch.addcmul((d.x * ddriven).sum(-1), d.A, da)
    ddt = ddt.reshape(b, -1, h)[:, :l] * _slope(inputs, options, k)
    dx = ddriven * d.dt.unsqueeze(-1)
    if inputs.D is not None:
        dx = torch.addcmul(dx, inputs.D[k].to(dx.dtype).view(sizes[3:]), dy)
    dA, dD = (d.dt * da).sum((0, 1, 2)).flatten(), (dy * d.x).sum((0, 1, 2)).flatten(0, 1)
    dB, dC = (t.permute(0, 2, 3, 1, 4).flatten(1, 2)[:, :l] for t in (dB, dC))
    return _plain(dx, l), ddt, dB, dC, dA, dD, _plain_state(dstate)


def _prepare(inputs: Inputs, options: Options, k: int) -> _Direction:
    """Cut direction k into chunks of nearly one length."""
    dtype = torch.promote_types(inputs.x.dtype, torch.float32)
    x, B, C = (t[:, k].to(dtype) for t in (inputs.x, inputs.B, inputs.C))
    (b, l, h, p), (g, n) = x.shape, B.shape[2:]
    r, c = h // g, -(-l // (options.chunk_size or CHUNK))
    q = -(-l // c)
    c = -(-l // q)
    state = x.new_zeros(b, g, n, r, p)
    if inputs.initial_state is not None:
        state = _grouped_state(inputs.initial_state[:, k].to(dtype), state)
    return _Direction(
        backwards=bool(options.reverse[k]),
        x=_chunks(x, c, q, g, r, p),
        dt=_chunks(_steps(inputs, options, k)[1].clamp(options.dt_min, options.dt_max), c, q, g, r),
        A=inputs.A[k].to(dtype).view(g, r),
        B=_chunks(B, c, q, g, n).permute(0, 3, 1, 2, 4),
        C=_chunks(C, c, q, g, n).permute(0, 3, 1, 2, 4),
        state=state,
    )


def _steps(inputs: Inputs, options: Options, k: int) -> tuple[Tensor, Tensor]:
    """Return the steps of direction k, (b, l, h), before the softplus, and before they are kept in their limits."""
    raw = inputs.dt[:, k].to(inputs.A.dtype)
    raw = raw if inputs.dt_bias is None else raw + inputs.dt_bias[k]
    return raw, F.softplus(raw) if options.dt_softplus else raw


def _slope(inputs: Inputs, options: Options, k: int) -> Tensor:
    """Return the derivative of the steps of direction k, (b, l, h), by dt."""
    raw, steps = _steps(inputs, options, k)
    inside = (steps >= options.dt_min) & (steps <= options.dt_max)
    return inside * torch.sigmoid(raw) if options.dt_softplus else inside.to(raw.dtype)


def _carry(new: Tensor, total: Tensor, state: Tensor, chunks: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Run state = exp(total) state + new over the chunks.

    Args:
        new: (b, g, c, n, r p).
        total: (b, g, r, c).
        state: (b, g, n, r, p).
        chunks: their order.

    Returns:
        The state before each chunk, (b, g, c, n, r p), and the last one, (b, g, n, r, p).
    """
    new, decays = new.unflatten(-1, state.shape[3:]), total.exp()[:, :, None, :, None]
    before = [state] * len(chunks)
    for c in chunks:
        before[c] = state
        state = torch.addcmul(new[:, :, c], decays[..., c], state)
    return torch.stack(before, 2).flatten(-2), state


def _chunks(t: Tensor, c: int, q: int, *sizes: int) -> Tensor:
    """(b, l, ...) to (b, c, q, ...), with zeros behind the last token."""
    b, l = t.shape[:2]
    t = t if l == c * q else torch.cat([t, t.new_zeros(b, c * q - l, *t.shape[2:])], 1)
    return t.reshape(b, c, q, *sizes)


def _plain(t: Tensor, l: int) -> Tensor:
    """(b, c, q, g, r, p) to (b, l, h, p)."""
    b, c, q, g, r, p = t.shape
    return t.reshape(b, c * q, g * r, p)[:, :l]


def _plain_state(state: Tensor) -> Tensor:
    """(b, g, n, r, p) to (b, h, p, n)."""
    return state.permute(0, 1, 3, 4, 2).flatten(1, 2)


def _grouped_state(state: Tensor, like: Tensor) -> Tensor:
    """(b, h, p, n) to (b, g, n, r, p)."""
    b, g, n, r, p = like.shape
    return state.reshape(b, g, r, p, n).permute(0, 1, 4, 2, 3)


def _by_token(t: Tensor) -> Tensor:
    """(b, g, r, c, q) to (b, c, q, g, r)."""
    return t.permute(0, 3, 4, 1, 2)


def _by_group(t: Tensor) -> Tensor:
    """(b, c, q, g, r, p) to (b, g, c, q, r p)."""
    return t.flatten(-2).permute(0, 3, 1, 2, 4)


def _of_group(t: Tensor, like: Tensor) -> Tensor:
    """(b, g, c, q, r p) to (b, c, q, g, r, p)."""
    return t.permute(0, 2, 3, 1, 4).unflatten(-1, like.shape[4:])


def _by_head(t: Tensor) -> Tensor:
    """(b, c, q, g, r, p) to (b, g, r, c, q, p)."""
    return t.permute(0, 3, 4, 1, 2, 5)


def _by_chunk(t: Tensor) -> Tensor:
    """(b, g, r, c, q, p) to (b, c, q, g, r, p)."""
    return t.permute(0, 3, 4, 1, 2, 5)


def _over_channels(t: Tensor, like: Tensor) -> Tensor:
    """Sum (b, g, c, q, r p) over the channels: (b, g, r, c, q)."""
    return t.unflatten(-1, like.shape[4:]).sum(-1).permute(0, 1, 4, 2, 3)
