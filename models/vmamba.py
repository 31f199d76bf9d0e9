"""VMamba: four stages of selective scans along the rows and the columns of an image.

Paper: VMamba: Visual State Space Model, https://arxiv.org/abs/2401.10166. Published code and weights:
https://github.com/MzeroMiko/VMamba. Two generations are in use: v0, and v2, whose variants are called by the expansion
of their mixers and the depth of their third stage ("s1l8").
"""

import re
from collections.abc import Callable, Mapping
from functools import partial
from typing import Literal, cast

import torch
from timm.layers import LayerNorm2d, Mlp, PatchEmbed, calculate_drop_path_rates
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

from vim.checkpoints import checkpoint_filter_fn as checkpoint_filter_fn  # timm expects it beside the class
from vim.layers import (
    ConvDownsample,
    ConvStem,
    Downsample,
    Factory,
    ResidualMixer,
    ResidualNorm,
    ResidualStack,
    SelectiveTokenMixer,
    Stage,
    StagedBackbone,
    check_choice,
    check_counts,
    check_stages,
    init_linears,
)

from ._registry import create, register_variant, tag_facts

# published names, of both generations before and after their renaming, and ours
NAMES = (
    (r"layers\.(\d+)\.blocks\.(\d+)\.(?:ln_1|norm)\.", r"stages.\1.layers.\2.0.norm."),
    (r"layers\.(\d+)\.blocks\.(\d+)\.(?:self_attention|op)\.", r"stages.\1.layers.\2.0.mixer."),
    (r"layers\.(\d+)\.blocks\.(\d+)\.norm2\.", r"stages.\1.layers.\2.1.norm."),
    (r"layers\.(\d+)\.blocks\.(\d+)\.mlp\.", r"stages.\1.layers.\2.1.mixer."),
    *((rf"layers\.{i}\.downsample\.(reduction|norm)\.", rf"stages.{i + 1}.downsample.\1.") for i in range(3)),
    *((rf"layers\.{i}\.downsample\.1\.", f"stages.{i + 1}.downsample.conv.") for i in range(3)),
    *((rf"layers\.{i}\.downsample\.3\.", f"stages.{i + 1}.downsample.norm.") for i in range(3)),
    (r"(?:classifier\.)?norm\.", "norm_f."),
    (r"classifier\.head\.", "head."),
)
STEMS = {  # by generation
    "v0": ((r"patch_embed\.0\.", "patch_embed.proj."), (r"patch_embed\.2\.", "patch_embed.norm.")),
    "v2": (
        (r"patch_embed\.0\.", "patch_embed.conv1."),
        (r"patch_embed\.2\.", "patch_embed.norm1."),
        (r"patch_embed\.5\.", "patch_embed.conv2."),
        (r"patch_embed\.7\.", "patch_embed.norm2."),
    ),
}


class VMamba(StagedBackbone):
    """VMamba: a stem, four stages of selective token mixers, the mean over the map, a linear head.

    Images can have any size. v0's stem leaves out the rows and columns that do not fill a patch of 4 pixels.

    Args:
        img_size: height and width in pixels of the images to prepare.
        global_pool: "avg", "max" or "avgmax" of the map; "" for the map (b, d, rows, columns).
        embed_dims, depths: of each stage, its channels and its blocks.
        version: "v0": patches of 4 pixels, gated mixers, patch merging. "v2": a stem of two convolutions, mixers
            without gate and biases, each followed by an MLP, and convolutions between the stages.
        output_stride: see :class:`vim.layers.StagedBackbone`.
        wd_exempt_A: keep weight decay off `A_log` and `dt_bias`. The published recipe decays both.

    Raises:
        ValueError: an option is none of its names, or a size is not whole and positive.
    """

    published_names, published_compute = NAMES, "scans"

    def __init__(
        self,
        *,
        img_size: int | tuple[int, int] = 224,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        embed_dims: tuple[int, ...] = (96, 192, 384, 768),
        depths: tuple[int, ...] = (2, 2, 8, 2),
        version: Literal["v0", "v2"] = "v2",
        d_state: int = 1,
        expand: int = 1,
        wd_exempt_A: bool = False,
        output_stride: int | None = None,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_choice("version", version, ("v0", "v2"))
        check_stages(embed_dims=embed_dims, depths=depths)
        check_counts(d_state=d_state, expand=expand)
        dd: Factory = {"device": device, "dtype": dtype}
        first, plain = embed_dims[0], version == "v0"
        mixer = partial(SelectiveTokenMixer, d_state=d_state, expand=expand, gate=plain, conv_bias=plain, **dd)
        halve = partial(Downsample, **dd) if plain else partial(ConvDownsample, norm=True, **dd)
        rates = iter(cast(list[float], calculate_drop_path_rates(drop_path_rate, sum(depths))))
        stages = []
        for i, (dim, depth) in enumerate(zip(embed_dims, depths, strict=True)):
            blocks = []
            for _ in range(depth):
                branches = [mixer(dim)] if plain else [mixer(dim), Mlp(dim, 4 * dim, **dd)]
                rate = next(rates)
                blocks.append(nn.Sequential(*(ResidualMixer(dim, branch, drop_path=rate, **dd) for branch in branches)))
            downsample = halve(embed_dims[i - 1], dim) if i else nn.Identity()
            stages.append(Stage(downsample, ResidualStack(*blocks)))
        super().__init__(
            img_size=img_size,
            in_chans=in_chans,
            num_classes=num_classes,
            global_pool=global_pool,
            patch_embed=_stem(version, in_chans, first, dd),
            stride=4,
            stages=stages,
            embed_dims=embed_dims,
            output_stride=output_stride,
            norm_f=ResidualNorm(embed_dims[-1], **dd),
            drop_rate=drop_rate,
            not_decayed=("D", "A_log", "dt_bias") if wd_exempt_A else ("D",),
            **dd,
        )
        self.version = str(version)
        self.init_weights(needs_reset=False)

    @torch.jit.ignore
    def init_weights(self, needs_reset: bool = True) -> None:
        """Draw the initial weights; see :meth:`vim.layers.TimmModel.init_weights`."""
        super().init_weights(needs_reset)
        init_linears(self, but="x_proj")

    def rename_weight(self, key: str, weight: object) -> tuple[str, object]:
        """Return a published weight under our name and in our shape."""
        for pattern, own in STEMS[self.version]:
            key = re.sub(f"^{pattern}", own, key)
        return _reshape(*super().rename_weight(key, weight))

    def rename_weights(self, weights: dict[str, object]) -> dict[str, object]:
        """Give published weights our names; raise ValueError for weights of another published variant."""
        renamed = super().rename_weights(weights)
        other = variant_of(renamed)
        if other in default_cfgs and other != variant_of(self.state_dict()):
            raise ValueError(f"its tensors are those of {other}")
        return renamed


def variant_of(weights: Mapping[str, object]) -> str:
    """The name of the variant that weights of such sizes are of, by our names; another word if there is none."""
    first = [weights.get(f"stages.0.layers.0.0.mixer.{one}_proj.weight") for one in ("in", "out")]
    (rows, _), (dim, inner) = (tuple(w.shape) if isinstance(w, Tensor) and w.dim() == 2 else (0, 0) for w in first)
    depth = sum(key.startswith("stages.2.") and key.endswith(".out_proj.weight") for key in weights)
    size = {96: "tiny" if depth < 10 else "small", 128: "base"}.get(dim)
    plain = rows == 2 * inner and depth in (9, 27)
    return f"vmamba_{size}_v0" if plain else f"vmamba_{size}_s{inner / max(dim, 1):g}l{depth}"


# The mixer's stacked tensors: their last published name, ours, the dimensions, and how ours is made. The published ones
# start with the four directions: rows, columns, rows back, columns back; ours with (back, column).
STACKED: dict[str, tuple[str, int, Callable[[Tensor], Tensor]]] = {
    "x_proj_weight": ("x_proj.weight", 3, lambda t: t[[0, 2, 1, 3]].flatten(0, 1)),
    "dt_projs_weight": ("s6.dt_weight", 3, lambda t: t.unflatten(0, (2, 2)).transpose(2, 3).contiguous()),
    "dt_projs_bias": ("s6.dt_bias", 2, lambda t: t.reshape(2, -1)),
    "A_logs": ("s6.A_log", 2, lambda t: t.unflatten(0, (2, -1))),
    "Ds": ("s6.D", 1, lambda t: t.reshape(2, -1)),
}
LINEAR = re.compile(r"(in_proj|out_proj|fc1|fc2|reduction|head)\.weight$")  # in some files 1 x 1 convolutions


def _reshape(key: str, value: object) -> tuple[str, object]:
    """Return a tensor under our name and in our shape. One of unexpected shape stays as it is."""
    path, _, leaf = key.rpartition(".")
    if isinstance(value, Tensor) and leaf in STACKED:
        own, dims, convert = STACKED[leaf]
        sound = value.dim() == dims and value.shape[0] % 4 == 0 < len(value)
        return f"{path}.{own}", convert(value) if sound else value
    if isinstance(value, Tensor) and LINEAR.search(key) and value.shape[2:] == (1, 1):
        return key, value.flatten(1)
    return key, value


def _stem(version: str, in_chans: int, dim: int, dd: Factory) -> nn.Module:
    if version == "v0":
        return PatchEmbed(None, 4, in_chans, dim, norm_layer=nn.LayerNorm, output_fmt="NHWC", **dd)
    norm = partial(LayerNorm2d, eps=1e-5, **dd)
    return ConvStem(in_chans, dim // 2, dim, norm=norm, act=nn.GELU, last_act=False, bias=True, **dd)


_facts = partial(tag_facts, pool_size=(7, 7), paper_ids="arXiv:2401.10166", license="mit")


def _published(generation: str, file: str, top1: float) -> dict[str, object]:
    """The facts of the authors' weights, with their top-1 in % on ImageNet-1k's validation images."""
    return _facts(
        url=f"https://github.com/MzeroMiko/VMamba/releases/download/%23{generation}cls/{file}",
        origin_url="https://github.com/MzeroMiko/VMamba",
        first_conv="patch_embed.proj" if generation == "v0" else "patch_embed.conv1",
        notes=(f"{top1} % top-1, as published",),
    )


default_cfgs = generate_default_cfgs(
    {
        "vmamba_tiny_v0.in1k": _published("v0", "vssmtiny_dp01_ckpt_epoch_292.pth", 82.2),
        "vmamba_small_v0.in1k": _published("v0", "vssmsmall_dp03_ckpt_epoch_238.pth", 83.5),
        "vmamba_base_v0.in1k": _published("v0", "vssmbase_dp06_ckpt_epoch_241.pth", 83.7),
        "vmamba_tiny_s2l5.in1k": _published("v2", "vssm_tiny_0230_ckpt_epoch_262.pth", 82.5),
        "vmamba_small_s2l15.in1k": _published("v2", "vssm_small_0229_ckpt_epoch_222.pth", 83.6),
        "vmamba_base_s2l15.in1k": _published("v2", "vssm_base_0229_ckpt_epoch_237.pth", 83.9),
        "vmamba_tiny_s1l8.in1k": _published("v2", "vssm1_tiny_0230s_ckpt_epoch_264.pth", 82.6),
        "vmamba_small_s1l20.in1k": _published("v2", "vssm1_small_0229s_ckpt_epoch_240.pth", 83.3),
        "vmamba_base_s1l20.in1k": _published("v2", "vssm1_base_0229s_ckpt_epoch_225.pth", 83.8),
        "test_vmamba.untrained": _facts(input_size=(3, 64, 64), pool_size=(2, 2), first_conv="patch_embed.conv1"),
    }
)

_DIMS = {"tiny": (96, 192, 384, 768), "small": (96, 192, 384, 768), "base": (128, 256, 512, 1024)}


def _register(size: str, variant: str, depth: int, **options: object) -> None:
    """Register a variant by the depth of its third stage."""
    name = f"vmamba_{size}_{variant}"
    doc = f"VMamba-{size.title()} {variant}; {default_cfgs[name].default.notes[0]}."
    register_variant(VMamba, name, doc, embed_dims=_DIMS[size], depths=(2, 2, depth, 2), **options)


for _size, _depth in (("tiny", 9), ("small", 27), ("base", 27)):
    _register(_size, "v0", _depth, version="v0", d_state=16, expand=2)
for _size, _depth in (("tiny", 5), ("small", 15), ("base", 15)):
    _register(_size, f"s2l{_depth}", _depth, expand=2)
for _size, _depth in (("tiny", 8), ("small", 20), ("base", 20)):
    _register(_size, f"s1l{_depth}", _depth)


@register_model
def test_vmamba(pretrained: bool = False, **options: object) -> VMamba:
    """A VMamba for tests, 0.2 M parameters."""
    dims = {"embed_dims": (16, 24, 32, 48), "depths": (1, 1, 2, 1)}
    return create(VMamba, "test_vmamba", pretrained, options, img_size=64, **dims)
