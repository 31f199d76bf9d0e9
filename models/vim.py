"""Vim: bidirectional Mamba over image patches.

Paper: Vision Mamba: Efficient Visual Representation Learning with Bidirectional State Space Model,
https://arxiv.org/abs/2401.09417. Published code and weights: https://github.com/hustvl/Vim.
"""

from typing import Any, Literal, cast

import torch
from timm.layers import calculate_drop_path_rates, get_device_dtype, global_pool_nlc, lecun_normal_, trunc_normal_
from timm.models import build_model_with_cfg, checkpoint, generate_default_cfgs, register_model
from timm.models._features import feature_take_indices
from timm.models._input import update_model_input_size
from torch import Tensor, nn

from vim.checkpoints import checkpoint_filter_fn, load_pretrained
from vim.layers import (
    NUM_CLASS_TOKENS,
    ClassToken,
    Directions,
    FeatureGetter,
    Init,
    MambaBlock,
    MambaMixer,
    PatchEmbed,
    RMSNorm,
    insert_class_tokens,
    residual_dtype,
    resize_position_table,
    split_class_tokens,
)

POOLS = ("", "token", "avg", "max", "avgmax")


class Vim(nn.Module):
    """Vision Mamba: patches, class tokens, `depth` Mamba blocks on a float32 residual stream, a linear head.

    Args:
        img_size: height and width in pixels.
        stride: pixels between neighbouring patches; below `patch_size` they overlap (the paper's fine-tuned models).
        dynamic_img_size: take images of any size; the position table is resized on the way.
        class_token: where it sits in the sequence: in the middle (all published weights), first, one at both ends, or
            none.
        global_pool: "token", the class token or the mean of both; "avg", "max" or "avgmax" of the patches; "" for all
            tokens. By default "token" where there is one, else "avg".
        directions, combine, init: see :class:`vim.layers.MambaMixer`.
        wd_exempt_A: keep weight decay off `A_log`. The published recipe decays it, against its own code's marks.
    """

    def __init__(
        self,
        *,
        img_size: int | tuple[int, int] = 224,
        patch_size: int | tuple[int, int] = 16,
        stride: int | tuple[int, int] | None = None,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str | None = None,
        embed_dim: int = 192,
        depth: int = 24,
        d_state: int = 16,
        d_conv: int = 4,
        expand: int = 2,
        directions: Directions = "v2",
        combine: Literal["sum", "mean"] | None = None,
        class_token: ClassToken = "middle",
        dynamic_img_size: bool = False,
        drop_rate: float = 0.0,
        pos_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        init: Init = "published",
        wd_exempt_A: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if class_token not in NUM_CLASS_TOKENS:
            raise ValueError(f"class_token must be one of {tuple(NUM_CLASS_TOKENS)}, got {class_token!r}")
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.in_chans, self.num_classes, self.embed_dim = in_chans, num_classes, embed_dim
        self.num_features = self.head_hidden_size = embed_dim
        self.class_token, self.num_prefix_tokens = str(class_token), NUM_CLASS_TOKENS[class_token]
        self.dynamic_img_size, self.wd_exempt_A = dynamic_img_size, wd_exempt_A
        self.grad_checkpointing = False
        self._set_pool(("token" if self.num_prefix_tokens else "avg") if global_pool is None else global_pool)

        self.patch_embed = PatchEmbed(
            img_size=img_size,
            patch_size=patch_size,
            stride=stride,
            in_chans=in_chans,
            embed_dim=embed_dim,
            dynamic_img_size=dynamic_img_size,
            **dd,
        )
        ends = class_token == "ends"
        self.cls_token = nn.Parameter(torch.empty(1, 1, embed_dim, **dd)) if self.num_prefix_tokens == 1 else None
        self.cls_token_head = nn.Parameter(torch.empty(1, 1, embed_dim, **dd)) if ends else None
        self.cls_token_tail = nn.Parameter(torch.empty(1, 1, embed_dim, **dd)) if ends else None
        num_tokens = self.patch_embed.num_patches + self.num_prefix_tokens
        self.pos_embed = nn.Parameter(torch.empty(1, num_tokens, embed_dim, **dd))
        self.pos_drop = nn.Dropout(pos_drop_rate)
        self.layers = nn.ModuleList(
            MambaBlock(
                RMSNorm(embed_dim, **dd),
                MambaMixer(
                    embed_dim,
                    d_state=d_state,
                    d_conv=d_conv,
                    expand=expand,
                    directions=directions,
                    combine=combine,
                    init=init,
                    depth=depth,
                    **dd,
                ),
                drop_path=rate,
            )
            for rate in cast(list[float], calculate_drop_path_rates(drop_path_rate, depth))
        )
        self.norm_f: nn.Module = RMSNorm(embed_dim, **dd)
        self.head_drop = nn.Dropout(drop_rate)
        self.head = nn.Linear(embed_dim, num_classes, **dd) if num_classes > 0 else nn.Identity()
        reduction = max(self.patch_embed.stride)
        self.feature_info = [
            {"module": f"layers.{i}", "num_chs": embed_dim, "reduction": reduction} for i in range(depth)
        ]
        self.init_weights(needs_reset=False)

    @torch.jit.ignore
    def init_weights(self, needs_reset: bool = True) -> None:
        """Draw every parameter as the published code does.

        Args:
            needs_reset: also those of the blocks; they have drawn their own when just constructed.
        """
        for token in (self.cls_token, self.cls_token_head, self.cls_token_tail, self.pos_embed):
            if token is not None:
                trunc_normal_(token, std=0.02)
        lecun_normal_(self.patch_embed.proj.weight)
        nn.init.constant_(cast(Tensor, self.patch_embed.proj.bias), 0)
        if isinstance(self.head, nn.Linear):
            trunc_normal_(self.head.weight, std=0.02)
            nn.init.zeros_(self.head.bias)
        if needs_reset:
            for module in self.modules():
                if isinstance(module, MambaMixer | RMSNorm):
                    module.reset_parameters()

    @torch.jit.ignore
    def load_pretrained(self, path: str) -> None:
        """Load a published checkpoint from a file; see :func:`vim.checkpoints.load_pretrained`."""
        load_pretrained(self, path)

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
            "stem": r"^cls_token|^pos_embed|^patch_embed",
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
        self.patch_embed.set_input_size(img_size)
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

    def _embed(self, image: Tensor) -> Tensor:
        """Map (b, c, h, w) to the residual stream (b, l, d) before the first block."""
        patches = self.patch_embed(image)  # (b, rows, columns, d)
        table: Tensor = self.pos_embed
        if self.dynamic_img_size:
            grid = (patches.shape[1], patches.shape[2])
            table = resize_position_table(table, self.patch_embed.grid_size, grid, self.class_token)
        x = patches.flatten(1, 2)
        b = x.shape[0]
        if self.cls_token is not None:
            x = insert_class_tokens(x, self.cls_token.expand(b, -1, -1), self.class_token)
        elif self.cls_token_head is not None and self.cls_token_tail is not None:
            tokens = torch.cat([self.cls_token_head, self.cls_token_tail], dim=1)
            x = insert_class_tokens(x, tokens.expand(b, -1, -1), self.class_token)
        x = self.pos_drop(x + table)
        return x.to(residual_dtype(x))

    def forward_features(self, image: Tensor) -> Tensor:
        """Map (b, c, h, w) to normed tokens (b, l, d), the class tokens in their places."""
        x = self._embed(image)
        for layer in self.layers:
            if self.grad_checkpointing and not torch.jit.is_scripting():
                x = checkpoint(layer, x)
            else:
                x = layer(x)
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
        """Map (b, c, h, w) to logits (b, num_classes)."""
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
            x: (b, c, h, w).
            indices: of the blocks; the last n for an int, all for None.
            return_prefix_tokens: with each, also its class tokens.
            norm: apply the final norm to what leaves the last block; as in training, it follows no other.
            stop_early: leave out the blocks after the last one wanted.
            output_fmt: "NCHW" for (b, d, rows, columns), "NLC" for (b, l, d).
            intermediates_only: leave out the final features.
            output_dict: a dict of `image_features`, `image_intermediates`, `image_intermediates_prefix`.
        """
        assert output_fmt in ("NCHW", "NLC"), f"output_fmt must be NCHW or NLC, got {output_fmt}"
        take_indices, max_index = feature_take_indices(len(self.layers), indices)
        b, _, height, width = x.shape
        x = self._embed(x)
        if torch.jit.is_scripting() or not stop_early:  # TorchScript slices no ModuleList
            layers = self.layers
        else:
            layers = self.layers[: max_index + 1]
        intermediates, prefix_tokens = [], []
        for i, layer in enumerate(layers):
            if self.grad_checkpointing and not torch.jit.is_scripting():
                x = checkpoint(layer, x)
            else:
                x = layer(x)
            if i in take_indices:
                taken = self._norm(x) if norm and i == len(self.layers) - 1 else x.to(self.pos_embed.dtype)
                patches, class_tokens = split_class_tokens(taken, self.class_token)
                if output_fmt == "NCHW":
                    rows, columns = self.patch_embed.feat_size((height, width))
                    patches = patches.reshape(b, rows, columns, -1).permute(0, 3, 1, 2).contiguous()
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
        "paper_ids": "arXiv:2401.09417",
        "origin_url": "https://github.com/hustvl/Vim",
        **kwargs,
    }


def _published(repository: str, filename: str, top1: float, top5: float) -> dict[str, Any]:
    """The authors' weights, with the accuracies they report for ImageNet-1k's validation images."""
    return _cfg(
        hf_hub_id=f"hustvl/{repository}",
        hf_hub_filename=filename,
        license="apache-2.0",
        notes=(
            f"{top1} % top-1, {top5} % top-5, as published",
            "The model card's header says apache-2.0, its text 'Non-commercial license': ask the authors.",
        ),
    )


default_cfgs = generate_default_cfgs(
    {
        "vim_nano.untrained": _cfg(input_size=(3, 32, 32)),
        "vim_tiny.hustvl_in1k": _published("Vim-tiny-midclstok", "vim_t_midclstok_76p1acc.pth", 76.1, 93.0),
        "vim_tiny_stride8.hustvl_in1k": _published("Vim-tiny-midclstok", "vim_t_midclstok_ft_78p3acc.pth", 78.3, 94.2),
        "vim_small.hustvl_in1k": _published("Vim-small-midclstok", "vim_s_midclstok_80p5acc.pth", 80.5, 95.1),
        "vim_small_stride8.hustvl_in1k": _published(
            "Vim-small-midclstok", "vim_s_midclstok_ft_81p6acc.pth", 81.6, 95.4
        ),
        "vim_base.hustvl_in1k": _published("Vim-base-midclstok", "vim_b_midclstok_81p9acc.pth", 81.9, 95.8),
        "test_vim.untrained": _cfg(input_size=(3, 64, 64)),
    }
)


def _create_vim(
    variant: str, pretrained: bool, pretrained_cfg_overlay: dict[str, Any] | None = None, **kwargs: Any
) -> Vim:
    if kwargs.get("features_only"):  # whatever head the weights have, it is not wanted
        kwargs.setdefault("num_classes", 0)
    return build_model_with_cfg(
        Vim,
        variant,
        pretrained,
        # files go through load_pretrained: timm would take the running average where there is one
        pretrained_cfg_overlay={"custom_load": "hf", **(pretrained_cfg_overlay or {})},
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg={"out_indices": 3, "feature_cls": FeatureGetter},
        **kwargs,
    )


@register_model
def vim_nano(pretrained: bool = False, **kwargs: Any) -> Vim:
    """Vim-Nano, 0.3 M parameters, for small images: 32 pixels in patches of 4."""
    return _create_vim("vim_nano", pretrained, **{"patch_size": 4, "embed_dim": 64, "depth": 6, **kwargs})


@register_model
def vim_tiny(pretrained: bool = False, **kwargs: Any) -> Vim:
    """Vim-Tiny, 7 M parameters, 76.1 % ImageNet-1k top-1 published."""
    return _create_vim("vim_tiny", pretrained, **{"embed_dim": 192, **kwargs})


@register_model
def vim_tiny_stride8(pretrained: bool = False, **kwargs: Any) -> Vim:
    """Vim-Tiny on overlapping patches, 730 tokens, 78.3 % ImageNet-1k top-1 published."""
    return _create_vim("vim_tiny_stride8", pretrained, **{"embed_dim": 192, "stride": 8, **kwargs})


@register_model
def vim_small(pretrained: bool = False, **kwargs: Any) -> Vim:
    """Vim-Small, 26 M parameters, 80.5 % ImageNet-1k top-1 published."""
    return _create_vim("vim_small", pretrained, **{"embed_dim": 384, **kwargs})


@register_model
def vim_small_stride8(pretrained: bool = False, **kwargs: Any) -> Vim:
    """Vim-Small on overlapping patches, 730 tokens, 81.6 % ImageNet-1k top-1 published."""
    return _create_vim("vim_small_stride8", pretrained, **{"embed_dim": 384, "stride": 8, **kwargs})


@register_model
def vim_base(pretrained: bool = False, **kwargs: Any) -> Vim:
    """Vim-Base, 98 M parameters, 81.9 % ImageNet-1k top-1 published."""
    return _create_vim("vim_base", pretrained, **{"embed_dim": 768, **kwargs})


@register_model
def test_vim(pretrained: bool = False, **kwargs: Any) -> Vim:
    """A Vim for tests, 0.2 M parameters."""
    return _create_vim("test_vim", pretrained, **{"embed_dim": 64, "depth": 3, **kwargs})
