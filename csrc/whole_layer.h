// A layer in one call from Python, forward or backward: one direction over dense steps, without projection. What is beside the
// kernels then runs without the interpreter, whose code and data a walk has pushed out of the caches. Any other layer goes
// through the calls that this one is made of (module.cpp), one by one. New tensors come from torch.
#pragma once

#include <pybind11/pybind11.h>

#include <algorithm>
#include <initializer_list>
#include <string>

#include "packed.h"
#include "single_step.h"
#include "tensors.h"

namespace fused_rnn {

// So few rows of large weights are bound by the reading of them, which single products of few rows do best.
constexpr Index kFewestRows = 8;
constexpr Index kSmallWeights = Index{2} << 20;

// The input's weights are laid out as they are needed where the kernels take all rows in one turn, or large ones in two.
constexpr Index kLooseRows = 96;

// One and two sequences read the recurrence's weights as they are for so many steps: laying them out takes longer than it
// gains. If they come from beyond the caches, and begin with whole vectors, it gains little.
constexpr Index kStepsInColumns = 16;
constexpr Index kStepsOfLargeInColumns = 64;
constexpr Index kVectorBytes = 64;

// Smaller tensors are torch's alone, as in fused_rnn/memory.py.
constexpr double kKeptBytes = 256 << 10;

// A new contiguous tensor of the dtype and device of `like`.
inline py::object new_tensor(py::handle like, std::initializer_list<Index> sizes, Index item) {
  struct Names {
    py::object empty, new_empty, dtype, device;
    Names() {
      empty = py::module_::import("fused_rnn.memory").attr("empty");
      new_empty = py::str("new_empty");
      dtype = py::str("dtype");
      device = py::str("device");
    }
  };
  // Never freed: the interpreter may be gone by the time that statics are.
  static const Names* names = new Names();
  py::tuple shape(sizes.size());
  double bytes = static_cast<double>(item);
  for (std::size_t i = 0; i < sizes.size(); ++i) {
    shape[i] = sizes.begin()[i];
    bytes *= static_cast<double>(sizes.begin()[i]);
  }
  if (bytes >= kKeptBytes) return names->empty(shape, like.attr(names->dtype), like.attr(names->device));
  PyObject* arguments[] = {like.ptr(), shape.ptr()};
  PyObject* made = PyObject_VectorcallMethod(names->new_empty.ptr(), arguments, 2, nullptr);
  if (!made) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(made);
}

// The sizes and operands that both directions of a layer have.
template <class T>
struct WholeLayer {
  int cell;
  const CellShape& shape;
  Index length, batch, inputs;
  const T* input;
  StepArgs<T> weights;  // of which the weights are read
  const T* states[2] = {};
  int threads;
  bool reverse = false, large = false;

  Index hidden() const { return weights.hidden; }
  Index rows() const { return length * batch; }

  // False where another way is better, or the memory cannot be read as it is.
  bool read(const Tensor& x, const py::object& states_object, const py::sequence& weights_object) {
    length = x.shape(0);
    batch = x.shape(1);
    inputs = x.shape(2);
    input = x.data<const T>();
    weights.hidden = Tensor(py::object(weights_object[1])).shape(1);
    if (x.size() == 0 || hidden() == 0 || !x.contiguous()) return false;
    if (!read_layer<T>(weights_object, 0, shape, inputs, weights)) return false;
    const double bytes = static_cast<double>(shape.gates) * hidden() * (inputs + hidden()) * sizeof(T);
    large = bytes > kSmallWeights;
    if (rows() < kFewestRows && large) return false;
    if (states_object.is_none()) return true;
    const py::sequence given = py::reinterpret_borrow<py::sequence>(states_object);
    const std::size_t count = shape.has_c ? 2 : 1;
    if (given.size() != count) refuse("states", std::to_string(count), std::to_string(given.size()));
    for (std::size_t i = 0; i < count; ++i) {
      const Tensor state(py::object(given[i]));
      check_sizes<T>("states", i, state, {1, batch, hidden()});
      if (!state.contiguous()) return false;
      states[i] = state.data<const T>();
    }
    return true;
  }

  // How the kernels read the weights.
  Layout layout(Product product, bool backward) const {
    if (product == Product::kInput) {
      const bool loose = rows() <= (large ? 2 : 1) * kLooseRows && batch <= kMostLooseBatch;
      return !loose ? Layout::kPanels : backward ? Layout::kRows : Layout::kColumns;
    }
    if (backward || batch > 2) return Layout::kPanels;
    const bool slow = !large || batch == 2 || weights.weight_hh_stride * sizeof(T) % kVectorBytes;
    return length < (slow ? kStepsInColumns : kStepsOfLargeInColumns) ? Layout::kColumns : Layout::kPanels;
  }

  Sizes sizes() const {
    Sizes s;
    s.recurrences = 1;
    s.hidden = s.output = hidden();
    s.steps.length = length;
    s.steps.batch = batch;
    s.reverse = &reverse;
    s.threads = threads;
    return s;
  }
};

// Memory for so many elements.
template <class T>
Memory room(Index elements) {
  return Memory(static_cast<std::size_t>(elements) * sizeof(T));
}

// One weight of a layer as the kernels read it.
template <class T>
struct Laid {
  Laid() = default;
  Laid(const TypedKernels<T>& kernels, const WholeLayer<T>& layer, Product product, bool backward) {
    const bool of_input = product == Product::kInput;
    PackArgs<T> args;
    args.backward = backward;
    args.product = product;
    args.weight = of_input ? layer.weights.weight_ih : layer.weights.weight_hh;
    args.row_stride = of_input ? layer.weights.weight_ih_stride : layer.weights.weight_hh_stride;
    args.hidden = layer.hidden();
    args.output = of_input ? layer.inputs : layer.hidden();
    args.threads = layer.threads;
    const Index carried_back = (of_input ? layer.shape.gates : layer.shape.feedback) * layer.hidden();
    matrix = {args.weight, layer.layout(product, backward), backward ? carried_back : args.output, args.row_stride};
    if (matrix.layout != Layout::kPanels) return;
    memory = room<T>(kernels.panel_elements[layer.cell](args));
    args.panels = static_cast<T*>(memory.get());
    matrix.data = args.panels;
    kernels.pack[layer.cell](args);
  }
  Memory memory;
  Matrix<T> matrix;
};

// The bias that the kernels add: sums, and last what a cell keeps apart of bias_hh.
template <class T>
void sum_biases(const WholeLayer<T>& layer, T* to) {
  const T *ih = layer.weights.bias_ih, *hh = layer.weights.bias_hh;
  const Index H = layer.hidden(), gates = layer.shape.gates * H, together = gates - (layer.shape.bias * H - gates);
  for (Index i = 0; i < gates; ++i) to[i] = (ih ? ih[i] : T{}) + (hh && i < together ? hh[i] : T{});
  for (Index i = together; i < gates; ++i) to[gates - together + i] = hh ? hh[i] : T{};
}

template <class T>
py::object layer_forward_typed(WholeLayer<T>& layer, const py::object& input, const Tensor& x, const py::object& states,
                               const py::sequence& weights, bool keep) {
  if (!layer.read(x, states, weights)) return py::none();
  const CellShape& shape = layer.shape;
  const Index H = layer.hidden(), blocks = shape.tape * H;
  const py::object out = new_tensor(input, {layer.length, layer.batch, H}, sizeof(T));
  py::object tape = py::none();
  if (keep && !shape.tape_is_out) tape = new_tensor(input, {layer.rows(), 1, blocks}, sizeof(T));
  py::tuple after(shape.has_c ? 2 : 1);
  for (std::size_t i = 0; i < after.size(); ++i) after[i] = new_tensor(input, {1, layer.batch, H}, sizeof(T));

  ForwardArgs<T> args;
  args.sizes = layer.sizes();
  args.keep = keep;
  const Tensor out_new(out), h_new(after[0]), c_new = shape.has_c ? Tensor(after[1]) : Tensor();
  const Tensor tape_new = tape.is_none() ? Tensor() : Tensor(tape);
  if (!is_new<T>(out_new, {layer.length, layer.batch, H}) || !is_new<T>(h_new, {1, layer.batch, H}) ||
      (shape.has_c && !is_new<T>(c_new, {1, layer.batch, H})) ||
      (!tape.is_none() && !is_new<T>(tape_new, {layer.rows(), 1, blocks}))) {
    return py::none();
  }
  args.out = {out_new.data<T>(), H, H};
  if (!tape.is_none()) args.tape = {tape_new.data<T>(), blocks, blocks};
  if (shape.tape_is_out) args.tape = args.out;
  args.input = layer.input;
  args.input_stride = layer.inputs;
  args.states[0] = h_new.data<T>();
  if (shape.has_c) args.states[1] = c_new.data<T>();
  {
    const py::gil_scoped_release release;
    const auto& kernels = typed<T>(*current().load());
    const Index size = layer.batch * H;
    for (int i = 0; i < (shape.has_c ? 2 : 1); ++i) {
      if (layer.states[i]) {
        std::copy_n(layer.states[i], size, args.states[i]);
      } else {
        std::fill_n(args.states[i], size, T{});
      }
    }
    const Memory bias = room<T>(shape.bias * H);
    if (layer.weights.bias_ih || layer.weights.bias_hh) {
      sum_biases(layer, static_cast<T*>(bias.get()));
      args.bias = static_cast<const T*>(bias.get());
    }
    const Laid<T> weight_ih(kernels, layer, Product::kInput, false), weight_hh(kernels, layer, Product::kHidden, false);
    args.weight_ih = &weight_ih.matrix;
    args.weight_hh = &weight_hh.matrix;
    args.weight_hr = nullptr;
    kernels.forward[layer.cell](args);
  }
  return py::make_tuple(out, after, tape);
}

// Checks what both calls have in common, and calls f(layer, input as a Tensor) in its dtype, or returns None.
template <class F>
py::object with_layer(const std::string& cell, const py::object& input, const py::object& states, const py::sequence& weights,
                      int threads, F&& f) {
  const int index = cell_index(cell);
  if (threads < 1) refuse("threads", "1 or more", std::to_string(threads));
  if (weights.size() != kStepWeights) refuse("weights", std::to_string(kStepWeights), std::to_string(weights.size()));
  if (!Tensor::is_plain(input)) return py::none();
  for (std::size_t i = 0; i < kStepWeights; ++i) {
    const py::object weight = weights[i];
    if (!(i > 1 && weight.is_none()) && !Tensor::is_plain(weight)) return py::none();
  }
  if (!states.is_none()) {
    for (const py::handle& state : states) {
      if (!Tensor::is_plain(state)) return py::none();
    }
  }
  const Tensor x(input);
  if (x.dimensions() != 3) return py::none();
  check_dimensions("weights[1]", Tensor(py::object(weights[1])), 2);
  const auto run = [&](auto zero) {
    WholeLayer<decltype(zero)> layer{index, kShapes[index], 0, 0, 0, nullptr, {}, {}, threads};
    return f(layer, x);
  };
  if (x.dtype() == Dtype::kFloat32) return run(0.0f);
  if (x.dtype() == Dtype::kFloat64) return run(0.0);
  return py::none();
}

// input (T, N, I); states (1, N, H) each, or None for zero; weights: kStepWeights. Returns out (T, N, H), the states after the
// walk, and with `keep` the tape (T * N, 1, ·), None where it is the output. Returns None, with nothing done, for what is
// another layer. Raises ValueError for sizes that do not fit each other.
inline py::object layer_forward(const std::string& cell, const py::object& input, const py::object& states,
                                const py::sequence& weights, bool keep, int threads) {
  return with_layer(cell, input, states, weights, threads,
                    [&](auto& layer, const Tensor& x) { return layer_forward_typed(layer, input, x, states, weights, keep); });
}

}  // namespace fused_rnn
