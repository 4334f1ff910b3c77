// The cells for code outside the kernels: their sizes by number, and their numbers by name.
#pragma once

#include <pybind11/pybind11.h>

#include <string>

#include "bind/tensors.h"
#include "run/isa.h"

namespace fused_rnn {

namespace py = pybind11;

// By CellKind. The sizes are the same in all instruction sets.
inline const CellShape* cell_shapes() { return current().load()->shapes; }

inline int cell_index(const std::string& name) {
  for (int i = 0; i < kCellKinds; ++i) {
    if (name == cell_shapes()[i].name) return i;
  }
  std::string known;
  for (int i = 0; i < kCellKinds; ++i)
    known += (i == 0 ? "" : i + 1 < kCellKinds ? ", " : " or ") + std::string(cell_shapes()[i].name);
  refuse("cell", known, name);
}

// The table for Python: what fused_rnn/cells says of each cell, as far as the kernels know it. Blocks by number.
inline py::list cells() {
  py::list rows;
  for (int i = 0; i < kCellKinds; ++i) {
    const CellShape& shape = cell_shapes()[i];
    const auto known = [](int number) -> py::object {
      return number < 0 ? py::object(py::none()) : py::object(py::int_(number));
    };
    py::list weight_blocks;
    for (int b = 0; b < shape.feedback; ++b) weight_blocks.append(shape.weight_blocks[b]);
    py::dict row;
    row["name"] = shape.name;
    row["gates"] = shape.gates;
    row["tape"] = shape.tape;
    row["bias"] = shape.bias;
    row["d_gates"] = shape.gradients;
    row["weight_blocks"] = weight_blocks;
    row["apart"] = known(shape.apart);
    row["later"] = shape.later;
    row["operand"] = known(shape.tape_operand);
    row["cell_state"] = known(shape.tape_c);
    row["reads_before"] = shape.previous == Previous::kNone ? py::object(py::none())
                                                            : py::object(py::str(shape.previous == Previous::kH ? "h" : "c"));
    row["direct"] = shape.direct;
    row["projection"] = shape.has_projection;
    row["tape_is_out"] = shape.tape_is_out;
    rows.append(row);
  }
  return rows;
}

}  // namespace fused_rnn
