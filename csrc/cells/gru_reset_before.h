// GRU with the reset gate before the product (Cho et al. 2014; ONNX's linear_before_reset=0).
#pragma once

#include "walk/pointwise.h"

namespace fused_rnn {
namespace FUSED_RNN_ISA {

template <class T>
struct GruResetBefore : CellDefaults {
  static constexpr int kGates = 3;        // r, z, n
  static constexpr int kLater = 1;        // n: its product is with m = r * h_previous
  static constexpr int kTape = 4;         // r, z, n, m
  static constexpr int kTapeOperand = 3;  // m
  static constexpr int kGradients = 3;    // r, z, n
  static constexpr bool kDirect = true;   // h = … + z * h_previous
  static constexpr Previous kPrevious = Previous::kH;

  // r, z and m. z waits in the place of h, which is there without a tape too.
  template <class Io>
  static void forward(Io io, const Vec<T>* recurrent, const ForwardPoint<T>& p) {
    const Index H = p.hidden;
    Vec<T> gates[2] = {input<T>(io, p, 0) + recurrent[0], input<T>(io, p, 1) + recurrent[1]};
    activate<T, 2, 0>(gates);  // (1), (3)
    const Vec<T> r = gates[0], z = gates[1];
    if (p.keep) {
      io.store(p.tape, r);
      io.store(p.tape + H, z);
    }
    io.store(p.operand, r * io.load(p.h_previous));  // (2)
    io.store(p.h, z);
  }

  // n and h.
  template <class Io>
  static void forward_later(Io io, const Vec<T>* recurrent, const ForwardPoint<T>& p) {
    const Vec<T> z = io.load(p.h);
    const Vec<T> n = tanh<T>(input<T>(io, p, 2) + recurrent[0]);  // (4)
    if (p.keep) io.store(p.tape + 2 * p.hidden, n);
    io.store(p.h, n + z * (io.load(p.h_previous) - n));  // (5)
  }

  // z and n, from the gradient of h.
  template <class Io>
  static void backward(Io io, Vec<T> d_h, const BackwardPoint<T>& p) {
    const Index H = p.hidden;
    const Vec<T> one = broadcast<T>(1), z = io.load(p.tape + H), n = io.load(p.tape + 2 * H);
    io.store(p.d_gates + H, d_h * (io.load(p.previous) - n) * z * (one - z));  // (5), (3)
    io.store(p.d_gates + 2 * H, d_h * (one - z) * (one - n * n));              // (5), (4)
    io.store(p.d_h, p.reset ? Vec<T>{} : d_h * z);                             // (5)
  }

  // r, from the gradient of m.
  template <class Io>
  static void backward_later(Io io, Vec<T> d_m, const BackwardPoint<T>& p) {
    const Vec<T> r = io.load(p.tape), m = io.load(p.tape + 3 * p.hidden);
    io.store(p.d_gates, d_m * m * (broadcast<T>(1) - r));     // (2), (1): r h_previous is m
    if (!p.reset) io.store(p.d_h, io.load(p.d_h) + d_m * r);  // (2)
  }
};

}  // namespace FUSED_RNN_ISA
}  // namespace fused_rnn
