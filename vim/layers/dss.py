"""DSS's kernels: diagonal systems whose states are no conjugate pairs.

Sources: https://arxiv.org/abs/2203.14343 (DSS), https://github.com/ag1988/dss.
Sizes: l tokens, d channels, n states, c kernels a channel.
"""

from typing import Literal, get_args

import torch
from timm.layers import register_notrace_module
from torch import Tensor, nn

from .checks import check_choice, check_counts
from .factory import Factory
from .hippo import diagonalize
from .lti_kernels import DiagonalKernel, Pair, exponential_less_one, reset_log_steps, sum_powers, times
from .mixer import MixerState
from .norm import residual_dtype

torch.fx.wrap("residual_dtype")
torch.fx.wrap("sum_powers")
Scale = Literal["softmax", "exp", "exp-no-scale"]


@register_notrace_module
class DSSKernel(DiagonalKernel):
    """The kernels ``K[k] = Re sum_n W_n scale_n exp(dt L_n k)``, all states shared by all channels; published names.

    Args:
        d_model: d.
        d_state: n; none of them is another's conjugate.
        channels: c, also those of a backward direction.
        disc: "exp", the input is constant within a step; "exp-no-scale", no scale; "softmax", the published default:
            each state's factors are divided by their sum over the l tokens, so that the kernel depends on l, and it
            cannot go on step by step. With "softmax" a state may also grow.
        dt_min, dt_max: the range of the initial steps.
    """

    def __init__(
        self,
        d_model: int,
        *,
        d_state: int = 64,
        channels: int = 1,
        disc: Scale = "exp",
        dt_min: float = 1e-3,
        dt_max: float = 1e-1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_counts(d_model=d_model, d_state=d_state, channels=channels)
        check_choice("disc", disc, get_args(Scale))
        self.disc, self.dt_min, self.dt_max = str(disc), dt_min, dt_max
        dd = Factory(device=device, dtype=dtype)
        self.log_dt = nn.Parameter(torch.empty(d_model, **dd))
        softmax = disc == "softmax"
        # None and not left out: TorchScript drops the branches of an attribute that is None
        self.Lambda = nn.Parameter(torch.empty(d_state, 2, **dd)) if softmax else None
        self.Lambda_log_neg_re = None if softmax else nn.Parameter(torch.empty(d_state, **dd))
        self.Lambda_im = None if softmax else nn.Parameter(torch.empty(d_state, **dd))
        self.W = nn.Parameter(torch.empty(channels, d_model, d_state, 2, **dd))
        self.reset_parameters()

    def lti_parameters(self) -> dict[str, nn.Parameter]:
        """See :meth:`LTIKernel.lti_parameters`."""
        return {name: parameter for name, parameter in self.named_parameters() if name != "W"}

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw the steps and W anew, and set the states to the HiPPO matrix's of twice as many, fastest first."""
        reset_log_steps(self.log_dt, self.dt_min, self.dt_max)
        nn.init.normal_(self.W)
        states = diagonalize("legs", 2 * self.W.shape[2]).A.flip(0)
        if self.Lambda is not None:
            self.Lambda.copy_(torch.view_as_real(states))
        if self.Lambda_log_neg_re is not None and self.Lambda_im is not None:
            self.Lambda_log_neg_re.copy_((-states.real).log())
            self.Lambda_im.copy_(states.imag)

    def _states(self, dtype: torch.dtype) -> Pair:
        """Return the eigenvalues, (n)."""
        if self.Lambda is not None:
            return self.Lambda[:, 0].to(dtype), self.Lambda[:, 1].to(dtype)
        assert self.Lambda_log_neg_re is not None and self.Lambda_im is not None
        return -torch.exp(self.Lambda_log_neg_re.to(dtype)), self.Lambda_im.to(dtype)

    def terms(self) -> tuple[Pair, Pair]:
        """See :meth:`DiagonalKernel.terms`; not for "softmax"."""
        dtype = residual_dtype(self.W)
        L, dt = self._states(dtype), torch.exp(self.log_dt.to(dtype)).unsqueeze(1)
        log = dt * L[0], dt * L[1]
        weight = self.W[..., 0].to(dtype), self.W[..., 1].to(dtype)
        if self.disc == "exp":
            norm = (L[0] ** 2 + L[1] ** 2).clamp(min=1e-7)  # as published
            weight = times(weight, times(exponential_less_one(log), (L[0] / norm, -L[1] / norm)))
        return weight, log

    def _softmax(self, l: int) -> tuple[Pair, Pair, Pair]:
        """Return the weights, the logarithms of the factors, and those at the first token."""
        (weight, log), L = self.terms(), self._states(residual_dtype(self.W))
        grows = (L[0] > 0).to(log[0].dtype)  # its largest factor is the last
        down = log[0] * (1 - 2 * grows), log[1] * (1 - 2 * grows)
        total = times(exponential_less_one((down[0] * l, down[1] * l)), L)
        norm = total[0] ** 2 + total[1] ** 2 + 1e-7  # as published
        share = times(exponential_less_one(down), (total[0] / norm, -total[1] / norm))
        last = grows * (1 - l)
        return times(weight, share), log, (log[0] * last, log[1] * last)

    def forward(self, l: int) -> Tensor:
        """Return the kernels (c, d, l); float32, or float64 in such a model."""
        if self.disc == "softmax":
            weight, log, first = self._softmax(l)
            return sum_powers(weight, log, l, first)
        weight, log = self.terms()
        return sum_powers(weight, log, l)

    @torch.jit.ignore
    def step(self, x: Tensor, state: MixerState | None) -> tuple[Tensor, MixerState]:
        """See :meth:`LTIKernel.step`."""
        if self.disc == "softmax":
            raise ValueError("disc='softmax' needs the whole sequence: take 'exp' to go on step by step")
        return super().step(x, state)
