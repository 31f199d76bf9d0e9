"""State space duality on the CPU: calls of ssd.h."""

import struct

import torch
from torch import Tensor

from ..directions import empty_gradient, pack
from ..native.library import ROWS, as_dense_floats, as_floats, call, constant, pointer, rows
from .reference import Inputs, Options, shape_of_y

TASK_COST = 0.4  # of the products of B and C that the heads of a task share, in heads
TASKS = 16  # the least number of tasks of a backward pass, if they are not too small
CHANNELS = 192  # of its smallest task
# Ssd and SsdGrads of common.h, field by field
_SSD = struct.Struct(f"11q 3f {ROWS * 7} 6q")
_SSD_GRADS = struct.Struct(f"{ROWS * 6} 5q")


def ssd(inputs: Inputs, options: Options, *, save: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return y, the last state, and what the backward pass needs: y before the gate, and the state every few steps."""
    floats = _in_float32(inputs)  # alive until after the call: the library has their addresses
    x, A = inputs.x, inputs.A
    b, k, _, h, p = x.shape
    y = x.new_empty(shape_of_y(inputs, options), dtype=torch.float32)
    last_state = A.new_empty((b, k, h, p, inputs.B.shape[4]) if options.return_last_state else 0)
    ungated, saved = kept_for_backward(inputs, options, save)
    call("vim_ssd", _pack_ssd(floats, options, _piece(inputs, options), y, last_state, ungated, saved))
    return y.to(x.dtype), last_state, ungated, saved


def kept_for_backward(inputs: Inputs, options: Options, save: bool) -> tuple[Tensor, Tensor]:
    """Return uninitialised tensors for y before the gate and for the states; each is empty if it is not needed.

    The states are (b, k, c, h, n, p), those before each of c runs of tokens.
    """
    A = inputs.A
    if not save:
        return A.new_empty(0), A.new_empty(0)
    b, k, l, h, p = inputs.x.shape
    ungated = A.new_empty(0 if inputs.z is None else shape_of_y(inputs, options))
    return ungated, A.new_empty(b, k, -(-l // constant("vim_ssd_saved_every")), h, inputs.B.shape[4], p)


def ssd_backward(
    grad_y: Tensor, grad_state: Tensor | None, ungated: Tensor, saved: Tensor, inputs: Inputs, options: Options
) -> Inputs:
    """Return the gradients of the inputs, float32."""
    floats = _in_float32(inputs)  # alive until after the call, as are grad_y and grad_state
    grad_y, grad_state = as_floats(grad_y), as_dense_floats(grad_state)
    A, shared = inputs.A, options.combine != "none"
    (b, k, l, h, p), (g, n) = inputs.x.shape, inputs.B.shape[3:]

    # Partial sums, one for each image, and for B and C one for each piece of heads. They are added up in a fixed order,
    # so that the result does not depend on the number of threads.
    piece = _backward_piece(inputs)
    pieces = g * -(-(h // g) // piece)
    dB, dC = A.new_empty(b, k, l, pieces, n), A.new_empty(b, k, l, pieces, n)
    dA = A.new_empty(b, k, h)
    dD = None if inputs.D is None else A.new_empty(b, k, h, p)
    dbias = None if inputs.dt_bias is None else A.new_empty(b, k, h)
    # whole gradients
    dx, ddt = empty_gradient(inputs.x, A.dtype), empty_gradient(inputs.dt, A.dtype)
    dz = None if inputs.z is None else empty_gradient(inputs.z, A.dtype)
    dstate = None if inputs.initial_state is None else A.new_empty(b, k, h, p, n)

    grads = _SSD_GRADS.pack(
        *(*rows(grad_y, shared), *rows(dx), *rows(ddt), *rows(dz, shared), *rows(dB), *rows(dC)),
        *map(pointer, (grad_state, dA, dD, dbias, dstate)),
    )
    call("vim_ssd_backward", _pack_ssd(floats, options, piece, None, None, ungated, saved), grads)
    return Inputs(
        x=dx,
        dt=ddt,
        A=dA.sum(0),
        B=dB.unflatten(3, (g, -1)).sum(4),
        C=dC.unflatten(3, (g, -1)).sum(4),
        D=None if dD is None else dD.sum(0),
        z=dz,
        dt_bias=None if dbias is None else dbias.sum(0),
        initial_state=dstate,
    )


def _in_float32(inputs: Inputs) -> Inputs:
    return Inputs(
        x=as_floats(inputs.x),
        dt=inputs.dt.float(),
        A=as_dense_floats(inputs.A),
        B=as_floats(inputs.B),
        C=as_floats(inputs.C),
        D=as_dense_floats(inputs.D),
        z=as_floats(inputs.z),
        dt_bias=as_dense_floats(inputs.dt_bias),
        initial_state=as_dense_floats(inputs.initial_state),
    )


def _pack_ssd(
    inputs: Inputs,
    options: Options,
    piece: int,
    y: Tensor | None,
    last_state: Tensor | None,
    ungated: Tensor,
    saved: Tensor,
) -> bytes:
    """Return the fields of `Ssd`; a backward pass has no y and no last state to write."""
    (b, k, l, h, p), (g, n) = inputs.x.shape, inputs.B.shape[3:]
    shared = options.combine != "none"
    return _SSD.pack(
        *(b, k, l, h, p, g, n),
        *(piece, pack(options.reverse), options.dt_softplus, shared),
        *(1 / k if options.combine == "mean" else 1.0, options.dt_min, options.dt_max),
        *(*rows(inputs.x), *rows(inputs.dt), *rows(inputs.B), *rows(inputs.C)),
        *(*rows(inputs.z, shared), *rows(y, shared), *rows(ungated, shared)),
        *map(pointer, (inputs.A, inputs.D, inputs.dt_bias, inputs.initial_state, last_state, saved)),
    )


def _piece(inputs: Inputs, options: Options) -> int:
    """Return how many heads of a group a task works on: the number for which the threads finish first.

    Results do not depend on it.
    """
    b, directions, _, h, _ = shape_of_y(inputs, options)  # directions that are added up are one task
    heads, threads = h // inputs.B.shape[3], torch.get_num_threads()

    def time(piece: int) -> float:
        tasks = b * directions * inputs.B.shape[3] * -(-heads // piece)
        return -(-tasks // threads) * (piece + TASK_COST)

    return min(range(1, heads + 1), key=time)


def _backward_piece(inputs: Inputs) -> int:
    """Return the same for the backward pass: at least `CHANNELS`, few enough heads to have tasks for all threads.

    It depends on the shapes alone, since it sets the order in which gradients are added up.
    """
    b, k, _, h, p = inputs.x.shape
    g = inputs.B.shape[3]
    pieces = -(-TASKS // (b * k * g))
    return min(max(-(-(h // g) // pieces), CHANNELS // p, 1), h // g)
