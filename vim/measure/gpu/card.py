"""What is asked of the card itself: time, memory, CUDA graphs and measured ceilings.

Without a GPU the same functions work on the CPU, so that every stage can be rehearsed there.
"""

import time
from collections.abc import Callable
from functools import partial
from typing import ParamSpec, TypeVar

import torch
import triton
import triton.language as tl

from vim.measure.timing import Run, peak_memory

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LONG = 100.0  # milliseconds; a call that takes longer is timed once
BLOCK, UNROLL = 512, 16  # values of a program, exponentials of a round
P = ParamSpec("P")
T = TypeVar("T")
Clock = Callable[[Run], float]  # milliseconds of a call


def name() -> str:
    """The card's name, as PyTorch reports it."""
    return torch.cuda.get_device_name() if DEVICE == "cuda" else "no GPU"


def once(run: Run) -> float:
    """Milliseconds of one call, compilation included."""
    start = time.perf_counter()
    run()
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    return 1e3 * (time.perf_counter() - start)


def median(run: Run) -> float:
    """Median milliseconds of many calls, each with a cold L2 cache. The first call, which compiles, is not timed."""
    once(run)
    first = once(run)
    return first if first > LONG else triton.testing.do_bench(run, warmup=10, rep=50, return_mode="median")


def graphed(run: Run) -> Run:
    """Capture a call in a CUDA graph and return its replay, which launches no kernel one by one."""
    if DEVICE == "cpu":
        return run
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # capturing needs warm calls on another stream
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def compiled(call: Callable[P, T], *, mode: str = "default") -> Callable[P, T]:
    """Compile a function or model for fixed shapes. Without a GPU it is only traced, which takes seconds."""
    if DEVICE == "cpu":
        return torch.compile(call, backend="eager", dynamic=False)
    return torch.compile(call, mode=mode, dynamic=False)


def allocated_mb() -> float:
    """Megabytes of live tensors on the GPU."""
    return torch.cuda.memory_allocated() / 1e6 if DEVICE == "cuda" else 0.0


def peak_mb(run: Run) -> float:
    """The most megabytes allocated during a call, on top of those before it."""
    return peak_memory(run) / 1e6 if DEVICE == "cuda" else 0.0


def release() -> None:
    """Return cached memory to the card, for the other processes on it."""
    if DEVICE == "cuda":
        torch.cuda.empty_cache()


def bytes_per_second(time: Clock, elements: int) -> float:
    """Bandwidth of a copy of so many float32 elements: bytes read plus bytes written."""
    source = torch.randn(elements, device=DEVICE)
    target = torch.empty_like(source)
    return 2 * source.nbytes / (1e-3 * time(partial(target.copy_, source)))


def exponentials_per_second(time: Clock, programs: int, rounds: int) -> float:
    """Rate of `exp2` on values in registers, where nothing else takes time."""
    values = torch.rand(programs * BLOCK, device=DEVICE)
    launch = partial(_exponentials_kernel[(programs,)], values, rounds, BLOCK=BLOCK, UNROLL=UNROLL)
    return programs * BLOCK * rounds * UNROLL / (1e-3 * time(launch))


def products_per_second(time: Clock, size: int) -> float:
    """Rate of additions and multiplications in the product of two square bfloat16 matrices."""
    matrix = torch.randn(size, size, device=DEVICE, dtype=torch.bfloat16)
    target = torch.empty_like(matrix)
    return 2 * size**3 / (1e-3 * time(partial(torch.mm, matrix, matrix, out=target)))


@triton.jit
def _exponentials_kernel(values, rounds, BLOCK: tl.constexpr, UNROLL: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(values + at)
    for _ in range(rounds):
        for _ in tl.static_range(UNROLL):
            value = tl.exp2(-value)  # stays between a half and one
    tl.store(values + at, value)
