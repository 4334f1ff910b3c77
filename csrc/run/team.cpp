#include "run/team.h"

#include <pthread.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cmath>

#include "run/patience.h"

#if defined(FUSED_RNN_STD_THREADS)
#include <thread>
#include <vector>
#elif defined(_OPENMP)
#include <omp.h>
#endif

namespace fused_rnn {

namespace {

// The OpenMP runtime's threads do not survive a fork, and its next parallel region in the child would wait for them.
std::atomic<bool> threads_started{false};
std::atomic<bool> threads_lost{false};

[[maybe_unused]] const int fork_handler = pthread_atfork(nullptr, nullptr, [] { threads_lost.store(threads_started.load()); });

// Starting a parallel region, when its threads have gone to sleep.
constexpr double kRegionCycles = 15000;

// One barrier between two cores of a machine; more members cost more.
constexpr double kBarrierCycles = 700;

// Bytes a core reads per cycle from its second-level cache and from beyond it.
constexpr double kNearBytesPerCycle = 40;
constexpr double kFarBytesPerCycle = 8;

}  // namespace

double second_level_cache() {
  static const double bytes = [] {
#if defined(_SC_LEVEL2_CACHE_SIZE)
    const long size = sysconf(_SC_LEVEL2_CACHE_SIZE);
    if (size > 0) return static_cast<double>(size);
#endif
    return 1024.0 * 1024.0;
  }();
  return bytes;
}

Plan make_plan(int threads, const StepCost& cost, Sharing sharing) {
  Plan best;
  double best_cycles = 0;
  for (int units = 1; units <= threads; ++units) {
    if (units > 1 && (sharing == Sharing::kBatch || units > cost.vectors)) break;
    for (int groups = 1; groups * units <= threads; ++groups) {
      // Groups without a recurrence of their own share the batch.
      const Index parts = std::max<Index>(1, (groups + cost.recurrences - 1) / cost.recurrences);
      if (parts > 1 && (sharing == Sharing::kUnits || parts > cost.rows)) continue;
      const Index tasks = cost.recurrences * parts;
      const double rounds = std::ceil(static_cast<double>(tasks) / groups);
      const double share = std::ceil(static_cast<double>(cost.vectors) / units) / static_cast<double>(cost.vectors);
      const double rows = std::ceil(static_cast<double>(cost.rows) / static_cast<double>(parts));
      const double bytes = cost.weight_bytes * share;
      const double rate = bytes < 0.75 * second_level_cache() ? kNearBytesPerCycle : kFarBytesPerCycle;
      const double barrier = units > 1 ? cost.meetings * kBarrierCycles * (1 + std::log2(units)) : 0;
      const double step = rounds * (std::max(rows * share * cost.row_cycles, bytes / rate) + barrier);
      const double cycles = static_cast<double>(cost.steps) * step + (groups * units > 1 ? kRegionCycles : 0);
      if (best_cycles == 0 || cycles < best_cycles) {
        best_cycles = cycles;
        best = {static_cast<int>(parts), units, groups};
      }
    }
  }
  if (sharing == Sharing::kUnits) {
    best = {1, static_cast<int>(std::min<Index>(threads, cost.vectors)), 1};
  }
  return best;
}

Begun::Begun(Index count) : many_(count > kFew ? new std::atomic<bool>[static_cast<std::size_t>(count)]() : nullptr) {}
Begun::~Begun() = default;

void run_team(int threads, Body body, void* context) {
  if (threads <= 1 || threads_lost.load(std::memory_order_relaxed)) {
    body(context, 0, 1);
    return;
  }
#if defined(FUSED_RNN_STD_THREADS)
  std::vector<std::thread> team;
  for (int rank = 1; rank < threads; ++rank) team.emplace_back(body, context, rank, threads);
  body(context, 0, threads);
  for (std::thread& member : team) member.join();
#elif defined(_OPENMP)
  const Clock::time_point begin = Clock::now();
  if (patience.begins_alone(begin, threads)) {
    body(context, 0, 1);
    patience.ends(Clock::now());
    return;
  }
  threads_started.store(true, std::memory_order_relaxed);
  Meeting end(threads);
  Clock::duration late{};
  Clock::time_point met;
#pragma omp parallel num_threads(threads)
  {
    const int rank = omp_get_thread_num(), size = omp_get_num_threads();
    // A team begins when all have left the region before: this too may wait for a thread without a core.
    if (rank == 0) late = Clock::now() - begin;
    body(context, rank, size);
    end.end(0, rank == 0 ? 1 + threads - size : 1);
    if (rank == 0) {
      // OpenMP waits by spinning for milliseconds, on a core that the awaited thread may need.
      end.wait(0);
      met = Clock::now();
    }
  }
  const Clock::time_point now = Clock::now();
  patience.wait_ended(late + (now - met), now);
  patience.ends(now);
#else
  body(context, 0, 1);
#endif
}

}  // namespace fused_rnn
