"""MambaMixer's selective mixer of an image's channels.

Source: https://arxiv.org/abs/2403.19888v1; docs/mambamixer.md lists what is the paper's and what is ours.
Sizes: b images, l tokens, c channels, w inner channels, n states, k = 2 directions.
"""

from typing import get_args

import torch
import torch.nn.functional as F
from timm.layers import register_notrace_module
from torch import Tensor, nn

import vim.kernels  # noqa: F401  registers the ops

from .checks import check_choice
from .factory import Factory
from .norm import residual_dtype
from .s6 import SelectFrom, reset_projections, reset_states, reset_steps, reset_uniform

D_CONV = 4  # taps of the convolution along the channels, as Mamba's
POOL = 7  # rows and columns of the map that describes a channel


@register_notrace_module
class SelectiveChannelMixer(nn.Module):
    """Mix the channels of an image by a scan along them in both directions; the tokens share steps, B and C.

    The steps, B and C of a channel depend on its map, pooled to a fixed size, so no parameter's shape depends on the
    number of tokens. All tokens of an image share one (w, w) mixing matrix, so the scan is also a matrix product.

    Args:
        dim: c.
        width: w.
        d_state: n.
        select_from: what is pooled: "conv", the convolved channels, or "input", the channels before the convolution.
        depth: see :class:`vim.layers.SelectiveTokenMixer`.

    Raises:
        ValueError: `select_from` is neither.
    """

    def __init__(
        self,
        dim: int,
        width: int,
        *,
        d_state: int = 16,
        select_from: SelectFrom = "conv",
        depth: int = 1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_choice("select_from", select_from, get_args(SelectFrom))
        self.width, self.d_state, self.select_from, self.depth = width, d_state, str(select_from), depth
        self.pool, self.reverse = POOL, [0, 1]
        dd: Factory = {"device": device, "dtype": dtype}
        self.in_proj = nn.Linear(dim, 2 * width, bias=False, **dd)
        self.conv_weight = nn.Parameter(torch.empty(2, D_CONV, **dd))
        self.conv_bias = nn.Parameter(torch.empty(2, **dd))
        self.x_proj = nn.Parameter(torch.empty(2, POOL * POOL, 1 + 2 * d_state, **dd))
        self.dt_bias = nn.Parameter(torch.empty(2, width, **dd))
        self.A_log = nn.Parameter(torch.empty(2, d_state, **dd))
        self.D = nn.Parameter(torch.empty(2, width, **dd))
        self.out_proj = nn.Linear(width, dim, bias=False, **dd)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw every parameter anew."""
        reset_projections(self, self.depth)
        reset_uniform(D_CONV, self.conv_weight, self.conv_bias)
        reset_uniform(self.pool * self.pool, self.x_proj)
        nn.init.ones_(self.D)
        reset_steps(self.dt_bias)
        reset_states(self.A_log)

    def forward(self, x: Tensor) -> Tensor:
        """Map (b, rows, columns, c) to the same."""
        b, rows, columns, _ = x.shape
        l, w = rows * columns, self.width
        v, z = self.in_proj(x).flatten(1, 2).chunk(2, dim=-1)  # (b, l, w) each
        h = v.transpose(1, 2).unsqueeze(1).expand(-1, 2, -1, -1)  # (b, k, w, l): the channels are the sequence
        taps, bias = self.conv_weight.unsqueeze(1).expand(-1, l, -1), self.conv_bias.unsqueeze(1).expand(-1, l)
        u = torch.ops.vim.causal_conv1d(h, taps, bias, reverse=self.reverse)
        pooled = self._pool(u if self.select_from == "conv" else h[:, :1], rows, columns)
        D = self.D.unsqueeze(-1)  # (k, w, 1)
        if w < l:  # scan the columns of the identity, which gives the mixing matrix: fewer scans than tokens
            identity = torch.eye(w, device=u.device, dtype=u.dtype)
            mix = self._scan(identity.expand(b, 2, w, w), pooled, "none") + identity * D.to(u.dtype)
            y = u.flatten(1, 2).transpose(1, 2) @ mix.transpose(2, 3).flatten(1, 2)  # (b, l, 2w) @ (b, 2w, w)
        else:
            y = (self._scan(u, pooled, "sum").squeeze(1) + (u * D.to(u.dtype)).sum(1)).transpose(1, 2)
        return self.out_proj(y * F.silu(z)).unflatten(1, (rows, columns))

    def _pool(self, maps: Tensor, rows: int, columns: int) -> Tensor:
        """Describe each channel of (b, k or 1, w, l) by its map pooled to (pool, pool): (b, k or 1, w, pool^2)."""
        return (
            F.adaptive_avg_pool2d(maps.unflatten(-1, (rows, columns)).flatten(1, 2), self.pool)
            .unflatten(1, (-1, self.width))
            .flatten(-2)
        )

    def _scan(self, u: Tensor, pooled: Tensor, combine: str) -> Tensor:
        """Scan u, (b, k, w, columns), along w. The columns are sequences that share their steps, B and C."""
        b, k, w, columns = u.shape
        source = pooled.expand(b, k, w, -1).transpose(0, 1).reshape(k, b * w, -1)
        selected = torch.bmm(source, self.x_proj).view(k, b, w, 1, -1).transpose(0, 1)
        delta, B, C = selected.split([1, self.d_state, self.d_state], dim=-1)
        dtype = residual_dtype(u)
        # (b, k, w, 1). The op's delta_bias is per column, not per position along w; and a sum in bfloat16 would be up
        # to 3 % of a step off.
        delta = F.softplus(delta.squeeze(-1).to(dtype) + self.dt_bias.unsqueeze(-1).to(dtype)).to(u.dtype)
        A = torch.exp(self.A_log.to(dtype)).neg().unsqueeze(1).expand(-1, columns, -1)
        y, _ = torch.ops.vim.selective_scan(u, delta.expand(u.shape), A, B, C, reverse=self.reverse, combine=combine)
        return y
