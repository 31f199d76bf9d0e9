"""The selective scan on a GPU, in Triton: forward, and backward without atomics.

A program walks the tokens of one direction of one image for a block of channels. It keeps the state in registers: a
tuple of n float32 vectors, with the loops over n unrolled. A reversed direction has another first token and step. If
the programs are too few for a GPU, the tokens are cut into segments, whose last states are computed first. States that
are too many for the registers take several launches.

Sizes: b images, k directions, l tokens, d channels, g groups of B and C, n states; s segments, c chunks of 64 tokens.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from ..directions import MaybeTensor, dense, empty_rows, pack, unit_stride
from ..gate import combine_directions, differentiate_combined
from ..tiles import on_its_device
from .reference import Inputs, Options, shape_of_y
from .triton_kernels import ends_kernel, forward_kernel, gradients_kernel, states_kernel

CHUNK = 64  # tokens between two saved states
MOST_STATES = 24  # in a launch: more would spill registers and take minutes to compile
BUSY = 1536  # programs: three warps for each scheduler of an H100, which hide one another's latencies
# by (b k, l, d, g, n) what `configuration` returns instead of its default; found with tune.py, and goes with it
TUNED: dict[tuple[int, int, int, int, int], tuple[int, int]] = {}
# one warp, so that sums need no barrier; with more registers a scheduler of NVIDIA's would have room for two warps
LAUNCH: dict[str, object] = {"num_warps": 1, "num_stages": 1, "enable_fp_fusion": True}
if torch.version.hip is None:
    LAUNCH["maxnreg"] = 168


@on_its_device
def selective_scan(inputs: Inputs, options: Options, *, save: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return y, the last state, and what the backward pass needs: y before the gate, and the state every 64 tokens."""
    u, A, z, D = inputs.u, inputs.A, unit_stride(inputs.z), dense(inputs.D)
    (b, k, _, d), n = u.shape, A.shape[2]
    y = u.new_empty(shape_of_y(inputs, options))
    ungated, saved = kept_for_backward(inputs, options, save)

    # Directions that are added up take another kernel, which also gates the sum: `each` holds them until then.
    apart = options.combine != "none" and k > 1
    each = u.new_empty(u.shape, dtype=_ungated(u)) if apart and not ungated.numel() else ungated
    out = (None if apart else y, each if each.numel() else None)
    gate = (None, None) if apart or z is None else (z, z.stride())

    partial = A.new_empty(u.shape) if n > MOST_STATES else None  # the sum of C h over the states of earlier launches
    last_states: list[Tensor | None] = []
    for scan in _scans(inputs, options):
        states = scan.states
        start = None if inputs.initial_state is None else inputs.initial_state[..., states].contiguous()
        last_states.append(A.new_empty(b, k, d, scan.A.shape[2]) if options.return_last_state else None)
        forward_kernel[scan.grid](
            *(*scan.inputs, D, start, *scan.ends_of_segments(scan.u, scan.B, backwards=False), *gate),
            *(partial, *out, saved[states] if save else None, last_states[-1], *scan.sizes),
            once=1,
            FIRST=states.start == 0,
            LAST=states.stop == n,
            **scan.options,
        )
    last_state = _join(last_states, 3)
    if apart:
        combine_directions(each, z, options.combine, y)
    return y, A.new_empty(0) if last_state is None else last_state, ungated, saved


def kept_for_backward(inputs: Inputs, options: Options, save: bool) -> tuple[Tensor, Tensor]:
    """Return uninitialised tensors for each direction's y before the gate and for the states, (n, b, k, c + 1, d).

    Each is empty if it is not needed.
    """
    u, A = inputs.u, inputs.A
    if not save:
        return u.new_empty(0), A.new_empty(0)
    b, k, l, d = u.shape
    ungated = u.new_empty(0 if inputs.z is None else u.shape, dtype=_ungated(u))
    return ungated, A.new_empty(A.shape[2], b, k, -(-l // CHUNK) + 1, d)


@on_its_device
def selective_scan_backward(
    grad_y: Tensor, grad_state: Tensor | None, ungated: Tensor, saved: Tensor, inputs: Inputs, options: Options
) -> Inputs:
    """Return the gradients of the inputs.

    Two walks over the tokens: the first needs no gradient of a state, the second no state. Let pull[t] be the gradient
    of h[t-1] from the tokens t and later, and kept[t] = exp(dt[t] A) h[t-1]. Then the gradient of dt[t] A is

        pull[t] h[t-1] = pull[t+1] h[t] + dy[t] C[t] kept[t] - pull[t+1] dt[t] B[t] u[t]

    where the first term is known at the end of a chunk, the first walk computes the second and the second walk the
    third. ddelta is that sum times A over the states: the first walk leaves one number for each token and channel, not
    n. dA is that sum times dt over the tokens: with the sums exchanged, each term times the sum of dt up to it. This
    costs dA two or three digits in float32: as many as that sum over a chunk is larger than its smallest steps.
    """
    u, A, B, z, D = inputs.u, inputs.A, inputs.B, unit_stride(inputs.z), dense(inputs.D)
    (b, k, l, d), n = u.shape, A.shape[2]
    chunks = triton.cdiv(l, CHUNK)

    # the gradient of each direction's y, and of z
    grad_y = unit_stride(grad_y)
    dy, dz = grad_y, None
    if z is not None or options.combine == "mean":
        dy, dz = u.new_empty(grad_y.shape, dtype=_ungated(u)), None if z is None else empty_rows(z, *z.shape)
        differentiate_combined(grad_y, ungated, z, options.combine, k, dy, dz)
    dy = dy.expand(u.shape)

    du, ddelta, kept = empty_rows(u, *u.shape), empty_rows(u, *u.shape), A.new_empty(u.shape)
    partial = A.new_empty(b, k, l, 2, d) if n > MOST_STATES else None
    dAs, dBs, dCs = [], [], []
    dstates: list[Tensor | None] = []
    for scan in _scans(inputs, options):
        # partial sums, added up in a fixed order: dB and dC of a block of channels, the others of a segment or chunk
        states, segments, m = scan.states, scan.grid[1], scan.A.shape[2]
        dB, dC = (A.new_empty(scan.blocks, k, b, *B.shape[2:4], m).transpose(1, 2) for _ in range(2))
        steps, dA = A.new_empty(b, k, chunks, d), A.new_empty(b, chunks + segments, k, m, d)
        dD, dbias = A.new_empty(b, segments, k, d), A.new_empty(b, segments, k, d)
        dstate = None if inputs.initial_state is None else A.new_empty(b, k, d, m)
        row_at = (*dB.stride()[1:5], dB.stride(0))
        # the first walk, then the second
        states_kernel[(scan.grid[0] * chunks,)](
            *(*scan.inputs, dy, dy.stride(), saved[states], kept, steps, dC, row_at, dA, *scan.sizes), **scan.options
        )
        pull = None if grad_state is None else grad_state[..., states].contiguous()
        ends = scan.ends_of_segments(dy, scan.C, backwards=True)
        gradients_kernel[scan.grid](
            *(*scan.inputs, D, dy, dy.stride(), saved[states], kept, steps, pull, *ends, partial),
            *(du, ddelta, du.stride(), dB, row_at, dA, dD, dbias, dstate, *scan.sizes),
            FIRST=states.start == 0,
            LAST=states.stop == n,
            **scan.options,
        )
        dAs.append(dA.sum((0, 1)).transpose(1, 2))
        dBs.append(dB.sum(0))
        dCs.append(dC.sum(0))
        dstates.append(dstate)
    return Inputs(
        u=du,
        delta=ddelta,
        A=_join(dAs, 2),
        B=_join(dBs, 4),
        C=_join(dCs, 4),
        D=None if D is None else dD.sum((0, 1)),
        z=dz,
        delta_bias=None if inputs.delta_bias is None else dbias.sum((0, 1)),
        initial_state=_join(dstates, 3),
    )


@dataclass
class _Scan:
    """What all kernels of a scan take."""

    states: slice  # the part of the n states that A, B and C are of
    u: Tensor
    delta: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    delta_bias: Tensor | None
    softplus: bool
    reverse: int  # a bit for each direction
    block: int  # channels of a program
    segment: int  # tokens

    @property
    def blocks(self) -> int:
        """The number of programs for a group of B and C."""
        return triton.cdiv(self.u.shape[3] // self.B.shape[3], self.block)

    @property
    def grid(self) -> tuple[int, int]:
        b, k, l, _ = self.u.shape
        return b * k * self.B.shape[3] * self.blocks, triton.cdiv(l, self.segment)

    @property
    def inputs(self) -> tuple[object, ...]:
        rows = [part for x in (self.u, self.delta, self.B, self.C) for part in (x, x.stride())]
        return *rows, self.A, self.delta_bias

    @property
    def sizes(self) -> tuple[int, ...]:
        return *self.u.shape[1:], self.B.shape[3], self.segment, self.reverse

    @property
    def options(self) -> dict[str, object]:
        n = self.A.shape[2]
        parts = math.gcd(n, 4)  # lanes that B and C of a token are shared out to; the other lanes take other tokens
        groups = {"PARTS": parts, "GROUP": math.gcd(32 // parts, CHUNK)}
        return {"N": n, **groups, "BLOCK": self.block, "CHUNK": CHUNK, "SOFTPLUS": self.softplus, **LAUNCH}

    def ends_of_segments(self, x: Tensor, B: Tensor, *, backwards: bool) -> tuple[Tensor | None, Tensor | None]:
        """Return each segment's last state if it starts from zero, (b, k, s, n, d), and its sum of dt, (b, k, s, d).

        None for both if there is one segment. `backwards` takes dy for x, C for B, and the gradient of the state.
        """
        (b, k, _, d), n, segments = self.u.shape, self.A.shape[2], self.grid[1]
        if segments == 1:
            return None, None
        ends, steps = self.A.new_empty(b, k, segments, n, d), self.A.new_empty(b, k, segments, d)
        inputs = (x, x.stride(), self.delta, self.delta.stride(), B, B.stride(), self.A, self.delta_bias)
        ends_kernel[self.grid](*inputs, ends, steps, *self.sizes, once=1, BACKWARDS=backwards, **self.options)
        return ends, steps


def _scans(inputs: Inputs, options: Options) -> Iterator[_Scan]:
    """Yield the scan; if a launch cannot hold all states, one scan for each part of them."""
    u, delta, B, C = (unit_stride(x) for x in (inputs.u, inputs.delta, inputs.B, inputs.C))
    A, delta_bias = inputs.A, dense(inputs.delta_bias)
    (b, k, l, d), g, n = u.shape, B.shape[3], A.shape[2]
    block, segment = configuration(b * k, l, d, g, n)
    size = triton.cdiv(n, triton.cdiv(n, MOST_STATES))
    for first in range(0, n, size):
        states = slice(first, min(first + size, n))
        yield _Scan(
            states=states,
            u=u,
            delta=delta,
            A=A[..., states].contiguous(),
            B=B[..., states],
            C=C[..., states],
            delta_bias=delta_bias,
            softplus=options.delta_softplus,
            reverse=pack(options.reverse),
            block=block,
            segment=segment,
        )


def configuration(rows: int, l: int, d: int, g: int, n: int) -> tuple[int, int]:
    """Return the channels of a program and the tokens of a segment, for b k rows.

    They depend on the shapes alone, because the last bit of sums over channels and segments depends on them. With 64
    channels a thread has two, which share what it does for B and C; that needs few enough states for the registers, and
    enough chunks to go round. The last states of the segments take nearly as long as the scan itself, so that two
    segments would gain nothing.
    """
    if (rows, l, d, g, n) in TUNED:
        return TUNED[rows, l, d, g, n]
    chunks, wide = triton.cdiv(l, CHUNK), rows * g * triton.cdiv(d // g, 64)
    block = 64 if n <= 16 and wide * chunks >= BUSY // 3 else 32
    segments = BUSY // (rows * g * triton.cdiv(d // g, block))
    return block, triton.cdiv(chunks, segments if segments > 2 else 1) * CHUNK


def _ungated(u: Tensor) -> torch.dtype:
    """Return the dtype of y before the gate and of its gradient: with a small gate they may pass float16's 65,504."""
    return torch.float32 if u.dtype == torch.float16 else u.dtype


def _join(parts: Sequence[MaybeTensor], dim: int) -> MaybeTensor:
    """Concatenate the parts, all of them tensors or all None; a single part is not copied."""
    given = [part for part in parts if part is not None]
    return torch.cat(given, dim) if len(given) > 1 else parts[0]
