// kd_loss: ce_weight * CE(student, labels) + kd_weight * T^2 * D(teacher_T, student_T), loss and
// gradient in one pass over memory: a row is read once, worked on in cache, its gradient written
// once. With x = (s - shift)/T and y = (t - shift')/T, q = e^x / sum e^x and p = e^y / sum e^y,
//   forward KL  sum p (y - x) + log sum e^x - log sum e^y       dD/dz = q - p
//   reverse KL  R = sum q (x - y) + log sum e^y - log sum e^x   dD/dz = q (log q - log p) - R q
//   JSD, TVD    see `against_mixture`, `total_variation`: a second sweep over the row in cache
//   decoupled   the forward KL without the label's class, and that class beside it: see `row_loss`
// The gradient is A e^x + B w with w = e^y, or B e^x (w - A) with w the divergence's own: A and B
// are numbers of the row. The hard part adds softmax(s) - onehot, whose exponential is a power of
// e^x when T is a small integer: a row needs two exponentials, three for another T.
#include "batch.h"
#include "row_gradient.h"

namespace fxk {
namespace FXK_ISA {
namespace {

// What turns e^x and e^y into q, p and beta p + (1 - beta) q, and y - x into log2 p - log2 q.
template <class F>
struct Mixture {
  F q_factor, p_factor, on_q, on_p, offset;
};

// Second sweep of the JSD: with m = beta p + (1 - beta) q, w becomes log(q/m). Leaves KL(p || m) in
// `teacher` and KL(q || m) in `student`, in base 2. The logarithm is taken of the larger of q/m
// and p/m, which is a small number above 0 with all its digits; the smaller one's differs from it
// by log p - log q, known from the logits. kTiny keeps two classes that underflow from being 0/0.
template <class F, bool kGuard>
FXK_INLINE void mixture_terms(int64_t count, const Mixture<F>& mixture, const F* es, const F* ratio,
                              F* w, Adder<F>* adder) {
  using V = typename Lane<F>::type;
  const Mixture<F> m = mixture;
  add_up<F>(count, adder, [=](int64_t j) __attribute__((always_inline)) {
    constexpr F kTiny = (F)0x1p-120;
    Terms<F> terms = {};
    V q, p, log_ratio;
    get(es + j, &q);
    get(w + j, &p);
    get(ratio + j, &log_ratio);
    q = q * m.q_factor;
    // With the guard a class without probability must stay at 0.
    p = p * m.p_factor + (kGuard ? (F)0 : kTiny);
    log_ratio = log_ratio + m.offset;
    const V mixed = q * m.on_q + (kGuard ? p * m.on_p + kTiny : p * m.on_p), zero = {};
    const V log_most = log2_of(quotient(kGuard ? larger(q, p) + kTiny : larger(q, p), mixed));
    V to_q = log_most - larger(log_ratio, zero), to_p = log_most + smaller(log_ratio, zero);
    if (kGuard) {
      to_q = unless_zero(q, to_q);
      to_p = unless_zero(p, to_p);
    }
    terms.student = q * to_q;
    terms.teacher = p * to_p;
    put(w + j, to_q);
    return terms;
  });
}

template <class X, class F, bool kGuard>
Sums against_mixture(const Row<X, F>& row, const Sums& first, double beta) {
  // log p - log q of the very p and q that are mixed: rounding of the factors is a first-order
  // error where one is measured against the other, and none where both agree.
  const F q_factor = (F)(1 / first.student), p_factor = (F)(1 / first.teacher);
  const F offset = (F)log2((double)p_factor / (double)q_factor);
  const Mixture<F> mixture = {q_factor, p_factor, (F)(1 - beta), (F)beta, offset};
  Adder<F> adder;
  const F *es = row.exp_student, *ratio = row.ratio;
  F* w = row.weight;
  for (int64_t j = 0; j < row.whole; j += kBlock) {
    const int64_t n = row.whole - j < kBlock ? row.whole - j : kBlock;
    mixture_terms<F, kGuard>(n, mixture, es + j, ratio + j, w + j, &adder);
  }
  const int64_t j = row.whole;
  if (j != row.classes) mixture_terms<F, true>(kLanes, mixture, es + j, ratio + j, w + j, &adder);
  return adder.total();
}

// Second sweep of the TVD: w becomes sgn(q - p), its mean over q in `student`; sum |q - p| in
// `teacher`.
template <class X, class F>
Sums total_variation(const Row<X, F>& row, const Sums& first) {
  using V = typename Lane<F>::type;
  const F q_factor = (F)(1 / first.student), p_factor = (F)(1 / first.teacher);
  Adder<F> adder;
  const int64_t n = (row.classes + kLanes - 1) & ~(kLanes - 1);
  for (int64_t k = 0; k < n; k += kBlock) {
    const F* es = row.exp_student + k;
    F* w = row.weight + k;
    add_up<F>(n - k < kBlock ? n - k : kBlock, &adder,
              [=](int64_t j) __attribute__((always_inline)) {
                Terms<F> terms = {};
                V q, p;
                get(es + j, &q);
                get(w + j, &p);
                q = q * q_factor;
                const V difference = q - p * p_factor;
                const V one = V{} + (F)1, sign = with_sign(one, difference);
                terms.student = q * sign;
                terms.teacher = absolute(difference);
                put(w + j, sign);
                return terms;
              });
  }
  return adder.total();
}

// Value of the soft part, and the factors of its gradient, to be multiplied with the row's scale:
// on_student e^x + on_weight w, or on_weight e^x (w - on_student).
struct Soft {
  double value, on_student, on_weight;
};

template <class X, class F, int kWeight, bool kGuard>
FXK_INLINE Soft divergence(const Row<X, F>& row, const KDLossArgs& a, const Exponents<F>& z,
                           const Sums& sums) {
  const double offset = log(sums.student / sums.teacher);
  if (kWeight == kPlain)
    return {kLn2 * sums.dot / sums.teacher + offset, 1 / sums.student, -1 / sums.teacher};
  if (kWeight == kCross) {
    // log q - log p = ln2 w - offset; the offset cancels against its mean.
    const double mean = sums.dot / sums.student;
    return {kLn2 * mean - offset, mean, kLn2 / sums.student};
  }
  if (kWeight == kMixed) {
    const Sums second = against_mixture<X, F, kGuard>(row, sums, a.beta);
    // The rounded shares need not sum to 1; m is too large by that factor.
    const double excess = log2((double)(F)a.beta + (double)(F)(1 - a.beta));
    const double value = a.beta * second.teacher + (1 - a.beta) * second.student + excess;
    return {kLn2 * value, second.student, kLn2 * (1 - a.beta) / sums.student};
  }
  const Sums second = total_variation(row, sums);
  return {second.teacher / 2, second.student, 0.5 / sums.student};
}

// log of a sigmoid, and its complement's.
struct LogOdds {
  double in, out;
  explicit LogOdds(double odds)
      : in(odds > 0 ? -log1p(exp(-odds)) : odds - log1p(exp(odds))),
        out(odds > 0 ? -odds - log1p(exp(-odds)) : -log1p(exp(odds))) {}
};

FXK_INLINE double kl_term(double log_p, double log_q) {
  return log_p == -INFINITY ? 0 : exp(log_p) * (log_p - log_q);
}

// A row after its first sweep.
template <class X, class F>
struct Swept {
  Row<X, F> row;
  Exponents<F> z;
  Sums sums;
  int64_t i;
};

template <class S, class X, class F, int kPower, int kWeight>
FXK_INLINE RowLoss finish(const Swept<X, F>& swept, const KDLossArgs& a, int64_t label,
                          const Scale& scale, S* grad) {
  constexpr bool kHard = kPower >= 0, kSoft = kWeight != kNone;
  const bool decoupled = kWeight == kPlain && a.divergence == kDecoupled;
  const Row<X, F>& row = swept.row;
  const Exponents<F>& z = swept.z;
  const Sums& sums = swept.sums;

  RowLoss loss = {0, 0};
  Soft soft = {0, 0, 0};
  double on_target = 0;  // what the decoupled loss adds at the label
  if (kSoft) {
    soft = divergence<X, F, kWeight, false>(row, a, z, sums);
    if (kWeight == kMixed && soft.value - soft.value != 0) {  // w has been overwritten
      sweep_again<X, F, kPower, kWeight>(row, z);
      soft = divergence<X, F, kWeight, true>(row, a, z, sums);
    }
    if (decoupled) {
      // The sums are those of the other classes; the label's has its odds against them.
      if (sums.teacher == 0) soft = Soft{0, sums.student == 0 ? 0 : 1 / sums.student, 0};
      const auto odds = [&](const Exponent<F>& e, const X* x, double others) {
        return LogOdds(((double)load(x + label) - e.exact_shift()) / a.temperature - log(others));
      };
      const LogOdds q = odds(z.student, row.s, sums.student);
      const LogOdds p = odds(z.teacher, row.t, sums.teacher);
      const double target = kl_term(p.in, q.in) + kl_term(p.out, q.out);
      // q - p; of the two ways to say it, the one between small numbers keeps its digits.
      const double shift = q.in > q.out ? exp(p.out) - exp(q.out) : exp(q.in) - exp(p.in);
      soft.value = a.alpha * target + a.beta * soft.value;
      soft.on_student *= a.beta - a.alpha * shift;
      soft.on_weight *= a.beta;
      on_target = scale.soft * a.alpha * shift;
    }
    loss.soft = a.kd_weight * a.temperature * a.temperature * soft.value;
    if (soft.value != soft.value) soft.on_weight = NAN;
  }

  Hard hard = {0, 0, 0, 0};
  double inverse_sum = 0;
  if (kHard) {
    const double shift = (kPower == 0 ? z.hard : z.student).exact_shift();
    double log_sum = log(sums.hard);
    inverse_sum = 1 / sums.hard;
    double of_label = 0;
    if (decoupled) {
      const double on_label = (double)load(row.s + label) - shift, gap = on_label - log_sum;
      log_sum = gap > 0 ? on_label + log1p(exp(-gap)) : log_sum + log1p(exp(gap));
      inverse_sum = exp(-log_sum);
      of_label = exp(on_label - log_sum);
    }
    hard = hard_part(row, a, label, shift, log_sum);
    loss.hard = hard.loss;
    on_target += scale.hard * (hard.on_sum * of_label - hard.on_label);
  }
  if (grad == nullptr) return loss;
  const Slope<F> slope = {
      (F)(scale.hard * hard.on_sum * inverse_sum),
      (F)(kWeight == kPlain ? scale.soft * soft.on_student : soft.on_student),
      (F)(scale.soft * soft.on_weight),
  };
  write_gradient<S, X, F, kPower, kWeight>(row, a, slope, (F)(scale.hard * hard.uniform),
                                           kHard || decoupled ? label : -1, on_target, grad);
  return loss;
}

// Two rows at a time, as long as their scratch stays in the nearest caches.
FXK_INLINE bool overlaps(int64_t classes) { return classes <= 2048; }

// Rows [first, last). A row's few numbers take as long to come as a hundred classes: the next row's
// sweep stands between a row's own and its gradient, so that the processor need not wait.
template <class S, class Source, int kPower, int kWeight>
void rows_of(const Batch<S>& batch, int64_t first, int64_t last, char* work, RowLoss* losses) {
  using F = typename Compute<S>::type;
  using X = typename Source::template Logit<S>;
  const KDLossArgs& a = batch.a;
  const bool decoupled = kWeight == kPlain && a.divergence == kDecoupled;
  Swept<X, F> both[2];
  const auto done = [&](const Swept<X, F>& swept) {
    const int64_t i = swept.i;
    const double weight = batch.weight_of(i);
    const Scale scale = {a.ce_weight * batch.per_label * weight,
                         a.kd_weight * a.temperature * batch.per_row * weight};
    const RowLoss loss =
        finish<S, X, F, kPower, kWeight>(swept, a, batch.label_of(i), scale, batch.gradient_of(i));
    losses[i] = RowLoss{loss.hard * weight, loss.soft * weight};
  };
  const bool overlap = overlaps(a.classes);
  int64_t found = 0;
  for (int64_t i = first; i < last; ++i) {
    if (!batch.counts(i)) {
      losses[i] = RowLoss{0, 0};
      S* grad = batch.gradient_of(i);
      if (grad) memset((void*)grad, 0, sizeof(S) * (size_t)a.classes);
      continue;
    }
    const int64_t turn = overlap ? found & 1 : 0;
    Swept<X, F>& swept = both[turn];
    Source::read(batch, i, work + (size_t)turn * batch.lines * batch.line, &swept.row);
    cut(&swept.row, kWeight != kNone, decoupled ? batch.label_of(i) : -1);
    swept.sums = first_sweep<X, F, kPower, kWeight>(swept.row, a.temperature, &swept.z);
    swept.i = i;
    if (!overlap) done(swept);
    if (overlap && found) done(both[1 - turn]);
    ++found;
  }
  if (overlap && found) done(both[(found - 1) & 1]);
  stream_fence();  // before another thread is told that the rows are there
}

template <class S, class Source, int kWeight>
void by_power(const Batch<S>& batch, int64_t first, int64_t last, char* work, RowLoss* losses) {
  switch (batch.power) {
    case -1: return rows_of<S, Source, -1, kWeight>(batch, first, last, work, losses);
    case 1: return rows_of<S, Source, 1, kWeight>(batch, first, last, work, losses);
    case 2: return rows_of<S, Source, 2, kWeight>(batch, first, last, work, losses);
    case 3: return rows_of<S, Source, 3, kWeight>(batch, first, last, work, losses);
    case 4: return rows_of<S, Source, 4, kWeight>(batch, first, last, work, losses);
    default: return rows_of<S, Source, 0, kWeight>(batch, first, last, work, losses);
  }
}

template <class S, class Source>
void by_divergence(const Batch<S>& batch, int64_t first, int64_t last, char* work,
                   RowLoss* losses) {
  if (!batch.soft) return rows_of<S, Source, 1, kNone>(batch, first, last, work, losses);
  switch (batch.a.divergence) {
    case kReverseKL: return by_power<S, Source, kCross>(batch, first, last, work, losses);
    case kJSD: return by_power<S, Source, kMixed>(batch, first, last, work, losses);
    case kTVD: return by_power<S, Source, kSign>(batch, first, last, work, losses);
    default: return by_power<S, Source, kPlain>(batch, first, last, work, losses);
  }
}

template <class S>
int64_t run(const KDLossArgs& a, int threads) {
  using F = typename Compute<S>::type;
  const int64_t rows = a.rows, classes = a.classes;
  Batch<S> batch(a);
  if (batch.soft && a.divergence == kDIST) return dist(a, threads);
  const int64_t status = batch.count();
  if (status != kOk) return status;
  // Two exponentials are the work of several plain operations.
  const int n_threads = useful_threads(threads, 3 * rows * classes, rows);
  const size_t losses = align64(sizeof(RowLoss) * (size_t)rows);
  const size_t per_thread = (overlaps(classes) ? 2 : 1) * batch.lines * batch.line;
  Scratch scratch(losses + per_thread * (size_t)n_threads);
  if (!scratch.ok()) return kNoMemory;
  RowLoss* row_losses = scratch.as<RowLoss>();
  if (!batch.hard && !batch.soft) {
    memset((void*)row_losses, 0, losses);
    if (a.grad) memset(a.grad, 0, sizeof(S) * (size_t)(rows * classes));
  } else {
    const int64_t share = (rows + n_threads - 1) / n_threads;
#pragma omp parallel for num_threads(n_threads) if (n_threads > 1) schedule(static, 1)
    for (int part = 0; part < n_threads; ++part) {
      char* work = scratch.as<char>(losses + per_thread * (size_t)part);
      const int64_t first = part * share, last = first + share < rows ? first + share : rows;
      if (batch.as_it_is)
        by_divergence<S, AsItIs>(batch, first, last, work, row_losses);
      else
        by_divergence<S, Copied>(batch, first, last, work, row_losses);
    }
  }

  F* out = static_cast<F*>(a.loss);
  F* parts = static_cast<F*>(a.parts);
  if (a.reduction == 0) {
    for (int64_t i = 0; i < rows; ++i) {
      out[i] = (F)(row_losses[i].hard + row_losses[i].soft);
      if (parts == nullptr) continue;
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
  hard_sum *= batch.per_label;
  soft_sum *= batch.per_row;
  out[0] = (F)(hard_sum + soft_sum);
  if (parts == nullptr) return kOk;
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
