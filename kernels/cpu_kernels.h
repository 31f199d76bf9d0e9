// The kernels of cpu.cpp for one instruction set: VIM_LANES floats a vector. Included once for each, so no guard.

constexpr int kLanes = VIM_LANES;
typedef float Vec __attribute__((vector_size(4 * VIM_LANES), may_alias));
typedef int32_t IntVec __attribute__((vector_size(4 * VIM_LANES)));

static inline Vec splat(float x) { return Vec{} + x; }

// Which lanes of a block hold channels: all of them but in the last block of a piece.
#if VIM_LANES == 16
typedef __mmask16 Mask;
static inline Mask mask_of(int64_t lanes) { return static_cast<Mask>(lanes >= 16 ? 0xffff : (1 << lanes) - 1); }
static inline Vec load(const float* from, Mask mask) { return reinterpret_cast<Vec>(_mm512_maskz_loadu_ps(mask, from)); }
static inline void store(float* to, Vec x, Mask mask) { _mm512_mask_storeu_ps(to, mask, reinterpret_cast<__m512>(x)); }
#elif VIM_LANES == 8
typedef __m256i Mask;
static inline Mask mask_of(int64_t lanes) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(lanes)), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
static inline Vec load(const float* from, Mask mask) { return reinterpret_cast<Vec>(_mm256_maskload_ps(from, mask)); }
static inline void store(float* to, Vec x, Mask mask) { _mm256_maskstore_ps(to, mask, reinterpret_cast<__m256>(x)); }
#else
typedef int64_t Mask;
static inline Mask mask_of(int64_t lanes) { return std::min<int64_t>(lanes, kLanes); }
static inline Vec load(const float* from, Mask lanes) {
  Vec x{};
  if (lanes == kLanes) {
    std::memcpy(&x, from, sizeof(Vec));
  } else {
    for (int64_t i = 0; i < lanes; ++i) x[i] = from[i];
  }
  return x;
}
static inline void store(float* to, Vec x, Mask lanes) {
  if (lanes == kLanes) {
    std::memcpy(to, &x, sizeof(Vec));
  } else {
    for (int64_t i = 0; i < lanes; ++i) to[i] = x[i];
  }
}
#endif

// Rows of one piece lie far apart in memory, out of the hardware prefetcher's sight.
static inline Vec load_ahead(const float* from, int64_t next, Mask mask) {
  __builtin_prefetch(from + next);
  return load(from, mask);
}

static inline float sum_lanes(Vec x) {
#if VIM_LANES == 16
  return _mm512_reduce_add_ps(reinterpret_cast<__m512>(x));
#else
  float total = 0;
  for (int i = 0; i < kLanes; ++i) total += x[i];
  return total;
#endif
}

// 2^x to 1e-7 relative, at most 2^-126 below the normal numbers. A minimax polynomial on the fraction, the integer part
// as exponent. Each operation waits for the one before it: M vectors side by side keep the processor busy.
template <int M>
static inline void exp2(Vec* x) {
  Vec f[M], p[M];
#if VIM_LANES == 16
  for (int i = 0; i < M; ++i)  // x - floor(x)
    f[i] = reinterpret_cast<Vec>(_mm512_reduce_ps(reinterpret_cast<__m512>(x[i]), 0x09));
  for (int i = 0; i < M; ++i) p[i] = f[i] * 1.867130087e-03f + 9.017030275e-03f;
  for (int i = 0; i < M; ++i) p[i] = p[i] * f[i] + 5.579991315e-02f;
  for (int i = 0; i < M; ++i) p[i] = p[i] * f[i] + 2.401644501e-01f;
  for (int i = 0; i < M; ++i) p[i] = p[i] * f[i] + 6.931513118e-01f;
  for (int i = 0; i < M; ++i) p[i] = p[i] * f[i] + 1.0f;
  for (int i = 0; i < M; ++i)
    x[i] = reinterpret_cast<Vec>(_mm512_scalef_ps(reinterpret_cast<__m512>(p[i]), reinterpret_cast<__m512>(x[i])));
#else
  const Vec low = splat(-126.0f), high = splat(127.99f);
  Vec shifted[M];
  for (int i = 0; i < M; ++i) {
    x[i] = low > x[i] ? low : x[i];  // in this order a NaN passes
    x[i] = high < x[i] ? high : x[i];
    shifted[i] = x[i] + 12582912.0f;  // 1.5 * 2^23: the addition rounds x to an integer, kept in the low bits
    f[i] = x[i] - (shifted[i] - 12582912.0f);
  }
  for (int i = 0; i < M; ++i) p[i] = f[i] * 1.326472707e-03f + 9.671512649e-03f;
  for (int i = 0; i < M; ++i) p[i] = p[i] * f[i] + 5.550733744e-02f;
  for (int i = 0; i < M; ++i) p[i] = p[i] * f[i] + 2.402224209e-01f;
  for (int i = 0; i < M; ++i) p[i] = p[i] * f[i] + 6.931469776e-01f;
  for (int i = 0; i < M; ++i) p[i] = p[i] * f[i] + 1.0f;
  for (int i = 0; i < M; ++i)
    x[i] = reinterpret_cast<Vec>(reinterpret_cast<IntVec>(p[i]) + (reinterpret_cast<IntVec>(shifted[i]) << 23));
#endif
}

static inline Vec exp2(Vec x) {
  exp2<1>(&x);
  return x;
}

constexpr float kLog2E = 1.4426950408889634f, kLn2 = 0.6931471805599453f;

static inline Vec absolute(Vec x) { return x < 0 ? -x : x; }

// 1 / x to 1e-7 relative for 1 <= x <= 2^100: an estimate and Newton's step take a fifth of a division's time.
static inline Vec reciprocal(Vec x) {
#if VIM_LANES == 16
  const Vec r = reinterpret_cast<Vec>(_mm512_rcp14_ps(reinterpret_cast<__m512>(x)));
  return r + r * (1.0f - x * r);
#else
  return 1.0f / x;
#endif
}

static inline Vec sigmoid(Vec x) {
  const Vec e = x * -kLog2E, high = splat(100.0f);
  return reciprocal(1.0f + exp2(high < e ? high : e));
}

static inline Vec silu(Vec x) { return x * sigmoid(x); }

static inline Vec silu_grad(Vec x) {
  const Vec s = sigmoid(x);
  return s * (1.0f + x * (1.0f - s));
}

// log(1 + exp(x)) = max(x, 0) + log1p(exp(-|x|)), log1p(w) / w by a minimax polynomial on [0, 1].
static inline Vec softplus(Vec x) {
  const Vec w = exp2(absolute(x) * -kLog2E);
  Vec p = w * 5.364822779e-03f + -3.006578609e-02f;
  p = p * w + 7.920452552e-02f;
  p = p * w + -1.375380149e-01f;
  p = p * w + 1.915365455e-01f;
  p = p * w + -2.485716357e-01f;
  p = p * w + 3.332132261e-01f;
  p = p * w + -4.999964796e-01f;
  p = p * w + 1.0f;
  return (x < 0 ? Vec{} : x) + w * p;
}

// One direction of one piece of one image, and where its tokens, channels and states lie.
struct Place {
  int64_t b, k;
  Piece piece;
  bool reverse;
  int64_t tokens;

  int64_t token(int64_t t) const { return reverse ? tokens - 1 - t : t; }
  int64_t blocks() const { return (piece.end - piece.first + kLanes - 1) / kLanes; }
  int64_t channel(int64_t block) const { return piece.first + block * kLanes; }
  int64_t lanes(int64_t block) const { return std::min<int64_t>(kLanes, piece.end - channel(block)); }
  Mask mask(int64_t block) const { return mask_of(lanes(block)); }
  // How many floats from a row to the one `steps` steps later.
  int64_t ahead(const Rows& rows, int64_t steps) const { return (reverse ? -steps : steps) * rows.token; }
};

// Transposes (d, n) in memory to a vector of channels for each block and state, and back.
static void load_states(Vec* to, const float* from, const Place& p, int64_t n, float scale) {
  float* lanes_of = reinterpret_cast<float*>(to);
  for (int64_t c = p.piece.first; c < p.piece.end; ++c) {
    const int64_t block = (c - p.piece.first) / kLanes, lane = (c - p.piece.first) % kLanes;
    for (int64_t i = 0; i < n; ++i) lanes_of[(block * n + i) * kLanes + lane] = from[c * n + i] * scale;
  }
}

static void store_states(float* to, const Vec* from, const Place& p, int64_t n) {
  const float* lanes_of = reinterpret_cast<const float*>(from);
  for (int64_t c = p.piece.first; c < p.piece.end; ++c) {
    const int64_t block = (c - p.piece.first) / kLanes, lane = (c - p.piece.first) % kLanes;
    for (int64_t i = 0; i < n; ++i) to[c * n + i] = lanes_of[(block * n + i) * kLanes + lane];
  }
}

static inline Vec step_size(const Scan& s, Vec delta, int64_t k, int64_t channel, Mask mask) {
  if (s.delta_bias != nullptr) delta += load(s.delta_bias + k * s.channels + channel, mask);
  return s.softplus ? softplus(delta) : delta;
}

static void copy_rows(float* to, const Rows& rows, const Place& p, int64_t t0, int64_t steps, int64_t n) {
  for (int64_t t = 0; t < steps; ++t)
    std::memcpy(to + t * n, rows.at(p.b, p.k, p.token(t0 + t), p.piece.group), n * sizeof(float));
}

template <int T>
constexpr int kSideBySide = T < 4 ? T : 4;

// T steps of one block of channels, its state h in registers one n at a time. N: n at compile time, 0 if unusual.
template <int T, int N>
static inline void scan_steps(const Scan& s, const Place& p, int64_t block, int64_t t0, const Vec* A2, Vec* h,
                              const float* B, const float* C, bool first, bool last) {
  const int64_t n = N ? N : s.states, c = p.channel(block);
  const Mask mask = p.mask(block);
  Vec dt[T], x[T], y[T];
  const Vec D = s.D != nullptr ? load(s.D + p.k * s.channels + c, mask) : Vec{};
  for (int t = 0; t < T; ++t) {
    const int64_t token = p.token(t0 + t);
    const Vec u = load_ahead(s.u.at(p.b, p.k, token) + c, p.ahead(s.u, T), mask);
    dt[t] = step_size(s, load_ahead(s.delta.at(p.b, p.k, token) + c, p.ahead(s.delta, T), mask), p.k, c, mask);
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
  for (int t = 0; t < T; ++t) {
    const int64_t token = p.token(t0 + t);
    float* out = s.y.at(p.b, p.k, token) + c;
    if (!first) y[t] += load_ahead(out, p.ahead(s.y, T), mask);
    if (last) {
      y[t] *= s.scale;
      if (s.ungated.data != nullptr) store(s.ungated.at(p.b, p.k, token) + c, y[t], mask);
      if (s.z.data != nullptr) y[t] *= silu(load_ahead(s.z.at(p.b, p.k, token) + c, p.ahead(s.z, T), mask));
    }
    store(out, y[t], mask);
  }
}

template <int N>
static void scan_piece(const Scan& s, const Place& p, bool first, bool last) {
  constexpr int kSteps = 8;
  static_assert(kSaved % kSteps == 0, "states are saved between two runs of kSteps");
  const int64_t n = N ? N : s.states, blocks = p.blocks();
  const int64_t states = (p.b * s.directions + p.k) * s.channels * n, chunks = (s.tokens + kSaved - 1) / kSaved;
  Buffer<Vec> A2(blocks * n), h(blocks * n);
  Buffer<float> B(kSteps * n), C(kSteps * n);
  load_states(A2.data(), s.A + p.k * s.channels * n, p, n, kLog2E);
  if (s.initial_state != nullptr) load_states(h.data(), s.initial_state + states, p, n, 1.0f);
  for (int64_t t0 = 0; t0 < s.tokens; t0 += kSteps) {
    const int64_t steps = std::min<int64_t>(kSteps, s.tokens - t0);
    copy_rows(B.data(), s.B, p, t0, steps, n);
    copy_rows(C.data(), s.C, p, t0, steps, n);
    for (int64_t block = 0; block < blocks; ++block) {
      const Vec* a = &A2[block * n];
      Vec* state = &h[block * n];
      if (s.saved != nullptr && t0 % kSaved == 0) {
        float* saved = s.saved + states * chunks + (t0 / kSaved * s.channels + p.channel(block)) * n;
        for (int64_t i = 0; i < n; ++i) store(saved + i * p.lanes(block), state[i], p.mask(block));
      }
      if (steps == kSteps) {
        scan_steps<kSteps, N>(s, p, block, t0, a, state, B.data(), C.data(), first, last);
      } else {
        for (int64_t t = 0; t < steps; ++t)
          scan_steps<1, N>(s, p, block, t0 + t, a, state, B.data() + t * n, C.data() + t * n, first, last);
      }
    }
  }
  if (s.last_state != nullptr) store_states(s.last_state + states, h.data(), p, n);
}

static Place place_of(const Scan& s, int64_t b, int64_t k, int64_t piece) {
  return {b, k, piece_of(s.channels, s.groups, s.piece, piece), ((s.reverse >> k) & 1) != 0, s.tokens};
}

static void scan_forward(const Scan& s, int64_t threads) {
  const int64_t pieces = pieces_of(s.channels, s.groups, s.piece), each = s.combined ? s.directions : 1;
  auto* run = s.states == 16 ? scan_piece<16> : scan_piece<0>;
  // Directions that are added up belong to one task: the sum then stays in its cache and its order is fixed.
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
  for (int64_t t = 0; t < steps; ++t) {
    const int64_t token = p.token(t0 + t);
    u[t] = load_ahead(s.u.at(p.b, p.k, token) + c, p.ahead(s.u, -kSaved), mask);
    dt[t] = step_size(s, load_ahead(s.delta.at(p.b, p.k, token) + c, p.ahead(s.delta, -kSaved), mask), p.k, c, mask);
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
    if (s.softplus) ddelta *= 1.0f - exp2(dt[t] * -kLog2E);  // sigmoid(x) = 1 - exp(-softplus(x))
    *dbias += ddelta;
    store(grads.delta.at(p.b, p.k, token) + c, ddelta, mask);
  }
}

template <int N>
static void scan_piece_backward(const Scan& s, const ScanGrads& grads, const Place& p) {
  const int64_t n = N ? N : s.states, blocks = p.blocks();
  const int64_t states = (p.b * s.directions + p.k) * s.channels * n, chunks = (s.tokens + kSaved - 1) / kSaved;
  Buffer<Vec> A2(blocks * n), g(blocks * n), dA(blocks * n), dD(blocks), dbias(blocks), dB(kSaved * n), dC(kSaved * n);
  Buffer<float> B(kSaved * n), C(kSaved * n);
  load_states(A2.data(), s.A + p.k * s.channels * n, p, n, kLog2E);
  if (grads.last_state != nullptr) load_states(g.data(), grads.last_state + states, p, n, 1.0f);
  for (int64_t chunk = chunks - 1; chunk >= 0; --chunk) {
    const int64_t t0 = chunk * kSaved, steps = std::min(kSaved, s.tokens - t0);
    copy_rows(B.data(), s.B, p, t0, steps, n);
    copy_rows(C.data(), s.C, p, t0, steps, n);
    std::fill(dB.data(), dB.data() + kSaved * n, Vec{});
    std::fill(dC.data(), dC.data() + kSaved * n, Vec{});
    for (int64_t block = 0; block < blocks; ++block) {
      const float* saved = s.saved + states * chunks + (chunk * s.channels + p.channel(block)) * n;
      scan_steps_backward<N>(s, grads, p, block, t0, steps, &A2[block * n], &g[block * n], B.data(), C.data(), saved,
                             &dA[block * n], &dD[block], &dbias[block], dB.data(), dC.data());
    }
    for (int64_t t = 0; t < steps; ++t) {
      float* to_B = grads.B.at(p.b, p.k, p.token(t0 + t), p.piece.index);
      float* to_C = grads.C.at(p.b, p.k, p.token(t0 + t), p.piece.index);
      for (int64_t i = 0; i < n; ++i) {
        to_B[i] = sum_lanes(dB[i * kSaved + t]);
        to_C[i] = sum_lanes(dC[i * kSaved + t]);
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

static Place place_of(const Conv& c, int64_t b, int64_t k) {
  return {b, k, {0, 0, c.channels, 0}, ((c.reverse >> k) & 1) != 0, c.tokens};
}

// The weights of every direction, a vector of channels for each block and tap.
static int64_t load_weights(const Conv& c, Vec* to) {
  const int64_t each = place_of(c, 0, 0).blocks() * c.width;
  for (int64_t k = 0; k < c.directions && to != nullptr; ++k)
    load_states(to + k * each, c.weight + k * c.channels * c.width, place_of(c, 0, k), c.width, 1.0f);
  return each;
}

constexpr int64_t kConvSteps = 8;

// What the convolution gives at steps t0 to t0 + T of a block before its activation. W: its width at compile time.
// weight[j] multiplies the token width - 1 - j steps back.
template <int T, int W>
static inline void convolve(const Conv& c, const Place& p, int64_t block, int64_t t0, const Vec* weight, Vec bias, Vec* y) {
  const int64_t channel = p.channel(block), step = p.ahead(c.x, 1);
  const float* from = c.x.at(p.b, p.k, p.token(t0)) + channel;
  const Mask mask = p.mask(block);
  if (W != 0 && t0 >= W - 1) {
    Vec x[T + W];
    for (int i = 0; i < T + W - 1; ++i) x[i] = load_ahead(from + (i - (W - 1)) * step, T * step, mask);
#pragma GCC unroll 8
    for (int t = 0; t < T; ++t) {
      y[t] = bias;
      for (int j = 0; j < W; ++j) y[t] += weight[j] * x[t + j];
    }
    return;
  }
  for (int t = 0; t < T; ++t) {
    y[t] = bias;
    for (int64_t j = std::max<int64_t>(0, c.width - 1 - (t0 + t)); j < c.width; ++j)
      y[t] += weight[j] * load(from + (t - (c.width - 1) + j) * step, mask);
  }
}

static Vec load_bias(const Conv& c, const Place& p, int64_t block) {
  return c.bias != nullptr ? load(c.bias + p.k * c.channels + p.channel(block), p.mask(block)) : Vec{};
}

template <int T, int W>
static inline void conv_steps(const Conv& c, const Place& p, int64_t t0, const Vec* weight) {
  for (int64_t block = 0; block < p.blocks(); ++block) {
    Vec y[T];
    convolve<T, W>(c, p, block, t0, weight + block * c.width, load_bias(c, p, block), y);
    for (int t = 0; t < T; ++t)
      store(c.y.at(p.b, p.k, p.token(t0 + t)) + p.channel(block), c.silu ? silu(y[t]) : y[t], p.mask(block));
  }
}

// `steps` tokens from token t0 on, in the direction's own order.
template <int W>
static void conv_tokens(const Conv& c, const Place& p, int64_t t0, int64_t steps, const Vec* weight) {
  const int64_t start = p.reverse ? c.tokens - t0 - steps : t0;
  if (steps == kConvSteps) return conv_steps<kConvSteps, W>(c, p, start, weight);
  for (int64_t t = start; t < start + steps; ++t) conv_steps<1, W>(c, p, t, weight);
}

template <int W>
static void conv_forward(const Conv& c, int64_t threads) {
  const int64_t each = load_weights(c, nullptr), chunks = (c.tokens + kConvTokens - 1) / kConvTokens;
  Buffer<Vec> weight(c.directions * each);
  load_weights(c, weight.data());
  parallel_for(c.images * chunks, threads, [&](int64_t task) {
    const int64_t b = task / chunks, start = task % chunks * kConvTokens, end = std::min(start + kConvTokens, c.tokens);
    for (int64_t t0 = start; t0 < end; t0 += kConvSteps)
      for (int64_t k = 0; k < c.directions; ++k)  // all directions while the tokens are in the cache
        conv_tokens<W>(c, place_of(c, b, k), t0, std::min(kConvSteps, end - t0), &weight[k * each]);
  });
}

// Up to kConvSteps steps of one block, backwards. x and dy: scratch for the steps and the width - 1 on either side, or after.
template <int W>
static inline void conv_steps_backward(const Conv& c, const ConvGrads& grads, const Place& p, int64_t block, int64_t t0,
                                       int64_t steps, const Vec* weight, Vec* dweight, Vec* dbias, Vec* x, Vec* dy) {
  const int64_t channel = p.channel(block), before = (W ? W : c.width) - 1;
  const int64_t later = std::min(steps + before, c.tokens - t0);
  const Vec bias = load_bias(c, p, block);
  const Mask mask = p.mask(block);
  for (int64_t i = 0; i < later + before; ++i) {
    const int64_t t = t0 - before + i;
    x[i] = t < 0 ? Vec{} : load(c.x.at(p.b, p.k, p.token(t)) + channel, mask);
  }
  for (int64_t i = 0; i < steps + before; ++i) {
    dy[i] = i < later ? load(grads.y.at(p.b, p.k, p.token(t0 + i)) + channel, mask) : Vec{};
    if (!c.silu || i >= later) continue;
    Vec y = bias;
    for (int64_t j = 0; j <= before; ++j) y += weight[j] * x[i + j];
    dy[i] *= silu_grad(y);
  }
  for (int64_t i = 0; i < steps; ++i) {
    Vec dx{};
    for (int64_t j = 0; j <= before; ++j) {
      dx += weight[j] * dy[i + before - j];
      dweight[j] += dy[i] * x[i + j];
    }
    *dbias += dy[i];
    store(grads.x.at(p.b, p.k, p.token(t0 + i)) + channel, dx, mask);
  }
}

template <int W>
static void conv_backward(const Conv& c, const ConvGrads& grads, int64_t threads) {
  const int64_t each = load_weights(c, nullptr), chunks = (c.tokens + kConvTokens - 1) / kConvTokens;
  Buffer<Vec> weight(c.directions * each);
  load_weights(c, weight.data());
  parallel_for(c.images * chunks * c.directions, threads, [&](int64_t task) {
    const int64_t k = task % c.directions, chunk = task / c.directions % chunks;
    const Place p = place_of(c, task / c.directions / chunks, k);
    const int64_t end = std::min((chunk + 1) * kConvTokens, c.tokens);
    Buffer<Vec> dweight(each), dbias(p.blocks()), x(kConvSteps + 2 * c.width), dy(kConvSteps + c.width);
    for (int64_t t0 = chunk * kConvTokens; t0 < end; t0 += kConvSteps)
      for (int64_t block = 0; block < p.blocks(); ++block)
        conv_steps_backward<W>(c, grads, p, block, t0, std::min(kConvSteps, end - t0),
                               &weight[k * each + block * c.width], &dweight[block * c.width], &dbias[block], x.data(),
                               dy.data());
    store_states(grads.weight + task * c.channels * c.width, dweight.data(), p, c.width);
    for (int64_t block = 0; block < p.blocks(); ++block)
      store(grads.bias + task * c.channels + p.channel(block), dbias[block], p.mask(block));
  });
}

// What a row of x is multiplied with: 1 / rms(x).
static inline float inverse_rms(const Norm& norm, const float* x) {
  Vec squares{};
  for (int64_t c = 0; c < norm.channels; c += kLanes) {
    const Vec v = load(x + c, mask_of(norm.channels - c));
    squares += v * v;
  }
  return 1.0f / std::sqrt(sum_lanes(squares) / static_cast<float>(norm.channels) + norm.eps);
}

static void norm_forward(const Norm& norm, int64_t threads) {
  parallel_for((norm.rows + kNormRows - 1) / kNormRows, threads, [&](int64_t task) {
    const int64_t end = std::min(norm.rows, (task + 1) * kNormRows);
    for (int64_t row = task * kNormRows; row < end; ++row) {
      const float* x = norm.x + row * norm.channels;
      const float inverse = inverse_rms(norm, x);
      for (int64_t c = 0; c < norm.channels; c += kLanes) {
        const Mask mask = mask_of(norm.channels - c);
        store(norm.y + row * norm.channels + c, load(x + c, mask) * inverse * load(norm.weight + c, mask), mask);
      }
    }
  });
}

// With s = 1 / rms(x): dx = s w dy - x s^3 mean(w dy x), dw = sum over rows of dy x s.
static void norm_backward(const Norm& norm, const NormGrads& grads, int64_t threads) {
  parallel_for((norm.rows + kNormRows - 1) / kNormRows, threads, [&](int64_t task) {
    const int64_t end = std::min(norm.rows, (task + 1) * kNormRows);
    float* dweight = grads.weight + task * norm.channels;
    std::fill(dweight, dweight + norm.channels, 0.0f);
    for (int64_t row = task * kNormRows; row < end; ++row) {
      const float *x = norm.x + row * norm.channels, *dy = grads.y + row * norm.channels;
      const float inverse = inverse_rms(norm, x);
      Vec along{};
      for (int64_t c = 0; c < norm.channels; c += kLanes) {
        const Mask mask = mask_of(norm.channels - c);
        along += load(dy + c, mask) * load(norm.weight + c, mask) * load(x + c, mask);
      }
      const float pull = sum_lanes(along) / static_cast<float>(norm.channels) * inverse * inverse * inverse;
      for (int64_t c = 0; c < norm.channels; c += kLanes) {
        const Mask mask = mask_of(norm.channels - c);
        const Vec v = load(x + c, mask), g = load(dy + c, mask);
        store(grads.x + row * norm.channels + c, g * load(norm.weight + c, mask) * inverse - v * pull, mask);
        store(dweight + c, load(dweight + c, mask) + g * v * inverse, mask);
      }
    }
  });
}
