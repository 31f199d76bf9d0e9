"""Tokens in, tokens out: what the families are built from."""

from .block import MambaBlock
from .features import FeatureGetter
from .mamba import Directions, Init, MambaMixer
from .norm import RMSNorm, residual_dtype
from .patch_embed import PatchEmbed
from .position import (
    NUM_CLASS_TOKENS,
    ClassToken,
    insert_class_tokens,
    resize_position_table,
    split_class_tokens,
)

__all__ = [
    "NUM_CLASS_TOKENS",
    "ClassToken",
    "Directions",
    "FeatureGetter",
    "Init",
    "MambaBlock",
    "MambaMixer",
    "PatchEmbed",
    "RMSNorm",
    "insert_class_tokens",
    "residual_dtype",
    "resize_position_table",
    "split_class_tokens",
]
