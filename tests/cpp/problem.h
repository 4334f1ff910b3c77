// What the sanitizers' driver runs the kernels on: numbers in buffers of exactly the right size.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <memory>
#include <random>
#include <vector>

// The kernels' code before the table of them, so that the table has them made here for both dtypes.
#include "walk/backward.h"
#include "walk/forward.h"
#include "walk/int8_forward.h"
#include "walk/multiply.h"
#include "walk/pack.h"
#include "walk/step.h"
#include "walk/weight_gradient.h"
// And the table.
#include "kernels/table.cpp"

namespace fused_rnn {
namespace FUSED_RNN_ISA {
namespace {

// Its place in the tables of kernels.
int number(const CellShape& cell) { return static_cast<int>(&cell - kernels().shapes); }

struct Shape {
  Index length, batch, recurrences, hidden, output;
  bool ragged, reset;
};

template <class T>
struct Problem {
  Problem(const CellShape& cell, const Shape& shape, unsigned seed) : cell(cell), shape(shape), random(seed) {
    const Index D = shape.recurrences, H = shape.hidden, P = shape.output, N = shape.batch;
    Index row = 0;
    for (Index t = 0; t < shape.length; ++t) {
      const Index count = shape.ragged ? N - N * t / shape.length : N;
      batch_sizes.push_back(count);
      offsets.push_back(row);
      row += count;
    }
    rows = row;
    bias = draw(D * cell.bias * H);
    weight_hh = draw(D * cell.gates * H * P);
    weight_hr = draw(D * P * H);
    inputs = H + 5;
    weight_ih = draw(D * cell.gates * H * inputs);
    input = draw(rows * inputs);
    h_0 = draw(D * N * P);
    c_0 = draw(D * N * H);
    d_out = draw(rows * D * P);
    d_cells = draw(rows * D * H);
    for (Index d = 0; d < D; ++d) reverse.push_back(d % 2 == 1);
    // Each recurrence has its own.
    for (Index d = 0; d < D; ++d) {
      for (Index i = 0; i < rows; ++i) reset.push_back((i + d) % 3 == 0);
    }
  }

  std::vector<T> draw(Index n) {
    std::uniform_real_distribution<T> uniform(-1, 1);
    std::vector<T> values(static_cast<std::size_t>(n));
    for (T& value : values) value = uniform(random);
    return values;
  }

  Sizes sizes(int threads, Sharing sharing) const {
    Sizes s;
    s.recurrences = shape.recurrences;
    s.hidden = shape.hidden;
    s.output = shape.output;
    s.steps.length = shape.length;
    s.steps.batch = shape.batch;
    if (shape.ragged) {
      s.steps.batch_sizes = batch_sizes.data();
      s.steps.offsets = offsets.data();
    }
    s.reverse = reinterpret_cast<const bool*>(reverse.data());
    s.reset = shape.reset ? reinterpret_cast<const bool*>(reset.data()) : nullptr;
    s.reset_stride = rows;
    s.threads = threads;
    s.sharing = sharing;
    return s;
  }

  const CellShape& cell;
  const Shape shape;
  std::mt19937 random;
  Index rows, inputs;
  std::vector<std::int64_t> batch_sizes, offsets;
  std::vector<char> reverse, reset;
  std::vector<T> bias, weight_hh, weight_hr, weight_ih, input, h_0, c_0, d_out, d_cells;
};

// Memory on a vector's boundary without a spare byte at its end.
template <class T>
struct Panels {
  explicit Panels(Index n)
      : data(static_cast<T*>(::operator new[](static_cast<std::size_t>(n) * sizeof(T), std::align_val_t{64}))) {}
  ~Panels() { ::operator delete[](data, std::align_val_t{64}); }
  Panels(const Panels&) = delete;
  T* data;
};

template <class T>
struct Weights {
  // Of the later gates in the second stage, for a cell that has none no matrices.
  Weights(const Problem<T>& problem, const TypedKernels<T>& kernels, bool backward, Product product, int threads,
          Stage stage = Stage::kFirst) {
    const bool second = stage == Stage::kSecond;
    const Index first = problem.cell.gates - problem.cell.later;
    if (second && !problem.cell.later) return;
    const bool projection = product == Product::kProjection, of_input = product == Product::kInput;
    const auto& source = projection ? problem.weight_hr : of_input ? problem.weight_ih : problem.weight_hh;
    PackArgs<T> args;
    args.backward = backward;
    args.product = product;
    args.stage = stage;
    args.hidden = problem.shape.hidden;
    args.output = of_input ? problem.inputs : problem.shape.output;
    args.row_stride = projection ? args.hidden : args.output;
    args.threads = threads;
    const int kind = number(problem.cell);
    for (Index d = 0; d < problem.shape.recurrences; ++d) {
      args.weight = source.data() + d * static_cast<Index>(source.size()) / problem.shape.recurrences +
                    (second ? first * args.hidden * args.row_stride : 0);
      panels.emplace_back(new Panels<T>(kernels.panel_elements[kind](args)));
      args.panels = panels.back()->data;
      kernels.pack[kind](args);
      const Index forward_inner = projection ? args.hidden : args.output;
      const Index blocks = of_input ? problem.cell.gates : second ? problem.cell.later : problem.cell.feedback;
      const Index backward_inner = projection ? args.output : blocks * args.hidden;
      matrices.push_back({args.panels, Layout::kPanels, backward ? backward_inner : forward_inner, 0});
    }
  }
  std::vector<std::unique_ptr<Panels<T>>> panels;
  std::vector<Matrix<T>> matrices;
};

// The weights of one product as torch stores them, for the forward (kColumns) or the backward (kRows).
template <class T>
std::vector<Matrix<T>> as_stored(const Problem<T>& p, Product product, bool backward, Stage stage = Stage::kFirst) {
  const bool of_input = product == Product::kInput;
  const Index H = p.shape.hidden, columns = of_input ? p.inputs : p.shape.output;
  const std::vector<T>& source = of_input ? p.weight_ih : p.weight_hh;
  const bool second = stage == Stage::kSecond;
  const Index blocks = of_input ? p.cell.gates : second ? p.cell.later : p.cell.feedback;
  std::vector<Matrix<T>> matrices;
  for (Index d = 0; d < p.shape.recurrences; ++d) {
    const T* weight = source.data() + (d * p.cell.gates + (second ? p.cell.gates - p.cell.later : 0)) * H * columns;
    if (backward) {
      matrices.push_back({weight, Layout::kRows, blocks * H, columns});
    } else {
      matrices.push_back({weight, Layout::kColumns, columns, columns});
    }
  }
  return matrices;
}

// What is summed in another order must still be the same but for rounding.
template <class T>
void expect_close(const Problem<T>& p, const char* what, const std::vector<T>& actual, const std::vector<T>& expected) {
  T worst = 0, scale = 1;
  for (std::size_t i = 0; i < expected.size(); ++i) {
    worst = std::max(worst, std::abs(actual[i] - expected[i]));
    scale = std::max(scale, std::abs(expected[i]));
  }
  if (actual.size() == expected.size() && worst < 200 * scale * std::numeric_limits<T>::epsilon()) return;
  std::printf("%s, T=%td N=%td H=%td: %s: error %g\n", p.cell.name, p.shape.length, p.shape.batch, p.shape.hidden, what,
              static_cast<double>(worst));
  std::abort();
}

}  // namespace
}  // namespace FUSED_RNN_ISA
}  // namespace fused_rnn
