#include "run/patience.h"

#include <algorithm>

namespace fused_rnn {

namespace {

// Waiting that says nothing: threads wake up, and shares are never quite even.
constexpr std::chrono::microseconds kGrace{200};

// Time alone for each unit of time waited, at first and at most: it doubles each time that the others come late again, so that
// what is lost to waiting falls from a third of the time to a seventeenth, and halves when they do not. More, and a neighbour
// that was there for a moment would cost the team for much longer than it stayed.
constexpr int kLeastPrice = 2, kHighestPrice = 16;

// However long it waited: the others may have gone.
constexpr std::chrono::milliseconds kLongest{250};

}  // namespace

thread_local Patience patience;

Clock::time_point Patience::wait_ended(Clock::duration waited, Clock::time_point now) {
  lost_ += waited;
  // Alone, its work would take up to as many times as long as there are threads; half of that, since where others keep the
  // cores busy the team has not got all of them.
  const Clock::duration worked = now - begin_ - lost_;
  if (lost_ < kGrace || 2 * lost_ < (threads_ - 1) * worked) return {};
  price_ = std::min(std::max(kLeastPrice, 2 * price_), kHighestPrice);
  lost_much_ = true;
  alone_until_ = std::min(std::max(alone_until_, now) + price_ * lost_, now + kLongest);
  begin_ = now;
  lost_ = {};
  return alone_until_;
}

void Patience::ends(Clock::time_point now) {
  if (!lost_much_ && alone_ <= Clock::duration::zero()) price_ /= 2;
  alone_ = alone_until_ - now;
}

}  // namespace fused_rnn
