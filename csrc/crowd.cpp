#include "crowd.h"

#if defined(__linux__)
#include <signal.h>
#include <sys/resource.h>

#include <algorithm>
#include <cstdlib>
#include <exception>
#include <thread>

#include "parallel.h"
#endif

namespace stepfuse {

#if defined(__linux__)

namespace {

constexpr int64_t kOften = 100'000;                  // twice in so many microseconds is no chance
constexpr int64_t kShort = 50'000, kLong = 800'000;  // waiting asleep, until all is tried again

// How often a thread of the process had to leave its core while it wanted to go on.
int64_t cores_lost() {
  rusage usage{};
  return getrusage(RUSAGE_SELF, &usage) == 0 ? usage.ru_nivcsw : 0;
}

// Whoever says how OpenMP is to wait means it.
bool users_choice() {
  static const bool set =
      std::getenv("OMP_WAIT_POLICY") != nullptr || std::getenv("GOMP_SPINCOUNT") != nullptr;
  return set;
}

// More threads than cores for so long.
void add_threads(int64_t pause) {
  const ThreadPool& pool = thread_pool();
  pool.parallel([](void*) {}, nullptr, static_cast<unsigned>(pool.cores() + 1), 0);
  std::this_thread::sleep_for(std::chrono::microseconds(pause));
}

}  // namespace

void Crowd::late() {
  if (thread_pool().cores == nullptr || users_choice()) return;
  const int64_t time = microseconds(), lost = cores_lost();
  const int64_t last = last_.exchange(time), left = lost - lost_.exchange(lost);
  int64_t until = until_.load();
  if (time < until || time - last > kOften || left == 0) return;
  const bool again = time - until < 2 * kOften;
  const int64_t pause = again ? std::min(2 * pause_.load(), kLong) : kShort;
  if (!until_.compare_exchange_strong(until, time + pause)) return;  // another thread was here
  pause_.store(pause);
  sigset_t all, before;
  sigfillset(&all);
  pthread_sigmask(SIG_SETMASK, &all, &before);  // they hear no signals
  try {
    std::thread(add_threads, pause).detach();
  } catch (const std::exception&) {  // no more threads for this process: all is as it was
  }
  pthread_sigmask(SIG_SETMASK, &before, nullptr);
}

#else

void Crowd::late() {}

#endif

}  // namespace stepfuse
