// fused_rnn._C: the CPU kernels for Python. Checks every argument, picks the instruction set, releases the GIL.
#include <pybind11/pybind11.h>

#include <memory>

#include "packed.h"
#include "single_step.h"
#include "tensors.h"
#include "whole_gradients.h"
#include "whole_layer.h"

namespace fused_rnn {
namespace {

// What both walks have in common.
struct Call {
  Call(const std::string& cell, const CheckedSteps& steps, const std::vector<bool>& reverse_flags, const Optional& reset,
       const Packed& packed, int threads, const std::string& sharing)
      : cell(cell_index(cell)), shape(kShapes[this->cell]), reverse(new bool[reverse_flags.size()]) {
    if (reverse_flags.empty()) throw py::value_error("reverse: expected one flag per recurrence, got none");
    if (threads < 1) refuse("threads", "1 or more", std::to_string(threads));
    std::copy(reverse_flags.begin(), reverse_flags.end(), reverse.get());
    sizes.recurrences = static_cast<Index>(reverse_flags.size());
    sizes.hidden = packed.hidden();
    sizes.output = packed.output();
    sizes.steps = steps.steps;
    sizes.reverse = reverse.get();
    sizes.threads = threads;
    if (reset) sizes.reset = contiguous<const bool>("reset", *reset, {steps.rows});
    if (sharing == "batch") {
      sizes.sharing = Sharing::kBatch;
    } else if (sharing == "units") {
      sizes.sharing = Sharing::kUnits;
    } else if (sharing != "auto") {
      refuse("sharing", "auto, batch or units", sharing);
    }
  }

  template <class T>
  T* state(const std::string& name, const Tensors& states, std::size_t index) const {
    if (states.size() != (shape.has_c ? 2 : 1)) {
      refuse(name, std::to_string(shape.has_c ? 2 : 1) + " states", std::to_string(states.size()));
    }
    return contiguous<T>(name + "[" + std::to_string(index) + "]", states[index],
                         {sizes.recurrences, sizes.steps.batch, index ? sizes.hidden : sizes.output});
  }

  const int cell;
  const CellShape& shape;
  Sizes sizes;

 private:
  std::unique_ptr<bool[]> reverse;
};

template <class T>
void forward_typed(Call& call, const CheckedSteps& steps, const Optional& input, const Optional& tape, const Tensor& out,
                   const Tensors& states, const Packed* weight_ih, const Packed& weight_hh, const Packed* weight_hr,
                   const Optional& bias, bool keep) {
  const Sizes& s = call.sizes;
  ForwardArgs<T> args;
  args.sizes = s;
  args.keep = keep;
  args.out = rows<T>("out", out, steps.rows, s.recurrences, s.output);
  if (weight_ih) {
    args.weight_ih =
        weight_ih->matrices<T>("weight_ih", call.cell, false, Product::kInput, s.recurrences, s.hidden, weight_ih->output());
    args.input_stride = matrix<T>("input", *input, steps.rows, weight_ih->output());
    args.input = input->data<const T>();
    check_apart("out", out, "input", *input);
  }
  if (tape) {
    args.tape = rows<T>("tape", *tape, steps.rows, s.recurrences, call.shape.tape * s.hidden);
    if (!call.shape.tape_is_out) {
      check_apart("tape", *tape, "out", out);
    } else if (tape->size() && (args.tape.data != args.out.data || args.tape.row_stride != args.out.row_stride)) {
      throw py::value_error("tape: expected the memory of out for this cell");
    }
    if (weight_ih) check_apart("tape", *tape, "input", *input);
  } else if (!weight_ih || keep) {
    refuse("tape", "a tensor, as it holds gates_x or is kept", "None");
  }
  args.states[0] = call.state<T>("states", states, 0);
  if (call.shape.has_c) args.states[1] = call.state<T>("states", states, 1);
  args.weight_hh = weight_hh.matrices<T>("weight_hh", call.cell, false, Product::kHidden, s.recurrences, s.hidden, s.output);
  args.weight_hr =
      weight_hr ? weight_hr->matrices<T>("weight_hr", call.cell, false, Product::kProjection, s.recurrences, s.hidden, s.output)
                : nullptr;
  if (bias) args.bias = contiguous<const T>("bias", *bias, {s.recurrences, call.shape.bias * s.hidden});
  const py::gil_scoped_release release;
  typed<T>(weight_hh.kernels()).forward[call.cell](args);
}

void check_input(const std::string& name, const Optional& input, const Packed* weight_ih, const Packed& weight_hh) {
  if (input.has_value() != (weight_ih != nullptr)) throw py::value_error(name + " and weight_ih: expected both or neither");
  if (weight_ih && (!weight_ih->in_panels() || &weight_ih->kernels() != &weight_hh.kernels())) {
    refuse("weight_ih", "weights packed in panels for the instruction set of weight_hh", weight_ih->kernels().isa);
  }
  if (weight_ih && !weight_hh.in_panels()) refuse("weight_hh", "weights packed in panels, as weight_ih is", "columns");
}

void check_projection(const Packed& weight_hh, const Packed* weight_hr) {
  if (!weight_hr && weight_hh.hidden() != weight_hh.output()) {
    refuse("weight_hr", "weights, as P is not H", "None");
  }
  if (weight_hr && &weight_hr->kernels() != &weight_hh.kernels()) {
    refuse("weight_hr", "weights packed for the instruction set of weight_hh", weight_hr->kernels().isa);
  }
}

void forward(const std::string& cell, const Optional& input, const Optional& tape, const Tensor& out, const Tensors& states,
             const Packed* weight_ih, const Packed& weight_hh, const Packed* weight_hr, const Optional& bias, Index length,
             Index batch, const Optional& batch_sizes, const Optional& offsets, const std::vector<bool>& reverse,
             const Optional& reset, bool keep, int threads, const std::string& sharing) {
  const CheckedSteps steps(length, batch, batch_sizes, offsets);
  check_projection(weight_hh, weight_hr);
  check_input("input", input, weight_ih, weight_hh);
  Call call(cell, steps, reverse, reset, weight_hh, threads, sharing);
  if (out.dtype() == Dtype::kFloat32) {
    forward_typed<float>(call, steps, input, tape, out, states, weight_ih, weight_hh, weight_hr, bias, keep);
  } else {
    forward_typed<double>(call, steps, input, tape, out, states, weight_ih, weight_hh, weight_hr, bias, keep);
  }
}

template <class T>
void backward_typed(Call& call, const CheckedSteps& steps, Index t_begin, Index t_end, const Tensor& d_gates,
                    const Tensors& d_states, const Optional& d_out, const Optional& d_cells, const Tensor& tape,
                    const Tensor& out, const Tensors& states_0, const Packed* weight_ih, const Packed& weight_hh,
                    const Packed* weight_hr, const Optional& d_input) {
  const Sizes& s = call.sizes;
  BackwardArgs<T> args;
  args.sizes = s;
  args.t_begin = t_begin;
  args.t_end = t_end;
  const StepRows& rows_of = s.steps;
  const Index walked = t_begin == t_end ? 0 : rows_of.offset(t_end - 1) + rows_of.count(t_end - 1) - rows_of.offset(t_begin);
  const Index columns = call.shape.gradients * s.hidden + (weight_hr ? s.output : 0);
  args.d_gates = rows<T>("d_gates", d_gates, walked, s.recurrences, columns);
  args.tape = rows<const T>("tape", tape, steps.rows, s.recurrences, call.shape.tape * s.hidden);
  args.out = rows<const T>("out", out, steps.rows, s.recurrences, s.output);
  check_apart("d_gates", d_gates, "tape", tape);
  check_apart("d_gates", d_gates, "out", out);
  if (d_out) {
    args.d_out = rows<const T>("d_out", *d_out, steps.rows, s.recurrences, s.output);
    check_apart("d_gates", d_gates, "d_out", *d_out);
  }
  if (d_cells) {
    if (!call.shape.has_c) refuse("d_cells", "None for a cell without c", "a tensor");
    args.d_cells = rows<const T>("d_cells", *d_cells, steps.rows, s.recurrences, s.hidden);
    check_apart("d_gates", d_gates, "d_cells", *d_cells);
  }
  for (std::size_t i = 0; i < (call.shape.has_c ? 2 : 1); ++i) {
    args.d_states[i] = call.state<T>("d_states", d_states, i);
    args.states_0[i] = call.state<const T>("states_0", states_0, i);
    check_apart("d_states", d_states[i], "states_0", states_0[i]);
  }
  args.weight_hh = weight_hh.matrices<T>("weight_hh", call.cell, true, Product::kHidden, s.recurrences, s.hidden, s.output);
  args.weight_hr =
      weight_hr ? weight_hr->matrices<T>("weight_hr", call.cell, true, Product::kProjection, s.recurrences, s.hidden, s.output)
                : nullptr;
  if (weight_ih) {
    if (s.recurrences != 1) refuse("weight_ih", "None with several recurrences", std::to_string(s.recurrences));
    args.inputs = weight_ih->output();
    args.weight_ih = weight_ih->matrices<T>("weight_ih", call.cell, true, Product::kInput, 1, s.hidden, args.inputs);
    args.d_input_stride = matrix<T>("d_input", *d_input, walked, args.inputs);
    args.d_input = d_input->data<T>();
    check_apart("d_input", *d_input, "d_gates", d_gates);
    check_apart("d_input", *d_input, "tape", tape);
    check_apart("d_input", *d_input, "out", out);
    if (args.d_out) check_apart("d_input", *d_input, "d_out", *d_out);
    if (args.d_cells) check_apart("d_input", *d_input, "d_cells", *d_cells);
  }
  const py::gil_scoped_release release;
  typed<T>(weight_hh.kernels()).backward[call.cell](args);
}

void backward(const std::string& cell, const Tensor& d_gates, const Tensors& d_states, const Optional& d_out,
              const Optional& d_cells, const Tensor& tape, const Tensor& out, const Tensors& states_0, const Packed* weight_ih,
              const Packed& weight_hh, const Packed* weight_hr, Index length, Index batch, const Optional& batch_sizes,
              const Optional& offsets, Index t_begin, Index t_end, const std::vector<bool>& reverse, const Optional& reset,
              const Optional& d_input, int threads, const std::string& sharing) {
  const CheckedSteps steps(length, batch, batch_sizes, offsets);
  check_projection(weight_hh, weight_hr);
  check_input("d_input", d_input, weight_ih, weight_hh);
  if (t_begin < 0 || t_end < t_begin || t_end > length) {
    refuse("t_begin, t_end", "0 <= t_begin <= t_end <= " + std::to_string(length), text(Shape{t_begin, t_end}));
  }
  Call call(cell, steps, reverse, reset, weight_hh, threads, sharing);
  if (tape.dtype() == Dtype::kFloat32) {
    backward_typed<float>(call, steps, t_begin, t_end, d_gates, d_states, d_out, d_cells, tape, out, states_0, weight_ih,
                          weight_hh, weight_hr, d_input);
  } else {
    backward_typed<double>(call, steps, t_begin, t_end, d_gates, d_states, d_out, d_cells, tape, out, states_0, weight_ih,
                           weight_hh, weight_hr, d_input);
  }
}

template <class T>
void project_typed(const Tensor& input, const Tensor& weight, const Tensor& out, int threads) {
  ProjectArgs<T> args;
  args.rows = input.shape(0);
  args.inner = input.shape(1);
  args.columns = weight.shape(0);
  args.input_stride = matrix<T>("input", input, args.rows, args.inner);
  args.weight_stride = matrix<T>("weight", weight, args.columns, args.inner);
  args.out_stride = matrix<T>("out", out, args.rows, args.columns);
  args.input = input.data<const T>();
  args.weight = weight.data<const T>();
  args.out = out.data<T>();
  args.threads = threads;
  check_apart("out", out, "input", input);
  check_apart("out", out, "weight", weight);
  const py::gil_scoped_release release;
  typed<T>(*current().load()).project(args);
}

void project(const Tensor& input, const Tensor& weight, const Tensor& out, int threads) {
  check_dimensions("input", input, 2);
  check_dimensions("weight", weight, 2);
  if (threads < 1) refuse("threads", "1 or more", std::to_string(threads));
  if (input.dtype() == Dtype::kFloat32) {
    project_typed<float>(input, weight, out, threads);
  } else {
    project_typed<double>(input, weight, out, threads);
  }
}

template <class T>
void weight_gradient_typed(const Tensor& d_gates, const Tensors& inputs, const Tensor& d_weight, const Optional& d_bias,
                           bool add, int threads) {
  WeightGradientArgs<T> args;
  args.rows = d_gates.shape(0);
  args.outputs = d_gates.shape(1);
  args.inputs = d_weight.shape(1);
  args.d_gates_stride = matrix<T>("d_gates", d_gates, args.rows, args.outputs);
  args.d_gates = d_gates.data<const T>();
  args.d_weight_stride = matrix<T>("d_weight", d_weight, args.outputs, args.inputs);
  args.d_weight = d_weight.data<T>();
  check_apart("d_weight", d_weight, "d_gates", d_gates);
  std::vector<Part<T>> parts;
  Index rows = 0;
  for (std::size_t i = 0; i < inputs.size(); ++i) {
    const std::string name = "inputs[" + std::to_string(i) + "]";
    check_dimensions(name, inputs[i], 2);
    const Index row_stride = matrix<T>(name, inputs[i], inputs[i].shape(0), args.inputs);
    parts.push_back({inputs[i].data<const T>(), inputs[i].shape(0), row_stride});
    check_apart("d_weight", d_weight, name, inputs[i]);
    rows += inputs[i].shape(0);
  }
  if (rows != args.rows) refuse("inputs", std::to_string(args.rows) + " rows in all", std::to_string(rows));
  args.parts = parts.data();
  if (d_bias) {
    args.d_bias = contiguous<T>("d_bias", *d_bias, {args.outputs});
    check_apart("d_bias", *d_bias, "d_gates", d_gates);
    check_apart("d_bias", *d_bias, "d_weight", d_weight);
  }
  args.add = add;
  args.threads = threads;
  const auto& kernels = typed<T>(*current().load());
  const Memory workspace(static_cast<std::size_t>(kernels.workspace_elements(args)) * static_cast<std::size_t>(threads) *
                         sizeof(T));
  args.workspace = static_cast<T*>(workspace.get());
  const py::gil_scoped_release release;
  kernels.weight_gradient(args);
}

void weight_gradient(const Tensor& d_gates, const Tensors& inputs, const Tensor& d_weight, const Optional& d_bias, bool add,
                     int threads) {
  check_dimensions("d_gates", d_gates, 2);
  check_dimensions("d_weight", d_weight, 2);
  if (threads < 1) refuse("threads", "1 or more", std::to_string(threads));
  if (d_gates.dtype() == Dtype::kFloat32) {
    weight_gradient_typed<float>(d_gates, inputs, d_weight, d_bias, add, threads);
  } else {
    weight_gradient_typed<double>(d_gates, inputs, d_weight, d_bias, add, threads);
  }
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "The CPU kernels of fused_rnn (contract: fused_rnn.kernels). Tensors are torch's.";
  m.def("cells", &cells, "The cells that the kernels know, and their sizes.");
  m.def("isas", &isas, "Instruction sets that this build and this machine have, best first.");
  m.def("isa", [] { return std::string(current().load()->isa); }, "The instruction set in use.");
  m.def("set_isa", &set_isa, py::arg("name"), "Use another instruction set for weights packed from now on.");
  py::class_<Memory>(m, "Memory", "A block of uninitialised memory that is kept for the next one when it goes.",
                     py::buffer_protocol())
      .def(py::init<std::size_t>(), py::arg("bytes"))
      .def_buffer([](Memory& memory) {
        return py::buffer_info(memory.get(), 1, py::format_descriptor<unsigned char>::format(),
                               static_cast<py::ssize_t>(memory.bytes()));
      });
  m.def("kept_bytes", &kept_bytes, "Bytes of unused blocks that are kept for later calls.");
  m.def("release_kept", &release_kept, "Give all unused blocks back to the system.");
  py::class_<Packed>(m, "Packed", "The D weights of one product, laid out for the kernels.")
      .def(py::init<const std::string&, const py::sequence&, bool, const std::string&, bool, int>(), py::arg("cell"),
           py::arg("weights"), py::arg("backward"), py::arg("product"), py::arg("as_columns"), py::arg("threads"));
  m.def("forward", &forward, py::arg("cell"), py::arg("input"), py::arg("tape"), py::arg("out"), py::arg("states"),
        py::arg("weight_ih").none(true), py::arg("weight_hh"), py::arg("weight_hr").none(true), py::arg("bias"),
        py::arg("length"), py::arg("batch"), py::arg("batch_sizes"), py::arg("offsets"), py::arg("reverse"), py::arg("reset"),
        py::arg("keep"), py::arg("threads"), py::arg("sharing") = "auto", "Walk all steps forward.");
  m.def("project", &project, py::arg("input"), py::arg("weight"), py::arg("out"), py::arg("threads"),
        "Write input times weight transposed to out, for a few rows.");
  m.def("weight_gradient", &weight_gradient, py::arg("d_gates"), py::arg("inputs"), py::arg("d_weight"), py::arg("d_bias"),
        py::arg("add"), py::arg("threads"),
        "Write d_gates transposed times the inputs to d_weight and the sums of its columns to d_bias, or add them.");
  m.def("step", &step, py::arg("cell"), py::arg("input"), py::arg("states"), py::arg("weights"), py::arg("batch_first"),
        py::arg("threads"), "Take one step of a stack of layers without a backward, or return None.");
  m.def("layer_forward", &layer_forward, py::arg("cell"), py::arg("input"), py::arg("states"), py::arg("weights"),
        py::arg("keep"), py::arg("threads"), "Run a layer forward, or return None.");
  m.def("layer_backward", &layer_backward, py::arg("cell"), py::arg("input"), py::arg("states"), py::arg("weights"),
        py::arg("out"), py::arg("tape"), py::arg("d_out"), py::arg("d_states"), py::arg("input_wanted"),
        py::arg("states_wanted"), py::arg("weights_wanted"), py::arg("threads"), "Return the gradients of a layer, or None.");
  m.def("backward", &backward, py::arg("cell"), py::arg("d_gates"), py::arg("d_states"), py::arg("d_out"), py::arg("d_cells"),
        py::arg("tape"), py::arg("out"), py::arg("states_0"), py::arg("weight_ih").none(true), py::arg("weight_hh"),
        py::arg("weight_hr").none(true), py::arg("length"), py::arg("batch"), py::arg("batch_sizes"), py::arg("offsets"),
        py::arg("t_begin"), py::arg("t_end"), py::arg("reverse"), py::arg("reset"), py::arg("d_input"), py::arg("threads"),
        py::arg("sharing") = "auto", "Walk steps t_begin .. t_end - 1 backward.");
}

}  // namespace fused_rnn
