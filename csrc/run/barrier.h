// A barrier for the few threads that share one recurrence: it spins, because a step lasts microseconds, and gives the
// processor away after a while, because there may be more threads than cores, or the machine may have been paused.
#pragma once

#include <sched.h>

#include <atomic>

namespace fused_rnn {

class Barrier {
 public:
  explicit Barrier(int members = 1) : members_(members) {}
  Barrier(const Barrier&) = delete;
  Barrier& operator=(const Barrier&) = delete;

  void set_members(int members) { members_ = members; }

  // Returns when all members have called it; what each wrote before, all see afterwards.
  void wait() {
    const unsigned generation = generation_.load(std::memory_order_acquire);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == members_) {
      arrived_.store(0, std::memory_order_relaxed);
      generation_.store(generation + 1, std::memory_order_release);
      return;
    }
    for (int spins = 0; generation_.load(std::memory_order_acquire) == generation; ++spins) {
      if (spins < kSpins) {
        pause();
      } else {
        sched_yield();
      }
    }
  }

 private:
  // About 20 microseconds: longer than a step of any size at which threads share units, unless a neighbour lost its core.
  static constexpr int kSpins = 1000;

  static void pause() {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
  }

  int members_;
  // On lines of their own: the arriving threads write one, the waiting threads read the other.
  alignas(64) std::atomic<int> arrived_{0};
  alignas(64) std::atomic<unsigned> generation_{0};
};

}  // namespace fused_rnn
