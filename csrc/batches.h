// Loops over samples in batches of four vectors, the unit in which noise is drawn.
#pragma once

#include "parallel.h"
#include "philox.h"

namespace stepfuse {

// Calls vector(offset, i, lanes) for the vectors i = 0 .. 3 of the batch at `offset`, of which the
// elements before `end` are memory.
template <class Vector>
STEPFUSE_INLINE void for_vectors(int64_t offset, int64_t end, const Vector& vector) {
  if (offset + kBatch <= end) {
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) vector(offset + i * W, i, Full{});
    return;
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const int64_t left = std::min<int64_t>(W, end - offset - i * W);
    if (left > 0) vector(offset + i * W, i, Partial{static_cast<int>(left)});
  }
}

// Splits [count, elements] into pieces of whole batches inside one sample, and calls
// piece(sample, begin, end) for them on the threads.
template <class Piece>
inline void for_pieces(int64_t count, int64_t elements, int threads, int64_t grain,
                       const Piece& piece) {
  constexpr int64_t kPiece = 64 * kBatch;
  const int64_t pieces = (elements + kPiece - 1) / kPiece;
  const auto run = [&](int64_t begin, int64_t end) {
    while (begin < end) {
      const int64_t sample = begin / pieces, first = begin % pieces;
      const int64_t last = std::min(pieces, first + end - begin);
      piece(sample, first * kPiece, std::min(elements, last * kPiece));
      begin += last - first;
    }
  };
  parallel_for(worthwhile(threads, count * elements, grain), count * pieces, run);
}

}  // namespace stepfuse
