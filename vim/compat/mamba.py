"""`mamba_ssm.Mamba`, with the options and parameters of the published forks.

Sizes: b images, l tokens, d channels, e inner channels, n states, r the rank of the step size, w taps.
"""

import math
from functools import partial
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vim.kernels import causal_conv1d, selective_scan

from .conv import causal_conv1d_update
from .layout import state_dtype
from .ssd import selective_state_update

States = tuple[
    Tensor, Tensor
]  # of a mixer that takes token by token: the convolution's last inputs, and the scan's state

FORK = "put the repository's own mamba_ssm on the path, and vim.compat serves its kernels"
# the scans of each type, by the ends of their parameters' names: forwards, backwards, slices side by side
SCANS = {"none": ("",), "v1": ("",), "v2": ("", "_b"), "v3": ("", "_b", "_s")}


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

    conv1d: nn.Conv1d
    x_proj: nn.Linear
    dt_proj: nn.Linear
    A_log: nn.Parameter
    A_b_log: nn.Parameter
    D: nn.Parameter

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
        kind = _kind_of_scans(bimamba_type, bimamba, nslices)
        self.d_model, self.d_state, self.d_conv, self.expand = d_model, d_state, d_conv, expand
        self.d_inner = int(expand * d_model)
        self.dt_rank = math.ceil(d_model / 16) if dt_rank == "auto" else dt_rank
        self.use_fast_path, self.layer_idx = use_fast_path, layer_idx
        self.bimamba_type, self.bimamba, self.nslices, self.init_layer_scale = kind, bimamba, nslices, init_layer_scale
        self.if_divide_out = self.if_devide_out = (if_divide_out or if_devide_out) and kind == "v2"
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
            setattr(self, f"D{end}", not_decayed(torch.ones(e, device=device)))
        for end in ("", "_b") if kind == "v1" else SCANS[kind]:
            log = torch.arange(1, d_state + 1, dtype=torch.float32, device=device).log().repeat(e, 1)
            setattr(self, f"A{end}_log", not_decayed(log))
        self.out_proj = nn.Linear(e, d_model, bias=bias, device=device, dtype=dtype)
        if init_layer_scale is not None:
            self.gamma = nn.Parameter(torch.full((d_model,), init_layer_scale, device=device))

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take the attributes of a pickled mixer; a published one has fewer, and one spelling of the division."""
        state = {"bimamba": False, "nslices": None, "init_layer_scale": None, **state}
        if not {"if_divide_out", "if_devide_out"} <= state.keys():
            kind = _kind_of_scans(state.get("bimamba_type"), state["bimamba"], state["nslices"])
            divide = kind == "v2" and bool(state.get("if_divide_out") or state.get("if_devide_out"))
            state |= {"bimamba_type": kind, "if_divide_out": divide, "if_devide_out": divide}
        super().__setstate__(state)

    def forward(self, hidden_states: Tensor, inference_params: Any = None, T: int = 1) -> Tensor:
        """Map (b, l, d) to the same.

        Args:
            inference_params: where the states are kept for the next tokens, by `layer_idx`. With a `seqlen_offset`
                above 0 the input is the next token, (b, 1, d).
            T: VideoMamba's; without effect, as there.

        Raises:
            ValueError: a second sequence is given, as to Pan-Mamba's fork; or `layer_idx` is None.
            NotImplementedError: `inference_params` are given, and the tokens are scanned in two directions.
        """
        if isinstance(inference_params, Tensor):
            raise ValueError(f"Mamba takes one sequence, got two: {FORK}")
        states = None
        if inference_params is not None:
            states = cached_states(self, inference_params, len(hidden_states))
            if inference_params.seqlen_offset > 0:
                return self.step(hidden_states, *states)[0]
        return self._project_out(self._mix(self.in_proj(hidden_states), states))

    def _mix(self, xz: Tensor, states: States | None) -> Tensor:
        """Scan the two halves of (b, l, 2e) in all directions: return (b, l, e)."""
        x, z = xz.chunk(2, dim=-1)
        scans = [self._scan(x, z, end, end == "_b", states) for end in SCANS[self.bimamba_type]]
        y = sum(scans[1:], scans[0])
        return y / 2 if self.if_divide_out else y

    def _project_out(self, y: Tensor) -> Tensor:
        out = self.out_proj(y)
        return out if self.init_layer_scale is None else out * self.gamma

    def _scan(self, x: Tensor, z: Tensor, end: str, reverse: bool = False, states: States | None = None) -> Tensor:
        """Convolve and scan (b, l, e) in the order, and with the parameters, of one direction; gate with z."""
        conv, x_proj, dt_proj = (getattr(self, f"{name}{end}") for name in ("conv1d", "x_proj", "dt_proj"))
        order = None
        if end == "_s":
            order = _slices(x.shape[1], self.nslices, x.device)  # type: ignore[arg-type]
            x, z = x[:, order], z[:, order]
        u = causal_conv1d(x, conv.weight.squeeze(1), conv.bias, reverse=reverse)
        dt, B, C = x_proj(u).split([self.dt_rank, self.d_state, self.d_state], dim=-1)
        delta = F.linear(dt, dt_proj.weight)
        wide = state_dtype(u.dtype)
        A, D, bias = -torch.exp(getattr(self, f"A{end}_log").to(wide)), getattr(self, f"D{end}"), dt_proj.bias
        scan = partial(
            selective_scan, u, delta, B=B, C=C, D=D.to(wide), z=z, delta_bias=bias.to(wide), delta_softplus=True
        )
        if states is not None:
            y, last = scan(A=A, return_last_state=True)
            keep_last(states[0], x)
            states[1].copy_(last)
            return cast(Tensor, y)
        y = cast(Tensor, scan(A=A, reverse=reverse))
        if self.bimamba_type == "v1":
            A = -torch.exp(self.A_b_log.to(wide))
            y = y + cast(Tensor, scan(A=A, reverse=True))
        return y if order is None else y[:, order.argsort()]

    def step(self, hidden_states: Tensor, conv_state: Tensor, ssm_state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Take the next token, (b, 1, d), into the states, in place, without gradient; return its output and them."""
        self._check_one_direction()
        x, z = self.in_proj(one_token(hidden_states)).chunk(2, dim=-1)
        u = causal_conv1d_update(x, conv_state, self.conv1d.weight.squeeze(1), self.conv1d.bias, "silu")
        dt, B, C = self.x_proj(u).split([self.dt_rank, self.d_state, self.d_state], dim=-1)
        y = selective_state_update(
            ssm_state,
            u,
            F.linear(dt, self.dt_proj.weight),
            -torch.exp(self.A_log),
            B,
            C,
            self.D,
            z=z,
            dt_bias=self.dt_proj.bias,
            dt_softplus=True,
        )
        return self._project_out(y).unsqueeze(1), conv_state, ssm_state

    def allocate_inference_cache(
        self, batch_size: int, max_seqlen: int, dtype: torch.dtype | None = None, **options: object
    ) -> States:
        """Return the states before the first token: (b, e, w), (b, e, n)."""
        self._check_one_direction()
        conv, dt_proj = self.conv1d.weight, self.dt_proj.weight
        conv_state = conv.new_zeros(batch_size, self.d_inner, self.d_conv, dtype=dtype or conv.dtype)
        ssm_state = dt_proj.new_zeros(batch_size, self.d_inner, self.d_state, dtype=dtype or dt_proj.dtype)
        return conv_state, ssm_state

    def _check_one_direction(self) -> None:
        if self.bimamba_type != "none":
            raise NotImplementedError(
                f"Mamba with bimamba_type={self.bimamba_type!r} also scans backwards, so it takes whole sequences: "
                "call it without inference_params"
            )


def _kind_of_scans(bimamba_type: str | None, bimamba: bool, nslices: int | None) -> str:
    """Return the key of `SCANS`, or raise ValueError where published forks disagree on it."""
    kind = "v2" if bimamba else bimamba_type or "none"
    if kind not in SCANS or (kind == "v3") != (nslices is not None):
        raise ValueError(
            f"bimamba_type={kind!r} with nslices={nslices} means different models in different forks: {FORK}"
        )
    return kind


def cached_states(mixer: nn.Module, inference_params: Any, batch_size: int) -> States:
    """Return the states of a mixer; at first, those before the first token.

    Raises:
        ValueError: the mixer has no `layer_idx`, under which they are kept.
    """
    cache, index = inference_params.key_value_memory_dict, mixer.layer_idx
    if index is None:
        raise ValueError(
            f"{type(mixer).__name__} keeps its states by layer_idx, which is None: pass layer_idx=0, 1, ..."
        )
    if index not in cache:
        cache[index] = mixer.allocate_inference_cache(batch_size, inference_params.max_seqlen)  # type: ignore[operator]
    return cast(States, cache[index])


@torch.no_grad()
def keep_last(conv_state: Tensor, x: Tensor) -> None:
    """Keep the last tokens of (b, l, e) in (b, e, w), with zeros before the first."""
    conv_state.copy_(F.pad(x.transpose(1, 2), (conv_state.shape[2] - x.shape[1], 0)))


def one_token(hidden_states: Tensor) -> Tensor:
    """Return (b, 1, d) as (b, d), or raise ValueError where it has more tokens."""
    if hidden_states.shape[1] != 1:
        raise ValueError(f"a step takes one token, (b, 1, d), got {tuple(hidden_states.shape)}")
    return hidden_states.squeeze(1)


def _slices(l: int, nslices: int, device: torch.device) -> Tensor:
    """Return the order of the third scan: the first token of each slice, the second of each, ... (l,).

    Raises:
        ValueError: the slices are not of one length.
    """
    if l % nslices:
        raise ValueError(f"the tokens must be a multiple of nslices, {nslices}, got {l}")
    return torch.arange(l, device=device).view(nslices, l // nslices).t().flatten()


def not_decayed(x: Tensor) -> nn.Parameter:
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
    dt_proj.bias.copy_(inverse_softplus(dt_proj.bias, low, high, floor))
    dt_proj.bias._no_reinit = True  # type: ignore[attr-defined]  # published models skip it


def inverse_softplus(like: Tensor, low: float, high: float, floor: float) -> Tensor:
    dt = torch.empty_like(like, dtype=torch.float32).uniform_(math.log(low), math.log(high)).exp().clamp(min=floor)
    return dt + torch.log(-torch.expm1(-dt))
