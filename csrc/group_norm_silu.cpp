#include "group_norm_layouts.h"

namespace stepfuse {

namespace {

constexpr int64_t kGrain = 16384;  // elements a thread must have to be worth waking

template <class T, class Unit, bool act>
void forward(const GroupNorm& a, T* out, int threads) {
  const T* x = static_cast<const T*>(a.x);
  for_units<Unit>(a, threads, [&](const Unit& unit, int64_t piece) {
    const float* coefficients = unit.state().coefficients.data();
    const auto result = [](F v, const F(&c)[2]) {
      const F y = fma(v, c[0], c[1]);
      return act ? silu<kHalfPrecision<T>>(y) : y;
    };
    const auto step = [&](int64_t i, const F(&c)[2], auto lanes) {
      // arithmetic here leaves the memory time to bring in what is summed next
      if (const int64_t ahead = unit.ahead(); ahead != 0) __builtin_prefetch(x + i + ahead, 0, 2);
      if constexpr (std::is_same_v<decltype(lanes), Paired>) {
        F even, odd;
        load_pair(x + i, even, odd);
        store_pair(out + i, result(even, c), result(odd, c));
      } else {
        store(out + i, result(load(x + i, lanes), c), lanes);
      }
    };
    unit.template for_vectors<2, kPaired<T>>(piece, coefficients, step);
  });
}

}  // namespace

void group_norm_silu(const GroupNorm& a, void* out, int threads) {
  if (a.samples * a.channels * a.spatial == 0) return;
  threads = worthwhile(threads, a.samples * a.channels * a.spatial, kGrain);
  with_type(a.dtype, [&](auto type) {
    using T = decltype(type);
    T* y = static_cast<T*>(out);
    if (a.channels_last && a.silu) return forward<T, LastUnit<T>, true>(a, y, threads);
    if (a.channels_last) return forward<T, LastUnit<T>, false>(a, y, threads);
    if (a.silu) return forward<T, FirstUnit<T>, true>(a, y, threads);
    return forward<T, FirstUnit<T>, false>(a, y, threads);
  });
}

}  // namespace stepfuse
