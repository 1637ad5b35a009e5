// What to do when other processes compute on the cores that our threads were to have.
//
// At the end of a parallel loop OpenMP's threads wait for the last one with their cores held, 3 ms
// and more, and between loops they wait for the next as they do at the end of one. On cores of our
// own that is the fastest way. Beside a busy process it is the slowest: who waits uses up its share
// of the cores, and then does not get one when there is something to do.
//
// libgomp waits for a moment only, and then sleeps, as long as the process has more of its threads
// than there are cores. So for a while we add some, which sleep: all loops of the process, ours and
// PyTorch's, then wait asleep; and ours leave a core to whoever wants it. When they are gone all is
// as before.
#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>

namespace stepfuse {

using Clock = std::chrono::steady_clock;

class Crowd {
 public:
  // How many of `threads` to use now.
  int leaves(int threads) const {
    const int64_t until = until_.load(std::memory_order_relaxed);
    return threads > 1 && until > 0 && microseconds() < until ? threads - 1 : threads;
  }

  // A thread had computed for `worked` and then waited so long for the others.
  void waited(Clock::duration worked, Clock::duration waited) {
    if (waited >= kLate && waited >= worked) late();
  }

 private:
  static constexpr std::chrono::microseconds kLate{500};  // a thread that runs is not so far behind

  static int64_t microseconds() {
    return Clock::now().time_since_epoch() / std::chrono::microseconds(1);
  }

  void late();

  std::atomic<int64_t> last_{-(int64_t{1} << 60)};  // a late thread, in microseconds
  std::atomic<int64_t> until_{0};  // the end of the last change
  std::atomic<int64_t> pause_{0};  // its length
  std::atomic<int64_t> lost_{0};   // cores that threads of ours had to leave
};

}  // namespace stepfuse
