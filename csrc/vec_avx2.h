// AVX2 with FMA and F16C: 8 lanes, tails through a buffer. Included by vec.h.
#pragma once

namespace stepfuse {

template <class T>
constexpr bool kPaired = false;

STEPFUSE_INLINE F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
STEPFUSE_INLINE F fnma(F a, F b, F c) { return _mm256_fnmadd_ps(a, b, c); }  // c - a b
// b where a or b is NaN: with the value as b, a NaN passes through a clamp.
STEPFUSE_INLINE F max(F a, F b) { return _mm256_max_ps(a, b); }
STEPFUSE_INLINE F min(F a, F b) { return _mm256_min_ps(a, b); }
STEPFUSE_INLINE F sqrt(F v) { return _mm256_sqrt_ps(v); }

STEPFUSE_INLINE F from_bits(__m128i v, bfloat16) {
  return (F)_mm256_slli_epi32(_mm256_cvtepu16_epi32(v), 16);
}
STEPFUSE_INLINE F from_bits(__m128i v, float16) { return _mm256_cvtph_ps(v); }
STEPFUSE_INLINE __m128i to_bits(F v, bfloat16) {
  const __m256i u = (__m256i)bfloat16_bits(v);
  return _mm_packus_epi32(_mm256_castsi256_si128(u), _mm256_extracti128_si256(u, 1));
}
STEPFUSE_INLINE __m128i to_bits(F v, float16) {
  return _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT);
}

template <class T>
STEPFUSE_INLINE F load(const T* p, Full) {
  return from_bits(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)), T{});
}
template <class T>
STEPFUSE_INLINE void store(T* p, F v, Full) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), to_bits(v, T{}));
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
STEPFUSE_INLINE float sum(F v) {
  const __m128 half = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  const __m128 pair = _mm_add_ps(half, _mm_movehl_ps(half, half));
  return _mm_cvtss_f32(_mm_add_ss(pair, _mm_movehdup_ps(pair)));
}

// v with zero in the lanes that are not memory.
STEPFUSE_INLINE F keep(F v, Full) { return v; }
STEPFUSE_INLINE F keep(F v, Partial lanes) {
  const I lane = {0, 1, 2, 3, 4, 5, 6, 7};
  return lane < lanes.count ? v : F{};
}

STEPFUSE_INLINE F round_even(F v) {
  return _mm256_round_ps(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
STEPFUSE_INLINE I to_int(F v) { return (I)_mm256_cvtps_epi32(v); }
STEPFUSE_INLINE F from_int(I v) { return _mm256_cvtepi32_ps((__m256i)v); }
// Both halves convert exactly, so the fused sum rounds once.
STEPFUSE_INLINE F from_unsigned(U v) {
  return fma(from_int((I)(v >> 16)), broadcast(65536.0f), from_int((I)(v & 0xffffu)));
}

// 2^t p(t - round(t)) for -126 <= round(t) <= 127.
constexpr bool kFloorReduction = false;
STEPFUSE_INLINE F fraction(F t) { return t - round_even(t); }
STEPFUSE_INLINE F scale_by_power(F p, F t) { return (F)((U)p + ((U)to_int(t) << 23)); }

// Product of the low 32 bits of every 64-bit lane.
STEPFUSE_INLINE U64 multiply_low(U64 a, U64 b) {
  return (U64)_mm256_mul_epu32((__m256i)a, (__m256i)b);
}
STEPFUSE_INLINE U64 xor3(U64 a, U64 b, U64 c) { return a ^ b ^ c; }
// 32-bit lanes 2j from the low half of even[j], 2j+1 from the low half of odd[j].
STEPFUSE_INLINE U interleave_low(U64 even, U64 odd) {
  return (U)_mm256_blend_epi32((__m256i)even, (__m256i)(odd << 32), 0xaa);
}
// Transposes the 4x4 blocks that four vectors hold in each 128-bit part.
STEPFUSE_INLINE void transpose_parts(F v[4]) {
  const F ab_lo = _mm256_unpacklo_ps(v[0], v[1]), ab_hi = _mm256_unpackhi_ps(v[0], v[1]);
  const F cd_lo = _mm256_unpacklo_ps(v[2], v[3]), cd_hi = _mm256_unpackhi_ps(v[2], v[3]);
  v[0] = (F)_mm256_unpacklo_pd((__m256d)ab_lo, (__m256d)cd_lo);
  v[1] = (F)_mm256_unpackhi_pd((__m256d)ab_lo, (__m256d)cd_lo);
  v[2] = (F)_mm256_unpacklo_pd((__m256d)ab_hi, (__m256d)cd_hi);
  v[3] = (F)_mm256_unpackhi_pd((__m256d)ab_hi, (__m256d)cd_hi);
}

}  // namespace stepfuse
