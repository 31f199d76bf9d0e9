"""`mamba_ssm.modules.mamba_new` and `mamba_simple_scan_norm`: the mixers of OpenGVLab/video-mamba-suite's fork."""

from typing import Any

import torch
from torch import Tensor, nn

from .mamba import Mamba, States
from .norm import RMSNorm


class HalvedMamba(Mamba):
    """`mamba_new.Mamba`: one half of the channels is scanned forwards, the other backwards, with one set of weights.

    The projection in makes 4e channels, and the projection out takes 2e. `init_layer_scale` has no effect there either.
    """

    def __init__(self, d_model: int, *args: Any, init_layer_scale: float | None = None, **options: Any) -> None:
        super().__init__(d_model, *args, **options)
        weight, bias, e = self.out_proj.weight, self.out_proj.bias is not None, self.d_inner
        self.bimamba_type = "halves"
        self.in_proj = nn.Linear(d_model, 4 * e, bias=bias, device=weight.device, dtype=weight.dtype)
        self.out_proj = nn.Linear(2 * e, d_model, bias=bias, device=weight.device, dtype=weight.dtype)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take the attributes of a pickled mixer, with our name for its two directions."""
        super().__setstate__(state | {"bimamba_type": "halves", "if_divide_out": False, "if_devide_out": False})

    def _mix(self, xz: Tensor, states: States | None) -> Tensor:
        halves = (half.chunk(2, dim=-1) for half in xz.chunk(2, dim=-1))
        return torch.cat([self._scan(x, z, "", reverse=i == 1) for i, (x, z) in enumerate(halves)], dim=-1)


class ScanNormMamba(Mamba):
    """`mamba_simple_scan_norm.Mamba`: "v2", whose sum is normalised, with `if_devide_out`, and not halved."""

    def __init__(self, d_model: int, *args: Any, **options: Any) -> None:
        super().__init__(d_model, *args, **options)
        if self.bimamba_type != "v2":
            raise ValueError(f"mamba_simple_scan_norm.Mamba needs bimamba_type='v2', got {self.bimamba_type!r}")
        weight = self.out_proj.weight
        self.norm = RMSNorm(self.d_inner, device=weight.device, dtype=weight.dtype)
        self.if_divide_out = False

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take the attributes of a pickled mixer, whose sum is not halved."""
        super().__setstate__(state | {"if_divide_out": False})

    def _mix(self, xz: Tensor, states: States | None) -> Tensor:
        y = super()._mix(xz, states)
        return self.norm(y) if self.if_devide_out else y  # type: ignore[return-value]
