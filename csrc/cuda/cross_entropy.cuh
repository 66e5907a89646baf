// The hard part of a row: with the weights of its label and of its row, and label smoothing, it is
//   mass * log sum e^s - picked * s_label - uniform * sum of the (weighted) logits.
#pragma once
#include "logits.cuh"

namespace fxk {
namespace cuda {
namespace {

// What the gradient has of it: mass * softmax, less `picked` at the label and `uniform` everywhere.
template <class F>
struct HardSlope {
  F picked, mass, uniform;
  bool by_class;  // `uniform` goes with the weight of the class
  // `mean`: the reciprocal of what the mean divides by; `all_weight`: the mean of the class
  // weights.
  __device__ __forceinline__ HardSlope(const Params<F>& a, double label_weight, double on_row,
                                       double mean, double all_weight) {
    const F scale = a.hard ? (F)(a.ce_weight * mean * on_row) : (F)0;
    picked = scale * (F)((1 - a.label_smoothing) * label_weight);
    mass = picked + scale * (F)(a.label_smoothing * all_weight);
    uniform = scale * (F)a.spread;
    by_class = uniform != 0 && a.class_weight != nullptr;
  }
};

// The loss in double precision, of the offset and the sum of its exponentials, `sum`: valid in the
// group's first thread. Of a sum that the label's class is not in where kWithoutLabel.
template <bool kWithoutLabel, class F, class S, class T, class Group>
__device__ __forceinline__ double hard_loss(const Params<F>& a, const Row<S, T>& row, double on_row,
                                            const Offsets<F>& z, F sum, double all_weight,
                                            Group& group) {
  const double shift =
      a.apart ? -(double)z.hard * a.hard_logit_unit : -(double)z.student * a.logit_unit;
  const double s = (double)widen(row.s[row.label]);
  const double weight = a.class_weight ? a.class_weight[row.label] : 1;
  double spread = 0;  // the other classes' share, by weight
  if (a.label_smoothing > 0) {
    double part[1] = {0};
    for (int j = group.index(); j < row.n; j += group.size()) {
      const double w = a.class_weight ? a.class_weight[j] : 1;
      if (w != 0) part[0] += w * ((double)widen(row.s[j]) - shift);
    }
    group.template all<Sum>(part);
    spread = a.spread * part[0];
  }
  if (group.index() != 0) return 0;
  double log_sum = log_of((double)sum);
  if (kWithoutLabel) {
    const double above = s - shift - log_sum;
    log_sum += larger(above, 0.0) + log1p_of(exp_of(-magnitude(above)));
    if (sum == 0) log_sum = s - shift;
  }
  const double picked = (1 - a.label_smoothing) * weight;
  const double mass = picked + a.label_smoothing * all_weight;
  return a.ce_weight * on_row * (mass * log_sum - picked * (s - shift) - spread);
}

}  // namespace
}  // namespace cuda
}  // namespace fxk
