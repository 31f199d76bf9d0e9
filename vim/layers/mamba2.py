"""The Mamba-2 mixer in one direction or two, and Hydra.

Sources: https://arxiv.org/abs/2405.21060 (Mamba-2: state space duality), https://arxiv.org/abs/2407.09941 (Hydra).
Sizes: b images, l tokens, d channels, e scanned channels in h heads of p, m channels of a gated MLP, n states, g groups
of B and C; k directions scan, c of them have a convolution of their own, and s have B, C and steps of their own.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .checks import check_choice, check_counts
from .factory import Factory
from .mixer import ConvolvedMixer, Directions, MixerState
from .norm import GatedRMSNorm, residual_dtype
from .s6 import reset_projections, reset_steps
from .scan_paths import from_paths, to_paths

torch.fx.wrap("residual_dtype")


class Mamba2Mixer(ConvolvedMixer):
    """Project in, convolve, scan with one decay a head, gate, norm, project out; parameters under the published names.

    The defaults are those of Mamba2Simple, but for the heads, which have the 64 channels of Mamba2's and Hydra's.

    Args:
        d_model: d.
        d_state: n.
        d_conv: taps of the convolution; by default 4, and 7 for "hydra".
        expand: (e + m) / d.
        head_dim: p.
        ngroups: g.
        d_ssm: e; by default all of the inner channels. The others are a gated MLP.
        directions: "none" scans forwards. "v2", ours after Vim's, also convolves and scans backwards, with its own
            convolution, `A_b_log`, `D_b` and `dt_bias_b`, and sums the two. "hydra" is Hydra's quasi-separable mixer:
            a convolution centred on its token, B, C and steps for each direction; a token does not see itself in the
            scans, but through `fc_D` and `D`.
        rmsnorm: normalise the gated output; otherwise only gate it.
        norm_before_gate: normalise before the gate; by default for "hydra" only.
        D_has_hdim: `D` for each channel, not for each head.
        dt_limit: the smallest and the largest step.
        learnable_init_states: the scan starts from `init_states`, not from zeros. For "none" only.
        depth: the number of mixers in the model; the output projection starts at 1 / sqrt(depth) of its usual size.

    Raises:
        ValueError: the sizes do not fit together, or a name is none of the above.
    """

    def __init__(
        self,
        d_model: int,
        *,
        d_state: int = 64,
        d_conv: int | None = None,
        expand: int = 2,
        head_dim: int = 64,
        ngroups: int = 1,
        d_ssm: int | None = None,
        directions: Directions = "v2",
        rmsnorm: bool = True,
        norm_before_gate: bool | None = None,
        D_has_hdim: bool = False,
        dt_limit: tuple[float, float] = (0.0, math.inf),
        learnable_init_states: bool = False,
        depth: int = 1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_choice("directions", directions, ("none", "v2", "hydra"))
        hydra, twice = directions == "hydra", directions == "v2"
        d_inner = expand * d_model
        e = d_inner if d_ssm is None else d_ssm
        d_conv = (7 if hydra else 4) if d_conv is None else d_conv
        check_counts(d_state=d_state, d_conv=d_conv, head_dim=head_dim, ngroups=ngroups, d_ssm=e)
        _check_sizes(e, d_inner, head_dim, ngroups)
        if hydra and d_conv % 2 == 0:
            raise ValueError(f"d_conv must be odd for directions='hydra', whose convolution is centred, got {d_conv}")
        if learnable_init_states and directions != "none":
            raise ValueError(f"learnable_init_states must be False but for directions='none', got {directions!r}")
        self.d_state, self.d_conv, self.head_dim, self.ngroups = d_state, d_conv, head_dim, ngroups
        self.d_ssm, self.d_mlp, self.heads = e, d_inner - e, e // head_dim
        self.directions, self.depth = directions, depth
        # an infinity is no number in JSON, the form of an op's arguments in a compiled package
        self.dt_min, self.dt_max = float(dt_limit[0]), min(float(dt_limit[1]), torch.finfo(torch.float32).max)
        self.selections = 2 if hydra else 1  # s
        self.convolved = [0, 1] if twice else [0]  # c: whether each convolution is reversed
        self.scanned = [0] if directions == "none" else [0, 1]  # k: whether each scan is reversed
        self.ahead = d_conv // 2 if hydra else 0  # tokens after its own that a convolution reads
        self.d_xbc = e + 2 * self.selections * ngroups * d_state

        heads, dd = self.heads, Factory(device=device, dtype=dtype)
        self.in_proj = nn.Linear(d_model, sum(self._widths()), bias=False, **dd)
        self.conv1d = nn.Conv1d(self.d_xbc, self.d_xbc, d_conv, groups=self.d_xbc, **dd)
        self.dt_bias = nn.Parameter(torch.empty(heads, **dd))
        self.A_log = nn.Parameter(torch.empty(heads, **dd))
        self.D = nn.Parameter(torch.empty(e if D_has_hdim else heads, **dd))
        # None and not left out: TorchScript drops the branches of an attribute that is None
        self.conv1d_b = nn.Conv1d(self.d_xbc, self.d_xbc, d_conv, groups=self.d_xbc, **dd) if twice else None
        self.dt_bias_b = nn.Parameter(torch.empty_like(self.dt_bias)) if twice else None
        self.A_b_log = nn.Parameter(torch.empty_like(self.A_log)) if twice else None
        self.D_b = nn.Parameter(torch.empty_like(self.D)) if twice else None
        self.fc_D = nn.Linear(e, heads, bias=False, **dd) if hydra else None
        states = (heads, head_dim, d_state)
        self.init_states = nn.Parameter(torch.empty(states, **dd)) if learnable_init_states else None
        first, groups = hydra if norm_before_gate is None else norm_before_gate, 1 if hydra else ngroups
        self.norm = GatedRMSNorm(e, groups=groups, norm_before_gate=first, **dd) if rmsnorm else None
        self.out_proj = nn.Linear(d_inner, d_model, bias=False, **dd)
        self.reset_parameters()

    def _widths(self) -> list[int]:
        """Channels that `in_proj` makes: the gated MLP's two halves, the gate, x with B and C, the steps."""
        return [2 * self.d_mlp, self.d_ssm, self.d_xbc + self.selections * self.heads]

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw every parameter anew, as Mamba-2 does: decays from 1 to 16; as Hydra does: decays of 1."""
        reset_projections(self, self.depth)
        for A_log in (self.A_log, self.A_b_log):
            if A_log is not None:
                A_log.uniform_(1, 1 if self.directions == "hydra" else 16).log_()
        for D in (self.D, self.D_b):
            if D is not None:
                nn.init.ones_(D)
        for dt_bias in (self.dt_bias, self.dt_bias_b):
            if dt_bias is not None:
                reset_steps(dt_bias)
        if self.init_states is not None:
            nn.init.zeros_(self.init_states)

    def forward(self, x: Tensor, paths: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """Map (b, l, d) to (b, l, d); see :meth:`vim.layers.MambaMixer.forward`.

        Raises:
            ValueError: `paths` for "hydra", whose directions share a convolution.
        """
        mlp, z, h = self.in_proj(x).split(self._widths(), dim=-1)
        if mask is not None:
            h = h.masked_fill(~mask.unsqueeze(-1), 0)  # as the zeros that a convolution sees beyond the end
        c = len(self.convolved)
        if paths is None:
            y, _ = self._scan(h.unsqueeze(1).expand(-1, c, -1, -1), None, "sum", False, mask)
            return self._project_out(y.squeeze(1), z, mlp)
        if self.directions == "hydra":
            raise ValueError("directions='hydra' takes the tokens in their order only, got paths")
        h = to_paths(h, paths, c)
        if mask is not None:
            mask = mask.repeat_interleave(h.shape[0] // mask.shape[0], dim=0)
        y, _ = self._scan(h, None, "none", False, mask)
        return self._project_out(from_paths(y, paths, x.shape[0]).sum(1), z, mlp)

    def step(self, x: Tensor, state: MixerState | None) -> tuple[Tensor, MixerState]:
        """Map the next tokens of a sequence, (b, l, d), to the outputs that :meth:`forward` has for them.

        Args:
            state: the state that the step before returned; None at the start of the sequence.

        Returns:
            (b, l, d), and the state for the next step: the convolution's last inputs, (b, taps - 1, e + 2gn + h), the
            last h of which are not used, and the scan's state, (b, 1, h, p, n).

        Raises:
            ValueError: the mixer has a backward direction, which starts at the sequence's end.
        """
        if self.directions != "none":
            raise ValueError(f"only directions='none' goes on step by step, got {self.directions!r}")
        mlp, z, h = self.in_proj(x).split(self._widths(), dim=-1)
        before, last = (h.new_zeros(len(h), self.d_conv - 1, h.shape[2]), None) if state is None else state
        h = torch.cat([before, h], dim=1)
        y, last = self._scan(h.unsqueeze(1), last, "sum", True, None)
        return self._project_out(y.squeeze(1), z, mlp), (h[:, x.shape[1] :].clone(), last)

    def _scan(
        self, h: Tensor, state: Tensor | None, combine: str, step: bool, mask: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Convolve and scan h, (b, c, l, e + 2sgn + sh): return (b, k or 1, l, e), and the last state.

        In a step, h starts with the convolution's last inputs.
        """
        xbc, dt = h.split([self.d_xbc, self.selections * self.heads], dim=-1)
        before = self.d_conv - 1 if step else 0
        if self.ahead > 0:
            xbc = F.pad(xbc, (0, 0, 0, self.ahead))
        u, dt = self._convolve(xbc)[:, :, before + self.ahead :], dt[:, :, before:]
        if mask is not None:
            u = u.masked_fill(~mask.unsqueeze(1).unsqueeze(-1), 0)  # which leaves a state of zeros as it is
        x, BC = u.split([self.d_ssm, self.d_xbc - self.d_ssm], dim=-1)

        # a direction for each selection of B, C and steps
        b, _, l, _ = x.shape
        k, dtype = len(self.scanned), residual_dtype(h)
        x = x.unflatten(-1, (self.heads, self.head_dim)).expand(b, k, l, self.heads, self.head_dim)
        BC = BC.unflatten(-1, (self.selections, 2, self.ngroups, self.d_state)).transpose(2, 3).flatten(1, 2)
        B, C = BC.unbind(3)  # (b, k, l, g, n) each
        dt = dt.unflatten(-1, (self.selections, self.heads)).transpose(2, 3).flatten(1, 2)
        A_log = self.A_log.unsqueeze(0) if self.A_b_log is None else torch.stack([self.A_log, self.A_b_log])
        dt_bias = self.dt_bias.unsqueeze(0) if self.dt_bias_b is None else torch.stack([self.dt_bias, self.dt_bias_b])
        D = self.D.unsqueeze(0) if self.D_b is None else torch.stack([self.D, self.D_b])
        D = D.unflatten(-1, (self.heads, -1)).expand(-1, self.heads, self.head_dim)
        if state is None and self.init_states is not None:
            state = self.init_states.to(dtype).expand(b, 1, self.heads, self.head_dim, self.d_state)
        y, last = torch.ops.vim.ssd(
            *(x, dt, torch.exp(A_log.to(dtype)).neg().expand(k, self.heads), B, C),
            D=None if self.fc_D is not None else D.to(dtype),
            dt_bias=dt_bias.to(dtype).expand(k, self.heads),
            initial_state=state,
            reverse=self.scanned,
            dt_softplus=True,
            dt_min=self.dt_min,
            dt_max=self.dt_max,
            combine="none" if self.fc_D is not None else combine,
            return_last_state=step,
        )
        if self.fc_D is not None:
            seen = y[:, :1, :-1], y[:, 1:, 1:]  # by the token after, and by the token before
            own = x[:, :1] * (self.fc_D(u[..., : self.d_ssm]).unsqueeze(-1) + D)
            y = F.pad(seen[0], (0, 0, 0, 0, 1, 0)) + F.pad(seen[1], (0, 0, 0, 0, 0, 1)) + own
        return y.flatten(3), last

    def _project_out(self, y: Tensor, z: Tensor, mlp: Tensor) -> Tensor:
        """Gate the scan's output y with z, (b, l, e) each, put the gated MLP in front, and project: (b, l, d)."""
        y = y * F.silu(z) if self.norm is None else self.norm(y, z)
        if self.d_mlp > 0:
            gate, up = mlp.chunk(2, dim=-1)
            y = torch.cat([F.silu(gate) * up, y], dim=-1)
        return self.out_proj(y)


def _check_sizes(e: int, d_inner: int, head_dim: int, ngroups: int) -> None:
    if e > d_inner:
        raise ValueError(f"d_ssm must be at most the inner channels, {d_inner}, got {e}")
    if e % head_dim:
        raise ValueError(f"head_dim must divide the {e} channels that are scanned, got {head_dim}")
    if e // head_dim % ngroups:
        raise ValueError(f"ngroups must divide the number of heads, {e // head_dim}, got {ngroups}")
