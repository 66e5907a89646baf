#pragma once
#include "kd_loss.h"

namespace fxk {
namespace cuda {

// kd_loss with the divergence kDIST and a soft part; the same arguments, the same errors.
void dist(const KDLossArgs&, int device, void* stream, int* ticket, double* scratch);
int64_t dist_workspace(int64_t rows, int64_t classes, int dtype, int device);

}  // namespace cuda
}  // namespace fxk
