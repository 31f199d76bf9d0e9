// The gradients of the selective scan for one instruction set; included after scan.h, once for each.

// The states of one block of channels, before up to kSaved steps, and the sums of gradients over its steps.
struct StatesBackward {
  const float *B, *C, *saved;
  const Vec* A2;
  Vec largest_A2;
  Vec *g, *dA, *dB, *dC, *dD, *dbias;  // g: the gradient of the states behind the steps, then of those before them
};

// The steps themselves, from their inputs to the inputs' gradients. Behind the last one are steps of zeros, which change
// nothing, up to `whole`, a multiple of kSideBySide.
struct StepsBackward {
  int64_t steps, whole;
  Vec u[kSaved], raw[kSaved], dt[kSaved], x[kSaved], dy[kSaved], dx[kSaved], ddt[kSaved];  // raw: dt before softplus
};

// Loads the steps' inputs and gradients, writes the gradient of the gate and takes it out of dy.
static VIM_INLINE void load_backward(const Scan& s, const ScanGrads& grads, const Place& p, int64_t block, int64_t t0,
                                     StepsBackward* at) {
  const int64_t steps = at->steps, whole = at->whole;
  constexpr int kSide = kSideBySide<kSaved>;
  const Mask mask = p.mask(block);
  const Steps u = p.steps(s.u, block, t0), delta = p.steps(s.delta, block, t0), dy = p.steps(grads.y, block, t0);
  const Vec bias = s.delta_bias != nullptr ? load(s.delta_bias + p.k * s.channels + p.channel(block), mask) : Vec{};
  for (int64_t t = 0; t < steps; ++t) {
    at->u[t] = load_ahead(u, t, -kSaved, mask);
    at->dy[t] = load_ahead(dy, t, -kSaved, mask);
    at->dt[t] = at->raw[t] = load_ahead(delta, t, -kSaved, mask) + bias;
  }
  for (int64_t t = steps; t < whole; ++t) at->u[t] = at->dy[t] = at->dt[t] = at->raw[t] = Vec{};
  if (s.softplus)
    for (int64_t t = 0; t < whole; t += kSide) softplus<kSide>(at->dt + t);
  for (int64_t t = steps; t < whole; ++t) at->dt[t] = Vec{};
  if (s.z.data != nullptr) {
    const Steps z = p.steps(s.z, block, t0), ungated = p.steps(s.ungated, block, t0), dz = p.steps(grads.z, block, t0);
    Vec gate[kSaved], open[kSaved];
    for (int64_t t = 0; t < steps; ++t) gate[t] = open[t] = load_ahead(z, t, -kSaved, mask);
    for (int64_t t = steps; t < whole; ++t) gate[t] = open[t] = Vec{};
    for (int64_t t = 0; t < whole; t += kSide) sigmoid<kSide>(open + t);
    if (!s.combined || p.k == 0)
      for (int64_t t = 0; t < steps; ++t) {
        const Vec slope = open[t] * (1.0f + gate[t] * (1.0f - open[t]));
        store(dz.at(t), at->dy[t] * load_ahead(ungated, t, -kSaved, mask) * slope, mask);
      }
    for (int64_t t = 0; t < steps; ++t) at->dy[t] *= gate[t] * open[t];
  }
  for (int64_t t = 0; t < whole; ++t) {
    at->dy[t] *= s.scale;
    at->x[t] = at->dt[t] * at->u[t];
    at->dx[t] = at->ddt[t] = Vec{};
  }
}

// S states of the steps, backwards. With g = dL/dh: g[t] = C[t] dy[t] + exp(dt[t+1] A) g[t+1]. Each step waits for the
// one before it, so the states go side by side.
template <int S, bool kInRange>
static VIM_INLINE void states_backward(const StatesBackward& states, StepsBackward* at, int64_t n, int64_t first_state,
                                       Mask mask, int64_t lanes) {
  constexpr int kSide = kSideBySide<kSaved>;
  const int64_t whole = at->whole;
  const float *B = states.B + first_state, *C = states.C + first_state;
  Vec *g = states.g + first_state, *dA = states.dA + first_state;
  Vec *dB = states.dB + first_state, *dC = states.dC + first_state;
  Vec h[kSaved + 1][S], decay[kSaved][S], a[S], carry[S], da[S];
  for (int i = 0; i < S; ++i) {
    a[i] = states.A2[first_state + i];
    h[0][i] = load(states.saved + (first_state + i) * lanes, mask);
    carry[i] = g[i];
    da[i] = Vec{};
  }
  for (int64_t first = 0; first < whole; first += kSide)
#pragma GCC unroll 4
    for (int i = 0; i < S; ++i) {
      Vec power[kSide], state = h[first][i];
#pragma GCC unroll 4
      for (int t = 0; t < kSide; ++t) power[t] = at->dt[first + t] * a[i];
      kInRange ? exp2_in_range<kSide>(power) : exp2<kSide>(power);
#pragma GCC unroll 4
      for (int t = 0; t < kSide; ++t) {
        decay[first + t][i] = power[t];
        h[first + t + 1][i] = state = power[t] * state + at->x[first + t] * B[(first + t) * n + i];
      }
    }
  for (int64_t t = whole - 1; t >= 0; --t) {
    const Vec dy = at->dy[t], x = at->x[t], dt = at->dt[t];
    Vec dx = at->dx[t], ddt = at->ddt[t];
#pragma GCC unroll 4
    for (int i = 0; i < S; ++i) {
      const int64_t j = t * n + i;
      const Vec gt = dy * C[j] + carry[i];
      dC[j] += dy * h[t + 1][i];
      dB[j] += gt * x;
      dx += gt * B[j];
      carry[i] = gt * decay[t][i];
      const Vec q = carry[i] * h[t][i];
      da[i] += dt * q;
      ddt += q * a[i];
    }
    at->dx[t] = dx;
    at->ddt[t] = ddt;
  }
  for (int i = 0; i < S; ++i) {
    g[i] = carry[i];
    dA[i] += da[i];
  }
}

// Writes the gradients of the steps' u and delta.
static VIM_INLINE void store_backward(const Scan& s, const ScanGrads& grads, const Place& p, int64_t block, int64_t t0,
                                      const StatesBackward& states, StepsBackward* at) {
  constexpr int kSide = kSideBySide<kSaved>;
  const Mask mask = p.mask(block);
  const Steps du = p.steps(grads.u, block, t0), ddelta = p.steps(grads.delta, block, t0);
  const Vec D = s.D != nullptr ? load(s.D + p.k * s.channels + p.channel(block), mask) : Vec{};
  if (s.softplus)
    for (int64_t t = 0; t < at->whole; t += kSide) sigmoid<kSide>(at->raw + t);
  Vec dD = *states.dD, dbias = *states.dbias;
  for (int64_t t = 0; t < at->steps; ++t) {
    dD += at->dy[t] * at->u[t];
    store(du.at(t), at->dx[t] * at->dt[t] + D * at->dy[t], mask);
    Vec slope = at->ddt[t] * kLn2 + at->dx[t] * at->u[t];  // A2 = A log2(e)
    if (s.softplus) slope *= at->raw[t];
    dbias += slope;
    store(ddelta.at(t), slope, mask);
  }
  *states.dD = dD;
  *states.dbias = dbias;
}

// Up to kSaved steps of one block, backwards. N: n at compile time, 0 if unusual.
template <int N>
static inline void scan_steps_backward(const Scan& s, const ScanGrads& grads, const Place& p, int64_t block, int64_t t0,
                                       int64_t steps, const StatesBackward& states) {
  constexpr int kSide = kSideBySide<kSaved>;
  const int64_t n = N ? N : s.states, lanes = p.lanes(block);
  StepsBackward at;
  at.steps = steps;
  at.whole = (steps + kSide - 1) / kSide * kSide;
  load_backward(s, grads, p, block, t0, &at);
  const bool gentle = in_range(steepest(at.dt, at.whole, states.largest_A2));
  for (int64_t i = 0; i < n;) {
    const bool four = i + 4 <= n;
    if (four && gentle) states_backward<4, true>(states, &at, n, i, p.mask(block), lanes);
    else if (four) states_backward<4, false>(states, &at, n, i, p.mask(block), lanes);
    else if (gentle) states_backward<1, true>(states, &at, n, i, p.mask(block), lanes);
    else states_backward<1, false>(states, &at, n, i, p.mask(block), lanes);
    i += four ? 4 : 1;
  }
  store_backward(s, grads, p, block, t0, states, &at);
}

template <int N>
static void scan_piece_backward(const Scan& scan, const ScanGrads& all_grads, const Place& p) {
  Scan s = scan;  // its large tensors, and those of the gradients, are tiles
  ScanGrads grads = all_grads;
  const int64_t n = N ? N : s.states, blocks = p.blocks();
  const int64_t states = (p.b * s.directions + p.k) * s.channels * n, chunks = (s.tokens + kSaved - 1) / kSaved;
  // Steps of a block before the next one's: more if they are transposed, and their dB and dC stay in the cache.
  const bool transposed = is_transposed(s.u) || is_transposed(s.delta) || is_transposed(s.z) || is_transposed(grads.y);
  const int64_t run = transposed ? run_of(s, std::min(kRun, 256 / n)) : kSaved;
  Buffer<Vec> A2(blocks * n), largest(blocks), g(blocks * n), dA(blocks * n), dD(blocks), dbias(blocks);
  Buffer<Vec> dB(run * n), dC(run * n);
  Buffer<float> B(run * n), C(run * n);
  load_states(A2.data(), s.A + p.k * s.channels * n, p, n, kLog2E);
  largest_of(largest.data(), A2.data(), blocks, n);
  if (grads.last_state != nullptr) load_states(g.data(), grads.last_state + states, p, n, 1.0f);
  Tile u(s.u, p, -run), delta(s.delta, p, -run), z(s.z, p, -run), ungated(s.ungated, p, -run);
  Tile dy(grads.y, p, -run), du(grads.u, p, -run), ddelta(grads.delta, p, -run), dz(grads.z, p, -run);
  for (int64_t t0 = (s.tokens - 1) / run * run; t0 >= 0; t0 -= run) {
    const int64_t steps = std::min(run, s.tokens - t0);
    copy_rows(B.data(), s.B, p, t0, steps, n);
    copy_rows(C.data(), s.C, p, t0, steps, n);
    std::fill(dB.data(), dB.data() + run * n, Vec{});
    std::fill(dC.data(), dC.data() + run * n, Vec{});
    for (int64_t block = 0; block < blocks; ++block)
      for (int64_t t = (steps - 1) / kSaved * kSaved; t >= 0; t -= kSaved) {
        const int64_t chunk = std::min(kSaved, steps - t);
        if (transposed) {
          s.u = u.read(block, t0 + t, chunk);
          s.delta = delta.read(block, t0 + t, chunk);
          s.z = z.read(block, t0 + t, chunk);
          s.ungated = ungated.read(block, t0 + t, chunk);
          grads.y = dy.read(block, t0 + t, chunk);
          grads.u = du.at(block, t0 + t, chunk);
          grads.delta = ddelta.at(block, t0 + t, chunk);
          grads.z = dz.at(block, t0 + t, chunk);
        }
        const float* saved = s.saved + states * chunks + ((t0 + t) / kSaved * s.channels + p.channel(block)) * n;
        const int64_t first = block * n, row = t * n;
        const StatesBackward at{&B[row],   &C[row],    saved,    &A2[first], largest[block], &g[first],
                                &dA[first], &dB[row], &dC[row], &dD[block], &dbias[block]};
        scan_steps_backward<N>(s, grads, p, block, t0 + t, chunk, at);
        du.write();
        ddelta.write();
        if (!s.combined || p.k == 0) dz.write();
      }
    for (int64_t t = 0; t < steps; ++t) {
      float* to_B = grads.B.at(p.b, p.k, p.token(t0 + t), p.piece.index);
      float* to_C = grads.C.at(p.b, p.k, p.token(t0 + t), p.piece.index);
      sum_all_lanes(to_B, dB.data() + t * n, n);
      sum_all_lanes(to_C, dC.data() + t * n, n);
    }
  }
  store_states(grads.A + states, dA.data(), p, n);
  if (grads.initial_state != nullptr) store_states(grads.initial_state + states, g.data(), p, n);
  const int64_t channels = (p.b * s.directions + p.k) * s.channels;
  for (int64_t block = 0; block < blocks; ++block) {
    const int64_t at = channels + p.channel(block);
    if (grads.D != nullptr) store(grads.D + at, dD[block], p.mask(block));
    if (grads.delta_bias != nullptr) store(grads.delta_bias + at, dbias[block], p.mask(block));
  }
}

static void scan_backward(const Scan& s, const ScanGrads& grads, int64_t threads) {
  const int64_t pieces = pieces_of(s.channels, s.groups, s.piece);
  auto* run = s.states == 16 ? scan_piece_backward<16> : scan_piece_backward<0>;
  parallel_for(s.images * s.directions * pieces, threads, [&](int64_t task) {
    const int64_t b = task / pieces / s.directions, k = task / pieces % s.directions;
    run(s, grads, place_of(s, b, k, task % pieces));
  });
}
