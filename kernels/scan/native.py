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
_SCAN = struct.Struct(f"10q f {ROWS * 7} 6q")
_SCAN_GRADS = struct.Struct(f"{ROWS * 6} 5q")


def selective_scan(inputs: Inputs, options: Options, *, save: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return y, the last state, and what the backward pass needs: y before the gate, and the state every few steps."""
    floats = _in_float32(inputs)  # alive until after the call: the library has their addresses
    u, A = inputs.u, inputs.A
    b, k, _, d = u.shape
    y = empty_like_tokens(u, shape_of_y(inputs, options), torch.float32)
    last_state = A.new_empty((b, k, d, A.shape[2]) if options.return_last_state else 0)
    ungated, saved = kept_for_backward(inputs, options, save)
    if save:
        saved[:, :, -1].zero_()  # which has more numbers than sums of step sizes
    call("vim_scan", _pack_scan(floats, options, y, last_state, ungated, saved))
    return y.to(u.dtype), last_state, ungated, saved


def kept_for_backward(inputs: Inputs, options: Options, save: bool) -> tuple[Tensor, Tensor]:
    """Return uninitialised tensors for y before the gate and for the states; each is empty if it is not needed.

    The states are (b, k, c + 1, d n): behind those of c chunks are the sums of the step sizes, in the first d numbers.
    """
    A = inputs.A
    if not save:
        return A.new_empty(0), A.new_empty(0)
    b, k, l, d = inputs.u.shape
    ungated = A.new_empty(0) if inputs.z is None else empty_like_tokens(inputs.u, shape_of_y(inputs, options), A.dtype)
    return ungated, A.new_empty(b, k, -(-l // constant("vim_saved_every")) + 1, d * A.shape[2])


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
    call("vim_scan_backward", _pack_scan(floats, options, None, None, ungated, saved), grads)
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
    inputs: Inputs, options: Options, y: Tensor | None, last_state: Tensor | None, ungated: Tensor, saved: Tensor
) -> bytes:
    """Return the fields of `Scan`; a backward pass has no y and no last state to write."""
    (b, k, l, d), g, n = inputs.u.shape, inputs.B.shape[3], inputs.A.shape[2]
    shared = options.combine != "none"
    return _SCAN.pack(
        *(b, k, l, d, g, n),
        *(_piece(inputs, options), pack(options.reverse), options.delta_softplus, shared),
        1 / k if options.combine == "mean" else 1.0,
        *(*rows(inputs.u), *rows(inputs.delta), *rows(inputs.B), *rows(inputs.C)),
        *(*rows(inputs.z, shared), *rows(y, shared), *rows(ungated, shared)),
        *map(pointer, (inputs.A, inputs.D, inputs.delta_bias, inputs.initial_state, last_state, saved)),
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
