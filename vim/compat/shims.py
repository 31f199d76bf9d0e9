"""Run code that asks for a GPU on the CPU: for programs with "cuda" written into them, on a machine without one."""

from collections.abc import Callable
from contextlib import nullcontext
from time import perf_counter
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

_NOTHING = (
    *("synchronize", "set_device", "manual_seed", "manual_seed_all", "init", "ipc_collect"),
    *("reset_peak_memory_stats", "reset_max_memory_allocated"),
)
_TYPES = ("Float", "Double", "Half", "BFloat16", "Long", "Int", "Short", "Char", "Byte", "Bool")
_kept: list[tuple[Any, str, Any]] = []  # what was replaced
_mode: "OnCPU | None" = None


class OnCPU(TorchFunctionMode):
    """Replaces a GPU by the CPU in the arguments of PyTorch's functions."""

    def __torch_function__(
        self, func: Callable[..., object], types: object, args: tuple = (), kwargs: dict | None = None
    ) -> object:
        """Call the function; `Tensor.cuda` and `Tensor.pin_memory` return their tensor."""
        if func in (Tensor.cuda, Tensor.pin_memory):
            return args[0]
        kwargs = {key: _to_cpu(value) if key == "device" else value for key, value in (kwargs or {}).items()}
        if func in (Tensor.to, Tensor.type):
            args = (args[0], *map(_to_cpu, args[1:]))
        return func(*args, **kwargs)


class Device(nullcontext):
    """`torch.cuda.device`, a class as there: PyTorch asks whether an argument is one."""

    def __init__(self, device: object = None) -> None:
        super().__init__()


class Event:
    """`torch.cuda.Event`: a moment; times are in milliseconds."""

    def __init__(self, *args: object, **options: object) -> None:
        self.record()

    def record(self, stream: object = None) -> None:
        """Take the time."""
        self.time = perf_counter()

    def elapsed_time(self, end: "Event") -> float:
        """Return the time from this event to another."""
        return 1000 * (end.time - self.time)

    def synchronize(self) -> None:
        """Wait for nothing."""


def _to_cpu(value: object) -> object:
    if isinstance(value, str) and value.startswith("torch.cuda."):  # a type of tensors
        return value.replace(".cuda", "")
    is_gpu = (
        (isinstance(value, str) and value.startswith("cuda"))
        or (isinstance(value, torch.device) and value.type == "cuda")
        or (isinstance(value, int) and not isinstance(value, bool))  # its number
    )
    return torch.device("cpu") if is_gpu else value


def _load(load: Callable[..., object]) -> Callable[..., object]:
    def on_cpu(f: object, map_location: object = None, *args: object, **options: object) -> object:
        return load(f, "cpu" if map_location is None else _to_cpu(map_location), *args, **options)

    return on_cpu


def _in_mode(run: Callable[..., object]) -> Callable[..., object]:
    def on_cpu(*args: object, **options: object) -> object:
        with OnCPU():
            return run(*args, **options)

    return on_cpu


def install() -> None:
    """Have "cuda" mean the CPU in this thread; nothing changes on a machine with a GPU."""
    global _mode
    if _mode is not None or torch.cuda.is_available():
        return
    _replace(torch.cuda, "device", Device)
    _replace(torch.cuda, "Event", Event)
    for name in _TYPES:
        _replace(torch.cuda, f"{name}Tensor", getattr(torch, f"{name}Tensor"))
    _replace(torch, "load", _load(torch.load))
    for name in _NOTHING:
        _replace(torch.cuda, name, lambda *args, **options: None)
    _replace(torch.cuda, "current_device", lambda: 0)
    _replace(torch.cuda, "get_device_name", lambda device=None: "CPU")
    # a mode is off inside the functions that it overrides, and a backward pass runs code of the program
    _replace(torch.autograd, "_engine_run_backward", _in_mode(torch.autograd._engine_run_backward))
    _replace(torch.nn.Module, "cuda", lambda module, device=None: module)
    _mode = OnCPU()
    _mode.__enter__()


def uninstall() -> None:
    """Undo :func:`install`."""
    global _mode
    if _mode is not None:
        _mode.__exit__(None, None, None)
        _mode = None
    while _kept:
        setattr(*_kept.pop())


def _replace(owner: Any, name: str, replacement: object) -> None:
    _kept.append((owner, name, getattr(owner, name)))
    setattr(owner, name, replacement)
