// Runs every kernel over odd sizes in buffers of exactly the right size, for the sanitizers to watch, and checks that the
// result does not depend on how the threads share the work.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <random>
#include <thread>
#include <vector>

#include "kernels.cpp"

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
    gates_x = draw(rows * D * cell.tape * H);
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
    for (Index i = 0; i < rows; ++i) reset.push_back(i % 3 == 0);
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
  std::vector<T> gates_x, bias, weight_hh, weight_hr, weight_ih, input, h_0, c_0, d_out, d_cells;
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
  Weights(const Problem<T>& problem, const TypedKernels<T>& kernels, bool backward, Product product, int threads) {
    const bool projection = product == Product::kProjection, of_input = product == Product::kInput;
    const auto& source = projection ? problem.weight_hr : of_input ? problem.weight_ih : problem.weight_hh;
    PackArgs<T> args;
    args.backward = backward;
    args.product = product;
    args.hidden = problem.shape.hidden;
    args.output = of_input ? problem.inputs : problem.shape.output;
    args.row_stride = projection ? args.hidden : args.output;
    args.threads = threads;
    const int kind = number(problem.cell);
    for (Index d = 0; d < problem.shape.recurrences; ++d) {
      args.weight = source.data() + d * static_cast<Index>(source.size()) / problem.shape.recurrences;
      panels.emplace_back(new Panels<T>(kernels.panel_elements[kind](args)));
      args.panels = panels.back()->data;
      kernels.pack[kind](args);
      const Index forward_inner = projection ? args.hidden : args.output;
      const Index blocks = of_input ? problem.cell.gates : problem.cell.feedback;
      const Index backward_inner = projection ? args.output : blocks * args.hidden;
      matrices.push_back({args.panels, Layout::kPanels, backward ? backward_inner : forward_inner, 0});
    }
  }
  std::vector<std::unique_ptr<Panels<T>>> panels;
  std::vector<Matrix<T>> matrices;
};

// Everything that a forward and a backward write.
template <class T>
std::vector<std::vector<T>> run(const Problem<T>& p, const TypedKernels<T>& kernels, int threads, Sharing sharing) {
  const Index D = p.shape.recurrences, H = p.shape.hidden, P = p.shape.output;
  const bool projected = H != P;
  const int kind = number(p.cell);
  std::vector<T> tape = p.gates_x, out(static_cast<std::size_t>(p.rows * D * P)), h = p.h_0, c = p.c_0;
  const bool tape_is_out = p.cell.tape_is_out;
  {
    const Weights<T> hh(p, kernels, false, Product::kHidden, threads), hr(p, kernels, false, Product::kProjection, threads);
    ForwardArgs<T> args;
    args.sizes = p.sizes(threads, sharing);
    args.tape = {tape.data(), D * p.cell.tape * H, p.cell.tape * H};
    args.out = {tape_is_out ? tape.data() : out.data(), D * P, P};
    args.states[0] = h.data();
    args.states[1] = p.cell.has_c ? c.data() : nullptr;
    args.bias = p.bias.data();
    args.weight_hh = hh.matrices.data();
    args.weight_hr = projected ? hr.matrices.data() : nullptr;
    kernels.forward[kind](args);
  }
  // The same with the input's products on the walk.
  std::vector<T> tape_x(p.gates_x.size()), out_x(out.size()), h_x = p.h_0, c_x = p.c_0;
  {
    const Weights<T> ih(p, kernels, false, Product::kInput, threads), hh(p, kernels, false, Product::kHidden, threads);
    const Weights<T> hr(p, kernels, false, Product::kProjection, threads);
    ForwardArgs<T> args;
    args.sizes = p.sizes(threads, sharing);
    args.tape = {tape_x.data(), D * p.cell.tape * H, p.cell.tape * H};
    args.out = {tape_is_out ? tape_x.data() : out_x.data(), D * P, P};
    args.input = p.input.data();
    args.input_stride = p.inputs;
    args.states[0] = h_x.data();
    args.states[1] = p.cell.has_c ? c_x.data() : nullptr;
    args.bias = p.bias.data();
    args.weight_ih = ih.matrices.data();
    args.weight_hh = hh.matrices.data();
    args.weight_hr = projected ? hr.matrices.data() : nullptr;
    kernels.forward[kind](args);
    if (!tape_is_out) {
      args.keep = false;
      args.tape = {};
      kernels.forward[kind](args);
    }
    // And with weights as torch has them, those of the recurrence too where there are few rows.
    if (p.shape.batch <= kMostLooseBatch) {
      std::vector<Matrix<T>> ih_in_columns, hh_in_columns;
      for (Index d = 0; d < D; ++d) {
        ih_in_columns.push_back({p.weight_ih.data() + d * p.cell.gates * H * p.inputs, Layout::kColumns, p.inputs, p.inputs});
        hh_in_columns.push_back({p.weight_hh.data() + d * p.cell.gates * H * P, Layout::kColumns, P, P});
      }
      h_x = p.h_0, c_x = p.c_0;
      args.weight_ih = ih_in_columns.data();
      if (p.shape.batch <= 2) args.weight_hh = hh_in_columns.data();
      kernels.forward[kind](args);
    }
  }
  const Index columns = p.cell.gradients * H + (projected ? P : 0);
  std::vector<T> d_gates(static_cast<std::size_t>(p.rows * D * columns)), d_h = p.h_0, d_c = p.c_0;
  std::vector<T> d_input(static_cast<std::size_t>(D == 1 ? p.rows * p.inputs : 0));
  {
    const Weights<T> ih(p, kernels, true, Product::kInput, threads), hh(p, kernels, true, Product::kHidden, threads);
    const Weights<T> hr(p, kernels, true, Product::kProjection, threads);
    BackwardArgs<T> args;
    args.sizes = p.sizes(threads, sharing);
    args.t_end = p.shape.length;
    args.d_gates = {d_gates.data(), D * columns, columns};
    args.d_states[0] = d_h.data();
    args.d_states[1] = p.cell.has_c ? d_c.data() : nullptr;
    args.d_out = {p.d_out.data(), D * P, P};
    // Not in all problems, so that both ways through the cell are walked.
    if (p.cell.has_c && p.shape.reset) args.d_cells = {p.d_cells.data(), D * H, H};
    args.tape = {tape.data(), D * p.cell.tape * H, p.cell.tape * H};
    args.out = {tape_is_out ? tape.data() : out.data(), D * P, P};
    args.states_0[0] = p.h_0.data();
    args.states_0[1] = p.cell.has_c ? p.c_0.data() : nullptr;
    args.weight_hh = hh.matrices.data();
    args.weight_hr = projected ? hr.matrices.data() : nullptr;
    if (D == 1) {
      args.weight_ih = ih.matrices.data();
      args.inputs = args.d_input_stride = p.inputs;
      args.d_input = d_input.data();
    }
    kernels.backward[kind](args);
    if (D == 1 && p.shape.batch <= kMostLooseBatch) {
      const Matrix<T> in_rows = {p.weight_ih.data(), Layout::kRows, p.cell.gates * H, p.inputs};
      const std::vector<T> in_panels = d_input;
      d_h = p.h_0, d_c = p.c_0;
      args.weight_ih = &in_rows;
      kernels.backward[kind](args);
      if (d_input != in_panels) std::printf("d_input differs with the layout of the weights\n"), std::abort();
    }
  }
  const Index gates = p.cell.gates * H;
  std::vector<T> d_weight(static_cast<std::size_t>(gates * p.inputs)), d_bias(static_cast<std::size_t>(gates));
  {
    const Index cut = p.rows / 3;
    const Part<T> parts[] = {{p.input.data(), cut, p.inputs}, {p.input.data() + cut * p.inputs, p.rows - cut, p.inputs}};
    WeightGradientArgs<T> args;
    args.rows = p.rows;
    args.outputs = gates;
    args.inputs = args.d_weight_stride = p.inputs;
    args.d_gates = d_gates.data();
    args.d_gates_stride = D * columns;
    args.parts = parts;
    args.d_weight = d_weight.data();
    args.d_bias = d_bias.data();
    args.threads = threads;
    const Panels<T> workspace(kernels.workspace_elements(args) * threads);
    args.workspace = workspace.data;
    kernels.weight_gradient(args);
    args.add = true;
    kernels.weight_gradient(args);
  }
  return {tape, out, h, c, tape_x, out_x, h_x, c_x, d_gates, d_h, d_c, d_input, d_weight, d_bias};
}

// One step of its own kind must come out as a walk of length one, but for the order in which biases are added.
template <class T>
int check_step(const TypedKernels<T>& kernels, const CellShape& cell, const Shape& shape) {
  const Problem<T> problem(cell, shape, 3);
  const auto expected = run(problem, kernels, 1, Sharing::kAuto);
  const Index N = shape.batch, H = shape.hidden, columns = cell.gates * H;
  // An identity in place of weight_ih: gates_x is the input itself.
  std::vector<T> input, identity(static_cast<std::size_t>(columns * columns), T(0));
  for (Index i = 0; i < columns; ++i) identity[static_cast<std::size_t>(i * columns + i)] = 1;
  for (Index n = 0; n < N; ++n) {
    const T* row = problem.gates_x.data() + n * cell.tape * H;
    input.insert(input.end(), row, row + columns);
  }
  const std::vector<T> bias_ih(problem.bias.begin(), problem.bias.begin() + columns);
  std::vector<T> bias_hh(static_cast<std::size_t>(columns), T(0));
  for (Index i = columns; i < cell.bias * H; ++i)
    bias_hh[static_cast<std::size_t>(i - H)] = problem.bias[static_cast<std::size_t>(i)];
  int failures = 0;
  for (int threads : {1, 2, 3}) {
    std::vector<T> out(static_cast<std::size_t>(N * H)), h(out), c(out);
    StepArgs<T> args;
    args.rows = N;
    args.inputs = args.input_stride = args.weight_ih_stride = columns;
    args.hidden = args.weight_hh_stride = H;
    args.input = input.data();
    args.weight_ih = identity.data();
    args.weight_hh = problem.weight_hh.data();
    args.bias_ih = bias_ih.data();
    args.bias_hh = bias_hh.data();
    args.h = problem.h_0.data();
    args.c = problem.c_0.data();
    args.out = out.data();
    args.h_new = h.data();
    args.c_new = c.data();
    args.threads = threads;
    kernels.step[number(cell)](args);
    T worst = 0;
    for (std::size_t i = 0; i < out.size(); ++i) {
      worst = std::max(worst, std::abs(out[i] - expected[2][i]));
      if (cell.has_c) worst = std::max(worst, std::abs(c[i] - expected[3][i]));
    }
    if (!(worst < 100 * std::numeric_limits<T>::epsilon()) || h != out) {
      std::printf("%s, N=%td H=%td: a step is not a walk of one, error %g\n", cell.name, N, H, static_cast<double>(worst));
      ++failures;
    }
  }
  return failures;
}

template <class T>
int check(const TypedKernels<T>& kernels, const char* dtype) {
  const Shape shapes[] = {{1, 1, 1, 1, 1, false, false},   {3, 2, 2, 17, 17, false, true},     {5, 7, 1, 33, 33, true, false},
                          {4, 13, 2, 50, 50, true, true},  {3, 50, 1, 100, 100, false, false}, {2, 5, 3, 65, 65, false, false},
                          {6, 9, 2, 37, 11, true, true},   {2, 4, 1, 70, 33, false, false},    {5, 1, 2, 150, 150, false, true},
                          {5, 2, 1, 150, 150, true, false}};
  int failures = 0;
  for (const CellShape& cell : FUSED_RNN_ISA::kernels().shapes) {
    for (const Index hidden : {1, 16, 37}) {
      failures += check_step(kernels, cell, {1, 1, 1, hidden, hidden, false, false});
      failures += check_step(kernels, cell, {1, 3, 1, hidden, hidden, false, false});
    }
    for (const Shape& shape : shapes) {
      if (shape.hidden != shape.output && !cell.has_projection) continue;
      const Problem<T> problem(cell, shape, 7);
      const auto expected = run(problem, kernels, 1, Sharing::kAuto);
      for (int threads : {2, 3, 4}) {
        for (Sharing sharing : {Sharing::kAuto, Sharing::kBatch, Sharing::kUnits}) {
          if (run(problem, kernels, threads, sharing) != expected) {
            std::printf("%s %s, T=%td N=%td D=%td H=%td P=%td: %d threads give another result\n", cell.name, dtype,
                        shape.length, shape.batch, shape.recurrences, shape.hidden, shape.output, threads);
            ++failures;
          }
        }
      }
    }
  }
  return failures;
}

// Members write their own slot, meet, and read all the others', many times over.
int check_barrier(int members) {
  constexpr int kRounds = 2000;
  Barrier barrier(members);
  std::vector<int> slots(static_cast<std::size_t>(members), 0);
  std::vector<int> failures(static_cast<std::size_t>(members), 0);
  std::vector<std::thread> threads;
  for (int member = 0; member < members; ++member) {
    threads.emplace_back([&, member] {
      for (int round = 1; round <= kRounds; ++round) {
        slots[static_cast<std::size_t>(member)] = round;
        barrier.wait();
        for (int slot : slots) failures[static_cast<std::size_t>(member)] += slot != round;
        barrier.wait();
      }
    });
  }
  int total = 0;
  for (int member = 0; member < members; ++member) {
    threads[static_cast<std::size_t>(member)].join();
    total += failures[static_cast<std::size_t>(member)];
  }
  if (total) std::printf("barrier of %d: %d reads of a slot that another member had not written\n", members, total);
  return total;
}

int run_all() {
  int failures = 0;
  for (int members : {1, 2, 3, 5}) failures += check_barrier(members);
  // Two callers at once: nothing is shared between calls.
  int other = 0;
  std::thread beside([&other] { other = check<float>(kernels().f32, "float32"); });
  failures += check<double>(kernels().f64, "float64");
  beside.join();
  failures += other;
  std::printf("%s: %s\n", kernels().isa, failures ? "FAILED" : "ok");
  return failures ? 1 : 0;
}

}  // namespace
}  // namespace FUSED_RNN_ISA
}  // namespace fused_rnn

int main() { return fused_rnn::FUSED_RNN_ISA::run_all(); }
