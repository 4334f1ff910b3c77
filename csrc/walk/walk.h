// What the forward and the backward walk share: the parts of a batch, the rows before a step, whole and last vectors.
#pragma once

#include <memory>
#include <new>
#include <type_traits>
#include <vector>

#include "run/team.h"
#include "walk/panels.h"

namespace fused_rnn {
namespace FUSED_RNN_ISA {

// Part `index` of `parts` of `whole` items, as even as can be.
inline Range share(Index whole, int parts, int index) { return {whole * index / parts, whole * (index + 1) / parts}; }

inline Index clip(Index count, Range rows) {
  return count < rows.begin ? 0 : (count < rows.end ? count - rows.begin : rows.size());
}

inline Index vectors_of(Index columns, Index lanes) { return (columns + lanes - 1) / lanes; }

// Zero-initialised memory on a boundary of whole vectors. The standard containers are kept out of these files where their
// element type is not of this namespace: the linker would merge the copies of all instruction sets into one of them.
template <class T>
class Buffer {
 public:
  explicit Buffer(Index size) : size_(size) {
    data_.reset(static_cast<T*>(::operator new[](bytes(), std::align_val_t{64})));
    std::memset(data_.get(), 0, bytes());
  }
  T* get() const { return data_.get(); }

 private:
  struct Free {
    void operator()(T* p) const { ::operator delete[](p, std::align_val_t{64}); }
  };
  std::size_t bytes() const { return (static_cast<std::size_t>(size_) * sizeof(T) + 63) / 64 * 64 + 64; }

  Index size_;
  std::unique_ptr<T[], Free> data_;
};

// Cuts the batch so that every part has about the same number of active rows over all steps.
inline std::vector<Range> batch_parts(const StepRows& steps, int parts) {
  std::vector<Range> ranges;
  if (!steps.batch_sizes) {
    for (int p = 0; p < parts; ++p) ranges.push_back(share(steps.batch, parts, p));
    return ranges;
  }
  Index total = 0;
  for (Index t = 0; t < steps.length; ++t) total += steps.count(t);
  // batch_sizes never grows: going back from the last step, rows join and are never lost, so row's length is t + 1 when it
  // is first seen.
  const Buffer<Index> buffer(steps.batch);
  Index* lengths = buffer.get();
  for (Index t = steps.length, row = 0; t-- > 0;) {
    for (; row < steps.count(t); ++row) lengths[row] = t + 1;
  }
  Index begin = 0, done = 0;
  for (int p = 0; p < parts; ++p) {
    Index end = begin;
    const Index goal = total * (p + 1) / parts;
    while (end < steps.batch && (done < goal || p + 1 == parts)) done += lengths[end++];
    ranges.push_back({begin, end});
    begin = end;
  }
  return ranges;
}

// One thread's private memory for a walk: the pointers to its rows of the products, and the products' results.
template <class T>
struct Scratch {
  // For a part of a batch of `all` sequences.
  Scratch(Index all, Index part, Index input_rows = 0, int tables = 1)
      : few(all <= kFewRows), rows(tables * part), inputs(input_rows) {}
  // Of the whole batch, and not of a part: how it is shared must not change the order of the sums.
  const bool few;
  // Whether products take their columns from the last to the first. A walk turns round at every step: what the step before read
  // last is then read first, while the caches still have it. Always from the first, weights larger than a cache would find
  // nothing of theirs there.
  bool descending = false;
  alignas(64) Vec<T> products[kChunk * kGroup];
  Buffer<const T*> rows;  // of the product that is next; behind them there may be another table
  Buffer<const T*> inputs;
  // Room for the panels of one group, where the weight is not in panels; else null.
  T* panels = nullptr;
  // Whether all rows of the walk are so few that weights in rows are read as they lie.
  bool as_stored = false;
};

// Whether buffers with so many columns of T, for every row of all steps, outgrow the caches: only then is it worth the while to
// fetch what a step will touch of them.
template <class T>
inline bool outgrows_caches(const Sizes& s, Index columns) {
  const Index last = s.steps.length - 1;
  const double rows = static_cast<double>(s.steps.offset(last) + s.steps.count(last));
  const double bytes = rows * static_cast<double>(s.recurrences * columns) * sizeof(T);
  return bytes > 2 * s.threads * second_level_cache();
}

// Fetches the rows of a product that other threads have just written: few rows' worth of weights do not take long enough for
// the lines to come one by one. Inlined always: GCC drops calls of a function that does nothing but fetch.
template <class T>
[[gnu::always_inline]] inline void fetch_few(const T* const* rows, Index n, Index columns) {
  if (n > 4) return;
  for (Index j = 0; j < n; ++j) {
    for (Index i = 0; i < columns; i += 64 / static_cast<Index>(sizeof(T))) __builtin_prefetch(rows[j] + i, 0, 3);
  }
}

// Vectors of units in a group: one with all of its gates, or several where a cell has one gate.
template <int kGates>
constexpr Index kUnitVectors = kGates == 1 ? kGroup : 1;

// Rows whose products with the input's weights are formed together, where one step has fewer: as many steps as make so many
// rows. The weights then pass by once for all of them, and in between the caches keep those of the recurrence.
constexpr Index kInputRows = 2 * kChunk;
static_assert(2 * kMostLooseBatch <= kInputRows);

// So few rows read weights in columns as they are: laying them out takes longer.
constexpr Index kFewestToLayOut = 4;

// Products of a few steps' inputs that wait for those of the recurrence: kGroup vectors for each row of each group.
template <class T>
struct Waiting {
  Vec<T>* data = nullptr;
  Index rows = 0;  // of a group

  Vec<T>* at(Index group, Index row) const { return data + (group * rows + row) * kGroup; }
  Waiting from(Index row) const { return {data ? data + row * kGroup : nullptr, rows}; }
};

// Gate kApart (-1 for none) keeps the products of input and recurrence apart: the input's moves behind the gates.
template <class T, int kGates, int kApart>
inline void move_apart(Vec<T>* c, Index rows) {
  static_assert(kApart < 0 || kGates < kGroup);
  if constexpr (kApart >= 0) {
    for (const Vec<T>* end = c + rows * kGroup; c < end; c += kGroup) {
      c[kGates] = c[kApart];
      c[kApart] = Vec<T>{};
    }
  }
}

// The products of the rows `inputs` with the columns `vectors` of `w`, for product() to add to; `room` as for group_of.
template <class T, int kGates, int kApart>
inline void input_products(const Matrix<T>& w, Index hidden, Range vectors, const T* const* inputs, Index n, T* room,
                           const Waiting<T>& to) {
  constexpr Index kVectors = kUnitVectors<kGates>;
  const Columns columns = {kGates, hidden};
  const Index groups = vectors_of(vectors.size(), kVectors);
  for (Index i = 0; i < groups; ++i) {
    const Index v = vectors.begin + i * kVectors;
    const Index count = vectors.end - v < kVectors ? vectors.end - v : kVectors;
    const Group<T> group = group_of(w, columns, v * kGates, count * kGates, room);
    for (Index row = 0; row < n; row += kChunk) {
      const Index end = n - row < kChunk ? n : row + kChunk;
      const bool last = end == n && i + 1 < groups && !room;
      const T* after = panels_of(group.matrix, last ? group.first + kVectors * kGates : group.first);
      product_chunk<T>(group.matrix, columns, group.first, static_cast<int>(count * kGates), inputs + row,
                       static_cast<int>(end - row), false, to.at(i, row), after, [](int) {});
      move_apart<T, kGates, kApart>(to.at(i, row), end - row);
    }
  }
}

// As product(), for a few rows times weights whose columns are contiguous: the weights are read row by row, as they lie, and
// not column by column, which would touch another page with every vector. Sums wait in `room`, a row of them for each row.
template <class T>
inline void few_rows_product(const Matrix<T>& w, Index columns, Range vectors, const T* const* rows, Index n, Vec<T>* room) {
  constexpr int kBlock = 8;
  const Index count = vectors.size();
  for (Index i = 0; i < n * count; ++i) room[i] = Vec<T>{};
  const auto row_at = [&](Index k) {
    const Index row = k + w.first;
    return w.data + (row < w.inner ? row : row - w.inner) * w.stride;
  };
  const auto take = [&](Index k, auto block) {
    constexpr int kRows = decltype(block)::value;
    const T* from[kRows];
    for (int i = 0; i < kRows; ++i) from[i] = row_at(k + i);
    for (Index v = 0; v < count; ++v) {
      with_io<T>(columns, vectors.begin + v, [&](auto io, Index at) {
        Vec<T> weights[kRows];
#pragma GCC unroll 8
        for (int i = 0; i < kRows; ++i) weights[i] = io.load(from[i] + at * kLanes<T>);
        for (Index j = 0; j < n; ++j) {
          Vec<T> sum = room[j * count + v];
#pragma GCC unroll 8
          for (int i = 0; i < kRows; ++i) sum += broadcast<T>(rows[j][k + i]) * weights[i];
          room[j * count + v] = sum;
        }
      });
    }
  };
  Index k = 0;
  for (; k + kBlock <= w.inner; k += kBlock) take(k, std::integral_constant<int, kBlock>{});
  for (; k < w.inner; ++k) take(k, std::integral_constant<int, 1>{});
}

// The product of rows `rows` (pointers, one per row; null products where `known` rows end) with the columns `vectors` of
// `w`, handed to sink(row, v, sums): v is a vector of units, sums its `gates` products.
// `ahead(row, v)` is called some time before sink(row, v, …), for it to fetch what sink will touch.
//
// With `w_inputs`, the rows scratch.inputs times these weights are added, or what is `waiting` of them. `w` may be other than
// in panels: in columns for few rows, or in any way if scratch has room for panels.
template <class T, int kGates, int kApart = -1, class Ahead, class Sink>
inline void product(const Matrix<T>* w_inputs, const Waiting<T>& waiting, const Matrix<T>& w, Index hidden, Range vectors,
                    Index n, Index known, Scratch<T>& scratch, Ahead&& ahead, Sink&& sink) {
  constexpr Index kVectors = kUnitVectors<kGates>;
  const Index groups = vectors_of(vectors.size(), kVectors);
  if constexpr (kGates == 1) {
    if (scratch.as_stored && scratch.panels && w.layout == Layout::kRows) {
      Vec<T>* const sums = reinterpret_cast<Vec<T>*>(scratch.panels);
      few_rows_product<T>(w, hidden, vectors, scratch.rows.get(), known, sums);
      const Vec<T> zero{};
      for (Index j = 0; j < n; ++j) {
        for (Index v = 0; v < vectors.size(); ++v) {
          sink(j, vectors.begin + v, j < known ? sums + j * vectors.size() + v : &zero);
        }
      }
      return;
    }
  }
  for (Index i = 0; i < groups; ++i) {
    const Index group = scratch.descending ? groups - 1 - i : i;
    const Index v = vectors.begin + group * kVectors;
    const Index count = vectors.end - v < kVectors ? vectors.end - v : kVectors;
    const Columns columns = {kGates, hidden};
    const Group<T> of = group_of(w, columns, v * kGates, count * kGates, scratch.panels);
    for (Index row = 0; row < n; row += kChunk) {
      const Index end = n - row < kChunk ? n : row + kChunk;
      // The next chunk reads the same panels again, the next group those beside them, and the next step turns round here.
      const Index next = end < n || i + 1 == groups ? v : scratch.descending ? v - kVectors : v + kVectors;
      const Index products = known <= row ? 0 : (known < end ? known : end) - row;
      Vec<T>* const c = waiting.data ? waiting.at(group, row) : scratch.products;
      if (products) {
        const auto panels_after = [&](const Matrix<T>& of, Index first) {
          return scratch.few ? nullptr : panels_of(of, first * kGates);
        };
        const int width = static_cast<int>(count * kGates), chunk = static_cast<int>(products);
        const auto fetch = [&](int j) __attribute__((always_inline)) {
          for (Index u = 0; u < count; ++u) ahead(row + j, v + u);
        };
        if (w_inputs) {
          product_chunk<T>(*w_inputs, columns, v * kGates, width, scratch.inputs.get() + row, chunk, false, c,
                           panels_after(w, v), fetch);
          move_apart<T, kGates, kApart>(c, chunk);
          product_chunk<T>(w, columns, v * kGates, width, scratch.rows.get() + row, chunk, true, c,
                           panels_after(*w_inputs, next), [](int) {});
        } else {
          const T* after = scratch.panels && !scratch.few ? scratch.panels : panels_after(w, next);
          product_chunk<T>(of.matrix, columns, of.first, width, scratch.rows.get() + row, chunk, waiting.data != nullptr, c,
                           after, fetch);
        }
      }
      for (Index i = products * kGroup; i < (end - row) * kGroup; ++i) c[i] = Vec<T>{};
      for (Index j = row; j < end; ++j) {
        const Vec<T>* sums = c + (j - row) * kGroup;
        for (Index u = 0; u < count; ++u) sink(j, v + u, sums + u * kGates);
      }
    }
  }
}

// The state after a walk of recurrence d is every sequence's last output; a sequence without a step keeps its state. For the
// sequences `batch` and the columns `mine`; h is (N, P).
template <class T>
inline void keep_last(const Sizes& s, const Rows<T>& out, Index d, Range batch, Range mine, T* h) {
  if (mine.begin >= mine.end) return;
  const StepRows& steps = s.steps;
  for (Index i = 0, j = 0; i < steps.length; ++i) {
    const Index t = s.reverse[d] ? i : steps.length - 1 - i;
    const Index first = steps.offset(t) + batch.begin;
    for (const Index n = clip(steps.count(t), batch); j < n; ++j) {
      std::memcpy(h + (batch.begin + j) * s.output + mine.begin, out.at(first + j, d) + mine.begin,
                  static_cast<std::size_t>(mine.size()) * sizeof(T));
    }
    if (j == batch.size()) return;
  }
}

// Threads for a pass over `bytes` of memory: one where waking the others takes longer than the pass.
inline int threads_for(double bytes, int threads) { return bytes < (256 << 10) ? 1 : threads; }

// The work of one step, for the plan. A row's vector takes `gates` fused multiply-adds per step of K, two a cycle, and
// `pointwise` cycles.
template <class T>
inline StepCost step_cost(const Sizes& s, int gates, double pointwise, Index inputs = 0, int stages = 1) {
  const double vectors = static_cast<double>(vectors_of(s.hidden, kLanes<T>));
  const double inner = static_cast<double>(s.output + inputs);
  const double multiply_adds = gates * inner / 2;
  return {s.recurrences,
          s.steps.batch,
          vectors_of(s.hidden, kLanes<T>),
          s.steps.length,
          vectors * (multiply_adds + pointwise),
          static_cast<double>(gates) * static_cast<double>(s.hidden) * inner * sizeof(T),
          stages};
}

// How the threads of one call share its recurrences and its batch.
class Groups {
 public:
  Groups(const Sizes& sizes, const StepCost& cost)
      : plan_(make_plan(sizes.threads, cost, sizes.sharing)),
        tasks_(sizes.recurrences * plan_.batch_parts),
        parts_(batch_parts(sizes.steps, plan_.batch_parts)),
        crews_(new Crew[static_cast<std::size_t>(plan_.groups)]),
        begun_(tasks_) {
    for (int g = 0; g < plan_.groups; ++g) crews_[static_cast<std::size_t>(g)].set_shares(plan_.unit_parts);
  }

  const Plan& plan() const { return plan_; }
  Index smallest_part() const {
    Index smallest = parts_.front().size();
    for (const Range& part : parts_) smallest = part.size() < smallest ? part.size() : smallest;
    return smallest;
  }
  Index largest_part() const {
    Index largest = 0;
    for (const Range& part : parts_) largest = part.size() > largest ? part.size() : largest;
    return largest;
  }

  // Runs task(d, batch, workspace, seat) for every part of every recurrence's batch, each by the threads of one group. Then a
  // thread does what other groups have not begun, whose threads have not come: so a team that came out smaller than planned
  // still does all tasks. There are as many workspaces as groups.
  template <class F>
  void run(F&& task) {
    together(plan_.threads(), [&](int rank, int size) {
      for (int i = 0; i < plan_.groups; ++i) {
        const int own = rank / plan_.unit_parts, group = own + i < plan_.groups ? own + i : own + i - plan_.groups;
        Crew& crew = crews_[static_cast<std::size_t>(group)];
        if (i > 0 && plan_.unit_parts > 1 && crew.begun()) continue;
        Seat seat(crew, rank % plan_.unit_parts, size == 1 || plan_.unit_parts == 1, rank == 0);
        for (Index t = group; t < tasks_; t += plan_.groups) {
          if (plan_.unit_parts == 1 && !begun_.take(t)) continue;
          // Who works alone has a workspace of their own; those who share units share it.
          const int workspace = plan_.unit_parts == 1 ? own : group;
          task(t / plan_.batch_parts, parts_[static_cast<std::size_t>(t % plan_.batch_parts)], workspace, seat);
        }
      }
    });
  }

 private:
  const Plan plan_;
  const Index tasks_;
  const std::vector<Range> parts_;
  const std::unique_ptr<Crew[]> crews_;
  Begun begun_;
};

}  // namespace FUSED_RNN_ISA
}  // namespace fused_rnn
