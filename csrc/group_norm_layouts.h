// The units of group_norm_silu in both memory layouts: see group_norm.h.
#pragma once

#include "group_norm.h"

namespace stepfuse {

// What both layouts keep of a unit of `width` channels.
template <class T>
struct UnitState {
  const GroupNorm& a;
  const int64_t width, groups, group_width;  // channels, groups of the unit; channels of a group
  const double per_element;                  // 1 / (elements of a group)
  int64_t pieces, sample = 0, channel = 0, offset = 0;  // offset: elements before the unit
  std::vector<float> space, coefficients, partials;
  std::vector<Statistics> statistics;
  Modulation modulation;

  UnitState(const GroupNorm& arguments, int64_t unit_width, int64_t unit_pieces, int64_t sums)
      : a(arguments),
        width(unit_width),
        groups(unit_width * a.groups / a.channels),
        group_width(a.channels / a.groups),
        per_element(1.0 / static_cast<double>(group_width * a.spatial)),
        pieces(unit_pieces),
        space(static_cast<size_t>(5 * width)),
        coefficients(static_cast<size_t>(2 * width)),
        partials(static_cast<size_t>(sums)),
        statistics(static_cast<size_t>(groups)) {}

  void begin(int64_t n, int64_t first_channel, int64_t first_element) {
    sample = n;
    channel = first_channel;
    offset = first_element;
    modulation.set(a, n, channel, width, space.data());
  }
  const T* x() const { return static_cast<const T*>(a.x) + offset; }

  void set(int64_t group, double K, double sum, double squares) {
    Statistics& s = statistics[static_cast<size_t>(group)];
    s = Statistics::of(K, sum, squares, per_element, static_cast<double>(a.eps));
    affine(s, modulation, group * group_width, group_width, coefficients.data(),
           coefficients.data() + width);
  }
};

// One group of a channels-first tensor: [C/G, S], contiguous.
template <class T>
class FirstUnit {
 public:
  explicit FirstUnit(const GroupNorm& a)
      : size_(a.channels / a.groups * a.spatial),
        state_(a, a.channels / a.groups, (size_ + kPiece - 1) / kPiece,
               2 * ((size_ - 1) / kPiece + 1)) {
    int64_t elements = 0;
    for (int64_t k = 0; k < 4; ++k) {
      const int64_t at = k * size_ / 4, channel = at / a.spatial;
      runs_[k] = {at, channel, std::min<int64_t>(W, (channel + 1) * a.spatial - at)};
      elements += runs_[k].count;
    }
    per_element_ = 1.0f / static_cast<float>(elements);
  }

  static int64_t units(const GroupNorm& a) { return a.samples * a.groups; }
  int64_t pieces() const { return state_.pieces; }
  // The next group follows in memory: elements from here to its counterpart.
  int64_t ahead() const { return size_; }
  const UnitState<T>& state() const { return state_; }

  void begin(int64_t unit) {
    const int64_t n = unit / state_.a.groups, group = unit - n * state_.a.groups;
    state_.begin(n, group * state_.width, unit * size_);
    K_ = estimate();
  }

  void moments(int64_t piece) {
    F first[4] = {}, second[4] = {};  // four of each, so that additions overlap
    const float* add = state_.modulation.add;
    if (add == nullptr)
      sum_run(state_.x() + piece * kPiece, std::min(kPiece, size_ - piece * kPiece), K_, first,
              second);
    else
      for_rows(piece, [&](int64_t c, int64_t at, int64_t count) {
        sum_run(state_.x() + at, count, K_ - add[c], first, second);
      });
    float* partial = state_.partials.data() + 2 * piece;
    partial[0] = sum((first[0] + first[1]) + (first[2] + first[3]));
    partial[1] = sum((second[0] + second[1]) + (second[2] + second[3]));
  }

  void finish() {
    double total = 0.0, squares = 0.0;
    for (size_t i = 0; i < state_.partials.size(); i += 2) {
      total += static_cast<double>(state_.partials[i]);
      squares += static_cast<double>(state_.partials[i + 1]);
    }
    state_.set(0, static_cast<double>(K_), total, squares);
  }

  // f(offset, c, lanes) for the vectors of a piece, where c[k] holds coefficient k of [K, width];
  // `paired` says that f takes Paired lanes.
  template <int K, bool paired = false, class Function>
  void for_vectors(int64_t piece, const float* coefficients, const Function& f) const {
    for_rows(piece, [&](int64_t channel, int64_t at, int64_t count) {
      F c[K];
      for (int k = 0; k < K; ++k) c[k] = broadcast(coefficients[k * state_.width + channel]);
      each_vector<paired>(state_.offset + at, state_.offset + at + count,
                          [&](int64_t i, auto lanes) { f(i, c, lanes); });
    });
  }

  // sums[k * width + channel] = the sums over the spatial elements of what f(offset, c, lanes, s)
  // adds to s[k]; c as in for_vectors.
  template <int K, int Sums, class Function>
  void channel_sums(const float* coefficients, double* sums, const Function& f) const {
    for (int64_t channel = 0; channel < state_.width; ++channel) {
      F c[K], s[Sums] = {};
      for (int k = 0; k < K; ++k) c[k] = broadcast(coefficients[k * state_.width + channel]);
      const int64_t at = state_.offset + channel * state_.a.spatial;
      each_vector(at, at + state_.a.spatial, [&](int64_t i, auto lanes) { f(i, c, lanes, s); });
      for (int k = 0; k < Sums; ++k)
        sums[k * state_.width + channel] = static_cast<double>(sum(s[k]));
    }
  }

 private:
  static constexpr int64_t kPiece = 4096;

  static void sum_run(const T* x, int64_t count, float shift, F (&first)[4], F (&second)[4]) {
    const F K = broadcast(shift);
    const auto term = [&](int k, F d) {
      first[k] = first[k] + d;
      second[k] = fma(d, d, second[k]);
    };
    int64_t i = 0;
    for (; i + 4 * W <= count; i += 4 * W) {
      if constexpr (kPaired<T>) {
        F v[4];
        load_pair(x + i, v[0], v[1]);
        load_pair(x + i + 2 * W, v[2], v[3]);
#pragma GCC unroll 4
        for (int k = 0; k < 4; ++k) term(k, v[k] - K);
      } else {
#pragma GCC unroll 4
        for (int k = 0; k < 4; ++k) term(k, load(x + i + k * W, Full{}) - K);
      }
    }
    each_vector(i, count,
                [&](int64_t at, auto lanes) { term(0, keep(load(x + at, lanes) - K, lanes)); });
  }

  // f(channel, offset in the unit, count) for the runs of one channel that a piece holds.
  template <class Function>
  void for_rows(int64_t piece, const Function& f) const {
    const int64_t spatial = state_.a.spatial, end = std::min(size_, (piece + 1) * kPiece);
    int64_t at = piece * kPiece;
    for (int64_t c = at == 0 ? 0 : at / spatial; at < end; ++c) {
      const int64_t count = std::min(end, (c + 1) * spatial) - at;
      f(c, at, count);
      at += count;
    }
  }

  // The mean of four runs of up to W elements.
  float estimate() const {
    F total = {};
    float added = 0.0f;
    for (const Run& run : runs_) {
      each_vector(run.at, run.at + run.count, [&](int64_t i, auto lanes) {
        total = total + keep(load(state_.x() + i, lanes), lanes);
      });
      added += static_cast<float>(run.count) * state_.modulation.added(run.channel);
    }
    return (sum(total) + added) * per_element_;
  }

  // Elements of one channel that are looked at before the sums: the same ones in every group.
  struct Run {
    int64_t at, channel, count;
  };

  int64_t size_;
  UnitState<T> state_;
  Run runs_[4];
  float per_element_;  // 1 / (elements of the runs)
  float K_ = 0.0f;
};

// One sample of a channels-last tensor: [S, C].
template <class T>
class LastUnit {
 public:
  explicit LastUnit(const GroupNorm& a)
      : state_(a, a.channels, piece_count(a), 2 * a.channels * piece_count(a)),
        pixels_((a.spatial + state_.pieces - 1) / state_.pieces),
        shifts_(static_cast<size_t>(2 * a.channels)),
        totals_(static_cast<size_t>(2 * a.channels)) {
    state_.pieces = (a.spatial + pixels_ - 1) / pixels_;
  }

  static int64_t units(const GroupNorm& a) { return a.samples; }
  int64_t pieces() const { return state_.pieces; }
  // The next sample is too far ahead for the cache.
  static constexpr int64_t ahead() { return 0; }
  const UnitState<T>& state() const { return state_; }

  void begin(int64_t unit) {
    state_.begin(unit, 0, unit * state_.a.spatial * state_.width);
    estimate();
  }

  void moments(int64_t piece) {
    const int64_t C = state_.width, first = piece * pixels_;
    const int64_t count = std::min(pixels_, state_.a.spatial - first);
    float* sums = state_.partials.data() + 2 * C * piece;
    std::fill_n(sums, 2 * C, 0.0f);
    for_images([&](Image image) {
      image.x += first * image.width();
      int64_t pixel = 0;
      for (; pixel + kRows <= count; pixel += kRows, image.x += kRows * image.width())
        add_rows<kRows>(image, sums);
      for (; pixel < count; ++pixel, image.x += image.width()) add_rows<1>(image, sums);
    });
  }

  void finish() {
    const int64_t C = state_.width;
    std::fill(totals_.begin(), totals_.end(), 0.0);
    for (int64_t piece = 0; piece < state_.pieces; ++piece)
      add_to(totals_.data(), state_.partials.data() + 2 * C * piece, 2 * C);
    for (int64_t group = 0; group < state_.groups; ++group) {
      const double* first = totals_.data() + group * state_.group_width;
      double total = 0.0, squares = 0.0;
      for (int64_t c = 0; c < state_.group_width; ++c) {
        total += first[c];
        squares += first[C + c];
      }
      const float K = shifts_[static_cast<size_t>(C + group * state_.group_width)];
      state_.set(group, static_cast<double>(K), total, squares);
    }
  }

  // As FirstUnit.
  template <int K, bool = false, class Function>
  void for_vectors(int64_t piece, const float* coefficients, const Function& f) const {
    const int64_t C = state_.width, end = std::min(state_.a.spatial, (piece + 1) * pixels_);
    for (int64_t pixel = piece * pixels_; pixel < end; ++pixel) {
      const int64_t at = state_.offset + pixel * C;
      each_vector(0, C, [&](int64_t channel, auto lanes) {
        F c[K];
        for (int k = 0; k < K; ++k) c[k] = load(coefficients + k * C + channel, lanes);
        f(at + channel, c, lanes);
      });
    }
  }

  // As FirstUnit.
  template <int K, int Sums, class Function>
  void channel_sums(const float* coefficients, double* sums, const Function& f) const {
    const int64_t C = state_.width;
    each_vector(0, C, [&](int64_t channel, auto lanes) {
      F c[K], s[Sums] = {};
      for (int k = 0; k < K; ++k) c[k] = load(coefficients + k * C + channel, lanes);
      for (int64_t pixel = 0; pixel < state_.a.spatial; ++pixel)
        f(state_.offset + pixel * C + channel, c, lanes, s);
      const int64_t count = std::min<int64_t>(W, C - channel);
      for (int k = 0; k < Sums; ++k)
        for (int64_t i = 0; i < count; ++i)
          sums[k * C + channel + i] = static_cast<double>(s[k][i]);
    });
  }

 private:
  static constexpr int kRows = 8;

  // Channels begin .. end - 1 of this sample: [S, end - begin].
  struct Image {
    const T* x;
    int64_t begin, end;
    int64_t width() const { return end - begin; }
  };
  template <class Function>
  void for_images(const Function& f) const {
    const GroupNorm& a = state_.a;
    if (a.beside == nullptr) return f(Image{state_.x(), 0, a.channels});
    const int64_t before = state_.sample * a.spatial;
    f(Image{static_cast<const T*>(a.x) + before * a.split, 0, a.split});
    f(Image{static_cast<const T*>(a.beside) + before * (a.channels - a.split), a.split,
            a.channels});
  }

  // 32 pieces at most, of at least 32 pixels and 16384 elements: each costs two sums a channel.
  static int64_t piece_count(const GroupNorm& a) {
    const int64_t enough = std::min(a.spatial / 32, a.spatial * a.channels / 16384);
    return std::clamp<int64_t>(enough, 1, 32);
  }

  static void add_to(double* totals, const float* values, int64_t count) {
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) totals[i] += static_cast<double>(values[i]);
  }

  // Adds x - K and (x - K)^2 of `rows` pixels to sums[0 .. C) and sums[C .. 2 C). Whole rows, so
  // that memory is read in order; several, so that the sums are not reloaded for each.
  template <int rows>
  void add_rows(const Image& image, float* sums) const {
    const int64_t C = state_.width, width = image.width();
    const float* shifts = shifts_.data();
    const T* x = image.x - image.begin;
    each_vector(image.begin, image.end, [&](int64_t c, auto lanes) {
      const F K = load(shifts + c, lanes);
      F first = load(sums + c, lanes), second = load(sums + C + c, lanes);
#pragma GCC unroll 8
      for (int row = 0; row < rows; ++row) {
        const F d = load(x + row * width + c, lanes) - K;
        first = first + d;
        second = fma(d, d, second);
      }
      store(sums + c, first, lanes);
      store(sums + C + c, second, lanes);
    });
  }

  // K of every group, the mean of up to eight pixels spread over the sample, into shifts_[C ..];
  // less what is added to each channel, into shifts_[0 .. C).
  void estimate() {
    const int64_t C = state_.width, S = state_.a.spatial, count = std::min<int64_t>(8, (S + 3) / 4);
    float* shifts = shifts_.data();
    for_images([&](const Image& image) {
      const T* x = image.x - image.begin;
      each_vector(image.begin, image.end, [&](int64_t c, auto lanes) {
        F total = {};
        for (int64_t k = 0; k < count; ++k)
          total = total + load(x + k * S / count * image.width() + c, lanes);
        store(shifts + C + c, total * (1.0f / static_cast<float>(count)), lanes);
      });
    });
    for (int64_t first = 0; first < C; first += state_.group_width) {
      float total = 0.0f;
      for (int64_t c = first; c < first + state_.group_width; ++c)
        total += shifts[C + c] + state_.modulation.added(c);
      const float K = total / static_cast<float>(state_.group_width);
      for (int64_t c = first; c < first + state_.group_width; ++c) {
        shifts[C + c] = K;
        shifts[c] = K - state_.modulation.added(c);
      }
    }
  }

  UnitState<T> state_;
  int64_t pixels_;              // of a piece
  std::vector<float> shifts_;   // [2, C]
  std::vector<double> totals_;  // [2, C]
};

}  // namespace stepfuse
