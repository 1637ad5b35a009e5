// The filters of a convolution as panels, one for each frequency, which products read: convolve.h.
#pragma once

#include "planes.h"

namespace stepfuse {

// Panels of one block of results after the other, each read in the order of its frequencies.
//
//     F(2, 3)   m0 = g0   m1 = (g0 + g1 + g2) / 2   m2 = (g0 - g1 + g2) / 2   m3 = g2
//     nearest2x m0 = g0   m1 = g0 + g1 + g2         m2 = g2
//
// What is a filter itself is read where it lies.
template <class T>
class Panels {
 public:
  Panels(const Convolution& a, const Geometry& g, int64_t panel)
      : frequencies_(g.frequencies),
        panel_(panel),
        axis_(a.form == Form::enlarged ? 3 : 4),
        form_(a.form),
        transforms_(kTransforms<T> && a.plain),
        block_(transforms_ ? 9 * a.channels * kWide : g.frequencies * panel),
        u_(static_cast<const T*>(a.u)) {
    if (transforms_) made_ = scratch<For::filters, T>(axis_ * panel_);
  }

  // Frequency f of a block, whose frequencies are asked for in order.
  const T* panel(int64_t block, int64_t f) {
    const T* u = u_ + block * block_;
    if (!transforms_) return u + f * panel_;
    if constexpr (kTransforms<T>) {
      if (form_ == Form::lines && f == 0) ends<4>(u);
      if (form_ == Form::squares && f % 4 == 0) column<4>(u, f / 4);
      if (form_ == Form::enlarged && f % 3 == 0) column<3>(u, f / 3);
    }
    return at_[f % axis_];
  }
  // What to fetch meanwhile: the next panel, or the next block's filters, a part at each frequency.
  const T* next(int64_t block, int64_t f) const {
    if (!transforms_) return u_ + block * block_ + (f + 1) * panel_;
    return u_ + (block + 1) * block_ + f * (block_ / frequencies_);
  }

 private:
  // The middle frequencies of an axis.
  template <int P>
  static STEPFUSE_INLINE void middle(F g0, F g1, F g2, F m[P - 2]) {
    if constexpr (P == 3) {
      m[0] = g0 + g1 + g2;
    } else {
      const F even = (g0 + g2) * 0.5f, odd = g1 * 0.5f;
      m[0] = even + odd;
      m[1] = even - odd;
    }
  }

  // The frequencies of three panels of filters: the first and the last are filters themselves.
  template <int P>
  void ends(const T* u) {
    for (int64_t i = 0; i < panel_; i += W) {
      F m[P - 2];
      middle<P>(load(u + i, Full{}), load(u + panel_ + i, Full{}), load(u + 2 * panel_ + i, Full{}),
                m);
#pragma GCC unroll 2
      for (int k = 0; k < P - 2; ++k) store(made_ + (k + 1) * panel_ + i, m[k], Full{});
    }
    at_[0] = u;
    for (int k = 1; k < P - 1; ++k) at_[k] = made_ + k * panel_;
    at_[P - 1] = u + 2 * panel_;
  }
  // All frequencies down for one across.
  template <int P>
  void column(const T* u, int64_t across) {
    if (across == 0) return ends<P>(u);
    if (across == P - 1) return ends<P>(u + 6 * panel_);
    if (across == 1) return between<P, 0>(u);
    if constexpr (P == 4) between<P, 1>(u);
  }
  template <int P, int which>
  void between(const T* u) {
    for (int64_t i = 0; i < panel_; i += W, u += W) {
      F g[3], m[P - 2];
#pragma GCC unroll 3
      for (int down = 0; down < 3; ++down) {
        const T* tap = u + down * panel_;
        middle<P>(load(tap, Full{}), load(tap + 3 * panel_, Full{}), load(tap + 6 * panel_, Full{}),
                  m);
        g[down] = m[which];
      }
      middle<P>(g[0], g[1], g[2], m);
      store(made_ + i, g[0], Full{});
#pragma GCC unroll 2
      for (int k = 0; k < P - 2; ++k) store(made_ + (k + 1) * panel_ + i, m[k], Full{});
      store(made_ + (P - 1) * panel_ + i, g[2], Full{});
    }
    for (int k = 0; k < P; ++k) at_[k] = made_ + k * panel_;
  }

  const int64_t frequencies_, panel_, axis_;  // axis: frequencies of one
  const Form form_;
  const bool transforms_;
  const int64_t block_;
  const T* const u_;
  T* made_ = nullptr;  // [P][panel]
  const T* at_[4] = {};
};

}  // namespace stepfuse
