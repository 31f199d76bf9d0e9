"""VSSD's mixer: state space duality without an order of the tokens, as two matrix products.

Source: https://arxiv.org/abs/2407.18559. Sizes: b images, l tokens, c channels, e inner channels in h heads of p, g
groups, n states.
"""

import torch
import torch.nn.functional as F
from timm.layers import register_notrace_module
from torch import Tensor, nn

from .factory import Factory
from .norm import ResidualNorm, residual_dtype, without_autocast
from .s6 import reset_steps


@register_notrace_module
class NonCausalSSD(nn.Module):
    """Project, convolve, sum all tokens into one state, read it for each token, normalise, gate, project.

    A head's state is ``sum_j m_j B_j x_j^T`` with the weights ``m = softplus(dt + dt_bias) exp(A_log)``; a token reads
    ``C state + D x``. The state is the sum and not the mean of the tokens, so it grows with the image: it is float32
    in 16-bit precision too.

    Args:
        dim: c.
        num_heads: h.
        d_state: n.
        expand: e / c.
        ngroups: g. Head i takes B and C of group i mod g, as in the published code; Mamba-2's takes group i g // h.

    Raises:
        ValueError: e is no multiple of the heads, or the heads are none of the groups.
    """

    def __init__(
        self,
        dim: int,
        *,
        num_heads: int,
        d_state: int = 64,
        expand: int = 2,
        ngroups: int = 1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        e = expand * dim
        if e % num_heads:
            raise ValueError(f"the inner channels must be a multiple of the heads, got {e} and {num_heads}")
        if num_heads % ngroups:
            raise ValueError(f"the heads must be a multiple of the groups, got {num_heads} and {ngroups}")
        self.d_inner, self.num_heads, self.d_state, self.ngroups = e, num_heads, d_state, ngroups
        dd: Factory = {"device": device, "dtype": dtype}
        convolved = e + 2 * ngroups * d_state
        self.in_proj = nn.Linear(dim, e + convolved + num_heads, bias=False, **dd)
        self.conv2d = nn.Conv2d(convolved, convolved, 3, padding=1, groups=convolved, **dd)
        self.dt_bias, self.A_log, self.D = (nn.Parameter(torch.empty(num_heads, **dd)) for _ in range(3))
        self.norm = ResidualNorm(e, **dd)
        self.out_proj = nn.Linear(e, dim, bias=False, **dd)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw every parameter anew, as Mamba-2 does."""
        for module in self.children():
            module.reset_parameters()  # type: ignore[operator]
        reset_steps(self.dt_bias)
        with torch.no_grad():
            self.A_log.uniform_(1, 16).log_()
        nn.init.ones_(self.D)

    def forward(self, x: Tensor) -> Tensor:
        """Map (b, rows, columns, c) to the same."""
        e, h, gn = self.d_inner, self.num_heads, self.ngroups * self.d_state
        z, xBC, dt = self.in_proj(x).split([e, e + 2 * gn, h], dim=-1)
        xBC = xBC.contiguous().permute(0, 3, 1, 2)  # otherwise the convolution's copy is slower
        xBC = F.silu(self.conv2d(xBC)).permute(0, 2, 3, 1)
        if torch.jit.is_scripting():
            y = self._mix(xBC, dt)
        else:
            with without_autocast(x.device.type):
                y = self._mix(xBC, dt)
        return self.out_proj(self.norm(y) * z)

    def _mix(self, xBC: Tensor, dt: Tensor) -> Tensor:
        """Sum the tokens and read the sum: (b, rows, columns, e + 2 g n) and (b, rows, columns, h) to (..., e)."""
        b, rows, columns, _ = xBC.shape
        h, g, n, dtype = self.num_heads, self.ngroups, self.d_state, residual_dtype(xBC)
        m = F.softplus(dt.to(dtype) + self.dt_bias.to(dtype)) * torch.exp(self.A_log.to(dtype))
        x, B, C = xBC.to(dtype).flatten(1, 2).split([self.d_inner, g * n, g * n], dim=-1)
        x = x.unflatten(-1, (h // g, g, -1))  # (b, l, h / g, g, p)
        weighted = x * m.view(b, -1, h // g, g, 1)
        state = _by_group(B, g).transpose(2, 3) @ weighted.permute(0, 3, 1, 2, 4).flatten(3)  # (b, g, n, e / g)
        y = (_by_group(C, g) @ state).unflatten(-1, (h // g, -1)).permute(0, 2, 3, 1, 4)  # as x
        y = torch.addcmul(y, x, self.D.to(dtype).view(h // g, g, 1))
        return y.reshape(b, rows, columns, -1)


def _by_group(t: Tensor, groups: int) -> Tensor:
    """Map (b, l, g n) to (b, g, l, n)."""
    return t.unflatten(-1, (groups, -1)).transpose(1, 2)
