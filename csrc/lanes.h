// Sixteen fp32 values side by side, in the vector registers of the instruction set this file is compiled for.
//
// Each operation rounds as its scalar counterpart in element.h does, so every build gives the same bits. `finite` sets
// all bits of the lanes that are neither infinite nor NaN, none of the others. `static inline` and unnamed namespaces
// for the reason given in philox.h.
#pragma once

#include <cstdint>
#include <limits>

#include "element.h"

#if defined(__AVX2__) || defined(__AVX512F__)
#include <immintrin.h>
#endif

namespace crd {

constexpr int kLanes = 16;
constexpr float kLargest = std::numeric_limits<float>::max();

namespace {

#if defined(__AVX512F__)

struct Lanes {
  __m512 v;
};

static inline Lanes splat(float value) { return {_mm512_set1_ps(value)}; }
static inline Lanes splat_bits(uint32_t bits) { return {_mm512_castsi512_ps(_mm512_set1_epi32(static_cast<int>(bits)))}; }
static inline Lanes load_lanes(const float* source) { return {_mm512_loadu_ps(source)}; }
static inline void store_lanes(Lanes a, float* target) { _mm512_storeu_ps(target, a.v); }
static inline Lanes operator-(Lanes a, Lanes b) { return {_mm512_sub_ps(a.v, b.v)}; }
static inline Lanes operator+(Lanes a, Lanes b) { return {_mm512_add_ps(a.v, b.v)}; }
static inline Lanes operator*(Lanes a, Lanes b) { return {_mm512_mul_ps(a.v, b.v)}; }
static inline Lanes operator&(Lanes a, Lanes b) { return {_mm512_and_ps(a.v, b.v)}; }
static inline Lanes fused(Lanes a, Lanes b, Lanes c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
static inline Lanes finite(Lanes a) {
  const __mmask16 kept = _mm512_cmp_ps_mask(_mm512_abs_ps(a.v), _mm512_set1_ps(kLargest), _CMP_LE_OQ);
  return {_mm512_castsi512_ps(_mm512_movm_epi32(kept))};
}

static inline Lanes load_bfloat16(const uint16_t* source) {
  const __m512i words = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(source)));
  return {_mm512_castsi512_ps(_mm512_slli_epi32(words, 16))};
}
static inline void store_bfloat16(Lanes a, uint16_t* target) {
  const __m512i bits = _mm512_castps_si512(a.v);
  const __m512i high = _mm512_srli_epi32(bits, 16);
  const __m512i odd = _mm512_and_si512(high, _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_srli_epi32(_mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7FFF)), odd), 16);
  const __mmask16 nan = _mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q);
  const __m512i result = _mm512_mask_or_epi32(rounded, nan, high, _mm512_set1_epi32(0x40));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(target), _mm512_cvtepi32_epi16(result));
}
static inline Lanes load_float16(const uint16_t* source) {
  return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(source)))};
}
static inline void store_float16(Lanes a, uint16_t* target) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(target), _mm512_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}

#elif defined(__AVX2__)

struct Lanes {
  __m256 low, high;
};

static inline Lanes splat(float value) { return {_mm256_set1_ps(value), _mm256_set1_ps(value)}; }
static inline Lanes splat_bits(uint32_t bits) {
  const __m256 half = _mm256_castsi256_ps(_mm256_set1_epi32(static_cast<int>(bits)));
  return {half, half};
}
static inline Lanes load_lanes(const float* source) { return {_mm256_loadu_ps(source), _mm256_loadu_ps(source + 8)}; }
static inline void store_lanes(Lanes a, float* target) {
  _mm256_storeu_ps(target, a.low);
  _mm256_storeu_ps(target + 8, a.high);
}
static inline Lanes operator-(Lanes a, Lanes b) { return {_mm256_sub_ps(a.low, b.low), _mm256_sub_ps(a.high, b.high)}; }
static inline Lanes operator+(Lanes a, Lanes b) { return {_mm256_add_ps(a.low, b.low), _mm256_add_ps(a.high, b.high)}; }
static inline Lanes operator*(Lanes a, Lanes b) { return {_mm256_mul_ps(a.low, b.low), _mm256_mul_ps(a.high, b.high)}; }
static inline Lanes operator&(Lanes a, Lanes b) { return {_mm256_and_ps(a.low, b.low), _mm256_and_ps(a.high, b.high)}; }
static inline Lanes fused(Lanes a, Lanes b, Lanes c) {
  return {_mm256_fmadd_ps(a.low, b.low, c.low), _mm256_fmadd_ps(a.high, b.high, c.high)};
}
static inline __m256 half_finite(__m256 a) {
  const __m256 magnitude = _mm256_and_ps(a, _mm256_castsi256_ps(_mm256_set1_epi32(0x7FFFFFFF)));
  return _mm256_cmp_ps(magnitude, _mm256_set1_ps(kLargest), _CMP_LE_OQ);
}
static inline Lanes finite(Lanes a) { return {half_finite(a.low), half_finite(a.high)}; }

static inline __m256 half_load_bfloat16(const uint16_t* source) {
  const __m256i words = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(source)));
  return _mm256_castsi256_ps(_mm256_slli_epi32(words, 16));
}
static inline Lanes load_bfloat16(const uint16_t* source) {
  return {half_load_bfloat16(source), half_load_bfloat16(source + 8)};
}
static inline __m256i half_to_bfloat16(__m256 a) {
  const __m256i bits = _mm256_castps_si256(a);
  const __m256i high = _mm256_srli_epi32(bits, 16);
  const __m256i odd = _mm256_and_si256(high, _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_srli_epi32(_mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7FFF)), odd), 16);
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(a, a, _CMP_UNORD_Q));
  return _mm256_blendv_epi8(rounded, _mm256_or_si256(high, _mm256_set1_epi32(0x40)), nan);
}
static inline void store_bfloat16(Lanes a, uint16_t* target) {
  const __m256i packed = _mm256_packus_epi32(half_to_bfloat16(a.low), half_to_bfloat16(a.high));  // 0 4 | 2 6 by quarters
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(target), _mm256_permute4x64_epi64(packed, 0xD8));
}
static inline Lanes load_float16(const uint16_t* source) {
  return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(source))),
          _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(source + 8)))};
}
static inline void store_float16(Lanes a, uint16_t* target) {
  constexpr int kNearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  _mm_storeu_si128(reinterpret_cast<__m128i*>(target), _mm256_cvtps_ph(a.low, kNearest));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(target + 8), _mm256_cvtps_ph(a.high, kNearest));
}

#else

struct Lanes {
  float v[kLanes];
};

template <class Function>
static inline Lanes each_lane(Function function) {
  Lanes result;
  for (int lane = 0; lane < kLanes; ++lane) result.v[lane] = function(lane);
  return result;
}

static inline Lanes splat(float value) { return each_lane([&](int) { return value; }); }
static inline Lanes splat_bits(uint32_t bits) { return splat(float_of(bits)); }
static inline Lanes load_lanes(const float* source) { return each_lane([&](int i) { return source[i]; }); }
static inline void store_lanes(const Lanes& a, float* target) {
  for (int lane = 0; lane < kLanes; ++lane) target[lane] = a.v[lane];
}
static inline Lanes operator-(const Lanes& a, const Lanes& b) { return each_lane([&](int i) { return a.v[i] - b.v[i]; }); }
static inline Lanes operator+(const Lanes& a, const Lanes& b) { return each_lane([&](int i) { return a.v[i] + b.v[i]; }); }
static inline Lanes operator*(const Lanes& a, const Lanes& b) { return each_lane([&](int i) { return a.v[i] * b.v[i]; }); }
static inline Lanes operator&(const Lanes& a, const Lanes& b) {
  return each_lane([&](int i) { return float_of(bits_of(a.v[i]) & bits_of(b.v[i])); });
}
static inline Lanes fused(const Lanes& a, const Lanes& b, const Lanes& c) {
  return each_lane([&](int i) { return __builtin_fmaf(a.v[i], b.v[i], c.v[i]); });
}
static inline Lanes finite(const Lanes& a) {
  return each_lane([&](int i) { return float_of((bits_of(a.v[i]) & 0x7F800000u) != 0x7F800000u ? 0xFFFFFFFFu : 0u); });
}

static inline Lanes load_bfloat16(const uint16_t* source) {
  return each_lane([&](int i) { return from_bfloat16(source[i]); });
}
static inline void store_bfloat16(const Lanes& a, uint16_t* target) {
  for (int lane = 0; lane < kLanes; ++lane) target[lane] = to_bfloat16(a.v[lane]);
}
static inline Lanes load_float16(const uint16_t* source) {
  return each_lane([&](int i) { return from_float16(source[i]); });
}
static inline void store_float16(const Lanes& a, uint16_t* target) {
  for (int lane = 0; lane < kLanes; ++lane) target[lane] = to_float16(a.v[lane]);
}

#endif

static inline Lanes absolute(Lanes a) { return a & splat_bits(0x7FFFFFFFu); }

}  // namespace
}  // namespace crd
