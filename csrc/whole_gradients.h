// The gradients of a layer in one call from Python; see whole_layer.h.
#pragma once

#include "whole_layer.h"

namespace fused_rnn {

// Gradients of the gates exist for a chunk of time: so many bytes, but at least so many rows, because every chunk adds to the
// weights' gradients, which are read and written once more for it. As in fused_rnn/gradients.py.
constexpr Index kChunkBytes = Index{16} << 20;
constexpr Index kChunkRows = 2048;

// Each thread copies all of the inputs for its share of a weight's gradient: with fewer rows than columns, unless all is small,
// torch's product is faster. As in fused_rnn/kernels/cpp.
constexpr double kFewMultiplications = 1 << 18;

// The gradients of a layer's parameters, summed over chunks of time.
template <class T>
class WholeGradients {
 public:
  WholeGradients(const TypedKernels<T>& kernels, const WholeLayer<T>& layer, T* const* to)
      : kernels_(kernels), layer_(layer), to_(to), apart_(layer.shape.gradients > layer.shape.gates) {
    // Of one bias alone, the sums over all gates still come first.
    if (!to[2] && to[3] && apart_) sums_ = room<T>(layer.shape.gates * layer.hidden());
    bias_ = to[2] ? to[2] : apart_ && to[3] ? static_cast<T*>(sums_.get()) : to[3];
  }

  // What steps t_begin .. t_end - 1 contribute, whose d_gates are given.
  void add(const T* d_gates, const T* out, const T* h_0, Index t_begin, Index t_end) {
    const Index H = layer_.hidden(), batch = layer_.batch, rows = (t_end - t_begin) * batch;
    const Index columns = layer_.shape.gradients * H, gates = layer_.shape.gates * H;
    const Part<T> input = {layer_.input + t_begin * batch * layer_.inputs, rows, layer_.inputs};
    product(d_gates + columns - gates, gates, &input, rows, layer_.inputs, to_[0], bias_);
    // h one step earlier.
    const Part<T> parts[] = {{h_0, batch, H}, {out, rows - batch, H}};
    const Part<T> later = {out + (t_begin - 1) * batch * H, rows, H};
    const Part<T>* previous = t_begin ? &later : parts;
    if (!apart_) {
      product(d_gates, gates, previous, rows, H, to_[1], nullptr);
    } else {
      // All but the last gate; then hn, whose gradient comes first in a row and last in the weight.
      product(d_gates + columns - gates, gates - H, previous, rows, H, to_[1], nullptr);
      product(d_gates, H, previous, rows, H, to_[1] + (gates - H) * H, to_[3] ? to_[3] + gates - H : nullptr);
    }
    begun_ = true;
  }

  // After all chunks: both biases have the same gradient but for what is apart.
  void finish() {
    if (to_[3] && to_[3] != bias_) std::copy_n(bias_, (layer_.shape.gates - apart_) * layer_.hidden(), to_[3]);
  }

 private:
  void product(const T* d_gates, Index outputs, const Part<T>* parts, Index rows, Index inputs, T* d_weight, T* d_bias) {
    WeightGradientArgs<T> args;
    args.rows = rows;
    args.outputs = outputs;
    args.inputs = inputs;
    args.d_gates = d_gates;
    args.d_gates_stride = layer_.shape.gradients * layer_.hidden();
    args.parts = parts;
    args.add = begun_;
    args.d_weight = d_weight;
    args.d_weight_stride = inputs;
    args.d_bias = d_bias;
    args.threads = layer_.threads;
    const Memory workspace = room<T>(kernels_.workspace_elements(args) * layer_.threads);
    args.workspace = static_cast<T*>(workspace.get());
    kernels_.weight_gradient(args);
  }

  const TypedKernels<T>& kernels_;
  const WholeLayer<T>& layer_;
  T* const* const to_;  // weight_ih, weight_hh and the biases, which may be null
  const bool apart_;
  Memory sums_;
  T* bias_;
  bool begun_ = false;
};

// What the backward reads and writes beside the layer.
template <class T>
struct WholeBackward {
  const T *out, *tape, *d_out = nullptr;
  const T* d_states_after[2] = {};  // or null for zero
  T* d_input = nullptr;
  T* d_states[2] = {};
  T* d_weights[kStepWeights] = {};
};

template <class T>
void run_backward(const WholeLayer<T>& layer, const WholeBackward<T>& call) {
  const CellShape& shape = layer.shape;
  const auto& kernels = typed<T>(*current().load());
  const Index H = layer.hidden(), batch = layer.batch, size = batch * H, columns = shape.gradients * H;
  const int count = shape.has_c ? 2 : 1;
  // States that were not given were zero; what no one wants of their gradients is still carried from step to step.
  Memory states_0, d_states;
  if (!layer.states[0]) {
    states_0 = room<T>(size);
    std::fill_n(static_cast<T*>(states_0.get()), size, T{});
  }
  if (!call.d_states[0]) d_states = room<T>(count * size);
  BackwardArgs<T> args;
  args.sizes = layer.sizes();
  for (int i = 0; i < count; ++i) {
    args.states_0[i] = layer.states[i] ? layer.states[i] : static_cast<const T*>(states_0.get());
    args.d_states[i] = call.d_states[i] ? call.d_states[i] : static_cast<T*>(d_states.get()) + i * size;
    if (call.d_states_after[i]) {
      std::copy_n(call.d_states_after[i], size, args.d_states[i]);
    } else {
      std::fill_n(args.d_states[i], size, T{});
    }
  }
  args.out = {call.out, H, H};
  args.tape = {call.tape, shape.tape * H, shape.tape * H};
  if (call.d_out) args.d_out = {call.d_out, H, H};
  const Laid<T> weight_hh(kernels, layer, Product::kHidden, true);
  args.weight_hh = &weight_hh.matrix;
  args.weight_hr = nullptr;
  const Laid<T> weight_ih = call.d_input ? Laid<T>(kernels, layer, Product::kInput, true) : Laid<T>();
  if (call.d_input) {
    args.weight_ih = &weight_ih.matrix;
    args.d_input_stride = args.inputs = layer.inputs;
  }
  const Index row_bytes = columns * static_cast<Index>(sizeof(T));
  const bool whole = layer.rows() <= kChunkBytes / row_bytes;
  const Index steps = whole ? layer.length : std::max<Index>(1, std::max(kChunkRows, kChunkBytes / row_bytes) / batch);
  const Memory d_gates = room<T>(std::min(steps, layer.length) * batch * columns);
  args.d_gates = {static_cast<T*>(d_gates.get()), columns, columns};
  WholeGradients<T> gradients(kernels, layer, call.d_weights);
  for (Index t = (layer.length - 1) / steps * steps; t >= 0; t -= steps) {
    args.t_begin = t;
    args.t_end = std::min(t + steps, layer.length);
    if (call.d_input) args.d_input = call.d_input + t * batch * layer.inputs;
    kernels.backward[layer.cell](args);
    if (call.d_weights[0]) gradients.add(args.d_gates.data, call.out, args.states_0[0], t, args.t_end);
  }
  if (call.d_weights[0]) gradients.finish();
}

// A tensor of the shape that is expected, or null; false if it cannot be read as it is.
template <class T>
bool read_whole(const char* name, const py::object& object, std::initializer_list<Index> sizes, const T*& data) {
  if (object.is_none()) return true;
  if (!Tensor::is_plain(object)) return false;
  const Tensor tensor(object);
  check_sizes<T>(name, 0, tensor, sizes);
  data = tensor.data<const T>();
  return tensor.contiguous();
}

template <class T>
py::object layer_backward_typed(WholeLayer<T>& layer, const py::object& input, const Tensor& x, const py::object& states,
                                const py::sequence& weights, const py::object& out, const py::object& tape,
                                const py::object& d_out, const py::sequence& d_after, bool input_wanted, bool states_wanted,
                                bool weights_wanted) {
  if (!layer.read(x, states, weights)) return py::none();
  const CellShape& shape = layer.shape;
  const Index H = layer.hidden(), gates = shape.gates * H;
  const double multiplications = static_cast<double>(layer.rows()) * gates * layer.inputs;
  if (weights_wanted && gates < layer.inputs && multiplications > kFewMultiplications) return py::none();
  const std::size_t count = shape.has_c ? 2 : 1;
  if (d_after.size() != count) refuse("d_states", std::to_string(count), std::to_string(d_after.size()));
  if (tape.is_none() != shape.tape_is_out) refuse("tape", "None if it is the output, else a tensor", "another");
  WholeBackward<T> call;
  call.out = call.tape = nullptr;
  if (!read_whole<T>("out", out, {layer.length, layer.batch, H}, call.out) || !call.out) return py::none();
  if (shape.tape_is_out) {
    call.tape = call.out;
  } else if (!read_whole<T>("tape", tape, {layer.rows(), 1, shape.tape * H}, call.tape)) {
    return py::none();
  }
  if (!read_whole<T>("d_out", d_out, {layer.length, layer.batch, H}, call.d_out)) return py::none();
  for (std::size_t i = 0; i < count; ++i) {
    if (!read_whole<T>("d_states", d_after[i], {1, layer.batch, H}, call.d_states_after[i])) return py::none();
  }
  bool fresh = true;
  const auto result = [&](bool wanted, std::initializer_list<Index> sizes, T*& data) -> py::object {
    if (!wanted) return py::none();
    py::object made = new_tensor(input, sizes, sizeof(T));
    const Tensor tensor(made);
    fresh = fresh && is_new<T>(tensor, sizes);
    data = tensor.data<T>();
    return made;
  };
  py::list results;
  results.append(result(input_wanted, {layer.length, layer.batch, layer.inputs}, call.d_input));
  for (std::size_t i = 0; i < count; ++i) results.append(result(states_wanted, {1, layer.batch, H}, call.d_states[i]));
  results.append(result(weights_wanted, {gates, layer.inputs}, call.d_weights[0]));
  results.append(result(weights_wanted, {gates, H}, call.d_weights[1]));
  results.append(result(weights_wanted && layer.weights.bias_ih, {gates}, call.d_weights[2]));
  results.append(result(weights_wanted && layer.weights.bias_hh, {gates}, call.d_weights[3]));
  if (!fresh) return py::none();
  {
    const py::gil_scoped_release release;
    run_backward(layer, call);
  }
  return py::tuple(results);
}

// The gradients of input, states and the weights that there are, None where they are not wanted; arguments as of layer_forward,
// and its results. d_out and each of d_states may be None for zero. Returns None, with nothing done, as layer_forward does.
inline py::object layer_backward(const std::string& cell, const py::object& input, const py::object& states,
                                 const py::sequence& weights, const py::object& out, const py::object& tape,
                                 const py::object& d_out, const py::sequence& d_states, bool input_wanted, bool states_wanted,
                                 bool weights_wanted, int threads) {
  return with_layer(cell, input, states, weights, threads, [&](auto& layer, const Tensor& x) {
    return layer_backward_typed(layer, input, x, states, weights, out, tape, d_out, d_states, input_wanted, states_wanted,
                                weights_wanted);
  });
}

}  // namespace fused_rnn
