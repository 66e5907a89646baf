// kd_loss: ce_weight * CE(student, labels) + kd_weight * T^2 * D(teacher_T, student_T), loss and
// gradient in one launch. With x = (s - max s)/T, y = (t - max t)/T, q = e^x / sum e^x, p = e^y /
// sum e^y the divergences D and what they add to the gradient with respect to s/T are
//   forward KL  sum p (y - x) + log sum e^x - log sum e^y      q - p
//   reverse KL  R = sum q (x - y) + log sum e^y - log sum e^x  q (x - y - sum q (x - y))
//   JSD         b KL(p||m) + (1-b) KL(q||m), m = bp + (1-b)q   (1-b) q (log q/m - KL(q||m))
//   TVD         sum |q - p| / 2                                q (sgn - sum q sgn) / 2
//   decoupled   a KL of (label, rest) + b KL among the rest    see Decoupled
//   DIST        correlations of rows and columns               in launches of its own, see dist.cu
// so the gradient of every one but the last is e^x times something plus a multiple of e^y, and of
// the hard part a multiple of e^(s - max s), a power of e^x for T = 1, 2, 3, 4.
//
// A row belongs to a warp or to a block. Up to a size it stays in registers; beyond, it is read
// again for each sweep, backwards every second time: what was read last is still in the L2 cache.
#include "cross_entropy.cuh"
#include "dist.h"
#include "divergences.cuh"
#include "kd_loss.h"
#include "launch.cuh"
#include "totals.cuh"

// Labels and weights that all blocks together may read to find the totals of a mean; beyond, a
// launch of its own is cheaper.
#ifndef FXK_TOTALS_READS
#define FXK_TOTALS_READS (1 << 21)
#endif

namespace fxk {
namespace cuda {
namespace {

// Loss of one row, valid in the group's first thread, and, where wanted, its gradient.
template <bool kOnChip, int kChunks, int kDivergence, class S, class T, class F, class Group>
__device__ __forceinline__ Pair row_loss(const Params<F>& a, const Row<S, T>& row, int64_t i,
                                         const Common& common, Group& group) {
  using AnyTile = Tile<S, T, kDivergence, kChunks>;
  constexpr int kVec = AnyTile::kVec;
  constexpr bool kTwice = kDivergence == kJSD || kDivergence == kTVD;
  constexpr bool kSoft = kDivergence != kNone;

  AnyTile tile;
  const int64_t per_tile = (int64_t)AnyTile::kSize * group.size();
  const int tiles = kOnChip ? 1 : (int)((row.n + row.skew + per_tile - 1) / per_tile);
  Offsets<F> z;
  F sum[kSums<kDivergence>] = {};
  sum_exponentials<kOnChip, kDivergence>(a, row, group, tile, tiles, z, sum);

  Slope<F> k = {};
  F second[2] = {};
  if constexpr (kTwice) {
    k.beta = (F)a.beta;
    k.of_student_sum = 1 / sum[kStudentSum];
    k.of_teacher_sum = 1 / sum[kTeacherSum];
    if (kDivergence == kJSD) k.shift = log2_of(sum[kStudentSum]) - log2_of(sum[kTeacherSum]);
    for (int n = tiles - 1; n >= 0; --n) {
      if (!kOnChip) tile.load(row, group, n);
#pragma unroll
      for (int c = 0; c < kChunks; ++c) {
        if (tile.first + c * tile.step >= row.n) break;
        F part[2] = {};
#pragma unroll
        for (int e = 0; e < kVec; ++e) {
          const Point<F> p = tile.at(c * kVec + e, z, a);
          const F q = p.student * k.of_student_sum, t = p.teacher * k.of_teacher_sum;
          if (kDivergence == kJSD) {
            const ToMixture<F> to(p.gap + k.shift, k.beta);
            if (t != 0) part[0] = fused(t, to.teacher, part[0]);
            if (q != 0) part[1] = fused(q, to.student, part[1]);
          } else {
            part[0] += magnitude(q - t);
            part[1] = fused(q, sign_of(q - t), part[1]);
          }
        }
        second[0] += part[0];
        second[1] += part[1];
      }
    }
    group.template all<Sum>(second);
  }

  const double temperature = kSoft ? a.temperature : 1;
  if (row.grad != nullptr) {
    const double on_row = a.row_weight ? a.row_weight[i] : 1;
    const double label_weight = a.hard && a.class_weight ? a.class_weight[row.label] : 1;
    const F soft_scale = (F)(a.kd_weight * temperature * common.mean.soft * on_row);
    const HardSlope<F> hard(a, label_weight, on_row, common.mean.hard, common.all_weight);
    k.uniform = hard.by_class ? (F)0 : hard.uniform;
    F on_hard = a.hard ? hard.mass / sum[kHardSum] : (F)0, at_label = 0;
    if constexpr (kDivergence == kForwardKL) {
      k.student = soft_scale / sum[kStudentSum];
      k.teacher = -soft_scale / sum[kTeacherSum];
    } else if constexpr (kDivergence == kReverseKL) {
      k.student = soft_scale * (F)a.unit / sum[kStudentSum];
      k.mean = sum[kDot] / sum[kStudentSum];
    } else if constexpr (kDivergence == kJSD) {
      k.student = soft_scale * (F)(a.unit * (1 - a.beta)) * k.of_student_sum;
      k.mean = second[1];
    } else if constexpr (kDivergence == kTVD) {
      k.student = soft_scale / 2 * k.of_student_sum;
      k.mean = second[1];
    } else if constexpr (kDivergence == kDecoupled) {
      const Decoupled<F> d(a, (F)widen(row.s[row.label]), (F)widen(row.t[row.label]), z, sum);
      const F alpha = (F)a.alpha, beta = (F)a.beta, shift = d.shift();
      // Without another class, or with all of them masked, there is nothing among the rest.
      k.student =
          sum[kStudentSum] == 0 ? (F)0 : soft_scale * (beta - alpha * shift) / sum[kStudentSum];
      k.teacher = sum[kTeacherSum] == 0 ? (F)0 : -soft_scale * beta / sum[kTeacherSum];
      at_label = soft_scale * alpha * shift;
      if (a.hard) {
        on_hard = sum[kHardSum] == 0 ? (F)0 : on_hard * exp_of(d.hard.rest);
        at_label += hard.picked * expm1_of(d.hard.label) +
                    (hard.mass - hard.picked) * exp_of(d.hard.label) -
                    hard.uniform * (F)label_weight;
      }
    }
    if constexpr (kDivergence == kNone) {
      k.student = on_hard;
    } else if (!a.apart) {
#pragma unroll
      for (int n = 0; n < 4; ++n) k.hard[n] = a.power[n] * on_hard;
      if (kLinear<kDivergence>) k.student += k.hard[0];
    }
    for (int n = 0; n < tiles; ++n) {
      if (!kOnChip) tile.load(row, group, kTwice ? n : tiles - 1 - n);
#pragma unroll
      for (int c = 0; c < kChunks; ++c) {
        const int at = tile.first + c * tile.step;
        if (at >= row.n) break;
        F g[kVec];
#pragma unroll
        for (int e = 0; e < kVec; ++e) g[e] = slope_at<kDivergence>(tile.at(c * kVec + e, z, a), k);
        if (kSoft && a.apart) {
#pragma unroll
          for (int e = 0; e < kVec; ++e)
            g[e] = fused(on_hard, hard_exponential(tile.s[c * kVec + e], z, a), g[e]);
        }
        if (hard.by_class) {
#pragma unroll
          for (int e = 0; e < kVec; ++e)
            if (row.holds(at + e)) g[e] -= hard.uniform * (F)a.class_weight[at + e];
        }
        row.store(at, g);
      }
    }
    // The label's entry again by the thread that wrote it: taking something off a stored one would
    // round twice.
    const bool has_own = a.hard || kDivergence == kDecoupled;
    if (has_own && (row.label + row.skew) / kVec % group.size() == group.index()) {
      if (kDivergence != kDecoupled) {
        const F s = widen(row.s[row.label]), t = kSoft ? (F)widen(row.t[row.label]) : (F)0;
        at_label = slope_at<kDivergence>(point<kDivergence>(s, t, z, a), k) - hard.picked;
        if (kSoft && a.apart) at_label = fused(on_hard, hard_exponential(s, z, a), at_label);
        if (hard.by_class) at_label -= hard.uniform * (F)label_weight;
      }
      narrow(at_label, row.grad + row.label);
    }
  }

  // The loss in double precision, when the registers are free again.
  const double on_row = a.row_weight ? a.row_weight[i] : 1;
  Pair loss = {0, 0};
  if (a.hard)
    loss.hard = hard_loss<kDivergence == kDecoupled>(a, row, on_row, z, sum[kHardSum],
                                                     common.all_weight, group);
  if constexpr (kSoft) {
    if (group.index() == 0) {
      const double student = sum[kStudentSum], teacher = sum[kTeacherSum];
      if constexpr (kDivergence == kForwardKL) {
        loss.soft = a.unit * sum[kDot] / teacher + log_of(student / teacher);
      } else if constexpr (kDivergence == kReverseKL) {
        loss.soft = a.unit * (sum[kDot] / student + (double)z.gap) - log_of(student / teacher);
      } else if constexpr (kDivergence == kJSD) {
        loss.soft = a.unit * (a.beta * second[0] + (1 - a.beta) * second[1]);
      } else if constexpr (kDivergence == kTVD) {
        loss.soft = (double)second[0] / 2;
      } else {
        const Decoupled<F> d(a, (F)widen(row.s[row.label]), (F)widen(row.t[row.label]), z, sum);
        const double others = teacher == 0 ? 0
                              : student == 0
                                  ? infinity<double>()
                                  : a.unit * sum[kDot] / teacher + log_of(student / teacher);
        loss.soft = a.alpha * (double)d.target() + a.beta * others;
      }
      loss.soft *= a.kd_weight * temperature * temperature * on_row;
    }
  }
  return loss;
}

template <class F>
__global__ void __launch_bounds__(512) totals_kernel(const Params<F> a) {
  Block block;
  const int64_t share = (a.rows + gridDim.x - 1) / gridDim.x, first = share * blockIdx.x;
  double sum[2] = {0, 0};
  count(a, first, first + share < a.rows ? first + share : a.rows, sum);
  block.all<Sum>(sum);
  if (sum_over_blocks(a.partials, a.ticket, sum, block) && threadIdx.x == 0) {
    static_cast<F*>(a.parts)[0] = (F)reciprocal(sum[0]);
    static_cast<F*>(a.parts)[1] = (F)reciprocal(sum[1]);
  }
}

template <class S, class T, int kDivergence, int kLayout>
__global__ void __launch_bounds__((kThreads<kLayout>), (kBlocks<S, kLayout>))
    kd_loss_kernel(const Params<typename Compute<S>::type> a) {
  using F = typename Compute<S>::type;
  constexpr bool kSoft = kDivergence != kNone;
  Block block;
  FXK_SHARED(Common, common);
  // Not in registers: the first of a row's threads alone has something to add.
  using Totals = Pair[kMostGroups];
  FXK_SHARED(Totals, totals);
  {
    double total[3] = {0, 0, 0};
    const bool to_count = a.reduction == 2 && !a.counted && (a.labels || a.row_weight);
    if (to_count) count(a, 0, a.rows, total);
    if (a.class_weight && a.label_smoothing > 0)
      for (int j = (int)threadIdx.x; j < a.classes; j += (int)blockDim.x)
        total[2] += a.class_weight[j];
    block.all<Sum>(total);
    if (threadIdx.x == 0) {
      common.all_weight = a.class_weight ? total[2] / a.classes : 1;
      common.mean = {1, 1};
      if (to_count) {
        common.mean = {reciprocal(total[0]), reciprocal(total[1])};
      } else if (a.reduction == 2 && a.counted) {
        const F* counted = static_cast<const F*>(a.parts);
        common.mean = {(double)counted[0], (double)counted[1]};
      } else if (a.reduction == 2) {
        common.mean.hard = common.mean.soft = reciprocal((double)a.rows);
      }
    }
    if (threadIdx.x < kMostGroups) totals[threadIdx.x] = {0, 0};
    __syncthreads();
  }

  using Group = typename Choose<kPerWarp<kLayout>>::type;
  Group group;
  if constexpr (kLayout == kWarpRow) group.width = a.width;
  const int number = kPerWarp<kLayout> ? (int)threadIdx.x / group.size() : 0;
  const int per_block = kPerWarp<kLayout> ? (int)blockDim.x / group.size() : 1;
  const int64_t start = (int64_t)blockIdx.x * per_block + number;
  for (int64_t i = start; i < a.rows; i += (int64_t)gridDim.x * per_block) {
    const int64_t label = a.labels ? a.labels[i] : -1;
    const Row<S, T> row(a, i, label, kSoft);
    Pair loss = {0, 0};
    if ((a.labels != nullptr && label == a.ignore_index) || (!kSoft && !a.hard)) {
      if (row.grad) row.fill((F)0, group);
    } else if (a.labels != nullptr && (label < 0 || label >= a.classes)) {
      loss.hard = loss.soft = not_a_number<double>();
      if (row.grad) row.fill(not_a_number<F>(), group);
    } else {
      loss = row_loss<kLayout != kLongRow, kChunksOf<S, kLayout>, kDivergence>(a, row, i, common,
                                                                               group);
    }
    if (group.index() != 0) continue;
    if (a.reduction == 0) {
      static_cast<F*>(a.loss)[i] = (F)(loss.hard + loss.soft);
      static_cast<F*>(a.parts)[i] = (F)loss.hard;
      static_cast<F*>(a.parts)[a.rows + i] = (F)loss.soft;
    } else {
      totals[number].hard += loss.hard;
      totals[number].soft += loss.soft;
    }
  }
  if (a.reduction == 0) return;

  __syncthreads();
  double total[2] = {0, 0};
  if (threadIdx.x < kMostGroups) {
    total[0] = totals[threadIdx.x].hard;
    total[1] = totals[threadIdx.x].soft;
  }
  block.all<Sum>(total);
  if (sum_over_blocks(a.partials, a.ticket, total, block) && threadIdx.x == 0) {
    const double hard = total[0] * common.mean.hard, soft = total[1] * common.mean.soft;
    *static_cast<F*>(a.loss) = (F)(hard + soft);
    static_cast<F*>(a.parts)[0] = (F)hard;
    static_cast<F*>(a.parts)[1] = (F)soft;
  }
}

template <class S, class T, int kDivergence, int kLayout>
void launch(Params<typename Compute<S>::type>& a, int device, cudaStream_t stream, int64_t chunks) {
  const int processors = multiprocessors(device);
  const Grid grid = grid_of<S, kLayout>(a.rows, chunks, processors);
  a.width = grid.width;
  if (a.reduction == 2 && (a.labels || a.row_weight) && grid.blocks * a.rows > FXK_TOTALS_READS) {
    const auto totals = &totals_kernel<typename Compute<S>::type>;
    const int64_t count_blocks = smaller(ceil_div(a.rows, 2048), 2 * processors);
    FXK_LAUNCH(totals, (unsigned)count_blocks, 512, 0, stream, a);
    check(cudaGetLastError(), "kd_loss");
    a.counted = true;
  }
  const auto kernel = &kd_loss_kernel<S, T, kDivergence, kLayout>;
  FXK_LAUNCH(kernel, (unsigned)grid.blocks, (unsigned)grid.threads, 0, stream, a);
  check(cudaGetLastError(), "kd_loss");
}

template <class S, class T, int kDivergence>
void run(const KDLossArgs& args, int device, cudaStream_t stream, int* ticket, double* scratch) {
  Params<typename Compute<S>::type> a = {};
  fill(a, args, kDivergence, ticket, scratch);
  by_layout<S, T>(args, [&](auto layout, int64_t chunks) {
    launch<S, T, kDivergence, decltype(layout)::value>(a, device, stream, chunks);
  });
}

}  // namespace

int64_t kd_loss_workspace(int64_t rows, int64_t classes, int divergence, int dtype, int device) {
  return divergence == kDIST ? dist_workspace(rows, classes, dtype, device) : 2 * rows;
}

int64_t kd_loss(const KDLossArgs& a, int device, void* stream, int* ticket, double* scratch) {
  if (a.classes > 1 << 30) throw std::invalid_argument("kd_loss: more than 2^30 classes");
  if (a.teacher_indices || a.teacher_form || a.models > 1)
    throw std::invalid_argument("kd_loss: the CUDA kernels take one teacher's logits");
  if (a.divergence < kForwardKL || a.divergence > kDIST)
    throw std::invalid_argument("kd_loss: unknown divergence");
  if (a.divergence == kDecoupled && a.labels == nullptr && a.rows > 0)
    throw std::invalid_argument("kd_loss: the decoupled divergence needs labels");
  if (a.divergence == kDIST && a.reduction != 2)
    throw std::invalid_argument("kd_loss: DIST is a mean over the batch");
  if (a.rows == 0 && a.reduction == 0) return kOk;
  // The JSD with all weight on one side is 0 whatever the logits.
  const bool nothing = a.divergence == kJSD && (a.beta == 0 || a.beta == 1);
  const int divergence = a.kd_weight == 0 || nothing ? kNone : a.divergence;
  const int student = a.dtype, teacher = divergence == kNone ? a.dtype : a.teacher_dtype;
  if (divergence == kDIST) {
    dist(a, device, stream, ticket, scratch);
    return kOk;
  }
  const OnDevice guard(device);
  const auto on = static_cast<cudaStream_t>(stream);
  by_dtypes(student, teacher, [&](auto types) {
    using S = typename decltype(types)::S;
    using T = typename decltype(types)::T;
    switch (divergence) {
      case kForwardKL: return run<S, T, kForwardKL>(a, device, on, ticket, scratch);
      case kReverseKL: return run<S, T, kReverseKL>(a, device, on, ticket, scratch);
      case kJSD: return run<S, T, kJSD>(a, device, on, ticket, scratch);
      case kTVD: return run<S, T, kTVD>(a, device, on, ticket, scratch);
      case kDecoupled: return run<S, T, kDecoupled>(a, device, on, ticket, scratch);
      default: return run<S, T, kNone>(a, device, on, ticket, scratch);
    }
  });
  return kOk;
}

}  // namespace cuda
}  // namespace fxk
