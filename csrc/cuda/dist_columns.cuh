// The columns of DIST: moments of a run of rows each, merged with Chan's formula. In single
// precision a thread follows its columns down a run; runs are merged in double.
#pragma once
#include "correlations.cuh"
#include "launch.cuh"
#include "totals.cuh"

namespace fxk {
namespace cuda {
namespace {

// Threads of a block, as the columns are cut: `tile_width` of them hold the columns of a tile, for
// a run of rows.
constexpr int kColumnThreads = 128;

// Over the rows so far. Not q but its difference from the first row's: none of it is rounded at the
// size of q itself, and columns without spread have exactly none.
template <class F>
struct Running {
  F first_q, first_p, q, p, qq, pp, qp;
  // by: the row's share of the weight with it; squares: its weight by the share of those before it.
  __device__ __forceinline__ void add(F student, F teacher, F by, F squares) {
    const F u = student - q, v = teacher - p;
    q = fused(by, u, q);
    p = fused(by, v, p);
    const F wu = squares * u;
    qq = fused(wu, u, qq);
    qp = fused(wu, v, qp);
    pp = fused(squares * v, v, pp);
  }
};

// kCount elements of a row as they lie in memory, `step` apart: they wait in few registers.
template <class S, int kCount>
struct Packed {
  static constexpr int kWords = kCount * (int)sizeof(S) / 16;
  struct Elements {
    S v[kCount];
  };
  struct Words {
    uint4 v[kWords];
  };
  Words words;
  __device__ __forceinline__ void load(const S* from, int first, int step, int n, bool whole) {
    if (whole) {
#pragma unroll
      for (int i = 0; i < kWords; ++i) words.v[i] = reinterpret_cast<const uint4*>(from + first)[i];
      return;
    }
    Words none;
#pragma unroll
    for (int i = 0; i < kWords; ++i) none.v[i] = minus_infinities(from);
    Elements found = bits_as<Elements>(none);
#pragma unroll
    for (int e = 0; e < kCount; ++e)
      if (first + e * step < n) found.v[e] = from[first + e * step];
    words = bits_as<Words>(found);
  }
  template <class F>
  __device__ __forceinline__ void widen_to(F (&out)[kCount]) const {
#pragma unroll
    for (int i = 0; i < kWords; ++i)
      unpack(words.v[i], static_cast<const S*>(nullptr), out + i * (16 / (int)sizeof(S)));
  }
};

template <class S, class T>
__global__ void __launch_bounds__(kColumnThreads, sizeof(S) == 8 ? 2 : 4)
    dist_columns_kernel(const DistParams<typename Compute<S>::type> a) {
  using F = typename Compute<S>::type;
  constexpr int kVec = 16 / sizeof(S);
  constexpr int kRows = sizeof(S) == 2 ? 2 : 4;  // that wait for memory together
  const int lines = kColumnThreads / a.tile_width;
  const int number = (int)threadIdx.x & (a.tile_width - 1);
  const int tile = (int)(blockIdx.x % (unsigned)a.tiles);
  const int run = (int)(blockIdx.x / (unsigned)a.tiles) * lines + (int)threadIdx.x / a.tile_width;
  if (run >= a.runs) return;
  // Neighbouring threads read neighbouring bytes, one element each or 16 bytes.
  const int base = tile * a.tile_width * kVec;
  const int first = base + (a.vector ? number * kVec : number), step = a.vector ? 1 : a.tile_width;
  const bool whole = a.vector && first + kVec <= a.classes;

  Running<F> column[kVec] = {};
  F weight = 0;
  const int64_t begin = run * a.share, end = begin + a.share < a.rows ? begin + a.share : a.rows;
  for (int64_t i = begin; i < end; i += kRows) {
    Packed<S, kVec> student[kRows];
    Packed<T, kVec> teacher[kRows];
    F on_row[kRows];
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      on_row[r] = i + r < end ? a.numbers[i + r].weight : (F)0;
      if (on_row[r] == 0) continue;  // it may hold anything
      student[r].load(static_cast<const S*>(a.student) + (i + r) * a.student_stride, first, step,
                      a.classes, whole);
      teacher[r].load(static_cast<const T*>(a.teacher) + (i + r) * a.teacher_stride, first, step,
                      a.classes, whole);
    }
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      if (on_row[r] == 0) continue;
      const RowNumbers<F>& row = a.numbers[i + r];
      F s[kVec], t[kVec];
      student[r].widen_to(s);
      teacher[r].widen_to(t);
      const F before = weight;
      weight += on_row[r];
      const F by = on_row[r] / weight, squares = before * by;
#pragma unroll
      for (int e = 0; e < kVec; ++e) {
        const F x = exp2_of(fused(s[e], a.factor, row.student));
        const F y = exp2_of(fused(t[e], a.factor, row.teacher));
        if (before == 0) {
          column[e].first_q = x * row.of_student_sum;
          column[e].first_p = y * row.of_teacher_sum;
        }
        column[e].add(fused(x, row.of_student_sum, -column[e].first_q),
                      fused(y, row.of_teacher_sum, -column[e].first_p), by, squares);
      }
    }
  }
  if (tile == 0 && number == 0) a.run_weight[run] = weight;
#pragma unroll
  for (int e = 0; e < kVec; ++e) {
    const int j = first + e * step;
    if (j >= a.classes) continue;
    double* to = a.moments + (int64_t)run * 5 * a.classes + j;
    to[0] = (double)column[e].first_q + (double)column[e].q;
    to[a.classes] = (double)column[e].first_p + (double)column[e].p;
    to[2 * (int64_t)a.classes] = column[e].qq;
    to[3 * (int64_t)a.classes] = column[e].pp;
    to[4 * (int64_t)a.classes] = column[e].qp;
  }
}

struct Moments {
  double weight, q, p, qq, pp, qp;
  // Means that are equal stay as they are, to the bit.
  __device__ __forceinline__ void merge(const Moments& m) {
    if (m.weight == 0) return;
    const double both = weight + m.weight, share = m.weight / both, squares = weight * share;
    const double u = m.q - q, v = m.p - p;
    weight = both;
    q += share * u;
    p += share * v;
    qq += m.qq + squares * u * u;
    pp += m.pp + squares * v * v;
    qp += m.qp + squares * u * v;
  }
};

constexpr int kMergedColumns = 32, kMergingWarps = 8;

template <class F>
__global__ void __launch_bounds__(kMergedColumns* kMergingWarps)
    dist_merge_kernel(const DistParams<F> a) {
  Block block;
  const int warp = (int)threadIdx.x / kMergedColumns, lane = (int)threadIdx.x % kMergedColumns;
  const int j = (int)blockIdx.x * kMergedColumns + lane;
  const bool there = a.by_column && j < a.classes;
  Moments mine = {};
  for (int run = warp; there && run < a.runs; run += kMergingWarps) {
    const double* from = a.moments + (int64_t)run * 5 * a.classes + j;
    const int64_t step = a.classes;
    mine.merge(
        {a.run_weight[run], from[0], from[step], from[2 * step], from[3 * step], from[4 * step]});
  }
  using Space = Moments[kMergingWarps][kMergedColumns];
  FXK_SHARED(Space, space);
  space[warp][lane] = mine;
  __syncthreads();
  double sum[1] = {0};
  if (warp == 0 && there) {
    for (int k = 1; k < kMergingWarps; ++k) mine.merge(space[k][lane]);
    const Correlation of(mine.qq, mine.pp, mine.qp);
    a.columns[kMeanQ][j] = (F)mine.q;
    a.columns[kMeanP][j] = (F)mine.p;
    a.columns[kPull][j] = (F)of.pull;
    a.columns[kPush][j] = (F)of.push;
    sum[0] = of.rho;
  }
  block.all<Sum>(sum);
  if (!sum_over_blocks(a.partials, a.ticket, sum, block) || threadIdx.x != 0) return;
  const double rows = a.totals[kWeight];
  const double inter = 1 - a.totals[kRho] * reciprocal(rows);
  const double intra = a.by_column ? 1 - sum[0] / a.classes : 0;
  const double hard = a.totals[kHard] * reciprocal(a.totals[kLabelWeight]);
  double soft = 0;
  if (rows != 0)
    soft = a.kd_weight * a.temperature * a.temperature * (a.alpha * inter + a.beta * intra);
  *static_cast<F*>(a.loss) = (F)(hard + soft);
  static_cast<F*>(a.parts)[0] = (F)hard;
  static_cast<F*>(a.parts)[1] = (F)soft;
}

// How the columns are cut.
struct Columns {
  int width, tiles, runs;
  int64_t share;
  Columns(int64_t rows, int64_t classes, int vec, int processors) {
    const int64_t chunks = ceil_div(classes, vec);
    width = threads_for(chunks, 1, 32, kColumnThreads);
    tiles = (int)ceil_div(chunks, width);
    // Enough for every processor, but no more than there are rows to make it worth while, and than
    // the merging launch takes in its stride.
    const int64_t lines = kColumnThreads / width;
    int64_t wanted = ceil_div(8 * processors * lines, tiles);
    wanted = smaller(wanted, smaller(ceil_div(rows, 16), 512));
    share = ceil_div(rows, wanted > 1 ? wanted : 1);
    if (share < 1) share = 1;
    runs = (int)ceil_div(rows, share);
  }
};

}  // namespace
}  // namespace cuda
}  // namespace fxk
