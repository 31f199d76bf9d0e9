"""Which backend runs an op: the only place that chooses."""

import os

import torch

from . import cpu

BACKENDS = ("reference", "chunked", "cpu")
VARIABLE = "VIM_BACKEND"
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def available_backends(device: str | torch.device = "cpu") -> tuple[str, ...]:
    """The backends that run on a device, the one chosen by default last."""
    native = torch.device(device).type == "cpu" and cpu.library() is not None
    return BACKENDS if native else BACKENDS[:2]


def choose_backend(requested: str, tensor: torch.Tensor) -> str:
    """Return the backend to run for tensors like the one given.

    Raises:
        ValueError: an unknown name, or a device or dtype the backend asked for does not take.
        RuntimeError: the native backend was asked for and is not built.
    """
    name = requested if requested != "auto" else os.environ.get(VARIABLE, "auto")
    if name == "auto":
        native = tensor.device.type == "cpu" and tensor.dtype != torch.float64 and cpu.library() is not None
        return "cpu" if native else "chunked"
    if name not in BACKENDS:
        raise ValueError(f"backend must be 'auto' or one of {BACKENDS}, got {name!r}")
    if name == "cpu":
        if tensor.device.type not in ("cpu", "meta"):
            raise ValueError(f"backend 'cpu' takes tensors on the CPU, got {tensor.device}")
        if tensor.dtype == torch.float64:
            raise ValueError("backend 'cpu' takes float32, bfloat16 or float16, got float64: use 'chunked'")
        if cpu.library() is None:
            raise RuntimeError(f"backend 'cpu' is not built: {cpu.MISSING}")
    return name
