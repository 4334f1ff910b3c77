// The table of all kernels for one instruction set: compiled once per set, with that set's flags and FUSED_RNN_ISA as its
// namespace. The kernels are in csrc/kernels/, each of these files compiled once per set and dtype: so two processors share the
// work evenly, and a changed header costs no more than the files that read it.
#include "kernels.h"
#include "cells.h"

#define FUSED_RNN_TEXT_OF(x) #x
#define FUSED_RNN_TEXT(x) FUSED_RNN_TEXT_OF(x)

namespace fused_rnn {
namespace FUSED_RNN_ISA {

template <class Cell, class T>
void forward(const ForwardArgs<T>& args);
template <class Cell, class T>
void backward(const BackwardArgs<T>& args);
template <class Cell, class T>
Index panel_elements(const PackArgs<T>& args);
template <class Cell, class T>
void pack(const PackArgs<T>& args);
template <class T>
void project(const ProjectArgs<T>& args);
template <class T>
Index workspace_elements(const WeightGradientArgs<T>& args);
template <class T>
void weight_gradient(const WeightGradientArgs<T>& args);
template <class Cell, class T>
void step(const StepArgs<T>& args);

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
