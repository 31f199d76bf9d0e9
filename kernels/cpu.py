"""The native CPU backend: calls into the library that cpu.cpp is built to, through ctypes.

The library knows neither PyTorch nor Python, so that one build serves every version of both. It computes in float32:
tensors of 16 bits are converted on the way in and out.
"""

import ctypes
import functools
import struct
import warnings
from collections.abc import Sequence
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import torch
from torch import Tensor

from .checks import empty_rows

MISSING = (
    "it is compiled when the package is installed, and needs a C++17 compiler (g++ or clang++); install again with one"
)
TASKS = 16  # at least as many for a call, where the channels suffice
WIDEST_PIECE = 384  # channels: the state of a piece stays in the first-level cache


# The structures of cpu.cpp, field by field; _ROWS is its Rows. Packed at once: ctypes would take three times as long.
_ROWS = "5q"
_SCAN = struct.Struct(f"10q f {_ROWS * 7} 6q")
_SCAN_GRADS = struct.Struct(f"{_ROWS * 6} 5q")
_CONV = struct.Struct(f"7q {_ROWS * 2} 2q")
_CONV_GRADS = struct.Struct(f"{_ROWS * 2} 2q")
_NORM = struct.Struct("2q f 3q")
_NORM_GRADS = struct.Struct("3q")


@functools.cache
def library() -> ctypes.CDLL | None:
    """The native library, or None where it is not built."""
    for suffix in EXTENSION_SUFFIXES:
        path = Path(__file__).with_name(f"_cpu{suffix}")
        if path.exists():
            try:
                found = ctypes.CDLL(str(path))
            except OSError as error:  # built for another machine, or damaged
                warnings.warn(f"cannot load the native kernels, PyTorch's serve instead: {error}", stacklevel=2)
                return None
            for name in ("vim_scan", "vim_conv", "vim_norm"):
                getattr(found, name).argtypes = [ctypes.c_char_p, ctypes.c_int64, ctypes.c_int64]
                getattr(found, f"{name}_backward").argtypes = [ctypes.c_char_p] * 2 + [ctypes.c_int64] * 2
            for name in ("vim_best_isa", "vim_saved_every", "vim_conv_tokens", "vim_norm_rows"):
                getattr(found, name).restype = ctypes.c_int64
            return found
    return None


@functools.cache
def instruction_set() -> int:
    """The best the processor has: 0 baseline, 1 AVX2, 2 AVX-512."""
    native = library()
    return 0 if native is None else native.vim_best_isa()


def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    initial_state: Tensor | None,
    delta_softplus: bool,
    reverse: Sequence[bool],
    combine: str,
    *,
    return_last_state: bool,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y, the last state and what the backward pass needs: y before the gate, and the state every few steps."""
    # kept in a list until after the call: the library gets their addresses
    tensors = [
        *(_channels_last(u), _channels_last(delta), _native(A), _channels_last(B), _channels_last(C), _native(D)),
        *(None if z is None else _channels_last(z), _native(delta_bias), _native(initial_state)),
    ]
    b, k, l, d = u.shape
    y = u.new_empty(b, k if combine == "none" else 1, l, d, dtype=torch.float32)
    last_state = A.new_empty(b, k, d, A.shape[2]) if return_last_state else A.new_empty(0)
    ungated, saved = kept_for_backward(u, A, z, combine, save)
    _call("vim_scan", _scan(tensors, y, last_state, ungated, saved, delta_softplus, reverse, combine))
    return y.to(u.dtype), last_state, ungated, saved


def kept_for_backward(u: Tensor, A: Tensor, z: Tensor | None, combine: str, save: bool) -> tuple[Tensor, Tensor]:
    """Empty tensors for y before the gate and for the states, of no size where they are not needed."""
    b, k, l, d = u.shape
    if not save:
        return A.new_empty(0), A.new_empty(0)
    ungated = A.new_empty(0) if z is None else A.new_empty(b, k if combine == "none" else 1, l, d)
    return ungated, A.new_empty(b, k, -(-l // _constant("vim_saved_every")), d * A.shape[2])


@functools.cache
def _constant(name: str) -> int:
    return getattr(library(), name)()


def selective_scan_backward(
    grad_y: Tensor,
    grad_state: Tensor | None,
    ungated: Tensor,
    saved: Tensor,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    initial_state: Tensor | None,
    delta_softplus: bool,
    reverse: Sequence[bool],
    combine: str,
) -> list[Tensor | None]:
    """The gradients of u, delta, A, B, C, D, z, delta_bias and initial_state, float32."""
    # kept in a list until after the call: the library gets their addresses
    tensors = [
        *(_channels_last(u), _channels_last(delta), _native(A), _channels_last(B), _channels_last(C), _native(D)),
        *(None if z is None else _channels_last(z), _native(delta_bias), _native(initial_state)),
    ]
    (b, k, l, d), g, n = u.shape, B.shape[3], A.shape[2]
    grad_y = _channels_last(grad_y)
    grad_state = None if grad_state is None else grad_state.float().contiguous()
    scan = _scan(tensors, grad_y, None, ungated, saved, delta_softplus, reverse, combine)
    du, ddelta = empty_rows(A, b, k, l, d), empty_rows(A, b, k, l, d)
    dz = None if z is None else A.new_empty(z.shape)
    # One partial sum a piece of channels, one an image: added up in a fixed order, whatever the number of threads.
    pieces = g * -(-(d // g) // _scan_piece(u, g, combine))
    dB, dC = A.new_empty(b, k, l, pieces, n), A.new_empty(b, k, l, pieces, n)
    dA, dstate = A.new_empty(b, k, d, n), None if initial_state is None else A.new_empty(b, k, d, n)
    dD = None if D is None else A.new_empty(b, k, d)
    dbias = None if delta_bias is None else A.new_empty(b, k, d)
    shared = combine != "none"
    grads = _SCAN_GRADS.pack(
        *(*_rows(grad_y, shared), *_rows(du), *_rows(ddelta), *_rows(dz, shared), *_rows(dB), *_rows(dC)),
        *map(_pointer, (grad_state, dA, dD, dbias, dstate)),
    )
    _call("vim_scan_backward", scan, grads)
    dB, dC = (t.unflatten(3, (g, -1)).sum(4) for t in (dB, dC))
    return [
        du,
        ddelta,
        dA.sum(0),
        dB,
        dC,
        None if dD is None else dD.sum(0),
        dz,
        None if dbias is None else dbias.sum(0),
        dstate,
    ]


def causal_conv1d(x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool, reverse: Sequence[bool]) -> Tensor:
    """The convolution, in x's dtype."""
    dtype, x, weight, bias = x.dtype, _channels_last(x), weight.float().contiguous(), _native(bias)
    y = empty_rows(x, *x.shape)
    _call("vim_conv", _conv(x, y, weight, bias, silu, reverse))
    return y.to(dtype)


def causal_conv1d_backward(
    grad_y: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool, reverse: Sequence[bool]
) -> list[Tensor | None]:
    """The gradients of x, weight and bias, float32."""
    b, k, l, d = x.shape
    x, weight, bias, grad_y = _channels_last(x), weight.float().contiguous(), _native(bias), _channels_last(grad_y)
    dx = empty_rows(x, b, k, l, d)
    chunks = b * -(-l // _constant("vim_conv_tokens"))
    dweight, dbias = x.new_empty(chunks, k, d, weight.shape[2]), x.new_empty(chunks, k, d)
    grads = _CONV_GRADS.pack(*_rows(grad_y), *_rows(dx), _pointer(dweight), _pointer(dbias))
    _call("vim_conv_backward", _conv(x, grad_y, weight, bias, silu, reverse), grads)
    return [dx, dweight.sum(0), dbias.sum(0)]


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x over its root mean square, times the weight, in x's dtype."""
    dtype, x, weight = x.dtype, x.float().contiguous(), weight.float().contiguous()
    y = torch.empty_like(x)
    _call("vim_norm", _norm(x, weight, eps, y))
    return y.to(dtype)


def rms_norm_backward(grad_y: Tensor, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The gradients of x and weight, in their dtype."""
    dtype = x.dtype
    grad_y, x, weight = (t.float().contiguous() for t in (grad_y, x, weight))
    rows, d = x.numel() // x.shape[-1], x.shape[-1]
    dx, dweight = torch.empty_like(x), x.new_empty(-(-rows // _constant("vim_norm_rows")), d)
    grads = _NORM_GRADS.pack(grad_y.data_ptr(), dx.data_ptr(), dweight.data_ptr())
    _call("vim_norm_backward", _norm(x, weight, eps, None), grads)
    return dx.to(dtype), dweight.sum(0).to(dtype)


def _norm(x: Tensor, weight: Tensor, eps: float, y: Tensor | None) -> bytes:
    d = x.shape[-1]
    return _NORM.pack(x.numel() // d, d, eps, x.data_ptr(), weight.data_ptr(), _pointer(y))


def _call(function: str, *structures: bytes) -> None:
    getattr(library(), function)(*structures, instruction_set(), torch.get_num_threads())


def _channels_last(x: Tensor) -> Tensor:
    x = x.float()
    return x if x.stride(-1) == 1 else x.contiguous()


def _pointer(x: Tensor | None) -> int:
    return 0 if x is None or x.numel() == 0 else x.data_ptr()


def _rows(x: Tensor | None, shared: bool = False) -> tuple[int, ...]:
    """(b, k, l, d) or (b, k, l, g, n) as the library sees it; shared: one for all directions."""
    if x is None or x.numel() == 0:
        return (0,) * 5
    image, direction, token, group = (*x.stride(), 0)[:4] if x.dim() == 4 else x.stride()[:4]
    return x.data_ptr(), image, 0 if shared else direction, token, group


def _native(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.float().contiguous()


def _bits(flags: Sequence[bool]) -> int:
    return sum(1 << i for i, flag in enumerate(flags) if flag)


def _piece(tasks: int, tokens: int, channels: int) -> int:
    """How many channels a task works on, a multiple of 16, so that a call has enough tasks for the threads.

    A function of the shapes alone, so that results do not depend on the number of threads.
    """
    pieces = max(-(-TASKS // tasks), -(-channels // WIDEST_PIECE))
    narrowest = 96 if tokens > 1024 else 16  # what is too long for the caches is read in longer runs
    return max(-(-channels // pieces // 16) * 16, narrowest)


def _scan_piece(u: Tensor, g: int, combine: str) -> int:
    b, k, l, d = u.shape
    return _piece(b * g * (k if combine == "none" else 1), l, d // g)


def _scan(
    tensors: Sequence[Tensor | None],
    y: Tensor,
    last_state: Tensor | None,
    ungated: Tensor,
    saved: Tensor,
    softplus: bool,
    reverse: Sequence[bool],
    combine: str,
) -> bytes:
    u, delta, A, B, C, D, z, delta_bias, initial_state = tensors
    assert u is not None and A is not None and B is not None
    (b, k, l, d), g, shared = u.shape, B.shape[3], combine != "none"
    return _SCAN.pack(
        *(b, k, l, d, g, A.shape[2]),
        *(_scan_piece(u, g, combine), _bits(reverse), softplus, shared),
        1 / k if combine == "mean" else 1.0,
        *(
            *_rows(u),
            *_rows(delta),
            *_rows(B),
            *_rows(C),
            *_rows(z, shared),
            *_rows(y, shared),
            *_rows(ungated, shared),
        ),
        *map(_pointer, (A, D, delta_bias, initial_state, last_state, saved)),
    )


def _conv(x: Tensor, y: Tensor, weight: Tensor, bias: Tensor | None, silu: bool, reverse: Sequence[bool]) -> bytes:
    b, k, l, d = x.shape
    return _CONV.pack(
        *(b, k, l, d, weight.shape[2], _bits(reverse), silu),
        *(*_rows(x), *_rows(y), _pointer(weight), _pointer(bias)),
    )
