// Every cell: its sizes, and its pointwise part, forward and backward, on one vector of units of one row.
//
// cells/equations.h holds them. setup.py writes it from the equations in fused_rnn/cells/; after a build it is in
// build/generated. `tape` and `d_gates` point at this row's first unit; block b is b * hidden further on
// (fused_rnn/data/cell.py names the blocks). `io` loads and stores whole vectors, or the first few lanes where the units end.
#pragma once

#include "cells/equations.h"
#include "walk/product.h"

namespace fused_rnn {
namespace FUSED_RNN_ISA {

// What the code outside the kernels is told of a cell. The limits are those of the walks.
template <class Cell>
constexpr CellShape shape_of(const char* name) {
  static_assert(Cell::kGates <= kMostGates && Cell::kGates <= kGroup, "all gates of a unit must fit in one group");
  static_assert(Cell::kApart < 0 || (Cell::kApart == Cell::kGates - 1 && Cell::kGates < kGroup),
                "only the last gate can stay apart, and its input's product needs room behind the gates");
  static_assert(Cell::kGradients == Cell::kGates + (Cell::kApart >= 0), "d_gates hold the gates, and the part that is apart");
  static_assert(Cell::kHasC == (Cell::kTapeC >= 0), "c of every step is a block of the tape");
  static_assert(Cell::kPrevious != Previous::kC || Cell::kHasC, "there is no c to read");
  static_assert(Cell::kPrevious != Previous::kH || Cell::kDirect,
                "what is read of h in the backward was used beside the product");
  static_assert(Cell::kLater >= 0 && Cell::kLater < Cell::kGates && kTwoStages<Cell> == (Cell::kTapeOperand >= 0),
                "the operand of the later gates is a block of the tape, and other gates make it");
  static_assert(!kTwoStages<Cell> || (Cell::kApart < 0 && !Cell::kProjection && Cell::weight_block(0) == 0),
                "the later gates add up, and h and the operand have H units");
  static_assert(!Cell::kTapeIsOut || (Cell::kTape == 1 && Cell::kGates == 1),
                "the tape is the output only where it is h alone");
  CellShape shape = {name,
                     Cell::kGates,
                     Cell::kTape,
                     Cell::kGradients,
                     kBias<Cell>,
                     Cell::kHasC,
                     Cell::kProjection,
                     Cell::kTapeIsOut,
                     kFeedback<Cell>,
                     {},
                     Cell::kApart,
                     Cell::kTapeC,
                     Cell::kPrevious,
                     Cell::kDirect,
                     Cell::kLater,
                     Cell::kTapeOperand};
  for (int b = 0; b < kFeedback<Cell>; ++b) shape.weight_blocks[b] = Cell::weight_block(b);
  return shape;
}

}  // namespace FUSED_RNN_ISA
}  // namespace fused_rnn
