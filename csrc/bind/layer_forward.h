// A layer's forward in one call from Python.
#pragma once

#include <algorithm>

#include "bind/laid.h"

namespace fused_rnn {

// What the forward gives back.
struct LayerOutputs {
  Operand out, cells, tape;
  Operand states[2];

  LayerOutputs(const LayerCall& call, bool keep, bool cell_states, bool batch_first) {
    const Index D = call.recurrences(), H = call.hidden;
    const Operand& like_out =
        call.input.tensor.shape(call.input.tensor.dimensions() - 1) == D * call.output ? call.input : call.states[0];
    out = rows_of(true, like_out, call, D * call.output, batch_first);
    cells = rows_of(cell_states, out, call, D * H, batch_first);
    tape = new_tensor(keep && !call.shape.tape_is_out, call.like, call.dtype, call.dtype, {call.rows, D, call.tape_columns()});
    for (int i = call.step; i < call.state_count(); ++i) states[i] = new_state(true, i ? states[i - 1] : out, call, i);
  }

  // The states after the walk, for Python.
  py::tuple after(const LayerCall& call) const {
    py::tuple all(call.state_count() - call.step);
    for (int i = call.step; i < call.state_count(); ++i) all[static_cast<std::size_t>(i - call.step)] = states[i].owner;
    return all;
  }

  // `other` has perhaps the sizes of the new tensor, here and below.
  static Operand new_state(bool wanted, const Operand& other, const LayerCall& call, int i) {
    const Index N = call.steps.batch, size = call.state_size(i);
    return call.step ? new_tensor(wanted, other, call.like, call.dtype, {N, size})
                     : new_tensor(wanted, other, call.like, call.dtype, {call.recurrences(), N, size});
  }

  // A tensor with rows as the input has them.
  static Operand rows_of(bool wanted, const Operand& other, const LayerCall& call, Index columns, bool batch_first) {
    const Index T = call.steps.length, N = call.steps.batch;
    if (call.by_rows) return new_tensor(wanted, other, call.like, call.dtype, {call.rows, columns});
    if (wanted && batch_first) return new_turned(call.like, call.dtype, T, N, columns);
    return new_tensor(wanted, other, call.like, call.dtype, {T, N, columns});
  }
};

template <class T>
void copy_or_zero(const T* from, Index count, T* to) {
  if (from) {
    std::copy_n(from, count, to);
  } else {
    std::fill_n(to, count, T{});
  }
}

// The bias that the kernels add, for every recurrence: sums, and last what a cell keeps apart of bias_hh. Null where there is
// none.
template <class S, class T>
Room<T> summed_biases(const LayerCall& call) {
  const Index H = call.hidden, gates = call.gate_columns(), all = call.shape.bias * H, together = gates - (all - gates);
  const bool none = std::all_of(call.weights.begin(), call.weights.end(),
                                [](const WeightOperands& weights) { return !weights.bias_ih && !weights.bias_hh; });
  if (none) return {};
  Room<T> sums(call.recurrences() * all);
  for (Index d = 0; d < call.recurrences(); ++d) {
    const WeightOperands& weights = call.weights[static_cast<std::size_t>(d)];
    const Computed<S, T> of_x(call, weights.bias_ih), of_h(call, weights.bias_hh);
    T* to = sums.get() + d * all;
    copy_or_zero(of_x.at, gates, to);
    if (const T* hh = of_h.at) {
      for (Index i = 0; i < together; ++i) to[i] += hh[i];
    }
    copy_or_zero(of_h.at ? of_h.at + together : nullptr, gates - together, to + gates);
  }
  return sums;
}

// Rows of a result, (R, D, columns), for one span: where the result is, or in a wider type to be converted after the walk.
template <class S, class T>
class Results {
 public:
  Results(const Operand& to, Index recurrences, Index columns, Index most_rows)
      : data_(to ? to.tensor.data<S>() : nullptr), all_(recurrences * columns), columns_(columns) {
    if constexpr (!std::is_same_v<S, T>) {
      if (data_) room_ = Room<T>(most_rows);
    }
  }

  Rows<T> of(const LayerCall::Span& span) const {
    if (!data_) return {};
    if constexpr (std::is_same_v<S, T>) {
      return {data_ + span.row * all_ + span.d * columns_, all_, columns_};
    } else {
      return {room_.get(), span.count * columns_, columns_};
    }
  }
  void finish(const LayerCall& call, const LayerCall::Span& span) const {
    if constexpr (!std::is_same_v<S, T>) {
      if (!data_) return;
      const Index width = span.count * columns_;
      convert(call, span.rows, width, room_.get(), width, data_ + span.row * all_ + span.d * columns_, all_);
    }
  }

 private:
  S* data_;
  Index all_, columns_;
  Room<T> room_;
};

// Bytes of the float32 copies of a stretch of time: a few second-level caches; but at least so many rows, because a product of
// fewer waits for the weights.
constexpr Index kStretchBytes = Index{8} << 20;
constexpr Index kStretchRows = 512;

template <class S, class T>
void run_forward(const LayerCall& call, const LayerOutputs& outputs, bool keep) {
  constexpr bool kStored = std::is_same_v<S, T>;
  const auto& kernels = typed<T>(call.kernels);
  const Index D = call.recurrences(), N = call.steps.batch, P = call.output, H = call.hidden;
  const Room<T> bias = summed_biases<S, T>(call);

  Room<T> rooms[2];  // states that are stored in a narrower type, or not given back
  T* states[2] = {};
  for (int i = 0; i < call.state_count(); ++i) {
    const Index size = D * N * call.state_size(i);
    const S* given = call.states[i] ? call.states[i].tensor.data<const S>() : nullptr;
    const Operand& to = outputs.states[i];
    if constexpr (kStored) {
      if (!to && given) {
        // Read alone: see updates_h.
        states[i] = const_cast<T*>(given);
        continue;
      }
      if (to) states[i] = to.tensor.data<T>();
    }
    if (!states[i]) {
      rooms[i] = Room<T>(size);
      states[i] = rooms[i].get();
    }
    if (!given) {
      std::fill_n(states[i], size, T{});
    } else if constexpr (kStored) {
      std::copy_n(given, size, states[i]);
    } else {
      convert(call, 1, size, given, size, states[i], size);
    }
  }

  const bool keeps_tape = static_cast<bool>(outputs.tape);
  const Index row_columns = call.inputs + P + (keeps_tape ? call.tape_columns() : 0) + (outputs.cells ? H : 0);
  const Index most = std::max(kStretchRows, kStretchBytes / (row_columns * static_cast<Index>(sizeof(T))));
  const bool at_once = kStored || call.rows * D <= most;
  const Index stretch = at_once ? call.steps.length : std::max<Index>(1, most / std::max<Index>(1, N));
  const Index room_rows = at_once ? call.rows * D : std::min(call.rows, stretch * N);
  const Results<S, T> out(outputs.out, D, P, room_rows * P), cells(outputs.cells, D, H, room_rows * H);
  const Results<S, T> tape(outputs.tape, D, call.tape_columns(), room_rows * call.tape_columns());

  const Index together = at_once ? D : 1;
  for (Index d = 0; d < D; d += together) {
    const Laid<S, T> weight_ih(call, Product::kInput, false, d, together),
        weight_hh(call, Product::kHidden, false, d, together);
    std::unique_ptr<Laid<S, T>> weight_hr, later_ih, later_hh;
    if (call.shape.later) {
      later_ih.reset(new Laid<S, T>(call, Product::kInput, false, d, together, Stage::kSecond));
      later_hh.reset(new Laid<S, T>(call, Product::kHidden, false, d, together, Stage::kSecond));
    }
    if (call.projected()) weight_hr.reset(new Laid<S, T>(call, Product::kProjection, false, d, together));
    const Index stretches = (call.steps.length + stretch - 1) / stretch;
    for (Index i = 0; i < stretches; ++i) {
      const Index t = (call.reverse[d] ? stretches - 1 - i : i) * stretch;
      const LayerCall::Span span = call.span(d, together, t, std::min(t + stretch, call.steps.length));
      const Computed<S, T> input(call, call.input.tensor.data<const S>() + span.row * call.input_stride(), span.rows,
                                 call.inputs, call.input_stride());
      ForwardArgs<T> args;
      args.sizes = span.sizes;
      args.keep = keep;
      args.updates_h = !call.step;
      args.out = out.of(span);
      args.tape = call.shape.tape_is_out ? args.out : tape.of(span);
      args.cells = cells.of(span);
      args.input = input.at;
      args.input_stride = input.stride;
      for (int k = 0; k < call.state_count(); ++k) args.states[k] = states[k] + d * N * call.state_size(k);
      args.weight_ih = weight_ih.get();
      args.weight_hh = weight_hh.get();
      args.weight_hr = weight_hr ? weight_hr->get() : nullptr;
      args.later_ih = later_ih ? later_ih->get() : nullptr;
      args.later_hh = later_hh ? later_hh->get() : nullptr;
      args.bias = bias.get() ? bias.get() + d * call.shape.bias * H : nullptr;
      const bool single = call.steps.length == 1 && !call.projected();
      (single ? kernels.step : kernels.forward)[call.cell](args);
      out.finish(call, span);
      tape.finish(call, span);
      cells.finish(call, span);
    }
  }
  if constexpr (!kStored) {
    for (int i = 0; i < call.state_count(); ++i) {
      const Index size = D * N * call.state_size(i);
      if (outputs.states[i]) convert(call, 1, size, states[i], size, outputs.states[i].tensor.data<S>(), size);
    }
  }
}

inline void run_forward(const LayerCall& call, const LayerOutputs& outputs, bool keep) {
  call.work(
      [&] { with_types(call.dtype, [&](auto s, auto t) { run_forward<decltype(s), decltype(t)>(call, outputs, keep); }); });
}

// input (R, I), or (T, N, I) of dense steps; states (D, N, ·) each, or None for zero; weights: ih, hh, bias_ih, bias_hh and hr
// of each recurrence, the last three may be None. Returns a LayerResult: out, (R, D·P) or (T, N, D·P); the states after the
// walk; with cell_states c of every step, else None; and with `keep` the tape (R, D, ·), None where it is the output. With
// `step`, input (N, I) and states (N, ·) are those of a cell, and h is not among the states after it: out is h. With
// `batch_first`, an out and a c of every step of three dimensions are (N, T, ·), in the same memory. Raises ValueError for what
// does not fit each other.
inline py::object layer_forward(const std::string& cell, const py::object& input, const py::object& states,
                                const py::sequence& weights, Index length, Index batch, const py::object& batch_sizes,
                                const py::sequence& reverse, const py::object& reset, bool keep, bool cell_states, bool step,
                                int threads, bool batch_first, const std::string& sharing) {
  const LayerCall call(cell, input, states, weights, length, batch, batch_sizes, reverse, reset, step, threads, sharing);
  if (cell_states && !call.shape.has_c) refuse("cell_states", "False for a cell without c", "True");
  const LayerOutputs outputs(call, keep, cell_states, batch_first);
  run_forward(call, outputs, keep);
  // A named tuple as its class makes it, in a fraction of the time.
  auto* type = reinterpret_cast<PyTypeObject*>(Makers::get().layer_result.ptr());
  const auto result = py::reinterpret_steal<py::object>(type->tp_alloc(type, 4));
  if (!result) throw py::error_already_set();
  py::ssize_t place = 0;
  const auto put = [&](const py::object& item) {
    PyTuple_SET_ITEM(result.ptr(), place++, (item ? item : py::none()).inc_ref().ptr());
  };
  put(outputs.out.owner);
  put(outputs.after(call));
  put(outputs.cells.owner);
  put(outputs.tape.owner);
  return result;
}

// As layer_forward, of one recurrence over dense steps, (T, N, I) or for a step (N, I), of which nothing is kept; weights:
// those of the recurrence. Returns out and the states after the walk; or None, with nothing done, where a tensor is of a class
// of its own.
inline py::object plain_forward(const std::string& cell, const py::object& input, const py::object& states,
                                const py::tuple& weights, bool step, int threads, bool batch_first) {
  const auto other = [](const py::handle& each) { return !each.is_none() && !Tensor::is_plain(each); };
  if (other(input) || std::any_of(weights.begin(), weights.end(), other)) return py::none();
  if (!states.is_none()) {
    const py::tuple given = as_tuple(states);
    if (std::any_of(given.begin(), given.end(), other)) return py::none();
  }
  const LayerCall call(cell, input, states, weights, step, threads);
  const LayerOutputs outputs(call, false, false, batch_first);
  run_forward(call, outputs, false);
  return py::make_tuple(outputs.out.owner, outputs.after(call));
}

}  // namespace fused_rnn
