// The gradients of the weights that many single steps share, by one product over the rows of all of them.
#pragma once

#include "bind/weight_gradients.h"

namespace fused_rnn {

// Rows of several tensors, copied one after another, in the dtype that the kernels compute in.
template <class T>
class JoinedRows {
 public:
  JoinedRows(Index rows, Index columns) : columns_(columns), room_(rows * columns), end_(room_.get()) {}
  template <class S>
  void append(const LayerCall& call, const Operand& part) {
    const Index rows = part.tensor.shape(0), stride = rows > 1 ? part.tensor.stride(0) : columns_;
    const S* from = part.tensor.data<const S>();
    if constexpr (std::is_same_v<S, T>) {
      for (Index row = 0; row < rows; ++row) std::copy_n(from + row * stride, columns_, end_ + row * columns_);
    } else {
      convert(call, rows, columns_, from, stride, end_, columns_);
    }
    end_ += rows * columns_;
  }
  Part<T> all() const { return {room_.get(), (end_ - room_.get()) / columns_, columns_}; }

 private:
  Index columns_;
  Room<T> room_;
  T* end_;
};

// The gradients of the five weights, None where they are not wanted. Each step gives the gradients of its gates (n, 1, ·), as
// layer_backward returns them, its input (n, I), h before it (n, P), and what the product of later gates read, (n, H), or None.
inline py::object loop_gradients(const std::string& cell, const py::sequence& steps, const py::sequence& wanted, int threads) {
  if (steps.size() == 0) refuse("steps", "at least one", "none");
  const py::tuple first = as_tuple(py::object(steps[0]));
  if (first.size() != 4) refuse("steps", "four operands each", std::to_string(first.size()));
  // The weights themselves are not read: whoever shards them may have freed them by now.
  const LayerCall call(cell, first[1], Tensor(first[2]).shape(1), threads);
  if (wanted.size() != kWeights) refuse("wanted", std::to_string(kWeights) + " flags", std::to_string(wanted.size()));
  const Index gates = call.gate_columns(), columns = call.shape.gradients * call.hidden;
  const Dtype computed = call.dtype == Dtype::kFloat64 ? Dtype::kFloat64 : Dtype::kFloat32;
  struct Step {
    Operand d_gates, input, h, operand;
  };
  std::vector<Step> all;
  Index rows = 0;
  for (const py::handle& each : steps) {
    const py::tuple step = as_tuple(each);
    const Index n = Tensor(step[1]).shape(0);
    all.push_back({read(py::object(step[0]), "d_gates", computed, {n, 1, columns}),
                   read(py::object(step[1]), "input", call.dtype, {n, call.inputs}, true),
                   read(py::object(step[2]), "h", call.dtype, {n, call.output}, true),
                   read(py::object(step[3]), "operand", call.dtype, {n, call.hidden}, true)});
    if (static_cast<bool>(all.back().operand) != (call.shape.later > 0)) {
      refuse("operand", call.shape.later ? "a tensor, as the cell has later gates" : "None for this cell", "another");
    }
    rows += n;
  }
  const auto is_wanted = [&](std::size_t i) { return static_cast<bool>(py::bool_(py::object(wanted[i]))); };
  WeightResults results;
  results.ih = new_tensor(is_wanted(0), call.like, call.dtype, call.dtype, {gates, call.inputs});
  results.hh = new_tensor(is_wanted(1), call.like, call.dtype, call.dtype, {gates, call.output});
  results.bias_ih = new_tensor(is_wanted(2), call.like, call.dtype, call.dtype, {gates});
  results.bias_hh = new_tensor(is_wanted(3), call.like, call.dtype, call.dtype, {gates});
  {
    const py::gil_scoped_release release;
    with_types(call.dtype, [&](auto s, auto t) {
      using S = decltype(s);
      using T = decltype(t);
      JoinedRows<T> d_gates(rows, columns), input(rows, call.inputs), h(rows, call.output);
      JoinedRows<T> operand(call.shape.later ? rows : 0, call.hidden);
      for (const Step& step : all) {
        d_gates.template append<T>(call, step.d_gates);
        input.template append<S>(call, step.input);
        h.template append<S>(call, step.h);
        if (step.operand) operand.template append<S>(call, step.operand);
      }
      WeightGradients<S, T> sums(call, results);
      const Part<T> of_h[2] = {h.all(), {nullptr, 0, call.output}}, of_input = input.all();
      if (results.any()) sums.add(d_gates.all().data, columns, rows, of_input, of_h, nullptr, operand.all());
      sums.finish();
    });
  }
  py::list found;
  for (const Operand* each : {&results.ih, &results.hh, &results.bias_ih, &results.bias_hh, &results.hr}) {
    found.append(*each ? each->owner : py::none());
  }
  return py::tuple(found);
}

}  // namespace fused_rnn
