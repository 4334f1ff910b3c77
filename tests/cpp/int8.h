// The walks with int8 weights, for the sanitizers: buffers of exactly the right size, and the same bits however the work is
// shared and in both forms of the products.
#pragma once

#include "problem.h"
#include "run/machine.h"

namespace fused_rnn {
namespace FUSED_RNN_ISA {
namespace {

// A packed weight of each recurrence. Columns beyond K hold numbers too: the rows have zeros there.
struct Int8Weights {
  Int8Weights(Problem<float>& p, Index inner) {
    const Index blocks = vectors_of(p.shape.hidden, kInt8Columns), quads = vectors_of(inner, kInt8Depth);
    const Index columns = blocks * p.cell.gates * kInt8Columns;
    for (Index d = 0; d < p.shape.recurrences; ++d) {
      std::vector<std::int8_t> whole;
      for (const float x : p.draw(columns * quads * kInt8Depth)) whole.push_back(static_cast<std::int8_t>(127.4f * x));
      std::vector<std::int32_t> sum(static_cast<std::size_t>(columns), 0);
      for (std::size_t i = 0; i < whole.size(); ++i) {
        // [block][quad][gate][unit][k]
        const Index at = static_cast<Index>(i), of_gates = p.cell.gates * kInt8Columns, k = at % kInt8Depth;
        const Index quad = at / (of_gates * kInt8Depth) % quads, block = at / (of_gates * kInt8Depth * quads);
        const Index column = block * of_gates + at / kInt8Depth % of_gates;
        if (quad * kInt8Depth + k < inner) sum[static_cast<std::size_t>(column)] -= 128 * whole[i];
      }
      data.push_back(whole);
      // So small that h of a relu does not grow until it is no number.
      scale.push_back(p.draw(columns));
      for (float& each : scale.back()) each *= 5e-4f;
      sums.push_back(sum);
    }
    for (std::size_t d = 0; d < data.size(); ++d) matrices.push_back({data[d].data(), scale[d].data(), sums[d].data(), inner});
  }
  std::vector<std::vector<std::int8_t>> data;
  std::vector<std::vector<float>> scale;
  std::vector<std::vector<std::int32_t>> sums;
  std::vector<Int8Matrix> matrices;
};

std::vector<std::vector<float>> run_int8(const Problem<float>& p, const Int8Weights& ih, const Int8Weights& hh, int threads,
                                         Sharing sharing, bool vnni) {
  const Index D = p.shape.recurrences, H = p.shape.hidden;
  std::vector<float> out(static_cast<std::size_t>(p.rows * D * H)), cells(p.cell.has_c ? out.size() : 0), h = p.h_0, c = p.c_0;
  Int8Args args;
  args.sizes = p.sizes(threads, sharing);
  args.out = {out.data(), D * H, H};
  if (p.cell.has_c) args.cells = {cells.data(), D * H, H};
  args.input = p.input.data();
  args.input_stride = p.inputs;
  args.states[0] = h.data();
  args.states[1] = p.cell.has_c ? c.data() : nullptr;
  args.weight_ih = ih.matrices.data();
  args.weight_hh = hh.matrices.data();
  args.bias = p.bias.data();
  args.vnni = vnni;
  kernels().int8_forward[number(p.cell)](args);
  return {out, cells, h, c};
}

int check_int8() {
  const Shape shapes[] = {{1, 1, 1, 1, 1, false, false},   {3, 2, 2, 17, 17, false, true},   {5, 7, 1, 33, 33, true, false},
                          {4, 13, 2, 50, 50, true, true},  {3, 50, 1, 20, 20, false, false}, {60, 1, 1, 64, 64, false, false},
                          {2, 100, 2, 35, 35, true, false}};
  int failures = 0;
  for (const CellShape& cell : kernels().shapes) {
    if (!kernels().int8_forward[number(cell)]) continue;
    for (const Shape& shape : shapes) {
      Problem<float> p(cell, shape, 7);
      const Int8Weights ih(p, p.inputs), hh(p, shape.hidden);
      const auto expected = run_int8(p, ih, hh, 1, Sharing::kAuto, false);
      for (int threads : {1, 2, 3}) {
        for (Sharing sharing : {Sharing::kAuto, Sharing::kBatch, Sharing::kUnits}) {
          for (bool vnni : {false, true}) {
            if (run_int8(p, ih, hh, threads, sharing, vnni && has_vnni()) == expected) continue;
            std::printf("%s int8, T=%td N=%td D=%td H=%td: %d threads give another result\n", cell.name, shape.length,
                        shape.batch, shape.recurrences, shape.hidden, threads);
            ++failures;
          }
        }
      }
    }
  }
  return failures;
}

}  // namespace
}  // namespace FUSED_RNN_ISA
}  // namespace fused_rnn
