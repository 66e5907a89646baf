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

constexpr double kLog2E = 1.4426950408889634, kLn2 = 0.6931471805599453;

// Rows are worked on in whole vectors: what is left of a row after the last multiple of kLanes goes
// through buffers padded with -inf, whose exponentials are 0, and the same vector code.
constexpr int64_t kLanes = 16;

template <class S>
struct Row {
  using F = typename Compute<S>::type;
  const S* s;
  const S* t;
  S* grad;
  int64_t label;
  F* exp_student;  // scratch [classes rounded up to kLanes] each
  F* exp_teacher;
  F* exp_hard;
};

struct RowLoss {
  double hard, soft;
};

struct Sums {
  double hard, student, teacher, dot;
};

// z = (x - shift) * factor. With a fused multiply-add that is one instruction: the product is
// exact, and the rounding of the offset is common to the row, where it cancels against the row's
// sum.
template <class F>
struct Exponent {
  F shift, factor, offset;
  Exponent(F shift_, double factor_) : shift(shift_), factor((F)factor_), offset(-shift * factor) {}
  inline __attribute__((always_inline)) F operator()(F x) const {
#if defined(__FMA__)
    return x * factor + offset;
#else
    return (x - shift) * factor;
#endif
  }
  // The shift in effect, that rounding included.
  double exact_shift() const {
#if defined(__FMA__)
    return -(double)offset / (double)factor;
#else
    return (double)shift;
#endif
  }
};

template <class F>
struct Exponents {
  Exponent<F> student, teacher, hard;
};

template <class S>
FXK_INLINE void padded_tail(const S* x, int64_t n, S* tail) {
  using F = typename Compute<S>::type;
  for (int64_t j = 0; j < kLanes; ++j) store(tail + j, -(F)INFINITY);
  memcpy((void*)tail, (const void*)x, sizeof(S) * (size_t)n);
}

template <class F, int kPower>
FXK_INLINE F hard_exponential(F soft, F hard_z) {
  if (kPower == 1) return soft;
  if (kPower == 2) return soft * soft;
  if (kPower == 3) return soft * soft * soft;
  if (kPower == 4) return (soft * soft) * (soft * soft);
  return exp2_nonpositive(hard_z);
}

// The maximum over a multiple of kLanes, in four independent chains: one would wait for itself.
template <class S>
FXK_INLINE typename Compute<S>::type vector_max(const S* x, int64_t n) {
  using F = typename Compute<S>::type;
  const int64_t quarter = (n / 4) & ~(kLanes - 1);
  F m0 = -(F)INFINITY, m1 = m0, m2 = m0, m3 = m0;
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
  const S* last = x + 4 * quarter;
#pragma omp simd reduction(max : m0)
  for (int64_t j = 0; j < rest; ++j) {
    const F a = load(last + j);
    m0 = a > m0 ? a : m0;
  }
  m0 = m1 > m0 ? m1 : m0;
  m2 = m3 > m2 ? m3 : m2;
  return m2 > m0 ? m2 : m0;
}

template <class S>
FXK_INLINE typename Compute<S>::type row_max(const S* x, int64_t n, const S* tail) {
  const auto whole = vector_max(x, n & ~(kLanes - 1));
  if (n % kLanes == 0) return whole;
  const auto left = vector_max(tail, kLanes);
  return left > whole ? left : whole;
}

// kPower: T when it is 1..4, 0 for any other temperature. kHard, kSoft: which part is wanted.
// kMasked: a class at -inf in the teacher (p = 0) adds nothing, whatever the student says.
template <class S, int kPower, bool kHard, bool kSoft, bool kMasked>
FXK_INLINE void exponentials_scalar(const S* s, const S* t, int64_t count,
                                    const Exponents<typename Compute<S>::type>& z,
                                    typename Compute<S>::type* es, typename Compute<S>::type* et,
                                    typename Compute<S>::type* eh, Sums* sums) {
  using F = typename Compute<S>::type;
  F bh = 0, bs = 0, bt = 0, bd = 0;
#pragma omp simd reduction(+ : bh, bs, bt, bd)
  for (int64_t j = 0; j < count; ++j) {
    const F logit = load(s + j);
    const F x = z.student(logit);
    F soft = 0;
    if (kSoft || kPower != 0) {
      soft = exp2_nonpositive(x);
      es[j] = soft;
    }
    if (kHard) {
      const F hard = hard_exponential<F, kPower>(soft, z.hard(logit));
      bh += hard;
      if (kPower == 0) eh[j] = hard;
    }
    if (kSoft) {
      const F y = z.teacher(load(t + j));
      const F p = exp2_nonpositive(y);
      et[j] = p;
      bs += soft;
      bt += p;
      if (kMasked)
        bd = p == (F)0 ? bd : bd + p * (y - x);
      else
        bd += p * (y - x);
    }
  }
  sums->hard += bh;
  sums->student += bs;
  sums->teacher += bt;
  sums->dot += bd;
}

#if defined(__AVX512F__)
// The same loop by hand, for what AVX-512 can do and scalar expressions cannot say.
template <class S, int kPower, bool kHard, bool kSoft, bool kMasked>
FXK_INLINE void exponentials_avx512(const S* s, const S* t, int64_t count,
                                    const Exponents<float>& z, float* es, float* et, float* eh,
                                    Sums* sums) {
  const __m512 student_factor = _mm512_set1_ps(z.student.factor);
  const __m512 student_offset = _mm512_set1_ps(z.student.offset);
  const __m512 teacher_factor = _mm512_set1_ps(z.teacher.factor);
  const __m512 teacher_offset = _mm512_set1_ps(z.teacher.offset);
  const __m512 hard_factor = _mm512_set1_ps(z.hard.factor);
  const __m512 hard_offset = _mm512_set1_ps(z.hard.offset);
  __m512 bh = _mm512_setzero_ps(), bs = bh, bt = bh, bd = bh;
  for (int64_t j = 0; j < count; j += kLanes) {
    const __m512 logit = load16(s + j);
    const __m512 x = _mm512_fmadd_ps(logit, student_factor, student_offset);
    __m512 soft = _mm512_setzero_ps();
    if (kSoft || kPower != 0) {
      soft = exp2_nonpositive(x);
      _mm512_storeu_ps(es + j, soft);
    }
    if (kHard) {
      __m512 hard = soft;
      if (kPower == 2 || kPower == 4) hard = soft * soft;
      if (kPower == 3) hard = soft * soft * soft;
      if (kPower == 4) hard = hard * hard;
      if (kPower == 0) {
        hard = exp2_nonpositive(_mm512_fmadd_ps(logit, hard_factor, hard_offset));
        _mm512_storeu_ps(eh + j, hard);
      }
      bh = _mm512_add_ps(bh, hard);
    }
    if (kSoft) {
      const __m512 y = _mm512_fmadd_ps(load16(t + j), teacher_factor, teacher_offset);
      const __m512 p = exp2_nonpositive(y);
      _mm512_storeu_ps(et + j, p);
      bs = _mm512_add_ps(bs, soft);
      bt = _mm512_add_ps(bt, p);
      const __mmask16 counts =
          kMasked ? _mm512_cmp_ps_mask(p, _mm512_setzero_ps(), _CMP_NEQ_UQ) : (__mmask16)0xffff;
      bd = _mm512_mask3_fmadd_ps(p, _mm512_sub_ps(y, x), bd, counts);
    }
  }
  sums->hard += _mm512_reduce_add_ps(bh);
  sums->student += _mm512_reduce_add_ps(bs);
  sums->teacher += _mm512_reduce_add_ps(bt);
  sums->dot += _mm512_reduce_add_ps(bd);
}
#endif

template <class S, int kPower, bool kHard, bool kSoft, bool kMasked>
FXK_INLINE void exponentials(const S* s, const S* t, int64_t count,
                             const Exponents<typename Compute<S>::type>& z,
                             typename Compute<S>::type* es, typename Compute<S>::type* et,
                             typename Compute<S>::type* eh, Sums* sums) {
#if defined(__AVX512F__)
  if constexpr (sizeof(typename Compute<S>::type) == sizeof(float)) {
    exponentials_avx512<S, kPower, kHard, kSoft, kMasked>(s, t, count, z, es, et, eh, sums);
    return;
  }
#endif
  exponentials_scalar<S, kPower, kHard, kSoft, kMasked>(s, t, count, z, es, et, eh, sums);
}

template <class S, int kPower, bool kHard, bool kSoft, bool kMasked>
Sums row_sums(const Row<S>& row, int64_t n, const Exponents<typename Compute<S>::type>& z,
              const S* tail_s, const S* tail_t) {
  const int64_t whole = n & ~(kLanes - 1);
  Sums sums = {0, 0, 0, 0};
  for (int64_t j = 0; j < whole; j += kBlock) {
    const int64_t count = (whole - j < kBlock ? whole - j : kBlock) & ~(kLanes - 1);
    exponentials<S, kPower, kHard, kSoft, kMasked>(row.s + j, row.t + j, count, z,
                                                   row.exp_student + j, row.exp_teacher + j,
                                                   row.exp_hard + j, &sums);
  }
  if (whole != n)
    exponentials<S, kPower, kHard, kSoft, true>(tail_s, tail_t, kLanes, z, row.exp_student + whole,
                                                row.exp_teacher + whole, row.exp_hard + whole,
                                                &sums);
  return sums;
}

template <class F>
struct Slope {
  F on_hard, on_student, on_teacher;
};

// on_hard es^T + on_student es - on_teacher et, with one es taken out of the first two.
template <class F, int kPower, bool kHard, bool kSoft>
FXK_INLINE F slope_at(F es, F et, F eh, const Slope<F>& slope) {
  F g = kSoft ? slope.on_student : (F)0;
  if (kHard && kPower == 1) g += slope.on_hard;
  if (kHard && kPower == 2) g += slope.on_hard * es;
  if (kHard && kPower == 3) g += slope.on_hard * (es * es);
  if (kHard && kPower == 4) g += (slope.on_hard * es) * (es * es);
  if (kSoft || kPower != 0) g *= es;
  if (kHard && kPower == 0) g += slope.on_hard * eh;
  if (kSoft) g -= slope.on_teacher * et;
  return g;
}

template <class S, int kPower, bool kHard, bool kSoft>
FXK_INLINE void gradient(const typename Compute<S>::type* es, const typename Compute<S>::type* et,
                         const typename Compute<S>::type* eh, int64_t count,
                         const Slope<typename Compute<S>::type>& slope, S* grad) {
  using F = typename Compute<S>::type;
#pragma omp simd
  for (int64_t j = 0; j < count; ++j) {
    store(grad + j, slope_at<F, kPower, kHard, kSoft>(es[j], kSoft ? et[j] : (F)0,
                                                      kHard && kPower == 0 ? eh[j] : (F)0, slope));
  }
}

template <class S, int kPower, bool kHard, bool kSoft>
RowLoss row_loss(const Row<S>& row, const KDLossArgs& a, double hard_scale, double soft_scale) {
  using F = typename Compute<S>::type;
  const int64_t n = a.classes, whole = n & ~(kLanes - 1);
  const S* s = row.s;
  const S* t = row.t;
  F* es = row.exp_student;
  F* et = row.exp_teacher;
  F* eh = row.exp_hard;
  const bool need_grad = row.grad != nullptr;
  S tail_s[kLanes], tail_t[kLanes];
  if (whole != n) {
    padded_tail(s + whole, n - whole, tail_s);
    if (kSoft) padded_tail(t + whole, n - whole, tail_t);
  }
  // Exponents are base 2: z = (s - max) log2(e)/T.
  const double soft_factor = kLog2E / a.temperature;
  const F highest = row_max(s, n, tail_s);
  const Exponents<F> z = {{highest, soft_factor},
                          {kSoft ? row_max(t, n, tail_t) : (F)0, soft_factor},
                          {highest, kLog2E}};
  Sums sums = row_sums<S, kPower, kHard, kSoft, false>(row, n, z, tail_s, tail_t);
  // Infinite logits give 0 * inf. They are rare, the guard costs a tenth of the loop, so rows that
  // turn out to need it are done again.
  if (kSoft && sums.dot != sums.dot)
    sums = row_sums<S, kPower, kHard, kSoft, true>(row, n, z, tail_s, tail_t);

  RowLoss loss = {0, 0};
  const double inv_classes = 1.0 / (double)n;
  const double label_weight =
      kHard ? (a.class_weight ? a.class_weight[row.label] : 1.0) * (1.0 - a.label_smoothing) : 0;
  double all_weight = 0;
  if (kSoft) {
    loss.soft = a.kd_weight * a.temperature * a.temperature *
                (kLn2 * sums.dot / sums.teacher + log(sums.student / sums.teacher));
  }
  if (kHard) {
    const double log_sum = log(sums.hard);
    const double shift = (kPower == 0 ? z.hard : z.student).exact_shift();
    loss.hard = label_weight * (log_sum - ((double)load(s + row.label) - shift));
    if (a.label_smoothing > 0) {
      double weighted = 0;
      for (int64_t j = 0; j < n; ++j) {
        const double w = a.class_weight ? a.class_weight[j] : 1.0;
        all_weight += w;
        weighted += w == 0 ? 0 : w * ((double)load(s + j) - shift);
      }
      all_weight *= a.label_smoothing * inv_classes;
      loss.hard += all_weight * log_sum - a.label_smoothing * inv_classes * weighted;
    }
    loss.hard *= a.ce_weight;
  }
  if (!need_grad) return loss;

  const Slope<F> slope = {
      kHard ? (F)(hard_scale * (label_weight + all_weight) / sums.hard) : (F)0,
      kSoft ? (F)(soft_scale / sums.student) : (F)0,
      kSoft ? (F)(soft_scale / sums.teacher) : (F)0,
  };
  const F uniform = (F)(hard_scale * a.label_smoothing * inv_classes);
  const bool smooth = kHard && a.label_smoothing > 0;
  // One entry again in full precision: taking something off a stored one would round twice.
  const auto entry = [&](int64_t j) -> F {
    F g = slope_at<F, kPower, kHard, kSoft>(es[j], kSoft ? et[j] : (F)0,
                                            kHard && kPower == 0 ? eh[j] : (F)0, slope);
    if (smooth) g -= uniform * (a.class_weight ? (F)a.class_weight[j] : (F)1);
    return g;
  };
  S* grad = row.grad;
  if (smooth) {
    for (int64_t j = 0; j < n; ++j) store(grad + j, entry(j));
  } else {
    gradient<S, kPower, kHard, kSoft>(es, et, eh, whole, slope, grad);
    if (whole != n) {
      S tail[kLanes];
      gradient<S, kPower, kHard, kSoft>(es + whole, et + whole, eh + whole, kLanes, slope, tail);
      memcpy((void*)(grad + whole), (const void*)tail, sizeof(S) * (size_t)(n - whole));
    }
  }
  if (kHard) store(grad + row.label, entry(row.label) - (F)(hard_scale * label_weight));
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
  const size_t line = align64(sizeof(F) * (size_t)(classes + kLanes));
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
