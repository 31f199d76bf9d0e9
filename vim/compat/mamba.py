"""`mamba_ssm.Mamba`, `Mamba2` and their block, with the options and parameters of the published forks.

Sizes: b images, l tokens, d channels, e inner channels, n states, r the rank of the step size, w taps.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vim.kernels import causal_conv1d, selective_scan

from .layout import state_dtype
from .norm import GatedRMSNorm, RMSNorm, layer_norm_fn
from .ssd import NO_LIMIT, Limit, mamba_split_conv1d_scan_combined

# the scans of each type, by the ends of their parameters' names: forwards, backwards, slices side by side
SCANS = {"none": ("",), "v1": ("",), "v2": ("", "_b"), "v3": ("", "_b", "_s")}
ONE_BY_ONE = "vim.compat serves {} for whole sequences: call it without inference_params"


class Mamba(nn.Module):
    """The published Mamba mixer: upstream's, Vim's, VideoMamba's and SegMamba's.

    All directions always run. In Vim's fork, `use_fast_path=False` left out the backward one.

    Args:
        dt_rank: r; "auto" for d / 16, rounded up.
        dt_min, dt_max, dt_init_floor: the range of the first steps.
        dt_init, dt_scale: the start of the steps' projection: uniform for "random", or "constant".
        conv_bias, bias: whether the convolution, and the projections in and out, have biases.
        use_fast_path, layer_idx: kept as attributes.
        bimamba_type: "none", "v1" or "v2" as in Vim; "v3" with `nslices` as in SegMamba.
        bimamba: VideoMamba's name for "v2".
        if_divide_out, if_devide_out: halve the sum of the two directions of "v2".
        init_layer_scale: first value of `gamma`, learned scales of the output.
        nslices: the third scan takes the first token of each slice of the sequence, then the second of each, ...

    Raises:
        ValueError: a `bimamba_type` whose meaning differs between published forks.
    """

    def __init__(
        self,
        d_model: int,
        d_state: int = 16,
        d_conv: int = 4,
        expand: float = 2,
        dt_rank: int | Literal["auto"] = "auto",
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        dt_init: Literal["random", "constant"] = "random",
        dt_scale: float = 1.0,
        dt_init_floor: float = 1e-4,
        conv_bias: bool = True,
        bias: bool = False,
        use_fast_path: bool = True,
        layer_idx: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        bimamba_type: str | None = "none",
        if_divide_out: bool = False,
        init_layer_scale: float | None = None,
        *,
        if_devide_out: bool = False,
        bimamba: bool = False,
        nslices: int | None = None,
    ) -> None:
        super().__init__()
        kind = "v2" if bimamba else bimamba_type or "none"
        if kind not in SCANS or (kind == "v3") != (nslices is not None):
            raise ValueError(
                f"bimamba_type={kind!r} with nslices={nslices} means different models in different forks of mamba_ssm: "
                "put the repository's own fork on the path, and vim.compat serves its kernels"
            )
        self.d_model, self.d_state, self.d_conv, self.expand = d_model, d_state, d_conv, expand
        self.d_inner = int(expand * d_model)
        self.dt_rank = math.ceil(d_model / 16) if dt_rank == "auto" else dt_rank
        self.use_fast_path, self.layer_idx = use_fast_path, layer_idx
        self.bimamba_type, self.nslices = kind, nslices
        self.if_divide_out = (if_divide_out or if_devide_out) and kind == "v2"
        self.activation, self.act = "silu", nn.SiLU()

        e, r = self.d_inner, self.dt_rank
        self.in_proj = nn.Linear(d_model, 2 * e, bias=bias, device=device, dtype=dtype)
        for end in SCANS[kind]:
            conv = nn.Conv1d(e, e, d_conv, groups=e, padding=d_conv - 1, bias=conv_bias, device=device, dtype=dtype)
            setattr(self, f"conv1d{end}", conv)
            setattr(self, f"x_proj{end}", nn.Linear(e, r + 2 * d_state, bias=False, device=device, dtype=dtype))
            dt_proj = nn.Linear(r, e, device=device, dtype=dtype)
            _reset_steps(dt_proj, dt_min, dt_max, dt_init, dt_scale, dt_init_floor)
            setattr(self, f"dt_proj{end}", dt_proj)
            setattr(self, f"D{end}", _not_decayed(torch.ones(e, device=device)))
        for end in ("", "_b") if kind == "v1" else SCANS[kind]:
            log = torch.arange(1, d_state + 1, dtype=torch.float32, device=device).log().repeat(e, 1)
            setattr(self, f"A{end}_log", _not_decayed(log))
        self.out_proj = nn.Linear(e, d_model, bias=bias, device=device, dtype=dtype)
        self.gamma = None
        if init_layer_scale is not None:
            self.gamma = nn.Parameter(torch.full((d_model,), init_layer_scale, device=device))

    def forward(self, hidden_states: Tensor, inference_params: object = None) -> Tensor:
        """Map (b, l, d) to the same.

        Raises:
            NotImplementedError: `inference_params` are given.
        """
        if inference_params is not None:
            raise NotImplementedError(ONE_BY_ONE.format("Mamba"))
        x, z = self.in_proj(hidden_states).chunk(2, dim=-1)
        scans = [self._scan(x, z, end) for end in SCANS[self.bimamba_type]]
        y = sum(scans[1:], scans[0])
        out = self.out_proj(y / 2 if self.if_divide_out else y)
        return out if self.gamma is None else out * self.gamma

    def _scan(self, x: Tensor, z: Tensor, end: str) -> Tensor:
        """Convolve and scan (b, l, e) in the order, and with the parameters, of one direction; gate with z."""
        conv, x_proj, dt_proj = (getattr(self, f"{name}{end}") for name in ("conv1d", "x_proj", "dt_proj"))
        reverse, order = end == "_b", None
        if end == "_s":
            order = _slices(x.shape[1], self.nslices, x.device)  # type: ignore[arg-type]
            x, z = x[:, order], z[:, order]
        u = causal_conv1d(x, conv.weight.squeeze(1), conv.bias, reverse=reverse)
        dt, B, C = x_proj(u).split([self.dt_rank, self.d_state, self.d_state], dim=-1)
        delta = F.linear(dt, dt_proj.weight)
        wide = state_dtype(u.dtype)
        A, D, bias = -torch.exp(getattr(self, f"A{end}_log").to(wide)), getattr(self, f"D{end}"), dt_proj.bias
        scan = partial(selective_scan, u, delta, B=B, C=C, D=D.to(wide), z=z, delta_bias=bias.to(wide))
        y = cast(Tensor, scan(A=A, reverse=reverse, delta_softplus=True))
        if self.bimamba_type == "v1":
            A = -torch.exp(cast(Tensor, self.A_b_log).to(wide))
            y = y + cast(Tensor, scan(A=A, reverse=True, delta_softplus=True))
        return y if order is None else y[:, order.argsort()]


def _slices(l: int, nslices: int, device: torch.device) -> Tensor:
    """Return the order of the third scan: the first token of each slice, the second of each, ... (l,).

    Raises:
        ValueError: the slices are not of one length.
    """
    if l % nslices:
        raise ValueError(f"the tokens must be a multiple of nslices, {nslices}, got {l}")
    return torch.arange(l, device=device).view(nslices, l // nslices).t().flatten()


def _not_decayed(x: Tensor) -> nn.Parameter:
    parameter = nn.Parameter(x)
    parameter._no_weight_decay = True  # type: ignore[attr-defined]  # optimizers of published code look for it
    return parameter


@torch.no_grad()
def _reset_steps(dt_proj: nn.Linear, low: float, high: float, init: str, scale: float, floor: float) -> None:
    """Draw the first steps log-uniform in [low, high], and the projection with them."""
    bound = dt_proj.in_features**-0.5 * scale
    if init == "constant":
        nn.init.constant_(dt_proj.weight, bound)
    elif init == "random":
        nn.init.uniform_(dt_proj.weight, -bound, bound)
    else:
        raise ValueError(f"dt_init must be 'random' or 'constant', got {init!r}")
    dt_proj.bias.copy_(_inverse_softplus(dt_proj.bias, low, high, floor))
    dt_proj.bias._no_reinit = True  # type: ignore[attr-defined]  # published models skip it


def _inverse_softplus(like: Tensor, low: float, high: float, floor: float) -> Tensor:
    dt = torch.empty_like(like, dtype=torch.float32).uniform_(math.log(low), math.log(high)).exp().clamp(min=floor)
    return dt + torch.log(-torch.expm1(-dt))


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
        self.d_model, self.d_state, self.d_conv, self.headdim, self.ngroups = d_model, d_state, d_conv, headdim, ngroups
        self.d_inner = int(expand * d_model)
        self.d_ssm = self.d_inner if d_ssm is None else d_ssm
        self.nheads, self.expand, self.D_has_hdim, self.rmsnorm = self.d_ssm // headdim, expand, D_has_hdim, rmsnorm
        self.norm_before_gate, self.dt_limit, self.chunk_size = norm_before_gate, dt_limit, chunk_size
        self.use_mem_eff_path, self.layer_idx, self.activation, self.act = (
            use_mem_eff_path,
            layer_idx,
            "silu",
            nn.SiLU(),
        )

        width = self.d_ssm + 2 * ngroups * d_state
        in_width = 2 * self.d_inner + 2 * ngroups * d_state + self.nheads
        self.in_proj = nn.Linear(d_model, in_width, bias=bias, device=device, dtype=dtype)
        self.conv1d = nn.Conv1d(
            width, width, d_conv, groups=width, padding=d_conv - 1, bias=conv_bias, device=device, dtype=dtype
        )
        if conv_init is not None:
            nn.init.uniform_(self.conv1d.weight, -conv_init, conv_init)
        steps = _inverse_softplus(torch.empty(self.nheads, device=device), dt_min, dt_max, dt_init_floor)
        self.dt_bias = _not_decayed(steps.to(dtype or steps.dtype))
        decays = torch.empty(self.nheads, dtype=torch.float32, device=device).uniform_(*A_init_range)
        self.A_log = _not_decayed(decays.log().to(dtype or decays.dtype))
        self.D = _not_decayed(torch.ones(self.d_ssm if D_has_hdim else self.nheads, device=device))
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
        inference_params: object = None,
    ) -> Tensor:
        """Map (b, l, d) to the same.

        Raises:
            NotImplementedError: another argument is given.
        """
        if any(given is not None for given in (seqlen, seq_idx, cu_seqlens, inference_params)):
            raise NotImplementedError(ONE_BY_ONE.format("Mamba2"))
        out = mamba_split_conv1d_scan_combined(
            self.in_proj(u),
            self.conv1d.weight.squeeze(1),
            self.conv1d.bias,
            self.dt_bias,
            -torch.exp(self.A_log.float()),
            self.D.unflatten(0, (-1, self.headdim)) if self.D_has_hdim else self.D,
            self.chunk_size,
            dt_limit=self.dt_limit,
            activation=self.activation,
            rmsnorm_weight=self.norm.weight if self.rmsnorm else None,
            rmsnorm_eps=1e-5,
            outproj_weight=self.out_proj.weight,
            outproj_bias=self.out_proj.bias,
            headdim=None if self.D_has_hdim else self.headdim,
            ngroups=self.ngroups,
            norm_before_gate=self.norm_before_gate,
        )
        return out  # type: ignore[return-value]


class Block(nn.Module):
    """Add, normalise, mix: `mamba_ssm.modules.mamba_simple.Block`, and with `mlp_cls` `mamba_ssm.modules.block.Block`.

    Args:
        mixer_cls, norm_cls, mlp_cls: make the mixer, the norms and the second half from d.
        fused_add_norm: the norms are LayerNorm or RMSNorm, and take the sum in one step.
        residual_in_fp32: keep the sum before the norms in float32.
    """

    def __init__(
        self,
        dim: int,
        mixer_cls: Callable[[int], nn.Module],
        *classes: Callable[[int], nn.Module],
        norm_cls: Callable[[int], nn.Module] = nn.LayerNorm,
        mlp_cls: Callable[[int], nn.Module] = nn.Identity,
        fused_add_norm: bool = False,
        residual_in_fp32: bool = False,
    ) -> None:
        super().__init__()
        if len(classes) == 1:  # version 1 has the norm here, version 2 the MLP, and then the norm
            (norm_cls,) = classes
        elif classes:
            mlp_cls, norm_cls = classes
        self.residual_in_fp32, self.fused_add_norm = residual_in_fp32, fused_add_norm
        self.norm, self.mixer = norm_cls(dim), mixer_cls(dim)
        self.mlp = None
        if mlp_cls is not nn.Identity:
            self.norm2, self.mlp = norm_cls(dim), mlp_cls(dim)

    def forward(
        self, hidden_states: Tensor, residual: Tensor | None = None, inference_params: object = None, **options: object
    ) -> tuple[Tensor, Tensor]:
        """Return what the mixer adds, and the sum before it, (b, l, d) each."""
        hidden_states, residual = self._add_norm(self.norm, hidden_states, residual)
        hidden_states = self.mixer(hidden_states, inference_params=inference_params, **options)
        if self.mlp is not None:
            hidden_states, residual = self._add_norm(self.norm2, hidden_states, residual)
            hidden_states = self.mlp(hidden_states)
        return hidden_states, residual

    def _add_norm(self, norm: nn.Module, x: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        if not self.fused_add_norm:  # a norm of any class
            residual = x if residual is None else x + residual
            weight = getattr(norm, "weight", None)
            y = norm(residual if weight is None else residual.to(weight.dtype))
            return y, residual.float() if self.residual_in_fp32 else residual
        return layer_norm_fn(  # type: ignore[return-value]
            *(x, norm.weight, norm.bias, residual),  # type: ignore[arg-type]
            eps=norm.eps,  # type: ignore[arg-type]
            prenorm=True,
            residual_in_fp32=self.residual_in_fp32,
            is_rms_norm=isinstance(norm, RMSNorm),
        )

    def allocate_inference_cache(self, *args: object, **options: object) -> None:
        """Refuse: raise NotImplementedError."""
        raise NotImplementedError(ONE_BY_ONE.format("Block"))
