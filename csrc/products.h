// Products of a few positions with a panel of filters: what convolutions and attention spend their
// time on.
#pragma once

#include <cstdlib>
#include <memory>
#include <new>

#include "convolve.h"

namespace stepfuse {

constexpr int kRows = W == 4 ? 4 : W == 8 ? 6 : 12;  // positions that share the registers
constexpr int64_t kLine = 64;                        // bytes of a cache line

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// m += v u for one channel, or for a pair of channels in bfloat16.
template <class T>
constexpr int64_t kTogether = sizeof(T) == 2 ? 2 : 1;
STEPFUSE_INLINE void accumulate(const float* v, F u[2], F m[2]) {
  const F one = broadcast(*v);
  m[0] = fma(one, u[0], m[0]);
  m[1] = fma(one, u[1], m[1]);
}
#if defined(STEPFUSE_AVX512)
STEPFUSE_INLINE void accumulate(const bfloat16* v, F u[2], F m[2]) {
  int32_t pair;
  std::memcpy(&pair, v, sizeof pair);
  const __m512bh both = (__m512bh)_mm512_set1_epi32(pair);
  m[0] = _mm512_dpbf16_ps(m[0], both, (__m512bh)u[0]);
  m[1] = _mm512_dpbf16_ps(m[1], both, (__m512bh)u[1]);
}
#endif

// The left factor: positions `stride` elements apart, each a sum over `taps` runs of `channels`
// elements that are `tap` apart. What will be read next is `lead` elements further on; zero where
// it is in the cache.
template <class T>
struct Left {
  const T* v;
  int64_t stride, channels, tap, taps, lead = 0;

  Left from(int64_t position) const {
    return {v + position * stride, stride, channels, tap, taps, lead};
  }
  // Elements of the panel [taps][channels][kWide] that it is multiplied with.
  int64_t panel() const { return taps * channels * kWide; }
};

// m[r] = sum over taps and channels of v[r] u: R positions, kWide channels of the result. Meanwhile
// memory is asked for, a cache line a step: half a panel from `ahead` on, and the left factors that
// lie `lead` ahead of these.
template <int R, class T>
STEPFUSE_INLINE void multiply(const Left<T>& left, const T* u, const char* ahead, F m[R][2]) {
  const T* v = left.v;
  const char* next = reinterpret_cast<const char*>(v + left.lead);
#pragma GCC unroll 12
  for (int r = 0; r < R; ++r) m[r][0] = m[r][1] = F{};
  for (int64_t t = 0; t < left.taps; ++t, v += left.tap) {
    const T* from[(R + 2) / 3];  // every third position: three fit one address and two offsets
#pragma GCC unroll 4
    for (int q = 0; q < (R + 2) / 3; ++q) from[q] = v + 3 * q * left.stride;
    for (int64_t c = 0; c < left.channels; c += kTogether<T>, u += kTogether<T> * kWide) {
      __builtin_prefetch(ahead, 0, 2);
      __builtin_prefetch(next, 0, 2);
      ahead += kLine;
      next += kLine;
      // one copy each: of both at once, GCC makes four that go through the stack with AVX2
      F both[2];
      std::memcpy(&both[0], u, sizeof(F));
      std::memcpy(&both[1], u + kTogether<T> * W, sizeof(F));
#pragma GCC unroll 12
      for (int r = 0; r < R; ++r) accumulate(from[r / 3] + (r % 3) * left.stride + c, both, m[r]);
    }
  }
}

template <int R, class Function>
STEPFUSE_INLINE void with_rows(int64_t rows, const Function& f) {
  if (rows == R) return f(std::integral_constant<int, R>{});
  if constexpr (R > 1) with_rows<R - 1>(rows, f);
}

// f(first, R, m) for all positions, as many at a time as there are registers for, in equal parts:
// m [R][2] are the products of positions first .. first + R - 1 with the panel u. As much as a
// panel is fetched from `next` on during the first two parts; a single part leaves no time for it.
// f unrolls its loops over m: what is indexed by a variable does not stay in registers.
template <class T, class Function>
STEPFUSE_INLINE void products(const Left<T>& left, int64_t count, const T* u, const T* next,
                              const Function& f) {
  const int64_t bytes = left.panel() * static_cast<int64_t>(sizeof(T));
  const char* const here = reinterpret_cast<const char*>(u);
  const char* const there = reinterpret_cast<const char*>(next);
  int64_t passes = ceil_div(count, kRows);
  for (int64_t first = 0, pass = 0; first < count; ++pass, --passes) {
    const int64_t rows = ceil_div(count - first, passes);
    const char* ahead = pass < 2 && passes + pass > 1 ? there + pass * bytes / 2 : here;
    with_rows<kRows>(rows, [&](auto size) {
      constexpr int R = decltype(size)::value;
      F m[R][2];
      multiply<R>(left.from(first), u, ahead, m);
      f(first, size, m);
    });
    first += rows;
  }
}

// Meanwhile the next panel is fetched.
template <class T, class Function>
STEPFUSE_INLINE void products(const Left<T>& left, int64_t count, const T* u, const Function& f) {
  products(left, count, u, u + left.panel(), f);
}

// Memory of a thread that lives as long as the thread: fresh pages cost more than a transform.
enum class For { planes, results, lines, filters, coefficients, keys, weights };
template <For, class T>
T* scratch(int64_t count) {
  struct Freed {
    void operator()(void* p) const { std::free(p); }
  };
  thread_local std::unique_ptr<T, Freed> held;
  thread_local int64_t size = 0;
  if (count > size) {
    size = 0;
    const size_t bytes = static_cast<size_t>(ceil_div(count * sizeof(T), 64)) * 64;
    held.reset(static_cast<T*>(std::aligned_alloc(64, bytes)));
    if (!held) throw std::bad_alloc();
    size = count;
  }
  return held.get();
}

}  // namespace stepfuse
