"""The Mamba (S6) mixer in one direction or two.

Source: https://arxiv.org/abs/2312.00752 (Mamba), https://arxiv.org/abs/2401.09417 (its two directions).
Sizes: b images, l tokens, d channels, e inner channels, n states, r the rank of the step size, k directions.
"""

import math
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import vim.kernels  # noqa: F401  registers the ops

from .norm import residual_dtype

Directions = Literal["none", "v1", "v2"]
Init = Literal["published", "corrected"]
# what a sequence leaves behind: the convolution's last inputs, (b, taps - 1, e), and the scan's state, (b, 1, e, n)
MixerState = tuple[Tensor, Tensor]


class MambaMixer(nn.Module):
    """Project in, convolve, scan, gate, project out; parameters under the published names.

    Args:
        d_model, d_state, d_conv, expand, dt_rank: d, n, the taps, e / d, and r (by default d / 16, rounded up).
        directions: "none" scans forwards. "v1" also scans the same convolved tokens backwards, with an `A_b_log` of
            its own. "v2", every published Vim and VideoMamba, also convolves backwards and has a second set of
            everything but the projections in and out.
        combine: "sum" or "mean" of the directions, before the gate. Vim's published weights want the mean, VideoMamba's
            the sum; "v1" only ever sums. By default the mean for "v2".
        init: "published" zeroes the bias of the backward step size, as Vim's training code did by oversight: its
            backward direction starts with steps of about 0.69 where the forward one has 0.001 to 0.1. "corrected"
            starts both alike.
        depth: how many mixers the model has; the output projection starts at 1 / sqrt(depth) of its usual size.

    Raises:
        ValueError: "v1" with "mean", or a name that is not one of the above.
    """

    def __init__(
        self,
        d_model: int,
        *,
        d_state: int = 16,
        d_conv: int = 4,
        expand: int = 2,
        dt_rank: int | None = None,
        directions: Directions = "v2",
        combine: Literal["sum", "mean"] | None = None,
        init: Init = "published",
        depth: int = 1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if combine is None:
            combine = "mean" if directions == "v2" else "sum"
        if directions not in ("none", "v1", "v2") or combine not in ("sum", "mean"):
            raise ValueError(
                f"directions must be 'none', 'v1' or 'v2', combine 'sum' or 'mean', got {directions!r}, {combine!r}"
            )
        if directions == "v1" and combine == "mean":
            raise ValueError("directions='v1' only ever sums: set combine='sum'")
        if init not in ("published", "corrected"):
            raise ValueError(f"init must be 'published' or 'corrected', got {init!r}")
        self.d_model, self.d_state, self.d_conv, self.d_inner = d_model, d_state, d_conv, expand * d_model
        self.dt_rank = math.ceil(d_model / 16) if dt_rank is None else dt_rank
        self.directions, self.combine, self.init, self.depth = directions, combine, init, depth
        self.convolved = [False, True] if directions == "v2" else [False]  # reversed or not, each with its parameters
        self.scanned = [False] if directions == "none" else [False, True]

        e, n, r = self.d_inner, d_state, self.dt_rank
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.in_proj = nn.Linear(d_model, 2 * e, bias=False, **dd)
        self.conv1d = nn.Conv1d(e, e, d_conv, groups=e, **dd)
        self.x_proj = nn.Linear(e, r + 2 * n, bias=False, **dd)
        self.dt_proj = nn.Linear(r, e, **dd)
        self.A_log = nn.Parameter(torch.empty(e, n, **dd))
        self.D = nn.Parameter(torch.empty(e, **dd))
        # TorchScript leaves out what hangs on an attribute that is None
        both, twice = directions != "none", directions == "v2"
        self.A_b_log = nn.Parameter(torch.empty(e, n, **dd)) if both else None
        self.conv1d_b = nn.Conv1d(e, e, d_conv, groups=e, **dd) if twice else None
        self.x_proj_b = nn.Linear(e, r + 2 * n, bias=False, **dd) if twice else None
        self.dt_proj_b = nn.Linear(r, e, **dd) if twice else None
        self.D_b = nn.Parameter(torch.empty(e, **dd)) if twice else None
        self.out_proj = nn.Linear(e, d_model, bias=False, **dd)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw every parameter anew."""
        for module in self.children():
            module.reset_parameters()  # type: ignore[operator]
        with torch.no_grad():
            for A_log in (self.A_log, self.A_b_log):
                if A_log is not None:  # S4D-real: A = -1 ... -n
                    A_log.copy_(torch.arange(1, self.d_state + 1, device=A_log.device).log().expand_as(A_log))
            for D in (self.D, self.D_b):
                if D is not None:
                    nn.init.ones_(D)
            self._reset_dt_bias(self.dt_proj.bias)
            if self.dt_proj_b is not None:
                if self.init == "published":
                    nn.init.zeros_(self.dt_proj_b.bias)
                else:
                    self._reset_dt_bias(self.dt_proj_b.bias)
            # kaiming_uniform(a=sqrt(5)) divided by the root of the number of branches added to the residual
            self.out_proj.weight /= math.sqrt(self.depth)

    @staticmethod
    def _reset_dt_bias(bias: Tensor) -> None:
        """softplus(bias) log-uniform in [0.001, 0.1]."""
        low, high = math.log(1e-3), math.log(1e-1)
        dt = torch.empty_like(bias, dtype=torch.float32).uniform_(low, high).exp_().clamp_(min=1e-4)
        bias.copy_(dt + torch.log(-torch.expm1(-dt)))

    def forward(self, x: Tensor, paths: Tensor | None = None) -> Tensor:
        """Map (b, l, d) to (b, l, d).

        Args:
            paths: (k, l), the tokens' indices in the order of each scan: one for each direction, or as many more for
                them all to scan again with the same parameters. By default every scan takes the tokens as they come.
        """
        h, z = self.in_proj(x).chunk(2, dim=-1)  # (b, l, e) each
        c = len(self.convolved)
        if paths is None:
            h = h.unsqueeze(1).expand(-1, c, -1, -1)  # (b, c, l, e), not copied
            y, _ = self._scan(h, z.unsqueeze(1), None, self.combine, False)
            return self.out_proj(y.squeeze(1))
        b, k = x.shape[0], paths.shape[0]
        h = h[:, paths].reshape(b * (k // c), c, x.shape[1], self.d_inner)  # a further scan is a further image
        y, _ = self._scan(h, None, None, "none", False)
        back = paths.argsort(dim=1).unsqueeze(0).unsqueeze(-1)  # (1, k, l, 1)
        y = y.reshape(b, k, x.shape[1], self.d_inner)
        y = y.gather(2, back.expand_as(y))
        y = y.sum(1) if self.combine == "sum" else y.mean(1)
        return self.out_proj(y * F.silu(z))

    def step(self, x: Tensor, state: MixerState | None) -> tuple[Tensor, MixerState]:
        """Map the next tokens of a sequence, (b, l, d), to what :meth:`forward` gives for them in the whole of it.

        Args:
            state: what the tokens before have left; None at the start.

        Raises:
            ValueError: there is a backward direction, which begins at the sequence's end.
        """
        if self.directions != "none":
            raise ValueError(f"only directions='none' goes on step by step, got {self.directions!r}")
        h, z = self.in_proj(x).chunk(2, dim=-1)
        before, last = (h.new_zeros(len(h), self.d_conv - 1, self.d_inner), None) if state is None else state
        h = torch.cat([before, h], dim=1)
        y, last = self._scan(h.unsqueeze(1), z.unsqueeze(1), last, self.combine, True)
        return self.out_proj(y.squeeze(1)), (h[:, x.shape[1] :].clone(), last)

    def _scan(
        self, h: Tensor, z: Tensor | None, state: Tensor | None, combine: str, step: bool
    ) -> tuple[Tensor, Tensor]:
        """Convolve and scan h, (b, c, l, e). In a step, h starts with the convolution's last inputs."""
        e, n, r = self.d_inner, self.d_state, self.dt_rank
        c, k = len(self.convolved), len(self.scanned)
        conv, dt_proj, A_log = (
            self.conv1d.weight.unsqueeze(0),
            self.dt_proj.weight.unsqueeze(0),
            self.A_log.unsqueeze(0),
        )
        conv_bias = self.conv1d.bias
        assert conv_bias is not None  # nn.Conv1d declares it optional
        vectors = [conv_bias, self.dt_proj.bias, self.D]
        if self.A_b_log is not None:
            A_log = torch.stack([self.A_log, self.A_b_log])
        if self.conv1d_b is not None and self.dt_proj_b is not None and self.D_b is not None:
            conv = torch.stack([self.conv1d.weight, self.conv1d_b.weight])
            dt_proj = torch.stack([self.dt_proj.weight, self.dt_proj_b.weight])
            conv_bias = self.conv1d_b.bias
            assert conv_bias is not None
            vectors += [conv_bias, self.dt_proj_b.bias, self.D_b]
        conv_bias, dt_bias, D = torch.stack(vectors).view(c, 3, e).unbind(1)  # (c, e) each

        u = torch.ops.vim.causal_conv1d(h, conv.squeeze(2), conv_bias, True, self.convolved, "auto")
        if step:
            u = u[:, :, self.d_conv - 1 :]
        b, _, l, _ = u.shape
        rows = u.unbind(1)
        projected = [self.x_proj(rows[0])]
        if self.x_proj_b is not None:
            projected.append(self.x_proj_b(rows[1]))
        dt, B, C = torch.stack(projected).unsqueeze(3).split([r, n, n], dim=-1)  # (c, b, l, 1, r or n)
        delta = torch.bmm(dt.reshape(c, b * l, r), dt_proj.transpose(1, 2)).view(c, b, l, e)
        delta, B, C = delta.transpose(0, 1), B.transpose(0, 1), C.transpose(0, 1)
        if c != k:  # "v1" scans the same tokens twice
            u, delta = u.expand(b, k, l, e), delta.expand(b, k, l, e)
            B, C = B.expand(b, k, l, 1, n), C.expand(b, k, l, 1, n)
            D, dt_bias = D.expand(k, e), dt_bias.expand(k, e)

        dtype = residual_dtype(h)
        A, D, dt_bias = torch.exp(A_log.to(dtype)).neg(), D.to(dtype), dt_bias.to(dtype)
        return torch.ops.vim.selective_scan(
            u, delta, A, B, C, D, z, dt_bias, state, True, self.scanned, combine, step, "auto"
        )
