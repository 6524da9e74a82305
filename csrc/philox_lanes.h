// Several Philox blocks side by side, in the vector registers of the instruction set this file is compiled for.
//
// A 32-bit word sits in the low half of a 64-bit lane. The widening multiply reads low halves only, so whatever gathers
// in the upper halves is never cleared and a round is two multiplies, two shifts and four exclusive-ors, with no
// shuffles; compilers turn the same loop over 32-bit words into shuffles that cost more than the multiplies.
#pragma once

#include "philox.h"

#if defined(__AVX2__) || defined(__AVX512F__)
#include <immintrin.h>
#endif

namespace crd {

#if defined(__AVX512F__)
typedef uint64_t WordLanes __attribute__((vector_size(64)));
static inline WordLanes multiply_low_words(WordLanes a, WordLanes b) {
  return reinterpret_cast<WordLanes>(_mm512_mul_epu32(reinterpret_cast<__m512i>(a), reinterpret_cast<__m512i>(b)));
}
#elif defined(__AVX2__)
typedef uint64_t WordLanes __attribute__((vector_size(32)));
static inline WordLanes multiply_low_words(WordLanes a, WordLanes b) {
  return reinterpret_cast<WordLanes>(_mm256_mul_epu32(reinterpret_cast<__m256i>(a), reinterpret_cast<__m256i>(b)));
}
#else
typedef uint64_t WordLanes __attribute__((vector_size(16)));
static inline WordLanes multiply_low_words(WordLanes a, WordLanes b) {
  constexpr uint64_t kLowWord = 0xFFFFFFFFu;
  return WordLanes{(a[0] & kLowWord) * (b[0] & kLowWord), (a[1] & kLowWord) * (b[1] & kLowWord)};
}
#endif

constexpr int kWordLanes = sizeof(WordLanes) / sizeof(uint64_t);

typedef uint32_t LowWords __attribute__((vector_size(sizeof(WordLanes) / 2)));

static inline void store_low_words(WordLanes lanes, uint32_t* target) {
  const LowWords words = __builtin_convertvector(lanes, LowWords);
  __builtin_memcpy(target, &words, sizeof words);
}

// Words of `blocks` consecutive counters (first + i, c1, c2, c3); `blocks` is a multiple of kWordLanes.
static inline void philox_lanes(uint32_t first, uint32_t c1, uint32_t c2, uint32_t c3, uint32_t key0, uint32_t key1,
                                int blocks, uint32_t* w0, uint32_t* w1, uint32_t* w2, uint32_t* w3) {
  const WordLanes multiplier0 = WordLanes{} + kPhiloxMultiplier0;
  const WordLanes multiplier1 = WordLanes{} + kPhiloxMultiplier1;
  WordLanes lane_index{};
  for (int lane = 0; lane < kWordLanes; ++lane) lane_index[lane] = static_cast<uint64_t>(lane);
  for (int block = 0; block < blocks; block += kWordLanes) {
    WordLanes a = lane_index + (first + static_cast<uint32_t>(block));
    WordLanes b = WordLanes{} + c1, c = WordLanes{} + c2, d = WordLanes{} + c3;
    uint32_t round_key0 = key0, round_key1 = key1;
#pragma GCC unroll 10
    for (int round = 0; round < kPhiloxRounds; ++round) {
      const WordLanes product0 = multiply_low_words(a, multiplier0);
      const WordLanes product1 = multiply_low_words(c, multiplier1);
      a = (product1 >> 32) ^ b ^ (WordLanes{} + round_key0);
      b = product1;
      c = (product0 >> 32) ^ d ^ (WordLanes{} + round_key1);
      d = product0;
      round_key0 += kPhiloxKeyStep0;
      round_key1 += kPhiloxKeyStep1;
    }
    store_low_words(a, w0 + block);
    store_low_words(b, w1 + block);
    store_low_words(c, w2 + block);
    store_low_words(d, w3 + block);
  }
}

}  // namespace crd
