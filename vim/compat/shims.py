"""Run code that asks for a GPU on the CPU: for programs with "cuda" written into them, on a machine without one."""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

_NOTHING = ("synchronize", "set_device", "manual_seed", "manual_seed_all", "init")
_kept: list[tuple[Any, str, Any]] = []  # what was replaced
_mode: "OnCPU | None" = None


class OnCPU(TorchFunctionMode):
    """Replaces a GPU by the CPU in the arguments of PyTorch's functions."""

    def __torch_function__(
        self, func: Callable[..., object], types: object, args: tuple = (), kwargs: dict | None = None
    ) -> object:
        """Call the function; `Tensor.cuda` returns its tensor."""
        if func is Tensor.cuda:
            return args[0]
        kwargs = {key: _to_cpu(value) if key == "device" else value for key, value in (kwargs or {}).items()}
        if func is Tensor.to:
            args = (args[0], *map(_to_cpu, args[1:]))
        return func(*args, **kwargs)


def _to_cpu(value: object) -> object:
    is_gpu = (isinstance(value, str) and value.startswith("cuda")) or (
        isinstance(value, torch.device) and value.type == "cuda"
    )
    return torch.device("cpu") if is_gpu else value


def _load(load: Callable[..., object]) -> Callable[..., object]:
    def on_cpu(file: object, map_location: object = None, *args: object, **options: object) -> object:
        return load(file, "cpu" if map_location is None else _to_cpu(map_location), *args, **options)

    return on_cpu


def install() -> None:
    """Have "cuda" mean the CPU in this thread; nothing changes on a machine with a GPU."""
    global _mode
    if _mode is not None or torch.cuda.is_available():
        return
    _replace(torch.cuda, "device", lambda *args: nullcontext())
    _replace(torch, "load", _load(torch.load))
    for name in _NOTHING:
        _replace(torch.cuda, name, lambda *args, **options: None)
    _replace(torch.cuda, "current_device", lambda: 0)
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
