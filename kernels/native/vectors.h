// Vectors of VIM_LANES channels, their functions, and where they lie in memory. Included once for each instruction set,
// so no guard.

constexpr int kLanes = VIM_LANES;
typedef float Vec __attribute__((vector_size(4 * VIM_LANES), may_alias));
typedef int32_t IntVec __attribute__((vector_size(4 * VIM_LANES)));

static inline Vec splat(float x) { return Vec{} + x; }

// The lanes of a block that hold channels: all of them, except in the last block of a piece.
#if VIM_LANES == 16
typedef __mmask16 Mask;
static inline Mask mask_of(int64_t lanes) { return static_cast<Mask>(lanes >= 16 ? 0xffff : (1 << lanes) - 1); }
static VIM_INLINE Vec load(const float* from, Mask mask) {
  return reinterpret_cast<Vec>(_mm512_maskz_loadu_ps(mask, from));
}
static VIM_INLINE void store(float* to, Vec x, Mask mask) {
  _mm512_mask_storeu_ps(to, mask, reinterpret_cast<__m512>(x));
}
#elif VIM_LANES == 8
typedef int64_t Mask;
static inline Mask mask_of(int64_t lanes) { return lanes; }
static inline __m256i first_lanes(Mask lanes) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(lanes)), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
// Some processors take many times as long for a masked store as for a whole one.
static VIM_INLINE Vec load(const float* from, Mask lanes) {
  return reinterpret_cast<Vec>(lanes < kLanes ? _mm256_maskload_ps(from, first_lanes(lanes)) : _mm256_loadu_ps(from));
}
static VIM_INLINE void store(float* to, Vec x, Mask lanes) {
  if (lanes < kLanes) {
    _mm256_maskstore_ps(to, first_lanes(lanes), reinterpret_cast<__m256>(x));
  } else {
    _mm256_storeu_ps(to, reinterpret_cast<__m256>(x));
  }
}
#else
typedef int64_t Mask;
static inline Mask mask_of(int64_t lanes) { return std::min<int64_t>(lanes, kLanes); }
static VIM_INLINE Vec load(const float* from, Mask lanes) {
  Vec x{};
  if (lanes == kLanes) {
    std::memcpy(&x, from, sizeof(Vec));
  } else {
    for (int64_t i = 0; i < lanes; ++i) x[i] = from[i];
  }
  return x;
}
static VIM_INLINE void store(float* to, Vec x, Mask lanes) {
  if (lanes == kLanes) {
    std::memcpy(to, &x, sizeof(Vec));
  } else {
    for (int64_t i = 0; i < lanes; ++i) to[i] = x[i];
  }
}
#endif

// a > b ? a : b, so that b is returned where one of them is not a number; and the same with <.
#if VIM_LANES == 8
static inline Vec larger(Vec a, Vec b) {
  return reinterpret_cast<Vec>(_mm256_max_ps(reinterpret_cast<__m256>(a), reinterpret_cast<__m256>(b)));
}
static inline Vec smaller(Vec a, Vec b) {
  return reinterpret_cast<Vec>(_mm256_min_ps(reinterpret_cast<__m256>(a), reinterpret_cast<__m256>(b)));
}
#else
static inline Vec larger(Vec a, Vec b) { return a > b ? a : b; }
static inline Vec smaller(Vec a, Vec b) { return a < b ? a : b; }
#endif

// One block of channels of a tensor, from one step on: `next` floats from a step to the one after it.
struct Steps {
  float* first;
  int64_t next;

  float* at(int64_t t) const { return first + t * next; }
};

// Loads, and prefetches what comes `ahead` steps later: a piece's rows are too far apart for the hardware prefetcher.
static VIM_INLINE Vec load_ahead(const Steps& from, int64_t t, int64_t ahead, Mask mask) {
  __builtin_prefetch(from.at(t + ahead));
  return load(from.at(t), mask);
}

#if VIM_LANES == 8
// Transposes a square of kLanes rows in memory, `row` floats apart, to rows `column` floats apart, also in place:
// fours of each half. Loads of halves exchange the halves, and cross fewer lines of the caches than loads of wholes.
static inline void transpose(const float* from, int64_t row, float* to, int64_t column) {
  __m256 x[8];
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {
    const float* at = from + i % 4 * row + i / 4 * 4;
    x[i] = _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(at)), _mm_loadu_ps(at + 4 * row), 1);
  }
#pragma GCC unroll 2
  for (int i = 0; i < 8; i += 4) {
    const __m256 low0 = _mm256_unpacklo_ps(x[i], x[i + 1]), high0 = _mm256_unpackhi_ps(x[i], x[i + 1]);
    const __m256 low1 = _mm256_unpacklo_ps(x[i + 2], x[i + 3]), high1 = _mm256_unpackhi_ps(x[i + 2], x[i + 3]);
    float* out = to + i * column;
    _mm256_storeu_ps(out, _mm256_shuffle_ps(low0, low1, 0x44));
    _mm256_storeu_ps(out + column, _mm256_shuffle_ps(low0, low1, 0xee));
    _mm256_storeu_ps(out + 2 * column, _mm256_shuffle_ps(high0, high1, 0x44));
    _mm256_storeu_ps(out + 3 * column, _mm256_shuffle_ps(high0, high1, 0xee));
  }
}
#else
// Interleaves the lower halves of two vectors, or the upper ones: a0 b0 a1 b1 ...
template <bool kUpper>
static inline Vec interleave(Vec a, Vec b) {
#if defined(__clang__)
#define VIM_PAIR(i) (i) + (kUpper ? kLanes / 2 : 0), kLanes + (i) + (kUpper ? kLanes / 2 : 0)
#if VIM_LANES == 16
  return __builtin_shufflevector(a, b, VIM_PAIR(0), VIM_PAIR(1), VIM_PAIR(2), VIM_PAIR(3), VIM_PAIR(4), VIM_PAIR(5),
                                 VIM_PAIR(6), VIM_PAIR(7));
#elif VIM_LANES == 8
  return __builtin_shufflevector(a, b, VIM_PAIR(0), VIM_PAIR(1), VIM_PAIR(2), VIM_PAIR(3));
#else
  return __builtin_shufflevector(a, b, VIM_PAIR(0), VIM_PAIR(1));
#endif
#undef VIM_PAIR
#else
  IntVec order;
  for (int i = 0; i < kLanes; ++i) order[i] = i / 2 + i % 2 * kLanes + (kUpper ? kLanes / 2 : 0);
  return __builtin_shuffle(a, b, order);
#endif
}

// Transposes a square of kLanes rows in memory, `row` floats apart, to rows `column` floats apart, also in place. Each
// round takes the place of an element, as a number of two halves of bits, one bit round.
static inline void transpose(const float* from, int64_t row, float* to, int64_t column) {
  Vec square[kLanes];
#pragma GCC unroll 16
  for (int64_t i = 0; i < kLanes; ++i) std::memcpy(&square[i], from + i * row, sizeof(Vec));
#pragma GCC unroll 4
  for (int round = 1; round < kLanes; round *= 2) {
    Vec next[kLanes];
#pragma GCC unroll 8
    for (int i = 0; i < kLanes / 2; ++i) {
      next[2 * i] = interleave<false>(square[i], square[i + kLanes / 2]);
      next[2 * i + 1] = interleave<true>(square[i], square[i + kLanes / 2]);
    }
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) square[i] = next[i];
  }
#pragma GCC unroll 16
  for (int64_t i = 0; i < kLanes; ++i) std::memcpy(to + i * column, &square[i], sizeof(Vec));
}
#endif

static inline float sum_lanes(Vec x) {
#if VIM_LANES == 16
  return _mm512_reduce_add_ps(reinterpret_cast<__m512>(x));
#else
  float total = 0;
  for (int i = 0; i < kLanes; ++i) total += x[i];
  return total;
#endif
}

// Writes the sum of the lanes of each of `count` vectors.
static inline void sum_all_lanes(float* to, const Vec* x, int64_t count) {
  const int64_t whole = count / kLanes * kLanes;
  for (int64_t i = 0; i < whole; i += kLanes) {
    Vec lanes[kLanes];
    transpose(reinterpret_cast<const float*>(x + i), kLanes, reinterpret_cast<float*>(lanes), kLanes);
#pragma GCC unroll 4
    for (int half = kLanes / 2; half > 0; half /= 2)
      for (int lane = 0; lane < half; ++lane) lanes[lane] += lanes[lane + half];
    std::memcpy(to + i, lanes, sizeof(Vec));
  }
  for (int64_t i = whole; i < count; ++i) to[i] = sum_lanes(x[i]);
}

constexpr float kExp2Range = 126.0f;  // the largest power of `exp2_in_range`, either way

// Returns whether all lanes of x, none of which is negative, are at most kExp2Range; not a number counts as such.
static VIM_INLINE bool in_range(Vec x) {
#if VIM_LANES == 16
  return true;  // its exp2_in_range takes all numbers
#elif VIM_LANES == 8
  return _mm256_movemask_ps(reinterpret_cast<__m256>(x > kExp2Range)) == 0;
#else
  const IntVec above = x > kExp2Range;
  int32_t any = 0;
  for (int i = 0; i < kLanes; ++i) any |= above[i];
  return any == 0;
#endif
}

// 2^x with a relative error of 1e-7, for |x| <= kExp2Range or not a number. The nearest integer, or with AVX2 eighth,
// and a minimax polynomial of the rest. Each operation waits for the one before it, so M vectors run side by side to
// keep the processor busy.
template <int M>
static VIM_INLINE void exp2_in_range(Vec* x) {
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
  // 1.5 * 2^20 or 2^23: the addition rounds x to an eighth or an integer, whose number is in the low bits.
  const float rounding = kLanes == 8 ? 1572864.0f : 12582912.0f;
  Vec shifted[M];
  for (int i = 0; i < M; ++i) {
    shifted[i] = x[i] + rounding;
    f[i] = x[i] - (shifted[i] - rounding);
  }
#if VIM_LANES == 8
  // The floats 2^(j / 8), less the j << 20 that the shifted number of eighths adds to them besides its exponent.
  const __m256i roots = _mm256_setr_epi32(0x3f800000, 0x3f7b95c2, 0x3f7837f0, 0x3f75fed7, 0x3f7504f3, 0x3f75672a,
                                          0x3f7744fd, 0x3f7ac0c7);
  for (int i = 0; i < M; ++i) p[i] = f[i] * 5.550474722e-02f + 2.402574828e-01f;
  for (int i = 0; i < M; ++i) p[i] = p[i] * f[i] + 6.931471806e-01f;
  for (int i = 0; i < M; ++i) {
    const __m256i eighths = reinterpret_cast<__m256i>(shifted[i]);
    const __m256i root = _mm256_permutevar8x32_epi32(roots, eighths);
    const Vec power = reinterpret_cast<Vec>(_mm256_add_epi32(root, _mm256_slli_epi32(eighths, 20)));
    x[i] = power * f[i] * p[i] + power;
  }
#else
  for (int i = 0; i < M; ++i) p[i] = f[i] * 1.326472707e-03f + 9.671512649e-03f;
  for (int i = 0; i < M; ++i) p[i] = p[i] * f[i] + 5.550733744e-02f;
  for (int i = 0; i < M; ++i) p[i] = p[i] * f[i] + 2.402224209e-01f;
  for (int i = 0; i < M; ++i) p[i] = p[i] * f[i] + 6.931469776e-01f;
  for (int i = 0; i < M; ++i) p[i] = p[i] * f[i] + 1.0f;
  for (int i = 0; i < M; ++i)
    x[i] = reinterpret_cast<Vec>(reinterpret_cast<IntVec>(p[i]) + (reinterpret_cast<IntVec>(shifted[i]) << 23));
#endif
#endif
}

// 2^x for any x; outside of the range it is 2^-126 or 2^126, or with AVX-512 exact.
template <int M>
static VIM_INLINE void exp2(Vec* x) {
#if VIM_LANES != 16
  const Vec low = splat(-kExp2Range), high = splat(kExp2Range);
  for (int i = 0; i < M; ++i) x[i] = smaller(high, larger(low, x[i]));  // this order keeps a NaN
#endif
  exp2_in_range<M>(x);
}

static VIM_INLINE Vec exp2(Vec x) {
  exp2<1>(&x);
  return x;
}

// At least `count` exponentials, in registers: the least time of whatever takes as many.
static void exponentials(int64_t count, int64_t threads) {
  constexpr int kVectors = 2;
  parallel_for(threads, threads, [=](int64_t) {
    Vec x{}, sum{};
    for (int64_t i = 0; i < count; i += threads * kVectors * kLanes) {
      Vec powers[kVectors];
      for (int v = 0; v < kVectors; ++v) powers[v] = x -= 1e-3f;  // none waits for another power
      exp2<kVectors>(powers);
      for (const Vec& power : powers) sum += power;
    }
    volatile float kept = sum[0];  // otherwise the compiler leaves it all out
    static_cast<void>(kept);
  });
}

constexpr float kLog2E = 1.4426950408889634f, kLn2 = 0.6931471805599453f;

// 1 / x with a relative error of 1e-7, for 1 <= x <= 2^100. An estimate and a Newton step take a fifth of the time of a
// division.
static VIM_INLINE Vec reciprocal(Vec x) {
#if VIM_LANES == 16
  const Vec r = reinterpret_cast<Vec>(_mm512_rcp14_ps(reinterpret_cast<__m512>(x)));
  return r + r * (1.0f - x * r);
#else
  return 1.0f / x;
#endif
}

template <int M>
static VIM_INLINE void sigmoid(Vec* x) {
  const Vec low = splat(-kExp2Range), high = splat(100.0f);
  for (int i = 0; i < M; ++i) x[i] = smaller(high, larger(low, x[i] * -kLog2E));
  exp2_in_range<M>(x);
  for (int i = 0; i < M; ++i) x[i] = reciprocal(1.0f + x[i]);
}

static VIM_INLINE Vec sigmoid(Vec x) {
  sigmoid<1>(&x);
  return x;
}

static VIM_INLINE Vec silu(Vec x) { return x * sigmoid(x); }

static VIM_INLINE Vec silu_grad(Vec x) {
  const Vec s = sigmoid(x);
  return s * (1.0f + x * (1.0f - s));
}

// log(1 + exp(x)) = max(x, 0) + log1p(exp(-|x|)), log1p(w) / w by a minimax polynomial on [0, 1]; M side by side as exp2.
template <int M>
static VIM_INLINE void softplus(Vec* x) {
  Vec w[M], square[M], even[M], odd[M];
  const Vec low = splat(-kExp2Range);
  for (int i = 0; i < M; ++i) w[i] = larger(low, smaller(x[i], -x[i]) * kLog2E);
  exp2_in_range<M>(w);
  // The odd and the even powers side by side: half as many operations wait for one another.
  for (int i = 0; i < M; ++i) square[i] = w[i] * w[i];
  for (int i = 0; i < M; ++i) even[i] = square[i] * 5.364822779e-03f + 7.920452552e-02f;
  for (int i = 0; i < M; ++i) odd[i] = square[i] * -3.006578609e-02f + -1.375380149e-01f;
  for (int i = 0; i < M; ++i) even[i] = even[i] * square[i] + 1.915365455e-01f;
  for (int i = 0; i < M; ++i) odd[i] = odd[i] * square[i] + -2.485716357e-01f;
  for (int i = 0; i < M; ++i) even[i] = even[i] * square[i] + 3.332132261e-01f;
  for (int i = 0; i < M; ++i) odd[i] = odd[i] * square[i] + -4.999964796e-01f;
  for (int i = 0; i < M; ++i) even[i] = even[i] * square[i] + 1.0f;
  for (int i = 0; i < M; ++i) x[i] = larger(Vec{}, x[i]) + w[i] * (odd[i] * w[i] + even[i]);
}

// One direction of one piece of one image, and the places of its tokens and channels.
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
  Steps steps(const Rows& rows, int64_t block, int64_t t0) const {
    return {rows.at(b, k, token(t0)) + channel(block), ahead(rows, 1)};
  }
  // Floats from a row to the one `steps` steps later.
  int64_t ahead(const Rows& rows, int64_t steps) const { return (reverse ? -steps : steps) * rows.token; }
};

// Transpose (d, n) in memory to a vector of channels for each block and state, and back.
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
