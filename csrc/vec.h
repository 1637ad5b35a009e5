// One vector of float32 lanes per instruction set, and what the kernels do with it.
//
// The types are GCC/Clang vector extensions, so +, -, *, /, comparisons and ?: are the operators of
// the language; what those cannot say (fused multiply-add, masked and converting memory access,
// 32x32 -> 64 bit products, 2^n scaling) has one implementation per instruction set in
// vec_avx512.h, vec_avx2.h and vec_baseline.h. Arithmetic is float32 whatever the storage type.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>

#if defined(STEPFUSE_AVX512) || defined(STEPFUSE_AVX2)
#include <immintrin.h>
#endif

// A vector passed to a function that is not inlined goes through memory.
#define STEPFUSE_INLINE inline __attribute__((always_inline))

namespace stepfuse {

#if defined(STEPFUSE_AVX512)
constexpr int W = 16;  // float32 lanes of a vector
#elif defined(STEPFUSE_AVX2)
constexpr int W = 8;
#else
constexpr int W = 4;
#endif

using F = float __attribute__((vector_size(4 * W)));
using I = int32_t __attribute__((vector_size(4 * W)));
using U = uint32_t __attribute__((vector_size(4 * W)));
using U64 = uint64_t __attribute__((vector_size(4 * W)));  // W / 2 lanes

// Storage types; arithmetic on them goes through F.
struct bfloat16 {
  uint16_t bits;
};
struct float16 {
  uint16_t bits;
};
// Where the storage type has at most 11 significant bits, functions may be accurate to 2^-13 only.
template <class T>
constexpr bool kHalfPrecision = sizeof(T) == 2;

// How many lanes of a vector are memory: all of them, or the first `count` at a tail.
struct Full {};
struct Partial {
  int count;
};
// Twice the lanes at once, as the even and the odd elements: for storage types with kPaired<T>,
// whose elements an instruction set separates and joins more cheaply than it widens and narrows.
struct Paired {};

STEPFUSE_INLINE F broadcast(float v) { return v - F{}; }

// Little loads and stores that every instruction set shares: a tail goes through a full-size
// buffer, so that no byte outside the first `count` elements is touched.
template <class T>
STEPFUSE_INLINE F load(const T* p, Full);
template <class T>
STEPFUSE_INLINE void store(T* p, F v, Full);

template <class T>
STEPFUSE_INLINE F load_through_buffer(const T* p, int count) {
  T lanes[W] = {};
  std::memcpy(lanes, p, sizeof(T) * static_cast<unsigned>(count));
  return load(lanes, Full{});
}
template <class T>
STEPFUSE_INLINE void store_through_buffer(T* p, F v, int count) {
  T lanes[W];
  store(lanes, v, Full{});
  std::memcpy(p, lanes, sizeof(T) * static_cast<unsigned>(count));
}

template <>
STEPFUSE_INLINE F load(const float* p, Full) {
  F v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
template <>
STEPFUSE_INLINE void store(float* p, F v, Full) {
  std::memcpy(p, &v, sizeof v);
}

// bfloat16 bits of v in the low half of every lane: round to nearest even, NaN stays NaN.
STEPFUSE_INLINE U bfloat16_bits(F v) {
  U u = (U)v;
  U rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  return v == v ? rounded : (u >> 16) | 0x40u;
}

}  // namespace stepfuse

#if defined(STEPFUSE_AVX512)
#include "vec_avx512.h"
#elif defined(STEPFUSE_AVX2)
#include "vec_avx2.h"
#else
#include "vec_baseline.h"
#endif
