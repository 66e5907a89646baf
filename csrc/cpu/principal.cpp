// The first principal component of an image's channels: the Gram matrix of its channels or of its
// positions, whichever are fewer, and that matrix's leading eigenvector by Lanczos' recurrence,
// which ends when the component is exact. Products of float32 are exact in double, so nothing is
// left to restore afterwards.
#include "simd.h"

namespace fxk {
namespace FXK_ISA {
namespace {

#if defined(__AVX512F__)
constexpr int64_t kWide = 8, kHigh = 8;  // doubles in a register, rows of a tile
#elif defined(__AVX2__)
constexpr int64_t kWide = 4, kHigh = 4;
#else
constexpr int64_t kWide = 2, kHigh = 4;
#endif
constexpr int64_t kAcross = 2 * kWide;  // columns of a tile
constexpr int64_t kDepth = 128;         // terms of a sum that are laid out at a time
constexpr int64_t kLine = 8;            // doubles of a cache line
constexpr int64_t kCheck = 8;           // steps between two looks at how exact the component is
constexpr double kExact = 1e-9;         // of the gap to the second eigenvalue

typedef double Pack __attribute__((vector_size(sizeof(double) * kWide)));
typedef double Unaligned __attribute__((vector_size(sizeof(double) * kWide), aligned(8)));

FXK_INLINE Pack pack(const double* x) { return *reinterpret_cast<const Unaligned*>(x); }

FXK_INLINE int64_t padded(int64_t n) { return (n + 15) / 16 * 16; }

double dot(const double* x, const double* y, int64_t n) {
  double sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < n; ++i) sum += x[i] * y[i];
  return sum;
}

void add(double factor, const double* x, double* y, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) y[i] += factor * x[i];
}

// A panel holds eight columns after eight columns, [kDepth, 8] each: rows of a whole panel would
// lie a power of two apart, and push each other out of the cache.
FXK_INLINE int64_t column(int64_t i) { return i / kLine * (kDepth * kLine) + i % kLine; }

// gram[i, j] += sum over l of panel[l, i] panel[l, j], for the tiles that touch j <= i.
void add_products(const double* panel, int64_t depth, int64_t size, double* gram) {
  for (int64_t j = 0; j < size; j += kAcross)
    for (int64_t i = j / kHigh * kHigh; i < size; i += kHigh) {
      const double *rows = panel + column(i), *lefts = panel + column(j);
      const double* rights = panel + column(j + kWide);
      Pack sums[kHigh][2] = {};
      for (int64_t l = 0; l < depth; ++l) {
        const Pack left = pack(lefts + l * kLine), right = pack(rights + l * kLine);
#pragma GCC unroll 8
        for (int64_t k = 0; k < kHigh; ++k) {
          sums[k][0] += rows[l * kLine + k] * left;
          sums[k][1] += rows[l * kLine + k] * right;
        }
      }
#pragma GCC unroll 8
      for (int64_t k = 0; k < kHigh; ++k)
        for (int64_t half = 0; half < 2; ++half) {
          double* out = gram + (i + k) * size + j + half * kWide;
          *reinterpret_cast<Unaligned*>(out) += sums[k][half];
        }
    }
}

// A tridiagonal matrix: how many of its eigenvalues lie above x.
int64_t above(const double* diagonal, const double* beside, int64_t n, double x, double tiny) {
  int64_t count = 0;
  double pivot = diagonal[0] - x;
  for (int64_t i = 0;; ++i) {
    if (pivot > 0) ++count;
    if (i + 1 == n) return count;
    if (fabs(pivot) < tiny) pivot = pivot < 0 ? -tiny : tiny;
    pivot = diagonal[i + 1] - x - beside[i] * beside[i] / pivot;
  }
}

// Its eigenvalue number `which` from above, 0 the largest.
double eigenvalue(const double* diagonal, const double* beside, int64_t n, int64_t which,
                  double reach, double tiny) {
  double low = -reach, high = reach;
  for (int step = 0; step < 100; ++step) {
    const double middle = 0.5 * (low + high);
    if (middle <= low || middle >= high) break;
    (above(diagonal, beside, n, middle, tiny) > which ? low : high) = middle;
  }
  return 0.5 * (low + high);
}

// Its eigenvector for an eigenvalue, of length 1: factored from both ends, joined where the two
// meet best. work: 2 n.
void eigenvector(const double* diagonal, const double* beside, int64_t n, double value, double tiny,
                 double* work, double* out) {
  double *down = work, *up = work + n;
  const auto safe = [tiny](double x) { return fabs(x) < tiny ? (x < 0 ? -tiny : tiny) : x; };
  down[0] = safe(diagonal[0] - value);
  for (int64_t i = 1; i < n; ++i)
    down[i] = safe(diagonal[i] - value - beside[i - 1] * beside[i - 1] / down[i - 1]);
  up[n - 1] = safe(diagonal[n - 1] - value);
  for (int64_t i = n - 2; i >= 0; --i)
    up[i] = safe(diagonal[i] - value - beside[i] * beside[i] / up[i + 1]);
  int64_t at = 0;
  double least = INFINITY;
  for (int64_t i = 0; i < n; ++i) {
    const double twist = fabs(down[i] + up[i] - (diagonal[i] - value));
    if (twist < least) least = twist, at = i;
  }
  out[at] = 1;
  for (int64_t i = at - 1; i >= 0; --i) out[i] = -beside[i] / down[i] * out[i + 1];
  for (int64_t i = at + 1; i < n; ++i) out[i] = -beside[i - 1] / up[i] * out[i - 1];
  const double length = sqrt(dot(out, out, n));
  for (int64_t i = 0; i < n; ++i) out[i] /= length;
}

struct Scratch {
  double *panel, *gram, *basis;         // [kDepth, size], [size, size], [count + 1, size]
  double *vector, *means;               // [size], [channels]
  double *diagonal, *beside, *factors;  // [count], [count], [3 count]
};

// Leading eigenvector of the symmetric gram [size, size], whose first `count` rows and columns are
// not padding; returns its eigenvalue.
double leading(const Scratch& s, int64_t size, int64_t count) {
  double* q = s.basis;
  // Not orthogonal to the component, whatever the picture: an arbitrary direction.
  uint64_t state = 0x9e3779b97f4a7c15u;
  for (int64_t i = 0; i < size; ++i) {
    state = state * 6364136223846793005u + 1442695040888963407u;
    q[i] = i < count ? (double)(state >> 11) * 0x1p-53 - 0.5 : 0;
  }
  double reach = 0;
  for (int64_t i = 0; i < count; ++i) reach += s.gram[i * size + i];  // no eigenvalue is larger
  reach = reach > 0 ? reach * (1 + 1e-12) : 1e-300;
  const double tiny = reach * 1e-30 > 0 ? reach * 1e-30 : 1e-300;
  const double length = sqrt(dot(q, q, size));
  for (int64_t i = 0; i < size; ++i) q[i] /= length;
  int64_t steps = 0;
  double value = 0;
  for (;;) {
    const double* now = q + steps * size;
    double* next = q + (steps + 1) * size;
    for (int64_t i = 0; i < size; ++i) next[i] = i < count ? dot(s.gram + i * size, now, size) : 0;
    s.diagonal[steps] = dot(now, next, size);
    for (int again = 0; again < 2; ++again)
      for (int64_t k = 0; k <= steps; ++k) {
        const double* other = q + k * size;
        add(-dot(other, next, size), other, next, size);
      }
    const double left = sqrt(dot(next, next, size));
    s.beside[steps] = left;
    ++steps;
    const bool last = steps == count || left <= 1e-15 * reach;
    if (last || steps % kCheck == 0) {
      double* found = s.factors + 2 * count;
      value = eigenvalue(s.diagonal, s.beside, steps, 0, reach, tiny);
      eigenvector(s.diagonal, s.beside, steps, value, tiny, s.factors, found);
      const double rest = left * fabs(found[steps - 1]);
      const double second = steps > 1 ? eigenvalue(s.diagonal, s.beside, steps, 1, reach, tiny) : 0;
      if (last || rest <= kExact * (value - second)) {
        for (int64_t i = 0; i < size; ++i) s.vector[i] = 0;
        for (int64_t k = 0; k < steps; ++k) add(found[k], q + k * size, s.vector, size);
        return value;
      }
    }
    for (int64_t i = 0; i < size; ++i) next[i] /= left;
  }
}

// One image. `x` runs over channels with stride c and positions with stride p, 1 where kDense.
template <class S, bool kDense>
void component(const PrincipalArgs& a, const S* x, const Scratch& s, double* projection,
               double* loadings) {
  const int64_t channels = a.channels, positions = a.positions;
  const int64_t c = a.stride_c, p = kDense ? 1 : a.stride_p;
  double largest = 0, bad = 0;
  for (int64_t k = 0; k < channels; ++k) {
    double sum = 0, top = 0;
    const S* row = x + k * c;
#pragma omp simd reduction(+ : sum) reduction(max : top)
    for (int64_t i = 0; i < positions; ++i) {
      const double v = load(row + i * p);
      sum += v;
      top = fabs(v) > top ? fabs(v) : top;
    }
    s.means[k] = sum / (double)positions;
    largest = top > largest ? top : largest;
    bad += sum - sum;  // NaN from what is not finite
  }
  if (!(bad == 0)) {
    for (int64_t i = 0; i < positions; ++i) projection[i] = NAN;
    *loadings = NAN;
    return;
  }
  // Squares shall neither overflow nor vanish; a power of two changes no digit.
  int exponent = 0;
  frexp(largest, &exponent);
  const double scale = largest > 0 ? ldexp(1.0, -exponent) : 1, back = 1 / scale;
  const bool by_channel = channels < positions;
  const int64_t count = by_channel ? channels : positions, size = padded(count);
  const int64_t terms = by_channel ? positions : channels;
  for (int64_t i = 0; i < size * size; ++i) s.gram[i] = 0;
  for (int64_t begin = 0; begin < terms; begin += kDepth) {
    const int64_t depth = terms - begin < kDepth ? terms - begin : kDepth;
    for (int64_t i = 0; i < kDepth * size; ++i) s.panel[i] = 0;
    if (by_channel) {
      for (int64_t k = 0; k < channels; ++k) {
        const S* row = x + k * c + begin * p;
        const double mean = s.means[k];
        double* out = s.panel + column(k);
#pragma omp simd
        for (int64_t l = 0; l < depth; ++l) out[l * kLine] = (load(row + l * p) - mean) * scale;
      }
    } else {
      for (int64_t l = 0; l < depth; ++l) {
        const S* row = x + (begin + l) * c;
        const double mean = s.means[begin + l];
        for (int64_t i = 0; i < positions; ++i)
          s.panel[column(i) + l * kLine] = (load(row + i * p) - mean) * scale;
      }
    }
    add_products(s.panel, depth, size, s.gram);
  }
  for (int64_t i = 0; i < size; ++i)
    for (int64_t j = 0; j < i; ++j) s.gram[j * size + i] = s.gram[i * size + j];
  const double value = leading(s, size, count);
  double total = 0;
  if (by_channel) {
    for (int64_t i = 0; i < positions; ++i) projection[i] = 0;
    for (int64_t k = 0; k < channels; ++k) {
      const double weight = s.vector[k], mean = s.means[k];
      const S* row = x + k * c;
      total += weight;
#pragma omp simd
      for (int64_t i = 0; i < positions; ++i) projection[i] += weight * (load(row + i * p) - mean);
    }
    *loadings = total;
    return;
  }
  const double length = value > 0 ? sqrt(value) : 0;
  double sum = 0;
  for (int64_t i = 0; i < positions; ++i) {
    projection[i] = length * back * s.vector[i];
    sum += s.vector[i];
  }
  for (int64_t k = 0; k < channels; ++k) {
    const S* row = x + k * c;
    double part = 0;
#pragma omp simd reduction(+ : part)
    for (int64_t i = 0; i < positions; ++i) part += s.vector[i] * load(row + i * p);
    total += part - s.means[k] * sum;
  }
  *loadings = length > 0 ? total * scale / length : total * scale;
}

template <class S>
int64_t run(const PrincipalArgs& a, int threads) {
  const int64_t count = a.channels < a.positions ? a.channels : a.positions;
  const int64_t size = padded(count);
  const int64_t doubles =
      kDepth * size + size * size + (count + 1) * size + size + a.channels + 5 * count;
  const int n_threads = useful_threads(threads, a.n * a.channels * a.positions, a.n);
  bool failed = false;
#pragma omp parallel num_threads(n_threads) if (n_threads > 1)
  {
    double* memory = static_cast<double*>(malloc((size_t)doubles * sizeof(double)));
    if (memory == nullptr) {
#pragma omp atomic write
      failed = true;
    }
    Scratch s{};
    if (memory != nullptr) {
      s.panel = memory;
      s.gram = s.panel + kDepth * size;
      s.basis = s.gram + size * size;
      s.vector = s.basis + (count + 1) * size;
      s.means = s.vector + size;
      s.diagonal = s.means + a.channels;
      s.beside = s.diagonal + count;
      s.factors = s.beside + count;
    }
#pragma omp for schedule(dynamic, 1)
    for (int64_t i = 0; i < a.n; ++i) {
      if (memory == nullptr) continue;
      const S* x = static_cast<const S*>(a.parts) + i * a.stride_n;
      double* projection = a.projection + i * a.positions;
      if (a.stride_p == 1)
        component<S, true>(a, x, s, projection, a.loadings + i);
      else
        component<S, false>(a, x, s, projection, a.loadings + i);
    }
    free(memory);
  }
  return failed ? kNoMemory : kOk;
}

}  // namespace

int64_t principal(const PrincipalArgs& a, int threads) {
  switch (a.dtype) {
    case kFloat32: return run<float>(a, threads);
    case kFloat64: return run<double>(a, threads);
    case kBFloat16: return run<BFloat16>(a, threads);
    default: return run<Float16>(a, threads);
  }
}

}  // namespace FXK_ISA
}  // namespace fxk
