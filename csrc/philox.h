// Philox4x32-10 (Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", SC11) and Box-Muller on its words.
//
// Everything is `static inline`: this header is compiled several times with different instruction sets, and a function
// with external linkage would let the linker keep the AVX build of it for machines that have no AVX.
//
// Every rounding is spelled out (explicit fused multiply-adds, contraction off), so all builds give the same bits and a
// GPU kernel that follows the same steps does too.
#pragma once

#include <cstdint>

namespace crd {

struct PhiloxBlock {
  uint32_t word[4];
};

constexpr uint32_t kPhiloxMultiplier0 = 0xD2511F53u;
constexpr uint32_t kPhiloxMultiplier1 = 0xCD9E8D57u;
constexpr uint32_t kPhiloxKeyStep0 = 0x9E3779B9u;  // golden ratio
constexpr uint32_t kPhiloxKeyStep1 = 0xBB67AE85u;  // sqrt(3) - 1
constexpr int kPhiloxRounds = 10;

static inline PhiloxBlock philox4x32(PhiloxBlock counter, uint32_t key0, uint32_t key1) {
  uint32_t c0 = counter.word[0], c1 = counter.word[1], c2 = counter.word[2], c3 = counter.word[3];
#pragma GCC unroll 10
  for (int round = 0; round < kPhiloxRounds; ++round) {
    const uint64_t product0 = static_cast<uint64_t>(kPhiloxMultiplier0) * c0;
    const uint64_t product1 = static_cast<uint64_t>(kPhiloxMultiplier1) * c2;
    c0 = static_cast<uint32_t>(product1 >> 32) ^ c1 ^ key0;
    c1 = static_cast<uint32_t>(product1);
    c2 = static_cast<uint32_t>(product0 >> 32) ^ c3 ^ key1;
    c3 = static_cast<uint32_t>(product0);
    key0 += kPhiloxKeyStep0;
    key1 += kPhiloxKeyStep1;
  }
  return {{c0, c1, c2, c3}};
}

static inline uint32_t bits_of(float value) {
  uint32_t bits;
  __builtin_memcpy(&bits, &value, sizeof bits);
  return bits;
}

static inline float float_of(uint32_t bits) {
  float value;
  __builtin_memcpy(&value, &bits, sizeof value);
  return value;
}

// Minimax coefficients made by csrc/fit_coefficients.py (weighted Lawson fits of values computed to 40 digits, rounded
// to fp32 one power at a time). Relative error of the polynomials in exact arithmetic: log 5.8e-9, sin 4.0e-9,
// cos 4.4e-10; half an fp32 ulp is 6.0e-8.
// Measured over every word, relative, in units of 2^-24: radius 1.64 (0.97 ulp), sine and cosine 1.20 (0.86 ulp). With
// the rounding of their product a normal is within 3.84 ulp of the fp64 formula; over 4e7 draws the worst is 2.5 ulp.
// -2 ln(1 + f) = -2 f + f^2 + f^3 (kLog0 + kLog1 f + ...)      for 1 + f in [sqrt(1/2), sqrt(2))
// sin(2 pi t)  = 2 pi t + t^3 (kSin0 + kSin1 t^2 + ...)        for |t| <= 1/8
// cos(2 pi t)  = 1 + t^2 (kCos0 + kCos1 t^2 + ...)             for |t| <= 1/8
constexpr float kLog0 = -0x1.555554p-1f;
constexpr float kLog1 = 0x1.000226p-1f;
constexpr float kLog2 = -0x1.99a01cp-2f;
constexpr float kLog3 = 0x1.54728ap-2f;
constexpr float kLog4 = -0x1.22d92ep-2f;
constexpr float kLog5 = 0x1.0d8242p-2f;
constexpr float kLog6 = -0x1.055ec6p-2f;
constexpr float kLog7 = 0x1.38c9dep-3f;
constexpr float kMinusTwoLn2High = -0x1.62e430p+0f;
constexpr float kMinusTwoLn2Low = 0x1.05c610p-28f;
constexpr float kSin0 = -0x1.4abbbep+5f;
constexpr float kSin1 = 0x1.465facp+6f;
constexpr float kSin2 = -0x1.2db5ccp+6f;
constexpr float kTwoPiHigh = 0x1.921fb6p+2f;
constexpr float kTwoPiLow = -0x1.777a5cp-23f;
constexpr float kCos0 = -0x1.3bd3ccp+4f;
constexpr float kCos1 = 0x1.03c1b0p+6f;
constexpr float kCos2 = -0x1.55b2b4p+6f;
constexpr float kCos3 = 0x1.d4f632p+5f;

// sqrt(-2 ln u) for u = ((word >> 9) + 1/2) 2^-23, which is the odd integer (word >> 8) | 1 times 2^-24.
static inline float box_muller_radius(uint32_t word) {
  const uint32_t bits = bits_of(static_cast<float>(static_cast<int32_t>((word >> 8) | 1u)));
  // Subtracting the bits of sqrt(1/2) makes the exponent field change where the mantissa passes sqrt(2).
  constexpr uint32_t kSqrtHalfBits = 0x3F3504F3u;
  const uint32_t shifted = bits - kSqrtHalfBits;
  const int32_t exponent = static_cast<int32_t>(shifted) >> 23;
  const float f = float_of((shifted & 0x007FFFFFu) + kSqrtHalfBits) - 1.0f;  // exact
  const float e = static_cast<float>(exponent - 24);                        // in [-24, 0]
  float p = __builtin_fmaf(kLog7, f, kLog6);
  p = __builtin_fmaf(p, f, kLog5);
  p = __builtin_fmaf(p, f, kLog4);
  p = __builtin_fmaf(p, f, kLog3);
  p = __builtin_fmaf(p, f, kLog2);
  p = __builtin_fmaf(p, f, kLog1);
  p = __builtin_fmaf(p, f, kLog0);
  p = __builtin_fmaf(p, f, 1.0f);
  const float tail = __builtin_fmaf(p, f * f, e * kMinusTwoLn2Low);
  const float log = __builtin_fmaf(e, kMinusTwoLn2High, __builtin_fmaf(-2.0f, f, tail));
  return __builtin_sqrtf(log);
}

// (radius cos, radius sin) of 2 pi turn for turn = (word >> 8) 2^-24. The turn is reduced to the nearest quarter on the
// integer, so the polynomial's argument is exact and the zeros of both functions are exact zeros.
static inline void box_muller_pair(float radius, uint32_t word, float* even, float* odd) {
  const uint32_t turn = word >> 8;
  const uint32_t quarter = (turn + (1u << 21)) >> 22;                          // 0..4
  const int32_t remainder = static_cast<int32_t>(turn - (quarter << 22));      // [-2^21, 2^21]
  const float t = static_cast<float>(remainder) * 0x1p-24f;                    // [-1/8, 1/8], exact
  const float s = t * t;
  const float sin_tail = __builtin_fmaf(__builtin_fmaf(__builtin_fmaf(kSin2, s, kSin1), s, kSin0), s, kTwoPiLow);
  const float sine = __builtin_fmaf(t, kTwoPiHigh, t * sin_tail);
  const float cos_tail = __builtin_fmaf(__builtin_fmaf(__builtin_fmaf(kCos3, s, kCos2), s, kCos1), s, kCos0);
  const float cosine = __builtin_fmaf(cos_tail, s, 1.0f);
  const uint32_t swap = 0u - (quarter & 1u);  // all ones in the odd quarters, where sine and cosine trade places
  const uint32_t sine_bits = bits_of(sine), cosine_bits = bits_of(cosine);
  const uint32_t x = (cosine_bits & ~swap) | (sine_bits & swap);
  const uint32_t y = (sine_bits & ~swap) | (cosine_bits & swap);
  *even = radius * float_of(x ^ (((quarter + 1u) & 2u) << 30));  // cosine is negated in quarters 1 and 2
  *odd = radius * float_of(y ^ ((quarter & 2u) << 30));          // sine in quarters 2 and 3
}

// Four standard normals from one Philox block: words (0, 1) give elements 0 and 1, words (2, 3) give 2 and 3.
static inline void box_muller(const PhiloxBlock& block, float* z0, float* z1, float* z2, float* z3) {
  box_muller_pair(box_muller_radius(block.word[0]), block.word[1], z0, z1);
  box_muller_pair(box_muller_radius(block.word[2]), block.word[3], z2, z3);
}

}  // namespace crd
