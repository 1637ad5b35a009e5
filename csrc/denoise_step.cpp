#include <optional>
#include <type_traits>

#include "batches.h"
#include "ops.h"

namespace stepfuse {

namespace {

constexpr int64_t kGrain = 32768;      // elements a thread must have to be worth waking,
constexpr int64_t kNoiseGrain = 8192;  // and where it draws noise

// Where each coefficient stands in a row of the step table: kernels/step_row.py.
enum Column { P_X, P_O, C_X, C_O, C_0, SIGMA, CLIP, L_0, L_1, GUIDANCE, TIMESTEP };
enum HistoryColumn { C_H0, H_X = 3, H_O, H_0, WRITE };
constexpr int kSlots = 3;

// What a row reads and writes of the history: a slot whose weight is 0 is not among them.
struct Memory {
  const float* read[kSlots];
  float weight[kSlots];
  int reads = 0;
  float* write = nullptr;

  explicit Memory(const DenoiseStep& a) {
    if (a.history == nullptr) return;
    const int64_t slot = a.count * a.elements;
    for (int k = 0; k < a.slots; ++k) {
      if (a.memory[C_H0 + k] == 0) continue;
      read[reads] = a.history + k * slot;
      weight[reads++] = a.memory[C_H0 + k];
    }
    const float to = a.memory[WRITE];
    if (to >= 0 && to < a.slots) write = a.history + static_cast<int64_t>(to) * slot;
  }
};

// T: storage of x, noise, out and x0. O: storage of the model outputs. K: how many slots are read,
// -1 where there is no history.
template <class T, class O, int K>
struct Piece {
  const DenoiseStep& a;
  const Memory& memory;

  template <class P>
  static P* row(P* base, int64_t offset) {
    return base == nullptr ? nullptr : base + offset;
  }

  void operator()(int64_t n, int64_t begin, int64_t end) const {
    const float* c = a.row;
    const int64_t at_x = n * a.elements;
    const T* x = static_cast<const T*>(a.x) + at_x;
    const O* cond = static_cast<const O*>(a.cond) + n * a.cond_stride;
    const O* uncond = row(static_cast<const O*>(a.uncond), n * a.uncond_stride);
    const O* variance = a.learned ? cond + a.elements : nullptr;
    const T* noise = row(static_cast<const T*>(a.noise), at_x);
    T* out = static_cast<T*>(a.out) + at_x;
    T* x0_out = row(static_cast<T*>(a.x0), at_x);

    std::optional<Philox> philox;
    const bool noisy = c[SIGMA] != 0 && (noise != nullptr || a.seed != nullptr);
    if (noisy && noise == nullptr)
      philox.emplace(a.seed[n], a.sample[n], static_cast<int64_t>(c[TIMESTEP]));

    const F p_x = broadcast(c[P_X]), p_o = broadcast(c[P_O]), clip = broadcast(c[CLIP]);
    const F c_x = broadcast(c[C_X]), c_o = broadcast(c[C_O]), c_0 = broadcast(c[C_0]);
    F h_x{}, h_o{}, h_0{};
    if constexpr (K >= 0) {
      h_x = broadcast(a.memory[H_X]), h_o = broadcast(a.memory[H_O]);
      h_0 = broadcast(a.memory[H_0]);
    }
    for (int64_t i = begin; i < end; i += kBatch) {
      F z[4] = {};
      if (philox) philox->normals(i / kBatch, z);
      for_vectors(i, end, [&](int64_t at, int k, auto lanes) __attribute__((always_inline)) {
        const F xt = load(x + at, lanes);
        F o = load(cond + at, lanes);
        if (uncond != nullptr) {
          const F u = load(uncond + at, lanes);
          o = fma(broadcast(c[GUIDANCE]), o - u, u);
        }
        const F x0 = max(-clip, min(clip, fma(p_x, xt, p_o * o)));
        F xs = fma(c_x, xt, fma(c_o, o, c_0 * x0));
        if constexpr (K > 0) {
#pragma GCC unroll 3
          for (int h = 0; h < K; ++h)
            xs = fma(broadcast(memory.weight[h]), load(memory.read[h] + at_x + at, lanes), xs);
        }
        if constexpr (K >= 0) {
          if (memory.write != nullptr)
            store(memory.write + at_x + at, fma(h_x, xt, fma(h_o, o, h_0 * x0)), lanes);
        }
        if (noisy) {
          F std = broadcast(c[SIGMA]);
          if (variance != nullptr) {
            const F w = load(variance + at, lanes);
            std = std * exp(fma(broadcast(c[L_1]), w, broadcast(c[L_0])) * 0.5f);
          }
          xs = fma(std, noise == nullptr ? z[k] : load(noise + at, lanes), xs);
        }
        store(out + at, xs, lanes);
        if (x0_out != nullptr) store(x0_out + at, x0, lanes);
      });
    }
  }
};

}  // namespace

void denoise_step(const DenoiseStep& a, int threads) {
  const Memory memory(a);
  const bool drawn = a.row[SIGMA] != 0 && a.noise == nullptr && a.seed != nullptr;
  with_type(a.dtype, [&](auto type) {
    with_type(a.output_dtype, [&](auto output_type) {
      const auto run = [&](auto reads) {
        for_pieces(a.count, a.elements, threads, drawn ? kNoiseGrain : kGrain,
                   Piece<decltype(type), decltype(output_type), reads()>{a, memory});
      };
      if (a.history == nullptr) return run(std::integral_constant<int, -1>{});
      switch (memory.reads) {
        case 0:
          return run(std::integral_constant<int, 0>{});
        case 1:
          return run(std::integral_constant<int, 1>{});
        case 2:
          return run(std::integral_constant<int, 2>{});
        default:
          return run(std::integral_constant<int, kSlots>{});
      }
    });
  });
}

}  // namespace stepfuse
