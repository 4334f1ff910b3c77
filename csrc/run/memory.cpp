#include "run/memory.h"

#include <pthread.h>
#include <sys/mman.h>

#include <cstdint>
#include <cstdlib>
#include <mutex>
#include <new>
#include <utility>
#include <vector>

namespace fused_rnn {

namespace {

constexpr std::size_t kLine = 64;
constexpr std::size_t kHugePage = std::size_t{2} << 20;

// Smaller ones are the allocator's business: it keeps them itself.
constexpr std::size_t kSmallestKept = std::size_t{256} << 10;

// A small block on a cache line, behind what `free` is to be given. Asked for lines, the allocator cuts a block in pieces and
// joins them again, which takes longer than a step of a small layer.
void* small_block(std::size_t capacity) {
  void* const base = std::malloc(capacity + kLine);
  if (!base) throw std::bad_alloc();
  // Blocks begin at multiples of the size of two pointers, so one of these fits in between.
  void* const data = static_cast<char*>(base) + kLine - reinterpret_cast<std::uintptr_t>(base) % kLine;
  static_cast<void**>(data)[-1] = base;
  return data;
}

void free_small(void* data) { std::free(static_cast<void**>(data)[-1]); }

// Advice only: what the system makes of it changes no result, so a refusal is no error.
void advise([[maybe_unused]] void* data, [[maybe_unused]] std::size_t bytes, [[maybe_unused]] int advice) {
  if (bytes >= kHugePage) madvise(data, bytes / kHugePage * kHugePage, advice);
}

class Pool {
 public:
  // The smallest block that is large enough and not twice too large.
  std::pair<void*, std::size_t> take(std::size_t capacity) {
    const std::lock_guard<std::mutex> lock(mutex_);
    std::size_t best = blocks_.size();
    for (std::size_t i = 0; i < blocks_.size(); ++i) {
      const std::size_t found = blocks_[i].second;
      if (found >= capacity && found <= 2 * capacity && (best == blocks_.size() || found < blocks_[best].second)) best = i;
    }
    if (best == blocks_.size()) return {nullptr, 0};
    const auto block = blocks_[best];
    blocks_.erase(blocks_.begin() + static_cast<std::ptrdiff_t>(best));
    kept_ -= block.second;
    return block;
  }

  void give(void* data, std::size_t capacity) {
    if (capacity > kMostKept) {
      std::free(data);
      return;
    }
    const std::lock_guard<std::mutex> lock(mutex_);
    blocks_.emplace_back(data, capacity);
    kept_ += capacity;
    while (kept_ > kMostKept) drop_oldest();
  }

  void release() {
    const std::lock_guard<std::mutex> lock(mutex_);
    while (!blocks_.empty()) drop_oldest();
  }

  std::size_t kept() {
    const std::lock_guard<std::mutex> lock(mutex_);
    return kept_;
  }

 private:
  void drop_oldest() {
    std::free(blocks_.front().first);
    kept_ -= blocks_.front().second;
    blocks_.erase(blocks_.begin());
  }

  std::mutex mutex_;
  std::vector<std::pair<void*, std::size_t>> blocks_;  // oldest first
  std::size_t kept_ = 0;
};

// Never destroyed: tensors may outlive the module. A forked child starts with an empty one, since another thread of the parent
// may have held the lock.
Pool* pool = new Pool;
[[maybe_unused]] const int fork_handler = pthread_atfork(nullptr, nullptr, [] { pool = new Pool; });

}  // namespace

Memory::Memory(std::size_t bytes) : bytes_(bytes) {
  if (!bytes) return;
  const std::size_t boundary = bytes >= kHugePage ? kHugePage : kLine;
  capacity_ = (bytes + boundary - 1) / boundary * boundary;
  if (capacity_ < bytes) throw std::bad_alloc();
  if (capacity_ < kSmallestKept) {
    data_ = small_block(capacity_);
    return;
  }
  const auto block = pool->take(capacity_);
  if (block.first) {
    data_ = block.first;
    capacity_ = block.second;
    return;
  }
  data_ = std::aligned_alloc(boundary, capacity_);
  if (!data_) throw std::bad_alloc();
#if defined(MADV_HUGEPAGE)
  advise(data_, capacity_, MADV_HUGEPAGE);
#endif
}

Memory::Memory(Memory&& other) noexcept
    : data_(std::exchange(other.data_, nullptr)),
      bytes_(std::exchange(other.bytes_, 0)),
      capacity_(std::exchange(other.capacity_, 0)) {}

Memory& Memory::operator=(Memory&& other) noexcept {
  std::swap(data_, other.data_);
  std::swap(bytes_, other.bytes_);
  std::swap(capacity_, other.capacity_);
  return *this;
}

Memory::~Memory() {
  if (!data_) return;
  if (capacity_ < kSmallestKept) {
    free_small(data_);
  } else {
    pool->give(data_, capacity_);
  }
}

std::size_t kept_bytes() { return pool->kept(); }
void release_kept() { pool->release(); }

}  // namespace fused_rnn
