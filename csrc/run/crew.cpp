#include "run/crew.h"

#include <sched.h>

#include <thread>

#include "run/patience.h"

#if defined(__linux__)
#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace fused_rnn {

namespace {

// Longer than a share takes at any size at which threads share units, and short beside the time slice of a process.
constexpr std::chrono::microseconds kSpin{50};

// How soon a thread that stays away sees that it may come back.
constexpr std::chrono::microseconds kNap{200};

// Looks between two readings of the clock.
constexpr int kLooks = 32;

// Returns when the number has changed, or for no reason.
void sleep_while([[maybe_unused]] std::atomic<unsigned>& number, [[maybe_unused]] unsigned value) {
#if defined(__linux__)
  static_assert(sizeof(number) == sizeof(unsigned));
  syscall(SYS_futex, &number, FUTEX_WAIT_PRIVATE, value, nullptr, nullptr, 0);
#else
  std::this_thread::sleep_for(std::chrono::microseconds(50));
#endif
}

}  // namespace

Crew::Crew() = default;
Crew::~Crew() = default;

void Crew::set_shares(int shares) {
  Meeting::set_shares(shares);
  // Nobody claims the only share.
  claims_.reset(shares > 1 ? new Claim[static_cast<std::size_t>(shares)] : nullptr);
}

void Crew::bar(Clock::time_point until) { barred_until_.store(until.time_since_epoch().count(), std::memory_order_relaxed); }

void Crew::stay_away() {
  const Clock::time_point until{Clock::duration{barred_until_.load(std::memory_order_relaxed)}};
  // Not in one piece: the calling thread may be done long before, and the region ends when all have left it.
  while (barred() && Clock::now() < until) std::this_thread::sleep_for(kNap);
  barred_until_.store(0, std::memory_order_relaxed);
}

Clock::time_point Meeting::wait_long(unsigned phase) {
  const Clock::time_point begin = Clock::now();
  do {
    for (int i = 0; i < kLooks; ++i) {
      if (past(phase)) return {};
      pause();
    }
  } while (Clock::now() - begin < kSpin);
  while (!past(phase)) {
    unsigned ended = ended_.load(std::memory_order_acquire);
    if (static_cast<int>((ended & ~kAsleep) - all_of(phase)) >= 0) {
      // Whoever ended the last share is about to say so.
      sched_yield();
    } else if (ended & kAsleep || ended_.compare_exchange_strong(ended, ended | kAsleep, std::memory_order_relaxed)) {
      sleep_while(ended_, ended | kAsleep);
    }
  }
  const Clock::time_point now = Clock::now();
  return patience.wait_ended(now - begin, now);
}

void Meeting::wake() {
  ended_.fetch_and(~kAsleep, std::memory_order_relaxed);
#if defined(__linux__)
  syscall(SYS_futex, &ended_, FUTEX_WAKE_PRIVATE, 1 << 30, nullptr, nullptr, 0);
#endif
}

}  // namespace fused_rnn
