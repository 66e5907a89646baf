// The operators of the CUDA extension as Python sees them; the emulator's extension has the same.
#pragma once
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <vector>

#include "kd_loss.h"

namespace fxk {
namespace cuda {

using Address = uintptr_t;

template <class T>
T* pointer(Address a) {
  return reinterpret_cast<T*>(a);
}

// After what belongs to the launch, the argument list of the C++ kernels (bindings.cpp).
inline int64_t bound_kd_loss(int device, Address stream, Address ticket, Address scratch,
                             Address student, Address teacher, Address labels, Address class_weight,
                             Address row_weight, Address teacher_indices, Address grad,
                             Address loss, Address parts, int64_t rows, int64_t classes,
                             int64_t student_stride, int64_t teacher_classes,
                             int64_t teacher_stride, int64_t teacher_model_stride,
                             const std::vector<double>& teacher_weights, int teacher_form,
                             double temperature, double ce_weight, double kd_weight, int divergence,
                             double alpha, double beta, double label_smoothing,
                             int64_t ignore_index, int reduction, int dtype, int teacher_dtype) {
  KDLossArgs a{};
  a.student = pointer<void>(student);
  a.teacher = pointer<void>(teacher);
  a.labels = pointer<int64_t>(labels);
  a.class_weight = pointer<double>(class_weight);
  a.row_weight = pointer<double>(row_weight);
  a.teacher_indices = pointer<int64_t>(teacher_indices);
  a.grad = pointer<void>(grad);
  a.loss = pointer<void>(loss);
  a.parts = pointer<void>(parts);
  a.rows = rows;
  a.classes = classes;
  a.student_stride = student_stride;
  a.models = teacher_weights.empty() ? 1 : (int64_t)teacher_weights.size();
  a.teacher_weights = teacher_weights.data();
  a.teacher_classes = teacher_classes;
  a.teacher_stride = teacher_stride;
  a.teacher_model_stride = teacher_model_stride;
  a.teacher_form = teacher_form;
  a.temperature = temperature;
  a.ce_weight = ce_weight;
  a.kd_weight = kd_weight;
  a.divergence = divergence;
  a.alpha = alpha;
  a.beta = beta;
  a.label_smoothing = label_smoothing;
  a.ignore_index = ignore_index;
  a.reduction = reduction;
  a.dtype = dtype;
  a.teacher_dtype = teacher_dtype;
  pybind11::gil_scoped_release release;
  return kd_loss(a, device, pointer<void>(stream), pointer<int>(ticket), pointer<double>(scratch));
}

inline void bound_kd_loss_scale(int device, Address stream, Address grad, Address upstream,
                                int64_t rows, int64_t classes, bool per_row, int dtype) {
  pybind11::gil_scoped_release release;
  kd_loss_scale(device, pointer<void>(stream), pointer<void>(grad), pointer<void>(upstream), rows,
                classes, per_row, dtype);
}

inline void bind_operators(pybind11::module_& m) {
  m.def("kd_loss", &bound_kd_loss);
  m.def("kd_loss_workspace", &kd_loss_workspace);
  m.def("kd_loss_scale", &bound_kd_loss_scale);
}

}  // namespace cuda
}  // namespace fxk
