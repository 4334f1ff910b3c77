// Weights laid out for the kernels.
#pragma once

#include <string>
#include <utility>
#include <vector>

#include "cell_shapes.h"
#include "isa.h"
#include "memory.h"
#include "tensors.h"

namespace fused_rnn {

// The D weights of one product, as the kernels of one instruction set read them.
class Packed {
 public:
  Packed(const std::string& cell, const py::sequence& tensors, bool backward, const std::string& product, bool as_columns,
         int threads)
      : cell_(cell_index(cell)), backward_(backward), product_(product_of(product)), kernels_(current().load()) {
    const Tensors weights = tensors.cast<Tensors>();
    if (weights.empty()) throw py::value_error("weights: expected one per recurrence, got none");
    if (as_columns && backward) throw py::value_error("as_columns: expected False for the backward, got True");
    const bool projection = product_ == Product::kProjection;
    if (projection && !kShapes[cell_].has_projection)
      refuse("product", "hidden or input, as " + cell + " has no projection", product);
    check_dimensions("weights[0]", weights[0], 2);
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
    single_ = weights[0].dtype() == Dtype::kFloat32;
    if (single_) {
      fill<float>(weights, as_columns, threads, matrices32_);
    } else {
      fill<double>(weights, as_columns, threads, matrices64_);
    }
    if (as_columns) sources_ = py::tuple(tensors);
  }
  Packed(const Packed&) = delete;

  // The matrices, if they are the ones that a call with these sizes needs.
  template <class T>
  const Matrix<T>* matrices(const std::string& name, int cell, bool backward, Product product, Index recurrences, Index hidden,
                            Index output) const {
    if (cell != cell_ || backward != backward_ || product != product_) {
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
  bool in_panels() const { return !sources_; }

 private:
  static Product product_of(const std::string& name) {
    if (name == "hidden") return Product::kHidden;
    if (name == "projection") return Product::kProjection;
    if (name == "input") return Product::kInput;
    refuse("product", "hidden, projection or input", name);
  }

  template <class T>
  void fill(const Tensors& weights, bool as_columns, int threads, std::vector<Matrix<T>>& matrices) {
    const bool projection = product_ == Product::kProjection;
    const Index rows = projection ? output_ : kShapes[cell_].gates * hidden_, columns = projection ? hidden_ : output_;
    PackArgs<T> args;
    args.backward = backward_;
    args.product = product_;
    args.hidden = hidden_;
    args.output = output_;
    args.threads = threads;
    const auto& kernels = typed<T>(*kernels_);
    const Index elements = kernels.panel_elements[cell_](args);
    const Index carried_back = product_ == Product::kHidden ? kShapes[cell_].feedback * hidden_ : rows;
    const Index inner = backward_ ? carried_back : columns;
    if (!as_columns) panels_ = Memory(static_cast<std::size_t>(elements) * weights.size() * sizeof(T));
    for (std::size_t d = 0; d < weights.size(); ++d) {
      const std::string name = "weights[" + std::to_string(d) + "]";
      args.row_stride = matrix<T>(name, weights[d], rows, columns);
      args.weight = weights[d].data<const T>();
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
  bool backward_, single_ = true;
  Product product_;
  const Kernels* kernels_;
  Index hidden_ = 0, output_ = 0;
  Memory panels_;
  py::object sources_;  // keeps weights that are read in place
  std::vector<Matrix<float>> matrices32_;
  std::vector<Matrix<double>> matrices64_;
};

}  // namespace fused_rnn
