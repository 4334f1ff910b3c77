// The threads that share one recurrence, and how they share each phase of a step: nobody waits for a thread that has not begun.
//
// A phase has a fixed number of shares, one for each thread, so that a thread's part of the weights stays in its cache. Before
// it computes a share, a thread claims it: its own first, then those that nobody has begun, because their threads have lost
// their cores or never got one. It waits only for shares that others are in the middle of, and after a while in the system.
// Which thread computes a share changes no result.
#pragma once

#include <atomic>
#include <memory>

#include "run/patience.h"

namespace fused_rnn {

// How far some threads have come in the phases of their work. Whoever waits spins for a while and then sleeps.
class Meeting {
 public:
  explicit Meeting(int shares = 1) : shares_(shares) {}
  Meeting(const Meeting&) = delete;
  Meeting& operator=(const Meeting&) = delete;

  int shares() const { return shares_; }

  // Whether all shares of a phase have ended; what was written for them is then seen.
  bool past(unsigned phase) const { return static_cast<int>(phases_.load(std::memory_order_acquire) - phase) > 0; }

  // `count` shares of a phase have ended.
  void end(unsigned phase, int count = 1) {
    const unsigned ends = static_cast<unsigned>(count) * kOne;
    const unsigned before = ended_.fetch_add(ends, std::memory_order_acq_rel);
    if ((before & ~kAsleep) + ends != all_of(phase)) return;
    phases_.store(phase + 1, std::memory_order_release);
    if (before & kAsleep) wake();
  }

  // Waits for the moment that threads which began together take to end together. Returns past(phase).
  bool past_soon(unsigned phase) const {
    for (int i = 0; i < kSoon; ++i) {
      if (past(phase)) return true;
      pause();
    }
    return past(phase);
  }

  // Returns when the phase is past: until when the calling thread does better alone, the beginning of time if not at all.
  Clock::time_point wait(unsigned phase) { return past_soon(phase) ? Clock::time_point{} : wait_long(phase); }

 protected:
  void set_shares(int shares) { shares_ = shares; }

 private:
  // A few microseconds at most.
  static constexpr int kSoon = 64;

  // The lowest bit of ended_ says that somebody sleeps until it changes.
  static constexpr unsigned kAsleep = 1, kOne = 2;

  static void pause() {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
  }

  // What ended_ comes to with the last share of a phase. It may pass the largest number: only differences count.
  unsigned all_of(unsigned phase) const { return (phase + 1) * static_cast<unsigned>(shares_) * kOne; }

  Clock::time_point wait_long(unsigned phase);
  void wake();

  int shares_;
  // On lines of their own: those that end a share write one, the waiting threads read the other.
  alignas(64) std::atomic<unsigned> ended_{0};
  alignas(64) std::atomic<unsigned> phases_{0};
};

// The threads that share one recurrence.
class Crew : public Meeting {
 public:
  Crew();
  ~Crew();

  void set_shares(int shares);

  // Whether anybody has claimed anything yet.
  bool begun() const {
    for (int i = 0; i < shares(); ++i) {
      if (claims_[static_cast<std::size_t>(i)].phases.load(std::memory_order_relaxed)) return true;
    }
    return false;
  }

  // Until then, the other threads than the one that calls are to stay away.
  void bar(Clock::time_point until);
  bool barred() const { return barred_until_.load(std::memory_order_relaxed) != 0; }
  void stay_away();

  // True for one of the threads that ask for a share of a phase, all phases before it being past.
  bool claim(int share, unsigned phase) {
    std::atomic<unsigned>& phases = claims_[static_cast<std::size_t>(share)].phases;
    unsigned expected = phase;
    return phases.load(std::memory_order_relaxed) == phase &&
           phases.compare_exchange_strong(expected, phase + 1, std::memory_order_relaxed);
  }

 private:
  // On lines of their own: the owner of a share writes its claims.
  struct alignas(64) Claim {
    std::atomic<unsigned> phases{0};
  };

  std::unique_ptr<Claim[]> claims_;
  std::atomic<Clock::rep> barred_until_{0};
};

// One thread's place in a crew. All threads of a crew go through the same phases; one that comes late finds them past.
class Seat {
 public:
  // `alone`: no other thread has a seat in this crew.
  // `leads`: it is the calling thread's, which the others help.
  Seat(Crew& crew, int share, bool alone, bool leads) : crew_(crew), share_(share), alone_(alone), leads_(leads) {}

  Seat(const Seat&) = delete;
  Seat& operator=(const Seat&) = delete;
  ~Seat() {
    // Who stays away may leave.
    if (leads_ && crew_.barred()) crew_.bar(Clock::time_point{});
  }

  int shares() const { return crew_.shares(); }
  // Whether other threads may write what this one reads.
  bool shared() const { return !alone_; }

  // Computes this thread's share of the next phase by take(share), and other shares that nobody has begun. Returns when all
  // have ended.
  template <class Take>
  void phase(Take&& take) {
    const int shares = crew_.shares();
    const unsigned phase = phase_++;
    if (alone_) {
      // To and fro, as products take their columns: what was read last is read first.
      for (int i = 0; i < shares; ++i) take(phase % 2 ? shares - 1 - i : i);
      return;
    }
    if (!leads_ && crew_.barred()) crew_.stay_away();
    if (crew_.past(phase)) return;
    bool helped = false;
    for (int i = 0; i < shares; ++i) {
      // Looking at another thread's claims takes their line from it. Unless it was late in the phase before, it comes.
      if (i == 1 && !helps_ && crew_.past_soon(phase)) return;
      const int share = share_ + i < shares ? share_ + i : share_ + i - shares;
      if (!crew_.claim(share, phase)) continue;
      take(share);
      crew_.end(phase);
      helped = helped || i > 0;
    }
    helps_ = helped;
    const Clock::time_point alone_until = crew_.wait(phase);
    if (leads_ && alone_until > Clock::time_point{}) crew_.bar(alone_until);
  }

 private:
  Crew& crew_;
  const int share_;
  const bool alone_, leads_;
  bool helps_ = false;
  unsigned phase_ = 0;
};

}  // namespace fused_rnn
