// fused_rnn._C: the CPU kernels for Python. Checks every argument, picks the instruction set, releases the GIL.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <memory>

#include "arrays.h"
#include "packed.h"

namespace fused_rnn {
namespace {

// What both walks have in common.
struct Call {
  Call(const std::string& cell, const CheckedSteps& steps, const std::vector<bool>& reverse_flags, const py::object& reset,
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
    if (!reset.is_none()) {
      reset_array = py::cast<py::array>(reset);
      sizes.reset = contiguous<const bool>("reset", reset_array, {steps.rows});
    }
    if (sharing == "batch") {
      sizes.sharing = Sharing::kBatch;
    } else if (sharing == "units") {
      sizes.sharing = Sharing::kUnits;
    } else if (sharing != "auto") {
      refuse("sharing", "auto, batch or units", sharing);
    }
  }

  template <class T>
  T* state(const std::string& name, std::vector<py::array>& states, std::size_t index) const {
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
  py::array reset_array;
};

template <class T>
void forward_typed(Call& call, const CheckedSteps& steps, const py::object& input_object, const py::object& tape_object,
                   py::array& out, std::vector<py::array>& states, const Packed* weight_ih, const Packed& weight_hh,
                   const Packed* weight_hr, const py::object& bias_object, bool keep) {
  const Sizes& s = call.sizes;
  ForwardArgs<T> args;
  args.sizes = s;
  args.keep = keep;
  args.out = rows<T>("out", out, steps.rows, s.recurrences, s.output);
  py::array input, tape;
  if (weight_ih) {
    input = py::cast<py::array>(input_object);
    args.weight_ih =
        weight_ih->matrices<T>("weight_ih", call.cell, false, Product::kInput, s.recurrences, s.hidden, weight_ih->output());
    args.input_stride = matrix<T>("input", input, steps.rows, weight_ih->output());
    args.input = pointer<const T>("input", input);
    check_apart("out", out, "input", input);
  }
  if (!tape_object.is_none()) {
    tape = py::cast<py::array>(tape_object);
    args.tape = rows<T>("tape", tape, steps.rows, s.recurrences, call.shape.tape * s.hidden);
    if (!call.shape.tape_is_out) {
      check_apart("tape", tape, "out", out);
    } else if (tape.size() && (args.tape.data != args.out.data || args.tape.row_stride != args.out.row_stride)) {
      throw py::value_error("tape: expected the memory of out for this cell");
    }
    if (weight_ih) check_apart("tape", tape, "input", input);
  } else if (!weight_ih || keep) {
    refuse("tape", "an array, as it holds gates_x or is kept", "None");
  }
  args.states[0] = call.state<T>("states", states, 0);
  if (call.shape.has_c) args.states[1] = call.state<T>("states", states, 1);
  args.weight_hh = weight_hh.matrices<T>("weight_hh", call.cell, false, Product::kHidden, s.recurrences, s.hidden, s.output);
  args.weight_hr =
      weight_hr ? weight_hr->matrices<T>("weight_hr", call.cell, false, Product::kProjection, s.recurrences, s.hidden, s.output)
                : nullptr;
  py::array bias;
  if (!bias_object.is_none()) {
    bias = py::cast<py::array>(bias_object);
    args.bias = contiguous<const T>("bias", bias, {s.recurrences, call.shape.bias * s.hidden});
  }
  const py::gil_scoped_release release;
  typed<T>(weight_hh.kernels()).forward[call.cell](args);
}

void check_input(const std::string& name, const py::object& input, const Packed* weight_ih, const Packed& weight_hh) {
  if (input.is_none() != (weight_ih == nullptr)) throw py::value_error(name + " and weight_ih: expected both or neither");
  if (weight_ih && (!weight_ih->in_panels() || &weight_ih->kernels() != &weight_hh.kernels())) {
    refuse("weight_ih", "weights packed in panels for the instruction set of weight_hh", weight_ih->kernels().isa);
  }
}

void check_projection(const Packed& weight_hh, const Packed* weight_hr) {
  if (!weight_hr && weight_hh.hidden() != weight_hh.output()) {
    refuse("weight_hr", "weights, as P is not H", "None");
  }
  if (weight_hr && &weight_hr->kernels() != &weight_hh.kernels()) {
    refuse("weight_hr", "weights packed for the instruction set of weight_hh", weight_hr->kernels().isa);
  }
}

void forward(const std::string& cell, const py::object& input, const py::object& tape, py::array out,
             std::vector<py::array> states, const Packed* weight_ih, const Packed& weight_hh, const Packed* weight_hr,
             const py::object& bias, Index length, Index batch, const py::object& batch_sizes, const py::object& offsets,
             const std::vector<bool>& reverse, const py::object& reset, bool keep, int threads, const std::string& sharing) {
  const CheckedSteps steps(length, batch, batch_sizes, offsets);
  check_projection(weight_hh, weight_hr);
  check_input("input", input, weight_ih, weight_hh);
  Call call(cell, steps, reverse, reset, weight_hh, threads, sharing);
  if (py::isinstance<py::array_t<float>>(out)) {
    forward_typed<float>(call, steps, input, tape, out, states, weight_ih, weight_hh, weight_hr, bias, keep);
  } else {
    forward_typed<double>(call, steps, input, tape, out, states, weight_ih, weight_hh, weight_hr, bias, keep);
  }
}

template <class T>
void backward_typed(Call& call, const CheckedSteps& steps, Index t_begin, Index t_end, py::array& d_gates,
                    std::vector<py::array>& d_states, const py::object& d_out, const py::object& d_cells, py::array& tape,
                    py::array& out, std::vector<py::array>& states_0, const Packed* weight_ih, const Packed& weight_hh,
                    const Packed* weight_hr, const py::object& d_input_object) {
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
  py::array d_out_array;
  if (!d_out.is_none()) {
    d_out_array = py::cast<py::array>(d_out);
    args.d_out = rows<const T>("d_out", d_out_array, steps.rows, s.recurrences, s.output);
    check_apart("d_gates", d_gates, "d_out", d_out_array);
  }
  py::array d_cells_array;
  if (!d_cells.is_none()) {
    if (!call.shape.has_c) refuse("d_cells", "None for a cell without c", "an array");
    d_cells_array = py::cast<py::array>(d_cells);
    args.d_cells = rows<const T>("d_cells", d_cells_array, steps.rows, s.recurrences, s.hidden);
    check_apart("d_gates", d_gates, "d_cells", d_cells_array);
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
  py::array d_input;
  if (weight_ih) {
    if (s.recurrences != 1) refuse("weight_ih", "None with several recurrences", std::to_string(s.recurrences));
    args.inputs = weight_ih->output();
    args.weight_ih = weight_ih->matrices<T>("weight_ih", call.cell, true, Product::kInput, 1, s.hidden, args.inputs);
    d_input = py::cast<py::array>(d_input_object);
    args.d_input_stride = matrix<T>("d_input", d_input, walked, args.inputs);
    args.d_input = pointer<T>("d_input", d_input);
    check_apart("d_input", d_input, "d_gates", d_gates);
    check_apart("d_input", d_input, "tape", tape);
    check_apart("d_input", d_input, "out", out);
    if (args.d_out) check_apart("d_input", d_input, "d_out", d_out_array);
    if (args.d_cells) check_apart("d_input", d_input, "d_cells", d_cells_array);
  }
  const py::gil_scoped_release release;
  typed<T>(weight_hh.kernels()).backward[call.cell](args);
}

void backward(const std::string& cell, py::array d_gates, std::vector<py::array> d_states, const py::object& d_out,
              const py::object& d_cells, py::array tape, py::array out, std::vector<py::array> states_0,
              const Packed* weight_ih, const Packed& weight_hh, const Packed* weight_hr, Index length, Index batch,
              const py::object& batch_sizes, const py::object& offsets, Index t_begin, Index t_end,
              const std::vector<bool>& reverse, const py::object& reset, const py::object& d_input, int threads,
              const std::string& sharing) {
  const CheckedSteps steps(length, batch, batch_sizes, offsets);
  check_projection(weight_hh, weight_hr);
  check_input("d_input", d_input, weight_ih, weight_hh);
  if (t_begin < 0 || t_end < t_begin || t_end > length) {
    refuse("t_begin, t_end", "0 <= t_begin <= t_end <= " + std::to_string(length), text(Shape{t_begin, t_end}));
  }
  Call call(cell, steps, reverse, reset, weight_hh, threads, sharing);
  if (py::isinstance<py::array_t<float>>(tape)) {
    backward_typed<float>(call, steps, t_begin, t_end, d_gates, d_states, d_out, d_cells, tape, out, states_0, weight_ih,
                          weight_hh, weight_hr, d_input);
  } else {
    backward_typed<double>(call, steps, t_begin, t_end, d_gates, d_states, d_out, d_cells, tape, out, states_0, weight_ih,
                           weight_hh, weight_hr, d_input);
  }
}

template <class T>
void project_typed(py::array& input, py::array& weight, py::array& out, int threads) {
  ProjectArgs<T> args;
  args.rows = input.shape(0);
  args.inner = input.shape(1);
  args.columns = weight.shape(0);
  args.input_stride = matrix<T>("input", input, args.rows, args.inner);
  args.weight_stride = matrix<T>("weight", weight, args.columns, args.inner);
  args.out_stride = matrix<T>("out", out, args.rows, args.columns);
  args.input = pointer<const T>("input", input);
  args.weight = pointer<const T>("weight", weight);
  args.out = pointer<T>("out", out);
  args.threads = threads;
  check_apart("out", out, "input", input);
  check_apart("out", out, "weight", weight);
  const py::gil_scoped_release release;
  typed<T>(*current().load()).project(args);
}

void project(py::array input, py::array weight, py::array out, int threads) {
  if (input.ndim() != 2) refuse("input", "2 dimensions", text(input));
  if (weight.ndim() != 2) refuse("weight", "2 dimensions", text(weight));
  if (threads < 1) refuse("threads", "1 or more", std::to_string(threads));
  if (py::isinstance<py::array_t<float>>(input)) {
    project_typed<float>(input, weight, out, threads);
  } else {
    project_typed<double>(input, weight, out, threads);
  }
}

template <class T>
void weight_gradient_typed(py::array& d_gates, std::vector<py::array>& inputs, py::array& d_weight, const py::object& d_bias,
                           bool add, int threads) {
  WeightGradientArgs<T> args;
  args.rows = d_gates.shape(0);
  args.outputs = d_gates.shape(1);
  args.inputs = d_weight.shape(1);
  args.d_gates_stride = matrix<T>("d_gates", d_gates, args.rows, args.outputs);
  args.d_gates = pointer<const T>("d_gates", d_gates);
  args.d_weight_stride = matrix<T>("d_weight", d_weight, args.outputs, args.inputs);
  args.d_weight = pointer<T>("d_weight", d_weight);
  check_apart("d_weight", d_weight, "d_gates", d_gates);
  std::vector<Part<T>> parts;
  Index rows = 0;
  for (std::size_t i = 0; i < inputs.size(); ++i) {
    const std::string name = "inputs[" + std::to_string(i) + "]";
    if (inputs[i].ndim() != 2) refuse(name, "2 dimensions", text(inputs[i]));
    const Index row_stride = matrix<T>(name, inputs[i], inputs[i].shape(0), args.inputs);
    parts.push_back({pointer<const T>(name, inputs[i]), inputs[i].shape(0), row_stride});
    check_apart("d_weight", d_weight, name, inputs[i]);
    rows += inputs[i].shape(0);
  }
  if (rows != args.rows) refuse("inputs", std::to_string(args.rows) + " rows in all", std::to_string(rows));
  args.parts = parts.data();
  py::array bias;
  if (!d_bias.is_none()) {
    bias = py::cast<py::array>(d_bias);
    args.d_bias = contiguous<T>("d_bias", bias, {args.outputs});
    check_apart("d_bias", bias, "d_gates", d_gates);
    check_apart("d_bias", bias, "d_weight", d_weight);
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

void weight_gradient(py::array d_gates, std::vector<py::array> inputs, py::array d_weight, const py::object& d_bias, bool add,
                     int threads) {
  if (d_gates.ndim() != 2) refuse("d_gates", "2 dimensions", text(d_gates));
  if (d_weight.ndim() != 2) refuse("d_weight", "2 dimensions", text(d_weight));
  if (threads < 1) refuse("threads", "1 or more", std::to_string(threads));
  if (py::isinstance<py::array_t<float>>(d_gates)) {
    weight_gradient_typed<float>(d_gates, inputs, d_weight, d_bias, add, threads);
  } else {
    weight_gradient_typed<double>(d_gates, inputs, d_weight, d_bias, add, threads);
  }
}

template <class T>
void step_typed(int cell, py::array& input, std::vector<py::array>& states, std::vector<py::array>& new_states, py::array& out,
                py::array& weight_ih, py::array& weight_hh, const py::object& bias_ih, const py::object& bias_hh, int threads) {
  const CellShape& shape = kShapes[cell];
  const std::size_t count = shape.has_c ? 2 : 1;
  if (states.size() != count || new_states.size() != count)
    refuse("states, new_states", std::to_string(count) + " each", "others");
  StepArgs<T> args;
  args.rows = input.shape(0);
  args.inputs = input.shape(1);
  args.hidden = weight_hh.shape(1);
  args.threads = threads;
  args.input_stride = matrix<T>("input", input, args.rows, args.inputs);
  args.input = pointer<const T>("input", input);
  args.weight_ih_stride = matrix<T>("weight_ih", weight_ih, shape.gates * args.hidden, args.inputs);
  args.weight_hh_stride = matrix<T>("weight_hh", weight_hh, shape.gates * args.hidden, args.hidden);
  args.weight_ih = pointer<const T>("weight_ih", weight_ih);
  args.weight_hh = pointer<const T>("weight_hh", weight_hh);
  py::array biases[2];
  const T** bias_pointers[2] = {&args.bias_ih, &args.bias_hh};
  const py::object* bias_objects[2] = {&bias_ih, &bias_hh};
  const char* names[2] = {"bias_ih", "bias_hh"};
  for (int i = 0; i < 2; ++i) {
    if (bias_objects[i]->is_none()) continue;
    biases[i] = py::cast<py::array>(*bias_objects[i]);
    *bias_pointers[i] = contiguous<const T>(names[i], biases[i], {shape.gates * args.hidden});
  }
  const Shape size = {args.rows, args.hidden};
  args.h = contiguous<const T>("states[0]", states[0], size);
  args.h_new = contiguous<T>("new_states[0]", new_states[0], size);
  args.out = contiguous<T>("out", out, size);
  check_apart("new_states[0]", new_states[0], "states[0]", states[0]);
  check_apart("out", out, "states[0]", states[0]);
  check_apart("out", out, "new_states[0]", new_states[0]);
  check_apart("new_states[0]", new_states[0], "input", input);
  check_apart("out", out, "input", input);
  if (shape.has_c) {
    args.c = contiguous<const T>("states[1]", states[1], size);
    args.c_new = contiguous<T>("new_states[1]", new_states[1], size);
    check_apart("new_states[1]", new_states[1], "states[1]", states[1]);
  }
  const py::gil_scoped_release release;
  typed<T>(*current().load()).step[cell](args);
}

void step(const std::string& cell, py::array input, std::vector<py::array> states, std::vector<py::array> new_states,
          py::array out, py::array weight_ih, py::array weight_hh, const py::object& bias_ih, const py::object& bias_hh,
          int threads) {
  if (input.ndim() != 2) refuse("input", "2 dimensions", text(input));
  if (weight_hh.ndim() != 2) refuse("weight_hh", "2 dimensions", text(weight_hh));
  if (threads < 1) refuse("threads", "1 or more", std::to_string(threads));
  const int index = cell_index(cell);
  if (py::isinstance<py::array_t<float>>(input)) {
    step_typed<float>(index, input, states, new_states, out, weight_ih, weight_hh, bias_ih, bias_hh, threads);
  } else {
    step_typed<double>(index, input, states, new_states, out, weight_ih, weight_hh, bias_ih, bias_hh, threads);
  }
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "The CPU kernels of fused_rnn (contract: fused_rnn.kernels). Arrays are NumPy's.";
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
      .def(py::init<const std::string&, std::vector<py::array>, bool, const std::string&, bool, int>(), py::arg("cell"),
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
  m.def("step", &step, py::arg("cell"), py::arg("input"), py::arg("states"), py::arg("new_states"), py::arg("out"),
        py::arg("weight_ih"), py::arg("weight_hh"), py::arg("bias_ih"), py::arg("bias_hh"), py::arg("threads"),
        "Take one step of a few rows without a backward.");
  m.def("backward", &backward, py::arg("cell"), py::arg("d_gates"), py::arg("d_states"), py::arg("d_out"), py::arg("d_cells"),
        py::arg("tape"), py::arg("out"), py::arg("states_0"), py::arg("weight_ih").none(true), py::arg("weight_hh"),
        py::arg("weight_hr").none(true), py::arg("length"), py::arg("batch"), py::arg("batch_sizes"), py::arg("offsets"),
        py::arg("t_begin"), py::arg("t_end"), py::arg("reverse"), py::arg("reset"), py::arg("d_input"), py::arg("threads"),
        py::arg("sharing") = "auto", "Walk steps t_begin .. t_end - 1 backward.");
}

}  // namespace fused_rnn
