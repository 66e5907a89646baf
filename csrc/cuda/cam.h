#pragma once
#include "../ops.h"

namespace fxk {
namespace cuda {

// The operators of fxk::baseline, every address on `device`; the same layouts and strides. scratch:
// as many doubles as cam_workspace says for these arguments (it asks for sizes, strides, method and
// dtype, not for addresses), from an address that is a multiple of 16 bytes. They throw
// std::invalid_argument for what no kernel serves, std::runtime_error for a failed launch.
int64_t cam_workspace(const CamArgs&, int device);
void cam(const CamArgs&, int device, void* stream, double* scratch);
void cam_backward(const CamBackwardArgs&, int device, void* stream);

}  // namespace cuda
}  // namespace fxk
