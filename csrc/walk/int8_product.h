// Products of int8 weights with rows that are made int8 on the way, each with a scale of its own.
//
// The sums are whole numbers and exact, in every form and for any order. So how threads share the work changes no result, and
// the forms of one instruction set, with and without VNNI, give the same bits.
#pragma once

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

#include "walk/int8_args.h"
#include "walk/walk.h"

namespace fused_rnn {
namespace FUSED_RNN_ISA {

// Whether there is a form with VNNI, beside the instruction set.
#if defined(__AVX512BW__)
constexpr bool kVnni = true;
#else
constexpr bool kVnni = false;
#endif

// Rows of activations as the products read them.
struct Int8Rows {
  std::int8_t* data = nullptr;
  Index stride = 0;
  float* scale = nullptr;

  std::int8_t* at(Index row) const { return data + row * stride; }
};

// Makes the n numbers at x whole multiples of the scale that it returns, at most 127 times it, to the nearest. `flip` is 0x80
// where 128 is to be added to all. A row with a NaN or an infinity has the scale NaN, which all of its products then are.
inline float quantize(const float* x, Index n, Index padded, std::uint32_t flip, std::int8_t* to) {
  // Of numbers that are not negative, the order is that of their bits.
  std::int32_t most = 0;
  for (Index i = 0; i < n; ++i) {
    std::int32_t bits;
    std::memcpy(&bits, x + i, sizeof bits);
    bits &= 0x7fffffff;
    most = most < bits ? bits : most;
  }
  float largest;
  std::memcpy(&largest, &most, sizeof largest);
  float scale = largest / 127, inverse = 127 / largest;
  if (most >= 0x7f800000) {
    scale = std::numeric_limits<float>::quiet_NaN();
    inverse = 0;
  } else if (!(inverse <= std::numeric_limits<float>::max())) {
    // Zeros, or numbers so small that nothing of them is left.
    scale = inverse = 0;
  }
  for (Index i = 0; i < n; ++i) {
    const float rounded = x[i] * inverse + Simd<float>::kRound;
    std::uint32_t bits;
    std::memcpy(&bits, &rounded, sizeof bits);
    to[i] = static_cast<std::int8_t>(bits ^ flip);
  }
  for (Index i = n; i < padded; ++i) to[i] = 0;
  return scale;
}

// Rows of a register tile: the accumulators of all gates fill the registers.
constexpr int kInt8Rows = 6;

// The tiles: to[row][gate][column] of one block of columns and a few rows of activations. `w` is the block, `quads` its K / 4.

#if defined(__AVX512BW__)
// Unsigned times signed, four products and their sum at once. The sums start with `start`, which undoes the shift of the rows.
template <int kGates, int kRows>
[[gnu::noinline, gnu::target("avx512vnni")]] void vnni_tile(const std::int8_t* w, Index quads, const std::int8_t* const* a,
                                                            const std::int32_t* start, std::int32_t* to) {
  // With few accumulators, each sum is made in parts: one chain of additions would wait for itself.
  constexpr int kChains = kGates * kRows >= 8 ? 1 : kGates * kRows >= 3 ? 2 : 4;
  __m512i sums[kChains][kRows][kGates];
#pragma GCC unroll 8
  for (int i = 0; i < kChains; ++i) {
#pragma GCC unroll 8
    for (int m = 0; m < kRows; ++m) {
#pragma GCC unroll 4
      for (int g = 0; g < kGates; ++g) sums[i][m][g] = i ? _mm512_setzero_si512() : _mm512_loadu_si512(start + g * 16);
    }
  }
  const std::int8_t* rows[kRows];
#pragma GCC unroll 8
  for (int m = 0; m < kRows; ++m) rows[m] = a[m];
  Index k = 0;
  for (; k + kChains <= quads; k += kChains) {
#pragma GCC unroll 4
    for (int i = 0; i < kChains; ++i) {
      __m512i weights[kGates];
#pragma GCC unroll 4
      for (int g = 0; g < kGates; ++g) weights[g] = _mm512_loadu_si512(w + ((k + i) * kGates + g) * 64);
#pragma GCC unroll 8
      for (int m = 0; m < kRows; ++m) {
        std::int32_t quad;
        std::memcpy(&quad, rows[m] + (k + i) * 4, sizeof quad);
        const __m512i x = _mm512_set1_epi32(quad);
#pragma GCC unroll 4
        for (int g = 0; g < kGates; ++g) sums[i][m][g] = _mm512_dpbusd_epi32(sums[i][m][g], x, weights[g]);
      }
    }
  }
  for (; k < quads; ++k) {
#pragma GCC unroll 8
    for (int m = 0; m < kRows; ++m) {
      std::int32_t quad;
      std::memcpy(&quad, rows[m] + k * 4, sizeof quad);
      const __m512i x = _mm512_set1_epi32(quad);
#pragma GCC unroll 4
      for (int g = 0; g < kGates; ++g) {
        sums[0][m][g] = _mm512_dpbusd_epi32(sums[0][m][g], x, _mm512_loadu_si512(w + (k * kGates + g) * 64));
      }
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < kRows; ++m) {
#pragma GCC unroll 4
    for (int g = 0; g < kGates; ++g) {
#pragma GCC unroll 4
      for (int i = 1; i < kChains; ++i) sums[0][m][g] = _mm512_add_epi32(sums[0][m][g], sums[i][m][g]);
      _mm512_storeu_si512(to + (m * kGates + g) * 16, sums[0][m][g]);
    }
  }
}
#endif

#if defined(__AVX2__)
// kSpan gates from `gate` on. vpmaddubsw adds two products in 16 bits: of the magnitudes of the weights, unsigned, and the rows
// with the weights' signs, both at most 127, that is at most 32258, which cannot saturate.
template <int kGates, int kSpan, int kRows>
[[gnu::noinline]] void signed_tile(const std::int8_t* w, Index quads, const std::int8_t* const* a, int gate, std::int32_t* to) {
  __m256i sums[kRows][2 * kSpan];
#pragma GCC unroll 4
  for (int m = 0; m < kRows; ++m) {
#pragma GCC unroll 8
    for (int i = 0; i < 2 * kSpan; ++i) sums[m][i] = _mm256_setzero_si256();
  }
  const std::int8_t* rows[kRows];
#pragma GCC unroll 4
  for (int m = 0; m < kRows; ++m) rows[m] = a[m];
  const __m256i ones = _mm256_set1_epi16(1);
  w += gate * 64;
  for (Index k = 0; k < quads; ++k, w += kGates * 64) {
    __m256i x[kRows];
#pragma GCC unroll 4
    for (int m = 0; m < kRows; ++m) {
      std::int32_t quad;
      std::memcpy(&quad, rows[m] + k * 4, sizeof quad);
      x[m] = _mm256_set1_epi32(quad);
    }
#pragma GCC unroll 8
    for (int i = 0; i < 2 * kSpan; ++i) {
      const __m256i weights = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(w + i * 32));
      const __m256i magnitudes = _mm256_abs_epi8(weights);
#pragma GCC unroll 4
      for (int m = 0; m < kRows; ++m) {
        const __m256i pairs = _mm256_maddubs_epi16(magnitudes, _mm256_sign_epi8(x[m], weights));
        sums[m][i] = _mm256_add_epi32(sums[m][i], _mm256_madd_epi16(pairs, ones));
      }
    }
  }
#pragma GCC unroll 4
  for (int m = 0; m < kRows; ++m) {
#pragma GCC unroll 8
    for (int i = 0; i < 2 * kSpan; ++i) {
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + (m * kGates + gate) * 16 + i * 8), sums[m][i]);
    }
  }
}
#else
typedef std::int8_t Bytes __attribute__((vector_size(8)));
typedef std::int16_t Shorts __attribute__((vector_size(16)));
typedef std::int32_t Sums __attribute__((vector_size(16)));

// Two columns' four steps of K, in 16 bits.
inline Shorts widened(const std::int8_t* p) {
  Bytes bytes;
  std::memcpy(&bytes, p, sizeof bytes);
  return __builtin_convertvector(bytes, Shorts);
}

// Adds the products, two by two: a product of two magnitudes of at most 127 fits in 16 bits.
inline Sums add_pairs(Sums sums, Shorts w, Shorts x) {
#if defined(__SSE2__)
  return sums + reinterpret_cast<Sums>(_mm_madd_epi16(reinterpret_cast<__m128i>(w), reinterpret_cast<__m128i>(x)));
#else
  const Shorts products = w * x;
  return sums +
         Sums{products[0] + products[1], products[2] + products[3], products[4] + products[5], products[6] + products[7]};
#endif
}

// Half a gate's columns for a row or two.
template <int kGates, int kRows>
inline void signed_half(const std::int8_t* w, Index quads, const std::int8_t* const* a, std::int32_t* to) {
  Sums sums[kRows][4] = {};
  for (Index k = 0; k < quads; ++k, w += kGates * 64) {
    Shorts x[kRows];
#pragma GCC unroll 2
    for (int m = 0; m < kRows; ++m) {
      std::int8_t twice[8];
      std::memcpy(twice, a[m] + k * 4, 4);
      std::memcpy(twice + 4, a[m] + k * 4, 4);
      x[m] = widened(twice);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      const Shorts weights = widened(w + i * 8);
#pragma GCC unroll 2
      for (int m = 0; m < kRows; ++m) sums[m][i] = add_pairs(sums[m][i], weights, x[m]);
    }
  }
  for (int m = 0; m < kRows; ++m) {
    for (int c = 0; c < 8; ++c) to[m * kGates * 16 + c] = sums[m][c / 2][c % 2 * 2] + sums[m][c / 2][c % 2 * 2 + 1];
  }
}

template <int kGates, int kSpan, int kRows>
void signed_tile(const std::int8_t* w, Index quads, const std::int8_t* const* a, int gate, std::int32_t* to) {
  for (int half = 2 * gate; half < 2 * (gate + kSpan); ++half) {
    const std::int8_t* columns = w + half * 32;
    std::int32_t* sums = to + half * 8;
    int m = 0;
    for (; m + 2 <= kRows; m += 2) signed_half<kGates, 2>(columns, quads, a + m, sums + m * kGates * 16);
    if (m < kRows) signed_half<kGates, 1>(columns, quads, a + m, sums + m * kGates * 16);
  }
}
#endif

// Rows of a tile without VNNI: the sums of one gate, the rows and a weight fill 16 registers. One row has all gates at once, so
// that the weights are read from one end to the other.
constexpr int kSignedRows = 4;

template <int kGates, int kRows = kSignedRows>
inline void signed_tile_of(int rows, const std::int8_t* w, Index quads, const std::int8_t* const* a, std::int32_t* to) {
  if (rows == kRows) {
    constexpr int kSpan = kRows == 1 ? kGates : kRows == 2 && kGates % 2 == 0 ? 2 : 1;
    for (int gate = 0; gate < kGates; gate += kSpan) signed_tile<kGates, kSpan, kRows>(w, quads, a, gate, to);
  } else if constexpr (kRows > 1) {
    signed_tile_of<kGates, kRows - 1>(rows, w, quads, a, to);
  }
}

#if defined(__AVX512BW__)
template <int kGates, int kRows = kInt8Rows>
inline void vnni_tile_of(int rows, const std::int8_t* w, Index quads, const std::int8_t* const* a, const std::int32_t* start,
                         std::int32_t* to) {
  if (rows == kRows) {
    vnni_tile<kGates, kRows>(w, quads, a, start, to);
  } else if constexpr (kRows > 1) {
    vnni_tile_of<kGates, kRows - 1>(rows, w, quads, a, start, to);
  }
}
#endif

// to[row][gate][column] of block `block` of a weight, for at most kInt8Rows rows from `first` on.
template <int kGates>
inline void int8_tile(const Int8Matrix& w, Index block, const Int8Rows& x, Index first, int rows, bool vnni, std::int32_t* to) {
  const Index quads = vectors_of(w.inner, kInt8Depth);
  const std::int8_t* data = w.data + block * quads * kGates * 64;
  const std::int8_t* a[kInt8Rows];
  for (int m = 0; m < rows; ++m) a[m] = x.at(first + m);
#if defined(__AVX512BW__)
  if (vnni) return vnni_tile_of<kGates>(rows, data, quads, a, w.sums + block * kGates * 16, to);
#else
  (void)vnni;
#endif
  for (int m = 0; m < rows; m += kSignedRows) {
    signed_tile_of<kGates>(rows - m < kSignedRows ? rows - m : kSignedRows, data, quads, a + m, to + m * kGates * 16);
  }
}

// kLanes numbers of a tile as numbers of the row: times the scales of their columns and of the row.
inline Vec<float> scaled(const std::int32_t* sums, const float* scale, float of_row) {
  typename Simd<float>::Int whole;
  std::memcpy(&whole, sums, sizeof whole);
  return __builtin_convertvector(whole, Vec<float>) * (load(scale) * of_row);
}

}  // namespace FUSED_RNN_ISA
}  // namespace fused_rnn
