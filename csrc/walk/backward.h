// Backpropagation through time for every cell: one parallel region walks the steps in the opposite order of the forward.
#pragma once

#include "run/memory.h"
#include "walk/walk.h"

namespace fused_rnn {
namespace FUSED_RNN_ISA {

// One thread's walk over one part of the batch of one recurrence.
template <class Cell, class T>
class BackwardWalk {
 public:
  // `room` is that of the thread's group.
  BackwardWalk(const BackwardArgs<T>& args, const T* zeros, T* room, Index d, Range batch, Seat& seat)
      : args_(args),
        steps_(args.sizes.steps),
        hidden_(args.sizes.hidden),
        output_(args.sizes.output),
        origin_(steps_.offset(args.t_begin)),
        zeros_(zeros),
        d_(d),
        reset_(args.sizes.reset ? args.sizes.reset + d * args.sizes.reset_stride : nullptr),
        reverse_(args.sizes.reverse[d]),
        batch_(batch),
        seat_(seat),
        shared_(seat.shared()),
        room_(room),
        fetches_(outgrows_caches<T>(args.sizes, (Cell::kTape + Cell::kGradients) * hidden_ + args.inputs)),
        d_h_(args.d_states[0] + d * steps_.batch * output_),
        d_c_(Cell::kHasC ? args.d_states[1] + d * steps_.batch * hidden_ : nullptr),
        scratch_(steps_.batch, batch.size()),
        input_scratch_(rows_to_wait(args, batch), rows_to_wait(args, batch)),
        waiting_(rows_to_wait(args, batch)),
        weight_hh_(args.weight_hh[d]) {
    scratch_.as_stored = input_scratch_.as_stored = (args.t_end - args.t_begin) * steps_.batch <= kFewestToLayOut;
    if (loose(args.weight_hh)) weight_hh_.first = Cell::weight_block(0) * hidden_;
    take(0);
  }

  // Elements that each thread needs for the panels of weights that are laid out as they are needed.
  static Index room_elements(const BackwardArgs<T>& args) {
    return recurrent_elements(args) + group_elements(args.weight_ih, args.inputs);
  }

  void run() {
    const Index length = args_.t_end - args_.t_begin;
    Index walked = -1, active = 0;
    // One more turn than steps: the last one carries the gradient of the first walked states out.
    for (Index s = 0; s <= length; ++s) {
      const Index t = s == length ? -1 : reverse_ ? args_.t_begin + s : args_.t_end - 1 - s;
      const Index n = t < 0 ? 0 : clip(steps_.count(t), batch_);
      if (n == 0 && active == 0) continue;
      scratch_.descending = s % 2;
      const bool gathered = args_.weight_ih && active && gather(walked, active, n == 0);
      const bool projected = !kTwoStages<Cell> && args_.weight_hr;
      const bool two = (kTwoStages<Cell> && n) || projected;
      seat_.phase([&](int part) {
        take(part);
        if (projected) {
          feed_back<Projected>(t, n, walked, active);
        } else {
          feed_back<Direct>(t, n, walked, active);
        }
        if (gathered && !two) input_gradient();
      });
      // The next product reads the units of all shares.
      if (two) {
        seat_.phase([&](int part) {
          take(part);
          if constexpr (kTwoStages<Cell>) {
            second_stage(t, n);
          } else {
            project(t, n);
          }
          if (gathered) input_gradient();
        });
      }
      if (gathered) waiting_rows_ = 0;
      walked = t;
      active = n;
    }
  }

 private:
  static Index rows_to_wait(const BackwardArgs<T>& args, Range batch) {
    return !args.weight_ih ? 0 : batch.size() < kInputRows ? kInputRows : batch.size();
  }

  static bool loose(const Matrix<T>* w) { return w && w->layout != Layout::kPanels; }
  // The panels of a group of columns, or the sums of a few rows.
  static Index group_elements(const Matrix<T>* w, Index columns) {
    if (!loose(w)) return 0;
    const Index panels = kGroup * w->inner, sums = kFewestToLayOut * vectors_of(columns, kLanes<T>);
    return (panels > sums ? panels : sums) * kLanes<T>;
  }

  // Of both recurrent products, which take turns.
  static Index recurrent_elements(const BackwardArgs<T>& args) {
    const Index first = group_elements(args.weight_hh, args.sizes.output);
    const Index second = group_elements(args.later_hh, args.sizes.hidden);
    return first > second ? first : second;
  }

  struct Direct {};
  struct Projected {};

  // Makes a share of the units the one to be computed.
  void take(int part) {
    if (part == part_) return;
    part_ = part;
    units_ = share(vectors_of(hidden_, kLanes<T>), seat_.shares(), part);
    outputs_ = share(vectors_of(output_, kLanes<T>), seat_.shares(), part);
    inputs_ = share(vectors_of(args_.inputs, kLanes<T>), seat_.shares(), part);
    T* const own = room_ + part * room_elements(args_);
    if (loose(args_.weight_hh)) scratch_.panels = own;
    if (loose(args_.weight_ih)) input_scratch_.panels = own + recurrent_elements(args_);
  }

  bool resets(Index row) const { return reset_ && reset_[row]; }

  T* d_gates(Index row) const { return args_.d_gates.at(row - origin_, d_); }

  // d_h of step t: what its output receives, and what comes back from the step walked before (`walked`, with `active` rows).
  // Rows that step t no longer has are done: their d_h is the gradient of the state they started from.
  template <class Kind>
  void feed_back(Index t, Index n, Index walked, Index active) {
    constexpr bool kProjected = std::is_same_v<Kind, Projected>;
    const Index first = t < 0 ? 0 : steps_.offset(t) + batch_.begin;
    const Index after = walked < 0 ? 0 : steps_.offset(walked) + batch_.begin;
    const T** rows = scratch_.rows.get();
    for (Index j = 0; j < active; ++j) rows[j] = resets(after + j) ? zeros_ : d_gates(after + j);
    if (shared_) fetch_few(rows, active, kFeedback<Cell> * hidden_);
    const Range columns = kProjected ? outputs_ : units_;
    const auto ahead = [&](Index j, Index v) __attribute__((always_inline)) {
      if (j < n && !kProjected) fetch(t, j, v * kLanes<T>);
    };
    product<T, 1>(nullptr, {}, weight_hh_, output_, columns, n > active ? n : active, active, scratch_, ahead,
                  [&](Index j, Index v, const Vec<T>* sums) {
                    const Index unit = v * kLanes<T>;
                    T* carry = d_h_ + (batch_.begin + j) * output_ + unit;
                    with_io<T>(output_, v, [&](auto io, Index) {
                      Vec<T> d_h = sums[0];
                      if (Cell::kDirect || j >= active) d_h += io.load(carry);
                      if (j >= n) {
                        io.store(carry, d_h);
                        return;
                      }
                      if (args_.d_out) d_h += io.load(args_.d_out.at(first + j, d_) + unit);
                      if constexpr (kProjected) {
                        io.store(d_gates(first + j) + Cell::kGradients * hidden_ + unit, d_h);
                      } else {
                        point(io, d_h, t, j, unit);
                      }
                    });
                  });
  }

  // Adds step t to those whose d_input is put off until so many rows wait that the weights are worth reading, or to the last
  // step. Returns whether it is formed now.
  bool gather(Index t, Index n, bool last) {
    const Index first = steps_.offset(t) + batch_.begin;
    Index* const rows = waiting_.get();
    for (Index j = 0; j < n; ++j) {
      rows[waiting_rows_] = first + j;
      input_scratch_.rows.get()[waiting_rows_++] = d_gates(first + j) + (Cell::kGradients - Cell::kGates) * hidden_;
    }
    return last || waiting_rows_ + batch_.size() > kInputRows;
  }

  // d_input of the rows that wait, whose d_gates have been computed for all units: d_gates W_ih, without those of the GRU's hn.
  void input_gradient() {
    const Index* const rows = waiting_.get();
    const auto d_input = [&](Index j, Index v) {
      return args_.d_input + (rows[j] - origin_) * args_.d_input_stride + v * kLanes<T>;
    };
    const auto ahead = [&](Index j, Index v) __attribute__((always_inline)) {
      if (fetches_) prefetch_to_write(d_input(j, v));
    };
    const auto write = [&](Index j, Index v, const Vec<T>* sums) {
      T* to = d_input(j, v);
      with_io<T>(args_.inputs, v, [&](auto io, Index) { io.store(to, args_.add_input ? io.load(to) + sums[0] : sums[0]); });
    };
    product<T, 1>(nullptr, {}, args_.weight_ih[d_], args_.inputs, inputs_, waiting_rows_, waiting_rows_, input_scratch_, ahead,
                  write);
  }

  // d_m = d_h W_hr, and the gates from it
  void project(Index t, Index n) {
    if (n == 0) return;
    const Index first = steps_.offset(t) + batch_.begin;
    const T** rows = scratch_.rows.get();
    for (Index j = 0; j < n; ++j) rows[j] = d_gates(first + j) + Cell::kGradients * hidden_;
    const auto ahead = [&](Index j, Index v) __attribute__((always_inline)) { fetch(t, j, v * kLanes<T>); };
    product<T, 1>(nullptr, {}, args_.weight_hr[d_], hidden_, units_, n, n, scratch_, ahead,
                  [&](Index j, Index v, const Vec<T>* sums) {
                    with_io<T>(hidden_, v, [&](auto io, Index) { point(io, sums[0], t, j, v * kLanes<T>); });
                  });
  }

  // d_operand = the later gates' gradients times their rows of weight_hh, and from it the first gates.
  void second_stage(Index t, Index n) {
    const Index first = steps_.offset(t) + batch_.begin;
    const T** rows = scratch_.rows.get();
    for (Index j = 0; j < n; ++j) rows[j] = d_gates(first + j) + kFirst<Cell> * hidden_;
    if (shared_) fetch_few(rows, n, Cell::kLater * hidden_);
    product<T, 1>(
        nullptr, {}, args_.later_hh[d_], hidden_, units_, n, n, scratch_, [](Index, Index) {},
        [&](Index j, Index v, const Vec<T>* sums) {
          const BackwardPoint<T> p = point_of(t, j, v * kLanes<T>);
          with_io<T>(hidden_, v, [&](auto io, Index) { Cell::backward_later(io, sums[0], p); });
        });
  }

  // Fetches what point() will touch and no step before it has.
  [[gnu::always_inline]] void fetch(Index t, Index j, Index unit) const {
    if (!fetches_) return;
    const Index row = steps_.offset(t) + batch_.begin + j;
    const T* tape = args_.tape.at(row, d_) + unit;
    for (int b = 0; b < Cell::kTape; ++b) prefetch(tape + b * hidden_);
    if (Cell::kPrevious != Previous::kNone) prefetch(before(t, j) + unit);
    if (args_.d_out && output_ == hidden_) prefetch(args_.d_out.at(row, d_) + unit);
    if (args_.d_cells) prefetch(args_.d_cells.at(row, d_) + unit);
    T* d_gates_row = d_gates(row) + unit;
    for (int b = 0; b < Cell::kGradients; ++b) prefetch_to_write(d_gates_row + b * hidden_);
  }

  template <class Io>
  void point(Io io, Vec<T> d_h, Index t, Index j, Index unit) {
    Cell::backward(io, d_h, point_of(t, j, unit));
  }

  [[gnu::always_inline]] BackwardPoint<T> point_of(Index t, Index j, Index unit) const {
    const Index row = steps_.offset(t) + batch_.begin + j, sequence = batch_.begin + j;
    BackwardPoint<T> p;
    p.tape = args_.tape.at(row, d_) + unit;
    p.previous = Cell::kPrevious == Previous::kNone ? nullptr : before(t, j) + unit;
    p.hidden = hidden_;
    p.d_h = d_h_ + sequence * output_ + unit;
    p.d_c = d_c_ + sequence * hidden_ + unit;
    p.d_cell = args_.d_cells ? args_.d_cells.at(row, d_) + unit : nullptr;
    p.reset = resets(row);
    p.d_gates = d_gates(row) + unit;
    return p;
  }

  // The state before step t that the cell's backward reads.
  const T* before(Index t, Index j) const {
    if (resets(steps_.offset(t) + batch_.begin + j)) return zeros_;
    const Index previous = reverse_ ? t + 1 : t - 1, sequence = batch_.begin + j;
    const bool has = previous >= 0 && previous < steps_.length && sequence < steps_.count(previous);
    const Index row = has ? steps_.offset(previous) + sequence : 0;
    if constexpr (Cell::kPrevious == Previous::kC) {
      return has ? args_.tape.at(row, d_) + Cell::kTapeC * hidden_
                 : args_.states_0[1] + (d_ * steps_.batch + sequence) * hidden_;
    } else {
      return has ? args_.out.at(row, d_) : args_.states_0[0] + (d_ * steps_.batch + sequence) * output_;
    }
  }

  const BackwardArgs<T>& args_;
  const StepRows& steps_;
  const Index hidden_, output_, origin_;
  const T* const zeros_;
  const Index d_;
  const bool* const reset_;
  const bool reverse_;
  const Range batch_;
  Seat& seat_;
  const bool shared_;
  // All shares' room, and what take() has set.
  T* const room_;
  int part_ = -1;
  Range units_, outputs_, inputs_;
  const bool fetches_;
  T* const d_h_;
  T* const d_c_;
  Scratch<T> scratch_;
  // Rows whose gradient of the input is put off, and where they are.
  Scratch<T> input_scratch_;
  Buffer<Index> waiting_;
  Index waiting_rows_ = 0;
  Matrix<T> weight_hh_;
};

template <class Cell, class T>
void backward(const BackwardArgs<T>& args) {
  const Sizes& s = args.sizes;
  if (s.steps.batch == 0 || args.t_begin == args.t_end) return;
  Groups groups(s, step_cost<T>(s, Cell::kGates, 20 * Cell::kGates, args.inputs, kTwoStages<Cell> ? 2 : 1));
  const Buffer<T> zeros(kFeedback<Cell> * s.hidden);
  const Index room_of_group = groups.plan().unit_parts * BackwardWalk<Cell, T>::room_elements(args);
  const Memory room(static_cast<std::size_t>(groups.plan().groups * room_of_group) * sizeof(T));
  groups.run([&](Index d, Range batch, int workspace_of, Seat& seat) {
    T* const own = static_cast<T*>(room.get()) + workspace_of * room_of_group;
    BackwardWalk<Cell, T>(args, zeros.get(), own, d, batch, seat).run();
  });
}

}  // namespace FUSED_RNN_ISA
}  // namespace fused_rnn
