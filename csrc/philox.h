// Counter-based normal noise: Philox4x32-10 (Salmon et al. 2011, section 3.3) and Box-Muller.
//
//   key     = seed, 64 bit
//   counter = (element / 4, timestep, sample index low, sample index high)
//
// Words (a, b) of a counter give sqrt(-2 ln u) (cos(pi v), sin(pi v)) with
// u = fl32(fl32(a) 2^-32 + 2^-33) and v = fl32(signed b) 2^-31: kernels/reference/philox.py.
#pragma once

#include "vecmath.h"

namespace stepfuse {

// Normals of one drawn batch: elements 4 W b .. 4 W (b + 1) - 1 of a sample.
constexpr int kBatch = 4 * W;

class Philox {
 public:
  Philox(int64_t seed, int64_t sample, int64_t timestep) {
    uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
    for (int i = 0; i < kRounds; ++i, k0 += 0x9E3779B9u, k1 += 0xBB67AE85u) {
      keys_[i][0] = k0;
      keys_[i][1] = k1;
    }
    const uint64_t p1 = low(sample) * kMultiplier1;  // of round 1
    const uint64_t c0 = (p1 >> 32) ^ low(timestep) ^ keys_[0][0];
    const uint64_t p0 = c0 * kMultiplier0;  // of round 2
    first_ = low(sample >> 32) ^ keys_[0][1];
    second_ = low(static_cast<int64_t>(p1)) ^ keys_[1][0];
    third_ = (p0 >> 32) ^ keys_[1][1];
    fourth_ = p0;
  }

  // The words of elements 4 W batch + i W + lane, in w[i][lane].
  STEPFUSE_INLINE void words(int64_t batch, U w[4]) const {
    counters(batch, w);
    F lanes[4];
    for (int i = 0; i < 4; ++i) lanes[i] = (F)w[i];
    transpose_parts(lanes);
    for (int i = 0; i < 4; ++i) w[i] = (U)lanes[i];
  }

  // The normals of elements 4 W batch + i W + lane, in z[i][lane].
  STEPFUSE_INLINE void normals(int64_t batch, F z[4]) const {
    U w[4];
    counters(batch, w);
    box_muller(w[0], w[1], z);
    box_muller(w[2], w[3], z + 2);
    transpose_parts(z);
  }

 private:
  static constexpr int kRounds = 10;
  static constexpr int kHalf = W / 2;
  static constexpr uint64_t kMultiplier0 = 0xD2511F53u, kMultiplier1 = 0xCD9E8D57u;
  static uint64_t low(int64_t v) { return static_cast<uint32_t>(v); }

  struct State {
    U64 c0, c1, c2, c3;  // one 32-bit word in the low half of every lane; the high halves are noise
  };

  // w[i] = word i of W counters. Lane 4 p + k holds counter (W/4) k + p of the batch, so that
  // transposing the 4x4 blocks of the 128-bit parts p puts the words into element order.
  STEPFUSE_INLINE void counters(int64_t batch, U w[4]) const {
    State even = start(batch, 0), odd = start(batch, 1);
#pragma GCC unroll 10
    for (int i = 2; i < kRounds; ++i) {
      round(even, keys_[i]);
      round(odd, keys_[i]);
    }
    w[0] = interleave_low(even.c0, odd.c0);
    w[1] = interleave_low(even.c1, odd.c1);
    w[2] = interleave_low(even.c2, odd.c2);
    w[3] = interleave_low(even.c3, odd.c3);
  }

  // The state after two rounds. Word 0 alone differs between lanes at first, and what it meets in
  // these rounds does not: the constructor has computed that.
  STEPFUSE_INLINE State start(int64_t batch, int parity) const {
    U64 block;
    for (int j = 0; j < kHalf; ++j) {
      const int lane = 2 * j + parity;
      block[j] = static_cast<uint64_t>(W / 4 * (lane % 4) + lane / 4);
    }
    block = block + static_cast<uint64_t>(batch * W);
    const U64 p0 = multiply_low(block, U64{} + kMultiplier0);
    const U64 p1 = multiply_low((p0 >> 32) ^ first_, U64{} + kMultiplier1);
    return {(p1 >> 32) ^ second_, p1, p0 ^ third_, U64{} + fourth_};
  }

  STEPFUSE_INLINE static void round(State& s, const uint64_t (&key)[2]) {
    const U64 p0 = multiply_low(s.c0, U64{} + kMultiplier0);
    const U64 p1 = multiply_low(s.c2, U64{} + kMultiplier1);
    s.c0 = xor3(p1 >> 32, s.c1, U64{} + key[0]);
    s.c1 = p1;
    s.c2 = xor3(p0 >> 32, s.c3, U64{} + key[1]);
    s.c3 = p0;
  }

  STEPFUSE_INLINE static void box_muller(U a, U b, F z[2]) {
    const F u = fma(from_unsigned(a), broadcast(0x1p-32f), broadcast(0x1p-33f));
    const F radius = sqrt(minus_two_log(u));
    const SinCos angle = sincospi(from_int((I)b) * 0x1p-31f);
    z[0] = radius * angle.cos;
    z[1] = radius * angle.sin;
  }

  uint64_t keys_[kRounds][2];
  uint64_t first_, second_, third_, fourth_;  // see start()
};

}  // namespace stepfuse
