// Loops over the thread pool that torch already has.
//
// A second OpenMP runtime in the process would mean a second pool, so none is linked: the runtime
// that torch mapped (libgomp, libiomp5 or libomp, under whatever file name) is found at import and
// its GOMP_parallel, the entry point that GCC compiles `#pragma omp parallel` to, is called.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>

#include "crowd.h"

namespace stepfuse {

struct ThreadPool {
  void (*parallel)(void (*body)(void*), void* data, unsigned threads, unsigned flags) = nullptr;
  int (*rank)() = nullptr;
  int (*cores)() = nullptr;  // of GCC's runtime alone
  Crowd crowd;
};

// The pool of this module; without functions where no OpenMP runtime is mapped.
ThreadPool& thread_pool();

// Looks for a mapped OpenMP runtime; true where one was found.
bool find_thread_pool();

// What one thread begins with; who has done its own goes on with what others have not begun.
struct alignas(64) Range {  // a line of the cache each
  std::atomic<int64_t> next{0};
  int64_t end = 0, step = 1;

  template <class Body>
  void finish(const Body& body) {
    while (next.load(std::memory_order_relaxed) < end) {
      const int64_t begin = next.fetch_add(step, std::memory_order_relaxed);
      if (begin < end) body(begin, std::min(end, begin + step));
    }
  }
};

constexpr int kPieces = 4;  // of a thread's part

// Those of the loop that the calling thread starts, in memory that it keeps.
Range* ranges_of(int threads);

// body(begin, end) over [0, items): a contiguous part a thread, some of it at a time. What shares a
// call depends on the number of threads and on chance, so no sum may run across items. A body starts
// no loop of its own: that would take the ranges of this one.
template <class Body>
void parallel_for(int threads, int64_t items, const Body& body) {
  ThreadPool& pool = thread_pool();
  threads = static_cast<int>(std::min<int64_t>(pool.crowd.leaves(threads), items));
  if (threads <= 1 || pool.parallel == nullptr) {
    body(int64_t{0}, items);
    return;
  }
  struct Shared {
    const Body& body;
    const ThreadPool& pool;
    Range* ranges;
    int threads;
    Clock::time_point done;
  } shared{body, pool, ranges_of(threads), threads, {}};
  for (int i = 0; i < threads; ++i) {
    Range& part = shared.ranges[i];
    const int64_t begin = items * i / threads;
    part.end = items * (i + 1) / threads;
    part.step = (part.end - begin + kPieces - 1) / kPieces;
    part.next.store(begin, std::memory_order_relaxed);
  }
  const auto share = [](void* data) {
    Shared& s = *static_cast<Shared*>(data);
    const int rank = s.pool.rank();  // of fewer than asked for where nested
    for (int i = rank; i < s.threads; ++i) s.ranges[i].finish(s.body);
    for (int i = 0; i < rank; ++i) s.ranges[i].finish(s.body);
    if (rank == 0) s.done = Clock::now();  // who called
  };
  const Clock::time_point begun = Clock::now();
  pool.parallel(share, &shared, static_cast<unsigned>(threads), 0);
  pool.crowd.waited(shared.done - begun, Clock::now() - shared.done);
}

// How many of `threads` are worth waking for `work` elements, where one pays from `grain` upwards.
inline int worthwhile(int threads, int64_t work, int64_t grain) {
  return static_cast<int>(std::min<int64_t>(threads, std::max<int64_t>(1, work / grain)));
}

}  // namespace stepfuse
