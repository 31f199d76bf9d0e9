"""State space duality on a GPU, in Triton: matrix products on tensor cores, and a backward pass without atomics.

A program walks the chunks of one head of one image in one direction, with the state in registers. Within a chunk,
tokens reach each other through a masked matrix product, and the chunks before through the state. A reversed direction
takes its tokens from the last to the first. If the programs are too few for a GPU, long sequences are cut into
segments: their own parts of the states are computed first, and then passed on from segment to segment.

Sizes: b images, k directions, l tokens, h heads, p channels of a head, g groups of B and C, n states; c chunks,
s segments.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..directions import dense, empty_rows, pack, unit_stride
from ..gate import combine_directions, differentiate_combined
from ..tiles import on_its_device
from .reference import Inputs, Options, shape_of_y
from .triton_kernels import forward_kernel, gradients_kernel, pass_kernel, states_kernel, steps_kernel

HEADS = 16  # whose step sizes a program computes
PASSED = 1024  # numbers of a state that a program passes on
LEAST = 16  # rows or columns of a matrix that tensor cores take
STATE = 4096  # numbers of a head's state in the registers of a program
SHORT = 256  # tokens: to cut them into segments gains nothing
BUSY = 512  # programs; fewer than half of them leave a GPU idle
# by (b k, l, h, p, g, n) what `configuration` returns instead of its default; found with tune.py, and goes with it
TUNED: dict[tuple[int, int, int, int, int, int], tuple[int, int]] = {}
# The operands of tensor cores, and how they round float32. The state and the sums are float32 always. float16's own
# operands would overflow where a state or a gradient is large: tf32 has as many digits.
OPERANDS = {
    torch.float32: (tl.float32, "tf32x3"),  # as exact as float32
    torch.bfloat16: (tl.bfloat16, None),
    torch.float16: (tl.float32, "tf32"),
}
# The most tokens of a chunk, and the default: longer ones spill registers. Hopper's bfloat16 operands stay in shared
# memory; tf32's are in registers, and tf32x3's there twice. The A100 has room for 32 of bfloat16.
CHUNK = {torch.float32: 16, torch.bfloat16: 64, torch.float16: 16}


@on_its_device
def ssd(inputs: Inputs, options: Options, *, save: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return y, the last state, and what the backward pass needs: y before the gate, the state before each chunk."""
    launch = _launch(inputs, options, slopes=False)
    z, D = unit_stride(inputs.z), dense(inputs.D)
    y = inputs.x.new_empty(shape_of_y(inputs, options))
    ungated, saved = kept_for_backward(inputs, options, save)
    last_state = inputs.A.new_empty(launch.states() if options.return_last_state else 0)

    # Directions that are added up take another kernel, which also gates the sum: `each` holds them until then.
    apart = options.combine != "none" and inputs.x.shape[1] > 1
    each = inputs.x.new_empty(inputs.x.shape, dtype=_ungated(inputs.x)) if apart and not ungated.numel() else ungated
    forward_kernel[(launch.programs * launch.segments,)](
        *(*launch.rows, *launch.steps[:3], D),
        *((None, None) if apart or z is None else (z, z.stride())),
        *(launch.starts(launch.x, launch.B, dense(inputs.initial_state), backwards=False), saved if save else None),
        *(None if apart else y, each if each.numel() else None, (each if apart else y).stride()),
        *(last_state if options.return_last_state else None, *launch.sizes),
        **launch.options,
    )
    if apart:
        combine_directions(each.flatten(3), None if z is None else z.flatten(3), options.combine, y.flatten(3))
    return y, last_state, ungated, saved


def kept_for_backward(inputs: Inputs, options: Options, save: bool) -> tuple[Tensor, Tensor]:
    """Return uninitialised tensors for each direction's y before the gate and for the states, (b, k, h, c, p, n).

    Each is empty if it is not needed.
    """
    x, A = inputs.x, inputs.A
    if not save:
        return x.new_empty(0), A.new_empty(0)
    b, k, l, h, p = x.shape
    chunk = _chunk(inputs, options)
    ungated = x.new_empty(0 if inputs.z is None else x.shape, dtype=_ungated(x))
    return ungated, A.new_empty(b, k, h, triton.cdiv(l, chunk), p, inputs.B.shape[4])


@on_its_device
def ssd_backward(
    grad_y: Tensor, grad_state: Tensor | None, ungated: Tensor, saved: Tensor, inputs: Inputs, options: Options
) -> Inputs:
    """Return the gradients of the inputs.

    The gradient of the state is walked from the last chunk to the first, as the state is from the first to the last.
    Every other gradient follows from a chunk's tokens, the state before it and the gradient of the state after it.
    """
    launch, x, z, D = _launch(inputs, options, slopes=True), inputs.x, unit_stride(inputs.z), dense(inputs.D)
    (b, k, l, h, p), (g, n) = x.shape, inputs.B.shape[3:]
    blocks, chunks = launch.programs // (b * k * h), saved.shape[3]

    # the gradient of each direction's y, and of z
    grad_y = unit_stride(grad_y)
    dy, dz = grad_y, None
    if z is not None or options.combine == "mean":
        dy, dz = x.new_empty(grad_y.shape, dtype=_ungated(x)), None if z is None else empty_rows(z, *z.shape)
        flat = [t if t is None else t.flatten(3) for t in (z, dz)]
        each = ungated if z is None else ungated.flatten(3)
        differentiate_combined(grad_y.flatten(3), each, flat[0], options.combine, k, dy.flatten(3), flat[1])
    dy = dy.expand(x.shape)

    pulls = saved.new_empty(saved.shape)
    dstate = None if inputs.initial_state is None else saved.new_empty(launch.states())
    pull = launch.starts(dy, launch.C, dense(grad_state), backwards=True)
    launch.walk(dy, launch.C, pull, pulls, dstate, None, None, backwards=True)
    dx = empty_rows(x, *x.shape)
    # partial sums, added up in a fixed order
    dB, dC = (saved.new_empty(h // g * blocks, k, b, l, g, n).transpose(1, 2) for _ in range(2))
    ddt, dD = saved.new_empty(blocks, b, k, h, l), saved.new_empty(b, chunks, k, h, p)
    dA, dbias = (saved.new_empty(blocks, b, chunks, k, h) for _ in range(2))
    gradients_kernel[(launch.programs * chunks,)](
        *(*launch.rows, *launch.steps, launch.A, D, dy, dy.stride(), saved, pulls, dx, dx.stride(), ddt),
        *(dB, dC, (*dB.stride()[1:5], dB.stride(0)), dA, dD, dbias, k, l, h, p, g, n, pack(options.reverse)),
        **launch.options,
    )
    return Inputs(
        x=dx,
        dt=ddt.sum(0).transpose(2, 3),
        A=dA.sum((0, 1, 2)),
        B=dB.sum(0),
        C=dC.sum(0),
        D=None if D is None else dD.sum((0, 1)),
        z=dz,
        dt_bias=None if inputs.dt_bias is None else dbias.sum((0, 1, 2)),
        initial_state=dstate,
    )


@dataclass
class _Launch:
    """What all kernels of a call take."""

    x: Tensor
    B: Tensor
    C: Tensor
    A: Tensor
    steps: tuple[Tensor | None, ...]  # what steps_kernel writes
    sizes: tuple[int, ...]
    programs: int  # for all tokens
    segments: int
    options: dict[str, object]

    @property
    def rows(self) -> tuple[object, ...]:
        return tuple(part for x in (self.x, self.B, self.C) for part in (x, x.stride()))

    def states(self, *parts: int) -> tuple[int, ...]:
        """Return the shape of the states, of a number of parts of the sequence or at its end."""
        b, k, _, h, p = self.x.shape
        return b, k, h, *parts, p, self.B.shape[4]

    def starts(self, x: Tensor, B: Tensor, start: Tensor | None, *, backwards: bool) -> Tensor | None:
        """Return the state before each segment, (b, k, h, s, p, n), from the state before the first, if there is one.

        `backwards` takes dy for x, C for B, and the gradient of the state, and the last segment is the first.
        """
        if self.segments == 1:
            return start
        ends = self.A.new_empty(self.states(self.segments))
        decays = self.A.new_empty(ends.shape[:4])
        self.walk(x, B, None, None, None, ends, decays, backwards=backwards)
        size = ends.shape[4] * ends.shape[5]
        grid = (decays.numel() // self.segments * triton.cdiv(size, PASSED),)
        pass_kernel[grid](ends, decays, start, self.segments, size, BLOCK=PASSED)
        return ends

    def walk(self, x: Tensor, B: Tensor, *states: Tensor | None, backwards: bool) -> None:
        """Walk the segments with the state alone: `states` are what :func:`states_kernel` reads and writes."""
        segments = self.segments if states[-1] is None else self.segments - 1
        states_kernel[(self.programs * segments,)](
            *(x, x.stride(), B, B.stride(), *self.steps[:3], *states, *self.sizes), BACKWARDS=backwards, **self.options
        )


def _launch(inputs: Inputs, options: Options, *, slopes: bool) -> _Launch:
    x, B, C = (unit_stride(t) for t in (inputs.x, inputs.B, inputs.C))
    (b, k, l, h, p), (g, n) = x.shape, B.shape[3:]
    chunk, (_, segment) = _chunk(inputs, options), _configuration(inputs)
    segment = triton.cdiv(segment, chunk) * chunk
    channels, states = tile(p, n)
    operand, precision = OPERANDS[x.dtype]
    A, chunks = inputs.A.contiguous(), triton.cdiv(l, chunk)
    steps = A.new_empty(4 if slopes else 3, b, k, h, chunks * chunk).unbind()
    steps_kernel[(b * k * chunks * triton.cdiv(h, HEADS),)](
        *(inputs.dt, inputs.dt.stride(), A, dense(inputs.dt_bias), *(*steps, None)[:4]),
        *(k, l, h, pack(options.reverse), options.dt_min, options.dt_max),
        CHUNK=chunk,
        HEADS=HEADS,
        SOFTPLUS=options.dt_softplus,
    )
    return _Launch(
        *(x, B, C, A, (*steps, None)[:4]),
        sizes=(k, l, h, p, g, n, segment, pack(options.reverse)),
        programs=b * k * h * triton.cdiv(p, channels),
        segments=triton.cdiv(l, segment),
        options={
            **{"CHUNK": chunk, "P": channels, "N": states, "OPERAND": operand, "PRECISION": precision},
            "num_warps": 8,
            "num_stages": 1,
        },
    )


def _chunk(inputs: Inputs, options: Options) -> int:
    """Return the tokens of a chunk: those asked for, as a power of 2 that tensor cores and registers take."""
    chunk, _ = _configuration(inputs)
    if not options.chunk_size:
        return chunk
    return min(max(triton.next_power_of_2(options.chunk_size), LEAST), CHUNK[inputs.x.dtype])


def _configuration(inputs: Inputs) -> tuple[int, int]:
    (b, k, l, h, p), (g, n) = inputs.x.shape, inputs.B.shape[3:]
    return configuration(inputs.x.dtype, b * k, l, h, p, g, n)


def configuration(dtype: torch.dtype, rows: int, l: int, h: int, p: int, g: int, n: int) -> tuple[int, int]:
    """Return the tokens of a chunk and of a segment, for b k rows.

    They depend on the dtype and the shapes alone, because the last bit of the results depends on them.
    """
    if (rows, l, h, p, g, n) in TUNED:
        chunk, segment = TUNED[rows, l, h, p, g, n]
        return min(chunk, CHUNK[dtype]), segment
    programs, chunk = rows * h * triton.cdiv(p, tile(p, n)[0]), CHUNK[dtype]
    segments = BUSY // programs if l > SHORT else 1
    # the states between the segments take about as long as the walk itself: two segments would gain nothing
    return chunk, triton.cdiv(triton.cdiv(l, chunk), segments if segments > 2 else 1) * chunk


def tile(p: int, n: int) -> tuple[int, int]:
    """Return the channels and the states of a program, powers of 2: what it has of a head's state in registers."""
    states = max(triton.next_power_of_2(n), LEAST)
    return min(max(triton.next_power_of_2(p), LEAST), max(STATE // states, LEAST)), states


def _ungated(x: Tensor) -> torch.dtype:
    """Return the dtype of y before the gate and of its gradient: with a small gate they may pass float16's 65,504."""
    return torch.float32 if x.dtype == torch.float16 else x.dtype
