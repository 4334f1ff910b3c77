// One step of a stack of layers for Python, as short as can be: it takes little longer than the reading of the weights, and in
// a small layer every call into Python counts. New tensors come from torch.
#pragma once

#include <pybind11/pybind11.h>

#include <initializer_list>
#include <string>
#include <vector>

#include "packed.h"
#include "tensors.h"

namespace fused_rnn {

// More rows are better served by packed weights.
constexpr Index kMostStepRows = 4;

// Of each layer: weight_ih, weight_hh, bias_ih, bias_hh; the biases may be None.
constexpr std::size_t kStepWeights = 4;

// A tensor like another, contiguous and not yet written. The format by name, because an axis of one element may have any
// stride, and the new tensor would have it too.
inline py::object empty_like(py::handle tensor) {
  struct Call {
    py::object function, format, names;
    Call() {
      const py::module_ torch = py::module_::import("torch");
      function = torch.attr("empty_like");
      format = torch.attr("contiguous_format");
      names = py::make_tuple("memory_format");
    }
  };
  // Never freed: the interpreter may be gone by the time that statics are.
  static const Call* call = new Call();
  PyObject* arguments[] = {tensor.ptr(), call->format.ptr()};
  PyObject* made = PyObject_Vectorcall(call->function.ptr(), arguments, 1, call->names.ptr());
  if (!made) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(made);
}

template <class T>
bool has_sizes(const Tensor& tensor, std::initializer_list<Index> sizes) {
  if (tensor.dtype() != dtype_of<T>() || tensor.dimensions() != static_cast<int>(sizes.size())) return false;
  for (int i = 0; i < tensor.dimensions(); ++i) {
    if (tensor.shape(i) != sizes.begin()[i]) return false;
  }
  return true;
}

// check_shape without what only an error needs: names and sizes on the heap take longer than the check.
template <class T>
void check_sizes(const char* what, std::size_t place, const Tensor& tensor, std::initializer_list<Index> sizes) {
  if (!has_sizes<T>(tensor, sizes)) check_shape<T>(std::string(what) + "[" + std::to_string(place) + "]", tensor, Shape(sizes));
}

// Whether a new tensor is as it was asked for: whoever intercepts torch's functions may have made something else of it.
template <class T>
bool is_new(const Tensor& tensor, std::initializer_list<Index> sizes) {
  return has_sizes<T>(tensor, sizes) && tensor.contiguous();
}

// The weights of one layer as the kernel reads them; false if rows do not follow one another as they must.
template <class T>
bool read_layer(const py::sequence& weights, std::size_t layer, const CellShape& shape, Index inputs, StepArgs<T>& args) {
  const auto at = [&](std::size_t i) { return py::object(weights[layer * kStepWeights + i]); };
  const Index rows = shape.gates * args.hidden;
  const auto weight = [&](std::size_t i, Index columns, const T*& data, Index& stride) {
    const Tensor tensor(at(i));
    check_sizes<T>("weights", layer * kStepWeights + i, tensor, {rows, columns});
    if ((columns > 1 && tensor.stride(1) != 1) || tensor.stride(0) < columns) return false;
    data = tensor.data<const T>();
    stride = tensor.stride(0);
    return true;
  };
  const auto bias = [&](std::size_t i, const T*& data) {
    const py::object object = at(i);
    if (object.is_none()) return true;
    const Tensor tensor(object);
    check_sizes<T>("weights", layer * kStepWeights + i, tensor, {rows});
    data = tensor.data<const T>();
    return tensor.contiguous();
  };
  args.inputs = inputs;
  args.bias_ih = args.bias_hh = nullptr;
  return weight(0, inputs, args.weight_ih, args.weight_ih_stride) &&
         weight(1, args.hidden, args.weight_hh, args.weight_hh_stride) && bias(2, args.bias_ih) && bias(3, args.bias_hh);
}

template <class T>
py::object step_typed(int cell, const Tensor& input, const py::sequence& states, const std::vector<Tensor>& before,
                      const py::sequence& weights, bool batch_first, int threads) {
  const CellShape& shape = kShapes[cell];
  const Index layers = static_cast<Index>(weights.size() / kStepWeights), hidden = before[0].shape(2);
  StepArgs<T> first;
  first.rows = input.shape(0);
  first.hidden = hidden;
  first.threads = threads;
  first.input = input.data<const T>();
  first.input_stride = input.stride(0);
  for (std::size_t i = 0; i < before.size(); ++i) {
    check_sizes<T>("states", i, before[i], {layers, first.rows, hidden});
    if (!before[i].contiguous()) return py::none();
  }
  if ((input.shape(1) > 1 && input.stride(1) != 1) || (first.rows > 1 && first.input_stride < input.shape(1))) {
    return py::none();
  }
  // All is read and checked before anything is computed.
  std::vector<StepArgs<T>> calls(static_cast<std::size_t>(layers), first);
  for (std::size_t layer = 0; layer < calls.size(); ++layer) {
    if (!read_layer<T>(weights, layer, shape, layer ? hidden : input.shape(1), calls[layer])) return py::none();
  }
  py::tuple after(before.size());
  for (std::size_t i = 0; i < before.size(); ++i) after[i] = empty_like(states[i]);
  // (1, N, H): of one layer as the new h, of several as one of them.
  py::object out = layers == 1 ? empty_like(states[0]) : empty_like(py::object(states[0])[py::slice(0, 1, 1)]);
  const Tensor h_new(after[0]), c_new = shape.has_c ? Tensor(after[1]) : Tensor(), out_read(out);
  if (!is_new<T>(h_new, {layers, first.rows, hidden}) || (shape.has_c && !is_new<T>(c_new, {layers, first.rows, hidden})) ||
      !is_new<T>(out_read, {1, first.rows, hidden})) {
    return py::none();
  }
  for (Index layer = 0; layer < layers; ++layer) {
    StepArgs<T>& args = calls[static_cast<std::size_t>(layer)];
    args.h = before[0].at(layer).data<const T>();
    args.h_new = h_new.at(layer).data<T>();
    if (shape.has_c) {
      args.c = before[1].at(layer).data<const T>();
      args.c_new = c_new.at(layer).data<T>();
    }
    if (layer) {
      args.input = calls[static_cast<std::size_t>(layer - 1)].h_new;
      args.input_stride = hidden;
    }
    args.out = layer + 1 == layers ? out_read.data<T>() : nullptr;
  }
  {
    const py::gil_scoped_release release;
    const auto kernel = typed<T>(*current().load()).step[cell];
    for (const StepArgs<T>& args : calls) kernel(args);
  }
  if (batch_first) out = out.attr("transpose_")(0, 1);
  return py::make_tuple(out, after);
}

// input (1, N, I), or with batch_first (N, 1, I); states (L, N, H) each; kStepWeights for each layer. Returns out in the layout
// of the input and the new states, or None, with nothing done, for what is another call: several steps, many rows, other
// dtypes, subclasses of torch.Tensor, memory that cannot be read as it is. Raises ValueError for sizes that do not fit each
// other.
inline py::object step(const std::string& cell, const py::object& input_object, const py::sequence& states,
                       const py::sequence& weights, bool batch_first, int threads) {
  const int index = cell_index(cell);
  if (threads < 1) refuse("threads", "1 or more", std::to_string(threads));
  if (weights.size() == 0 || weights.size() % kStepWeights) {
    refuse("weights", std::to_string(kStepWeights) + " for each layer", std::to_string(weights.size()));
  }
  const std::size_t count = kShapes[index].has_c ? 2 : 1;
  if (states.size() != count) refuse("states", std::to_string(count), std::to_string(states.size()));
  if (!Tensor::is_plain(input_object)) return py::none();
  for (const py::handle& state : states) {
    if (!Tensor::is_plain(state)) return py::none();
  }
  for (std::size_t i = 0; i < weights.size(); ++i) {
    const py::object weight = weights[i];
    const bool bias = i % kStepWeights > 1;
    if (!(bias && weight.is_none()) && !Tensor::is_plain(weight)) return py::none();
  }
  const Tensor input(input_object);
  const int time = batch_first ? 1 : 0;
  if (input.dimensions() != 3 || input.shape(time) != 1) return py::none();
  const Tensor rows = input.without(time);
  if (rows.size() == 0 || rows.shape(0) > kMostStepRows) return py::none();
  if (rows.dtype() != Dtype::kFloat32 && rows.dtype() != Dtype::kFloat64) return py::none();
  std::vector<Tensor> before;
  for (std::size_t i = 0; i < count; ++i) {
    before.emplace_back(py::object(states[i]));
    if (before[i].dimensions() != 3) check_dimensions("states[" + std::to_string(i) + "]", before[i], 3);
  }
  if (before[0].shape(2) == 0) refuse("states[0]", "at least one unit", text(before[0]));
  return rows.dtype() == Dtype::kFloat32 ? step_typed<float>(index, rows, states, before, weights, batch_first, threads)
                                         : step_typed<double>(index, rows, states, before, weights, batch_first, threads);
}

}  // namespace fused_rnn
