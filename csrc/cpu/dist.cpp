// The soft part of DIST: alpha (1 - mean correlation of q and p along rows) + beta (the same along
// columns), q and p the softened probabilities. With u, v centred, a and b their norms and
// rho = u.v / (a b + eps), d rho/d u = v / (a b + eps) - rho b / (a (a b + eps)) u.
//
// A column's mean and norm are of the whole batch, so no row's gradient is known before the last
// row has been read: the logits are read twice, and twice made probabilities, which costs less than
// to keep those. In between lie five numbers per column and thread.
#include "batch.h"
#include "row_gradient.h"

namespace fxk {
namespace FXK_ISA {
namespace {

constexpr double kEps = 1e-8;  // beside the product of the norms, as in the published code

// Columns are added up over blocks of rows, in the lanes' precision, before they go to double.
constexpr int64_t kBlockRows = 16, kTile = 256;
constexpr size_t kBlockBytes = (size_t)512 << 10;

struct Correlation {
  double rho, pull, push;  // -d rho/d u = pull u - push v
};

FXK_INLINE Correlation correlation(double cross, double of_student, double of_teacher) {
  const double a = sqrt(of_student), b = sqrt(of_teacher), norms = a * b + kEps;
  const double rho = cross / norms;
  // Without spread the correlation is 0, and stays 0. A teacher without any has v = 0, of which 1 /
  // kEps must not magnify the rounding.
  return {rho, a > 0 ? rho * b / (a * norms) : 0, of_teacher == 0 ? 0 : 1 / norms};
}

// Weighted moments of every column over some rows: means, and sums of the products of what is left.
struct Columns {
  double weight;
  double *q, *p, *qq, *pp, *qp;  // [classes] each

  static constexpr int64_t kArrays = 5;
  void place(double* at, int64_t classes) {
    weight = 0;
    q = at, p = q + classes, qq = p + classes, pp = qq + classes, qp = pp + classes;
    memset(at, 0, sizeof(double) * (size_t)(kArrays * classes));
  }

  // Columns [at, at + count) of more rows, of weight `more`; `weight` is what was there before.
  void merge(int64_t at, int64_t count, double more, const double* mean_q, const double* mean_p,
             const double* sqq, const double* spp, const double* sqp) {
    const double share = more / (weight + more), between = weight * share;
    double *to_q = q + at, *to_p = p + at, *to_qq = qq + at, *to_pp = pp + at, *to_qp = qp + at;
#pragma omp simd
    for (int64_t j = 0; j < count; ++j) {
      const double dq = mean_q[j] - to_q[j], dp = mean_p[j] - to_p[j];
      to_q[j] += dq * share;
      to_p[j] += dp * share;
      to_qq[j] += sqq[j] + dq * dq * between;
      to_pp[j] += spp[j] + dp * dp * between;
      to_qp[j] += sqp[j] + dq * dp * between;
    }
  }
};

// Adds a block of rows: q and p [rows, stride] with their weights. Everything is measured from the
// first row, so that what is rounded is of the size of the spread: a correlation that is nearly 1,
// or norms as small as kEps, would make much of the last digit of a mean.
template <class F>
void add_block(const F* q, const F* p, int64_t stride, const F* weights, int64_t rows,
               int64_t classes, Columns* columns) {
  double total = 0;
  for (int64_t r = 0; r < rows; ++r) total += weights[r];
  if (total == 0) return;
  const F inverse = (F)(1 / total);
  for (int64_t at = 0; at < classes; at += kTile) {
    const int64_t n = classes - at < kTile ? classes - at : kTile;
    const F *first_q = q + at, *first_p = p + at;
    F mean_q[kTile] = {}, mean_p[kTile] = {}, qq[kTile] = {}, pp[kTile] = {}, qp[kTile] = {};
    for (int64_t r = 1; r < rows; ++r) {
      const F w = weights[r] * inverse;
      const F *of_q = first_q + r * stride, *of_p = first_p + r * stride;
#pragma omp simd
      for (int64_t j = 0; j < n; ++j) {
        mean_q[j] += w * (of_q[j] - first_q[j]);
        mean_p[j] += w * (of_p[j] - first_p[j]);
      }
    }
    for (int64_t r = 0; r < rows; ++r) {
      const F w = weights[r];
      const F *of_q = first_q + r * stride, *of_p = first_p + r * stride;
#pragma omp simd
      for (int64_t j = 0; j < n; ++j) {
        const F u = of_q[j] - first_q[j] - mean_q[j], v = of_p[j] - first_p[j] - mean_p[j];
        qq[j] += w * u * u;
        pp[j] += w * v * v;
        qp[j] += w * u * v;
      }
    }
    double moments[Columns::kArrays][kTile];
#pragma omp simd
    for (int64_t j = 0; j < n; ++j) {
      moments[0][j] = (double)first_q[j] + (double)mean_q[j];
      moments[1][j] = (double)first_p[j] + (double)mean_p[j];
      moments[2][j] = qq[j];
      moments[3][j] = pp[j];
      moments[4][j] = qp[j];
    }
    columns->merge(at, n, total, moments[0], moments[1], moments[2], moments[3], moments[4]);
  }
  columns->weight += total;
}

// q and p, the latter in place of w. Stored: products that the compiler keeps unrounded would not
// be those that the moments were made of.
template <class X, class F>
void normalise(const Row<X, F>& row, const Sums& sums, F* q) {
  const F on_q = (F)(1 / sums.student), on_p = (F)(1 / sums.teacher);
  const F* es = row.exp_student;
  F* p = row.weight;
#pragma omp simd
  for (int64_t j = 0; j < row.classes; ++j) {
    q[j] = es[j] * on_q;
    p[j] *= on_p;
  }
}

template <class F>
Correlation along_row(const F* q, const F* p, int64_t classes) {
  const F mean = (F)(1.0 / (double)classes);
  double qq = 0, pp = 0, qp = 0;
  for (int64_t k = 0; k < classes; k += kBlock) {
    const int64_t n = classes - k < kBlock ? classes - k : kBlock;
    const F *of_q = q + k, *of_p = p + k;
    F sqq = 0, spp = 0, sqp = 0;
#pragma omp simd reduction(+ : sqq, spp, sqp)
    for (int64_t j = 0; j < n; ++j) {
      const F u = of_q[j] - mean, v = of_p[j] - mean;
      sqq += u * u;
      spp += v * v;
      sqp += u * v;
    }
    qq += sqq;
    pp += spp;
    qp += sqp;
  }
  return correlation(qp, qq, pp);
}

// What a column adds to the slope: on_q (q - mean_q) + on_p (p - mean_p), the means in two parts.
template <class F>
struct ColumnSlopes {
  F *on_q, *on_p, *mean_q, *mean_p, *rest_q, *rest_p;  // [classes] each
  static constexpr int64_t kArrays = 6;
};

// w, which holds p, becomes the row's slope; returns its mean under q.
template <class X, class F>
double slopes(const Row<X, F>& row, const F* of_student, double pull, double push,
              const ColumnSlopes<F>& columns) {
  const F of_q = (F)pull, of_p = (F)-push, mean = (F)(1.0 / (double)row.classes);
  double total = 0;
  for (int64_t k = 0; k < row.classes; k += kBlock) {
    const int64_t n = row.classes - k < kBlock ? row.classes - k : kBlock;
    const F* q = of_student + k;
    F* w = row.weight + k;
    const F *g = columns.on_q + k, *d = columns.on_p + k;
    const F *mean_q = columns.mean_q + k, *mean_p = columns.mean_p + k;
    const F *rest_q = columns.rest_q + k, *rest_p = columns.rest_p + k;
    F sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t j = 0; j < n; ++j) {
      const F p = w[j], u = q[j] - mean_q[j] - rest_q[j], v = p - mean_p[j] - rest_p[j];
      const F slope = of_q * (q[j] - mean) + of_p * (p - mean) + g[j] * u + d[j] * v;
      sum += q[j] * slope;
      w[j] = slope;
    }
    total += sum;
  }
  // What a vector reads beyond the row.
  for (int64_t j = row.classes; j < row.whole + kLanes; ++j) row.weight[j] = 0;
  return total;
}

template <class X, class F>
Sums sweep(int power, const Row<X, F>& row, double temperature, Exponents<F>* z) {
  switch (power) {
    case -1: return first_sweep<X, F, -1, kPair>(row, temperature, z);
    case 1: return first_sweep<X, F, 1, kPair>(row, temperature, z);
    case 2: return first_sweep<X, F, 2, kPair>(row, temperature, z);
    case 3: return first_sweep<X, F, 3, kPair>(row, temperature, z);
    case 4: return first_sweep<X, F, 4, kPair>(row, temperature, z);
    default: return first_sweep<X, F, 0, kPair>(row, temperature, z);
  }
}

// w holds the slope: the gradient is that of a divergence which weighs e^x.
template <class S, class X, class F>
void write(int power, const Row<X, F>& row, const KDLossArgs& a, const Slope<F>& slope, F uniform,
           int64_t label, double on_label, S* grad) {
  switch (power) {
    case -1:
      return write_gradient<S, X, F, -1, kCross>(row, a, slope, uniform, label, on_label, grad);
    case 1:
      return write_gradient<S, X, F, 1, kCross>(row, a, slope, uniform, label, on_label, grad);
    case 2:
      return write_gradient<S, X, F, 2, kCross>(row, a, slope, uniform, label, on_label, grad);
    case 3:
      return write_gradient<S, X, F, 3, kCross>(row, a, slope, uniform, label, on_label, grad);
    case 4:
      return write_gradient<S, X, F, 4, kCross>(row, a, slope, uniform, label, on_label, grad);
    default:
      return write_gradient<S, X, F, 0, kCross>(row, a, slope, uniform, label, on_label, grad);
  }
}

// A row's part of the losses, and of the slopes along it.
struct RowTerms {
  double hard, rho, pull, push;
};

template <class S, class X, class F>
Hard hard_of(const Batch<S>& batch, int64_t i, const Row<X, F>& row, const Exponents<F>& z,
             const Sums& sums) {
  const double shift = (batch.power == 0 ? z.hard : z.student).exact_shift();
  return hard_part(row, batch.a, batch.label_of(i), shift, log(sums.hard));
}

template <class S, class Source>
int64_t run(Batch<S>& batch, int threads) {
  using F = typename Compute<S>::type;
  using X = typename Source::template Logit<S>;
  const KDLossArgs& a = batch.a;
  const int64_t rows = a.rows, classes = a.classes;
  const int n_threads = useful_threads(threads, 3 * rows * classes, rows);
  int64_t block = (int64_t)(kBlockBytes / (2 * batch.line));
  block = block < 1 ? 1 : block > kBlockRows ? kBlockRows : block;

  const size_t terms_bytes = align64(sizeof(RowTerms) * (size_t)rows);
  const size_t lines_bytes = (batch.lines + 2 * (size_t)block) * batch.line;
  const size_t columns_bytes = align64(sizeof(double) * (size_t)(Columns::kArrays * classes));
  const size_t per_thread = lines_bytes + columns_bytes;
  Scratch scratch(terms_bytes + (size_t)ColumnSlopes<F>::kArrays * batch.line +
                  per_thread * (size_t)n_threads + align64(sizeof(Columns) * (size_t)n_threads));
  if (!scratch.ok()) return kNoMemory;
  RowTerms* terms = scratch.as<RowTerms>();
  F* slope_lines = scratch.as<F>(terms_bytes);
  const size_t line = batch.line / sizeof(F),
               first = terms_bytes + (size_t)ColumnSlopes<F>::kArrays * batch.line;
  Columns* columns = scratch.as<Columns>(first + per_thread * (size_t)n_threads);
  const int64_t share = (rows + n_threads - 1) / n_threads;
  const auto counts = [&](int64_t i) { return batch.counts(i) && batch.weight_of(i) != 0; };

#pragma omp parallel for num_threads(n_threads) if (n_threads > 1) schedule(static, 1)
  for (int part = 0; part < n_threads; ++part) {
    char* work = scratch.as<char>(first + per_thread * (size_t)part);
    F* q = reinterpret_cast<F*>(work + batch.lines * batch.line);
    F* p = q + (size_t)block * line;
    columns[part].place(reinterpret_cast<double*>(work + lines_bytes), classes);
    F weights[kBlockRows];
    int64_t filled = 0;
    const int64_t last = (part + 1) * share < rows ? (part + 1) * share : rows;
    for (int64_t i = part * share; i < last; ++i) {
      terms[i] = RowTerms{0, 0, 0, 0};
      if (!counts(i)) continue;
      Row<X, F> row;
      Source::read(batch, i, work, &row);
      row.exp_student = q + (size_t)filled * line;
      row.weight = p + (size_t)filled * line;
      cut(&row, true, -1);
      Exponents<F> z;
      const Sums sums = sweep(batch.power, row, a.temperature, &z);
      normalise(row, sums, row.exp_student);
      const Correlation along = along_row(row.exp_student, row.weight, classes);
      terms[i] = RowTerms{0, along.rho, along.pull, along.push};
      if (batch.hard) terms[i].hard = hard_of(batch, i, row, z, sums).loss;
      weights[filled++] = (F)batch.weight_of(i);
      if (filled == block) {
        add_block(q, p, (int64_t)line, weights, filled, classes, &columns[part]);
        filled = 0;
      }
    }
    add_block(q, p, (int64_t)line, weights, filled, classes, &columns[part]);
  }

  Columns& all = columns[0];
  for (int part = 1; part < n_threads; ++part) {
    const Columns& c = columns[part];
    if (c.weight == 0) continue;
    all.merge(0, classes, c.weight, c.q, c.p, c.qq, c.pp, c.qp);
    all.weight += c.weight;
  }
  ColumnSlopes<F> on;
  F** arrays[] = {&on.on_q, &on.on_p, &on.mean_q, &on.mean_p, &on.rest_q, &on.rest_p};
  for (int64_t k = 0; k < ColumnSlopes<F>::kArrays; ++k)
    *arrays[k] = slope_lines + (size_t)k * line;
  double rho = 0;
  for (int64_t j = 0; j < classes; ++j) {
    const Correlation c = correlation(all.qp[j], all.qq[j], all.pp[j]);
    rho += c.rho;
    on.on_q[j] = (F)(a.beta / (double)classes * c.pull);
    on.on_p[j] = (F)(-a.beta / (double)classes * c.push);
    on.mean_q[j] = (F)all.q[j];
    on.mean_p[j] = (F)all.p[j];
    on.rest_q[j] = (F)(all.q[j] - (double)on.mean_q[j]);
    on.rest_p[j] = (F)(all.p[j] - (double)on.mean_p[j]);
  }

  double hard_sum = 0, inter = 0;
  for (int64_t i = 0; i < rows; ++i) {
    const double weight = counts(i) ? batch.weight_of(i) : 0;
    hard_sum += weight * terms[i].hard;
    inter += weight * terms[i].rho;
  }
  const double scale = a.kd_weight * a.temperature;
  double soft = 0;
  if (batch.rows != 0)
    soft = scale * a.temperature *
           (a.alpha * (1 - inter * batch.per_row) + a.beta * (1 - rho / (double)classes));
  hard_sum *= batch.per_label;
  static_cast<F*>(a.loss)[0] = (F)(hard_sum + soft);
  if (a.parts != nullptr) {
    static_cast<F*>(a.parts)[0] = (F)hard_sum;
    static_cast<F*>(a.parts)[1] = (F)soft;
  }
  if (a.grad == nullptr) return kOk;

  const double on_row = a.alpha * batch.per_row;
#pragma omp parallel for num_threads(n_threads) if (n_threads > 1) schedule(static, 1)
  for (int part = 0; part < n_threads; ++part) {
    char* work = scratch.as<char>(first + per_thread * (size_t)part);
    const int64_t last = (part + 1) * share < rows ? (part + 1) * share : rows;
    for (int64_t i = part * share; i < last; ++i) {
      S* grad = batch.gradient_of(i);
      if (!counts(i)) {
        memset((void*)grad, 0, sizeof(S) * (size_t)classes);
        continue;
      }
      const double weight = batch.weight_of(i), on_hard = a.ce_weight * batch.per_label * weight;
      Row<X, F> row;
      Source::read(batch, i, work, &row);
      cut(&row, true, -1);
      Exponents<F> z;
      const Sums sums = sweep(batch.power, row, a.temperature, &z);
      F* of_student = row.ratio;
      normalise(row, sums, of_student);
      const double mean =
          slopes(row, of_student, on_row * terms[i].pull, on_row * terms[i].push, on);
      const Hard hard = batch.hard ? hard_of(batch, i, row, z, sums) : Hard{0, 0, 0, 0};
      const Slope<F> slope = {(F)(batch.hard ? on_hard * hard.on_sum / sums.hard : 0), (F)mean,
                              (F)(scale * weight / sums.student)};
      write(batch.power, row, a, slope, (F)(on_hard * hard.uniform),
            batch.hard ? batch.label_of(i) : -1, -on_hard * hard.on_label, grad);
    }
    stream_fence();  // before another thread is told that the rows are there
  }
  return kOk;
}

template <class S>
int64_t by_source(const KDLossArgs& a, int threads) {
  Batch<S> batch(a);
  const int64_t status = batch.count();
  if (status != kOk) return status;
  return batch.as_it_is ? run<S, AsItIs>(batch, threads) : run<S, Copied>(batch, threads);
}

}  // namespace

int64_t dist(const KDLossArgs& a, int threads) {
  switch (a.dtype) {
    case kFloat32: return by_source<float>(a, threads);
    case kFloat64: return by_source<double>(a, threads);
    case kBFloat16: return by_source<BFloat16>(a, threads);
    default: return by_source<Float16>(a, threads);
  }
}

}  // namespace FXK_ISA
}  // namespace fxk
