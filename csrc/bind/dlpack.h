// DLPack's exchange table (dmlc/dlpack 1.2, `DLPackExchangeAPI`): how torch from 2.10 on tells of a tensor without a call into
// Python. Only what is read here is declared; the layout is the standard's and stays for as long as its major version.
#pragma once

#include <cstdint>

namespace fused_rnn {
namespace dlpack {

constexpr std::uint32_t kMajorVersion = 1;
constexpr const char* kCapsule = "dlpack_exchange_api";

enum Device : std::int32_t { kCpu = 1 };
enum Code : std::uint8_t { kInt = 0, kFloat = 2, kBfloat = 4, kBool = 6 };

struct DataType {
  std::uint8_t code, bits;
  std::uint16_t lanes;
};

struct Tensor {
  void* data;
  std::int32_t device_type, device_id;
  std::int32_t dimensions;
  DataType dtype;
  const std::int64_t* shape;
  const std::int64_t* strides;  // in elements; null if contiguous
  std::uint64_t byte_offset;
};

struct Exchange {
  struct {
    std::uint32_t major, minor;
  } version;
  void* previous;
  void* allocate;
  void* from_object;
  void* to_object;
  int (*read)(void* object, Tensor* out);  // borrows; not 0 with a Python exception set; may be null
};

}  // namespace dlpack
}  // namespace fused_rnn
