// Up-sampled rows against a threshold, sixteen pixels at a time, into bits. Sources that include
// this are compiled without contraction, so that every machine rounds alike.
#pragma once
#include "simd.h"

namespace fxk {
namespace FXK_ISA {
namespace {

constexpr int64_t kGroup = 16;  // pixels

template <class S, class F>
FXK_INLINE bool any_above(const S* x, int64_t count, F threshold) {
  int any = 0;
#pragma omp simd reduction(| : any)
  for (int64_t k = 0; k < count; ++k) any |= load(x + k) > threshold;
  return any;
}
#if defined(__AVX512F__)
FXK_INLINE bool any_above(const float* x, int64_t count, float threshold) {
  const __m512 limit = _mm512_set1_ps(threshold);
  uint32_t any = 0;
  for (int64_t k = 0; k < count; k += 16) {
    const __mmask16 some = (__mmask16)(count - k < 16 ? (1u << (count - k)) - 1 : 0xffffu);
    const __m512 values = _mm512_maskz_loadu_ps(some, x + k);
    any |= _mm512_mask_cmp_ps_mask(some, values, limit, _CMP_GT_OQ);
  }
  return any;
}
#endif

// Sixteen pixels' values in all rows between two: bit k of above(part, threshold), where pixel k is
// above the threshold in the row that is that part of the way down.
template <class F>
struct Between {
  F a[kGroup], step[kGroup];
  FXK_INLINE Between of(const F* top, const F* bottom) {
    Between between;
    for (int k = 0; k < kGroup; ++k) {
      between.a[k] = top[k];
      between.step[k] = bottom[k] - top[k];
    }
    return between;
  }
  uint32_t __attribute__((always_inline)) above(F part, F threshold) const {
    uint32_t bits = 0;
    for (int k = 0; k < kGroup; ++k) bits |= (uint32_t)(a[k] + part * step[k] > threshold) << k;
    return bits;
  }
};

#if defined(__AVX512F__)
template <>
struct Between<float> {
  __m512 a, step;
  FXK_INLINE Between of(const float* top, const float* bottom) {
    const __m512 a = _mm512_loadu_ps(top);
    return {a, _mm512_sub_ps(_mm512_loadu_ps(bottom), a)};
  }
  uint32_t __attribute__((always_inline)) above(float part, float threshold) const {
    const __m512 value = _mm512_add_ps(a, _mm512_mul_ps(_mm512_set1_ps(part), step));
    return _mm512_cmp_ps_mask(value, _mm512_set1_ps(threshold), _CMP_GT_OQ);
  }
};
#elif defined(__AVX2__)
template <>
struct Between<float> {
  __m256 a[2], step[2];
  FXK_INLINE Between of(const float* top, const float* bottom) {
    const __m256 a = _mm256_loadu_ps(top), b = _mm256_loadu_ps(top + 8);
    return {
        {a, b},
        {_mm256_sub_ps(_mm256_loadu_ps(bottom), a), _mm256_sub_ps(_mm256_loadu_ps(bottom + 8), b)}};
  }
  uint32_t __attribute__((always_inline)) above(float part, float threshold) const {
    const __m256 down = _mm256_set1_ps(part), limit = _mm256_set1_ps(threshold);
    uint32_t bits = 0;
    for (int k = 0; k < 2; ++k) {
      const __m256 value = _mm256_add_ps(a[k], _mm256_mul_ps(down, step[k]));
      bits |= (uint32_t)_mm256_movemask_ps(_mm256_cmp_ps(value, limit, _CMP_GT_OQ)) << 8 * k;
    }
    return bits;
  }
};
#elif defined(__SSE2__)
template <>
struct Between<float> {
  __m128 a[4], step[4];
  FXK_INLINE Between of(const float* top, const float* bottom) {
    Between between;
    for (int k = 0; k < 4; ++k) {
      between.a[k] = _mm_loadu_ps(top + 4 * k);
      between.step[k] = _mm_sub_ps(_mm_loadu_ps(bottom + 4 * k), between.a[k]);
    }
    return between;
  }
  uint32_t __attribute__((always_inline)) above(float part, float threshold) const {
    const __m128 down = _mm_set1_ps(part), limit = _mm_set1_ps(threshold);
    uint32_t bits = 0;
    for (int k = 0; k < 4; ++k) {
      const __m128 value = _mm_add_ps(a[k], _mm_mul_ps(down, step[k]));
      bits |= (uint32_t)_mm_movemask_ps(_mm_cmpgt_ps(value, limit)) << 4 * k;
    }
    return bits;
  }
};
#endif

// A word for each of `count` rows between `top` and `bottom`: `groups` of them from bit `shift` on.
template <int groups, class F>
FXK_INLINE void mark_groups(const F* top, const F* bottom, const F* down, int64_t count,
                            F threshold, int64_t shift, uint64_t* to) {
  Between<F> between[groups];
  for (int g = 0; g < groups; ++g)
    between[g] = Between<F>::of(top + g * kGroup, bottom + g * kGroup);
  for (int64_t y = 0; y < count; ++y) {
    uint64_t bits = 0;
    for (int g = 0; g < groups; ++g)
      bits |= (uint64_t)between[g].above(down[y], threshold) << g * kGroup;
    to[y] = bits << shift;
  }
}

template <class F>
FXK_INLINE void mark_rows(const F* top, const F* bottom, const F* down, int64_t count, F threshold,
                          int64_t groups, int64_t shift, uint64_t* to) {
  switch (groups) {
    case 1: return mark_groups<1>(top, bottom, down, count, threshold, shift, to);
    case 2: return mark_groups<2>(top, bottom, down, count, threshold, shift, to);
    case 3: return mark_groups<3>(top, bottom, down, count, threshold, shift, to);
    default: return mark_groups<4>(top, bottom, down, count, threshold, shift, to);
  }
}

}  // namespace
}  // namespace FXK_ISA
}  // namespace fxk
