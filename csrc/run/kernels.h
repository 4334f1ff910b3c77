// The kernels of every instruction set that this build holds.
#pragma once

#include "walk/args.h"

namespace fused_rnn {

#if defined(FUSED_RNN_HAVE_BASELINE)
namespace baseline {
const Kernels& kernels();
}
#endif
#if defined(FUSED_RNN_HAVE_AVX2)
namespace avx2 {
const Kernels& kernels();
}
#endif
#if defined(FUSED_RNN_HAVE_AVX512)
namespace avx512 {
const Kernels& kernels();
}
#endif

}  // namespace fused_rnn
