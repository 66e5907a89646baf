// A row of student and teacher logits: its pieces, the exponents' shifts, and the first sweep,
// which leaves the exponentials in scratch and their sums.
#pragma once
#include "lanes.h"

namespace fxk {
namespace FXK_ISA {
namespace {

constexpr double kLog2E = 1.4426950408889634, kLn2 = 0.6931471805599453;

// z = (x - shift) * factor. With a fused multiply-add that is one instruction: the product is
// exact, and the rounding of the offset is common to the row, where it cancels against the row's
// sum. Of logits so large that it does not, the shift is taken off first.
template <class F>
struct Exponent {
  F shift, factor, offset;
  bool fused;
  Exponent(F shift_, double factor_, bool fused_)
      : shift(shift_), factor((F)factor_), offset(-shift * factor), fused(fused_) {}
  template <bool kFused, class V>
  inline __attribute__((always_inline)) V of(V x) const {
#if defined(__FMA__)
    if (kFused) return x * factor + offset;
#endif
    return (x - shift) * factor;
  }
  // The shift in effect, that rounding included.
  double exact_shift() const {
#if defined(__FMA__)
    if (fused) return -(double)offset / (double)factor;
#endif
    return (double)shift;
  }
};

template <class F>
struct Exponents {
  Exponent<F> student = {0, 1, true}, teacher = {0, 1, true}, hard = {0, 1, true};
};

// A row in pieces of which each can be loaded as vectors: the head, for the decoupled loss the
// vector that holds the label's class (there at -inf, so that it counts in no sum), what follows,
// and the padded tail. X is the type of the logits; a teacher that is given in another form comes
// as a row of F, and the student with it.
template <class X, class F>
struct Row {
  const X* s;
  const X* t;
  F* exp_student;  // scratch [classes rounded up to kLanes] each
  F* weight;       // w: e^y, or what the divergence weighs e^x with
  F* exp_hard;
  F* ratio;                       // y - x, where a second sweep needs it
  int64_t classes, whole, patch;  // patch: where the label's vector begins, or `whole`
  X tail_s[kLanes], tail_t[kLanes], patch_s[kLanes], patch_t[kLanes];

  // f(s, t, position, count) for every piece.
  template <class Each>
  inline __attribute__((always_inline)) void each(const Each& f) const {
    if (patch > 0) f(s, t, 0, patch);
    if (patch < whole) f(patch_s, patch_t, patch, kLanes);
    const int64_t next = patch + kLanes;
    if (next < whole) f(s + next, t + next, next, whole - next);
    if (whole != classes) f(tail_s, tail_t, whole, kLanes);
  }
};

// Fewer than a vector: by masks where there are some, since memcpy of a length that is not known
// ahead is a call.
template <class X>
FXK_INLINE void copy_some(const X* from, int64_t n, X* to) {
#if defined(__AVX512F__)
  const uint32_t mask = (1u << n) - 1;
  if constexpr (sizeof(X) == 4) {
    _mm512_mask_storeu_ps(to, (__mmask16)mask, _mm512_maskz_loadu_ps((__mmask16)mask, from));
    return;
  } else if constexpr (sizeof(X) == 2) {
    _mm256_mask_storeu_epi16(to, (__mmask16)mask, _mm256_maskz_loadu_epi16((__mmask16)mask, from));
    return;
  }
#endif
  memcpy((void*)to, (const void*)from, sizeof(X) * (size_t)n);
}

template <class X, class F>
FXK_INLINE void cut(Row<X, F>* row, bool soft, int64_t left_out) {
  const int64_t whole = row->whole, rest = row->classes - whole;
  const auto copy = [](const X* from, int64_t n, X* to) {
    for (int64_t j = 0; j < kLanes; ++j) store(to + j, -(F)INFINITY);
    copy_some(from, n, to);
  };
  if (rest) {
    copy(row->s + whole, rest, row->tail_s);
    if (soft) copy(row->t + whole, rest, row->tail_t);
  }
  row->patch = whole;
  if (left_out < 0) return;
  X* s = row->tail_s + (left_out - whole);
  X* t = row->tail_t + (left_out - whole);
  if (left_out < whole) {
    row->patch = left_out & ~(kLanes - 1);
    copy(row->s + row->patch, kLanes, row->patch_s);
    copy(row->t + row->patch, kLanes, row->patch_t);
    s = row->patch_s + (left_out - row->patch);
    t = row->patch_t + (left_out - row->patch);
  }
  store(s, -(F)INFINITY);
  store(t, -(F)INFINITY);
}

// The maximum over a multiple of kLanes, in four independent chains: one would wait for itself.
template <class X, class F>
FXK_INLINE F vector_max(const X* x, int64_t n, F highest) {
  const int64_t quarter = (n / 4) & ~(kLanes - 1);
  F m0 = highest, m1 = m0, m2 = m0, m3 = m0;
#pragma omp simd reduction(max : m0, m1, m2, m3)
  for (int64_t j = 0; j < quarter; ++j) {
    const F a = load(x + j), b = load(x + quarter + j);
    const F c = load(x + 2 * quarter + j), d = load(x + 3 * quarter + j);
    m0 = a > m0 ? a : m0;
    m1 = b > m1 ? b : m1;
    m2 = c > m2 ? c : m2;
    m3 = d > m3 ? d : m3;
  }
  const int64_t rest = (n - 4 * quarter) & ~(kLanes - 1);
  const X* last = x + 4 * quarter;
#pragma omp simd reduction(max : m0)
  for (int64_t j = 0; j < rest; ++j) {
    const F a = load(last + j);
    m0 = a > m0 ? a : m0;
  }
  m0 = m1 > m0 ? m1 : m0;
  m2 = m3 > m2 ? m3 : m2;
  return m2 > m0 ? m2 : m0;
}

template <class X>
FXK_INLINE typename Compute<X>::type first_max(const X* x) {
#if defined(__AVX512F__)
  if constexpr (sizeof(typename Compute<X>::type) == sizeof(float))
    return _mm512_reduce_max_ps(load16(x));
#endif
  return vector_max(x, kLanes, -(typename Compute<X>::type)INFINITY);
}

// The shifts of the exponents: the maxima, or, quickly, the maxima over the first vector. An
// exponential above 1 does no harm; should a sum overflow, the row is done again.
template <class X, class F>
Exponents<F> exponents(const Row<X, F>& row, bool soft, double factor, bool quick, bool fused) {
  F highest = -(F)INFINITY, highest_teacher = highest;
  row.each([&](const X* s, const X* t, int64_t at, int64_t count) {
    if (quick) {
      if (at != 0) return;
      highest = first_max(s);
      if (soft) highest_teacher = first_max(t);
    } else {
      highest = vector_max(s, count, highest);
      if (soft) highest_teacher = vector_max(t, count, highest_teacher);
    }
  });
  const bool nothing = highest == -(F)INFINITY || (soft && highest_teacher == -(F)INFINITY);
  if (quick && nothing) return exponents(row, soft, factor, false, fused);
  // A row without any class: its sums come out as 0.
  if (highest == -(F)INFINITY) highest = 0;
  if (!soft || highest_teacher == -(F)INFINITY) highest_teacher = 0;
  return {{highest, factor, fused}, {highest_teacher, factor, fused}, {highest, kLog2E, fused}};
}

template <int kPower, class V>
FXK_INLINE V power(V soft) {
  if (kPower == 2) return soft * soft;
  if (kPower == 3) return soft * soft * soft;
  if (kPower == 4) return (soft * soft) * (soft * soft);
  return soft;
}

// What the first sweep leaves behind beside the exponentials.
enum Weight : int {
  kNone,   // no soft part
  kPlain,  // w = e^y, dot = sum w (y - x)
  kCross,  // w = x - y, dot = sum e^x w
  kSign,   // w = e^y; `total_variation` follows
  kMixed,  // w = e^y, and y - x beside it; `against_mixture` follows
  kPair    // w = e^y, for correlations: dist.cpp
};

// The JSD measures p and q, as they came out, against the logits' difference: what the exponentials
// of neighbouring values have wrong in common would not cancel there. Nor does it from what is left
// of p and q without their means.
template <int kWeight, class V>
FXK_INLINE V exponential(V z) {
  return kWeight == kMixed || kWeight == kPair ? exp2_closely(z) : exp2_of(z);
}

// kPower: T when it is 1..4, 0 for any other temperature; -1: no hard part.
// kMasked: a class that the weighing distribution does not have adds nothing, whatever the other
// says; without the guard an infinite logit gives 0 * inf.
template <class X, class F, int kPower, int kWeight, bool kMasked, bool kFused>
FXK_INLINE void exponentials(const X* s, const X* t, int64_t count, const Exponents<F>& exponents,
                             F* es, F* w, F* eh, F* ratio, Adder<F>* adder) {
  using V = typename Lane<F>::type;
  // By value: behind a reference, each store could be a change of the factors.
  const Exponents<F> z = exponents;
  add_up<F>(count, adder, [=](int64_t j) __attribute__((always_inline)) {
    Terms<F> terms = {};
    V logit;
    get(s + j, &logit);
    const V x = z.student.template of<kFused>(logit), soft = exponential<kWeight>(x);
    put(es + j, soft);
    terms.student = soft;
    if (kPower > 0) terms.hard = power<kPower>(soft);
    if (kPower == 0) {
      terms.hard = exp2_of(z.hard.template of<kFused>(logit));
      put(eh + j, terms.hard);
    }
    if (kWeight != kNone) {
      V teacher;
      get(t + j, &teacher);
      const V y = z.teacher.template of<kFused>(teacher), p = exponential<kWeight>(y);
      terms.teacher = p;
      if (kWeight == kPlain) terms.dot = p * (kMasked ? unless_zero(p, y - x) : y - x);
      const V apart = kMasked ? unless_zero(soft, x - y) : x - y;
      if (kWeight == kCross) terms.dot = soft * apart;
      put(w + j, kWeight == kCross ? apart : p);
      if (kWeight == kMixed) put(ratio + j, y - x);
    }
    return terms;
  });
}

template <class X, class F, int kPower, int kWeight, bool kMasked, bool kFused>
Sums row_sums(const Row<X, F>& row, const Exponents<F>& z) {
  constexpr bool kGuard = kWeight == kPlain || kWeight == kCross;
  Adder<F> adder;
  row.each([&](const X* s, const X* t, int64_t at, int64_t count) __attribute__((always_inline)) {
    F *es = row.exp_student + at, *w = row.weight + at, *eh = row.exp_hard + at;
    F* ratio = row.ratio + at;
    if (s != row.s + at) {  // patch and tail hold -inf
      exponentials<X, F, kPower, kWeight, kGuard, kFused>(s, t, count, z, es, w, eh, ratio, &adder);
      return;
    }
    for (int64_t j = 0; j < count; j += kBlock) {
      const int64_t n = count - j < kBlock ? count - j : kBlock;
      exponentials<X, F, kPower, kWeight, kMasked, kFused>(s + j, t + j, n, z, es + j, w + j,
                                                           eh + j, ratio + j, &adder);
    }
  });
  return adder.total();
}

// With every guard, or as it was.
template <class X, class F, int kPower, int kWeight>
Sums sweep_again(const Row<X, F>& row, const Exponents<F>& z) {
  constexpr bool kGuard = kWeight == kPlain || kWeight == kCross;
  if (z.student.fused) return row_sums<X, F, kPower, kWeight, false, true>(row, z);
  return row_sums<X, F, kPower, kWeight, kGuard, false>(row, z);
}

// A sum by which numbers of the row may be divided, and an offset that is rounded by less than 1.
FXK_INLINE bool sound(double sum) { return sum > 0 && sum < 0x1p45; }
template <class F>
FXK_INLINE bool near_0(F offset) {
  return offset < (F)0x1p22 && offset > (F)-0x1p22;
}

// The sums and what is left in scratch, whatever the logits hold. Exponents are base 2:
// z = (s - shift) log2(e)/T.
template <class X, class F, int kPower, int kWeight>
FXK_INLINE Sums first_sweep(const Row<X, F>& row, double temperature, Exponents<F>* z) {
  constexpr bool kSoft = kWeight != kNone;
  const double factor = kLog2E / (kSoft ? temperature : 1);
#if defined(__AVX512F__)
  const bool quick = sizeof(F) == sizeof(float);
#else
  const bool quick = false;  // these exponentials do not saturate
#endif
  *z = exponents(row, kSoft, factor, quick, true);
  const Sums sums = row_sums<X, F, kPower, kWeight, false, true>(row, *z);
  const bool good = sound(sums.student) && (!kSoft || sound(sums.teacher)) &&
                    (kPower < 0 || sound(sums.hard)) && sums.dot - sums.dot == 0 &&
                    near_0(z->student.offset) && near_0(z->teacher.offset) &&
                    near_0(z->hard.offset);
  if (good) return sums;
  // Infinite logits gave 0 * inf, the quick shift was too low, or the offset too large. All are
  // rare and their guards cost a tenth of the loop, so such rows are done again.
  *z = exponents(row, kSoft, factor, false, false);
  return sweep_again<X, F, kPower, kWeight>(row, *z);
}

}  // namespace
}  // namespace FXK_ISA
}  // namespace fxk
