// The depthwise causal convolution for one instruction set; included after vectors.h, once for each.

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

// The convolution of a block at steps t0 to t0 + T, before its activation. weight[j] is for the token width - 1 - j
// steps back. W: the width at compile time, 0 if unusual.
template <int T, int W>
static inline void convolve(const Conv& c, const Place& p, int64_t block, int64_t t0, const Vec* weight, Vec bias,
                            Vec* y) {
  const Steps from = p.steps(c.x, block, t0);
  const Mask mask = p.mask(block);
  if (W != 0 && t0 >= W - 1) {
    Vec x[T + W];
    for (int i = 0; i < T + W - 1; ++i) x[i] = load_ahead(from, i - (W - 1), T, mask);
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
      y[t] += weight[j] * load(from.at(t - (c.width - 1) + j), mask);
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

// The `steps` tokens from token t0 on, in the direction's order.
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

// Up to kConvSteps steps of one block, backwards. Scratch memory: x for the steps and the width - 1 before and after
// them, dy for the steps and the width - 1 after them.
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
