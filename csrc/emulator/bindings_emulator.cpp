// The CUDA kernels' source compiled for the emulator, and kernels that it must reject. For tests
// only: no installed package holds this.
#include "../cuda/bindings.h"
#include "../cuda/cam.cu"
#include "../cuda/concepts.cu"
#include "../cuda/dist.cu"
#include "../cuda/distance.cu"
#include "../cuda/kd_loss.cu"
#include "../cuda/kd_loss_scale.cu"

namespace py = pybind11;

namespace {

void divergent_shuffle(int* out) {
  int v = (int)threadIdx.x;
  if (v % 2) v = __shfl_xor_sync(~0u, v, 1);
  out[threadIdx.x] = v;
}
void two_places(int* out) {
  int v = (int)threadIdx.x;
  if (v % 2)
    v = __shfl_xor_sync(~0u, v, 1);
  else
    v = __shfl_xor_sync(~0u, v, 1);
  out[threadIdx.x] = v;
}
void outside_the_mask(int* out) {
  if (threadIdx.x < 16) out[threadIdx.x] = __shfl_sync(0xffffu, (int)threadIdx.x, 20);
}
void partial_barrier(int* out) {
  if (threadIdx.x < 32) __syncthreads();
  out[threadIdx.x] = 1;
}
void early_return(int* out) {
  if (threadIdx.x == 40) return;
  __syncthreads();
  out[threadIdx.x] = 1;
}

// Each thread reads what another warp's thread wrote; without the barrier in between, one order of
// the warps reads the poison.
template <bool kBarrier>
void exchange(int* out) {
  using Space = int[64];
  FXK_SHARED(Space, space);
  space[threadIdx.x] = (int)threadIdx.x;
  if (kBarrier) __syncthreads();
  out[threadIdx.x] = space[threadIdx.x ^ 32];
}
void dynamic(int* out) {
  FXK_DYNAMIC_SHARED(bytes);
  float* space = reinterpret_cast<float*>(bytes);
  const bool poisoned = space[threadIdx.x] != space[threadIdx.x];
  __syncthreads();
  space[threadIdx.x] = (float)threadIdx.x;
  __syncthreads();
  const unsigned votes = __ballot_sync(~0u, threadIdx.x % 2);
  __syncwarp();
  out[threadIdx.x] = poisoned && votes == 0xaaaaaaaau ? (int)space[threadIdx.x ^ 63] : -1;
}

py::list run(const std::string& name) {
  void (*kernel)(int*) = name == "divergent_shuffle"  ? divergent_shuffle
                         : name == "two_places"       ? two_places
                         : name == "outside_the_mask" ? outside_the_mask
                         : name == "partial_barrier"  ? partial_barrier
                         : name == "early_return"     ? early_return
                         : name == "exchange"         ? exchange<true>
                         : name == "missing_barrier"  ? exchange<false>
                         : name == "dynamic"          ? dynamic
                                                      : nullptr;
  if (kernel == nullptr) throw std::invalid_argument("no kernel " + name);
  std::vector<int> out(64, -2);
  int* data = out.data();
  FXK_LAUNCH(kernel, 1, 64, 64 * sizeof(float), nullptr, data);
  py::list found;
  for (int v : out) found.append(v);
  return found;
}

}  // namespace

PYBIND11_MODULE(_emulator, m) {
  m.doc() = "The CUDA kernels of fastxkd on an emulated device. For tests.";
  m.def("set_device", [](int multiprocessors, bool reversed) {
    fxk::emulator::device.multiprocessors = multiprocessors;
    fxk::emulator::device.reversed = reversed;
  });
  m.def("run", &run);
  fxk::cuda::bind_operators(m);
}
