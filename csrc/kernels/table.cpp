// The table of all kernels for one instruction set: compiled once per set, with that set's flags and FUSED_RNN_ISA as its
// namespace. The kernels are in csrc/kernels/, each of these files compiled once per set and dtype: so two processors share the
// work evenly, and a changed header costs no more than the files that read it.
#include "run/kernels.h"

#include "cells/cells.h"
#include "walk/convert.h"

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
void multiply(const MultiplyArgs<T>& args);
template <class T>
Index workspace_elements(const WeightGradientArgs<T>& args);
template <class T>
void weight_gradient(const WeightGradientArgs<T>& args);
template <class Cell, class T>
void step(const ForwardArgs<T>& args);
template <class Cell, class T>
void unprojected(const UnprojectedArgs<T>& args);
template <class Cell>
void int8_forward(const Int8Args& args);

namespace {

template <class Cell, class T>
constexpr void add(TypedKernels<T>& table, CellKind kind) {
  const int i = static_cast<int>(kind);
  table.forward[i] = forward<Cell, T>;
  table.backward[i] = backward<Cell, T>;
  table.panel_elements[i] = panel_elements<Cell, T>;
  table.pack[i] = pack<Cell, T>;
  table.step[i] = step<Cell, T>;
  if constexpr (Cell::kProjection) table.unprojected[i] = unprojected<Cell, T>;
}

template <class T>
constexpr TypedKernels<T> typed_kernels() {
  TypedKernels<T> table{};
#define FUSED_RNN_CELL(name, Struct) add<Struct<T>, T>(table, CellKind::k##Struct);
#include "cells/cells.def"
  table.multiply = multiply<T>;
  table.workspace_elements = workspace_elements<T>;
  table.weight_gradient = weight_gradient<T>;
  return table;
}

template <class Cell>
constexpr void add_int8(Kernels& table, CellKind kind) {
  if constexpr (!kTwoStages<Cell>) table.int8_forward[static_cast<int>(kind)] = int8_forward<Cell>;
}

constexpr Kernels all_kernels() {
  Kernels table{FUSED_RNN_TEXT(FUSED_RNN_ISA),
                FUSED_RNN_VECTOR_BYTES,
                {},
                typed_kernels<float>(),
                typed_kernels<double>(),
                widen_rows<BFloat16>,
                widen_rows<Float16>,
                narrow_rows<BFloat16>,
                narrow_rows<Float16>,
                {}};
#define FUSED_RNN_CELL(name, Struct) add_int8<Struct<float>>(table, CellKind::k##Struct);
#include "cells/cells.def"
#define FUSED_RNN_CELL(name, Struct) table.shapes[static_cast<int>(CellKind::k##Struct)] = shape_of<Struct<float>>(#name);
#include "cells/cells.def"
  return table;
}

}  // namespace

const Kernels& kernels() {
  static constexpr Kernels table = all_kernels();
  return table;
}

}  // namespace FUSED_RNN_ISA
}  // namespace fused_rnn
