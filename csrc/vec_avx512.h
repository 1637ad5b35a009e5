// AVX-512 F, BW, VL, DQ and BF16: 16 lanes, tails by mask registers. Included by vec.h.
#pragma once

namespace stepfuse {

inline F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
inline F fnma(F a, F b, F c) { return _mm512_fnmadd_ps(a, b, c); }  // c - a b
inline F sqrt(F v) { return _mm512_sqrt_ps(v); }

inline __mmask16 mask(Partial lanes) { return static_cast<__mmask16>((1u << lanes.count) - 1u); }

inline F from_bits(__m256i v, bfloat16) {
  return (F)_mm512_slli_epi32(_mm512_cvtepu16_epi32(v), 16);
}
inline F from_bits(__m256i v, float16) { return _mm512_cvtph_ps(v); }
inline __m256i to_bits(F v, bfloat16) { return (__m256i)_mm512_cvtneps_pbh(v); }
inline __m256i to_bits(F v, float16) {
  return _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}

template <class T>
inline F load(const T* p, Full) {
  return from_bits(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)), T{});
}
template <class T>
inline void store(T* p, F v, Full) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), to_bits(v, T{}));
}
inline F load(const float* p, Partial lanes) { return _mm512_maskz_loadu_ps(mask(lanes), p); }
inline void store(float* p, F v, Partial lanes) { _mm512_mask_storeu_ps(p, mask(lanes), v); }
template <class T>
inline F load(const T* p, Partial lanes) {
  return from_bits(_mm256_maskz_loadu_epi16(mask(lanes), p), T{});
}
template <class T>
inline void store(T* p, F v, Partial lanes) {
  _mm256_mask_storeu_epi16(p, mask(lanes), to_bits(v, T{}));
}
// v with zero in the lanes that are not memory.
inline F keep(F v, Full) { return v; }
inline F keep(F v, Partial lanes) { return _mm512_maskz_mov_ps(mask(lanes), v); }

// 2^t p(t - floor(t)): vscalefps takes the floor itself, saturates, and keeps NaN.
constexpr bool kFloorReduction = true;
inline F fraction(F t) { return _mm512_reduce_ps(t, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC); }
inline F scale_by_power(F p, F t) { return _mm512_scalef_ps(p, t); }
// 1 / v within 2^-14.
constexpr int kReciprocalBits = 14;
inline F reciprocal_estimate(F v) { return _mm512_rcp14_ps(v); }

inline F round_even(F v) {
  return _mm512_roundscale_ps(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
inline I to_int(F v) { return (I)_mm512_cvtps_epi32(v); }
inline F from_int(I v) { return _mm512_cvtepi32_ps((__m512i)v); }
inline F from_unsigned(U v) { return _mm512_cvtepu32_ps((__m512i)v); }

// Product of the low 32 bits of every 64-bit lane.
inline U64 multiply_low(U64 a, U64 b) { return (U64)_mm512_mul_epu32((__m512i)a, (__m512i)b); }
inline U64 xor3(U64 a, U64 b, U64 c) {
  return (U64)_mm512_ternarylogic_epi64((__m512i)a, (__m512i)b, (__m512i)c, 0x96);
}
// 32-bit lanes 2j from the low half of even[j], 2j+1 from the low half of odd[j].
inline U interleave_low(U64 even, U64 odd) {
  return (U)_mm512_mask_blend_epi32(0xaaaa, (__m512i)even, _mm512_slli_epi64((__m512i)odd, 32));
}
// Transposes the 4x4 blocks that four vectors hold in each 128-bit part.
inline void transpose_parts(F v[4]) {
  const F ab_lo = _mm512_unpacklo_ps(v[0], v[1]), ab_hi = _mm512_unpackhi_ps(v[0], v[1]);
  const F cd_lo = _mm512_unpacklo_ps(v[2], v[3]), cd_hi = _mm512_unpackhi_ps(v[2], v[3]);
  v[0] = (F)_mm512_unpacklo_pd((__m512d)ab_lo, (__m512d)cd_lo);
  v[1] = (F)_mm512_unpackhi_pd((__m512d)ab_lo, (__m512d)cd_lo);
  v[2] = (F)_mm512_unpacklo_pd((__m512d)ab_hi, (__m512d)cd_hi);
  v[3] = (F)_mm512_unpackhi_pd((__m512d)ab_hi, (__m512d)cd_hi);
}

}  // namespace stepfuse
