// The forward recurrence of every cell: one parallel region walks all steps.
#pragma once

#include "walk.h"

namespace fused_rnn {
namespace FUSED_RNN_ISA {

// One thread's walk over one part of the batch of one recurrence.
template <class Cell, class T>
class ForwardWalk {
 public:
  ForwardWalk(const ForwardArgs<T>& args, const T* zeros, T* before_projection, Index d, Range batch, Barrier& barrier,
              int member, int members)
      : args_(args),
        steps_(args.sizes.steps),
        hidden_(args.sizes.hidden),
        output_(args.sizes.output),
        zeros_(zeros),
        m_(before_projection),
        d_(d),
        batch_(batch),
        units_(share(vectors_of(hidden_, kLanes<T>), members, member)),
        outputs_(share(vectors_of(output_, kLanes<T>), members, member)),
        barrier_(barrier),
        shared_(members > 1),
        blocks_(args.keep        ? Cell::kTape
                : args.weight_ih ? 0
                                 : Cell::kGates),
        fetches_(outgrows_caches<T>(args.sizes, blocks_ * hidden_ + output_)),
        h_(args.states[0] + d * steps_.batch * output_),
        c_(Cell::kHasC ? args.states[1] + d * steps_.batch * hidden_ : nullptr),
        scratch_(steps_.batch, batch.size(), args.weight_ih != nullptr) {}

  void run() {
    const bool reverse = args_.sizes.reverse[d_];
    Index previous = -1;
    for (Index s = 0; s < steps_.length; ++s) {
      const Index t = reverse ? steps_.length - 1 - s : s;
      const Index n = clip(steps_.count(t), batch_);
      if (n == 0) continue;
      scratch_.descending = s % 2;
      step(t, previous, n);
      if (args_.weight_hr) {
        meet();
        project(t, n);
      }
      meet();
      previous = t;
    }
    keep_last(reverse);
  }

 private:
  // Waits for the other threads of this part of the batch: the next product reads their units.
  void meet() {
    if (shared_) barrier_.wait();
  }

  bool resets(Index row) const { return args_.sizes.reset && args_.sizes.reset[row]; }

  void step(Index t, Index previous, Index n) {
    const Index first = steps_.offset(t) + batch_.begin;
    const Index going_on = previous < 0 ? 0 : clip(steps_.count(previous), batch_);
    const Index before = previous < 0 ? 0 : steps_.offset(previous) + batch_.begin;
    const T** h = scratch_.rows.get();
    for (Index j = 0; j < n; ++j) {
      h[j] = resets(first + j) ? zeros_ : j < going_on ? args_.out.at(before + j, d_) : h_ + (batch_.begin + j) * output_;
    }
    if (shared_) fetch_few(h, n, output_);
    const Matrix<T>* weight_ih = args_.weight_ih ? args_.weight_ih + d_ : nullptr;
    if (weight_ih) {
      for (Index j = 0; j < n; ++j) scratch_.inputs.get()[j] = args_.input + (first + j) * args_.input_stride;
    }
    const T* bias = args_.bias ? args_.bias + d_ * Cell::kBias * hidden_ : nullptr;
    const auto ahead = [&](Index j, Index v) __attribute__((always_inline)) {
      if (!fetches_) return;
      const Index unit = v * kLanes<T>;
      for (int b = 0; b < blocks_; ++b) prefetch_to_write(args_.tape.at(first + j, d_) + b * hidden_ + unit);
      if (!m_ && Cell::kTape > 1) prefetch_to_write(args_.out.at(first + j, d_) + unit);
    };
    const auto point = [&](Index j, Index v, const Vec<T>* sums) {
      const Index unit = v * kLanes<T>, row = batch_.begin + j;
      ForwardPoint<T> p;
      p.tape = args_.tape ? args_.tape.at(first + j, d_) + unit : nullptr;
      p.gates_x = weight_ih ? nullptr : p.tape;
      p.hidden = hidden_;
      p.bias = bias ? bias + unit : nullptr;
      p.h_previous = h[j] + unit;
      p.c = c_ + row * hidden_ + unit;
      p.reset = resets(first + j);
      p.keep = args_.keep;
      p.h = (m_ ? m_ + (d_ * steps_.batch + row) * hidden_ : args_.out.at(first + j, d_)) + unit;
      with_io<T>(hidden_, v, [&](auto io, Index) { Cell::forward(io, sums, p); });
    };
    product<T, Cell::kGates, Cell::kApart>(weight_ih, args_.weight_hh[d_], hidden_, units_, n, n, scratch_, ahead, point);
  }

  // h = W_hr m
  void project(Index t, Index n) {
    const Index first = steps_.offset(t) + batch_.begin;
    const T** m = scratch_.rows.get();
    for (Index j = 0; j < n; ++j) m[j] = m_ + (d_ * steps_.batch + batch_.begin + j) * hidden_;
    product<T, 1>(
        nullptr, args_.weight_hr[d_], output_, outputs_, n, n, scratch_, [](Index, Index) {},
        [&](Index j, Index v, const Vec<T>* sums) {
          T* h = args_.out.at(first + j, d_) + v * kLanes<T>;
          with_io<T>(output_, v, [&](auto io, Index) { io.store(h, sums[0]); });
        });
  }

  // The state after the walk is every sequence's last output; a sequence without a step keeps its state.
  void keep_last(bool reverse) {
    const Index begin = outputs_.begin * kLanes<T>;
    const Index end = outputs_.end * kLanes<T> < output_ ? outputs_.end * kLanes<T> : output_;
    if (begin >= end) return;
    for (Index s = 0, j = 0; s < steps_.length; ++s) {
      const Index t = reverse ? s : steps_.length - 1 - s;
      const Index first = steps_.offset(t) + batch_.begin;
      for (const Index n = clip(steps_.count(t), batch_); j < n; ++j) {
        std::memcpy(h_ + (batch_.begin + j) * output_ + begin, args_.out.at(first + j, d_) + begin,
                    static_cast<std::size_t>(end - begin) * sizeof(T));
      }
      if (j == batch_.size()) return;
    }
  }

  const ForwardArgs<T>& args_;
  const StepRows& steps_;
  const Index hidden_, output_;
  const T* const zeros_;
  T* const m_;
  const Index d_;
  const Range batch_, units_, outputs_;
  Barrier& barrier_;
  const bool shared_;
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
  const Groups groups(s, step_cost<T>(s, Cell::kGates, 40 * Cell::kGates, args.weight_ih ? args.weight_ih->inner : 0));
  const Buffer<T> zeros(s.output);
  const Buffer<T> before_projection(args.weight_hr ? s.recurrences * s.steps.batch * s.hidden : 0);
  T* const m = args.weight_hr ? before_projection.get() : nullptr;
  groups.run([&](Index d, Range batch, Barrier& barrier, int member, int members) {
    ForwardWalk<Cell, T>(args, zeros.get(), m, d, batch, barrier, member, members).run();
  });
}

}  // namespace FUSED_RNN_ISA
}  // namespace fused_rnn
