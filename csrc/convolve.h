// Convolutions and linear layers as products with packed filters: kernels/convolve.py; what is
// packed, and how: kernels/filters.py.
#pragma once

#include <cstdint>

#include "ops.h"

namespace stepfuse {

constexpr int kWide = 2 * W;  // channels of the result that are computed together
#if defined(STEPFUSE_AVX512)
constexpr bool kBFloat16Products = true;
#else
constexpr bool kBFloat16Products = false;  // needs dot products of bfloat16 pairs
#endif

// How a convolution is computed.
//
//             kernel, stride       frequencies   taps   results of a tile
//   dense     1x1, or linear                 1      1   1
//   direct    3x3, stride 1 or 2             1      9   1
//   lines     3x3, F(2, 3)                   4      3   2 side by side
//   squares   3x3, F(2x2, 3x3)              16      1   2 x 2
//   enlarged  3x3 of nearest2x(x)            9      1   2 x 2
enum class Form : int { dense = 0, direct = 1, lines = 2, squares = 3, enlarged = 4 };

// Plain filters of a 3x3 kernel, taps [across][down], may stand for transformed ones and are
// transformed a block at a time: memory holds 9 numbers instead of 12 or 16. Not in bfloat16, where
// it would round twice.
template <class T>
constexpr bool kTransforms = sizeof(T) == sizeof(float);

// out = conv(act(norm(x)), w, padding 1) + bias + residual, x [N, H, W, C], out [N, H', W', K].
struct Convolution {
  const void* x;
  const void* beside;    // null, or an image with channels split .. C - 1; x has those before
  int64_t split;         // a multiple of wide
  const void* u;         // filters: [K / wide][frequencies][taps][C][wide], pairs of C adjacent
                         // in bfloat16: [C / 2][wide][2]
  bool plain;            // u: [K / wide][9][C][wide] though the form has frequencies
  const float* bias;     // [K] or null
  const void* residual;  // like out, or null; may be out itself
  void* out;
  DType dtype;  // of x, u, residual and out: f32 or bf16
  Form form;
  int64_t stride;                                     // of direct ones
  int64_t samples, height, width, channels, filters;  // C, K multiples of wide; W even for lines,
                                                      // H and W for squares
  const GroupNorm* norm;  // what x goes through first, or null; channels-last, of the same images
};
void convolve(const Convolution&, int threads);

}  // namespace stepfuse
