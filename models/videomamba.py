"""VideoMamba: bidirectional Mamba over the patches of a clip, frame by frame.

Paper: VideoMamba: State Space Model for Efficient Video Understanding, https://arxiv.org/abs/2403.06977.
Published code and weights: https://github.com/OpenGVLab/VideoMamba.
"""

import re
from collections.abc import Iterable, Iterator
from typing import Any, Literal, cast

import torch
from timm.layers import trunc_normal_
from timm.models import build_model_with_cfg, checkpoint, generate_default_cfgs, register_model
from timm.models._input import update_model_args
from torch import Tensor, nn

from vim.checkpoints import checkpoint_filter_fn, load_pretrained
from vim.layers import (
    SCAN_ORDERS,
    Directions,
    FeatureGetter,
    Init,
    MambaBackbone,
    MambaBlock,
    MambaMixer,
    MixerState,
    PatchEmbed,
    ScanOrder,
    insert_class_tokens,
    residual_dtype,
    resize_temporal_table,
    spatiotemporal_paths,
    split_class_tokens,
)

INFLATIONS = ("center", "average")


class VideoMamba(MambaBackbone):
    """Vision Mamba for clips: a class token first, the patches of all frames, `depth` Mamba blocks, a linear head.

    Args:
        img_size: height and width in pixels.
        num_frames: how many a clip has; None for a model of images.
        tubelet_size: frames that are embedded together; 1 in all published weights.
        dynamic_img_size: take images of any size and clips of any length; the position tables are resized on the way.
        global_pool: "token", the class token; "avg", "max" or "avgmax" of the patches; "" for all tokens. By default
            "token", and "avg" in one direction, where a token that comes first sees no other.
        directions: see :class:`vim.layers.MambaMixer`. In one direction, "none", clips can be taken as a
            :meth:`stream`.
        scan_order: the paper's names. "spatial_first": all patches of a frame, then of the next. "temporal_first": all
            times of a patch, then of the next. "spatiotemporal_v1" does half of both: forwards spatial-first, backwards
            temporal-first. "spatiotemporal_v2" does all of both, with the same parameters in either order, and computes
            twice as much. The paper does not say which half, nor what the orders share, and no such code or weights
            were published: both are our reading.
        inflation: how image weights become those of a tubelet: in its "center" frame, zero in the others, or the
            "average" of them all.
        init: "published" starts with normal weights and no bias on all projections but the last, so that steps start
            near 0.69; "corrected" starts the mixers as Mamba does, with steps in 0.001 to 0.1.
        wd_exempt_A: keep weight decay off `A_log`. The published recipe decays it, against its own code's marks.
    """

    def __init__(
        self,
        *,
        img_size: int | tuple[int, int] = 224,
        patch_size: int | tuple[int, int] = 16,
        num_frames: int | None = None,
        tubelet_size: int = 1,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str | None = None,
        embed_dim: int = 192,
        depth: int = 24,
        d_state: int = 16,
        d_conv: int = 4,
        expand: int = 2,
        directions: Directions = "v2",
        scan_order: ScanOrder = "spatial_first",
        inflation: Literal["center", "average"] = "center",
        dynamic_img_size: bool = False,
        drop_rate: float = 0.0,
        pos_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        init: Init = "published",
        wd_exempt_A: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if scan_order not in SCAN_ORDERS:
            raise ValueError(f"scan_order must be one of {SCAN_ORDERS}, got {scan_order!r}")
        if inflation not in INFLATIONS:
            raise ValueError(f"inflation must be one of {INFLATIONS}, got {inflation!r}")
        if scan_order.startswith("spatiotemporal") and directions != "v2":
            raise ValueError(f"scan_order {scan_order!r} needs directions='v2', got {directions!r}")
        if directions == "none":
            if global_pool == "token":
                raise ValueError(
                    "global_pool='token' needs two directions: the token comes first and would see no other"
                )
            global_pool = "avg" if global_pool is None else global_pool
        patch_embed = PatchEmbed(
            img_size=img_size,
            patch_size=patch_size,
            num_frames=num_frames,
            tubelet_size=tubelet_size,
            in_chans=in_chans,
            embed_dim=embed_dim,
            dynamic_img_size=dynamic_img_size,
            device=device,
            dtype=dtype,
        )
        super().__init__(
            patch_embed=patch_embed,
            class_token="first",
            in_chans=in_chans,
            num_classes=num_classes,
            global_pool=global_pool,
            embed_dim=embed_dim,
            depth=depth,
            mixer={
                "d_state": d_state,
                "d_conv": d_conv,
                "expand": expand,
                "directions": directions,
                "combine": "sum",
                "init": init,
            },
            drop_rate=drop_rate,
            pos_drop_rate=pos_drop_rate,
            drop_path_rate=drop_path_rate,
            wd_exempt_A=wd_exempt_A,
            device=device,
            dtype=dtype,
        )
        self.directions, self.inflation, self.init = directions, inflation, init
        self.scan_order = "spatial_first" if num_frames is None else str(scan_order)  # an image has no other
        self.temporal_pos_embedding = (
            None
            if num_frames is None
            else nn.Parameter(torch.empty(1, patch_embed.num_tubelets, embed_dim, device=device, dtype=dtype))
        )
        self.init_weights(needs_reset=False)

    @torch.jit.ignore
    def init_weights(self, needs_reset: bool = True) -> None:
        """Draw every parameter; see :meth:`vim.layers.MambaBackbone.init_weights`."""
        super().init_weights(needs_reset)
        if self.init == "published":
            for module in self.modules():
                if isinstance(module, MambaMixer):
                    _init_projections(module)

    def _init_embedding(self) -> None:
        self.patch_embed.proj.reset_parameters()
        trunc_normal_(self.pos_embed, std=0.02)
        for zero in (self.cls_token, self.temporal_pos_embedding):
            if zero is not None:
                nn.init.zeros_(zero)

    @torch.jit.ignore
    def load_pretrained(self, path: str) -> None:
        """Load a published checkpoint from a file; see :func:`vim.checkpoints.load_pretrained`."""
        load_pretrained(self, path)

    def set_input_size(self, img_size: int | tuple[int, int] | None = None, *, num_frames: int | None = None) -> None:
        """Take clips of another size or length from now on, with the position tables resized.

        Raises:
            ValueError: a patch does not fit in, or tubelets do not make up the frames; or it is a model of images.
        """
        temporal = self.temporal_pos_embedding
        if num_frames is not None and temporal is None:
            raise ValueError(f"a model of images takes no num_frames, got {num_frames}: build one with num_frames")
        if img_size is not None:
            super().set_input_size(img_size)
        if num_frames is not None and temporal is not None:
            self.patch_embed.set_input_size(self.patch_embed.img_size, num_frames)
            table = resize_temporal_table(temporal.detach(), self.patch_embed.num_tubelets)
            self.temporal_pos_embedding = nn.Parameter(table, temporal.requires_grad)
            update_model_args(self, num_frames=num_frames)  # for timm's exports

    def _positions(self, grid: list[int]) -> Tensor:
        """The positions of all tokens, (1, l, d), for a grid of patches, (t, rows, columns)."""
        table = self._spatial_positions(grid)
        temporal: Tensor | None = self.temporal_pos_embedding
        if temporal is None:
            return table
        if self.dynamic_img_size:
            temporal = resize_temporal_table(temporal, grid[0])
        expected = f"{self.patch_embed.num_frames} frames expected: set num_frames, or dynamic_img_size=True"
        torch._assert(grid[0] == temporal.shape[1], expected)
        patches, token = split_class_tokens(table, self.class_token)
        patches = patches.unsqueeze(1) + temporal.unsqueeze(2)  # (1, t, rows * columns, d)
        return insert_class_tokens(self._flatten(patches), token, self.class_token)

    def _flatten(self, patches: Tensor) -> Tensor:
        """Put patches, (b, t, ..., d), in a sequence, (b, l, d)."""
        if self.scan_order == "temporal_first":
            return patches.flatten(2, -2).transpose(1, 2).flatten(1, 2)
        return patches.flatten(1, -2)

    def _unflatten(self, patches: Tensor, grid: list[int]) -> Tensor:
        """Undo :meth:`_flatten`."""
        if self.scan_order == "temporal_first":
            return patches.unflatten(1, (-1, grid[0])).transpose(1, 2).unflatten(2, grid[1:])
        return patches.unflatten(1, grid)

    def _paths(self, grid: list[int], device: torch.device) -> Tensor | None:
        """The orders in which the mixers scan the tokens, (2 or 4, l); None where they take them as they come."""
        if self.scan_order == "spatiotemporal_v1" or self.scan_order == "spatiotemporal_v2":
            both = self.scan_order == "spatiotemporal_v2"
            return spatiotemporal_paths(grid[0], grid[1] * grid[2], self.num_prefix_tokens, both, device)
        return None

    @torch.jit.ignore
    def forward_visible(self, clip: Tensor, visible: Tensor) -> Tensor:
        """The normed tokens, (b, 1 + v, d), of a clip of which only some patches are there.

        Args:
            clip: (b, c, t, h, w).
            visible: (b, v) places of the patches in the order of the tokens; the class token always is there.

        Raises:
            ValueError: the scan is not spatial-first.
        """
        if self.scan_order != "spatial_first":
            raise ValueError(f"patches can be left out with scan_order='spatial_first', got {self.scan_order!r}")
        x, _ = self._embed(clip)
        places = torch.cat([torch.zeros_like(visible[:, :1]), 1 + visible], dim=1)
        x = x.gather(1, places.unsqueeze(2).expand(-1, -1, x.shape[2]))
        for layer in self.layers:
            x = checkpoint(layer, x) if self.grad_checkpointing else layer(x)
        return self._norm(x)

    @torch.jit.ignore
    @torch.no_grad()
    def stream(self, frames: Iterable[Tensor]) -> Iterator[Tensor]:
        """Take a clip piece by piece, each as soon as it is there, in memory that does not grow; in evaluation mode.

        Args:
            frames: (b, c, h, w), or pieces of any lengths, (b, c, t, h, w): multiples of `tubelet_size`.

        Yields:
            For each piece its normed tokens, (b, l, d): those that :meth:`forward_features` gives in the whole clip.

        Raises:
            ValueError: the model is in training mode or looks back from the end, or has no place in time for so many
                frames.
        """
        if self.training:
            raise ValueError("a stream needs the model in evaluation mode: call eval() before")
        temporal = self.temporal_pos_embedding
        if self.directions != "none" or self.scan_order != "spatial_first" or temporal is None:
            raise ValueError(
                "a stream needs a model of clips with directions='none' and scan_order='spatial_first', "
                f"got {self.directions!r}, {self.scan_order!r} and num_frames={self.patch_embed.num_frames}"
            )
        states: list[MixerState | None] = [None] * len(self.layers)
        start = 0
        for clip in frames:
            patches = self.patch_embed(clip)  # (b, t, rows, columns, d)
            b, t = patches.shape[:2]
            if start + t > temporal.shape[1]:
                raise ValueError(
                    f"the stream is longer than num_frames={self.patch_embed.num_frames}: "
                    "build the model with more, or set_input_size(num_frames=...)"
                )
            rows, token = split_class_tokens(self._spatial_positions(patches.shape[1:-1]), self.class_token)
            rows = rows.unsqueeze(1) + temporal[:, start : start + t].unsqueeze(2)
            x = patches.flatten(1, -2) + rows.flatten(1, 2)
            l = x.shape[1]
            if start == 0:
                assert self.cls_token is not None  # it is one
                x = torch.cat([(self.cls_token + token).expand(b, -1, -1), x], dim=1)
            x = x.to(residual_dtype(x))
            for i, layer in enumerate(self.layers):
                x, states[i] = cast(MambaBlock, layer).step(x, states[i])
            yield self._norm(x)[:, -l:]
            start += t


def _init_projections(mixer: MambaMixer) -> None:
    """As the published code, which draws all projections as a transformer's, and forgets that steps need their bias."""
    for name, module in mixer.named_children():
        if isinstance(module, nn.Linear) and name != "out_proj":
            trunc_normal_(module.weight, std=0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)


# the authors' files, videomamba_NAME.pth, and top-1 in %, as published. Their table links two others for the masked
# Kinetics-400 and Something-Something models of 16 frames; these are the names it means.
PUBLISHED: dict[str, float | None] = {
    "t16_in1k_res224": 76.9,
    "t16_in1k_res224to448": 79.3,
    "t16_in1k_res224to448to576": 79.6,
    "s16_in1k_res224": 81.2,
    "s16_in1k_res224to448": 83.2,
    "s16_in1k_res224to448to576": 83.5,
    "m16_in1k_res224": 82.8,
    "m16_in1k_res224to448": 83.8,
    "m16_in1k_res224to448to576": 84.0,
    "b16_in1k_res224": 82.7,
    "t16_k400_f8_res224": 76.9,
    "t16_k400_f16_res224": 78.1,
    "t16_k400_f32_res224": 78.8,
    "t16_k400_f64_res224": 79.6,
    "t16_k400_f64_res224to384": 80.3,
    "s16_k400_f8_res224": 79.3,
    "s16_k400_f16_res224": 80.8,
    "s16_k400_f32_res224": 81.5,
    "s16_k400_f64_res224": 81.8,
    "s16_k400_f64_res224to384": 82.7,
    "m16_k400_f8_res224": 80.6,
    "m16_k400_f16_res224": 81.9,
    "m16_k400_f32_res224": 82.4,
    "m16_k400_f64_res224": 82.8,
    "m16_k400_f64_res224to384": 83.3,
    "m16_k400_mask_ft_f8_res224": 82.0,
    "m16_k400_mask_ft_f16_res224": 83.4,
    "m16_k400_mask_ft_f32_res224": 83.9,
    "m16_k400_mask_ft_f64_res224": 84.3,
    "m16_k400_mask_ft_f64_res224to384": 85.0,
    "t16_ssv2_f8_res224": 65.1,
    "t16_ssv2_f16_res224": 66.0,
    "t16_ssv2_f16_res224to288": 66.2,
    "s16_ssv2_f8_res224": 66.6,
    "s16_ssv2_f16_res224": 67.7,
    "s16_ssv2_f16_res224to288": 68.1,
    "m16_ssv2_f8_res224": 67.3,
    "m16_ssv2_f16_res224": 68.3,
    "m16_ssv2_f16_res224to288": 68.4,
    "m16_ssv2_mask_ft_f8_res224": 70.2,
    "m16_ssv2_mask_ft_f16_res224": 71.0,
    "m16_ssv2_mask_ft_f16_res224to288": 71.4,
    "t16_breakfast_f32_res224": 94.3,
    "t16_breakfast_f64_res224": 94.3,
    "s16_breakfast_f32_res224": 95.3,
    "s16_breakfast_f64_res224": 97.4,
    "m16_breakfast_f32_res224": 94.8,
    "m16_breakfast_f64_res224": 95.8,
    "m16_breakfast_mask_ft_f32_res224": 97.9,
    "m16_breakfast_mask_ft_f64_res224": 96.9,  # has times for 32 frames, which are resized
    "t16_coin_f32_res224": 86.2,
    "t16_coin_f64_res224": 87.0,
    "s16_coin_f32_res224": 88.4,
    "s16_coin_f64_res224": 88.7,
    "m16_coin_f32_res224": 88.3,
    "m16_coin_f64_res224": 89.5,
    "m16_coin_mask_ft_f32_res224": 89.6,
    "m16_coin_mask_ft_f64_res224": 90.4,
    "m16_k400_mask_pt_f8_res224": None,
    "m16_ssv2_mask_pt_f8_res224": None,
    "m16_5M_f8_res224": None,
    "m16_17M_f8_res224": None,
    "m16_25M_f8_res224": None,
}
NAME = re.compile(r"(.)16_([^_]+)_(?:mask_(ft|pt)_)?(?:f(\d+)_)?res(?:\d+to)*(\d+)")
SIZES = {"t": "tiny", "s": "small", "m": "middle", "b": "base"}
NUM_CLASSES = {"in1k": 1000, "k400": 400, "ssv2": 174, "breakfast": 10, "coin": 180}
NUM_FRAMES = (8, 16, 32, 64)
_CLIPS = {"crop_pct": 1.0, "interpolation": "bilinear"}


def _cfg(**kwargs: Any) -> dict[str, Any]:
    return {
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "fixed_input_size": True,
        "pool_size": None,
        "crop_pct": 0.875,
        "interpolation": "bicubic",
        "mean": (0.485, 0.456, 0.406),
        "std": (0.229, 0.224, 0.225),
        "first_conv": "patch_embed.proj",
        "classifier": "head",
        "paper_ids": "arXiv:2403.06977",
        "origin_url": "https://github.com/OpenGVLab/VideoMamba",
        **kwargs,
    }


def _published() -> dict[str, dict[str, Any]]:
    """A tag for each of the authors' files, and one for each model of clips that starts from image weights."""
    cfgs = {}
    for file, top1 in PUBLISHED.items():
        size, data, mask, frames, pixels = cast(re.Match[str], NAME.fullmatch(file)).groups()
        model = f"videomamba_{SIZES[size]}" + (f"_f{frames}" if frames else "")
        before = {None: "", "ft": "mask_", "pt": "mask_pt_"}[mask]
        tag = f"opengvlab_{before}{data.lower()}" + (f"_{pixels}" if pixels != "224" else "")
        views = f" with 3 crops of each of {10 if data == 'coin' else 4} clips" if frames else ""
        cfgs[f"{model}.{tag}"] = _cfg(
            hf_hub_id="OpenGVLab/VideoMamba",
            hf_hub_filename=f"videomamba_{file}.pth",
            license="apache-2.0",
            num_classes=NUM_CLASSES[data] if top1 else 0,
            input_size=(3, int(pixels), int(pixels)),
            notes=(f"{top1} % top-1{views}, as published" if top1 else "pre-training only: no head",),
            **(_CLIPS if frames else {}),
        )
    for size in ("tiny", "small", "middle"):
        for frames in NUM_FRAMES:
            cfgs[f"videomamba_{size}_f{frames}.opengvlab_in1k"] = {
                **cfgs[f"videomamba_{size}.opengvlab_in1k"],
                **_CLIPS,  # the weights are of images, what is evaluated are videos
            }
    return cfgs


default_cfgs = generate_default_cfgs(
    {
        **_published(),
        "test_videomamba.untrained": _cfg(input_size=(3, 64, 64)),
    }
)


def _create_videomamba(
    variant: str, pretrained: bool, pretrained_cfg_overlay: dict[str, Any] | None = None, **kwargs: Any
) -> VideoMamba:
    if kwargs.get("features_only"):  # whatever head the weights have, it is not wanted
        kwargs.setdefault("num_classes", 0)
    return build_model_with_cfg(
        VideoMamba,
        variant,
        pretrained,
        # files go through load_pretrained: timm would take the running average where there is one
        pretrained_cfg_overlay={"custom_load": "hf", **(pretrained_cfg_overlay or {})},
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg={"out_indices": 3, "feature_cls": FeatureGetter},
        **kwargs,
    )


@register_model
def videomamba_tiny(pretrained: bool = False, **kwargs: Any) -> VideoMamba:
    """VideoMamba-Tiny on images, 7 M parameters, 76.9 % ImageNet-1k top-1 published."""
    return _create_videomamba("videomamba_tiny", pretrained, **{"embed_dim": 192, **kwargs})


@register_model
def videomamba_small(pretrained: bool = False, **kwargs: Any) -> VideoMamba:
    """VideoMamba-Small on images, 26 M parameters, 81.2 % ImageNet-1k top-1 published."""
    return _create_videomamba("videomamba_small", pretrained, **{"embed_dim": 384, **kwargs})


@register_model
def videomamba_middle(pretrained: bool = False, **kwargs: Any) -> VideoMamba:
    """VideoMamba-Middle on images, 74 M parameters, 82.8 % ImageNet-1k top-1 published."""
    return _create_videomamba("videomamba_middle", pretrained, **{"embed_dim": 576, "depth": 32, **kwargs})


@register_model
def videomamba_base(pretrained: bool = False, **kwargs: Any) -> VideoMamba:
    """VideoMamba-Base on images, 98 M parameters, 82.7 % ImageNet-1k top-1 published."""
    return _create_videomamba("videomamba_base", pretrained, **{"embed_dim": 768, **kwargs})


@register_model
def videomamba_tiny_f8(pretrained: bool = False, **kwargs: Any) -> VideoMamba:
    """VideoMamba-Tiny on clips of 8 frames, 7 M parameters, 76.9 % Kinetics-400 top-1 published."""
    return _create_videomamba("videomamba_tiny_f8", pretrained, **{"embed_dim": 192, "num_frames": 8, **kwargs})


@register_model
def videomamba_tiny_f16(pretrained: bool = False, **kwargs: Any) -> VideoMamba:
    """VideoMamba-Tiny on clips of 16 frames, 7 M parameters, 78.1 % Kinetics-400 top-1 published."""
    return _create_videomamba("videomamba_tiny_f16", pretrained, **{"embed_dim": 192, "num_frames": 16, **kwargs})


@register_model
def videomamba_tiny_f32(pretrained: bool = False, **kwargs: Any) -> VideoMamba:
    """VideoMamba-Tiny on clips of 32 frames, 7 M parameters, 78.8 % Kinetics-400 top-1 published."""
    return _create_videomamba("videomamba_tiny_f32", pretrained, **{"embed_dim": 192, "num_frames": 32, **kwargs})


@register_model
def videomamba_tiny_f64(pretrained: bool = False, **kwargs: Any) -> VideoMamba:
    """VideoMamba-Tiny on clips of 64 frames, 7 M parameters, 79.6 % Kinetics-400 top-1 published."""
    return _create_videomamba("videomamba_tiny_f64", pretrained, **{"embed_dim": 192, "num_frames": 64, **kwargs})


@register_model
def videomamba_small_f8(pretrained: bool = False, **kwargs: Any) -> VideoMamba:
    """VideoMamba-Small on clips of 8 frames, 26 M parameters, 79.3 % Kinetics-400 top-1 published."""
    return _create_videomamba("videomamba_small_f8", pretrained, **{"embed_dim": 384, "num_frames": 8, **kwargs})


@register_model
def videomamba_small_f16(pretrained: bool = False, **kwargs: Any) -> VideoMamba:
    """VideoMamba-Small on clips of 16 frames, 26 M parameters, 80.8 % Kinetics-400 top-1 published."""
    return _create_videomamba("videomamba_small_f16", pretrained, **{"embed_dim": 384, "num_frames": 16, **kwargs})


@register_model
def videomamba_small_f32(pretrained: bool = False, **kwargs: Any) -> VideoMamba:
    """VideoMamba-Small on clips of 32 frames, 26 M parameters, 81.5 % Kinetics-400 top-1 published."""
    return _create_videomamba("videomamba_small_f32", pretrained, **{"embed_dim": 384, "num_frames": 32, **kwargs})


@register_model
def videomamba_small_f64(pretrained: bool = False, **kwargs: Any) -> VideoMamba:
    """VideoMamba-Small on clips of 64 frames, 26 M parameters, 81.8 % Kinetics-400 top-1 published."""
    return _create_videomamba("videomamba_small_f64", pretrained, **{"embed_dim": 384, "num_frames": 64, **kwargs})


@register_model
def videomamba_middle_f8(pretrained: bool = False, **kwargs: Any) -> VideoMamba:
    """VideoMamba-Middle on clips of 8 frames, 74 M parameters, 80.6 % Kinetics-400 top-1 published."""
    return _create_videomamba(
        "videomamba_middle_f8", pretrained, **{"embed_dim": 576, "depth": 32, "num_frames": 8, **kwargs}
    )


@register_model
def videomamba_middle_f16(pretrained: bool = False, **kwargs: Any) -> VideoMamba:
    """VideoMamba-Middle on clips of 16 frames, 74 M parameters, 81.9 % Kinetics-400 top-1 published."""
    return _create_videomamba(
        "videomamba_middle_f16", pretrained, **{"embed_dim": 576, "depth": 32, "num_frames": 16, **kwargs}
    )


@register_model
def videomamba_middle_f32(pretrained: bool = False, **kwargs: Any) -> VideoMamba:
    """VideoMamba-Middle on clips of 32 frames, 74 M parameters, 82.4 % Kinetics-400 top-1 published."""
    return _create_videomamba(
        "videomamba_middle_f32", pretrained, **{"embed_dim": 576, "depth": 32, "num_frames": 32, **kwargs}
    )


@register_model
def videomamba_middle_f64(pretrained: bool = False, **kwargs: Any) -> VideoMamba:
    """VideoMamba-Middle on clips of 64 frames, 74 M parameters, 82.8 % Kinetics-400 top-1 published."""
    return _create_videomamba(
        "videomamba_middle_f64", pretrained, **{"embed_dim": 576, "depth": 32, "num_frames": 64, **kwargs}
    )


@register_model
def test_videomamba(pretrained: bool = False, **kwargs: Any) -> VideoMamba:
    """A VideoMamba for tests, 0.2 M parameters; on images unless `num_frames` is given."""
    return _create_videomamba("test_videomamba", pretrained, **{"embed_dim": 64, "depth": 3, **kwargs})
