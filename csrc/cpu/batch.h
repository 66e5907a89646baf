// A batch of rows: what a mean divides by, and each row as the sweeps read it: student and teacher
// as they lie in memory, or copies of them when the teacher comes as probabilities, as some
// classes' values or from several models.
#pragma once
#include "rows.h"

namespace fxk {
namespace FXK_ISA {
namespace {

// One model's row as logits of every class.
template <class X, class F>
void spread(const KDLossArgs& a, int64_t model, int64_t i, F* out) {
  const X* x =
      static_cast<const X*>(a.teacher) + model * a.teacher_model_stride + i * a.teacher_stride;
  if (a.teacher_indices != nullptr) {
    const int64_t* at = a.teacher_indices + (model * a.rows + i) * a.teacher_classes;
    for (int64_t j = 0; j < a.classes; ++j) out[j] = -(F)INFINITY;
    for (int64_t j = 0; j < a.teacher_classes; ++j)
      out[at[j]] = a.teacher_form == 0 ? load(x + j) : (F)kLn2 * log2_of((F)load(x + j));
    return;
  }
  if (a.teacher_form == 0) {
#pragma omp simd
    for (int64_t j = 0; j < a.classes; ++j) out[j] = load(x + j);
  } else {
#pragma omp simd
    for (int64_t j = 0; j < a.classes; ++j) out[j] = (F)kLn2 * log2_of((F)load(x + j));
  }
}

// The teacher's row as logits whose softmax at T is the target: of several models, the logarithm
// of their weighted probabilities. `work` holds another row.
template <class X, class F>
void prepare(const KDLossArgs& a, int64_t i, F* out, F* work) {
  if (a.models == 1) return spread<X, F>(a, 0, i, out);
  const double factor = kLog2E / a.temperature;
  for (int64_t j = 0; j < a.classes; ++j) out[j] = 0;
  for (int64_t model = 0; model < a.models; ++model) {
    spread<X, F>(a, model, i, work);
    F highest = -(F)INFINITY;
    for (int64_t j = 0; j < a.classes; ++j) highest = work[j] > highest ? work[j] : highest;
    const Exponent<F> z(highest, factor, false);
    double sum = 0;
    for (int64_t k = 0; k < a.classes; k += kBlock) {
      const int64_t n = a.classes - k < kBlock ? a.classes - k : kBlock;
      F part = 0;
      F* x = work + k;
#pragma omp simd reduction(+ : part)
      for (int64_t j = 0; j < n; ++j) {
        x[j] = exp2_of(z.template of<false>(x[j]));
        part += x[j];
      }
      sum += part;
    }
    const F share = (F)(a.teacher_weights[model] / sum);
#pragma omp simd
    for (int64_t j = 0; j < a.classes; ++j) out[j] += share * work[j];
  }
#pragma omp simd
  for (int64_t j = 0; j < a.classes; ++j) out[j] = (F)(a.temperature * kLn2) * log2_of(out[j]);
}

template <class F>
void prepare_from(const KDLossArgs& a, int64_t i, F* out, F* work) {
  switch (a.teacher_dtype) {
    case kFloat32: return prepare<float, F>(a, i, out, work);
    case kFloat64: return prepare<double, F>(a, i, out, work);
    case kBFloat16: return prepare<BFloat16, F>(a, i, out, work);
    default: return prepare<Float16, F>(a, i, out, work);
  }
}

// Rows are read as they are, or as copies, by one name.
struct AsItIs {
  template <class S>
  using Logit = S;
  template <class AnyBatch, class AnyRow>
  static void read(const AnyBatch& batch, int64_t i, char* scratch, AnyRow* row) {
    batch.read(i, scratch, row);
  }
};
struct Copied {
  template <class S>
  using Logit = typename Compute<S>::type;
  template <class AnyBatch, class AnyRow>
  static void read(const AnyBatch& batch, int64_t i, char* scratch, AnyRow* row) {
    batch.read_copy(i, scratch, row);
  }
};

template <class S>
struct Batch {
  using F = typename Compute<S>::type;
  const KDLossArgs& a;
  bool hard, soft, as_it_is;
  int power;            // of e^x that e^s is; 0: an exponential of its own, -1: no hard part
  double rows, labels;  // weights of what counts
  double per_row, per_label;
  size_t lines;  // scratch of a thread: `line` bytes each
  size_t line;

  explicit Batch(const KDLossArgs& args) : a(args), rows(0), labels(0), per_row(1), per_label(1) {
    hard = a.labels != nullptr && a.ce_weight != 0;
    soft = a.kd_weight != 0;
    as_it_is = a.models == 1 && a.teacher_indices == nullptr && a.teacher_form == 0 &&
               a.teacher_dtype == a.dtype;
    const double t = a.temperature;
    power = !hard ? -1 : t == 1 ? 1 : t == 2 ? 2 : t == 3 ? 3 : t == 4 ? 4 : 0;
    // e^x, w, e^s, y - x and, for a teacher in another form, both rows and one to work in.
    lines = as_it_is ? 4 : 7;
    line = align64(sizeof(F) * (size_t)(a.classes + kLanes));
  }

  // kOk, or what is wrong with the labels or the teacher's indices.
  int64_t count() {
    for (int64_t i = 0; i < a.rows; ++i) {
      const double weight = weight_of(i);
      if (a.labels != nullptr) {
        const int64_t y = a.labels[i];
        if (y == a.ignore_index) continue;
        if (y < 0 || y >= a.classes) return i;
        labels += weight * (a.class_weight ? a.class_weight[y] : 1.0);
      }
      rows += weight;
    }
    if (a.teacher_indices != nullptr) {
      const int64_t indices = a.models * a.rows * a.teacher_classes;
      for (int64_t j = 0; j < indices; ++j)
        if (a.teacher_indices[j] < 0 || a.teacher_indices[j] >= a.classes) return kBadIndex;
    }
    if (a.reduction == 2) {
      per_row = rows != 0 ? 1.0 / rows : 0.0;
      per_label = labels != 0 ? 1.0 / labels : 0.0;
    }
    return kOk;
  }

  double weight_of(int64_t i) const { return a.row_weight ? a.row_weight[i] : 1.0; }
  int64_t label_of(int64_t i) const { return a.labels ? a.labels[i] : -1; }
  bool counts(int64_t i) const { return a.labels == nullptr || a.labels[i] != a.ignore_index; }
  S* gradient_of(int64_t i) const {
    return a.grad ? static_cast<S*>(a.grad) + i * a.classes : nullptr;
  }

  // Row i, its logits as they lie in memory or as numbers to compute with; `scratch` holds its
  // lines.
  void read(int64_t i, char* scratch, Row<S, F>* row) const {
    place(static_cast<const S*>(a.student) + i * a.student_stride,
          static_cast<const S*>(a.teacher) + i * a.teacher_stride, scratch, row);
  }
  void read_copy(int64_t i, char* scratch, Row<F, F>* row) const {
    F *teacher = buffer(scratch, 4), *student = buffer(scratch, 6);
    prepare_from<F>(a, i, teacher, buffer(scratch, 5));
    const S* from = static_cast<const S*>(a.student) + i * a.student_stride;
#pragma omp simd
    for (int64_t j = 0; j < a.classes; ++j) student[j] = load(from + j);
    place(student, teacher, scratch, row);
  }

 private:
  F* buffer(char* scratch, int k) const { return reinterpret_cast<F*>(scratch + (size_t)k * line); }
  template <class X>
  void place(const X* student, const X* teacher, char* scratch, Row<X, F>* row) const {
    row->s = student;
    row->t = teacher;
    row->exp_student = buffer(scratch, 0);
    row->weight = buffer(scratch, 1);
    row->exp_hard = buffer(scratch, 2);
    row->ratio = buffer(scratch, 3);
    row->classes = a.classes;
    row->whole = a.classes & ~(kLanes - 1);
  }
};

}  // namespace

// The divergence whose columns tie the rows together: dist.cpp, called by kd_loss.cpp.
int64_t dist(const KDLossArgs& a, int threads);

}  // namespace FXK_ISA
}  // namespace fxk
