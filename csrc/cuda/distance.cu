// distance: one tile of the sweep over pairs. The Gram products come from the vendor's GEMM, or a
// feature is so narrow that its differences are cheaper; a launch makes distances of all matrices
// and their sums along rows and columns, a second one the products of every two matrices, and a
// third adds up what the blocks have found, in double precision and always in the same order.
// As on the CPU (csrc/cpu/distance.cpp) a typical distance is taken off before anything is summed,
// and near neighbours are computed anew from the features.
#include "distance.h"
#include "launch.cuh"

namespace fxk {
namespace cuda {
namespace {

constexpr int kSide = 32;          // rows and columns of a warp's part of a tile
constexpr int kAtOnce = 4;         // rows whose loads are under way together
constexpr int kMostMatrices = 64;  // of a launch: their addresses are its arguments
constexpr int kTileThreads = 256;

// |x - y|^2 = |x|^2 + |y|^2 - 2 xy loses its digits where it is small against the norms; below
// this share it is recomputed from the features.
__device__ __forceinline__ bool is_near(float square, float scale) {
  return !(square >= 1e-2f * scale);
}
__device__ __forceinline__ bool is_near(double square, double scale) {
  return !(square >= 1e-5 * scale);
}
__device__ __forceinline__ float root(float x) { return sqrtf(x); }
__device__ __forceinline__ double root(double x) { return sqrt(x); }

struct Feature {
  const void* rows;
  int64_t stride;
  int width, dtype;
};

template <class F>
struct TileParams {
  F* tiles;              // [matrices, rows, cols]: Gram products in, distances out
  const F* row_norms;    // [matrices, rows]
  const F* col_norms;    // [matrices, cols]
  const double* shifts;  // [matrices]
  double* row_partials;  // [matrices, col_blocks, rows], or null: distances only
  double* col_partials;  // [matrices, row_blocks, cols]
  int64_t row_offset, col_offset, matrices;
  int rows, cols, row_blocks, col_blocks, narrow;
  bool diagonal;
  Feature features[kMostMatrices];
};

template <class F>
__device__ __forceinline__ F value_at(const Feature& x, int64_t at) {
  switch (x.dtype) {
    case kFloat32: return (F) static_cast<const float*>(x.rows)[at];
    case kFloat64: return (F) static_cast<const double*>(x.rows)[at];
    case kBFloat16: return (F)widen(static_cast<const __nv_bfloat16*>(x.rows)[at]);
    default: return (F)widen(static_cast<const __half*>(x.rows)[at]);
  }
}

// From the features as they were given, by a whole warp: centring them has rounded what near
// neighbours differ by.
template <class F>
__device__ __forceinline__ double exact_square(const Feature& x, int64_t i, int64_t j, Warp& warp) {
  double total[1] = {0};
  for (int w = warp.index(); w < x.width; w += warp.size()) {
    const F d = value_at<F>(x, i * x.stride + w) - value_at<F>(x, j * x.stride + w);
    total[0] += (double)(d * d);
  }
  warp.all<Sum>(total);
  return total[0];
}

// A warp has 32 rows and 32 columns of one matrix, a lane one column and, of a narrow feature, one
// row and one column in registers.
template <class F>
__global__ void __launch_bounds__(kTileThreads, sizeof(F) == 8 ? 1 : 2)
    distances_kernel(const TileParams<F> a) {
  Warp warp;
  const int64_t item = (int64_t)blockIdx.x * (kTileThreads / 32) + threadIdx.x / 32;
  const int64_t per_matrix = (int64_t)a.row_blocks * a.col_blocks;
  if (item >= a.matrices * per_matrix) return;
  const int k = (int)(item / per_matrix), lane = warp.index();
  const int row_block = (int)(item % per_matrix / a.col_blocks);
  const int col_block = (int)(item % per_matrix % a.col_blocks);
  const int first = row_block * kSide, j = col_block * kSide + lane;
  const int last = first + kSide < a.rows ? first + kSide : a.rows;
  const bool inside = j < a.cols, narrow = a.features[k].width <= a.narrow;
  const int64_t column = a.col_offset + (inside ? j : a.cols - 1);
  F* tile = a.tiles + (int64_t)k * a.rows * a.cols + j;
  const F shift = a.row_partials ? (F)a.shifts[k] : (F)0;

  F x[kDistanceNarrow], y[kDistanceNarrow], norm_x = 0, norm_y = 0;
  const int own = first + lane < last ? first + lane : last - 1;
  if (narrow) {
    const int64_t stride = a.features[k].stride;
#pragma unroll
    for (int w = 0; w < kDistanceNarrow; ++w) {
      x[w] = y[w] = 0;
      if (w < a.features[k].width) {
        x[w] = value_at<F>(a.features[k], (a.row_offset + own) * stride + w);
        y[w] = value_at<F>(a.features[k], column * stride + w);
      }
    }
  } else {
    norm_x = a.row_norms[(int64_t)k * a.rows + own];
    norm_y = inside ? a.col_norms[(int64_t)k * a.cols + j] : (F)0;
  }

  F col_sum = 0;
  double own_sum = 0;  // of the row that is this lane's
  for (int begin = first; begin < last; begin += kAtOnce) {
    F d[kAtOnce];
#pragma unroll
    for (int r = 0; r < kAtOnce; ++r) {
      d[r] = 0;
      if (!narrow && inside && begin + r < last) d[r] = tile[(int64_t)(begin + r) * a.cols];
    }
#pragma unroll
    for (int r = 0; r < kAtOnce; ++r) {
      const int i = begin + r, source = i - first;
      const bool there = inside && i < last && !(a.diagonal && i == j);
      if (narrow) {
#pragma unroll
        for (int w = 0; w < kDistanceNarrow; ++w) {
          const F difference = __shfl_sync(~0u, x[w], source) - y[w];
          d[r] = fused(difference, difference, d[r]);
        }
      } else {
        const F scale = __shfl_sync(~0u, norm_x, source) + norm_y;
        d[r] = scale - (F)2 * d[r];
        unsigned near = __ballot_sync(~0u, there && is_near(d[r], scale));
        while (near) {
          const int at = __ffs((int)near) - 1;
          near &= near - 1;
          const double exact = exact_square<F>(a.features[k], a.row_offset + i,
                                               a.col_offset + col_block * kSide + at, warp);
          if (lane == at) d[r] = (F)exact;
        }
      }
      d[r] = there ? root(d[r]) - shift : (F)0;
      if (inside && i < last) tile[(int64_t)i * a.cols] = d[r];
      col_sum += d[r];
    }
    if (a.row_partials == nullptr) continue;
    warp.all<Sum>(d);
#pragma unroll
    for (int r = 0; r < kAtOnce; ++r)
      if (begin + r - first == lane) own_sum = (double)d[r];
  }
  if (a.row_partials == nullptr) return;
  if (first + lane < last)
    a.row_partials[((int64_t)k * a.col_blocks + col_block) * a.rows + first + lane] = own_sum;
  if (inside)
    a.col_partials[((int64_t)k * a.row_blocks + row_block) * a.cols + j] = (double)col_sum;
}

constexpr int kGroup = 4;                // matrices on either side of the products of a block
constexpr int kPairs = kGroup * kGroup;  // so many products
constexpr int kRun = 16;                 // distances summed before they go to double
constexpr int64_t kShare = 256 * kRun;   // of a tile, the least that a block is worth
constexpr int kChunksPerProcessor = 4;   // blocks that share a tile, by pair of groups

template <class F>
__global__ void __launch_bounds__(256)
    products_kernel(const F* tiles, double* partials, int matrices, int groups, int64_t size,
                    int64_t share) {
  Block block;
  const int pairs = groups * (groups + 1) / 2;
  const int64_t chunk = blockIdx.x / pairs;
  int first = 0, pair = (int)blockIdx.x % pairs;
  for (; pair >= groups - first; ++first) pair -= groups - first;
  const int second = first + pair;
  const int64_t last = (chunk + 1) * share < size ? (chunk + 1) * share : size;
  double total[kPairs];
#pragma unroll
  for (int p = 0; p < kPairs; ++p) total[p] = 0;
  for (int64_t begin = chunk * share; begin < last; begin += kShare) {
    F sum[kPairs];
#pragma unroll
    for (int p = 0; p < kPairs; ++p) sum[p] = 0;
#pragma unroll 2
    for (int r = 0; r < kRun; ++r) {
      const int64_t at = begin + 256 * r + (int)threadIdx.x;
      if (at >= last) break;
      F a[kGroup], b[kGroup];
#pragma unroll
      for (int g = 0; g < kGroup; ++g) {
        const int k = first * kGroup + g, l = second * kGroup + g;
        a[g] = k < matrices ? tiles[k * size + at] : (F)0;
        b[g] = l < matrices ? tiles[l * size + at] : (F)0;
      }
#pragma unroll
      for (int p = 0; p < kPairs; ++p) sum[p] = fused(a[p / kGroup], b[p % kGroup], sum[p]);
    }
#pragma unroll
    for (int p = 0; p < kPairs; ++p) total[p] += (double)sum[p];
  }
  block.all<Sum>(total);
  if (threadIdx.x != 0) return;
#pragma unroll
  for (int p = 0; p < kPairs; ++p) {
    const int k = first * kGroup + p / kGroup, l = second * kGroup + p % kGroup;
    if (k > l || l >= matrices) continue;
    partials[(chunk * matrices + k) * matrices + l] = total[p];
  }
}

struct FoldParams {
  const double* row_partials;
  const double* col_partials;
  const double* product_partials;  // [chunks, matrices, matrices], upper triangles
  double* products;
  double* row_sums;
  int64_t row_sums_stride, row_offset, col_offset, sums;
  int matrices, rows, cols, row_blocks, col_blocks, chunks;
  bool diagonal;
};

// What the blocks of the other launches have found, to the results: a thread for each row and
// column of each matrix, a warp for each product.
__global__ void __launch_bounds__(256) fold_kernel(const FoldParams a) {
  const int64_t sum_blocks = (a.sums + 255) / 256;
  if ((int64_t)blockIdx.x < sum_blocks) {
    const int64_t index = (int64_t)blockIdx.x * 256 + (int)threadIdx.x;
    if (index >= a.sums) return;
    const bool by_row = index < (int64_t)a.matrices * a.rows;
    const int64_t rest = by_row ? index : index - (int64_t)a.matrices * a.rows;
    const int length = by_row ? a.rows : a.cols, blocks = by_row ? a.col_blocks : a.row_blocks;
    const int64_t k = rest / length, i = rest % length;
    const double* from = (by_row ? a.row_partials : a.col_partials) + k * blocks * length + i;
    double total = 0;
#pragma unroll 8
    for (int b = 0; b < blocks; ++b) total += from[(int64_t)b * length];
    a.row_sums[k * a.row_sums_stride + (by_row ? a.row_offset : a.col_offset) + i] += total;
    return;
  }
  Warp warp;
  const int64_t pair = ((int64_t)blockIdx.x - sum_blocks) * 8 + threadIdx.x / 32;
  const int64_t each = (int64_t)a.matrices * a.matrices;
  const int64_t k = pair / a.matrices, l = pair % a.matrices;
  if (pair >= each || k > l) return;
  double total[1] = {0};
  for (int64_t c = warp.index(); c < a.chunks; c += 32)
    total[0] += a.product_partials[c * each + pair];
  warp.all<Sum>(total);
  if (warp.index() != 0) return;
  const double found = a.diagonal ? total[0] : 2 * total[0];  // the mirrored tile is never visited
  a.products[pair] += found;
  if (k != l) a.products[l * a.matrices + k] += found;
}

// V = (2 sum_l (P + P^T)_kl D_l + r_i + r_j) / D_k.
template <class F>
__global__ void __launch_bounds__(256)
    weights_kernel(const F* distances, F* weights, const F* factors, const double* on_rows,
                   const double* on_cols, int matrices, int k, int64_t rows, int64_t cols) {
  const int64_t size = rows * cols, step = (int64_t)gridDim.x * 256;
  for (int64_t at = (int64_t)blockIdx.x * 256 + (int)threadIdx.x; at < size; at += step) {
    F v = (F)(on_rows[at / cols] + on_cols[at % cols]);
    for (int l = 0; l < matrices; ++l) {
      // Without a factor what it stands before is not asked: it may be infinite.
      const F factor = factors[l];
      if (factor != (F)0) v = fused(factor, distances[l * size + at], v);
    }
    const F own = distances[k * size + at];
    weights[at] = own == (F)0 ? (F)0 : v / own;
  }
}

constexpr int kPairSide = 16, kDepth = 32;

// 16 x 16 distances of a block, one of a thread; 32 numbers of each row at a time.
template <class F>
__global__ void __launch_bounds__(256)
    pairs_kernel(const F* rows, double* out, int64_t n, int64_t width) {
  const int64_t side = (n + kPairSide - 1) / kPairSide;
  const int64_t first = blockIdx.x / side * kPairSide, second = blockIdx.x % side * kPairSide;
  if (first > second) return;  // its mirror image
  const int y = (int)threadIdx.x % kPairSide, x = (int)threadIdx.x / kPairSide;
  // A column more than is used: then the banks of a column differ.
  using Space = F[2][kPairSide][kDepth + 1];
  FXK_SHARED(Space, space);
  double total = 0;
  for (int64_t begin = 0; begin < width; begin += kDepth) {
#pragma unroll
    for (int q = 0; q < 2 * kPairSide * kDepth / 256; ++q) {
      const int at = 256 * q + (int)threadIdx.x;
      const int side_of = at / (kPairSide * kDepth), of = at / kDepth % kPairSide;
      const int64_t row = (side_of ? second : first) + of, w = begin + at % kDepth;
      space[side_of][of][at % kDepth] = row < n && w < width ? rows[row * width + w] : (F)0;
    }
    __syncthreads();
    F sum = 0;
#pragma unroll
    for (int w = 0; w < kDepth; ++w) {
      const F d = space[0][x][w] - space[1][y][w];
      sum = fused(d, d, sum);
    }
    total += (double)sum;
    __syncthreads();
  }
  const int64_t i = first + x, j = second + y;
  if (i >= n || j >= n) return;
  total = sqrt(total);
  out[i * n + j] = total;
  out[j * n + i] = total;
}

int64_t chunks_of(int64_t rows, int64_t cols, int device) {
  return smaller(ceil_div(rows * cols, kShare), kChunksPerProcessor * multiprocessors(device));
}

int64_t sums_of(int64_t matrices, int64_t rows, int64_t cols) {
  return matrices * (ceil_div(cols, kSide) * rows + ceil_div(rows, kSide) * cols);
}

template <class F>
void tile(const DistanceTileArgs& args, int narrow, int device, cudaStream_t stream,
          double* scratch) {
  const int64_t size = args.rows * args.cols;
  TileParams<F> a = {};
  a.rows = (int)args.rows;
  a.cols = (int)args.cols;
  a.row_blocks = (int)ceil_div(args.rows, kSide);
  a.col_blocks = (int)ceil_div(args.cols, kSide);
  a.row_offset = args.row_offset;
  a.col_offset = args.col_offset;
  a.narrow = narrow;
  a.diagonal = args.diagonal != 0;
  const int64_t of_rows = a.col_blocks * args.rows, of_cols = a.row_blocks * args.cols;
  double* col_partials = scratch + args.matrices * of_rows;
  for (int64_t first = 0; first < args.matrices; first += kMostMatrices) {
    a.matrices = smaller(args.matrices - first, kMostMatrices);
    a.tiles = reinterpret_cast<F*>(args.grams[first]);
    a.row_norms = static_cast<const F*>(args.row_norms) + first * args.rows;
    a.col_norms = static_cast<const F*>(args.col_norms) + first * args.cols;
    a.shifts = args.shifts + first;
    if (args.products) {
      a.row_partials = scratch + first * of_rows;
      a.col_partials = col_partials + first * of_cols;
    }
    for (int64_t k = 0; k < a.matrices; ++k)
      a.features[k] = {reinterpret_cast<const void*>(args.features[first + k]),
                       args.feature_strides[first + k], (int)args.widths[first + k],
                       (int)args.feature_dtypes[first + k]};
    const int64_t warps = a.matrices * a.row_blocks * a.col_blocks;
    const auto kernel = &distances_kernel<F>;
    FXK_LAUNCH(kernel, (unsigned)ceil_div(warps, kTileThreads / 32), kTileThreads, 0, stream, a);
    check(cudaGetLastError(), "distance_tile");
  }
  if (args.products == nullptr) return;

  FoldParams fold = {};
  fold.row_partials = scratch;
  fold.col_partials = col_partials;
  double* partials = scratch + sums_of(args.matrices, args.rows, args.cols);
  fold.product_partials = partials;
  fold.products = args.products;
  fold.row_sums = args.row_sums;
  fold.row_sums_stride = args.row_sums_stride;
  fold.row_offset = args.row_offset;
  fold.col_offset = args.col_offset;
  fold.matrices = (int)args.matrices;
  fold.rows = a.rows;
  fold.cols = a.cols;
  fold.row_blocks = a.row_blocks;
  fold.col_blocks = a.col_blocks;
  fold.diagonal = a.diagonal;
  fold.sums = args.matrices * (args.rows + (args.diagonal ? 0 : args.cols));
  const int64_t most = chunks_of(args.rows, args.cols, device);
  const int64_t share = ceil_div(ceil_div(size, most), kShare) * kShare;
  fold.chunks = (int)ceil_div(size, share);
  const int groups = (int)ceil_div(args.matrices, kGroup);
  const auto products = &products_kernel<F>;
  FXK_LAUNCH(products, (unsigned)(fold.chunks * groups * (groups + 1) / 2), 256, 0, stream,
             reinterpret_cast<const F*>(args.grams[0]), partials, fold.matrices, groups, size,
             share);
  check(cudaGetLastError(), "distance_tile");
  const int64_t blocks = ceil_div(fold.sums, 256) + ceil_div(args.matrices * args.matrices, 8);
  const auto add = &fold_kernel;
  FXK_LAUNCH(add, (unsigned)blocks, 256, 0, stream, fold);
  check(cudaGetLastError(), "distance_tile");
}

template <class F>
void weights_of(const void* distances, void* weights, const void* factors, const double* on_rows,
                const double* on_cols, int64_t matrices, int64_t k, int64_t rows, int64_t cols,
                int device, cudaStream_t stream) {
  const int64_t blocks = smaller(ceil_div(rows * cols, 256), 16 * multiprocessors(device));
  const auto kernel = &weights_kernel<F>;
  FXK_LAUNCH(kernel, (unsigned)blocks, 256, 0, stream, static_cast<const F*>(distances),
             static_cast<F*>(weights), static_cast<const F*>(factors), on_rows, on_cols,
             (int)matrices, (int)k, rows, cols);
  check(cudaGetLastError(), "distance_grad_tile");
}

template <class F>
void pairs(const void* rows, double* out, int64_t n, int64_t width, cudaStream_t stream) {
  const int64_t side = ceil_div(n, kPairSide);
  const auto kernel = &pairs_kernel<F>;
  FXK_LAUNCH(kernel, (unsigned)(side * side), 256, 0, stream, static_cast<const F*>(rows), out, n,
             width);
  check(cudaGetLastError(), "pair_distances");
}

}  // namespace

int64_t distance_workspace(int64_t matrices, int64_t rows, int64_t cols, int device) {
  return sums_of(matrices, rows, cols) + chunks_of(rows, cols, device) * matrices * matrices;
}

void distance_tile(const DistanceTileArgs& a, int narrow, int device, void* stream,
                   double* scratch) {
  if (narrow > kDistanceNarrow) throw std::invalid_argument("distance_tile: narrow is too wide");
  if (a.rows > 1 << 20 || a.cols > 1 << 20 || a.matrices > 1 << 12)
    throw std::invalid_argument("distance_tile: at most 2^20 rows and columns of 2^12 matrices");
  for (int64_t k = 0; k < a.matrices; ++k) {
    const int64_t size = a.rows * a.cols * (a.dtype == kFloat64 ? 8 : 4);
    if (a.grams[k] != a.grams[0] + k * size)
      throw std::invalid_argument("distance_tile: the tiles must lie one after the other");
    if (a.widths[k] > INT32_MAX)
      throw std::invalid_argument("distance_tile: more than 2^31 - 1 numbers in a row");
  }
  if (a.matrices == 0 || a.rows == 0 || a.cols == 0) return;
  const OnDevice guard(device);
  const auto on = static_cast<cudaStream_t>(stream);
  if (a.dtype == kFloat64) return tile<double>(a, narrow, device, on, scratch);
  tile<float>(a, narrow, device, on, scratch);
}

void distance_grad_tile(const void* distances, void* weights, const void* factors,
                        const double* on_rows, const double* on_cols, int64_t matrices, int64_t k,
                        int64_t rows, int64_t cols, int dtype, int device, void* stream) {
  if (rows == 0 || cols == 0) return;
  const OnDevice guard(device);
  const auto on = static_cast<cudaStream_t>(stream);
  const auto run = dtype == kFloat64 ? &weights_of<double> : &weights_of<float>;
  run(distances, weights, factors, on_rows, on_cols, matrices, k, rows, cols, device, on);
}

void pair_distances(const void* rows, double* out, int64_t n, int64_t width, int dtype, int device,
                    void* stream) {
  if (n == 0) return;
  if (n > 1 << 19) throw std::invalid_argument("pair_distances: more than 2^19 rows");
  const OnDevice guard(device);
  const auto on = static_cast<cudaStream_t>(stream);
  if (dtype == kFloat64) return pairs<double>(rows, out, n, width, on);
  pairs<float>(rows, out, n, width, on);
}

}  // namespace cuda
}  // namespace fxk
