// The pointwise part of every cell, forward and backward, on one vector of units of one row.
//
// `tape` and `d_gates` point at this row's first unit; block b is b * hidden further on (fused_rnn/cells.py names the
// blocks). `io` loads and stores whole vectors, or the first few lanes where the units end.
// The numbers (1), (2) … are those of the equations in fused_rnn/reference.
#pragma once

#include "gru.h"
#include "lstm.h"
#include "rnn.h"
