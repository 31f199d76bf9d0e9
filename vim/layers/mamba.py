"""The Mamba (S6) mixer in one direction or two.

Source: https://arxiv.org/abs/2312.00752 (Mamba), https://arxiv.org/abs/2401.09417 (its two directions).
Sizes: b images, l tokens, d channels, e inner channels, n states, r the rank of the step size; k directions scan, and c
of them have a convolution and projections of their own.
"""

from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import vim.kernels  # noqa: F401  registers the ops

from .checks import check_choice
from .factory import Factory
from .mixer import ConvolvedMixer, Directions, MixerState
from .norm import residual_dtype
from .plain import stack_plain
from .s6 import reset_projections, reset_states, reset_steps, step_rank
from .scan_paths import from_paths, to_paths

torch.fx.wrap("residual_dtype")
Init = Literal["published", "corrected"]


class MambaMixer(ConvolvedMixer):
    """Project in, convolve, scan, gate, project out; parameters under the published names.

    Args:
        d_model: d.
        d_state: n.
        d_conv: taps of the convolution.
        expand: e / d.
        directions: "none" scans forwards. "v1" also scans the same convolved tokens backwards, with its own
            `A_b_log`. "v2", as every published Vim and VideoMamba, also convolves backwards and has a second set of
            all parameters but the projections in and out.
        combine: "sum" or "mean" of the directions, before the gate; the default is the mean for "v2" and the sum for
            the others. Vim's published weights need the mean, VideoMamba's the sum. "v1" takes the sum only.
        init: "published" sets the bias of the backward step size to zero, as Vim's training code did by oversight: the
            backward direction starts with steps of about 0.69, the forward one with 0.001 to 0.1. "corrected" starts
            both alike.
        depth: the number of mixers in the model; the output projection starts at 1 / sqrt(depth) of its usual size.

    Raises:
        ValueError: "v1" with "mean", or a name that is none of the above.
    """

    def __init__(
        self,
        d_model: int,
        *,
        d_state: int = 16,
        d_conv: int = 4,
        expand: int = 2,
        directions: Directions = "v2",
        combine: Literal["sum", "mean"] | None = None,
        init: Init = "published",
        depth: int = 1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        combine = combine or ("mean" if directions == "v2" else "sum")
        check_choice("directions", directions, ("none", "v1", "v2"))
        check_choice("combine", combine, ("sum", "mean"))
        check_choice("init", init, get_args(Init))
        if directions == "v1" and combine == "mean":
            raise ValueError("directions='v1' only ever sums: set combine='sum'")
        self.d_model, self.d_state, self.d_conv, self.d_inner = d_model, d_state, d_conv, expand * d_model
        self.dt_rank = step_rank(d_model)
        self.directions, self.combine, self.init, self.depth = directions, combine, init, depth
        self.convolved = [0, 1] if directions == "v2" else [0]  # c: whether each convolution is reversed
        self.scanned = [0] if directions == "none" else [0, 1]  # k: whether each scan is reversed

        e, n, r = self.d_inner, d_state, self.dt_rank
        dd: Factory = {"device": device, "dtype": dtype}
        self.in_proj = nn.Linear(d_model, 2 * e, bias=False, **dd)
        self.conv1d = nn.Conv1d(e, e, d_conv, groups=e, **dd)
        self.x_proj = nn.Linear(e, r + 2 * n, bias=False, **dd)
        self.dt_proj = nn.Linear(r, e, **dd)
        self.A_log = nn.Parameter(torch.empty(e, n, **dd))
        self.D = nn.Parameter(torch.empty(e, **dd))
        # None and not left out: TorchScript drops the branches of an attribute that is None
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
        reset_projections(self, self.depth)
        for A_log in (self.A_log, self.A_b_log):
            if A_log is not None:
                reset_states(A_log)
        for D in (self.D, self.D_b):
            if D is not None:
                nn.init.ones_(D)
        reset_steps(self.dt_proj.bias)
        if self.dt_proj_b is not None:
            if self.init == "published":
                nn.init.zeros_(self.dt_proj_b.bias)
            else:
                reset_steps(self.dt_proj_b.bias)

    def forward(self, x: Tensor, paths: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """Map (b, l, d) to (b, l, d).

        Args:
            paths: (k, l), for each scan the tokens' indices in its order; or (2k, l), with which each direction scans
                twice with the same parameters; or one such table for each sequence, (b, k or 2k, l). By default every
                scan takes the tokens in their order.
            mask: (b, l), False for padding at the end of a sequence. The other tokens' outputs are those of the
                sequence without it; the padding's are of no use. With `paths`, the padding is last in each of them.
        """
        h, z = self.in_proj(x).chunk(2, dim=-1)  # (b, l, e) each
        if mask is not None:
            h = h.masked_fill(~mask.unsqueeze(-1), 0)  # as the zeros that a convolution sees beyond the end
        c = len(self.convolved)
        if paths is None:
            h = h.unsqueeze(1).expand(-1, c, -1, -1)  # (b, c, l, e), not copied
            y, _ = self._scan(h, z.unsqueeze(1), None, self.combine, False, mask)
            return self.out_proj(y.squeeze(1))
        h = to_paths(h, paths, c)
        if mask is not None:
            mask = mask.repeat_interleave(h.shape[0] // mask.shape[0], dim=0)
        y, _ = self._scan(h, None, None, "none", False, mask)
        y = from_paths(y, paths, x.shape[0])
        y = y.sum(1) if self.combine == "sum" else y.mean(1)
        return self.out_proj(y * F.silu(z))

    def step(self, x: Tensor, state: MixerState | None) -> tuple[Tensor, MixerState]:
        """Map the next tokens of a sequence, (b, l, d), to the outputs that :meth:`forward` has for them.

        Args:
            state: the state that the step before returned; None at the start of the sequence.

        Returns:
            (b, l, d), and the state for the next step: the convolution's last inputs, (b, taps - 1, e), and the scan's
            state, (b, 1, e, n).

        Raises:
            ValueError: the mixer has a backward direction, which starts at the sequence's end.
        """
        if self.directions != "none":
            raise ValueError(f"only directions='none' goes on step by step, got {self.directions!r}")
        h, z = self.in_proj(x).chunk(2, dim=-1)
        before, last = (h.new_zeros(len(h), self.d_conv - 1, self.d_inner), None) if state is None else state
        h = torch.cat([before, h], dim=1)
        y, last = self._scan(h.unsqueeze(1), z.unsqueeze(1), last, self.combine, True, None)
        return self.out_proj(y.squeeze(1)), (h[:, x.shape[1] :].clone(), last)

    def _scan(
        self, h: Tensor, z: Tensor | None, state: Tensor | None, combine: str, step: bool, mask: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Convolve and scan h, (b, c, l, e). In a step, h starts with the convolution's last inputs."""
        e, n, r = self.d_inner, self.d_state, self.dt_rank
        c, k = len(self.convolved), len(self.scanned)
        u = self._convolve(h)
        if step:
            u = u[:, :, self.d_conv - 1 :]

        # steps, B and C of each token
        b, _, l, _ = u.shape
        rows = u.unbind(1)
        projected = [self.x_proj(rows[0])]
        if self.x_proj_b is not None:
            projected.append(self.x_proj_b(rows[1]))
        dt, B, C = torch.stack(projected).unsqueeze(3).split([r, n, n], dim=-1)  # (c, b, l, 1, r or n)
        delta, dt_bias = self._project_steps(dt.squeeze(3))
        if mask is not None:
            # a step of zero leaves the state as it is: the softplus of this, with any bias
            delta = delta.masked_fill(~mask.unsqueeze(-1), -1e4)
        delta, B, C = delta.transpose(0, 1), B.transpose(0, 1), C.transpose(0, 1)
        D = self.D.unsqueeze(0) if self.D_b is None else torch.stack([self.D, self.D_b])
        A_log = self.A_log.unsqueeze(0) if self.A_b_log is None else torch.stack([self.A_log, self.A_b_log])
        if c != k:  # "v1" scans the same tokens twice
            u, delta = u.expand(b, k, l, e), delta.expand(b, k, l, e)
            B, C = B.expand(b, k, l, 1, n), C.expand(b, k, l, 1, n)
            D, dt_bias = D.expand(k, e), None if dt_bias is None else dt_bias.expand(k, e)

        dtype = residual_dtype(h)
        return torch.ops.vim.selective_scan(
            *(u, delta, torch.exp(A_log.to(dtype)).neg(), B, C),
            D=D.to(dtype),
            z=z,
            delta_bias=None if dt_bias is None else dt_bias.to(dtype),
            initial_state=state,
            reverse=self.scanned,
            delta_softplus=True,
            combine=combine,
            return_last_state=step,
        )

    def _project_steps(self, dt: Tensor) -> tuple[Tensor, Tensor | None]:
        """Map (c, b, l, r) to the step sizes (c, b, l, e), and return the bias (c, e) that they still lack."""
        if not torch.jit.is_scripting():
            stacked = stack_plain(self.dt_proj, self.dt_proj_b)
            if stacked is not None:
                # The scan adds the bias in float32: in bfloat16, the sum would be up to 3 % of a step off.
                (weight, bias), (c, b, l, r) = stacked, dt.shape
                return torch.bmm(dt.reshape(c, b * l, r), weight.transpose(1, 2)).view(c, b, l, -1), bias
        rows = dt.unbind()
        delta = [self.dt_proj(rows[0])]
        if self.dt_proj_b is not None:
            delta.append(self.dt_proj_b(rows[1]))
        return torch.stack(delta), None
