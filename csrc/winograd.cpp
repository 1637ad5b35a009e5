#include "winograd.h"

#include <cstdlib>
#include <memory>
#include <new>

#include "parallel.h"

namespace stepfuse {

namespace {

constexpr int kWide = kWinogradWide;
constexpr int kRows = W == 4 ? 4 : W == 8 ? 6 : 12;  // positions that share the registers of a product
constexpr int64_t kPair = 2 * kWide;                 // the two results of an axis
constexpr int64_t kScratch = 640 << 10;  // bytes of transformed image that stay in the L2 cache
constexpr int64_t kPositions = 96;       // enough to pay for reading the filters
constexpr int64_t kShares = 8;           // of the filters at most: each transforms the image anew
constexpr int64_t kApart = 320;          // bytes, five cache lines: see Image::plane

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// kWide channels in two vectors: of bfloat16 the even and the odd ones, else the halves.
struct Channels {
  F a, b;
};
STEPFUSE_INLINE Channels operator+(Channels x, Channels y) { return {x.a + y.a, x.b + y.b}; }
STEPFUSE_INLINE Channels operator-(Channels x, Channels y) { return {x.a - y.a, x.b - y.b}; }

template <class T>
STEPFUSE_INLINE Channels read(const T* p) {
  Channels v;
  if constexpr (kPaired<T>) {
    load_pair(p, v.a, v.b);
  } else {
    v = {load(p, Full{}), load(p + W, Full{})};
  }
  return v;
}
template <class T>
STEPFUSE_INLINE void write(T* p, Channels v) {
  if constexpr (kPaired<T>) {
    store_pair(p, v.a, v.b);
  } else {
    store(p, v.a, Full{});
    store(p + W, v.b, Full{});
  }
}

// What one thread works on at a time: `rows` rows of tiles from `row` on, of some samples, and the
// channels of the result from `begin` to `end`.
struct Part {
  int64_t sample, samples, row, rows, begin, end;
};

struct Sizes {
  explicit Sizes(const Winograd& a)
      : frequencies(a.square ? 16 : 4),
        taps(a.square ? 1 : 3),
        tile_rows(a.square ? a.height / 2 : a.height),
        tiles(a.width / 2) {}
  int64_t frequencies, taps;  // products of a tile; rows of the image that each of them sums over
  int64_t tile_rows, tiles;   // tiles: in a row
};

// v = B^T d
STEPFUSE_INLINE void transform(const Channels d[4], Channels v[4]) {
  v[0] = d[0] - d[2];
  v[1] = d[1] + d[2];
  v[2] = d[2] - d[1];
  v[3] = d[1] - d[3];
}

// Part of the images as frequencies: [frequencies][samples][rows + taps - 1][tiles][C].
template <class T>
class Image {
 public:
  Image(const Winograd& a, const Sizes& s, const Part& p, T* v)
      : a_(a), s_(s), p_(p), v_(v), rows_(p.rows + s.taps - 1), plane_(plane(a, s, p)) {}

  // Elements of one frequency. Planes a multiple of 4 KB apart would share the sets of a cache.
  static int64_t plane(const Winograd& a, const Sizes& s, const Part& p) {
    return p.samples * (p.rows + s.taps - 1) * s.tiles * a.channels +
           kApart / static_cast<int64_t>(sizeof(T));
  }
  T* at(int64_t f, int64_t n) const { return v_ + f * plane_ + n * rows_ * s_.tiles * a_.channels; }

  void fill() const {
    for (int64_t n = 0; n < p_.samples; ++n)
      for (int64_t r = 0; r < rows_; ++r)
        for (int64_t j = 0; j < s_.tiles; ++j) a_.square ? square(n, r, j) : line(n, r, j);
  }

 private:
  // Pixel (y, x) of a sample, null beyond the border.
  const T* pixel(int64_t n, int64_t y, int64_t x) const {
    if (y < 0 || y >= a_.height || x < 0 || x >= a_.width) return nullptr;
    return static_cast<const T*>(a_.x) +
           (((p_.sample + n) * a_.height + y) * a_.width + x) * a_.channels;
  }
  T* target(int64_t f, int64_t n, int64_t r, int64_t j) const {
    return at(f, n) + (r * s_.tiles + j) * a_.channels;
  }
  void line(int64_t n, int64_t r, int64_t j) const {
    const T* from[4];
    T* to[4];
    for (int i = 0; i < 4; ++i) from[i] = pixel(n, p_.row + r - 1, 2 * j - 1 + i);
    for (int f = 0; f < 4; ++f) to[f] = target(f, n, r, j);
    for (int64_t c = 0; c < a_.channels; c += kWide) {
      Channels d[4], v[4];
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) d[i] = from[i] ? read(from[i] + c) : Channels{};
      transform(d, v);
#pragma GCC unroll 4
      for (int f = 0; f < 4; ++f) write(to[f] + c, v[f]);
    }
  }
  void square(int64_t n, int64_t r, int64_t j) const {
    const T* from[4][4];
    T* to[16];
    for (int y = 0; y < 4; ++y)
      for (int x = 0; x < 4; ++x) from[y][x] = pixel(n, 2 * (p_.row + r) - 1 + y, 2 * j - 1 + x);
    for (int f = 0; f < 16; ++f) to[f] = target(f, n, r, j);
    for (int64_t c = 0; c < a_.channels; c += kWide) {
      Channels half[4][4];  // [y][frequency across]
#pragma GCC unroll 4
      for (int y = 0; y < 4; ++y) {
        Channels d[4];
#pragma GCC unroll 4
        for (int x = 0; x < 4; ++x) d[x] = from[y][x] ? read(from[y][x] + c) : Channels{};
        transform(d, half[y]);
      }
#pragma GCC unroll 4
      for (int across = 0; across < 4; ++across) {
        const Channels d[4] = {half[0][across], half[1][across], half[2][across], half[3][across]};
        Channels v[4];
        transform(d, v);
#pragma GCC unroll 4
        for (int down = 0; down < 4; ++down) write(to[4 * across + down] + c, v[down]);
      }
    }
  }

  const Winograd& a_;
  const Sizes& s_;
  const Part p_;
  T* v_;
  int64_t rows_, plane_;
};

// m[r] += v[r] u for one channel, or for a pair of channels in bfloat16; v + r `step` elements.
template <class T>
constexpr int64_t kTogether = kPaired<T> ? 2 : 1;
STEPFUSE_INLINE void accumulate(const float* v, F u[2], F m[2]) {
  const F one = broadcast(*v);
  m[0] = fma(one, u[0], m[0]);
  m[1] = fma(one, u[1], m[1]);
}
#if defined(STEPFUSE_AVX512)
STEPFUSE_INLINE void accumulate(const bfloat16* v, F u[2], F m[2]) {
  int32_t pair;
  std::memcpy(&pair, v, sizeof pair);
  const __m512bh both = (__m512bh)_mm512_set1_epi32(pair);
  m[0] = _mm512_dpbf16_ps(m[0], both, (__m512bh)u[0]);
  m[1] = _mm512_dpbf16_ps(m[1], both, (__m512bh)u[1]);
}
#endif

// m[r] = sum over taps and channels of v[r] u: R positions, kWide channels of the result.
// v: positions `channels` elements apart, taps `tap` apart; u: [taps][channels][kWide].
template <int R, class T>
STEPFUSE_INLINE void multiply(const T* v, int64_t channels, int64_t tap, int64_t taps, const T* u,
                              F m[R][2]) {
#pragma GCC unroll 12
  for (int r = 0; r < R; ++r) m[r][0] = m[r][1] = F{};
  for (int64_t t = 0; t < taps; ++t, v += tap) {
    const T* from[(R + 2) / 3];  // every third position: three fit one address and two offsets
#pragma GCC unroll 4
    for (int q = 0; q < (R + 2) / 3; ++q) from[q] = v + 3 * q * channels;
    for (int64_t c = 0; c < channels; c += kTogether<T>, u += kTogether<T> * kWide) {
      F both[2];
      std::memcpy(both, u, sizeof both);
#pragma GCC unroll 12
      for (int r = 0; r < R; ++r) accumulate(from[r / 3] + (r % 3) * channels + c, both, m[r]);
    }
  }
}

// The products m[a] of one axis become its pair of results, y = A^T m, one after the other:
//
//     a        0         1                 2                  3
//     y[0]     m0        + m1              + m2
//     y[1]               m1                - m2               - m3
template <int R>
STEPFUSE_INLINE void combine(int a, const F m[R][2], float* y) {
#pragma GCC unroll 12
  for (int r = 0; r < R; ++r, y += kPair)
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
      float *first = y + half * W, *second = first + kWide;
      const F v = m[r][half];
      if (a == 0) store(first, v, Full{});
      if (a == 1 || a == 2) store(first, load(first, Full{}) + v, Full{});
      if (a == 1) store(second, v, Full{});
      if (a >= 2) store(second, load(second, Full{}) - v, Full{});
    }
}

// The product at frequency a of an axis, at R positions, into their pairs y [R][2][kWide].
template <int R, class T>
void product(const Sizes& s, int64_t a, const T* v, int64_t channels, const T* u, float* y) {
  F m[R][2];
  multiply<R>(v, channels, s.tiles * channels, s.taps, u, m);
  if (a == 0) combine<R>(0, m, y);
  if (a == 1) combine<R>(1, m, y);
  if (a == 2) combine<R>(2, m, y);
  if (a == 3) combine<R>(3, m, y);
}

// All positions, as many at a time as there are registers for.
template <int R = kRows, class T>
void products(const Sizes& s, int64_t a, int64_t count, const T* v, int64_t channels, const T* u,
              float* y) {
  for (; count >= R; count -= R, v += R * channels, y += R * kPair)
    product<R>(s, a, v, channels, u, y);
  if constexpr (R > 1) {
    if (count > 0) products<R - 1>(s, a, count, v, channels, u, y);
  }
}

// kWide channels of a pixel: bias and residual are added, then the sum is rounded, once.
template <class T>
STEPFUSE_INLINE void put(const Winograd& a, int64_t at, int64_t k, F first, F second) {
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

// Pairs [axes][positions][2][kWide] of a sample to pixels; across, four axes become a pair again.
template <class T>
void finish(const Winograd& a, const Sizes& s, const Part& p, int64_t n, int64_t k, const float* y,
            int64_t axis) {
  const auto at = [&](int64_t row, int64_t column) {
    return (((p.sample + n) * a.height + row) * a.width + column) * a.filters + k;
  };
  for (int64_t r = 0; r < p.rows; ++r)
    for (int64_t j = 0; j < s.tiles; ++j, y += kPair)
      for (int64_t o = 0; o < 2; ++o) {
        const float* m = y + o * kWide;
        if (!a.square) {
          put<T>(a, at(p.row + r, 2 * j + o), k, load(m, Full{}), load(m + W, Full{}));
          continue;
        }
        F left[2], right[2];
#pragma GCC unroll 2
        for (int half = 0; half < 2; ++half, m += W) {
          const F m0 = load(m, Full{}), m1 = load(m + axis, Full{});
          const F m2 = load(m + 2 * axis, Full{}), m3 = load(m + 3 * axis, Full{});
          left[half] = m0 + m1 + m2;
          right[half] = m1 - m2 - m3;
        }
        const int64_t row = 2 * (p.row + r) + o;
        put<T>(a, at(row, 2 * j), k, left[0], left[1]);
        put<T>(a, at(row, 2 * j + 1), k, right[0], right[1]);
      }
}

// Memory of a thread that lives as long as the thread: fresh pages cost more than a transform.
enum class For { image, results };
template <For, class T>
T* scratch(int64_t count) {
  struct Freed {
    void operator()(void* p) const { std::free(p); }
  };
  thread_local std::unique_ptr<T, Freed> held;
  thread_local int64_t size = 0;
  if (count > size) {
    size = 0;
    const size_t bytes = static_cast<size_t>(ceil_div(count * sizeof(T), 64)) * 64;
    held.reset(static_cast<T*>(std::aligned_alloc(64, bytes)));
    if (!held) throw std::bad_alloc();
    size = count;
  }
  return held.get();
}

template <class T>
void compute(const Winograd& a, const Sizes& s, const Part& p) {
  const Image<T> image(a, s, p, scratch<For::image, T>(s.frequencies * Image<T>::plane(a, s, p)));
  image.fill();
  const int64_t each = p.rows * s.tiles, axes = s.frequencies / 4;
  const int64_t axis = p.samples * each * kPair;  // y: [axes][samples][positions][2][kWide]
  float* y = scratch<For::results, float>(axes * axis);
  const T* u = static_cast<const T*>(a.u) + p.begin * s.frequencies * s.taps * a.channels;
  for (int64_t k = p.begin; k < p.end; k += kWide) {
    for (int64_t f = 0; f < s.frequencies; ++f, u += s.taps * a.channels * kWide)
      for (int64_t n = 0; n < p.samples; ++n)
        products(s, f % 4, each, image.at(f, n), a.channels, u,
                 y + f / 4 * axis + n * each * kPair);
    for (int64_t n = 0; n < p.samples; ++n) finish<T>(a, s, p, n, k, y + n * each * kPair, axis);
  }
}

template <class T>
void run(const Winograd& a, int threads) {
  const Sizes s(a);
  // As many rows of tiles as the cache holds; where one sample is too little, several ...
  int64_t rows = s.tile_rows;
  const auto bytes = [&](int64_t r) {
    return s.frequencies * Image<T>::plane(a, s, {0, 1, 0, r, 0, 0}) *
           static_cast<int64_t>(sizeof(T));
  };
  while (rows > 4 && bytes(rows) > kScratch) rows = ceil_div(rows, 2);
  const int64_t strips = ceil_div(s.tile_rows, rows);
  int64_t group = 1;
  if (strips == 1)
    group = std::max<int64_t>(1, std::min(kPositions / (rows * s.tiles), a.samples / threads));
  const int64_t images = ceil_div(a.samples, group) * strips;
  // ... and as many shares of the filters as give every thread the same.
  const int64_t blocks = a.filters / kWide;
  int64_t shares = 1;
  while (shares < kShares && (images * shares % threads != 0 || blocks % shares != 0)) ++shares;
  if (images * shares % threads != 0 || blocks % shares != 0) shares = 1;
  parallel_for(threads, images * shares, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t image = i / shares, share = i % shares * (a.filters / shares);
      const int64_t sample = image / strips * group, row = image % strips * rows;
      compute<T>(a, s,
                 {sample, std::min(group, a.samples - sample), row,
                  std::min(rows, s.tile_rows - row), share, share + a.filters / shares});
    }
  });
}

}  // namespace

void winograd(const Winograd& a, int threads) {
  if (a.dtype == DType::f32) run<float>(a, threads);
#if defined(STEPFUSE_AVX512)
  if (a.dtype == DType::bf16) run<bfloat16>(a, threads);
#endif
}

}  // namespace stepfuse
