"""Maps at falling resolution, stage by stage: what the hierarchical families share.

A family adds a stem, blocks and sizes. Maps are channels last between the modules, (b, rows, columns, c),
and channels first where timm sees them, (b, c, rows, columns).
"""

import logging
import re
from collections.abc import Callable, Sequence
from typing import Unpack, cast

import torch
import torch.nn.functional as F
from timm.layers import global_pool_nlc, register_notrace_function, to_2tuple
from timm.models import checkpoint
from timm.models.swin_transformer import window_partition, window_reverse
from torch import Tensor, nn

from .checks import check_choice
from .contract import TimmModel, feature_take_indices, update_model_input_size
from .factory import Factory
from .norm import ResidualNorm, residual_dtype

DETECTOR = "backbone."  # the prefix of the weights that are a detector's backbone
OUT_NORM = re.compile(r"outnorm\d")  # after a stage, for the detector

_logger = logging.getLogger(__name__)


@register_notrace_function
def pad_tokens(x: Tensor, stride: int) -> Tensor:
    """Pad (b, rows, columns, c) with zeros on the right and below, until 2 x 2 neighbours with this stride cover it."""
    down, right = (x.shape[1] % 2, x.shape[2] % 2) if stride == 2 else (1, 1)
    return F.pad(x, (0, 0, 0, right, 0, down)) if down + right > 0 else x


class Downsample(nn.Module):
    """Swin's patch merging: concatenate the channels of 2 x 2 neighbours, normalise, project.

    Source: https://arxiv.org/abs/2103.14030.
    """

    def __init__(self, dim: int, out_dim: int, **dd: Unpack[Factory]) -> None:
        super().__init__()
        self.stride = (2, 2)
        self.norm = ResidualNorm(4 * dim, **dd)
        self.reduction = nn.Linear(4 * dim, out_dim, bias=False, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """Map (b, rows, columns, dim) to (b, rows / 2, columns / 2, out_dim), rounded up."""
        s = self.stride[0]
        x = pad_tokens(x, s)
        x = torch.cat([x[:, :-1:s, :-1:s], x[:, 1::s, :-1:s], x[:, :-1:s, 1::s], x[:, 1::s, 1::s]], dim=-1)
        return self.reduction(self.norm(x))


class ConvDownsample(nn.Module):
    """A 3 x 3 convolution with stride 2, then with `norm` a layer norm."""

    def __init__(self, dim: int, out_dim: int, *, norm: bool, **dd: Unpack[Factory]) -> None:
        super().__init__()
        self.conv = nn.Conv2d(dim, out_dim, 3, 2, 1, bias=norm, **dd)
        self.norm = ResidualNorm(out_dim, **dd) if norm else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Map (b, rows, columns, dim) to (b, rows / 2, columns / 2, out_dim), rounded up."""
        x = x.to(self.conv.weight.dtype).permute(0, 3, 1, 2)
        return self.norm(self.conv(x).permute(0, 2, 3, 1))


class ConvStem(nn.Module):
    """Two 3 x 3 convolutions with stride 2, each followed by a norm, the first also by an activation.

    Args:
        norm: makes the norm of maps (b, c, rows, columns) from their channels.
        last_act: have an activation after the second norm too.
        bias: give the convolutions biases.
    """

    def __init__(
        self,
        in_chans: int,
        hidden: int,
        embed_dim: int,
        *,
        norm: Callable[[int], nn.Module],
        act: type[nn.Module],
        last_act: bool,
        bias: bool,
        **dd: Unpack[Factory],
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_chans, hidden, 3, 2, 1, bias=bias, **dd)
        self.norm1, self.act1 = norm(hidden), act()
        self.conv2 = nn.Conv2d(hidden, embed_dim, 3, 2, 1, bias=bias, **dd)
        self.norm2, self.act2 = norm(embed_dim), act() if last_act else nn.Identity()

    def forward(self, image: Tensor) -> Tensor:
        """Map (b, c, h, w) to (b, h / 4, w / 4, embed_dim), twice rounded up."""
        x = self.act1(self.norm1(self.conv1(image)))
        return self.act2(self.norm2(self.conv2(x))).permute(0, 2, 3, 1)


class ResidualStack(nn.Sequential):
    """Blocks of one resolution on a float32 stream."""

    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__(*blocks)
        self.grad_checkpointing = False

    def forward(self, x: Tensor) -> Tensor:
        """Map (b, rows, columns, c) to the same."""
        x = x.to(residual_dtype(x))
        for block in self:
            if self.grad_checkpointing and not torch.jit.is_scripting():
                # a compiled block needs no care: its backward pass computes what it needs, and updates nothing
                x = checkpoint(block if torch.compiler.is_compiling() else _UpdatedOnce(block), x)
            else:
                x = block(x)
        return x


class _UpdatedOnce:
    """A checkpointed block whose second run, in the backward pass, does not update statistics of batch norms again."""

    def __init__(self, block: nn.Module) -> None:
        self.block, self.runs = block, 0

    def __call__(self, x: Tensor) -> Tensor:
        self.runs += 1
        if self.runs == 1:
            return self.block(x)
        copies = {name: buffer.clone() for name, buffer in self.block.named_buffers()}
        return torch.func.functional_call(self.block, copies, x)


class Stage(nn.Module):
    """A downsampling (nn.Identity in the first stage), then layers that keep the shape.

    Args:
        windows: run the layers on windows of so many rows and columns, as sequences (b, windows^2, c). What does not
            fill a window is padded with zeros, which the layers do not tell from the map. 0 for one window, the whole
            map; None for layers of maps.
    """

    def __init__(self, downsample: nn.Module, layers: nn.Module, *, windows: int | None = None) -> None:
        super().__init__()
        self.downsample, self.layers, self.windows = downsample, layers, windows
        self.dilation = 1

    def dilate(self, dilation: int) -> None:
        """Keep the resolution of the stage before, for layers whose neighbours are `dilation` rows and columns apart.

        The layers run on each of the dilation^2 maps of every `dilation`-th row and column. The first of these maps is
        what the stage returns without dilation.
        """
        self.dilation = dilation
        for module in self.downsample.modules():
            if hasattr(module, "stride"):
                module.stride = (1, 1)  # type: ignore[assignment]

    def forward(self, x: Tensor) -> Tensor:
        """Map (b, rows, columns, c) of the stage before to this stage's."""
        if self.dilation > 1:
            before, rows, columns = self.dilation // 2, x.shape[1], x.shape[2]
            x = merge_phases(self.downsample(split_phases(x, before)), before, rows, columns)
        else:
            x = self.downsample(x)
        rows, columns = x.shape[1], x.shape[2]
        return self.merge(self.layers(self.split(x)), rows, columns)

    def split(self, x: Tensor) -> Tensor:
        """Map (b, rows, columns, c) to what the layers take."""
        x, w = split_phases(x, self.dilation), self.windows
        if w is None:
            return x
        if w > 0:
            x = window_partition(F.pad(x, (0, 0, 0, -x.shape[2] % w, 0, -x.shape[1] % w)), (w, w))
        return x.flatten(1, 2)

    def merge(self, x: Tensor, rows: int, columns: int) -> Tensor:
        """Undo :meth:`split`: map what the layers return to (b, rows, columns, c)."""
        d, w = self.dilation, self.windows
        if w is not None:
            r, c = -(-rows // d), -(-columns // d)
            x = x.unflatten(1, (w, w) if w > 0 else (r, c))
            if w > 0:
                x = window_reverse(x, (w, w), r + -r % w, c + -c % w)[:, :r, :c]
        return merge_phases(x, d, rows, columns)


def split_phases(x: Tensor, d: int) -> Tensor:
    """Map (b, rows, columns, c) to its maps of every d-th row and column, (d^2 b, rows / d, columns / d, c).

    What does not fill d rows or columns is padded with zeros.
    """
    if d == 1:
        return x
    x = F.pad(x, (0, 0, 0, -x.shape[2] % d, 0, -x.shape[1] % d))
    b, rows, columns, c = x.shape
    x = x.reshape(b, rows // d, d, columns // d, d, c).permute(2, 4, 0, 1, 3, 5)
    return x.reshape(-1, rows // d, columns // d, c)


def merge_phases(x: Tensor, d: int, rows: int, columns: int) -> Tensor:
    """Undo :func:`split_phases`: return (b, rows, columns, c)."""
    if d == 1:
        return x
    r, c = x.shape[1], x.shape[2]
    x = x.reshape(d, d, -1, r, c, x.shape[3]).permute(2, 3, 0, 4, 1, 5)
    return x.reshape(-1, r * d, c * d, x.shape[5])[:, :rows, :columns]


class StagedBackbone(TimmModel):
    """A stem, stages, a final norm, the mean over the map, a linear head.

    Args:
        img_size: height and width in pixels of the images to prepare. The model takes any size its modules take.
        global_pool: "avg", "max" or "avgmax" of the map; "" for the map itself.
        patch_embed: the stem; maps images (b, c, h, w) to (b, rows, columns, embed_dims[0]).
        stride: pixels between the stem's outputs.
        norm_embed: follows the stem; None for a stem with a norm of its own.
        embed_dims: channels of each stage.
        strides: pixels between the outputs of each stage. Default: from one stage to the next, twice as many.
        output_stride: the largest stride; stages that would go beyond it are dilated, see :meth:`Stage.dilate`. None
            for that of the last stage.
        norm_f: follows the last stage.

    Raises:
        ValueError: the image is smaller than the stride, or `output_stride` is not a stage's.
    """

    blocks = "stages"
    out_indices: int | tuple[int, ...] = (0, 1, 2, 3)
    published_names: tuple[tuple[str, str], ...] = ()  # patterns of how published names start, and our starts

    def __init__(
        self,
        *,
        img_size: int | tuple[int, int],
        in_chans: int,
        num_classes: int,
        global_pool: str,
        patch_embed: nn.Module,
        stride: int,
        norm_embed: nn.Module | None = None,
        stages: Sequence[Stage],
        embed_dims: Sequence[int],
        strides: Sequence[int] | None = None,
        output_stride: int | None,
        norm_f: nn.Module,
        drop_rate: float,
        not_decayed: tuple[str, ...],
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__(
            in_chans=in_chans,
            num_classes=num_classes,
            num_features=embed_dims[-1],
            global_pool=global_pool,
            not_decayed=not_decayed,
        )
        self.patch_embed, self.norm_embed = patch_embed, norm_embed or nn.Identity()
        self.stages, self.norm_f = nn.ModuleList(stages), norm_f
        self._add_head(drop_rate, {"device": device, "dtype": dtype})
        strides = strides or [stride * 2**i for i in range(len(embed_dims))]
        if output_stride is not None:
            check_choice("output_stride", output_stride, strides)
            for stage, one in zip(stages, strides, strict=True):
                if one > output_stride:
                    stage.dilate(one // output_stride)
            strides = [min(one, output_stride) for one in strides]
        self.feature_info = [
            {"module": f"stages.{i}", "num_chs": dim, "reduction": strides[i]} for i, dim in enumerate(embed_dims)
        ]
        self._set_img_size(img_size)

    @property
    def img_size(self) -> tuple[int, int]:
        """Height and width in pixels of the images to prepare."""
        return self._img_size

    def set_input_size(self, img_size: int | tuple[int, int]) -> None:
        """Have images prepared in another size from now on.

        Raises:
            ValueError: the image is smaller than the stem's stride.
        """
        self._set_img_size(img_size)
        update_model_input_size(self, img_size)  # timm's exports record it

    def _set_img_size(self, img_size: int | tuple[int, int]) -> None:
        size, least = to_2tuple(img_size), int(self.feature_info[0]["reduction"])
        if min(size) < least:
            raise ValueError(f"img_size must be at least the patch size {least}, got {size}")
        self._img_size: tuple[int, int] = size

    def rename_weights(self, weights: dict[str, object]) -> dict[str, object]:
        """Give the weights of a classifier, or of a detector's backbone, this model's names; see :meth:`rename_weight`.

        A detector has a norm after each stage and heads of its own, which are dropped. It has no final norm and no
        classifier: this model's stay as they are. Both is logged.

        Raises:
            ValueError: two of the weights have one name in this model.
        """
        backbone = {key.removeprefix(DETECTOR): w for key, w in weights.items() if key.startswith(DETECTOR)} or weights
        kept = {key: weight for key, weight in backbone.items() if not OUT_NORM.match(key)}
        renamed: dict[str, object] = {}
        for published, weight in kept.items():
            key, value = self.rename_weight(published, weight)
            if key in renamed:
                raise ValueError(f"two of its tensors are {key} in the model")
            renamed[key] = value
        if len(kept) < len(weights):
            own = {key: weight for key, weight in self.state_dict().items() if key.startswith(("norm_f.", "head."))}
            new = sorted({key.partition(".")[0] for key in own} - {key.partition(".")[0] for key in renamed})
            _logger.warning(
                "The weights are of a detector: %d tensors besides its backbone are left out; new in the model: %s",
                len(weights) - len(kept),
                " and ".join(new) or "nothing",
            )
            renamed |= {key: weight for key, weight in own.items() if key.startswith(tuple(f"{one}." for one in new))}
        return renamed

    def rename_weight(self, key: str, weight: object) -> tuple[str, object]:
        """Return a published weight under this model's name and in its shape. Of its own result, it changes nothing."""
        for pattern, own in self.published_names:
            key, count = re.subn(f"^{pattern}", own, key)
            if count:
                break
        return key, weight

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, object]:
        """Return patterns of parameter names for layer-wise learning rates: the stem, a group a layer or a stage."""
        layers = [(r"^stages\.(\d+)\.downsample", (0,)), (r"^stages\.(\d+)\.layers\.(\d+)", None)]
        return {
            "stem": r"^patch_embed|^norm_embed",
            "blocks": r"^stages\.(\d+)" if coarse else [*layers, (r"^norm_f", (99999,))],
        }

    def _embed(self, image: Tensor) -> Tensor:
        """Map images (b, c, h, w) to the normed map of the stem, (b, rows, columns, d)."""
        expected = f"images (b, {self.in_chans}, h, w) expected"
        torch._assert(image.dim() == 4, expected)
        torch._assert(image.shape[1] == self.in_chans, expected)
        torch._assert(image.shape[0] > 0, "at least one image expected")
        torch._assert(image.shape[2] * image.shape[3] > 0, "at least one pixel expected")
        return self.norm_embed(self.patch_embed(image))

    def forward_features(self, image: Tensor) -> Tensor:
        """Map images (b, c, h, w) to the normed map of the last stage, (b, d, rows, columns)."""
        x = self._embed(image)
        for stage in self.stages:
            x = stage(x)
        return self._to_map(self.norm_f(x), image)

    @torch.jit.ignore
    def tokens_to_map(self, tokens: Tensor, input_size: int | Sequence[int] | None = None) -> Tensor:
        """Map what a stage's layers return, (b, rows, columns, d) or windows (b, l, d), to (b, d, rows, columns).

        A map (b, d, rows, columns), as :meth:`forward_features` returns it, stays as it is.
        """
        height, width = to_2tuple(self.img_size if input_size is None else input_size)[-2:]
        sizes: list[tuple[int, ...]] = []
        for stage, info in zip(
            cast(list[Stage], self.stages), self.feature_info, strict=False
        ):  # a pruned one has less
            r = int(info["reduction"])
            size = (-(-height // r), -(-width // r))
            sizes.append(size)
            phases = tuple(-(-side // stage.dilation) for side in size)
            if info["num_chs"] == tokens.shape[-1] and (tokens.dim() == 3 or tokens.shape[1:-1] == phases != size):
                tokens = stage.merge(tokens, *size)
        if tokens.dim() != 4:
            raise ValueError(f"tokens of a stage, or a map (b, rows, columns, d), expected, got {tuple(tokens.shape)}")
        is_map = tokens.shape[1:3] not in sizes and tokens.shape[2:] in sizes
        return tokens if is_map else tokens.permute(0, 3, 1, 2)

    def _to_map(self, x: Tensor, image: Tensor) -> Tensor:
        """Map (b, rows, columns, d) to (b, d, rows, columns), in the image's dtype."""
        return x.to(image.dtype).movedim(-1, 1).contiguous()

    def pool(self, x: Tensor) -> Tensor:
        """Map (b, d, rows, columns) to (b, d), or to itself for `global_pool` ""."""
        if self.global_pool == "":
            return x
        return global_pool_nlc(x.flatten(2).transpose(1, 2), self.global_pool, num_prefix_tokens=0)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Map (b, d, rows, columns) to logits (b, num_classes), or to the features before the head.

        For `global_pool` "", map it to (b, num_classes, rows, columns).
        """
        x = self.head_drop(self.pool(x))
        if pre_logits:
            return x
        return self.head(x.movedim(1, -1)).movedim(-1, 1)  # there may be a map left

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Return the maps of chosen stages, and the final features.

        Args:
            x: images (b, c, h, w).
            indices: of the stages; the last n for an int, all for None.
            norm: apply the final norm to the output of the last stage. As in training, it follows no other.
            stop_early: leave out the stages after the last one wanted.
            output_fmt: "NCHW", (b, d, rows, columns); there is no other.
            intermediates_only: leave out the final features.
        """
        assert output_fmt == "NCHW", f"output_fmt must be NCHW, got {output_fmt}"
        take_indices, max_index = feature_take_indices(len(self.stages), indices)
        last = len(self.stages) - 1
        if torch.jit.is_scripting() or not stop_early:  # TorchScript slices no ModuleList
            stages = self.stages
        else:
            stages = self.stages[: max_index + 1]
        image, x = x, self._embed(x)
        intermediates = []
        for i, stage in enumerate(stages):
            x = stage(x)
            if i in take_indices:
                intermediates.append(self._to_map(self.norm_f(x) if norm and i == last else x, image))
        if intermediates_only:
            return intermediates
        if torch.jit.is_scripting() or not stop_early or max_index == last:
            x = self.norm_f(x)
        return self._to_map(x, image), intermediates
