// All kernels for one instruction set: compiled once per set, with that set's flags and FUSED_RNN_ISA as its namespace.
#include "backward.h"
#include "cells.h"
#include "forward.h"
#include "pack.h"
#include "project.h"
#include "step.h"
#include "weight_gradient.h"

#define FUSED_RNN_TEXT_OF(x) #x
#define FUSED_RNN_TEXT(x) FUSED_RNN_TEXT_OF(x)

namespace fused_rnn {
namespace FUSED_RNN_ISA {

namespace {

// In the order of CellKind.
template <class T>
constexpr TypedKernels<T> typed_kernels() {
  return {{forward<RnnTanh<T>, T>, forward<RnnRelu<T>, T>, forward<Lstm<T>, T>, forward<Gru<T>, T>},
          {backward<RnnTanh<T>, T>, backward<RnnRelu<T>, T>, backward<Lstm<T>, T>, backward<Gru<T>, T>},
          {panel_elements<RnnTanh<T>, T>, panel_elements<RnnRelu<T>, T>, panel_elements<Lstm<T>, T>, panel_elements<Gru<T>, T>},
          {pack<RnnTanh<T>, T>, pack<RnnRelu<T>, T>, pack<Lstm<T>, T>, pack<Gru<T>, T>},
          project<T>,
          workspace_elements<T>,
          weight_gradient<T>,
          {step<RnnTanh<T>, T>, step<RnnRelu<T>, T>, step<Lstm<T>, T>, step<Gru<T>, T>}};
}

}  // namespace

const Kernels& kernels() {
  static constexpr Kernels table = {FUSED_RNN_TEXT(FUSED_RNN_ISA), FUSED_RNN_VECTOR_BYTES, typed_kernels<float>(),
                                    typed_kernels<double>()};
  return table;
}

}  // namespace FUSED_RNN_ISA
}  // namespace fused_rnn
