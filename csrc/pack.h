// Weights as the products read them: panels of one vector of columns, K after K (Layout::kPanels).
#pragma once

#include "walk.h"

namespace fused_rnn {
namespace FUSED_RNN_ISA {

// The matrix that a pack makes: columns in vectors of `gates` blocks, and K.
template <class Cell, class T>
struct PackShape {
  explicit PackShape(const PackArgs<T>& p) : gates(p.backward || p.product == Product::kProjection ? 1 : Cell::kGates) {
    // Forward: rows become columns. Backward: columns stay columns.
    if (p.product == Product::kProjection) {
      columns = p.backward ? p.hidden : p.output;
      inner = p.backward ? p.output : p.hidden;
    } else {
      columns = p.backward ? p.output : p.hidden;
      inner = !p.backward ? p.output : (p.product == Product::kInput ? Cell::kGates : Cell::kFeedback) * p.hidden;
    }
  }
  int gates;
  Index columns;  // of one gate
  Index inner;
  Index vectors() const { return vectors_of(columns, kLanes<T>) * gates; }
};

template <class Cell, class T>
Index panel_elements(const PackArgs<T>& p) {
  const PackShape<Cell, T> shape(p);
  return shape.vectors() * shape.inner * kLanes<T>;
}

// Rows of the weight stay in the order of K, cut into vectors of columns. All panels take a few rows at a time, so that the
// weight is read row by row: one panel at a time would touch another page with every vector.
template <class Cell, class T>
void pack_backward(const PackArgs<T>& p, const PackShape<Cell, T>& shape, Range mine) {
  constexpr Index kBlock = 16;
  for (Index k = 0; k < shape.inner; k += kBlock) {
    const Index end = shape.inner - k < kBlock ? shape.inner : k + kBlock;
    const T* rows[kBlock];
    for (Index i = k; i < end; ++i) {
      // Only what feeds back has blocks in another order than the weight.
      const bool ordered = p.product != Product::kHidden;
      const Index row = ordered ? i : Cell::weight_block(static_cast<int>(i / p.hidden)) * p.hidden + i % p.hidden;
      rows[i - k] = p.weight + row * p.row_stride;
    }
    for (Index v = mine.begin; v < mine.end; ++v) {
      T* panel = p.panels + (v * shape.inner + k) * kLanes<T>;
      with_io<T>(shape.columns, v, [&](auto io, Index) {
        for (Index i = 0; i < end - k; ++i) store<T>(panel + i * kLanes<T>, io.load(rows[i] + v * kLanes<T>));
      });
    }
  }
}

// Rows of the weight become columns.
template <class Cell, class T>
void pack_forward(const PackArgs<T>& p, const PackShape<Cell, T>& shape, Range mine) {
  constexpr int n = kLanes<T>;
  for (Index v = mine.begin; v < mine.end; ++v) {
    const Index unit = v / shape.gates * n, gate = v % shape.gates;
    const int exist = static_cast<int>(shape.columns - unit < n ? shape.columns - unit : n);
    const T* rows = p.weight + (gate * shape.columns + unit) * p.row_stride;
    T* panel = p.panels + v * shape.inner * n;
    for (Index k = 0; k < shape.inner; k += n) {
      Vec<T> block[n];
      for (int lane = 0; lane < n; ++lane) {
        block[lane] = Vec<T>{};
        if (lane < exist) {
          with_io<T>(shape.inner, k / n, [&](auto io, Index) { block[lane] = io.load(rows + lane * p.row_stride + k); });
        }
      }
      transpose<T>(block);
      for (int i = 0; i < n && k + i < shape.inner; ++i) store<T>(panel + (k + i) * n, block[i]);
    }
  }
}

template <class Cell, class T>
void pack(const PackArgs<T>& p) {
  const PackShape<Cell, T> shape(p);
  parallel(threads_for(static_cast<double>(shape.vectors()) * shape.inner * sizeof(Vec<T>), p.threads),
           [&](int rank, int size) {
             const Range mine = share(shape.vectors(), size, rank);
             if (p.backward) {
               pack_backward<Cell, T>(p, shape, mine);
             } else {
               pack_forward<Cell, T>(p, shape, mine);
             }
           });
}

}  // namespace FUSED_RNN_ISA
}  // namespace fused_rnn
