# mypy: ignore-errors
"""The kernels of :mod:`vim.kernels.scan.triton`, which says how they work together.

`x_at` are the strides of x: image, direction, token, group. The last dimension is contiguous. A tensor without strides
is contiguous: (b, k, l, d), (k, d, n), (b, k, d, n), or at the borders of chunks or segments (b, k, c or s, n, d).

A program takes one image, direction, group and block of channels. The grid is (programs, segments), or (programs times
chunks,): only the first number of a grid can be above 65,535.
"""

import triton
import triton.language as tl

from ..tiles import LOG2E, sigmoid, step_size

LN2 = tl.constexpr(0.6931471805599453)


@triton.jit(do_not_specialize=["once"])
def forward_kernel(
    u, u_at, delta, delta_at, B, B_at, C, C_at, A, delta_bias, D, initial_state, ends, steps, z, z_at,
    partial, y, ungated, saved, last_state, k, l, d, g, segment, reverse, once, FIRST: tl.constexpr, LAST: tl.constexpr,
    N: tl.constexpr, WORD: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr, SOFTPLUS: tl.constexpr,
):  # fmt: skip
    """Write those outputs that are given: y, y before the gate, the states at the chunks' borders, the last state.

    With the states in several launches, `partial` passes on the sum of C h: only the FIRST launch does not read it, and
    only the LAST writes y.
    """
    image, direction, group, channel, inside, block = _place(tl.program_id(0), k, d, g, BLOCK)
    row = image * k + direction
    first, last = tl.program_id(1) * segment, min(tl.program_id(1) * segment + segment, l)
    token, step = _walk(first, l, direction, reverse)
    u = _row(u, u_at, image, direction, token) + channel
    delta = _row(delta, delta_at, image, direction, token) + channel
    B = _shared(_row(B, B_at, image, direction, token) + group * B_at[3], d)
    C = _shared(_row(C, C_at, image, direction, token) + group * C_at[3], d)
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
    x, dt = tl.load(u, inside, 0.0).to(tl.float32), step_size(tl.load(delta, inside, 0.0), bias, SOFTPLUS)[0]
    b, c = _floats(_words(B, N, WORD), B, N, WORD), _floats(_words(C, N, WORD), C, N, WORD)
    delta += _ahead(first + 1, last, step) * delta_at[2]
    next_delta = tl.load(delta, inside, 0.0)
    for start in range(first, last, CHUNK):
        if saved is not None:
            place = row * (chunks + 1) + start // CHUNK
            _store_vectors(saved, place * N * d + channel, d, state, inside, N)
        for i in range(start, min(start + CHUNK, last)):
            next_dt = step_size(next_delta, bias, SOFTPLUS)[0]
            # load the next token before this one is used, to hide the latency; after the last token, the last again
            ahead = _ahead(i + 1, last, step)
            u += ahead * u_at[2]
            delta += _ahead(i + 2, last, step) * delta_at[2]
            B += ahead * B_at[2]
            C += ahead * C_at[2]
            next_x, next_delta = tl.load(u, inside, 0.0), tl.load(delta, inside, 0.0)
            next_B, next_C = _words(B, N, WORD), _words(C, N, WORD)
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
            x, dt = next_x.to(tl.float32), next_dt
            b, c = _floats(next_B, B, N, WORD), _floats(next_C, C, N, WORD)
    if last == l:
        if saved is not None:
            _store_vectors(saved, (row * (chunks + 1) + chunks) * N * d + channel, d, state, inside, N)
        if last_state is not None:
            _store_vectors(last_state, (row * d + channel) * N, 1, state, inside, N)


@triton.jit(do_not_specialize=["once"])
def ends_kernel(
    x, x_at, delta, delta_at, B, B_at, A, delta_bias, ends, steps, k, l, d, g, segment, reverse, once,
    N: tl.constexpr, WORD: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr, SOFTPLUS: tl.constexpr, BACKWARDS: tl.constexpr,
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
    x = _row(x, x_at, image, direction, token) + channel
    delta = _row(delta, delta_at, image, direction, token) + channel
    B = _shared(_row(B, B_at, image, direction, token) + group * B_at[3], d)
    rates = _rates(A, direction, d, channel, inside, N)
    bias = _of_channels(delta_bias, direction, d, channel, inside)
    state = _vectors(None, channel, 1, inside, N)
    total = tl.zeros(inside.shape, tl.float32)
    value, dt = tl.load(x, inside, 0.0).to(tl.float32), step_size(tl.load(delta, inside, 0.0), bias, SOFTPLUS)[0]
    b = _floats(_words(B, N, WORD), B, N, WORD)
    delta += _ahead(first + 1, last, step) * delta_at[2]
    next_delta = tl.load(delta, inside, 0.0)
    for i in range(first, last):
        next_dt = step_size(next_delta, bias, SOFTPLUS)[0]
        ahead = _ahead(i + 1, last, step)
        x += ahead * x_at[2]
        B += ahead * B_at[2]
        delta += _ahead(i + 2, last, step) * delta_at[2]
        next_value, next_delta, next_B = tl.load(x, inside, 0.0), tl.load(delta, inside, 0.0), _words(B, N, WORD)
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
        value, dt, b = next_value.to(tl.float32), next_dt, _floats(next_B, B, N, WORD)
    place = (image * k + direction) * tl.num_programs(1) + tl.program_id(1)
    _store_vectors(ends, place * N * d + channel, d, state, inside, N)
    tl.store(steps + place * d + channel, total, inside)


@triton.jit(do_not_specialize=["once"])
def states_kernel(
    u, u_at, delta, delta_at, B, B_at, C, C_at, A, delta_bias, dy, dy_at, saved, kept, steps, dC, dC_at, dA,
    k, l, d, g, segment, reverse, once,
    N: tl.constexpr, WORD: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr, SOFTPLUS: tl.constexpr,
):  # fmt: skip
    """Run the first walk over a chunk; write dC, the sum of A C kept, the sum of dt, and this walk's part of dA."""
    chunks = tl.cdiv(l, CHUNK)
    chunk = tl.program_id(0) % chunks
    image, direction, group, channel, inside, block = _place(tl.program_id(0) // chunks, k, d, g, BLOCK)
    row = image * k + direction
    first, last = chunk * CHUNK, min(chunk * CHUNK + CHUNK, l)
    token, step = _walk(first, l, direction, reverse)
    u = _row(u, u_at, image, direction, token) + channel
    delta = _row(delta, delta_at, image, direction, token) + channel
    dy = _row(dy, dy_at, image, direction, token) + channel
    B = _shared(_row(B, B_at, image, direction, token) + group * B_at[3], d)
    C = _shared(_row(C, C_at, image, direction, token) + group * C_at[3], d)
    dC = _row(dC, dC_at, image, direction, token) + group * dC_at[3] + block.to(tl.int64) * dC_at[4]
    kept += (row * l + token) * d + channel
    rates = _rates(A, direction, d, channel, inside, N)
    bias = _of_channels(delta_bias, direction, d, channel, inside)
    state = _vectors(saved, (row * (chunks + 1) + chunk) * N * d + channel, d, inside, N)
    grad_A = _vectors(None, channel, 1, inside, N)
    since = tl.zeros(inside.shape, tl.float32)  # the sum of dt up to this token
    next_x, next_grad, next_delta = tl.load(u, inside, 0.0), tl.load(dy, inside, 0.0), tl.load(delta, inside, 0.0)
    for i in range(first, last):
        x, grad = next_x.to(tl.float32), next_grad.to(tl.float32)
        dt = step_size(next_delta, bias, SOFTPLUS)[0]
        ahead = _ahead(i + 1, last, step)
        u += ahead * u_at[2]
        dy += ahead * dy_at[2]
        delta += ahead * delta_at[2]
        next_x, next_grad, next_delta = tl.load(u, inside, 0.0), tl.load(dy, inside, 0.0), tl.load(delta, inside, 0.0)
        b, c = _floats(_words(B, N, WORD), B, N, WORD), _floats(_words(C, N, WORD), C, N, WORD)
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
        tl.store(kept, total * LN2, inside)
        B += step * B_at[2]
        C += step * C_at[2]
        dC += step * dC_at[2]
        kept += step * d
    tl.store(steps + (row * chunks + chunk) * d + channel, since, inside)
    place = (image * (chunks + tl.cdiv(l, segment)) + chunk) * k + direction
    _store_vectors(dA, place * N * d + channel, d, grad_A, inside, N)


@triton.jit(do_not_specialize=["once"])
def gradients_kernel(
    u, u_at, delta, delta_at, B, B_at, C, C_at, A, delta_bias, D, dy, dy_at, saved, kept, steps,
    grad_state, ends, end_steps, partial, du, ddelta, du_at, dB, dB_at, dA, dD, dbias, dstate,
    k, l, d, g, segment, reverse, once, FIRST: tl.constexpr, LAST: tl.constexpr,
    N: tl.constexpr, WORD: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr, SOFTPLUS: tl.constexpr,
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
    u = _row(u, u_at, image, direction, token) + channel
    delta = _row(delta, delta_at, image, direction, token) + channel
    dy = _row(dy, dy_at, image, direction, token) + channel
    du, ddelta = _row(du, du_at, image, direction, token) + channel, _row(ddelta, du_at, image, direction, token) + channel
    B = _shared(_row(B, B_at, image, direction, token) + group * B_at[3], d)
    C = _shared(_row(C, C_at, image, direction, token) + group * C_at[3], d)
    dB = _row(dB, dB_at, image, direction, token) + group * dB_at[3] + block.to(tl.int64) * dB_at[4]
    kept += (row * l + token) * d + channel
    if partial is not None:
        partial += (row * l + token) * 2 * d + channel
    rates = _rates(A, direction, d, channel, inside, N)
    bias, skip = _of_channels(delta_bias, direction, d, channel, inside), _of_channels(D, direction, d, channel, inside)
    pull = _vectors(grad_state, (row * d + channel) * N, 1, inside, N)
    if ends is not None:
        for s in range(segments - 1 - tl.program_id(1)):
            place = row * segments + segments - 1 - s
            pull = _pass_segment(pull, ends, end_steps, place, rates, d, channel, inside, N)
    grad_A = _vectors(None, channel, 1, inside, N)
    grad_D, grad_bias = tl.zeros(inside.shape, tl.float32), tl.zeros(inside.shape, tl.float32)
    next_x, next_grad = tl.load(u, inside, 0.0), tl.load(dy, inside, 0.0)
    next_delta, next_kept = tl.load(delta, inside, 0.0), tl.load(kept, inside, 0.0)
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
        for left in range(min(chunk * CHUNK + CHUNK, last), chunk * CHUNK, -1):
            dt, slope = step_size(next_delta, bias, SOFTPLUS)
            x, grad, kept_now = next_x.to(tl.float32), next_grad.to(tl.float32), next_kept
            ahead = _ahead(first + 1, left, step)
            u += ahead * u_at[2]
            dy += ahead * dy_at[2]
            delta += ahead * delta_at[2]
            kept += ahead * d
            next_x, next_grad, next_delta = tl.load(u, inside, 0.0), tl.load(dy, inside, 0.0), tl.load(delta, inside, 0.0)
            next_kept = tl.load(kept, inside, 0.0)
            wB, wC = _words(B, N, WORD), _words(C, N, WORD)
            b, c = _floats(wB, B, N, WORD), _floats(wC, C, N, WORD)
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
            to_decay += grad * kept_now - drive * (through * LN2)
            whole_drive, whole_decay = to_drive, to_decay
            if not FIRST:
                whole_drive += tl.load(partial, inside, 0.0)
                whole_decay += tl.load(partial + d, inside, 0.0)
            if LAST:
                to_delta = (x * whole_drive + whole_decay) * slope
                tl.store(du, dt * whole_drive + skip * grad, inside)
                tl.store(ddelta, to_delta, inside)
                grad_D += grad * x
                grad_bias += to_delta
            else:
                tl.store(partial, whole_drive, inside)
                tl.store(partial + d, whole_decay, inside)
            if partial is not None:
                partial += step * 2 * d
            B += step * B_at[2]
            C += step * C_at[2]
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
def _shared(x, d):
    """Return an address for each lane, of numbers that all lanes load.

    The addresses are equal, which the compiler does not see: it would keep the numbers in registers that the lanes
    share, and moving them there waits for the load.
    """
    return x + tl.arange(0, 32)[:, None] // (d + 32)


@triton.jit
def _ahead(position, last, step):
    """Return the step to the token at a position, none after the last."""
    return tl.where(position < last, step, 0)


@triton.jit
def _rates(A, direction, d, channel, inside, N: tl.constexpr):
    """Return A log2(e), n vectors: the GPU computes powers of 2."""
    rates = ()
    for n in tl.static_range(N):
        rates = rates + (tl.load(A + (direction * d + channel) * N + n, inside, 0.0) * LOG2E,)
    return rates


@triton.jit
def _words(x, N: tl.constexpr, WORD: tl.constexpr):
    """Load n numbers that all channels share, WORD of them at a time: see :func:`_floats`."""
    if WORD > 1:
        if x.dtype.element_ty.primitive_bitwidth * WORD == 64:
            x = x.to(tl.pointer_type(tl.int64), bitcast=True)
        else:
            x = x.to(tl.pointer_type(tl.int32), bitcast=True)
    words = ()
    for n in tl.static_range(N // WORD):
        words = words + (tl.load(x + n),)
    return words


@triton.jit
def _floats(words, x, N: tl.constexpr, WORD: tl.constexpr):
    """Return the n numbers that :func:`_words` loaded from x, in float32."""
    bits: tl.constexpr = x.dtype.element_ty.primitive_bitwidth
    floats = ()
    for n in tl.static_range(N):
        if WORD == 1:
            value = words[n]
        elif bits == 32:
            value = (words[n // 2] >> (32 * (n % 2))).to(tl.int32).to(tl.float32, bitcast=True)
        elif x.dtype.element_ty == tl.bfloat16:
            pair = (words[n // WORD] >> (32 * (n % WORD // 2))).to(tl.int32)
            value = (pair << 16 if n % 2 == 0 else pair & -65536).to(tl.float32, bitcast=True)
        else:
            value = (words[n // WORD] >> (16 * (n % WORD))).to(tl.int16).to(tl.float16, bitcast=True)
        floats = floats + (value.to(tl.float32),)
    return floats


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
