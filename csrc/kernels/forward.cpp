// The forward walk of every cell for one instruction set (FUSED_RNN_ISA) and one dtype (FUSED_RNN_ELEMENT).
#include "walk/forward.h"

#include "cells/cells.h"

namespace fused_rnn {
namespace FUSED_RNN_ISA {

using Element = FUSED_RNN_ELEMENT;

#define FUSED_RNN_CELL(name, Struct) template void forward<Struct<Element>, Element>(const ForwardArgs<Element>&);
#include "cells/cells.def"

}  // namespace FUSED_RNN_ISA
}  // namespace fused_rnn
