// 3x3 convolutions with fewer products, by Winograd's algorithm: engine/passes/winograd.py.
#pragma once

#include <cstdint>

#include "ops.h"

namespace stepfuse {

constexpr int kWinogradWide = 2 * W;  // channels of the result that are computed together
#if defined(STEPFUSE_AVX512)
constexpr bool kWinogradBFloat16 = true;
#else
constexpr bool kWinogradBFloat16 = false;  // needs dot products of bfloat16 pairs
#endif

// out = conv(x, w, padding 1) + bias + residual, for x [N, H, W, C] and out [N, H, W, K].
struct Winograd {
  const void* x;
  const void* u;         // filters: [K / wide][frequencies][taps][C][wide], pairs of C adjacent
                         // in bfloat16: [C / 2][wide][2]
  const float* bias;     // [K] or null
  const void* residual;  // like out, or null; may be out itself
  void* out;
  DType dtype;                                        // of x, u, residual and out: f32 or bf16
  int64_t samples, height, width, channels, filters;  // W even; C, K multiples of wide
  bool square;                                        // F(2x2, 3x3), H even too; else F(2, 3) along rows
};
void winograd(const Winograd&, int threads);

}  // namespace stepfuse
