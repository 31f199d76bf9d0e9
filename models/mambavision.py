"""MambaVision: convolutions, then scans and attention within windows, in four stages.

Paper: MambaVision: A Hybrid Mamba-Transformer Vision Backbone, https://arxiv.org/abs/2407.08083. Published code and
weights: https://github.com/NVlabs/MambaVision. The weights are for non-commercial use.
"""

from functools import partial
from typing import cast

import torch
from timm.layers import Attention, DropPath, Mlp, calculate_drop_path_rates
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

from vim.checkpoints import checkpoint_filter_fn as checkpoint_filter_fn  # timm expects it beside the class
from vim.layers import (
    ConvDownsample,
    ConvStem,
    Factory,
    MapBatchNorm,
    ResidualMixer,
    ResidualStack,
    SplitMixer,
    Stage,
    StagedBackbone,
    check_counts,
    check_stages,
    init_linears,
)

from ._registry import create, register_variant, tag_facts

# published names, and ours
NAMES = (
    (r"patch_embed\.conv_down\.0\.", "patch_embed.conv1."),
    (r"patch_embed\.conv_down\.1\.", "patch_embed.norm1."),
    (r"patch_embed\.conv_down\.3\.", "patch_embed.conv2."),
    (r"patch_embed\.conv_down\.4\.", "patch_embed.norm2."),
    (r"levels\.([23])\.blocks\.(\d+)\.norm1\.", r"stages.\1.layers.\2.0.norm."),
    (r"levels\.([23])\.blocks\.(\d+)\.mixer\.", r"stages.\1.layers.\2.0.mixer."),
    (r"levels\.([23])\.blocks\.(\d+)\.gamma_1", r"stages.\1.layers.\2.0.layer_scale.gamma"),
    (r"levels\.([23])\.blocks\.(\d+)\.norm2\.", r"stages.\1.layers.\2.1.norm."),
    (r"levels\.([23])\.blocks\.(\d+)\.mlp\.", r"stages.\1.layers.\2.1.mixer."),
    (r"levels\.([23])\.blocks\.(\d+)\.gamma_2", r"stages.\1.layers.\2.1.layer_scale.gamma"),
    (r"levels\.([01])\.blocks\.", r"stages.\1.layers."),
    *((rf"levels\.{i}\.downsample\.reduction\.0\.", f"stages.{i + 1}.downsample.conv.") for i in range(3)),
    (r"norm\.", "norm_f.norm."),
)


class ConvBlock(nn.Module):
    """``x + drop_path(norm(conv(gelu(norm(conv(x))))))`` with 3 x 3 convolutions and batch norms; tanh's GELU."""

    def __init__(self, dim: int, drop_path: float, dd: Factory) -> None:
        super().__init__()
        self.conv1, self.conv2 = (nn.Conv2d(dim, dim, 3, 1, 1, **dd) for _ in range(2))
        self.norm1, self.norm2 = (nn.BatchNorm2d(dim, **dd) for _ in range(2))
        self.act = nn.GELU(approximate="tanh")
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Map (b, rows, columns, c) to the same."""
        y = x.to(self.conv1.weight.dtype).permute(0, 3, 1, 2)
        y = self.norm2(self.conv2(self.act(self.norm1(self.conv1(y)))))
        return x + self.drop_path(y.permute(0, 2, 3, 1))


class MambaVision(StagedBackbone):
    """MambaVision: a stem, two stages of convolutions, two of scans and attention, the mean, a linear head.

    Images can have any size. At the last two stages a map is padded to whole windows, and the padding is not masked, so
    the outputs at sizes that need padding depend on `window_sizes`. The weights do not.

    Args:
        img_size: height and width in pixels of the images to prepare.
        global_pool: "avg", "max" or "avgmax" of the map; "" for the map (b, d, rows, columns).
        stem_dim: channels between the stem's convolutions.
        embed_dim: channels of the first stage; each stage has twice as many as the one before.
        depths: blocks of each stage. Of those in the last two, the later half attends, the earlier scans.
        num_heads: attention heads of the last two stages.
        window_sizes: rows and columns of a window in the last two stages; 0 for the whole map.
        layer_scale: first value of the learned scales of the branches in the last two stages; None for no scales.
        double_dt_bias: see :class:`vim.layers.SplitMixer`.
        output_stride: see :class:`vim.layers.StagedBackbone`.

    Raises:
        ValueError: a size is not whole and positive, or the channels are no multiple of the heads.
    """

    published_names, published_compute = NAMES, "layers"

    def __init__(
        self,
        *,
        img_size: int | tuple[int, int] = 224,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        stem_dim: int = 32,
        embed_dim: int = 80,
        depths: tuple[int, ...] = (1, 3, 8, 4),
        num_heads: tuple[int, int] = (8, 16),
        window_sizes: tuple[int, int] = (14, 7),
        layer_scale: float | None = None,
        d_state: int = 8,
        double_dt_bias: bool = True,
        output_stride: int | None = None,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        dims = tuple(embed_dim * 2**i for i in range(4))
        check_stages(depths=depths, dims=dims)
        check_stages(num_heads=num_heads, last_dims=dims[2:])
        check_stages(least=0, num_heads=num_heads, window_sizes=window_sizes)
        check_counts(stem_dim=stem_dim, d_state=d_state)
        for dim, heads in zip(dims[2:], num_heads, strict=True):
            if dim % heads:
                raise ValueError(f"the channels of a stage must be a multiple of its heads, got {dim} and {heads}")
        dd: Factory = {"device": device, "dtype": dtype}
        rates = iter(cast(list[float], calculate_drop_path_rates(drop_path_rate, sum(depths))))
        scan = partial(SplitMixer, d_state=d_state, double_dt_bias=double_dt_bias, **dd)
        stages = []
        for i, (dim, depth) in enumerate(zip(dims, depths, strict=True)):
            blocks: list[nn.Module] = []
            for j in range(depth):
                if i < 2:
                    blocks.append(ConvBlock(dim, next(rates), dd))
                    continue
                attends = j >= (depth + 1) // 2
                mixer = Attention(dim, num_heads[i - 2], qkv_bias=True, **dd) if attends else scan(dim)
                branch = partial(ResidualMixer, dim, drop_path=next(rates), layer_scale=layer_scale, **dd)
                blocks.append(nn.Sequential(branch(mixer), branch(Mlp(dim, 4 * dim, **dd))))
            downsample = ConvDownsample(dims[i - 1], dim, norm=False, **dd) if i else nn.Identity()
            windows = None if i < 2 else window_sizes[i - 2]
            stages.append(Stage(downsample, ResidualStack(*blocks), windows=windows))
        norm = partial(nn.BatchNorm2d, eps=1e-4, **dd)
        super().__init__(
            img_size=img_size,
            in_chans=in_chans,
            num_classes=num_classes,
            global_pool=global_pool,
            patch_embed=ConvStem(
                in_chans, stem_dim, embed_dim, norm=norm, act=nn.ReLU, last_act=True, bias=False, **dd
            ),
            stride=4,
            stages=stages,
            embed_dims=dims,
            output_stride=output_stride,
            norm_f=MapBatchNorm(dims[-1], **dd),
            drop_rate=drop_rate,
            not_decayed=("gamma",),
            **dd,
        )
        self.init_weights(needs_reset=False)

    @torch.jit.ignore
    def init_weights(self, needs_reset: bool = True) -> None:
        """Draw the initial weights; see :meth:`vim.layers.TimmModel.init_weights`."""
        super().init_weights(needs_reset)
        init_linears(self)


_NON_COMMERCIAL = "cc-by-nc-sa-4.0"
_facts = partial(
    tag_facts,
    pool_size=(7, 7),
    crop_pct=1.0,
    first_conv="patch_embed.conv1",
    paper_ids="arXiv:2407.08083",
    origin_url="https://github.com/NVlabs/MambaVision",
)


def _published(repository: str, file: str, top1: float, top5: float, **facts: object) -> dict[str, object]:
    """The facts of the authors' weights, with their top-1 and top-5 in % on ImageNet-1k's validation images."""
    return _facts(
        hf_hub_id=f"nvidia/MambaVision-{repository}",
        hf_hub_filename=file,
        license=_NON_COMMERCIAL,
        notes=(
            f"{top1} % top-1, {top5} % top-5, as published",
            "For non-commercial use: the authors' page says CC-BY-NC-SA-4.0, the model cards nvclv1.",
        ),
        **facts,
    )


def _squashed(pixels: int) -> dict[str, object]:
    return {"input_size": (3, pixels, pixels), "crop_pct": 0.93, "crop_mode": "squash", "pool_size": (16, 16)}


default_cfgs = generate_default_cfgs(
    {
        "mambavision_t.nvidia_in1k": _published("T-1K", "model.safetensors", 82.3, 96.2),
        "mambavision_t2.nvidia_in1k": _published("T2-1K", "mambavision_tiny2_1k.pth.tar", 82.7, 96.3, crop_pct=0.98),
        "mambavision_s.nvidia_in1k": _published("S-1K", "mambavision_small_1k.pth.tar", 83.3, 96.5, crop_pct=0.93),
        "mambavision_b.nvidia_in1k": _published("B-1K", "mambavision_base_1k.pth.tar", 84.2, 96.9),
        "mambavision_b.nvidia_in21k_ft_in1k": _published("B-21K", "mambavision_base_21k.pth.tar", 84.9, 97.5),
        "mambavision_l.nvidia_in1k": _published("L-1K", "mambavision_large_1k.pth.tar", 85.0, 97.1),
        "mambavision_l.nvidia_in21k_ft_in1k": _published("L-21K", "mambavision_large_21k.pth.tar", 86.1, 97.9),
        "mambavision_l2.nvidia_in1k": _published("L2-1K", "mambavision_large2_1k.pth.tar", 85.3, 97.2),
        "mambavision_l2_512.nvidia_in21k_ft_in1k": _published(
            "L2-512-21K", "mambavision_L2_21k_240m_512.pth.tar", 87.3, 98.4, **_squashed(512)
        ),
        "mambavision_l3.nvidia_in21k_ft_in1k": _published(
            "L3-256-21K", "mambavision_L3_21k_740m_256.pth.tar", 87.3, 98.3, input_size=(3, 256, 256), pool_size=(8, 8)
        ),
        "mambavision_l3_512.nvidia_in21k_ft_in1k": _published(
            "L3-512-21K", "mambavision_L3_21k_740m_512.pth.tar", 88.1, 98.6, **_squashed(512)
        ),
        "test_mambavision.untrained": _facts(input_size=(3, 64, 64), pool_size=(2, 2)),
    }
)

_L2: dict[str, object] = {"embed_dim": 196, "depths": (3, 3, 12, 5), "num_heads": (16, 32)}
_L3: dict[str, object] = {"embed_dim": 256, "depths": (3, 3, 20, 10), "num_heads": (16, 32)}
_SCALED: dict[str, object] = {"stem_dim": 64, "layer_scale": 1e-5}
VARIANTS: dict[str, dict[str, object]] = {
    "t": {},
    "t2": {"depths": (1, 3, 11, 4)},
    "s": {"stem_dim": 64, "embed_dim": 96, "depths": (3, 3, 7, 5)},
    "b": {**_SCALED, "embed_dim": 128, "depths": (3, 3, 10, 5)},
    "l": {**_SCALED, "embed_dim": 196, "depths": (3, 3, 10, 5), "num_heads": (16, 32)},
    "l2": {**_SCALED, **_L2},
    "l2_512": {**_SCALED, **_L2, "img_size": 512, "window_sizes": (32, 16)},
    "l3": {**_SCALED, **_L3, "img_size": 256, "window_sizes": (16, 8)},
    "l3_512": {**_SCALED, **_L3, "img_size": 512, "window_sizes": (32, 16)},
}


for _variant, _options in VARIANTS.items():
    _name = f"mambavision_{_variant}"
    _doc = f"MambaVision-{_variant.upper()}; {default_cfgs[_name].default.notes[0]}."
    register_variant(MambaVision, _name, _doc, **_options)


@register_model
def test_mambavision(pretrained: bool = False, **options: object) -> MambaVision:
    """A MambaVision for tests, 0.2 M parameters."""
    sizes = {"stem_dim": 8, "embed_dim": 8, "depths": (1, 1, 2, 3), "num_heads": (2, 4), "window_sizes": (4, 2)}
    return create(MambaVision, "test_mambavision", pretrained, options, img_size=64, layer_scale=1e-5, **sizes)
