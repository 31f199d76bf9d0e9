"""The public ops. Each chooses its backend by its tensors, by `backend=`, or by the variable VIM_BACKEND.

Models call the same ops as `torch.ops.vim.NAME`, which TorchScript compiles too; importing this package registers them.
Forward-mode and second derivatives run the reference, whatever the backend: see autograd.py.
"""

if __name__ == "kernels":  # another project's package, which transformers looks for and finds this folder in a clone
    del __file__  # a module without a file and a version is none to transformers
else:
    from .backends import available_backends
    from .conv1d.op import causal_conv1d
    from .norm.op import rms_norm
    from .scan.op import selective_scan
    from .ssd.op import ssd

    __all__ = ["available_backends", "causal_conv1d", "rms_norm", "selective_scan", "ssd"]
