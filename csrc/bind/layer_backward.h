// A layer's backward in one call from Python.
#pragma once

#include <algorithm>
#include <cstring>

#include "bind/layer_forward.h"
#include "bind/weight_gradients.h"
#include "run/team.h"

namespace fused_rnn {

// What the backward reads beside the operands of the layer, and what it writes.
struct LayerGradients {
  Operand out, tape, d_out, d_cells;
  Operand d_states_after[2];  // absent for zero
  // Absent where they are not wanted.
  Operand d_input, d_gates;
  Operand d_states[2];
  std::vector<WeightResults> d_weights;

  LayerGradients(const LayerCall& call, const py::object& out_object, const py::object& tape_object,
                 const py::object& d_out_object, const py::object& d_cells_object, const py::sequence& d_states_objects,
                 const py::sequence& wanted, bool gates_wanted) {
    const Index D = call.recurrences(), N = call.steps.batch, H = call.hidden, P = call.output, gates = call.gate_columns();
    const auto rows = [&](const py::object& object, const char* name, Index columns) {
      return call.by_rows ? read(object, name, call.dtype, {call.rows, columns})
                          : read(object, name, call.dtype, {call.steps.length, N, columns});
    };
    out = rows(out_object, "out", D * P);
    if (!out) refuse("out", "a tensor", "None");
    if (tape_object.is_none() != call.shape.tape_is_out) refuse("tape", "None if it is the output, else a tensor", "another");
    tape = read(tape_object, "tape", call.dtype, {call.rows, D, call.tape_columns()});
    d_out = rows(d_out_object, "d_out", D * P);
    d_cells = rows(d_cells_object, "d_cells", D * H);
    if (d_cells && !call.shape.has_c) refuse("d_cells", "None for a cell without c", "a tensor");
    const std::size_t count = static_cast<std::size_t>(call.state_count() - call.step);
    if (d_states_objects.size() != count) refuse("d_states", std::to_string(count), std::to_string(d_states_objects.size()));
    const std::size_t all = 1 + static_cast<std::size_t>(call.state_count()) + kWeights * static_cast<std::size_t>(D);
    if (wanted.size() != all) refuse("wanted", std::to_string(all) + " flags", std::to_string(wanted.size()));
    std::size_t place = 0;
    const auto next = [&] { return static_cast<bool>(py::bool_(py::object(wanted[place++]))); };
    d_input = LayerOutputs::rows_of(next(), call.input, call, call.inputs, false);
    for (int i = 0; i < call.state_count(); ++i) {
      d_states[i] = LayerOutputs::new_state(next(), call.states[i], call, i);
      if (i < call.step) continue;
      const py::object after = d_states_objects[static_cast<std::size_t>(i - call.step)];
      d_states_after[i] = call.step ? read(after, "d_states", call.dtype, {N, call.state_size(i)})
                                    : read(after, "d_states", call.dtype, {D, N, call.state_size(i)});
    }
    // The biases themselves need not be there: no gradient reads them.
    for (const WeightOperands& weights : call.weights) {
      WeightResults results;
      results.ih = new_tensor(next(), weights.ih, call.like, call.dtype, {gates, call.inputs});
      results.hh = new_tensor(next(), weights.hh, call.like, call.dtype, {gates, P});
      results.bias_ih = new_tensor(next(), weights.bias_ih, call.like, call.dtype, {gates});
      results.bias_hh = new_tensor(next(), results.bias_ih, call.like, call.dtype, {gates});
      results.hr = new_tensor(next() && weights.hr, weights.hr, call.like, call.dtype, {P, H});
      d_weights.push_back(std::move(results));
    }
    const Dtype computed = call.dtype == Dtype::kFloat64 ? Dtype::kFloat64 : Dtype::kFloat32;
    d_gates = new_tensor(gates_wanted, call.like, call.dtype, computed, {call.rows, D, call.gradient_columns()});
  }

  py::tuple results() const {
    py::tuple all(1 + static_cast<std::size_t>(state_count) + kWeights * d_weights.size() + static_cast<bool>(d_gates));
    std::size_t place = 0;
    const auto append = [&](const Operand& operand) { all[place++] = operand ? operand.owner : py::none(); };
    append(d_input);
    for (int i = 0; i < 2; ++i) {
      if (i < state_count) append(d_states[i]);
    }
    for (const WeightResults& weights : d_weights) {
      for (const Operand* each : {&weights.ih, &weights.hh, &weights.bias_ih, &weights.bias_hh, &weights.hr}) append(*each);
    }
    if (d_gates) append(d_gates);
    return all;
  }
  int state_count = 1;
};

// Rows of what the forward left, (R, D, columns), for one span: where they are, or converted.
template <class S, class T>
class StoredRows {
 public:
  StoredRows(const Operand& operand, Index recurrences, Index columns)
      : data_(operand ? operand.tensor.data<const S>() : nullptr), all_(recurrences * columns), columns_(columns) {}
  Rows<const T> of(const LayerCall& call, const LayerCall::Span& span) {
    if (!data_) return {};
    const S* from = data_ + span.row * all_ + span.d * columns_;
    if constexpr (std::is_same_v<S, T>) {
      return {from, all_, columns_};
    } else {
      computed_ = Computed<S, T>(call, from, span.rows, span.count * columns_, all_);
      return {computed_.at, span.count * columns_, columns_};
    }
  }

 private:
  const S* data_;
  Index all_, columns_;
  Computed<S, T> computed_;
};

// What a recurrence's product read in the rows of one span, its h one step earlier, in parts that follow one another.
template <class T>
class PreviousH {
 public:
  // out: the rows of recurrence d from the first of `near` on; h_0: N x P.
  PreviousH(const LayerCall& call, const LayerCall::Span& span, const LayerCall::Span& near, const T* out, Index stride,
            const T* h_0, Index d) {
    const bool reverse = call.reverse[d];
    const Index N = call.steps.batch, P = call.output, rows = span.rows;
    const T* own = out + (span.row - near.row) * stride;
    if (call.steps.batch_sizes || call.reset) {
      gather(call, span, near, out, stride, h_0, d);
      return;
    }
    // Views of the output, one step off; only the first step of the walk starts from h_0.
    if (reverse) {
      const bool starts = span.t_end == call.steps.length;
      parts_[0] = {own + N * stride, starts ? rows - N : rows, stride};
      parts_[1] = {h_0, starts ? N : 0, P};
    } else if (span.t_begin > 0) {
      parts_[0] = {own - N * stride, rows, stride};
    } else {
      parts_[0] = {h_0, N, P};
      parts_[1] = {own, rows - N, stride};
    }
  }
  const Part<T>* parts() const { return parts_; }

 private:
  void gather(const LayerCall& call, const LayerCall::Span& span, const LayerCall::Span& near, const T* out, Index stride,
              const T* h_0, Index d) {
    const bool reverse = call.reverse[d];
    const Index P = call.output;
    const StepRows& steps = call.steps;
    room_ = Room<T>(span.rows * P);
    parts_[0] = {room_.get(), span.rows, P};
    const bool* reset = call.reset ? call.reset.tensor.data<const bool>() + d * call.rows : nullptr;
    const double bytes = static_cast<double>(span.rows) * static_cast<double>(P) * sizeof(T);
    parallel(bytes < (256 << 10) ? 1 : call.threads, [&](int rank, int size) {
      for (Index t = span.t_begin + rank; t < span.t_end; t += size) {
        const Index before = reverse ? t + 1 : t - 1;
        const Index known = before >= 0 && before < steps.length ? steps.count(before) : 0;
        for (Index j = 0; j < steps.count(t); ++j) {
          const Index row = call.offset(t) + j;
          T* to = room_.get() + (row - span.row) * P;
          if (reset && reset[row]) {
            std::fill_n(to, P, T{});
          } else {
            std::copy_n(j < known ? out + (call.offset(before) + j - near.row) * stride : h_0 + j * P, P, to);
          }
        }
      }
    });
  }

  Part<T> parts_[2];
  Room<T> room_;
};

// States of all recurrences as the kernels compute with them; zero where they are absent.
template <class S, class T>
Computed<S, T> computed_state(const LayerCall& call, const Operand& state, Index size) {
  if (state) return Computed<S, T>(call, state.tensor.data<const S>(), 1, size, size);
  Computed<S, T> zero;
  zero.room = Room<T>(size);
  std::fill_n(zero.room.get(), size, T{});
  zero.at = zero.room.get();
  return zero;
}

// Gradients of the gates exist for a stretch of time: so many bytes, but at least so many rows, because every stretch adds to
// the weights' gradients, which are read and written once more for it.
constexpr Index kGradientBytes = Index{16} << 20;
constexpr Index kGradientStretchRows = 2048;

template <class S, class T>
class LayerBackward {
 public:
  LayerBackward(const LayerCall& call, const LayerGradients& io)
      : call_(call),
        io_(io),
        kernels_(typed<T>(call.kernels)),
        D_(call.recurrences()),
        columns_(call.gradient_columns()),
        d_input_(io.d_input, call.rows, call.inputs),
        out_(io.out, D_, call.output),
        tape_(io.tape, D_, call.tape_columns()),
        d_out_(io.d_out, D_, call.output),
        d_cells_(io.d_cells, D_, call.hidden) {
    const Index row_bytes = columns_ * static_cast<Index>(sizeof(T));
    at_once_ = io.d_gates || call.rows * D_ <= kGradientBytes / row_bytes;
    stretch_ = at_once_ ? call.steps.length
                        : std::max<Index>(1, std::max(kGradientStretchRows, kGradientBytes / row_bytes) /
                                                 std::max<Index>(1, call.steps.batch));
    for (const WeightResults& results : io.d_weights) {
      sums_.push_back(results.any() ? std::make_unique<WeightGradients<S, T>>(call, results) : nullptr);
    }
  }

  void run() {
    read_states();
    const Index together = at_once_ ? D_ : 1;
    const Index most_rows = std::min(call_.rows, stretch_ * call_.steps.batch);
    if (!io_.d_gates) gates_ = Room<T>(most_rows * together * columns_);
    for (Index d = 0; d < D_; d += together) walk(d, together);
    for (const auto& sums : sums_) {
      if (sums) sums->finish();
    }
    d_input_.finish(call_);
    if constexpr (!kStored) {
      for (int i = 0; i < call_.state_count(); ++i) {
        const Index size = state_elements(i);
        if (io_.d_states[i]) convert(call_, 1, size, d_states_[i], size, io_.d_states[i].tensor.data<S>(), size);
      }
    }
  }

 private:
  static constexpr bool kStored = std::is_same_v<S, T>;

  Index state_elements(int i) const { return D_ * call_.steps.batch * call_.state_size(i); }

  void read_states() {
    for (int i = 0; i < call_.state_count(); ++i) {
      const Index size = state_elements(i);
      states_0_[i] = computed_state<S, T>(call_, call_.states[i], size);
      bool given = false;
      if constexpr (kStored) {
        given = static_cast<bool>(io_.d_states[i]);
        if (given) d_states_[i] = io_.d_states[i].tensor.data<T>();
      }
      // What no one wants of them is still carried from step to step.
      if (!given) {
        d_state_rooms_[i] = Room<T>(size);
        d_states_[i] = d_state_rooms_[i].get();
      }
      const Operand& after = io_.d_states_after[i];
      if (!after) {
        std::fill_n(d_states_[i], size, T{});
      } else if constexpr (kStored) {
        std::copy_n(after.tensor.data<const T>(), size, d_states_[i]);
      } else {
        convert(call_, 1, size, after.tensor.data<const S>(), size, d_states_[i], size);
      }
    }
  }

  // Recurrences d .. d + count - 1, from the last stretch of their walk to the first.
  void walk(Index d, Index count) {
    const Laid<S, T> weight_hh(call_, Product::kHidden, true, d, count);
    std::unique_ptr<Laid<S, T>> weight_hr, weight_ih, later_hh;
    if (call_.shape.later) later_hh.reset(new Laid<S, T>(call_, Product::kHidden, true, d, count, Stage::kSecond));
    if (call_.projected()) weight_hr.reset(new Laid<S, T>(call_, Product::kProjection, true, d, count));
    if (d_input_.at) weight_ih.reset(new Laid<S, T>(call_, Product::kInput, true, d, count));
    const Index stretches = (call_.steps.length + stretch_ - 1) / stretch_;
    for (Index i = 0; i < stretches; ++i) {
      const bool reverse = call_.reverse[d];
      const Index t = (reverse ? i : stretches - 1 - i) * stretch_, t_end = std::min(t + stretch_, call_.steps.length);
      const LayerCall::Span own = call_.span(d, count, t, t_end);
      // With a conversion, only the rows that the stretch reads exist in the wider type: its own and those one step before it.
      Index first = 0, last = call_.steps.length;
      if (!kStored && !at_once_) {
        first = reverse ? t : std::max<Index>(t - 1, 0);
        last = reverse ? std::min(t_end + 1, call_.steps.length) : t_end;
      }
      const LayerCall::Span near = call_.span(d, count, first, last);
      BackwardArgs<T> args;
      args.sizes = near.sizes;
      args.t_begin = t - first;
      args.t_end = t_end - first;
      args.out = out_.of(call_, near);
      args.tape = call_.shape.tape_is_out ? args.out : tape_.of(call_, near);
      args.d_out = d_out_.of(call_, near);
      args.d_cells = d_cells_.of(call_, near);
      T* const d_gates = io_.d_gates ? io_.d_gates.tensor.data<T>() : gates_.get();
      args.d_gates = {d_gates, count * columns_, columns_};
      for (int k = 0; k < call_.state_count(); ++k) {
        const Index from = d * call_.steps.batch * call_.state_size(k);
        args.d_states[k] = d_states_[k] + from;
        args.states_0[k] = states_0_[k].at + from;
      }
      args.weight_hh = weight_hh.get();
      args.weight_hr = weight_hr ? weight_hr->get() : nullptr;
      args.later_hh = later_hh ? later_hh->get() : nullptr;
      T* const d_input = d_input_.at ? d_input_.at + own.row * call_.inputs : nullptr;
      // A single recurrence makes the input's gradient as it walks.
      if (d_input && count == 1) {
        args.weight_ih = weight_ih->get();
        args.inputs = args.d_input_stride = call_.inputs;
        args.d_input = d_input;
        args.add_input = d > 0;
      }
      kernels_.backward[call_.cell](args);
      sum_up(own, near, args);
      if (d_input && count > 1) {
        MultiplyArgs<T> product;
        product.rows = own.rows;
        product.columns = product.out_stride = call_.inputs;
        product.recurrences = count;
        product.left = {d_gates + (call_.shape.gradients - call_.shape.gates) * call_.hidden, count * columns_, columns_};
        product.weights = weight_ih->get();
        product.out = d_input;
        product.threads = call_.threads;
        kernels_.multiply(product);
      }
    }
  }

  // What the weights of these recurrences receive from one stretch.
  void sum_up(const LayerCall::Span& own, const LayerCall::Span& near, const BackwardArgs<T>& args) {
    const auto first = sums_.begin() + own.d;
    if (std::all_of(first, first + own.count, [](const auto& sums) { return !sums; })) return;
    const Computed<S, T> x(call_, call_.input.tensor.data<const S>() + own.row * call_.input_stride(), own.rows, call_.inputs,
                           call_.input_stride());
    const Part<T> input = {x.at, own.rows, x.stride};
    for (Index i = 0; i < own.count; ++i) {
      if (!first[i]) continue;
      WeightGradients<S, T>& sums = *first[i];
      std::unique_ptr<PreviousH<T>> h;
      if (sums.reads_h()) {
        h.reset(new PreviousH<T>(call_, own, near, args.out.at(0, i), args.out.row_stride,
                                 args.states_0[0] + i * call_.steps.batch * call_.output, own.d + i));
      }
      Room<T> m;
      if (sums.reads_tape()) {
        m = Room<T>(own.rows * call_.hidden);
        kernels_.unprojected[call_.cell](
            {own.rows, call_.hidden, args.tape.at(own.row - near.row, i), args.tape.row_stride, m.get(), call_.threads});
      }
      Part<T> operand;
      if (call_.shape.later) {
        const T* tape = args.tape.at(own.row - near.row, i);
        operand = {tape + call_.shape.tape_operand * call_.hidden, own.rows, args.tape.row_stride};
      }
      sums.add(args.d_gates.at(0, i), args.d_gates.row_stride, own.rows, input, h ? h->parts() : nullptr, m.get(), operand);
    }
  }

  const LayerCall& call_;
  const LayerGradients& io_;
  const TypedKernels<T>& kernels_;
  const Index D_, columns_;
  bool at_once_;
  Index stretch_;
  Sum<S, T> d_input_;
  StoredRows<S, T> out_, tape_, d_out_, d_cells_;
  std::vector<std::unique_ptr<WeightGradients<S, T>>> sums_;
  Computed<S, T> states_0_[2];
  T* d_states_[2] = {};
  Room<T> d_state_rooms_[2], gates_;
};

// The gradients of input, states and the five weights of each recurrence, None where they are not wanted or there is no such
// weight; arguments as of layer_forward, and its results. d_out, d_cells and each of d_states may be None for zero. wanted: a
// flag for each of these gradients. With gates_wanted, the gradients of the gates follow, (R, D, ·), in the dtype that the
// kernels compute in.
inline py::object layer_backward(const std::string& cell, const py::object& input, const py::object& states,
                                 const py::sequence& weights, Index length, Index batch, const py::object& batch_sizes,
                                 const py::sequence& reverse, const py::object& reset, const py::object& out,
                                 const py::object& tape, const py::object& d_out, const py::object& d_cells,
                                 const py::sequence& d_states, const py::sequence& wanted, bool gates_wanted, bool step,
                                 int threads, const std::string& sharing) {
  const LayerCall call(cell, input, states, weights, length, batch, batch_sizes, reverse, reset, step, threads, sharing);
  LayerGradients io(call, out, tape, d_out, d_cells, d_states, wanted, gates_wanted);
  io.state_count = call.state_count();
  call.work([&] { with_types(call.dtype, [&](auto s, auto t) { LayerBackward<decltype(s), decltype(t)>(call, io).run(); }); });
  return io.results();
}

}  // namespace fused_rnn
