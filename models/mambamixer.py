"""ViM2: an image model of MambaMixer's selective token and channel mixers, in four stages.

Paper: MambaMixer: Efficient Selective State Space Models with Dual Token and Channel Selection,
https://arxiv.org/abs/2403.19888v1. Its authors have published neither code nor weights: docs/mambamixer.md says choice
by choice what is the paper's and what is ours.
"""

from functools import partial
from typing import Literal, NamedTuple, cast, get_args

import torch
from timm.layers import Mlp, calculate_drop_path_rates, to_2tuple
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

from vim.checkpoints import checkpoint_filter_fn as checkpoint_filter_fn  # timm expects it beside the class
from vim.layers import (
    NOT_DECAYED,
    Downsample,
    Factory,
    MambaMixerLayer,
    MambaMixerStack,
    PaddedPatchEmbed,
    ResidualMixer,
    ResidualNorm,
    SelectFrom,
    SelectiveChannelMixer,
    SelectiveSequenceMixer,
    SelectiveTokenMixer,
    Stage,
    StagedBackbone,
    check_choice,
    check_counts,
    check_stages,
)

from ._registry import create, tag_facts

TokenMixer = Literal["s6", "mlp"]
ChannelMixer = Literal["tied", "transposed", "mlp", "transposed_mlp", "none"]


class S6Options(Factory):
    """Options of every S6 mixer."""

    d_state: int
    select_from: SelectFrom


class LayerOptions(NamedTuple):
    """Options of every layer."""

    token_mixers: int
    token_mixer: TokenMixer
    channel_mixer: ChannelMixer
    expand: int
    averaging: bool
    s6: S6Options


class Transposed(nn.Module):
    """A mixer of sequences (b, c, l) on maps (b, rows, columns, c), for one grid of tokens."""

    def __init__(self, mixer: nn.Module, rows: int, columns: int) -> None:
        super().__init__()
        self.mixer, self.rows, self.columns = mixer, rows, columns

    def forward(self, x: Tensor) -> Tensor:
        """Map (b, rows, columns, c) to the same."""
        rows, columns = self.rows, self.columns
        expected = f"an image that fills {rows} x {columns} patches expected: set img_size, or channel_mixer='tied'"
        torch._assert(x.shape[1] == rows, expected)
        torch._assert(x.shape[2] == columns, expected)
        return self.mixer(x.flatten(1, 2).transpose(1, 2)).transpose(1, 2).reshape(x.shape)


class ViM2(StagedBackbone):
    """Vision MambaMixer: a stem, four stages of token and channel mixers, the mean over the tokens, a linear head.

    Images can have any size: what does not fill a patch, or a pair of rows or columns, is padded with zeros.

    Args:
        img_size: height and width in pixels of the images to prepare, and the only size for a `transposed` mixer.
        global_pool: "avg", "max" or "avgmax" of the tokens; "" for the map (b, d, rows, columns).
        embed_dims, channel_dims: of each stage, its channels and the inner width of its channel mixers.
        depths: layers of each stage.
        token_mixers: token mixers of a layer, one after the other, before its channel mixer.
        token_mixer: "s6"; or "mlp", an MLP on each token: the layer without S6 and convolution.
        channel_mixer: "tied", for images of any size (see :class:`vim.layers.SelectiveChannelMixer`); "transposed", the
            paper's equations, for images of `img_size`, with parameters that grow with the tokens squared; "mlp", on
            each token, the paper's ablation; "transposed_mlp", on each channel: "transposed" without S6 and
            convolution; "none".
        select_from: "conv", or "input" as in the paper's equations; see :class:`vim.layers.SelectiveTokenMixer`.
        averaging: weighted sums of a stage's earlier outputs; False for a plain residual stack.
        output_stride: see :class:`vim.layers.StagedBackbone`.

    Raises:
        ValueError: an option is none of its names, or a size is not whole and positive.
    """

    def __init__(
        self,
        *,
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 4,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        embed_dims: tuple[int, ...] = (96, 192, 384, 768),
        channel_dims: tuple[int, ...] = (192, 384, 768, 768),
        depths: tuple[int, ...] = (1, 1, 3, 1),
        token_mixers: int = 2,
        d_state: int = 16,
        expand: int = 2,
        token_mixer: TokenMixer = "s6",
        channel_mixer: ChannelMixer = "tied",
        select_from: SelectFrom = "conv",
        averaging: bool = True,
        output_stride: int | None = None,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_choice("token_mixer", token_mixer, get_args(TokenMixer))
        check_choice("channel_mixer", channel_mixer, get_args(ChannelMixer))
        check_choice("select_from", select_from, get_args(SelectFrom))
        check_stages(embed_dims=embed_dims, channel_dims=channel_dims, depths=depths)
        check_counts(patch_size=patch_size, token_mixers=token_mixers, d_state=d_state, expand=expand)
        dd: Factory = {"device": device, "dtype": dtype}
        patch_embed = PaddedPatchEmbed(patch_size, in_chans, embed_dims[0], **dd)
        rows, columns = (-(-side // patch_size) for side in to_2tuple(img_size))
        s6: S6Options = {"d_state": d_state, "select_from": select_from, **dd}
        options = LayerOptions(token_mixers, token_mixer, channel_mixer, expand, averaging, s6)
        super().__init__(
            img_size=img_size,
            in_chans=in_chans,
            num_classes=num_classes,
            global_pool=global_pool,
            patch_embed=patch_embed,
            stride=patch_size,
            norm_embed=ResidualNorm(embed_dims[0], **dd),
            stages=_build_stages(options, embed_dims, channel_dims, depths, rows, columns, drop_path_rate, dd),
            embed_dims=embed_dims,
            output_stride=output_stride,
            norm_f=ResidualNorm(embed_dims[-1], **dd),
            drop_rate=drop_rate,
            not_decayed=NOT_DECAYED,
            **dd,
        )
        self.channel_mixer = str(channel_mixer)
        self.init_weights(needs_reset=False)

    def set_input_size(self, img_size: int | tuple[int, int]) -> None:
        """Have images prepared in another size from now on; the model takes any.

        Raises:
            ValueError: the image is smaller than a patch, or the channel mixers are for one number of tokens.
        """
        if self.channel_mixer.startswith("transposed"):
            raise ValueError(f"channel_mixer={self.channel_mixer!r} is for one img_size: build another model")
        super().set_input_size(img_size)


def _build_stages(
    options: LayerOptions,
    embed_dims: tuple[int, ...],
    channel_dims: tuple[int, ...],
    depths: tuple[int, ...],
    rows: int,
    columns: int,
    drop_path_rate: float,
    dd: Factory,
) -> list[Stage]:
    """Build the stages for a first map of `rows` x `columns`; rates of stochastic depth grow from mixer to mixer."""
    per_layer = options.token_mixers + (options.channel_mixer != "none")
    rates = iter(cast(list[float], calculate_drop_path_rates(drop_path_rate, per_layer * sum(depths))))
    stages = []
    for i, (dim, width, depth) in enumerate(zip(embed_dims, channel_dims, depths, strict=True)):
        layers = []
        for l in range(1, depth + 1):
            mixers = [_token_mixer(options, dim, per_layer * depth) for _ in range(options.token_mixers)]
            tokens = nn.Sequential(*(ResidualMixer(dim, mixer, drop_path=next(rates), **dd) for mixer in mixers))
            channels: nn.Module = nn.Identity()
            if options.channel_mixer != "none":
                mixer = _channel_mixer(options, dim, width, rows, columns, per_layer * depth)
                channels = ResidualMixer(dim, mixer, drop_path=next(rates), **dd)
            layers.append(MambaMixerLayer(tokens, channels, l, averaging=options.averaging, **dd))
        downsample = Downsample(embed_dims[i - 1], dim, **dd) if i else nn.Identity()
        stages.append(Stage(downsample, MambaMixerStack(*layers)))
        rows, columns = -(-rows // 2), -(-columns // 2)
    return stages


def _token_mixer(options: LayerOptions, dim: int, depth: int) -> nn.Module:
    if options.token_mixer == "mlp":
        return _mlp(dim, options.expand * dim, options.s6)
    return SelectiveTokenMixer(dim, expand=options.expand, depth=depth, **options.s6)


def _channel_mixer(options: LayerOptions, dim: int, width: int, rows: int, columns: int, depth: int) -> nn.Module:
    kind, expand, s6, l = options.channel_mixer, options.expand, options.s6, rows * columns
    if kind == "mlp":
        return _mlp(dim, width, s6)
    if kind == "tied":
        return SelectiveChannelMixer(dim, width, depth=depth, **s6)
    if kind == "transposed_mlp":
        return Transposed(_mlp(l, expand * l, s6), rows, columns)
    return Transposed(SelectiveSequenceMixer(l, bidirectional=True, expand=expand, depth=depth, **s6), rows, columns)


def _mlp(dim: int, hidden: int, dd: Factory) -> Mlp:
    return Mlp(dim, hidden, act_layer=nn.SiLU, device=dd["device"], dtype=dd["dtype"])  # the activation of the gates


_facts = partial(tag_facts, pool_size=(7, 7), paper_ids="arXiv:2403.19888")
default_cfgs = generate_default_cfgs(
    {
        "vim2_tiny.untrained": _facts(),
        "vim2_small.untrained": _facts(),
        "vim2_base.untrained": _facts(),
        "test_vim2.untrained": _facts(input_size=(3, 64, 64), pool_size=(2, 2)),
    }
)


@register_model
def vim2_tiny(pretrained: bool = False, **options: object) -> ViM2:
    """ViM2-Tiny, 24 M parameters (20 M published), 82.7 % ImageNet-1k top-1 published."""
    return create(ViM2, "vim2_tiny", pretrained, options)


@register_model
def vim2_small(pretrained: bool = False, **options: object) -> ViM2:
    """ViM2-Small, 44 M parameters (43 M published), 83.7 % ImageNet-1k top-1 published."""
    return create(ViM2, "vim2_small", pretrained, options, depths=(1, 1, 9, 1))


@register_model
def vim2_base(pretrained: bool = False, **options: object) -> ViM2:
    """ViM2-Base, 76 M parameters (74 M published), 83.9 % ImageNet-1k top-1 published."""
    dims = {"embed_dims": (128, 256, 512, 1024), "channel_dims": (256, 512, 1024, 1024)}
    return create(ViM2, "vim2_base", pretrained, options, depths=(1, 1, 9, 1), **dims)


@register_model
def test_vim2(pretrained: bool = False, **options: object) -> ViM2:
    """A ViM2 for tests, 0.2 M parameters."""
    dims = {"embed_dims": (16, 24, 32, 48), "channel_dims": (32, 48, 64, 48)}
    return create(ViM2, "test_vim2", pretrained, options, img_size=64, depths=(1, 1, 2, 1), d_state=8, **dims)
