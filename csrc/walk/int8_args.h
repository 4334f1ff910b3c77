// What the kernels of int8 weights are given.
#pragma once

#include <cstdint>

#include "walk/args.h"

namespace fused_rnn {

// Columns of a block, and steps of K that stand together. The same on every machine, so that packed weights can move: a block's
// four steps of K are one vector of 64 bytes, or parts of it.
constexpr Index kInt8Columns = 16;
constexpr Index kInt8Depth = 4;

// A weight with one scale for each row of torch's matrix, a column here: [unit / 16][K / 4][gate][unit % 16][K % 4], padded
// with zeros. `scale` and `sums` are [unit / 16][gate][unit % 16]; `sums` are those of the columns, times -128: where the
// activations are shifted by 128 to be unsigned, the product starts with them.
struct Int8Matrix {
  const std::int8_t* data = nullptr;
  const float* scale = nullptr;
  const std::int32_t* sums = nullptr;
  Index inner = 0;  // K
};

// Sums of so many products of two 8-bit numbers, one of them unsigned, fit in 32 bits.
constexpr Index kMostInt8Inner = 65536;

struct Int8Args {
  Sizes sizes;
  Rows<float> out;    // (R, D, H)
  Rows<float> cells;  // (R, D, H): where c of every step goes as well, or null
  const float* input = nullptr;
  Index input_stride = 0;
  float* states[2] = {};                  // (D, N, H), updated in place; the second only where the cell has one
  bool updates_h = true;                  // whether states[0] is
  const Int8Matrix* weight_ih = nullptr;  // D matrices, K = I
  const Int8Matrix* weight_hh = nullptr;  // D matrices, K = H
  const float* bias = nullptr;            // (D, bias blocks * H), or null
  bool vnni = false;                      // whether the machine has the instructions, and they are to be used
};

}  // namespace fused_rnn
