// The hard part of a row, and its gradient, written once.
#pragma once
#include "rows.h"

namespace fxk {
namespace FXK_ISA {
namespace {

// Gradients from this size on are written past the caches; none of today's would hold them.
constexpr int64_t kStreamBytes = (int64_t)64 << 20;

template <class F>
struct Slope {
  F on_hard, on_student, on_weight;
};

// on_hard e^s + on_student e^x + on_weight w, or on_hard e^s + on_weight e^x (w - on_student); one
// e^x is taken out.
template <class F, int kPower, int kWeight>
FXK_INLINE F slope_at(F es, F w, F eh, const Slope<F>& slope) {
  F g = 0;
  if (kWeight == kPlain) g = slope.on_student;
  if (kWeight != kNone && kWeight != kPlain) g = slope.on_weight * (w - slope.on_student);
  if (kPower == 1) g += slope.on_hard;
  if (kPower == 2) g += slope.on_hard * es;
  if (kPower == 3) g += slope.on_hard * (es * es);
  if (kPower == 4) g += (slope.on_hard * es) * (es * es);
  g *= es;
  if (kPower == 0) g += slope.on_hard * eh;
  if (kWeight == kPlain) g += slope.on_weight * w;
  return g;
}

template <class S, class F, int kPower, int kWeight>
FXK_INLINE void gradient(const F* es, const F* w, const F* eh, int64_t count, const Slope<F>& slope,
                         S* grad) {
#pragma omp simd
  for (int64_t j = 0; j < count; ++j)
    store(grad + j, slope_at<F, kPower, kWeight>(es[j], kWeight == kNone ? (F)0 : w[j],
                                                 kPower == 0 ? eh[j] : (F)0, slope));
}

FXK_INLINE void stream_fence() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

// Moves finished lines out past the caches: without it each line of a gradient that no cache will
// hold is first read from memory to be overwritten.
template <class S>
FXK_INLINE void stream_out(const S* from, int64_t count, S* to) {
#if defined(__SSE2__)
  constexpr int64_t kEach = 16 / sizeof(S);
  for (int64_t j = 0; j < count; j += kEach)
    _mm_stream_si128((__m128i*)(to + j), _mm_loadu_si128((const __m128i*)(from + j)));
#else
  memcpy((void*)to, (const void*)from, sizeof(S) * (size_t)count);
#endif
}

struct RowLoss {
  double hard, soft;
};

// What the gradients of one row's parts are multiplied with: weights of reduction and row.
struct Scale {
  double hard, soft;
};

// The hard part of a row: its value, and its gradient on_sum softmax(s) - on_label at the label -
// uniform times the classes' weights, before the scale.
struct Hard {
  double loss, on_sum, on_label, uniform;
};

// `shift` and `log_sum`: log sum e^s is their sum.
template <class X, class F>
FXK_INLINE Hard hard_part(const Row<X, F>& row, const KDLossArgs& a, int64_t label, double shift,
                          double log_sum) {
  const double on_label = (double)load(row.s + label) - shift;
  const double weight = (a.class_weight ? a.class_weight[label] : 1.0) * (1.0 - a.label_smoothing);
  Hard hard = {weight * (log_sum - on_label), weight, weight, 0};
  if (a.label_smoothing > 0) {
    double all = 0, weighted = 0;
    for (int64_t j = 0; j < row.classes; ++j) {
      const double w = a.class_weight ? a.class_weight[j] : 1.0;
      all += w;
      weighted += w == 0 ? 0 : w * ((double)load(row.s + j) - shift);
    }
    hard.uniform = a.label_smoothing / (double)row.classes;
    hard.on_sum += all * hard.uniform;
    hard.loss += hard.uniform * (all * log_sum - weighted);
  }
  hard.loss *= a.ce_weight;
  return hard;
}

// `label`: -1, or where `on_label` is added.
template <class S, class X, class F, int kPower, int kWeight>
FXK_INLINE void write_gradient(const Row<X, F>& row, const KDLossArgs& a, const Slope<F>& slope,
                               F uniform, int64_t label, double on_label, S* grad) {
  const int64_t n = row.classes, whole = row.whole;
  const F *es = row.exp_student, *w = row.weight, *eh = row.exp_hard;
  // One entry again in full precision: taking something off a stored one would round twice.
  const auto entry = [&](int64_t j) -> F {
    F g = slope_at<F, kPower, kWeight>(es[j], kWeight == kNone ? (F)0 : w[j],
                                       kPower == 0 ? eh[j] : (F)0, slope);
    if (uniform != 0) g -= uniform * (a.class_weight ? (F)a.class_weight[j] : (F)1);
    return g;
  };
  if (uniform != 0) {
    for (int64_t j = 0; j < n; ++j) store(grad + j, entry(j));
  } else {
    if (a.rows * n * (int64_t)sizeof(S) >= kStreamBytes && (size_t)grad % 64 == 0) {
      S block[kBlock];
      for (int64_t j = 0; j < whole; j += kBlock) {
        const int64_t count = whole - j < kBlock ? whole - j : kBlock;
        gradient<S, F, kPower, kWeight>(es + j, w + j, eh + j, count, slope, block);
        stream_out(block, count, grad + j);
      }
    } else {
      gradient<S, F, kPower, kWeight>(es, w, eh, whole, slope, grad);
    }
    if (whole != n) {
      S tail[kLanes];
      gradient<S, F, kPower, kWeight>(es + whole, w + whole, eh + whole, kLanes, slope, tail);
      copy_some(tail, n - whole, grad + whole);
    }
  }
  if (label >= 0) store(grad + label, entry(label) + (F)on_label);
}

}  // namespace
}  // namespace FXK_ISA
}  // namespace fxk
