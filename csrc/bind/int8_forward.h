// A layer with int8 weights in one call from Python.
#pragma once

#include <vector>

#include "bind/layer_forward.h"
#include "run/machine.h"
#include "walk/int8_args.h"

namespace fused_rnn {

// A packed weight: data (blocks, K / 4, G * 64) int8, scale (blocks, G * 16) float32 and sums (blocks, G * 16) int32.
struct Int8Operand {
  Operand data, scale, sums;

  Int8Operand(const LayerCall& call, const py::tuple& one, std::size_t first, const char* name, Index inner) : inner_(inner) {
    const auto up = [](Index n, Index of) { return (n + of - 1) / of; };
    const Index blocks = up(call.hidden, kInt8Columns), columns = call.shape.gates * kInt8Columns;
    data = read(py::object(one[first]), name, Dtype::kInt8, {blocks, up(inner, kInt8Depth), columns * kInt8Depth});
    scale = read(py::object(one[first + 1]), "scale", Dtype::kFloat32, {blocks, columns});
    sums = read(py::object(one[first + 2]), "sums", Dtype::kInt32, {blocks, columns});
    if (!data || !scale || !sums) refuse(name, "data, scale and sums", "None");
    if (inner > kMostInt8Inner) refuse(name, "at most " + std::to_string(kMostInt8Inner) + " columns", std::to_string(inner));
  }

  Int8Matrix matrix() const {
    return {data.tensor.data<const std::int8_t>(), scale.tensor.data<const float>(), sums.tensor.data<const std::int32_t>(),
            inner_};
  }

 private:
  Index inner_;
};

// As layer_forward, of a cell with one stage, in float32. weights: of each recurrence data, scale and sums of weight_ih, the
// same of weight_hh, and bias_ih and bias_hh, which may be None. `vnni`: whether its instructions are used where the machine
// has them. Returns out, the states after the walk, and c of every step or None.
inline py::object int8_forward(const std::string& cell, const py::object& input, const py::object& states, Index hidden,
                               const py::sequence& weights, Index length, Index batch, const py::object& batch_sizes,
                               const py::sequence& reverse, const py::object& reset, bool cell_states, bool step, int threads,
                               bool batch_first, const std::string& sharing, bool vnni) {
  if (weights.size() != reverse.size()) {
    refuse("weights", std::to_string(reverse.size()) + ", one for each recurrence", std::to_string(weights.size()));
  }
  py::list biases;
  for (const py::handle& each : weights) {
    const py::tuple one = as_tuple(each);
    if (one.size() != 8) refuse("weights", "8 tensors for each recurrence", std::to_string(one.size()));
    biases.append(py::make_tuple(py::object(one[6]), py::object(one[7])));
  }
  const LayerCall call(cell, input, states, hidden, biases, length, batch, batch_sizes, reverse, reset, step, threads, sharing);
  const auto run = call.kernels.int8_forward[call.cell];
  if (!run) refuse("cell", "one with one stage", cell);
  if (cell_states && !call.shape.has_c) refuse("cell_states", "False for a cell without c", "True");
  std::vector<Int8Operand> operands;
  std::vector<Int8Matrix> ih, hh;
  for (const py::handle& each : weights) {
    const py::tuple one = as_tuple(each);
    operands.emplace_back(call, one, 0, "weight_ih", call.inputs);
    ih.push_back(operands.back().matrix());
    operands.emplace_back(call, one, 3, "weight_hh", call.hidden);
    hh.push_back(operands.back().matrix());
  }
  const LayerOutputs outputs(call, false, cell_states, batch_first);
  {
    const py::gil_scoped_release release;
    const Index D = call.recurrences(), H = call.hidden, size = D * call.steps.batch * H;
    const Room<float> bias = summed_biases<float, float>(call);
    Room<float> before;
    const LayerCall::Span span = call.span(0, D, 0, call.steps.length);
    Int8Args args;
    args.sizes = span.sizes;
    args.out = {outputs.out.tensor.data<float>(), D * H, H};
    if (outputs.cells) args.cells = {outputs.cells.tensor.data<float>(), D * H, H};
    args.input = call.input.tensor.data<const float>();
    args.input_stride = call.input_stride();
    args.updates_h = !call.step;
    for (int i = 0; i < call.state_count(); ++i) {
      const float* given = call.states[i] ? call.states[i].tensor.data<const float>() : nullptr;
      if (!outputs.states[i] && given) {
        // Read alone: see updates_h.
        args.states[i] = const_cast<float*>(given);
        continue;
      }
      if (!outputs.states[i]) before = Room<float>(size);
      args.states[i] = outputs.states[i] ? outputs.states[i].tensor.data<float>() : before.get();
      copy_or_zero(given, size, args.states[i]);
    }
    args.weight_ih = ih.data();
    args.weight_hh = hh.data();
    args.bias = bias.get();
    args.vnni = vnni && has_vnni();
    run(args);
  }
  return py::make_tuple(outputs.out.owner, outputs.after(call), outputs.cells ? outputs.cells.owner : py::none());
}

}  // namespace fused_rnn
