// The forward recurrence with int8 weights: one parallel region walks all steps, as in walk/forward.h.
//
// For each share of the units, int8 rows are made of all the inputs and states that its products read, also where several
// threads share the units of a batch: the row's scale is known only when the whole row is there, and making it takes less than
// meeting once more would.
#pragma once

#include "run/memory.h"
#include "walk/int8_product.h"
#include "walk/walk.h"

namespace fused_rnn {
namespace FUSED_RNN_ISA {

// Rows of the input whose products are made together, where one step has fewer.
constexpr Index kInt8InputRows = 48;

// Where the room of one share of the units has what.
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
  // `memory` has a room of `bytes` for each share.
  Int8Walk(const Int8Args& args, const T* zeros, char* memory, Index bytes, Index d, Range batch, Seat& seat)
      : args_(args),
        steps_(args.sizes.steps),
        hidden_(args.sizes.hidden),
        zeros_(zeros),
        d_(d),
        reset_(args.sizes.reset ? args.sizes.reset + d * args.sizes.reset_stride : nullptr),
        batch_(batch),
        seat_(seat),
        memory_(memory),
        bytes_(bytes),
        vnni_(kVnni && args.vnni),
        flip_(vnni_ ? 0x80 : 0),
        room_(args, batch.size(), vectors_of(vectors_of(hidden_, kInt8Columns), seat.shares())),
        h_(args.states[0] + d * steps_.batch * hidden_),
        c_(Cell::kHasC ? args.states[1] + d * steps_.batch * hidden_ : nullptr),
        before_(batch.size()) {
    take(0);
  }

  void run() {
    Index previous = -1;
    for (Index s = 0; s < steps_.length; ++s) {
      const Index t = step_at(s), n = clip(steps_.count(t), batch_);
      if (n == 0) continue;
      const bool begins = s >= inputs_until_;
      if (begins) begin_block(s);
      // The next step reads the units of all shares.
      seat_.phase([&](int part) {
        take(part);
        if (begins) form_inputs(s);
        step(t, previous, n, s % 2);
      });
      row_of_block_ += n;
      previous = t;
    }
    if (!args_.updates_h) return;
    seat_.phase([&](int part) {
      take(part);
      const Index begin = blocks_.begin * kInt8Columns, end = blocks_.end * kInt8Columns;
      keep_last(args_.sizes, args_.out, d_, batch_, {begin, end < hidden_ ? end : hidden_}, h_);
    });
  }

 private:
  bool resets(Index row) const { return reset_ && reset_[row]; }
  Index step_at(Index s) const { return args_.sizes.reverse[d_] ? steps_.length - 1 - s : s; }

  // Makes a share of the units the one to be computed.
  void take(int part) {
    if (part == part_) return;
    part_ = part;
    blocks_ = share(vectors_of(hidden_, kInt8Columns), seat_.shares(), part);
    char* const own = memory_ + part * bytes_;
    x_ = {reinterpret_cast<std::int8_t*>(own + room_.x), room_.width_x, reinterpret_cast<T*>(own + room_.scale_x)};
    q_ = {reinterpret_cast<std::int8_t*>(own + room_.h), room_.width_h, reinterpret_cast<T*>(own + room_.scale_h)};
    waiting_ = reinterpret_cast<T*>(own + room_.waiting);
  }

  // Step s of the walk and those after it, as many as their inputs' products are formed of at once.
  void begin_block(Index s) {
    for (Index rows = 0; s < steps_.length; ++s) {
      rows += clip(steps_.count(step_at(s)), batch_);
      if (rows > room_.most) break;
    }
    inputs_until_ = s;
    row_of_block_ = 0;
  }

  // Forms the inputs' products of the steps from s up to inputs_until_.
  void form_inputs(Index s) {
    const Int8Matrix& w = args_.weight_ih[d_];
    Index rows = 0;
    for (; s < inputs_until_; ++s) {
      const Index t = step_at(s), first = steps_.offset(t) + batch_.begin, n = clip(steps_.count(t), batch_);
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
  const Range batch_;
  Seat& seat_;
  // All shares' rooms, and what take() has set.
  char* const memory_;
  const Index bytes_;
  int part_ = -1;
  Range blocks_;
  const bool vnni_;
  const std::uint32_t flip_;
  const Int8Room<Cell> room_;
  Int8Rows x_, q_;
  T* waiting_ = nullptr;
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
  Groups groups(s, {s.recurrences, s.steps.batch, blocks, s.steps.length, columns * (gates * depth / 4 + point),
                    columns * gates * depth * kInt8Columns, 1});
  const Buffer<float> zeros(s.hidden);
  const Index most = groups.largest_part();
  const Index bytes = Int8Room<Cell>(args, most, vectors_of(blocks, groups.plan().unit_parts)).bytes;
  const Index of_group = bytes * groups.plan().unit_parts;
  const Memory memory(static_cast<std::size_t>(of_group * groups.plan().groups));
  groups.run([&](Index d, Range batch, int workspace, Seat& seat) {
    char* const own = static_cast<char*>(memory.get()) + of_group * workspace;
    Int8Walk<Cell>(args, zeros.get(), own, bytes, d, batch, seat).run();
  });
}

// Of cells with one stage; there is none for others.
template <class Cell>
void int8_forward(const Int8Args& args) {
  if constexpr (!kTwoStages<Cell>) walk_int8<Cell>(args);
}

}  // namespace FUSED_RNN_ISA
}  // namespace fused_rnn
