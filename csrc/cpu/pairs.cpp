// Distances of all pairs of rows from their differences: no digits cancel, as they do between norms
// and Gram products, and with half of the pairs it costs about what the product does.
#include "simd.h"

namespace fxk {
namespace FXK_ISA {
namespace {

// Rows of a task and rows that pass it by, four at a time: five loads for four differences. A run
// of all of them fits into the first cache, and is summed in the lanes before it goes to double.
constexpr int64_t kRows = 8, kOthers = 4;
constexpr int64_t kRun = kBlock < 512 ? kBlock : 512;

template <class F>
FXK_INLINE void add_squares(const F* x, const F* const* y, int64_t begin, int64_t end,
                            double* total) {
  const F *y0 = y[0], *y1 = y[1], *y2 = y[2], *y3 = y[3];
  F s0 = 0, s1 = 0, s2 = 0, s3 = 0;
#pragma omp simd reduction(+ : s0, s1, s2, s3)
  for (int64_t j = begin; j < end; ++j) {
    const F a = x[j] - y0[j], b = x[j] - y1[j], c = x[j] - y2[j], d = x[j] - y3[j];
    s0 += a * a;
    s1 += b * b;
    s2 += c * c;
    s3 += d * d;
  }
  total[0] += s0;
  total[1] += s1;
  total[2] += s2;
  total[3] += s3;
}

template <class F>
int64_t run(const F* rows, int64_t n, int64_t width, double* out, int threads) {
  const int64_t blocks = (n + kRows - 1) / kRows;
  const int n_threads = useful_threads(threads, n * n / 2 * width, blocks);
  // The last blocks have the fewest pairs.
#pragma omp parallel for num_threads(n_threads) if (n_threads > 1) schedule(dynamic, 1)
  for (int64_t block = 0; block < blocks; ++block) {
    const int64_t first = block * kRows, last = first + kRows < n ? first + kRows : n;
    for (int64_t j = first; j < n; j += kOthers) {
      const F* others[kOthers];
      for (int64_t k = 0; k < kOthers; ++k) others[k] = rows + (j + k < n ? j + k : n - 1) * width;
      double totals[kRows][kOthers] = {};
      for (int64_t begin = 0; begin < width; begin += kRun) {
        const int64_t end = begin + kRun < width ? begin + kRun : width;
        for (int64_t i = first; i < last && i < j + kOthers; ++i)
          add_squares(rows + i * width, others, begin, end, totals[i - first]);
      }
      for (int64_t i = first; i < last; ++i)
        for (int64_t k = 0; k < kOthers && j + k < n; ++k)
          if (i <= j + k)
            out[i * n + j + k] = out[(j + k) * n + i] = __builtin_sqrt(totals[i - first][k]);
    }
  }
  return kOk;
}

}  // namespace

int64_t pair_distances(const void* rows, int64_t n, int64_t width, int dtype, double* out,
                       int threads) {
  if (dtype == kFloat64) return run(static_cast<const double*>(rows), n, width, out, threads);
  return run(static_cast<const float*>(rows), n, width, out, threads);
}

}  // namespace FXK_ISA
}  // namespace fxk
