// Any processor: 4 lanes in the compiler's own vector extensions (SSE2 on x86-64, NEON on aarch64).
// Included by vec.h.
#pragma once

#include <cmath>

namespace stepfuse {

template <class T>
constexpr bool kPaired = false;

#if defined(__aarch64__)
STEPFUSE_INLINE F fma(F a, F b, F c) {
  for (int i = 0; i < W; ++i) c[i] = __builtin_fmaf(a[i], b[i], c[i]);
  return c;
}
#else
STEPFUSE_INLINE F fma(F a, F b, F c) {
  return a * b + c;
}  // two roundings: x86-64 has no fused one here
#endif
STEPFUSE_INLINE F fnma(F a, F b, F c) { return fma(-a, b, c); }  // c - a b
// b where a or b is NaN: with the value as b, a NaN passes through a clamp.
STEPFUSE_INLINE F max(F a, F b) { return a > b ? a : b; }
STEPFUSE_INLINE F min(F a, F b) { return a < b ? a : b; }
STEPFUSE_INLINE F sqrt(F v) {
  for (int i = 0; i < W; ++i) v[i] = std::sqrt(v[i]);
  return v;
}

using U16 = uint16_t __attribute__((vector_size(2 * W)));

STEPFUSE_INLINE F from_bits(U u, bfloat16) { return (F)(u << 16); }
// Shifting the 15 magnitude bits to their float32 place leaves the exponent 112 too small, which a
// product with 2^112 mends, for subnormal numbers too; infinity and NaN get all exponent bits.
STEPFUSE_INLINE F from_bits(U u, float16) {
  const F magnitude = (F)((u & 0x7fffu) << 13) * 0x1p112f;
  const U special = (u & 0x7c00u) == 0x7c00u ? U{} + 0x7f800000u : U{};
  return (F)((U)magnitude | special | (u & 0x8000u) << 16);
}
STEPFUSE_INLINE U to_bits(F v, bfloat16) { return bfloat16_bits(v); }
// Round to nearest even: below 2^-14 the sum with 0.5 rounds to multiples of 2^-24, the spacing of
// subnormal float16; above, half a unit in the last place less one, plus the last bit, does.
STEPFUSE_INLINE U to_bits(F v, float16) {
  const U sign = ((U)v >> 16) & 0x8000u, u = (U)v & 0x7fffffffu;
  const U subnormal = (U)((F)u + 0.5f) - 0x3f000000u;
  const U normal = (u - (112u << 23) + 0xfffu + ((u >> 13) & 1u)) >> 13;
  U half = u < U{} + (113u << 23) ? subnormal : normal;
  half = half > U{} + 0x7c00u ? U{} + 0x7c00u : half;
  half = u > U{} + 0x7f800000u ? U{} + 0x7e00u : half;
  return half | sign;
}

template <class T>
STEPFUSE_INLINE F load(const T* p, Full) {
  U16 bits;
  std::memcpy(&bits, p, sizeof bits);
  return from_bits(__builtin_convertvector(bits, U), T{});
}
template <class T>
STEPFUSE_INLINE void store(T* p, F v, Full) {
  const U16 bits = __builtin_convertvector(to_bits(v, T{}), U16);
  std::memcpy(p, &bits, sizeof bits);
}
template <class T>
STEPFUSE_INLINE F load(const T* p, Partial lanes) {
  return load_through_buffer(p, lanes.count);
}
template <class T>
STEPFUSE_INLINE void store(T* p, F v, Partial lanes) {
  store_through_buffer(p, v, lanes.count);
}
// Sum of the lanes, always in the same tree.
STEPFUSE_INLINE float sum(F v) { return (v[0] + v[2]) + (v[1] + v[3]); }

// v with zero in the lanes that are not memory.
STEPFUSE_INLINE F keep(F v, Full) { return v; }
STEPFUSE_INLINE F keep(F v, Partial lanes) {
  const I lane = {0, 1, 2, 3};
  return lane < lanes.count ? v : F{};
}

// Adding and subtracting 1.5 * 2^23 rounds to an integer; for |v| < 2^22.
STEPFUSE_INLINE F round_even(F v) { return (v + 0x1.8p23f) - 0x1.8p23f; }
STEPFUSE_INLINE I to_int(F v) { return __builtin_convertvector(round_even(v), I); }
STEPFUSE_INLINE F from_int(I v) { return __builtin_convertvector(v, F); }
// Both halves convert exactly and so does the product, so the sum rounds once.
STEPFUSE_INLINE F from_unsigned(U v) {
  return from_int((I)(v >> 16)) * 65536.0f + from_int((I)(v & 0xffffu));
}

// 2^t p(t - round(t)) for -126 <= round(t) <= 127.
constexpr bool kFloorReduction = false;
STEPFUSE_INLINE F fraction(F t) { return t - round_even(t); }
STEPFUSE_INLINE F scale_by_power(F p, F t) { return (F)((U)p + ((U)to_int(t) << 23)); }

// Product of the low 32 bits of every 64-bit lane.
STEPFUSE_INLINE U64 multiply_low(U64 a, U64 b) { return (a & 0xffffffffu) * (b & 0xffffffffu); }
STEPFUSE_INLINE U64 xor3(U64 a, U64 b, U64 c) { return a ^ b ^ c; }
// 32-bit lanes 2j from the low half of even[j], 2j+1 from the low half of odd[j].
STEPFUSE_INLINE U interleave_low(U64 even, U64 odd) {
  return (U)((even & 0xffffffffu) | odd << 32);
}
// Transposes the 4x4 block that four vectors hold.
STEPFUSE_INLINE void transpose_parts(F v[4]) {
  for (int i = 0; i < W; ++i)
    for (int j = 0; j < i; ++j) {
      const float upper = v[j][i];
      v[j][i] = v[i][j];
      v[i][j] = upper;
    }
}

}  // namespace stepfuse
