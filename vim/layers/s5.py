"""S5: one system of n states for all channels.

Source: https://arxiv.org/abs/2208.04933.
Sizes: b images, l tokens, d channels, m kept states of n = 2 m.
"""

import math
from typing import get_args

import torch
import torch.nn.functional as F
from timm.layers import register_notrace_module
from torch import Tensor, nn

from .checks import check_choice, check_counts
from .factory import Factory
from .hippo import diagonalize
from .long_convolution import convolve
from .lti_kernels import Discretization, Pair, discretize, exponential, powers, reset_log_steps, times
from .mixer import MixerState
from .norm import residual_dtype

torch.fx.wrap("convolve")
torch.fx.wrap("powers")
torch.fx.wrap("residual_dtype")


@register_notrace_module
class S5(nn.Module):
    """``x_t = exp(dt A) x_{t-1} + B' u_t, y_t = 2 Re(C x_t) + D u_t``; parameters under the published names.

    Every state runs through a convolution of its own, between the projections of the channels to the states and back.
    A kernel would be d x d for each token.

    Args:
        d_model: d.
        d_state: n.
        blocks: the states start as so many copies of a HiPPO matrix of n / blocks states.
        bidirectional: also run from the last token to the first, with the same states and a C of its own. Both
            directions see the token itself.
        disc: "zoh" or "bilinear".
        dt_min, dt_max: the range of the initial steps, one for each state.

    Raises:
        ValueError: `blocks` does not cut `d_state` into even parts, or a name is none of the above.
    """

    DYNAMICS = ("Lambda_re", "Lambda_im", "B", "log_step")

    def __init__(
        self,
        d_model: int,
        *,
        d_state: int = 64,
        blocks: int = 8,
        bidirectional: bool = False,
        disc: Discretization = "zoh",
        dt_min: float = 1e-3,
        dt_max: float = 1e-1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_counts(d_model=d_model, d_state=d_state, blocks=blocks)
        check_choice("disc", disc, get_args(Discretization))
        if d_state % (2 * blocks):
            raise ValueError(f"blocks must cut d_state, {d_state}, into even parts, got {blocks}")
        self.d_state, self.blocks, self.disc = d_state, blocks, str(disc)
        self.dt_min, self.dt_max = dt_min, dt_max
        m, dd = d_state // 2, Factory(device=device, dtype=dtype)
        self.Lambda_re = nn.Parameter(torch.empty(m, **dd))
        self.Lambda_im = nn.Parameter(torch.empty(m, **dd))
        self.B = nn.Parameter(torch.empty(m, d_model, 2, **dd))
        # None and not left out: TorchScript drops the branches of an attribute that is None
        self.C = None if bidirectional else nn.Parameter(torch.empty(d_model, m, 2, **dd))
        self.C1 = nn.Parameter(torch.empty(d_model, m, 2, **dd)) if bidirectional else None
        self.C2 = nn.Parameter(torch.empty(d_model, m, 2, **dd)) if bidirectional else None
        self.D = nn.Parameter(torch.empty(d_model, **dd))
        self.log_step = nn.Parameter(torch.empty(m, 1, **dd))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw B, C, D and the steps anew, and set the states to those of the HiPPO matrix."""
        n, d = self.d_state // self.blocks, self.D.shape[0]
        form = diagonalize("legs", n)
        A, V = form.A.conj().resolve_conj(), form.V.conj().resolve_conj()  # the published half
        self.Lambda_re.copy_(A.real.repeat(self.blocks))
        self.Lambda_im.copy_(A.imag.repeat(self.blocks))
        self.B.copy_(torch.view_as_real((V.mH @ _normal(self.blocks, n, d, fan_in=d)).flatten(0, 1)))
        for C in (self.C, self.C1, self.C2):
            if C is not None:
                drawn = torch.complex(*(_normal(d, self.blocks, n, fan_in=self.d_state).real for _ in range(2)))
                C.copy_(torch.view_as_real((drawn @ V).flatten(1)))
        nn.init.normal_(self.D)
        reset_log_steps(self.log_step, self.dt_min, self.dt_max)

    def lti_parameters(self) -> dict[str, nn.Parameter]:
        """See :meth:`vim.layers.LTIKernel.lti_parameters`."""
        return {name: getattr(self, name) for name in self.DYNAMICS}

    def _discretize(self) -> tuple[Tensor, Pair]:
        """Return the map from channels to states, (2 m, d), real parts first, and the logarithm of the factors, (m)."""
        dtype = residual_dtype(self.B)  # every state decays
        A = self.Lambda_re.to(dtype).clamp(max=-1e-4), self.Lambda_im.to(dtype)
        log, taken = discretize(A, torch.exp(self.log_step.to(dtype)).squeeze(1), self.disc)
        B = self.B.to(dtype)
        return torch.cat(times((taken[0].unsqueeze(1), taken[1].unsqueeze(1)), (B[..., 0], B[..., 1]))), log

    def _run(self, v: Tensor, log: Pair) -> Tensor:
        """Map what enters the states, (b, l, 2 m), to the states (b, l, 2 m)."""
        parts = v.to(log[0].dtype).unflatten(2, (2, -1)).transpose(1, 2)  # (b, 2, l, m)
        y = convolve(parts.unsqueeze(2), powers(log, v.shape[1]), dim=-2)  # (b, 2, 2, l, m)
        return torch.cat([y[:, 0, 0] - y[:, 1, 1], y[:, 0, 1] + y[:, 1, 0]], dim=-1)

    def _read(self, x: Tensor, C: Tensor) -> Tensor:
        """Map states (b, l, 2 m) to channels (b, l, d)."""
        C = C.to(x.dtype)
        return F.linear(x, torch.cat([2 * C[..., 0], -2 * C[..., 1]], dim=1))

    def forward(self, u: Tensor) -> Tensor:
        """Map (b, l, d) to the same."""
        into, log = self._discretize()
        v = F.linear(u.to(into.dtype), into)
        y = self.D.to(into.dtype) * u
        if self.C is not None:
            y = y + self._read(self._run(v, log), self.C)
        if self.C1 is not None and self.C2 is not None:
            y = y + self._read(self._run(v, log), self.C1)
            y = y + self._read(self._run(v.flip(1), log).flip(1), self.C2)
        return y

    @torch.jit.ignore
    def step(self, u: Tensor, state: MixerState | None) -> tuple[Tensor, MixerState]:
        """Map the next tokens of a sequence, (b, l, d), to the same; the state is two tensors (b, m)."""
        assert self.C is not None, "a bidirectional S5 has no step"
        into, log = self._discretize()
        factor = exponential(log)
        re, im = (log[0].new_zeros(len(u), len(log[0])) for _ in range(2)) if state is None else state
        states = []
        for token in F.linear(u.to(into.dtype), into).unbind(1):
            entering = token.chunk(2, dim=-1)
            re, im = times(factor, (re, im))
            re, im = re + entering[0], im + entering[1]
            states.append(torch.cat([re, im], dim=-1))
        return self.D.to(into.dtype) * u + self._read(torch.stack(states, dim=1), self.C), (re, im)


def _normal(*size: int, fan_in: int) -> Tensor:
    """Draw complex128 numbers without imaginary parts, with deviation 1 / sqrt(fan_in)."""
    drawn = torch.randn(size, dtype=torch.float64, device="cpu") / math.sqrt(fan_in)
    return drawn.to(torch.complex128)
