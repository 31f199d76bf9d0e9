"""One grid of tokens through a stack of Mamba blocks: what Vim and VideoMamba share."""

import inspect
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal, TypedDict, cast, get_args

import torch
from timm.layers import calculate_drop_path_rates, global_pool_nlc, lecun_normal_, to_2tuple, trunc_normal_
from timm.models import checkpoint
from torch import Tensor, nn

from .attention import AttentionMixer
from .block import MambaBlock
from .checks import check_choice, check_counts
from .contract import TimmModel, feature_take_indices, update_model_input_size
from .factory import Factory
from .hippo import Spectrum
from .lti import LTIKind, LTIMixer
from .mamba import Init, MambaMixer
from .mamba2 import Mamba2Mixer
from .mixer import Directions
from .moe import NOT_DECAYED_EXPERTS, ExpertBlock, MoEOptions, expert_blocks
from .norm import RMSNorm, residual_dtype
from .patch_embed import PatchEmbed
from .position import (
    NUM_CLASS_TOKENS,
    ClassToken,
    find_table,
    insert_class_tokens,
    resize_position_table,
    split_class_tokens,
)

torch.fx.wrap("residual_dtype")  # for torch.fx.symbolic_trace, which wraps a name in the file that calls it
EMBEDDING = ("cls_token", "cls_token_head", "cls_token_tail", "pos_embed", "pos_embed_cls", "temporal_pos_embedding")


MixerName = Literal["s6", "ssd", "s4d", "s4", "dss", "s5", "lssl", "attention"]
MIXERS: dict[MixerName, Callable[..., nn.Module]] = {
    "s6": MambaMixer,
    "ssd": Mamba2Mixer,
    **{kind: partial(LTIMixer, kind=kind) for kind in get_args(LTIKind)},
    "attention": AttentionMixer,
}


class MixerOptions(TypedDict, total=False):
    """Options of the mixer that a family chooses for all of its blocks.

    None is the mixer's own default.
    """

    d_state: int | None
    d_conv: int | None
    expand: int | None
    head_dim: int | None
    directions: Directions
    combine: Literal["sum", "mean"] | None
    init: Init | Spectrum | None


def _given(mixer: MixerName, options: MixerOptions, depth: int) -> dict[str, Any]:
    """Return the options that are given, and raise ValueError for one that the mixer does not have.

    A mixer whose output projection depends on the number of blocks is told it.
    """
    check_choice("mixer", mixer, tuple(MIXERS))
    given = {name: value for name, value in options.items() if value is not None}
    own = inspect.signature(MIXERS[mixer]).parameters
    for name in given.keys() - own.keys():
        raise ValueError(f"{name} must be left out with mixer={mixer!r}, got {given[name]!r}")
    return given | {"depth": depth} if "depth" in own else given


class MambaBackbone(TimmModel):
    """Patches, class tokens, `depth` Mamba blocks on a float32 residual stream, a linear head.

    A family builds the patch embedding. If its tokens are no plain grid of patches, it overrides :meth:`_positions`,
    :meth:`_flatten`, :meth:`_unflatten` and :meth:`_paths`; for other tokens than class tokens, :meth:`_insert_tokens`
    and :meth:`_split_tokens`.

    Args:
        patch_embed: maps the input to patches (b, ..., d); the dimensions in between are the grid.
        class_token: its place in the sequence.
        global_pool: "token", the class token or the mean of both; "avg", "max" or "avgmax" of the patches; "" for all
            tokens. Default: "token" for a model with a class token, otherwise "avg".
        mixer: what :data:`MIXERS` holds.
        mixer_options: its options.
        moe_every, moe_options: see :func:`vim.layers.moe.expert_blocks`.
        wd_exempt_A: keep weight decay off `A_log`.
    """

    __jit_unused_properties__ = ("aux_loss",)

    def __init__(
        self,
        *,
        patch_embed: PatchEmbed,
        class_token: ClassToken,
        in_chans: int,
        num_classes: int,
        global_pool: str | None,
        embed_dim: int,
        depth: int,
        mixer: MixerName = "s6",
        mixer_options: MixerOptions,
        moe_every: int | None = None,
        moe_options: MoEOptions | None = None,
        drop_rate: float,
        pos_drop_rate: float,
        drop_path_rate: float,
        wd_exempt_A: bool,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        given = _given(mixer, mixer_options, depth)
        check_counts(depth=depth, **{name: given[name] for name in ("d_state", "d_conv", "expand") if name in given})
        num_tokens = NUM_CLASS_TOKENS[class_token]
        super().__init__(
            in_chans=in_chans,
            num_classes=num_classes,
            num_features=embed_dim,
            num_prefix_tokens=num_tokens,
            global_pool=("token" if num_tokens else "avg") if global_pool is None else global_pool,
            not_decayed=(*EMBEDDING, *NOT_DECAYED_EXPERTS, *(("A_log", "A_b_log") if wd_exempt_A else ())),
        )
        dd: Factory = {"device": device, "dtype": dtype}
        self.class_token, self.dynamic_img_size = str(class_token), patch_embed.dynamic_img_size
        self.grad_checkpointing = False
        self.patch_embed = patch_embed
        ends = class_token == "ends"
        self.cls_token = nn.Parameter(torch.empty(1, 1, embed_dim, **dd)) if num_tokens == 1 else None
        self.cls_token_head = nn.Parameter(torch.empty(1, 1, embed_dim, **dd)) if ends else None
        self.cls_token_tail = nn.Parameter(torch.empty(1, 1, embed_dim, **dd)) if ends else None
        self.pos_embed = nn.Parameter(torch.empty(1, patch_embed.num_patches + num_tokens, embed_dim, **dd))
        self.pos_drop = nn.Dropout(pos_drop_rate)
        rates = cast(list[float], calculate_drop_path_rates(drop_path_rate, depth))
        self.layers = nn.ModuleList(
            MambaBlock(
                RMSNorm(embed_dim, **dd),
                MIXERS[mixer](embed_dim, **given, **dd),
                drop_path=rate,
                moe=moe,
            )
            for rate, moe in zip(
                rates, expert_blocks(embed_dim, rates, moe_every, moe_options or {}, **dd), strict=True
            )
        )
        self.norm_f = RMSNorm(embed_dim, **dd)
        self._add_head(drop_rate, dd)
        reduction = max(patch_embed.stride)
        self.feature_info = [
            {"module": f"layers.{i}", "num_chs": embed_dim, "reduction": reduction} for i in range(depth)
        ]

    @property
    def img_size(self) -> tuple[int, int]:
        """Height and width in pixels."""
        return self.patch_embed.img_size

    @property
    def num_frames(self) -> int | None:
        """Frames of a clip; None for a model of images."""
        return self.patch_embed.num_frames

    @property
    def aux_loss(self) -> Tensor | None:
        """What balances the experts, to be added to the loss of the batch that the model saw last in training.

        It has its weight, and is the sum over the blocks; None if there is nothing to balance.
        """
        blocks = [module for module in self.modules() if isinstance(module, ExpertBlock)]
        losses = [block.aux_loss for block in blocks if block.aux_loss is not None]
        return torch.stack(losses).sum() if losses else None

    def _init_embedding(self) -> None:
        for token in (self.cls_token, self.cls_token_head, self.cls_token_tail, self.pos_embed):
            if token is not None:
                trunc_normal_(token, std=0.02)
        lecun_normal_(self.patch_embed.proj.weight)
        nn.init.zeros_(cast(Tensor, self.patch_embed.proj.bias))

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, object]:
        """Return patterns of parameter names for layer-wise learning rates: the stem, a group a block, the norm."""
        return {
            "stem": r"^cls_token|^pos_embed|^temporal_pos_embedding|^patch_embed",
            "blocks": [(r"^layers\.(\d+)", None), (r"^norm_f", (99999,))],
        }

    def set_input_size(self, img_size: int | tuple[int, int]) -> None:
        """Take images of another size from now on, with the position table resized.

        Raises:
            ValueError: a patch does not fit in.
        """
        old_grid = self.patch_embed.grid_size
        self.patch_embed.set_input_size(img_size, self.num_frames)
        self.pos_embed = nn.Parameter(
            resize_position_table(self.pos_embed.detach(), old_grid, self.patch_embed.grid_size, self.class_token),
            requires_grad=self.pos_embed.requires_grad,
        )
        update_model_input_size(self, img_size)  # timm's exports record it

    def adapt_weights(self, weights: dict[str, Tensor], img_size: tuple[int, int]) -> None:
        """Resize the position table of other weights to this model's grid, in place."""
        table = find_table(weights, "pos_embed", self.embed_dim)
        if table is None:
            return
        count = table.shape[1] - NUM_CLASS_TOKENS[self.class_token]
        side = math.isqrt(max(count, 0))
        # the grid of the weights' own images; failing that, this model's; failing that, a square
        for grid in (self.patch_embed.feat_size(img_size), self.patch_embed.grid_size, (side, side)):
            if grid[0] * grid[1] == count > 0:
                new_grid = self.patch_embed.grid_size
                weights["pos_embed"] = resize_position_table(table, grid, new_grid, self.class_token)
                return

    def _positions(self, grid: list[int]) -> Tensor:
        """Return the positions of all tokens, (1, l, d), for a grid of patches."""
        return self._spatial_positions(grid)

    def _spatial_positions(self, grid: list[int]) -> Tensor:
        """Return the positions of one image's tokens, (1, l, d)."""
        if not self.dynamic_img_size:
            return self.pos_embed
        size = (grid[-2], grid[-1])
        return resize_position_table(self.pos_embed, self.patch_embed.grid_size, size, self.class_token)

    def _flatten(self, patches: Tensor) -> Tensor:
        """Put patches (b, ..., d) in a sequence (b, l, d)."""
        return patches.flatten(1, -2)

    def _unflatten(self, patches: Tensor, grid: list[int]) -> Tensor:
        """Undo :meth:`_flatten`."""
        return patches.unflatten(1, grid)

    def _paths(self, grid: list[int], device: torch.device) -> Tensor | None:
        """Return the orders in which the mixers scan the tokens; None for the order of the sequence."""
        return None

    @torch.jit.ignore
    def tokens_to_map(self, tokens: Tensor, input_size: int | Sequence[int] | None = None) -> Tensor:
        """Map tokens (b, l, d) to (b, d, rows, columns); of clips to (b, d, t, rows, columns)."""
        embed, size = self.patch_embed, to_2tuple(self.img_size if input_size is None else input_size)
        grid = list(embed.feat_size((size[-2], size[-1])))
        if embed.num_frames is not None:
            frames = embed.num_frames if input_size is None else size[0] if len(size) == 3 else 1
            grid = [frames // embed.tubelet_size, *grid]
        patches, _ = self._split_tokens(tokens)
        if tokens.dim() != 3 or patches.shape[1] != math.prod(grid):
            count = f"{math.prod(grid)} patches and {self.num_prefix_tokens} class tokens"
            raise ValueError(f"{count} (b, l, d) expected for this input_size, got {tuple(tokens.shape)}")
        return self._unflatten(patches, grid).movedim(-1, 1)

    def _embed(self, image: Tensor) -> tuple[Tensor, list[int]]:
        """Map the input to the residual stream (b, l, d) before the first block; also return the grid of patches."""
        patches = self.patch_embed(image)  # (b, ..., d)
        grid = patches.shape[1:-1]
        x = self._insert_tokens(self._flatten(patches))
        x = self.pos_drop(x + self._positions(grid))
        return x.to(residual_dtype(x)), grid

    def _insert_tokens(self, patches: Tensor) -> Tensor:
        """Put the class tokens into a sequence of patches (b, l, d)."""
        b = patches.shape[0]
        if self.cls_token is not None:
            return insert_class_tokens(patches, self.cls_token.expand(b, -1, -1), self.class_token)
        if self.cls_token_head is not None and self.cls_token_tail is not None:
            tokens = torch.cat([self.cls_token_head, self.cls_token_tail], dim=1)
            return insert_class_tokens(patches, tokens.expand(b, -1, -1), self.class_token)
        return patches

    def _split_tokens(self, sequence: Tensor) -> tuple[Tensor, Tensor]:
        """Undo :meth:`_insert_tokens`: return the patches (b, l, d) and the class tokens (b, m, d)."""
        return split_class_tokens(sequence, self.class_token)

    def forward_features(self, image: Tensor) -> Tensor:
        """Map the input to normed tokens (b, l, d), with the class tokens in their places."""
        x, grid = self._embed(image)
        paths = self._paths(grid, x.device)
        for layer in self.layers:
            if self.grad_checkpointing and not torch.jit.is_scripting():
                x = checkpoint(layer, x, paths)
            else:
                x = layer(x, paths)
        return self._norm(x)

    def _norm(self, x: Tensor) -> Tensor:
        return self.norm_f(x).to(self.pos_embed.dtype)

    def pool(self, x: Tensor) -> Tensor:
        """Map tokens (b, l, d) to (b, d), or to themselves for `global_pool` ""."""
        if self.global_pool == "":
            return x
        patches, class_tokens = self._split_tokens(x)
        if self.global_pool == "token":
            return class_tokens.mean(dim=1)
        return global_pool_nlc(patches, pool_type=self.global_pool, num_prefix_tokens=0)

    def forward(self, image: Tensor) -> Tensor:
        """Map the input to logits (b, num_classes)."""
        # defined here since fx leaves untraced only functions that the file of `forward` imports: residual_dtype
        return self.forward_head(self.forward_features(image))

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
        output_dict: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]] | dict[str, Any]:
        """Return the patches after chosen blocks, and the final features.

        Args:
            x: (b, c, h, w), or (b, c, t, h, w) for a video model.
            indices: of the blocks; the last n for an int, all for None.
            return_prefix_tokens: pair each with its class tokens.
            norm: apply the final norm to the output of the last block. As in training, it follows no other.
            stop_early: leave out the blocks after the last one wanted.
            output_fmt: "NCHW" for (b, d, rows, columns), of a clip (b, d, t, rows, columns); "NLC" for (b, l, d).
            intermediates_only: leave out the final features.
            output_dict: return a dict of `image_features`, `image_intermediates`, `image_intermediates_prefix`.
        """
        assert output_fmt in ("NCHW", "NLC"), f"output_fmt must be NCHW or NLC, got {output_fmt}"
        take_indices, last = feature_take_indices(len(self.layers), indices)
        x, grid = self._embed(x)
        paths = self._paths(grid, x.device)

        # run the blocks and keep the outputs wanted
        if torch.jit.is_scripting() or not stop_early:  # TorchScript slices no ModuleList
            layers = self.layers
        else:
            layers = self.layers[: last + 1]
        intermediates, prefix_tokens = [], []
        for i, layer in enumerate(layers):
            if self.grad_checkpointing and not torch.jit.is_scripting():
                x = checkpoint(layer, x, paths)
            else:
                x = layer(x, paths)
            if i in take_indices:
                patches, class_tokens = self._take(x, grid, norm and i == len(self.layers) - 1, output_fmt)
                intermediates.append(patches)
                prefix_tokens.append(class_tokens)

        # return them in the form asked for
        with_prefix = return_prefix_tokens and self.num_prefix_tokens > 0
        if output_dict:
            result: dict[str, Any] = {"image_intermediates": intermediates}
            if with_prefix:
                result["image_intermediates_prefix"] = prefix_tokens
            if not intermediates_only:
                result["image_features"] = self._norm(x)
            return result
        if not torch.jit.is_scripting() and with_prefix:
            intermediates = list(zip(intermediates, prefix_tokens, strict=True))  # type: ignore[arg-type]
        if intermediates_only:
            return intermediates
        return self._norm(x), intermediates

    def _take(self, x: Tensor, grid: list[int], norm: bool, output_fmt: str) -> tuple[Tensor, Tensor]:
        """Return the patches of the residual stream x, in the form asked for, and its class tokens."""
        x = self._norm(x) if norm else x.to(self.pos_embed.dtype)
        patches, class_tokens = self._split_tokens(x)
        if output_fmt == "NCHW":
            patches = self._unflatten(patches, grid).movedim(-1, 1).contiguous()
        return patches, class_tokens
