// Gradients of group_norm_silu. With r = rstd, h^ = (x + add - mean) r, u = weight h^ + bias,
// y = (1 + scale) u + shift = a x + b, g = dL/dy, and sums over the spatial elements of a channel:
//
//   P = sum g    Q = sum g h^    R = sum h^    p, q = sum_group a P / r M, sum_group a Q / r M
//   dshift = P               dscale = weight Q + bias P
//   dbias  = sum_n (1 + scale) P    dweight = sum_n (1 + scale) Q
//   dx     = a g - r p - r q h^     dadd = a P - r (S p + q R)
//
// M being the elements of a group and S those of a channel (Wu & He 2018, eq. 1, differentiated).
#include "group_norm_layouts.h"

namespace stepfuse {

namespace {

constexpr int64_t kGrain = 16384;  // elements a thread must have to be worth waking

// dL/dy from the gradient of the activation's output.
template <bool act>
inline F pre_activation(F grad, F y) {
  if constexpr (!act) return grad;
  const F s = sigmoid(y);
  return grad * (s * fma(y, 1.0f - s, broadcast(1.0f)));
}

template <class T, class Unit, bool act>
class Backward {
 public:
  Backward(const GroupNorm& a, const GroupNormGradients& out)
      : a_(a), out_(out), per_sample_(static_cast<size_t>(2 * a.samples * a.channels)) {}

  void run(int threads) {
    for_whole_units<Unit>(a_, Unit::units(a_), threads, [&](const Unit& unit) { unit_(unit); });
    reduce(out_.dbias, per_sample_.data());
    reduce(out_.dweight, per_sample_.data() + a_.samples * a_.channels);
  }

 private:
  void unit_(const Unit& unit) {
    const auto& state = unit.state();
    const int64_t width = state.width;
    // [4, width]: a, b, then h^ = r x + h
    std::vector<float> c(static_cast<size_t>(4 * width));
    std::copy_n(state.coefficients.begin(), 2 * width, c.begin());
    for (int64_t i = 0; i < width; ++i) {
      const Statistics& s = state.statistics[static_cast<size_t>(i / state.group_width)];
      c[static_cast<size_t>(2 * width + i)] = static_cast<float>(s.rstd);
      c[static_cast<size_t>(3 * width + i)] =
          static_cast<float>((static_cast<double>(state.modulation.added(i)) - s.mean) * s.rstd);
    }
    const T* x = static_cast<const T*>(a_.x);
    const T* grad = static_cast<const T*>(out_.grad);
    std::vector<double> sums(static_cast<size_t>(3 * width));
    unit.template channel_sums<4, 3>(
        c.data(), sums.data(), [&](int64_t i, const F(&k)[4], auto lanes, F(&s)[3]) {
          const F v = load(x + i, lanes), normal = fma(v, k[2], k[3]);
          const F g = pre_activation<act>(load(grad + i, lanes), fma(v, k[0], k[1]));
          s[0] = s[0] + keep(g, lanes);
          s[1] = s[1] + keep(g * normal, lanes);
          s[2] = s[2] + keep(normal, lanes);
        });
    parameters(state, sums.data());
    if (out_.dx == nullptr && out_.dadd == nullptr) return;

    // dx = a g + slope x + level, into the last two rows of c
    for (int64_t first = 0; first < width; first += state.group_width)
      group(state, first, sums.data(), c.data());
    if (out_.dx == nullptr) return;
    T* dx = static_cast<T*>(out_.dx);
    for (int64_t piece = 0; piece < unit.pieces(); ++piece)
      unit.template for_vectors<4>(piece, c.data(), [&](int64_t i, const F(&k)[4], auto lanes) {
        const F v = load(x + i, lanes);
        const F g = pre_activation<act>(load(grad + i, lanes), fma(v, k[0], k[1]));
        store(dx + i, fma(k[0], g, fma(k[2], v, k[3])), lanes);
      });
  }

  // dscale, dshift, and this sample's share of dweight and dbias.
  void parameters(const UnitState<T>& state, const double* sums) {
    const Modulation& m = state.modulation;
    for (int64_t i = 0; i < state.width; ++i) {
      const double P = sums[i], Q = sums[state.width + i], scaled = m.scaled(i);
      const int64_t at = state.sample * a_.channels + state.channel + i;
      const double bias = m.bias == nullptr ? 0.0 : static_cast<double>(m.bias[i]);
      if (out_.dshift != nullptr) out_.dshift[at] = static_cast<float>(P);
      if (out_.dscale != nullptr)
        out_.dscale[at] = static_cast<float>(m.weighted(i) * Q + bias * P);
      per_sample_[static_cast<size_t>(at)] = scaled * P;
      per_sample_[static_cast<size_t>(a_.samples * a_.channels + at)] = scaled * Q;
    }
  }

  void group(const UnitState<T>& state, int64_t first, const double* sums, float* c) {
    const int64_t width = state.width, end = first + state.group_width;
    const Statistics& s = state.statistics[static_cast<size_t>(first / state.group_width)];
    const double S = static_cast<double>(a_.spatial);
    double p = 0.0, q = 0.0;
    for (int64_t i = first; i < end; ++i) {
      p += static_cast<double>(c[i]) * sums[i];
      q += static_cast<double>(c[i]) * sums[width + i];
    }
    p /= s.rstd * S * static_cast<double>(state.group_width);
    q /= s.rstd * S * static_cast<double>(state.group_width);
    for (int64_t i = first; i < end; ++i) {
      if (out_.dadd != nullptr)
        out_.dadd[state.sample * a_.channels + state.channel + i] = static_cast<float>(
            static_cast<double>(c[i]) * sums[i] - s.rstd * (S * p + q * sums[2 * width + i]));
      const double slope = -s.rstd * s.rstd * q;
      c[2 * width + i] = static_cast<float>(slope);
      c[3 * width + i] = static_cast<float>(
          slope * (static_cast<double>(state.modulation.added(i)) - s.mean) - s.rstd * p);
    }
  }

  // out[c] = sum over the samples of shares[n, c], in order.
  void reduce(float* out, const double* shares) const {
    if (out == nullptr) return;
    for (int64_t c = 0; c < a_.channels; ++c) {
      double total = 0.0;
      for (int64_t n = 0; n < a_.samples; ++n) total += shares[n * a_.channels + c];
      out[c] = static_cast<float>(total);
    }
  }

  const GroupNorm& a_;
  const GroupNormGradients& out_;
  std::vector<double> per_sample_;  // [2, N, C]: shares of dbias and dweight
};

}  // namespace

void group_norm_silu_backward(const GroupNorm& a, const GroupNormGradients& out, int threads) {
  threads = worthwhile(threads, a.samples * a.channels * a.spatial, kGrain);
  with_type(a.dtype, [&](auto type) {
    using T = decltype(type);
    if (a.channels_last && a.silu) return Backward<T, LastUnit<T>, true>(a, out).run(threads);
    if (a.channels_last) return Backward<T, LastUnit<T>, false>(a, out).run(threads);
    if (a.silu) return Backward<T, FirstUnit<T>, true>(a, out).run(threads);
    return Backward<T, FirstUnit<T>, false>(a, out).run(threads);
  });
}

}  // namespace stepfuse
