"""The public ops. Each chooses its backend by its tensors, by `backend=`, or by the variable VIM_BACKEND.

Models call the same ops as `torch.ops.vim.NAME`, which TorchScript compiles too; importing this package registers them.
"""

from .backends import available_backends
from .conv1d.op import causal_conv1d
from .norm.op import rms_norm
from .scan.op import selective_scan

__all__ = ["available_backends", "causal_conv1d", "rms_norm", "selective_scan"]
