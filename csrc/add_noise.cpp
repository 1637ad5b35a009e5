#include <cmath>
#include <optional>

#include "batches.h"
#include "ops.h"

namespace stepfuse {

namespace {

constexpr int64_t kGrain = 32768;      // elements a thread must have to be worth waking,
constexpr int64_t kNoiseGrain = 8192;  // and where it draws noise

template <class T>
void noise_piece(const AddNoise& a, int64_t n, int64_t begin, int64_t end) {
  const double abar = a.alphas_cumprod[a.t[n]];
  const F signal = broadcast(static_cast<float>(std::sqrt(abar)));
  const F sigma = broadcast(static_cast<float>(std::sqrt(1.0 - abar)));
  const int64_t row = n * a.elements;
  const T* x0 = static_cast<const T*>(a.x0) + row;
  const T* noise = a.noise == nullptr ? nullptr : static_cast<const T*>(a.noise) + row;
  T* out = static_cast<T*>(a.out) + row;
  T* target = a.target == nullptr ? nullptr : static_cast<T*>(a.target) + row;

  std::optional<Philox> philox;
  if (noise == nullptr) philox.emplace(a.seed[n], a.sample[n], a.t[n]);
  for (int64_t i = begin; i < end; i += kBatch) {
    F z[4] = {};
    if (philox) philox->normals(i / kBatch, z);
    for_vectors(i, end, [&](int64_t at, int k, auto lanes) __attribute__((always_inline)) {
      const F x = load(x0 + at, lanes);
      const F eps = noise == nullptr ? z[k] : load(noise + at, lanes);
      store(out + at, fma(signal, x, sigma * eps), lanes);
      if (target == nullptr) return;
      store(target + at, a.velocity ? fma(signal, eps, -(sigma * x)) : eps, lanes);
    });
  }
}

}  // namespace

void add_noise(const AddNoise& a, int threads) {
  with_type(a.dtype, [&](auto type) {
    for_pieces(a.count, a.elements, threads, a.noise == nullptr ? kNoiseGrain : kGrain,
               [&](int64_t n, int64_t begin, int64_t end) {
                 noise_piece<decltype(type)>(a, n, begin, end);
               });
  });
}

}  // namespace stepfuse
