// What a kernel is given: plain pointers and sizes, the same for every instruction set. The caller has checked them.
//
// Row buffers hold the active rows of all steps, one step after another; a row has D recurrences, a recurrence has
// blocks of H columns (fused_rnn/data/cell.py names them). Strides count elements; columns are contiguous.
#pragma once

#include <cstddef>
#include <cstdint>

namespace fused_rnn {

using Index = std::ptrdiff_t;

// Numbers of 16 bits, in which a tensor may be stored. The kernels compute in float32 then.
struct BFloat16 {
  std::uint16_t bits;
};
struct Float16 {
  std::uint16_t bits;
};

enum class CellKind : int {
#define FUSED_RNN_CELL(name, Struct) k##Struct,
#include "cells/cells.def"
};
constexpr int kCellKinds = 0
#define FUSED_RNN_CELL(name, Struct) +1
#include "cells/cells.def"
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
  int later;         // gates, the last ones, whose recurrent product is with an operand of the step
  int tape_operand;  // block, or -1
};

// A step's two products: with h, and that of the later gates with their operand.
enum class Stage : int { kFirst, kSecond };

// One weight matrix as a product reads it: element (k, column) of a K x columns matrix.
enum class Layout : int {
  kPanels,   // [column / lanes][K][lanes], columns padded with zeros to whole vectors
  kColumns,  // K contiguous per column: a torch weight as it is, for products of few rows
  kRows      // columns contiguous per K: a torch weight as it is, in the backward
};

// Weights that are not in panels are laid out group by group as they are needed. Those of the input then serve as many steps at
// once as the kernels take together: that pays for few rows in all, and needs steps of at most so many.
constexpr Index kMostLooseBatch = 48;

template <class T>
struct Matrix {
  const T* data = nullptr;
  Layout layout = Layout::kPanels;
  Index inner = 0;   // K
  Index stride = 0;  // kColumns, kRows: elements from one column or row to the next
  Index first = 0;   // kRows: the row that is k = 0; after the last row comes row 0
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
  const bool* reset = nullptr;    // one row of flags for each recurrence, or null
  Index reset_stride = 0;         // from one recurrence's flags to the next
  int threads = 1;
  Sharing sharing = Sharing::kAuto;
};

template <class T>
struct ForwardArgs {
  Sizes sizes;
  bool keep = true;          // whether the tape is written
  Rows<T> tape;              // what the backward reads; null without keep
  Rows<T> out;               // (R, D, P); may be the tape itself for cells whose tape is the output
  Rows<T> cells;             // (R, D, H): where c of every step goes as well, or null
  const T* input = nullptr;  // (R, I)
  Index input_stride = 0;
  T* states[2] = {};                     // (D, N, P) and (D, N, H), updated in place; the second only where the cell has one
  bool updates_h = true;                 // whether states[0] is; a single step may leave it
  const Matrix<T>* weight_hh;            // D matrices, K = P
  const Matrix<T>* weight_hr;            // D matrices, K = H, or null
  const Matrix<T>* weight_ih = nullptr;  // D matrices, K = I, or null
  // For a cell with later gates, the rows of these are matrices of their own, and the matrices above have those of the others.
  const Matrix<T>* later_hh = nullptr;
  const Matrix<T>* later_ih = nullptr;
  const T* bias = nullptr;  // (D, bias blocks * H), or null
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
  // For a cell with later gates: D matrices, K = their gradients, H columns.
  const Matrix<T>* later_hh = nullptr;
  // With one recurrence, the input's gradient of the walked steps can be formed on the way.
  const Matrix<T>* weight_ih = nullptr;  // K = gates * H, I columns, or null
  T* d_input = nullptr;                  // rows of the walked steps only, (·, I)
  Index d_input_stride = 0, inputs = 0;
  bool add_input = false;  // whether d_input is added to
};

// What a packed weight multiplies.
enum class Product : int {
  kHidden,      // weight_hh (gates * H, P)
  kProjection,  // weight_hr (P, H)
  kInput        // weight_ih (gates * H, I); `output` stands for I
};

// Source of a pack: rows of a torch weight, row-major.
template <class T>
struct PackArgs {
  bool backward = false;
  Product product = Product::kHidden;
  // Whose gates the rows are. In the backward, all rows of the input's weights are one matrix.
  Stage stage = Stage::kFirst;
  const T* weight = nullptr;
  Index row_stride = 0;
  Index hidden = 0, output = 0;
  int threads = 1;
  T* panels = nullptr;
};

// out (+)= the sum over d of left[d] · weights[d]
template <class T>
struct MultiplyArgs {
  Index rows = 0, columns = 0, recurrences = 1;
  Rows<const T> left;                  // rows x D x K
  const Matrix<T>* weights = nullptr;  // D matrices, in panels or kRows
  T* out = nullptr;                    // rows x columns
  Index out_stride = 0;
  int threads = 1;
};

// Rows of numbers in one format, to be written in another.
template <class From, class To>
struct ConvertArgs {
  Index rows = 0, columns = 0;
  const From* from = nullptr;
  Index from_stride = 0;
  To* to = nullptr;
  Index to_stride = 0;
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

// to[row] = what a projection multiplies in that row (o * tanh(c) of an LSTM), from what the forward kept.
template <class T>
struct UnprojectedArgs {
  Index rows = 0, hidden = 0;
  const T* tape = nullptr;
  Index tape_stride = 0;
  T* to = nullptr;  // rows x hidden
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
  void (*multiply)(const MultiplyArgs<T>&);
  // Elements of WeightGradientArgs::workspace for each thread.
  Index (*workspace_elements)(const WeightGradientArgs<T>&);
  void (*weight_gradient)(const WeightGradientArgs<T>&);
  // The forward of a single step without a projection; weights are in kColumns.
  void (*step[kCellKinds])(const ForwardArgs<T>&);
  // Null for a cell without a projection.
  void (*unprojected[kCellKinds])(const UnprojectedArgs<T>&);
};

struct Int8Args;

struct Kernels {
  const char* isa;
  int vector_bytes;
  CellShape shapes[kCellKinds];
  TypedKernels<float> f32;
  TypedKernels<double> f64;
  void (*widen_bfloat16)(const ConvertArgs<BFloat16, float>&);
  void (*widen_float16)(const ConvertArgs<Float16, float>&);
  void (*narrow_bfloat16)(const ConvertArgs<float, BFloat16>&);
  void (*narrow_float16)(const ConvertArgs<float, Float16>&);
  // The forward of a layer with int8 weights; null for a cell of two stages.
  void (*int8_forward[kCellKinds])(const Int8Args&);
};

}  // namespace fused_rnn
