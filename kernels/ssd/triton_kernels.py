# mypy: ignore-errors
"""The kernels of :mod:`vim.kernels.ssd.triton`, which says how they work together.

`x_at` are the strides of x: image, direction, token, head or group. The last dimension is contiguous; dt has none. A
tensor without strides is contiguous: (k, h), (k, h, p), or at borders of chunks or segments (b, k, h, c or s, p, n).

A program takes one image, direction, segment or chunk, head and block of the head's channels. Its neighbours take the
other heads, which share B and C. Vectors of tokens are (b, k, h, c CHUNK), in the order in which the direction takes
them.
"""

import triton
import triton.language as tl

from ..tiles import LOG2E, sigmoid, step_size

STATES = tl.constexpr(32)  # that a product over the states takes at a time: more would spill registers
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def steps_kernel(
    dt, dt_at, A, dt_bias, steps, since, below, slopes, k, l, h, reverse, dt_min, dt_max,
    CHUNK: tl.constexpr, HEADS: tl.constexpr, SOFTPLUS: tl.constexpr,
):  # fmt: skip
    """Write the step sizes, what of log2 of the decay has come since the chunk's start, and the slopes if wanted.

    After the last token the steps are zero: the state stays. The logarithm is the sum of `since` and `below`. What is
    used are its differences: where a strong decay came before weak ones, the digits of the weak ones are in the second.
    """
    chunks, blocks = tl.cdiv(l, CHUNK), tl.cdiv(h, HEADS)
    block, chunk, row = (
        tl.program_id(0) % blocks,
        tl.program_id(0) // blocks % chunks,
        tl.program_id(0) // (blocks * chunks),
    )
    direction, head = row % k, block * HEADS + tl.arange(0, HEADS)
    token, inside = _tokens(chunk * CHUNK, l, direction, reverse, CHUNK)
    dt = _of_head(dt, dt_at, (row // k).to(tl.int64), direction, head)
    mask = inside[:, None] & (head < h)[None, :]
    raw = tl.load(dt[None, :] + token[:, None] * dt_at[2], mask, 0.0)
    rate = tl.load(A + direction * h + head, head < h, 0.0)
    bias = tl.zeros([HEADS], tl.float32) if dt_bias is None else tl.load(dt_bias + direction * h + head, head < h, 0.0)
    step, slope = step_size(raw, bias[None, :], SOFTPLUS)
    kept = mask & (step >= dt_min) & (step <= dt_max)
    step = tl.where(mask, tl.minimum(tl.maximum(step, dt_min), dt_max), 0.0)
    decay = tl.cumsum(step.to(tl.float64) * (rate * LOG2E)[None, :], 0)
    high = decay.to(tl.float32)
    place = ((row.to(tl.int64) * h + head) * chunks + chunk)[None, :] * CHUNK + tl.arange(0, CHUNK)[:, None]
    ours = (head < h)[None, :]
    tl.store(steps + place, step, ours)
    tl.store(since + place, high, ours)
    tl.store(below + place, (decay - high).to(tl.float32), ours)
    if slopes is not None:
        tl.store(slopes + place, tl.where(kept, slope, 0.0), ours)


@triton.jit
def forward_kernel(
    x, x_at, B, B_at, C, C_at, steps, since, below, D, z, z_at, starts, saved, y, ungated, y_at, last_state,
    k, l, h, p, g, n, segment, reverse,
    CHUNK: tl.constexpr, P: tl.constexpr, N: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Walk the chunks of a segment; write those outputs that are given: y, y before the gate, and states."""
    segments, chunks, state_at = tl.cdiv(l, segment), tl.cdiv(l, CHUNK), tl.arange(0, N)
    image, direction, turn, head, channel, block = _place(k, segments, h, p, P)
    row = (image * k + direction) * h + head
    x = _of_head(x, x_at, image, direction, head)
    B = _of_head(B, B_at, image, direction, head // (h // g))
    C = _of_head(C, C_at, image, direction, head // (h // g))
    if z is not None:
        z = _of_head(z, z_at, image, direction, head)
    if y is not None:
        y = _of_head(y, y_at, image, direction, head)
    if ungated is not None:
        ungated = _of_head(ungated, y_at, image, direction, head)
    skip = _skip(D, (direction * h + head) * p, channel, p, P)
    state = _load_state(starts, row * segments + turn, channel, state_at, p, n)
    first, last = turn * segment // CHUNK, tl.cdiv(min(turn * segment + segment, l), CHUNK)
    for chunk in tl.range(first, last, disable_licm=True):  # addresses kept through the loop would spill registers
        if saved is not None:
            _store_state(saved, row * chunks + chunk, state, channel, state_at, p, n)
        place = (row * chunks + chunk) * CHUNK
        token, inside = _tokens(chunk * CHUNK, l, direction, reverse, CHUNK)
        step, opened, closed, whole = _decays(steps, since, below, place, CHUNK)
        values = _load(x, x_at, token, channel, inside, p)
        pairs = tl.zeros([CHUNK, CHUNK], tl.float32)
        for some in tl.range(0, n, STATES, disable_licm=True):
            part = some + _some(N)
            ins, outs = _load(B, B_at, token, part, inside, n), _load(C, C_at, token, part, inside, n)
            pairs = _dot(outs, tl.trans(ins), pairs, OPERAND, PRECISION)
        ins, outs = _load(B, B_at, token, state_at, inside, n), _load(C, C_at, token, state_at, inside, n)
        pairs *= _between(since, below, place, CHUNK) * step[None, :]
        out = _dot(outs, tl.trans(state), None, OPERAND, PRECISION) * opened[:, None]
        out = _dot(pairs, values, out + skip[None, :] * values.to(tl.float32), OPERAND, PRECISION)
        added = ins.to(tl.float32) * (step * closed)[:, None]
        state = _dot(tl.trans(values), added, whole * state, OPERAND, PRECISION)
        if ungated is not None:
            _store(ungated, y_at, token, channel, inside, p, out)
        if z is not None:
            gate = _load(z, z_at, token, channel, inside, p).to(tl.float32)
            out *= gate * sigmoid(gate)
        if y is not None:
            _store(y, y_at, token, channel, inside, p, out)
    if last_state is not None and turn == segments - 1:
        _store_state(last_state, row, state, channel, state_at, p, n)


@triton.jit
def states_kernel(
    x, x_at, B, B_at, steps, since, below, starts, saved, last_state, ends, decays,
    k, l, h, p, g, n, segment, reverse,
    CHUNK: tl.constexpr, P: tl.constexpr, N: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
    BACKWARDS: tl.constexpr,
):  # fmt: skip
    """Walk the chunks of a segment with the state alone, and write it where it is given.

    `saved` gets the state before each chunk. `ends` gets the last state, and `decays` the decay of the segment, in the
    place of the next segment: the last one has none. BACKWARDS, with dy for x and C for B, the state is the gradient of
    the state, and the last segment is the first.
    """
    segments, chunks, state_at = tl.cdiv(l, segment), tl.cdiv(l, CHUNK), tl.arange(0, N)
    image, direction, turn, head, channel, block = _place(k, segments if ends is None else segments - 1, h, p, P)
    row = (image * k + direction) * h + head
    first = (segments - 1 - turn if BACKWARDS else turn) * (segment // CHUNK)
    last = min(first + segment // CHUNK, chunks)
    x = _of_head(x, x_at, image, direction, head)
    B = _of_head(B, B_at, image, direction, head // (h // g))
    state = _load_state(starts, row * segments + turn, channel, state_at, p, n)
    decay = tl.full([], 1.0, tl.float32)
    for i in tl.range(last - first, disable_licm=True):
        chunk = last - 1 - i if BACKWARDS else first + i
        if saved is not None:
            _store_state(saved, row * chunks + chunk, state, channel, state_at, p, n)
        token, inside = _tokens(chunk * CHUNK, l, direction, reverse, CHUNK)
        step, opened, closed, whole = _decays(steps, since, below, (row * chunks + chunk) * CHUNK, CHUNK)
        values, ins = _load(x, x_at, token, channel, inside, p), _load(B, B_at, token, state_at, inside, n)
        added = ins.to(tl.float32) * (opened if BACKWARDS else step * closed)[:, None]
        state = _dot(tl.trans(values), added, whole * state, OPERAND, PRECISION)
        decay *= whole
    if last_state is not None and turn == segments - 1:
        _store_state(last_state, row, state, channel, state_at, p, n)
    if ends is not None:
        place = row * segments + turn + 1
        _store_state(ends, place, state, channel, state_at, p, n)
        tl.store(decays + place, decay)


@triton.jit
def pass_kernel(ends, decays, start, segments, size, BLOCK: tl.constexpr):
    """Turn what each segment adds to the state into the state before the segment, in place."""
    blocks = tl.cdiv(size, BLOCK)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    at = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    state = tl.zeros([BLOCK], tl.float32) if start is None else tl.load(start + row * size + at, at < size, 0.0)
    place = ends + row * segments * size + at
    tl.store(place, state, at < size)
    for s in range(1, segments):
        place += size
        state = tl.load(decays + row * segments + s) * state + tl.load(place, at < size, 0.0)
        tl.store(place, state, at < size)


@triton.jit
def gradients_kernel(
    x, x_at, B, B_at, C, C_at, steps, since, below, slopes, A, D, dy, dy_at, saved, pulls,
    dx, dx_at, ddt, dB, dC, dB_at, dA, dD, dbias, k, l, h, p, g, n, reverse,
    CHUNK: tl.constexpr, P: tl.constexpr, N: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Write every gradient of a chunk, from the state before it and the gradient of the state after it.

    Where programs share a gradient, each writes its own part: ddt is (blocks, b, k, h, l), dA and dbias (blocks, b, c,
    k, h), dD (b, c, k, h, p), and the strides of dB and dC have a fifth, of the blocks of all heads of a group.
    """
    chunks = tl.cdiv(l, CHUNK)
    image, direction, chunk, head, channel, block = _place(k, chunks, h, p, P)
    row, images = (image * k + direction) * h + head, tl.num_programs(0) // (k * chunks * h * tl.cdiv(p, P))
    group, share = head // (h // g), (head % (h // g) * tl.cdiv(p, P) + block).to(tl.int64)
    token, inside = _tokens(chunk * CHUNK, l, direction, reverse, CHUNK)
    place = (row * chunks + chunk) * CHUNK
    step, opened, closed, whole = _decays(steps, since, below, place, CHUNK)
    x, dy = _of_head(x, x_at, image, direction, head), _of_head(dy, dy_at, image, direction, head)
    B, C = _of_head(B, B_at, image, direction, group), _of_head(C, C_at, image, direction, group)
    dB = _of_head(dB, dB_at, image, direction, group) + share * dB_at[4]
    dC = _of_head(dC, dB_at, image, direction, group) + share * dB_at[4]
    values, grads = _load(x, x_at, token, channel, inside, p), _load(dy, dy_at, token, channel, inside, p)
    grad_pairs = _dot(grads, tl.trans(values), None, OPERAND, PRECISION)
    grad_pairs *= _between(since, below, place, CHUNK) * step[None, :]
    pairs, grad_values = tl.zeros([CHUNK, CHUNK], tl.float32), tl.zeros([CHUNK, P], tl.float32)
    through, entering, leaving = 0.0, tl.zeros([CHUNK], tl.float32), tl.zeros([CHUNK], tl.float32)
    for some in tl.range(0, n, STATES, disable_licm=True):
        state_at = some + _some(N)
        ins, outs = _load(B, B_at, token, state_at, inside, n), _load(C, C_at, token, state_at, inside, n)
        pairs = _dot(outs, tl.trans(ins), pairs, OPERAND, PRECISION)

        # through the state before the chunk
        state = _load_state(saved, row * chunks + chunk, channel, state_at, p, n)
        grad_outs = _dot(_load(dy, dy_at, token, channel, inside, p), state, None, OPERAND, PRECISION)
        grad_outs *= opened[:, None]
        entering += tl.sum(grad_outs * outs.to(tl.float32), 1)
        grad_outs = _dot(grad_pairs, ins, grad_outs, OPERAND, PRECISION)
        _store(dC, dB_at, token, state_at, inside, n, grad_outs)

        # through the state after it
        pull = _load_state(pulls, row * chunks + chunk, channel, state_at, p, n)
        through += tl.sum(pull * state)
        grad_ins = _dot(_load(x, x_at, token, channel, inside, p), pull, None, OPERAND, PRECISION)
        grad_ins *= (step * closed)[:, None]
        leaving += tl.sum(grad_ins * ins.to(tl.float32), 1)
        grad_ins = _dot(tl.trans(grad_pairs), outs, grad_ins, OPERAND, PRECISION)
        _store(dB, dB_at, token, state_at, inside, n, grad_ins)
        grad_values = _dot(ins, tl.trans(pull), grad_values, OPERAND, PRECISION)

    to_decay = whole * through + _sum_across(pairs * grad_pairs, CHUNK)
    to_decay += tl.cumsum(entering, 0, reverse=True) + _sum_before(leaving, CHUNK)
    pairs *= _between(since, below, place, CHUNK)
    grads = _load(dy, dy_at, token, channel, inside, p)
    grad_values = _dot(tl.trans(pairs), grads, grad_values * closed[:, None], OPERAND, PRECISION)

    values, grads = _load(x, x_at, token, channel, inside, p).to(tl.float32), grads.to(tl.float32)
    skip = _skip(D, (direction * h + head) * p, channel, p, P)
    grad_x = step[:, None] * grad_values + skip[None, :] * grads
    _store(_of_head(dx, dx_at, image, direction, head), dx_at, token, channel, inside, p, grad_x)
    to_dt = tl.sum(grad_values * values, 1) + tl.load(A + direction * h + head) * to_decay
    to_dt *= tl.load(slopes + place + tl.arange(0, CHUNK))
    tl.store(ddt + ((block * images + image) * k * h + direction * h + head) * l + token, to_dt, inside)
    part = (image * chunks + chunk) * k + direction
    tl.store(dD + (part * h + head) * p + channel, tl.sum(grads * values, 0), channel < p)
    part = ((block * images + image) * chunks + chunk) * k + direction
    tl.store(dA + part * h + head, tl.sum(step * to_decay))
    tl.store(dbias + part * h + head, tl.sum(to_dt))


@triton.jit
def _place(k, parts, h, p, P: tl.constexpr):
    """Return a program's image, direction, part of the tokens, head, channels, and the block of the head's channels."""
    blocks = tl.cdiv(p, P)
    block, head = tl.program_id(0) % blocks, tl.program_id(0) // blocks % h
    part, row = tl.program_id(0) // (blocks * h) % parts, tl.program_id(0) // (blocks * h * parts)
    return (row // k).to(tl.int64), row % k, part, head, block * P + tl.arange(0, P), block


@triton.jit
def _of_head(x, x_at, image, direction, head):
    """Return the address of a head or group in a tensor of strides x_at."""
    return x + image * x_at[0] + direction.to(tl.int64) * x_at[1] + head.to(tl.int64) * x_at[3]


@triton.jit
def _tokens(start, l, direction, reverse, CHUNK: tl.constexpr):
    """Return the tokens that a direction takes after `start` others, and which of them exist."""
    position = start + tl.arange(0, CHUNK)
    backwards = reverse >> direction & 1
    return (position + backwards * (l - 1 - 2 * position)).to(tl.int64), position < l


@triton.jit
def _some(N: tl.constexpr):
    """Return the first of the states, as many as a product takes at a time."""
    return tl.arange(0, N if N < STATES else STATES)


@triton.jit
def _load(x, x_at, token, column, inside, columns):
    mask = inside[:, None] & (column < columns)[None, :]
    return tl.load(x + token[:, None] * x_at[2] + column[None, :], mask, 0.0)


@triton.jit
def _store(x, x_at, token, column, inside, columns, value):
    mask = inside[:, None] & (column < columns)[None, :]
    tl.store(x + token[:, None] * x_at[2] + column[None, :], value, mask)


@triton.jit
def _load_state(x, place, channel, state_at, p, n):
    """Load a state, (P, N); zeros if x is None."""
    if x is None:
        state = tl.zeros([channel.shape[0], state_at.shape[0]], tl.float32)
    else:
        mask = (channel < p)[:, None] & (state_at < n)[None, :]
        state = tl.load(x + (place * p + channel)[:, None] * n + state_at[None, :], mask, 0.0)
    return state


@triton.jit
def _store_state(x, place, state, channel, state_at, p, n):
    mask = (channel < p)[:, None] & (state_at < n)[None, :]
    tl.store(x + (place * p + channel)[:, None] * n + state_at[None, :], state, mask)


@triton.jit
def _skip(D, at, channel, p, P: tl.constexpr):
    return tl.zeros([P], tl.float32) if D is None else tl.load(D + at + channel, channel < p, 0.0)


@triton.jit
def _decays(steps, since, below, place, CHUNK: tl.constexpr):
    """Return a chunk's steps, its decays from its start through each token and from there to its end, and its whole."""
    at = place + tl.arange(0, CHUNK)
    high, low = tl.load(since + at), tl.load(below + at)
    whole, rest = tl.load(since + place + CHUNK - 1), tl.load(below + place + CHUNK - 1)
    return tl.load(steps + at), tl.exp2(high), tl.exp2(whole - high + (rest - low)), tl.exp2(whole)


@triton.jit
def _between(since, below, place, CHUNK: tl.constexpr):
    """Return the decay of each token, a row, from each token before it, a column; zeros above the diagonal."""
    token = tl.arange(0, CHUNK)
    high, low = tl.load(since + place + token), tl.load(below + place + token)
    decay = high[:, None] - high[None, :] + (low[:, None] - low[None, :])
    return tl.exp2(tl.where(token[:, None] >= token[None, :], decay, float("-inf")))  # above, exp2 could overflow


@triton.jit
def _sum_across(pairs, CHUNK: tl.constexpr):
    """Return for each token t the sum of pairs[i, j] with i >= t > j.

    Those are the pairs of tokens between which t's decay lies. The difference of sums of whole rows and columns would
    lose digits.
    """
    token = tl.arange(0, CHUNK)
    pairs = tl.where(token[:, None] > token[None, :], pairs, 0.0)
    before = tl.cumsum(pairs, 1) - pairs
    return tl.sum(tl.where(token[:, None] >= token[None, :], before, 0.0), 0)


@triton.jit
def _sum_before(values, CHUNK: tl.constexpr):
    """Return for each token the sum of the values of those before it, without a difference that would lose digits."""
    token = tl.arange(0, CHUNK)
    return tl.sum(tl.where(token[:, None] > token[None, :], values[None, :], 0.0), 1)


@triton.jit
def _dot(a, b, total, OPERAND: tl.constexpr, PRECISION: tl.constexpr):
    """Return the matrix product, added to a total if there is one."""
    a, b = a.to(OPERAND), b.to(OPERAND)
    if INTERPRETED:  # the interpreter would multiply the bits of bfloat16
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, total, input_precision=PRECISION)
