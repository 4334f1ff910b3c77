// What a kernel is given: plain pointers and sizes, the same for every instruction set. The caller has checked them.
//
// Row buffers hold the active rows of all steps, one step after another; a row has D recurrences, a recurrence has
// blocks of H columns (fused_rnn/cells.py names them). Strides count elements; columns are contiguous.
#pragma once

#include <cstddef>
#include <cstdint>

namespace fused_rnn {

using Index = std::ptrdiff_t;

enum class CellKind : int {
#define FUSED_RNN_CELL(name, Struct) k##Struct,
#include "cells.def"
};
constexpr int kCellKinds = 0
#define FUSED_RNN_CELL(name, Struct) +1
#include "cells.def"
    ;

// Which state before a step a cell's backward reads.
enum class Previous : int { kNone, kH, kC };

// A group of columns in a product holds so many vectors, and all gates of a unit must fit in one.
constexpr int kMostGates = 4;

// The sizes of a cell, for code outside the kernels: its struct's constants (CellDefaults in pointwise.h says what they are).
struct CellShape {
  const char* name;
  int gates, tape, gradients, bias;  // blocks
  bool has_c, has_projection, tape_is_out;
  int feedback;                   // blocks of the gradients that weight_hh carries back to h: the first ones
  int weight_blocks[kMostGates];  // for each of those, the block of weight_hh's rows that it belongs to
  int apart;                      // gate, or -1
  int tape_c;                     // block, or -1
  Previous previous;
  bool direct;
};

// One weight matrix as a product reads it: element (k, column) of a K x columns matrix.
enum class Layout : int {
  kPanels,   // [column / lanes][K][lanes], columns padded with zeros to whole vectors
  kColumns,  // K contiguous per column: a torch weight as it is, for products of few rows
  kRows      // columns contiguous per K: a torch weight as it is, in the backward
};

// Weights of the input that are not in panels are laid out as they are needed, for as many steps at once as the kernels take
// together: that pays for few rows in all, and needs steps of at most so many.
constexpr Index kMostLooseBatch = 48;

template <class T>
struct Matrix {
  const T* data = nullptr;
  Layout layout = Layout::kPanels;
  Index inner = 0;   // K
  Index stride = 0;  // kColumns, kRows: elements from one column or row to the next
};

template <class T>
struct Rows {
  T* data = nullptr;
  Index row_stride = 0;
  Index recurrence_stride = 0;

  T* at(Index row, Index d) const { return data + row * row_stride + d * recurrence_stride; }
  explicit operator bool() const { return data != nullptr; }
};

// Which rows a step works on. Without batch_sizes and offsets the batch is dense.
struct StepRows {
  Index length = 0;
  Index batch = 0;
  const std::int64_t* batch_sizes = nullptr;
  const std::int64_t* offsets = nullptr;

  Index count(Index t) const { return batch_sizes ? static_cast<Index>(batch_sizes[t]) : batch; }
  Index offset(Index t) const { return offsets ? static_cast<Index>(offsets[t]) : t * batch; }
};

// How the threads share the work of a step.
enum class Sharing : int { kAuto, kBatch, kUnits };

struct Sizes {
  Index recurrences = 0;  // D
  Index hidden = 0;       // H
  Index output = 0;       // P: H, or proj_size
  StepRows steps;
  const bool* reverse = nullptr;  // (D,)
  const bool* reset = nullptr;    // (R,), or null
  int threads = 1;
  Sharing sharing = Sharing::kAuto;
};

template <class T>
struct ForwardArgs {
  Sizes sizes;
  bool keep = true;          // whether the tape is written
  Rows<T> tape;              // in, without weight_ih: gates_x; out: what the backward reads. Null if neither
  Rows<T> out;               // (R, D, P); may be the tape itself for cells whose tape is the output
  const T* input = nullptr;  // (R, I), or null: what gates_x are formed from on the way
  Index input_stride = 0;
  T* states[2] = {};                     // (D, N, P) and (D, N, H), updated in place; the second only where the cell has one
  const Matrix<T>* weight_hh;            // D matrices, K = P
  const Matrix<T>* weight_hr;            // D matrices, K = H, or null
  const Matrix<T>* weight_ih = nullptr;  // D matrices, K = I, or null
  const T* bias = nullptr;               // (D, bias blocks * H), or null
};

template <class T>
struct BackwardArgs {
  Sizes sizes;
  Index t_begin = 0, t_end = 0;
  Rows<T> d_gates;        // rows of the walked steps only
  T* d_states[2] = {};    // updated in place
  Rows<const T> d_out;    // or null
  Rows<const T> d_cells;  // gradient of c of every step, (R, D, H), or null
  Rows<const T> tape;
  Rows<const T> out;
  const T* states_0[2] = {};
  const Matrix<T>* weight_hh;  // D matrices, transposed use: K = d_gates columns that feed back, P columns
  const Matrix<T>* weight_hr;  // D matrices, K = P, H columns, or null
  // With one recurrence, the input's gradient of the walked steps can be formed on the way.
  const Matrix<T>* weight_ih = nullptr;  // K = gates * H, I columns, or null
  T* d_input = nullptr;                  // rows of the walked steps only, (·, I)
  Index d_input_stride = 0, inputs = 0;
};

// What a packed weight multiplies.
enum class Product : int {
  kHidden,      // weight_hh (gates * H, P)
  kProjection,  // weight_hr (P, H)
  kInput        // weight_ih (gates * H, I); `output` stands for I
};

// Source of a pack: a torch weight, rows x columns, row-major.
template <class T>
struct PackArgs {
  bool backward = false;
  Product product = Product::kHidden;
  const T* weight = nullptr;
  Index row_stride = 0;
  Index hidden = 0, output = 0;
  int threads = 1;
  T* panels = nullptr;
};

// out = input · weightᵀ
template <class T>
struct ProjectArgs {
  Index rows = 0, inner = 0, columns = 0;
  const T* input = nullptr;  // rows x inner
  Index input_stride = 0;
  const T* weight = nullptr;  // columns x inner
  Index weight_stride = 0;
  T* out = nullptr;  // rows x columns
  Index out_stride = 0;
  int threads = 1;
};

// Rows that follow one another in memory.
template <class T>
struct Part {
  const T* data = nullptr;
  Index rows = 0, stride = 0;
};

// d_weight (+)= d_gatesᵀ · inputs and d_bias (+)= the sums of d_gates' columns, over the rows of many steps.
template <class T>
struct WeightGradientArgs {
  Index rows = 0;
  Index outputs = 0, inputs = 0;  // rows and columns of d_weight
  const T* d_gates = nullptr;     // rows x outputs
  Index d_gates_stride = 0;
  const Part<T>* parts = nullptr;  // rows x inputs in all, one part after another
  bool add = false;
  T* d_weight = nullptr;
  Index d_weight_stride = 0;
  T* d_bias = nullptr;  // (outputs,), or null
  int threads = 1;
  T* workspace = nullptr;  // `workspace_elements` for each thread
};

// One step without a backward. All states are rows x H, contiguous; the new ones are apart from the old.
template <class T>
struct StepArgs {
  Index rows = 0, inputs = 0, hidden = 0;
  const T* input = nullptr;
  Index input_stride = 0;
  const T *weight_ih = nullptr, *weight_hh = nullptr;
  Index weight_ih_stride = 0, weight_hh_stride = 0;
  const T *bias_ih = nullptr, *bias_hh = nullptr;  // or null
  const T *h = nullptr, *c = nullptr;
  T *out = nullptr, *h_new = nullptr, *c_new = nullptr;  // out, a copy of the new h, may be null
  int threads = 1;
};

// The kernels of one instruction set for one dtype.
template <class T>
struct TypedKernels {
  void (*forward[kCellKinds])(const ForwardArgs<T>&);
  void (*backward[kCellKinds])(const BackwardArgs<T>&);
  // Elements that PackArgs::panels must hold.
  Index (*panel_elements[kCellKinds])(const PackArgs<T>&);
  void (*pack[kCellKinds])(const PackArgs<T>&);
  void (*project)(const ProjectArgs<T>&);
  // Elements of WeightGradientArgs::workspace for each thread.
  Index (*workspace_elements)(const WeightGradientArgs<T>&);
  void (*weight_gradient)(const WeightGradientArgs<T>&);
  void (*step[kCellKinds])(const StepArgs<T>&);
};

struct Kernels {
  const char* isa;
  int vector_bytes;
  CellShape shapes[kCellKinds];
  TypedKernels<float> f32;
  TypedKernels<double> f64;
};

}  // namespace fused_rnn
