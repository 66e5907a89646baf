#pragma once
#include "../ops.h"

namespace fxk {
namespace cuda {

// The operators of fxk::baseline::distance_tile and of the same name. What args.grams, features,
// feature_strides, feature_dtypes and widths point to is on the host, all else on `device`, the
// shifts as well; the tiles of the matrices lie one after the other from grams[0] on. A feature of
// at most `narrow` numbers needs no Gram product: its distances come from differences, and its tile
// may hold anything. narrow <= kDistanceNarrow; scratch: as many doubles as distance_workspace
// says, none where no sums are wanted.
constexpr int kDistanceNarrow = 16;
void distance_tile(const DistanceTileArgs& args, int narrow, int device, void* stream,
                   double* scratch);
int64_t distance_workspace(int64_t matrices, int64_t rows, int64_t cols, int device);

// The weights of x_i - x_j in the gradient of matrix k, of distances [matrices, rows, cols].
// factors: [matrices] of 2 (P + P^T)_k in the dtype of the distances; on_rows, on_cols: row k of
// the row sums' gradient, where the rows and the columns of the tile begin.
void distance_grad_tile(const void* distances, void* weights, const void* factors,
                        const double* on_rows, const double* on_cols, int64_t matrices, int64_t k,
                        int64_t rows, int64_t cols, int dtype, int device, void* stream);

// [n, n] of contiguous float32 or float64 rows [n, width].
void pair_distances(const void* rows, double* out, int64_t n, int64_t width, int dtype, int device,
                    void* stream);

}  // namespace cuda
}  // namespace fxk
