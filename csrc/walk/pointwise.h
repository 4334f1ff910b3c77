// What the cells' pointwise parts are written with.
#pragma once

#include "walk/args.h"
#include "walk/simd.h"

namespace fused_rnn {
namespace FUSED_RNN_ISA {

// Access to a whole vector of units.
template <class T>
struct Whole {
  Vec<T> load(const T* p) const { return FUSED_RNN_ISA::load<T>(p); }
  void store(T* p, Vec<T> x) const { FUSED_RNN_ISA::store<T>(p, x); }
};

// Access to the first n units of a vector: the last vector where H is no multiple of its lanes.
template <class T>
struct First {
  int n;
  Vec<T> load(const T* p) const { return load_first<T>(p, n); }
  void store(T* p, Vec<T> x) const { store_first<T>(p, x, n); }
};

// One vector of units of one row in the forward. Pointers are at its first unit.
template <class T>
struct ForwardPoint {
  T* tape;              // block 0
  Index hidden;         // from one block to the next
  const T* bias;        // block 0, or null
  const T* h_previous;  // h before this step
  T* c;                 // c, updated in place; null for cells without
  bool reset;           // c before this step counts as zero
  bool keep;            // whether the tape is written
  T* h;                 // where the new h (before a projection) goes; the first of two stages may leave a vector there
  T* operand;           // what the later gates' product reads; cells with such gates only
};

// A gate's sum before its activation: its share of the products, and block `b` of the bias.
template <class T, class Io>
inline Vec<T> gate(Io io, const ForwardPoint<T>& p, Index b, Vec<T> products) {
  return p.bias ? products + io.load(p.bias + b * p.hidden) : products;
}

template <class T>
inline Vec<T> sigmoid(Vec<T> x) {
  activate<T, 1, 0>(&x);
  return x;
}

// x < 0 is false for NaN, which passes as it does in torch.
template <class T>
inline Vec<T> relu(Vec<T> x) {
  return x < Vec<T>{} ? Vec<T>{} : x;
}

// y where x is positive, else zero: the derivative of relu. NaN in x lets y pass.
template <class T>
inline Vec<T> where_positive(Vec<T> x, Vec<T> y) {
  return x <= Vec<T>{} ? Vec<T>{} : y;
}

// The same in the backward.
template <class T>
struct BackwardPoint {
  const T* tape;
  const T* previous;  // the state before this step that Cell::kPrevious names
  Index hidden;
  T* d_h;           // carries the gradient of h that does not pass through the gates; cells with kDirect only
  T* d_c;           // gradient of c, updated in place
  const T* d_cell;  // what c of this step receives as an output, or null; cells with c only
  bool reset;       // no gradient passes to the state before this step
  T* d_gates;
};

// What a cell says of itself where it says nothing else. Beside these it has kGates, the gates in the order of the weights;
// kTape, the blocks that it keeps; and kGradients, the blocks that its backward emits, of which the last are the gates'.
// fused_rnn/data/cell.py has the same with names, and a test compares the two.
struct CellDefaults {
  // The gate (the last one) whose recurrent part does not add up with its other sums, or -1. That part has a block of the bias
  // behind the gates, and of the gradients before them.
  static constexpr int kApart = -1;
  // Whether there is a state c beside h, and the block of the tape that it is, or -1.
  static constexpr bool kHasC = false;
  static constexpr int kTapeC = -1;
  // The block of weight_hh's rows to which block b of the gradients belongs.
  static constexpr int weight_block(int b) { return b; }
  // Whether h itself passes from step to step beside the product.
  static constexpr bool kDirect = false;
  static constexpr Previous kPrevious = Previous::kNone;
  // How many gates, the last ones, have a recurrent product with an operand that the others make, and the block of the tape
  // that the operand is, or -1. Such a cell has a second stage: forward_later and backward_later.
  static constexpr int kLater = 0;
  static constexpr int kTapeOperand = -1;
  // Whether h may be projected (weight_hr).
  static constexpr bool kProjection = false;
  // Whether the tape is the output, and nothing else is kept.
  static constexpr bool kTapeIsOut = false;
};

// Blocks of the bias that the kernels add.
template <class Cell>
constexpr int kBias = Cell::kGates + (Cell::kApart >= 0);

// Gates whose recurrent product is with h.
template <class Cell>
constexpr int kFirst = Cell::kGates - Cell::kLater;

template <class Cell>
constexpr int gates_of(Stage stage) {
  return stage == Stage::kFirst ? kFirst<Cell> : Cell::kLater;
}

// Whether a step has a second stage.
template <class Cell>
constexpr bool kTwoStages = Cell::kLater > 0;

// Blocks of the gradients that weight_hh carries back to h: the first ones.
template <class Cell>
constexpr int kFeedback = kFirst<Cell>;

}  // namespace FUSED_RNN_ISA
}  // namespace fused_rnn
