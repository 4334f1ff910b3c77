// The forward recurrence of every cell: one parallel region walks all steps.
#pragma once

#include "run/memory.h"
#include "walk/walk.h"

namespace fused_rnn {
namespace FUSED_RNN_ISA {

// Whether the inputs' products of several steps are formed at once, where a part of the batch has so many rows.
inline bool in_blocks(Index batch) { return 2 * batch <= kInputRows; }

// Vectors of the workspace for one of so many threads that share the units: those that wait, and room for the panels of a group
// of weights that are laid out as they are needed.
template <int kGates, class T>
inline Index waiting_vectors(const ForwardArgs<T>& args, int members) {
  const Index most = vectors_of(vectors_of(args.sizes.hidden, kLanes<T>), members);
  return vectors_of(most, kUnitVectors<kGates>) * kInputRows * kGroup;
}
// Those of both stages.
template <class Cell, class T>
inline Index all_waiting_vectors(const ForwardArgs<T>& args, int members) {
  const Index first = waiting_vectors<kFirst<Cell>>(args, members);
  return kTwoStages<Cell> ? first + waiting_vectors<Cell::kLater>(args, members) : first;
}
template <class Cell, class T>
inline Index member_vectors(const ForwardArgs<T>& args, int members) {
  const bool panels = args.weight_ih->layout == Layout::kPanels;
  return all_waiting_vectors<Cell>(args, members) + (panels ? 0 : kGroup * args.weight_ih->inner);
}

// One thread's walk over one part of the batch of one recurrence.
template <class Cell, class T>
class ForwardWalk {
 public:
  // `within` is what a step hands to its second product, (D, N, H): what a projection multiplies, or the operand of later
  // gates.
  ForwardWalk(const ForwardArgs<T>& args, const T* zeros, T* within, Vec<T>* workspace, Index d, Range batch, Seat& seat)
      : args_(args),
        steps_(args.sizes.steps),
        hidden_(args.sizes.hidden),
        output_(args.sizes.output),
        zeros_(zeros),
        m_(within),
        d_(d),
        reset_(args.sizes.reset ? args.sizes.reset + d * args.sizes.reset_stride : nullptr),
        batch_(batch),
        seat_(seat),
        shared_(seat.shared()),
        workspace_(workspace),
        in_blocks_(in_blocks(batch.size())),
        blocks_(args.keep ? Cell::kTape : 0),
        fetches_(outgrows_caches<T>(args.sizes, blocks_ * hidden_ + output_)),
        h_(args.states[0] + d * steps_.batch * output_),
        c_(Cell::kHasC ? args.states[1] + d * steps_.batch * hidden_ : nullptr),
        scratch_(steps_.batch, batch.size(), in_blocks_ ? kInputRows : batch.size(), kTwoStages<Cell> ? 2 : 1) {
    take(0);
  }

  void run() {
    Index previous = -1;
    for (Index s = 0; s < steps_.length; ++s) {
      const Index t = step_at(s);
      const Index n = clip(steps_.count(t), batch_);
      if (n == 0) continue;
      scratch_.descending = s % 2;
      const bool begins = in_blocks_ && s >= inputs_until_;
      if (begins) begin_block(s);
      seat_.phase([&](int part) {
        take(part);
        if (begins) form_inputs(s);
        step(t, previous, n);
      });
      // The next product reads the units of all shares.
      if constexpr (kTwoStages<Cell>) {
        seat_.phase([&](int part) {
          take(part);
          second_stage(t, previous, n);
        });
      } else if (args_.weight_hr) {
        seat_.phase([&](int part) {
          take(part);
          project(t, n);
        });
      }
      row_of_block_ += n;
      previous = t;
    }
    seat_.phase([&](int part) {
      take(part);
      const Index begin = outputs_.begin * kLanes<T>, end = outputs_.end * kLanes<T>;
      keep_last(args_.sizes, args_.out, d_, batch_, {begin, end < output_ ? end : output_}, h_);
    });
  }

 private:
  // Makes a share of the units the one to be computed.
  void take(int part) {
    if (part == part_) return;
    part_ = part;
    units_ = share(vectors_of(hidden_, kLanes<T>), seat_.shares(), part);
    outputs_ = share(vectors_of(output_, kLanes<T>), seat_.shares(), part);
    if (!in_blocks_) return;
    Vec<T>* const own = workspace_ + part * member_vectors<Cell>(args_, seat_.shares());
    waiting_ = {own, kInputRows};
    if constexpr (kTwoStages<Cell>) later_waiting_ = {own + waiting_vectors<kFirst<Cell>>(args_, seat_.shares()), kInputRows};
    // All rows are asked, not those of a part: how they are shared must not change the order of the sums.
    if (args_.weight_ih->layout != Layout::kPanels && steps_.length * steps_.batch > kFewestToLayOut)
      room_ = reinterpret_cast<T*>(own + all_waiting_vectors<Cell>(args_, seat_.shares()));
  }

  bool resets(Index row) const { return reset_ && reset_[row]; }

  // Step `s` of the walk.
  Index step_at(Index s) const { return args_.sizes.reverse[d_] ? steps_.length - 1 - s : s; }

  // Step s of the walk and those after it, as many as their inputs' products are formed of at once.
  void begin_block(Index s) {
    for (Index rows = 0; s < steps_.length; ++s) {
      rows += clip(steps_.count(step_at(s)), batch_);
      if (rows > kInputRows) break;
    }
    inputs_until_ = s;
    row_of_block_ = 0;
  }

  // Forms the inputs' products of the steps from s up to inputs_until_.
  void form_inputs(Index s) {
    Index rows = 0;
    for (; s < inputs_until_; ++s) {
      const Index t = step_at(s), first = steps_.offset(t) + batch_.begin, n = clip(steps_.count(t), batch_);
      for (Index j = 0; j < n; ++j) scratch_.inputs.get()[rows++] = args_.input + (first + j) * args_.input_stride;
    }
    const T* const* inputs = scratch_.inputs.get();
    input_products<T, kFirst<Cell>, Cell::kApart>(args_.weight_ih[d_], hidden_, units_, inputs, rows, room_, waiting_);
    if constexpr (kTwoStages<Cell>) {
      input_products<T, Cell::kLater, -1>(args_.later_ih[d_], hidden_, units_, inputs, rows, room_, later_waiting_);
    }
  }

  // Weights of the inputs whose products a step forms itself, and the rows that they multiply; null where they are there.
  const Matrix<T>* find_inputs(const Matrix<T>* weights, Index first, Index n) const {
    if (in_blocks_) return nullptr;
    for (Index j = 0; j < n; ++j) scratch_.inputs.get()[j] = args_.input + (first + j) * args_.input_stride;
    return weights + d_;
  }

  // Finds the rows of h before step t.
  const T** find_before(Index t, Index previous, Index n) const {
    const Index first = steps_.offset(t) + batch_.begin;
    const Index going_on = previous < 0 ? 0 : clip(steps_.count(previous), batch_);
    const Index before = previous < 0 ? 0 : steps_.offset(previous) + batch_.begin;
    const T** h = rows_before();
    for (Index j = 0; j < n; ++j) {
      h[j] = resets(first + j) ? zeros_ : j < going_on ? args_.out.at(before + j, d_) : h_ + (batch_.begin + j) * output_;
    }
    return h;
  }

  void step(Index t, Index previous, Index n) {
    const Index first = steps_.offset(t) + batch_.begin;
    const T* const* h = find_before(t, previous, n);
    if constexpr (kTwoStages<Cell>) std::memcpy(scratch_.rows.get(), h, static_cast<std::size_t>(n) * sizeof(*h));
    if (shared_) fetch_few(h, n, output_);
    const Matrix<T>* weight_ih = find_inputs(args_.weight_ih, first, n);
    const auto ahead = [&](Index j, Index v) __attribute__((always_inline)) {
      if (!fetches_) return;
      const Index unit = v * kLanes<T>;
      for (int b = 0; b < blocks_; ++b) prefetch_to_write(args_.tape.at(first + j, d_) + b * hidden_ + unit);
      if ((!m_ || kTwoStages<Cell>) && Cell::kTape > 1) prefetch_to_write(args_.out.at(first + j, d_) + unit);
    };
    const auto point = [&](Index j, Index v, const Vec<T>* sums) {
      const ForwardPoint<T> p = point_of(first, j, v);
      with_io<T>(hidden_, v, [&](auto io, Index) {
        Cell::forward(io, sums, p);
        if (Cell::kHasC && args_.cells) io.store(args_.cells.at(first + j, d_) + v * kLanes<T>, io.load(p.c));
      });
    };
    product<T, kFirst<Cell>, Cell::kApart>(weight_ih, waiting_.from(row_of_block_), args_.weight_hh[d_], hidden_, units_, n, n,
                                           scratch_, ahead, point);
  }

  // The later gates, whose operand has been computed for all units, and h.
  void second_stage(Index t, Index previous, Index n) {
    const Index first = steps_.offset(t) + batch_.begin;
    find_before(t, previous, n);
    const T** operands = scratch_.rows.get();
    for (Index j = 0; j < n; ++j) operands[j] = within(first, j);
    if (shared_) fetch_few(operands, n, hidden_);
    const Matrix<T>* later_ih = find_inputs(args_.later_ih, first, n);
    product<T, Cell::kLater>(
        later_ih, later_waiting_.from(row_of_block_), args_.later_hh[d_], hidden_, units_, n, n, scratch_, [](Index, Index) {},
        [&](Index j, Index v, const Vec<T>* sums) {
          const ForwardPoint<T> p = point_of(first, j, v);
          with_io<T>(hidden_, v, [&](auto io, Index) { Cell::forward_later(io, sums, p); });
        });
  }

  // The rows of h before the step.
  const T** rows_before() const { return scratch_.rows.get() + (kTwoStages<Cell> ? batch_.size() : 0); }

  // What a step hands to its second product in row j.
  T* within(Index first, Index j) const {
    if constexpr (kTwoStages<Cell>) {
      if (args_.keep) return args_.tape.at(first + j, d_) + Cell::kTapeOperand * hidden_;
    }
    return m_ + (d_ * steps_.batch + batch_.begin + j) * hidden_;
  }

  // Vector v of the units of row j of a step whose first row is `first`.
  [[gnu::always_inline]] ForwardPoint<T> point_of(Index first, Index j, Index v) const {
    const Index unit = v * kLanes<T>;
    const T* bias = args_.bias ? args_.bias + d_ * kBias<Cell> * hidden_ : nullptr;
    ForwardPoint<T> p;
    p.tape = args_.tape ? args_.tape.at(first + j, d_) + unit : nullptr;
    p.hidden = hidden_;
    p.bias = bias ? bias + unit : nullptr;
    p.h_previous = rows_before()[j] + unit;
    p.c = c_ + (batch_.begin + j) * hidden_ + unit;
    p.reset = resets(first + j);
    p.keep = args_.keep;
    p.operand = kTwoStages<Cell> ? within(first, j) + unit : nullptr;
    p.h = (m_ && !kTwoStages<Cell> ? within(first, j) : args_.out.at(first + j, d_)) + unit;
    return p;
  }

  // h = W_hr m
  void project(Index t, Index n) {
    const Index first = steps_.offset(t) + batch_.begin;
    const T** m = scratch_.rows.get();
    for (Index j = 0; j < n; ++j) m[j] = within(first, j);
    product<T, 1>(
        nullptr, {}, args_.weight_hr[d_], output_, outputs_, n, n, scratch_, [](Index, Index) {},
        [&](Index j, Index v, const Vec<T>* sums) {
          T* h = args_.out.at(first + j, d_) + v * kLanes<T>;
          with_io<T>(output_, v, [&](auto io, Index) { io.store(h, sums[0]); });
        });
  }

  const ForwardArgs<T>& args_;
  const StepRows& steps_;
  const Index hidden_, output_;
  const T* const zeros_;
  T* const m_;
  const Index d_;
  const bool* const reset_;
  const Range batch_;
  Seat& seat_;
  const bool shared_;
  // All shares' part of the workspace, and what take() has set.
  Vec<T>* const workspace_;
  int part_ = -1;
  Range units_, outputs_;
  // Whether the inputs' products are formed for several steps at once: up to step inputs_until_ of the walk. The next step's
  // begin at row_of_block_.
  const bool in_blocks_;
  Index inputs_until_ = 0, row_of_block_ = 0;
  Waiting<T> waiting_, later_waiting_;
  T* room_ = nullptr;
  const int blocks_;  // of the tape that a step touches
  const bool fetches_;
  T* const h_;
  T* const c_;
  Scratch<T> scratch_;
};

template <class Cell, class T>
void forward(const ForwardArgs<T>& args) {
  const Sizes& s = args.sizes;
  if (s.steps.batch == 0 || s.steps.length == 0) return;
  Groups groups(s, step_cost<T>(s, Cell::kGates, 40 * Cell::kGates, args.weight_ih->inner, kTwoStages<Cell> ? 2 : 1));
  const Buffer<T> zeros(s.output);
  const bool hands_on = args.weight_hr || (kTwoStages<Cell> && !args.keep);
  const Buffer<T> within(hands_on ? s.recurrences * s.steps.batch * s.hidden : 0);
  T* const m = hands_on ? within.get() : nullptr;
  const int members = groups.plan().unit_parts;
  // Of a group. A thread that does all its work alone needs no more.
  const bool blocks = in_blocks(groups.smallest_part());
  const Index vectors = blocks ? members * member_vectors<Cell>(args, members) : 0;
  const Memory workspace(static_cast<std::size_t>(groups.plan().groups * vectors) * sizeof(Vec<T>));
  groups.run([&](Index d, Range batch, int workspace_of, Seat& seat) {
    Vec<T>* const own = static_cast<Vec<T>*>(workspace.get()) + workspace_of * vectors;
    ForwardWalk<Cell, T>(args, zeros.get(), m, own, d, batch, seat).run();
  });
}

}  // namespace FUSED_RNN_ISA
}  // namespace fused_rnn
