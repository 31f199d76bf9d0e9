"""Run code that asks for a GPU on the CPU: for programs with "cuda" written into them, on a machine without one."""

import os
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from time import perf_counter
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

_NOTHING = (
    *("synchronize", "set_device", "init", "ipc_collect", "empty_cache"),
    *("reset_peak_memory_stats", "reset_max_memory_allocated", "reset_accumulated_memory_stats"),
)
_TYPES = ("Float", "Double", "Half", "BFloat16", "Long", "Int", "Short", "Char", "Byte", "Bool")
# `mamba_ssm.utils.torch`: decorators that ask for CUDA's autocast, as the published ones
custom_fwd = partial(torch.amp.custom_fwd, device_type="cuda")
custom_bwd = partial(torch.amp.custom_bwd, device_type="cuda")
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

    def query(self) -> bool:
        """Return that it is over."""
        return True

    def synchronize(self) -> None:
        """Wait for nothing."""

    def wait(self, stream: object = None) -> None:
        """Wait for nothing."""


class Stream(nullcontext):
    """`torch.cuda.Stream`: everything on the CPU is done when its call returns."""

    def __init__(self, *args: object, **options: object) -> None:
        super().__init__()

    def record_event(self, event: Event | None = None) -> Event:
        """Return an event of now."""
        event = event or Event()
        event.record()
        return event

    def query(self) -> bool:
        """Return that everything is done."""
        return True

    def synchronize(self) -> None:
        """Wait for nothing."""

    def wait_event(self, event: object) -> None:
        """Wait for nothing."""

    def wait_stream(self, stream: object) -> None:
        """Wait for nothing."""


class Generator(torch.Generator):
    """`torch.Generator`, on the CPU."""

    def __new__(cls, device: object = "cpu") -> "Generator":
        """Make a generator on the CPU instead of a GPU."""
        return super().__new__(cls, _to_cpu(device))  # type: ignore[call-arg]


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
        if map_location is None or isinstance(map_location, dict):  # from one GPU to another
            map_location = "cpu"
        return load(f, _to_cpu(map_location), *args, **options)

    return on_cpu


def _in_mode(run: Callable[..., object]) -> Callable[..., object]:
    def on_cpu(*args: object, **options: object) -> object:
        with OnCPU():
            return run(*args, **options)

    return on_cpu


def _of_cpu(ask: Callable[[str], object]) -> Callable[..., object]:
    """Ask about the CPU's autocast instead of CUDA's."""
    return lambda device_type="cuda": ask("cpu" if device_type == "cuda" else device_type)


def _autocast(init: Callable[..., None]) -> Callable[..., None]:
    """Have CUDA's autocast be the CPU's, in bfloat16: without a GPU, GradScaler scales no gradients for float16."""

    def on_cpu(self: object, device_type: str, dtype: torch.dtype | None = None, *args: Any, **options: Any) -> None:
        if device_type.startswith("cuda"):
            device_type, dtype = "cpu", torch.bfloat16 if dtype == torch.float16 else dtype
        init(self, device_type, dtype, *args, **options)

    return on_cpu


def _distributed(init: Callable[..., None]) -> Callable[..., None]:
    """Wrap a module in DistributedDataParallel without numbers of GPUs."""

    def on_cpu(
        self: object,
        module: object,
        device_ids: object = None,
        output_device: object = None,
        *args: Any,
        **options: Any,
    ) -> None:
        init(self, module, None, None, *args, **options)

    return on_cpu


def _process_group(start: Callable[..., None]) -> Callable[..., None]:
    """Start a process group with gloo instead of nccl."""

    def on_cpu(backend: str | None = None, *args: Any, **options: Any) -> None:
        start(backend.replace("nccl", "gloo") if backend else backend, *args, **options)

    return on_cpu


def _properties(device: object = None) -> SimpleNamespace:
    """Return what `torch.cuda.get_device_properties` tells of a GPU, of this machine; memory is in bytes."""
    memory = _memory("SC_PHYS_PAGES")
    return SimpleNamespace(name="CPU", major=0, minor=0, total_memory=memory, multi_processor_count=os.cpu_count())


def _memory(pages: str) -> int:
    """Return the bytes of all pages of memory, or of the free ones."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf(pages) if hasattr(os, "sysconf") else 0


def _set_rng_states(new_states: list[Tensor]) -> None:
    for state in new_states:
        torch.set_rng_state(state)


def install() -> None:
    """Have "cuda" mean the CPU in this thread; nothing changes on a machine with a GPU."""
    global _mode
    if _mode is not None or torch.cuda.is_available():
        return
    _replace_cuda()
    _replace(torch, "load", _load(torch.load))
    _replace(torch, "Generator", Generator)
    _replace(torch, "is_autocast_enabled", _of_cpu(torch.is_autocast_enabled))
    _replace(torch, "get_autocast_dtype", _of_cpu(torch.get_autocast_dtype))
    _replace(torch, "get_autocast_gpu_dtype", torch.get_autocast_dtype)
    _replace(torch.autocast, "__init__", _autocast(torch.autocast.__init__))
    # a mode is off inside the functions that it overrides, and a backward pass runs code of the program
    _replace(torch.autograd, "_engine_run_backward", _in_mode(torch.autograd._engine_run_backward))
    _replace(Tensor, "record_stream", lambda tensor, stream: None)
    _replace(torch.nn.Module, "cuda", lambda module, device=None: module)
    parallel = torch.nn.parallel.DistributedDataParallel
    _replace(parallel, "__init__", _distributed(parallel.__init__))
    if torch.distributed.is_available():
        _replace(torch.distributed, "init_process_group", _process_group(torch.distributed.init_process_group))
    _mode = OnCPU()
    _mode.__enter__()


def _replace_cuda() -> None:
    """Replace what programs call of `torch.cuda`; random numbers of a GPU are the CPU's."""
    for name, replacement in {
        "device": Device,
        "Event": Event,
        "Stream": Stream,
        "stream": lambda stream: nullcontext(stream),
        "current_stream": Stream,
        "default_stream": Stream,
        "current_device": lambda: 0,
        "get_device_name": lambda device=None: "CPU",
        "get_device_properties": _properties,
        "get_device_capability": lambda device=None: (0, 0),
        "mem_get_info": lambda device=None: (_memory("SC_AVPHYS_PAGES"), _memory("SC_PHYS_PAGES")),
        "memory_summary": lambda device=None, abbreviated=False: "",
        "utilization": lambda device=None: 0,
        "manual_seed": lambda seed: torch.default_generator.manual_seed(int(seed)),
        "manual_seed_all": lambda seed: torch.default_generator.manual_seed(int(seed)),
        "initial_seed": torch.initial_seed,
        "get_rng_state": lambda device=None: torch.get_rng_state(),
        "get_rng_state_all": lambda: [torch.get_rng_state()],
        "set_rng_state": lambda new_state, device=None: torch.set_rng_state(new_state),
        "set_rng_state_all": _set_rng_states,
        **{name: lambda *args, **options: None for name in _NOTHING},
        **{f"{name}Tensor": getattr(torch, f"{name}Tensor") for name in _TYPES},
    }.items():
        _replace(torch.cuda, name, replacement)


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
