#pragma once
#include "../ops.h"

namespace fxk {
namespace cuda {

// The operator of fxk::baseline::kd_loss for a dense teacher of logits, every address on `device`.
// ticket: one int that is 0 between launches of a stream; scratch: as many doubles as
// kd_loss_workspace says, from an address that is a multiple of 16 bytes. Returns kOk: what a label
// holds is known on the device only, a row with one outside the classes gets NaN. Throws
// std::invalid_argument for what no kernel serves, std::runtime_error for a failed launch.
int64_t kd_loss(const KDLossArgs&, int device, void* stream, int* ticket, double* scratch);
int64_t kd_loss_workspace(int64_t rows, int64_t classes, int divergence, int dtype, int device);

// grad *= upstream, row by row when per_row. Rows whose factor is one are left alone.
void kd_loss_scale(int device, void* stream, void* grad, const void* upstream, int64_t rows,
                   int64_t classes, bool per_row, int dtype);

}  // namespace cuda
}  // namespace fxk
