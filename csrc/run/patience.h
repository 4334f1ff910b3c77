// When a thread works alone: where other programs keep the cores busy, waiting for the rest of a team takes longer than its
// help is worth.
#pragma once

#include <chrono>

namespace fused_rnn {

using Clock = std::chrono::steady_clock;

// What the calling thread has learned of its team. Time in which it does not work for us does not count.
class Patience {
 public:
  // A region begins. Returns whether the thread is to do all of it alone.
  bool begins_alone(Clock::time_point now) {
    alone_until_ = now + alone_;
    lost_ = false;
    return alone_ > Clock::duration::zero();
  }

  // Others made it wait for so long, until now. Returns when it will have worked alone for long enough.
  Clock::time_point wait_ended(Clock::duration waited, Clock::time_point now);

  // The region that began has ended.
  void ends(Clock::time_point now);

 private:
  Clock::duration alone_{};          // what is left of it, between regions
  Clock::time_point alone_until_{};  // within one
  bool lost_ = false;
  int price_ = 0;
};

extern thread_local Patience patience;

}  // namespace fused_rnn
