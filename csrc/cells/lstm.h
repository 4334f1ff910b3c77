// LSTM (torch.nn.LSTM; Hochreiter & Schmidhuber 1997 with the forget gate of Gers et al. 2000).
#pragma once

#include "walk/pointwise.h"

namespace fused_rnn {
namespace FUSED_RNN_ISA {

template <class T>
struct Lstm : CellDefaults {
  static constexpr int kGates = 4;  // i, f, g, o
  static constexpr int kTape = 5;   // i, f, g, o, c
  static constexpr bool kHasC = true;
  static constexpr int kTapeC = 4;
  static constexpr int kGradients = 4;  // i, f, g, o
  static constexpr Previous kPrevious = Previous::kC;
  static constexpr bool kProjection = true;

  template <class Io>
  static void forward(Io io, const Vec<T>* recurrent, const ForwardPoint<T>& p) {
    const Index H = p.hidden;
    Vec<T> gates[4] = {input<T>(io, p, 0) + recurrent[0], input<T>(io, p, 1) + recurrent[1], input<T>(io, p, 3) + recurrent[3],
                       input<T>(io, p, 2) + recurrent[2]};
    activate<T, 3, 1>(gates);  // (1), (2)
    const Vec<T> i = gates[0], f = gates[1], o = gates[2], g = gates[3];
    const Vec<T> c = (p.reset ? Vec<T>{} : f * io.load(p.c)) + i * g;  // (3)
    if (p.keep) {
      io.store(p.tape, i);
      io.store(p.tape + H, f);
      io.store(p.tape + 2 * H, g);
      io.store(p.tape + 3 * H, o);
      io.store(p.tape + 4 * H, c);
    }
    io.store(p.c, c);
    io.store(p.h, o * tanh<T>(c));  // (4)
  }

  // What a projection multiplies.
  template <class Io>
  static Vec<T> unprojected(Io io, const T* tape, Index H) {
    return io.load(tape + 3 * H) * tanh<T>(io.load(tape + 4 * H));
  }

  template <class Io>
  static void backward(Io io, Vec<T> d_h, const BackwardPoint<T>& p) {
    const Index H = p.hidden;
    const Vec<T> one = broadcast<T>(1);
    const Vec<T> i = io.load(p.tape), f = io.load(p.tape + H), g = io.load(p.tape + 2 * H), o = io.load(p.tape + 3 * H);
    // tanh(c) is cheaper to form again than to keep: a sixth of the tape.
    const Vec<T> tanh_c = tanh<T>(io.load(p.tape + 4 * H));
    Vec<T> d_c = io.load(p.d_c) + d_h * o * (one - tanh_c * tanh_c);  // (4)
    if (p.d_cell) d_c += io.load(p.d_cell);
    io.store(p.d_gates, d_c * g * i * (one - i));                        // (3), (1)
    io.store(p.d_gates + H, d_c * io.load(p.previous) * f * (one - f));  // (3), (1)
    io.store(p.d_gates + 2 * H, d_c * i * (one - g * g));                // (3), (2)
    io.store(p.d_gates + 3 * H, d_h * tanh_c * o * (one - o));           // (4), (1)
    io.store(p.d_c, p.reset ? Vec<T>{} : d_c * f);                       // (3)
  }
};

}  // namespace FUSED_RNN_ISA
}  // namespace fused_rnn
