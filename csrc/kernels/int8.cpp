// The forward walk with int8 weights, for one instruction set (FUSED_RNN_ISA). The table has it for cells of one stage.
#include "walk/int8_forward.h"

#include "cells/cells.h"

namespace fused_rnn {
namespace FUSED_RNN_ISA {

#define FUSED_RNN_CELL(name, Struct) template void int8_forward<Struct<float>>(const Int8Args&);
#include "cells/cells.def"

}  // namespace FUSED_RNN_ISA
}  // namespace fused_rnn
