"""Vim: bidirectional Mamba over image patches.

Paper: Vision Mamba: Efficient Visual Representation Learning with Bidirectional State Space Model,
https://arxiv.org/abs/2401.09417. Published code and weights: https://github.com/hustvl/Vim.
"""

from functools import partial
from typing import Literal

import torch
from timm.models import generate_default_cfgs, register_model

from vim.checkpoints import checkpoint_filter_fn as checkpoint_filter_fn  # timm expects it beside the class
from vim.layers import (
    NUM_CLASS_TOKENS,
    ClassToken,
    Directions,
    Factory,
    Init,
    MambaBackbone,
    MixerName,
    PatchEmbed,
    Router,
    Spectrum,
    check_choice,
)

from ._registry import create, register_variant, tag_facts


class Vim(MambaBackbone):
    """Vision Mamba: patches, class tokens, `depth` Mamba blocks on a float32 residual stream, a linear head.

    Args:
        img_size: height and width in pixels.
        stride: pixels between neighbouring patches; below `patch_size` they overlap (the paper's fine-tuned models).
        global_pool: "token", the class token or the mean of both; "avg", "max" or "avgmax" of the patches; "" for all
            tokens. Default: "token" for a model with a class token, otherwise "avg".
        class_token: its place in the sequence: "middle" (all published weights), "first", one at both "ends", or
            "none".
        dynamic_img_size: take images of any size; the position table is resized for each.
        mixer: "s6", Mamba's as published; "ssd", Mamba-2's; "attention"; "s4d", "s4", "dss", "s5" or "lssl", which are
            time-invariant.
        d_state, d_conv, expand, directions: of the mixer, see :class:`vim.layers.MambaMixer`,
            :class:`vim.layers.Mamba2Mixer` and :class:`vim.layers.LTIMixer`. Default: 16 states with "s6", otherwise
            64; 2 for `expand`.
        combine: of "s6" only.
        init: of "s6", "s4d" and "s4" only.
        head_dim: of "ssd" and "attention" only.
        moe_every: behind each so many-th block comes a mixture of feed-forward experts. Experimental: no published
            vision result exists. None for none.
        num_experts: of a mixture; the default is 8.
        router: what a token goes through, see :mod:`vim.layers.moe`: "soft" (the default), a mean of all experts'
            outputs; "top1", the expert of its highest probability, balanced by `model.aux_loss`.
        num_slots: of "soft" only, for each expert; the default is 16.
        capacity_factor, aux_weight: of "top1" only; the defaults are 1.25 and 0.01.
        wd_exempt_A: keep weight decay off `A_log`. The published recipe decays it, against its own code's marks.
            With "ssd" timm's optimizers never decay it: it has one dimension.
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
        mixer: MixerName = "s6",
        d_state: int | None = None,
        d_conv: int | None = None,
        expand: int | None = None,
        head_dim: int | None = None,
        directions: Directions = "v2",
        combine: Literal["sum", "mean"] | None = None,
        moe_every: int | None = None,
        num_experts: int | None = None,
        router: Router | None = None,
        num_slots: int | None = None,
        capacity_factor: float | None = None,
        aux_weight: float | None = None,
        class_token: ClassToken = "middle",
        dynamic_img_size: bool = False,
        drop_rate: float = 0.0,
        pos_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        init: Init | Spectrum | None = None,
        wd_exempt_A: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_choice("class_token", class_token, tuple(NUM_CLASS_TOKENS))
        dd: Factory = {"device": device, "dtype": dtype}
        patch_embed = PatchEmbed(
            img_size=img_size,
            patch_size=patch_size,
            stride=stride,
            in_chans=in_chans,
            embed_dim=embed_dim,
            dynamic_img_size=dynamic_img_size,
            **dd,
        )
        super().__init__(
            patch_embed=patch_embed,
            class_token=class_token,
            in_chans=in_chans,
            num_classes=num_classes,
            global_pool=global_pool,
            embed_dim=embed_dim,
            depth=depth,
            mixer=mixer,
            mixer_options={
                "d_state": d_state,
                "d_conv": d_conv,
                "expand": expand,
                "head_dim": head_dim,
                "directions": directions,
                "combine": combine,
                "init": init,
            },
            moe_every=moe_every,
            moe_options={
                "num_experts": num_experts,
                "router": router,
                "num_slots": num_slots,
                "capacity_factor": capacity_factor,
                "aux_weight": aux_weight,
            },
            drop_rate=drop_rate,
            pos_drop_rate=pos_drop_rate,
            drop_path_rate=drop_path_rate,
            wd_exempt_A=wd_exempt_A,
            **dd,
        )
        self.init_weights(needs_reset=False)

    def rename_weights(self, weights: dict[str, object]) -> dict[str, object]:
        """Drop the rotary tables of the authors' first checkpoints; the names are ours."""
        return {key: value for key, value in weights.items() if not key.startswith("rope.")}


_facts = partial(
    tag_facts,
    fixed_input_size=True,
    paper_ids="arXiv:2401.09417",
    origin_url="https://github.com/hustvl/Vim",
)


def _published(repository: str, filename: str, top1: float, top5: float) -> dict[str, object]:
    """The facts of the authors' weights, with their top-1 and top-5 in % on ImageNet-1k's validation images."""
    return _facts(
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
        "vim_nano.untrained": _facts(input_size=(3, 32, 32)),
        "vim_tiny.hustvl_in1k": _published("Vim-tiny-midclstok", "vim_t_midclstok_76p1acc.pth", 76.1, 93.0),
        "vim_tiny_stride8.hustvl_in1k": _published("Vim-tiny-midclstok", "vim_t_midclstok_ft_78p3acc.pth", 78.3, 94.2),
        "vim_small.hustvl_in1k": _published("Vim-small-midclstok", "vim_s_midclstok_80p5acc.pth", 80.5, 95.1),
        "vim_small_stride8.hustvl_in1k": _published(
            "Vim-small-midclstok", "vim_s_midclstok_ft_81p6acc.pth", 81.6, 95.4
        ),
        "vim_base.hustvl_in1k": _published("Vim-base-midclstok", "vim_b_midclstok_81p9acc.pth", 81.9, 95.8),
        "vim_ssd_tiny.untrained": _facts(),
        "vim_ssd_small.untrained": _facts(),
        "vim_s4d_tiny.untrained": _facts(),
        "test_vim.untrained": _facts(input_size=(3, 64, 64)),
        "test_vim_ssd.untrained": _facts(input_size=(3, 64, 64)),
        "test_vim_moe.untrained": _facts(input_size=(3, 64, 64)),
        "test_vim_s4d.untrained": _facts(input_size=(3, 64, 64)),
    }
)


@register_model
def vim_nano(pretrained: bool = False, **options: object) -> Vim:
    """Vim-Nano, 0.3 M parameters, for small images: 32 pixels in patches of 4."""
    return create(Vim, "vim_nano", pretrained, options, patch_size=4, embed_dim=64, depth=6)


@register_model
def vim_tiny(pretrained: bool = False, **options: object) -> Vim:
    """Vim-Tiny, 7 M parameters, 76.1 % ImageNet-1k top-1 published."""
    return create(Vim, "vim_tiny", pretrained, options, embed_dim=192)


@register_model
def vim_tiny_stride8(pretrained: bool = False, **options: object) -> Vim:
    """Vim-Tiny on overlapping patches, 730 tokens, 78.3 % ImageNet-1k top-1 published."""
    return create(Vim, "vim_tiny_stride8", pretrained, options, embed_dim=192, stride=8)


@register_model
def vim_small(pretrained: bool = False, **options: object) -> Vim:
    """Vim-Small, 26 M parameters, 80.5 % ImageNet-1k top-1 published."""
    return create(Vim, "vim_small", pretrained, options, embed_dim=384)


@register_model
def vim_small_stride8(pretrained: bool = False, **options: object) -> Vim:
    """Vim-Small on overlapping patches, 730 tokens, 81.6 % ImageNet-1k top-1 published."""
    return create(Vim, "vim_small_stride8", pretrained, options, embed_dim=384, stride=8)


@register_model
def vim_base(pretrained: bool = False, **options: object) -> Vim:
    """Vim-Base, 98 M parameters, 81.9 % ImageNet-1k top-1 published."""
    return create(Vim, "vim_base", pretrained, options, embed_dim=768)


@register_model
def vim_ssd_tiny(pretrained: bool = False, **options: object) -> Vim:
    """Vim-Tiny with Mamba-2's mixer, 6 M parameters, nothing published."""
    return create(Vim, "vim_ssd_tiny", pretrained, options, embed_dim=192, mixer="ssd")


@register_model
def vim_ssd_small(pretrained: bool = False, **options: object) -> Vim:
    """Vim-Small with Mamba-2's mixer, 23 M parameters, nothing published."""
    return create(Vim, "vim_ssd_small", pretrained, options, embed_dim=384, mixer="ssd")


@register_model
def vim_s4d_tiny(pretrained: bool = False, **options: object) -> Vim:
    """Vim-Tiny with S4D's time-invariant mixer, 5 M parameters, nothing published."""
    return create(Vim, "vim_s4d_tiny", pretrained, options, embed_dim=192, mixer="s4d")


for _name, _doc, _options in (
    ("test_vim", "A Vim for tests, 0.2 M parameters.", {}),
    ("test_vim_ssd", "A Vim for tests with Mamba-2's mixer, 0.2 M parameters.", {"mixer": "ssd", "head_dim": 32}),
    ("test_vim_s4d", "A Vim for tests with S4D's mixer, 0.2 M parameters.", {"mixer": "s4d"}),
    ("test_vim_moe", "A Vim for tests with experts, 0.4 M parameters.", {"moe_every": 2, "num_experts": 4}),
):
    register_variant(Vim, _name, _doc, embed_dim=64, depth=3, **_options)
