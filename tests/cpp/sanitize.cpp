// Runs every kernel over odd sizes in buffers of exactly the right size, for the sanitizers to watch, and checks that the
// result does not depend on how the threads share the work.
#include <cstdio>
#include <cstdlib>
#include <thread>
#include <vector>

#include "int8.h"
#include "problem.h"
#include "teams.h"

namespace fused_rnn {
namespace FUSED_RNN_ISA {
namespace {

// Everything that a forward and a backward write.
template <class T>
std::vector<std::vector<T>> run(const Problem<T>& p, const TypedKernels<T>& kernels, int threads, Sharing sharing) {
  const Index D = p.shape.recurrences, H = p.shape.hidden, P = p.shape.output;
  const bool projected = H != P;
  const int kind = number(p.cell);
  std::vector<T> tape(static_cast<std::size_t>(p.rows * D * p.cell.tape * H)), out(static_cast<std::size_t>(p.rows * D * P));
  std::vector<T> h = p.h_0, c = p.c_0, cells(static_cast<std::size_t>(p.cell.has_c ? p.rows * D * H : 0));
  const bool tape_is_out = p.cell.tape_is_out;
  std::vector<T> tape_x, out_x, h_x = p.h_0, c_x = p.c_0, out_s, tape_s(tape.size()), h_s, c_s;
  {
    const Weights<T> ih(p, kernels, false, Product::kInput, threads), hh(p, kernels, false, Product::kHidden, threads);
    const Weights<T> hr(p, kernels, false, Product::kProjection, threads);
    const Weights<T> later_ih(p, kernels, false, Product::kInput, threads, Stage::kSecond);
    const Weights<T> later_hh(p, kernels, false, Product::kHidden, threads, Stage::kSecond);
    ForwardArgs<T> args;
    args.sizes = p.sizes(threads, sharing);
    args.tape = {tape.data(), D * p.cell.tape * H, p.cell.tape * H};
    args.out = {tape_is_out ? tape.data() : out.data(), D * P, P};
    args.input = p.input.data();
    args.input_stride = p.inputs;
    args.states[0] = h.data();
    args.states[1] = p.cell.has_c ? c.data() : nullptr;
    args.bias = p.bias.data();
    args.weight_ih = ih.matrices.data();
    args.weight_hh = hh.matrices.data();
    args.weight_hr = projected ? hr.matrices.data() : nullptr;
    args.later_ih = later_ih.matrices.data();
    args.later_hh = later_hh.matrices.data();
    if (p.cell.has_c) args.cells = {cells.data(), D * H, H};
    kernels.forward[kind](args);
    const std::vector<T> out_walked = tape_is_out ? tape : out, cells_walked = cells;
    // The same in other ways: without a tape,
    tape_x.resize(tape.size()), out_x.resize(out.size());
    args.tape = {tape_x.data(), D * p.cell.tape * H, p.cell.tape * H};
    args.out = {tape_is_out ? tape_x.data() : out_x.data(), D * P, P};
    args.states[0] = h_x.data();
    args.states[1] = p.cell.has_c ? c_x.data() : nullptr;
    if (!tape_is_out) {
      args.keep = false;
      args.tape = {};
    }
    kernels.forward[kind](args);
    expect_close(p, "a walk without a tape", tape_is_out ? tape_x : out_x, out_walked);
    // with the bias in none of them,
    args.bias = nullptr;
    kernels.forward[kind](args);
    args.bias = p.bias.data();
    // with weights as torch has them, those of the recurrence too where there are few rows,
    if (p.shape.batch <= kMostLooseBatch) {
      const std::vector<Matrix<T>> ih_in_columns = as_stored(p, Product::kInput, false);
      const std::vector<Matrix<T>> hh_in_columns = as_stored(p, Product::kHidden, false);
      const std::vector<Matrix<T>> later_ih_in_columns = as_stored(p, Product::kInput, false, Stage::kSecond);
      const std::vector<Matrix<T>> later_hh_in_columns = as_stored(p, Product::kHidden, false, Stage::kSecond);
      h_x = p.h_0, c_x = p.c_0;
      args.weight_ih = ih_in_columns.data();
      args.later_ih = later_ih_in_columns.data();
      if (p.shape.batch <= 2) args.weight_hh = hh_in_columns.data(), args.later_hh = later_hh_in_columns.data();
      kernels.forward[kind](args);
    }
    // and by the kernel of a single step.
    if (p.shape.length == 1 && !projected) {
      const std::vector<Matrix<T>> ih_as_stored = as_stored(p, Product::kInput, false);
      const std::vector<Matrix<T>> hh_as_stored = as_stored(p, Product::kHidden, false);
      const std::vector<Matrix<T>> later_ih_as_stored = as_stored(p, Product::kInput, false, Stage::kSecond);
      const std::vector<Matrix<T>> later_hh_as_stored = as_stored(p, Product::kHidden, false, Stage::kSecond);
      std::vector<T> cells_s(cells.size());
      for (const bool keep : {true, false}) {
        out_s.assign(out_x.size(), T(0));
        h_s = p.h_0, c_s = p.c_0;
        args.keep = keep;
        args.updates_h = keep;
        args.out = {out_s.data(), D * P, P};
        args.tape = tape_is_out ? args.out : keep ? Rows<T>{tape_s.data(), D * p.cell.tape * H, p.cell.tape * H} : Rows<T>{};
        if (p.cell.has_c) args.cells = {cells_s.data(), D * H, H};
        args.states[0] = h_s.data();
        args.states[1] = p.cell.has_c ? c_s.data() : nullptr;
        args.weight_ih = ih_as_stored.data();
        args.weight_hh = hh_as_stored.data();
        args.later_ih = later_ih_as_stored.data();
        args.later_hh = later_hh_as_stored.data();
        kernels.step[kind](args);
        expect_close(p, "a step is not a walk of one", out_s, out_walked);
        expect_close(p, "c after a step", c_s, c);
        expect_close(p, "c of a step", cells_s, cells_walked);
        if (!keep && h_s != p.h_0) std::printf("h_0 was written\n"), std::abort();
      }
      if (!tape_is_out) expect_close(p, "the tape of a step", tape_s, tape);
    }
  }
  const Index columns = p.cell.gradients * H + (projected ? P : 0);
  std::vector<T> d_gates(static_cast<std::size_t>(p.rows * D * columns)), d_h = p.h_0, d_c = p.c_0;
  std::vector<T> d_input(static_cast<std::size_t>(D == 1 ? p.rows * p.inputs : 0)), unprojected;
  std::vector<T> product(static_cast<std::size_t>(p.rows * p.inputs));
  {
    const Weights<T> ih(p, kernels, true, Product::kInput, threads), hh(p, kernels, true, Product::kHidden, threads);
    const Weights<T> hr(p, kernels, true, Product::kProjection, threads);
    const Weights<T> later(p, kernels, true, Product::kHidden, threads, Stage::kSecond);
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
    args.later_hh = later.matrices.data();
    if (D == 1) {
      args.weight_ih = ih.matrices.data();
      args.inputs = args.d_input_stride = p.inputs;
      args.d_input = d_input.data();
    }
    kernels.backward[kind](args);
    const std::vector<Matrix<T>> ih_in_rows = as_stored(p, Product::kInput, true);
    const std::vector<Matrix<T>> hh_in_rows = as_stored(p, Product::kHidden, true);
    if (D == 1 && p.shape.batch <= kMostLooseBatch) {
      const std::vector<T> in_panels = d_input;
      d_h = p.h_0, d_c = p.c_0;
      args.weight_ih = ih_in_rows.data();
      kernels.backward[kind](args);
      expect_close(p, "d_input differs with the layout of the weights", d_input, in_panels);
      // The same once more on top of it.
      std::vector<T> twice = d_input;
      for (T& value : twice) value *= 2;
      d_h = p.h_0, d_c = p.c_0;
      args.add_input = true;
      kernels.backward[kind](args);
      expect_close(p, "d_input added to itself", d_input, twice);
      args.add_input = false;
    }
    // The recurrence's weights as torch stores them serve a single step.
    if (p.shape.length == 1 && !projected) {
      const std::vector<T> in_panels = d_h;
      const std::vector<Matrix<T>> later_in_rows = as_stored(p, Product::kHidden, true, Stage::kSecond);
      d_h = p.h_0, d_c = p.c_0;
      args.weight_hh = hh_in_rows.data();
      args.later_hh = later_in_rows.data();
      kernels.backward[kind](args);
      expect_close(p, "d_h differs with the layout of the weights", d_h, in_panels);
      args.weight_hh = hh.matrices.data();
      args.later_hh = later.matrices.data();
    }
    // The input's gradient after the walk, of all recurrences together.
    std::vector<T> in_one_product = product, of_panels;
    for (const Matrix<T>* weights : {static_cast<const Matrix<T>*>(ih.matrices.data()), ih_in_rows.data()}) {
      MultiplyArgs<T> multiply;
      multiply.rows = p.rows;
      multiply.columns = multiply.out_stride = p.inputs;
      multiply.recurrences = D;
      multiply.left = {d_gates.data() + (p.cell.gradients - p.cell.gates) * H, D * columns, columns};
      multiply.weights = weights;
      multiply.out = in_one_product.data();
      multiply.threads = threads;
      kernels.multiply(multiply);
      if (of_panels.empty()) of_panels = in_one_product;
    }
    product = in_one_product;
    expect_close(p, "a product differs with the layout of the weights", product, of_panels);
    if (D == 1) {
      args.weight_ih = ih.matrices.data();
      d_h = p.h_0, d_c = p.c_0;
      kernels.backward[kind](args);
      expect_close(p, "d_input on the walk and after it", d_input, product);
    }
    // What the projection multiplied in every row.
    for (Index d = 0; d < (projected ? D : 0); ++d) {
      std::vector<T> m(static_cast<std::size_t>(p.rows * H));
      kernels.unprojected[kind]({p.rows, H, tape.data() + d * p.cell.tape * H, D * p.cell.tape * H, m.data(), threads});
      unprojected.insert(unprojected.end(), m.begin(), m.end());
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
  return {tape, out, h,       c,   tape_x, out_x,   h_x,     c_x,         cells,    out_s, tape_s,
          h_s,  c_s, d_gates, d_h, d_c,    d_input, product, unprojected, d_weight, d_bias};
}

// Every number of 16 bits, widened and narrowed in rows of wider buffers; no NaN becomes a number.
template <class Half>
int check_conversions(void (*widen)(const ConvertArgs<Half, float>&), void (*narrow)(const ConvertArgs<float, Half>&),
                      std::uint32_t exponent) {
  constexpr Index kRows = 1 << 8, kColumns = 1 << 8;
  int failures = 0;
  for (const Index gap : {0, 3}) {
    for (int threads : {1, 2, 3}) {
      const Index stride = kColumns + gap, size = (kRows - 1) * stride + kColumns;
      std::vector<Half> halves(static_cast<std::size_t>(size)), back(halves);
      std::vector<float> floats(static_cast<std::size_t>(size));
      for (Index i = 0; i < kRows * kColumns; ++i)
        halves[static_cast<std::size_t>(i / kColumns * stride + i % kColumns)] = {static_cast<std::uint16_t>(i)};
      widen({kRows, kColumns, halves.data(), stride, floats.data(), stride, threads});
      narrow({kRows, kColumns, floats.data(), stride, back.data(), stride, threads});
      for (Index i = 0; i < kRows * kColumns; ++i) {
        const std::size_t at = static_cast<std::size_t>(i / kColumns * stride + i % kColumns);
        const std::uint32_t bits = halves[at].bits, infinity = exponent;
        const bool is_nan = (bits & 0x7fff) > infinity;
        const bool right = is_nan ? (back[at].bits & 0x7fffu) > infinity && floats[at] != floats[at] : back[at].bits == bits;
        failures += !right;
      }
    }
  }
  // A single number and none.
  Half one = {0x3c01};
  float wide = 0;
  widen({1, 1, &one, 1, &wide, 1, 2});
  narrow({0, 5, &wide, 5, &one, 5, 2});
  if (failures) std::printf("conversions: %d numbers come back as others\n", failures);
  return failures;
}

template <class T>
int check(const TypedKernels<T>& kernels, const char* dtype) {
  const Shape shapes[] = {
      {1, 1, 1, 1, 1, false, false},    {3, 2, 2, 17, 17, false, true},     {5, 7, 1, 33, 33, true, false},
      {4, 13, 2, 50, 50, true, true},   {3, 50, 1, 100, 100, false, false}, {2, 5, 3, 65, 65, false, false},
      {6, 9, 2, 37, 11, true, true},    {2, 4, 1, 70, 33, false, false},    {5, 1, 2, 150, 150, false, true},
      {5, 2, 1, 150, 150, true, false}, {1, 3, 1, 37, 37, false, true},     {1, 5, 2, 16, 16, false, false},
      {1, 13, 1, 70, 70, false, true},  {1, 100, 1, 33, 33, false, false},  {1, 4, 2, 65, 20, false, false}};
  int failures = 0;
  for (const CellShape& cell : FUSED_RNN_ISA::kernels().shapes) {
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

int run_all() {
  int failures = check_patience() + check_staying_away();
  for (int members : {1, 2, 3, 5}) failures += check_crew(members) + check_parallel(members);
  failures += check_conversions(kernels().widen_bfloat16, kernels().narrow_bfloat16, 0x7f80);
  failures += check_int8();
  failures += check_conversions(kernels().widen_float16, kernels().narrow_float16, 0x7c00);
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
