// The plain recurrent cell (torch.nn.RNN; Elman 1990) with tanh or relu.
#pragma once

#include "walk/pointwise.h"

namespace fused_rnn {
namespace FUSED_RNN_ISA {

template <class T, bool kRelu>
struct Rnn : CellDefaults {
  static constexpr int kGates = 1;
  static constexpr int kTape = 1;  // h: the output itself
  static constexpr bool kTapeIsOut = true;
  static constexpr int kGradients = 1;

  template <class Io>
  static void forward(Io io, const Vec<T>* recurrent, const ForwardPoint<T>& p) {
    const Vec<T> x = input<T>(io, p, 0) + recurrent[0];
    // x < 0 is false for NaN, which passes as it does in torch.
    io.store(p.h, kRelu ? (x < Vec<T>{} ? Vec<T>{} : x) : tanh<T>(x));  // (1)
  }

  template <class Io>
  static void backward(Io io, Vec<T> d_h, const BackwardPoint<T>& p) {
    const Vec<T> h = io.load(p.tape);
    io.store(p.d_gates, kRelu ? (h <= Vec<T>{} ? Vec<T>{} : d_h) : d_h * (broadcast<T>(1) - h * h));  // (1)
  }
};

template <class T>
using RnnTanh = Rnn<T, false>;
template <class T>
using RnnRelu = Rnn<T, true>;

}  // namespace FUSED_RNN_ISA
}  // namespace fused_rnn
