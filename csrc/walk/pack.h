// Weights as the products read them, laid out as a whole.
#pragma once

#include "walk/walk.h"

namespace fused_rnn {
namespace FUSED_RNN_ISA {

// The matrix that a pack makes: columns in vectors of `gates` blocks, and K.
template <class Cell, class T>
struct PackShape {
  explicit PackShape(const PackArgs<T>& p)
      : gates(p.backward || p.product == Product::kProjection ? 1 : gates_of<Cell>(p.stage)) {
    // Forward: rows become columns. Backward: columns stay columns.
    if (p.product == Product::kProjection) {
      columns = p.backward ? p.hidden : p.output;
      inner = p.backward ? p.output : p.hidden;
    } else {
      columns = p.backward ? p.output : p.hidden;
      inner = !p.backward ? p.output : (p.product == Product::kInput ? Cell::kGates : gates_of<Cell>(p.stage)) * p.hidden;
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

template <class Cell, class T>
void pack_backward(const PackArgs<T>& p, const PackShape<Cell, T>& shape, Range mine) {
  const auto row_of = [&](Index k) {
    // Only what feeds back has blocks in another order than the weight.
    const bool ordered = p.product != Product::kHidden || p.stage != Stage::kFirst;
    return ordered ? k : Cell::weight_block(static_cast<int>(k / p.hidden)) * p.hidden + k % p.hidden;
  };
  lay_out_rows<T>(p.weight, p.row_stride, row_of, shape.columns, shape.inner, mine,
                  p.panels + mine.begin * shape.inner * kLanes<T>);
}

template <class Cell, class T>
void pack_forward(const PackArgs<T>& p, const PackShape<Cell, T>& shape, Range mine) {
  lay_out_columns<T>(p.weight, p.row_stride, {shape.gates, shape.columns}, shape.inner, mine,
                     p.panels + mine.begin * shape.inner * kLanes<T>);
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
