// unit_counts, unit_values: how many of each unit's values fall into each step of a window, and
// which values are in a window, in the order of their keys. A key is a number's bits, those after
// the sign turned over where it is negative: a signed integer in the order of the numbers.
#include "simd.h"

namespace fxk {
namespace FXK_ISA {
namespace {

constexpr int64_t kUnits = 64;  // that are read together, at most
constexpr int kPart = 16;       // that are passed over together
constexpr int64_t kLine = 256;  // values of a unit that are looked at together

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

// The keys from `low` to `low + reach` that are a number's; NaN has those beyond both infinities.
template <class S>
struct Window {
  using K = typename Key<S>::type;
  using D = typename Key<S>::distance;
  D first, extent, skipped;  // skipped: from `low` to the first
  bool none;

  static inline __attribute__((always_inline)) Window over(int64_t low, D reach) {
    constexpr K kFirst = (K)(-Key<S>::infinity - 1), kLast = Key<S>::infinity;
    const K start = (K)low;
    const D room = (D)kLast - (D)start, span = reach < room ? reach : room;
    const D skipped = start < kFirst ? (D)kFirst - (D)start : 0;
    const bool none = start > kLast || span < skipped;
    return {(D)start + skipped, none ? 0 : span - skipped, skipped, none};
  }
};

// Bit k: values[k] is in the window; how far its key is from the first, and whether any is NaN.
template <class S>
FXK_INLINE uint32_t within(const S* values, const Window<S>& window,
                           typename Key<S>::distance* beyond, bool* undefined) {
  using K = typename Key<S>::type;
  using D = typename Key<S>::distance;
  const D first = window.first, extent = window.extent;
  int any = 0, bad = 0;
#pragma omp simd reduction(| : any, bad)
  for (int k = 0; k < kPart; ++k) {
    const K bits = bits_of(values + k);
    beyond[k] = key_of<S>(bits) - first;
    any |= beyond[k] <= extent;
    bad |= (K)(bits & Key<S>::most) > Key<S>::infinity;
  }
  *undefined = bad != 0;
  uint32_t inside = 0;
  if (any)
    for (int k = 0; k < kPart; ++k) inside |= (uint32_t)(beyond[k] <= extent) << k;
  return inside;
}

#if defined(__AVX512F__)
FXK_INLINE uint32_t within(const float* values, const Window<float>& window, uint32_t* beyond,
                           bool* undefined) {
  const __m512i bits = _mm512_loadu_si512(values), most = _mm512_set1_epi32(Key<float>::most);
  const __m512i turned = _mm512_and_si512(_mm512_srai_epi32(bits, 31), most);
  const __m512i from_first =
      _mm512_sub_epi32(_mm512_xor_si512(bits, turned), _mm512_set1_epi32((int32_t)window.first));
  _mm512_storeu_si512(beyond, from_first);
  const __m512i infinity = _mm512_set1_epi32(Key<float>::infinity);
  *undefined = _mm512_cmpgt_epi32_mask(_mm512_and_si512(bits, most), infinity) != 0;
  return _mm512_cmple_epu32_mask(from_first, _mm512_set1_epi32((int32_t)window.extent));
}
#endif

// take(distance from the window's first key) for every value of the line in the window; returns how
// many are NaN. Few are in it once the search is under way: a part without any is passed over.
template <class S, class Take>
FXK_INLINE int64_t look_over(const Line<S>& line, const Window<S>& window, const Take& take) {
  using K = typename Key<S>::type;
  using D = typename Key<S>::distance;
  int64_t undefined = 0, begin = 0;
  const auto is_nan = [](const S* x) { return (K)(bits_of(x) & Key<S>::most) > Key<S>::infinity; };
  for (; begin + kPart <= line.count; begin += kPart) {
    D beyond[kPart];
    bool bad;
    uint32_t inside = within(line.values + begin, window, beyond, &bad);
    if (bad)
      for (int k = 0; k < kPart; ++k) undefined += is_nan(line.values + begin + k);
    if (window.none) continue;
    if (inside == (1u << kPart) - 1)
      for (int k = 0; k < kPart; ++k) take(beyond[k]);
    else
      for (; inside != 0; inside &= inside - 1) take(beyond[__builtin_ctz(inside)]);
  }
  for (; begin < line.count; ++begin) {
    const S* x = line.values + begin;
    undefined += is_nan(x);
    const D beyond = key_of<S>(bits_of(x)) - window.first;
    if (beyond <= window.extent && !window.none) take(beyond);
  }
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
          const int64_t room = kLine - line->count, left = a.positions - p;
          const int64_t count = left < room ? left : room;
          S* to = line->values + line->count;
          if (a.stride_p == 1)
            memcpy(to, x + p, sizeof(S) * (size_t)count);
          else
            for (int64_t q = 0; q < count; ++q) to[q] = x[(p + q) * a.stride_p];
          p += count;
          line->count += count;
          if (line->count < kLine) continue;
          line_of(first + k, *line);
          line->count = 0;
        }
      }
    for (int64_t k = 0; k < units; ++k) line_of(first + k, lines[k]);
  }
}

template <class S>
int64_t run(const UnitCountArgs& a, int threads) {
  using D = typename Key<S>::distance;
  const int64_t width = a.shift + a.bits, columns = ((int64_t)1 << a.bits) + 1;
  const D reach = width >= (int64_t)(8 * sizeof(D)) ? ~(D)0 : (D)(((D)1 << width) - 1);
  each_line<S>(a, threads, [&](int64_t unit, const Line<S>& line) {
    int64_t* counts = a.counts + unit * columns;
    const Window<S> window = Window<S>::over(a.low[unit], reach);
    counts[columns - 1] +=
        look_over(line, window, [&](D beyond) { ++counts[(beyond + window.skipped) >> a.shift]; });
  });
  return kOk;
}

template <class S>
int64_t run(const UnitValueArgs& a, int threads) {
  using K = typename Key<S>::type;
  using D = typename Key<S>::distance;
  each_line<S>(a, threads, [&](int64_t unit, const Line<S>& line) {
    if (a.high[unit] < a.low[unit]) return;
    int64_t *keys = a.keys + unit * a.room, *found = a.found + unit;
    const Window<S> window = Window<S>::over(a.low[unit], (D)(K)a.high[unit] - (D)(K)a.low[unit]);
    look_over(line, window, [&](D beyond) {
      if (*found < a.room) keys[*found] = (int64_t)(K)(window.first + beyond);
      ++*found;
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
