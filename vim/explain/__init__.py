"""What a model sees: its hidden attention, and maps of what its prediction rests on."""

from .attention import Direction, implicit_attention
from .maps import METHODS, Method, explain, layer_maps
from .recording import num_scanning_layers
from .segmentation import SegmentationScores, segmentation_scores

__all__ = [
    "METHODS",
    "Direction",
    "Method",
    "SegmentationScores",
    "explain",
    "implicit_attention",
    "layer_maps",
    "num_scanning_layers",
    "segmentation_scores",
]
