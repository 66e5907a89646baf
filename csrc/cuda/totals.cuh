// Sums over rows and over blocks: what a mean divides by, and the loss itself.
#pragma once
#include "logits.cuh"

namespace fxk {
namespace cuda {
namespace {

// The hard and the soft part of something.
struct Pair {
  double hard, soft;
};

// What a block knows before its first row.
struct Common {
  Pair mean;          // reciprocal totals
  double all_weight;  // the mean of the class weights
};

__device__ __forceinline__ double reciprocal(double total) { return total != 0 ? 1 / total : 0; }

// Sums over rows [first, last) of what a mean divides by, of this thread's share.
template <class F>
__device__ __forceinline__ void count(const Params<F>& a, int64_t first, int64_t last,
                                      double* sum) {
#pragma unroll 4
  for (int64_t i = first + (int)threadIdx.x; i < last; i += (int)blockDim.x) {
    const int64_t label = a.labels ? a.labels[i] : -1;
    const bool counts = a.labels == nullptr || label != a.ignore_index;
    const double on_row = !counts ? 0 : a.row_weight ? a.row_weight[i] : 1;
    const bool known = a.class_weight != nullptr && label >= 0 && label < a.classes;
    sum[0] += on_row * (known ? a.class_weight[label] : 1.0);
    sum[1] += on_row;
  }
}

// The last block to come here of a launch; it sees what the others wrote before, and it sets the
// ticket back.
__device__ __forceinline__ bool is_last_block(int* ticket) {
  if (gridDim.x == 1) return true;
  FXK_SHARED(bool, last);
  if (threadIdx.x == 0) {
    __threadfence();
    last = atomicAdd(ticket, 1) == (int)gridDim.x - 1;
    if (last) *ticket = 0;
  }
  __syncthreads();
  __threadfence();
  return last;
}

// The sums of every block to the scratch memory, [blocks, kCount]; true in the last block, with the
// sums over all of them in every thread of it.
template <int kCount>
__device__ __forceinline__ bool sum_over_blocks(double* scratch, int* ticket, double (&sum)[kCount],
                                                Block& block) {
  if (gridDim.x == 1) return true;
  if (threadIdx.x == 0) {
#pragma unroll
    for (int k = 0; k < kCount; ++k) scratch[kCount * (int64_t)blockIdx.x + k] = sum[k];
  }
  if (!is_last_block(ticket)) return false;
  // In an order of its own: any run of the launch gives the same bits.
  const volatile double* partials = scratch;
#pragma unroll
  for (int k = 0; k < kCount; ++k) sum[k] = 0;
  for (int64_t i = threadIdx.x; i < gridDim.x; i += blockDim.x) {
#pragma unroll
    for (int k = 0; k < kCount; ++k) sum[k] += partials[kCount * i + k];
  }
  block.all<Sum>(sum);
  return true;
}

}  // namespace
}  // namespace cuda
}  // namespace fxk
