#include "batches.h"
#include "ops.h"

namespace stepfuse {

namespace {
constexpr int64_t kGrain = 8192;  // elements a thread must have to be worth waking
}

void fill(const Fill& a, int threads) {
  with_type(a.dtype, [&](auto type) {
    using T = decltype(type);
    T* out = static_cast<T*>(a.out);
    for_pieces(a.count, a.elements, threads, kGrain, [&](int64_t n, int64_t begin, int64_t end) {
      const Philox philox(a.seed[n], a.sample[n], a.timestep[n]);
      T* row = out + n * a.elements;
      for (int64_t i = begin; i < end; i += kBatch) {
        F z[4];
        philox.normals(i / kBatch, z);
        for_vectors(i, end, [&](int64_t at, int k, auto lanes) __attribute__((always_inline)) {
          store(row + at, z[k], lanes);
        });
      }
    });
  });
}

void integers(const int64_t* seed, const int64_t* sample, const int64_t* timestep, int64_t count,
              int64_t elements, int64_t* out, int threads) {
  for_pieces(count, elements, threads, kGrain, [&](int64_t n, int64_t begin, int64_t end) {
    const Philox philox(seed[n], sample[n], timestep[n]);
    for (int64_t i = begin; i < end; i += kBatch) {
      U w[4];
      philox.words(i / kBatch, w);
      uint32_t words[kBatch];
      std::memcpy(words, w, sizeof words);
      std::copy_n(words, std::min<int64_t>(kBatch, end - i), out + n * elements + i);
    }
  });
}

}  // namespace stepfuse
