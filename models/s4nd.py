"""ViT with S4ND in place of attention, class token and positions.

Paper: https://arxiv.org/abs/2210.06583. Published code, without weights: https://github.com/state-spaces/s4.
"""

from functools import partial
from typing import Literal, cast

import torch
from timm.layers import Mlp, calculate_drop_path_rates
from timm.models import generate_default_cfgs, register_model
from torch import nn

from vim.checkpoints import checkpoint_filter_fn as checkpoint_filter_fn  # timm expects it beside the class
from vim.layers import (
    S4ND,
    Factory,
    PaddedPatchEmbed,
    ResidualMixer,
    ResidualNorm,
    ResidualStack,
    S4NDKernel,
    Spectrum,
    Stage,
    StagedBackbone,
    check_choice,
    check_counts,
    init_linears,
)

from ._registry import create, register_variant, tag_facts


class ViTS4ND(StagedBackbone):
    """ViT with S4ND in place of attention, class token and positions: patches, blocks, the mean, a linear head.

    Images can have any size: rows and columns of patches are rounded up.

    Args:
        img_size: height and width in pixels of the images to prepare.
        global_pool: "avg", "max" or "avgmax" of the map; "" for the map (b, d, rows, columns).
        mlp_ratio: width of the MLP after each mixer, in channels; 0 for blocks without one.
        axes: 1 for kernels over the patches row by row, as published; 2 for kernels along rows and columns.
        channels, kind, d_state, init, dt_min, dt_max, rate, bandlimit: see :class:`vim.layers.S4ND`.

    Raises:
        ValueError: an option is none of its values, or a size is not whole and positive.
    """

    out_indices = 3  # the last blocks
    published_compute = "images"

    def __init__(
        self,
        *,
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 16,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        embed_dim: int = 768,
        depth: int = 12,
        mlp_ratio: float = 4.0,
        axes: Literal[1, 2] = 1,
        channels: int = 2,
        kind: S4NDKernel = "s4",
        d_state: int = 64,
        init: Spectrum = "legs",
        dt_min: float = 1e-3,
        dt_max: float = 1e-1,
        rate: float = 1.0,
        bandlimit: float | None = None,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_choice("axes", axes, (1, 2))
        check_counts(patch_size=patch_size, in_chans=in_chans, embed_dim=embed_dim, depth=depth)
        dd: Factory = {"device": device, "dtype": dtype}
        mixer = partial(
            S4ND,
            embed_dim,
            axes=axes,
            kind=kind,
            d_state=d_state,
            init=init,
            dt_min=dt_min,
            dt_max=dt_max,
            channels=channels,
            rate=rate,
            bandlimit=bandlimit,
            **dd,
        )
        stages = []
        for drop_path in cast(list[float], calculate_drop_path_rates(drop_path_rate, depth)):
            branch = partial(ResidualMixer, embed_dim, drop_path=drop_path, **dd)
            branches = [branch(mixer())]
            if mlp_ratio > 0:
                branches.append(branch(Mlp(embed_dim, int(mlp_ratio * embed_dim), **dd)))
            windows = 0 if axes == 1 else None
            stages.append(Stage(nn.Identity(), ResidualStack(nn.Sequential(*branches)), windows=windows))
        super().__init__(
            img_size=img_size,
            in_chans=in_chans,
            num_classes=num_classes,
            global_pool=global_pool,
            patch_embed=PaddedPatchEmbed(patch_size, in_chans, embed_dim, **dd),
            stride=patch_size,
            stages=stages,
            embed_dims=(embed_dim,) * depth,
            strides=(patch_size,) * depth,
            output_stride=None,
            norm_f=ResidualNorm(embed_dim, **dd),
            drop_rate=drop_rate,
            not_decayed=(),
            **dd,
        )
        self.init_weights(needs_reset=False)

    @torch.jit.ignore
    def init_weights(self, needs_reset: bool = True) -> None:
        """Draw the initial weights; see :meth:`vim.layers.TimmModel.init_weights`."""
        super().init_weights(needs_reset)
        init_linears(self)


_facts = partial(
    tag_facts,
    crop_pct=0.9,
    paper_ids="arXiv:2210.06583",
    origin_url="https://github.com/state-spaces/s4",
)

default_cfgs = generate_default_cfgs(
    {
        "vit_s4nd_base.untrained": _facts(notes=("80.4 % top-1, as published without weights",)),
        "s4nd_nano.untrained": _facts(input_size=(3, 16, 16)),
        "test_s4nd.untrained": _facts(input_size=(3, 64, 64)),
    }
)

register_variant(ViTS4ND, "vit_s4nd_base", "ViT-S4ND-B, 89 M parameters, 80.4 % ImageNet-1k top-1 published.")


@register_model
def s4nd_nano(pretrained: bool = False, **options: object) -> ViTS4ND:
    """S4ND over rows and columns without MLPs, for images of 8 to 32 pixels, 0.1 M parameters."""
    sizes = {"img_size": 16, "patch_size": 2, "embed_dim": 64, "depth": 4, "mlp_ratio": 0, "axes": 2, "channels": 1}
    return create(ViTS4ND, "s4nd_nano", pretrained, options, kind="s4d", d_state=32, dt_min=0.1, dt_max=1.0, **sizes)


@register_model
def test_s4nd(pretrained: bool = False, **options: object) -> ViTS4ND:
    """A ViT with S4ND for tests, 0.1 M parameters."""
    sizes = {"embed_dim": 32, "depth": 3, "patch_size": 16, "kind": "s4d", "d_state": 8}
    return create(ViTS4ND, "test_s4nd", pretrained, options, img_size=64, **sizes)
