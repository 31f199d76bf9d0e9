// The selective scan for one instruction set; included after vectors.h, once for each.

template <int T>
constexpr int kSideBySide = T < 4 ? T : 4;

// Turns delta at T steps of one block of channels into step sizes.
template <int T>
static VIM_INLINE void step_sizes(const Scan& s, Vec* delta, int64_t k, int64_t channel, Mask mask) {
  if (s.delta_bias != nullptr) {
    const Vec bias = load(s.delta_bias + k * s.channels + channel, mask);
    for (int t = 0; t < T; ++t) delta[t] += bias;
  }
  if (!s.softplus) return;
#pragma GCC unroll 2
  for (int t = 0; t < T; t += kSideBySide<T>) softplus<kSideBySide<T>>(delta + t);
}

static void copy_rows(float* to, const Rows& rows, const Place& p, int64_t t0, int64_t steps, int64_t n) {
  for (int64_t t = 0; t < steps; ++t) {
    const float* from = rows.at(p.b, p.k, p.token(t0 + t), p.piece.group);
    for (int64_t i = 0; i < n; ++i) to[t * n + i] = from[i * rows.channel];
  }
}

// Returns the steps of a run: at most `longest`, and a multiple of kSaved.
static int64_t run_of(const Scan& s, int64_t longest) {
  return std::max(std::min(longest / kSaved, (s.tokens + kSaved - 1) / kSaved), int64_t{1}) * kSaved;
}

static bool is_transposed(const Rows& rows) { return rows.data != nullptr && rows.channel != 1; }

// Up to kSaved steps of one block of a tensor. If its channels are not contiguous, they are transposed to and from a
// buffer.
class Tile {
 public:
  // After the last block, the first comes again `ahead` steps later.
  Tile(const Rows& rows, const Place& p, int64_t ahead)
      : rows_(rows),
        p_(p),
        next_run_(p.ahead(rows, ahead) - (p.blocks() - 1) * kLanes * rows.channel),
        transposed_(is_transposed(rows)) {}

  // Returns the tensor, for a block's steps from t0 on.
  Rows at(int64_t block, int64_t t0, int64_t steps) {
    if (!transposed_) return rows_;
    const int64_t first = p_.reverse ? p_.token(t0 + steps - 1) : t0;
    memory_ = rows_.at(p_.b, p_.k, first) + p_.channel(block) * rows_.channel;
    steps_ = steps;
    lanes_ = p_.lanes(block);
    // A line of each channel of the next block: its other steps are prefetched with this block's others.
    const float* next = memory_ + (block + 1 < p_.blocks() ? kLanes * rows_.channel : next_run_);
#pragma GCC unroll 16
    for (int64_t c = 0; c < kLanes; ++c) __builtin_prefetch(next + c * rows_.channel);
    return {reinterpret_cast<float*>(buffer_) - first * kLanes - p_.channel(block), 0, 0, kLanes, 0, 1};
  }

  Rows read(int64_t block, int64_t t0, int64_t steps) {
    const Rows tile = at(block, t0, steps);
    if (transposed_) copy<true>();
    return tile;
  }

  void write() {
    if (transposed_) copy<false>();
  }

 private:
  template <bool kRead>
  void copy() {
    float* tile = reinterpret_cast<float*>(buffer_);
    int64_t t = 0;
    if (lanes_ == kLanes && rows_.token == 1)
      for (; t + kLanes <= steps_; t += kLanes) {
        if (kRead) transpose(memory_ + t, rows_.channel, tile + t * kLanes, kLanes);
        else transpose(tile + t * kLanes, kLanes, memory_ + t, rows_.channel);
      }
    for (; t < steps_; ++t)
      for (int64_t c = 0; c < lanes_; ++c) {
        float *here = memory_ + t * rows_.token + c * rows_.channel, *lane = tile + t * kLanes + c;
        (kRead ? *lane : *here) = kRead ? *here : *lane;
      }
  }

  const Rows rows_;
  const Place& p_;
  const int64_t next_run_;
  const bool transposed_;
  Vec buffer_[kSaved];
  float* memory_ = nullptr;
  int64_t steps_ = 0, lanes_ = 0;
};

// Scales and gates the sum of the directions at T steps of one block of channels.
template <int T>
static VIM_INLINE void finish_steps(const Scan& s, const Place& p, int64_t token, int64_t channel, Mask mask, Vec* y) {
  for (int t = 0; t < T; ++t) y[t] *= s.scale;
  if (s.ungated.data != nullptr) {
    float* out = s.ungated.at(p.b, p.k, token) + channel;
    for (int t = 0; t < T; ++t) store(out + p.ahead(s.ungated, t), y[t], mask);
  }
  if (s.z.data != nullptr) {
    const float* z = s.z.at(p.b, p.k, token) + channel;
#pragma GCC unroll 8
    for (int t = 0; t < T; ++t) y[t] *= silu(load_ahead(z + p.ahead(s.z, t), p.ahead(s.z, T), mask));
  }
}

// T steps of one block of channels, its state h in registers one n at a time. N: n at compile time, 0 if unusual.
template <int T, int N>
static inline void scan_steps(const Scan& s, const Place& p, int64_t block, int64_t t0, const Vec* A2, Vec* h,
                              const float* B, const float* C, bool first, bool last, Vec* elapsed) {
  const int64_t n = N ? N : s.states, c = p.channel(block);
  const Mask mask = p.mask(block);
  Vec dt[T], x[T], y[T];
  const Vec D = s.D != nullptr ? load(s.D + p.k * s.channels + c, mask) : Vec{};
  const int64_t token = p.token(t0);
  const float* delta = s.delta.at(p.b, p.k, token) + c;
#pragma GCC unroll 8
  for (int t = 0; t < T; ++t) dt[t] = load_ahead(delta + p.ahead(s.delta, t), p.ahead(s.delta, T), mask);
  step_sizes<T>(s, dt, p.k, c, mask);
#pragma GCC unroll 8
  for (int t = 0; t < T; ++t) *elapsed += dt[t];
  const float* u_at = s.u.at(p.b, p.k, token) + c;
#pragma GCC unroll 8
  for (int t = 0; t < T; ++t) {
    const Vec u = load_ahead(u_at + p.ahead(s.u, t), p.ahead(s.u, T), mask);
    x[t] = dt[t] * u;
    y[t] = D * u;
  }
  for (int64_t i = 0; i < n; ++i) {
    const Vec a = A2[i];
    Vec state = h[i];
#pragma GCC unroll 2
    for (int t0 = 0; t0 < T; t0 += kSideBySide<T>) {
      Vec decay[kSideBySide<T>];
#pragma GCC unroll 8
      for (int t = 0; t < kSideBySide<T>; ++t) decay[t] = dt[t0 + t] * a;
      exp2<kSideBySide<T>>(decay);
#pragma GCC unroll 8
      for (int t = 0; t < kSideBySide<T>; ++t) {
        state = decay[t] * state + x[t0 + t] * B[(t0 + t) * n + i];
        y[t0 + t] += state * C[(t0 + t) * n + i];
      }
    }
    h[i] = state;
  }
  float* out = s.y.at(p.b, p.k, token) + c;
  if (!first)
#pragma GCC unroll 8
    for (int t = 0; t < T; ++t) y[t] += load_ahead(out + p.ahead(s.y, t), p.ahead(s.y, T), mask);
  if (last) finish_steps<T>(s, p, token, c, mask, y);
#pragma GCC unroll 8
  for (int t = 0; t < T; ++t) store(out + p.ahead(s.y, t), y[t], mask);
}

// Writes the state and the sums of the step sizes, the `part`-th of those that are returned.
static void keep_states(const Scan& s, const Place& p, const Vec* h, const Vec* elapsed, int64_t part) {
  const int64_t parts = std::max<int64_t>((s.tokens + s.every - 1) / s.every, 1);
  const int64_t channels = ((p.b * s.directions + p.k) * parts + part) * s.channels;
  if (s.kept != nullptr) store_states(s.kept + channels * s.states, h, p, s.states);
  if (s.elapsed == nullptr) return;
  for (int64_t block = 0; block < p.blocks(); ++block)
    store(s.elapsed + channels + p.channel(block), elapsed[block], p.mask(block));
}

template <int N>
static void scan_piece(const Scan& scan, const Place& p, bool first, bool last) {
  Scan s = scan;  // its large tensors are tiles
  constexpr int kSteps = 8;
  static_assert(kSaved % kSteps == 0 && kRun % kSaved == 0, "states are saved between two runs of kSteps");
  const int64_t n = N ? N : s.states, blocks = p.blocks();
  const int64_t states = (p.b * s.directions + p.k) * s.channels * n, chunks = (s.tokens + kSaved - 1) / kSaved;
  const bool transposed = is_transposed(s.u) || is_transposed(s.delta) || is_transposed(s.z) || is_transposed(s.y);
  const int64_t run = transposed ? run_of(s, kRun) : kSteps;  // steps of a block before the next one's
  Tile u(s.u, p, run), delta(s.delta, p, run), z(s.z, p, run), y(s.y, p, run), ungated(s.ungated, p, run);
  Buffer<Vec> A2(blocks * n), h(blocks * n), elapsed(blocks);
  Buffer<float> B(run * n), C(run * n);
  load_states(A2.data(), s.A + p.k * s.channels * n, p, n, kLog2E);
  if (s.initial_state != nullptr) load_states(h.data(), s.initial_state + states, p, n, 1.0f);
  for (int64_t t0 = 0; t0 < s.tokens; t0 += run) {
    const int64_t steps = std::min(run, s.tokens - t0);
    copy_rows(B.data(), s.B, p, t0, steps, n);
    copy_rows(C.data(), s.C, p, t0, steps, n);
    for (int64_t block = 0; block < blocks; ++block) {
      const Vec* a = &A2[block * n];
      Vec* state = &h[block * n];
      for (int64_t t = 0; t < steps;) {
        if (transposed && t % kSaved == 0) {
          const int64_t chunk = std::min(kSaved, steps - t);
          s.u = u.read(block, t0 + t, chunk);
          s.delta = delta.read(block, t0 + t, chunk);
          s.z = z.read(block, t0 + t, chunk);
          s.y = first ? y.at(block, t0 + t, chunk) : y.read(block, t0 + t, chunk);
          s.ungated = ungated.at(block, t0 + t, chunk);
        }
        if (s.saved != nullptr && (t0 + t) % kSaved == 0) {
          float* saved = s.saved + states * chunks + ((t0 + t) / kSaved * s.channels + p.channel(block)) * n;
          for (int64_t i = 0; i < n; ++i) store(saved + i * p.lanes(block), state[i], p.mask(block));
        }
        const float *b = B.data() + t * n, *c = C.data() + t * n;
        if (t + kSteps <= steps) {
          scan_steps<kSteps, N>(s, p, block, t0 + t, a, state, b, c, first, last, &elapsed[block]);
          t += kSteps;
        } else {
          scan_steps<1, N>(s, p, block, t0 + t, a, state, b, c, first, last, &elapsed[block]);
          t += 1;
        }
        if (transposed && (t % kSaved == 0 || t == steps)) {
          y.write();
          if (last) ungated.write();
        }
      }
    }
    if (t0 + steps == s.tokens || (t0 + steps) % s.every == 0)
      keep_states(s, p, h.data(), elapsed.data(), (t0 + steps - 1) / s.every);
  }
  if (s.tokens == 0) keep_states(s, p, h.data(), elapsed.data(), 0);
}

static Place place_of(const Scan& s, int64_t b, int64_t k, int64_t piece) {
  return {b, k, piece_of(s.channels, s.groups, s.piece, piece), ((s.reverse >> k) & 1) != 0, s.tokens};
}

static void scan_forward(const Scan& s, int64_t threads) {
  const int64_t pieces = pieces_of(s.channels, s.groups, s.piece), each = s.combined ? s.directions : 1;
  auto* run = s.states == 16 ? scan_piece<16> : s.states == 1 ? scan_piece<1> : scan_piece<0>;
  // Directions that are added up are one task: their sum stays in its cache, and its order is fixed.
  parallel_for(s.images * (s.directions / each) * pieces, threads, [&](int64_t task) {
    const int64_t b = task / pieces / (s.directions / each), k0 = task / pieces % (s.directions / each);
    for (int64_t k = k0; k < k0 + each; ++k)
      run(s, place_of(s, b, k, task % pieces), k == k0, k == k0 + each - 1);
  });
}

// Up to kSaved steps of one block, backwards. With g = dL/dh: g[t] = C[t] dy[t] + exp(dt[t+1] A) g[t+1].
template <int N>
static inline void scan_steps_backward(const Scan& s, const ScanGrads& grads, const Place& p, int64_t block, int64_t t0,
                                       int64_t steps, const Vec* A2, Vec* g, const float* B, const float* C,
                                       const float* saved, Vec* dA, Vec* dD, Vec* dbias, Vec* dB, Vec* dC) {
  const int64_t n = N ? N : s.states, c = p.channel(block);
  const Mask mask = p.mask(block);
  Vec u[kSaved], dt[kSaved], x[kSaved], dy[kSaved], dx[kSaved], ddt[kSaved];
  const Vec D = s.D != nullptr ? load(s.D + p.k * s.channels + c, mask) : Vec{};
  const Vec bias = s.delta_bias != nullptr ? load(s.delta_bias + p.k * s.channels + c, mask) : Vec{};
  for (int64_t t = 0; t < kSaved; ++t) {
    const float* delta = s.delta.at(p.b, p.k, p.token(t0 + t)) + c;
    dt[t] = t < steps ? load_ahead(delta, p.ahead(s.delta, -kSaved), mask) : Vec{};
  }
  for (int64_t t = 0; t < steps; t += kSideBySide<kSaved>) step_sizes<kSideBySide<kSaved>>(s, dt + t, p.k, c, mask);
  for (int64_t t = 0; t < steps; ++t) {
    const int64_t token = p.token(t0 + t);
    u[t] = load_ahead(s.u.at(p.b, p.k, token) + c, p.ahead(s.u, -kSaved), mask);
    x[t] = dt[t] * u[t];
    dx[t] = ddt[t] = Vec{};
    dy[t] = load_ahead(grads.y.at(p.b, p.k, token) + c, p.ahead(grads.y, -kSaved), mask);
    if (s.z.data != nullptr) {
      const Vec z = load_ahead(s.z.at(p.b, p.k, token) + c, p.ahead(s.z, -kSaved), mask);
      if (!s.combined || p.k == 0) {
        const Vec ungated = load_ahead(s.ungated.at(p.b, p.k, token) + c, p.ahead(s.ungated, -kSaved), mask);
        store(grads.z.at(p.b, p.k, token) + c, dy[t] * ungated * silu_grad(z), mask);
      }
      dy[t] *= silu(z);
    }
    dy[t] *= s.scale;
    *dD += dy[t] * u[t];
  }
  for (int64_t i = 0; i < n; ++i) {
    const Vec a = A2[i];
    Vec h[kSaved + 1], decay[kSaved];
    h[0] = load(saved + i * p.lanes(block), mask);
    for (int64_t t = 0; t < steps; ++t) {
      decay[t] = exp2(dt[t] * a);
      h[t + 1] = decay[t] * h[t] + x[t] * B[t * n + i];
    }
    Vec carry = g[i], da = Vec{};
    for (int64_t t = steps - 1; t >= 0; --t) {
      const Vec gt = dy[t] * C[t * n + i] + carry;
      dC[i * kSaved + t] += dy[t] * h[t + 1];
      dB[i * kSaved + t] += gt * x[t];
      dx[t] += gt * B[t * n + i];
      carry = gt * decay[t];
      const Vec q = carry * h[t];
      da += dt[t] * q;
      ddt[t] += q * a;
    }
    g[i] = carry;
    dA[i] += da;
  }
  for (int64_t t = 0; t < steps; ++t) {
    const int64_t token = p.token(t0 + t);
    store(grads.u.at(p.b, p.k, token) + c, dx[t] * dt[t] + D * dy[t], mask);
    Vec ddelta = ddt[t] * kLn2 + dx[t] * u[t];  // A2 = A log2(e)
    if (s.softplus) ddelta *= sigmoid(load(s.delta.at(p.b, p.k, token) + c, mask) + bias);
    *dbias += ddelta;
    store(grads.delta.at(p.b, p.k, token) + c, ddelta, mask);
  }
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
  Buffer<Vec> A2(blocks * n), g(blocks * n), dA(blocks * n), dD(blocks), dbias(blocks), dB(run * n), dC(run * n);
  Buffer<float> B(run * n), C(run * n);
  load_states(A2.data(), s.A + p.k * s.channels * n, p, n, kLog2E);
  if (grads.last_state != nullptr) load_states(g.data(), grads.last_state + states, p, n, 1.0f);
  Tile u(s.u, p, -run), delta(s.delta, p, -run), z(s.z, p, -run), ungated(s.ungated, p, -run);
  Tile dy(grads.y, p, -run), du(grads.u, p, -run), ddelta(grads.delta, p, -run), dz(grads.z, p, -run);
  for (int64_t t0 = (s.tokens - 1) / run * run; t0 >= 0; t0 -= run) {
    const int64_t steps = std::min(run, s.tokens - t0);
    copy_rows(B.data(), s.B, p, t0, steps, n);
    copy_rows(C.data(), s.C, p, t0, steps, n);
    std::fill(dB.data(), dB.data() + run * n, Vec{});
    std::fill(dC.data(), dC.data() + run * n, Vec{});
    for (int64_t block = 0; block < blocks; ++block) {
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
        scan_steps_backward<N>(s, grads, p, block, t0 + t, chunk, &A2[block * n], &g[block * n], B.data() + t * n,
                               C.data() + t * n, saved, &dA[block * n], &dD[block], &dbias[block], dB.data() + t * n,
                               dC.data() + t * n);
        du.write();
        ddelta.write();
        if (!s.combined || p.k == 0) dz.write();
      }
    }
    for (int64_t t = 0; t < steps; ++t) {
      float* to_B = grads.B.at(p.b, p.k, p.token(t0 + t), p.piece.index);
      float* to_C = grads.C.at(p.b, p.k, p.token(t0 + t), p.piece.index);
      const int64_t chunk = t / kSaved * kSaved;
      for (int64_t i = 0; i < n; ++i) {
        to_B[i] = sum_lanes(dB[chunk * n + i * kSaved + t - chunk]);
        to_C[i] = sum_lanes(dC[chunk * n + i * kSaved + t - chunk]);
      }
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
