// The input projection of a few rows: too few for a library's matrix product to be worth its threads and its packing.
#pragma once

#include "walk.h"

namespace fused_rnn {
namespace FUSED_RNN_ISA {

// out = input · weightᵀ, by dot products along K; the threads share the columns.
template <class T>
void project(const ProjectArgs<T>& p) {
  parallel(threads_for(static_cast<double>(p.columns) * p.inner * sizeof(T), p.threads), [&](int rank, int size) {
    const Matrix<T> weight = {p.weight, Layout::kColumns, p.inner, p.weight_stride};
    const Range mine = share(vectors_of(p.columns, kLanes<T>), size, rank);
    Scratch<T> scratch(p.rows, p.rows);
    for (Index row = 0; row < p.rows; ++row) scratch.rows.get()[row] = p.input + row * p.input_stride;
    product<T, 1>(
        nullptr, {}, weight, p.columns, mine, p.rows, p.rows, scratch, [](Index, Index) {},
        [&](Index row, Index v, const Vec<T>* sums) {
          T* out = p.out + row * p.out_stride + v * kLanes<T>;
          with_io<T>(p.columns, v, [&](auto io, Index) { io.store(out, sums[0]); });
        });
  });
}

}  // namespace FUSED_RNN_ISA
}  // namespace fused_rnn
