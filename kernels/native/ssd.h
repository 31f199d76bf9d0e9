// State space duality for one instruction set; included after matrix.h, once for each.
//
// With decay[t] = exp(dt[t] A), and over a chunk of tokens L[i, j] = decay[j + 1] ... decay[i] for j <= i, else 0,
// e[i] = decay[0] ... decay[i] and h the state before the chunk:
//   y[i] = sum_j L[i, j] (C[i] . B[j]) dt[j] x[j] + e[i] h C[i],   h' = e[last] h + sum_j L[last, j] dt[j] x[j] B[j].
// These are products of small matrices. L is made of products: no exponential but the decay's, no difference of sums.
// A state is kept as n rows of p channels. The rows of the matrices here are whole vectors, and their tokens are in the
// order in which a direction runs.

constexpr int64_t kChunk = 2 * kLanes;  // tokens of a chunk: the rows of L are two vectors
static_assert(kChunk % kTile == 0 && kSsdSaved % kChunk == 0, "whole tiles, and states saved between two chunks");

// Copies `count` numbers of a group at each of a few steps; zeros for the steps that are missing in the last chunk.
static void read_rows(float* to, const Rows& rows, const Place& p, int64_t t0, int64_t steps, int64_t group,
                      int64_t count, int64_t ahead) {
  const int64_t width = whole_vectors(count), all = (steps + kChunk - 1) / kChunk * kChunk;
  for (int64_t t = 0; t < steps; ++t) {
    const float* from = rows.at(p.b, p.k, p.token(t0 + t), group);
    const float* next = from + p.ahead(rows, ahead);
    for (int64_t c = 0; c < count; c += kLanes) {
      __builtin_prefetch(next + c, 0, 2);
      vec(to + t * width + c) = load(from + c, mask_of(count - c));
    }
  }
  std::fill(to + steps * width, to + all * width, 0.0f);
}

// Up to kSsdSaved tokens of a group: B and C, and for each chunk B transposed and C[i] . B[j].
struct GroupTokens {
  const int64_t n, width;
  Buffer<float> B, C, turned_B, CB;

  explicit GroupTokens(int64_t states)
      : n(states),
        width(whole_vectors(states)),
        B(kSsdSaved * width),
        C(kSsdSaved * width),
        turned_B(kSsdSaved * width),
        CB(kSsdSaved * kChunk) {}

  void read(const Ssd& s, const Place& p, int64_t t0, int64_t steps, int64_t ahead) {
    read_rows(B.data(), s.B, p, t0, steps, p.piece.group, n, ahead);
    read_rows(C.data(), s.C, p, t0, steps, p.piece.group, n, ahead);
    for (int64_t t = 0; t < steps; t += kChunk) {
      transpose_rows(&turned_B[t * width], &B[t * width], kChunk, width);
      multiply(&CB[t * kChunk], kChunk, kChunk, n, {&C[t * width], width, 1}, &turned_B[t * width]);
    }
  }
};

// Up to kSsdSaved tokens of a head: x, the step sizes and decays, and for each chunk L, e and the weights of the
// tokens in the next state, L[last, j] dt[j].
struct HeadTokens {
  const int64_t p, width;
  Buffer<float> x, dt, slope, decay, L, e, weight;

  explicit HeadTokens(int64_t channels)
      : p(channels),
        width(whole_vectors(channels)),
        x(kSsdSaved * width),
        dt(kSsdSaved),
        slope(kSsdSaved),  // of dt over what it is made from
        decay(kSsdSaved),
        L(kSsdSaved * kChunk),
        e(kSsdSaved),
        weight(kSsdSaved) {}

  void read(const Ssd& s, const Place& place, int64_t head, int64_t t0, int64_t steps, int64_t ahead) {
    read_rows(x.data(), s.x, place, t0, steps, head, p, ahead);
    read_steps(s, place, head, t0, steps);
    for (int64_t t = 0; t < steps; t += kChunk) multiply_decays(t);
  }

  void read_steps(const Ssd& s, const Place& place, int64_t head, int64_t t0, int64_t steps) {
    const int64_t at = place.k * s.heads + head;
    const float bias = s.dt_bias == nullptr ? 0.0f : s.dt_bias[at];
    for (int64_t t = 0; t < steps; ++t)
      dt[t] = s.dt.at(place.b, place.k, place.token(t0 + t))[head * s.dt.channel] + bias;
    for (int64_t t = 0; t < steps; t += kLanes) {
      Vec raw = vec(&dt[t]), rise = splat(1.0f);
      if (s.softplus) {
        rise = sigmoid(raw);
        softplus<1>(&raw);
      }
      const Vec low = splat(s.dt_min), high = splat(s.dt_max), clamped = smaller(high, larger(low, raw));
      const IntVec missing = lanes_from(t) >= static_cast<int32_t>(steps);
      vec(&dt[t]) = missing ? Vec{} : clamped;
      vec(&slope[t]) = (missing | (raw < low) | (raw > high)) ? Vec{} : rise;
      vec(&decay[t]) = exp2(vec(&dt[t]) * (s.A[at] * kLog2E));
    }
    for (int64_t t = whole_vectors(steps); t < (steps + kChunk - 1) / kChunk * kChunk; ++t) {
      dt[t] = slope[t] = 0.0f;
      decay[t] = 1.0f;
    }
  }

  // Each row of L is the row before times a decay, and a one on the diagonal.
  void multiply_decays(int64_t t0) {
    Vec row[2] = {};
    const IntVec lanes[2] = {lanes_from(0), lanes_from(kLanes)};
    float product = 1.0f;
    for (int64_t i = 0; i < kChunk; ++i) {
      const float factor = decay[t0 + i];
      e[t0 + i] = product *= factor;
      for (int v = 0; v < 2; ++v) {
        row[v] = row[v] * factor;
        row[v] = lanes[v] == static_cast<int32_t>(i) ? splat(1.0f) : row[v];
        vec(&L[(t0 + i) * kChunk + v * kLanes]) = row[v];
      }
    }
    for (int v = 0; v < 2; ++v) vec(&weight[t0 + v * kLanes]) = row[v] * vec(&dt[t0 + v * kLanes]);
  }
};

// Goes from the state before the chunk at t0 to that after it; `weighted` gets the chunk's B times the weights.
static void next_state(float* to, const float* from, GroupTokens& group, HeadTokens& head, int64_t t0,
                       float* weighted) {
  scale_rows(weighted, &group.B[t0 * group.width], kChunk, group.width, &head.weight[t0]);
  multiply(to, head.width, group.n, kChunk, {weighted, 1, group.width}, &head.x[t0 * head.width],
           {from, &head.e[t0 + kChunk - 1], 0});
}

// What token j gives to y[i] of the chunk at t0: L[i, j] (C[i] . B[j]) dt[j], and zeros for j > i.
static void weigh_tokens(float* to, GroupTokens& group, HeadTokens& head, int64_t t0) {
  for (int v = 0; v < 2; ++v) {
    const IntVec lanes = lanes_from(v * kLanes);
    const Vec dt = vec(&head.dt[t0 + v * kLanes]);
    for (int64_t i = 0; i < kChunk; ++i) {
      const int64_t at = (t0 + i) * kChunk + v * kLanes;
      const Vec weight = vec(&head.L[at]) * vec(&group.CB[at]) * dt;
      vec(to + i * kChunk + v * kLanes) = lanes > static_cast<int32_t>(i) ? Vec{} : weight;
    }
  }
}

// Adds the skip connection and the directions before, gates, and writes a chunk of y.
static void write_y(const Ssd& s, const Place& p, int64_t head, int64_t t0, int64_t steps, const float* y,
                    const float* x, const float* D, bool first, bool last) {
  const int64_t width = whole_vectors(s.channels);
  for (int64_t t = 0; t < steps; ++t) {
    const int64_t token = p.token(t0 + t);
    float* out = s.y.at(p.b, p.k, token, head);
    const float* z = s.z.data == nullptr ? nullptr : s.z.at(p.b, p.k, token, head);
    float* ungated = s.ungated.data == nullptr ? nullptr : s.ungated.at(p.b, p.k, token, head);
    for (int64_t c = 0; c < width; c += kLanes) {
      const Mask mask = mask_of(s.channels - c);
      Vec sum = vec(y + t * width + c) + vec(D + c) * vec(x + t * width + c);
      if (!first) sum += load(out + c, mask);
      if (last) {
        sum *= s.scale;
        if (ungated != nullptr) store(ungated + c, sum, mask);
        if (z != nullptr) sum *= silu(load(z + c, mask));
      }
      store(out + c, sum, mask);
    }
  }
}

// Between states in memory, (p, n), and rows of channels.
static void read_state(float* to, const float* from, int64_t width, int64_t n, int64_t channels) {
  for (int64_t i = 0; i < n; ++i)
    for (int64_t c = 0; c < channels; ++c) to[i * width + c] = from[c * n + i];
}

static void write_state(float* to, const float* from, int64_t width, int64_t n, int64_t channels) {
  for (int64_t c = 0; c < channels; ++c)
    for (int64_t i = 0; i < n; ++i) to[c * n + i] = from[i * width + c];
}

static float* saved_state(const Ssd& s, const Place& p, int64_t head, int64_t t0) {
  const int64_t runs = (s.tokens + kSsdSaved - 1) / kSsdSaved;
  const int64_t run = (p.b * s.directions + p.k) * runs + t0 / kSsdSaved;
  return s.saved + (run * s.heads + head) * s.states * s.channels;
}

static void ssd_piece(const Ssd& s, const Place& p, bool first, bool last) {
  const int64_t n = s.states, channels = s.channels, heads = p.piece.end - p.piece.first;
  GroupTokens group(n);
  HeadTokens head(channels);
  const int64_t width = head.width, state_size = group.width * width;
  Buffer<float> states(heads * state_size), skip(heads * width), weights(kChunk * kChunk), y(kChunk * width);
  Buffer<float> weighted(kChunk * group.width);
  const int64_t at = (p.b * s.directions + p.k) * s.heads + p.piece.first;
  for (int64_t h = 0; h < heads; ++h) {
    if (s.initial_state != nullptr)
      read_state(&states[h * state_size], s.initial_state + (at + h) * n * channels, width, n, channels);
    if (s.D != nullptr)
      std::copy_n(s.D + (p.k * s.heads + p.piece.first + h) * channels, channels, &skip[h * width]);
  }
  for (int64_t t0 = 0; t0 < s.tokens; t0 += kSsdSaved) {
    const int64_t steps = std::min(kSsdSaved, s.tokens - t0);
    group.read(s, p, t0, steps, kSsdSaved);
    for (int64_t h = 0; h < heads; ++h) {
      const int64_t index = p.piece.first + h;
      float* state = &states[h * state_size];
      if (s.saved != nullptr)
        for (int64_t i = 0; i < n; ++i)
          std::copy_n(state + i * width, channels, saved_state(s, p, index, t0) + i * channels);
      head.read(s, p, index, t0, steps, kSsdSaved);
      for (int64_t t = 0; t < steps; t += kChunk) {
        const float* x = &head.x[t * width];
        weigh_tokens(weights.data(), group, head, t);
        multiply(y.data(), width, kChunk, n, {&group.C[t * group.width], group.width, 1}, state);
        multiply(y.data(), width, kChunk, kChunk, {weights.data(), kChunk, 1}, x, {y.data(), &head.e[t], 1},
                 Part::kLower);
        next_state(state, state, group, head, t, weighted.data());
        write_y(s, p, index, t0 + t, std::min(kChunk, steps - t), y.data(), x, &skip[h * width], first, last);
      }
    }
  }
  if (s.last_state != nullptr)
    for (int64_t h = 0; h < heads; ++h)
      write_state(s.last_state + (at + h) * n * channels, &states[h * state_size], width, n, channels);
}

static Place place_of(const Ssd& s, int64_t b, int64_t k, int64_t piece) {
  return {b, k, piece_of(s.heads, s.groups, s.piece, piece), ((s.reverse >> k) & 1) != 0, s.tokens};
}

static void ssd_forward(const Ssd& s, int64_t threads) {
  const int64_t pieces = pieces_of(s.heads, s.groups, s.piece), each = s.combined ? s.directions : 1;
  // Directions that are added up are one task: their sum stays in its cache, and its order is fixed.
  parallel_for(s.images * (s.directions / each) * pieces, threads, [&](int64_t task) {
    const int64_t b = task / pieces / (s.directions / each), k0 = task / pieces % (s.directions / each);
    for (int64_t k = k0; k < k0 + each; ++k)
      ssd_piece(s, place_of(s, b, k, task % pieces), k == k0, k == k0 + each - 1);
  });
}
