"""VideoMamba: bidirectional Mamba over the patches of a clip, frame by frame.

Paper: VideoMamba: State Space Model for Efficient Video Understanding, https://arxiv.org/abs/2403.06977.
Published code and weights: https://github.com/OpenGVLab/VideoMamba.
"""

import re
from collections.abc import Iterable, Iterator
from functools import partial
from typing import Literal, cast, get_args

import torch
import torch.nn.functional as F
from timm.layers import trunc_normal_
from timm.models import checkpoint, generate_default_cfgs, register_model
from timm.models.naflexvit import global_pool_naflex
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from vim.checkpoints import checkpoint_filter_fn as checkpoint_filter_fn  # timm expects it beside the class
from vim.layers import (
    SCAN_ORDERS,
    Directions,
    Factory,
    Init,
    LTIKind,
    MambaBackbone,
    MambaBlock,
    MambaMixer,
    MixerName,
    MixerState,
    PatchEmbed,
    ScanOrder,
    check_choice,
    find_table,
    insert_class_tokens,
    padding_last,
    paths_of_padded,
    residual_dtype,
    resize_temporal_table,
    spatiotemporal_paths,
    split_class_tokens,
    update_model_args,
)

from ._registry import create, register_variant, tag_facts

FIRST_CONV = "patch_embed.proj.weight"
TIMES = "temporal_pos_embedding"
IMAGES_AND_TEXT = "vision_encoder."  # prefix of the image part in a model of images and text
UNUSED = ("distill_head.", "clip_decoder.", "clip_teacher.", "pool_norm.")  # of distillation and masked pre-training


class VideoMamba(MambaBackbone):
    """Vision Mamba for clips: a class token first, the patches of all frames, `depth` Mamba blocks, a linear head.

    Args:
        img_size: height and width in pixels.
        num_frames: frames of a clip; None for a model of images.
        tubelet_size: frames that are embedded together; 1 in all published weights.
        global_pool: "token", the class token; "avg", "max" or "avgmax" of the patches; "" for all tokens. Default:
            "token", but "avg" for `directions="none"`, where the token comes first and sees no other.
        mixer, d_state, d_conv, expand, head_dim: see :class:`vim.models.Vim`.
        directions: see :class:`vim.layers.MambaMixer` and :class:`vim.layers.Mamba2Mixer`. A model with "none" can also
            take clips as a :meth:`stream`.
        scan_order: the paper's names. "spatial_first": all patches of a frame, then of the next. "temporal_first": all
            times of a patch, then of the next. "spatiotemporal_v1": forwards spatial-first, backwards temporal-first.
            "spatiotemporal_v2": both directions in both orders, with the same parameters, which doubles the compute.
            The paper does not say which direction takes which order in v1, nor which parameters v2 shares, and no such
            code or weights were published: both are our reading.
        inflation: how image weights become a tubelet's: "center" puts them in its middle frame and zeros in the others,
            "average" spreads them evenly over all frames.
        dynamic_img_size: take images of any size and clips of any length; the position tables are resized for each.
        init: of "s6" only: "published", the default, draws normal weights and zero biases for all projections but the
            last, so that steps start near 0.69; "corrected" draws the mixers as Mamba does, with steps from 0.001 to
            0.1.
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
        mixer: MixerName = "s6",
        d_state: int | None = None,
        d_conv: int | None = None,
        expand: int | None = None,
        head_dim: int | None = None,
        directions: Directions = "v2",
        scan_order: ScanOrder = "spatial_first",
        inflation: Literal["center", "average"] = "center",
        dynamic_img_size: bool = False,
        drop_rate: float = 0.0,
        pos_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        init: Init | None = None,
        wd_exempt_A: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_choice("scan_order", scan_order, SCAN_ORDERS)
        check_choice("inflation", inflation, ("center", "average"))
        if scan_order.startswith("spatiotemporal") and directions != "v2":
            raise ValueError(f"scan_order {scan_order!r} needs directions='v2', got {directions!r}")
        if scan_order.startswith("spatiotemporal") and mixer in get_args(LTIKind):
            raise ValueError(f"scan_order {scan_order!r} needs another mixer than {mixer!r}, which has one order")
        if directions == "none" and global_pool == "token":
            raise ValueError("global_pool='token' needs two directions: the token comes first and would see no other")
        dd: Factory = {"device": device, "dtype": dtype}
        patch_embed = PatchEmbed(
            img_size=img_size,
            patch_size=patch_size,
            num_frames=num_frames,
            tubelet_size=tubelet_size,
            in_chans=in_chans,
            embed_dim=embed_dim,
            dynamic_img_size=dynamic_img_size,
            **dd,
        )
        super().__init__(
            patch_embed=patch_embed,
            class_token="first",
            in_chans=in_chans,
            num_classes=num_classes,
            global_pool="avg" if directions == "none" and global_pool is None else global_pool,
            embed_dim=embed_dim,
            depth=depth,
            mixer=mixer,
            mixer_options={
                "d_state": d_state,
                "d_conv": d_conv,
                "expand": expand,
                "head_dim": head_dim,
                "directions": directions,
                "combine": "sum" if mixer == "s6" else None,
                "init": init,
            },
            drop_rate=drop_rate,
            pos_drop_rate=pos_drop_rate,
            drop_path_rate=drop_path_rate,
            wd_exempt_A=wd_exempt_A,
            **dd,
        )
        self.directions, self.inflation = directions, inflation
        self.scan_order = "spatial_first" if num_frames is None else str(scan_order)  # an image has no other
        times = None if num_frames is None else torch.empty(1, patch_embed.num_tubelets, embed_dim, **dd)
        self.temporal_pos_embedding = None if times is None else nn.Parameter(times)
        self.init_weights(needs_reset=False)

    @torch.jit.ignore
    def init_weights(self, needs_reset: bool = True) -> None:
        """Draw the initial weights; see :meth:`vim.layers.TimmModel.init_weights`."""
        super().init_weights(needs_reset)
        for module in self.modules():
            if isinstance(module, MambaMixer) and module.init == "published":
                _init_projections(module)

    def _init_embedding(self) -> None:
        self.patch_embed.proj.reset_parameters()
        trunc_normal_(self.pos_embed, std=0.02)
        for zero in (self.cls_token, self.temporal_pos_embedding):
            if zero is not None:
                nn.init.zeros_(zero)

    def rename_weights(self, weights: dict[str, object]) -> dict[str, object]:
        """Take the image part of a model of images and text, without what only distillation and pre-training use.

        Files of masked pre-training call the last norm `norm`.
        """
        if any(key.startswith(IMAGES_AND_TEXT) for key in weights):
            weights = {key: value for key, value in weights.items() if key.startswith(IMAGES_AND_TEXT)}
        weights = {key.removeprefix(IMAGES_AND_TEXT): value for key, value in weights.items()}
        weights = {key: value for key, value in weights.items() if not key.startswith(UNUSED)}
        if "norm.weight" in weights and "norm_f.weight" not in weights:
            weights["norm_f.weight"] = weights.pop("norm.weight")
        return weights

    def adapt_weights(self, weights: dict[str, Tensor], img_size: tuple[int, int]) -> None:
        """Make clip weights out of image weights, and resize the tables of positions and times, in place."""
        super().adapt_weights(weights, img_size)
        times, conv = self.temporal_pos_embedding, weights.get(FIRST_CONV)
        if times is None:
            return
        if conv is not None and conv.dim() == 4:
            weights[FIRST_CONV] = self._inflate(conv)
            weights.setdefault(TIMES, torch.zeros_like(times, device="cpu"))
        table = find_table(weights, TIMES, self.embed_dim)
        if table is not None:
            weights[TIMES] = resize_temporal_table(table, self.patch_embed.num_tubelets)

    def _inflate(self, conv: Tensor) -> Tensor:
        """Make a convolution over tubelets, (d, c, t, p, p), out of one over patches, (d, c, p, p)."""
        t = self.patch_embed.tubelet_size
        if self.inflation == "average":
            return conv.unsqueeze(2).repeat(1, 1, t, 1, 1) / t
        inflated = conv.new_zeros(*conv.shape[:2], t, *conv.shape[2:])
        inflated[:, :, t // 2] = conv
        return inflated

    def set_input_size(self, img_size: int | tuple[int, int] | None = None, *, num_frames: int | None = None) -> None:
        """Take clips of another size or length from now on, with the position tables resized.

        Raises:
            ValueError: a patch does not fit in; the frames are no multiple of the tubelets; or `num_frames` is given to
                a model of images.
        """
        temporal = self.temporal_pos_embedding
        if num_frames is not None and temporal is None:
            raise ValueError(f"a model of images takes no num_frames, got {num_frames}: build one with num_frames")
        if img_size is not None:
            super().set_input_size(img_size)
        if num_frames is not None and temporal is not None:
            self.patch_embed.set_input_size(self.img_size, num_frames)
            table = resize_temporal_table(temporal.detach(), self.patch_embed.num_tubelets)
            self.temporal_pos_embedding = nn.Parameter(table, temporal.requires_grad)
            update_model_args(self, num_frames=num_frames)  # timm's exports record it

    def _positions(self, grid: list[int]) -> Tensor:
        """Return the positions of all tokens, (1, l, d), for a grid of patches, (t, rows, columns)."""
        table = self._spatial_positions(grid)
        temporal: Tensor | None = self.temporal_pos_embedding
        if temporal is None:
            return table
        if self.dynamic_img_size:
            temporal = resize_temporal_table(temporal, grid[0])
        expected = f"{self.num_frames} frames expected: set num_frames, or dynamic_img_size=True"
        torch._assert(grid[0] == temporal.shape[1], expected)
        patches, token = split_class_tokens(table, self.class_token)
        patches = patches.unsqueeze(1) + temporal.unsqueeze(2)  # (1, t, rows * columns, d)
        return insert_class_tokens(self._flatten(patches), token, self.class_token)

    def _flatten(self, patches: Tensor) -> Tensor:
        """Put patches (b, t, ..., d) in a sequence (b, l, d)."""
        if self.scan_order == "temporal_first":
            return patches.flatten(2, -2).transpose(1, 2).flatten(1, 2)
        return patches.flatten(1, -2)

    def _unflatten(self, patches: Tensor, grid: list[int]) -> Tensor:
        """Undo :meth:`_flatten`."""
        if self.scan_order == "temporal_first":
            return patches.unflatten(1, (-1, grid[0])).transpose(1, 2).unflatten(2, grid[1:])
        return patches.unflatten(1, grid)

    def _paths(self, grid: list[int], device: torch.device) -> Tensor | None:
        """Return the orders in which the mixers scan the tokens, (2 or 4, l); None for the order of the sequence."""
        if self.scan_order == "spatiotemporal_v1" or self.scan_order == "spatiotemporal_v2":
            both = self.scan_order == "spatiotemporal_v2"
            return spatiotemporal_paths(grid[0], grid[1] * grid[2], self.num_prefix_tokens, both, device)
        return None

    @torch.jit.ignore
    def forward_padded(self, clips: Tensor, lengths: Tensor) -> Tensor:
        """Map clips of several lengths to logits (b, num_classes), equal to the logits of each clip alone.

        Args:
            clips: (b, c, t, h, w); the frames after a clip's last one are not used.
            lengths: (b,) the frames of each clip, multiples of `tubelet_size`.

        Raises:
            ValueError: the model takes clips of one length only, does not pool, or a length does not fit.
        """
        if self.temporal_pos_embedding is None or not self.dynamic_img_size or not self.global_pool:
            raise ValueError("lengths need a model of clips with dynamic_img_size=True and a global_pool")
        step, most = self.patch_embed.tubelet_size, clips.shape[2]
        if lengths.shape != clips.shape[:1] or not all(0 < n <= most and n % step == 0 for n in lengths.tolist()):
            raise ValueError(
                f"lengths must be {len(clips)} multiples of {step} from {step} to {most}, got {lengths.tolist()}"
            )
        x, mask, grid = self._embed_padded(clips, lengths // step)
        paths = self._paths(grid, x.device)
        if paths is not None:
            paths = paths_of_padded(paths, mask)
        for layer in self.layers:
            x = checkpoint(layer, x, paths, mask) if self.grad_checkpointing else layer(x, paths, mask)
        pooled = global_pool_naflex(self._norm(x), mask[:, 1:], self.global_pool, num_prefix_tokens=1)
        return self.head(self.head_drop(pooled))

    def _embed_padded(self, clips: Tensor, counts: Tensor) -> tuple[Tensor, Tensor, list[int]]:
        """Return the residual stream (b, l, d) with the padding last, where it is (b, l), and the grid of patches.

        Args:
            counts: (b,) the tubelets of each clip.
        """
        patches = self.patch_embed(clips)  # (b, t, rows, columns, d)
        grid = list(patches.shape[1:-1])
        counted = torch.arange(grid[0], device=clips.device) < counts.to(clips.device).unsqueeze(1)  # (b, t)
        mask = counted.view(*counted.shape, 1, 1).expand(patches.shape[:-1]).unsqueeze(-1)
        # each clip has the table of times of its own length, as alone
        temporal, table = cast(Tensor, self.temporal_pos_embedding), self._spatial_positions(grid)
        times = [resize_temporal_table(temporal, n)[0] for n in counts.tolist()]
        rows, token = split_class_tokens(table, self.class_token)
        positions = rows.unsqueeze(1) + pad_sequence(times, batch_first=True).unsqueeze(2)
        x, mask = self._flatten(patches), self._flatten(mask)
        x = x + self._flatten(F.pad(positions, (0, 0, 0, 0, 0, grid[0] - positions.shape[1])))
        x, mask = padding_last(x, mask.squeeze(-1))
        assert self.cls_token is not None  # class_token is "first"
        x = insert_class_tokens(x, (self.cls_token + token).expand(len(x), -1, -1), self.class_token)
        x = self.pos_drop(x)
        return x.to(residual_dtype(x)), F.pad(mask, (1, 0), value=True), grid

    @torch.jit.ignore
    def forward_visible(self, clip: Tensor, visible: Tensor) -> Tensor:
        """Map the visible patches of a clip, and the class token, to normed tokens (b, 1 + v, d).

        Args:
            clip: (b, c, t, h, w).
            visible: (b, v) indices of the visible patches in the sequence of all patches.

        Raises:
            ValueError: the scan is not spatial-first.
        """
        if self.scan_order != "spatial_first":
            raise ValueError(f"patches can be left out only with scan_order='spatial_first', got {self.scan_order!r}")
        x, _ = self._embed(clip)
        places = torch.cat([torch.zeros_like(visible[:, :1]), 1 + visible], dim=1)
        x = x.gather(1, places.unsqueeze(2).expand(-1, -1, x.shape[2]))
        for layer in self.layers:
            x = checkpoint(layer, x) if self.grad_checkpointing else layer(x)
        return self._norm(x)

    @torch.jit.ignore
    @torch.no_grad()
    def stream(self, frames: Iterable[Tensor]) -> Iterator[Tensor]:
        """Process a clip piece by piece, each as soon as it arrives, in constant memory. For evaluation mode.

        Args:
            frames: single frames (b, c, h, w), or pieces (b, c, t, h, w) of any multiples of `tubelet_size`.

        Yields:
            for each piece its normed tokens (b, l, d), equal to those of :meth:`forward_features` on the whole clip.

        Raises:
            ValueError: the model is in training mode, or scans backwards or temporal-first, or is for images; or the
                frames are more than `num_frames`.
        """
        if self.training:
            raise ValueError("a stream needs the model in evaluation mode: call eval() before")
        temporal = self.temporal_pos_embedding
        if self.directions != "none" or self.scan_order != "spatial_first" or temporal is None:
            raise ValueError(
                "a stream needs a model of clips with directions='none' and scan_order='spatial_first', "
                f"got {self.directions!r}, {self.scan_order!r} and num_frames={self.num_frames}"
            )
        states: list[MixerState | None] = [None] * len(self.layers)
        start = 0
        for clip in frames:
            # embed the piece, at its place in time
            patches = self.patch_embed(clip)  # (b, t, rows, columns, d)
            b, t = patches.shape[:2]
            if start + t > temporal.shape[1]:
                raise ValueError(
                    f"the stream is longer than num_frames={self.num_frames}: "
                    "build the model with more, or set_input_size(num_frames=...)"
                )
            rows, token = split_class_tokens(self._spatial_positions(patches.shape[1:-1]), self.class_token)
            rows = rows.unsqueeze(1) + temporal[:, start : start + t].unsqueeze(2)
            x = patches.flatten(1, -2) + rows.flatten(1, 2)
            l = x.shape[1]
            if start == 0:
                assert self.cls_token is not None  # class_token is "first"
                x = torch.cat([(self.cls_token + token).expand(b, -1, -1), x], dim=1)
            # go on from the states that the pieces before have left
            x = x.to(residual_dtype(x))
            for i, layer in enumerate(self.layers):
                x, states[i] = cast(MambaBlock, layer).step(x, states[i])
            yield self._norm(x)[:, -l:]
            start += t


def _init_projections(mixer: MambaMixer) -> None:
    """Draw projections as the published code does: as a transformer's, which zeroes the bias that the steps need."""
    for name, module in mixer.named_children():
        if isinstance(module, nn.Linear) and name != "out_proj":
            trunc_normal_(module.weight, std=0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)


# The authors' files, videomamba_ROW_COLUMN.pth, and their top-1 in %, as published: in each table the columns, then the
# rows. The authors' list links other files for two masked models of 16 frames; these are the names it means. Files of
# pre-training have no head and no figure.
_TABLES: dict[tuple[str, ...], dict[str, tuple[float | None, ...]]] = {
    ("res224", "res224to448", "res224to448to576"): {
        "t16_in1k": (76.9, 79.3, 79.6),
        "s16_in1k": (81.2, 83.2, 83.5),
        "m16_in1k": (82.8, 83.8, 84.0),
        "b16_in1k": (82.7,),
    },
    ("f8_res224", "f16_res224", "f32_res224", "f64_res224", "f64_res224to384"): {
        "t16_k400": (76.9, 78.1, 78.8, 79.6, 80.3),
        "s16_k400": (79.3, 80.8, 81.5, 81.8, 82.7),
        "m16_k400": (80.6, 81.9, 82.4, 82.8, 83.3),
        "m16_k400_mask_ft": (82.0, 83.4, 83.9, 84.3, 85.0),
    },
    ("f8_res224", "f16_res224", "f16_res224to288"): {
        "t16_ssv2": (65.1, 66.0, 66.2),
        "s16_ssv2": (66.6, 67.7, 68.1),
        "m16_ssv2": (67.3, 68.3, 68.4),
        "m16_ssv2_mask_ft": (70.2, 71.0, 71.4),
    },
    ("f32_res224", "f64_res224"): {
        "t16_breakfast": (94.3, 94.3),
        "s16_breakfast": (95.3, 97.4),
        "m16_breakfast": (94.8, 95.8),
        "m16_breakfast_mask_ft": (97.9, 96.9),  # the file of 64 frames has times for 32, which are resized
        "t16_coin": (86.2, 87.0),
        "s16_coin": (88.4, 88.7),
        "m16_coin": (88.3, 89.5),
        "m16_coin_mask_ft": (89.6, 90.4),
    },
    ("f8_res224",): dict.fromkeys(("m16_k400_mask_pt", "m16_ssv2_mask_pt", "m16_5M", "m16_17M", "m16_25M"), (None,)),
}
PUBLISHED = {
    f"{row}_{column}": top1
    for columns, rows in _TABLES.items()
    for row, figures in rows.items()
    for column, top1 in zip(columns, figures, strict=False)
}
NAME = re.compile(r"(.)16_([^_]+)_(?:mask_(ft|pt)_)?(?:f(\d+)_)?res(?:\d+to)*(\d+)")
SIZES = {"t": "tiny", "s": "small", "m": "middle", "b": "base"}
NUM_CLASSES = {"in1k": 1000, "k400": 400, "ssv2": 174, "breakfast": 10, "coin": 180}
NUM_FRAMES = (8, 16, 32, 64)
_CLIPS = {"crop_pct": 1.0, "interpolation": "bilinear"}
_facts = partial(
    tag_facts,
    fixed_input_size=True,
    paper_ids="arXiv:2403.06977",
    origin_url="https://github.com/OpenGVLab/VideoMamba",
)


def _published() -> dict[str, dict[str, object]]:
    """Return the facts of a tag for each of the authors' files, and for each model of clips that starts from images."""
    cfgs = {}
    for file, top1 in PUBLISHED.items():
        size, data, mask, frames, pixels = cast(re.Match[str], NAME.fullmatch(file)).groups()
        model = f"videomamba_{SIZES[size]}" + (f"_f{frames}" if frames else "")
        before = {None: "", "ft": "mask_", "pt": "mask_pt_"}[mask]
        tag = f"opengvlab_{before}{data.lower()}" + (f"_{pixels}" if pixels != "224" else "")
        views = f" with 3 crops of each of {10 if data == 'coin' else 4} clips" if frames else ""
        cfgs[f"{model}.{tag}"] = _facts(
            hf_hub_id="OpenGVLab/VideoMamba",
            hf_hub_filename=f"videomamba_{file}.pth",
            license="apache-2.0",
            num_classes=NUM_CLASSES[data] if top1 else 0,
            input_size=(3, int(pixels), int(pixels)),
            notes=(f"{top1} % top-1{views}, as published" if top1 else "pre-training only: no head",),
            **(_CLIPS if frames else {}),
        )
    for size in ("tiny", "small", "middle"):
        for number in NUM_FRAMES:  # the weights are of images, but videos are evaluated
            cfgs[f"videomamba_{size}_f{number}.opengvlab_in1k"] = cfgs[f"videomamba_{size}.opengvlab_in1k"] | _CLIPS
    return cfgs


default_cfgs = generate_default_cfgs({**_published(), "test_videomamba.untrained": _facts(input_size=(3, 64, 64))})


def _register(letter: str, millions: int, frames: int | None, **architecture: int) -> None:
    """Register the variant of a size for images, or for clips of so many frames."""
    size = SIZES[letter]
    name = f"videomamba_{size}" + (f"_f{frames}" if frames else "")
    inputs, data, file = (
        (f"clips of {frames} frames", "Kinetics-400", f"{letter}16_k400_f{frames}_res224")
        if frames
        else ("images", "ImageNet-1k", f"{letter}16_in1k_res224")
    )
    doc = f"VideoMamba-{size.title()} on {inputs}, {millions} M parameters, {PUBLISHED[file]} % {data} top-1 published."
    register_variant(VideoMamba, name, doc, num_frames=frames, **architecture)


for _frames in (None, *NUM_FRAMES):
    _register("t", 7, _frames, embed_dim=192)
    _register("s", 26, _frames, embed_dim=384)
    _register("m", 74, _frames, embed_dim=576, depth=32)
_register("b", 98, None, embed_dim=768)


@register_model
def test_videomamba(pretrained: bool = False, **options: object) -> VideoMamba:
    """A VideoMamba for tests, 0.2 M parameters; for images, or with `num_frames` for clips."""
    return create(VideoMamba, "test_videomamba", pretrained, options, embed_dim=64, depth=3)
