// The backward pass of state space duality; included after ssd.h, once for each instruction set.
//
// With the names of ssd.h, d for gradients, and h and dh' of a chunk's start and end:
//   d(C[i] . B[j]) = L[i, j] dt[j] (dy[i] . x[j])
//   dx[j] = dt[j] (sum_i L[i, j] (C[i] . B[j]) dy[i] + L[last, j] dh' B[j]) + D dy[j]
//   dB[j] = sum_i d(C[i] . B[j]) C[i] + L[last, j] dt[j] x[j] dh',   dC[i] = sum_j d(C[i] . B[j]) B[j] + e[i] dy[i] h
//   dh = e[last] dh' + sum_i e[i] dy[i] C[i]
// dB and dC are sums over the heads of a piece. The gradient of log decay[t] is the sum of all that passes over t: from
// tokens before it to tokens from it on or to the end, and from the start to tokens from it on or to the end.

class SsdPieceBackward {
 public:
  SsdPieceBackward(const Ssd& ssd, const SsdGrads& grads, const Place& place) : s(ssd), grads(grads), p(place) {}
  void run();

 private:
  void read_dy(int64_t h, int64_t t0, int64_t steps);
  void find_states(int64_t index, int64_t t0, int64_t last);
  void run_chunk(int64_t h, int64_t t0, int64_t t, int64_t steps);
  void weigh(int64_t t0, Vec* of_dt, Vec* of_decay);
  Vec fold(const float* turned, int64_t v, Vec weight, float* total);
  void write_chunk(int64_t h, int64_t t0, int64_t t, int64_t steps, const Vec* of_dt, const Vec* of_decay);
  void write_rows(const Rows& to, int64_t t0, int64_t steps, const float* turned, Left of_CB, Part part,
                  const float* factor);

  const Ssd& s;
  const SsdGrads& grads;
  const Place p;
  const int64_t n = s.states, heads = p.piece.end - p.piece.first;
  GroupTokens group{n};
  HeadTokens head{s.channels};
  const int64_t width = head.width, narrow = group.width, state_size = narrow * width;
  // of all heads
  Buffer<float> dstates{heads * state_size}, D{heads * width}, dD{heads * width}, dA{heads}, dbias{heads};
  // of kSsdSaved tokens; states: those before each chunk; turned: transposed, as are dB and dC
  Buffer<float> states{kSsdSaved / kChunk * state_size}, dy{kSsdSaved * width}, weighted_B{kSsdSaved * narrow};
  Buffer<float> turned_C{kSsdSaved * narrow}, dB{kSsdSaved * narrow}, dC{kSsdSaved * narrow}, dCB{kSsdSaved * kChunk};
  // of a chunk; turned_d: what a head adds to dB or dC, before the tokens' weights; products: dy[i] . x[j]
  Buffer<float> turned_x{kChunk * width}, turned_dy{kChunk * width}, dx{kChunk * width};
  Buffer<float> weights{kChunk * kChunk}, products{kChunk * kChunk};
  Buffer<float> weighted_C{kChunk * narrow}, turned_d{kChunk * narrow}, rows{kChunk * narrow};
};

// Reads the gradient of y before the gate, and adds to that of D; with a gate, writes the gradient of z.
void SsdPieceBackward::read_dy(int64_t h, int64_t t0, int64_t steps) {
  const int64_t index = p.piece.first + h;
  for (int64_t t = 0; t < steps; ++t) {
    const int64_t token = p.token(t0 + t);
    const float* from = grads.y.at(p.b, p.k, token, index);
    for (int64_t c = 0; c < width; c += kLanes) {
      const Mask mask = mask_of(s.channels - c);
      Vec gradient = load(from + c, mask);
      __builtin_prefetch(from + p.ahead(grads.y, -kSsdSaved) + c, 0, 2);
      if (s.z.data != nullptr) {
        const Vec z = load(s.z.at(p.b, p.k, token, index) + c, mask);
        if (!s.combined || p.k == 0) {
          const Vec ungated = load(s.ungated.at(p.b, p.k, token, index) + c, mask);
          store(grads.z.at(p.b, p.k, token, index) + c, gradient * ungated * silu_grad(z), mask);
        }
        gradient *= silu(z);
      }
      gradient *= s.scale;
      vec(&dD[h * width + c]) += gradient * vec(&head.x[t * width + c]);
      vec(&dy[t * width + c]) = gradient;
    }
  }
  std::fill(&dy[steps * width], &dy[0] + (steps + kChunk - 1) / kChunk * kChunk * width, 0.0f);
}

// Runs from the state kept by the forward pass to those before all chunks, of which the last is at `last`.
void SsdPieceBackward::find_states(int64_t index, int64_t t0, int64_t last) {
  const float* saved = saved_state(s, p, index, t0);
  for (int64_t i = 0; i < n; ++i) std::copy_n(saved + i * s.channels, s.channels, &states[i * width]);
  float* state = states.data();
  for (int64_t t = 0; t < last; t += kChunk, state += state_size)
    next_state(state + state_size, state, group, head, t, &weighted_B[t * narrow]);
  scale_rows(&weighted_B[last * narrow], &group.B[last * narrow], kChunk, narrow, &head.weight[last]);
}

// From products, dy[i] . x[j]: adds to the gradient of C[i] . B[j], and returns what the tokens of a chunk give one
// another: for each, the gradient of dt as a factor of x, and that of the logarithm of the decay.
void SsdPieceBackward::weigh(int64_t t0, Vec* of_dt, Vec* of_decay) {
  Vec below[kChunk] = {};
  for (int v = 0; v < 2; ++v) {
    const IntVec lanes = lanes_from(v * kLanes);
    const Vec dt = vec(&head.dt[t0 + v * kLanes]);
    Vec later{};  // the sum over this row and the later ones
    for (int64_t i = kChunk - 1; i >= 0; --i) {
      const int64_t at = i * kChunk + v * kLanes, in_run = t0 * kChunk + at;
      const Vec weight = lanes > static_cast<int32_t>(i) ? Vec{} : vec(&head.L[in_run]) * vec(&products[at]);
      vec(&dCB[in_run]) += weight * dt;
      later += weight * vec(&group.CB[in_run]);
      below[i] += lanes < static_cast<int32_t>(i) ? later * dt : Vec{};
    }
    of_dt[v] = later;
  }
  for (int v = 0; v < 2; ++v) {
    float* square = reinterpret_cast<float*>(below + v * kLanes);
    transpose(square, kLanes, square, kLanes);
    of_decay[v] = Vec{};
    for (int i = 0; i < kLanes; ++i) of_decay[v] += below[v * kLanes + i];
  }
}

// Adds turned_d, (n, chunk), times a weight of each token to a total, and returns each token's product with `turned`.
Vec SsdPieceBackward::fold(const float* turned, int64_t v, Vec weight, float* total) {
  Vec dot{};
  for (int64_t i = 0; i < n; ++i) {
    const int64_t at = i * kChunk + v * kLanes;
    vec(total + at) += vec(&turned_d[at]) * weight;
    dot += vec(&turned_d[at]) * vec(turned + at);
  }
  return dot;
}

void SsdPieceBackward::run_chunk(int64_t h, int64_t t0, int64_t t, int64_t steps) {
  const float *x = &head.x[t * width], *dy_at = &dy[t * width], *state = &states[t / kChunk * state_size];
  float* dstate = &dstates[h * state_size];
  const float whole = head.e[t + kChunk - 1];
  const int64_t at = t * narrow;
  Vec of_dt[2], of_decay[2], of_end[2], of_start[2];
  transpose_rows(turned_x.data(), x, kChunk, width);
  transpose_rows(turned_dy.data(), dy_at, kChunk, width);
  multiply(products.data(), kChunk, kChunk, s.channels, {dy_at, width, 1}, turned_x.data());
  weigh(t, of_dt, of_decay);
  multiply(turned_d.data(), kChunk, n, s.channels, {state, width, 1}, turned_dy.data());
  for (int v = 0; v < 2; ++v) {
    const Vec e = vec(&head.e[t + v * kLanes]);
    of_start[v] = e * fold(&turned_C[at], v, e, &dC[at]);
  }
  multiply(turned_d.data(), kChunk, n, s.channels, {dstate, width, 1}, turned_x.data());
  for (int v = 0; v < 2; ++v) {
    const Vec reach = vec(&head.L[(t + kChunk - 1) * kChunk + v * kLanes]);
    of_end[v] = reach * fold(&group.turned_B[at], v, vec(&head.weight[t + v * kLanes]), &dB[at]);
  }
  weigh_tokens(weights.data(), group, head, t);
  multiply(dx.data(), width, kChunk, n, {&weighted_B[at], narrow, 1}, dstate);
  multiply(dx.data(), width, kChunk, kChunk, {weights.data(), 1, kChunk}, dy_at, {dx.data(), &kOne, 0}, Part::kUpper);
  Vec both{};
  for (int64_t i = 0; i < n * width; i += kLanes) both += vec(state + i) * vec(dstate + i);
  scale_rows(weighted_C.data(), &group.C[at], kChunk, narrow, &head.e[t]);
  multiply(dstate, width, n, kChunk, {weighted_C.data(), 1, narrow}, dy_at, {dstate, &whole, 0});

  // A decay is a factor of what earlier tokens give to later ones and to the end, and of what the start gives to them.
  float *decays = reinterpret_cast<float*>(of_decay), *starts = reinterpret_cast<float*>(of_start);
  float from_start = whole * sum_lanes(both);
  for (int64_t i = kChunk - 1; i >= 0; --i) decays[i] += from_start += starts[i];
  float to_end = 0.0f;
  for (int64_t i = 0; i < kChunk; ++i) {
    decays[i] += to_end;
    to_end += reinterpret_cast<float*>(of_end)[i] * head.dt[t + i];
  }
  for (int v = 0; v < 2; ++v) of_dt[v] += of_end[v];
  write_chunk(h, t0, t, std::min(kChunk, steps - t), of_dt, of_decay);
}

void SsdPieceBackward::write_chunk(int64_t h, int64_t t0, int64_t t, int64_t steps, const Vec* of_dt,
                                   const Vec* of_decay) {
  const int64_t index = p.piece.first + h;
  const float A = s.A[p.k * s.heads + index];
  Vec ddt[2], sum_A{}, sum_bias{};
  for (int v = 0; v < 2; ++v) {
    ddt[v] = (of_dt[v] + A * of_decay[v]) * vec(&head.slope[t + v * kLanes]);
    sum_A += of_decay[v] * vec(&head.dt[t + v * kLanes]);
    sum_bias += ddt[v];
  }
  dA[h] += sum_lanes(sum_A);
  dbias[h] += sum_lanes(sum_bias);
  for (int64_t i = 0; i < steps; ++i) {
    const int64_t token = p.token(t0 + t + i);
    grads.dt.at(p.b, p.k, token)[index * grads.dt.channel] = reinterpret_cast<const float*>(ddt)[i];
    float* to = grads.x.at(p.b, p.k, token, index);
    for (int64_t c = 0; c < width; c += kLanes)
      store(to + c, vec(&dx[i * width + c]) + vec(&D[h * width + c]) * vec(&dy[(t + i) * width + c]),
            mask_of(s.channels - c));
  }
}

// Adds what a chunk's C[i] . B[j] give to the gradient of B or C, kept transposed, and writes it.
void SsdPieceBackward::write_rows(const Rows& to, int64_t t0, int64_t steps, const float* turned, Left of_CB, Part part,
                                  const float* factor) {
  transpose_rows(rows.data(), turned, narrow, kChunk);
  multiply(rows.data(), narrow, kChunk, kChunk, of_CB, factor, {rows.data(), &kOne, 0}, part);
  for (int64_t t = 0; t < steps; ++t)
    std::copy_n(&rows[t * narrow], n, to.at(p.b, p.k, p.token(t0 + t), p.piece.index));
}

void SsdPieceBackward::run() {
  const int64_t first = p.piece.first, channels = s.channels;
  const int64_t at = (p.b * s.directions + p.k) * s.heads + first;
  for (int64_t h = 0; h < heads; ++h) {
    if (grads.last_state != nullptr)
      read_state(&dstates[h * state_size], grads.last_state + (at + h) * n * channels, width, n, channels);
    if (s.D != nullptr) std::copy_n(s.D + (p.k * s.heads + first + h) * channels, channels, &D[h * width]);
  }
  for (int64_t t0 = (s.tokens - 1) / kSsdSaved * kSsdSaved; t0 >= 0; t0 -= kSsdSaved) {
    const int64_t steps = std::min(kSsdSaved, s.tokens - t0), last = (steps - 1) / kChunk * kChunk;
    group.read(s, p, t0, steps, -kSsdSaved);
    for (int64_t t = 0; t < steps; t += kChunk)
      transpose_rows(&turned_C[t * narrow], &group.C[t * narrow], kChunk, narrow);
    for (Buffer<float>* sum : {&dB, &dC}) std::fill_n(sum->data(), kSsdSaved * narrow, 0.0f);
    std::fill_n(dCB.data(), kSsdSaved * kChunk, 0.0f);
    for (int64_t h = 0; h < heads; ++h) {
      head.read(s, p, first + h, t0, steps, -kSsdSaved);
      read_dy(h, t0, steps);
      find_states(first + h, t0, last);
      for (int64_t t = last; t >= 0; t -= kChunk) run_chunk(h, t0, t, steps);
    }
    for (int64_t t = 0; t < steps; t += kChunk) {
      const int64_t at = t * narrow, count = std::min(kChunk, steps - t);
      const float* CB = &dCB[t * kChunk];
      write_rows(grads.B, t0 + t, count, &dB[at], {CB, 1, kChunk}, Part::kUpper, &group.C[at]);
      write_rows(grads.C, t0 + t, count, &dC[at], {CB, kChunk, 1}, Part::kLower, &group.B[at]);
    }
  }
  for (int64_t h = 0; h < heads; ++h) {
    if (grads.initial_state != nullptr)
      write_state(grads.initial_state + (at + h) * n * channels, &dstates[h * state_size], width, n, channels);
    if (grads.D != nullptr) std::copy_n(&dD[h * width], channels, grads.D + (at + h) * channels);
    if (grads.dt_bias != nullptr) grads.dt_bias[at + h] = dbias[h];
    grads.A[at + h] = dA[h];
  }
}

static void ssd_backward(const Ssd& s, const SsdGrads& grads, int64_t threads) {
  const int64_t pieces = pieces_of(s.heads, s.groups, s.piece);
  parallel_for(s.images * s.directions * pieces, threads, [&](int64_t task) {
    const int64_t b = task / pieces / s.directions, k = task / pieces % s.directions;
    SsdPieceBackward(s, grads, place_of(s, b, k, task % pieces)).run();
  });
}
