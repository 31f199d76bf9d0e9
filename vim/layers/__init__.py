"""Tokens in, tokens out: what the families are built from."""

from .backbone import MambaBackbone
from .block import MambaBlock
from .features import FeatureGetter
from .mamba import Directions, Init, MambaMixer, MixerState
from .norm import RMSNorm, residual_dtype
from .patch_embed import PatchEmbed
from .position import (
    NUM_CLASS_TOKENS,
    ClassToken,
    insert_class_tokens,
    resize_position_table,
    resize_temporal_table,
    split_class_tokens,
)
from .scan_paths import SCAN_ORDERS, ScanOrder, cross_merge, cross_scan, spatiotemporal_paths
from .selective_mixers import (
    S6,
    SelectFrom,
    SelectiveChannelMixer,
    SelectiveSequenceMixer,
    SelectiveTokenMixer,
)
from .weighted_averaging import AVERAGING, MambaMixerLayer, ResidualMixer, ResidualNorm

__all__ = [
    "AVERAGING",
    "NUM_CLASS_TOKENS",
    "S6",
    "SCAN_ORDERS",
    "ClassToken",
    "Directions",
    "FeatureGetter",
    "Init",
    "MambaBackbone",
    "MambaBlock",
    "MambaMixer",
    "MambaMixerLayer",
    "MixerState",
    "PatchEmbed",
    "RMSNorm",
    "ResidualMixer",
    "ResidualNorm",
    "ScanOrder",
    "SelectFrom",
    "SelectiveChannelMixer",
    "SelectiveSequenceMixer",
    "SelectiveTokenMixer",
    "cross_merge",
    "cross_scan",
    "insert_class_tokens",
    "residual_dtype",
    "resize_position_table",
    "resize_temporal_table",
    "spatiotemporal_paths",
    "split_class_tokens",
]
