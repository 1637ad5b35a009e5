#include <cstring>

#include "ops.h"
#include "parallel.h"

namespace stepfuse {

namespace {

constexpr int64_t kGrain = 1 << 16;  // bytes a thread must have to be worth waking

}  // namespace

void concatenate(const Concatenate& a, int threads) {
  int64_t row = 0;
  for (const Concatenate::Part& part : a.parts) row += part.bytes;
  threads = worthwhile(threads, a.pixels * row, kGrain);
  parallel_for(threads, a.pixels, [&](int64_t begin, int64_t end) {
    char* out = static_cast<char*>(a.out) + begin * row;
    for (int64_t pixel = begin; pixel < end; ++pixel)
      for (const Concatenate::Part& part : a.parts) {
        std::memcpy(out, static_cast<const char*>(part.data) + pixel * part.bytes,
                    static_cast<size_t>(part.bytes));
        out += part.bytes;
      }
  });
}

}  // namespace stepfuse
