// One time step of a few rows without a backward: streaming and generation.
//
// Both products and the pointwise part in one parallel region without a barrier: a thread's units need no one else's. Weights
// are read as torch stores them, once: such a step takes as long as that reading does.
#pragma once

#include "walk.h"

namespace fused_rnn {
namespace FUSED_RNN_ISA {

template <class Cell, class T>
void step(const StepArgs<T>& args) {
  constexpr int kGates = Cell::kGates;
  const Index H = args.hidden;
  const Matrix<T> weight_ih = {args.weight_ih, Layout::kColumns, args.inputs, args.weight_ih_stride};
  const Matrix<T> weight_hh = {args.weight_hh, Layout::kColumns, H, args.weight_hh_stride};
  const double bytes = static_cast<double>(kGates) * H * (args.inputs + H) * sizeof(T);
  parallel(threads_for(bytes, args.threads), [&](int rank, int size) {
    const Range mine = share(vectors_of(H, kLanes<T>), size, rank);
    // Every other call from the last unit to the first, as the walks do (Scratch).
    thread_local bool descending = false;
    descending = !descending;
    alignas(64) Vec<T> of_x[kChunk * kGroup], of_h[kChunk * kGroup];
    const T *x[kChunk], *h[kChunk];
    for (Index first = 0; first < args.rows; first += kChunk) {
      const int rows = static_cast<int>(args.rows - first < kChunk ? args.rows - first : kChunk);
      for (int j = 0; j < rows; ++j) {
        x[j] = args.input + (first + j) * args.input_stride;
        h[j] = args.h + (first + j) * H;
      }
      for (Index i = 0; i < mine.size(); ++i) {
        const Index v = descending ? mine.end - 1 - i : mine.begin + i;
        const auto ahead = [](Index) {};
        product_chunk<T>(weight_ih, {kGates, H}, v * kGates, kGates, x, rows, false, of_x, nullptr, ahead);
        product_chunk<T>(weight_hh, {kGates, H}, v * kGates, kGates, h, rows, false, of_h, nullptr, ahead);
        const Index unit = v * kLanes<T>;
        with_io<T>(H, v, [&](auto io, Index) {
          for (int j = 0; j < rows; ++j) {
            Vec<T>*xs = of_x + j * kGroup, *hs = of_h + j * kGroup;
            for (int g = 0; g < kGates; ++g) {
              if (args.bias_ih) xs[g] += io.load(args.bias_ih + g * H + unit);
              if (args.bias_hh) hs[g] += io.load(args.bias_hh + g * H + unit);
            }
            const Index place = (first + j) * H + unit;
            T* c = Cell::kHasC ? args.c_new + place : nullptr;
            if (Cell::kHasC) io.store(c, io.load(args.c + place));
            ForwardPoint<T> p;
            p.gates_x = reinterpret_cast<T*>(xs);
            p.tape = nullptr;
            p.hidden = kLanes<T>;
            p.bias = nullptr;
            p.h_previous = args.h + place;
            p.c = c;
            p.reset = false;
            p.keep = false;
            p.h = args.h_new + place;
            Cell::forward(io, hs, p);
            if (args.out) io.store(args.out + place, io.load(p.h));
          }
        });
      }
    }
  });
}

}  // namespace FUSED_RNN_ISA
}  // namespace fused_rnn
