// fused_rnn._C: the CPU kernels for Python. Checks every argument, picks the instruction set, releases the GIL.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <atomic>
#include <cstdlib>
#include <memory>
#include <new>

#include "arrays.h"
#include "kernels.h"
#include "memory.h"

namespace fused_rnn {
namespace {

// ---- instruction sets: best first

std::vector<const Kernels*> instruction_sets() {
  std::vector<const Kernels*> found;
#if defined(__x86_64__)
  __builtin_cpu_init();
#endif
#if defined(FUSED_RNN_HAVE_AVX512)
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("fma")) {
    found.push_back(&avx512::kernels());
  }
#endif
#if defined(FUSED_RNN_HAVE_AVX2)
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) found.push_back(&avx2::kernels());
#endif
  found.push_back(&baseline::kernels());
  return found;
}

std::atomic<const Kernels*>& current() {
  static std::atomic<const Kernels*> kernels{instruction_sets().front()};
  return kernels;
}

std::vector<std::string> isas() {
  std::vector<std::string> names;
  for (const Kernels* kernels : instruction_sets()) names.emplace_back(kernels->isa);
  return names;
}

void set_isa(const std::string& name) {
  std::string known;
  for (const Kernels* kernels : instruction_sets()) {
    if (name == kernels->isa) {
      current().store(kernels);
      return;
    }
    known += (known.empty() ? "" : ", ") + std::string(kernels->isa);
  }
  refuse("isa", "one that this machine and this build have: " + known, name);
}

// ---- cells

// The sizes that the checks need (csrc/<cell>.h has the same for the kernels).
struct CellShape {
  const char* name;
  int gates, tape, gradients, bias;
  bool has_c, has_projection, tape_is_out;
};

constexpr CellShape kShapes[kCellKinds] = {{"rnn_tanh", 1, 1, 1, 1, false, false, true},
                                           {"rnn_relu", 1, 1, 1, 1, false, false, true},
                                           {"lstm", 4, 5, 4, 4, true, true, false},
                                           {"gru", 3, 4, 4, 4, false, false, false}};

int cell_index(const std::string& name) {
  for (int i = 0; i < kCellKinds; ++i) {
    if (name == kShapes[i].name) return i;
  }
  refuse("cell", "rnn_tanh, rnn_relu, lstm or gru", name);
}

template <class T>
const TypedKernels<T>& typed(const Kernels& kernels) {
  if constexpr (sizeof(T) == 4) {
    return kernels.f32;
  } else {
    return kernels.f64;
  }
}

// ---- packed weights

// The D weights of one product, as the kernels of one instruction set read them.
class Packed {
 public:
  Packed(const std::string& cell, std::vector<py::array> weights, bool backward, bool projection, bool as_columns, int threads)
      : cell_(cell_index(cell)), backward_(backward), projection_(projection), kernels_(current().load()) {
    if (weights.empty()) throw py::value_error("weights: expected one per recurrence, got none");
    if (as_columns && backward) throw py::value_error("as_columns: expected False for the backward, got True");
    if (projection && !kShapes[cell_].has_projection) throw py::value_error("projection: " + cell + " has none");
    if (weights[0].ndim() != 2) refuse("weights[0]", "2 dimensions", text(weights[0]));
    const Index gates = kShapes[cell_].gates;
    if (projection) {
      output_ = weights[0].shape(0);
      hidden_ = weights[0].shape(1);
    } else {
      if (weights[0].shape(0) % gates) refuse("weights[0]", std::to_string(gates) + " * H rows", text(weights[0]));
      hidden_ = weights[0].shape(0) / gates;
      output_ = weights[0].shape(1);
    }
    if (hidden_ == 0 || output_ == 0) refuse("weights[0]", "at least one unit", text(weights[0]));
    single_ = py::isinstance<py::array_t<float>>(weights[0]);
    if (single_) {
      fill<float>(weights, as_columns, threads, matrices32_);
    } else {
      fill<double>(weights, as_columns, threads, matrices64_);
    }
    if (as_columns) sources_ = std::move(weights);
  }
  Packed(const Packed&) = delete;

  // The matrices, if they are the ones that a call with these sizes needs.
  template <class T>
  const Matrix<T>* matrices(const std::string& name, int cell, bool backward, bool projection, Index recurrences, Index hidden,
                            Index output) const {
    if (cell != cell_ || backward != backward_ || projection != projection_) {
      refuse(name, "weights packed for this cell, direction and product", "others");
    }
    if (single_ != (sizeof(T) == 4)) refuse(name, "weights of the other arguments' dtype", "another");
    const Index count = static_cast<Index>(single_ ? matrices32_.size() : matrices64_.size());
    if (count != recurrences || hidden != hidden_ || output != output_) {
      refuse(name, "D, H, P = " + text(Shape{recurrences, hidden, output}), text(Shape{count, hidden_, output_}));
    }
    if constexpr (sizeof(T) == 4) {
      return matrices32_.data();
    } else {
      return matrices64_.data();
    }
  }

  const Kernels& kernels() const { return *kernels_; }
  Index hidden() const { return hidden_; }
  Index output() const { return output_; }

 private:
  template <class T>
  void fill(std::vector<py::array>& weights, bool as_columns, int threads, std::vector<Matrix<T>>& matrices) {
    const Index rows = projection_ ? output_ : kShapes[cell_].gates * hidden_, columns = projection_ ? hidden_ : output_;
    PackArgs<T> args;
    args.backward = backward_;
    args.projection = projection_;
    args.hidden = hidden_;
    args.output = output_;
    args.threads = threads;
    const auto& kernels = typed<T>(*kernels_);
    const Index elements = kernels.panel_elements[cell_](args);
    const Index inner = backward_ ? (projection_ ? output_ : rows) : columns;
    if (!as_columns) panels_ = Memory(static_cast<std::size_t>(elements) * weights.size() * sizeof(T));
    for (std::size_t d = 0; d < weights.size(); ++d) {
      const std::string name = "weights[" + std::to_string(d) + "]";
      check_shape<T>(name, weights[d], {rows, columns});
      if (columns > 1 && stride<T>(name, weights[d], 1) != 1) refuse(name, "contiguous rows", "strides");
      args.weight = pointer<const T>(name, weights[d]);
      args.row_stride = stride<T>(name, weights[d], 0);
      if (as_columns) {
        matrices.push_back({args.weight, Layout::kColumns, inner, args.row_stride});
      } else {
        args.panels = static_cast<T*>(panels_.get()) + static_cast<Index>(d) * elements;
        matrices.push_back({args.panels, Layout::kPanels, inner, 0});
        const py::gil_scoped_release release;
        kernels.pack[cell_](args);
      }
    }
  }

  int cell_;
  bool backward_, projection_, single_ = true;
  const Kernels* kernels_;
  Index hidden_ = 0, output_ = 0;
  Memory panels_;
  std::vector<py::array> sources_;  // keeps weights that are read in place
  std::vector<Matrix<float>> matrices32_;
  std::vector<Matrix<double>> matrices64_;
};

// ---- calls

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
void forward_typed(Call& call, const CheckedSteps& steps, py::array& tape, py::array& out, std::vector<py::array>& states,
                   const Packed& weight_hh, const Packed* weight_hr, const py::object& bias_object, bool keep) {
  const Sizes& s = call.sizes;
  ForwardArgs<T> args;
  args.sizes = s;
  args.keep = keep;
  args.tape = rows<T>("tape", tape, steps.rows, s.recurrences, call.shape.tape * s.hidden);
  args.out = rows<T>("out", out, steps.rows, s.recurrences, s.output);
  if (!call.shape.tape_is_out) {
    check_apart("tape", tape, "out", out);
  } else if (tape.size() && (args.tape.data != args.out.data || args.tape.row_stride != args.out.row_stride)) {
    throw py::value_error("tape: expected the memory of out for this cell");
  }
  args.states[0] = call.state<T>("states", states, 0);
  if (call.shape.has_c) args.states[1] = call.state<T>("states", states, 1);
  args.weight_hh = weight_hh.matrices<T>("weight_hh", call.cell, false, false, s.recurrences, s.hidden, s.output);
  args.weight_hr =
      weight_hr ? weight_hr->matrices<T>("weight_hr", call.cell, false, true, s.recurrences, s.hidden, s.output) : nullptr;
  py::array bias;
  if (!bias_object.is_none()) {
    bias = py::cast<py::array>(bias_object);
    args.bias = contiguous<const T>("bias", bias, {s.recurrences, call.shape.bias * s.hidden});
  }
  const py::gil_scoped_release release;
  typed<T>(weight_hh.kernels()).forward[call.cell](args);
}

void check_projection(const Packed& weight_hh, const Packed* weight_hr) {
  if (!weight_hr && weight_hh.hidden() != weight_hh.output()) {
    refuse("weight_hr", "weights, as P is not H", "None");
  }
  if (weight_hr && &weight_hr->kernels() != &weight_hh.kernels()) {
    refuse("weight_hr", "weights packed for the instruction set of weight_hh", weight_hr->kernels().isa);
  }
}

void forward(const std::string& cell, py::array tape, py::array out, std::vector<py::array> states, const Packed& weight_hh,
             const Packed* weight_hr, const py::object& bias, Index length, Index batch, const py::object& batch_sizes,
             const py::object& offsets, const std::vector<bool>& reverse, const py::object& reset, bool keep, int threads,
             const std::string& sharing) {
  const CheckedSteps steps(length, batch, batch_sizes, offsets);
  check_projection(weight_hh, weight_hr);
  Call call(cell, steps, reverse, reset, weight_hh, threads, sharing);
  if (py::isinstance<py::array_t<float>>(tape)) {
    forward_typed<float>(call, steps, tape, out, states, weight_hh, weight_hr, bias, keep);
  } else {
    forward_typed<double>(call, steps, tape, out, states, weight_hh, weight_hr, bias, keep);
  }
}

template <class T>
void backward_typed(Call& call, const CheckedSteps& steps, Index t_begin, Index t_end, py::array& d_gates,
                    std::vector<py::array>& d_states, const py::object& d_out, py::array& tape, py::array& out,
                    std::vector<py::array>& states_0, const Packed& weight_hh, const Packed* weight_hr) {
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
  for (std::size_t i = 0; i < (call.shape.has_c ? 2 : 1); ++i) {
    args.d_states[i] = call.state<T>("d_states", d_states, i);
    args.states_0[i] = call.state<const T>("states_0", states_0, i);
    check_apart("d_states", d_states[i], "states_0", states_0[i]);
  }
  args.weight_hh = weight_hh.matrices<T>("weight_hh", call.cell, true, false, s.recurrences, s.hidden, s.output);
  args.weight_hr =
      weight_hr ? weight_hr->matrices<T>("weight_hr", call.cell, true, true, s.recurrences, s.hidden, s.output) : nullptr;
  const py::gil_scoped_release release;
  typed<T>(weight_hh.kernels()).backward[call.cell](args);
}

void backward(const std::string& cell, py::array d_gates, std::vector<py::array> d_states, const py::object& d_out,
              py::array tape, py::array out, std::vector<py::array> states_0, const Packed& weight_hh, const Packed* weight_hr,
              Index length, Index batch, const py::object& batch_sizes, const py::object& offsets, Index t_begin, Index t_end,
              const std::vector<bool>& reverse, const py::object& reset, int threads, const std::string& sharing) {
  const CheckedSteps steps(length, batch, batch_sizes, offsets);
  check_projection(weight_hh, weight_hr);
  if (t_begin < 0 || t_end < t_begin || t_end > length) {
    refuse("t_begin, t_end", "0 <= t_begin <= t_end <= " + std::to_string(length), text(Shape{t_begin, t_end}));
  }
  Call call(cell, steps, reverse, reset, weight_hh, threads, sharing);
  if (py::isinstance<py::array_t<float>>(tape)) {
    backward_typed<float>(call, steps, t_begin, t_end, d_gates, d_states, d_out, tape, out, states_0, weight_hh, weight_hr);
  } else {
    backward_typed<double>(call, steps, t_begin, t_end, d_gates, d_states, d_out, tape, out, states_0, weight_hh, weight_hr);
  }
}

// One matrix of `name`: rows x columns with contiguous columns; returns its row stride.
template <class T>
Index matrix(const std::string& name, const py::array& array, Index row_count, Index columns) {
  check_shape<T>(name, array, {row_count, columns});
  if (array.size() == 0) return columns;
  if (columns > 1 && stride<T>(name, array, 1) != 1) refuse(name, "contiguous rows", "strides");
  const Index row = stride<T>(name, array, 0);
  if (row_count > 1 && row < columns) refuse(name, "rows that do not overlap", std::to_string(row));
  return row;
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
  m.def("advise_huge_pages", &advise_huge_pages, py::arg("address"), py::arg("bytes"),
        "Ask the system to back fresh memory with huge pages: one page fault instead of 512.");
  m.def("kept_bytes", &kept_bytes, "Bytes of unused blocks that are kept for later calls.");
  m.def("release_kept", &release_kept, "Give all unused blocks back to the system.");
  py::class_<Packed>(m, "Packed", "The D weights of one product, laid out for the kernels.")
      .def(py::init<const std::string&, std::vector<py::array>, bool, bool, bool, int>(), py::arg("cell"), py::arg("weights"),
           py::arg("backward"), py::arg("projection"), py::arg("as_columns"), py::arg("threads"));
  m.def("forward", &forward, py::arg("cell"), py::arg("tape"), py::arg("out"), py::arg("states"), py::arg("weight_hh"),
        py::arg("weight_hr").none(true), py::arg("bias"), py::arg("length"), py::arg("batch"), py::arg("batch_sizes"),
        py::arg("offsets"), py::arg("reverse"), py::arg("reset"), py::arg("keep"), py::arg("threads"),
        py::arg("sharing") = "auto", "Walk all steps forward.");
  m.def("project", &project, py::arg("input"), py::arg("weight"), py::arg("out"), py::arg("threads"),
        "Write input times weight transposed to out, for a few rows.");
  m.def("step", &step, py::arg("cell"), py::arg("input"), py::arg("states"), py::arg("new_states"), py::arg("out"),
        py::arg("weight_ih"), py::arg("weight_hh"), py::arg("bias_ih"), py::arg("bias_hh"), py::arg("threads"),
        "Take one step of a few rows without a backward.");
  m.def("backward", &backward, py::arg("cell"), py::arg("d_gates"), py::arg("d_states"), py::arg("d_out"), py::arg("tape"),
        py::arg("out"), py::arg("states_0"), py::arg("weight_hh"), py::arg("weight_hr").none(true), py::arg("length"),
        py::arg("batch"), py::arg("batch_sizes"), py::arg("offsets"), py::arg("t_begin"), py::arg("t_end"), py::arg("reverse"),
        py::arg("reset"), py::arg("threads"), py::arg("sharing") = "auto", "Walk steps t_begin .. t_end - 1 backward.");
}

}  // namespace fused_rnn
