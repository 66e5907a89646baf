// Labelled pixels, a word of bits at a time, which are neighbours of a row: the labels that are
// among them, and the bits of those that have each.
#pragma once
#include "simd.h"

namespace fxk {
namespace FXK_ISA {
namespace {

constexpr int64_t kWord = 64;  // pixels of a row in a word of bits

// Bit k: labels[k] is `label`. SSE2 is enough: these are bytes, most of the time.
#if defined(__SSE2__)
FXK_INLINE __m128i sixteen(const void* x) { return _mm_loadu_si128((const __m128i*)x); }
FXK_INLINE uint32_t equal16(const uint8_t* labels, uint8_t label) {
  return (uint32_t)_mm_movemask_epi8(_mm_cmpeq_epi8(sixteen(labels), _mm_set1_epi8((char)label)));
}
FXK_INLINE __m128i equal8(const int16_t* labels, int16_t label) {
  return _mm_cmpeq_epi16(sixteen(labels), _mm_set1_epi16(label));
}
FXK_INLINE __m128i equal8(const int32_t* labels, int32_t label) {
  const __m128i wanted = _mm_set1_epi32(label);
  return _mm_packs_epi32(_mm_cmpeq_epi32(sixteen(labels), wanted),
                         _mm_cmpeq_epi32(sixteen(labels + 4), wanted));
}
template <class L>
FXK_INLINE uint32_t equal16(const L* labels, L label) {
  return (uint32_t)_mm_movemask_epi8(
      _mm_packs_epi16(equal8(labels, label), equal8(labels + 8, label)));
}
#else
template <class L>
FXK_INLINE uint32_t equal16(const L* labels, L label) {
  uint32_t bits = 0;
  for (int k = 0; k < 16; ++k) bits |= (uint32_t)(labels[k] == label) << k;
  return bits;
}
#endif

template <class L>
FXK_INLINE uint64_t equal64(const L* labels, L label) {
  uint64_t bits = 0;
  for (int k = 0; k < kWord; k += 16) bits |= (uint64_t)equal16(labels + k, label) << k;
  return bits;
}
#if defined(__AVX512BW__)
FXK_INLINE uint64_t equal64(const uint8_t* labels, uint8_t label) {
  return _mm512_cmpeq_epi8_mask(_mm512_loadu_si512(labels), _mm512_set1_epi8((char)label));
}
#endif

FXK_INLINE int64_t popcount(uint64_t x) {
#if defined(__POPCNT__) || !defined(__x86_64__)
  return __builtin_popcountll(x);
#else
  x -= (x >> 1) & 0x5555555555555555u;
  x = (x & 0x3333333333333333u) + ((x >> 2) & 0x3333333333333333u);
  x = (x + (x >> 4)) & 0x0f0f0f0f0f0f0f0fu;
  return (int64_t)((x * 0x0101010101010101u) >> 56);
#endif
}

// How many bits two runs of words have in common.
FXK_INLINE int64_t common_bits(const uint64_t* a, const uint64_t* b, int64_t count) {
#if defined(__AVX512F__)
  // The instruction that counts a vector's bits is not part of this level: looked up by halves.
  const __m512i low = _mm512_set1_epi8(15);
  const __m512i bits_of_half =
      _mm512_broadcast_i32x4(_mm_setr_epi8(0, 1, 1, 2, 1, 2, 2, 3, 1, 2, 2, 3, 2, 3, 3, 4));
  __m512i total = _mm512_setzero_si512();
  for (int64_t i = 0; i < count; i += 8) {
    const __mmask8 some = (__mmask8)(count - i >= 8 ? 255 : (1 << (count - i)) - 1);
    const __m512i both = _mm512_and_si512(_mm512_maskz_loadu_epi64(some, a + i),
                                          _mm512_maskz_loadu_epi64(some, b + i));
    const __m512i upper = _mm512_and_si512(_mm512_srli_epi16(both, 4), low);
    const __m512i bits =
        _mm512_add_epi8(_mm512_shuffle_epi8(bits_of_half, _mm512_and_si512(both, low)),
                        _mm512_shuffle_epi8(bits_of_half, upper));
    total = _mm512_add_epi64(total, _mm512_sad_epu8(bits, _mm512_setzero_si512()));
  }
  return _mm512_reduce_add_epi64(total);
#else
  int64_t total = 0;
  for (int64_t i = 0; i < count; ++i) total += popcount(a[i] & b[i]);
  return total;
#endif
}

// Calls visit(row, word, label, bits) for every label but 0 in every word of a layer
// [height, width]; false, and no call, where one is not below `count`.
template <class L, class Visit>
FXK_INLINE bool each_label(const L* layer, int64_t height, int64_t width, int64_t count,
                           const Visit& visit) {
  const L* end = layer + height * width;
  L least = 0, most = 0;
#pragma omp simd reduction(min : least) reduction(max : most)
  for (int64_t i = 0; i < height * width; ++i) {
    least = layer[i] < least ? layer[i] : least;
    most = layer[i] > most ? layer[i] : most;
  }
  if (least < 0 || most >= count) return false;
  for (int64_t y = 0; y < height; ++y)
    for (int64_t x = 0; x < width; x += kWord) {
      const L* at = layer + y * width + x;
      L last[kWord];
      if (end - at < kWord) {  // nothing to read behind the layer
        memset(last, 0, sizeof last);
        memcpy(last, at, sizeof(L) * (size_t)(end - at));
        at = last;
      }
      // Behind the row there may be others.
      const uint64_t row = ~(uint64_t)0 >> (width - x < kWord ? kWord - (width - x) : 0);
      uint64_t rest = row & ~equal64(at, (L)0);
      while (rest) {
        const L label = at[__builtin_ctzll(rest)];
        const uint64_t bits = equal64(at, label) & row;
        visit(y, x / kWord, (int64_t)label, bits);
        rest &= ~bits;
      }
    }
  return true;
}

FXK_INLINE bool known(const int64_t* labels, int64_t given, int64_t count) {
  for (int64_t s = 0; s < given; ++s)
    if (labels[s] < 0 || labels[s] >= count) return false;
  return true;
}

// Integers: the sum is the same in whichever order the threads come.
FXK_INLINE void add(int64_t* to, int64_t value, bool shared) {
  if (shared)
    __atomic_fetch_add(to, value, __ATOMIC_RELAXED);
  else
    *to += value;
}

// The first image with an unknown label, whichever thread has found one.
FXK_INLINE void note_image(int64_t* first, int64_t image) {
  int64_t seen = __atomic_load_n(first, __ATOMIC_RELAXED);
  while ((seen < 0 || image < seen) &&
         !__atomic_compare_exchange_n(first, &seen, image, false, __ATOMIC_RELAXED,
                                      __ATOMIC_RELAXED)) {
  }
}

}  // namespace
}  // namespace FXK_ISA
}  // namespace fxk
