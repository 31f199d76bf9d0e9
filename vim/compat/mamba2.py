"""`mamba_ssm.Mamba2` and `Mamba2Simple`, with the options and parameters of the published modules.

Sizes: b images, l tokens, d channels, e inner channels in h heads of p, g groups of B and C, n states, w taps.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .conv import causal_conv1d_update
from .layout import state_dtype
from .mamba import States, cached_states, inverse_softplus, keep_last, not_decayed, one_token
from .norm import GatedRMSNorm
from .ssd import NO_LIMIT, Limit, mamba_split_conv1d_scan_combined, selective_state_update


class Mamba2(nn.Module):
    """The published Mamba-2 mixer.

    Args:
        headdim: p, channels of a head.
        d_ssm: e; by default `expand` times d. The rest of the inner channels are a gated MLP.
        ngroups: groups of B and C.
        A_init_range: of the first decays.
        D_has_hdim: a skip connection for each channel instead of each head.
        rmsnorm, norm_before_gate: gate with a norm before or after it.
        dt_min, dt_max, dt_init_floor, dt_limit: the range of the first steps, and of all.
        chunk_size, use_mem_eff_path, sequence_parallel, layer_idx: without effect on the result.

    Raises:
        NotImplementedError: a `process_group` is given.
        ValueError: the channels are not heads of p, or these not groups.
    """

    def __init__(
        self,
        d_model: int,
        d_state: int = 128,
        d_conv: int = 4,
        conv_init: float | None = None,
        expand: float = 2,
        headdim: int = 64,
        d_ssm: int | None = None,
        ngroups: int = 1,
        A_init_range: tuple[float, float] = (1, 16),
        D_has_hdim: bool = False,
        rmsnorm: bool = True,
        norm_before_gate: bool = False,
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        dt_init_floor: float = 1e-4,
        dt_limit: Limit = NO_LIMIT,
        bias: bool = False,
        conv_bias: bool = True,
        chunk_size: int = 256,
        use_mem_eff_path: bool = True,
        layer_idx: int | None = None,
        process_group: object = None,
        sequence_parallel: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if process_group is not None:
            raise NotImplementedError("vim.compat serves Mamba2 on one device: process_group must be None")
        self.process_group, self.sequence_parallel, self.world_size, self.local_rank = None, sequence_parallel, 1, 0
        self.d_model, self.d_state, self.d_conv, self.conv_init = d_model, d_state, d_conv, conv_init
        self.expand, self.headdim, self.ngroups, self.D_has_hdim = expand, headdim, ngroups, D_has_hdim
        self.d_inner = int(expand * d_model)
        self.d_ssm = self.d_inner if d_ssm is None else d_ssm
        self.nheads = self.d_ssm // headdim
        if self.d_ssm > self.d_inner or self.d_ssm % headdim or self.nheads % ngroups:
            raise ValueError(
                f"d_ssm={self.d_ssm} must be at most expand * d_model = {self.d_inner}, and heads of {headdim}, "
                f"in ngroups={ngroups} of equal size"
            )
        self.rmsnorm, self.norm_before_gate, self.dt_limit = rmsnorm, norm_before_gate, dt_limit
        self.chunk_size, self.use_mem_eff_path, self.layer_idx = chunk_size, use_mem_eff_path, layer_idx
        self.activation, self.act = "silu", nn.SiLU()

        width = self.d_ssm + 2 * ngroups * d_state
        in_width = 2 * self.d_inner + 2 * ngroups * d_state + self.nheads
        self.in_proj = nn.Linear(d_model, in_width, bias=bias, device=device, dtype=dtype)
        self.conv1d = nn.Conv1d(
            width, width, d_conv, groups=width, padding=d_conv - 1, bias=conv_bias, device=device, dtype=dtype
        )
        if conv_init is not None:
            nn.init.uniform_(self.conv1d.weight, -conv_init, conv_init)
        steps = inverse_softplus(torch.empty(self.nheads, device=device), dt_min, dt_max, dt_init_floor)
        self.dt_bias = not_decayed(steps.to(dtype or steps.dtype))
        decays = torch.empty(self.nheads, dtype=torch.float32, device=device).uniform_(*A_init_range)
        self.A_log = not_decayed(decays.log().to(dtype or decays.dtype))
        self.D = not_decayed(torch.ones(self.d_ssm if D_has_hdim else self.nheads, device=device))
        if rmsnorm:
            self.norm = GatedRMSNorm(
                self.d_ssm, 1e-5, self.d_ssm // ngroups, norm_before_gate, device=device, dtype=dtype
            )
        self.out_proj = nn.Linear(self.d_inner, d_model, bias=bias, device=device, dtype=dtype)

    def forward(
        self,
        u: Tensor,
        seqlen: int | None = None,
        seq_idx: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        inference_params: Any = None,
    ) -> Tensor:
        """Map (b, l, d) to the same.

        Args:
            seqlen: l, where u is (b l, d), and the output too.
            inference_params: where the states are kept for the next tokens, by `layer_idx`. With a `seqlen_offset`
                above 0 the input is the next token, (b, 1, d).

        Raises:
            NotImplementedError: several sequences in one: `seq_idx` or `cu_seqlens`.
        """
        if seq_idx is not None or cu_seqlens is not None:
            raise NotImplementedError("vim.compat serves Mamba2 without seq_idx and cu_seqlens")
        if seqlen is not None:
            return self(u.unflatten(0, (-1, seqlen)), inference_params=inference_params).flatten(0, 1)
        states = None
        if inference_params is not None:
            states = cached_states(self, inference_params, len(u))
            if inference_params.seqlen_offset > 0:
                return self.step(u, *states)[0]
        zxbcdt = self.in_proj(u)
        out = mamba_split_conv1d_scan_combined(
            zxbcdt,
            self.conv1d.weight.squeeze(1),
            self.conv1d.bias,
            self.dt_bias,
            -torch.exp(self.A_log.float()),
            self._skip(),
            self.chunk_size,
            initial_states=self._initial_states(len(u)),
            dt_limit=self.dt_limit,
            return_final_states=states is not None,
            activation=self.activation,
            rmsnorm_weight=self.norm.weight if self.rmsnorm else None,
            rmsnorm_eps=1e-5,
            outproj_weight=self.out_proj.weight,
            outproj_bias=self.out_proj.bias,
            headdim=None if self.D_has_hdim else self.headdim,
            ngroups=self.ngroups,
            norm_before_gate=self.norm_before_gate,
        )
        if states is None:
            return out  # type: ignore[return-value]
        out, last = out
        keep_last(states[0], self._split(zxbcdt)[3])
        states[1].copy_(last.detach())
        return out

    def _split(self, zxbcdt: Tensor) -> tuple[Tensor, ...]:
        """Return a gated MLP's two halves, the gate, the tokens to convolve, and the steps."""
        width = self.conv1d.weight.shape[0]
        extra = self.d_inner - self.d_ssm
        return zxbcdt.split([extra, extra, self.d_ssm, width, self.nheads], dim=-1)

    def _skip(self) -> Tensor:
        return self.D.unflatten(0, (-1, self.headdim)) if self.D_has_hdim else self.D

    def _initial_states(self, batch_size: int) -> Tensor | None:
        return None

    def step(self, hidden_states: Tensor, conv_state: Tensor, ssm_state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Take the next token, (b, 1, d), into the states, in place, without gradient; return its output and them."""
        z0, x0, z, xbc, dt = self._split(self.in_proj(one_token(hidden_states)))
        xbc = causal_conv1d_update(xbc, conv_state, self.conv1d.weight.squeeze(1), self.conv1d.bias, self.activation)
        width = self.ngroups * self.d_state
        x, B, C = xbc.split([self.d_ssm, width, width], dim=-1)
        p, n = self.headdim, self.d_state
        wide = state_dtype(x.dtype)
        dt = F.softplus(dt.to(wide) + self.dt_bias).clamp(*self.dt_limit)
        D = self._skip()
        y = selective_state_update(
            ssm_state,
            x.unflatten(-1, (-1, p)),
            dt.unsqueeze(-1).expand(-1, -1, p),
            -torch.exp(self.A_log.to(wide)).view(-1, 1, 1).expand(-1, p, n),
            B.unflatten(-1, (self.ngroups, n)),
            C.unflatten(-1, (self.ngroups, n)),
            D if D.dim() == 2 else D.unsqueeze(1).expand(-1, p),
            z=None if self.rmsnorm else z.unflatten(-1, (-1, p)),
        ).flatten(1)
        y = self.norm(y, z) if self.rmsnorm else y
        out = self.out_proj(torch.cat([F.silu(z0) * x0, y], dim=-1))
        return out.unsqueeze(1), conv_state, ssm_state

    def allocate_inference_cache(
        self, batch_size: int, max_seqlen: int, dtype: torch.dtype | None = None, **options: object
    ) -> States:
        """Return the states before the first token: (b, e + 2gn, w), (b, h, p, n)."""
        weight, (width, _, taps) = self.conv1d.weight, self.conv1d.weight.shape
        conv_state = weight.new_zeros(batch_size, width, taps, dtype=dtype or weight.dtype)
        shape = batch_size, self.nheads, self.headdim, self.d_state
        ssm_state = weight.new_zeros(shape, dtype=dtype or self.in_proj.weight.dtype)
        initial = self._initial_states(batch_size)
        return conv_state, ssm_state if initial is None else ssm_state.copy_(initial.detach())


class Mamba2Simple(Mamba2):
    """The published Mamba-2 mixer with fewer options, and other defaults.

    Args:
        learnable_init_states: learn the state before the first token, `init_states`, (h, p, n).
        activation: of the convolution.
        deterministic: without effect; the kernels are.
    """

    def __init__(
        self,
        d_model: int,
        d_state: int = 64,
        d_conv: int = 4,
        conv_init: float | None = None,
        expand: float = 2,
        headdim: int = 128,
        ngroups: int = 1,
        A_init_range: tuple[float, float] = (1, 16),
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        dt_init_floor: float = 1e-4,
        dt_limit: Limit = NO_LIMIT,
        learnable_init_states: bool = False,
        activation: str = "swish",
        bias: bool = False,
        conv_bias: bool = True,
        chunk_size: int = 256,
        use_mem_eff_path: bool = True,
        layer_idx: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        deterministic: bool | None = None,
    ) -> None:
        super().__init__(
            *(d_model, d_state, d_conv, conv_init, expand, headdim),
            ngroups=ngroups,
            A_init_range=A_init_range,
            dt_min=dt_min,
            dt_max=dt_max,
            dt_init_floor=dt_init_floor,
            dt_limit=dt_limit,
            bias=bias,
            conv_bias=conv_bias,
            chunk_size=chunk_size,
            use_mem_eff_path=use_mem_eff_path,
            layer_idx=layer_idx,
            device=device,
            dtype=dtype,
        )
        self.activation, self.learnable_init_states = activation, learnable_init_states
        if learnable_init_states:
            shape = self.nheads, headdim, d_state
            self.init_states = not_decayed(torch.zeros(shape, device=device, dtype=dtype))

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take the attributes of a pickled mixer; a published one lacks the options that only `Mamba2` has."""
        fixed = {"d_ssm": state["d_inner"], "D_has_hdim": False, "rmsnorm": True, "norm_before_gate": False}
        super().__setstate__(fixed | state)

    def forward(self, u: Tensor, seq_idx: Tensor | None = None, **options: Any) -> Tensor:  # type: ignore[override]
        """Map (b, l, d) to the same."""
        return super().forward(u, seq_idx=seq_idx, **options)

    def _initial_states(self, batch_size: int) -> Tensor | None:
        return self.init_states.expand(batch_size, -1, -1, -1) if self.learnable_init_states else None
