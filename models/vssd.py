"""VSSD: state space duality without an order of the tokens, in four stages, the last of which attends.

Paper: https://arxiv.org/abs/2407.18559. Published code and weights: https://github.com/YuHengsss/VSSD, in the version
of August 2024.
"""

import re
from collections.abc import Mapping
from functools import partial
from typing import Any, cast

import torch
from timm.layers import Attention, ConvNormAct, Mlp, calculate_drop_path_rates
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

from vim.checkpoints import checkpoint_filter_fn as checkpoint_filter_fn  # timm expects it beside the class
from vim.layers import (
    Factory,
    NonCausalSSD,
    PositionConv,
    ResidualMixer,
    ResidualNorm,
    ResidualStack,
    Stage,
    StagedBackbone,
    check_counts,
    check_stages,
    init_linears,
)

from ._registry import create, register_variant, tag_facts

# published names, and ours
NAMES = (
    (r"patch_embed\.(.*)\.norm\.", r"patch_embed.\1.bn."),
    *(
        (rf"layers\.(\d+)\.blocks\.(\d+)\.{published}\.", rf"stages.\1.layers.\2.{own}.")
        for published, own in {
            "cpe1": "0.conv",
            "norm1": "1.norm",
            r"attn\.to_qkv": "1.mixer.attn.qkv",
            r"attn\.to_out": "1.mixer.attn.proj",
            "attn": "1.mixer",
            "cpe2": "2.conv",
            "norm2": "3.norm",
            "mlp": "3.mixer",
        }.items()
    ),
    *((rf"layers\.{i}\.downsample\.conv\.0\.conv\.", f"stages.{i + 1}.downsample.expand.") for i in range(3)),
    *((rf"layers\.{i}\.downsample\.conv\.1\.conv\.", f"stages.{i + 1}.downsample.depthwise.") for i in range(3)),
    *((rf"layers\.{i}\.downsample\.conv\.2\.conv\.", f"stages.{i + 1}.downsample.project.conv.") for i in range(3)),
    *((rf"layers\.{i}\.downsample\.conv\.2\.norm\.", f"stages.{i + 1}.downsample.project.bn.") for i in range(3)),
    (r"norm\.", "norm_f."),
)


class MapAttention(nn.Module):
    """Multi-head attention between all positions of a map."""

    def __init__(self, dim: int, num_heads: int, dd: Factory) -> None:
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"the channels must be a multiple of the heads, got {dim} and {num_heads}")
        self.attn = Attention(dim, num_heads, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """Map (b, rows, columns, c) to the same."""
        return self.attn(x.flatten(1, 2)).unflatten(1, (x.shape[1], x.shape[2]))


class Stem(nn.Module):
    """3 x 3 convolutions at half of the resolution, two of them a residual branch, then an inverted bottleneck."""

    def __init__(self, in_chans: int, dim: int, dd: Factory) -> None:
        super().__init__()
        half, conv = dim // 2, partial(ConvNormAct, **dd)
        self.conv1 = conv(in_chans, half, 3, stride=2)
        self.conv2 = nn.Sequential(conv(half, half, 3), conv(half, half, 3, apply_act=False))
        self.conv3 = nn.Sequential(conv(half, 4 * dim, 3, stride=2), conv(4 * dim, dim, 1, apply_act=False))

    def forward(self, image: Tensor) -> Tensor:
        """Map (b, c, h, w) to (b, h / 4, w / 4, dim), twice rounded up."""
        x = self.conv1(image.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2))  # channels last, as the blocks
        return self.conv3(x + self.conv2(x)).permute(0, 2, 3, 1)


class Downsample(nn.Module):
    """An inverted bottleneck with stride 2."""

    def __init__(self, dim: int, dd: Factory) -> None:
        super().__init__()
        hidden = 8 * dim
        self.expand = nn.Conv2d(dim, hidden, 1, **dd)
        self.depthwise = nn.Conv2d(hidden, hidden, 3, stride=2, padding=1, groups=hidden, **dd)
        self.project = ConvNormAct(hidden, 2 * dim, bias=True, apply_act=False, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """Map (b, rows, columns, dim) to (b, rows / 2, columns / 2, 2 dim), rounded up."""
        x = x.to(self.expand.weight.dtype).permute(0, 3, 1, 2)
        return self.project(self.depthwise(self.expand(x).relu()).relu()).permute(0, 2, 3, 1)


class VSSD(StagedBackbone):
    """VSSD: a stem, three stages of non-causal state space duality, one of attention, the mean, a linear head.

    Images can have any size: rows and columns are rounded up. The published classifier takes multiples of 32 only.

    Args:
        img_size: height and width in pixels of the images to prepare.
        global_pool: "avg", "max" or "avgmax" of the map; "" for the map (b, d, rows, columns).
        embed_dim: channels of the first stage; each stage has twice as many as the one before.
        depths, num_heads: of each stage, its blocks and the heads of its mixers.
        d_state, expand, ngroups: see :class:`vim.layers.NonCausalSSD`.
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
        embed_dim: int = 64,
        depths: tuple[int, ...] = (2, 4, 8, 4),
        num_heads: tuple[int, ...] = (2, 4, 8, 16),
        d_state: int = 64,
        expand: int = 2,
        ngroups: int = 1,
        output_stride: int | None = None,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_counts(embed_dim=embed_dim, d_state=d_state, expand=expand, ngroups=ngroups)
        dims = tuple(embed_dim * 2**i for i in range(4))
        check_stages(depths=depths, num_heads=num_heads, dims=dims)
        dd: Factory = {"device": device, "dtype": dtype}
        ssd = partial(NonCausalSSD, d_state=d_state, expand=expand, ngroups=ngroups, **dd)
        rates = iter(cast(list[float], calculate_drop_path_rates(drop_path_rate, sum(depths))))
        stages = []
        for i, (dim, depth, heads) in enumerate(zip(dims, depths, num_heads, strict=True)):
            blocks = []
            for _ in range(depth):
                branch, conv = (
                    partial(ResidualMixer, dim, drop_path=next(rates), **dd),
                    partial(PositionConv, dim, **dd),
                )
                mixer = ssd(dim, num_heads=heads) if i < 3 else MapAttention(dim, heads, dd)
                mlp = Mlp(dim, 4 * dim, **dd)
                blocks.append(nn.Sequential(conv(), branch(mixer), conv(), branch(mlp)))
            downsample = Downsample(dims[i - 1], dd) if i else nn.Identity()
            stages.append(Stage(downsample, ResidualStack(*blocks)))
        super().__init__(
            img_size=img_size,
            in_chans=in_chans,
            num_classes=num_classes,
            global_pool=global_pool,
            patch_embed=Stem(in_chans, embed_dim, dd),
            stride=4,
            stages=stages,
            embed_dims=dims,
            output_stride=output_stride,
            norm_f=ResidualNorm(dims[-1], **dd),
            drop_rate=drop_rate,
            not_decayed=("D", "A_log", "dt_bias"),
            **dd,
        )
        self.init_weights(needs_reset=False)

    @torch.jit.ignore
    def init_weights(self, needs_reset: bool = True) -> None:
        """Draw the initial weights; see :meth:`vim.layers.TimmModel.init_weights`."""
        super().init_weights(needs_reset)
        init_linears(self)

    def rename_weights(self, weights: dict[str, object]) -> dict[str, object]:
        """Give published weights our names; raise ValueError for those of another variant, and of the later version."""
        renamed = super().rename_weights(weights)
        found = blocks_of(renamed)
        if "stages.0.layers.0.1.mixer.A_log" not in renamed or found == blocks_of(self.state_dict()):
            return renamed
        for name, options in VARIANTS.items():
            if found == blocks_of(VSSD(**options, device="meta").state_dict()):
                raise ValueError(f"its tensors are those of vssd_{name}")
        if renamed.keys() != weights.keys():
            version = "the version of 2025, whose files have _iccv2025 in their names"
            raise ValueError(f"its blocks are those of no VSSD of August 2024; {version}, is not in this package")
        return renamed


def blocks_of(weights: Mapping[str, object]) -> set[tuple[str, object]]:
    """The names of the blocks' tensors, by our names, with the shapes of the input projections."""
    names = [key for key in weights if re.match(r"stages\.\d+\.layers\.", key)]
    return {(key, getattr(weights[key], "shape", None) if key.endswith(".in_proj.weight") else None) for key in names}


_facts = partial(
    tag_facts,
    pool_size=(7, 7),
    first_conv="patch_embed.conv1.conv",
    paper_ids="arXiv:2407.18559",
    origin_url="https://github.com/YuHengsss/VSSD",
)


def _published(file: str, top1: float) -> dict[str, object]:
    """The facts of the authors' weights, with their top-1 in % on ImageNet-1k's validation images."""
    return _facts(
        hf_hub_id="YuhengSSS/VSSD",
        hf_hub_filename=file,
        notes=(f"{top1} % top-1, as published", "Neither the code nor the weights name a licence: ask the authors."),
    )


default_cfgs = generate_default_cfgs(
    {
        "vssd_micro.in1k": _published("vssd_micro_best.pth", 82.5),
        "vssd_tiny.in1k": _published("vssd_tiny_best_ema.pth", 83.6),
        "vssd_tiny.mesa_in1k": _published("vssd_tiny_e300_with_mesa.pth", 84.1),
        "vssd_small.in1k": _published("vssd_small_best_ema.pth", 84.1),
        "vssd_small.mesa_in1k": _published("vssd_small_e300_with_mesa.pth", 84.5),
        "vssd_base.in1k": _published("vssd_base_best_ema.pth", 84.7),
        "vssd_base.mesa_in1k": _published("vssd_base_e300_with_mesa.pth", 85.4),
        "test_vssd.untrained": _facts(input_size=(3, 64, 64), pool_size=(2, 2)),
    }
)

VARIANTS: dict[str, dict[str, Any]] = {
    "micro": {"embed_dim": 48, "depths": (2, 2, 8, 4), "d_state": 48},
    "tiny": {},
    "small": {"depths": (3, 4, 21, 5)},
    "base": {"embed_dim": 96, "depths": (3, 4, 21, 5), "num_heads": (3, 6, 12, 24)},
}

for _variant, _options in VARIANTS.items():
    _name = f"vssd_{_variant}"
    _doc = f"VSSD-{_variant.title()}; {default_cfgs[_name].default.notes[0]}."
    register_variant(VSSD, _name, _doc, **_options)


@register_model
def test_vssd(pretrained: bool = False, **options: object) -> VSSD:
    """A VSSD for tests, 0.2 M parameters."""
    sizes = {"embed_dim": 8, "depths": (1, 1, 2, 1), "num_heads": (1, 2, 4, 4), "d_state": 8}
    return create(VSSD, "test_vssd", pretrained, options, img_size=64, **sizes)
