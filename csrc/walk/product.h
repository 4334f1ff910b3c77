// The recurrent product: a few rows of h (or of d_gates) times a weight matrix, the result handed on in vectors.
//
// The caller names a group of at most kGroup vectors of columns; the results of a chunk of rows stay in a small scratch that
// lives in the first-level cache, where the cell's pointwise part picks them up.
#pragma once

#include "walk/args.h"
#include "walk/simd.h"

namespace fused_rnn {
namespace FUSED_RNN_ISA {

// Vectors of columns per group: all gates of one vector of LSTM units, or as many vectors of units.
constexpr int kGroup = 4;

// Rows of a chunk: kChunk x kGroup vectors are 12 KiB at 64 bytes a vector, a quarter of a 48 KiB first-level cache.
constexpr int kChunk = 48;

// Steps of K that one pass over a chunk's rows takes at most: kGroup panels of 128 vectors are 32 KiB, two thirds of that
// cache, so a panel is read from further away once per chunk and not once per register tile.
constexpr Index kDepth = 128;

// Rows of a register tile of `vectors` columns: accumulators, weights and one broadcast fill the register file.
constexpr int tile_rows(int vectors) {
#if FUSED_RNN_MANY_REGISTERS
  return vectors == 4 ? 6 : 8;
#else
  return vectors == 4 ? 2 : vectors == 3 ? 4 : 6;
#endif
}

// c[m][v] = sum over k in [k_begin, k_end) of a[m][k] * panel[v][k], or added to it. The caller's c has kGroup vectors a row.
// Every step fetches one vector from `ahead` on, for a later tile.
template <class T, int kVectors, int kRows>
[[gnu::noinline]] void panel_tile(const T* panels, Index panel_stride, Index k_begin, Index k_end, const T* const* a, bool add,
                                  Vec<T>* c, const T* ahead) {
  Vec<T> sums[kRows][kVectors];
#pragma GCC unroll 16
  for (int m = 0; m < kRows; ++m) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) sums[m][v] = Vec<T>{};
  }
  const T* rows[kRows];
#pragma GCC unroll 16
  for (int m = 0; m < kRows; ++m) rows[m] = a[m];
  const T* w = panels + k_begin * kLanes<T>;
  for (Index k = k_begin; k < k_end; ++k, w += kLanes<T>) {
    Vec<T> weights[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) weights[v] = *reinterpret_cast<const Vec<T>*>(w + v * panel_stride);
    prefetch(ahead);
    ahead += kLanes<T>;
#pragma GCC unroll 16
    for (int m = 0; m < kRows; ++m) {
      const Vec<T> x = broadcast<T>(rows[m][k]);
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) sums[m][v] += x * weights[v];
    }
  }
#pragma GCC unroll 16
  for (int m = 0; m < kRows; ++m) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) c[m * kGroup + v] = add ? c[m * kGroup + v] + sums[m][v] : sums[m][v];
  }
}

template <class T, int kVectors, int kRows = tile_rows(kVectors)>
inline void panel_tile_of(int rows, const T* panels, Index panel_stride, Index k_begin, Index k_end, const T* const* a,
                          bool add, Vec<T>* c, const T* ahead) {
  if (rows == kRows) {
    panel_tile<T, kVectors, kRows>(panels, panel_stride, k_begin, k_end, a, add, c, ahead);
  } else if constexpr (kRows > 1) {
    panel_tile_of<T, kVectors, kRows - 1>(rows, panels, panel_stride, k_begin, k_end, a, add, c, ahead);
  }
}

// Batches of so few sequences are bound by the reading of the weights.
constexpr Index kFewRows = 2;

// Each sum in so many parts, every one over its own steps of K: with so few rows, one chain of additions would wait for itself.
// The same for any number of vectors: how the units are shared must not change the order of the sums.
constexpr int kFewChains = 2;

// As panel_tile, for batches of at most kFewRows sequences. It fetches nothing for later: what is read so fast and in order the
// processor fetches itself, and every line that is asked for beside it delays one that is needed.
template <class T, int kVectors, int kRows>
[[gnu::noinline]] void few_rows_tile(const T* panels, Index panel_stride, Index k_begin, Index k_end, const T* const* a,
                                     bool add, Vec<T>* c) {
  Vec<T> sums[kFewChains][kRows][kVectors] = {};
  const T* rows[kRows];
  for (int m = 0; m < kRows; ++m) rows[m] = a[m];
  const T* w = panels + k_begin * kLanes<T>;
  const auto multiply = [&](Vec<T>(&to)[kRows][kVectors], Index k) {
    Vec<T> weights[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) weights[v] = *reinterpret_cast<const Vec<T>*>(w + v * panel_stride);
    w += kLanes<T>;
#pragma GCC unroll 2
    for (int m = 0; m < kRows; ++m) {
      const Vec<T> x = broadcast<T>(rows[m][k]);
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) to[m][v] += x * weights[v];
    }
  };
  Index k = k_begin;
  for (; k + kFewChains <= k_end; k += kFewChains) {
#pragma GCC unroll 2
    for (int i = 0; i < kFewChains; ++i) multiply(sums[i], k + i);
  }
  for (; k < k_end; ++k) multiply(sums[0], k);
#pragma GCC unroll 2
  for (int m = 0; m < kRows; ++m) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
#pragma GCC unroll 2
      for (int i = 1; i < kFewChains; ++i) sums[0][m][v] += sums[i][m][v];
      c[m * kGroup + v] = add ? c[m * kGroup + v] + sums[0][m][v] : sums[0][m][v];
    }
  }
}

// All rows of a chunk, cut into tiles of nearly equal height: 8 rows are 4 + 4 and not 6 + 2.
//
// While the tiles of one pass work on one stretch of K, they fetch the next stretch, and in the last pass the panels at `next`,
// which are read after these; none are if the whole batch has few rows. `ahead(row)` is called once for every row, between the
// tiles of the first pass: the caller fetches what it will combine the products with.
template <class T, int kVectors, class RowAhead>
inline void panel_chunk(const T* panels, Index inner, const T* const* a, int rows, bool add, Vec<T>* c, const T* next,
                        RowAhead&& ahead) {
  const int tiles = (rows + tile_rows(kVectors) - 1) / tile_rows(kVectors);
  const Index panel_stride = inner * kLanes<T>;
  // Each pass sums from zero: one chain over all of K would round some ten times worse at K = 4096.
  // Passes of nearly equal depth: 200 steps are 100 + 100 and not 128 + 72.
  const Index passes = (inner + kDepth - 1) / kDepth;
  for (Index pass = 0; pass < passes; ++pass) {
    const Index k = inner * pass / passes, k_end = inner * (pass + 1) / passes;
    if (!next) {
      if (rows == 1) {
        few_rows_tile<T, kVectors, 1>(panels, panel_stride, k, k_end, a, add || k > 0, c);
      } else {
        few_rows_tile<T, kVectors, 2>(panels, panel_stride, k, k_end, a, add || k > 0, c);
      }
      continue;
    }
    for (int tile = 0, row = 0; tile < tiles; ++tile) {
      const int height = (rows - row + tiles - tile - 1) / (tiles - tile);
      const T* soon = (k_end < inner ? panels + k_end * kLanes<T> : next) + (tile % kVectors) * panel_stride;
      panel_tile_of<T, kVectors>(height, panels, panel_stride, k, k_end, a + row, add || k > 0, c + row * kGroup, soon);
      if (k == 0) {
        for (int i = row; i < row + height; ++i) ahead(i);
      }
      row += height;
    }
  }
}

// kRows x kColumns dot products along K, which is contiguous on both sides.
template <class T, int kColumns, int kRows>
inline void dot_tile(const T* columns, Index stride, Index inner, const T* const* a, T* results, Index row_stride) {
  Vec<T> sums[kRows][kColumns] = {};
  const auto add = [&](auto read, Index k) {
    Vec<T> w[kColumns];
#pragma GCC unroll 8
    for (int i = 0; i < kColumns; ++i) {
      w[i] = read(columns + i * stride + k);
    }
#pragma GCC unroll 4
    for (int m = 0; m < kRows; ++m) {
      const Vec<T> x = read(a[m] + k);
#pragma GCC unroll 8
      for (int i = 0; i < kColumns; ++i) sums[m][i] += x * w[i];
    }
  };
  Index k = 0;
  for (; k + kLanes<T> <= inner; k += kLanes<T>) add([](const T* p) { return load<T>(p); }, k);
  const int rest = static_cast<int>(inner - k);
  if (rest) add([rest](const T* p) { return load_first<T>(p, rest); }, k);
#pragma GCC unroll 4
  for (int m = 0; m < kRows; ++m) store_first<T>(results + m * row_stride, sums_of<T, kColumns>(sums[m]), kColumns);
}

// Columns of one dot tile: enough independent sums to hide the latency of a fused multiply-add at one row.
template <class T>
constexpr int kDotColumns = FUSED_RNN_MANY_REGISTERS && kLanes<T> >= 8 ? 8
                            : kLanes<T> >= 4                           ? 4
                                                                       : 2;
constexpr int kDotRows = 2;

// One vector of columns, of which `count` exist, for all rows of a chunk.
template <class T>
inline void dot_chunk(const Matrix<T>& w, Index column, int count, const T* const* a, int rows, bool add, Vec<T>* c) {
  Vec<T> sums[kDotRows] = {};
  T* results = reinterpret_cast<T*>(sums);
  constexpr Index kRowStride = kLanes<T>;
  for (int row = 0; row < rows; row += kDotRows) {
    const bool one = row + 1 == rows;
    int i = 0;
    for (; i + kDotColumns<T> <= count; i += kDotColumns<T>) {
      const T* columns = w.data + (column + i) * w.stride;
      if (one) {
        dot_tile<T, kDotColumns<T>, 1>(columns, w.stride, w.inner, a + row, results + i, kRowStride);
      } else {
        dot_tile<T, kDotColumns<T>, kDotRows>(columns, w.stride, w.inner, a + row, results + i, kRowStride);
      }
    }
    for (; i < count; ++i) {
      const T* columns = w.data + (column + i) * w.stride;
      for (int m = 0; m < (one ? 1 : kDotRows); ++m) {
        dot_tile<T, 1, 1>(columns, w.stride, w.inner, a + row + m, results + m * kRowStride + i, kRowStride);
      }
    }
    for (int m = 0; m < (one ? 1 : kDotRows); ++m) {
      Vec<T>& to = c[(row + m) * kGroup];
      to = add ? to + sums[m] : sums[m];
    }
  }
}

// How vectors of columns lie in a weight matrix: `gates` blocks of `hidden` columns. Vector v is gate v % gates of the units
// of vector v / gates.
struct Columns {
  int gates;
  Index hidden;
};

// The panels from vector `first` on.
template <class T>
inline const T* panels_of(const Matrix<T>& w, Index first) {
  return w.data + first * w.inner * kLanes<T>;
}

// c[row][0 .. vectors) of vectors first .. first + vectors - 1 of the columns, for `rows` <= kChunk rows, or added to it. The
// product after this one starts at panels `after`, null in a batch of few rows; `ahead` as in panel_chunk.
template <class T, class RowAhead>
inline void product_chunk(const Matrix<T>& w, Columns columns, Index first, int vectors, const T* const* a, int rows, bool add,
                          Vec<T>* c, const T* after, RowAhead&& ahead) {
  if (w.layout == Layout::kColumns) {
    for (int row = 0; row < rows; ++row) ahead(row);
    for (int v = 0; v < vectors; ++v) {
      const Index gate = (first + v) % columns.gates, unit = (first + v) / columns.gates * kLanes<T>;
      const Index exist = columns.hidden - unit < kLanes<T> ? columns.hidden - unit : kLanes<T>;
      dot_chunk<T>(w, gate * columns.hidden + unit, static_cast<int>(exist), a, rows, add, c + v);
    }
    return;
  }
  const T* panels = panels_of(w, first);
  switch (vectors) {
    case 1:
      return panel_chunk<T, 1>(panels, w.inner, a, rows, add, c, after, ahead);
    case 2:
      return panel_chunk<T, 2>(panels, w.inner, a, rows, add, c, after, ahead);
    case 3:
      return panel_chunk<T, 3>(panels, w.inner, a, rows, add, c, after, ahead);
    default:
#if FUSED_RNN_MANY_REGISTERS
      return panel_chunk<T, 4>(panels, w.inner, a, rows, add, c, after, ahead);
#else
      // Four vectors by two rows would load more than they multiply; twice two vectors by six rows do not.
      const T* others = panels + 2 * w.inner * kLanes<T>;
      panel_chunk<T, 2>(panels, w.inner, a, rows, add, c, after ? others : nullptr, ahead);
      return panel_chunk<T, 2>(others, w.inner, a, rows, add, c + 2, after, [](int) {});
#endif
  }
}

}  // namespace FUSED_RNN_ISA
}  // namespace fused_rnn
