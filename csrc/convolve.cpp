#include "convolve.h"

#include "group_norm_layouts.h"
#include "filters.h"

namespace stepfuse {

namespace {

constexpr int64_t kPair = 2 * kWide;     // the two results of an axis
constexpr int64_t kScratch = 640 << 10;  // bytes of planes that stay in the L2 cache
constexpr int64_t kPositions = 96;       // enough to pay for reading the filters
constexpr int64_t kNormGrain = 16384;    // elements a thread must have to be worth waking
constexpr int64_t kGrain = 1 << 18;      // likewise, products

// The products m of one axis become its pair of results, one after the other:
//
//     F(2, 3)   first   second            nearest2x   first   second
//     m0        set                       m0          set
//     m1        plus    set               m1          plus    set
//     m2        plus    minus             m2                  plus
//     m3                minus
enum class Put { none, set, plus, minus };
template <Put put>
STEPFUSE_INLINE void collect(float* y, F v) {
  if constexpr (put == Put::set) store(y, v, Full{});
  if constexpr (put == Put::plus) store(y, load(y, Full{}) + v, Full{});
  if constexpr (put == Put::minus) store(y, load(y, Full{}) - v, Full{});
}
template <Put first, Put second, int R>
STEPFUSE_INLINE void combine(const F m[R][2], float* y) {
#pragma GCC unroll 12
  for (int r = 0; r < R; ++r, y += kPair)
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
      collect<first>(y + half * W, m[r][half]);
      collect<second>(y + kWide + half * W, m[r][half]);
    }
}
template <int R>
STEPFUSE_INLINE void combine(int64_t frequency, int64_t last, const F m[R][2], float* y) {
  if (frequency == 0) return combine<Put::set, Put::none, R>(m, y);
  if (frequency == 1) return combine<Put::plus, Put::set, R>(m, y);
  if (frequency == 3) return combine<Put::none, Put::minus, R>(m, y);
  if (last == 2) return combine<Put::none, Put::plus, R>(m, y);
  combine<Put::plus, Put::minus, R>(m, y);
}

// kWide channels of a pixel: bias and residual are added, then the sum is rounded, once.
template <class T>
STEPFUSE_INLINE void put(const Convolution& a, int64_t at, int64_t k, F first, F second) {
  if (a.bias != nullptr) {
    first += load(a.bias + k, Full{});
    second += load(a.bias + k + W, Full{});
  }
  if (a.residual != nullptr) {
    const T* residual = static_cast<const T*>(a.residual) + at;
    first += load(residual, Full{});
    second += load(residual + W, Full{});
  }
  T* out = static_cast<T*>(a.out) + at;
  store(out, first, Full{});
  store(out + W, second, Full{});
}

template <class T>
class Work {
 public:
  explicit Work(const Convolution& a) : a_(a), g_(a) {
    rows_ = g_.tile_rows;
    while (rows_ > 2 && bytes(rows_) > kScratch) rows_ = ceil_div(rows_, 2);
    strips_ = ceil_div(g_.tile_rows, rows_);
  }

  void run(int threads) {
    coefficients(threads);
    const int64_t results = a_.samples * g_.out_height * g_.out_width * a_.filters;
    threads = worthwhile(threads, results * a_.channels * (a_.form == Form::dense ? 1 : 4), kGrain);
    // As many rows of tiles as the cache holds; where one sample is too little, several.
    int64_t group = 1;
    if (strips_ == 1) {
      group = std::min(kPositions / std::max<int64_t>(1, rows_ * g_.tiles), a_.samples / threads);
      group = std::max<int64_t>(1, group);
    }
    const int64_t parts = ceil_div(a_.samples, group) * strips_, whole = parts - parts % threads;
    const auto part = [&](int64_t i) {
      const int64_t sample = i / strips_ * group, row = i % strips_ * rows_;
      return Part{sample, std::min(group, a_.samples - sample), row,
                  std::min(rows_, g_.tile_rows - row)};
    };
    parallel_for(threads, whole, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) alone(part(i));
    });
    for (int64_t i = whole; i < parts; ++i) together(part(i), threads);
  }

 private:
  // Whether the images are left factors as they lie: two of the same width are two terms of a sum.
  bool in_place() const {
    const bool alike = a_.beside == nullptr || 2 * a_.split == a_.channels;
    return a_.form == Form::dense && a_.norm == nullptr && alike;
  }
  int64_t blocks() const { return a_.filters / kWide; }
  int64_t bytes(int64_t rows) const {
    return g_.planes * Planes<T>::size(a_, g_, {0, 1, 0, rows}) * static_cast<int64_t>(sizeof(T));
  }
  T* space(const Part& p) const {
    if (in_place()) return nullptr;
    return scratch<For::planes, T>(g_.planes * Planes<T>::size(a_, g_, p));
  }

  // [N, 2, C]: what the norm multiplies by and adds.
  void coefficients(int threads) {
    if (a_.norm == nullptr) return;
    const GroupNorm& norm = *a_.norm;
    float* all = scratch<For::coefficients, float>(2 * a_.samples * a_.channels);
    coefficients_ = all;
    threads = worthwhile(threads, norm.samples * norm.channels * norm.spatial, kNormGrain);
    for_statistics<LastUnit<T>>(norm, threads, [&](const LastUnit<T>& unit) {
      const auto& state = unit.state();
      std::copy(state.coefficients.begin(), state.coefficients.end(),
                all + 2 * state.sample * a_.channels);
    });
  }
  const float* coefficients_of(int64_t sample) const {
    return coefficients_ == nullptr ? nullptr : coefficients_ + 2 * sample * a_.channels;
  }

  void alone(const Part& p) const {
    const Planes<T> planes(a_, g_, p, space(p));
    if (!in_place())
      for (int64_t n = 0; n < p.samples; ++n)
        for (int64_t c = 0; c < a_.channels; c += kWide)
          planes.fill(n, c, coefficients_of(p.sample + n));
    multiply_all(planes, p, 0, p.rows, 0, blocks());
  }

  // All threads: first they share the channels of the image, then those of the result.
  void together(const Part& p, int threads) const {
    const Planes<T> planes(a_, g_, p, space(p));
    const int64_t columns = a_.channels / kWide;
    if (!in_place())
      parallel_for(threads, p.samples * columns, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i)
          planes.fill(i / columns, i % columns * kWide, coefficients_of(p.sample + i / columns));
      });
    int64_t strips = 1;  // until every thread gets the same
    while (strips < std::min<int64_t>(threads, p.rows) && blocks() * strips % threads != 0)
      ++strips;
    parallel_for(threads, blocks() * strips, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end;) {
        const int64_t strip = i / blocks(), first = i % blocks();
        const int64_t last = std::min(blocks(), first + end - i);
        multiply_all(planes, p, p.rows * strip / strips, p.rows * (strip + 1) / strips, first,
                     last);
        i += last - first;
      }
    });
  }

  Left<T> left(const Planes<T>& planes, const Part& p, int64_t plane, int64_t n,
               int64_t row) const {
    if (!in_place()) return planes.left(plane, n).from(row * g_.tiles);
    const int64_t position = ((p.sample + n) * g_.tile_rows + p.row + row) * g_.tiles;
    const T* x = static_cast<const T*>(a_.x);
    if (a_.beside == nullptr)
      return {x + position * a_.channels, a_.channels, a_.channels, 0, 1, kRows * a_.channels};
    const int64_t apart = static_cast<const T*>(a_.beside) - x;
    return {x + position * a_.split, a_.split, a_.split, apart, 2, kRows * a_.split};
  }

  // Rows begin .. end - 1 of the part, blocks first .. last - 1 of the result's channels.
  void multiply_all(const Planes<T>& planes, const Part& p, int64_t begin, int64_t end,
                    int64_t first, int64_t last) const {
    const int64_t each = (end - begin) * g_.tiles, frequencies = g_.frequencies;
    // samples follow one another where a part has all rows and taps reach no further
    const bool joined = g_.halo == 0 && end - begin == (in_place() ? g_.tile_rows : p.rows);
    const int64_t runs = joined ? 1 : p.samples, count = joined ? p.samples * each : each;
    const int64_t axes = across();
    const int64_t axis = p.samples * each * kPair;  // y: [axes][samples][positions][2][kWide]
    float* y = frequencies == 1 ? nullptr : scratch<For::results, float>(axes * axis);
    const int64_t down = frequencies / axes, panel = left(planes, p, 0, 0, 0).panel();
    Panels<T> panels(a_, g_, panel);
    for (int64_t block = first; block < last; ++block) {
      const int64_t k = block * kWide;
      for (int64_t f = 0; f < frequencies; ++f) {
        const T* u = panels.panel(block, f);
        for (int64_t n = 0; n < runs; ++n) {
          Left<T> v = left(planes, p, f, n, begin);
          if (block > first) v.lead = 0;  // the first has brought it into the cache
          if (frequencies == 1) {
            plain(p, n, begin, v, count, u, panels.next(block, f), k);
          } else {
            float* to = y + f / down * axis + n * count * kPair;
            const T* next = n == 0 ? panels.next(block, f) : u;
            products(v, count, u, next, [&](int64_t at, auto size, const F(*m)[2]) {
              combine<decltype(size)::value>(f % down, down - 1, m, to + at * kPair);
            });
          }
        }
      }
      if (frequencies > 1)
        for (int64_t n = 0; n < p.samples; ++n)
          finish(p, n, begin, end, k, y + n * each * kPair, axes, axis);
    }
  }
  // Frequencies across; down, those of lines are all there are.
  int64_t across() const { return g_.frequencies == 16 ? 4 : g_.frequencies == 9 ? 3 : 1; }

  // One product is one result.
  void plain(const Part& p, int64_t n, int64_t row, const Left<T>& v, int64_t count, const T* u,
             const T* next, int64_t k) const {
    const int64_t first = ((p.sample + n) * g_.out_height + p.row + row) * g_.out_width;
    products(v, count, u, next, [&](int64_t at, auto size, const F(*m)[2]) {
      constexpr int R = decltype(size)::value;
#pragma GCC unroll 12
      for (int r = 0; r < R; ++r)
        put<T>(a_, (first + at + r) * a_.filters + k, k, m[r][0], m[r][1]);
    });
  }

  // Pairs of a sample to pixels; across, the axes become a pair again.
  void finish(const Part& p, int64_t n, int64_t begin, int64_t end, int64_t k, const float* y,
              int64_t axes, int64_t axis) const {
    const int64_t results = axes == 1 ? 1 : 2;
    const auto pixel = [&](int64_t row, int64_t column) {
      return (((p.sample + n) * g_.out_height + row) * g_.out_width + column) * a_.filters + k;
    };
    for (int64_t r = p.row + begin; r < p.row + end; ++r)
      for (int64_t j = 0; j < g_.tiles; ++j, y += kPair)
        for (int64_t o = 0; o < 2; ++o) {
          const float* m = y + o * kWide;
          if (axes == 1) {
            put<T>(a_, pixel(r, 2 * j + o), k, load(m, Full{}), load(m + W, Full{}));
            continue;
          }
          F left[2], right[2];
#pragma GCC unroll 2
          for (int half = 0; half < 2; ++half, m += W) {
            const F m0 = load(m, Full{}), m1 = load(m + axis, Full{});
            const F m2 = load(m + 2 * axis, Full{});
            if (axes == 3) {
              left[half] = m0 + m1;
              right[half] = m1 + m2;
            } else {
              left[half] = m0 + m1 + m2;
              right[half] = m1 - m2 - load(m + 3 * axis, Full{});
            }
          }
          put<T>(a_, pixel(results * r + o, 2 * j), k, left[0], left[1]);
          put<T>(a_, pixel(results * r + o, 2 * j + 1), k, right[0], right[1]);
        }
  }

  const Convolution& a_;
  const Geometry g_;
  int64_t rows_, strips_;
  const float* coefficients_ = nullptr;
};

}  // namespace

void convolve(const Convolution& a, int threads) {
  if (a.samples * a.height * a.width * a.channels * a.filters == 0) return;
  if (a.dtype == DType::f32) Work<float>(a).run(threads);
#if defined(STEPFUSE_AVX512)
  if (a.dtype == DType::bf16) Work<bfloat16>(a).run(threads);
#endif
}

}  // namespace stepfuse
