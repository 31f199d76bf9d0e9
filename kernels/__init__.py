"""The public ops. Each chooses its backend by its tensors, by `backend=`, or by the variable VIM_BACKEND."""

from .backends import available_backends
from .causal_conv1d import causal_conv1d
from .rms_norm import rms_norm
from .selective_scan import selective_scan

__all__ = ["available_backends", "causal_conv1d", "rms_norm", "selective_scan"]
