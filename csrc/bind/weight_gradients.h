// The gradients of one recurrence's parameters, summed over stretches of time.
#pragma once

#include <algorithm>

#include "bind/laid.h"

namespace fused_rnn {

// Where the gradients of a layer's parameters go; absent where they are not wanted.
using WeightResults = WeightOperands;

// One parameter's gradient: summed where it is stored, or beside it in a wider type.
template <class S, class T>
class Sum {
 public:
  Sum(const Operand& to, Index rows, Index columns) : to_(to), rows_(rows), columns_(columns) {
    if (!to) return;
    if constexpr (std::is_same_v<S, T>) {
      at = to.tensor.data<T>();
    } else {
      room_ = Room<T>(rows * columns);
      at = room_.get();
    }
  }
  void finish(const LayerCall& call) const {
    if constexpr (!std::is_same_v<S, T>) {
      if (at) convert(call, rows_, columns_, at, columns_, to_.tensor.data<S>(), columns_);
    }
  }
  T* at = nullptr;

 private:
  const Operand& to_;
  Index rows_, columns_;
  Room<T> room_;
};

template <class S, class T>
class WeightGradients {
 public:
  WeightGradients(const LayerCall& call, const WeightResults& to)
      : call_(call),
        kernels_(typed<T>(call.kernels)),
        apart_(call.shape.gradients > call.shape.gates),
        ih_(to.ih, call.gate_columns(), call.inputs),
        hh_(to.hh, call.gate_columns(), call.output),
        bias_ih_(to.bias_ih, 1, call.gate_columns()),
        bias_hh_(to.bias_hh, 1, call.gate_columns()),
        hr_(to.hr, call.output, call.hidden) {
    // Of one bias alone, the sums over all gates still come first.
    if (bias_hh_.at && !bias_ih_.at && apart_) sums_ = Room<T>(call.gate_columns());
    bias_ = bias_ih_.at ? bias_ih_.at : apart_ && bias_hh_.at ? sums_.get() : bias_hh_.at;
  }

  bool reads_h() const { return hh_.at || (apart_ && bias_hh_.at); }
  bool reads_tape() const { return hr_.at; }

  // What `rows` rows contribute. d_gates: their first column, `stride` from row to row; input: rows x I; h: what the recurrence
  // read in these rows, in one or two parts; m: what the projection multiplied there, rows x H, or null; operand: what the
  // product of later gates read there.
  void add(const T* d_gates, Index stride, Index rows, const Part<T>& input, const Part<T>* h, const T* m,
           const Part<T>& operand) {
    const Index H = call_.hidden, gates = call_.gate_columns(), columns = call_.shape.gradients * H;
    const T* of_x = d_gates + columns - gates;
    if (ih_.at || bias_) product(of_x, stride, gates, &input, rows, call_.inputs, ih_.at, bias_, &transposed_ih_);
    if (call_.shape.later) {
      const Index later = call_.shape.later * H, first = gates - later;
      if (hh_.at) {
        product(d_gates, stride, first, h, rows, call_.output, hh_.at, nullptr);
        product(d_gates + first, stride, later, &operand, rows, call_.output, hh_.at + first * call_.output, nullptr);
      }
    } else if (!apart_) {
      if (hh_.at) product(d_gates, stride, gates, h, rows, call_.output, hh_.at, nullptr);
    } else if (reads_h()) {
      // All but the last gate; then what stays apart, whose gradient comes first in a row and last in the weight.
      T* last_weight = hh_.at ? hh_.at + (gates - H) * call_.output : nullptr;
      T* last_bias = bias_hh_.at ? bias_hh_.at + gates - H : nullptr;
      if (hh_.at) product(of_x, stride, gates - H, h, rows, call_.output, hh_.at, nullptr);
      product(d_gates, stride, H, h, rows, call_.output, last_weight, last_bias);
    }
    const Part<T> unprojected = {m, rows, H};
    if (hr_.at) product(d_gates + columns, stride, call_.output, &unprojected, rows, H, hr_.at, nullptr, &transposed_hr_);
    begun_ = true;
  }

  // After all stretches: both biases have the same gradient but for what is apart.
  void finish() {
    const Index gates = call_.gate_columns(), H = call_.hidden;
    turn(transposed_ih_, gates, call_.inputs, ih_.at);
    turn(transposed_hr_, call_.output, H, hr_.at);
    if (bias_hh_.at && bias_hh_.at != bias_) std::copy_n(bias_, gates - (apart_ ? H : 0), bias_hh_.at);
    ih_.finish(call_);
    hh_.finish(call_);
    bias_ih_.finish(call_);
    bias_hh_.finish(call_);
    hr_.finish(call_);
  }

 private:
  // Each thread copies all of the right factor for its share of the rows. Below so many multiplications that does not matter;
  // beyond, the wider factor should be the left one, and the sum is that of the gradient `transposed`, where it may be.
  static constexpr double kFewMultiplications = 1 << 18;

  void product(const T* d_gates, Index stride, Index outputs, const Part<T>* inputs, Index rows, Index columns, T* d_weight,
               T* d_bias, Room<T>* transposed = nullptr) {
    WeightGradientArgs<T> args;
    args.rows = rows;
    args.add = begun_;
    args.threads = call_.threads;
    args.d_gates = d_gates;
    args.d_gates_stride = stride;
    args.outputs = outputs;
    args.parts = inputs;
    args.inputs = d_weight ? columns : 0;
    args.d_weight = d_weight;
    args.d_weight_stride = columns;
    args.d_bias = d_bias;
    const double multiplications = static_cast<double>(rows) * static_cast<double>(outputs) * static_cast<double>(columns);
    const bool begins = transposed && !begun_ && d_weight && outputs < columns && multiplications > kFewMultiplications;
    if (begins) *transposed = Room<T>(outputs * columns);
    if (!transposed || !transposed->get()) {
      run(args);
      return;
    }
    if (d_bias) {
      args.inputs = 0;
      args.d_weight = nullptr;
      run(args);
    }
    const Part<T> right = {d_gates, rows, stride};
    args.d_gates = inputs->data;
    args.d_gates_stride = inputs->stride;
    args.outputs = columns;
    args.parts = &right;
    args.inputs = outputs;
    args.d_weight = transposed->get();
    args.d_weight_stride = outputs;
    args.d_bias = nullptr;
    run(args);
  }

  void run(WeightGradientArgs<T>& args) {
    const Room<T> workspace(kernels_.workspace_elements(args) * call_.threads);
    args.workspace = workspace.get();
    kernels_.weight_gradient(args);
  }

  // to[row][column] = from[column][row], block by block.
  static void turn(const Room<T>& from, Index rows, Index columns, T* to) {
    constexpr Index kBlock = 16;
    if (!from.get() || !to) return;
    for (Index row = 0; row < rows; row += kBlock) {
      const Index row_end = std::min(rows, row + kBlock);
      for (Index column = 0; column < columns; ++column) {
        for (Index i = row; i < row_end; ++i) to[i * columns + column] = from.get()[column * rows + i];
      }
    }
  }

  const LayerCall& call_;
  const TypedKernels<T>& kernels_;
  const bool apart_;
  Sum<S, T> ih_, hh_, bias_ih_, bias_hh_, hr_;
  Room<T> sums_, transposed_ih_, transposed_hr_;
  T* bias_;
  bool begun_ = false;
};

}  // namespace fused_rnn
