// What all instruction sets share: the structures of the C interface, pieces of channels, memory and threads.
#pragma once

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>
#include <thread>
#include <vector>

#if defined(__linux__)
#include <dlfcn.h>
#include <link.h>
#endif
#if defined(__x86_64__)
#include <immintrin.h>
#endif

// Not left to the compiler: it would keep vectors in memory where a function of vectors has many callers.
#define VIM_INLINE inline __attribute__((always_inline))

namespace {

// A tensor; strides count floats. A direction stride of 0 shares it among directions. Only the scan takes tensors whose
// channels, or for B and C states, are not contiguous: `channel` is not 1.
struct Rows {
  float* data;
  int64_t image, direction, token, group, channel;

  float* at(int64_t b, int64_t k, int64_t t, int64_t g = 0) const {
    return data + b * image + k * direction + t * token + g * group;
  }
};

// Sizes: b images, k directions, l tokens, d channels, g groups of B and C, n states.
struct Scan {
  int64_t images, directions, tokens, channels, groups, states;
  int64_t piece;     // channels one task works on, all of one group: they share the rows of B and C
  int64_t reverse;   // bit k set: direction k runs from the last token to the first
  int64_t softplus;  // delta goes through softplus
  int64_t combined;  // the directions are added up into one y
  int64_t every;     // steps between two of `kept`: a multiple of kRun, or all
  float scale;       // factor of the combined y
  Rows u, delta, B, C, z, y, ungated;
  const float *A, *D, *delta_bias, *initial_state;  // (k, d, n), (k, d), (k, d), (b, k, d, n); all but A may be null
  // After each `every` steps, the last of them fewer: the state, (b, k, l / every, d, n), and the sum of the step sizes
  // so far, (b, k, l / every, d). Before each kSaved steps: the state, (b, k, chunks, blocks, n, lanes). May be null.
  float *kept, *elapsed, *saved;
};

struct ScanGrads {
  Rows y, u, delta, z, B, C;  // B and C have a partial sum for each piece of channels where the inputs have a group
  const float* last_state;
  float *A, *D, *delta_bias, *initial_state;  // for each image: (b, k, d, n), (b, k, d), (b, k, d), (b, k, d, n)
};

// Sizes: b images, k directions, l tokens, h heads, p channels of a head, g groups of B and C, n states.
struct Ssd {
  int64_t images, directions, tokens, heads, channels, groups, states;
  int64_t piece;     // heads one task works on, all of one group: they share B, C and their products
  int64_t reverse;   // bit k set: direction k runs from the last token to the first
  int64_t softplus;  // dt goes through softplus
  int64_t combined;  // the directions are added up into one y
  float scale;       // factor of the combined y
  float dt_min, dt_max;
  Rows x, dt, B, C, z, y, ungated;  // the heads are the groups of x, z, y and ungated, and the channels of dt
  // (k, h), (k, h, p), (k, h), (b, k, h, p, n); all but A may be null
  const float *A, *D, *dt_bias, *initial_state;
  float *last_state, *saved;  // (b, k, h, p, n), and (b, k, runs of kSsdSaved tokens, h, n, p); may be null
};

struct SsdGrads {
  Rows y, x, dt, z, B, C;  // B and C have a partial sum for each piece of heads where the inputs have a group
  const float* last_state;
  float *A, *D, *dt_bias, *initial_state;  // for each image: (b, k, h), (b, k, h, p), (b, k, h), (b, k, h, p, n)
};

struct Conv {
  int64_t images, directions, tokens, channels, width;
  int64_t reverse;
  int64_t silu;
  Rows x, y;
  const float *weight, *bias;  // (k, d, width), (k, d) or null
};

struct ConvGrads {
  Rows y, x;
  float *weight, *bias;  // partial sums of kConvTokens steps: (b chunks, k, d, width), (b chunks, k, d)
};

struct Norm {
  int64_t rows, channels;
  float eps;
  const float *x, *weight;
  float* y;
};

struct NormGrads {
  const float* y;
  float *x, *weight;  // (rows, d), and partial sums of kNormRows rows: (rows / kNormRows rounded up, d)
};

constexpr int64_t kNormRows = 32;    // rows of a task
constexpr int64_t kConvTokens = 32;  // tokens of a task
constexpr int64_t kSaved = 16;       // steps between two states kept for the backward pass
constexpr int64_t kSsdSaved = 64;    // and of state space duality
constexpr int64_t kRun = 256;        // steps of a block before the next one's, if tokens are contiguous

// A run of channels of one group. Each group is cut into pieces of the same width, fewer channels in the last.
struct Piece {
  int64_t group, first, end, index;
};

int64_t pieces_of(int64_t channels, int64_t groups, int64_t width) {
  return groups * ((channels / groups + width - 1) / width);
}

Piece piece_of(int64_t channels, int64_t groups, int64_t width, int64_t index) {
  const int64_t in_group = channels / groups, each = pieces_of(channels, groups, width) / groups;
  const int64_t group = index / each, first = group * in_group + index % each * width;
  return {group, first, std::min(first + width, (group + 1) * in_group), index};
}

// Zeros, aligned for vectors.
template <typename T>
class Buffer {
 public:
  explicit Buffer(int64_t count) {
    const size_t bytes = (count * sizeof(T) + 63) / 64 * 64;
    data_ = static_cast<T*>(std::aligned_alloc(64, std::max<size_t>(bytes, 64)));
    if (data_ == nullptr) throw std::bad_alloc();
    std::memset(static_cast<void*>(data_), 0, bytes);
  }
  ~Buffer() { std::free(data_); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  T& operator[](int64_t i) { return data_[i]; }
  T* data() { return data_; }

 private:
  T* data_;
};

// Decayed states become denormal numbers, which cost a hundred cycles each: treat them as zero while a task runs.
class FlushDenormals {
#if defined(__x86_64__)
 public:
  FlushDenormals() : before_(_mm_getcsr()) { _mm_setcsr(before_ | 0x8040); }
  ~FlushDenormals() { _mm_setcsr(before_); }

 private:
  unsigned before_;
#else
 public:
  FlushDenormals() {}
#endif
};

using Parallel = void (*)(void (*)(void*), void*, unsigned, unsigned);

// Returns GOMP_parallel of the OpenMP library that PyTorch has loaded: a second team of threads would compete with its
// spinning one.
Parallel find_openmp() {
#if defined(__linux__)
  void* found = nullptr;
  dl_iterate_phdr(
      [](dl_phdr_info* info, size_t, void* out) {
        if (info->dlpi_name == nullptr || std::strstr(info->dlpi_name, "libgomp") == nullptr) return 0;
        void* library = dlopen(info->dlpi_name, RTLD_NOLOAD | RTLD_NOW);
        if (library == nullptr) return 0;
        *static_cast<void**>(out) = dlsym(library, "GOMP_parallel");
        return *static_cast<void**>(out) != nullptr ? 1 : 0;
      },
      &found);
  return reinterpret_cast<Parallel>(found);
#else
  return nullptr;
#endif
}

// Runs task(0) ... task(count - 1), each once, on up to `threads` threads.
template <typename Task>
void parallel_for(int64_t count, int64_t threads, const Task& task) {
  struct Work {
    const Task& task;
    int64_t count;
    std::atomic<int64_t> next{0};
  } work{task, count};
  void (*run)(void*) = [](void* data) {
    Work& work = *static_cast<Work*>(data);
    FlushDenormals flush;
    for (int64_t i; (i = work.next.fetch_add(1)) < work.count;) work.task(i);
  };
  threads = std::min(threads, count);
  static const Parallel openmp = find_openmp();
  if (threads <= 1) {
    run(&work);
  } else if (openmp != nullptr) {
    openmp(run, &work, static_cast<unsigned>(threads), 0);
  } else {
    std::vector<std::thread> team;
    for (int64_t i = 1; i < threads; ++i) team.emplace_back(run, &work);
    run(&work);
    for (std::thread& thread : team) thread.join();
  }
}

}  // namespace
