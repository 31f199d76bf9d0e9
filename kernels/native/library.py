"""The library that kernels.cpp is built to: loading it, calling it through ctypes, and what it takes.

It knows neither PyTorch nor Python, so that one build serves every version of both. It computes in float32 and takes a
C structure of sizes, strides and addresses for each call.
"""

import ctypes
import functools
import warnings
from pathlib import Path

import torch
from torch import Tensor

from ..directions import MaybeTensor, dense, unit_stride

MISSING = (
    "it is compiled when the package is installed, and needs a C++17 compiler (g++ or clang++); install again with one"
)
ROWS = "6q"  # `Rows` of common.h, as the struct module writes it


@functools.cache
def load() -> ctypes.CDLL | None:
    """Return the library, or None if it is not built or cannot be loaded; the latter warns."""
    path = Path(__file__).with_name("_kernels.abi3.so")
    if not path.exists():
        return None
    try:
        return _declare(ctypes.CDLL(str(path)))
    except (OSError, AttributeError) as error:  # built for another machine, damaged, or of another version
        warnings.warn(f"cannot load the native kernels, PyTorch's serve instead: {error}", stacklevel=2)
        return None


def _declare(found: ctypes.CDLL) -> ctypes.CDLL:
    for name in ("vim_scan", "vim_ssd", "vim_conv", "vim_norm"):
        getattr(found, name).argtypes = [ctypes.c_char_p, ctypes.c_int64, ctypes.c_int64]
        getattr(found, f"{name}_backward").argtypes = [ctypes.c_char_p] * 2 + [ctypes.c_int64] * 2
    found.vim_exponentials.argtypes = [ctypes.c_int64] * 3
    for name in ("best_isa", "saved_every", "ssd_saved_every", "conv_tokens", "norm_rows"):
        getattr(found, f"vim_{name}").restype = ctypes.c_int64
    return found


@functools.cache
def instruction_set() -> int:
    """Return the best instruction set of this processor: 0 baseline, 1 AVX2, 2 AVX-512."""
    native = load()
    return 0 if native is None else native.vim_best_isa()


@functools.cache
def constant(function: str) -> int:
    """Return a constant of the library, by the function that returns it."""
    return getattr(load(), function)()


def call(function: str, *arguments: bytes | int) -> None:
    """Call a function with as many threads as PyTorch uses. The tensors in its structures must be alive."""
    getattr(load(), function)(*arguments, instruction_set(), torch.get_num_threads())


def as_floats(x: MaybeTensor) -> MaybeTensor:
    """Return x in float32 with its last dimension contiguous, as `Rows` describes it."""
    return None if x is None else unit_stride(x.float())


def as_dense_floats(x: MaybeTensor) -> MaybeTensor:
    """Return x in float32 and contiguous."""
    return None if x is None else dense(x.float())


def pointer(x: Tensor | None) -> int:
    """Return the address of a tensor's data; 0, a null pointer, if it is None or empty."""
    return 0 if x is None or x.numel() == 0 else x.data_ptr()


def rows(x: Tensor | None, shared: bool = False) -> tuple[int, ...]:
    """Return the fields of `Rows` for x, (b, k, l, d) or (b, k, l, g, n).

    Args:
        shared: all directions use the first, so that x is (b, 1, l, d).
    """
    if x is None or x.numel() == 0:
        return (0,) * 6
    if x.dim() == 4:
        (image, direction, token, channel), group = x.stride(), 0
    else:
        image, direction, token, group, channel = x.stride()
    return x.data_ptr(), image, 0 if shared else direction, token, group, channel
