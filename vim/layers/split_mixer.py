"""MambaVision's mixer: half of the channels scan, the other half is only convolved.

Source: https://arxiv.org/abs/2407.08083. Sizes: b images, l tokens, c channels, e = c / 2, n states, r the rank of the
step size.
"""

import torch
import torch.nn.functional as F
from timm.layers import register_notrace_module
from torch import Tensor, nn

import vim.kernels  # noqa: F401  registers the ops

from .factory import Factory
from .norm import residual_dtype
from .s6 import reset_states, reset_steps, step_rank

D_CONV = 3  # taps of the convolutions, which are centred on their token


@register_notrace_module
class SplitMixer(nn.Module):
    """Project, convolve both halves, scan one of them forwards, concatenate, project; under the published names.

    Args:
        dim: c, even.
        d_state: n.
        double_dt_bias: add the bias of the step size twice, as the published code does and its weights need.

    Raises:
        ValueError: `dim` is odd.
    """

    def __init__(
        self,
        dim: int,
        *,
        d_state: int = 8,
        double_dt_bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if dim % 2:
            raise ValueError(f"dim must be even, got {dim}")
        e, r = dim // 2, step_rank(dim)
        self.d_state, self.dt_rank, self.double_dt_bias = d_state, r, double_dt_bias
        dd: Factory = {"device": device, "dtype": dtype}
        self.in_proj = nn.Linear(dim, dim, bias=False, **dd)
        self.conv1d_x = nn.Conv1d(e, e, D_CONV, padding=1, groups=e, bias=False, **dd)
        self.conv1d_z = nn.Conv1d(e, e, D_CONV, padding=1, groups=e, bias=False, **dd)
        self.x_proj = nn.Linear(e, r + 2 * d_state, bias=False, **dd)
        self.dt_proj = nn.Linear(r, e, **dd)
        self.A_log = nn.Parameter(torch.empty(e, d_state, **dd))
        self.D = nn.Parameter(torch.empty(e, **dd))
        self.out_proj = nn.Linear(dim, dim, bias=False, **dd)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw every parameter anew, as Mamba does."""
        for module in self.children():
            module.reset_parameters()  # type: ignore[operator]
        reset_steps(self.dt_proj.bias)
        reset_states(self.A_log)
        nn.init.ones_(self.D)

    def forward(self, x: Tensor) -> Tensor:
        """Map (b, l, c) to the same."""
        x, z = self.in_proj(x).transpose(1, 2).chunk(2, dim=1)  # (b, e, l) each
        x = F.silu(self.conv1d_x(x)).transpose(1, 2)
        z = F.silu(self.conv1d_z(z)).transpose(1, 2)
        dt, B, C = self.x_proj(x).unsqueeze(2).split([self.dt_rank, self.d_state, self.d_state], dim=-1)
        dt = dt.squeeze(2)
        # by halves, which is exact: a quantized layer's bias cannot be read
        delta = 2 * self.dt_proj(dt / 2) if self.double_dt_bias else self.dt_proj(dt)
        dtype = residual_dtype(x)
        y, _ = torch.ops.vim.selective_scan(
            *(x.unsqueeze(1), delta.unsqueeze(1), torch.exp(self.A_log.to(dtype)).neg().unsqueeze(0)),
            *(B.unsqueeze(1), C.unsqueeze(1)),
            D=self.D.to(dtype).unsqueeze(0),
            reverse=[0],
            delta_softplus=True,
        )
        return self.out_proj(torch.cat([y.squeeze(1), z], dim=-1))
