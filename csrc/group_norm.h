// What the forward and the backward of group_norm_silu share: statistics of the groups in either
// memory layout, and the loop that gives units of work to the threads.
//
// A unit is what is normalised at once: one group (channels-first: [C/G, S] contiguous) or one
// sample (channels-last: [S, C]). It is cut into pieces, by its size alone. A thread runs whole
// units while there are enough of them; the pieces of those left over are shared out. Sums over
// pieces are taken in order, so the bits of a result do not depend on the number of threads.
//
// Sums are of x - K and (x - K)^2 in float32 within a piece and in float64 over pieces, K being the
// mean of m elements of the group. By Cauchy-Schwarz (K - mean)^2 <= var (n - m)/m: what
// E[(x-K)^2] - (K - mean)^2 can cancel is bounded whatever the data, and nothing is for a far mean.
#pragma once

#include <cmath>
#include <vector>

#include "ops.h"
#include "parallel.h"
#include "vecmath.h"

namespace stepfuse {

// Channels first .. first+count-1 of a parameter for sample n as float32, converted into `buffer`
// where it is stored otherwise; null where there is none.
inline const float* values(const Parameter& p, int64_t n, int64_t first, int64_t count,
                           float* buffer) {
  if (p.data == nullptr) return nullptr;
  const float* result = buffer;
  with_type(p.dtype, [&](auto type) {
    using T = decltype(type);
    const T* source = static_cast<const T*>(p.data) + n * p.stride + first;
    if constexpr (sizeof(T) == sizeof(float)) {
      result = source;
    } else {
      int64_t c = 0;
      for (; c + W <= count; c += W) store(buffer + c, load(source + c, Full{}), Full{});
      const Partial tail{static_cast<int>(count - c)};
      if (tail.count > 0) store(buffer + c, load(source + c, tail), tail);
    }
  });
  return result;
}

// The parameters of some channels of one sample.
struct Modulation {
  const float *weight = nullptr, *bias = nullptr, *scale = nullptr, *shift = nullptr;
  const float* add = nullptr;

  // `buffer` holds 5 count floats.
  void set(const GroupNorm& a, int64_t n, int64_t first, int64_t count, float* buffer) {
    weight = values(a.weight, 0, first, count, buffer);
    bias = values(a.bias, 0, first, count, buffer + count);
    scale = values(a.scale, n, first, count, buffer + 2 * count);
    shift = values(a.shift, n, first, count, buffer + 3 * count);
    add = values(a.add, n, first, count, buffer + 4 * count);
  }
  float added(int64_t c) const { return add == nullptr ? 0.0f : add[c]; }
  double scaled(int64_t c) const { return scale == nullptr ? 1.0 : 1.0 + scale[c]; }
  double weighted(int64_t c) const { return weight == nullptr ? 1.0 : weight[c]; }
};

// Mean and 1 / sqrt(variance + eps) of a group.
struct Statistics {
  double mean, rstd;

  // From the sums of x - K and (x - K)^2 over 1 / per_element elements.
  static Statistics of(double K, double sum, double squares, double per_element, double eps) {
    const double offset = sum * per_element;
    const double variance = std::max(0.0, squares * per_element - offset * offset);
    return {K + offset, 1.0 / std::sqrt(variance + eps)};
  }
};

// Calls f(offset, lanes) for the vectors of [begin, end), `paired` two at a time while they last.
template <bool paired = false, class Function>
inline void each_vector(int64_t begin, int64_t end, const Function& f) {
  int64_t i = begin;
  if constexpr (paired)
    for (; i + 2 * W <= end; i += 2 * W) f(i, Paired{});
  for (; i + W <= end; i += W) f(i, Full{});
  if (i < end) f(i, Partial{static_cast<int>(end - i)});
}

// y = a x + b before the activation, for `count` channels of one group. b is computed with the
// rounded a and rounded once, so that at a mean far from zero only that rounding is left.
inline void affine(const Statistics& s, const Modulation& m, int64_t first, int64_t count, float* a,
                   float* b) {
  const float mean = static_cast<float>(s.mean);
  const F rest = broadcast(static_cast<float>(s.mean - static_cast<double>(mean)));
  each_vector(first, first + count, [&](int64_t c, auto lanes) {
    const auto value = [&](const float* p, float neutral) {
      return p == nullptr ? broadcast(neutral) : load(p + c, lanes);
    };
    const F scaled = value(m.scale, 0.0f) + 1.0f;
    const F slope = value(m.weight, 1.0f) * scaled * static_cast<float>(s.rstd);
    const F level = fma(value(m.bias, 0.0f), scaled, value(m.shift, 0.0f));
    store(a + c, slope, lanes);
    store(b + c, fnma(slope, broadcast(mean), fma(slope, value(m.add, 0.0f) - rest, level)), lanes);
  });
}

// `Unit` has
//   pieces()          how many pieces a unit has
//   begin(u)          start unit u
//   moments(piece)    sum one piece, on any thread
//   finish()          statistics and coefficients from the sums
// Calls work(unit) for the first `units` units, each on one thread.
template <class Unit, class Work>
void for_whole_units(const GroupNorm& a, int64_t units, int threads, const Work& work) {
  parallel_for(threads, units, [&](int64_t first, int64_t last) {
    if (first == last) return;
    Unit unit(a);
    for (int64_t u = first; u < last; ++u) {
      unit.begin(u);
      for (int64_t p = 0; p < unit.pieces(); ++p) unit.moments(p);
      unit.finish();
      work(unit);
    }
  });
}

// Calls whole(unit) for units that one thread sums, as many as all threads get, and shared(unit)
// for those left over, which all threads have summed together.
template <class Unit, class Whole, class Shared>
void for_summed_units(const GroupNorm& a, int threads, const Whole& whole, const Shared& shared) {
  const int64_t units = Unit::units(a), even = units - units % threads;
  for_whole_units<Unit>(a, even, threads, whole);
  if (even == units) return;
  Unit unit(a);
  for (int64_t u = even; u < units; ++u) {
    unit.begin(u);
    parallel_for(threads, unit.pieces(), [&](int64_t first, int64_t last) {
      for (int64_t p = first; p < last; ++p) unit.moments(p);
    });
    unit.finish();
    shared(unit);
  }
}

// Calls work(unit) once the statistics of the unit are known.
template <class Unit, class Work>
void for_statistics(const GroupNorm& a, int threads, const Work& work) {
  for_summed_units<Unit>(a, threads, work, work);
}

// Calls work(unit, piece) for every piece of every unit, backwards: what was summed last is still
// in the cache.
template <class Unit, class Work>
void for_units(const GroupNorm& a, int threads, const Work& work) {
  for_summed_units<Unit>(
      a, threads,
      [&](const Unit& unit) {
        for (int64_t p = unit.pieces(); p-- > 0;) work(unit, p);
      },
      [&](const Unit& unit) {
        parallel_for(threads, unit.pieces(), [&](int64_t first, int64_t last) {
          for (int64_t p = last; p-- > first;) work(unit, p);
        });
      });
}

}  // namespace stepfuse
