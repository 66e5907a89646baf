// How work is cut up for the device: the layouts of a row, the launches they make, and the choice
// of a kernel by dtype and length.
#pragma once
#include <type_traits>

#include "logits.cuh"

namespace fxk {
namespace cuda {
namespace {

// Rows in registers, one per warp or one per block, and rows that are read in a loop.
enum Layout : int { kWarpRow, kWideWarpRow, kBlockRow, kLongRow };
template <int kLayout>
constexpr bool kPerWarp = kLayout == kWarpRow || kLayout == kWideWarpRow;
// What the registers give: chunks of each matrix that a thread holds at a time, threads of a block
// and blocks of a multiprocessor.
template <class S, int kLayout>
constexpr int kChunksOf = kLayout == kWarpRow       ? 8 * (int)sizeof(S) / 16
                          : kLayout == kWideWarpRow ? 32 * (int)sizeof(S) / 16
                          : kLayout == kBlockRow    ? 16 * (int)sizeof(S) / 16
                          : sizeof(S) == 8          ? 1
                                                    : 2;
template <int kLayout>
constexpr int kThreads = kPerWarp<kLayout> ? 128 : 384;
template <class S, int kLayout>
constexpr int kBlocks = sizeof(S) == 8            ? 1
                        : kLayout == kWarpRow     ? 5
                        : kLayout == kWideWarpRow ? 3
                                                  : 2;
constexpr int kLeastWidth = 4, kMostGroups = 32;  // threads of a row, rows of a block at a time

inline int multiprocessors(int device) {
  int count = 0;
  check(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device),
        "cudaDeviceGetAttribute");
  return count;
}

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The number of threads, a power of two between two bounds, of which each takes `each` of `items`.
inline int threads_for(int64_t items, int64_t each, int least, int most) {
  int threads = least;
  while (threads < most && threads * each < items) threads *= 2;
  return threads;
}

struct Grid {
  int64_t blocks;
  int threads;
  int width;  // threads of a row, where a warp has several rows
};

// As many groups as rows, or as many as the device holds at a time.
template <class S, int kLayout>
Grid grid_of(int64_t rows, int64_t chunks, int processors) {
  constexpr int kMost = kThreads<kLayout>;
  Grid grid = {1, 32, 32};
  if (kPerWarp<kLayout>) {
    if (kLayout == kWarpRow)
      grid.width = threads_for(chunks, kChunksOf<S, kLayout>, kLeastWidth, 32);
    const int64_t warps = ceil_div(rows * grid.width, 32);
    // Few rows are spread over all processors.
    grid.threads = 32 * (int)smaller(warps / processors + 1, kMost / 32);
  } else {
    constexpr int64_t kWarpful = 32 * kChunksOf<S, kLayout>;
    grid.threads = 32 * (int)smaller(ceil_div(chunks, kWarpful), kMost / 32);
  }
  const int64_t per_block = kPerWarp<kLayout> ? grid.threads / grid.width : 1;
  const int64_t resident = (int64_t)processors * (kBlocks<S, kLayout> * kMost / grid.threads);
  grid.blocks = smaller(ceil_div(rows, per_block), resident);
  if (grid.blocks < 1) grid.blocks = 1;  // an empty sum has to be written, too
  return grid;
}

// Whether chunks of 16 bytes begin at the same column in every row.
template <class S>
bool aligned(const void* first, int64_t rows, int64_t stride) {
  return (uintptr_t)first % 16 == 0 && (rows == 1 || stride % (16 / (int64_t)sizeof(S)) == 0);
}

// call(layout, chunks), the layout as a type, with the layout that rows of this length have.
template <class S, class T, class Call>
void by_layout(const KDLossArgs& a, Call call) {
  constexpr int kVec = 16 / sizeof(S);
  const int64_t skew = aligned<S>(a.student, a.rows, a.student_stride) ? 0 : kVec - 1;
  const int64_t chunks = (a.classes + skew + kVec - 1) / kVec;
  // Rare combinations have the kernel that takes a row of any length and no other.
  if constexpr (sizeof(S) == sizeof(T) && sizeof(S) < 8) {
    if (chunks <= 32 * kChunksOf<S, kWarpRow>)
      return call(std::integral_constant<int, kWarpRow>(), chunks);
    if (chunks <= 32 * kChunksOf<S, kWideWarpRow>)
      return call(std::integral_constant<int, kWideWarpRow>(), chunks);
    if (chunks <= kThreads<kBlockRow> * kChunksOf<S, kBlockRow>)
      return call(std::integral_constant<int, kBlockRow>(), chunks);
  }
  call(std::integral_constant<int, kLongRow>(), chunks);
}

template <class S_, class T_>
struct Types {
  using S = S_;
  using T = T_;
};

// call(types) with the storage types of student and teacher.
template <class Call>
void by_dtypes(int student, int teacher, Call call) {
  if (student == kFloat32 && teacher == kFloat32)
    call(Types<float, float>());
  else if (student == kFloat64 && teacher == kFloat64)
    call(Types<double, double>());
  else if (student == kBFloat16 && teacher == kBFloat16)
    call(Types<__nv_bfloat16, __nv_bfloat16>());
  else if (student == kBFloat16 && teacher == kFloat32)
    call(Types<__nv_bfloat16, float>());
  else if (student == kFloat16 && teacher == kFloat16)
    call(Types<__half, __half>());
  else if (student == kFloat16 && teacher == kFloat32)
    call(Types<__half, float>());
  else
    throw std::invalid_argument("kd_loss: no CUDA kernel for these dtypes of student and teacher");
}

template <class F>
void fill(Params<F>& a, const KDLossArgs& args, int divergence, int* ticket, double* scratch) {
  a.student = args.student;
  a.teacher = args.teacher;
  a.labels = args.labels;
  a.class_weight = args.class_weight;
  a.row_weight = args.row_weight;
  a.grad = args.grad;
  a.loss = args.loss;
  a.parts = args.parts;
  a.partials = scratch;
  a.ticket = ticket;
  a.rows = args.rows;
  a.student_stride = args.student_stride;
  a.teacher_stride = args.teacher_stride;
  a.ignore_index = args.ignore_index;
  a.temperature = args.temperature;
  a.ce_weight = args.ce_weight;
  a.kd_weight = args.kd_weight;
  a.alpha = args.alpha;
  a.beta = args.beta;
  a.label_smoothing = args.label_smoothing;
  a.classes = (int)args.classes;
  a.reduction = args.reduction;
  a.hard = args.labels != nullptr && args.ce_weight != 0;
  // Without a soft part the row is worked on at T = 1.
  const double t = divergence == kNone ? 1 : args.temperature;
  a.factor = (F)(kLog2E / t);
  a.hard_factor = (F)kLog2E;
  a.logit_unit = 1 / (double)a.factor;
  a.hard_logit_unit = 1 / (double)a.hard_factor;
  a.unit = a.logit_unit / t;
  a.spread = args.label_smoothing / (double)args.classes;
  for (int k = 0; k < 4; ++k) a.power[k] = a.hard && t == k + 1 ? (F)1 : (F)0;
  a.apart = a.hard && t != 1 && t != 2 && t != 3 && t != 4;
}

}  // namespace
}  // namespace cuda
}  // namespace fxk
