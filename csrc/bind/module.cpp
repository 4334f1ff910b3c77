// fused_rnn._C: the CPU kernels for Python.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "bind/cell_shapes.h"
#include "bind/int8_forward.h"
#include "bind/layer_backward.h"
#include "bind/layer_forward.h"
#include "bind/loop_gradients.h"
#include "run/isa.h"
#include "run/machine.h"
#include "run/memory.h"

namespace fused_rnn {

PYBIND11_MODULE(_C, m) {
  check_instruction_sets();
  m.doc() = "The CPU kernels of fused_rnn. Tensors are torch's.";
  m.def("cells", &cells, "The cells that the kernels know, and their sizes.");
  m.def("isas", &isas, "Instruction sets that this build and this machine have, best first.");
  m.def("isa", [] { return std::string(current().load()->isa); }, "The instruction set in use.");
  m.def("set_isa", &set_isa, py::arg("name"), "Use another instruction set for calls from now on.");
  py::class_<Memory>(m, "Memory", "A block of uninitialised memory that is kept for the next one when it goes.",
                     py::buffer_protocol())
      .def(py::init<std::size_t>(), py::arg("bytes"))
      .def_buffer([](Memory& memory) {
        return py::buffer_info(memory.get(), 1, py::format_descriptor<unsigned char>::format(),
                               static_cast<py::ssize_t>(memory.bytes()));
      });
  m.def("kept_bytes", &kept_bytes, "Bytes of unused blocks that are kept for later calls.");
  m.def("release_kept", &release_kept, "Give all unused blocks back to the system.");
  m.def("layer_forward", &layer_forward, py::arg("cell"), py::arg("input"), py::arg("states"), py::arg("weights"),
        py::arg("length"), py::arg("batch"), py::arg("batch_sizes"), py::arg("reverse"), py::arg("reset"), py::arg("keep"),
        py::arg("cell_states"), py::arg("step"), py::arg("threads"), py::arg("batch_first") = false,
        py::arg("sharing") = "auto", "Run a layer: out, the states after it, c of every step or None, and the tape or None.");
  m.def("plain_forward", &plain_forward, py::arg("cell"), py::arg("input"), py::arg("states"), py::arg("weights"),
        py::arg("step"), py::arg("threads"), py::arg("batch_first") = false,
        "Run one recurrence over dense steps of plain tensors: out and the states after it, or None for others.");
  m.def("int8_forward", &int8_forward, py::arg("cell"), py::arg("input"), py::arg("states"), py::arg("hidden"),
        py::arg("weights"), py::arg("length"), py::arg("batch"), py::arg("batch_sizes"), py::arg("reverse"), py::arg("reset"),
        py::arg("cell_states"), py::arg("step"), py::arg("threads"), py::arg("batch_first") = false,
        py::arg("sharing") = "auto", py::arg("vnni") = true,
        "Run a layer with int8 weights: out, the states after it, and c of every step or None.");
  m.def("has_vnni", &has_vnni, "Whether this machine has instructions for products of 8-bit numbers beside avx512.");
  m.def("layer_backward", &layer_backward, py::arg("cell"), py::arg("input"), py::arg("states"), py::arg("weights"),
        py::arg("length"), py::arg("batch"), py::arg("batch_sizes"), py::arg("reverse"), py::arg("reset"), py::arg("out"),
        py::arg("tape"), py::arg("d_out"), py::arg("d_cells"), py::arg("d_states"), py::arg("wanted"), py::arg("gates_wanted"),
        py::arg("step"), py::arg("threads"), py::arg("sharing") = "auto",
        "The gradients of a layer's input, states and weights.");
  m.def("loop_gradients", &loop_gradients, py::arg("cell"), py::arg("steps"), py::arg("wanted"), py::arg("threads"),
        "The gradients of the weights that many single steps share.");
}

}  // namespace fused_rnn
