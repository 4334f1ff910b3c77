// Checks of how threads work together: crews, shares of independent work, and when a thread goes alone.
#pragma once

#include <atomic>
#include <chrono>
#include <cstdio>
#include <initializer_list>
#include <thread>
#include <vector>

#include "run/team.h"

namespace fused_rnn {
namespace FUSED_RNN_ISA {
namespace {

// Threads share phases, some of them late and some slow in the middle of a share: every share of every phase is computed once,
// and after all those of the phase before.
int check_crew(int members) {
  constexpr int kPhases = 600;
  Crew crew;
  crew.set_shares(members);
  // What a share's last phase was; written by whoever has claimed the share, read by all in the phase after.
  std::vector<int> shares(static_cast<std::size_t>(members), 0);
  std::vector<int> failures(static_cast<std::size_t>(members), 0);
  std::vector<std::thread> threads;
  for (int member = 0; member < members; ++member) {
    threads.emplace_back([&, member] {
      const auto rest = [](int microseconds) { std::this_thread::sleep_for(std::chrono::microseconds(microseconds)); };
      int& failed = failures[static_cast<std::size_t>(member)];
      Seat seat(crew, member, members == 1, member == 0);
      rest(2000 * member);
      for (int phase = 1; phase <= kPhases; phase += 2) {
        seat.phase([&](int share) {
          if (phase % 100 == 1 && share == phase / 100 % members) rest(500);
          failed += shares[static_cast<std::size_t>(share)]++ != phase - 1;
        });
        // One phase writes and the next one reads: all shares, whoever computed them.
        seat.phase([&](int share) {
          for (int i = 0; i < members; ++i) failed += i != share && shares[static_cast<std::size_t>(i)] < phase;
        });
        seat.phase([&](int share) { failed += shares[static_cast<std::size_t>(share)]++ != phase; });
      }
    });
  }
  int total = 0;
  for (int member = 0; member < members; ++member) {
    threads[static_cast<std::size_t>(member)].join();
    total += failures[static_cast<std::size_t>(member)] + (shares[static_cast<std::size_t>(member)] != kPhases);
  }
  if (total) std::printf("crew of %d: %d shares were computed too early, twice or never\n", members, total);
  return total;
}

// A thread that was told to stay away for long leaves as soon as the leading one is done.
int check_staying_away() {
  constexpr int kPhases = 50;
  Crew crew;
  crew.set_shares(2);
  int taken[2] = {};
  const Clock::time_point begin = Clock::now();
  crew.bar(begin + std::chrono::hours(1));
  std::thread other([&] {
    Seat seat(crew, 1, false, false);
    for (int phase = 0; phase < kPhases; ++phase) seat.phase([&](int share) { ++taken[share]; });
  });
  {
    Seat seat(crew, 0, false, true);
    for (int phase = 0; phase < kPhases; ++phase) seat.phase([&](int share) { ++taken[share]; });
  }
  other.join();
  const bool right = taken[0] == kPhases && taken[1] == kPhases && Clock::now() - begin < std::chrono::minutes(30);
  if (!right) std::printf("a thread that stays away: %d and %d shares of %d\n", taken[0], taken[1], kPhases);
  return !right;
}

// Every share of independent work is computed once, by however many threads.
int check_parallel(int threads) {
  std::vector<std::atomic<int>> done(static_cast<std::size_t>(threads));
  std::atomic<int> wrong{0};
  parallel(threads, [&](int share, int size) {
    wrong += share < 0 || share >= size || size > threads;
    ++done[static_cast<std::size_t>(share)];
  });
  int size = 0;
  for (const std::atomic<int>& times : done) {
    wrong += times > 1;
    size += times;
  }
  // The shares of a smaller team are the first ones.
  for (int i = 0; i < size; ++i) wrong += done[static_cast<std::size_t>(i)] != 1;
  if (wrong || size < 1) std::printf("%d threads: shares were computed twice or never\n", threads);
  return wrong + (size < 1);
}

// How long a thread works alone after it had to wait, by a clock of the test's own.
int check_patience() {
  using std::chrono::milliseconds;
  Patience patience;
  Clock::time_point now{milliseconds(1000)};
  int failures = 0;
  const auto expect = [&failures](bool holds, const char* what) {
    if (!holds) std::printf("patience: %s\n", what);
    failures += !holds;
  };
  // A region of 1 ms, in which the others made it wait for so long; returns whether it began alone.
  const auto region = [&](std::chrono::microseconds waited) {
    const bool alone = patience.begins_alone(now, 2);
    now += milliseconds(1);
    if (!alone) patience.wait_ended(waited, now);
    patience.ends(now);
    now += milliseconds(100);
    return alone;
  };
  // Regions until the thread has a team again.
  const auto alone = [&] {
    int regions = 0;
    while (region({})) ++regions;
    return regions;
  };
  const std::chrono::microseconds little(150), much(1000);
  expect(!region(little) && !region(little), "waiting for little leaves the team together");
  expect(!region(much) && alone() == 2, "1 ms of waiting is worth 2 ms alone, and time outside of regions does not count");
  // The regions that ended the counting were good ones: the price has halved.
  expect(!region(much) && alone() == 2, "the price falls to the least one");
  expect(!region(much), "the team is together");
  for (int i = 0; i < 2; ++i) expect(region({}), "alone for 2 ms");
  expect(!region(much) && alone() == 4, "waiting again at once costs twice as much");
  expect(!region(std::chrono::seconds(10)) && alone() == 250, "however long it waited, alone for 250 ms at most");
  // In proportion: the work of two threads for 30 ms would take one up to 60, that of four up to 120.
  for (int threads : {2, 4}) {
    Patience of_team;
    of_team.begins_alone(now, threads);
    expect(of_team.wait_ended(milliseconds(10), now + milliseconds(40)) == Clock::time_point{}, "10 ms of 40 are no loss");
    const bool leaves = of_team.wait_ended(milliseconds(8), now + milliseconds(48)) > Clock::time_point{};
    expect(leaves == (threads == 2), "18 ms of 48 are a loss for two threads, not for four");
  }
  // Within a region: until when, in the same measure.
  Patience within;
  within.begins_alone(now, 2);
  expect(within.wait_ended(little, now + little) == Clock::time_point{}, "waiting for little says nothing");
  now += little + much;
  expect(within.wait_ended(much, now) == now + 2 * (little + much),
         "alone within the region for twice as long as it waited in all");
  within.ends(now + milliseconds(1));
  expect(within.begins_alone(now, 2) && !Patience().begins_alone(now, 2), "what is left of them is carried over");
  return failures;
}

}  // namespace
}  // namespace FUSED_RNN_ISA
}  // namespace fused_rnn
