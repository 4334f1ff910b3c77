// The forward of a single step: a cell, or a layer that is called step by step.
//
// Both products and the pointwise part in one parallel region without a barrier, because a thread's units need no one else's. A
// second stage, whose product reads all units of what the first one made, is a region of its own.
// Each weight is read once, as torch stores it: a step of few rows takes as long as that reading does. For more rows a group of
// its columns is laid out in panels first, for all rows together.
#pragma once

#include "run/memory.h"
#include "walk/walk.h"

namespace fused_rnn {
namespace FUSED_RNN_ISA {

// What the threads share: groups of columns of every recurrence, and where these are few, parts of the rows.
struct StepTasks {
  Index recurrences, groups, parts;
  Index count() const { return recurrences * groups * parts; }
};

inline StepTasks step_tasks(Index recurrences, Index groups, Index rows, int threads) {
  const Index most = (rows + 7) / 8;
  const bool enough = recurrences * groups >= 4 * threads;
  return {recurrences, groups, enough || most < 1 ? 1 : most < threads ? most : threads};
}

// As threads_for, for work that may also be many products of small weights.
inline int threads_for_step(double bytes, double multiply_adds, int threads) {
  return multiply_adds < (1 << 17) ? threads_for(bytes, threads) : threads;
}

template <class Cell, class T>
class Step {
 public:
  explicit Step(const ForwardArgs<T>& args)
      : args_(args),
        hidden_(args.sizes.hidden),
        batch_(args.sizes.steps.batch),
        rows_(args.sizes.steps.count(0)),
        zeros_(args.sizes.reset ? hidden_ : 0),
        room_(zeros_ + (kTwoStages<Cell> && !args.keep ? args.sizes.recurrences * batch_ * hidden_ : 0)) {}

  void run() const {
    run_stage<Stage::kFirst>();
    if constexpr (kTwoStages<Cell>) run_stage<Stage::kSecond>();
    for (Index d = 0; args_.updates_h && d < args_.sizes.recurrences; ++d) {
      for (Index j = 0; j < rows_; ++j) {
        std::memcpy(args_.states[0] + (d * batch_ + j) * hidden_, args_.out.at(j, d),
                    static_cast<std::size_t>(hidden_) * sizeof(T));
      }
    }
  }

 private:
  template <Stage kStage>
  void run_stage() const {
    constexpr int kGates = gates_of<Cell>(kStage);
    const Sizes& s = args_.sizes;
    const Index columns = args_.weight_ih->inner + s.output, gates = kGates * hidden_ * s.recurrences;
    const double elements = static_cast<double>(gates) * static_cast<double>(columns);
    const int threads = threads_for_step(elements * sizeof(T), elements * static_cast<double>(rows_) / kLanes<T>, s.threads);
    const Index groups = vectors_of(vectors_of(hidden_, kLanes<T>), kUnitVectors<kGates>);
    const StepTasks tasks = step_tasks(s.recurrences, groups, rows_, threads);
    const Index room = lays_out() ? kGroup * columns * kLanes<T> : 0;
    const Memory memory(static_cast<std::size_t>(room * threads) * sizeof(T));
    parallel(threads, [&](int rank, int size) {
      const Range mine = share(tasks.count(), size, rank);
      T* const panels = lays_out() ? static_cast<T*>(memory.get()) + rank * room : nullptr;
      // Every other call from the last group to the first: what the call before read last, the caches still have.
      thread_local bool descending = false;
      descending = !descending;
      for (Index i = 0; i < mine.size(); ++i) {
        const Index task = descending ? mine.end - 1 - i : mine.begin + i;
        const Index group = task / tasks.parts;
        take<kStage>(group / groups, group % groups,
                     share(rows_, static_cast<int>(tasks.parts), static_cast<int>(task % tasks.parts)), panels);
      }
    });
  }

  bool lays_out() const { return rows_ > kFewestToLayOut; }
  bool resets(Index d, Index row) const { return args_.sizes.reset && args_.sizes.reset[d * args_.sizes.reset_stride + row]; }

  // h before the step.
  const T* before(Index d, Index row) const {
    return resets(d, row) ? room_.get() : args_.states[0] + (d * batch_ + row) * hidden_;
  }

  // What the later gates' product reads.
  T* operand(Index d, Index row) const {
    return args_.keep ? args_.tape.at(row, d) + Cell::kTapeOperand * hidden_
                      : room_.get() + zeros_ + (d * batch_ + row) * hidden_;
  }

  // One group of a stage's columns of recurrence d, for some of the rows.
  template <Stage kStage>
  void take(Index d, Index group, Range rows, T* panels) const {
    constexpr bool kSecond = kStage == Stage::kSecond;
    constexpr int kGates = gates_of<Cell>(kStage);
    const Columns columns = {kGates, hidden_};
    const Index v = group * kUnitVectors<kGates>, all = vectors_of(hidden_, kLanes<T>);
    const Index count = all - v < kUnitVectors<kGates> ? all - v : kUnitVectors<kGates>;
    const Matrix<T>&w_x = (kSecond ? args_.later_ih : args_.weight_ih)[d],
          &w_h = (kSecond ? args_.later_hh : args_.weight_hh)[d];
    const Group<T> of_x = group_of(w_x, columns, v * kGates, count * kGates, panels);
    const Group<T> of_h =
        group_of(w_h, columns, v * kGates, count * kGates, panels ? panels + kGroup * w_x.inner * kLanes<T> : nullptr);
    alignas(64) Vec<T> sums[kChunk * kGroup];
    const T *x[kChunk], *h[kChunk];
    const int width = static_cast<int>(count * kGates);
    const auto nothing = [](int) {};
    for (Index first = rows.begin; first < rows.end; first += kChunk) {
      const int n = static_cast<int>(rows.end - first < kChunk ? rows.end - first : kChunk);
      for (int j = 0; j < n; ++j) {
        x[j] = args_.input + (first + j) * args_.input_stride;
        h[j] = kSecond ? operand(d, first + j) : before(d, first + j);
      }
      product_chunk<T>(of_x.matrix, columns, of_x.first, width, x, n, false, sums, of_h.matrix.data, nothing);
      if constexpr (!kSecond) move_apart<T, kGates, Cell::kApart>(sums, n);
      product_chunk<T>(of_h.matrix, columns, of_h.first, width, h, n, true, sums, of_h.matrix.data, nothing);
      for (int j = 0; j < n; ++j) {
        for (Index u = 0; u < count; ++u) point<kStage>(d, first + j, v + u, sums + j * kGroup + u * kGates);
      }
    }
  }

  template <Stage kStage>
  void point(Index d, Index row, Index v, const Vec<T>* sums) const {
    const Index unit = v * kLanes<T>;
    with_io<T>(hidden_, v, [&](auto io, Index) {
      ForwardPoint<T> p;
      p.tape = args_.tape ? args_.tape.at(row, d) + unit : nullptr;
      p.hidden = hidden_;
      p.bias = args_.bias ? args_.bias + d * kBias<Cell> * hidden_ + unit : nullptr;
      p.h_previous = before(d, row) + unit;
      p.c = Cell::kHasC ? args_.states[1] + (d * batch_ + row) * hidden_ + unit : nullptr;
      p.reset = resets(d, row);
      p.keep = args_.keep;
      p.h = args_.out.at(row, d) + unit;
      p.operand = kTwoStages<Cell> ? operand(d, row) + unit : nullptr;
      if constexpr (kStage == Stage::kSecond) {
        Cell::forward_later(io, sums, p);
      } else {
        Cell::forward(io, sums, p);
      }
      if (Cell::kHasC && args_.cells) io.store(args_.cells.at(row, d) + unit, io.load(p.c));
    });
  }

  const ForwardArgs<T>& args_;
  const Index hidden_, batch_, rows_;
  // So many zeros, if rows are reset; behind them the operands, if no tape keeps them.
  const Index zeros_;
  const Buffer<T> room_;
};

template <class Cell, class T>
void step(const ForwardArgs<T>& args) {
  if (args.sizes.steps.batch) Step<Cell, T>(args).run();
}

}  // namespace FUSED_RNN_ISA
}  // namespace fused_rnn
