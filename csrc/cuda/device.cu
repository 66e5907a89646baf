// What the CUDA build can say about the machine it runs on.
#include <cuda_runtime.h>

#include "device.h"

namespace fxk {
namespace cuda {

DeviceCount device_count() {
  DeviceCount found{0, nullptr};
  const cudaError_t status = cudaGetDeviceCount(&found.devices);
  if (status != cudaSuccess) {
    cudaGetLastError();  // leave no sticky error behind for the caller's own CUDA code
    found.devices = 0;
    found.problem = cudaGetErrorString(status);
  }
  return found;
}

Versions versions() {
  Versions v{0, 0};
  cudaRuntimeGetVersion(&v.runtime);
  cudaDriverGetVersion(&v.driver);
  return v;
}

}  // namespace cuda
}  // namespace fxk
