"""What all S6 mixers share: the start of their parameters, and the scan of MambaMixer's mixers.

Sources: https://arxiv.org/abs/2312.00752 (Mamba, S6), https://arxiv.org/abs/2206.11893 (S4D).
Sizes: b images, l tokens, e inner channels, n states, r the rank of the step size, k directions, g routes.
"""

import math
from typing import Literal

import torch
from torch import Tensor, nn

import vim.kernels  # noqa: F401  registers the ops

from .factory import Factory
from .norm import residual_dtype

SelectFrom = Literal["conv", "input"]  # what steps, B and C depend on: the convolved tokens, or the mixer's input


def step_rank(dim: int) -> int:
    """Return the rank of the step size for a mixer of `dim` channels, as Mamba chooses it: dim / 16, rounded up."""
    return math.ceil(dim / 16)


@torch.no_grad()
def reset_states(A_log: Tensor) -> None:
    """Set A_log, (..., n), in place to S4D-real: A = -exp(A_log) = -1 ... -n."""
    A_log.copy_(torch.arange(1, A_log.shape[-1] + 1, device=A_log.device).log().expand_as(A_log))


@torch.no_grad()
def reset_steps(dt_bias: Tensor) -> None:
    """Draw dt_bias in place so that the step size softplus(dt_bias) is log-uniform in [0.001, 0.1]."""
    low, high = math.log(1e-3), math.log(1e-1)
    dt = torch.empty_like(dt_bias, dtype=torch.float32).uniform_(low, high).exp_()
    dt_bias.copy_(dt + torch.log(-torch.expm1(-dt)))  # the inverse of softplus


@torch.no_grad()
def reset_projections(mixer: nn.Module, depth: int) -> None:
    """Draw the parameters of a mixer's parts anew, and scale its output projection by 1 / sqrt(depth).

    Args:
        depth: the number of mixers that add to one residual stream.
    """
    for module in mixer.children():
        module.reset_parameters()  # type: ignore[operator]
    mixer.out_proj.weight /= math.sqrt(depth)  # type: ignore[union-attr, operator]


def reset_uniform(fan_in: int, *parameters: Tensor) -> None:
    """Draw parameters in place as PyTorch's linear and convolutional layers do."""
    for parameter in parameters:
        nn.init.uniform_(parameter, -(fan_in**-0.5), fan_in**-0.5)


class S6(nn.Module):
    """One scan for k directions and g routes, with parameters for each pair; the directions of a route are summed.

    Routes are concatenated along the channels, so that both directions read one tensor.

    Args:
        d_inner: channels of a route.
        d_state: n.
        dt_rank: r.
        reverse: for each direction 1 if it runs from the last token to the first, otherwise 0.
        routes: g.
    """

    def __init__(
        self,
        d_inner: int,
        *,
        d_state: int,
        dt_rank: int,
        reverse: list[int],
        routes: int = 1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.d_state, self.dt_rank, self.reverse = d_state, dt_rank, reverse
        k, e = len(reverse), routes * d_inner
        dd: Factory = {"device": device, "dtype": dtype}
        self.dt_weight = nn.Parameter(torch.empty(k, routes, dt_rank, d_inner, **dd))
        self.dt_bias = nn.Parameter(torch.empty(k, e, **dd))
        self.A_log = nn.Parameter(torch.empty(k, e, d_state, **dd))
        self.D = nn.Parameter(torch.empty(k, e, **dd))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw every parameter anew, as Mamba does."""
        reset_uniform(self.dt_rank, self.dt_weight)
        nn.init.ones_(self.D)
        reset_steps(self.dt_bias)
        reset_states(self.A_log)

    def forward(self, u: Tensor, selected: Tensor) -> Tensor:
        """Scan the tokens and sum the directions.

        Args:
            u: (b, k or 1, l, g d_inner).
            selected: (b, k, l, g, r + 2n), the steps before their projection, B and C of each token.

        Returns:
            (b, l, g d_inner).
        """
        b, k, l, g, _ = selected.shape
        e, r, n = self.A_log.shape[1], self.dt_rank, self.d_state
        dt, B, C = selected.split([r, n, n], dim=-1)
        # One product of all routes with a block-diagonal matrix writes the steps in the layout that the scan reads.
        blocks = torch.eye(g, device=u.device, dtype=self.dt_weight.dtype).view(1, g, 1, g, 1)
        dt_weight = (self.dt_weight.unsqueeze(3) * blocks).reshape(k, g * r, e)  # 4-D, it may lie channels last
        delta = torch.bmm(dt.transpose(0, 1).reshape(k, b * l, g * r), dt_weight).view(k, b, l, e).transpose(0, 1)

        dtype = residual_dtype(u)
        A, D, dt_bias = torch.exp(self.A_log.to(dtype)).neg(), self.D.to(dtype), self.dt_bias.to(dtype)
        u = u.expand(b, k, l, e)  # not copied
        y, _ = torch.ops.vim.selective_scan(
            u, delta, A, B, C, D=D, delta_bias=dt_bias, reverse=self.reverse, delta_softplus=True, combine="sum"
        )
        return y.squeeze(1)
