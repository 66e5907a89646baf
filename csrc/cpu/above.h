// Up-sampled rows against a threshold, sixteen pixels at a time, into bits. Sources that include
// this are compiled without contraction, so that every machine rounds alike.
#pragma once
#include "simd.h"

namespace fxk {
namespace FXK_ISA {
namespace {

constexpr int64_t kGroup = 16;    // pixels
constexpr int64_t kQuarters = 4;  // groups of a word

typedef uint16_t Bits16 __attribute__((may_alias));

// For each of `count` rows of sixteen pixels between `top` and `bottom`: bit k where the value is
// above the threshold, stored a word after the other.
template <class F>
FXK_INLINE void mark16(const F* top, const F* bottom, const F* down, int64_t count, F threshold,
                       Bits16* to) {
  for (int64_t y = 0; y < count; ++y) {
    uint32_t bits = 0;
    for (int k = 0; k < kGroup; ++k) {
      const F value = top[k] + down[y] * (bottom[k] - top[k]);
      bits |= (uint32_t)(value > threshold) << k;
    }
    to[y * kQuarters] = (uint16_t)bits;
  }
}

#if defined(__AVX512F__)
FXK_INLINE void mark16(const float* top, const float* bottom, const float* down, int64_t count,
                       float threshold, Bits16* to) {
  const __m512 a = _mm512_loadu_ps(top), step = _mm512_loadu_ps(bottom) - a;
  const __m512 limit = _mm512_set1_ps(threshold);
  for (int64_t y = 0; y < count; ++y) {
    const __m512 value = _mm512_add_ps(a, _mm512_mul_ps(_mm512_set1_ps(down[y]), step));
    to[y * kQuarters] = _mm512_cmp_ps_mask(value, limit, _CMP_GT_OQ);
  }
}
#elif defined(__AVX2__)
FXK_INLINE void mark16(const float* top, const float* bottom, const float* down, int64_t count,
                       float threshold, Bits16* to) {
  const __m256 limit = _mm256_set1_ps(threshold);
  const __m256 a = _mm256_loadu_ps(top), b = _mm256_loadu_ps(top + 8);
  const __m256 a_step = _mm256_loadu_ps(bottom) - a, b_step = _mm256_loadu_ps(bottom + 8) - b;
  for (int64_t y = 0; y < count; ++y) {
    const __m256 part = _mm256_set1_ps(down[y]);
    const __m256 left = _mm256_add_ps(a, _mm256_mul_ps(part, a_step));
    const __m256 right = _mm256_add_ps(b, _mm256_mul_ps(part, b_step));
    const int low = _mm256_movemask_ps(_mm256_cmp_ps(left, limit, _CMP_GT_OQ));
    const int high = _mm256_movemask_ps(_mm256_cmp_ps(right, limit, _CMP_GT_OQ));
    to[y * kQuarters] = (uint16_t)(low | high << 8);
  }
}
#elif defined(__SSE2__)
FXK_INLINE void mark16(const float* top, const float* bottom, const float* down, int64_t count,
                       float threshold, Bits16* to) {
  const __m128 limit = _mm_set1_ps(threshold);
  for (int64_t y = 0; y < count; ++y) {
    const __m128 part = _mm_set1_ps(down[y]);
    int bits = 0;
    for (int k = 0; k < kGroup; k += 4) {
      const __m128 a = _mm_loadu_ps(top + k), step = _mm_loadu_ps(bottom + k) - a;
      const __m128 value = _mm_add_ps(a, _mm_mul_ps(part, step));
      bits |= _mm_movemask_ps(_mm_cmpgt_ps(value, limit)) << k;
    }
    to[y * kQuarters] = (uint16_t)bits;
  }
}
#endif

}  // namespace
}  // namespace FXK_ISA
}  // namespace fxk
