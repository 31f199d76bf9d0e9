"""ViM2: an image model of MambaMixer's selective token and channel mixers, in four stages.

Paper: MambaMixer: Efficient Selective State Space Models with Dual Token and Channel Selection,
https://arxiv.org/abs/2403.19888v1. Its authors have published neither code nor weights: docs/mambamixer.md tells choice
by choice what is the paper's and what is ours.
"""

from collections.abc import Sequence
from typing import Any, Literal, cast, get_args

import torch
import torch.nn.functional as F
from timm.layers import (
    Mlp,
    calculate_drop_path_rates,
    get_device_dtype,
    global_pool_nlc,
    register_notrace_function,
    trunc_normal_,
)
from timm.models import build_model_with_cfg, checkpoint, generate_default_cfgs, register_model
from timm.models._features import feature_take_indices
from timm.models._input import update_model_input_size
from torch import Tensor, nn

from vim.checkpoints import checkpoint_filter_fn, load_pretrained
from vim.layers import (
    AVERAGING,
    FeatureGetter,
    MambaMixerLayer,
    PatchEmbed,
    ResidualMixer,
    ResidualNorm,
    SelectFrom,
    SelectiveChannelMixer,
    SelectiveSequenceMixer,
    SelectiveTokenMixer,
    residual_dtype,
)

TokenMixer = Literal["s6", "mlp"]
ChannelMixer = Literal["tied", "transposed", "mlp", "transposed_mlp", "none"]
POOLS = ("", "avg", "max", "avgmax")
NOT_DECAYED = (*AVERAGING, "A_log", "D", "dt_bias", "conv_bias")


@register_notrace_function
def pad_image(image: Tensor, multiple: int) -> Tensor:
    """Zeros to the right of and below (b, c, h, w), until h and w are multiples."""
    down, right = -image.shape[2] % multiple, -image.shape[3] % multiple
    return F.pad(image, (0, right, 0, down)) if down + right > 0 else image


@register_notrace_function
def pad_tokens(x: Tensor) -> Tensor:
    """Zeros to the right of and below (b, rows, columns, c), until rows and columns are even."""
    down, right = x.shape[1] % 2, x.shape[2] % 2
    return F.pad(x, (0, 0, 0, right, 0, down)) if down + right > 0 else x


class Downsample(nn.Module):
    """Four neighbours to one, beside each other in the channels; a norm, a projection. Swin's patch merging."""

    def __init__(self, dim: int, out_dim: int, **dd: Any) -> None:
        super().__init__()
        self.norm = ResidualNorm(4 * dim, **dd)
        self.reduction = nn.Linear(4 * dim, out_dim, bias=False, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """Map (b, rows, columns, dim) to (b, rows / 2, columns / 2, out_dim), rounded up."""
        x = pad_tokens(x)
        x = torch.cat([x[:, 0::2, 0::2], x[:, 1::2, 0::2], x[:, 0::2, 1::2], x[:, 1::2, 1::2]], dim=-1)
        return self.reduction(self.norm(x))


class Transposed(nn.Module):
    """A mixer of sequences (b, c, l) on images (b, rows, columns, c), for one number of tokens."""

    def __init__(self, mixer: nn.Module) -> None:
        super().__init__()
        self.mixer = mixer

    def forward(self, x: Tensor) -> Tensor:
        y = self.mixer(x.flatten(1, 2).transpose(1, 2))
        return y.transpose(1, 2).reshape(x.shape)


class Stage(nn.Module):
    """Layers on one grid of tokens; each sees what all before it in the stage gave."""

    def __init__(self, downsample: nn.Module, layers: list[MambaMixerLayer]) -> None:
        super().__init__()
        self.downsample = downsample
        self.layers = nn.ModuleList(layers)
        self.grad_checkpointing = False

    def forward(self, x: Tensor) -> Tensor:
        """Map (b, rows, columns, c) of the stage before to (b, rows, columns, c) of this one."""
        x = self.downsample(x)
        x = x.to(residual_dtype(x))
        tokens, channels = [x], [x]
        for layer in self.layers:
            if self.grad_checkpointing and not torch.jit.is_scripting():
                y, x = checkpoint(_apply_layer, layer, *tokens, *channels)  # a reentrant one sees no tensors in lists
            else:
                y, x = layer(tokens, channels)
            tokens, channels = tokens + [y], channels + [x]
        return x


def _apply_layer(layer: nn.Module, *outputs: Tensor) -> tuple[Tensor, Tensor]:
    """What the token mixers before gave, then what the channel mixers did."""
    half = len(outputs) // 2
    return layer(list(outputs[:half]), list(outputs[half:]))


class ViM2(nn.Module):
    """Vision MambaMixer: a stem, four stages of token and channel mixers, the mean over the tokens, a linear head.

    Images of any size: what does not fill a patch, or a pair of rows or columns, is filled up with zeros.

    Args:
        img_size: height and width in pixels, for what prepares images, and for the `transposed` channel mixers.
        global_pool: "avg", "max" or "avgmax" of the tokens; "" for the map (b, d, rows, columns).
        embed_dims, channel_dims: channels of each stage, and the inner width of its channel mixers.
        depths: layers of each stage.
        token_mixers: a layer's, one after the other, before its channel mixer.
        token_mixer: "s6"; or "mlp", which is what is left without S6 and convolution: an MLP on each token.
        channel_mixer: "tied", for images of any size (see :class:`vim.layers.SelectiveChannelMixer`); "transposed", the
            paper's equations, for images of `img_size` and as many parameters as tokens squared; "mlp", on each token,
            the paper's ablation; "transposed_mlp", on each channel, which is "transposed" without S6 and convolution;
            "none".
        select_from: "conv", or "input" as in the paper's equations; see :class:`vim.layers.SelectiveTokenMixer`.
        averaging: weighted sums of the earlier outputs of a stage; without, a plain residual stack.
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
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if not len(embed_dims) == len(channel_dims) == len(depths):
            raise ValueError(
                "embed_dims, channel_dims and depths must have a number for each stage, "
                f"got {embed_dims}, {channel_dims}, {depths}"
            )
        _check_sizes(embed_dims=embed_dims, channel_dims=channel_dims, depths=depths)
        _check_sizes(patch_size=[patch_size], token_mixers=[token_mixers], d_state=[d_state], expand=[expand])
        for name, value, choices in (
            ("token_mixer", token_mixer, get_args(TokenMixer)),
            ("channel_mixer", channel_mixer, get_args(ChannelMixer)),
            ("select_from", select_from, get_args(SelectFrom)),
        ):
            if value not in choices:
                raise ValueError(f"{name} must be one of {choices}, got {value!r}")
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.in_chans, self.num_classes = in_chans, num_classes
        self.channel_mixer = str(channel_mixer)
        self._set_pool(global_pool)
        self._set_width(embed_dims[-1])
        self.patch_embed = PatchEmbed(
            img_size=img_size,
            patch_size=patch_size,
            in_chans=in_chans,
            embed_dim=embed_dims[0],
            dynamic_img_size=True,
            **dd,
        )
        self.norm_embed = ResidualNorm(embed_dims[0], **dd)

        per_layer = token_mixers + (channel_mixer != "none")
        rates = iter(cast(list[float], calculate_drop_path_rates(drop_path_rate, per_layer * sum(depths))))
        height, width = self.patch_embed.img_size
        rows, columns = self.grid_size = -(-height // patch_size), -(-width // patch_size)
        stages: list[Stage] = []
        for i, (dim, width, depth) in enumerate(zip(embed_dims, channel_dims, depths, strict=True)):
            s6: dict[str, Any] = {"d_state": d_state, "select_from": select_from, "depth": per_layer * depth, **dd}
            layers = []
            for l in range(1, depth + 1):
                mixers = [_token_mixer(token_mixer, dim, expand, s6) for _ in range(token_mixers)]
                tokens = nn.Sequential(*(ResidualMixer(dim, mixer, drop_path=next(rates), **dd) for mixer in mixers))
                channels: nn.Module = nn.Identity()
                if channel_mixer != "none":
                    mixer = _channel_mixer(channel_mixer, dim, width, rows * columns, expand, s6)
                    channels = ResidualMixer(dim, mixer, drop_path=next(rates), **dd)
                layers.append(MambaMixerLayer(tokens, channels, l, averaging=averaging, **dd))
            stages.append(Stage(Downsample(embed_dims[i - 1], dim, **dd) if i else nn.Identity(), layers))
            rows, columns = -(-rows // 2), -(-columns // 2)
        self.stages = nn.ModuleList(stages)
        self.norm_f: nn.Module = ResidualNorm(embed_dims[-1], **dd)
        self.head_drop = nn.Dropout(drop_rate)
        self.head = nn.Linear(self.num_features, num_classes, **dd) if num_classes > 0 else nn.Identity()
        self.feature_info = [
            {"module": f"stages.{i}", "num_chs": dim, "reduction": patch_size * 2**i}
            for i, dim in enumerate(embed_dims)
        ]
        self.init_weights(needs_reset=False)

    @torch.jit.ignore
    def init_weights(self, needs_reset: bool = True) -> None:
        """Draw every parameter.

        Args:
            needs_reset: also those of the layers; they have drawn their own when just constructed.
        """
        if needs_reset:
            for module in reversed(list(self.modules())):  # a mixer after its parts
                if hasattr(module, "reset_parameters"):
                    cast(Any, module).reset_parameters()
        if isinstance(self.head, nn.Linear):
            trunc_normal_(self.head.weight, std=0.02)
            nn.init.zeros_(self.head.bias)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """The names of the parameters that weight decay must leave alone."""
        return {name for name, _ in self.named_parameters() if name.rpartition(".")[2] in NOT_DECAYED}

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Patterns of parameter names for layer-wise learning rates: the stem, a group a layer or a stage."""
        layers = [(r"^stages\.(\d+)\.downsample", (0,)), (r"^stages\.(\d+)\.layers\.(\d+)", None)]
        return {
            "stem": r"^patch_embed|^norm_embed",
            "blocks": r"^stages\.(\d+)" if coarse else [*layers, (r"^norm_f", (99999,))],
        }

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Keep only what goes in and out of each layer, and compute the rest again in the backward pass."""
        for stage in self.stages:
            cast(Stage, stage).grad_checkpointing = enable

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        """The head."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A new head for that many classes (0 for none), and another pooling unless None."""
        if global_pool is not None:
            self._set_pool(global_pool)
        self.num_classes = num_classes
        dd = get_device_dtype(self)
        self.head = nn.Linear(self.num_features, num_classes, **dd) if num_classes > 0 else nn.Identity()
        self.head.train(self.training)

    def _set_pool(self, global_pool: str) -> None:
        assert global_pool in POOLS, f"global_pool must be one of {POOLS}, got {global_pool!r}"
        self.global_pool = global_pool

    def _set_width(self, dim: int) -> None:
        self.num_features = self.head_hidden_size = self.embed_dim = dim

    def set_input_size(self, img_size: int | tuple[int, int]) -> None:
        """Have images prepared in another size from now on; the model takes any.

        Raises:
            ValueError: it does not, its channel mixers being of one number of tokens.
        """
        if self.channel_mixer.startswith("transposed"):
            raise ValueError(f"channel_mixer={self.channel_mixer!r} is for one img_size: build another model")
        self.patch_embed.set_input_size(img_size)
        update_model_input_size(self, img_size)  # for timm's exports

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop the stages after the last one wanted, with them the norm and the head. Returns the indices."""
        take_indices, max_index = feature_take_indices(len(self.stages), indices)
        shorter = max_index < len(self.stages) - 1
        self.stages = self.stages[: max_index + 1]
        if prune_norm or shorter:
            self.norm_f = nn.Identity()
        if shorter:
            self._set_width(self.feature_info[max_index]["num_chs"])
        if prune_head or shorter:
            self.reset_classifier(0, "")
        return take_indices

    def _embed(self, image: Tensor) -> Tensor:
        expected = f"images (b, {self.in_chans}, h, w) expected"
        torch._assert(image.dim() == 4, expected)
        torch._assert(image.shape[1] == self.in_chans, expected)
        torch._assert(image.shape[0] > 0, "at least one image expected")
        torch._assert(image.shape[2] * image.shape[3] > 0, "at least one pixel expected")
        patches = self.patch_embed(pad_image(image, self.patch_embed.patch_size[0]))
        if self.channel_mixer.startswith("transposed"):
            rows, columns = self.grid_size
            expected = f"an image that fills {rows} x {columns} patches expected: set img_size, or channel_mixer='tied'"
            torch._assert(patches.shape[1] == rows, expected)
            torch._assert(patches.shape[2] == columns, expected)
        return self.norm_embed(patches)

    def forward_features(self, image: Tensor) -> Tensor:
        """Map images (b, c, h, w) to the normed map of the last stage, (b, d, rows, columns)."""
        x = self._embed(image)
        for stage in self.stages:
            x = stage(x)
        return self._to_map(self.norm_f(x))

    def _to_map(self, x: Tensor) -> Tensor:
        """Tokens (b, rows, columns, d) to (b, d, rows, columns)."""
        return x.to(self.norm_embed.weight.dtype).permute(0, 3, 1, 2).contiguous()

    def pool(self, x: Tensor) -> Tensor:
        """Map (b, d, rows, columns) to (b, d), or to itself where `global_pool` is ""."""
        if self.global_pool == "":
            return x
        return global_pool_nlc(x.flatten(2).transpose(1, 2), self.global_pool, num_prefix_tokens=0)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Map (b, d, rows, columns) to logits (b, num_classes), or to the features before the head.

        Where `global_pool` is "", to (b, num_classes, rows, columns).
        """
        x = self.head_drop(self.pool(x))
        if pre_logits:
            return x
        return self.head(x.movedim(1, -1)).movedim(-1, 1)  # there may be a map left

    def forward(self, image: Tensor) -> Tensor:
        """Map images (b, c, h, w) to logits (b, num_classes)."""
        return self.forward_head(self.forward_features(image))

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """The maps of chosen stages, and the final features.

        Args:
            x: images (b, c, h, w).
            indices: of the stages; the last n for an int, all for None.
            norm: apply the final norm to what leaves the last stage; as in training, it follows no other.
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
        x = self._embed(x)
        intermediates = []
        for i, stage in enumerate(stages):
            x = stage(x)
            if i in take_indices:
                intermediates.append(self._to_map(self.norm_f(x) if norm and i == last else x))
        if intermediates_only:
            return intermediates
        if torch.jit.is_scripting() or not stop_early or max_index == last:
            x = self.norm_f(x)
        return self._to_map(x), intermediates

    @torch.jit.ignore
    def load_pretrained(self, path: str) -> None:
        """Load a checkpoint from a file; see :func:`vim.checkpoints.load_pretrained`."""
        load_pretrained(self, path)


def _check_sizes(**sizes: Sequence[int]) -> None:
    for name, numbers in sizes.items():
        if not numbers or not all(isinstance(number, int) and number >= 1 for number in numbers):
            raise ValueError(f"{name}: whole numbers from 1 expected, got {numbers}")


def _token_mixer(kind: str, dim: int, expand: int, s6: dict[str, Any]) -> nn.Module:
    if kind == "mlp":
        return _mlp(dim, expand * dim, s6)
    return SelectiveTokenMixer(dim, expand=expand, **s6)


def _channel_mixer(kind: str, dim: int, width: int, num_tokens: int, expand: int, s6: dict[str, Any]) -> nn.Module:
    if kind == "mlp":
        return _mlp(dim, width, s6)
    if kind == "transposed_mlp":
        return Transposed(_mlp(num_tokens, expand * num_tokens, s6))
    if kind == "transposed":
        return Transposed(SelectiveSequenceMixer(num_tokens, bidirectional=True, expand=expand, **s6))
    return SelectiveChannelMixer(dim, width, **s6)


def _mlp(dim: int, hidden: int, s6: dict[str, Any]) -> Mlp:
    return Mlp(dim, hidden, act_layer=nn.SiLU, device=s6["device"], dtype=s6["dtype"])  # the activation of the gates


def _cfg(**kwargs: Any) -> dict[str, Any]:
    return {
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": (7, 7),
        "crop_pct": 0.875,
        "interpolation": "bicubic",
        "mean": (0.485, 0.456, 0.406),
        "std": (0.229, 0.224, 0.225),
        "first_conv": "patch_embed.proj",
        "classifier": "head",
        "paper_ids": "arXiv:2403.19888",
        **kwargs,
    }


default_cfgs = generate_default_cfgs(
    {
        "vim2_tiny.untrained": _cfg(),
        "vim2_small.untrained": _cfg(),
        "vim2_base.untrained": _cfg(),
        "test_vim2.untrained": _cfg(input_size=(3, 64, 64), pool_size=(2, 2)),
    }
)


def _create_vim2(variant: str, pretrained: bool, **kwargs: Any) -> ViM2:
    if kwargs.get("features_only"):  # whatever head the weights have, it is not wanted
        kwargs.setdefault("num_classes", 0)
    return build_model_with_cfg(
        ViM2,
        variant,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg={"out_indices": (0, 1, 2, 3), "feature_cls": FeatureGetter},
        **kwargs,
    )


@register_model
def vim2_tiny(pretrained: bool = False, **kwargs: Any) -> ViM2:
    """ViM2-Tiny, 24 M parameters (20 M published), 82.7 % ImageNet-1k top-1 published."""
    return _create_vim2("vim2_tiny", pretrained, **kwargs)


@register_model
def vim2_small(pretrained: bool = False, **kwargs: Any) -> ViM2:
    """ViM2-Small, 44 M parameters (43 M published), 83.7 % ImageNet-1k top-1 published."""
    return _create_vim2("vim2_small", pretrained, **{"depths": (1, 1, 9, 1), **kwargs})


@register_model
def vim2_base(pretrained: bool = False, **kwargs: Any) -> ViM2:
    """ViM2-Base, 76 M parameters (74 M published), 83.9 % ImageNet-1k top-1 published."""
    options = {"embed_dims": (128, 256, 512, 1024), "channel_dims": (256, 512, 1024, 1024), "depths": (1, 1, 9, 1)}
    return _create_vim2("vim2_base", pretrained, **{**options, **kwargs})


@register_model
def test_vim2(pretrained: bool = False, **kwargs: Any) -> ViM2:
    """A ViM2 for tests, 0.2 M parameters."""
    options = {
        "img_size": 64,
        "embed_dims": (16, 24, 32, 48),
        "channel_dims": (32, 48, 64, 48),
        "depths": (1, 1, 2, 1),
        "d_state": 8,
    }
    return _create_vim2("test_vim2", pretrained, **{**options, **kwargs})
