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
#include "simd.h"

namespace fxk {
namespace FXK_ISA {
namespace {

constexpr double kLog2E = 1.4426950408889634, kLn2 = 0.6931471805599453;

// Rows are worked on in whole vectors: what is left of a row after the last multiple of kLanes goes
// through buffers padded with -inf, whose exponentials are 0, and the same vector code.
constexpr int64_t kLanes = 16;

// Gradients from this size on are written past the caches; none of today's would hold them.
constexpr int64_t kStreamBytes = (int64_t)64 << 20;

// What a loop computes with: a whole vector by hand, or one number in a loop left to the compiler.
template <class F>
struct Lane {
  using type = F;
};
#if defined(__AVX512F__)
template <>
struct Lane<float> {
  using type = __m512;
};
template <class X>
FXK_INLINE void get(const X* x, __m512* v) {
  *v = load16(x);
}
FXK_INLINE void put(float* x, __m512 v) { _mm512_storeu_ps(x, v); }
#endif
template <class X, class F>
FXK_INLINE void get(const X* x, F* v) {
  *v = load(x);
}
FXK_INLINE void put(float* x, float v) { *x = v; }
FXK_INLINE void put(double* x, double v) { *x = v; }

template <class F>
struct Terms {
  typename Lane<F>::type hard, student, teacher, dot;
};

struct Sums {
  double hard, student, teacher, dot;
};

// Sums of a row: in the lanes' own precision for a run of up to kBlock, then in double.
template <class F>
struct Adder {
  Sums sums = {0, 0, 0, 0};
#if defined(__AVX512F__)
  Terms<F> lanes = {};
  int64_t pending = 0;

  inline __attribute__((always_inline)) void flush() {
    if constexpr (sizeof(typename Lane<F>::type) == 64) {
      sums.hard += _mm512_reduce_add_ps(lanes.hard);
      sums.student += _mm512_reduce_add_ps(lanes.student);
      sums.teacher += _mm512_reduce_add_ps(lanes.teacher);
      sums.dot += _mm512_reduce_add_ps(lanes.dot);
      lanes = Terms<F>{};
      pending = 0;
    }
  }
#endif

  inline __attribute__((always_inline)) Sums total() {
#if defined(__AVX512F__)
    flush();
#endif
    return sums;
  }
};

// Adds what `body` gives for every position of a run of at most kBlock.
template <class F, class Body>
FXK_INLINE void add_up(int64_t count, Adder<F>* adder, const Body& body) {
#if defined(__AVX512F__)
  if constexpr (sizeof(typename Lane<F>::type) == 64) {
    if (adder->pending + count > kBlock) adder->flush();
    Terms<F> a = adder->lanes;
    for (int64_t j = 0; j < count; j += kLanes) {
      const Terms<F> more = body(j);
      a.hard += more.hard;
      a.student += more.student;
      a.teacher += more.teacher;
      a.dot += more.dot;
    }
    adder->lanes = a;
    adder->pending += count;
    return;
  } else
#endif
  {
    F hard = 0, student = 0, teacher = 0, dot = 0;
#pragma omp simd reduction(+ : hard, student, teacher, dot)
    for (int64_t j = 0; j < count; ++j) {
      const Terms<F> more = body(j);
      hard += more.hard;
      student += more.student;
      teacher += more.teacher;
      dot += more.dot;
    }
    adder->sums.hard += hard;
    adder->sums.student += student;
    adder->sums.teacher += teacher;
    adder->sums.dot += dot;
  }
}

// z = (x - shift) * factor. With a fused multiply-add that is one instruction: the product is
// exact, and the rounding of the offset is common to the row, where it cancels against the row's
// sum.
template <class F>
struct Exponent {
  F shift, factor, offset;
  Exponent(F shift_, double factor_) : shift(shift_), factor((F)factor_), offset(-shift * factor) {}
  template <class V>
  inline __attribute__((always_inline)) V operator()(V x) const {
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

// What turns e^x and e^y into q, p and beta p + (1 - beta) q, and y - x into log2 p - log2 q.
template <class F>
struct Mixture {
  F q_factor, p_factor, on_q, on_p, offset;
};

// A row in pieces of which each can be loaded as vectors: the head, for the decoupled loss the
// vector that holds the label's class (there at -inf, so that it counts in no sum), what follows,
// and the padded tail. X is the type of the logits; a teacher that is given in another form comes
// as a row of F, and the student with it.
template <class X, class F>
struct Row {
  const X* s;
  const X* t;
  F* exp_student;  // scratch [classes rounded up to kLanes] each
  F* weight;       // w: e^y, or what the divergence weighs e^x with
  F* exp_hard;
  F* ratio;                       // y - x, where a second sweep needs it
  int64_t classes, whole, patch;  // patch: where the label's vector begins, or `whole`
  X tail_s[kLanes], tail_t[kLanes], patch_s[kLanes], patch_t[kLanes];

  // f(s, t, position, count) for every piece.
  template <class Each>
  inline __attribute__((always_inline)) void each(const Each& f) const {
    if (patch > 0) f(s, t, 0, patch);
    if (patch < whole) f(patch_s, patch_t, patch, kLanes);
    const int64_t next = patch + kLanes;
    if (next < whole) f(s + next, t + next, next, whole - next);
    if (whole != classes) f(tail_s, tail_t, whole, kLanes);
  }
};

// Fewer than a vector: by masks where there are some, since memcpy of a length that is not known
// ahead is a call.
template <class X>
FXK_INLINE void copy_some(const X* from, int64_t n, X* to) {
#if defined(__AVX512F__)
  const uint32_t mask = (1u << n) - 1;
  if constexpr (sizeof(X) == 4) {
    _mm512_mask_storeu_ps(to, (__mmask16)mask, _mm512_maskz_loadu_ps((__mmask16)mask, from));
    return;
  } else if constexpr (sizeof(X) == 2) {
    _mm256_mask_storeu_epi16(to, (__mmask16)mask, _mm256_maskz_loadu_epi16((__mmask16)mask, from));
    return;
  }
#endif
  memcpy((void*)to, (const void*)from, sizeof(X) * (size_t)n);
}

template <class X, class F>
FXK_INLINE void cut(Row<X, F>* row, bool soft, int64_t left_out) {
  const int64_t whole = row->whole, rest = row->classes - whole;
  const auto copy = [](const X* from, int64_t n, X* to) {
    for (int64_t j = 0; j < kLanes; ++j) store(to + j, -(F)INFINITY);
    copy_some(from, n, to);
  };
  if (rest) {
    copy(row->s + whole, rest, row->tail_s);
    if (soft) copy(row->t + whole, rest, row->tail_t);
  }
  row->patch = whole;
  if (left_out < 0) return;
  X* s = row->tail_s + (left_out - whole);
  X* t = row->tail_t + (left_out - whole);
  if (left_out < whole) {
    row->patch = left_out & ~(kLanes - 1);
    copy(row->s + row->patch, kLanes, row->patch_s);
    copy(row->t + row->patch, kLanes, row->patch_t);
    s = row->patch_s + (left_out - row->patch);
    t = row->patch_t + (left_out - row->patch);
  }
  store(s, -(F)INFINITY);
  store(t, -(F)INFINITY);
}

// The maximum over a multiple of kLanes, in four independent chains: one would wait for itself.
template <class X, class F>
FXK_INLINE F vector_max(const X* x, int64_t n, F highest) {
  const int64_t quarter = (n / 4) & ~(kLanes - 1);
  F m0 = highest, m1 = m0, m2 = m0, m3 = m0;
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
  const X* last = x + 4 * quarter;
#pragma omp simd reduction(max : m0)
  for (int64_t j = 0; j < rest; ++j) {
    const F a = load(last + j);
    m0 = a > m0 ? a : m0;
  }
  m0 = m1 > m0 ? m1 : m0;
  m2 = m3 > m2 ? m3 : m2;
  return m2 > m0 ? m2 : m0;
}

template <class X>
FXK_INLINE typename Compute<X>::type first_max(const X* x) {
#if defined(__AVX512F__)
  if constexpr (sizeof(typename Compute<X>::type) == sizeof(float))
    return _mm512_reduce_max_ps(load16(x));
#endif
  return vector_max(x, kLanes, -(typename Compute<X>::type)INFINITY);
}

// The shifts of the exponents: the maxima, or, quickly, the maxima over the first vector. An
// exponential above 1 does no harm; should a sum overflow, the row is done again.
template <class X, class F>
Exponents<F> exponents(const Row<X, F>& row, bool soft, double factor, bool quick) {
  F highest = -(F)INFINITY, highest_teacher = highest;
  row.each([&](const X* s, const X* t, int64_t at, int64_t count) {
    if (quick) {
      if (at != 0) return;
      highest = first_max(s);
      if (soft) highest_teacher = first_max(t);
    } else {
      highest = vector_max(s, count, highest);
      if (soft) highest_teacher = vector_max(t, count, highest_teacher);
    }
  });
  const bool nothing = highest == -(F)INFINITY || (soft && highest_teacher == -(F)INFINITY);
  if (quick && nothing) return exponents(row, soft, factor, false);
  // A row without any class: its sums come out as 0.
  if (highest == -(F)INFINITY) highest = 0;
  if (!soft || highest_teacher == -(F)INFINITY) highest_teacher = 0;
  return {{highest, factor}, {highest_teacher, factor}, {highest, kLog2E}};
}

template <int kPower, class V>
FXK_INLINE V power(V soft) {
  if (kPower == 2) return soft * soft;
  if (kPower == 3) return soft * soft * soft;
  if (kPower == 4) return (soft * soft) * (soft * soft);
  return soft;
}

// What the first sweep leaves behind beside the exponentials.
enum Weight : int {
  kNone,   // no soft part
  kPlain,  // w = e^y, dot = sum w (y - x)
  kCross,  // w = x - y, dot = sum e^x w
  kSign,   // w = e^y; `total_variation` follows
  kMixed   // w = e^y, and y - x beside it; `against_mixture` follows
};

// The JSD measures p and q, as they came out, against the logits' difference: what the exponentials
// of neighbouring values have wrong in common would not cancel there.
template <int kWeight, class V>
FXK_INLINE V exponential(V z) {
  return kWeight == kMixed ? exp2_closely(z) : exp2_of(z);
}

// kPower: T when it is 1..4, 0 for any other temperature; -1: no hard part.
// kMasked: a class that the weighing distribution does not have adds nothing, whatever the other
// says; without the guard an infinite logit gives 0 * inf.
template <class X, class F, int kPower, int kWeight, bool kMasked>
FXK_INLINE void exponentials(const X* s, const X* t, int64_t count, const Exponents<F>& exponents,
                             F* es, F* w, F* eh, F* ratio, Adder<F>* adder) {
  using V = typename Lane<F>::type;
  // By value: behind a reference, each store could be a change of the factors.
  const Exponents<F> z = exponents;
  add_up<F>(count, adder, [=](int64_t j) __attribute__((always_inline)) {
    Terms<F> terms = {};
    V logit;
    get(s + j, &logit);
    const V x = z.student(logit), soft = exponential<kWeight>(x);
    put(es + j, soft);
    terms.student = soft;
    if (kPower > 0) terms.hard = power<kPower>(soft);
    if (kPower == 0) {
      terms.hard = exp2_of(z.hard(logit));
      put(eh + j, terms.hard);
    }
    if (kWeight != kNone) {
      V teacher;
      get(t + j, &teacher);
      const V y = z.teacher(teacher), p = exponential<kWeight>(y);
      terms.teacher = p;
      if (kWeight == kPlain) terms.dot = p * (kMasked ? unless_zero(p, y - x) : y - x);
      const V apart = kMasked ? unless_zero(soft, x - y) : x - y;
      if (kWeight == kCross) terms.dot = soft * apart;
      put(w + j, kWeight == kCross ? apart : p);
      if (kWeight == kMixed) put(ratio + j, y - x);
    }
    return terms;
  });
}

template <class X, class F, int kPower, int kWeight, bool kMasked>
Sums row_sums(const Row<X, F>& row, const Exponents<F>& z) {
  constexpr bool kGuard = kWeight == kPlain || kWeight == kCross;
  Adder<F> adder;
  row.each([&](const X* s, const X* t, int64_t at, int64_t count) __attribute__((always_inline)) {
    F *es = row.exp_student + at, *w = row.weight + at, *eh = row.exp_hard + at;
    F* ratio = row.ratio + at;
    if (s != row.s + at) {  // patch and tail hold -inf
      exponentials<X, F, kPower, kWeight, kGuard>(s, t, count, z, es, w, eh, ratio, &adder);
      return;
    }
    for (int64_t j = 0; j < count; j += kBlock) {
      const int64_t n = count - j < kBlock ? count - j : kBlock;
      exponentials<X, F, kPower, kWeight, kMasked>(s + j, t + j, n, z, es + j, w + j, eh + j,
                                                   ratio + j, &adder);
    }
  });
  return adder.total();
}

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

template <class S, class X, class F, int kPower, int kWeight>
RowLoss row_loss(Row<X, F>* row_to_cut, const KDLossArgs& a, int64_t label, const Scale& scale,
                 S* grad) {
  constexpr bool kHard = kPower >= 0, kSoft = kWeight != kNone;
  const bool decoupled = kWeight == kPlain && a.divergence == kDecoupled;
  cut(row_to_cut, kSoft, decoupled ? label : -1);
  const Row<X, F>& row = *row_to_cut;
  const int64_t n = a.classes;
  // Exponents are base 2: z = (s - shift) log2(e)/T.
  const double factor = kLog2E / (kSoft ? a.temperature : 1);
#if defined(__AVX512F__)
  const bool quick = sizeof(F) == sizeof(float);
#else
  const bool quick = false;  // these exponentials do not saturate
#endif
  Exponents<F> z = exponents(row, kSoft, factor, quick);
  Sums sums = row_sums<X, F, kPower, kWeight, false>(row, z);
  // Not finite: infinite logits gave 0 * inf, or the quick shift was too low. Both are rare and
  // their guards cost a tenth of the loop, so such rows are done again.
  const double all = sums.hard + sums.student + sums.teacher + sums.dot;
  if (all - all != 0) {
    z = exponents(row, kSoft, factor, false);
    sums = row_sums < X, F, kPower, kWeight, kWeight == kPlain || kWeight == kCross > (row, z);
  }

  RowLoss loss = {0, 0};
  Soft soft = {0, 0, 0};
  double on_target = 0;  // what the decoupled loss adds at the label
  if (kSoft) {
    soft = divergence<X, F, kWeight, false>(row, a, z, sums);
    if (kWeight == kMixed && soft.value - soft.value != 0) {  // w has been overwritten
      row_sums<X, F, kPower, kWeight, false>(row, z);
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

  const double inv_classes = 1.0 / (double)n;
  const double label_weight =
      kHard ? (a.class_weight ? a.class_weight[label] : 1.0) * (1.0 - a.label_smoothing) : 0;
  double all_weight = 0, log_sum = 0, inverse_sum = 1 / sums.hard;
  if (kHard) {
    const double shift = (kPower == 0 ? z.hard : z.student).exact_shift();
    const double on_label = (double)load(row.s + label) - shift;
    log_sum = log(sums.hard);
    if (decoupled) {
      const double gap = on_label - log_sum;
      log_sum = gap > 0 ? on_label + log1p(exp(-gap)) : log_sum + log1p(exp(gap));
      inverse_sum = exp(-log_sum);
      on_target += scale.hard * label_weight * exp(on_label - log_sum);
    }
    loss.hard = label_weight * (log_sum - on_label);
    if (a.label_smoothing > 0) {
      double weighted = 0;
      for (int64_t j = 0; j < n; ++j) {
        const double w = a.class_weight ? a.class_weight[j] : 1.0;
        all_weight += w;
        weighted += w == 0 ? 0 : w * ((double)load(row.s + j) - shift);
      }
      all_weight *= a.label_smoothing * inv_classes;
      loss.hard += all_weight * log_sum - a.label_smoothing * inv_classes * weighted;
      if (decoupled) on_target += scale.hard * all_weight * exp(on_label - log_sum);
    }
    loss.hard *= a.ce_weight;
  }
  if (grad == nullptr) return loss;

  const Slope<F> slope = {
      kHard ? (F)(scale.hard * (label_weight + all_weight) * inverse_sum) : (F)0,
      (F)(kWeight == kPlain ? scale.soft * soft.on_student : soft.on_student),
      kSoft ? (F)(scale.soft * soft.on_weight) : (F)0,
  };
  const F uniform = (F)(scale.hard * a.label_smoothing * inv_classes);
  const bool smooth = kHard && a.label_smoothing > 0;
  const F *es = row.exp_student, *w = row.weight, *eh = row.exp_hard;
  // One entry again in full precision: taking something off a stored one would round twice.
  const auto entry = [&](int64_t j) -> F {
    F g =
        slope_at<F, kPower, kWeight>(es[j], kSoft ? w[j] : (F)0, kPower == 0 ? eh[j] : (F)0, slope);
    if (smooth) g -= uniform * (a.class_weight ? (F)a.class_weight[j] : (F)1);
    return g;
  };
  if (smooth) {
    for (int64_t j = 0; j < n; ++j) store(grad + j, entry(j));
  } else {
    const int64_t whole = row.whole;
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
  if (kHard || decoupled)
    store(grad + label, entry(label) + (F)(on_target - scale.hard * label_weight));
  return loss;
}

template <class S, class X, class F, int kWeight>
RowLoss by_power(int power, Row<X, F>* row, const KDLossArgs& a, int64_t label, const Scale& scale,
                 S* grad) {
  switch (power) {
    case -1: return row_loss<S, X, F, -1, kWeight>(row, a, label, scale, grad);
    case 1: return row_loss<S, X, F, 1, kWeight>(row, a, label, scale, grad);
    case 2: return row_loss<S, X, F, 2, kWeight>(row, a, label, scale, grad);
    case 3: return row_loss<S, X, F, 3, kWeight>(row, a, label, scale, grad);
    case 4: return row_loss<S, X, F, 4, kWeight>(row, a, label, scale, grad);
    default: return row_loss<S, X, F, 0, kWeight>(row, a, label, scale, grad);
  }
}

template <class S, class X, class F>
RowLoss by_divergence(bool soft, int power, Row<X, F>* row, const KDLossArgs& a, int64_t label,
                      const Scale& scale, S* grad) {
  if (!soft) return row_loss<S, X, F, 1, kNone>(row, a, label, scale, grad);
  switch (a.divergence) {
    case kReverseKL: return by_power<S, X, F, kCross>(power, row, a, label, scale, grad);
    case kJSD: return by_power<S, X, F, kMixed>(power, row, a, label, scale, grad);
    case kTVD: return by_power<S, X, F, kSign>(power, row, a, label, scale, grad);
    default: return by_power<S, X, F, kPlain>(power, row, a, label, scale, grad);
  }
}

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
    const Exponent<F> z(highest, factor);
    double sum = 0;
    for (int64_t k = 0; k < a.classes; k += kBlock) {
      const int64_t n = a.classes - k < kBlock ? a.classes - k : kBlock;
      F part = 0;
      F* x = work + k;
#pragma omp simd reduction(+ : part)
      for (int64_t j = 0; j < n; ++j) {
        x[j] = exp2_of((F)z(x[j]));
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

// Weights of the rows: 0 for those that do not count.
struct Totals {
  double rows, labels;
};

template <class S>
int64_t run(const KDLossArgs& a, int threads) {
  using F = typename Compute<S>::type;
  const int64_t rows = a.rows, classes = a.classes;
  const bool hard = a.labels != nullptr && a.ce_weight != 0;
  const bool soft = a.kd_weight != 0;
  Totals total = {0, 0};
  for (int64_t i = 0; i < rows; ++i) {
    const double weight = a.row_weight ? a.row_weight[i] : 1.0;
    if (a.labels != nullptr) {
      const int64_t y = a.labels[i];
      if (y == a.ignore_index) continue;
      if (y < 0 || y >= classes) return i;
      total.labels += weight * (a.class_weight ? a.class_weight[y] : 1.0);
    }
    total.rows += weight;
  }
  if (a.teacher_indices != nullptr) {
    const int64_t count = a.models * rows * a.teacher_classes;
    for (int64_t j = 0; j < count; ++j)
      if (a.teacher_indices[j] < 0 || a.teacher_indices[j] >= classes) return kBadIndex;
  }
  const bool mean = a.reduction == 2;
  const double per_row = mean ? (total.rows != 0 ? 1.0 / total.rows : 0.0) : 1.0;
  const double per_label = mean ? (total.labels != 0 ? 1.0 / total.labels : 0.0) : 1.0;

  const bool as_it_is = a.models == 1 && a.teacher_indices == nullptr && a.teacher_form == 0 &&
                        a.teacher_dtype == a.dtype;
  const int n_threads = useful_threads(threads, rows * classes, rows);
  // Per thread: e^x, w, e^s, y - x and, for a teacher in another form, both rows and one to work
  // in.
  const size_t lines = as_it_is ? 4 : 7;
  const size_t line = align64(sizeof(F) * (size_t)(classes + kLanes));
  const size_t losses = align64(sizeof(RowLoss) * (size_t)rows);
  Scratch scratch(losses + lines * line * (size_t)n_threads);
  if (!scratch.ok()) return kNoMemory;
  RowLoss* row_losses = scratch.as<RowLoss>();

  const double t = a.temperature;
  const int power = !hard ? -1 : t == 1 ? 1 : t == 2 ? 2 : t == 3 ? 3 : t == 4 ? 4 : 0;
  const int64_t per_thread = (rows + n_threads - 1) / n_threads;
#pragma omp parallel for num_threads(n_threads) if (n_threads > 1) schedule(static, 1)
  for (int part = 0; part < n_threads; ++part) {
    const size_t base = losses + lines * line * (size_t)part;
    F* buffer[7];
    for (size_t k = 0; k < lines; ++k) buffer[k] = scratch.as<F>(base + k * line);
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
      const double weight = a.row_weight ? a.row_weight[i] : 1.0;
      const Scale scale = {a.ce_weight * per_label * weight, a.kd_weight * t * per_row * weight};
      const S* student = static_cast<const S*>(a.student) + i * a.student_stride;
      const int64_t whole = classes & ~(kLanes - 1);
      RowLoss loss;
      if (as_it_is) {
        const S* teacher = static_cast<const S*>(a.teacher) + i * a.teacher_stride;
        Row<S, F> row = {student,   teacher,   buffer[0], buffer[1],
                         buffer[2], buffer[3], classes,   whole};
        loss = by_divergence<S>(soft, power, &row, a, label, scale, grad);
      } else {
        prepare_from<F>(a, i, buffer[4], buffer[5]);
#pragma omp simd
        for (int64_t j = 0; j < classes; ++j) buffer[6][j] = load(student + j);
        Row<F, F> row = {buffer[6], buffer[4], buffer[0], buffer[1],
                         buffer[2], buffer[3], classes,   whole};
        loss = by_divergence<S>(soft, power, &row, a, label, scale, grad);
      }
      row_losses[i] = RowLoss{loss.hard * weight, loss.soft * weight};
    }
    stream_fence();  // before another thread is told that the rows are there
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
  hard_sum *= per_label;
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
