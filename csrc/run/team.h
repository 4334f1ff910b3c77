// One parallel region per sequence, and who does what in it.
#pragma once

#include <cstddef>

#include "run/barrier.h"
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

// Runs body(rank) for rank 0 .. n - 1 at the same time, n <= threads, and returns n. Serial in a forked child, whose parent's
// threads do not exist.
using Body = void (*)(void* context, int rank, int size);
void run_team(int threads, Body body, void* context);

// Usable bytes of second-level cache per core.
double second_level_cache();

template <class F>
void parallel(int threads, F&& f) {
  run_team(threads, [](void* context, int rank, int size) { (*static_cast<F*>(context))(rank, size); }, &f);
}

}  // namespace fused_rnn
