// Large blocks of memory backed by huge pages where the system has them: a fresh block of 4 KiB pages costs more to fault in
// than a matrix product takes to fill it, and streaming 16 MiB of weights through them misses the address cache.
#pragma once

#include <sys/mman.h>

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <new>
#include <utility>

namespace fused_rnn {

constexpr std::size_t kHugePage = std::size_t{2} << 20;

// Advice only: what the system makes of it changes no result, so a refusal is no error.
inline void advise_huge_pages(std::uintptr_t address, std::size_t bytes) {
#if defined(MADV_HUGEPAGE)
  constexpr std::uintptr_t kPage = 4096;
  const std::uintptr_t begin = (address + kPage - 1) / kPage * kPage, end = (address + bytes) / kPage * kPage;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  (void)address;
  (void)bytes;
#endif
}

// A block that ends with its owner; small ones sit on a cache line, large ones on a huge page.
class Memory {
 public:
  Memory() = default;
  explicit Memory(std::size_t bytes) {
    const std::size_t boundary = bytes >= kHugePage ? kHugePage : 64;
    data_ = std::aligned_alloc(boundary, (bytes + boundary - 1) / boundary * boundary);
    if (!data_) throw std::bad_alloc();
    if (bytes >= kHugePage) advise_huge_pages(reinterpret_cast<std::uintptr_t>(data_), bytes);
  }
  Memory(Memory&& other) noexcept : data_(std::exchange(other.data_, nullptr)) {}
  Memory& operator=(Memory&& other) noexcept {
    std::swap(data_, other.data_);
    return *this;
  }
  ~Memory() { std::free(data_); }

  void* get() const { return data_; }

 private:
  void* data_ = nullptr;
};

}  // namespace fused_rnn
