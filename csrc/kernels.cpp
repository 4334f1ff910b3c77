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

template <class Cell, class T>
constexpr void add(TypedKernels<T>& table, CellKind kind) {
  const int i = static_cast<int>(kind);
  table.forward[i] = forward<Cell, T>;
  table.backward[i] = backward<Cell, T>;
  table.panel_elements[i] = panel_elements<Cell, T>;
  table.pack[i] = pack<Cell, T>;
  table.step[i] = step<Cell, T>;
}

template <class T>
constexpr TypedKernels<T> typed_kernels() {
  TypedKernels<T> table{};
#define FUSED_RNN_CELL(name, Struct) add<Struct<T>, T>(table, CellKind::k##Struct);
#include "cells.def"
  table.project = project<T>;
  table.workspace_elements = workspace_elements<T>;
  table.weight_gradient = weight_gradient<T>;
  return table;
}

constexpr Kernels all_kernels() {
  Kernels table{FUSED_RNN_TEXT(FUSED_RNN_ISA), FUSED_RNN_VECTOR_BYTES, {}, typed_kernels<float>(), typed_kernels<double>()};
#define FUSED_RNN_CELL(name, Struct) table.shapes[static_cast<int>(CellKind::k##Struct)] = shape_of<Struct<float>>(#name);
#include "cells.def"
  return table;
}

}  // namespace

const Kernels& kernels() {
  static constexpr Kernels table = all_kernels();
  return table;
}

}  // namespace FUSED_RNN_ISA
}  // namespace fused_rnn
