"""Mamba-R: Vim with registers, tokens spread through the sequence that the head reads.

Paper: Mamba-R: Vision Mamba ALSO Needs Registers, https://arxiv.org/abs/2405.14858. Published code and weights:
https://github.com/wangf3014/Mamba-Reg.
"""

from functools import partial

import torch
from timm.layers import global_pool_nlc, trunc_normal_
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

from vim.checkpoints import checkpoint_filter_fn as checkpoint_filter_fn  # timm expects it beside the class
from vim.layers import (
    Factory,
    Init,
    MambaBackbone,
    PatchEmbed,
    RMSNorm,
    check_counts,
    insert_registers,
    split_registers,
)

from ._registry import create, tag_facts


class MambaR(MambaBackbone):
    """Vim with registers: each goes through one linear layer, and the head reads all of them.

    Args:
        img_size, patch_size, dynamic_img_size, init, wd_exempt_A: see :class:`vim.models.Vim`.
        num_classes: outputs of the head. A model that is built with 0 has no layer before the head either; it pools the
            mean of the registers.
        global_pool: "token", the registers; "avg", "max" or "avgmax" of the patches, without that layer; "" for all
            tokens.
        num_registers: m. They are spread evenly, so on images of another size they have other places.
        neck_reduction: the registers' channels are divided by this before the head; 1 for no such layer.

    Raises:
        ValueError: `embed_dim` is no multiple of `neck_reduction`, or a number is not whole and positive.
    """

    def __init__(
        self,
        *,
        img_size: int | tuple[int, int] = 224,
        patch_size: int | tuple[int, int] = 16,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "token",
        embed_dim: int = 192,
        depth: int = 24,
        num_registers: int = 12,
        neck_reduction: int = 1,
        d_state: int = 16,
        d_conv: int = 4,
        expand: int = 2,
        dynamic_img_size: bool = False,
        drop_rate: float = 0.0,
        pos_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        init: Init = "published",
        wd_exempt_A: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_counts(num_registers=num_registers, neck_reduction=neck_reduction)
        if embed_dim % neck_reduction:
            raise ValueError(f"embed_dim must be a multiple of neck_reduction, {neck_reduction}, got {embed_dim}")
        dd: Factory = {"device": device, "dtype": dtype}
        patch_embed = PatchEmbed(
            img_size=img_size,
            patch_size=patch_size,
            in_chans=in_chans,
            embed_dim=embed_dim,
            dynamic_img_size=dynamic_img_size,
            **dd,
        )
        super().__init__(
            patch_embed=patch_embed,
            class_token="none",
            in_chans=in_chans,
            num_classes=0,  # the head is made when its input is known
            global_pool="",
            embed_dim=embed_dim,
            depth=depth,
            mixer_options={
                "d_state": d_state,
                "d_conv": d_conv,
                "expand": expand,
                "directions": "v2",
                "combine": None,
                "init": init,
            },
            drop_rate=drop_rate,
            pos_drop_rate=pos_drop_rate,
            drop_path_rate=drop_path_rate,
            wd_exempt_A=wd_exempt_A,
            **dd,
        )
        self.num_prefix_tokens, self.neck_reduction = num_registers, neck_reduction
        self.concat_registers = num_classes > 0 and global_pool == "token"
        self.cls_token = nn.Parameter(torch.empty(1, num_registers, embed_dim, **dd))
        self.pos_embed_cls = nn.Parameter(torch.empty(1, num_registers, embed_dim, **dd))
        if neck_reduction > 1 and self.concat_registers:
            self.neck: nn.Module = nn.Linear(embed_dim, embed_dim // neck_reduction, bias=False, **dd)
            self.norm_neck: nn.Module = RMSNorm(num_registers * embed_dim // neck_reduction, **dd)
        self.reset_classifier(num_classes, global_pool)
        self.init_weights(needs_reset=False)

    @property
    def head_hidden_size(self) -> int:
        """Channels before the head: of all registers, one after the other, if they are what is pooled."""
        if self.global_pool != "token" or not self.concat_registers:
            return self.num_features
        return self.num_prefix_tokens * (self.num_features // self.neck_reduction)

    def _set_pool(self, global_pool: str) -> None:
        super()._set_pool(global_pool)
        if global_pool != "token":
            self.concat_registers = False
            self.neck, self.norm_neck = nn.Identity(), nn.Identity()

    def _init_embedding(self) -> None:
        super()._init_embedding()
        trunc_normal_(self.pos_embed_cls, std=0.02)
        if isinstance(self.neck, nn.Linear):
            trunc_normal_(self.neck.weight, std=0.02)

    def _insert_tokens(self, patches: Tensor) -> Tensor:
        assert self.cls_token is not None
        return insert_registers(patches, self.cls_token.expand(patches.shape[0], -1, -1))

    def _split_tokens(self, sequence: Tensor) -> tuple[Tensor, Tensor]:
        return split_registers(sequence, self.num_prefix_tokens)

    def _positions(self, grid: list[int]) -> Tensor:
        return insert_registers(self._spatial_positions(grid), self.pos_embed_cls)

    def pool(self, x: Tensor) -> Tensor:
        """Map tokens (b, l, d) to (b, head_hidden_size), or to themselves for `global_pool` ""."""
        if self.global_pool == "":
            return x
        patches, registers = self._split_tokens(x)
        if self.global_pool == "token":
            return self.norm_neck(self.neck(registers).flatten(1)) if self.concat_registers else registers.mean(1)
        return global_pool_nlc(patches, pool_type=self.global_pool, num_prefix_tokens=0)

    def rename_weights(self, weights: dict[str, object]) -> dict[str, object]:
        """Drop the layer before the head for a model without one."""
        if not self.concat_registers:
            weights = {key: weight for key, weight in weights.items() if not key.startswith(("neck.", "norm_neck."))}
        return weights


_facts = partial(
    tag_facts,
    fixed_input_size=True,
    crop_pct=1.0,
    paper_ids="arXiv:2405.14858",
    origin_url="https://github.com/wangf3014/Mamba-Reg",
)


def _published(size: str, top1: float) -> dict[str, object]:
    """The facts of the authors' weights, with their top-1 in % on ImageNet-1k's validation images."""
    return _facts(
        hf_hub_id="Wangf3014/Mamba-Reg",
        hf_hub_filename=f"mambar_{size}_patch16_224.pth",
        notes=(f"{top1} % top-1, as published", "Neither the code nor the weights name a licence: ask the authors."),
    )


default_cfgs = generate_default_cfgs(
    {
        "mambar_tiny.untrained": _facts(),
        "mambar_small.wangf3014_in1k": _published("small", 81.4),
        "mambar_base.wangf3014_in1k": _published("base", 83.0),
        "mambar_large.wangf3014_in1k": _published("large", 83.6),
        "test_mambar.untrained": _facts(input_size=(3, 64, 64)),
    }
)


@register_model
def mambar_tiny(pretrained: bool = False, **options: object) -> MambaR:
    """Mamba-R-Tiny, 9 M parameters; no weights are published."""
    return create(MambaR, "mambar_tiny", pretrained, options)


@register_model
def mambar_small(pretrained: bool = False, **options: object) -> MambaR:
    """Mamba-R-Small, 28 M parameters, 81.4 % ImageNet-1k top-1 published."""
    return create(MambaR, "mambar_small", pretrained, options, embed_dim=384, neck_reduction=2)


@register_model
def mambar_base(pretrained: bool = False, **options: object) -> MambaR:
    """Mamba-R-Base, 99 M parameters, 83.0 % ImageNet-1k top-1 published."""
    return create(MambaR, "mambar_base", pretrained, options, embed_dim=768, neck_reduction=4)


@register_model
def mambar_large(pretrained: bool = False, **options: object) -> MambaR:
    """Mamba-R-Large, 341 M parameters, 83.6 % ImageNet-1k top-1 published."""
    sizes = {"embed_dim": 1024, "depth": 48, "num_registers": 16, "neck_reduction": 8}
    return create(MambaR, "mambar_large", pretrained, options, **sizes)


@register_model
def test_mambar(pretrained: bool = False, **options: object) -> MambaR:
    """A Mamba-R for tests, 0.2 M parameters."""
    sizes = {"embed_dim": 64, "depth": 3, "num_registers": 3, "neck_reduction": 2}
    return create(MambaR, "test_mambar", pretrained, options, **sizes)
