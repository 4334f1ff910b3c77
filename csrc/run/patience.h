// When a thread works alone: where other programs keep the cores busy, waiting for the rest of a team takes longer than its
// help is worth.
#pragma once

#include <chrono>

namespace fused_rnn {

using Clock = std::chrono::steady_clock;

// What the calling thread has learned of its team. Time in which it does not work for us does not count.
class Patience {
 public:
  // A region for so many threads begins. Returns whether the calling one is to do all of it alone.
  bool begins_alone(Clock::time_point now, int threads) {
    begin_ = now;
    alone_until_ = now + alone_;
    threads_ = threads;
    lost_ = {};
    lost_much_ = false;
    return alone_ > Clock::duration::zero();
  }

  // Others made it wait for so long, until now. Returns until when it is to work alone, the beginning of time if not at all.
  Clock::time_point wait_ended(Clock::duration waited, Clock::time_point now);

  // The region that began has ended.
  void ends(Clock::time_point now);

 private:
  Clock::duration alone_{};          // what is left of it, between regions
  Clock::time_point alone_until_{};  // within one
  // Since `begin_`: what it has waited for.
  Clock::time_point begin_{};
  Clock::duration lost_{};
  bool lost_much_ = false;
  int threads_ = 1, price_ = 0;
};

extern thread_local Patience patience;

}  // namespace fused_rnn
