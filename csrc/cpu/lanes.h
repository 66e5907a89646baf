// Loops over a row in whole vectors, and their sums.
#pragma once
#include "simd.h"

namespace fxk {
namespace FXK_ISA {
namespace {

// Rows are worked on in whole vectors: what is left of a row after the last multiple of kLanes goes
// through buffers padded with -inf, whose exponentials are 0, and the same vector code.
constexpr int64_t kLanes = 16;

// What a loop computes with: a whole vector by hand, or one number in a loop left to the compiler.
template <class F>
struct Lane {
  using type = F;
};
#if defined(__AVX512F__)
template <>
struct Lane<float> {
  using type = __m512;
};
template <class X>
FXK_INLINE void get(const X* x, __m512* v) {
  *v = load16(x);
}
FXK_INLINE void put(float* x, __m512 v) { _mm512_storeu_ps(x, v); }
#endif
template <class X, class F>
FXK_INLINE void get(const X* x, F* v) {
  *v = load(x);
}
FXK_INLINE void put(float* x, float v) { *x = v; }
FXK_INLINE void put(double* x, double v) { *x = v; }

template <class F>
struct Terms {
  typename Lane<F>::type hard, student, teacher, dot;
};

struct Sums {
  double hard, student, teacher, dot;
};

// Sums of a row: in the lanes' own precision for a run of up to kBlock, then in double.
template <class F>
struct Adder {
  Sums sums = {0, 0, 0, 0};
#if defined(__AVX512F__)
  Terms<F> lanes = {};
  int64_t pending = 0;

  inline __attribute__((always_inline)) void flush() {
    if constexpr (sizeof(typename Lane<F>::type) == 64) {
      sums.hard += _mm512_reduce_add_ps(lanes.hard);
      sums.student += _mm512_reduce_add_ps(lanes.student);
      sums.teacher += _mm512_reduce_add_ps(lanes.teacher);
      sums.dot += _mm512_reduce_add_ps(lanes.dot);
      lanes = Terms<F>{};
      pending = 0;
    }
  }
#endif

  inline __attribute__((always_inline)) Sums total() {
#if defined(__AVX512F__)
    flush();
#endif
    return sums;
  }
};

// Adds what `body` gives for every position of a run of at most kBlock.
template <class F, class Body>
FXK_INLINE void add_up(int64_t count, Adder<F>* adder, const Body& body) {
#if defined(__AVX512F__)
  if constexpr (sizeof(typename Lane<F>::type) == 64) {
    if (adder->pending + count > kBlock) adder->flush();
    Terms<F> a = adder->lanes;
    for (int64_t j = 0; j < count; j += kLanes) {
      const Terms<F> more = body(j);
      a.hard += more.hard;
      a.student += more.student;
      a.teacher += more.teacher;
      a.dot += more.dot;
    }
    adder->lanes = a;
    adder->pending += count;
    return;
  } else
#endif
  {
    F hard = 0, student = 0, teacher = 0, dot = 0;
#pragma omp simd reduction(+ : hard, student, teacher, dot)
    for (int64_t j = 0; j < count; ++j) {
      const Terms<F> more = body(j);
      hard += more.hard;
      student += more.student;
      teacher += more.teacher;
      dot += more.dot;
    }
    adder->sums.hard += hard;
    adder->sums.student += student;
    adder->sums.teacher += teacher;
    adder->sums.dot += dot;
  }
}

}  // namespace
}  // namespace FXK_ISA
}  // namespace fxk
