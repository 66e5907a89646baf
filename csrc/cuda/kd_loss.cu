// kd_loss: ce_weight * CE(student, labels) + kd_weight * T^2 * D(teacher_T, student_T), loss and
// gradient in one launch. With x = (s - max s)/T, y = (t - max t)/T, q = e^x / sum e^x, p = e^y /
// sum e^y the divergences D and what they add to the gradient with respect to s/T are
//   forward KL  sum p (y - x) + log sum e^x - log sum e^y      q - p
//   reverse KL  R = sum q (x - y) + log sum e^y - log sum e^x  q (x - y - sum q (x - y))
//   JSD         b KL(p||m) + (1-b) KL(q||m), m = bp + (1-b)q   (1-b) q (log q/m - KL(q||m))
//   TVD         sum |q - p| / 2                                q (sgn - sum q sgn) / 2
//   decoupled   a KL of (label, rest) + b KL among the rest    see Decoupled
// so the gradient of every one is e^x times something plus a multiple of e^y, and of the hard part
// a multiple of e^(s - max s), a power of e^x for T = 1, 2, 3, 4.
//
// A row belongs to a warp or to a block. Up to a size it stays in registers; beyond, it is read
// again for each sweep, backwards every second time: what was read last is still in the L2 cache.
#include "block.cuh"
#include "kd_loss.h"

// Labels and weights that all blocks together may read to find the totals of a mean; beyond, a
// launch of its own is cheaper.
#ifndef FXK_TOTALS_READS
#define FXK_TOTALS_READS (1 << 21)
#endif

namespace fxk {
namespace cuda {
namespace {

constexpr double kLog2E = 1.4426950408889634, kLn2 = 0.6931471805599453;

enum Divergence : int { kForwardKL, kReverseKL, kJSD, kTVD, kDecoupled, kNone };

// The arguments as the kernels read them, from constant memory.
template <class F>
struct Params {
  const void* student;
  const void* teacher;
  const int64_t* labels;
  const double* class_weight;
  const double* row_weight;
  void* grad;
  void* loss;
  void* parts;
  double* partials;  // [2, blocks]
  int* ticket;
  int64_t rows, student_stride, teacher_stride, ignore_index;
  double temperature, ce_weight, kd_weight, alpha, beta, label_smoothing;
  int classes, reduction;
  int width;     // threads of a row, where a warp has several rows
  bool hard;     // the hard part is wanted
  bool counted;  // `parts` holds the reciprocal totals for now
  // Exponents in base 2: z = logit * factor + offset, one fused multiply-add. The rounding of the
  // offset is common to the row and cancels against the row's sum.
  F factor, hard_factor;
  F power[4];  // e^(s - max) = sum of power[k] (e^x)^(k+1)
  bool apart;  // T has no such power: an exponential of its own
  // Natural units of a base-2 exponent: at T, and of the logits of the soft and of the hard part.
  // The roundings of the factors are in them.
  double unit, logit_unit, hard_logit_unit;
  double spread;  // the share of a class in label smoothing
};

// The hard and the soft part of something.
struct Pair {
  double hard, soft;
};

template <class F>
__device__ __forceinline__ F infinity() {
  return (F)HUGE_VAL;
}
template <class F>
__device__ __forceinline__ F not_a_number() {
  return infinity<F>() - infinity<F>();
}

// A row and how its memory is cut into chunks of 16 bytes of student: the first chunk begins `skew`
// elements before the row, so that chunks of an odd row are aligned as well.
template <class S, class T>
struct Row {
  static constexpr int kVec = 16 / sizeof(S);
  const S* s;
  const T* t;
  S* grad;
  int n, skew, label;
  bool vector;  // chunks are aligned in all three

  template <class F>
  __device__ __forceinline__ Row(const Params<F>& a, int64_t i, int64_t label_, bool soft)
      : s(static_cast<const S*>(a.student) + i * a.student_stride),
        t(static_cast<const T*>(a.teacher) + i * a.teacher_stride),
        grad(a.grad ? static_cast<S*>(a.grad) + i * a.classes : nullptr),
        n(a.classes),
        skew((int)((uintptr_t)s / sizeof(S) % kVec)),
        label((int)label_) {
    vector = (!soft || ((uintptr_t)t - skew * sizeof(T)) % 16 == 0) &&
             (!grad || ((uintptr_t)grad - skew * sizeof(S)) % 16 == 0);
  }
  __device__ __forceinline__ bool whole(int first) const {
    return vector && first >= 0 && first + kVec <= n;
  }
  __device__ __forceinline__ bool holds(int j) const { return (unsigned)j < (unsigned)n; }

  // The chunk from `first` on, as far as it lies in the row.
  template <class F>
  __device__ __forceinline__ void store(int first, const F* g) const {
    if (whole(first)) {
      store_vector(g, grad + first);
    } else {
#pragma unroll
      for (int e = 0; e < kVec; ++e)
        if (holds(first + e)) narrow(g[e], grad + first + e);
    }
  }

  template <class F, class Group>
  __device__ void fill(F value, const Group& group) const {
    F g[kVec];
#pragma unroll
    for (int e = 0; e < kVec; ++e) g[e] = value;
    for (int first = group.index() * kVec - skew; first < n; first += group.size() * kVec)
      store(first, g);
  }
};

template <class F>
__device__ __forceinline__ F power_of(F e, const Params<F>& a) {
  return e * fused(e, fused(e, fused(e, a.power[3], a.power[2]), a.power[1]), a.power[0]);
}

// What a row takes off its exponents; of the reverse KL also x - y at the student's maximum, since
// its gradient is the difference of such gaps, and it is the small ones that need the digits.
template <class F>
struct Offsets {
  F student = 0, teacher = 0, hard = 0, gap = 0;
};

// Maxima: of the student, of the teacher, and the teacher's logit where the student has its own.
template <class F>
struct Top {
  F student = -infinity<F>(), teacher = -infinity<F>(), beside = -infinity<F>();
};

template <class F>
struct Point {
  F student, teacher;  // e^x, e^y
  F gap;               // y - x; of the reverse KL x - y, less that at the maximum
};

template <int kDivergence, class F>
__device__ __forceinline__ Point<F> point(F s, F t, const Offsets<F>& z, const Params<F>& a) {
  Point<F> p;
  const F x = fused(s, a.factor, z.student);
  p.student = exp2_of(x);
  p.teacher = p.gap = 0;
  if (kDivergence != kNone) {
    const F y = fused(t, a.factor, z.teacher);
    p.teacher = exp2_of(y);
    p.gap = kDivergence == kReverseKL ? x - y - z.gap : y - x;
  }
  return p;
}
template <class F>
__device__ __forceinline__ F hard_exponential(F s, const Offsets<F>& z, const Params<F>& a) {
  return exp2_of(fused(s, a.hard_factor, z.hard));
}

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

// What a thread holds of a row at a time.
template <class S, class T, int kDivergence, int kChunks_>
struct Tile {
  using F = typename Compute<S>::type;
  static constexpr int kChunks = kChunks_, kVec = Row<S, T>::kVec, kSize = kChunks * kVec;
  static constexpr bool kSoft = kDivergence != kNone;
  static constexpr int kTeacherWords = kSoft ? kVec * (int)sizeof(T) / 16 : 1;
  F s[kSize], t[kSize];
  int first, step;

  template <class Group>
  __device__ __forceinline__ void load(const Row<S, T>& row, const Group& group, int tile) {
    step = group.size() * kVec;
    first = tile * kChunks * step + group.index() * kVec - row.skew;
    // All loads before the first use: they wait for memory together.
    uint4 student[kChunks], teacher[kChunks][kTeacherWords];
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
      const int at = first + c * step;
      student[c] = minus_infinities(row.s);
#pragma unroll
      for (int i = 0; i < kTeacherWords; ++i) teacher[c][i] = minus_infinities(row.t);
      if (row.whole(at)) {
        student[c] = *reinterpret_cast<const uint4*>(row.s + at);
        if (kSoft) {
          const uint4* from = reinterpret_cast<const uint4*>(row.t + at);
#pragma unroll
          for (int i = 0; i < kTeacherWords; ++i) teacher[c][i] = from[i];
        }
      }
    }
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
      unpack(student[c], row.s, s + c * kVec);
      if (kSoft) {
#pragma unroll
        for (int i = 0; i < kTeacherWords; ++i)
          unpack(teacher[c][i], row.t, t + c * kVec + i * (16 / (int)sizeof(T)));
      }
    }
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
      const int at = first + c * step;
      if (!row.whole(at) && at < row.n) {
#pragma unroll
        for (int e = 0; e < kVec; ++e) {
          if (!row.holds(at + e)) continue;
          s[c * kVec + e] = widen(row.s[at + e]);
          if (kSoft) t[c * kVec + e] = (F)widen(row.t[at + e]);
        }
      }
      // The label's class stays out; what it would have given is not subtracted but left away.
      if (kDivergence == kDecoupled && (unsigned)(row.label - at) < (unsigned)kVec) {
#pragma unroll
        for (int e = 0; e < kVec; ++e)
          if (at + e == row.label) s[c * kVec + e] = t[c * kVec + e] = -infinity<F>();
      }
    }
  }

  __device__ __forceinline__ void highest(Top<F>& top) const {
#pragma unroll
    for (int i = 0; i < kSize; ++i) {
      if (kDivergence == kReverseKL && s[i] > top.student) top.beside = t[i];
      top.student = larger(top.student, s[i]);
      if (kSoft) top.teacher = larger(top.teacher, t[i]);
    }
  }
  __device__ __forceinline__ Point<F> at(int i, const Offsets<F>& z, const Params<F>& a) const {
    return point<kDivergence>(s[i], kSoft ? t[i] : (F)0, z, a);
  }
};

// Sums over a row; the last of them for the KL divergences alone.
enum { kHardSum, kStudentSum, kTeacherSum, kDot };
template <int kDivergence>
constexpr int kSums = kDivergence == kNone                         ? 1
                      : kDivergence == kJSD || kDivergence == kTVD ? 3
                                                                   : 4;

template <int kDivergence, class AnyTile, class F>
__device__ __forceinline__ void add(const AnyTile& tile, int n, const Offsets<F>& z,
                                    const Params<F>& a, F (&total)[kSums<kDivergence>]) {
  constexpr int kCount = kSums<kDivergence>;
#pragma unroll
  for (int c = 0; c < AnyTile::kChunks; ++c) {
    if (tile.first + c * tile.step >= n) break;
    F sum[kCount] = {};
#pragma unroll
    for (int i = c * AnyTile::kVec; i < (c + 1) * AnyTile::kVec; ++i) {
      const Point<F> p = tile.at(i, z, a);
      if constexpr (kDivergence == kNone) {
        sum[kHardSum] += p.student;
      } else {
        sum[kHardSum] += power_of(p.student, a);
        sum[kStudentSum] += p.student;
        sum[kTeacherSum] += p.teacher;
      }
      if constexpr (kCount > kDot) {
        // A class of probability 0 has no say, whatever the other side thinks of it.
        const F weight = kDivergence == kReverseKL ? p.student : p.teacher;
        if (weight != 0) sum[kDot] = fused(weight, p.gap, sum[kDot]);
      }
    }
    if (kDivergence != kNone && a.apart) {
#pragma unroll
      for (int i = c * AnyTile::kVec; i < (c + 1) * AnyTile::kVec; ++i)
        sum[kHardSum] += hard_exponential(tile.s[i], z, a);
    }
#pragma unroll
    for (int i = 0; i < kCount; ++i) total[i] += sum[i];
  }
}

template <int kDivergence, class F, class Group>
__device__ __forceinline__ Top<F> over_group(const Top<F>& own, Group& group) {
  Top<F> top;
  F high[2] = {own.student, own.teacher};
  group.template all<Max>(high);
  top.student = high[0];
  top.teacher = high[1];
  if (kDivergence == kReverseKL) {
    F beside[1] = {own.student == top.student ? own.beside : -infinity<F>()};
    group.template all<Max>(beside);
    top.beside = beside[0];
  }
  return top;
}

// Higher maxima: the sums so far are brought to them.
template <int kDivergence, class F>
__device__ __forceinline__ void raise(Top<F>& high, const Top<F>& top, Offsets<F>& z,
                                      const Params<F>& a, F (&total)[kSums<kDivergence>]) {
  const F none = -infinity<F>();
  // A row of -inf alone has no maximum to take off. Before the first finite logit the sums are 0
  // (or NaN, or infinite, and stay so): nothing to bring anywhere.
  Offsets<F> to;
  if (top.student != none) to.student = -top.student * a.factor;
  if (top.student != none) to.hard = -top.student * a.hard_factor;
  if (top.teacher != none) to.teacher = -top.teacher * a.factor;
  if (kDivergence == kReverseKL && top.beside != none)
    to.gap = -fused(top.beside, a.factor, to.teacher);
  const F dx = high.student == none ? (F)0 : to.student - z.student;
  const F dy = high.teacher == none ? (F)0 : to.teacher - z.teacher;
  const F on_student = exp2_of(dx), on_teacher = exp2_of(dy);
  if (kDivergence == kNone)
    total[kHardSum] *= on_student;
  else if (high.student != none)
    total[kHardSum] *= a.apart ? exp2_of(to.hard - z.hard) : power_of(on_student, a);
  if constexpr (kSums<kDivergence> > kDot) {
    constexpr bool kReverse = kDivergence == kReverseKL;
    const F by = kReverse ? on_student : on_teacher;
    const F moved =
        kReverse ? (dx - dy + z.gap - to.gap) * total[kStudentSum] : (dy - dx) * total[kTeacherSum];
    total[kDot] = by == 0 ? (F)0 : by * (total[kDot] + moved);
  }
  if constexpr (kDivergence != kNone) {
    total[kStudentSum] *= on_student;
    total[kTeacherSum] *= on_teacher;
  }
  z = to;
  high = top;
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

// What a block knows before its first row.
struct Common {
  Pair mean;          // reciprocal totals
  double all_weight;  // the mean of the class weights
};

// Loss of one row, valid in the group's first thread, and, where wanted, its gradient.
template <bool kOnChip, int kChunks, int kDivergence, class S, class T, class F, class Group>
__device__ __forceinline__ Pair row_loss(const Params<F>& a, const Row<S, T>& row, int64_t i,
                                         const Common& common, Group& group) {
  using AnyTile = Tile<S, T, kDivergence, kChunks>;
  constexpr int kVec = AnyTile::kVec;
  constexpr bool kTwice = kDivergence == kJSD || kDivergence == kTVD;
  constexpr bool kSoft = kDivergence != kNone;

  AnyTile tile;
  const int64_t per_tile = (int64_t)AnyTile::kSize * group.size();
  const int tiles = kOnChip ? 1 : (int)((row.n + row.skew + per_tile - 1) / per_tile);
  Offsets<F> z;
  F sum[kSums<kDivergence>] = {};
  Top<F> high;
  for (int k = 0; k < tiles; ++k) {
    tile.load(row, group, k);
    Top<F> top = high;
    tile.highest(top);
    if (kOnChip) top = over_group<kDivergence>(top, group);
    if (kOnChip || top.student > high.student || top.teacher > high.teacher)
      raise<kDivergence>(high, top, z, a, sum);
    add<kDivergence>(tile, row.n, z, a, sum);
  }
  if (!kOnChip) raise<kDivergence>(high, over_group<kDivergence>(high, group), z, a, sum);
  group.template all<Sum>(sum);

  Slope<F> k = {};
  F second[2] = {};
  if constexpr (kTwice) {
    k.beta = (F)a.beta;
    k.of_student_sum = 1 / sum[kStudentSum];
    k.of_teacher_sum = 1 / sum[kTeacherSum];
    if (kDivergence == kJSD) k.shift = log2_of(sum[kStudentSum]) - log2_of(sum[kTeacherSum]);
    for (int n = tiles - 1; n >= 0; --n) {
      if (!kOnChip) tile.load(row, group, n);
#pragma unroll
      for (int c = 0; c < kChunks; ++c) {
        if (tile.first + c * tile.step >= row.n) break;
        F part[2] = {};
#pragma unroll
        for (int e = 0; e < kVec; ++e) {
          const Point<F> p = tile.at(c * kVec + e, z, a);
          const F q = p.student * k.of_student_sum, t = p.teacher * k.of_teacher_sum;
          if (kDivergence == kJSD) {
            const ToMixture<F> to(p.gap + k.shift, k.beta);
            if (t != 0) part[0] = fused(t, to.teacher, part[0]);
            if (q != 0) part[1] = fused(q, to.student, part[1]);
          } else {
            part[0] += magnitude(q - t);
            part[1] = fused(q, sign_of(q - t), part[1]);
          }
        }
        second[0] += part[0];
        second[1] += part[1];
      }
    }
    group.template all<Sum>(second);
  }

  const double temperature = kSoft ? a.temperature : 1;
  if (row.grad != nullptr) {
    const double on_row = a.row_weight ? a.row_weight[i] : 1;
    const double label_weight = a.hard && a.class_weight ? a.class_weight[row.label] : 1;
    const F soft_scale = (F)(a.kd_weight * temperature * common.mean.soft * on_row);
    const F hard_scale = a.hard ? (F)(a.ce_weight * common.mean.hard * on_row) : (F)0;
    const F picked = hard_scale * (F)((1 - a.label_smoothing) * label_weight);
    const F mass = picked + hard_scale * (F)(a.label_smoothing * common.all_weight);
    const F uniform = hard_scale * (F)a.spread;
    const bool by_class = uniform != 0 && a.class_weight != nullptr;
    k.uniform = by_class ? (F)0 : uniform;
    F on_hard = a.hard ? mass / sum[kHardSum] : (F)0, at_label = 0;
    if constexpr (kDivergence == kForwardKL) {
      k.student = soft_scale / sum[kStudentSum];
      k.teacher = -soft_scale / sum[kTeacherSum];
    } else if constexpr (kDivergence == kReverseKL) {
      k.student = soft_scale * (F)a.unit / sum[kStudentSum];
      k.mean = sum[kDot] / sum[kStudentSum];
    } else if constexpr (kDivergence == kJSD) {
      k.student = soft_scale * (F)(a.unit * (1 - a.beta)) * k.of_student_sum;
      k.mean = second[1];
    } else if constexpr (kDivergence == kTVD) {
      k.student = soft_scale / 2 * k.of_student_sum;
      k.mean = second[1];
    } else if constexpr (kDivergence == kDecoupled) {
      const Decoupled<F> d(a, (F)widen(row.s[row.label]), (F)widen(row.t[row.label]), z, sum);
      const F alpha = (F)a.alpha, beta = (F)a.beta, shift = d.shift();
      // Without another class, or with all of them masked, there is nothing among the rest.
      k.student =
          sum[kStudentSum] == 0 ? (F)0 : soft_scale * (beta - alpha * shift) / sum[kStudentSum];
      k.teacher = sum[kTeacherSum] == 0 ? (F)0 : -soft_scale * beta / sum[kTeacherSum];
      at_label = soft_scale * alpha * shift;
      if (a.hard) {
        on_hard = sum[kHardSum] == 0 ? (F)0 : on_hard * exp_of(d.hard.rest);
        at_label += picked * expm1_of(d.hard.label) + (mass - picked) * exp_of(d.hard.label) -
                    uniform * (F)label_weight;
      }
    }
    if constexpr (kDivergence == kNone) {
      k.student = on_hard;
    } else if (!a.apart) {
#pragma unroll
      for (int n = 0; n < 4; ++n) k.hard[n] = a.power[n] * on_hard;
      if (kLinear<kDivergence>) k.student += k.hard[0];
    }
    for (int n = 0; n < tiles; ++n) {
      if (!kOnChip) tile.load(row, group, kTwice ? n : tiles - 1 - n);
#pragma unroll
      for (int c = 0; c < kChunks; ++c) {
        const int at = tile.first + c * tile.step;
        if (at >= row.n) break;
        F g[kVec];
#pragma unroll
        for (int e = 0; e < kVec; ++e) g[e] = slope_at<kDivergence>(tile.at(c * kVec + e, z, a), k);
        if (kSoft && a.apart) {
#pragma unroll
          for (int e = 0; e < kVec; ++e)
            g[e] = fused(on_hard, hard_exponential(tile.s[c * kVec + e], z, a), g[e]);
        }
        if (by_class) {
#pragma unroll
          for (int e = 0; e < kVec; ++e)
            if (row.holds(at + e)) g[e] -= uniform * (F)a.class_weight[at + e];
        }
        row.store(at, g);
      }
    }
    // The label's entry again by the thread that wrote it: taking something off a stored one would
    // round twice.
    const bool has_own = a.hard || kDivergence == kDecoupled;
    if (has_own && (row.label + row.skew) / kVec % group.size() == group.index()) {
      if (kDivergence != kDecoupled) {
        const F s = widen(row.s[row.label]), t = kSoft ? (F)widen(row.t[row.label]) : (F)0;
        at_label = slope_at<kDivergence>(point<kDivergence>(s, t, z, a), k) - picked;
        if (kSoft && a.apart) at_label = fused(on_hard, hard_exponential(s, z, a), at_label);
        if (by_class) at_label -= uniform * (F)label_weight;
      }
      narrow(at_label, row.grad + row.label);
    }
  }

  // The loss in double precision, when the registers are free again.
  const double on_row = a.row_weight ? a.row_weight[i] : 1;
  Pair loss = {0, 0};
  if (a.hard) {
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
    if (group.index() == 0) {
      double log_sum = log_of((double)sum[kHardSum]);
      if (kDivergence == kDecoupled) {
        const double above = s - shift - log_sum;
        log_sum += larger(above, 0.0) + log1p_of(exp_of(-magnitude(above)));
        if (sum[kHardSum] == 0) log_sum = s - shift;
      }
      const double picked = (1 - a.label_smoothing) * weight;
      const double mass = picked + a.label_smoothing * common.all_weight;
      loss.hard = a.ce_weight * on_row * (mass * log_sum - picked * (s - shift) - spread);
    }
  }
  if constexpr (kSoft) {
    if (group.index() == 0) {
      const double student = sum[kStudentSum], teacher = sum[kTeacherSum];
      if constexpr (kDivergence == kForwardKL) {
        loss.soft = a.unit * sum[kDot] / teacher + log_of(student / teacher);
      } else if constexpr (kDivergence == kReverseKL) {
        loss.soft = a.unit * (sum[kDot] / student + (double)z.gap) - log_of(student / teacher);
      } else if constexpr (kDivergence == kJSD) {
        loss.soft = a.unit * (a.beta * second[0] + (1 - a.beta) * second[1]);
      } else if constexpr (kDivergence == kTVD) {
        loss.soft = (double)second[0] / 2;
      } else {
        const Decoupled<F> d(a, (F)widen(row.s[row.label]), (F)widen(row.t[row.label]), z, sum);
        const double others = teacher == 0 ? 0
                              : student == 0
                                  ? infinity<double>()
                                  : a.unit * sum[kDot] / teacher + log_of(student / teacher);
        loss.soft = a.alpha * (double)d.target() + a.beta * others;
      }
      loss.soft *= a.kd_weight * temperature * temperature * on_row;
    }
  }
  return loss;
}

__device__ __forceinline__ double reciprocal(double total) { return total != 0 ? 1 / total : 0; }

// Sums over rows [first, last) of what a mean divides by, of this thread's share.
template <class F>
__device__ __forceinline__ void count(const Params<F>& a, int64_t first, int64_t last,
                                      double* sum) {
#pragma unroll 4
  for (int64_t i = first + (int)threadIdx.x; i < last; i += (int)blockDim.x) {
    const int64_t label = a.labels ? a.labels[i] : -1;
    const bool counts = a.labels == nullptr || label != a.ignore_index;
    const double on_row = !counts ? 0 : a.row_weight ? a.row_weight[i] : 1;
    const bool known = a.class_weight != nullptr && label >= 0 && label < a.classes;
    sum[0] += on_row * (known ? a.class_weight[label] : 1.0);
    sum[1] += on_row;
  }
}

// The last block to come here of a launch; it sees what the others wrote before, and it sets the
// ticket back.
__device__ __forceinline__ bool is_last_block(int* ticket) {
  if (gridDim.x == 1) return true;
  FXK_SHARED(bool, last);
  if (threadIdx.x == 0) {
    __threadfence();
    last = atomicAdd(ticket, 1) == (int)gridDim.x - 1;
    if (last) *ticket = 0;
  }
  __syncthreads();
  __threadfence();
  return last;
}

// One pair per block to the scratch memory; true in the last block, with the sum over all of them
// in every thread of it.
template <class F>
__device__ __forceinline__ bool sum_over_blocks(const Params<F>& a, double (&sum)[2],
                                                Block& block) {
  if (gridDim.x == 1) return true;
  if (threadIdx.x == 0) {
    a.partials[2 * (int64_t)blockIdx.x] = sum[0];
    a.partials[2 * (int64_t)blockIdx.x + 1] = sum[1];
  }
  if (!is_last_block(a.ticket)) return false;
  // In an order of its own: any run of the launch gives the same bits.
  const volatile double* partials = a.partials;
  sum[0] = sum[1] = 0;
  for (int64_t i = threadIdx.x; i < gridDim.x; i += blockDim.x) {
    sum[0] += partials[2 * i];
    sum[1] += partials[2 * i + 1];
  }
  block.all<Sum>(sum);
  return true;
}

template <class F>
__global__ void __launch_bounds__(512) totals_kernel(const Params<F> a) {
  Block block;
  const int64_t share = (a.rows + gridDim.x - 1) / gridDim.x, first = share * blockIdx.x;
  double sum[2] = {0, 0};
  count(a, first, first + share < a.rows ? first + share : a.rows, sum);
  block.all<Sum>(sum);
  if (sum_over_blocks(a, sum, block) && threadIdx.x == 0) {
    static_cast<F*>(a.parts)[0] = (F)reciprocal(sum[0]);
    static_cast<F*>(a.parts)[1] = (F)reciprocal(sum[1]);
  }
}

// Rows in registers, one per warp or one per block, and rows that are read in a loop.
enum Layout : int { kWarpRow, kWideWarpRow, kBlockRow, kLongRow };
// What the registers give: chunks of each matrix that a thread holds at a time, threads of a block
// and blocks of a multiprocessor.
template <class S, int kLayout>
constexpr int kChunksOf = kLayout == kWarpRow       ? 8 * (int)sizeof(S) / 16
                          : kLayout == kWideWarpRow ? 32 * (int)sizeof(S) / 16
                          : kLayout == kBlockRow    ? 16 * (int)sizeof(S) / 16
                          : sizeof(S) == 8          ? 1
                                                    : 2;
template <int kLayout>
constexpr int kThreads = kLayout == kWarpRow || kLayout == kWideWarpRow ? 128 : 384;
template <class S, int kLayout>
constexpr int kBlocks = sizeof(S) == 8            ? 1
                        : kLayout == kWarpRow     ? 5
                        : kLayout == kWideWarpRow ? 3
                                                  : 2;
constexpr int kLeastWidth = 4, kMostGroups = 32;  // threads of a row, rows of a block at a time

template <class S, class T, int kDivergence, int kLayout>
__global__ void __launch_bounds__((kThreads<kLayout>), (kBlocks<S, kLayout>))
    kd_loss_kernel(const Params<typename Compute<S>::type> a) {
  using F = typename Compute<S>::type;
  constexpr bool kPerWarp = kLayout == kWarpRow || kLayout == kWideWarpRow;
  constexpr bool kSoft = kDivergence != kNone;
  Block block;
  FXK_SHARED(Common, common);
  // Not in registers: the first of a row's threads alone has something to add.
  using Totals = Pair[kMostGroups];
  FXK_SHARED(Totals, totals);
  {
    double total[3] = {0, 0, 0};
    const bool to_count = a.reduction == 2 && !a.counted && (a.labels || a.row_weight);
    if (to_count) count(a, 0, a.rows, total);
    if (a.class_weight && a.label_smoothing > 0)
      for (int j = (int)threadIdx.x; j < a.classes; j += (int)blockDim.x)
        total[2] += a.class_weight[j];
    block.all<Sum>(total);
    if (threadIdx.x == 0) {
      common.all_weight = a.class_weight ? total[2] / a.classes : 1;
      common.mean = {1, 1};
      if (to_count) {
        common.mean = {reciprocal(total[0]), reciprocal(total[1])};
      } else if (a.reduction == 2 && a.counted) {
        const F* counted = static_cast<const F*>(a.parts);
        common.mean = {(double)counted[0], (double)counted[1]};
      } else if (a.reduction == 2) {
        common.mean.hard = common.mean.soft = reciprocal((double)a.rows);
      }
    }
    if (threadIdx.x < kMostGroups) totals[threadIdx.x] = {0, 0};
    __syncthreads();
  }

  using Group = typename Choose<kPerWarp>::type;
  Group group;
  if constexpr (kLayout == kWarpRow) group.width = a.width;
  const int number = kPerWarp ? (int)threadIdx.x / group.size() : 0;
  const int per_block = kPerWarp ? (int)blockDim.x / group.size() : 1;
  const int64_t start = (int64_t)blockIdx.x * per_block + number;
  for (int64_t i = start; i < a.rows; i += (int64_t)gridDim.x * per_block) {
    const int64_t label = a.labels ? a.labels[i] : -1;
    const Row<S, T> row(a, i, label, kSoft);
    Pair loss = {0, 0};
    if ((a.labels != nullptr && label == a.ignore_index) || (!kSoft && !a.hard)) {
      if (row.grad) row.fill((F)0, group);
    } else if (a.labels != nullptr && (label < 0 || label >= a.classes)) {
      loss.hard = loss.soft = not_a_number<double>();
      if (row.grad) row.fill(not_a_number<F>(), group);
    } else {
      loss = row_loss<kLayout != kLongRow, kChunksOf<S, kLayout>, kDivergence>(a, row, i, common,
                                                                               group);
    }
    if (group.index() != 0) continue;
    if (a.reduction == 0) {
      static_cast<F*>(a.loss)[i] = (F)(loss.hard + loss.soft);
      static_cast<F*>(a.parts)[i] = (F)loss.hard;
      static_cast<F*>(a.parts)[a.rows + i] = (F)loss.soft;
    } else {
      totals[number].hard += loss.hard;
      totals[number].soft += loss.soft;
    }
  }
  if (a.reduction == 0) return;

  __syncthreads();
  double total[2] = {0, 0};
  if (threadIdx.x < kMostGroups) {
    total[0] = totals[threadIdx.x].hard;
    total[1] = totals[threadIdx.x].soft;
  }
  block.all<Sum>(total);
  if (sum_over_blocks(a, total, block) && threadIdx.x == 0) {
    const double hard = total[0] * common.mean.hard, soft = total[1] * common.mean.soft;
    *static_cast<F*>(a.loss) = (F)(hard + soft);
    static_cast<F*>(a.parts)[0] = (F)hard;
    static_cast<F*>(a.parts)[1] = (F)soft;
  }
}

template <class S>
__global__ void __launch_bounds__(256)
    scale_kernel(S* grad, const typename Compute<S>::type* upstream, int64_t rows, int classes,
                 bool per_row, int threads) {
  using F = typename Compute<S>::type;
  constexpr int kVec = 16 / sizeof(S);
  const int per_block = (int)blockDim.x / threads;
  const int64_t start = (int64_t)blockIdx.x * per_block + (int)threadIdx.x / threads;
  for (int64_t i = start; i < rows; i += (int64_t)gridDim.x * per_block) {
    const F factor = upstream[per_row ? i : 0];
    if (factor == 1) continue;
    S* line = grad + i * classes;
    const int skew = (int)((uintptr_t)line / sizeof(S) % kVec);
    for (int at = (int)threadIdx.x % threads * kVec - skew; at < classes; at += threads * kVec) {
      if (at >= 0 && at + kVec <= classes) {
        F v[kVec];
        load_vector<kVec>(line + at, v);
#pragma unroll
        for (int e = 0; e < kVec; ++e) v[e] *= factor;
        store_vector(v, line + at);
      } else {
        for (int e = 0; e < kVec; ++e)
          if (at + e >= 0 && at + e < classes) narrow(widen(line[at + e]) * factor, line + at + e);
      }
    }
  }
}

int multiprocessors(int device) {
  int count = 0;
  check(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device),
        "cudaDeviceGetAttribute");
  return count;
}

int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// The number of threads, a power of two between two bounds, of which each takes `each` of `items`.
int threads_for(int64_t items, int64_t each, int least, int most) {
  int threads = least;
  while (threads < most && threads * each < items) threads *= 2;
  return threads;
}

template <class S, class T, int kDivergence, int kLayout>
void launch(Params<typename Compute<S>::type>& a, int device, cudaStream_t stream, int64_t chunks) {
  constexpr bool kPerWarp = kLayout == kWarpRow || kLayout == kWideWarpRow;
  constexpr int kMost = kThreads<kLayout>;
  const int processors = multiprocessors(device);
  int threads, width = 32;
  if (kPerWarp) {
    if (kLayout == kWarpRow) width = threads_for(chunks, kChunksOf<S, kLayout>, kLeastWidth, 32);
    const int64_t warps = (a.rows * width + 31) / 32;
    // Few rows are spread over all processors.
    threads = 32 * (int)smaller(warps / processors + 1, kMost / 32);
  } else {
    constexpr int64_t kWarpful = 32 * kChunksOf<S, kLayout>;
    threads = 32 * (int)smaller((chunks + kWarpful - 1) / kWarpful, kMost / 32);
  }
  a.width = width;
  const int64_t per_block = kPerWarp ? threads / width : 1;
  const int64_t resident = (int64_t)processors * (kBlocks<S, kLayout> * kMost / threads);
  int64_t blocks = smaller((a.rows + per_block - 1) / per_block, resident);
  if (blocks < 1) blocks = 1;  // an empty sum has to be written, too
  if (a.reduction == 2 && (a.labels || a.row_weight) && blocks * a.rows > FXK_TOTALS_READS) {
    const auto totals = &totals_kernel<typename Compute<S>::type>;
    const int64_t count_blocks = smaller((a.rows + 2047) / 2048, 2 * processors);
    FXK_LAUNCH(totals, (unsigned)count_blocks, 512, 0, stream, a);
    check(cudaGetLastError(), "kd_loss");
    a.counted = true;
  }
  const auto kernel = &kd_loss_kernel<S, T, kDivergence, kLayout>;
  FXK_LAUNCH(kernel, (unsigned)blocks, (unsigned)threads, 0, stream, a);
  check(cudaGetLastError(), "kd_loss");
}

template <class S, class T, int kDivergence>
void by_layout(Params<typename Compute<S>::type>& a, int device, cudaStream_t stream) {
  constexpr int kVec = 16 / sizeof(S);
  const bool aligned =
      (uintptr_t)a.student % 16 == 0 && (a.rows == 1 || a.student_stride % kVec == 0);
  const int64_t chunks = (a.classes + (aligned ? 0 : kVec - 1) + kVec - 1) / kVec;
  // Rare combinations have the kernel that takes a row of any length and no other.
  if constexpr (sizeof(S) == sizeof(T) && sizeof(S) < 8) {
    if (chunks <= 32 * kChunksOf<S, kWarpRow>)
      return launch<S, T, kDivergence, kWarpRow>(a, device, stream, chunks);
    if (chunks <= 32 * kChunksOf<S, kWideWarpRow>)
      return launch<S, T, kDivergence, kWideWarpRow>(a, device, stream, chunks);
    if (chunks <= kThreads<kBlockRow> * kChunksOf<S, kBlockRow>)
      return launch<S, T, kDivergence, kBlockRow>(a, device, stream, chunks);
  }
  launch<S, T, kDivergence, kLongRow>(a, device, stream, chunks);
}

template <class S, class T>
void run(const KDLossArgs& args, int divergence, int device, cudaStream_t stream, int* ticket,
         double* row_losses) {
  using F = typename Compute<S>::type;
  Params<F> a = {};
  a.student = args.student;
  a.teacher = args.teacher;
  a.labels = args.labels;
  a.class_weight = args.class_weight;
  a.row_weight = args.row_weight;
  a.grad = args.grad;
  a.loss = args.loss;
  a.parts = args.parts;
  a.partials = row_losses;
  a.ticket = ticket;
  a.rows = args.rows;
  a.student_stride = args.student_stride;
  a.teacher_stride = args.teacher_stride;
  a.ignore_index = args.ignore_index;
  a.temperature = args.temperature;
  a.ce_weight = args.ce_weight;
  a.kd_weight = args.kd_weight;
  a.alpha = args.alpha;
  a.beta = args.beta;
  a.label_smoothing = args.label_smoothing;
  a.classes = (int)args.classes;
  a.reduction = args.reduction;
  a.hard = args.labels != nullptr && args.ce_weight != 0;
  // Without a soft part the row is worked on at T = 1.
  const double t = divergence == kNone ? 1 : args.temperature;
  a.factor = (F)(kLog2E / t);
  a.hard_factor = (F)kLog2E;
  a.logit_unit = 1 / (double)a.factor;
  a.hard_logit_unit = 1 / (double)a.hard_factor;
  a.unit = a.logit_unit / t;
  a.spread = args.label_smoothing / (double)args.classes;
  for (int k = 0; k < 4; ++k) a.power[k] = a.hard && t == k + 1 ? (F)1 : (F)0;
  a.apart = a.hard && t != 1 && t != 2 && t != 3 && t != 4;
  switch (divergence) {
    case kForwardKL: return by_layout<S, T, kForwardKL>(a, device, stream);
    case kReverseKL: return by_layout<S, T, kReverseKL>(a, device, stream);
    case kJSD: return by_layout<S, T, kJSD>(a, device, stream);
    case kTVD: return by_layout<S, T, kTVD>(a, device, stream);
    case kDecoupled: return by_layout<S, T, kDecoupled>(a, device, stream);
    default: return by_layout<S, T, kNone>(a, device, stream);
  }
}

}  // namespace

int64_t kd_loss(const KDLossArgs& a, int device, void* stream, int* ticket, double* row_losses) {
  if (a.classes > 1 << 30) throw std::invalid_argument("kd_loss: more than 2^30 classes");
  if (a.teacher_indices || a.teacher_form || a.models > 1)
    throw std::invalid_argument("kd_loss: the CUDA kernels take one teacher's logits");
  if (a.divergence < kForwardKL || a.divergence > kDecoupled)
    throw std::invalid_argument("kd_loss: unknown divergence");
  if (a.divergence == kDecoupled && a.labels == nullptr && a.rows > 0)
    throw std::invalid_argument("kd_loss: the decoupled divergence needs labels");
  if (a.rows == 0 && a.reduction == 0) return kOk;
  // The JSD with all weight on one side is 0 whatever the logits.
  const bool nothing = a.divergence == kJSD && (a.beta == 0 || a.beta == 1);
  const int divergence = a.kd_weight == 0 || nothing ? kNone : a.divergence;
  const int student = a.dtype, teacher = divergence == kNone ? a.dtype : a.teacher_dtype;
  const OnDevice guard(device);
  const auto on = static_cast<cudaStream_t>(stream);
  const auto serve = [&](auto run_for) { run_for(a, divergence, device, on, ticket, row_losses); };
  if (student == kFloat32 && teacher == kFloat32)
    serve(run<float, float>);
  else if (student == kFloat64 && teacher == kFloat64)
    serve(run<double, double>);
  else if (student == kBFloat16 && teacher == kBFloat16)
    serve(run<__nv_bfloat16, __nv_bfloat16>);
  else if (student == kBFloat16 && teacher == kFloat32)
    serve(run<__nv_bfloat16, float>);
  else if (student == kFloat16 && teacher == kFloat16)
    serve(run<__half, __half>);
  else if (student == kFloat16 && teacher == kFloat32)
    serve(run<__half, float>);
  else
    throw std::invalid_argument("kd_loss: no CUDA kernel for these dtypes of student and teacher");
  return kOk;
}

namespace {
template <class S>
void scale(int device, cudaStream_t stream, void* grad, const void* upstream, int64_t rows,
           int64_t classes, bool per_row) {
  constexpr int kVec = 16 / sizeof(S);
  const int threads = threads_for((classes + kVec - 1) / kVec, 4, 32, 256);
  const int64_t per_block = 256 / threads;
  const int64_t blocks = smaller((rows + per_block - 1) / per_block, 8 * multiprocessors(device));
  const auto kernel = &scale_kernel<S>;
  FXK_LAUNCH(kernel, (unsigned)blocks, 256, 0, stream, static_cast<S*>(grad),
             static_cast<const typename Compute<S>::type*>(upstream), rows, (int)classes, per_row,
             threads);
  check(cudaGetLastError(), "kd_loss_scale");
}
}  // namespace

void kd_loss_scale(int device, void* stream, void* grad, const void* upstream, int64_t rows,
                   int64_t classes, bool per_row, int dtype) {
  if (rows == 0) return;
  const OnDevice guard(device);
  const auto on = static_cast<cudaStream_t>(stream);
  switch (dtype) {
    case kFloat32: return scale<float>(device, on, grad, upstream, rows, classes, per_row);
    case kFloat64: return scale<double>(device, on, grad, upstream, rows, classes, per_row);
    case kBFloat16: return scale<__nv_bfloat16>(device, on, grad, upstream, rows, classes, per_row);
    default: return scale<__half>(device, on, grad, upstream, rows, classes, per_row);
  }
}

}  // namespace cuda
}  // namespace fxk
