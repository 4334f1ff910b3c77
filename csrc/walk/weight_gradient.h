// The gradient of a weight: d_gatesᵀ · x over the rows of many steps.
//
// K are the rows here, so both factors lie across: a stretch of K of each is copied to where it is read in order. A thread owns
// some rows of d_weight and takes all of K for them, so the sums do not depend on the number of threads.
#pragma once

#include "walk/walk.h"

namespace fused_rnn {
namespace FUSED_RNN_ISA {

// A register tile: rows of d_weight by vectors of its columns.
constexpr int kGradientRows = FUSED_RNN_MANY_REGISTERS ? 8 : 4;
constexpr int kGradientVectors = 3;

// Columns of d_gates that are copied together: with kDepth steps of K, 16 KiB in float32, which stay in the first-level cache
// beside one group of vectors of the other factor (24 KiB).
constexpr Index kStrip = 32;

// Vectors of d_weight's columns in groups of nearly equal width.
template <class T>
struct ColumnGroups {
  explicit ColumnGroups(Index columns)
      : vectors(vectors_of(columns, kLanes<T>)), count(static_cast<int>((vectors + kGradientVectors - 1) / kGradientVectors)) {}
  Range operator[](int g) const { return share(vectors, count, g); }
  Index vectors;
  int count;
};

template <class T>
Index workspace_elements(const WeightGradientArgs<T>& p) {
  return kDepth * (ColumnGroups<T>(p.inputs).vectors * kLanes<T> + kStrip);
}

// Fetches rows of a matrix line by line, for the copies to come.
template <class T>
class Fetcher {
 public:
  Fetcher(const T* first, Index stride, Index rows, Index columns)
      : row_(first), stride_(stride), rows_(rows), columns_(columns) {}
  void line() {
    if (rows_ <= 0) return;
    prefetch(row_ + column_);
    column_ += 64 / static_cast<Index>(sizeof(T));
    if (column_ >= columns_) {
      column_ = 0;
      row_ += stride_;
      --rows_;
    }
  }

 private:
  const T* row_;
  Index stride_, rows_, columns_, column_ = 0;
};

// What the copies after the present ones will read.
template <class T>
struct Ahead {
  Fetcher<T> d_gates, inputs;
};

// Copies steps k of the inputs: for each group of vectors [k][vector][lane], columns padded with zeros.
template <class T>
inline void copy_inputs(const WeightGradientArgs<T>& p, const ColumnGroups<T>& groups, Range k, T* to) {
  const Part<T>* part = p.parts;
  Index begin = 0;  // of the part
  for (Index row = k.begin; row < k.end; ++row) {
    while (row - begin >= part->rows) begin += (part++)->rows;
    const T* from = part->data + (row - begin) * part->stride;
    for (int g = 0; g < groups.count; ++g) {
      const Range vectors = groups[g];
      T* group = to + (vectors.begin * kDepth + (row - k.begin) * vectors.size()) * kLanes<T>;
      for (Index v = vectors.begin; v < vectors.end; ++v, group += kLanes<T>) {
        with_io<T>(p.inputs, v, [&](auto io, Index) { store<T>(group, io.load(from + v * kLanes<T>)); });
      }
    }
  }
}

// The inputs of steps k, to be fetched: as many as the part of the first has.
template <class T>
inline Fetcher<T> inputs_ahead(const WeightGradientArgs<T>& p, Range k) {
  const Part<T>* part = p.parts;
  Index row = k.begin;
  if (k.size() == 0) return {nullptr, 0, 0, 0};
  for (; row >= part->rows; ++part) row -= part->rows;
  return {part->data + row * part->stride, part->stride, part->rows - row < k.size() ? part->rows - row : k.size(), p.inputs};
}

// Copies steps k of columns `columns` of d_gates to [k][kStrip], padded with zeros, and sums them for the bias.
template <class T>
inline void copy_d_gates(const WeightGradientArgs<T>& p, Range columns, Range k, bool add, T* to) {
  constexpr int kVectors = static_cast<int>(kStrip) / kLanes<T>;
  for (int v = 0; v < kVectors; ++v) {
    const Index column = columns.begin + v * kLanes<T>;
    const Index exist = columns.end - column;
    const auto copy = [&](auto io) {
      const T* from = p.d_gates + k.begin * p.d_gates_stride + column;
      Vec<T> sum{};
      for (Index i = 0; i < k.size(); ++i, from += p.d_gates_stride) {
        const Vec<T> x = io.load(from);
        store<T>(to + i * kStrip + v * kLanes<T>, x);
        sum += x;
      }
      if (p.d_bias) io.store(p.d_bias + column, add ? io.load(p.d_bias + column) + sum : sum);
    };
    if (exist >= kLanes<T>) {
      copy(Whole<T>{});
    } else if (exist > 0) {
      copy(First<T>{static_cast<int>(exist)});
    } else {
      for (Index i = 0; i < k.size(); ++i) store<T>(to + i * kStrip + v * kLanes<T>, Vec<T>{});
    }
  }
}

// Every so many steps of K, a tile fetches some lines: spread out, they find a free line buffer.
constexpr Index kFetchEvery = 8;

// to[m][v] (+)= sum over k of left[k][m] * right[k][v], for the first `rows` rows; the last vector has `last` lanes.
template <class T, int kVectors>
inline void gradient_tile(const T* left, const T* right, Index depth, int rows, T* to, Index stride, int last, bool add,
                          Ahead<T>& ahead) {
  if (add) {
    for (int m = 0; m < rows; ++m) {
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) prefetch_to_write(to + m * stride + v * kLanes<T>);
    }
  }
  Vec<T> sums[kGradientRows][kVectors];
#pragma GCC unroll 16
  for (int m = 0; m < kGradientRows; ++m) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) sums[m][v] = Vec<T>{};
  }
  const auto steps = [&](Index count) {
    for (Index k = 0; k < count; ++k, left += kStrip, right += kVectors * kLanes<T>) {
      Vec<T> x[kVectors];
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) x[v] = *reinterpret_cast<const Vec<T>*>(right + v * kLanes<T>);
#pragma GCC unroll 16
      for (int m = 0; m < kGradientRows; ++m) {
        const Vec<T> d = broadcast<T>(left[m]);
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) sums[m][v] += d * x[v];
      }
    }
  };
  Index k = 0;
  for (; k + kFetchEvery <= depth; k += kFetchEvery) {
    ahead.d_gates.line();
    ahead.d_gates.line();
    ahead.inputs.line();
    steps(kFetchEvery);
  }
  steps(depth - k);
#pragma GCC unroll 16
  for (int m = 0; m < kGradientRows; ++m) {
    if (m == rows) return;
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      T* at = to + m * stride + v * kLanes<T>;
      if (v + 1 < kVectors || last == kLanes<T>) {
        store<T>(at, add ? load<T>(at) + sums[m][v] : sums[m][v]);
      } else {
        store_first<T>(at, add ? load_first<T>(at, last) + sums[m][v] : sums[m][v], last);
      }
    }
  }
}

template <class T>
inline void gradient_tile_of(Index vectors, const T* left, const T* right, Index depth, int rows, T* to, Index stride, int last,
                             bool add, Ahead<T>& ahead) {
  switch (vectors) {
    case 1:
      return gradient_tile<T, 1>(left, right, depth, rows, to, stride, last, add, ahead);
    case 2:
      return gradient_tile<T, 2>(left, right, depth, rows, to, stride, last, add, ahead);
    default:
      return gradient_tile<T, 3>(left, right, depth, rows, to, stride, last, add, ahead);
  }
}

// So few rows make an outer product or a few: bound by the writing of d_weight, which is written row by row.
constexpr Index kFewGradientRows = 4;

template <class T>
void outer_products(const WeightGradientArgs<T>& p) {
  const T* x[kFewGradientRows];
  const Part<T>* part = p.parts;
  for (Index row = 0, begin = 0; row < p.rows; ++row) {
    while (row - begin >= part->rows) begin += (part++)->rows;
    x[row] = part->data + (row - begin) * part->stride;
  }
  parallel(threads_for(static_cast<double>(p.outputs) * p.inputs * sizeof(T), p.threads), [&](int rank, int size) {
    const Range mine = share(p.outputs, size, rank);
    for (Index m = mine.begin; m < mine.end; ++m) {
      T d[kFewGradientRows] = {}, bias{};
      for (Index row = 0; row < p.rows; ++row) bias += d[row] = p.d_gates[row * p.d_gates_stride + m];
      if (p.d_bias) p.d_bias[m] = p.add ? p.d_bias[m] + bias : bias;
      T* const to = p.d_weight + m * p.d_weight_stride;
      for (Index v = 0; v < vectors_of(p.inputs, kLanes<T>); ++v) {
        with_io<T>(p.inputs, v, [&](auto io, Index) {
          Vec<T> sum = p.add ? io.load(to + v * kLanes<T>) : Vec<T>{};
          for (Index row = 0; row < p.rows; ++row) sum += broadcast<T>(d[row]) * io.load(x[row] + v * kLanes<T>);
          io.store(to + v * kLanes<T>, sum);
        });
      }
    }
  });
}

template <class T>
void weight_gradient(const WeightGradientArgs<T>& p) {
  if (p.rows <= kFewGradientRows) return outer_products(p);
  const ColumnGroups<T> groups(p.inputs);
  const Index tiles = (p.outputs + kGradientRows - 1) / kGradientRows;
  const Index passes = p.rows ? (p.rows + kDepth - 1) / kDepth : 1;
  const double work = static_cast<double>(p.rows) * p.outputs * (p.inputs + 16) / 16 * sizeof(T);
  parallel(threads_for(work, p.threads), [&](int rank, int size) {
    const Range own = share(tiles, size, rank);
    const Index begin = own.begin * kGradientRows;
    const Index end = own.end * kGradientRows < p.outputs ? own.end * kGradientRows : p.outputs;
    T* const right = p.workspace + rank * workspace_elements(p);
    T* const left = right + kDepth * groups.vectors * kLanes<T>;
    for (Index pass = 0; pass < passes; ++pass) {
      // Each pass sums from zero, as in the recurrent product; passes are of nearly equal depth.
      const Range k = {p.rows * pass / passes, p.rows * (pass + 1) / passes};
      const bool add = p.add || pass > 0;
      copy_inputs<T>(p, groups, k, right);
      const Range next = {k.end, pass + 1 < passes ? p.rows * (pass + 2) / passes : k.end};
      Ahead<T> ahead = {{nullptr, 0, 0, 0}, inputs_ahead(p, next)};
      for (Index m = begin; m < end; m += kStrip) {
        const Range strip = {m, end - m < kStrip ? end : m + kStrip};
        copy_d_gates<T>(p, strip, k, add, left);
        // The strip after this one, or the first of the next pass.
        const bool more = strip.end < end;
        const Range rows_ahead = more ? k : next;
        ahead.d_gates = {p.d_gates + rows_ahead.begin * p.d_gates_stride + (more ? strip.end : begin), p.d_gates_stride,
                         rows_ahead.size(), kStrip};
        for (int g = 0; g < groups.count; ++g) {
          const Range vectors = groups[g];
          const Index columns = p.inputs - (vectors.end - 1) * kLanes<T>;
          const int last = columns < kLanes<T> ? static_cast<int>(columns) : kLanes<T>;
          for (Index row = strip.begin; row < strip.end; row += kGradientRows) {
            const int rows = static_cast<int>(strip.end - row < kGradientRows ? strip.end - row : kGradientRows);
            gradient_tile_of<T>(vectors.size(), left + (row - m), right + vectors.begin * kDepth * kLanes<T>, k.size(), rows,
                                p.d_weight + row * p.d_weight_stride + vectors.begin * kLanes<T>, p.d_weight_stride, last, add,
                                ahead);
          }
        }
      }
    }
  });
}

}  // namespace FUSED_RNN_ISA
}  // namespace fused_rnn
