// A call of a layer from Python: its tensors and sizes, checked, and how the kernels read its weights.
//
// One call each way, from tensors to tensors: what is beside the kernels runs without the interpreter, whose code and data a
// walk has pushed out of the caches. New tensors come from torch.
#pragma once

#include <pybind11/pybind11.h>

#include <initializer_list>
#include <memory>
#include <string>
#include <vector>

#include "bind/cell_shapes.h"
#include "bind/new_tensors.h"
#include "run/isa.h"
#include "run/memory.h"

namespace fused_rnn {

// Whether rows follow one another without overlap, with contiguous columns.
inline bool has_rows(const Tensor& matrix) {
  const Index columns = matrix.shape(1);
  return (columns <= 1 || matrix.stride(1) == 1) && (matrix.shape(0) <= 1 || matrix.stride(0) >= columns);
}

// A tensor whose memory holds the numbers themselves: of a view with the other sign, a copy.
inline Operand take(py::handle object) {
  Operand operand;
  operand.owner = py::reinterpret_borrow<py::object>(object);
  if (Tensor::is_negated(object)) operand.owner = operand.owner.attr("resolve_neg")();
  operand.tensor = Tensor(operand.owner);
  return operand;
}

// Checks its dtype and sizes; it becomes a copy where the kernels do not know its strides. Names and sizes are put together for
// an error alone.
inline void fit(Operand& operand, const char* name, Dtype dtype, std::initializer_list<Index> sizes, bool strided = false) {
  const Tensor& tensor = operand.tensor;
  bool fits = tensor.dtype() == dtype && tensor.dimensions() == static_cast<int>(sizes.size());
  for (int i = 0; fits && i < tensor.dimensions(); ++i) fits = tensor.shape(i) == sizes.begin()[i];
  if (!fits) {
    refuse(name, std::string(dtype_name(dtype)) + " of shape " + text(Shape(sizes)),
           std::string(dtype_name(tensor.dtype())) + " of shape " + text(tensor));
  }
  if (!(strided ? has_rows(tensor) : tensor.contiguous())) {
    operand.owner = operand.owner.attr("contiguous")();
    operand.tensor = Tensor(operand.owner);
  }
}

// Reads a tensor of the given sizes, or None.
inline Operand read(py::handle object, const char* name, Dtype dtype, std::initializer_list<Index> sizes,
                    bool strided = false) {
  if (object.is_none()) return {};
  Operand operand = take(object);
  fit(operand, name, dtype, sizes, strided);
  return operand;
}

// The parameters of one recurrence; the biases and hr may be absent.
struct WeightOperands {
  Operand ih, hh, bias_ih, bias_hh, hr;
  bool any() const { return ih || hh || bias_ih || bias_hh || hr; }
};
constexpr std::size_t kWeights = 5;

// What a layer is a function of, and what else a call has.
struct LayerCall {
  // Chosen once: what is laid out for one instruction set is not for another.
  const Kernels& kernels;
  int cell;
  const CellShape& shape;
  Dtype dtype;
  py::object like;  // the input as it was given: new tensors have its dtype and device
  Operand input, reset;
  Operand states[2];  // absent for zero
  std::vector<WeightOperands> weights;
  std::vector<std::int64_t> batch_sizes, offsets;
  std::unique_ptr<bool[]> reverse;
  StepRows steps;
  Index rows, inputs, hidden, output;
  bool by_rows;  // whether the input is (R, I), and not (T, N, I)
  // A step of a cell: the input is (N, I), states are (N, ·), and h after the step is the output alone.
  bool step;
  int threads;
  Sharing sharing;

  LayerCall(const std::string& cell_name, const py::object& input_object, const py::object& states_object,
            const py::sequence& weights_object, Index length, Index batch, const py::object& batch_sizes_object,
            const py::sequence& reverse_flags, const py::object& reset_object, bool is_step, int thread_count,
            const std::string& sharing_name)
      : kernels(*current().load()),
        cell(cell_index(cell_name)),
        shape(kernels.shapes[cell]),
        like(input_object),
        step(is_step),
        threads(thread_count) {
    if (threads < 1) refuse("threads", "1 or more", std::to_string(threads));
    sharing = sharing_of(sharing_name);
    read_steps(length, batch, batch_sizes_object);
    read_reverse(reverse_flags);
    if (weights_object.size() != reverse_flags.size()) {
      refuse("weights", std::to_string(reverse_flags.size()) + ", one for each recurrence",
             std::to_string(weights_object.size()));
    }
    take_input(input_object);
    fit_input();
    weights.reserve(weights_object.size());
    for (const py::handle& one : weights_object) read_weights(one);
    read_states(states_object);
    reset = read(reset_object, "reset", Dtype::kBool, {recurrences(), rows});
    check_step();
  }

  // One recurrence over dense steps, whose sizes are those of the input, (T, N, I) or for a step (N, I).
  LayerCall(const std::string& cell_name, const py::object& input_object, const py::object& states_object,
            const py::object& weights_object, bool is_step, int thread_count)
      : kernels(*current().load()),
        cell(cell_index(cell_name)),
        shape(kernels.shapes[cell]),
        like(input_object),
        reverse(new bool[1]{false}),
        step(is_step),
        threads(thread_count),
        sharing(Sharing::kAuto) {
    if (threads < 1) refuse("threads", "1 or more", std::to_string(threads));
    take_input(input_object);
    check_dimensions("input", input.tensor, step ? 2 : 3);
    read_steps(step ? 1 : input.tensor.shape(0), input.tensor.shape(step ? 0 : 1), py::none());
    fit_input();
    read_weights(weights_object);
    read_states(states_object);
    check_step();
  }

  // What is done for single steps together, without weights and states: input (·, I), and the number of units.
  LayerCall(const std::string& cell_name, const py::object& input_object, Index units, int thread_count)
      : kernels(*current().load()),
        cell(cell_index(cell_name)),
        shape(kernels.shapes[cell]),
        like(input_object),
        hidden(units),
        output(units),
        by_rows(true),
        step(true),
        threads(thread_count),
        sharing(Sharing::kAuto) {
    if (threads < 1) refuse("threads", "1 or more", std::to_string(threads));
    take_input(input_object);
    check_dimensions("input", input.tensor, 2);
    steps.length = 1;
    steps.batch = rows = input.tensor.shape(0);
    inputs = input.tensor.shape(1);
  }

  // A layer whose weights are of another kind than the input: the caller reads them, and here there are biases alone, pairs of
  // bias_ih and bias_hh for each recurrence.
  LayerCall(const std::string& cell_name, const py::object& input_object, const py::object& states_object, Index units,
            const py::sequence& biases, Index length, Index batch, const py::object& batch_sizes_object,
            const py::sequence& reverse_flags, const py::object& reset_object, bool is_step, int thread_count,
            const std::string& sharing_name)
      : kernels(*current().load()),
        cell(cell_index(cell_name)),
        shape(kernels.shapes[cell]),
        like(input_object),
        hidden(units),
        output(units),
        step(is_step),
        threads(thread_count) {
    if (threads < 1) refuse("threads", "1 or more", std::to_string(threads));
    if (hidden < 1) refuse("hidden", "1 or more", std::to_string(hidden));
    sharing = sharing_of(sharing_name);
    read_steps(length, batch, batch_sizes_object);
    read_reverse(reverse_flags);
    take_input(input_object);
    dtype = Dtype::kFloat32;
    fit_input();
    for (const py::handle& one : biases) {
      const py::sequence pair = py::reinterpret_borrow<py::sequence>(one);
      weights.emplace_back();
      weights.back().bias_ih = read(py::object(pair[0]), "bias_ih", dtype, {gate_columns()});
      weights.back().bias_hh = read(py::object(pair[1]), "bias_hh", dtype, {gate_columns()});
    }
    read_states(states_object);
    reset = read(reset_object, "reset", Dtype::kBool, {recurrences(), rows});
    check_step();
  }

  Index recurrences() const { return static_cast<Index>(weights.size()); }
  int state_count() const { return shape.has_c ? 2 : 1; }
  Index state_size(int i) const { return i ? hidden : output; }
  Index tape_columns() const { return shape.tape * hidden; }
  // With a projection, the gradient of h comes after those of the gates.
  Index gradient_columns() const { return shape.gradients * hidden + (projected() ? output : 0); }
  Index gate_columns() const { return shape.gates * hidden; }
  bool projected() const { return static_cast<bool>(weights[0].hr); }
  Index input_stride() const { return by_rows ? (rows > 1 ? input.tensor.stride(0) : inputs) : inputs; }

  // Runs f without the lock of the interpreter, unless that takes longer to give away and to get back than f does.
  template <class F>
  void work(F&& f) const {
    constexpr double kFewMultiplications = 1 << 16;
    const double each = static_cast<double>(gate_columns()) * static_cast<double>(inputs + output);
    if (each * static_cast<double>(rows * recurrences()) <= kFewMultiplications) return f();
    const py::gil_scoped_release release;
    f();
  }

  // Steps t_begin .. t_end - 1 of recurrences d .. d + count - 1: what one call of the kernels works on. Its rows begin at
  // `row`.
  struct Span {
    Index d, count, t_begin, t_end, row, rows;
    std::vector<std::int64_t> offsets;
    Sizes sizes;
  };

  Index offset(Index t) const { return t == steps.length ? rows : steps.offset(t); }

  Span span(Index d, Index count, Index t_begin, Index t_end) const {
    Span s{d, count, t_begin, t_end, offset(t_begin), offset(t_end) - offset(t_begin), {}, {}};
    s.sizes.recurrences = count;
    s.sizes.hidden = hidden;
    s.sizes.output = output;
    s.sizes.steps.length = t_end - t_begin;
    s.sizes.steps.batch = steps.batch;
    if (steps.batch_sizes) {
      s.sizes.steps.batch_sizes = steps.batch_sizes + t_begin;
      s.offsets.assign(offsets.begin() + t_begin, offsets.begin() + t_end);
      for (std::int64_t& each : s.offsets) each -= s.row;
      s.sizes.steps.offsets = s.offsets.data();
    }
    s.sizes.reverse = reverse.get() + d;
    s.sizes.reset = reset ? reset.tensor.data<const bool>() + d * rows + s.row : nullptr;
    s.sizes.reset_stride = rows;
    s.sizes.threads = threads;
    s.sizes.sharing = sharing;
    return s;
  }

 private:
  static Sharing sharing_of(const std::string& name) {
    if (name == "auto") return Sharing::kAuto;
    if (name == "batch") return Sharing::kBatch;
    if (name == "units") return Sharing::kUnits;
    refuse("sharing", "auto, batch or units", name);
  }

  void read_steps(Index length, Index batch, const py::object& sizes) {
    if (length < 1) refuse("length", "1 or more", std::to_string(length));
    if (batch < 0) refuse("batch", "0 or more", std::to_string(batch));
    steps.length = length;
    steps.batch = batch;
    if (sizes.is_none()) {
      if (__builtin_mul_overflow(length, batch, &rows)) throw py::value_error("length * batch overflows");
      return;
    }
    const Operand given = read(sizes, "batch_sizes", Dtype::kInt64, {length});
    // Copied, so that what is checked is what the kernels read, whoever else holds the tensor.
    batch_sizes.assign(given.tensor.data<const std::int64_t>(), given.tensor.data<const std::int64_t>() + length);
    offsets.resize(batch_sizes.size());
    rows = 0;
    for (std::size_t t = 0; t < batch_sizes.size(); ++t) {
      const Index most = t ? batch_sizes[t - 1] : batch;
      if (batch_sizes[t] < 0 || batch_sizes[t] > most) {
        refuse("batch_sizes[" + std::to_string(t) + "]", "0 to " + std::to_string(most), std::to_string(batch_sizes[t]));
      }
      offsets[t] = rows;
      if (__builtin_add_overflow(rows, batch_sizes[t], &rows)) throw py::value_error("the sum of batch_sizes overflows");
    }
    steps.batch_sizes = batch_sizes.data();
    steps.offsets = offsets.data();
  }

  void take_input(const py::object& object) {
    input = take(object);
    dtype = input.tensor.dtype();
    if (dtype > Dtype::kFloat16) refuse("input", "float32, float64, bfloat16 or float16", dtype_name(dtype));
  }

  void fit_input() {
    const Tensor& x = input.tensor;
    by_rows = x.dimensions() == 2;
    if (!by_rows && x.dimensions() != 3) refuse("input", "(R, I) or (T, N, I)", text(x));
    inputs = x.shape(x.dimensions() - 1);
    if (by_rows) {
      fit(input, "input", dtype, {rows, inputs}, true);
    } else {
      fit(input, "input", dtype, {steps.length, steps.batch, inputs});
      if (!batch_sizes.empty()) refuse("input", "(R, I) with batch_sizes", text(x));
    }
  }

  void check_step() const {
    if (step && (steps.length != 1 || recurrences() != 1 || !by_rows || projected())) {
      throw py::value_error("step: expected one step of one recurrence without a projection, and an input (N, I)");
    }
  }

  void read_reverse(const py::sequence& flags) {
    if (flags.size() == 0) throw py::value_error("reverse: expected one flag for each recurrence, got none");
    reverse.reset(new bool[flags.size()]);
    for (std::size_t d = 0; d < flags.size(); ++d) reverse[d] = py::bool_(py::object(flags[d]));
  }

  void read_weights(py::handle given) {
    const py::tuple one = as_tuple(given);
    if (one.size() != kWeights) refuse("weights", "ih, hh, bias_ih, bias_hh and hr", std::to_string(one.size()));
    const auto at = [&](std::size_t i) { return py::handle(PyTuple_GET_ITEM(one.ptr(), static_cast<py::ssize_t>(i))); };
    const py::handle hr = at(4);
    if (at(0).is_none() || at(1).is_none()) refuse("weights", "weight_ih and weight_hh", "None");
    Operand hh = take(at(1));
    if (weights.empty()) {
      const Tensor& first = hh.tensor;
      check_dimensions("weight_hh", first, 2);
      if (first.shape(0) % shape.gates) refuse("weight_hh", std::to_string(shape.gates) + " * H rows", text(first));
      hidden = first.shape(0) / shape.gates;
      output = first.shape(1);
      if (!hr.is_none() && !shape.has_projection) refuse("weight_hr", "None for this cell", "a tensor");
      if (hr.is_none() && hidden != output) refuse("weight_hr", "weights, as P is not H", "None");
      if (!hidden || !output) refuse("weight_hh", "at least one unit", text(first));
    } else if (hr.is_none() == projected()) {
      refuse("weight_hr", "one for each recurrence or none", "some");
    }
    const Index gates = gate_columns();
    weights.emplace_back();
    WeightOperands& taken = weights.back();
    taken.ih = read(at(0), "weight_ih", dtype, {gates, inputs}, true);
    fit(hh, "weight_hh", dtype, {gates, output}, true);
    taken.hh = std::move(hh);
    taken.bias_ih = read(at(2), "bias_ih", dtype, {gates});
    taken.bias_hh = read(at(3), "bias_hh", dtype, {gates});
    taken.hr = read(hr, "weight_hr", dtype, {output, hidden}, true);
  }

  void read_states(const py::object& object) {
    if (object.is_none()) return;
    const py::sequence given = py::reinterpret_borrow<py::sequence>(object);
    if (given.size() != static_cast<std::size_t>(state_count())) {
      refuse("states", std::to_string(state_count()), std::to_string(given.size()));
    }
    for (int i = 0; i < state_count(); ++i) {
      const py::object state = given[static_cast<std::size_t>(i)];
      states[i] = step ? read(state, "states", dtype, {steps.batch, state_size(i)})
                       : read(state, "states", dtype, {recurrences(), steps.batch, state_size(i)});
      if (!states[i]) refuse("states", "tensors, or None for all", "None");
    }
  }
};

}  // namespace fused_rnn
