// An image as planes, one for each frequency or tap, in which every product of a convolution finds
// its left factor side by side: see convolve.h.
#pragma once

#include "products.h"
#include "vecmath.h"

namespace stepfuse {

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
// kWide floats in the order in which read<T> has them.
template <class T>
inline Channels arranged(const float* p) {
  if constexpr (!kPaired<T>) return read(p);
  float parts[2][W];
  for (int i = 0; i < kWide; ++i) parts[i % 2][i / 2] = p[i];
  return {load(parts[0], Full{}), load(parts[1], Full{})};
}

struct Geometry {
  explicit Geometry(const Convolution& a) {
    switch (a.form) {
      case Form::dense:
        set(1, 1, 1, a.height, a.width, 1);
        break;
      case Form::direct:
        set(1, 9, 9, (a.height - 1) / a.stride + 1, (a.width - 1) / a.stride + 1, 1);
        break;
      case Form::lines:
        set(4, 4, 3, a.height, a.width / 2, 1);
        halo = 2;
        out_width = a.width;
        break;
      case Form::squares:
        set(16, 16, 1, a.height / 2, a.width / 2, 2);
        break;
      case Form::enlarged:
        set(9, 9, 1, a.height, a.width, 2);
        break;
    }
  }
  int64_t frequencies = 1, planes = 1, taps = 1;  // products of a tile; terms a product sums over
  int64_t tile_rows = 0, tiles = 0;               // tiles: in a row
  int64_t halo = 0;                               // rows that taps reach beyond the last
  int64_t out_height = 0, out_width = 0;

 private:
  void set(int64_t f, int64_t p, int64_t t, int64_t rows, int64_t columns, int64_t results) {
    frequencies = f;
    planes = p;
    taps = t;
    tile_rows = rows;
    tiles = columns;
    out_height = rows * results;
    out_width = columns * results;
  }
};

// What is worked on at a time: `rows` rows of tiles from `row` on, of some samples.
struct Part {
  int64_t sample, samples, row, rows;
};

// v = B^T d of F(2, 3)
STEPFUSE_INLINE void winograd(const Channels d[4], Channels v[4]) {
  v[0] = d[0] - d[2];
  v[1] = d[1] + d[2];
  v[2] = d[2] - d[1];
  v[3] = d[1] - d[3];
}
// Of a pixel and its neighbours, each of which stands for two pixels of the enlarged image.
STEPFUSE_INLINE void enlarge(const Channels d[3], Channels v[3]) {
  v[0] = d[0] - d[1];
  v[1] = d[1];
  v[2] = d[2] - d[1];
}

// Part of the images: [planes][samples][rows + halo][tiles][C].
template <class T>
class Planes {
 public:
  Planes(const Convolution& a, const Geometry& g, const Part& p, T* v)
      : a_(a), g_(g), p_(p), v_(v), rows_(p.rows + g.halo), plane_(size(a, g, p)) {}

  // Elements of one plane. Planes a multiple of 4 KB apart would share the sets of a cache.
  static int64_t size(const Convolution& a, const Geometry& g, const Part& p) {
    return p.samples * (p.rows + g.halo) * g.tiles * a.channels +
           kApart / static_cast<int64_t>(sizeof(T));
  }

  Left<T> left(int64_t plane, int64_t n) const {
    const int64_t tap = a_.form == Form::direct ? plane_ : g_.tiles * a_.channels;
    const bool last = plane + 1 == g_.frequencies;
    return {at(plane, n, 0, 0), a_.channels, a_.channels, tap, g_.taps, last ? 0 : plane_};
  }

  // kWide channels from c on of sample n of the part; coefficients [2][C] of its norm, or null.
  void fill(int64_t n, int64_t c, const float* coefficients) const {
    if (coefficients == nullptr) return fill(n, c, [](Channels v) { return v; });
    const Channels slope = arranged<T>(coefficients + c);
    const Channels level = arranged<T>(coefficients + a_.channels + c);
    const auto affine = [&](Channels v) {
      return Channels{fma(v.a, slope.a, level.a), fma(v.b, slope.b, level.b)};
    };
    if (!a_.norm->silu) return fill(n, c, affine);
    fill(n, c, [&](Channels v) {
      v = affine(v);
      return Channels{silu<kHalfPrecision<T>>(v.a), silu<kHalfPrecision<T>>(v.b)};
    });
  }

 private:
  static constexpr int64_t kApart = 320;  // bytes, five cache lines

  T* at(int64_t plane, int64_t n, int64_t r, int64_t j) const {
    return v_ + plane * plane_ + ((n * rows_ + r) * g_.tiles + j) * a_.channels;
  }
  // Rows of the image as floats that the transforms read, four of them in turn; a pixel of zeros
  // at either end.
  int64_t line() const { return (a_.width + 2) * kWide; }
  const float* slot(const float* lines, int64_t y) const { return lines + ((y + 4) & 3) * line(); }

  template <class Norm>
  void fill(int64_t n, int64_t c, const Norm& norm) const {
    const bool other = a_.beside != nullptr && c >= a_.split;
    const int64_t begin = other ? a_.split : 0;
    const int64_t width = (other || a_.beside == nullptr ? a_.channels : a_.split) - begin;
    const T* x = static_cast<const T*>(other ? a_.beside : a_.x) +
                 (p_.sample + n) * a_.height * a_.width * width + c - begin;
    if (a_.form == Form::dense) return dense(n, c, x, width, norm);
    float* lines = scratch<For::lines, float>(4 * line());
    const auto load_row = [&](int64_t y) {
      float* to = lines + ((y + 4) & 3) * line();
      std::memset(to, 0, kWide * sizeof(float));
      std::memset(to + line() - kWide, 0, kWide * sizeof(float));
      if (y < 0 || y >= a_.height)  // zeros beyond the border, after the norm
        return static_cast<void>(std::memset(to, 0, static_cast<size_t>(line()) * sizeof(float)));
      const T* from = x + y * a_.width * width;
      for (int64_t i = 0; i < a_.width; ++i, from += width)
        put(to + (i + 1) * kWide, norm(read(from)));
    };
    switch (a_.form) {
      case Form::direct:
        for (int64_t y = p_.row * a_.stride - 1; y <= (p_.row + p_.rows - 1) * a_.stride + 1; ++y) {
          load_row(y);
          direct(n, c, y, slot(lines, y));
        }
        break;
      case Form::lines:
        for (int64_t r = 0; r < rows_; ++r) {
          load_row(p_.row + r - 1);
          row_of_lines(n, c, r, slot(lines, p_.row + r - 1));
        }
        break;
      case Form::squares:
        for (int64_t r = 0, y = 2 * p_.row - 1; r < p_.rows; ++r) {
          for (const int64_t end = 2 * (p_.row + r) + 2; y <= end; ++y) load_row(y);
          row_of_tiles<4, 2>(n, c, r, 2 * (p_.row + r) - 1, lines, winograd);
        }
        break;
      default:
        for (int64_t r = 0, y = p_.row - 1; r < p_.rows; ++r) {
          for (const int64_t end = p_.row + r + 1; y <= end; ++y) load_row(y);
          row_of_tiles<3, 1>(n, c, r, p_.row + r - 1, lines, enlarge);
        }
    }
  }

  static STEPFUSE_INLINE Channels get(const float* p) {
    return {load(p, Full{}), load(p + W, Full{})};
  }
  static STEPFUSE_INLINE void put(float* p, Channels v) {
    store(p, v.a, Full{});
    store(p + W, v.b, Full{});
  }

  template <class Norm>
  void dense(int64_t n, int64_t c, const T* x, int64_t width, const Norm& norm) const {
    const T* from = x + p_.row * a_.width * width;
    T* to = at(0, n, 0, 0) + c;
    for (int64_t i = p_.rows * g_.tiles; i > 0; --i, from += width, to += a_.channels)
      write(to, norm(read(from)));
  }
  // Row y of the image, wherever a tap of a result meets it.
  void direct(int64_t n, int64_t c, int64_t y, const float* line) const {
    for (int64_t down = 0; down < 3; ++down) {
      const int64_t first = y + 1 - down, row = first / a_.stride - p_.row;
      if (first < 0 || first % a_.stride != 0 || row < 0 || row >= p_.rows) continue;
      for (int64_t across = 0; across < 3; ++across) {
        T* to = at(3 * across + down, n, row, 0) + c;
        const float* from = line + across * kWide;
        for (int64_t j = 0; j < g_.tiles; ++j, to += a_.channels, from += a_.stride * kWide)
          write(to, get(from));
      }
    }
  }
  void row_of_lines(int64_t n, int64_t c, int64_t r, const float* line) const {
    T* to = at(0, n, r, 0) + c;
    for (int64_t j = 0; j < g_.tiles; ++j, to += a_.channels) {
      Channels d[4], v[4];
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) d[i] = get(line + (2 * j + i) * kWide);
      winograd(d, v);
#pragma GCC unroll 4
      for (int f = 0; f < 4; ++f) write(to + f * plane_, v[f]);
    }
  }
  // Tiles of P x P pixels that are `step` apart, the first row of pixels being y.
  template <int P, int step, class Transform>
  STEPFUSE_INLINE void row_of_tiles(int64_t n, int64_t c, int64_t r, int64_t y, const float* lines,
                                    const Transform& transform) const {
    const float* from[P];
    for (int i = 0; i < P; ++i) from[i] = slot(lines, y + i);
    T* to = at(0, n, r, 0) + c;
    for (int64_t j = 0; j < g_.tiles; ++j, to += a_.channels) {
      Channels half[P][P];  // [y][frequency across]
#pragma GCC unroll 4
      for (int i = 0; i < P; ++i) {
        Channels d[P];
#pragma GCC unroll 4
        for (int x = 0; x < P; ++x) d[x] = get(from[i] + (step * j + x) * kWide);
        transform(d, half[i]);
      }
#pragma GCC unroll 4
      for (int across = 0; across < P; ++across) {
        Channels d[P], v[P];
#pragma GCC unroll 4
        for (int i = 0; i < P; ++i) d[i] = half[i][across];
        transform(d, v);
#pragma GCC unroll 4
        for (int down = 0; down < P; ++down) write(to + (P * across + down) * plane_, v[down]);
      }
    }
  }

  const Convolution& a_;
  const Geometry& g_;
  const Part p_;
  T* v_;
  int64_t rows_, plane_;
};

}  // namespace stepfuse
