// What is no walk, for one instruction set (FUSED_RNN_ISA) and one dtype (FUSED_RNN_ELEMENT).
#include "cells.h"
#include "pack.h"
#include "project.h"
#include "step.h"
#include "weight_gradient.h"

namespace fused_rnn {
namespace FUSED_RNN_ISA {

using Element = FUSED_RNN_ELEMENT;

#define FUSED_RNN_OTHERS(Cell)                                                     \
  template Index panel_elements<Cell<Element>, Element>(const PackArgs<Element>&); \
  template void pack<Cell<Element>, Element>(const PackArgs<Element>&);            \
  template void step<Cell<Element>, Element>(const StepArgs<Element>&);
FUSED_RNN_FOR_EVERY_CELL(FUSED_RNN_OTHERS)

template void project<Element>(const ProjectArgs<Element>&);
template Index workspace_elements<Element>(const WeightGradientArgs<Element>&);
template void weight_gradient<Element>(const WeightGradientArgs<Element>&);

}  // namespace FUSED_RNN_ISA
}  // namespace fused_rnn
