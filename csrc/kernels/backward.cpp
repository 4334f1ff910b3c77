// The backward walk of every cell for one instruction set (FUSED_RNN_ISA) and one dtype (FUSED_RNN_ELEMENT).
#include "walk/backward.h"

#include "cells/cells.h"

namespace fused_rnn {
namespace FUSED_RNN_ISA {

using Element = FUSED_RNN_ELEMENT;

#define FUSED_RNN_CELL(name, Struct) template void backward<Struct<Element>, Element>(const BackwardArgs<Element>&);
#include "cells/cells.def"

}  // namespace FUSED_RNN_ISA
}  // namespace fused_rnn
