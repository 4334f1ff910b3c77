// Vectors of one instruction set, and the transcendental functions on them.
//
// Everything is written with the vector extensions that GCC and Clang share, so one source serves every target; the
// compiler flags of the translation unit decide the width. Intrinsics stand only where the extensions have no word for
// an instruction (masked access, the reciprocal estimate), each with a portable twin.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>
#include <utility>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#ifndef FUSED_RNN_ISA
#error "define FUSED_RNN_ISA: the namespace of this translation unit's instruction set"
#endif

#if defined(__AVX512F__)
#define FUSED_RNN_VECTOR_BYTES 64
#elif defined(__AVX2__)
#define FUSED_RNN_VECTOR_BYTES 32
#else
#define FUSED_RNN_VECTOR_BYTES 16
#endif

// 32 vector registers instead of 16 allow a register tile of twice the size.
#if defined(__AVX512F__) || defined(__aarch64__)
#define FUSED_RNN_MANY_REGISTERS 1
#else
#define FUSED_RNN_MANY_REGISTERS 0
#endif

#if defined(__FMA__) || defined(__aarch64__)
#define FUSED_RNN_FUSED_MULTIPLY 1
#else
#define FUSED_RNN_FUSED_MULTIPLY 0
#endif

namespace fused_rnn {
namespace FUSED_RNN_ISA {

template <class T>
struct Simd;

template <>
struct Simd<float> {
  typedef float Vec __attribute__((vector_size(FUSED_RNN_VECTOR_BYTES)));
  typedef std::int32_t Int __attribute__((vector_size(FUSED_RNN_VECTOR_BYTES)));
  typedef float Unaligned __attribute__((vector_size(FUSED_RNN_VECTOR_BYTES), aligned(4), may_alias));
  static constexpr int kMantissaBits = 23;
  static constexpr std::int32_t kExponentBias = 127;
  // Adding 1.5 * 2^mantissa rounds to the nearest integer and leaves that integer in the low bits.
  static constexpr float kRound = 12582912.0f;
  static constexpr float kLog2e = 1.44269504f;
#if FUSED_RNN_FUSED_MULTIPLY
  // ln 2: n times it is not rounded, and its own error is 2e-9.
  static constexpr float kLn2High = 0.693147182f;
  static constexpr float kLn2Low = 0;
#else
  // ln 2 in two parts; the first has few enough bits for n * kLn2High to be exact.
  static constexpr float kLn2High = 0.693359375f;
  static constexpr float kLn2Low = -2.12194440e-4f;
#endif
  // e^x has a scale up to here; sigmoid(-88) is no normal number any more, and comes out as 0.
  static constexpr float kLimit = 88.0f;
  // (e^r - 1 - r) / r^2 on |r| <= ln(2) / 2, interpolated at the Chebyshev nodes; relative error of e^r 1.0e-8.
  static constexpr int kDegree = 4;
  static constexpr float kExpm1[kDegree + 1] = {0.5f, 0.16666576845993976f, 0.041666554437685939f, 0.0083632029715758549f,
                                                0.0013926213466332443f};
};

template <>
struct Simd<double> {
  typedef double Vec __attribute__((vector_size(FUSED_RNN_VECTOR_BYTES)));
  typedef std::int64_t Int __attribute__((vector_size(FUSED_RNN_VECTOR_BYTES)));
  typedef double Unaligned __attribute__((vector_size(FUSED_RNN_VECTOR_BYTES), aligned(8), may_alias));
  static constexpr int kMantissaBits = 52;
  static constexpr std::int64_t kExponentBias = 1023;
  static constexpr double kRound = 6755399441055744.0;
  static constexpr double kLog2e = 1.4426950408889634;
  static constexpr double kLn2High = 6.93145751953125e-1;
  static constexpr double kLn2Low = 1.42860682030941723212e-6;
  static constexpr double kLimit = 709.0;  // sigmoid(-709) is 0 in the same way
  // As above; relative error of e^r 2.3e-19.
  static constexpr int kDegree = 10;
  static constexpr double kExpm1[kDegree + 1] = {0.5,
                                                 0.16666666666666671008,
                                                 0.041666666666666669767,
                                                 0.0083333333333261120526,
                                                 0.0013888888888883731828,
                                                 0.00019841269874901259234,
                                                 0.000024801587325605322782,
                                                 2.7557255297969644392e-6,
                                                 2.7557273570102139673e-7,
                                                 2.5105259538448493419e-8,
                                                 2.0914717341716375952e-9};
};

template <class T>
using Vec = typename Simd<T>::Vec;

// Lanes of a vector.
template <class T>
constexpr int kLanes = FUSED_RNN_VECTOR_BYTES / static_cast<int>(sizeof(T));

template <class T>
inline Vec<T> broadcast(T x) {
  return x - Vec<T>{};
}

template <class T>
inline Vec<T> load(const T* p) {
  return *reinterpret_cast<const typename Simd<T>::Unaligned*>(p);
}

template <class T>
inline void store(T* p, Vec<T> x) {
  *reinterpret_cast<typename Simd<T>::Unaligned*>(p) = x;
}

// The first n lanes; the others are zero. 0 <= n <= kLanes.
template <class T>
inline Vec<T> load_first(const T* p, int n) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) {
    return reinterpret_cast<Vec<T>>(_mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << n) - 1), p));
  } else {
    return reinterpret_cast<Vec<T>>(_mm512_maskz_loadu_pd(static_cast<__mmask8>((1u << n) - 1), p));
  }
#else
  alignas(FUSED_RNN_VECTOR_BYTES) T lanes[kLanes<T>] = {};
  std::memcpy(lanes, p, static_cast<std::size_t>(n) * sizeof(T));
  return load(lanes);
#endif
}

// Stores the first n lanes and touches nothing beyond them.
template <class T>
inline void store_first(T* p, Vec<T> x, int n) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) {
    _mm512_mask_storeu_ps(p, static_cast<__mmask16>((1u << n) - 1), reinterpret_cast<__m512>(x));
  } else {
    _mm512_mask_storeu_pd(p, static_cast<__mmask8>((1u << n) - 1), reinterpret_cast<__m512d>(x));
  }
#else
  alignas(FUSED_RNN_VECTOR_BYTES) T lanes[kLanes<T>];
  store(lanes, x);
  std::memcpy(p, lanes, static_cast<std::size_t>(n) * sizeof(T));
#endif
}

// pair_sums: {a0 + a1, a2 + a3, …, b0 + b1, b2 + b3, …}.
// interleave_from<k>: {ak, bk, ak+1, bk+1, …}.
#if defined(__has_builtin) && __has_builtin(__builtin_shufflevector)
template <class V, std::size_t... i>
inline V pair_sums(V a, V b, std::index_sequence<i...>) {
  return __builtin_shufflevector(a, b, (2 * i)...) + __builtin_shufflevector(a, b, (2 * i + 1)...);
}
template <std::size_t kFrom, class V, std::size_t... i>
inline V interleave_from(V a, V b, std::index_sequence<i...>) {
  return __builtin_shufflevector(a, b, (kFrom + i / 2 + (i % 2) * sizeof...(i))...);
}
#else
template <class V, std::size_t... i>
inline V pair_sums(V a, V b, std::index_sequence<i...>) {
  constexpr std::size_t n = sizeof...(i);
  return V{((2 * i < n ? a[(2 * i) % n] : b[(2 * i) % n]) + (2 * i < n ? a[(2 * i + 1) % n] : b[(2 * i + 1) % n]))...};
}
template <std::size_t kFrom, class V, std::size_t... i>
inline V interleave_from(V a, V b, std::index_sequence<i...>) {
  return V{(i % 2 ? b[kFrom + i / 2] : a[kFrom + i / 2])...};
}
#endif

// The sums of n vectors, in the first n lanes; n a power of two, at most the number of lanes.
template <class T, int n>
inline Vec<T> sums_of(const Vec<T>* x) {
  static_assert(n > 0 && (n & (n - 1)) == 0 && n <= kLanes<T>);
  Vec<T> level[n];
#pragma GCC unroll 16
  for (int i = 0; i < n; ++i) level[i] = x[i];
#pragma GCC unroll 4
  for (int count = n; count > 1; count /= 2) {
#pragma GCC unroll 8
    for (int i = 0; i < count / 2; ++i) {
      level[i] = pair_sums(level[2 * i], level[2 * i + 1], std::make_index_sequence<kLanes<T>>());
    }
  }
#pragma GCC unroll 4
  for (int parts = kLanes<T> / n; parts > 1; parts /= 2) {
    level[0] = pair_sums(level[0], level[0], std::make_index_sequence<kLanes<T>>());
  }
  return level[0];
}

// Turns kLanes rows into columns: a perfect shuffle of the rows, as often as it takes to move each lane home.
template <class T>
inline void transpose(Vec<T>* rows) {
  constexpr int n = kLanes<T>;
  using Lanes = std::make_index_sequence<n>;
#pragma GCC unroll 4
  for (int stage = 1; stage < n; stage *= 2) {
    Vec<T> next[n];
#pragma GCC unroll 8
    for (int i = 0; i < n / 2; ++i) {
      next[2 * i] = interleave_from<0>(rows[i], rows[i + n / 2], Lanes());
      next[2 * i + 1] = interleave_from<n / 2>(rows[i], rows[i + n / 2], Lanes());
    }
#pragma GCC unroll 16
    for (int i = 0; i < n; ++i) rows[i] = next[i];
  }
}

// Fetches a line into the second-level cache: to be read, or to be written.
[[gnu::always_inline]] inline void prefetch(const void* p) { __builtin_prefetch(p, 0, 2); }
[[gnu::always_inline]] inline void prefetch_to_write(const void* p) { __builtin_prefetch(p, 1, 2); }

// x, but not below (not above) the limit. NaN stays: a comparison with it is false.
// x86's minimum and maximum give their second operand then; written as a comparison, each would be two instructions.
template <class T>
inline Vec<T> at_least(Vec<T> x, T limit) {
  const Vec<T> low = broadcast<T>(limit);
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) {
    return reinterpret_cast<Vec<T>>(_mm512_maskz_max_ps(0xffff, reinterpret_cast<__m512>(low), reinterpret_cast<__m512>(x)));
  }
#elif defined(__AVX2__)
  if constexpr (sizeof(T) == 4) {
    return reinterpret_cast<Vec<T>>(_mm256_max_ps(reinterpret_cast<__m256>(low), reinterpret_cast<__m256>(x)));
  }
#endif
  return x < low ? low : x;
}

template <class T>
inline Vec<T> at_most(Vec<T> x, T limit) {
  const Vec<T> high = broadcast<T>(limit);
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) {
    return reinterpret_cast<Vec<T>>(_mm512_maskz_min_ps(0xffff, reinterpret_cast<__m512>(high), reinterpret_cast<__m512>(x)));
  }
#elif defined(__AVX2__)
  if constexpr (sizeof(T) == 4) {
    return reinterpret_cast<Vec<T>>(_mm256_min_ps(reinterpret_cast<__m256>(high), reinterpret_cast<__m256>(x)));
  }
#endif
  return x > high ? high : x;
}

// The magnitude of `x` with the sign of `signs`, and -|x|. NaN and zeros have signs too.
template <class T>
inline Vec<T> with_sign(Vec<T> x, Vec<T> signs) {
  using Int = typename Simd<T>::Int;
  const Int sign = reinterpret_cast<Int>(broadcast<T>(T(-0.0)));
  return reinterpret_cast<Vec<T>>((reinterpret_cast<Int>(x) & ~sign) | (reinterpret_cast<Int>(signs) & sign));
}

template <class T>
inline Vec<T> negative(Vec<T> x) {
  using Int = typename Simd<T>::Int;
  return reinterpret_cast<Vec<T>>(reinterpret_cast<Int>(x) | reinterpret_cast<Int>(broadcast<T>(T(-0.0))));
}

// 1 / x for x >= 1, and 0 where that would be no normal number.
template <class T>
inline Vec<T> reciprocal(Vec<T> x) {
  const Vec<T> last = broadcast<T>(1 / std::numeric_limits<T>::min());
#if defined(__AVX512F__)
  // A 512-bit division keeps its port busy for 16 cycles. The estimate has 14 bits, one Newton step makes it 28.
  if constexpr (sizeof(T) == 4) {
    const __m512 of = reinterpret_cast<__m512>(x);
    const __mmask16 normal = _mm512_cmp_ps_mask(of, reinterpret_cast<__m512>(last), _CMP_NGT_UQ);
    const Vec<T> estimate = reinterpret_cast<Vec<T>>(_mm512_maskz_rcp14_ps(normal, of));
    return estimate + estimate * (broadcast<T>(1) - x * estimate);
  }
#endif
  return x > last ? Vec<T>{} : broadcast<T>(1) / x;
}

// x / y for 1 <= y <= 2 and |x| <= y: 1 and -1 are exact.
template <class T>
inline Vec<T> quotient(Vec<T> x, Vec<T> y) {
#if defined(__AVX512F__)
  // As above. The step mends the quotient, not the reciprocal: so it is rounded once, and x / x is 1.
  if constexpr (sizeof(T) == 4) {
    const Vec<T> estimate = reinterpret_cast<Vec<T>>(_mm512_maskz_rcp14_ps(0xffff, reinterpret_cast<__m512>(y)));
    const Vec<T> near = x * estimate;
    return near + estimate * (x - y * near);
  }
#endif
  return x / y;
}

// e^x = scale * (1 + fraction) with scale a power of two and |fraction| < 0.42, for every x[i] whose scale is normal.
//
// Several at once, step by step: each step waits for the one before it, and n independent chains side by side fill that wait,
// where n chains one after another would fill the processor's window with waiting instructions.
template <class T, int n>
inline void exp_parts(const Vec<T>* x, Vec<T>* scale, Vec<T>* fraction) {
  using S = Simd<T>;
  using Int = typename S::Int;
  // With the bias of an exponent, so that the integer in the low bits is one.
  const Vec<T> rounder = broadcast<T>(S::kRound + static_cast<T>(S::kExponentBias));
  Vec<T> r[n], q[n];
#pragma GCC unroll 4
  for (int i = 0; i < n; ++i) scale[i] = x[i] * S::kLog2e + rounder;
#pragma GCC unroll 4
  for (int i = 0; i < n; ++i) q[i] = scale[i] - rounder;
#pragma GCC unroll 4
  for (int i = 0; i < n; ++i) r[i] = x[i] - q[i] * S::kLn2High;
  if constexpr (S::kLn2Low != 0) {
#pragma GCC unroll 4
    for (int i = 0; i < n; ++i) r[i] = r[i] - q[i] * S::kLn2Low;
  }
#pragma GCC unroll 4
  for (int i = 0; i < n; ++i) q[i] = broadcast<T>(S::kExpm1[S::kDegree]);
#pragma GCC unroll 16
  for (int d = S::kDegree - 1; d >= 0; --d) {
#pragma GCC unroll 4
    for (int i = 0; i < n; ++i) q[i] = q[i] * r[i] + S::kExpm1[d];
  }
#pragma GCC unroll 4
  for (int i = 0; i < n; ++i) {
    scale[i] = reinterpret_cast<Vec<T>>(reinterpret_cast<Int>(scale[i]) << S::kMantissaBits);
  }
#pragma GCC unroll 4
  for (int i = 0; i < n; ++i) fraction[i] = (r[i] * r[i]) * q[i] + r[i];
}

// In place: 1 / (1 + e^-x) of the first kSigmoids vectors, tanh x of the kTanhs after them.
//
// tanh of -|x| is (e^-2|x| - 1) / (e^-2|x| + 1), and takes the sign of x. The numerator is formed without cancellation: the
// relative error stays small near 0, where 2 * sigmoid(2x) - 1 loses all digits. Far from 0 it is -1 and the denominator 1, so
// that 1 - tanh(x)^2 is 0: a gradient is that number times an input, which may be large.
template <class T, int kSigmoids, int kTanhs>
inline void activate(Vec<T>* x) {
  constexpr int n = kSigmoids + kTanhs;
  constexpr T kLimit = Simd<T>::kLimit;
  Vec<T> scale[n], fraction[n], low[n], signs[n];
#pragma GCC unroll 4
  for (int i = kSigmoids; i < n; ++i) {
    signs[i] = x[i];
    x[i] = negative<T>(x[i]);
    x[i] = at_least<T>(x[i] + x[i], -kLimit);
  }
#pragma GCC unroll 4
  for (int i = 0; i < kSigmoids; ++i) x[i] = at_most<T>(at_least<T>(x[i], -kLimit), kLimit);
  // Here, and not before, the sign becomes part of the multiplications that follow.
#pragma GCC unroll 4
  for (int i = 0; i < kSigmoids; ++i) x[i] = -x[i];
  exp_parts<T, n>(x, scale, fraction);
  // The denominators, and for tanh the numerator.
#pragma GCC unroll 4
  for (int i = 0; i < n; ++i) {
    if (i < kSigmoids) {
      low[i] = scale[i] * fraction[i] + (scale[i] + broadcast<T>(1));
    } else {
      fraction[i] = scale[i] * fraction[i] + (scale[i] - broadcast<T>(1));
      low[i] = fraction[i] + broadcast<T>(2);
    }
  }
#pragma GCC unroll 4
  for (int i = 0; i < kSigmoids; ++i) x[i] = reciprocal<T>(low[i]);
#pragma GCC unroll 4
  for (int i = kSigmoids; i < n; ++i) x[i] = with_sign<T>(quotient<T>(fraction[i], low[i]), signs[i]);
}

template <class T>
inline Vec<T> tanh(Vec<T> x) {
  activate<T, 0, 1>(&x);
  return x;
}

}  // namespace FUSED_RNN_ISA
}  // namespace fused_rnn
