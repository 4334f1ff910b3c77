// A layer's tensors as the kernels read them: in the type that they compute in, and weights laid out for their products.
#pragma once

#include <type_traits>
#include <utility>
#include <vector>

#include "bind/layer.h"

namespace fused_rnn {

// Calls f(S{}, T{}) with the type that the tensors hold and the one that the kernels compute in.
template <class F>
void with_types(Dtype dtype, F&& f) {
  switch (dtype) {
    case Dtype::kFloat32:
      return f(float{}, float{});
    case Dtype::kFloat64:
      return f(double{}, double{});
    case Dtype::kBFloat16:
      return f(BFloat16{}, float{});
    default:
      return f(Float16{}, float{});
  }
}

// Memory for so many numbers.
template <class T>
class Room {
 public:
  Room() = default;
  explicit Room(Index elements) : memory_(static_cast<std::size_t>(elements) * sizeof(T)) {}
  T* get() const { return static_cast<T*>(memory_.get()); }

 private:
  Memory memory_;
};

template <class S, class T>
void convert(const LayerCall& call, Index rows, Index columns, const S* from, Index from_stride, T* to, Index to_stride) {
  const Kernels& kernels = call.kernels;
  const ConvertArgs<S, T> args = {rows, columns, from, from_stride, to, to_stride, call.threads};
  if constexpr (std::is_same_v<S, BFloat16>) {
    kernels.widen_bfloat16(args);
  } else if constexpr (std::is_same_v<S, Float16>) {
    kernels.widen_float16(args);
  } else if constexpr (std::is_same_v<T, BFloat16>) {
    kernels.narrow_bfloat16(args);
  } else {
    kernels.narrow_float16(args);
  }
}

// A matrix of numbers as the kernels compute with them: where it is, or a copy in the wider type.
template <class S, class T>
struct Computed {
  Computed() = default;
  Computed(const LayerCall& call, const S* data, Index rows, Index columns, Index row_stride) {
    if constexpr (std::is_same_v<S, T>) {
      at = data;
      stride = row_stride;
    } else if (data) {
      room = Room<T>(rows * columns);
      convert(call, rows, columns, data, row_stride, room.get(), columns);
      at = room.get();
      stride = columns;
    }
  }
  // A weight or a bias; absent, where the operand is.
  Computed(const LayerCall& call, const Operand& operand) {
    if (!operand) return;
    const Tensor& tensor = operand.tensor;
    const bool matrix = tensor.dimensions() == 2;
    const Index columns = tensor.shape(tensor.dimensions() - 1), rows = matrix ? tensor.shape(0) : 1;
    *this = Computed(call, tensor.data<const S>(), rows, columns, rows > 1 ? tensor.stride(0) : columns);
  }
  const T* at = nullptr;
  Index stride = 0;
  Room<T> room;
};

// The weights of one product of recurrences d .. d + count - 1, as the kernels read them. Of a cell with later gates, the rows
// of a stage; but all rows of the input's weights in the backward, where they are one matrix.
template <class S, class T>
class Laid {
 public:
  Laid(const LayerCall& call, Product product, bool backward, Index d, Index count, Stage stage = Stage::kFirst) {
    const auto& kernels = typed<T>(call.kernels);
    PackArgs<T> args;
    args.backward = backward;
    args.product = product;
    args.stage = stage;
    args.hidden = call.hidden;
    args.output = product == Product::kInput ? call.inputs : call.output;
    args.threads = call.threads;
    const Layout layout = layout_of(call, product, backward);
    const Index elements = layout == Layout::kPanels ? kernels.panel_elements[call.cell](args) : 0;
    panels_ = Room<T>(elements * count);
    for (Index i = 0; i < count; ++i) {
      const WeightOperands& weights = call.weights[static_cast<std::size_t>(d + i)];
      Computed<S, T> weight(call, product == Product::kInput    ? weights.ih
                                  : product == Product::kHidden ? weights.hh
                                                                : weights.hr);
      const bool projection = product == Product::kProjection;
      const Index forward_inner = projection ? call.hidden : args.output;
      const Index rows = projection ? call.output : call.gate_columns();
      const Index first = call.shape.gates - call.shape.later;
      const bool second = stage == Stage::kSecond;
      const Index recurrent = (second ? call.shape.later : call.shape.feedback) * call.hidden;
      const Index backward_inner = product == Product::kHidden ? recurrent : rows;
      const T* from = weight.at + (second ? first * call.hidden * weight.stride : 0);
      Matrix<T> matrix = {from, layout, backward ? backward_inner : forward_inner, weight.stride, 0};
      if (layout == Layout::kPanels) {
        args.weight = from;
        args.row_stride = weight.stride;
        args.panels = panels_.get() + i * elements;
        kernels.pack[call.cell](args);
        matrix.data = args.panels;
      } else if constexpr (!std::is_same_v<S, T>) {
        computed_.push_back(std::move(weight));
      }
      if (count <= kFew) {
        few_[i] = matrix;
      } else {
        many_.push_back(matrix);
      }
    }
  }
  const Matrix<T>* get() const { return many_.empty() ? few_ : many_.data(); }

 private:
  // The input's weights are laid out as they are needed where the kernels take all rows in one turn, or large ones in two.
  static constexpr Index kLooseRows = 96;
  static constexpr Index kSmallWeights = Index{2} << 20;
  // One and two sequences read the recurrence's weights as they are for so many steps: laying them out takes longer than it
  // gains. If they come from beyond the caches, and begin with whole vectors, it gains little.
  static constexpr Index kStepsInColumns = 16;
  static constexpr Index kStepsOfLargeInColumns = 64;
  static constexpr Index kRowsOfFewSteps = 4;
  static constexpr Index kVectorBytes = 64;

  static Layout layout_of(const LayerCall& call, Product product, bool backward) {
    const Index length = call.steps.length, batch = call.steps.batch;
    const double bytes = static_cast<double>(call.gate_columns()) * static_cast<double>(call.inputs + call.output) * sizeof(T);
    const bool large = bytes > kSmallWeights;
    const bool single = length == 1 && !call.projected();
    if (single && product != Product::kInput) return backward ? Layout::kRows : Layout::kColumns;
    if (product == Product::kInput) {
      const bool loose = call.rows <= (large ? 2 : 1) * kLooseRows && batch <= kMostLooseBatch;
      return backward ? (loose || length == 1 ? Layout::kRows : Layout::kPanels)
                      : (loose || single ? Layout::kColumns : Layout::kPanels);
    }
    if (backward) return Layout::kPanels;
    if (length == 1 && batch <= kRowsOfFewSteps) return Layout::kColumns;
    if (batch > 2) return Layout::kPanels;
    const bool slow = !large || batch == 2 || call.output * static_cast<Index>(sizeof(T)) % kVectorBytes;
    return length < (slow ? kStepsInColumns : kStepsOfLargeInColumns) ? Layout::kColumns : Layout::kPanels;
  }

  Room<T> panels_;
  std::vector<Computed<S, T>> computed_;  // weights that are read where their copies are
  static constexpr Index kFew = 2;
  Matrix<T> few_[kFew];
  std::vector<Matrix<T>> many_;
};

}  // namespace fused_rnn
