// RMSNorm for one instruction set; included after vectors.h, once for each.

// 1 / rms(x) of a row.
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
