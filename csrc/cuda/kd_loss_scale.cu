// kd_loss_scale: what the backward pass has left to do, the gradient of the forward pass times what
// comes from above.
#include "kd_loss.h"
#include "launch.cuh"

namespace fxk {
namespace cuda {
namespace {

template <class S>
__global__ void __launch_bounds__(256)
    scale_kernel(S* grad, const typename Compute<S>::type* upstream, int64_t rows, int classes,
                 bool per_row, int threads) {
  using F = typename Compute<S>::type;
  constexpr int kVec = 16 / sizeof(S);
  const int per_block = (int)blockDim.x / threads;
  const int64_t start = (int64_t)blockIdx.x * per_block + (int)threadIdx.x / threads;
  for (int64_t i = start; i < rows; i += (int64_t)gridDim.x * per_block) {
    const F factor = upstream[per_row ? i : 0];
    if (factor == 1) continue;
    S* line = grad + i * classes;
    const int skew = (int)((uintptr_t)line / sizeof(S) % kVec);
    for (int at = (int)threadIdx.x % threads * kVec - skew; at < classes; at += threads * kVec) {
      if (at >= 0 && at + kVec <= classes) {
        F v[kVec];
        load_vector<kVec>(line + at, v);
#pragma unroll
        for (int e = 0; e < kVec; ++e) v[e] *= factor;
        store_vector(v, line + at);
      } else {
        for (int e = 0; e < kVec; ++e)
          if (at + e >= 0 && at + e < classes) narrow(widen(line[at + e]) * factor, line + at + e);
      }
    }
  }
}

template <class S>
void scale(int device, cudaStream_t stream, void* grad, const void* upstream, int64_t rows,
           int64_t classes, bool per_row) {
  constexpr int kVec = 16 / sizeof(S);
  const int threads = threads_for((classes + kVec - 1) / kVec, 4, 32, 256);
  const int64_t per_block = 256 / threads;
  const int64_t blocks = smaller((rows + per_block - 1) / per_block, 8 * multiprocessors(device));
  const auto kernel = &scale_kernel<S>;
  FXK_LAUNCH(kernel, (unsigned)blocks, 256, 0, stream, static_cast<S*>(grad),
             static_cast<const typename Compute<S>::type*>(upstream), rows, (int)classes, per_row,
             threads);
  check(cudaGetLastError(), "kd_loss_scale");
}
}  // namespace

void kd_loss_scale(int device, void* stream, void* grad, const void* upstream, int64_t rows,
                   int64_t classes, bool per_row, int dtype) {
  if (rows == 0) return;
  const OnDevice guard(device);
  const auto on = static_cast<cudaStream_t>(stream);
  switch (dtype) {
    case kFloat32: return scale<float>(device, on, grad, upstream, rows, classes, per_row);
    case kFloat64: return scale<double>(device, on, grad, upstream, rows, classes, per_row);
    case kBFloat16: return scale<__nv_bfloat16>(device, on, grad, upstream, rows, classes, per_row);
    default: return scale<__half>(device, on, grad, upstream, rows, classes, per_row);
  }
}

}  // namespace cuda
}  // namespace fxk
