"""`mamba_ssm.modules.block`, `mlp` and `models.mixer_seq_simple`: what stands around a mixer."""

import math
from collections.abc import Callable, Collection
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .language import MHA
from .mamba import Mamba
from .mamba2 import Mamba2
from .norm import RMSNorm, layer_norm_fn


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
        self.layer_idx: int | None = None
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
        if getattr(self, "mlp", None) is not None:  # a block of version 1 that was pickled has none
            hidden_states, residual = self._add_norm(self.norm2, hidden_states, residual)
            hidden_states = self.mlp(hidden_states)  # type: ignore[misc]
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

    def allocate_inference_cache(self, *args: Any, **options: Any) -> Any:
        """Return the mixer's states before the first token."""
        return self.mixer.allocate_inference_cache(*args, **options)  # type: ignore[operator]


class GatedMLP(nn.Module):
    """Two layers with a gate between them.

    Args:
        hidden_features: the width between the layers, rounded up to a multiple of `multiple_of`.
        activation: of the gate.
    """

    def __init__(
        self,
        in_features: int,
        hidden_features: int | None = None,
        out_features: int | None = None,
        activation: Callable[[Tensor], Tensor] = F.silu,
        bias: bool = False,
        multiple_of: int = 128,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        width = int(8 * in_features / 3) if hidden_features is None else hidden_features
        width = math.ceil(width / multiple_of) * multiple_of
        self.activation = activation
        self.fc1 = nn.Linear(in_features, 2 * width, bias=bias, device=device, dtype=dtype)
        self.fc2 = nn.Linear(width, out_features or in_features, bias=bias, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., in_features) to (..., out_features)."""
        y, gate = self.fc1(x).chunk(2, dim=-1)
        return self.fc2(y * self.activation(gate))


def create_block(
    d_model: int,
    d_intermediate: int | dict | None = 0,
    ssm_cfg: dict | None = None,
    *,
    attn_layer_idx: Collection[int] | None = None,
    attn_cfg: dict | None = None,
    norm_epsilon: float = 1e-5,
    rms_norm: bool = False,
    residual_in_fp32: bool = False,
    fused_add_norm: bool = False,
    layer_idx: int | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> Block:
    """Return a block with a mixer, by the arguments of either published version.

    Args:
        d_intermediate: the width of a gated MLP behind the mixer, 0 for none. In version 1, `ssm_cfg` comes here.
        ssm_cfg: the mixer's options, and `layer`, "Mamba1" or "Mamba2".
        attn_layer_idx, attn_cfg: which layers are attention, which is refused.
    """
    if not isinstance(d_intermediate, int):
        ssm_cfg, d_intermediate = d_intermediate or ssm_cfg, 0
    made: dict[str, Any] = {"device": device, "dtype": dtype}
    options = dict(ssm_cfg or {})
    kind = options.pop("layer", "Mamba1")
    if kind not in ("Mamba1", "Mamba2"):
        raise ValueError(f"ssm_cfg['layer'] must be 'Mamba1' or 'Mamba2', got {kind!r}")
    mixer = partial(Mamba if kind == "Mamba1" else Mamba2, layer_idx=layer_idx, **options, **made)
    if layer_idx in (attn_layer_idx or ()):
        mixer = partial(MHA, layer_idx=layer_idx, **(attn_cfg or {}), **made)  # type: ignore[assignment]
    block = Block(
        *(d_model, mixer),
        norm_cls=partial(RMSNorm if rms_norm else nn.LayerNorm, eps=norm_epsilon, **made),  # type: ignore[arg-type]
        mlp_cls=partial(GatedMLP, hidden_features=d_intermediate, **made) if d_intermediate else nn.Identity,
        fused_add_norm=fused_add_norm,
        residual_in_fp32=residual_in_fp32,
    )
    block.layer_idx = layer_idx
    return block


@torch.no_grad()
def init_weights(
    module: nn.Module,
    n_layer: int,
    initializer_range: float = 0.02,
    rescale_prenorm_residual: bool = True,
    n_residuals_per_layer: int = 1,
) -> None:
    """Start one module of a model, as `model.apply` calls it.

    Biases start at zero, except those of the step sizes; embeddings with a deviation of `initializer_range`; the last
    layers of mixers and MLPs smaller by the root of the number of residual sums.
    """
    if isinstance(module, nn.Linear) and module.bias is not None and not hasattr(module.bias, "_no_reinit"):
        nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Embedding):
        nn.init.normal_(module.weight, std=initializer_range)
    for name, parameter in module.named_parameters():
        if rescale_prenorm_residual and name in ("out_proj.weight", "fc2.weight"):
            nn.init.kaiming_uniform_(parameter, a=math.sqrt(5))
            parameter.div_(math.sqrt(n_residuals_per_layer * n_layer))
