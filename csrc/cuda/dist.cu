// DIST: correlations instead of a divergence. With q = softmax(s/T), p = softmax(t/T), w the
// weights of the rows, 0 of those that are left out, W their sum and C the classes,
//   a row's     u = q - 1/C,     v = p - 1/C      inter = 1 - sum_i w_i rho_i / W
//   a column's  u = q - mean q,  v = p - mean p   intra = 1 - sum_j rho_j / C
//   rho = u.v / (a b + eps),     a = |u|, b = |v|
// the loss is kd_weight T^2 (alpha inter + beta intra) and the hard part, and since
//   d rho / du = push v - pull u,  push = 1 / (a b + eps),  pull = rho b / (a (a b + eps))
// the gradient at a class is q (slope - sum_k q_k slope_k), where the slope adds up what row and
// column have of it. Everything is centred before it is multiplied: of rows and columns that are
// all but uniform, differences of the products would have no digits left.
//
// A column has something of every row in it, and no block waits for another one: one launch reduces
// the rows, one the columns of a run of rows each, one brings the runs together, and one has what
// it takes for the gradient. Between them stand some numbers per row and per column, in double
// precision where they are added up, in an order that nothing changes.
#include "correlations.cuh"
#include "cross_entropy.cuh"
#include "dist.h"
#include "dist_columns.cuh"
#include "launch.cuh"
#include "totals.cuh"

namespace fxk {
namespace cuda {
namespace {

// The weights of the classes, on the average.
template <class F>
__device__ __forceinline__ double all_weight(const Params<F>& a, Block& block) {
  if (!a.hard || a.class_weight == nullptr || a.label_smoothing == 0) return 1;
  double sum[1] = {0};
  for (int j = (int)threadIdx.x; j < a.classes; j += (int)blockDim.x) sum[0] += a.class_weight[j];
  block.all<Sum>(sum);
  return sum[0] / a.classes;
}

// How a row counts.
struct Standing {
  int64_t label;
  bool known;     // the label is a class, or there is none
  double weight;  // 0: the row may hold anything
  template <class F>
  __device__ __forceinline__ Standing(const Params<F>& a, int64_t i) {
    label = a.labels ? a.labels[i] : -1;
    known = a.labels == nullptr || (label >= 0 && label < a.classes);
    const bool ignored = a.labels != nullptr && label == a.ignore_index;
    weight = ignored ? 0 : a.row_weight ? a.row_weight[i] : 1;
    known = known || ignored;
  }
};

template <bool kOnChip, int kChunks, class S, class T, class F, class Group>
__device__ __forceinline__ void reduce_row(const DistParams<F>& a, const Row<S, T>& row, int64_t i,
                                           const Standing& is, double all, Group& group,
                                           double* total) {
  using AnyTile = Tile<S, T, kDIST, kChunks>;
  AnyTile tile;
  const int64_t per_tile = (int64_t)AnyTile::kSize * group.size();
  const int tiles = kOnChip ? 1 : (int)((row.n + row.skew + per_tile - 1) / per_tile);
  Offsets<F> z;
  F sum[kSums<kDIST>] = {};
  sum_exponentials<kOnChip, kDIST>(a, row, group, tile, tiles, z, sum);

  const F of_student = 1 / sum[kStudentSum], of_teacher = 1 / sum[kTeacherSum];
  F moment[5] = {};  // u, v, uu, vv, uv
  for (int k = tiles - 1; k >= 0; --k) {
    if (!kOnChip) tile.load(row, group, k);
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
      const int at = tile.first + c * tile.step;
      if (at >= row.n) break;
      F part[5] = {};
#pragma unroll
      for (int e = 0; e < AnyTile::kVec; ++e) {
        if (!row.holds(at + e)) continue;
        const Point<F> p = tile.at(c * AnyTile::kVec + e, z, a);
        const F u = fused(p.student, of_student, -a.uniform);
        const F v = fused(p.teacher, of_teacher, -a.uniform);
        part[0] += u;
        part[1] += v;
        part[2] = fused(u, u, part[2]);
        part[3] = fused(v, v, part[3]);
        part[4] = fused(u, v, part[4]);
      }
#pragma unroll
      for (int n = 0; n < 5; ++n) moment[n] += part[n];
    }
  }
  group.template all<Sum>(moment);
  double hard = 0;
  if (a.hard && is.known) hard = hard_loss<false>(a, row, is.weight, z, sum[kHardSum], all, group);
  if (group.index() != 0) return;

  const double n = a.classes, u = moment[0], v = moment[1];
  const double uu = moment[2] - u * u / n, vv = moment[3] - v * v / n, uv = moment[4] - u * v / n;
  const Correlation of(uu < 0 ? 0 : uu, vv < 0 ? 0 : vv, uv);
  // What the probabilities are short of 1 is the rounding of their sum.
  const F exact_student = (F)(of_student * (1 - u)), exact_teacher = (F)(of_teacher * (1 - v));
  a.numbers[i] = {z.student, z.teacher,         exact_student, exact_teacher, (F)is.weight,
                  z.hard,    1 / sum[kHardSum], (F)of.pull,    (F)of.push};
  const double wrong = is.known ? 0 : not_a_number<double>();
  total[kHard] += hard + wrong;
  total[kLabelWeight] +=
      is.weight * (a.class_weight && is.known && is.label >= 0 ? a.class_weight[is.label] : 1);
  total[kRho] += is.weight * of.rho + wrong;
  total[kWeight] += is.weight;
}

template <class S, class T, int kLayout>
__global__ void __launch_bounds__((kThreads<kLayout>), (kBlocks<S, kLayout>))
    dist_rows_kernel(const DistParams<typename Compute<S>::type> a) {
  Block block;
  using Totals = double[kMostGroups][kRowTotals];
  FXK_SHARED(Totals, totals);
  const double all = all_weight(a, block);
  if (threadIdx.x < kMostGroups)
    for (int k = 0; k < kRowTotals; ++k) totals[threadIdx.x][k] = 0;
  __syncthreads();

  using Group = typename Choose<kPerWarp<kLayout>>::type;
  Group group;
  if constexpr (kLayout == kWarpRow) group.width = a.width;
  const int number = kPerWarp<kLayout> ? (int)threadIdx.x / group.size() : 0;
  const int per_block = kPerWarp<kLayout> ? (int)blockDim.x / group.size() : 1;
  const int64_t start = (int64_t)blockIdx.x * per_block + number;
  for (int64_t i = start; i < a.rows; i += (int64_t)gridDim.x * per_block) {
    const Standing is(a, i);
    if (is.weight != 0) {
      const Row<S, T> row(a, i, is.label, true);
      reduce_row<kLayout != kLongRow, kChunksOf<S, kLayout>>(a, row, i, is, all, group,
                                                             totals[number]);
    } else if (group.index() == 0) {
      a.numbers[i].weight = 0;
      if (!is.known) totals[number][kHard] = totals[number][kRho] = not_a_number<double>();
    }
  }
  __syncthreads();
  double total[kRowTotals] = {};
  if (threadIdx.x < kMostGroups)
    for (int k = 0; k < kRowTotals; ++k) total[k] = totals[threadIdx.x][k];
  block.all<Sum>(total);
  if (sum_over_blocks(a.partials, a.ticket, total, block) && threadIdx.x == 0)
    for (int k = 0; k < kRowTotals; ++k) a.totals[k] = total[k];
}

// What a row's slopes are made with: its exponentials', and the factors of its own part and of the
// columns', with everything that the loss is multiplied by.
template <class F>
struct Factors {
  F student, teacher, of_student_sum, of_teacher_sum;
  F row_pull, row_push, column;
};

// kCount numbers of the columns from `at` on, 0 where there is none.
template <int kCount, class S, class T, class F>
__device__ __forceinline__ void of_columns(const DistParams<F>& a, const Row<S, T>& row, int at,
                                           const F* from, F (&out)[kCount]) {
  if (a.by_column && row.skew == 0 && at + kCount <= row.n) {
    load_vector<kCount>(from + at, out);
  } else {
#pragma unroll
    for (int e = 0; e < kCount; ++e)
      out[e] = a.by_column && row.holds(at + e) ? from[at + e] : (F)0;
  }
}

// Exponentials of the student in place of its logits, slopes in place of the teacher's; the sum of
// the slopes under q, of this thread's share.
template <class AnyTile, class S, class T, class F>
__device__ __forceinline__ F slopes(const DistParams<F>& a, const Row<S, T>& row, AnyTile& tile,
                                    const Factors<F>& by) {
  constexpr int kVec = AnyTile::kVec, kEach = 16 / (int)sizeof(F);
  F total = 0;
#pragma unroll
  for (int c = 0; c < AnyTile::kChunks; ++c) {
    if (tile.first + c * tile.step >= row.n) break;
    F sum = 0;
#pragma unroll
    for (int part = 0; part < kVec; part += kEach) {
      const int at = tile.first + c * tile.step + part;
      // One side after the other: the columns' numbers take registers.
      F mean[kEach], factor[kEach], own[kEach];
      of_columns(a, row, at, a.columns[kMeanQ], mean);
      of_columns(a, row, at, a.columns[kPull], factor);
#pragma unroll
      for (int e = 0; e < kEach; ++e) {
        F& s = tile.s[c * kVec + part + e];
        s = exp2_of(fused(s, a.factor, by.student));
        const F u = fused(s, by.of_student_sum, -a.uniform);
        own[e] = by.row_pull * u + by.column * factor[e] * fused(s, by.of_student_sum, -mean[e]);
      }
      of_columns(a, row, at, a.columns[kMeanP], mean);
      of_columns(a, row, at, a.columns[kPush], factor);
#pragma unroll
      for (int e = 0; e < kEach; ++e) {
        F& t = tile.t[c * kVec + part + e];
        const F y = exp2_of(fused(t, a.factor, by.teacher));
        const F v = fused(y, by.of_teacher_sum, -a.uniform);
        t = own[e] - by.row_push * v -
            by.column * factor[e] * fused(y, by.of_teacher_sum, -mean[e]);
        // Beside the row, e^x is 0.
        sum = fused(tile.s[c * kVec + part + e] * by.of_student_sum, t, sum);
      }
    }
    total += sum;
  }
  return total;
}

template <bool kOnChip, int kChunks, class S, class T, class F, class Group>
__device__ __forceinline__ void row_gradient(const DistParams<F>& a, const Row<S, T>& row,
                                             int64_t i, const Common& common, Group& group) {
  using AnyTile = Tile<S, T, kDIST, kChunks>;
  constexpr int kVec = AnyTile::kVec;
  const RowNumbers<F>& has = a.numbers[i];
  Factors<F> by = {has.student, has.teacher, has.of_student_sum, has.of_teacher_sum};
  F on_hard = 0, picked = 0, uniform = 0;
  {
    const double on_row = a.row_weight ? a.row_weight[i] : 1;
    const double label_weight = a.hard && a.class_weight ? a.class_weight[row.label] : 1;
    const HardSlope<F> hard(a, label_weight, on_row, common.mean.hard, common.all_weight);
    if (a.hard) on_hard = hard.mass * has.of_hard_sum;
    picked = hard.picked;
    uniform = hard.uniform;
    const double scale = a.kd_weight * a.temperature * on_row;
    const F on_rows = (F)(scale * a.alpha * common.mean.soft);
    by.row_pull = on_rows * has.pull;
    by.row_push = on_rows * has.push;
    by.column = (F)(scale * a.beta / a.classes);
  }
  const bool by_class = uniform != 0 && a.class_weight != nullptr;
  AnyTile tile;
  const int64_t per_tile = (int64_t)AnyTile::kSize * group.size();
  const int tiles = kOnChip ? 1 : (int)((row.n + row.skew + per_tile - 1) / per_tile);
  F under[1] = {0};
  for (int k = 0; k < tiles; ++k) {
    tile.load(row, group, k);
    under[0] += slopes(a, row, tile, by);
  }
  group.template all<Sum>(under);

  Offsets<F> z;
  z.hard = has.hard;
  for (int k = tiles - 1; k >= 0; --k) {
    if (!kOnChip) {
      tile.load(row, group, k);
      slopes(a, row, tile, by);
    }
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
      const int at = tile.first + c * tile.step;
      if (at >= row.n) break;
      F g[kVec];
#pragma unroll
      for (int e = 0; e < kVec; ++e) {
        const F x = tile.s[c * kVec + e];
        const F soft = x * by.of_student_sum * (tile.t[c * kVec + e] - under[0]);
        g[e] = fused(on_hard, power_of(x, a), soft) - (by_class ? (F)0 : uniform);
      }
      if (a.apart || by_class) {
#pragma unroll
        for (int e = 0; e < kVec; ++e) {
          if (!row.holds(at + e)) continue;
          if (a.apart)  // the logit once more: its place is taken
            g[e] = fused(on_hard, hard_exponential((F)widen(row.s[at + e]), z, a), g[e]);
          if (by_class) g[e] -= uniform * (F)a.class_weight[at + e];
        }
      }
      if (a.hard && (unsigned)(row.label - at) < (unsigned)kVec) {
#pragma unroll
        for (int e = 0; e < kVec; ++e)
          if (at + e == row.label) g[e] -= picked;
      }
      row.store(at, g);
    }
  }
}

// The columns' numbers take registers from rows that are read in a loop.
template <class S, int kLayout>
constexpr int kGradientChunks = kLayout == kLongRow && sizeof(S) == 2 ? 1 : kChunksOf<S, kLayout>;

template <class S, class T, int kLayout>
__global__ void __launch_bounds__((kThreads<kLayout>), (kBlocks<S, kLayout>))
    dist_gradient_kernel(const DistParams<typename Compute<S>::type> a) {
  using F = typename Compute<S>::type;
  Block block;
  FXK_SHARED(Common, common);
  const double all = all_weight(a, block);
  if (threadIdx.x == 0) {
    common.all_weight = all;
    common.mean = {reciprocal(a.totals[kLabelWeight]), reciprocal(a.totals[kWeight])};
  }
  __syncthreads();
  using Group = typename Choose<kPerWarp<kLayout>>::type;
  Group group;
  if constexpr (kLayout == kWarpRow) group.width = a.width;
  const int number = kPerWarp<kLayout> ? (int)threadIdx.x / group.size() : 0;
  const int per_block = kPerWarp<kLayout> ? (int)blockDim.x / group.size() : 1;
  const int64_t start = (int64_t)blockIdx.x * per_block + number;
  for (int64_t i = start; i < a.rows; i += (int64_t)gridDim.x * per_block) {
    const Standing is(a, i);
    const Row<S, T> row(a, i, is.label, true);
    if (!is.known)
      row.fill(not_a_number<F>(), group);
    else if (is.weight == 0)
      row.fill((F)0, group);
    else
      row_gradient<kLayout != kLongRow, kGradientChunks<S, kLayout>>(a, row, i, common, group);
  }
}

// Where everything lies in the scratch memory, in doubles from its beginning.
struct Places {
  int64_t partials = 0, totals, numbers, run_weight, moments, columns, end;
  int64_t pitch;
  Places(int64_t rows, int64_t classes, const Columns& cut, int64_t exact, int64_t number) {
    const int64_t merging = ceil_div(classes, kMergedColumns);
    totals = kRowTotals * rows > merging ? kRowTotals * rows : merging;
    numbers = even(totals + kRowTotals);
    run_weight = numbers + rows * number / 8;
    moments = run_weight + cut.runs;
    columns = even(moments + 5 * cut.runs * classes);
    pitch = ceil_div(classes, 4) * 4;
    end = columns + kColumnNumbers * pitch * exact / 8;
  }
  static int64_t even(int64_t n) { return n + n % 2; }
};

template <class F>
Places places(int64_t rows, int64_t classes, const Columns& cut) {
  return Places(rows, classes, cut, sizeof(F), sizeof(RowNumbers<F>));
}

template <class S, class T>
void run(const KDLossArgs& args, int device, cudaStream_t stream, int* ticket, double* scratch) {
  using F = typename Compute<S>::type;
  const int processors = multiprocessors(device);
  const Columns cut(args.rows, args.classes, 16 / sizeof(S), processors);
  const Places at = places<F>(args.rows, args.classes, cut);
  DistParams<F> a = {};
  fill(a, args, kDIST, ticket, scratch + at.partials);
  a.totals = scratch + at.totals;
  a.numbers = reinterpret_cast<RowNumbers<F>*>(scratch + at.numbers);
  a.run_weight = scratch + at.run_weight;
  a.moments = scratch + at.moments;
  for (int k = 0; k < kColumnNumbers; ++k)
    a.columns[k] = reinterpret_cast<F*>(scratch + at.columns) + k * at.pitch;
  a.share = cut.share;
  a.runs = cut.runs;
  a.tiles = cut.tiles;
  a.tile_width = cut.width;
  a.uniform = (F)(1 / (double)args.classes);
  a.by_column = args.beta != 0;
  a.vector = aligned<S>(args.student, args.rows, args.student_stride) &&
             aligned<T>(args.teacher, args.rows, args.teacher_stride);
  by_layout<S, T>(args, [&](auto layout, int64_t chunks) {
    constexpr int kLayout = decltype(layout)::value;
    const Grid grid = grid_of<S, kLayout>(a.rows, chunks, processors);
    a.width = grid.width;
    const auto rows = &dist_rows_kernel<S, T, kLayout>;
    FXK_LAUNCH(rows, (unsigned)grid.blocks, (unsigned)grid.threads, 0, stream, a);
    check(cudaGetLastError(), "kd_loss");
    if (a.by_column && a.runs > 0) {
      const int64_t lines = kColumnThreads / a.tile_width;
      const auto columns = &dist_columns_kernel<S, T>;
      FXK_LAUNCH(columns, (unsigned)(a.tiles * ceil_div(a.runs, lines)), kColumnThreads, 0, stream,
                 a);
      check(cudaGetLastError(), "kd_loss");
    }
    const auto merge = &dist_merge_kernel<F>;
    const int64_t merging = a.by_column ? ceil_div(a.classes, kMergedColumns) : 1;
    FXK_LAUNCH(merge, (unsigned)merging, kMergedColumns * kMergingWarps, 0, stream, a);
    check(cudaGetLastError(), "kd_loss");
    if (a.grad != nullptr && a.rows > 0) {
      const auto gradient = &dist_gradient_kernel<S, T, kLayout>;
      FXK_LAUNCH(gradient, (unsigned)grid.blocks, (unsigned)grid.threads, 0, stream, a);
      check(cudaGetLastError(), "kd_loss");
    }
  });
}

}  // namespace

int64_t dist_workspace(int64_t rows, int64_t classes, int dtype, int device) {
  const int vec = dtype == kFloat64 ? 2 : dtype == kFloat32 ? 4 : 8;
  const Columns cut(rows, classes, vec, multiprocessors(device));
  return (dtype == kFloat64 ? places<double> : places<float>)(rows, classes, cut).end;
}

void dist(const KDLossArgs& a, int device, void* stream, int* ticket, double* scratch) {
  const OnDevice guard(device);
  const auto on = static_cast<cudaStream_t>(stream);
  by_dtypes(a.dtype, a.teacher_dtype, [&](auto types) {
    using Both = decltype(types);
    run<typename Both::S, typename Both::T>(a, device, on, ticket, scratch);
  });
}

}  // namespace cuda
}  // namespace fxk
