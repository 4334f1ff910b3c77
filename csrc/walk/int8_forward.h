// The forward recurrence with int8 weights: one parallel region walks all steps, as in walk/forward.h.
//
// Each thread makes int8 rows of all the inputs and states that its products read, also where several share the units of a
// batch: the row's scale is known only when the whole row is there, and making it takes less than meeting once more would.
#pragma once

#include "run/memory.h"
#include "walk/int8_product.h"
#include "walk/walk.h"

namespace fused_rnn {
namespace FUSED_RNN_ISA {

// Rows of the input whose products are made together, where one step has fewer.
constexpr Index kInt8InputRows = 48;

// Where one thread's room has what.
template <class Cell>
struct Int8Room {
  // For a part of so many rows of the batch, and so many blocks of units.
  Int8Room(const Int8Args& args, Index rows, Index blocks)
      : most(rows < kInt8InputRows ? kInt8InputRows : rows),
        width_x(vectors_of(args.weight_ih->inner, 64) * 64),
        width_h(vectors_of(args.sizes.hidden, 64) * 64) {
    scale_x = take(most * sizeof(float));
    scale_h = take(rows * sizeof(float));
    x = take(most * width_x);
    h = take(rows * width_h);
    waiting = take(most * blocks * Cell::kGates * kInt8Columns * sizeof(float));
  }

  const Index most, width_x, width_h;
  Index scale_x, scale_h, x, h, waiting, bytes = 0;

 private:
  Index take(Index size) {
    const Index at = bytes;
    bytes += vectors_of(size, 64) * 64;
    return at;
  }
};

// One thread's walk over one part of the batch of one recurrence.
template <class Cell>
class Int8Walk {
  using T = float;
  static constexpr int kGates = Cell::kGates;

 public:
  Int8Walk(const Int8Args& args, const T* zeros, char* memory, Index d, Range batch, const Member& member)
      : args_(args),
        steps_(args.sizes.steps),
        hidden_(args.sizes.hidden),
        zeros_(zeros),
        d_(d),
        reset_(args.sizes.reset ? args.sizes.reset + d * args.sizes.reset_stride : nullptr),
        batch_(batch),
        blocks_(share(vectors_of(hidden_, kInt8Columns), member.count, member.index)),
        barrier_(member.barrier),
        shared_(member.count > 1),
        vnni_(kVnni && args.vnni),
        flip_(vnni_ ? 0x80 : 0),
        room_(args, batch.size(), blocks_.size()),
        x_{reinterpret_cast<std::int8_t*>(memory + room_.x), room_.width_x, reinterpret_cast<T*>(memory + room_.scale_x)},
        q_{reinterpret_cast<std::int8_t*>(memory + room_.h), room_.width_h, reinterpret_cast<T*>(memory + room_.scale_h)},
        waiting_(reinterpret_cast<T*>(memory + room_.waiting)),
        h_(args.states[0] + d * steps_.batch * hidden_),
        c_(Cell::kHasC ? args.states[1] + d * steps_.batch * hidden_ : nullptr),
        before_(batch.size()) {}

  void run() {
    Index previous = -1;
    for (Index s = 0; s < steps_.length; ++s) {
      const Index t = step_at(s), n = clip(steps_.count(t), batch_);
      if (n == 0) continue;
      if (s >= inputs_until_) begin_block(s);
      step(t, previous, n, s % 2);
      row_of_block_ += n;
      // The next step reads the units of the other threads.
      if (shared_) barrier_.wait();
      previous = t;
    }
    if (!args_.updates_h) return;
    const Index begin = blocks_.begin * kInt8Columns, end = blocks_.end * kInt8Columns;
    keep_last(args_.sizes, args_.out, d_, batch_, {begin, end < hidden_ ? end : hidden_}, h_);
  }

 private:
  bool resets(Index row) const { return reset_ && reset_[row]; }
  Index step_at(Index s) const { return args_.sizes.reverse[d_] ? steps_.length - 1 - s : s; }

  // Forms the inputs' products of step s of the walk and of those after it.
  void begin_block(Index s) {
    const Int8Matrix& w = args_.weight_ih[d_];
    Index rows = 0;
    for (; s < steps_.length; ++s) {
      const Index t = step_at(s), first = steps_.offset(t) + batch_.begin, n = clip(steps_.count(t), batch_);
      if (rows + n > room_.most) break;
      for (Index j = 0; j < n; ++j, ++rows) {
        const T* row = args_.input + (first + j) * args_.input_stride;
        x_.scale[rows] = quantize(row, w.inner, vectors_of(w.inner, kInt8Depth) * kInt8Depth, flip_, x_.at(rows));
      }
    }
    alignas(64) std::int32_t sums[kInt8Rows * kGates * kInt8Columns];
    for (Index block = blocks_.begin; block < blocks_.end; ++block) {
      const T* scale = w.scale + block * kGates * kInt8Columns;
      tiles(rows, [&](Index row, int height) {
        int8_tile<kGates>(w, block, x_, row, height, vnni_, sums);
        for (int m = 0; m < height; ++m) {
          T* to = waiting_at(block, row + m);
          for (Index i = 0; i < kGates * kInt8Columns; i += kLanes<T>) {
            store<T>(to + i, scaled(sums + m * kGates * kInt8Columns + i, scale + i, x_.scale[row + m]));
          }
        }
      });
    }
    inputs_until_ = s;
    row_of_block_ = 0;
  }

  void step(Index t, Index previous, Index n, bool descending) {
    const Index first = steps_.offset(t) + batch_.begin;
    const Index going_on = previous < 0 ? 0 : clip(steps_.count(previous), batch_);
    const Index before = previous < 0 ? 0 : steps_.offset(previous) + batch_.begin;
    const Int8Matrix& w = args_.weight_hh[d_];
    for (Index j = 0; j < n; ++j) {
      const T* h = resets(first + j) ? zeros_ : j < going_on ? args_.out.at(before + j, d_) : h_ + (batch_.begin + j) * hidden_;
      before_.get()[j] = h;
      q_.scale[j] = quantize(h, hidden_, vectors_of(hidden_, kInt8Depth) * kInt8Depth, flip_, q_.at(j));
    }
    alignas(64) std::int32_t sums[kInt8Rows * kGates * kInt8Columns];
    for (Index i = 0; i < blocks_.size(); ++i) {
      // Every other step from the last block to the first: what was read last, the caches still have.
      const Index block = descending ? blocks_.end - 1 - i : blocks_.begin + i;
      tiles(n, [&](Index row, int height) {
        int8_tile<kGates>(w, block, q_, row, height, vnni_, sums);
        for (int m = 0; m < height; ++m) point(block, row + m, first, sums + m * kGates * kInt8Columns);
      });
    }
  }

  // Calls f(row, height) for tiles of nearly equal height.
  template <class F>
  static void tiles(Index rows, F&& f) {
    const Index count = vectors_of(rows, kInt8Rows);
    for (Index i = 0; i < count; ++i) {
      const Range range = share(rows, static_cast<int>(count), static_cast<int>(i));
      f(range.begin, static_cast<int>(range.size()));
    }
  }

  // The pointwise part of one block's units in row j.
  void point(Index block, Index j, Index first, const std::int32_t* sums) {
    const T* scale = args_.weight_hh[d_].scale + block * kGates * kInt8Columns;
    const T* inputs = waiting_at(block, row_of_block_ + j);
    const Index end = hidden_ - block * kInt8Columns;
    for (Index lane = 0; lane < kInt8Columns && lane < end; lane += kLanes<T>) {
      Vec<T> gates[kGates + 1];
      for (int g = 0; g < kGates; ++g) {
        const Index at = g * kInt8Columns + lane;
        gates[g] = scaled(sums + at, scale + at, q_.scale[j]);
        if (g == Cell::kApart) {
          gates[kGates] = load(inputs + at);
        } else {
          gates[g] += load(inputs + at);
        }
      }
      const Index unit = block * kInt8Columns + lane, row = batch_.begin + j;
      ForwardPoint<T> p;
      p.gates_x = nullptr;
      p.tape = nullptr;
      p.hidden = hidden_;
      p.bias = args_.bias ? args_.bias + d_ * kBias<Cell> * hidden_ + unit : nullptr;
      p.h_previous = before_.get()[j] + unit;
      p.c = Cell::kHasC ? c_ + row * hidden_ + unit : nullptr;
      p.reset = resets(first + j);
      p.keep = false;
      p.h = args_.out.at(first + j, d_) + unit;
      p.operand = nullptr;
      with_io<T>(hidden_, unit / kLanes<T>, [&](auto io, Index) {
        Cell::forward(io, gates, p);
        if (Cell::kHasC && args_.cells) io.store(args_.cells.at(first + j, d_) + unit, io.load(p.c));
      });
    }
  }

  // The products of one block with row `row` of the inputs that wait, [gate][unit].
  T* waiting_at(Index block, Index row) const {
    return waiting_ + ((block - blocks_.begin) * room_.most + row) * kGates * kInt8Columns;
  }

  const Int8Args& args_;
  const StepRows& steps_;
  const Index hidden_;
  const T* const zeros_;
  const Index d_;
  const bool* const reset_;
  const Range batch_, blocks_;
  Barrier& barrier_;
  const bool shared_;
  const bool vnni_;
  const std::uint32_t flip_;
  const Int8Room<Cell> room_;
  const Int8Rows x_, q_;
  T* const waiting_;
  T* const h_;
  T* const c_;
  const Buffer<const T*> before_;
  // Inputs' products are there up to this step of the walk; the next step's begin at row_of_block_.
  Index inputs_until_ = 0, row_of_block_ = 0;
};

template <class Cell>
void walk_int8(const Int8Args& args) {
  const Sizes& s = args.sizes;
  if (s.steps.batch == 0 || s.steps.length == 0) return;
  // One vector of four steps of K a cycle, and as many cycles for the pointwise part as in walk/forward.h.
  const Index blocks = vectors_of(s.hidden, kInt8Columns), inner = s.hidden + args.weight_ih->inner;
  const double gates = Cell::kGates, columns = static_cast<double>(blocks), depth = static_cast<double>(inner);
  const double point = 40 * gates * kInt8Columns / kLanes<float>;
  const Groups groups(s, {s.recurrences, s.steps.batch, blocks, s.steps.length, columns * (gates * depth / 4 + point),
                          columns * gates * depth * kInt8Columns, 1});
  const Buffer<float> zeros(s.hidden);
  const Index most = groups.largest_part();
  const Index bytes = Int8Room<Cell>(args, most, vectors_of(blocks, groups.plan().unit_parts)).bytes;
  // A team that came out smaller than planned has members that take all units.
  const Index whole = Int8Room<Cell>(args, most, blocks).bytes;
  const int members = groups.plan().unit_parts;
  const Index of_group = bytes * members < whole ? whole : bytes * members;
  const Memory memory(static_cast<std::size_t>(of_group * groups.plan().groups));
  groups.run([&](Index d, Range batch, const Member& member) {
    char* const mine = static_cast<char*>(memory.get()) + of_group * member.group + bytes * member.index;
    Int8Walk<Cell>(args, zeros.get(), mine, d, batch, member).run();
  });
}

// Of cells with one stage; there is none for others.
template <class Cell>
void int8_forward(const Int8Args& args) {
  if constexpr (!kTwoStages<Cell>) walk_int8<Cell>(args);
}

}  // namespace FUSED_RNN_ISA
}  // namespace fused_rnn
