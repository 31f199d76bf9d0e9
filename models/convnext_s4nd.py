"""ConvNeXt with S4ND in place of its depthwise convolutions, for images and clips.

Paper: https://arxiv.org/abs/2210.06583. Published code, without weights: https://github.com/state-spaces/s4.
"""

import re
from collections.abc import Sequence
from functools import partial
from typing import Literal, cast

import torch
from timm.layers import calculate_drop_path_rates
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

from vim.checkpoints import checkpoint_filter_fn as checkpoint_filter_fn  # timm expects it beside the class
from vim.layers import (
    S4ND,
    Factory,
    PaddedPatchEmbed,
    ResidualNorm,
    ResidualStack,
    S4NDBlock,
    S4NDDownsample,
    S4NDKernel,
    S4NDStem,
    Spectrum,
    Stage,
    StagedBackbone,
    as_frames,
    check_choice,
    check_counts,
    check_stages,
    init_linears,
)

from ._registry import create, register_variant, tag_facts

torch.fx.wrap("as_frames")  # for torch.fx.symbolic_trace, which wraps a name in the file that calls it
FIRST_CONV = "patch_embed.proj.weight"
KERNEL = re.compile(r"(.*\.kernels)\.(\d)\.(.*)")  # of an axis
TUBELET = 2  # frames that are embedded together


class ConvNeXtS4ND(StagedBackbone):
    """ConvNeXt with kernels as long as the map's rows and columns, and in clips as the clip.

    Images and clips can have any size: rows and columns are rounded up. Clips have a multiple of two frames.

    Args:
        img_size: height and width in pixels of the images to prepare.
        num_frames: frames of a clip; None for a model of images, whose weights a model of clips can start from.
        global_pool: "avg", "max" or "avgmax" of the map; "" for the map (b, d, rows, columns).
        embed_dims, depths: of each stage, its channels and its blocks.
        stem: "s4nd": kernels of 16 pixels over the image, then the mean of each patch. "patch": ConvNeXt's.
        downsample: between the stages "conv", ConvNeXt's, or "s4nd", kernels over the map, then the mean of neighbours.
        kind, d_state, init, dt_min, dt_max, rate, bandlimit: see :class:`vim.layers.S4ND`.
        output_stride: see :class:`vim.layers.StagedBackbone`.

    Raises:
        ValueError: an option is none of its values, or a size is not whole and positive.
    """

    published_compute = "images"
    dynamic_img_size = True  # for the engine: clips of any length

    def __init__(
        self,
        *,
        img_size: int | tuple[int, int] = 224,
        num_frames: int | None = None,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        embed_dims: tuple[int, ...] = (96, 192, 384, 768),
        depths: tuple[int, ...] = (3, 3, 9, 3),
        stem: Literal["s4nd", "patch"] = "s4nd",
        downsample: Literal["conv", "s4nd"] = "conv",
        kind: S4NDKernel = "s4",
        d_state: int = 64,
        init: Spectrum = "fout",
        dt_min: float = 0.1,
        dt_max: float = 1.0,
        rate: float = 1.0,
        bandlimit: float | None = None,
        output_stride: int | None = None,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_choice("stem", stem, ("s4nd", "patch"))
        check_choice("downsample", downsample, ("conv", "s4nd"))
        check_stages(embed_dims=embed_dims, depths=depths)
        check_counts(in_chans=in_chans)
        if num_frames is not None and (num_frames < 1 or num_frames % TUBELET or output_stride is not None):
            raise ValueError(
                f"num_frames must be even, and output_stride None for clips, got {num_frames} and {output_stride}"
            )
        dd: Factory = {"device": device, "dtype": dtype}
        patch = (4, 4) if num_frames is None else (TUBELET, 4, 4)
        mixer = partial(
            S4ND,
            axes=len(patch),
            kind=kind,
            d_state=d_state,
            init=init,
            dt_min=dt_min,
            dt_max=dt_max,
            out="none",
            rate=rate,
            bandlimit=bandlimit,
            **dd,
        )
        embed: nn.Module
        if stem == "s4nd":
            embed = S4NDStem(mixer(in_chans, channels=32, out="sum", l_max=16), 32, embed_dims[0], patch, dd)
        else:
            embed = PaddedPatchEmbed(4, in_chans, embed_dims[0], tubelet_size=TUBELET if num_frames else None, **dd)
        rates = iter(cast(list[float], calculate_drop_path_rates(drop_path_rate, sum(depths))))
        stages = []
        for i, (dim, depth) in enumerate(zip(embed_dims, depths, strict=True)):
            before = embed_dims[i - 1]
            reduce = (
                S4NDDownsample(before, dim, mixer(before) if downsample == "s4nd" else None, dd) if i else nn.Identity()
            )
            stages.append(
                Stage(reduce, ResidualStack(*(S4NDBlock(dim, mixer(dim), next(rates), dd) for _ in range(depth))))
            )
        super().__init__(
            img_size=img_size,
            in_chans=in_chans,
            num_classes=num_classes,
            global_pool=global_pool,
            patch_embed=embed,
            stride=4,
            norm_embed=ResidualNorm(embed_dims[0], eps=1e-6, **dd),
            stages=stages,
            embed_dims=embed_dims,
            output_stride=output_stride,
            norm_f=ResidualNorm(embed_dims[-1], eps=1e-6, **dd),
            drop_rate=drop_rate,
            not_decayed=(),
            **dd,
        )
        self._num_frames = num_frames
        self.init_weights(needs_reset=False)

    @property
    def num_frames(self) -> int | None:
        """Frames of a clip; None for a model of images."""
        return self._num_frames

    @torch.jit.ignore
    def init_weights(self, needs_reset: bool = True) -> None:
        """Draw the initial weights; see :meth:`vim.layers.TimmModel.init_weights`."""
        super().init_weights(needs_reset)
        init_linears(self)

    def _embed(self, image: Tensor) -> Tensor:
        """Map images (b, c, h, w) or clips (b, c, t, h, w) to the normed map of the stem."""
        frames = self._num_frames is not None
        image = as_frames(image, frames)
        expected = (
            f"clips (b, {self.in_chans}, t, h, w) expected, t even"
            if frames
            else f"images (b, {self.in_chans}, h, w) expected"
        )
        torch._assert(image.dim() == (5 if frames else 4), expected)
        torch._assert(image.shape[1] == self.in_chans, expected)
        torch._assert(image.shape[0] > 0, "at least one image expected")
        torch._assert(image.shape[-2] * image.shape[-1] > 0, "at least one pixel expected")
        if frames:
            torch._assert(image.shape[2] % 2 == 0, expected)
        return self.norm_embed(self.patch_embed(image))

    @torch.jit.ignore
    def tokens_to_map(self, tokens: Tensor, input_size: int | Sequence[int] | None = None) -> Tensor:
        """Map (b, rows, columns, d) to (b, d, rows, columns); of clips (b, t, rows, columns, d) to (b, d, t, ...)."""
        if self._num_frames is None:
            return super().tokens_to_map(tokens, input_size)
        widths = [info["num_chs"] for info in self.feature_info]
        is_map = tokens.shape[-1] not in widths and tokens.shape[1] in widths
        return tokens if is_map else tokens.movedim(-1, 1)

    def adapt_weights(self, weights: dict[str, Tensor], img_size: tuple[int, int]) -> None:
        """Make clip weights out of image weights, in place: kernels along rows and columns, patches repeated in time.

        The kernels along time start as they are in this model. Repeated patches are not divided by the frames: as
        published.
        """
        if self._num_frames is None or any(".kernels.2." in key for key in weights):
            return
        kernels = {key: match for key in weights if (match := KERNEL.fullmatch(key))}
        moved = {f"{m[1]}.{int(m[2]) + 1}.{m[3]}": weights.pop(key) for key, m in kernels.items()}
        weights |= moved | {key: own for key, own in self.state_dict().items() if ".kernels.0." in key}
        conv = weights.get(FIRST_CONV)
        if conv is not None and conv.dim() == 4:
            weights[FIRST_CONV] = conv.unsqueeze(2).repeat(1, 1, TUBELET, 1, 1)


_facts = partial(
    tag_facts,
    pool_size=(7, 7),
    crop_pct=0.9,
    first_conv=(),
    paper_ids="arXiv:2210.06583",
    origin_url="https://github.com/state-spaces/s4",
)

default_cfgs = generate_default_cfgs(
    {
        "convnext_s4nd_tiny.untrained": _facts(notes=("82.2 % top-1, as published without weights",)),
        "test_convnext_s4nd.untrained": _facts(input_size=(3, 64, 64), pool_size=(2, 2), first_conv="patch_embed.proj"),
    }
)

register_variant(
    ConvNeXtS4ND, "convnext_s4nd_tiny", "ConvNeXt-S4ND-T, 30 M parameters, 82.2 % ImageNet-1k top-1 published."
)


@register_model
def test_convnext_s4nd(pretrained: bool = False, **options: object) -> ConvNeXtS4ND:
    """A ConvNeXt with S4ND for tests, 0.05 M parameters; for images, or with `num_frames` for clips."""
    sizes = {"embed_dims": (8, 16, 24, 32), "depths": (1, 1, 2, 1), "stem": "patch", "kind": "s4d", "d_state": 8}
    return create(ConvNeXtS4ND, "test_convnext_s4nd", pretrained, options, img_size=64, **sizes)
