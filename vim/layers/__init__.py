"""Tokens in, tokens out: what the families are built from."""

from .attention import AttentionMixer
from .backbone import MambaBackbone, MixerName, MixerOptions
from .block import MambaBlock
from .channel_mixer import SelectiveChannelMixer
from .checks import check_choice, check_counts, check_stages
from .contract import FeatureGetter, TimmModel, update_model_args
from .dss import DSSKernel
from .factory import Factory, init_linears
from .hippo import Spectrum
from .long_convolution import convolve, fft_size
from .lti import LTIKind, LTIMixer
from .lti_kernels import LTIKernel, S4DKernel, constant_kernels
from .mamba import Init, MambaMixer
from .mamba2 import Mamba2Mixer
from .mixer import Directions, MixerState
from .moe import ExpertBlock, MoEOptions, Router
from .noncausal_ssd import NonCausalSSD
from .norm import GatedRMSNorm, MapBatchNorm, ResidualNorm, RMSNorm, residual_dtype
from .patch_embed import PaddedPatchEmbed, PatchEmbed, as_frames
from .position import (
    NUM_CLASS_TOKENS,
    ClassToken,
    PositionConv,
    find_table,
    insert_class_tokens,
    insert_registers,
    resize_position_table,
    resize_temporal_table,
    split_class_tokens,
    split_registers,
)
from .pyramid import PyramidGetter
from .s4 import LSSLKernel, S4Kernel
from .s4nd import S4ND, S4NDBlock, S4NDDownsample, S4NDKernel, S4NDStem
from .s5 import S5
from .s6 import S6, SelectFrom
from .scan_paths import (
    SCAN_ORDERS,
    ScanOrder,
    cross_merge,
    cross_scan,
    padding_last,
    paths_of_padded,
    spatiotemporal_paths,
)
from .selective_mixers import SelectiveSequenceMixer, SelectiveTokenMixer
from .split_mixer import SplitMixer
from .stages import ConvDownsample, ConvStem, Downsample, ResidualStack, Stage, StagedBackbone
from .weighted_averaging import NOT_DECAYED, MambaMixerLayer, MambaMixerStack, ResidualMixer

__all__ = [
    "NOT_DECAYED",
    "NUM_CLASS_TOKENS",
    "S4DKernel",
    "S4Kernel",
    "S5",
    "S4ND",
    "S4NDBlock",
    "S4NDDownsample",
    "S4NDKernel",
    "S4NDStem",
    "S6",
    "Router",
    "SCAN_ORDERS",
    "AttentionMixer",
    "ClassToken",
    "DSSKernel",
    "ConvDownsample",
    "ConvStem",
    "Directions",
    "Downsample",
    "Factory",
    "ExpertBlock",
    "FeatureGetter",
    "GatedRMSNorm",
    "Init",
    "LTIKernel",
    "LTIKind",
    "LTIMixer",
    "LSSLKernel",
    "Mamba2Mixer",
    "MambaBackbone",
    "MambaBlock",
    "MambaMixer",
    "MambaMixerLayer",
    "MambaMixerStack",
    "MapBatchNorm",
    "MixerName",
    "MixerOptions",
    "MixerState",
    "MoEOptions",
    "NonCausalSSD",
    "PaddedPatchEmbed",
    "PatchEmbed",
    "PositionConv",
    "PyramidGetter",
    "RMSNorm",
    "ResidualMixer",
    "ResidualNorm",
    "ResidualStack",
    "ScanOrder",
    "SelectFrom",
    "SelectiveChannelMixer",
    "SelectiveSequenceMixer",
    "SelectiveTokenMixer",
    "Spectrum",
    "SplitMixer",
    "Stage",
    "StagedBackbone",
    "TimmModel",
    "Spectrum",
    "as_frames",
    "check_choice",
    "check_counts",
    "check_stages",
    "constant_kernels",
    "convolve",
    "cross_merge",
    "cross_scan",
    "fft_size",
    "find_table",
    "init_linears",
    "insert_class_tokens",
    "insert_registers",
    "padding_last",
    "paths_of_padded",
    "residual_dtype",
    "resize_position_table",
    "resize_temporal_table",
    "spatiotemporal_paths",
    "split_class_tokens",
    "split_registers",
    "update_model_args",
]
