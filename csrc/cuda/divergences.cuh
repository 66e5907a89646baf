// What the divergences make of a row's exponentials: the gradient at a class, and the parts of the
// loss that take more than the sums.
#pragma once
#include "logits.cuh"

namespace fxk {
namespace cuda {
namespace {

// log2 of p/m and of q/m, from gap = log2 p - log2 q.
template <class F>
struct ToMixture {
  F teacher, student;
  __device__ __forceinline__ ToMixture(F gap, F beta) {
    const bool above = gap > 0;
    const F larger_share = above ? beta : 1 - beta, e = exp2_of(-magnitude(gap));
    const F log = -log2_of(fused(1 - larger_share, e, larger_share));
    teacher = above ? log : log + gap;
    student = above ? log - gap : log;
  }
};

template <class F>
__device__ __forceinline__ F sign_of(F v) {
  return v > 0 ? (F)1 : v < 0 ? (F)-1 : v;
}

// The gradient at a class: e^x (hard[0] + hard[1] e^x + ... + soft) + teacher * e^y - uniform.
template <class F>
struct Slope {
  F hard[4];
  F student, teacher, mean;
  F shift, beta;                     // JSD
  F of_student_sum, of_teacher_sum;  // TVD: their reciprocals
  F uniform;
};

template <int kDivergence>
constexpr bool kLinear =
    kDivergence == kForwardKL || kDivergence == kDecoupled || kDivergence == kNone;

template <int kDivergence, class F>
__device__ __forceinline__ F slope_at(const Point<F>& p, const Slope<F>& k) {
  F soft = k.student;
  if (kDivergence == kReverseKL) soft *= p.gap - k.mean;
  if (kDivergence == kJSD) soft *= ToMixture<F>(p.gap + k.shift, k.beta).student - k.mean;
  if (kDivergence == kReverseKL || kDivergence == kJSD) soft = p.student == 0 ? (F)0 : soft;
  if (kDivergence == kTVD)
    soft *= sign_of(p.student * k.of_student_sum - p.teacher * k.of_teacher_sum) - k.mean;
  const F e = p.student;
  F g;
  if (kDivergence == kNone) {
    g = e * soft;
  } else {
    // Where the soft factor is the same for the whole row, hard[0] is in it.
    if (!kLinear<kDivergence>) soft += k.hard[0];
    g = e * fused(e, fused(e, fused(e, k.hard[3], k.hard[2]), k.hard[1]), soft);
  }
  if (kDivergence == kForwardKL || kDivergence == kDecoupled) g = fused(k.teacher, p.teacher, g);
  return g - k.uniform;
}

template <class F>
__device__ __forceinline__ F weighted(F p, F v) {
  return p == 0 ? (F)0 : p * v;
}

// The label against the rest, in one distribution: from how far the label's logit lies above the
// logarithm of the rest's sum. Neither logarithm is a difference of large numbers.
template <class F>
struct Split {
  F label, rest;  // log-probabilities
  __device__ __forceinline__ explicit Split(F above) {
    const F both = log1p_of(exp_of(-magnitude(above)));
    label = -(larger(-above, (F)0) + both);
    rest = -(larger(above, (F)0) + both);
    if (above != above) label = rest = above;
  }
};

// alpha * KL of (label, rest) + beta * KL among the rest, both against the label's class. With ^
// for the distributions among the rest, d/dz is alpha (q - p) at the label and elsewhere beta (q^ -
// p^) - alpha (q - p) q^.
template <class F>
struct Decoupled {
  Split<F> student, teacher, hard;
  __device__ __forceinline__ Decoupled(const Params<F>& params, F student_label, F teacher_label,
                                       const Offsets<F>& z, const F (&sum)[4])
      : student(above(student_label, params.factor, z.student, sum[kStudentSum])),
        teacher(above(teacher_label, params.factor, z.teacher, sum[kTeacherSum])),
        hard(params.apart
                 ? above(student_label, params.hard_factor, z.hard, sum[kHardSum])
                 : above(student_label, params.factor, z.student, (F)1) * (F)params.temperature -
                       log_of(sum[kHardSum])) {}

  // q - p of the label: the same number twice, and the one without the 1 in it keeps its digits.
  __device__ __forceinline__ F shift() const {
    const F q = exp_of(student.label);
    return q > (F)0.5 ? exp_of(teacher.rest) - exp_of(student.rest) : q - exp_of(teacher.label);
  }
  __device__ __forceinline__ F target() const {
    return weighted(exp_of(teacher.label), teacher.label - student.label) +
           weighted(exp_of(teacher.rest), teacher.rest - student.rest);
  }

 private:
  // In natural units; dividing by the factor as rounded gives the shift in effect.
  static __device__ __forceinline__ F above(F logit, F factor, F offset, F sum) {
    return fused(logit, factor, offset) * (F)kLn2 - log_of(sum);
  }
};

}  // namespace
}  // namespace cuda
}  // namespace fxk
