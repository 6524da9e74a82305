// Element types of tensors and their exact conversions to and from fp32, written without branches so loops vectorise.
//
// `static inline` for the reason given in philox.h.
#pragma once

#include <cstdint>

#include "philox.h"

namespace crd {

enum class Dtype : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2, kMask = 3 };

static inline float from_bfloat16(uint16_t half) { return float_of(static_cast<uint32_t>(half) << 16); }

static inline uint16_t to_bfloat16(float value) {
  const uint32_t bits = bits_of(value);
  const uint32_t rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;  // nearest, ties to even
  const uint32_t nan = (bits >> 16) | 0x0040u;
  return static_cast<uint16_t>((bits & 0x7FFFFFFFu) > 0x7F800000u ? nan : rounded);
}

static inline float from_float16(uint16_t half) {
  const uint32_t sign = static_cast<uint32_t>(half & 0x8000u) << 16;
  const uint32_t magnitude = static_cast<uint32_t>(half & 0x7FFFu) << 13;
  const uint32_t normal = magnitude + ((127u - 15u) << 23);
  const uint32_t special = magnitude | 0x7F800000u;  // infinity and NaN
  // A subnormal half is its integer mantissa times 2^-24.
  const uint32_t subnormal = bits_of(static_cast<float>(static_cast<int32_t>(half & 0x03FFu)) * 0x1p-24f);
  const uint32_t finite = magnitude < (1u << 23) ? subnormal : normal;
  return float_of(sign | (magnitude >= (31u << 23) ? special : finite));
}

static inline uint16_t to_float16(float value) {
  const uint32_t bits = bits_of(value);
  const uint32_t magnitude = bits & 0x7FFFFFFFu;
  const uint32_t sign = (bits >> 16) & 0x8000u;
  const uint32_t rebased = magnitude - ((127u - 15u) << 23);
  const uint32_t normal = (rebased + 0x0FFFu + ((magnitude >> 13) & 1u)) >> 13;  // ties to even, even into infinity
  // Adding 1/2 shifts a result below 2^-14 so that fp32 addition itself rounds at the subnormal spacing 2^-24.
  const uint32_t subnormal = bits_of(float_of(magnitude) + 0.5f) - bits_of(0.5f);
  const uint32_t nan = 0x7E00u | ((magnitude >> 13) & 0x01FFu);
  uint32_t result = magnitude < (113u << 23) ? subnormal : normal;
  result = magnitude >= (143u << 23) ? 0x7C00u : result;  // 65536 and above
  result = magnitude > 0x7F800000u ? nan : result;
  return static_cast<uint16_t>(sign | result);
}

}  // namespace crd
