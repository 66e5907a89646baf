// kd_loss: ce_weight * CE(student, labels) + kd_weight * T^2 * KL(teacher_T || student_T), loss
// and gradient in one pass over memory: a row is read once, worked on in cache, its gradient
// written once. With x = (s - max s)/T and y = (t - max t)/T,
//   KL   = sum p (y - x) + log sum e^x - log sum e^y,          p = e^y / sum e^y
//   dL/ds = a * (softmax(s) - onehot) + b * T * (softmax(s/T) - p)
// so a row needs three exponentials, two when T is a small integer: e^(s - max) = (e^x)^T.
#include "simd.h"

namespace fxk {
namespace FXK_ISA {
namespace {

template <class S>
struct Row {
  using F = typename Compute<S>::type;
  const S* s;
  const S* t;
  S* grad;
  int64_t label;
  F* exp_student;  // scratch [classes] each
  F* exp_teacher;
  F* exp_hard;
};

struct RowLoss {
  double hard, soft;
};

template <class F, int kPower>
FXK_INLINE F hard_exponential(F soft, F shifted) {
  if (kPower == 1) return soft;
  if (kPower == 2) return soft * soft;
  if (kPower == 3) return soft * soft * soft;
  if (kPower == 4) return (soft * soft) * (soft * soft);
  return exp_nonpositive(shifted);
}

template <class S>
FXK_INLINE typename Compute<S>::type row_max(const S* x, int64_t n) {
  using F = typename Compute<S>::type;
  F m = -(F)INFINITY;
#pragma omp simd reduction(max : m)
  for (int64_t j = 0; j < n; ++j) {
    const F v = load(x + j);
    m = v > m ? v : m;
  }
  return m;
}

// kPower: T when it is 1..4, 0 for any other temperature. kHard, kSoft: which part is wanted.
template <class S, int kPower, bool kHard, bool kSoft>
RowLoss row_loss(const Row<S>& row, const KDLossArgs& a, double hard_scale, double soft_scale) {
  using F = typename Compute<S>::type;
  const int64_t n = a.classes;
  const S* s = row.s;
  const S* t = row.t;
  F* es = row.exp_student;
  F* et = row.exp_teacher;
  F* eh = row.exp_hard;
  const bool need_grad = row.grad != nullptr;
  const F inv_t = (F)(1.0 / a.temperature);
  const F ms = row_max(s, n);
  const F mt = kSoft ? row_max(t, n) : (F)0;

  double sum_hard = 0, sum_student = 0, sum_teacher = 0, dot = 0;
  for (int64_t begin = 0; begin < n; begin += kBlock) {
    const int64_t end = begin + kBlock < n ? begin + kBlock : n;
    F bh = 0, bs = 0, bt = 0, bd = 0;
#pragma omp simd reduction(+ : bh, bs, bt, bd)
    for (int64_t j = begin; j < end; ++j) {
      const F shifted = load(s + j) - ms;
      const F x = shifted * inv_t;
      F soft = 0;
      if (kSoft || kPower != 0) {
        soft = exp_nonpositive(x);
        es[j] = soft;
      }
      if (kHard) {
        const F hard = hard_exponential<F, kPower>(soft, shifted);
        bh += hard;
        if (kPower == 0) eh[j] = hard;
      }
      if (kSoft) {
        const F y = (load(t + j) - mt) * inv_t;
        const F p = exp_nonpositive(y);
        et[j] = p;
        bs += soft;
        bt += p;
        // A class masked in the teacher (p = 0) adds nothing, whatever the student says.
        bd += p == (F)0 ? (F)0 : p * (y - x);
      }
    }
    sum_hard += bh;
    sum_student += bs;
    sum_teacher += bt;
    dot += bd;
  }

  RowLoss loss = {0, 0};
  const double inv_classes = 1.0 / (double)n;
  const double label_weight =
      kHard ? (a.class_weight ? a.class_weight[row.label] : 1.0) * (1.0 - a.label_smoothing) : 0;
  double all_weight = 0;
  if (kSoft) {
    loss.soft = a.kd_weight * a.temperature * a.temperature *
                (dot / sum_teacher + (log(sum_student) - log(sum_teacher)));
  }
  if (kHard) {
    const double log_sum = log(sum_hard);
    // (label - max) is taken before the logarithm is added: both may be large, the loss small.
    loss.hard = label_weight * (log_sum - (double)(load(s + row.label) - ms));
    if (a.label_smoothing > 0) {
      double weighted = 0;
      for (int64_t j = 0; j < n; ++j) {
        const double w = a.class_weight ? a.class_weight[j] : 1.0;
        all_weight += w;
        weighted += w == 0 ? 0 : w * (double)(load(s + j) - ms);
      }
      all_weight *= a.label_smoothing * inv_classes;
      loss.hard += all_weight * log_sum - a.label_smoothing * inv_classes * weighted;
    }
    loss.hard *= a.ce_weight;
  }
  if (!need_grad) return loss;

  const F on_hard = kHard ? (F)(hard_scale * (label_weight + all_weight) / sum_hard) : (F)0;
  const F on_student = kSoft ? (F)(soft_scale / sum_student) : (F)0;
  const F on_teacher = kSoft ? (F)(soft_scale / sum_teacher) : (F)0;
  const F uniform = (F)(hard_scale * a.label_smoothing * inv_classes);
  const bool smooth = kHard && a.label_smoothing > 0;
  S* grad = row.grad;
  if (!smooth) {
#pragma omp simd
    for (int64_t j = 0; j < n; ++j) {
      F g = 0;
      if (kHard) g = on_hard * (kPower == 0 ? eh[j] : hard_exponential<F, kPower>(es[j], (F)0));
      if (kSoft) g += on_student * es[j] - on_teacher * et[j];
      store(grad + j, g);
    }
  } else {
    for (int64_t j = 0; j < n; ++j) {
      F g = on_hard * (kPower == 0 ? eh[j] : hard_exponential<F, kPower>(es[j], (F)0));
      g -= uniform * (a.class_weight ? (F)a.class_weight[j] : (F)1);
      if (kSoft) g += on_student * es[j] - on_teacher * et[j];
      store(grad + j, g);
    }
  }
  if (kHard) {
    // The label's entry again, in full precision: subtracting from the stored value would round
    // a 16-bit gradient twice.
    const int64_t y = row.label;
    F g = on_hard * (kPower == 0 ? eh[y] : hard_exponential<F, kPower>(es[y], (F)0));
    g -= (F)(hard_scale * label_weight);
    if (smooth) g -= uniform * (a.class_weight ? (F)a.class_weight[y] : (F)1);
    if (kSoft) g += on_student * es[y] - on_teacher * et[y];
    store(grad + y, g);
  }
  return loss;
}

template <class S, int kPower>
RowLoss row_parts(const Row<S>& row, const KDLossArgs& a, bool hard, bool soft, double hard_scale,
                  double soft_scale) {
  if (hard && soft) return row_loss<S, kPower, true, true>(row, a, hard_scale, soft_scale);
  if (soft) return row_loss<S, kPower, false, true>(row, a, hard_scale, soft_scale);
  return row_loss<S, kPower, true, false>(row, a, hard_scale, soft_scale);
}

template <class S>
int64_t run(const KDLossArgs& a, int threads) {
  using F = typename Compute<S>::type;
  const int64_t rows = a.rows, classes = a.classes;
  const bool hard = a.labels != nullptr && a.ce_weight != 0;
  const bool soft = a.kd_weight != 0;
  double count = 0, weight = 0;
  for (int64_t i = 0; i < rows; ++i) {
    if (a.labels == nullptr) {
      count += 1;
      continue;
    }
    const int64_t y = a.labels[i];
    if (y == a.ignore_index) continue;
    if (y < 0 || y >= classes) return i;
    count += 1;
    weight += a.class_weight ? a.class_weight[y] : 1.0;
  }
  const bool mean = a.reduction == 2;
  const double per_row = mean ? (count > 0 ? 1.0 / count : 0.0) : 1.0;
  const double per_weight = mean ? (weight > 0 ? 1.0 / weight : 0.0) : 1.0;
  const double hard_scale = a.ce_weight * per_weight;
  const double soft_scale = a.kd_weight * a.temperature * per_row;

  const int n_threads = useful_threads(threads, rows * classes, rows);
  const size_t line = align64(sizeof(F) * (size_t)classes);
  const size_t losses = align64(sizeof(RowLoss) * (size_t)rows);
  Scratch scratch(losses + 3 * line * (size_t)n_threads);
  if (!scratch.ok()) return kNoMemory;
  RowLoss* row_losses = scratch.as<RowLoss>();

  const int power = a.temperature == 1   ? 1
                    : a.temperature == 2 ? 2
                    : a.temperature == 3 ? 3
                    : a.temperature == 4 ? 4
                                         : 0;
  const int64_t per_thread = (rows + n_threads - 1) / n_threads;
#pragma omp parallel for num_threads(n_threads) if (n_threads > 1) schedule(static, 1)
  for (int part = 0; part < n_threads; ++part) {
    const size_t base = losses + 3 * line * (size_t)part;
    const int64_t last = (part + 1) * per_thread < rows ? (part + 1) * per_thread : rows;
    for (int64_t i = part * per_thread; i < last; ++i) {
      S* grad = a.grad ? static_cast<S*>(a.grad) + i * classes : nullptr;
      const int64_t label = a.labels ? a.labels[i] : -1;
      const bool counts = a.labels == nullptr || label != a.ignore_index;
      if (!counts || (!hard && !soft)) {
        row_losses[i] = RowLoss{0, 0};
        if (grad) memset((void*)grad, 0, sizeof(S) * (size_t)classes);
        continue;
      }
      Row<S> row = {static_cast<const S*>(a.student) + i * a.student_stride,
                    static_cast<const S*>(a.teacher) + i * a.teacher_stride,
                    grad,
                    label,
                    scratch.as<F>(base),
                    scratch.as<F>(base + line),
                    scratch.as<F>(base + 2 * line)};
      RowLoss loss;
      switch (power) {
        case 1: loss = row_parts<S, 1>(row, a, hard, soft, hard_scale, soft_scale); break;
        case 2: loss = row_parts<S, 2>(row, a, hard, soft, hard_scale, soft_scale); break;
        case 3: loss = row_parts<S, 3>(row, a, hard, soft, hard_scale, soft_scale); break;
        case 4: loss = row_parts<S, 4>(row, a, hard, soft, hard_scale, soft_scale); break;
        default: loss = row_parts<S, 0>(row, a, hard, soft, hard_scale, soft_scale);
      }
      row_losses[i] = loss;
    }
  }

  F* out = static_cast<F*>(a.loss);
  F* parts = static_cast<F*>(a.parts);
  if (a.reduction == 0) {
    for (int64_t i = 0; i < rows; ++i) {
      out[i] = (F)(row_losses[i].hard + row_losses[i].soft);
      parts[i] = (F)row_losses[i].hard;
      parts[rows + i] = (F)row_losses[i].soft;
    }
    return kOk;
  }
  double hard_sum = 0, soft_sum = 0;
  for (int64_t i = 0; i < rows; ++i) {
    hard_sum += row_losses[i].hard;
    soft_sum += row_losses[i].soft;
  }
  hard_sum *= per_weight;
  soft_sum *= per_row;
  out[0] = (F)(hard_sum + soft_sum);
  parts[0] = (F)hard_sum;
  parts[1] = (F)soft_sum;
  return kOk;
}

template <class S>
int64_t scale(S* grad, const typename Compute<S>::type* upstream, int64_t rows, int64_t cols,
              int per_row, int threads) {
  using F = typename Compute<S>::type;
  bool unchanged = true;
  for (int64_t i = 0; i < (per_row ? rows : 1); ++i) unchanged = unchanged && upstream[i] == (F)1;
  if (unchanged) return kOk;
  const int n_threads = useful_threads(threads, rows * cols, rows);
#pragma omp parallel for num_threads(n_threads) if (n_threads > 1) schedule(static)
  for (int64_t i = 0; i < rows; ++i) {
    const F g = upstream[per_row ? i : 0];
    S* line = grad + i * cols;
#pragma omp simd
    for (int64_t j = 0; j < cols; ++j) store(line + j, load(line + j) * g);
  }
  return kOk;
}

}  // namespace

int64_t kd_loss(const KDLossArgs& a, int threads) {
  switch (a.dtype) {
    case kFloat32: return run<float>(a, threads);
    case kFloat64: return run<double>(a, threads);
    case kBFloat16: return run<BFloat16>(a, threads);
    default: return run<Float16>(a, threads);
  }
}

int64_t kd_loss_scale(void* grad, const void* upstream, int64_t rows, int64_t cols, int per_row,
                      int dtype, int threads) {
  switch (dtype) {
    case kFloat32: return scale((float*)grad, (const float*)upstream, rows, cols, per_row, threads);
    case kFloat64:
      return scale((double*)grad, (const double*)upstream, rows, cols, per_row, threads);
    case kBFloat16:
      return scale((BFloat16*)grad, (const float*)upstream, rows, cols, per_row, threads);
    default: return scale((Float16*)grad, (const float*)upstream, rows, cols, per_row, threads);
  }
}

}  // namespace FXK_ISA
}  // namespace fxk
