// Between the numbers of 16 bits that a tensor may hold and the float32 that the kernels compute in.
#pragma once

#include "walk/walk.h"

namespace fused_rnn {
namespace FUSED_RNN_ISA {

inline float float_of(std::uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}
inline std::uint32_t bits_of(float x) {
  std::uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}

inline float widen(BFloat16 x) { return float_of(std::uint32_t{x.bits} << 16); }

// To the nearest, ties to even; every NaN to the one that torch writes.
inline BFloat16 narrow(float x, BFloat16) {
  const std::uint32_t bits = bits_of(x);
  const std::uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  return {static_cast<std::uint16_t>(x != x ? 0x7fc0 : rounded)};
}

// The exponent of float16 counts from 15 and that of float32 from 127: a product with 2^112 moves it, of subnormal numbers too.
inline float widen(Float16 x) {
  const std::uint32_t bits = std::uint32_t{x.bits};
  const std::uint32_t magnitude = (bits & 0x7fff) << 13, sign = (bits & 0x8000) << 16;
  const std::uint32_t moved = bits_of(float_of(magnitude) * 0x1p112f);
  const bool finite = (bits & 0x7c00) != 0x7c00;
  return float_of(sign | (finite ? moved : magnitude | 0x7f800000));
}

inline Float16 narrow(float x, Float16) {
  const std::uint32_t bits = bits_of(x), magnitude = bits & 0x7fffffff;
  const std::uint32_t normal = (magnitude + 0xfff + (magnitude >> 13 & 1) - (std::uint32_t{112} << 23)) >> 13;
  // Numbers below 2^-14 are multiples of 2^-24, which is the last place of 0.5.
  const std::uint32_t subnormal = bits_of(float_of(magnitude) + 0.5f) - bits_of(0.5f);
  const std::uint32_t finite = magnitude < 0x38800000 ? subnormal : normal;
  // From 65520 on, half a step above the largest number, all are infinite.
  const std::uint32_t beyond = magnitude > 0x7f800000 ? 0x7e00 : 0x7c00;
  return {static_cast<std::uint16_t>((bits >> 16 & 0x8000) | (magnitude < 0x477ff000 ? finite : beyond))};
}

// Rows of `columns` numbers, from one stride to another.
template <class From, class To, class F>
inline void convert_rows(const ConvertArgs<From, To>& p, F&& one) {
  const double bytes = static_cast<double>(p.rows) * p.columns * (sizeof(From) + sizeof(To));
  parallel(threads_for(bytes, p.threads), [&](int rank, int size) {
    const Range mine = share(p.rows, size, rank);
    for (Index row = mine.begin; row < mine.end; ++row) {
      const From* from = p.from + row * p.from_stride;
      To* to = p.to + row * p.to_stride;
      for (Index i = 0; i < p.columns; ++i) to[i] = one(from[i]);
    }
  });
}

template <class Half>
void widen_rows(const ConvertArgs<Half, float>& p) {
  convert_rows(p, [](Half x) { return widen(x); });
}
template <class Half>
void narrow_rows(const ConvertArgs<float, Half>& p) {
  convert_rows(p, [](float x) { return narrow(x, Half{}); });
}

}  // namespace FUSED_RNN_ISA
}  // namespace fused_rnn
