// From a torch weight to panels of one vector of columns, K after K (Layout::kPanels).
#pragma once

#include "walk/pointwise.h"
#include "walk/product.h"

namespace fused_rnn {
namespace FUSED_RNN_ISA {

struct Range {
  Index begin, end;
  Index size() const { return end - begin; }
};

// Calls f(io, v) for vector v, with io for a whole vector or for the last few units.
template <class T, class F>
inline void with_io(Index columns, Index v, F&& f) {
  const Index rest = columns - v * kLanes<T>;
  if (rest >= kLanes<T>) {
    f(Whole<T>{}, v);
  } else {
    f(First<T>{static_cast<int>(rest)}, v);
  }
}

// Rows of the weight stay in the order of K, row_of(k), cut into vectors `mine` of the columns. All panels take a few rows at a
// time, so that the weight is read row by row: one panel at a time would touch another page with every vector.
template <class T, class RowOf>
inline void lay_out_rows(const T* weight, Index stride, RowOf&& row_of, Index columns, Index inner, Range mine, T* panels) {
  constexpr Index kBlock = 16;
  for (Index k = 0; k < inner; k += kBlock) {
    const Index end = inner - k < kBlock ? inner : k + kBlock;
    const T* rows[kBlock];
    for (Index i = k; i < end; ++i) rows[i - k] = weight + row_of(i) * stride;
    for (Index v = mine.begin; v < mine.end; ++v) {
      T* panel = panels + ((v - mine.begin) * inner + k) * kLanes<T>;
      with_io<T>(columns, v, [&](auto io, Index) {
        for (Index i = 0; i < end - k; ++i) store<T>(panel + i * kLanes<T>, io.load(rows[i] + v * kLanes<T>));
      });
    }
  }
}

// Rows of the weight become columns: vectors `mine` of them.
template <class T>
inline void lay_out_columns(const T* weight, Index stride, Columns columns, Index inner, Range mine, T* panels) {
  constexpr int n = kLanes<T>;
  for (Index v = mine.begin; v < mine.end; ++v) {
    const Index unit = v / columns.gates * n, gate = v % columns.gates;
    const int exist = static_cast<int>(columns.hidden - unit < n ? columns.hidden - unit : n);
    const T* rows = weight + (gate * columns.hidden + unit) * stride;
    T* panel = panels + (v - mine.begin) * inner * n;
    for (Index k = 0; k < inner; k += n) {
      Vec<T> block[n];
      for (int lane = 0; lane < n; ++lane) {
        block[lane] = Vec<T>{};
        if (lane < exist) {
          with_io<T>(inner, k / n, [&](auto io, Index) { block[lane] = io.load(rows + lane * stride + k); });
        }
      }
      transpose<T>(block);
      for (int i = 0; i < n && k + i < inner; ++i) store<T>(panel + (k + i) * n, block[i]);
    }
  }
}

// Where the panels of some vectors are: among those of the whole weight, or laid out for them alone.
template <class T>
struct Group {
  Matrix<T> matrix;
  Index first;
};

// Vectors first .. first + count - 1 of the columns; `room`, where there is some, is for a weight that is not in panels.
template <class T>
inline Group<T> group_of(const Matrix<T>& w, Columns columns, Index first, Index count, T* room) {
  if (!room) return {w, first};
  if (w.layout == Layout::kColumns) {
    lay_out_columns<T>(w.data, w.stride, columns, w.inner, {first, first + count}, room);
  } else {
    const auto row_of = [&](Index k) { return k + w.first < w.inner ? k + w.first : k + w.first - w.inner; };
    lay_out_rows<T>(w.data, w.stride, row_of, columns.hidden, w.inner, {first, first + count}, room);
  }
  return {{room, Layout::kPanels, w.inner, 0}, 0};
}

}  // namespace FUSED_RNN_ISA
}  // namespace fused_rnn
