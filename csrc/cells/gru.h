// GRU with the reset gate after the product (torch.nn.GRU; Cho et al. 2014 in cuDNN's form).
#pragma once

#include "walk/pointwise.h"

namespace fused_rnn {
namespace FUSED_RNN_ISA {

template <class T>
struct Gru : CellDefaults {
  static constexpr int kGates = 3;      // r, z, n
  static constexpr int kTape = 4;       // r, z, n, hn
  static constexpr int kApart = 2;      // n: r multiplies the recurrent part alone
  static constexpr int kGradients = 4;  // hn, r, z, n
  // hn is the n rows of weight_hh, which come last there.
  static constexpr int weight_block(int b) { return b == 0 ? 2 : b - 1; }
  static constexpr bool kDirect = true;  // h = … + z * h_previous
  static constexpr Previous kPrevious = Previous::kH;

  template <class Io>
  static void forward(Io io, const Vec<T>* recurrent, const ForwardPoint<T>& p) {
    const Index H = p.hidden;
    Vec<T> gates[2] = {input<T>(io, p, 0) + recurrent[0], input<T>(io, p, 1) + recurrent[1]};
    activate<T, 2, 0>(gates);  // (1), (2)
    const Vec<T> r = gates[0], z = gates[1];
    const Vec<T> hn = p.bias ? recurrent[2] + io.load(p.bias + 3 * H) : recurrent[2];
    const Vec<T> x = p.gates_x ? input<T>(io, p, 2) : input<T>(io, p, 2) + recurrent[kGates];
    const Vec<T> n = tanh<T>(x + r * hn);  // (3)
    if (p.keep) {
      io.store(p.tape, r);
      io.store(p.tape + H, z);
      io.store(p.tape + 2 * H, n);
      io.store(p.tape + 3 * H, hn);
    }
    io.store(p.h, n + z * (io.load(p.h_previous) - n));  // (4)
  }

  template <class Io>
  static void backward(Io io, Vec<T> d_h, const BackwardPoint<T>& p) {
    const Index H = p.hidden;
    const Vec<T> one = broadcast<T>(1);
    const Vec<T> r = io.load(p.tape), z = io.load(p.tape + H), n = io.load(p.tape + 2 * H), hn = io.load(p.tape + 3 * H);
    const Vec<T> d_n = d_h * (one - z) * (one - n * n);                            // (4), (3)
    io.store(p.d_gates, d_n * r);                                                  // (3)
    io.store(p.d_gates + H, d_n * hn * r * (one - r));                             // (3), (1)
    io.store(p.d_gates + 2 * H, d_h * (io.load(p.previous) - n) * z * (one - z));  // (4), (2)
    io.store(p.d_gates + 3 * H, d_n);
    io.store(p.d_h, p.reset ? Vec<T>{} : d_h * z);  // (4)
  }
};

}  // namespace FUSED_RNN_ISA
}  // namespace fused_rnn
