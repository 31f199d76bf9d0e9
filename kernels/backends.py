"""Which backend runs an op: the only place that chooses."""

import functools
import importlib.util
import os

import torch

from . import cpu

BACKENDS = ("reference", "chunked", "cpu", "triton")
VARIABLE = "VIM_BACKEND"
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def available_backends(device: str | torch.device = "cpu") -> tuple[str, ...]:
    """The backends that run on a device, the one chosen by default last."""
    kind = torch.device(device).type
    native = {"cpu": ("cpu",) if cpu.library() is not None else (), "cuda": ("triton",) if has_triton() else ()}
    return ("reference", "chunked", *native.get(kind, ()))


def choose_backend(requested: str, tensor: torch.Tensor) -> str:
    """Return the backend to run for tensors like the one given.

    Raises:
        ValueError: an unknown name, or a device or dtype the backend asked for does not take.
        RuntimeError: the backend asked for is not built, or not installed.
    """
    name = requested if requested != "auto" else os.environ.get(VARIABLE, "auto")
    if name == "auto":
        return "chunked" if tensor.dtype == torch.float64 else available_backends(tensor.device)[-1]
    if name not in BACKENDS:
        raise ValueError(f"backend must be 'auto' or one of {BACKENDS}, got {name!r}")
    if name not in ("cpu", "triton"):
        return name
    if tensor.dtype == torch.float64:
        raise ValueError(f"backend {name!r} takes float32, bfloat16 or float16, got float64: use 'chunked'")
    if name == "cpu":
        if tensor.device.type not in ("cpu", "meta"):
            raise ValueError(f"backend 'cpu' takes tensors on the CPU, got {tensor.device}")
        if cpu.library() is None:
            raise RuntimeError(f"backend 'cpu' is not built: {cpu.MISSING}")
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
def has_triton() -> bool:
    """Whether triton is installed, for NVIDIA's GPUs; it is imported by the first op that it runs."""
    return importlib.util.find_spec("triton") is not None and torch.version.hip is None


def interpreting() -> bool:
    """Whether Triton runs its kernels on the CPU, step by step in Python."""
    import triton

    return triton.knobs.runtime.interpret
