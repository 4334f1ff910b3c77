// What is no walk, for one instruction set (FUSED_RNN_ISA) and one dtype (FUSED_RNN_ELEMENT).
#include "cells/cells.h"
#include "walk/multiply.h"
#include "walk/pack.h"
#include "walk/step.h"
#include "walk/weight_gradient.h"

namespace fused_rnn {
namespace FUSED_RNN_ISA {

using Element = FUSED_RNN_ELEMENT;

#define FUSED_RNN_CELL(name, Struct)                                                 \
  template Index panel_elements<Struct<Element>, Element>(const PackArgs<Element>&); \
  template void pack<Struct<Element>, Element>(const PackArgs<Element>&);            \
  template void step<Struct<Element>, Element>(const ForwardArgs<Element>&);         \
  template void unprojected<Struct<Element>, Element>(const UnprojectedArgs<Element>&);
#include "cells/cells.def"

template void multiply<Element>(const MultiplyArgs<Element>&);
template Index workspace_elements<Element>(const WeightGradientArgs<Element>&);
template void weight_gradient<Element>(const WeightGradientArgs<Element>&);

}  // namespace FUSED_RNN_ISA
}  // namespace fused_rnn
