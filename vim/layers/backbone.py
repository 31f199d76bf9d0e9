"""What timm asks of a model, for the families that run tokens through a stack of Mamba blocks."""

from typing import Any, cast

import torch
from timm.layers import calculate_drop_path_rates, get_device_dtype, global_pool_nlc, trunc_normal_
from timm.models import checkpoint
from timm.models._features import feature_take_indices
from timm.models._input import update_model_input_size
from torch import Tensor, nn

from .block import MambaBlock
from .mamba import MambaMixer
from .norm import RMSNorm, residual_dtype
from .patch_embed import PatchEmbed
from .position import (
    NUM_CLASS_TOKENS,
    ClassToken,
    insert_class_tokens,
    resize_position_table,
    split_class_tokens,
)

POOLS = ("", "token", "avg", "max", "avgmax")


class MambaBackbone(nn.Module):
    """Patches, class tokens, `depth` Mamba blocks on a float32 residual stream, a linear head.

    A family builds the patch embedding and says how its other parameters start; one whose tokens are no plain grid of
    patches also overrides :meth:`_positions`, :meth:`_flatten`, :meth:`_unflatten` and :meth:`_paths`.

    Args:
        patch_embed: maps the input to patches (b, ..., d); the dimensions between are the grid.
        class_token: where it sits in the sequence.
        global_pool: "token", the class token or the mean of both; "avg", "max" or "avgmax" of the patches; "" for all
            tokens. By default "token" where there is one, else "avg".
        mixer: options for :class:`MambaMixer`.
        wd_exempt_A: keep weight decay off `A_log`.
    """

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
        mixer: dict[str, Any],
        drop_rate: float,
        pos_drop_rate: float,
        drop_path_rate: float,
        wd_exempt_A: bool,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.in_chans, self.num_classes, self.embed_dim = in_chans, num_classes, embed_dim
        self.num_features = self.head_hidden_size = embed_dim
        self.class_token, self.num_prefix_tokens = str(class_token), NUM_CLASS_TOKENS[class_token]
        self.dynamic_img_size, self.wd_exempt_A = patch_embed.dynamic_img_size, wd_exempt_A
        self.grad_checkpointing = False
        self._set_pool(("token" if self.num_prefix_tokens else "avg") if global_pool is None else global_pool)

        self.patch_embed = patch_embed
        ends = class_token == "ends"
        self.cls_token = nn.Parameter(torch.empty(1, 1, embed_dim, **dd)) if self.num_prefix_tokens == 1 else None
        self.cls_token_head = nn.Parameter(torch.empty(1, 1, embed_dim, **dd)) if ends else None
        self.cls_token_tail = nn.Parameter(torch.empty(1, 1, embed_dim, **dd)) if ends else None
        num_rows = patch_embed.num_patches + self.num_prefix_tokens
        self.pos_embed = nn.Parameter(torch.empty(1, num_rows, embed_dim, **dd))
        self.pos_drop = nn.Dropout(pos_drop_rate)
        self.layers = nn.ModuleList(
            MambaBlock(RMSNorm(embed_dim, **dd), MambaMixer(embed_dim, depth=depth, **mixer, **dd), drop_path=rate)
            for rate in cast(list[float], calculate_drop_path_rates(drop_path_rate, depth))
        )
        self.norm_f: nn.Module = RMSNorm(embed_dim, **dd)
        self.head_drop = nn.Dropout(drop_rate)
        self.head = nn.Linear(embed_dim, num_classes, **dd) if num_classes > 0 else nn.Identity()
        reduction = max(patch_embed.stride)
        self.feature_info = [
            {"module": f"layers.{i}", "num_chs": embed_dim, "reduction": reduction} for i in range(depth)
        ]

    @torch.jit.ignore
    def init_weights(self, needs_reset: bool = True) -> None:
        """Draw every parameter as the published code does.

        Args:
            needs_reset: also those of the blocks; they have drawn their own when just constructed.
        """
        self._init_embedding()
        if isinstance(self.head, nn.Linear):
            trunc_normal_(self.head.weight, std=0.02)
            nn.init.zeros_(self.head.bias)
        if needs_reset:
            for module in self.modules():
                if isinstance(module, MambaMixer | RMSNorm):
                    module.reset_parameters()

    def _init_embedding(self) -> None:
        """Draw what comes before the blocks."""
        raise NotImplementedError

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """The names of the parameters that weight decay must leave alone."""
        tokens = {name for name, _ in self.named_parameters(recurse=False)}
        states = {name for name, _ in self.named_parameters() if name.endswith(("A_log", "A_b_log"))}
        return tokens | states if self.wd_exempt_A else tokens

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Patterns of parameter names for layer-wise learning rates: the stem, a group a block, the norm."""
        return {
            "stem": r"^cls_token|^pos_embed|^temporal_pos_embedding|^patch_embed",
            "blocks": [(r"^layers\.(\d+)", None), (r"^norm_f", (99999,))],
        }

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Keep only what goes in and out of each block, and compute the rest again in the backward pass."""
        self.grad_checkpointing = enable

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
        self.head = nn.Linear(self.embed_dim, num_classes, **dd) if num_classes > 0 else nn.Identity()
        self.head.train(self.training)

    def _set_pool(self, global_pool: str) -> None:
        assert global_pool in POOLS, f"global_pool must be one of {POOLS}, got {global_pool!r}"
        assert global_pool != "token" or self.num_prefix_tokens, "global_pool='token' needs a class token"
        self.global_pool = global_pool

    def set_input_size(self, img_size: int | tuple[int, int]) -> None:
        """Take images of another size from now on, with the position table resized."""
        old_grid = self.patch_embed.grid_size
        self.patch_embed.set_input_size(img_size, self.patch_embed.num_frames)
        self.pos_embed = nn.Parameter(
            resize_position_table(self.pos_embed.detach(), old_grid, self.patch_embed.grid_size, self.class_token),
            requires_grad=self.pos_embed.requires_grad,
        )
        update_model_input_size(self, img_size)  # for timm's exports

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop the blocks after the last one wanted; on request also the norm and the head. Returns the indices."""
        take_indices, max_index = feature_take_indices(len(self.layers), indices)
        self.layers = self.layers[: max_index + 1]
        if prune_norm:
            self.norm_f = nn.Identity()
        if prune_head:
            self.reset_classifier(0, "")
        return take_indices

    def _positions(self, grid: list[int]) -> Tensor:
        """The positions of all tokens, (1, l, d), for a grid of patches."""
        return self._spatial_positions(grid)

    def _spatial_positions(self, grid: list[int]) -> Tensor:
        """The positions of an image's tokens, (1, l, d)."""
        if not self.dynamic_img_size:
            return self.pos_embed
        size = (grid[-2], grid[-1])
        return resize_position_table(self.pos_embed, self.patch_embed.grid_size, size, self.class_token)

    def _flatten(self, patches: Tensor) -> Tensor:
        """Put patches, (b, ..., d), in a sequence, (b, l, d)."""
        return patches.flatten(1, -2)

    def _unflatten(self, patches: Tensor, grid: list[int]) -> Tensor:
        """Undo :meth:`_flatten`."""
        return patches.unflatten(1, grid)

    def _paths(self, grid: list[int], device: torch.device) -> Tensor | None:
        """The orders in which the mixers scan the tokens; None where they take them as they come."""
        return None

    def _embed(self, image: Tensor) -> tuple[Tensor, list[int]]:
        """Map the input to the residual stream (b, l, d) before the first block, and the grid of patches in it."""
        patches = self.patch_embed(image)  # (b, ..., d)
        grid = patches.shape[1:-1]
        x = self._flatten(patches)
        b = x.shape[0]
        if self.cls_token is not None:
            x = insert_class_tokens(x, self.cls_token.expand(b, -1, -1), self.class_token)
        elif self.cls_token_head is not None and self.cls_token_tail is not None:
            tokens = torch.cat([self.cls_token_head, self.cls_token_tail], dim=1)
            x = insert_class_tokens(x, tokens.expand(b, -1, -1), self.class_token)
        x = self.pos_drop(x + self._positions(grid))
        return x.to(residual_dtype(x)), grid

    def forward_features(self, image: Tensor) -> Tensor:
        """Map the input to normed tokens (b, l, d), the class tokens in their places."""
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

    def pool(self, tokens: Tensor) -> Tensor:
        """Map tokens (b, l, d) to (b, d), or to themselves where `global_pool` is ""."""
        if self.global_pool == "":
            return tokens
        patches, class_tokens = split_class_tokens(tokens, self.class_token)
        if self.global_pool == "token":
            return class_tokens.mean(dim=1)
        return global_pool_nlc(patches, pool_type=self.global_pool, num_prefix_tokens=0)

    def forward_head(self, tokens: Tensor, pre_logits: bool = False) -> Tensor:
        """Map tokens (b, l, d) to logits (b, num_classes), or to the features before the head."""
        x = self.head_drop(self.pool(tokens))
        return x if pre_logits else self.head(x)

    def forward(self, image: Tensor) -> Tensor:
        """Map the input to logits (b, num_classes)."""
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
        """The patches after chosen blocks, and the final features.

        Args:
            x: (b, c, h, w), or (b, c, t, h, w) for a video model.
            indices: of the blocks; the last n for an int, all for None.
            return_prefix_tokens: with each, also its class tokens.
            norm: apply the final norm to what leaves the last block; as in training, it follows no other.
            stop_early: leave out the blocks after the last one wanted.
            output_fmt: "NCHW" for (b, d, rows, columns), of a clip (b, d, t, rows, columns); "NLC" for (b, l, d).
            intermediates_only: leave out the final features.
            output_dict: a dict of `image_features`, `image_intermediates`, `image_intermediates_prefix`.
        """
        assert output_fmt in ("NCHW", "NLC"), f"output_fmt must be NCHW or NLC, got {output_fmt}"
        take_indices, max_index = feature_take_indices(len(self.layers), indices)
        x, grid = self._embed(x)
        paths = self._paths(grid, x.device)
        if torch.jit.is_scripting() or not stop_early:  # TorchScript slices no ModuleList
            layers = self.layers
        else:
            layers = self.layers[: max_index + 1]
        intermediates, prefix_tokens = [], []
        for i, layer in enumerate(layers):
            if self.grad_checkpointing and not torch.jit.is_scripting():
                x = checkpoint(layer, x, paths)
            else:
                x = layer(x, paths)
            if i in take_indices:
                taken = self._norm(x) if norm and i == len(self.layers) - 1 else x.to(self.pos_embed.dtype)
                patches, class_tokens = split_class_tokens(taken, self.class_token)
                if output_fmt == "NCHW":
                    patches = self._unflatten(patches, grid).movedim(-1, 1).contiguous()
                intermediates.append(patches)
                prefix_tokens.append(class_tokens)

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
