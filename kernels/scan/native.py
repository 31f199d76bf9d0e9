"""The selective scan on the CPU: calls of scan.h."""

import struct

import torch
from torch import Tensor

from ..directions import empty_gradient, empty_like_tokens, pack
from ..native.library import ROWS, as_dense_floats, call, constant, pointer, rows
from .reference import Inputs, Options, shape_of_y

TASKS = 16  # the least number of tasks of a call, if it has the channels
WIDEST_PIECE = 384  # channels of a task: their state stays in the first-level cache
# Scan and ScanGrads of common.h, field by field. The struct module packs them in a third of ctypes' time.
_SCAN = struct.Struct(f"11q f {ROWS * 7} 7q")
_SCAN_GRADS = struct.Struct(f"{ROWS * 6} 5q")


def selective_scan(inputs: Inputs, options: Options, *, save: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return y, the last state, and what the backward pass needs: y before the gate, and the state every few steps."""
    (b, k, l, d), A = inputs.u.shape, inputs.A
    last_state = A.new_empty((b, k, d, A.shape[2]) if options.return_last_state else 0)
    ungated, saved = kept_for_backward(inputs, options, save)
    return _scan(inputs, options, l, last_state, None, ungated, saved), last_state, ungated, saved


def selective_scan_with_states(
    inputs: Inputs, options: Options, *, every: int, save: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return y, the state and the sum of the step sizes after each `every` tokens, y before the gate, and the states.

    The latter are for the backward pass. `every` is a multiple of 256.
    """
    (b, k, l, d), A = inputs.u.shape, inputs.A
    states = A.new_empty(b, k, max(-(-l // every), 1), d, A.shape[2])
    elapsed, ungated = A.new_empty(states.shape[:4]), empty_ungated(inputs, options)
    _, saved = kept_for_backward(inputs, options, save)
    return _scan(inputs, options, every, states, elapsed, ungated, saved), states, elapsed, ungated, saved


def _scan(
    inputs: Inputs, options: Options, every: int, states: Tensor, elapsed: Tensor | None, ungated: Tensor, saved: Tensor
) -> Tensor:
    floats = _in_float32(inputs)  # alive until after the call: the library has their addresses
    y = empty_like_tokens(inputs.u, shape_of_y(inputs, options), torch.float32)
    call("vim_scan", _pack_scan(floats, options, every, y, states, elapsed, ungated, saved))
    return y.to(inputs.u.dtype)


def empty_ungated(inputs: Inputs, options: Options) -> Tensor:
    """Return an uninitialised tensor for y before the gate; it is empty if there is no gate."""
    A = inputs.A
    return A.new_empty(0) if inputs.z is None else empty_like_tokens(inputs.u, shape_of_y(inputs, options), A.dtype)


def kept_for_backward(inputs: Inputs, options: Options, save: bool) -> tuple[Tensor, Tensor]:
    """Return uninitialised tensors for y before the gate and for the states, (b, k, c, d n), of c chunks.

    Each is empty if it is not needed.
    """
    A = inputs.A
    if not save:
        return A.new_empty(0), A.new_empty(0)
    b, k, l, d = inputs.u.shape
    return empty_ungated(inputs, options), A.new_empty(b, k, -(-l // constant("vim_saved_every")), d * A.shape[2])


def selective_scan_backward(
    grad_y: Tensor, grad_state: Tensor | None, ungated: Tensor, saved: Tensor, inputs: Inputs, options: Options
) -> Inputs:
    """Return the gradients of the inputs, float32."""
    floats = _in_float32(inputs)  # alive until after the call, as are grad_y and grad_state
    grad_y, grad_state = grad_y.float(), as_dense_floats(grad_state)
    A, shared = inputs.A, options.combine != "none"
    (b, k, l, d), g, n = inputs.u.shape, inputs.B.shape[3], A.shape[2]

    # Partial sums, one for each image, and for B and C one for each piece of channels. They are added up in a fixed
    # order, so that the result does not depend on the number of threads.
    pieces = g * -(-(d // g) // _piece(inputs, options))
    dB, dC = A.new_empty(b, k, l, pieces, n), A.new_empty(b, k, l, pieces, n)
    dA = A.new_empty(b, k, d, n)
    dD = None if inputs.D is None else A.new_empty(b, k, d)
    dbias = None if inputs.delta_bias is None else A.new_empty(b, k, d)
    # whole gradients
    du, ddelta = empty_gradient(inputs.u, A.dtype), empty_gradient(inputs.delta, A.dtype)
    dz = None if inputs.z is None else empty_gradient(inputs.z, A.dtype)
    dstate = None if inputs.initial_state is None else A.new_empty(b, k, d, n)

    grads = _SCAN_GRADS.pack(
        *(*rows(grad_y, shared), *rows(du), *rows(ddelta), *rows(dz, shared), *rows(dB), *rows(dC)),
        *map(pointer, (grad_state, dA, dD, dbias, dstate)),
    )
    call("vim_scan_backward", _pack_scan(floats, options, l, None, None, None, ungated, saved), grads)
    return Inputs(
        u=du,
        delta=ddelta,
        A=dA.sum(0),
        B=dB.unflatten(3, (g, -1)).sum(4),
        C=dC.unflatten(3, (g, -1)).sum(4),
        D=None if dD is None else dD.sum(0),
        z=dz,
        delta_bias=None if dbias is None else dbias.sum(0),
        initial_state=dstate,
    )


def _in_float32(inputs: Inputs) -> Inputs:
    return Inputs(
        u=inputs.u.float(),
        delta=inputs.delta.float(),
        A=as_dense_floats(inputs.A),
        B=inputs.B.float(),
        C=inputs.C.float(),
        D=as_dense_floats(inputs.D),
        z=None if inputs.z is None else inputs.z.float(),
        delta_bias=as_dense_floats(inputs.delta_bias),
        initial_state=as_dense_floats(inputs.initial_state),
    )


def _pack_scan(
    inputs: Inputs,
    options: Options,
    every: int,
    y: Tensor | None,
    states: Tensor | None,
    elapsed: Tensor | None,
    ungated: Tensor,
    saved: Tensor,
) -> bytes:
    """Return the fields of `Scan`; a backward pass has no y and no states to write."""
    (b, k, l, d), g, n = inputs.u.shape, inputs.B.shape[3], inputs.A.shape[2]
    shared = options.combine != "none"
    return _SCAN.pack(
        *(b, k, l, d, g, n),
        *(_piece(inputs, options), pack(options.reverse), options.delta_softplus, shared, max(every, 1)),
        1 / k if options.combine == "mean" else 1.0,
        *(*rows(inputs.u), *rows(inputs.delta), *rows(inputs.B), *rows(inputs.C)),
        *(*rows(inputs.z, shared), *rows(y, shared), *rows(ungated, shared)),
        *map(pointer, (inputs.A, inputs.D, inputs.delta_bias, inputs.initial_state, states, elapsed, saved)),
    )


def _piece(inputs: Inputs, options: Options) -> int:
    """Return how many channels of a group a task works on: a multiple of 16, few enough to have tasks for all threads.

    It depends on the shapes alone, so that results do not depend on the number of threads.
    """
    b, directions, tokens, d = shape_of_y(inputs, options)  # directions that are added up are one task
    channels, tasks = d // inputs.B.shape[3], b * directions * inputs.B.shape[3]
    pieces = max(-(-TASKS // tasks), -(-channels // WIDEST_PIECE))
    narrowest = 96 if tokens > 1024 else 16  # longer runs of channels where the tokens do not fit in the caches
    return max(-(-channels // pieces // 16) * 16, narrowest)
