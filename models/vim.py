"""Vim: bidirectional Mamba over image patches.

Paper: Vision Mamba: Efficient Visual Representation Learning with Bidirectional State Space Model,
https://arxiv.org/abs/2401.09417. Published code and weights: https://github.com/hustvl/Vim.
"""

from typing import Any, Literal, cast

import torch
from timm.layers import lecun_normal_, trunc_normal_
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn

from vim.checkpoints import checkpoint_filter_fn, load_pretrained
from vim.layers import (
    NUM_CLASS_TOKENS,
    ClassToken,
    Directions,
    FeatureGetter,
    Init,
    MambaBackbone,
    PatchEmbed,
)


class Vim(MambaBackbone):
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
        if class_token not in NUM_CLASS_TOKENS:
            raise ValueError(f"class_token must be one of {tuple(NUM_CLASS_TOKENS)}, got {class_token!r}")
        patch_embed = PatchEmbed(
            img_size=img_size,
            patch_size=patch_size,
            stride=stride,
            in_chans=in_chans,
            embed_dim=embed_dim,
            dynamic_img_size=dynamic_img_size,
            device=device,
            dtype=dtype,
        )
        super().__init__(
            patch_embed=patch_embed,
            class_token=class_token,
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
                "combine": combine,
                "init": init,
            },
            drop_rate=drop_rate,
            pos_drop_rate=pos_drop_rate,
            drop_path_rate=drop_path_rate,
            wd_exempt_A=wd_exempt_A,
            device=device,
            dtype=dtype,
        )
        self.init_weights(needs_reset=False)

    def _init_embedding(self) -> None:
        for token in (self.cls_token, self.cls_token_head, self.cls_token_tail, self.pos_embed):
            if token is not None:
                trunc_normal_(token, std=0.02)
        lecun_normal_(self.patch_embed.proj.weight)
        nn.init.constant_(cast(Tensor, self.patch_embed.proj.bias), 0)

    @torch.jit.ignore
    def load_pretrained(self, path: str) -> None:
        """Load a published checkpoint from a file; see :func:`vim.checkpoints.load_pretrained`."""
        load_pretrained(self, path)


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
