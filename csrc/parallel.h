// Static loops over the thread pool that torch already has.
//
// A second OpenMP runtime in the process would mean a second pool, so none is linked: the runtime
// that torch mapped (libgomp, libiomp5 or libomp, under whatever file name) is found at import and
// its GOMP_parallel, the entry point that GCC compiles `#pragma omp parallel` to, is called.
#pragma once

#include <algorithm>
#include <cstdint>

namespace stepfuse {

struct ThreadPool {
  void (*parallel)(void (*body)(void*), void* data, unsigned threads, unsigned flags) = nullptr;
  int (*rank)() = nullptr;
  int (*size)() = nullptr;
};

// The pool of this module; without functions where no OpenMP runtime is mapped.
ThreadPool& thread_pool();

// Looks for a mapped OpenMP runtime; true where one was found.
bool find_thread_pool();

// body(begin, end) over [0, items) in contiguous parts, one a thread. Which elements share a part
// depends on the number of threads, so no sum may run across items.
template <class Body>
void parallel_for(int threads, int64_t items, const Body& body) {
  const ThreadPool& pool = thread_pool();
  threads = static_cast<int>(std::min<int64_t>(threads, items));
  if (threads <= 1 || pool.parallel == nullptr) {
    body(int64_t{0}, items);
    return;
  }
  struct Shared {
    const Body& body;
    const ThreadPool& pool;
    int64_t items;
  } shared{body, pool, items};
  const auto part = [](void* data) {
    const Shared& s = *static_cast<Shared*>(data);
    const int64_t rank = s.pool.rank(), size = s.pool.size();  // fewer than asked where nested
    s.body(s.items * rank / size, s.items * (rank + 1) / size);
  };
  pool.parallel(part, &shared, static_cast<unsigned>(threads), 0);
}

// How many of `threads` are worth waking for `work` elements, where one pays from `grain` upwards.
inline int worthwhile(int threads, int64_t work, int64_t grain) {
  return static_cast<int>(std::min<int64_t>(threads, std::max<int64_t>(1, work / grain)));
}

}  // namespace stepfuse
