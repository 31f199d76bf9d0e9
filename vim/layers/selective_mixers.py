"""MambaMixer's selective mixers of tokens: S6 along the rows and columns of an image, and along a sequence.

Source: https://arxiv.org/abs/2403.19888v1; docs/mambamixer.md lists what is the paper's and what is ours.
Sizes: b images, l tokens, c channels, e inner channels, n states, r the rank of the step size, k directions.
"""

from typing import get_args

import torch
import torch.nn.functional as F
from timm.layers import register_notrace_module
from torch import Tensor, nn

from .checks import check_choice
from .factory import Factory
from .s6 import S6, SelectFrom, reset_projections, reset_uniform, step_rank
from .scan_paths import cross_merge, cross_scan

D_CONV = 4  # taps of the convolution along a sequence, as Mamba's


@register_notrace_module
class SelectiveTokenMixer(nn.Module):
    """Mix the tokens of an image: a 3 x 3 convolution, four scans, a norm and a gate.

    The scans go along the rows and the columns, each forwards and backwards. It is VMamba's SS2D
    (https://arxiv.org/abs/2401.10166) too; its second version has neither gate nor bias.

    Args:
        dim: c.
        expand: e / c.
        d_state: n.
        gate: multiply by the SiLU of a second projection.
        conv_bias: give the convolution a bias.
        select_from: what the steps, B and C of a token depend on: "conv", the convolved token, as in Mamba; or
            "input", the mixer's input, as in the paper's equations.
        depth: the number of mixers that add to the same stream; the output projection starts at 1 / sqrt(depth) of its
            usual size.

    Raises:
        ValueError: `select_from` is neither.
    """

    def __init__(
        self,
        dim: int,
        *,
        expand: int = 2,
        d_state: int = 16,
        select_from: SelectFrom = "conv",
        gate: bool = True,
        conv_bias: bool = True,
        depth: int = 1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_choice("select_from", select_from, get_args(SelectFrom))
        self.select_from, self.gate, self.depth = str(select_from), gate, depth
        e, r = expand * dim, step_rank(dim)
        dd: Factory = {"device": device, "dtype": dtype}
        self.in_proj = nn.Linear(dim, 2 * e if gate else e, bias=False, **dd)
        self.conv2d = nn.Conv2d(e, e, 3, padding=1, groups=e, bias=conv_bias, **dd)
        self.x_proj = nn.Linear(e if select_from == "conv" else dim, 4 * (r + 2 * d_state), bias=False, **dd)
        self.s6 = S6(e, d_state=d_state, dt_rank=r, reverse=[0, 1], routes=2, **dd)
        self.out_norm = nn.LayerNorm(e, **dd)
        self.out_proj = nn.Linear(e, dim, bias=False, **dd)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw every parameter anew."""
        reset_projections(self, self.depth)

    def forward(self, x: Tensor) -> Tensor:
        """Map (b, rows, columns, c) to the same."""
        rows, columns = x.shape[1], x.shape[2]
        h = self.in_proj(x)
        z = h  # for TorchScript; without a gate it is not used
        if self.gate:
            h, z = h.chunk(2, dim=-1)
        h = F.silu(self.conv2d(h.permute(0, 3, 1, 2))).permute(0, 2, 3, 1)  # (b, rows, columns, e)
        u = cross_scan(h, h)  # (b, l, 2e)
        # read from u, so that h need not be kept
        source = u[..., : h.shape[-1]] if self.select_from == "conv" else x.flatten(1, 2)
        by_rows, by_columns = self.x_proj(source).unflatten(1, (rows, columns)).chunk(2, dim=-1)
        selected = cross_scan(by_rows, by_columns).unflatten(-1, (2, 2, -1)).permute(0, 3, 1, 2, 4)
        y = self.s6(u.unsqueeze(1), selected)
        y = self.out_norm(cross_merge(y, rows, columns))
        if self.gate:
            y = y * F.silu(z)
        return self.out_proj(y)


@register_notrace_module
class SelectiveSequenceMixer(nn.Module):
    """Mix a sequence as in the paper's equations: convolve, scan, sum the directions, gate.

    On tokens it is Mamba; on the transpose of an image, the paper's selective channel mixer for one number of tokens.

    Args:
        dim: c.
        bidirectional: also scan from the end to the start, with another set of parameters.
        expand, d_state, select_from, depth: see :class:`SelectiveTokenMixer`.

    Raises:
        ValueError: `select_from` is neither "conv" nor "input".
    """

    def __init__(
        self,
        dim: int,
        *,
        bidirectional: bool,
        expand: int = 2,
        d_state: int = 16,
        select_from: SelectFrom = "conv",
        depth: int = 1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_choice("select_from", select_from, get_args(SelectFrom))
        self.select_from, self.depth = str(select_from), depth
        self.reverse = [0, 1] if bidirectional else [0]
        k, e, r = len(self.reverse), expand * dim, step_rank(dim)
        dd: Factory = {"device": device, "dtype": dtype}
        self.in_proj = nn.Linear(dim, 2 * e, bias=False, **dd)
        self.conv_weight = nn.Parameter(torch.empty(k, e, D_CONV, **dd))
        self.conv_bias = nn.Parameter(torch.empty(k, e, **dd))
        d_select = e if select_from == "conv" else dim
        self.x_proj = nn.Parameter(torch.empty(k, d_select, r + 2 * d_state, **dd))
        self.s6 = S6(e, d_state=d_state, dt_rank=r, reverse=self.reverse, **dd)
        self.out_proj = nn.Linear(e, dim, bias=False, **dd)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw every parameter anew."""
        reset_projections(self, self.depth)
        reset_uniform(D_CONV, self.conv_weight, self.conv_bias)
        reset_uniform(self.x_proj.shape[1], self.x_proj)

    def forward(self, x: Tensor) -> Tensor:
        """Map (b, l, c) to the same."""
        b, l, _ = x.shape
        h, z = self.in_proj(x).chunk(2, dim=-1)
        k = len(self.reverse)
        h = h.unsqueeze(1).expand(-1, k, -1, -1)
        h = torch.ops.vim.causal_conv1d(h, self.conv_weight, self.conv_bias, reverse=self.reverse)  # (b, k, l, e)
        source = h.transpose(0, 1) if self.select_from == "conv" else x.expand(k, -1, -1, -1)
        selected = torch.bmm(source.reshape(k, b * l, -1), self.x_proj)
        y = self.s6(h, selected.view(k, b, l, 1, -1).transpose(0, 1))
        return self.out_proj(y * F.silu(z))
