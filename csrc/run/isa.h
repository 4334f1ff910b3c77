// The instruction sets that this build and this machine have, and the one in use.
#pragma once

#include <atomic>
#include <string>
#include <vector>

#include "bind/tensors.h"
#include "run/kernels.h"
#include "run/machine.h"

namespace fused_rnn {

// Best first.
inline std::vector<const Kernels*> instruction_sets() {
  std::vector<const Kernels*> found;
#if defined(FUSED_RNN_HAVE_AVX512)
  if (has_avx512()) found.push_back(&avx512::kernels());
#endif
#if defined(FUSED_RNN_HAVE_AVX2)
  if (has_avx2()) found.push_back(&avx2::kernels());
#endif
#if defined(FUSED_RNN_HAVE_BASELINE)
  found.push_back(&baseline::kernels());
#endif
  return found;
}

inline std::atomic<const Kernels*>& current() {
  static std::atomic<const Kernels*> kernels{instruction_sets().front()};
  return kernels;
}

inline std::vector<std::string> isas() {
  std::vector<std::string> names;
  for (const Kernels* kernels : instruction_sets()) names.emplace_back(kernels->isa);
  return names;
}

inline void set_isa(const std::string& name) {
  std::string known;
  for (const Kernels* kernels : instruction_sets()) {
    if (name == kernels->isa) {
      current().store(kernels);
      return;
    }
    known += (known.empty() ? "" : ", ") + std::string(kernels->isa);
  }
  refuse("isa", "one that this machine and this build have: " + known, name);
}

template <class T>
const TypedKernels<T>& typed(const Kernels& kernels) {
  if constexpr (sizeof(T) == 4) {
    return kernels.f32;
  } else {
    return kernels.f64;
  }
}

}  // namespace fused_rnn
