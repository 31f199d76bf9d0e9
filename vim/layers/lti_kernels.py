"""The kernels of time-invariant state-space models: what a convolution with them does to a sequence.

Sources: https://arxiv.org/abs/2206.11893 (S4D).
Sizes: l tokens, d channels, m kept states of n = 2 m, c kernels a channel, s systems. Complex parameters are stored as
real ones, and complex numbers are pairs of real tensors: exporters know no others.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal, get_args

import torch
from timm.layers import register_notrace_function, register_notrace_module
from torch import Tensor, nn

from .checks import check_choice, check_counts
from .factory import Factory
from .hippo import Spectrum, diagonal
from .mixer import MixerState
from .norm import matrix_product, residual_dtype

torch.fx.wrap("residual_dtype")
torch.fx.wrap("sum_powers")
Discretization = Literal["zoh", "bilinear"]
Pair = tuple[Tensor, Tensor]  # the real and the imaginary part


def times(a: Pair, b: Pair) -> Pair:
    """Multiply complex numbers."""
    return a[0] * b[0] - a[1] * b[1], a[0] * b[1] + a[1] * b[0]


def divided(a: Pair, b: Pair) -> Pair:
    """Divide complex numbers."""
    norm = b[0] ** 2 + b[1] ** 2
    return (a[0] * b[0] + a[1] * b[1]) / norm, (a[1] * b[0] - a[0] * b[1]) / norm


def exponential(a: Pair) -> Pair:
    """Return e^a."""
    size = torch.exp(a[0])
    return size * torch.cos(a[1]), size * torch.sin(a[1])


def exponential_less_one(a: Pair) -> Pair:
    """Return e^a - 1, exact where it is small."""
    growth = torch.expm1(a[0])
    return growth * torch.cos(a[1]) - 2 * torch.sin(a[1] / 2) ** 2, (growth + 1) * torch.sin(a[1])


def discretize(A: Pair, dt: Tensor, disc: str) -> tuple[Pair, Pair]:
    """Return the logarithm of a state's factor from one token to the next, and what it takes in of B u.

    Args:
        A, dt: the eigenvalue and the step of each state.
        disc: "zoh", the input is constant within a step, or "bilinear".
    """
    real, imaginary = dt * A[0], dt * A[1]
    if disc == "zoh":
        return (real, imaginary), divided(exponential_less_one((real, imaginary)), A)
    below = 1 - real / 2, -imaginary / 2
    norm = below[0] ** 2 + below[1] ** 2
    turn = torch.atan2(imaginary / 2, 1 + real / 2) - torch.atan2(below[1], below[0])
    taken = divided((dt.expand_as(real), torch.zeros_like(real)), below)
    decay = 0.5 * torch.log1p(2 * real / norm)
    return (decay.clamp(min=-100), turn), taken  # e^-100 for a factor of zero, whose logarithm times no tokens is NaN


@register_notrace_function
def sum_powers(weight: Pair, log: Pair, l: int, first: Pair | None = None) -> Tensor:
    """Return ``sum_n Re(weight_n exp(first_n + log_n k))`` for k = 0 ... l - 1, as (c, d, l).

    With k = side i + j, the powers are products of those for i and for j: about 2 m sqrt(l) of them for each channel
    instead of m l, and no tensor (d, m, l).

    Args:
        weight: (c, d, m).
        log, first: (d, m). By default the first are zero.
    """
    c, d, m = weight[0].shape
    side = math.ceil(math.sqrt(l))
    rows = (l + side - 1) // side
    j = torch.arange(side, device=log[0].device, dtype=log[0].dtype)
    i = side * torch.arange(rows, device=log[0].device, dtype=log[0].dtype)
    near = exponential((log[0].unsqueeze(-1) * j, log[1].unsqueeze(-1) * j))  # (d, m, side)
    start = log[0].unsqueeze(-1) * i, log[1].unsqueeze(-1) * i
    if first is not None:
        start = start[0] + first[0].unsqueeze(-1), start[1] + first[1].unsqueeze(-1)
    far = exponential(start)  # (d, m, rows)
    far = times((weight[0].unsqueeze(-1), weight[1].unsqueeze(-1)), far)  # (c, d, m, rows)
    left = torch.cat([far[0], -far[1]], dim=2).permute(1, 0, 3, 2).reshape(d, c * rows, 2 * m)
    kernel = matrix_product(left, torch.cat(near, dim=1))  # (d, c rows, side)
    return kernel.view(d, c, rows * side)[:, :, :l].transpose(0, 1)


@register_notrace_function
def powers(log: Pair, l: int) -> Tensor:
    """Return ``exp(log k)`` for k = 0 ... l - 1, the real and the imaginary parts of (l, m), as (2, l, m)."""
    k = torch.arange(l, device=log[0].device, dtype=log[0].dtype).unsqueeze(1)
    return torch.stack(exponential((log[0] * k, log[1] * k)))


@torch.no_grad()
def reset_log_steps(log_dt: Tensor, dt_min: float, dt_max: float) -> None:
    """Draw the logarithms of steps in place, uniformly between those of `dt_min` and `dt_max`.

    Raises:
        ValueError: `dt_min` is not above 0, or `dt_max` below it or infinite.
    """
    if not 0 < dt_min <= dt_max < math.inf:
        raise ValueError(f"dt_min must be above 0 and at most dt_max, got {dt_min} and {dt_max}")
    log_dt.uniform_(math.log(dt_min), math.log(dt_max))


def check_bandlimit(bandlimit: float | None) -> None:
    """Raise ValueError unless some states are heard."""
    if bandlimit is not None and not bandlimit > 0:
        raise ValueError(f"bandlimit must be above 0, or None for all states, got {bandlimit!r}")


class LTIKernel(nn.Module):
    """The kernels of linear time-invariant systems: a part of a mixer, for one axis and one direction or more.

    A subclass names its parameters of the dynamics, which learn at a rate of their own and are not decayed.
    """

    DYNAMICS: tuple[str, ...] = ()

    def lti_parameters(self) -> dict[str, nn.Parameter]:
        """The parameters of the dynamics, by name: the steps, A and what else drives the states."""
        return {name: getattr(self, name) for name in self.DYNAMICS}

    def forward(self, l: int) -> Tensor:
        """Return the kernels (c, d, l); float32, or float64 in such a model."""
        raise NotImplementedError

    def step(self, x: Tensor, state: MixerState | None) -> tuple[Tensor, MixerState]:
        """Map the next tokens of a sequence, (b, l, d), to what a convolution with the kernels has for them.

        Args:
            state: the state after the tokens before; None at the start of the sequence.

        Returns:
            (b, l, c, d), and the state for the next step, in the precision of the kernels: two tensors (b, d, m).
        """
        raise NotImplementedError


class DiagonalKernel(LTIKernel):
    """The kernels ``K[k] = sum_n Re(weight_n exp(log_n k))``: what a subclass returns as `terms`."""

    def terms(self) -> tuple[Pair, Pair]:
        """Return the weight of each state, (c, d, m), and the logarithm of its factor from token to token, (d, m)."""
        raise NotImplementedError

    @torch.jit.ignore
    def step(self, x: Tensor, state: MixerState | None) -> tuple[Tensor, MixerState]:
        """See :meth:`LTIKernel.step`."""
        weight, log = self.terms()
        factor = exponential(log)
        u = x.to(log[0].dtype).unsqueeze(-1)  # (b, l, d, 1)
        re, im = (log[0].new_zeros(len(x), *log[0].shape) for _ in range(2)) if state is None else state
        outputs = []
        for token in u.unbind(1):
            re, im = times(factor, (re, im))
            re = re + token
            outputs.append((weight[0] * re.unsqueeze(1) - weight[1] * im.unsqueeze(1)).sum(-1))  # (b, c, d)
        return torch.stack(outputs, dim=1), (re, im)


@register_notrace_module
class S4DKernel(DiagonalKernel):
    """The kernels of diagonal systems: ``K[k] = 2 Re sum_n C_n B'_n exp(dt A_n)^k``; parameters under S4's names.

    A = -exp(A_real) - i A_imag.

    Args:
        d_model: d.
        d_state: n, even.
        channels: c, also those of a backward direction.
        init: of A and B, see :func:`vim.layers.hippo.diagonal`.
        disc: how a step is made of A and B: "zoh" or "bilinear".
        n_ssm: s, the pairs of A and B, which divides d: channel j has the pair j modulo s. Default: one for each
            channel. C and the steps are always each channel's own.
        dt_min, dt_max: the range of the initial steps.
        dt_tie: one step for all states of a channel, otherwise one each.
        B_clip: see :func:`vim.layers.hippo.diagonal`.
        bandlimit: leave out states that turn by more than this part of half a circle a token, which a longer step would
            alias. Default: all stay.
        l_max: the longest kernel.

    Raises:
        ValueError: an odd number of states, or systems that do not divide the channels, or a name that is none of the
            above.
    """

    DYNAMICS = ("inv_dt", "A_real", "A_imag", "B")

    def __init__(
        self,
        d_model: int,
        *,
        d_state: int = 64,
        channels: int = 1,
        init: Spectrum = "legs",
        disc: Discretization = "zoh",
        n_ssm: int | None = 1,
        dt_min: float = 1e-3,
        dt_max: float = 1e-1,
        dt_tie: bool = True,
        B_clip: float | None = 2.0,
        bandlimit: float | None = None,
        l_max: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        s = d_model if n_ssm is None else n_ssm
        check_counts(d_model=d_model, d_state=d_state, channels=channels, n_ssm=s)
        check_choice("init", init, get_args(Spectrum))
        check_choice("disc", disc, get_args(Discretization))
        if d_state % 2:
            raise ValueError(f"d_state must be even, got {d_state}")
        if d_model % s:
            raise ValueError(f"n_ssm must divide the {d_model} channels, got {s}")
        check_bandlimit(bandlimit)
        check_counts(l_max=1 if l_max is None else l_max)
        self.d_state, self.init, self.disc = d_state, init, str(disc)
        self.dt_min, self.dt_max, self.B_clip, self.bandlimit, self.l_max = dt_min, dt_max, B_clip, bandlimit, l_max
        m, dd = d_state // 2, Factory(device=device, dtype=dtype)
        self.inv_dt = nn.Parameter(torch.empty(d_model, 1 if dt_tie else m, **dd))  # S4's name for log(dt)
        self.A_real = nn.Parameter(torch.empty(s, m, **dd))
        self.A_imag = nn.Parameter(torch.empty(s, m, **dd))
        self.B = nn.Parameter(torch.empty(1, s, m, 2, **dd))
        self.C = nn.Parameter(torch.empty(channels, d_model, m, 2, **dd))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw the steps and C anew, and set A and B to what `init` names."""
        reset_log_steps(self.inv_dt, self.dt_min, self.dt_max)
        A, B = diagonal(self.init, self.d_state, B_clip=self.B_clip)
        self.A_real.copy_((-A.real).log().expand_as(self.A_real))
        self.A_imag.copy_(A.imag.expand_as(self.A_imag))
        self.B.copy_(torch.view_as_real(B.conj().resolve_conj()).expand_as(self.B))
        nn.init.normal_(self.C, std=math.sqrt(0.5))

    def terms(self, rate: float = 1.0) -> tuple[Pair, Pair]:
        """See :meth:`DiagonalKernel.terms`; `rate` as for :meth:`forward`."""
        dtype = residual_dtype(self.C)
        copies = self.C.shape[1] // self.A_real.shape[0]
        A = -torch.exp(self.A_real.to(dtype)).repeat(copies, 1), -self.A_imag.to(dtype).repeat(copies, 1)
        dt = torch.exp(self.inv_dt.to(dtype))
        log, taken = discretize(A, dt * rate, self.disc)
        B, C = self.B.to(dtype).squeeze(0).repeat(copies, 1, 1), self.C.to(dtype)
        weight = times((2 * C[..., 0], 2 * C[..., 1]), times((B[..., 0], B[..., 1]), taken))
        if self.bandlimit is not None:
            heard = dt * A[1].abs() <= math.pi * self.bandlimit
            weight = weight[0] * heard, weight[1] * heard
        return weight, log

    def forward(self, l: int, rate: float = 1.0) -> Tensor:
        """Return the kernels (c, d, l), or (c, d, l_max) if that is shorter; float32, or float64 in such a model.

        Args:
            rate: what the steps are multiplied by: 2 for a sequence sampled half as often as in training.
        """
        weight, log = self.terms(rate)
        return sum_powers(weight, log, l if self.l_max is None else min(l, self.l_max))


class _Constant(nn.Module):
    """Return what a kernel returned."""

    def __init__(self, kernel: Tensor) -> None:
        super().__init__()
        self.kernel = nn.Buffer(kernel)

    def forward(self, l: int, rate: float = 1.0) -> Tensor:
        return self.kernel


@contextmanager
@torch.no_grad()
def constant_kernels(model: nn.Module, images: Tensor) -> Iterator[None]:
    """Within this context, a model's kernels are the constants that they are for images of this size: for exports."""
    kernels = {name: module for name, module in model.named_modules() if isinstance(module, LTIKernel)}
    seen: dict[str, Tensor] = {}
    hooks = [
        module.register_forward_hook(lambda module, args, kernel, name=name: seen.update({name: kernel}))
        for name, module in kernels.items()
    ]
    try:
        if kernels:
            model(images)
    finally:
        for hook in hooks:
            hook.remove()
    try:
        for name, kernel in seen.items():
            model.set_submodule(name, _Constant(kernel))
        yield
    finally:
        for name, module in kernels.items():
            model.set_submodule(name, module)
