// The input's gradient where it is not formed on the walk: the gradients of the gates of all recurrences times their weights.
#pragma once

#include "run/memory.h"
#include "walk/walk.h"

namespace fused_rnn {
namespace FUSED_RNN_ISA {

// The threads share groups of columns and parts of the rows, so that each lays a loose weight out for its own columns alone.
template <class T>
void multiply(const MultiplyArgs<T>& p) {
  const Index vectors = vectors_of(p.columns, kLanes<T>), groups = vectors_of(vectors, kGroup);
  const Index inner = p.weights[0].inner;
  const double work = static_cast<double>(p.rows) * p.columns * inner * static_cast<double>(p.recurrences) / 16 * sizeof(T);
  const int threads = threads_for(work, p.threads);
  const Index chunks = (p.rows + kChunk - 1) / kChunk;
  const Index parts = groups >= 4 * threads || chunks < 1 ? 1 : chunks < threads ? chunks : threads;
  const bool loose = p.weights[0].layout != Layout::kPanels;
  const Index room = loose ? kGroup * inner * kLanes<T> * p.recurrences : 0;
  const Memory memory(static_cast<std::size_t>(room * threads) * sizeof(T));
  parallel(threads, [&](int rank, int size) {
    const Range mine = share(groups * parts, size, rank);
    for (Index task = mine.begin; task < mine.end; ++task) {
      const Index first = task / parts * kGroup;
      const int width = static_cast<int>(vectors - first < kGroup ? vectors - first : kGroup);
      const Range rows = share(p.rows, static_cast<int>(parts), static_cast<int>(task % parts));
      T* panels = loose ? static_cast<T*>(memory.get()) + rank * room : nullptr;
      if (loose) {
        for (Index d = 0; d < p.recurrences; ++d) {
          group_of(p.weights[d], {1, p.columns}, first, width, panels + d * kGroup * inner * kLanes<T>);
        }
      }
      alignas(64) Vec<T> sums[kChunk * kGroup];
      const T* left[kChunk];
      for (Index row = rows.begin; row < rows.end; row += kChunk) {
        const int n = static_cast<int>(rows.end - row < kChunk ? rows.end - row : kChunk);
        for (Index d = 0; d < p.recurrences; ++d) {
          const T* own = panels ? panels + d * kGroup * inner * kLanes<T> : nullptr;
          const Matrix<T> w = panels ? Matrix<T>{own, Layout::kPanels, inner, 0, 0} : p.weights[d];
          for (int j = 0; j < n; ++j) left[j] = p.left.at(row + j, d);
          product_chunk<T>(w, {1, p.columns}, panels ? 0 : first, width, left, n, d > 0, sums, panels_of(w, panels ? 0 : first),
                           [](int) {});
        }
        for (int j = 0; j < n; ++j) {
          for (int v = 0; v < width; ++v) {
            T* to = p.out + (row + j) * p.out_stride + (first + v) * kLanes<T>;
            with_io<T>(p.columns, first + v, [&](auto io, Index) { io.store(to, sums[j * kGroup + v]); });
          }
        }
      }
    }
  });
}

// What a projection multiplies, of every row; of the cells that have one.
template <class Cell, class T>
void unprojected([[maybe_unused]] const UnprojectedArgs<T>& p) {
  if constexpr (Cell::kProjection) {
    parallel(threads_for(static_cast<double>(p.rows) * p.hidden * sizeof(T), p.threads), [&](int rank, int size) {
      const Range mine = share(p.rows, size, rank);
      for (Index row = mine.begin; row < mine.end; ++row) {
        for (Index v = 0; v < vectors_of(p.hidden, kLanes<T>); ++v) {
          const Index unit = v * kLanes<T>;
          with_io<T>(p.hidden, v, [&](auto io, Index) {
            io.store(p.to + row * p.hidden + unit, Cell::unprojected(io, p.tape + row * p.tape_stride + unit, p.hidden));
          });
        }
      }
    });
  }
}

}  // namespace FUSED_RNN_ISA
}  // namespace fused_rnn
