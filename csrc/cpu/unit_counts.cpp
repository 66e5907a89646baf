// unit_counts, unit_values: how many of each unit's values fall into each step of a window, and
// which values are in a window, in the order of their keys. A key is a number's bits, those after
// the sign turned over where it is negative: a signed integer in the order of the numbers.
#include "simd.h"

namespace fxk {
namespace FXK_ISA {
namespace {

constexpr int64_t kUnits = 64;   // that are read together, at most
constexpr int kPart = 16;        // that are passed over together
constexpr int64_t kLine = 256;   // values of a unit that are looked at together, at most
constexpr int64_t kEnough = 32;  // neighbours that need not wait for others

template <class S>
struct Key;
template <>
struct Key<float> {
  using type = int32_t;
  using distance = uint32_t;
  static constexpr int32_t infinity = 0x7f800000, most = 0x7fffffff;
};
template <>
struct Key<double> {
  using type = int64_t;
  using distance = uint64_t;
  static constexpr int64_t infinity = 0x7ff0000000000000, most = 0x7fffffffffffffff;
};
template <>
struct Key<BFloat16> {
  using type = int16_t;
  using distance = uint32_t;
  static constexpr int16_t infinity = 0x7f80, most = 0x7fff;
};
template <>
struct Key<Float16> {
  using type = int16_t;
  using distance = uint32_t;
  static constexpr int16_t infinity = 0x7c00, most = 0x7fff;
};

// Values of one unit that wait to be looked at.
template <class S>
struct Line {
  S values[kLine];
  int64_t count;
};

template <class S>
FXK_INLINE typename Key<S>::type bits_of(const S* x) {
  typename Key<S>::type bits;
  memcpy(&bits, x, sizeof bits);
  return bits;
}

template <class S>
FXK_INLINE typename Key<S>::distance key_of(typename Key<S>::type bits) {
  using K = typename Key<S>::type;
  const K turned = (K)(bits >> (8 * sizeof(K) - 1)) & Key<S>::most;
  return (typename Key<S>::distance)(K)(bits ^ turned);
}

// The keys from `low` to `low + reach` that are a number's, in steps of `1 << shift`; NaN has those
// beyond both infinities.
template <class S>
struct Window {
  using K = typename Key<S>::type;
  using D = typename Key<S>::distance;
  D first, extent, skipped;  // skipped: from `low` to the first
  int shift;
  bool none;

  static inline __attribute__((always_inline)) Window over(int64_t low, D reach, int64_t shift) {
    constexpr K kFirst = (K)(-Key<S>::infinity - 1), kLast = Key<S>::infinity;
    const K start = (K)low;
    const D room = (D)kLast - (D)start, span = reach < room ? reach : room;
    const D skipped = start < kFirst ? (D)kFirst - (D)start : 0;
    const bool none = start > kLast || span < skipped;
    return {(D)start + skipped, none ? 0 : span - skipped, skipped, (int)shift, none};
  }
};

// The steps of those of `count` values, kPart at most, that are in the window and not zero: their
// number is returned. Zeros are as many as all others where a ReLU has been.
template <class S>
FXK_INLINE int sift(const S* values, int count, const Window<S>& window,
                    typename Key<S>::distance* steps, int64_t* zeros, int64_t* undefined) {
  using K = typename Key<S>::type;
  using D = typename Key<S>::distance;
  const D first = window.first, extent = window.extent, zero = (D)0 - first;
  D beyond[kPart];
  int inside = 0, nothing = 0, bad = 0;
#pragma omp simd reduction(+ : inside, nothing, bad)
  for (int k = 0; k < count; ++k) {
    const K bits = bits_of(values + k);
    beyond[k] = key_of<S>(bits) - first;
    inside += beyond[k] <= extent;
    nothing += bits == 0;
    bad += (K)(bits & Key<S>::most) > Key<S>::infinity;
  }
  *zeros += nothing;
  *undefined += bad;
  if (inside == 0) return 0;  // as mostly once the search is under way
  int at = 0;
  for (int k = 0; k < count; ++k) {
    steps[at] = (beyond[k] + window.skipped) >> window.shift;
    at += (beyond[k] <= extent) & (beyond[k] != zero);
  }
  return at;
}

#if defined(__AVX512F__)
FXK_INLINE int sift(const float* values, int count, const Window<float>& window, uint32_t* steps,
                    int64_t* zeros, int64_t* undefined) {
  const __mmask16 some = (__mmask16)((1u << count) - 1);
  const __m512i bits = _mm512_maskz_loadu_epi32(some, values);
  const __m512i most = _mm512_set1_epi32(Key<float>::most);
  const __m512i turned = _mm512_and_si512(_mm512_srai_epi32(bits, 31), most);
  const __m512i beyond =
      _mm512_sub_epi32(_mm512_xor_si512(bits, turned), _mm512_set1_epi32((int32_t)window.first));
  const __mmask16 other = _mm512_test_epi32_mask(bits, bits);
  *undefined += __builtin_popcount(_mm512_cmpgt_epi32_mask(
      _mm512_and_si512(bits, most), _mm512_set1_epi32(Key<float>::infinity)));
  *zeros += count - __builtin_popcount(other);
  const __mmask16 inside =
      _mm512_mask_cmple_epu32_mask(other, beyond, _mm512_set1_epi32((int32_t)window.extent));
  const __m512i all =
      _mm512_srl_epi32(_mm512_add_epi32(beyond, _mm512_set1_epi32((int32_t)window.skipped)),
                       _mm_cvtsi32_si128(window.shift));
  _mm512_storeu_si512(steps, _mm512_maskz_compress_epi32(inside, all));
  return __builtin_popcount(inside);
}
#endif

// take(step, how many) for those of up to kLine values that are in the window; returns how many are
// NaN.
template <class S, class Take>
FXK_INLINE int64_t look_over(const S* values, int64_t length, const Window<S>& window,
                             const Take& take) {
  using D = typename Key<S>::distance;
  D steps[kLine + kPart];
  int64_t count = 0, zeros = 0, undefined = 0, begin = 0;
  for (; begin + kPart <= length; begin += kPart)
    count += sift(values + begin, kPart, window, steps + count, &zeros, &undefined);
  if (begin < length)
    count += sift(values + begin, (int)(length - begin), window, steps + count, &zeros, &undefined);
  if (window.none) return undefined;
  for (int64_t k = 0; k < count; ++k) take(steps[k], 1);
  const D zero = (D)0 - window.first;
  if (zero <= window.extent && zeros) take((D)(zero + window.skipped) >> window.shift, zeros);
  return undefined;
}

// line(unit, values) for all values of every unit, so many at a time; a unit is one thread's.
template <class S, class Args, class Do>
FXK_INLINE void each_line(const Args& a, int threads, const Do& line_of) {
  // As many together as leave something to every thread: their values are neighbours in memory.
  const int64_t share = (a.units + threads - 1) / threads;
  const int64_t tile_units = share < 8 ? 8 : share < kUnits ? share : kUnits;
  const int64_t tiles = (a.units + tile_units - 1) / tile_units;
  const int n_threads = useful_threads(threads, a.n * a.units * a.positions, tiles);
#pragma omp parallel for num_threads(n_threads) if (n_threads > 1) schedule(static)
  for (int64_t tile = 0; tile < tiles; ++tile) {
    const int64_t first = tile * tile_units;
    const int64_t units = a.units - first < tile_units ? a.units - first : tile_units;
    Line<S> lines[kUnits];
    for (int64_t k = 0; k < units; ++k) lines[k].count = 0;
    for (int64_t image = 0; image < a.n; ++image)
      for (int64_t k = 0; k < units; ++k) {
        Line<S>* line = lines + k;
        const S* x =
            static_cast<const S*>(a.activations) + image * a.stride_n + (first + k) * a.stride_c;
        // The next image's begin too far away for the processor to expect them.
        if (a.stride_p == 1 && image + 1 < a.n && a.positions * (int64_t)sizeof(S) <= 1024)
          for (int64_t p = 0; p < a.positions; p += 64 / (int64_t)sizeof(S))
            __builtin_prefetch(x + a.stride_n + p);
        for (int64_t p = 0; p < a.positions;) {
          const int64_t left = a.positions - p;
          if (a.stride_p == 1 && left >= kEnough) {  // where they lie
            const int64_t count = left < kLine ? left : kLine;
            line_of(first + k, x + p, count);
            p += count;
            continue;
          }
          const int64_t room = kLine - line->count, count = left < room ? left : room;
          S* to = line->values + line->count;
          for (int64_t q = 0; q < count; ++q) to[q] = x[(p + q) * a.stride_p];
          p += count;
          line->count += count;
          if (line->count < kLine) continue;
          line_of(first + k, line->values, kLine);
          line->count = 0;
        }
      }
    for (int64_t k = 0; k < units; ++k) line_of(first + k, lines[k].values, lines[k].count);
  }
}

template <class S>
int64_t run(const UnitCountArgs& a, int threads) {
  using D = typename Key<S>::distance;
  const int64_t width = a.shift + a.bits, columns = ((int64_t)1 << a.bits) + 1;
  const D reach = width >= (int64_t)(8 * sizeof(D)) ? ~(D)0 : (D)(((D)1 << width) - 1);
  each_line<S>(a, threads, [&](int64_t unit, const S* values, int64_t length) {
    int64_t* counts = a.counts + unit * columns;
    const Window<S> window = Window<S>::over(a.low[unit], reach, a.shift);
    counts[columns - 1] +=
        look_over(values, length, window, [=](D step, int64_t times) { counts[step] += times; });
  });
  return kOk;
}

template <class S>
int64_t run(const UnitValueArgs& a, int threads) {
  using K = typename Key<S>::type;
  using D = typename Key<S>::distance;
  each_line<S>(a, threads, [&](int64_t unit, const S* values, int64_t length) {
    if (a.high[unit] < a.low[unit]) return;
    const D low = (D)(K)a.low[unit];
    int64_t *keys = a.keys + unit * a.room, *found = a.found + unit;
    const Window<S> window = Window<S>::over(a.low[unit], (D)(K)a.high[unit] - low, 0);
    look_over(values, length, window, [&](D step, int64_t times) {
      for (int64_t k = *found; k < *found + times && k < a.room; ++k)
        keys[k] = (int64_t)(K)(low + step);
      *found += times;
    });
  });
  return kOk;
}

}  // namespace

int64_t unit_counts(const UnitCountArgs& a, int threads) {
  switch (a.dtype) {
    case kFloat32: return run<float>(a, threads);
    case kFloat64: return run<double>(a, threads);
    case kBFloat16: return run<BFloat16>(a, threads);
    default: return run<Float16>(a, threads);
  }
}

int64_t unit_values(const UnitValueArgs& a, int threads) {
  switch (a.dtype) {
    case kFloat32: return run<float>(a, threads);
    case kFloat64: return run<double>(a, threads);
    case kBFloat16: return run<BFloat16>(a, threads);
    default: return run<Float16>(a, threads);
  }
}

}  // namespace FXK_ISA
}  // namespace fxk
