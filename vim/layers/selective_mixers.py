"""MambaMixer's selective token and channel mixers: S6 along the tokens of an image, along its channels, along a series.

Source: https://arxiv.org/abs/2403.19888v1; docs/mambamixer.md tells the paper's choices from ours.
Sizes: b images, l tokens, c channels, e inner channels, w of a channel mixer, n states, r the rank of the step size,
k directions, g routes.
"""

import math
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from timm.layers import register_notrace_module
from torch import Tensor, nn

import vim.kernels  # noqa: F401  registers the ops

from .mamba import MambaMixer
from .norm import residual_dtype
from .scan_paths import cross_merge, cross_scan

SelectFrom = Literal["conv", "input"]
Form = Literal["auto", "scan", "matrix"]


class S6(nn.Module):
    """k directions along g routes, each with its own parameters, in one scan; the directions of a route are added up.

    The routes lie beside each other in the channels, so that the directions read one tensor.
    """

    def __init__(
        self,
        d_inner: int,
        *,
        d_state: int,
        dt_rank: int,
        reverse: list[bool],
        routes: int = 1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.d_state, self.dt_rank, self.reverse = d_state, dt_rank, reverse
        k, e = len(reverse), routes * d_inner
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.dt_weight = nn.Parameter(torch.empty(k, routes, dt_rank, d_inner, **dd))
        self.dt_bias = nn.Parameter(torch.empty(k, e, **dd))
        self.A_log = nn.Parameter(torch.empty(k, e, d_state, **dd))
        self.D = nn.Parameter(torch.empty(k, e, **dd))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw every parameter anew, as Mamba does."""
        bound = self.dt_rank**-0.5
        nn.init.uniform_(self.dt_weight, -bound, bound)
        nn.init.ones_(self.D)
        with torch.no_grad():
            MambaMixer._reset_dt_bias(self.dt_bias)
            reset_states(self.A_log)

    def forward(self, u: Tensor, selected: Tensor) -> Tensor:
        """Scan u, (b, k or 1, l, g e), with steps, B and C in `selected`, (b, k, l, g, r + 2n), to (b, l, g e)."""
        b, k, l, g, _ = selected.shape
        e, r, n = self.A_log.shape[1], self.dt_rank, self.d_state
        dt, B, C = selected.split([r, n, n], dim=-1)
        # a product of all routes with a block-diagonal matrix writes the steps as the scan reads them
        blocks = torch.eye(g, device=u.device, dtype=self.dt_weight.dtype).view(1, g, 1, g, 1)
        dt_weight = (self.dt_weight.unsqueeze(3) * blocks).reshape(k, g * r, e)  # 4-D, it may lie channels last
        delta = torch.bmm(dt.transpose(0, 1).reshape(k, b * l, g * r), dt_weight).view(k, b, l, e).transpose(0, 1)

        dtype = residual_dtype(u)
        A, D, dt_bias = torch.exp(self.A_log.to(dtype)).neg(), self.D.to(dtype), self.dt_bias.to(dtype)
        u = u.expand(b, k, l, e)  # not copied
        y, _ = torch.ops.vim.selective_scan(
            u, delta, A, B, C, D, None, dt_bias, None, True, self.reverse, "sum", False, "auto"
        )
        return y.squeeze(1)


def reset_states(A_log: Tensor) -> None:
    """S4D-real, in place: A = -1 ... -n."""
    n = A_log.shape[-1]
    A_log.copy_(torch.arange(1, n + 1, device=A_log.device).log().expand_as(A_log))


def _check_select_from(select_from: str) -> None:
    if select_from not in get_args(SelectFrom):
        raise ValueError(f"select_from must be 'conv' or 'input', got {select_from!r}")


@register_notrace_module
class SelectiveTokenMixer(nn.Module):
    """Mix the tokens of an image: a 3 x 3 convolution, four scans (rows, columns, both back), a norm and a gate.

    Args:
        dim, expand, d_state, dt_rank: c, e / c, n, and r (by default c / 16, rounded up).
        select_from: what the steps, B and C of a token follow from: "conv", the convolved token, as in Mamba; or
            "input", what comes into the mixer, as in the paper's equations.
        depth: how many mixers add to the same stream; the output projection starts at 1 / sqrt(depth) of its usual
            size.

    Raises:
        ValueError: `select_from` is neither.
    """

    def __init__(
        self,
        dim: int,
        *,
        expand: int = 2,
        d_state: int = 16,
        dt_rank: int | None = None,
        select_from: SelectFrom = "conv",
        depth: int = 1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        _check_select_from(select_from)
        self.select_from, self.depth = str(select_from), depth
        e, r = expand * dim, math.ceil(dim / 16) if dt_rank is None else dt_rank
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.in_proj = nn.Linear(dim, 2 * e, bias=False, **dd)
        self.conv2d = nn.Conv2d(e, e, 3, padding=1, groups=e, **dd)
        self.x_proj = nn.Linear(e if select_from == "conv" else dim, 4 * (r + 2 * d_state), bias=False, **dd)
        self.s6 = S6(e, d_state=d_state, dt_rank=r, reverse=[False, True], routes=2, **dd)
        self.out_norm = nn.LayerNorm(e, **dd)
        self.out_proj = nn.Linear(e, dim, bias=False, **dd)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw every parameter anew."""
        _reset_parts(self, self.depth)

    def forward(self, x: Tensor) -> Tensor:
        """Map (b, rows, columns, c) to the same."""
        rows, columns = x.shape[1], x.shape[2]
        h, z = self.in_proj(x).chunk(2, dim=-1)
        h = F.silu(self.conv2d(h.permute(0, 3, 1, 2))).permute(0, 2, 3, 1)  # (b, rows, columns, e)
        u = cross_scan(h, h)  # (b, l, 2e)
        # read from u, so that h need not be kept
        source = u[..., : h.shape[-1]] if self.select_from == "conv" else x.flatten(1, 2)
        by_rows, by_columns = self.x_proj(source).unflatten(1, (rows, columns)).chunk(2, dim=-1)
        selected = cross_scan(by_rows, by_columns).unflatten(-1, (2, 2, -1)).permute(0, 3, 1, 2, 4)
        y = self.s6(u.unsqueeze(1), selected)
        y = self.out_norm(cross_merge(y, rows, columns))
        return self.out_proj(y * F.silu(z))


@register_notrace_module
class SelectiveSequenceMixer(nn.Module):
    """Mix a sequence: convolve, scan, add up the directions, gate. Literally the paper's equations.

    On tokens, Mamba; on the transpose of an image, the paper's selective channel mixer, for a fixed number of tokens.

    Args:
        dim, expand, d_state, d_conv, dt_rank: c, e / c, n, the taps, and r (by default c / 16, rounded up).
        bidirectional: also from the end to the start, with parameters of its own.
        select_from, depth: see :class:`SelectiveTokenMixer`.

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
        d_conv: int = 4,
        dt_rank: int | None = None,
        select_from: SelectFrom = "conv",
        depth: int = 1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        _check_select_from(select_from)
        self.select_from, self.depth = str(select_from), depth
        self.reverse = [False, True] if bidirectional else [False]
        k, e, r = len(self.reverse), expand * dim, math.ceil(dim / 16) if dt_rank is None else dt_rank
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.in_proj = nn.Linear(dim, 2 * e, bias=False, **dd)
        self.conv_weight = nn.Parameter(torch.empty(k, e, d_conv, **dd))
        self.conv_bias = nn.Parameter(torch.empty(k, e, **dd))
        d_select = e if select_from == "conv" else dim
        self.x_proj = nn.Parameter(torch.empty(k, d_select, r + 2 * d_state, **dd))
        self.s6 = S6(e, d_state=d_state, dt_rank=r, reverse=self.reverse, **dd)
        self.out_proj = nn.Linear(e, dim, bias=False, **dd)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw every parameter anew."""
        _reset_parts(self, self.depth)
        _reset_uniform(self.conv_weight.shape[2], self.conv_weight, self.conv_bias)
        _reset_uniform(self.x_proj.shape[1], self.x_proj)

    def forward(self, x: Tensor) -> Tensor:
        """Map (b, l, c) to the same."""
        b, l, _ = x.shape
        h, z = self.in_proj(x).chunk(2, dim=-1)
        k = len(self.reverse)
        h = h.unsqueeze(1).expand(-1, k, -1, -1)
        h = torch.ops.vim.causal_conv1d(h, self.conv_weight, self.conv_bias, True, self.reverse, "auto")  # (b, k, l, e)
        source = h.transpose(0, 1) if self.select_from == "conv" else x.expand(k, -1, -1, -1)
        selected = torch.bmm(source.reshape(k, b * l, -1), self.x_proj)
        y = self.s6(h, selected.view(k, b, l, 1, -1).transpose(0, 1))
        return self.out_proj(y * F.silu(z))


@register_notrace_module
class SelectiveChannelMixer(nn.Module):
    """Mix the channels of an image, scanning them in both directions; the tokens share steps, B and C.

    A channel's steps, B and C follow from its map, pooled to a few numbers: so the parameters are of no number of
    tokens. All tokens being mixed by one and the same matrix of an image, (w, w), the scan is also a matrix product.

    Args:
        dim, width, d_state, d_conv: c, w, n, and the taps along the channels.
        pool: rows and columns of the pooled map.
        form: "scan" scans the channels of every token; "matrix" scans for the matrix, and multiplies; the results are
            the same. "auto" takes the matrix where the tokens are more than the channels.
        select_from: what is pooled: "conv", the convolved channels, or "input", those before the convolution.
        depth: see :class:`SelectiveTokenMixer`.

    Raises:
        ValueError: `form` or `select_from` is none of these.
    """

    def __init__(
        self,
        dim: int,
        width: int,
        *,
        d_state: int = 16,
        d_conv: int = 4,
        pool: int = 7,
        form: Form = "auto",
        select_from: SelectFrom = "conv",
        depth: int = 1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        _check_select_from(select_from)
        if form not in get_args(Form):
            raise ValueError(f"form must be 'auto', 'scan' or 'matrix', got {form!r}")
        self.width, self.d_state, self.pool, self.depth = width, d_state, pool, depth
        self.form, self.select_from = str(form), str(select_from)
        self.reverse = [False, True]
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.in_proj = nn.Linear(dim, 2 * width, bias=False, **dd)
        self.conv_weight = nn.Parameter(torch.empty(2, d_conv, **dd))
        self.conv_bias = nn.Parameter(torch.empty(2, **dd))
        self.x_proj = nn.Parameter(torch.empty(2, pool * pool, 1 + 2 * d_state, **dd))
        self.dt_bias = nn.Parameter(torch.empty(2, width, **dd))
        self.A_log = nn.Parameter(torch.empty(2, d_state, **dd))
        self.D = nn.Parameter(torch.empty(2, width, **dd))
        self.out_proj = nn.Linear(width, dim, bias=False, **dd)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw every parameter anew."""
        _reset_parts(self, self.depth)
        _reset_uniform(self.conv_weight.shape[1], self.conv_weight, self.conv_bias)
        _reset_uniform(self.x_proj.shape[1], self.x_proj)
        nn.init.ones_(self.D)
        with torch.no_grad():
            MambaMixer._reset_dt_bias(self.dt_bias)
            reset_states(self.A_log)

    def forward(self, x: Tensor) -> Tensor:
        """Map (b, rows, columns, c) to the same."""
        b, rows, columns, _ = x.shape
        l, w = rows * columns, self.width
        v, z = self.in_proj(x).flatten(1, 2).chunk(2, dim=-1)  # (b, l, w) each
        h = v.transpose(1, 2).unsqueeze(1).expand(-1, 2, -1, -1)  # (b, k, w, l): the channels are the sequence
        taps, bias = self.conv_weight.unsqueeze(1).expand(-1, l, -1), self.conv_bias.unsqueeze(1).expand(-1, l)
        u = torch.ops.vim.causal_conv1d(h, taps, bias, True, self.reverse, "auto")
        pooled = self._pool(u if self.select_from == "conv" else h[:, :1], rows, columns)
        D = self.D.unsqueeze(-1)  # (k, w, 1)
        if self.form == "matrix" or (self.form == "auto" and w < l):
            identity = torch.eye(w, device=u.device, dtype=u.dtype)
            mix = self._scan(identity.expand(b, 2, w, w), pooled, "none") + identity * D.to(u.dtype)
            y = u.flatten(1, 2).transpose(1, 2) @ mix.transpose(2, 3).flatten(1, 2)  # (b, l, 2w) @ (b, 2w, w)
        else:
            y = (self._scan(u, pooled, "sum").squeeze(1) + (u * D.to(u.dtype)).sum(1)).transpose(1, 2)
        return self.out_proj(y * F.silu(z)).unflatten(1, (rows, columns))

    def _pool(self, maps: Tensor, rows: int, columns: int) -> Tensor:
        """Describe each channel of (b, k or 1, w, l) by a few means over its map, (b, k or 1, w, pool^2)."""
        return (
            F.adaptive_avg_pool2d(maps.unflatten(-1, (rows, columns)).flatten(1, 2), self.pool)
            .unflatten(1, (-1, self.width))
            .flatten(-2)
        )

    def _scan(self, u: Tensor, pooled: Tensor, combine: str) -> Tensor:
        """Scan u, (b, k, w, columns), along the channels. Each column is a sequence; all have the same steps, B, C."""
        b, k, w, columns = u.shape
        source = pooled.expand(b, k, w, -1).transpose(0, 1).reshape(k, b * w, -1)
        selected = torch.bmm(source, self.x_proj).view(k, b, w, 1, -1).transpose(0, 1)
        delta, B, C = selected.split([1, self.d_state, self.d_state], dim=-1)
        dtype = residual_dtype(u)
        # (b, k, w, 1); the op adds no bias along the sequence, and in bfloat16 the sum would be up to 3 % of a step off
        delta = F.softplus(delta.squeeze(-1).to(dtype) + self.dt_bias.unsqueeze(-1).to(dtype)).to(u.dtype)
        A = torch.exp(self.A_log.to(dtype)).neg().unsqueeze(1).expand(-1, columns, -1)
        y, _ = torch.ops.vim.selective_scan(
            u, delta.expand(u.shape), A, B, C, None, None, None, None, False, self.reverse, combine, False, "auto"
        )
        return y


def _reset_parts(mixer: nn.Module, depth: int) -> None:
    for module in mixer.children():
        module.reset_parameters()  # type: ignore[operator]
    with torch.no_grad():
        mixer.out_proj.weight /= math.sqrt(depth)  # type: ignore[union-attr, operator]


def _reset_uniform(fan_in: int, *parameters: Tensor) -> None:
    """As PyTorch's linear and convolutional layers."""
    for parameter in parameters:
        nn.init.uniform_(parameter, -(fan_in**-0.5), fan_in**-0.5)
