// AVX-512 F, BW, VL, DQ and BF16: 16 lanes, tails by mask registers. Included by vec.h.
#pragma once

// Compilers do not let the sanitizer of addresses look at masked accesses, so it is told of them.
#if defined(__SANITIZE_ADDRESS__)
extern "C" void __asan_loadN(const void*, std::size_t);
extern "C" void __asan_storeN(void*, std::size_t);
#endif

namespace stepfuse {

template <class T>
STEPFUSE_INLINE const T* read(const T* p, [[maybe_unused]] Partial lanes) {
#if defined(__SANITIZE_ADDRESS__)
  __asan_loadN(p, sizeof(T) * static_cast<unsigned>(lanes.count));
#endif
  return p;
}
template <class T>
STEPFUSE_INLINE T* written(T* p, [[maybe_unused]] Partial lanes) {
#if defined(__SANITIZE_ADDRESS__)
  __asan_storeN(p, sizeof(T) * static_cast<unsigned>(lanes.count));
#endif
  return p;
}

STEPFUSE_INLINE F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
STEPFUSE_INLINE F fnma(F a, F b, F c) { return _mm512_fnmadd_ps(a, b, c); }  // c - a b
// b where a or b is NaN: with the value as b, a NaN passes through a clamp.
STEPFUSE_INLINE F max(F a, F b) { return _mm512_max_ps(a, b); }
STEPFUSE_INLINE F min(F a, F b) { return _mm512_min_ps(a, b); }
STEPFUSE_INLINE F sqrt(F v) { return _mm512_sqrt_ps(v); }

STEPFUSE_INLINE __mmask16 mask(Partial lanes) {
  return static_cast<__mmask16>((1u << lanes.count) - 1u);
}

STEPFUSE_INLINE F from_bits(__m256i v, bfloat16) {
  return (F)_mm512_slli_epi32(_mm512_cvtepu16_epi32(v), 16);
}
STEPFUSE_INLINE F from_bits(__m256i v, float16) { return _mm512_cvtph_ps(v); }
STEPFUSE_INLINE __m256i to_bits(F v, bfloat16) { return (__m256i)_mm512_cvtneps_pbh(v); }
STEPFUSE_INLINE __m256i to_bits(F v, float16) {
  return _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}

// Two bfloat16 are one lane: the odd one is its upper half, the even one its lower half shifted up.
template <class T>
constexpr bool kPaired = std::is_same_v<T, bfloat16>;
STEPFUSE_INLINE void load_pair(const bfloat16* p, F& even, F& odd) {
  const __m512i v = _mm512_loadu_si512(p);
  even = (F)_mm512_slli_epi32(v, 16);
  odd = (F)_mm512_and_si512(v, _mm512_set1_epi32(static_cast<int>(0xffff0000u)));
}
STEPFUSE_INLINE void store_pair(bfloat16* p, F even, F odd) {
  alignas(64) static constexpr uint16_t kJoin[2 * W] = {
      0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
      8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  const __m512i halves = (__m512i)_mm512_cvtne2ps_pbh(odd, even);  // even ones first
  _mm512_storeu_si512(p, _mm512_permutexvar_epi16(_mm512_load_si512(kJoin), halves));
}

template <class T>
STEPFUSE_INLINE F load(const T* p, Full) {
  return from_bits(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)), T{});
}
template <class T>
STEPFUSE_INLINE void store(T* p, F v, Full) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), to_bits(v, T{}));
}
STEPFUSE_INLINE F load(const float* p, Partial lanes) {
  return _mm512_maskz_loadu_ps(mask(lanes), read(p, lanes));
}
STEPFUSE_INLINE void store(float* p, F v, Partial lanes) {
  _mm512_mask_storeu_ps(written(p, lanes), mask(lanes), v);
}
template <class T>
STEPFUSE_INLINE F load(const T* p, Partial lanes) {
  return from_bits(_mm256_maskz_loadu_epi16(mask(lanes), read(p, lanes)), T{});
}
template <class T>
STEPFUSE_INLINE void store(T* p, F v, Partial lanes) {
  _mm256_mask_storeu_epi16(written(p, lanes), mask(lanes), to_bits(v, T{}));
}
// Sum of the lanes, always in the same tree.
STEPFUSE_INLINE float sum(F v) { return _mm512_reduce_add_ps(v); }

// v with zero in the lanes that are not memory.
STEPFUSE_INLINE F keep(F v, Full) { return v; }
STEPFUSE_INLINE F keep(F v, Partial lanes) { return _mm512_maskz_mov_ps(mask(lanes), v); }

// 2^t p(t - floor(t)): vscalefps takes the floor itself, saturates, and keeps NaN.
constexpr bool kFloorReduction = true;
STEPFUSE_INLINE F fraction(F t) {
  return _mm512_reduce_ps(t, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
}
STEPFUSE_INLINE F scale_by_power(F p, F t) { return _mm512_scalef_ps(p, t); }

STEPFUSE_INLINE F round_even(F v) {
  return _mm512_roundscale_ps(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
STEPFUSE_INLINE I to_int(F v) { return (I)_mm512_cvtps_epi32(v); }
STEPFUSE_INLINE F from_int(I v) { return _mm512_cvtepi32_ps((__m512i)v); }
STEPFUSE_INLINE F from_unsigned(U v) { return _mm512_cvtepu32_ps((__m512i)v); }

// Product of the low 32 bits of every 64-bit lane.
STEPFUSE_INLINE U64 multiply_low(U64 a, U64 b) {
  return (U64)_mm512_mul_epu32((__m512i)a, (__m512i)b);
}
STEPFUSE_INLINE U64 xor3(U64 a, U64 b, U64 c) {
  return (U64)_mm512_ternarylogic_epi64((__m512i)a, (__m512i)b, (__m512i)c, 0x96);
}
// 32-bit lanes 2j from the low half of even[j], 2j+1 from the low half of odd[j].
STEPFUSE_INLINE U interleave_low(U64 even, U64 odd) {
  return (U)_mm512_mask_blend_epi32(0xaaaa, (__m512i)even, _mm512_slli_epi64((__m512i)odd, 32));
}
// Transposes the 4x4 blocks that four vectors hold in each 128-bit part.
STEPFUSE_INLINE void transpose_parts(F v[4]) {
  const F ab_lo = _mm512_unpacklo_ps(v[0], v[1]), ab_hi = _mm512_unpackhi_ps(v[0], v[1]);
  const F cd_lo = _mm512_unpacklo_ps(v[2], v[3]), cd_hi = _mm512_unpackhi_ps(v[2], v[3]);
  v[0] = (F)_mm512_unpacklo_pd((__m512d)ab_lo, (__m512d)cd_lo);
  v[1] = (F)_mm512_unpackhi_pd((__m512d)ab_lo, (__m512d)cd_lo);
  v[2] = (F)_mm512_unpacklo_pd((__m512d)ab_hi, (__m512d)cd_hi);
  v[3] = (F)_mm512_unpackhi_pd((__m512d)ab_hi, (__m512d)cd_hi);
}

}  // namespace stepfuse
