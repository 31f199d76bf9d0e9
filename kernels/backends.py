"""Which backend runs an op: the only place that chooses, and the only one that imports a backend's file.

An op is a folder: `op.py` has the public function, its checks and its registration with PyTorch, `reference.py` the
definition, and each other file a backend. Every backend has the op's function and its backward pass under the same
names.
"""

import functools
import importlib
import importlib.util
import os
from types import ModuleType

import torch

from .native import library

FILES = {"reference": "reference", "chunked": "chunked", "cpu": "native", "triton": "triton"}  # by backend
BACKENDS = tuple(FILES)
VARIABLE = "VIM_BACKEND"
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def available_backends(device: str | torch.device = "cpu") -> tuple[str, ...]:
    """Return the backends that run on a device; the last one is the default."""
    fastest = _fastest(torch.device(device).type)
    return ("reference", "chunked") if fastest == "chunked" else ("reference", "chunked", fastest)


def _fastest(kind: str) -> str:
    if kind == "cuda" and has_triton():
        return "triton"
    return "cpu" if kind == "cpu" and library.load() is not None else "chunked"


def choose_backend(requested: str, tensor: torch.Tensor) -> str:
    """Return the backend that runs an op on `tensor`.

    Args:
        requested: a backend's name, or "auto" for the variable VIM_BACKEND or, where it is not set, the fastest.

    Raises:
        ValueError: the name is unknown, or the backend does not take the tensor's device or dtype.
        RuntimeError: the backend is not built or not installed.
    """
    name = requested if requested != "auto" else os.environ.get(VARIABLE, "auto")
    if name == "auto":
        return "chunked" if tensor.dtype == torch.float64 else _fastest(tensor.device.type)
    if name not in BACKENDS:
        raise ValueError(f"backend must be 'auto' or one of {BACKENDS}, got {name!r}")
    if name not in ("cpu", "triton"):
        return name
    if tensor.dtype == torch.float64:
        raise ValueError(f"backend {name!r} takes float32, bfloat16 or float16, got float64: use 'chunked'")
    if name == "cpu":
        if tensor.device.type not in ("cpu", "meta"):
            raise ValueError(f"backend 'cpu' takes tensors on the CPU, got {tensor.device}")
        if library.load() is None:
            raise RuntimeError(f"backend 'cpu' is not built: {library.MISSING}")
        return name
    if not has_triton():
        raise RuntimeError("backend 'triton' needs the package triton, which is not installed: pip install triton")
    if tensor.device.type not in ("cuda", "meta") and not interpreting():
        raise ValueError(
            f"backend 'triton' takes tensors on a GPU, got {tensor.device}; on a CPU it runs in Triton's interpreter, "
            "for tests: set TRITON_INTERPRET=1 before the first import of triton"
        )
    return name


@functools.cache
def implementation(op: str, backend: str) -> ModuleType:
    """Return the file of an op's folder that a backend runs.

    It is imported at its first use: a machine without a GPU may have no triton.
    """
    return importlib.import_module(f".{op}.{FILES[backend]}", __package__)


@functools.cache
def has_triton() -> bool:
    """Return whether triton is installed, with a PyTorch for NVIDIA's GPUs. The first op that needs it imports it."""
    return importlib.util.find_spec("triton") is not None and torch.version.hip is None


def interpreting() -> bool:
    """Return whether Triton interprets its kernels on the CPU, step by step in Python."""
    import triton

    return triton.knobs.runtime.interpret
