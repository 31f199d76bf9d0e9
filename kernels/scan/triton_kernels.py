# mypy: ignore-errors
"""The kernels of :mod:`vim.kernels.scan.triton`, which says how they work together.

`x_at` are the strides of x: image, direction, token, group. The last dimension is contiguous. A tensor without strides
is contiguous: (b, k, l, d), (k, d, n), (b, k, d, n), or at the borders of chunks or segments (b, k, c or s, n, d).

A program takes one image, direction, group and block of channels. The grid is (programs, segments), or (programs times
chunks,): only the first number of a grid can be above 65,535.

What hides the latency of memory, of which a scheduler's few warps hide little:
- B and C come a GROUP of tokens at a time, PARTS lanes to a token, one group ahead; lanes then exchange them.
- The channels of the next token are loaded, and those FAR ahead fetched into the cache, before a token is computed.
- The compiler would move these loads behind the computation. In a forward pass, this is therefore the body of a loop of
  `once` turns, a number that only the launch knows. dt changes in it, so that nothing is computed before the loop.
"""

import torch
import triton
import triton.language as tl

from ..tiles import LOG2E, sigmoid, step_size

LN2 = tl.constexpr(0.6931471805599453)
FAR = tl.constexpr(8)  # tokens
PREFETCHES = tl.constexpr(torch.version.hip is None and not triton.knobs.runtime.interpret)


@triton.jit(do_not_specialize=["once"])
def forward_kernel(
    u, u_at, delta, delta_at, B, B_at, C, C_at, A, delta_bias, D, initial_state, ends, steps, z, z_at,
    partial, y, ungated, saved, last_state, k, l, d, g, segment, reverse, once, FIRST: tl.constexpr, LAST: tl.constexpr,
    N: tl.constexpr, PARTS: tl.constexpr, GROUP: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr,
    SOFTPLUS: tl.constexpr,
):  # fmt: skip
    """Write those outputs that are given: y, y before the gate, the states at the chunks' borders, the last state.

    With the states in several launches, `partial` passes on the sum of C h: only the FIRST launch does not read it, and
    only the LAST writes y.
    """
    image, direction, group, channel, inside, block = _place(tl.program_id(0), k, d, g, BLOCK)
    row = image * k + direction
    first, last = tl.program_id(1) * segment, min(tl.program_id(1) * segment + segment, l)
    token, step = _walk(first, l, direction, reverse)
    u = _row(u, u_at, image, direction, token)
    delta = _row(delta, delta_at, image, direction, token)
    B = _of_group(B, B_at, image, direction, group)
    C = _of_group(C, C_at, image, direction, group)
    if z is not None:
        z = _row(z, z_at, image, direction, token)
    if partial is not None:
        partial += (row * l + token) * d
    if y is not None:
        y += (row * l + token) * d
    if ungated is not None:
        ungated += (row * l + token) * d
    rates = _rates(A, direction, d, channel, inside, N)
    bias, skip = _of_channels(delta_bias, direction, d, channel, inside), _of_channels(D, direction, d, channel, inside)
    state = _vectors(initial_state, (row * d + channel) * N, 1, inside, N)
    if ends is not None:
        for s in range(tl.program_id(1)):
            state = _pass_segment(state, ends, steps, row * tl.num_programs(1) + s, rates, d, channel, inside, N)
    chunks = tl.cdiv(l, CHUNK)
    next_x = tl.load(u + channel, inside, 0.0)
    dt = step_size(tl.load(delta + channel, inside, 0.0), bias, SOFTPLUS)[0]
    delta, next_delta = _next(delta, delta_at[2], step, last - first, channel, inside)
    next_B = _load_group(B, B_at[2], first, first, last, l, direction, reverse, N, PARTS)
    next_C = _load_group(C, C_at[2], first, first, last, l, direction, reverse, N, PARTS)
    for start in range(first, last, CHUNK):
        if saved is not None:
            place = row * (chunks + 1) + start // CHUNK
            _store_vectors(saved, place * N * d + channel, d, state, inside, N)
        for some in range(start, min(start + CHUNK, last), GROUP):
            Bs, Cs = _floats(next_B), _floats(next_C)
            next_B = _load_group(B, B_at[2], some + GROUP, first, last, l, direction, reverse, N, PARTS)
            next_C = _load_group(C, C_at[2], some + GROUP, first, last, l, direction, reverse, N, PARTS)
            for i in range(some, min(some + GROUP, last)):
                x, next_dt = next_x.to(tl.float32), step_size(next_delta, bias, SOFTPLUS)[0]
                b, c = _of_token(Bs, i - some, d, N, PARTS), _of_token(Cs, i - some, d, N, PARTS)
                u, next_x = _next(u, u_at[2], step, last - i, channel, inside)
                delta, next_delta = _next(delta, delta_at[2], step, last - i - 1, channel, inside)
                out = skip * x if FIRST else tl.load(partial + channel, inside, 0.0)
                for _ in tl.range(once, disable_licm=True):
                    drive = dt * x
                    moved = ()
                    for n in tl.static_range(N):
                        h = tl.exp2(dt * rates[n]) * state[n] + drive * b[n]
                        out += h * c[n]
                        moved = moved + (h,)
                    state = moved
                    dt += 1
                dt = next_dt
                if partial is not None:
                    tl.store(partial + channel, out, inside)
                    partial += step * d
                if LAST and ungated is not None:
                    tl.store(ungated + channel, out, inside)
                    ungated += step * d
                if LAST and z is not None:
                    gate = tl.load(z + channel, inside, 0.0).to(tl.float32)
                    out *= gate * sigmoid(gate)
                    z += step * z_at[2]
                if LAST and y is not None:
                    tl.store(y + channel, out, inside)
                    y += step * d
    if last == l:
        if saved is not None:
            _store_vectors(saved, (row * (chunks + 1) + chunks) * N * d + channel, d, state, inside, N)
        if last_state is not None:
            _store_vectors(last_state, (row * d + channel) * N, 1, state, inside, N)


@triton.jit(do_not_specialize=["once"])
def ends_kernel(
    x, x_at, delta, delta_at, B, B_at, A, delta_bias, ends, steps, k, l, d, g, segment, reverse, once,
    N: tl.constexpr, PARTS: tl.constexpr, GROUP: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr,
    SOFTPLUS: tl.constexpr, BACKWARDS: tl.constexpr,
):  # fmt: skip
    """Write the last state of each segment that starts from zero, and the segment's sum of dt.

    BACKWARDS, with dy for x and C for B, it is the gradient of the state before the segment.
    """
    image, direction, group, channel, inside, block = _place(tl.program_id(0), k, d, g, BLOCK)
    first, last = tl.program_id(1) * segment, min(tl.program_id(1) * segment + segment, l)
    if (first == 0) if BACKWARDS else (last == l):
        return  # no segment comes after it
    token, step = _walk(last - 1 if BACKWARDS else first, l, direction, reverse)
    if BACKWARDS:
        step = -step
    x = _row(x, x_at, image, direction, token)
    delta = _row(delta, delta_at, image, direction, token)
    B = _of_group(B, B_at, image, direction, group)
    rates = _rates(A, direction, d, channel, inside, N)
    bias = _of_channels(delta_bias, direction, d, channel, inside)
    state = _vectors(None, channel, 1, inside, N)
    total = tl.zeros(inside.shape, tl.float32)
    next_value = tl.load(x + channel, inside, 0.0)
    dt = step_size(tl.load(delta + channel, inside, 0.0), bias, SOFTPLUS)[0]
    delta, next_delta = _next(delta, delta_at[2], step, last - first, channel, inside)
    groups, turn = tl.cdiv(last - first, GROUP), -GROUP if BACKWARDS else GROUP
    some = first + (groups - 1) * GROUP if BACKWARDS else first
    next_B = _load_group(B, B_at[2], some, first, last, l, direction, reverse, N, PARTS)
    for _ in range(groups):
        Bs, size = _floats(next_B), min(last - some, GROUP)
        next_B = _load_group(B, B_at[2], some + turn, first, last, l, direction, reverse, N, PARTS)
        for j in range(size):
            value, next_dt = next_value.to(tl.float32), step_size(next_delta, bias, SOFTPLUS)[0]
            b = _of_token(Bs, size - 1 - j if BACKWARDS else j, d, N, PARTS)
            left = (some - first + size if BACKWARDS else last - some) - j
            x, next_value = _next(x, x_at[2], step, left, channel, inside)
            delta, next_delta = _next(delta, delta_at[2], step, left - 1, channel, inside)
            total += dt
            for _ in tl.range(once, disable_licm=True):
                drive = value if BACKWARDS else dt * value
                moved = ()
                for n in tl.static_range(N):
                    decay, added = tl.exp2(dt * rates[n]), drive * b[n]
                    if BACKWARDS:
                        moved = moved + (decay * (state[n] + added),)
                    else:
                        moved = moved + (decay * state[n] + added,)
                state = moved
                dt += 1
            dt = next_dt
        some += turn
    place = (image * k + direction) * tl.num_programs(1) + tl.program_id(1)
    _store_vectors(ends, place * N * d + channel, d, state, inside, N)
    tl.store(steps + place * d + channel, total, inside)


@triton.jit
def states_kernel(
    u, u_at, delta, delta_at, B, B_at, C, C_at, A, delta_bias, dy, dy_at, saved, kept, steps, dC, dC_at, dA,
    k, l, d, g, segment, reverse,
    N: tl.constexpr, PARTS: tl.constexpr, GROUP: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr,
    SOFTPLUS: tl.constexpr,
):  # fmt: skip
    """Run the first walk over a chunk; write dC, the sum of A C kept, the sum of dt, and this walk's part of dA."""
    chunks = tl.cdiv(l, CHUNK)
    chunk = tl.program_id(0) % chunks
    image, direction, group, channel, inside, block = _place(tl.program_id(0) // chunks, k, d, g, BLOCK)
    row = image * k + direction
    first, last = chunk * CHUNK, min(chunk * CHUNK + CHUNK, l)
    token, step = _walk(first, l, direction, reverse)
    u = _row(u, u_at, image, direction, token)
    delta = _row(delta, delta_at, image, direction, token)
    dy = _row(dy, dy_at, image, direction, token)
    B = _of_group(B, B_at, image, direction, group)
    C = _of_group(C, C_at, image, direction, group)
    dC = _row(dC, dC_at, image, direction, token) + group * dC_at[3] + block.to(tl.int64) * dC_at[4]
    kept += (row * l + token) * d
    rates = _rates(A, direction, d, channel, inside, N)
    bias = _of_channels(delta_bias, direction, d, channel, inside)
    state = _vectors(saved, (row * (chunks + 1) + chunk) * N * d + channel, d, inside, N)
    grad_A = _vectors(None, channel, 1, inside, N)
    since = tl.zeros(inside.shape, tl.float32)  # the sum of dt up to this token
    next_x, next_grad = tl.load(u + channel, inside, 0.0), tl.load(dy + channel, inside, 0.0)
    next_delta = tl.load(delta + channel, inside, 0.0)
    next_B = _load_group(B, B_at[2], first, first, last, l, direction, reverse, N, PARTS)
    next_C = _load_group(C, C_at[2], first, first, last, l, direction, reverse, N, PARTS)
    for some in range(first, last, GROUP):
        Bs, Cs = _floats(next_B), _floats(next_C)
        next_B = _load_group(B, B_at[2], some + GROUP, first, last, l, direction, reverse, N, PARTS)
        next_C = _load_group(C, C_at[2], some + GROUP, first, last, l, direction, reverse, N, PARTS)
        for i in range(some, min(some + GROUP, last)):
            x, grad = next_x.to(tl.float32), next_grad.to(tl.float32)
            dt = step_size(next_delta, bias, SOFTPLUS)[0]
            u, next_x = _next(u, u_at[2], step, last - i, channel, inside)
            dy, next_grad = _next(dy, dy_at[2], step, last - i, channel, inside)
            delta, next_delta = _next(delta, delta_at[2], step, last - i, channel, inside)
            b, c = _of_token(Bs, i - some, d, N, PARTS), _of_token(Cs, i - some, d, N, PARTS)
            since += dt
            drive, weight = dt * x, since * grad
            total = tl.zeros(inside.shape, tl.float32)
            moved, moved_A, to_C = (), (), ()
            for n in tl.static_range(N):
                left = tl.exp2(dt * rates[n]) * state[n]
                h = left + drive * b[n]
                left *= c[n]
                total += rates[n] * left
                moved, moved_A, to_C = moved + (h,), moved_A + (grad_A[n] + weight * left,), to_C + (grad * h,)
            state, grad_A = moved, moved_A
            _store_sums(dC, to_C, N)
            tl.store(kept + channel, total * LN2, inside)
            dC += step * dC_at[2]
            kept += step * d
    tl.store(steps + (row * chunks + chunk) * d + channel, since, inside)
    place = (image * (chunks + tl.cdiv(l, segment)) + chunk) * k + direction
    _store_vectors(dA, place * N * d + channel, d, grad_A, inside, N)


@triton.jit
def gradients_kernel(
    u, u_at, delta, delta_at, B, B_at, C, C_at, A, delta_bias, D, dy, dy_at, saved, kept, steps,
    grad_state, ends, end_steps, partial, du, ddelta, du_at, dB, dB_at, dA, dD, dbias, dstate,
    k, l, d, g, segment, reverse, FIRST: tl.constexpr, LAST: tl.constexpr,
    N: tl.constexpr, PARTS: tl.constexpr, GROUP: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr,
    SOFTPLUS: tl.constexpr,
):  # fmt: skip
    """Run the second walk, from the last token of a segment to its first; write every gradient but dC.

    With the states in several launches, `partial` passes on the sums behind du and ddelta: only the FIRST launch does
    not read it, and only the LAST writes du and ddelta.
    """
    image, direction, group, channel, inside, block = _place(tl.program_id(0), k, d, g, BLOCK)
    row = image * k + direction
    chunks, segments = tl.cdiv(l, CHUNK), tl.num_programs(1)
    first, last = tl.program_id(1) * segment, min(tl.program_id(1) * segment + segment, l)
    token, step = _walk(last - 1, l, direction, reverse)
    step = -step
    u = _row(u, u_at, image, direction, token)
    delta = _row(delta, delta_at, image, direction, token)
    dy = _row(dy, dy_at, image, direction, token)
    du, ddelta = _row(du, du_at, image, direction, token), _row(ddelta, du_at, image, direction, token)
    B = _of_group(B, B_at, image, direction, group)
    C = _of_group(C, C_at, image, direction, group)
    dB = _row(dB, dB_at, image, direction, token) + group * dB_at[3] + block.to(tl.int64) * dB_at[4]
    kept += (row * l + token) * d
    if partial is not None:
        partial += (row * l + token) * 2 * d
    rates = _rates(A, direction, d, channel, inside, N)
    bias, skip = _of_channels(delta_bias, direction, d, channel, inside), _of_channels(D, direction, d, channel, inside)
    pull = _vectors(grad_state, (row * d + channel) * N, 1, inside, N)
    if ends is not None:
        for s in range(segments - 1 - tl.program_id(1)):
            place = row * segments + segments - 1 - s
            pull = _pass_segment(pull, ends, end_steps, place, rates, d, channel, inside, N)
    grad_A = _vectors(None, channel, 1, inside, N)
    grad_D, grad_bias = tl.zeros(inside.shape, tl.float32), tl.zeros(inside.shape, tl.float32)
    next_x, next_grad = tl.load(u + channel, inside, 0.0), tl.load(dy + channel, inside, 0.0)
    next_delta, next_kept = tl.load(delta + channel, inside, 0.0), tl.load(kept + channel, inside, 0.0)
    final = (last - 1) // GROUP * GROUP
    next_B = _load_group(B, B_at[2], final, first, last, l, direction, reverse, N, PARTS)
    next_C = _load_group(C, C_at[2], final, first, last, l, direction, reverse, N, PARTS)
    for i in range(tl.cdiv(last - first, CHUNK)):
        chunk = (last - 1) // CHUNK - i
        since = tl.load(steps + (row * chunks + chunk) * d + channel, inside, 0.0)  # the sum of dt up to this token
        to_decay = tl.zeros(inside.shape, tl.float32)
        moved_A = ()
        for n in tl.static_range(N):
            state = tl.load(saved + ((row * (chunks + 1) + chunk + 1) * N + n) * d + channel, inside, 0.0)
            to_decay += rates[n] * (pull[n] * state)
            moved_A = moved_A + (grad_A[n] + since * (pull[n] * state),)
        grad_A = moved_A
        to_decay *= LN2
        groups = tl.cdiv(min(chunk * CHUNK + CHUNK, last) - chunk * CHUNK, GROUP)
        for j in range(groups):
            some = chunk * CHUNK + (groups - 1 - j) * GROUP
            Bs, Cs = _floats(next_B), _floats(next_C)
            next_B = _load_group(B, B_at[2], some - GROUP, first, last, l, direction, reverse, N, PARTS)
            next_C = _load_group(C, C_at[2], some - GROUP, first, last, l, direction, reverse, N, PARTS)
            for position in range(min(some + GROUP, last) - 1, some - 1, -1):
                x, grad, through_later = next_x.to(tl.float32), next_grad.to(tl.float32), next_kept
                dt, slope = step_size(next_delta, bias, SOFTPLUS)
                left = position - first + 1
                u, next_x = _next(u, u_at[2], step, left, channel, inside)
                dy, next_grad = _next(dy, dy_at[2], step, left, channel, inside)
                delta, next_delta = _next(delta, delta_at[2], step, left, channel, inside)
                kept, next_kept = _next(kept, d, step, left, channel, inside)
                b, c = _of_token(Bs, position - some, d, N, PARTS), _of_token(Cs, position - some, d, N, PARTS)
                drive = dt * x
                weight = since * drive
                to_drive, through = tl.zeros(inside.shape, tl.float32), tl.zeros(inside.shape, tl.float32)
                moved, moved_A, to_B = (), (), ()
                for n in tl.static_range(N):
                    whole = pull[n] + grad * c[n]
                    to_drive += whole * b[n]
                    later = pull[n] * b[n]
                    through += rates[n] * later
                    moved, moved_A = moved + (tl.exp2(dt * rates[n]) * whole,), moved_A + (grad_A[n] - weight * later,)
                    to_B = to_B + (whole * drive,)
                pull, grad_A = moved, moved_A
                _store_sums(dB, to_B, N)
                since -= dt
                to_decay += grad * through_later - drive * (through * LN2)
                whole_drive, whole_decay = to_drive, to_decay
                if not FIRST:
                    whole_drive += tl.load(partial + channel, inside, 0.0)
                    whole_decay += tl.load(partial + d + channel, inside, 0.0)
                if LAST:
                    to_delta = (x * whole_drive + whole_decay) * slope
                    tl.store(du + channel, dt * whole_drive + skip * grad, inside)
                    tl.store(ddelta + channel, to_delta, inside)
                    grad_D += grad * x
                    grad_bias += to_delta
                else:
                    tl.store(partial + channel, whole_drive, inside)
                    tl.store(partial + d + channel, whole_decay, inside)
                if partial is not None:
                    partial += step * 2 * d
                du += step * du_at[2]
                ddelta += step * du_at[2]
                dB += step * dB_at[2]
    place = image * segments + tl.program_id(1)
    tl.store(dD + (place * k + direction) * d + channel, grad_D, inside)
    tl.store(dbias + (place * k + direction) * d + channel, grad_bias, inside)
    place = (image * (chunks + segments) + chunks + tl.program_id(1)) * k + direction
    _store_vectors(dA, place * N * d + channel, d, grad_A, inside, N)
    if dstate is not None and first == 0:
        _store_vectors(dstate, (row * d + channel) * N, 1, pull, inside, N)


@triton.jit
def _place(program, k, d, g, BLOCK: tl.constexpr):
    """Return a program's image, direction, group, channels, the mask of those inside d, and its block in the group."""
    blocks = tl.cdiv(d // g, BLOCK)
    block, group, row = program % blocks, program // blocks % g, program // (blocks * g)
    channel = block * BLOCK + tl.arange(0, 32)[:, None] * (BLOCK // 32) + tl.arange(0, BLOCK // 32)[None, :]
    return (row // k).to(tl.int64), row % k, group, group * (d // g) + channel, channel < d // g, block


@triton.jit
def _walk(first, l, direction, reverse):
    """Return the token that a direction takes after `first` others, and the step to its next."""
    backwards = reverse >> direction & 1
    return first + backwards * (l - 1 - 2 * first), 1 - 2 * backwards


@triton.jit
def _row(x, x_at, image, direction, token):
    """Return the address of a token in a tensor of strides x_at."""
    return x + image * x_at[0] + direction.to(tl.int64) * x_at[1] + token.to(tl.int64) * x_at[2]


@triton.jit
def _of_group(x, x_at, image, direction, group):
    """Return the address of B or C of a group of channels, in a tensor of strides x_at."""
    return x + image * x_at[0] + direction.to(tl.int64) * x_at[1] + group * x_at[3]


@triton.jit
def _next(x, x_at, step, left, channel, inside):
    """Return the address of the next token, and its channels; the last of the `left` tokens is its own next.

    Loading it before the token in hand is computed hides the latency of a cache; fetching one far ahead into the cache
    hides the latency of the memory.
    """
    if PREFETCHES:
        last_of_lane = tl.max(channel, 1)  # its channels are adjacent: one address fetches them all
        place = x + tl.minimum(left - 1, FAR) * step * x_at + last_of_lane
        asm: tl.constexpr = "prefetch.global.L2 [$1]; mov.b32 $0, 0;"
        tl.inline_asm_elementwise(asm, "=r,l", [place.to(tl.int64)], tl.int32, is_pure=False, pack=1)
    x += tl.where(left > 1, step, 0) * x_at
    return x, tl.load(x + channel, inside, 0.0)


@triton.jit
def _load_group(x, x_at, some, first, last, l, direction, reverse, N: tl.constexpr, PARTS: tl.constexpr):
    """Load B or C of a group of tokens, those of the positions from `some` on: a part of the n of a token to a lane."""
    lane = tl.arange(0, 32)[:, None]
    position = some + lane // PARTS
    token = _walk(position, l, direction, reverse)[0].to(tl.int64)
    x += token * x_at + lane % PARTS * (N // PARTS)
    part = ()
    for n in tl.static_range(N // PARTS):
        part = part + (tl.load(x + n, (position >= first) & (position < last), 0.0),)
    return part


@triton.jit
def _floats(vectors):
    floats = ()
    for n in tl.static_range(len(vectors)):
        floats = floats + (vectors[n].to(tl.float32),)
    return floats


@triton.jit
def _of_token(group, i, d, N: tl.constexpr, PARTS: tl.constexpr):
    """Return the n numbers of a group's token i, each in all lanes."""
    # a zero that the compiler does not know: it would copy an equal lane to a register of its own for every exchange
    lane = tl.arange(0, 32)[:, None] // (d + 32) + i * PARTS
    numbers = ()
    for n in tl.static_range(N):
        numbers = numbers + (tl.gather(group[n % (N // PARTS)], lane + n // (N // PARTS), 0),)
    return numbers


@triton.jit
def _rates(A, direction, d, channel, inside, N: tl.constexpr):
    """Return A log2(e), n vectors: the GPU computes powers of 2."""
    rates = ()
    for n in tl.static_range(N):
        rates = rates + (tl.load(A + (direction * d + channel) * N + n, inside, 0.0) * LOG2E,)
    return rates


@triton.jit
def _of_channels(x, direction, d, channel, inside):
    return tl.zeros(channel.shape, tl.float32) if x is None else tl.load(x + direction * d + channel, inside, 0.0)


@triton.jit
def _vectors(x, first, step, inside, N: tl.constexpr):
    """Load n vectors; zeros if x is None."""
    vectors = ()
    for n in tl.static_range(N):
        if x is None:
            vectors = vectors + (tl.zeros(inside.shape, tl.float32),)
        else:
            vectors = vectors + (tl.load(x + first + n * step, inside, 0.0),)
    return vectors


@triton.jit
def _store_vectors(x, first, step, vectors, inside, N: tl.constexpr):
    for n in tl.static_range(N):
        tl.store(x + first + n * step, vectors[n], inside)


@triton.jit
def _store_sums(x, vectors, N: tl.constexpr):
    """Store the sums of n vectors over the channels as n adjacent numbers."""
    for n in tl.static_range(0, N, 32):
        sums = _sums(vectors, n, min(32, N - n))
        lane = tl.arange(0, 32)
        tl.store(x + n + lane, sums, n + lane < N)


@triton.jit
def _sums(vectors, first, count: tl.constexpr):
    """Return the sums of up to 32 vectors, each in its lane.

    A butterfly halves the number of vectors with every exchange of lanes: about one exchange for each vector, where
    summing them one by one takes five.
    """
    lane = tl.arange(0, 32)
    sums = ()
    for i in tl.static_range(count):
        vector = vectors[first + i]
        sums = sums + (tl.sum(vector, 1),)
    for level in tl.static_range(5):
        merged = ()
        for i in tl.static_range(0, len(sums), 2):
            if i + 1 < len(sums):
                low = (lane >> level) % 2 == 0
                kept, given = tl.where(low, sums[i], sums[i + 1]), tl.where(low, sums[i + 1], sums[i])
                merged = merged + (kept + tl.gather(given, lane ^ (1 << level), 0),)
            else:
                merged = merged + (sums[i] + tl.gather(sums[i], lane ^ (1 << level), 0),)
        sums = merged
    return sums[0]


@triton.jit
def _pass_segment(state, ends, steps, place, rates, d, channel, inside, N: tl.constexpr):
    """Return the state at the far end of a segment, from the state before it and what :func:`ends_kernel` wrote."""
    dt = tl.load(steps + place * d + channel, inside, 0.0)
    end = _vectors(ends, place * N * d + channel, d, inside, N)
    moved = ()
    for n in tl.static_range(N):
        moved = moved + (tl.exp2(dt * rates[n]) * state[n] + end[n],)
    return moved
