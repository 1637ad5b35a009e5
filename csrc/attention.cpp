// softmax(scale q k^T) v, a few queries at a time against all keys.
#include "parallel.h"
#include "products.h"
#include "vecmath.h"

namespace stepfuse {

namespace {

constexpr int64_t kGrain = 1 << 20;  // products a thread must have to be worth waking

template <class T>
class Heads {
 public:
  explicit Heads(const Attention& a)
      : a_(a),
        keys_(ceil_div(a.keys, kWide) * kWide),
        values_(ceil_div(a.values, kWide) * kWide),
        head_(keys_ * (a.width + values_)) {}

  void run(int threads) {
    threads = worthwhile(threads, a_.samples * a_.heads * a_.queries * keys_ * a_.width, kGrain);
    packed_ = scratch<For::keys, T>(a_.samples * a_.heads * head_);
    const int64_t heads = a_.samples * a_.heads, blocks = keys_ / kWide;
    parallel_for(threads, heads * blocks, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) pack(i / blocks, i % blocks * kWide);
    });
    const int64_t parts = ceil_div(a_.queries, kRows);
    parallel_for(threads, heads * parts, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t first = i % parts * kRows;
        attend(i / parts, first, std::min<int64_t>(kRows, a_.queries - first));
      }
    });
  }

 private:
  template <class P = const T>
  P* at(const Attention::Operand& o, int64_t head, int64_t position) const {
    return static_cast<P*>(const_cast<void*>(o.data)) + head / a_.heads * o.sample +
           head % a_.heads * o.head + position * o.position;
  }

  // kWide keys from `first` on as a panel [width][kWide], their values as part of the panels
  // [values / kWide][keys][kWide]; zeros where there are none.
  void pack(int64_t head, int64_t first) const {
    const int64_t count = std::min<int64_t>(kWide, a_.keys - first);
    pack_keys(head, first, count, packed_ + head * head_ + first * a_.width);
    T* to = packed_ + head * head_ + keys_ * a_.width + first * kWide;
    for (int64_t c = 0; c < a_.values; c += kWide, to += keys_ * kWide) {
      const T* from = at(a_.v, head, first) + c;
      const int64_t wide = std::min<int64_t>(kWide, a_.values - c);
      if (count == kWide && wide == kWide)
        pack_values(from, to);
      else
        pack_values(from, to, count, wide);
    }
  }

  void pack_keys(int64_t head, int64_t first, int64_t count, T* to) const {
    constexpr int64_t together = kTogether<T>;
    const T* from[kWide];
    for (int64_t i = 0; i < count; ++i) from[i] = at(a_.k, head, first + i);
    if (count < kWide) std::fill_n(to, a_.width * kWide, T{});
    for (int64_t c = 0; c < a_.width; c += together, to += together * kWide)
      for (int64_t i = 0; i < count; ++i)
        std::memcpy(to + i * together, from[i] + c, sizeof(T) * together);
  }
  void pack_values(const T* from, T* to) const {
    constexpr int64_t together = kTogether<T>;
    for (int64_t i = 0; i < kWide; i += together, to += together * kWide)
      for (int64_t half = 0; half < kWide; half += W) {
        const T* p = from + i * a_.v.position + half;
        if constexpr (together == 1) {
          store(to + half, load(p, Full{}), Full{});
        } else {  // as float32, bfloat16 is its upper half
          const U pair = ((U)load(p, Full{}) >> 16) | (U)load(p + a_.v.position, Full{});
          std::memcpy(to + 2 * half, &pair, sizeof pair);
        }
      }
  }
  // As above, `count` keys and `wide` channels of them.
  void pack_values(const T* from, T* to, int64_t count, int64_t wide) const {
    constexpr int64_t together = kTogether<T>;
    std::fill_n(to, kWide * kWide, T{});
    for (int64_t i = 0; i < count; ++i)
      for (int64_t j = 0; j < wide; ++j)
        to[(i - i % together) * kWide + j * together + i % together] =
            from[i * a_.v.position + j];
  }

  // `rows` queries from `first` on, kRows at most.
  void attend(int64_t head, int64_t first, int64_t rows) const {
    const T* k = packed_ + head * head_;
    const T* v = k + keys_ * a_.width;
    float* logits = scratch<For::results, float>(rows * keys_);  // [rows][keys]
    T* weights = scratch<For::weights, T>(rows * keys_);         // likewise
    const Left<T> q{at(a_.q, head, first), a_.q.position, a_.width, 0, 1};
    for (int64_t block = 0; block < keys_; block += kWide)
      products(q, rows, k + block * a_.width, [&](int64_t at, auto size, const F(*m)[2]) {
        constexpr int R = decltype(size)::value;
#pragma GCC unroll 12
        for (int r = 0; r < R; ++r) {
          store(logits + (at + r) * keys_ + block, m[r][0], Full{});
          store(logits + (at + r) * keys_ + block + W, m[r][1], Full{});
        }
      });
    float inverse[kRows];
    for (int64_t r = 0; r < rows; ++r)
      inverse[r] = softmax(logits + r * keys_, weights + r * keys_);
    const Left<T> left{weights, keys_, keys_, 0, 1};
    for (int64_t c = 0; c < values_; c += kWide, v += keys_ * kWide)
      products(left, rows, v, [&](int64_t at, auto size, const F(*m)[2]) {
        constexpr int R = decltype(size)::value;
#pragma GCC unroll 12
        for (int r = 0; r < R; ++r)
          put(this->at<T>(a_.out, head, first + at + r) + c, a_.values - c, m[r],
              inverse[at + r]);
      });
  }

  // Weights e^(s - max s) of a row of products; returns 1 / their sum.
  float softmax(float* logits, T* weights) const {
    for (int64_t i = a_.keys; i < keys_; ++i) logits[i] = -__builtin_inff();
    F most = load(logits, Full{});
    for (int64_t i = W; i < keys_; i += W) most = max(most, load(logits + i, Full{}));
    float top = most[0];
    for (int i = 1; i < W; ++i) top = std::max(top, most[i]);
    const float scale = a_.scale * 1.44269504f;
    const F level = broadcast(-top * scale), least = broadcast(-126.0f);
    F total = {};
    for (int64_t i = 0; i < keys_; i += W) {
      const F t = fma(load(logits + i, Full{}), broadcast(scale), level);
      const F e = t < least ? F{} : exp2<kHalfPrecision<T>>(max(least, t));
      total = total + e;
      store(weights + i, e, Full{});
    }
    return 1.0f / sum(total);
  }

  static STEPFUSE_INLINE void put(T* out, int64_t count, const F m[2], float factor) {
    const F values[2] = {m[0] * factor, m[1] * factor};
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half, out += W, count -= W) {
      if (count >= W)
        store(out, values[half], Full{});
      else if (count > 0)
        store(out, values[half], Partial{static_cast<int>(count)});
    }
  }

  const Attention& a_;
  const int64_t keys_, values_, head_;  // padded; elements that a head's panels take
  T* packed_ = nullptr;
};

}  // namespace

void attention(const Attention& a, int threads) {
  if (a.samples * a.heads * a.queries * a.keys * a.width * a.values == 0) return;
  if (a.dtype == DType::f32) Heads<float>(a).run(threads);
#if defined(STEPFUSE_AVX512)
  if (a.dtype == DType::bf16) Heads<bfloat16>(a).run(threads);
#endif
}

}  // namespace stepfuse
