// One parallel region per sequence, and who does what in it.
#pragma once

#include <atomic>
#include <cstddef>
#include <memory>

#include "run/crew.h"
#include "walk/args.h"

namespace fused_rnn {

// How many threads work on one part of the batch, and in how many parts each recurrence's batch is cut.
struct Plan {
  int batch_parts = 1;  // per recurrence
  int unit_parts = 1;   // threads per part of the batch; more than one meet at a barrier each step
  int groups = 1;       // of unit_parts threads each; group g takes tasks g, g + groups, …

  int threads() const { return groups * unit_parts; }
};

// The costs that the plan weighs.
struct StepCost {
  Index recurrences;
  Index rows;     // N
  Index vectors;  // of units: what can be shared by units
  Index steps;
  double row_cycles;    // multiply-adds and pointwise work of one row, all units
  double weight_bytes;  // of one recurrence
  int meetings = 1;     // of threads that share units, in each step
};

// Picks the plan with the shortest step for a team of `threads`.
Plan make_plan(int threads, const StepCost& cost, Sharing sharing);

// Runs body(rank, n) for rank 0 .. n - 1 at the same time, n <= threads. Serial in a forked child, whose parent's threads do
// not exist, and for a while where waiting for the others took longer than their help was worth.
using Body = void (*)(void* context, int rank, int size);
void run_team(int threads, Body body, void* context);

// Usable bytes of second-level cache per core.
double second_level_cache();

// f(rank, n) on n <= threads threads. They may wait for one another.
template <class F>
void together(int threads, F&& f) {
  run_team(threads, [](void* context, int rank, int size) { (*static_cast<F*>(context))(rank, size); }, &f);
}

// Which of some things have been begun; each is by one thread.
class Begun {
 public:
  explicit Begun(Index count);
  ~Begun();
  // True for one of the threads that ask.
  bool take(Index i) { return !(many_ ? many_.get() : few_)[i].exchange(true, std::memory_order_relaxed); }

 private:
  static constexpr Index kFew = 16;
  std::atomic<bool> few_[kFew] = {};
  const std::unique_ptr<std::atomic<bool>[]> many_;
};

// f(share, n) once for each of n <= threads shares that need nothing from one another. A thread that is done with its own takes
// those whose threads have not come yet.
template <class F>
void parallel(int threads, F&& f) {
  if (threads <= 1) return f(0, 1);
  Begun begun(threads);
  together(threads, [&](int rank, int size) {
    for (int i = 0; i < size; ++i) {
      const int share = rank + i < size ? rank + i : rank + i - size;
      if (begun.take(share)) f(share, size);
    }
  });
}

}  // namespace fused_rnn
