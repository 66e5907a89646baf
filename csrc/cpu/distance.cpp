// distance: one tile of the sweep over pairs. The Gram products come from the vendor's GEMM; here
// they become distances, and every inner product of the matrices and every row sum is taken in
// double while the tile is in cache: a row far from all others makes products of which what decides
// is the seventh digit. Distances between
// points of many dimensions are nearly equal, and centring leaves of their products what little
// they differ by: a typical distance is taken off first (off the diagonal), the caller puts it
// back.
#include "simd.h"

namespace fxk {
namespace FXK_ISA {
namespace {

constexpr int64_t kRows = 64;  // rows of one task: fixed, so that any thread count adds alike
constexpr int64_t kCols =
    kBlock < 256 ? kBlock : 256;  // columns whose distances of all matrices stay in the first cache

// |x - y|^2 = |x|^2 + |y|^2 - 2 xy loses its digits where it is small against the norms; below
// this share it is recomputed from the features.
template <class F>
struct Near {
  static constexpr F share = (F)1e-2;
};
template <>
struct Near<double> {
  static constexpr double share = 1e-5;
};

// The builtins, because the overloads of sqrt are inline functions of namespace std.
FXK_INLINE float root(float x) { return __builtin_sqrtf(x); }
FXK_INLINE double root(double x) { return __builtin_sqrt(x); }

// From the features as they were given: centring them has rounded what near neighbours differ by.
template <class F, class S>
double exact_square(const S* x, const S* y, int64_t width) {
  double total = 0;
  for (int64_t begin = 0; begin < width; begin += kBlock) {
    const int64_t end = begin + kBlock < width ? begin + kBlock : width;
    F sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t j = begin; j < end; ++j) {
      const F d = (F)load(x + j) - (F)load(y + j);
      sum += d * d;
    }
    total += sum;
  }
  return total;
}

template <class F>
F pair_square(const DistanceTileArgs& a, int64_t k, int64_t i, int64_t j) {
  const auto of = [&](auto* base) {
    return (F)exact_square<F>(base + i * a.feature_strides[k], base + j * a.feature_strides[k],
                              a.widths[k]);
  };
  switch (a.feature_dtypes[k]) {
    case kFloat32: return of(reinterpret_cast<const float*>(a.features[k]));
    case kFloat64: return of(reinterpret_cast<const double*>(a.features[k]));
    case kBFloat16: return of(reinterpret_cast<const BFloat16*>(a.features[k]));
    default: return of(reinterpret_cast<const Float16*>(a.features[k]));
  }
}

// Row i of matrix k: the Gram products become distances, less the shift.
template <class F>
void row_distances(const DistanceTileArgs& a, int64_t k, int64_t i) {
  F* gram = reinterpret_cast<F*>(a.grams[k]) + i * a.cols;
  const F norm = static_cast<const F*>(a.row_norms)[k * a.rows + i];
  const F* norms = static_cast<const F*>(a.col_norms) + k * a.cols;
  const F shift = a.products ? (F)a.shifts[k] : (F)0;
  if (a.diagonal) gram[i] = 0;
  int near = 0;
#pragma omp simd reduction(+ : near)
  for (int64_t j = 0; j < a.cols; ++j) {
    const F scale = norm + norms[j];
    const F square = scale - (F)2 * gram[j];
    near += !(square >= Near<F>::share * scale);
    gram[j] = square;
  }
  if (near) {
    for (int64_t j = 0; j < a.cols; ++j)
      if (!(gram[j] >= Near<F>::share * (norm + norms[j])))
        gram[j] = pair_square<F>(a, k, a.row_offset + i, a.col_offset + j);
  }
#pragma omp simd
  for (int64_t j = 0; j < a.cols; ++j) gram[j] = root(gram[j]) - shift;
  if (a.diagonal) gram[i] = 0;
}

FXK_INLINE double dot(const double* a, const double* b, int64_t n) {
  double sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t j = 0; j < n; ++j) sum += a[j] * b[j];
  return sum;
}

template <class F>
int64_t run(const DistanceTileArgs& a, int threads) {
  const int64_t K = a.matrices;
  const int64_t blocks = (a.rows + kRows - 1) / kRows;
  // Doubles: products, column sums, and the distances of a row that are being added.
  const int64_t own = K * K + K * a.cols + K * kCols;
  Scratch scratch(a.products ? sizeof(double) * (size_t)(blocks * own) : 0);
  if (!scratch.ok()) return kNoMemory;
  double* partial = scratch.as<double>();
  const int n_threads = useful_threads(threads, K * a.rows * a.cols, blocks);
#pragma omp parallel for num_threads(n_threads) if (n_threads > 1) schedule(static, 1)
  for (int64_t block = 0; block < blocks; ++block) {
    double* products = partial + block * own;
    double* col_sums = products + K * K;
    double* wide = col_sums + K * a.cols;
    if (a.products)
      for (int64_t i = 0; i < own; ++i) products[i] = 0;
    const int64_t last = (block + 1) * kRows < a.rows ? (block + 1) * kRows : a.rows;
    for (int64_t i = block * kRows; i < last; ++i) {
      for (int64_t k = 0; k < K; ++k) row_distances<F>(a, k, i);
      if (!a.products) continue;
      for (int64_t j = 0; j < a.cols; j += kCols) {
        const int64_t m = j + kCols < a.cols ? kCols : a.cols - j;
        for (int64_t k = 0; k < K; ++k) {
          const F* x = reinterpret_cast<const F*>(a.grams[k]) + i * a.cols + j;
          double* w = wide + k * kCols;
          double sum = 0;
#pragma omp simd reduction(+ : sum)
          for (int64_t q = 0; q < m; ++q) {
            w[q] = (double)x[q];
            sum += w[q];
          }
          // One block owns row i, so its sum goes straight to the result.
          a.row_sums[k * a.row_sums_stride + a.row_offset + i] += sum;
          if (!a.diagonal) {
            double* to = col_sums + k * a.cols + j;
#pragma omp simd
            for (int64_t q = 0; q < m; ++q) to[q] += w[q];
          }
          for (int64_t l = 0; l <= k; ++l) products[l * K + k] += dot(wide + l * kCols, w, m);
        }
      }
    }
  }
  if (!a.products) return kOk;
  const double times = a.diagonal ? 1.0 : 2.0;  // the mirrored tile is never visited
  for (int64_t block = 0; block < blocks; ++block) {
    const double* products = partial + block * own;
    const double* col_sums = products + K * K;
    for (int64_t k = 0; k < K; ++k) {
      for (int64_t l = k; l < K; ++l) {
        a.products[k * K + l] += times * products[k * K + l];
        if (l != k) a.products[l * K + k] += times * products[k * K + l];
      }
      if (a.diagonal) continue;
      double* to = a.row_sums + k * a.row_sums_stride + a.col_offset;
      for (int64_t j = 0; j < a.cols; ++j) to[j] += col_sums[k * a.cols + j];
    }
  }
  return kOk;
}

// V = (2 sum_l (P + P^T)_kl D_l + r_i + r_j) / D_k, the weight of x_i - x_j in the gradient.
template <class F>
int64_t run_grad(const DistanceGradTileArgs& a, int threads) {
  const int64_t K = a.matrices;
  const int n_threads = useful_threads(threads, K * a.rows * a.cols, a.rows);
#pragma omp parallel for num_threads(n_threads) if (n_threads > 1) schedule(static)
  for (int64_t i = 0; i < a.rows; ++i) {
    for (int64_t k = 0; k < K; ++k) {
      if (a.outputs[k] == 0) continue;
      F* out = reinterpret_cast<F*>(a.outputs[k]) + i * a.cols;
      const F* own = reinterpret_cast<const F*>(a.distances[k]) + i * a.cols;
      const double* sums = a.grad_row_sums + k * a.grad_row_sums_stride;
      const double row = sums[a.row_offset + i];
      for (int64_t j = 0; j < a.cols; ++j) out[j] = (F)(row + sums[a.col_offset + j]);
      for (int64_t l = 0; l < K; ++l) {
        const F factor = (F)(2.0 * (a.grad_products[k * K + l] + a.grad_products[l * K + k]));
        if (factor == (F)0) continue;
        const F* other = reinterpret_cast<const F*>(a.distances[l]) + i * a.cols;
#pragma omp simd
        for (int64_t j = 0; j < a.cols; ++j) out[j] += factor * other[j];
      }
#pragma omp simd
      for (int64_t j = 0; j < a.cols; ++j) out[j] = own[j] == (F)0 ? (F)0 : out[j] / own[j];
    }
  }
  return kOk;
}

}  // namespace

int64_t distance_tile(const DistanceTileArgs& a, int threads) {
  return a.dtype == kFloat64 ? run<double>(a, threads) : run<float>(a, threads);
}

int64_t distance_grad_tile(const DistanceGradTileArgs& a, int threads) {
  if (a.dtype == kFloat64) return run_grad<double>(a, threads);
  return run_grad<float>(a, threads);
}

}  // namespace FXK_ISA
}  // namespace fxk
