#pragma once
#include "../ops.h"

namespace fxk {
namespace cuda {

// The operators of fxk::baseline, every address on `device`. Labels that there are not are passed
// over. scratch: as many doubles as concepts_workspace says for these sizes. They throw
// std::invalid_argument for what no kernel serves, std::runtime_error for a failed launch.
int64_t concepts_workspace(const ConceptArgs&);
void concepts(const ConceptArgs&, int device, void* stream, double* scratch);
void label_areas(const LabelAreaArgs&, int device, void* stream);
void unit_counts(const UnitCountArgs&, int device, void* stream);

}  // namespace cuda
}  // namespace fxk
