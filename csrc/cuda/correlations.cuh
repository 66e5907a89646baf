// What the launches of DIST share: a correlation and what its gradient takes, and the numbers of
// rows and columns that one launch leaves for the next.
#pragma once
#include "logits.cuh"

namespace fxk {
namespace cuda {
namespace {

constexpr double kEps = 1e-8;  // beside the product of the norms, as in the published code

__device__ __noinline__ double root_of(double x) { return sqrt(x); }

// Of two centred vectors, from their squared norms and their product.
struct Correlation {
  double rho, pull, push;
  __device__ __forceinline__ Correlation(double uu, double vv, double uv) {
    const double a = root_of(uu), b = root_of(vv);
    const double of_norms = 1 / (a * b + kEps);
    rho = uv * of_norms;
    pull = a > 0 ? rho * b / a * of_norms : 0;
    // Times nothing but the roundings of v where v is 0, and those would be divided by kEps.
    push = b == 0 ? 0 : of_norms;
  }
};

// What the later launches know of a row.
template <class F>
struct alignas(16) RowNumbers {
  F student, teacher, of_student_sum, of_teacher_sum;  // offsets and reciprocals: q, p
  F weight;                                            // 0: the row is left out
  F hard, of_hard_sum;
  F pull, push;
};

enum Column { kMeanQ, kMeanP, kPull, kPush, kColumnNumbers };
enum RowTotal { kHard, kLabelWeight, kRho, kWeight, kRowTotals };

template <class F>
struct DistParams : Params<F> {
  RowNumbers<F>* numbers;      // [rows]
  double* totals;              // over the rows: as RowTotal says
  double* run_weight;          // [runs]
  double* moments;             // [runs, 5, classes]: means, centred squares and products
  F* columns[kColumnNumbers];  // [classes] each
  int64_t share;               // rows of a run
  int runs, tiles, tile_width;
  F uniform;               // 1 / classes
  bool by_column, vector;  // beta is not 0; rows of both sides begin where 16 bytes do
};

}  // namespace
}  // namespace cuda
}  // namespace fxk
