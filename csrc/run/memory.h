// Large blocks of memory, kept for the next call.
//
// A fresh block costs more to fault in than a matrix product takes to fill it, and training asks for the same blocks at every
// step. So blocks that are given back stay, up to a bound.
// Fresh ones ask for huge pages: one fault instead of 512, and streaming 16 MiB of weights does not miss the address cache.
#pragma once

#include <cstddef>

namespace fused_rnn {

// Bytes of unused blocks that are kept.
constexpr std::size_t kMostKept = std::size_t{256} << 20;

// A block that goes back with its owner. It sits on a cache line, a large one on a huge page.
class Memory {
 public:
  Memory() = default;
  explicit Memory(std::size_t bytes);
  Memory(Memory&& other) noexcept;
  Memory& operator=(Memory&& other) noexcept;
  ~Memory();

  void* get() const { return data_; }
  std::size_t bytes() const { return bytes_; }

 private:
  void* data_ = nullptr;
  std::size_t bytes_ = 0;     // asked for
  std::size_t capacity_ = 0;  // of the block
};

// Unused blocks: their bytes, and away with them.
std::size_t kept_bytes();
void release_kept();

}  // namespace fused_rnn
