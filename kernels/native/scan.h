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
    if (rows.channel == 1) {
      std::memcpy(to + t * n, from, n * sizeof(float));
    } else {
      for (int64_t i = 0; i < n; ++i) to[t * n + i] = from[i * rows.channel];
    }
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
static VIM_INLINE void finish_steps(const Scan& s, const Place& p, int64_t block, int64_t t0, Mask mask, Vec* y) {
  for (int t = 0; t < T; ++t) y[t] *= s.scale;
  if (s.ungated.data != nullptr) {
    const Steps ungated = p.steps(s.ungated, block, t0);
    for (int t = 0; t < T; ++t) store(ungated.at(t), y[t], mask);
  }
  if (s.z.data != nullptr) {
    const Steps z = p.steps(s.z, block, t0);
    constexpr int kSide = kSideBySide<T>;
    for (int t = 0; t < T; t += kSide) {
      Vec gate[kSide];
#pragma GCC unroll 4
      for (int i = 0; i < kSide; ++i) y[t + i] *= gate[i] = load_ahead(z, t + i, T, mask);
      sigmoid<kSide>(gate);
#pragma GCC unroll 4
      for (int i = 0; i < kSide; ++i) y[t + i] *= gate[i];
    }
  }
}

// Returns the largest power to base 2 of a block's decays, either way, in steps of the sizes dt; it counts no NaN.
static VIM_INLINE Vec steepest(const Vec* dt, int64_t steps, Vec largest_A2) {
  Vec largest{};
  for (int64_t t = 0; t < steps; ++t) largest = larger(larger(dt[t], -dt[t]), largest);
  return largest * largest_A2;
}

// Writes the largest number of each block's A2, either way.
static void largest_of(Vec* largest, const Vec* A2, int64_t blocks, int64_t n) {
  for (int64_t i = 0; i < blocks * n; ++i) largest[i / n] = larger(larger(A2[i], -A2[i]), largest[i / n]);
}

// T steps of the n states of a block, and what the outputs y read of them.
template <int T, bool kInRange>
static VIM_INLINE void advance(Vec* h, const Vec* A2, const Vec* dt, const Vec* x, Vec* y, const float* B,
                               const float* C, int64_t n) {
  Vec sum[T], in[T];
#pragma GCC unroll 4
  for (int t = 0; t < T; ++t) {
    sum[t] = y[t];
    in[t] = x[t];
  }
  for (int64_t i = 0; i < n; ++i) {
    const Vec a = A2[i];
    Vec state = h[i], decay[T];
#pragma GCC unroll 4
    for (int t = 0; t < T; ++t) decay[t] = dt[t] * a;
    kInRange ? exp2_in_range<T>(decay) : exp2<T>(decay);
#pragma GCC unroll 4
    for (int t = 0; t < T; ++t) {
      state = decay[t] * state + in[t] * B[t * n + i];
      sum[t] += state * C[t * n + i];
    }
    h[i] = state;
  }
#pragma GCC unroll 4
  for (int t = 0; t < T; ++t) y[t] = sum[t];
}

// T steps of one block of channels, its state h in registers one n at a time. N: n at compile time, 0 if unusual.
template <int T, int N>
static inline void scan_steps(const Scan& s, const Place& p, int64_t block, int64_t t0, const Vec* A2, Vec largest_A2,
                              Vec* h, const float* B, const float* C, bool first, bool last, Vec* elapsed) {
  const int64_t n = N ? N : s.states, c = p.channel(block);
  const Mask mask = p.mask(block);
  const Steps delta = p.steps(s.delta, block, t0), u = p.steps(s.u, block, t0), out = p.steps(s.y, block, t0);
  const Vec D = s.D != nullptr ? load(s.D + p.k * s.channels + c, mask) : Vec{};
  Vec dt[T], x[T], y[T];
#pragma GCC unroll 8
  for (int t = 0; t < T; ++t) dt[t] = load_ahead(delta, t, T, mask);
  step_sizes<T>(s, dt, p.k, c, mask);
#pragma GCC unroll 8
  for (int t = 0; t < T; ++t) {
    *elapsed += dt[t];
    x[t] = load_ahead(u, t, T, mask);
    y[t] = D * x[t];
    x[t] *= dt[t];
  }
  constexpr int kSide = kSideBySide<T>;
  const bool gentle = in_range(steepest(dt, T, largest_A2));
  for (int t = 0; t < T; t += kSide) {
    if (gentle) advance<kSide, true>(h, A2, dt + t, x + t, y + t, B + t * n, C + t * n, n);
    else advance<kSide, false>(h, A2, dt + t, x + t, y + t, B + t * n, C + t * n, n);
  }
  if (!first)
#pragma GCC unroll 8
    for (int t = 0; t < T; ++t) y[t] += load_ahead(out, t, T, mask);
  if (last) finish_steps<T>(s, p, block, t0, mask, y);
#pragma GCC unroll 8
  for (int t = 0; t < T; ++t) store(out.at(t), y[t], mask);
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
  Buffer<Vec> A2(blocks * n), largest(blocks), h(blocks * n), elapsed(blocks);
  Buffer<float> B(run * n), C(run * n);
  load_states(A2.data(), s.A + p.k * s.channels * n, p, n, kLog2E);
  largest_of(largest.data(), A2.data(), blocks, n);
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
        const int64_t left = steps - t, taken = left >= kSteps ? kSteps : left >= 4 ? 4 : 1;
        auto* take = taken == kSteps ? scan_steps<kSteps, N> : taken == 4 ? scan_steps<4, N> : scan_steps<1, N>;
        take(s, p, block, t0 + t, a, largest[block], state, &B[t * n], &C[t * n], first, last, &elapsed[block]);
        t += taken;
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
