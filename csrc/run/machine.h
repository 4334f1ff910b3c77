// What this machine can run, and that this build has something for it.
#pragma once

#include <stdexcept>
#include <string>

namespace fused_rnn {

#if defined(__x86_64__)
inline bool has_avx2() {
  __builtin_cpu_init();
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
}
inline bool has_avx512() {
  __builtin_cpu_init();
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("fma");
}
// Products of 8-bit numbers, beside the instruction set "avx512".
inline bool has_vnni() {
  __builtin_cpu_init();
  return __builtin_cpu_supports("avx512vnni");
}
#else
inline bool has_avx2() { return false; }
inline bool has_avx512() { return false; }
inline bool has_vnni() { return false; }
#endif

// Throws if no instruction set of this build runs here: FUSED_RNN_ISAS may have left the baseline out.
inline void check_instruction_sets() {
  std::string built;
  bool runs = false;
  const auto add = [&](const char* name, bool has) {
    built += (built.empty() ? "" : ", ") + std::string(name);
    runs = runs || has;
  };
#if defined(FUSED_RNN_HAVE_BASELINE)
  add("baseline", true);
#endif
#if defined(FUSED_RNN_HAVE_AVX2)
  add("avx2", has_avx2());
#endif
#if defined(FUSED_RNN_HAVE_AVX512)
  add("avx512", has_avx512());
#endif
  if (runs) return;
  const std::string here = std::string("baseline") + (has_avx2() ? ", avx2" : "") + (has_avx512() ? ", avx512" : "");
  throw std::runtime_error("this build of fused_rnn has kernels for " + built + " alone, and this machine runs " + here +
                           ": build it again without FUSED_RNN_ISAS, or with one of these");
}

}  // namespace fused_rnn
