// Rows of logits: their arguments, how their memory is cut up, and the exponentials that every
// divergence is made of, from the maxima to the sums over a row.
#pragma once
#include "block.cuh"
#include "kd_loss.h"

namespace fxk {
namespace cuda {
namespace {

constexpr double kLog2E = 1.4426950408889634, kLn2 = 0.6931471805599453;

// As in ops.h, and what is left of the loss when its soft part has no weight.
enum Divergence : int { kForwardKL, kReverseKL, kJSD, kTVD, kDecoupled, kDIST, kNone };

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

// Sums over a row; the last of them for the KL divergences and the decoupled one alone.
enum { kHardSum, kStudentSum, kTeacherSum, kDot };
template <int kDivergence>
constexpr int kSums = kDivergence == kNone                                                 ? 1
                      : kDivergence == kJSD || kDivergence == kTVD || kDivergence == kDIST ? 3
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

// The offsets and the sums of a row, the same in every thread of the group; on chip, the row is in
// the tile afterwards.
template <bool kOnChip, int kDivergence, class AnyTile, class S, class T, class F, class Group>
__device__ __forceinline__ void sum_exponentials(const Params<F>& a, const Row<S, T>& row,
                                                 Group& group, AnyTile& tile, int tiles,
                                                 Offsets<F>& z, F (&sum)[kSums<kDivergence>]) {
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
}

}  // namespace
}  // namespace cuda
}  // namespace fxk
