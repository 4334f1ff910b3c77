// What the cells' pointwise parts are written with.
#pragma once

#include "args.h"
#include "simd.h"

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
  const T* gates_x;     // block 0, or null: then the product holds them, a part that stays apart after the gates
  T* tape;              // block 0
  Index hidden;         // from one block to the next
  const T* bias;        // block 0, or null
  const T* h_previous;  // h before this step
  T* c;                 // c, updated in place; null for cells without
  bool reset;           // c before this step counts as zero
  bool keep;            // whether the tape is written
  T* h;                 // where the new h (before a projection) goes
};

// Block `b` of gates_x, as far as they are apart from the product, and of the bias.
template <class T, class Io>
inline Vec<T> input(Io io, const ForwardPoint<T>& p, Index b) {
  const Vec<T> x = p.gates_x ? io.load(p.gates_x + b * p.hidden) : Vec<T>{};
  return p.bias ? x + io.load(p.bias + b * p.hidden) : x;
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

// Which state before the step a cell's backward reads.
enum class Previous { kNone, kH, kC };

}  // namespace FUSED_RNN_ISA
}  // namespace fused_rnn
