// Native CPU kernels: selective scan, state space duality, depthwise causal convolution, RMSNorm; float32, behind a
// plain C interface.
//
// Channels are the SIMD lanes. The outer loop goes over short chunks of tokens, so that everything a chunk needs
// stays in the first-level cache. All headers but common.h are compiled once for each instruction set, in a namespace of
// its own; the caller says which one runs.
//
// Do not build this with -ffast-math: it would fold away the rounding trick in exp2.

#include "common.h"

namespace {

#define VIM_LANES 4
namespace baseline {
#include "vectors.h"
#include "scan.h"
#include "scan_backward.h"
#include "matrix.h"
#include "ssd.h"
#include "ssd_backward.h"
#include "conv.h"
#include "norm.h"
}
#undef VIM_LANES

#if defined(__x86_64__)
#if defined(__clang__)
#define VIM_TARGET_AVX2 _Pragma("clang attribute push(__attribute__((target(\"avx2,fma\"))), apply_to = function)")
#define VIM_TARGET_AVX512 \
  _Pragma("clang attribute push(__attribute__((target(\"avx512f,avx512dq,avx512vl,avx2,fma\"))), apply_to = function)")
#define VIM_TARGET_END _Pragma("clang attribute pop")
#else
#define VIM_TARGET_AVX2 _Pragma("GCC push_options") _Pragma("GCC target(\"avx2,fma\")")
#define VIM_TARGET_AVX512 _Pragma("GCC push_options") _Pragma("GCC target(\"avx512f,avx512dq,avx512vl,avx2,fma\")")
#define VIM_TARGET_END _Pragma("GCC pop_options")
#endif

#define VIM_LANES 8
VIM_TARGET_AVX2
namespace avx2 {
#include "vectors.h"
#include "scan.h"
#include "scan_backward.h"
#include "matrix.h"
#include "ssd.h"
#include "ssd_backward.h"
#include "conv.h"
#include "norm.h"
}
VIM_TARGET_END
#undef VIM_LANES

#define VIM_LANES 16
VIM_TARGET_AVX512
namespace avx512 {
#include "vectors.h"
#include "scan.h"
#include "scan_backward.h"
#include "matrix.h"
#include "ssd.h"
#include "ssd_backward.h"
#include "conv.h"
#include "norm.h"
}
VIM_TARGET_END
#undef VIM_LANES
#endif

// Each instruction set by its number: 0 baseline, 1 AVX2, 2 AVX-512.
#if defined(__x86_64__)
#define VIM_DISPATCH(isa, call)   \
  if ((isa) == 2) avx512::call;   \
  else if ((isa) == 1) avx2::call; \
  else baseline::call
#else
#define VIM_DISPATCH(isa, call) baseline::call
#endif

}  // namespace

#define VIM_EXPORT extern "C" __attribute__((visibility("default")))

VIM_EXPORT int64_t vim_best_isa() {
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
    return 2;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return 1;
#endif
  return 0;
}

VIM_EXPORT int64_t vim_saved_every() { return kSaved; }

VIM_EXPORT int64_t vim_ssd_saved_every() { return kSsdSaved; }

VIM_EXPORT int64_t vim_conv_tokens() { return kConvTokens; }

VIM_EXPORT int64_t vim_norm_rows() { return kNormRows; }

VIM_EXPORT void vim_exponentials(int64_t count, int64_t isa, int64_t threads) {
  VIM_DISPATCH(isa, exponentials(count, threads));
}

VIM_EXPORT void vim_scan(const Scan* scan, int64_t isa, int64_t threads) {
  VIM_DISPATCH(isa, scan_forward(*scan, threads));
}

VIM_EXPORT void vim_scan_backward(const Scan* scan, const ScanGrads* grads, int64_t isa, int64_t threads) {
  VIM_DISPATCH(isa, scan_backward(*scan, *grads, threads));
}

VIM_EXPORT void vim_ssd(const Ssd* ssd, int64_t isa, int64_t threads) {
  VIM_DISPATCH(isa, ssd_forward(*ssd, threads));
}

VIM_EXPORT void vim_ssd_backward(const Ssd* ssd, const SsdGrads* grads, int64_t isa, int64_t threads) {
  VIM_DISPATCH(isa, ssd_backward(*ssd, *grads, threads));
}

VIM_EXPORT void vim_conv(const Conv* conv, int64_t isa, int64_t threads) {
  if (conv->width == 4) {
    VIM_DISPATCH(isa, conv_forward<4>(*conv, threads));
  } else {
    VIM_DISPATCH(isa, conv_forward<0>(*conv, threads));
  }
}

VIM_EXPORT void vim_conv_backward(const Conv* conv, const ConvGrads* grads, int64_t isa, int64_t threads) {
  if (conv->width == 4) {
    VIM_DISPATCH(isa, conv_backward<4>(*conv, *grads, threads));
  } else {
    VIM_DISPATCH(isa, conv_backward<0>(*conv, *grads, threads));
  }
}

VIM_EXPORT void vim_norm(const Norm* norm, int64_t isa, int64_t threads) {
  VIM_DISPATCH(isa, norm_forward(*norm, threads));
}

VIM_EXPORT void vim_norm_backward(const Norm* norm, const NormGrads* grads, int64_t isa, int64_t threads) {
  VIM_DISPATCH(isa, norm_backward(*norm, *grads, threads));
}
