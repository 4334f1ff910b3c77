// The pointwise part of every cell, forward and backward, on one vector of units of one row.
//
// `tape` and `d_gates` point at this row's first unit; block b is b * hidden further on (fused_rnn/cells.py names the
// blocks). `io` loads and stores whole vectors, or the first few lanes where the units end.
// The numbers (1), (2) … are those of the equations in fused_rnn/reference.
#pragma once

#include "gru.h"
#include "lstm.h"
#include "rnn.h"

// Calls the macro F with every cell's name. csrc/kernels.cpp has the same cells in the order of CellKind.
#define FUSED_RNN_FOR_EVERY_CELL(F) F(RnnTanh) F(RnnRelu) F(Lstm) F(Gru)
