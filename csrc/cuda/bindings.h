// The operators of the CUDA extension as Python sees them; the emulator's extension has the same.
#pragma once
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <vector>

#include "cam.h"
#include "concepts.h"
#include "distance.h"
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

// As the C++ kernel's, but for the shifts, which are on the device, and `narrow`.
inline void bound_distance_tile(
    int device, Address stream, Address scratch, const std::vector<int64_t>& grams,
    const std::vector<int64_t>& features, const std::vector<int64_t>& strides,
    const std::vector<int64_t>& dtypes, const std::vector<int64_t>& widths, Address row_norms,
    Address col_norms, Address shifts, Address products, Address row_sums, int64_t rows,
    int64_t cols, int64_t row_offset, int64_t col_offset, int64_t row_sums_stride, bool diagonal,
    int dtype, int narrow) {
  for (size_t size : {features.size(), strides.size(), dtypes.size(), widths.size()})
    if (size != grams.size())
      throw std::invalid_argument("distance_tile: expected one entry per matrix");
  DistanceTileArgs a{};
  a.matrices = (int64_t)grams.size();
  a.rows = rows;
  a.cols = cols;
  a.grams = grams.data();
  a.features = features.data();
  a.feature_strides = strides.data();
  a.feature_dtypes = dtypes.data();
  a.widths = widths.data();
  a.row_norms = pointer<void>(row_norms);
  a.col_norms = pointer<void>(col_norms);
  a.shifts = pointer<double>(shifts);
  a.products = pointer<double>(products);
  a.row_sums = pointer<double>(row_sums);
  a.row_offset = row_offset;
  a.col_offset = col_offset;
  a.row_sums_stride = row_sums_stride;
  a.diagonal = diagonal;
  a.dtype = dtype;
  pybind11::gil_scoped_release release;
  distance_tile(a, narrow, device, pointer<void>(stream), pointer<double>(scratch));
}

inline void bound_distance_grad_tile(int device, Address stream, Address distances, Address weights,
                                     Address factors, Address on_rows, Address on_cols,
                                     int64_t matrices, int64_t k, int64_t rows, int64_t cols,
                                     int dtype) {
  pybind11::gil_scoped_release release;
  distance_grad_tile(pointer<void>(distances), pointer<void>(weights), pointer<void>(factors),
                     pointer<double>(on_rows), pointer<double>(on_cols), matrices, k, rows, cols,
                     dtype, device, pointer<void>(stream));
}

inline void bound_pair_distances(int device, Address stream, Address rows, Address out, int64_t n,
                                 int64_t width, int dtype) {
  pybind11::gil_scoped_release release;
  pair_distances(pointer<void>(rows), pointer<double>(out), n, width, dtype, device,
                 pointer<void>(stream));
}

// sizes and strides as in bindings.cpp.
inline CamArgs cam_arguments(const std::vector<int64_t>& sizes, const std::vector<int64_t>& strides,
                             int method, int dtype) {
  if (sizes.size() != 6 || strides.size() != 6)
    throw std::invalid_argument("cam: expected six sizes and six strides");
  CamArgs a{};
  a.n = sizes[0];
  a.channels = sizes[1];
  a.height = sizes[2];
  a.width = sizes[3];
  a.out_height = sizes[4];
  a.out_width = sizes[5];
  a.activation_stride_n = strides[0];
  a.activation_stride_c = strides[1];
  a.activation_stride_p = strides[2];
  a.gradient_stride_n = strides[3];
  a.gradient_stride_c = strides[4];
  a.gradient_stride_p = strides[5];
  a.method = method;
  a.dtype = dtype;
  return a;
}

inline int64_t bound_cam_workspace(const std::vector<int64_t>& sizes,
                                   const std::vector<int64_t>& strides, int method, int dtype,
                                   int device) {
  return cam_workspace(cam_arguments(sizes, strides, method, dtype), device);
}

inline void bound_cam(int device, Address stream, Address scratch, Address activations,
                      Address gradients, Address out, const std::vector<int64_t>& sizes,
                      const std::vector<int64_t>& strides, int method, bool relu, int normalize,
                      int dtype) {
  CamArgs a = cam_arguments(sizes, strides, method, dtype);
  a.activations = pointer<void>(activations);
  a.gradients = pointer<void>(gradients);
  a.out = pointer<void>(out);
  a.relu = relu;
  a.normalize = normalize;
  pybind11::gil_scoped_release release;
  cam(a, device, pointer<void>(stream), pointer<double>(scratch));
}

inline void bound_cam_backward(int device, Address stream, Address activations, Address gradients,
                               Address upstream, Address grad_activations, Address grad_gradients,
                               int64_t n, int64_t channels, int64_t plane, int method, int dtype) {
  CamBackwardArgs a{};
  a.activations = pointer<void>(activations);
  a.gradients = pointer<void>(gradients);
  a.upstream = pointer<void>(upstream);
  a.grad_activations = pointer<void>(grad_activations);
  a.grad_gradients = pointer<void>(grad_gradients);
  a.n = n;
  a.channels = channels;
  a.plane = plane;
  a.method = method;
  a.dtype = dtype;
  pybind11::gil_scoped_release release;
  cam_backward(a, device, pointer<void>(stream));
}

// Addresses, sizes and strides as in bindings.cpp.
inline ConceptArgs concept_sizes(const std::vector<int64_t>& sizes) {
  if (sizes.size() != 10) throw std::invalid_argument("concepts: expected ten sizes");
  ConceptArgs a{};
  a.n = sizes[0];
  a.units = sizes[1];
  a.height = sizes[2];
  a.width = sizes[3];
  a.layers = sizes[4];
  a.out_height = sizes[5];
  a.out_width = sizes[6];
  a.given = sizes[7];
  a.label_count = sizes[8];
  a.category_count = sizes[9];
  return a;
}

inline int64_t bound_concepts_workspace(const std::vector<int64_t>& sizes) {
  return concepts_workspace(concept_sizes(sizes));
}

inline void bound_concepts(int device, Address stream, Address scratch,
                           const std::vector<Address>& tensors, const std::vector<int64_t>& sizes,
                           const std::vector<int64_t>& strides, int dtype, int mask_dtype) {
  if (tensors.size() != 11 || strides.size() != 3)
    throw std::invalid_argument("concepts: expected eleven tensors and three strides");
  ConceptArgs a = concept_sizes(sizes);
  a.activations = pointer<void>(tensors[0]);
  a.thresholds = pointer<void>(tensors[1]);
  a.masks = pointer<void>(tensors[2]);
  a.labels = pointer<int64_t>(tensors[3]);
  a.categories = pointer<int64_t>(tensors[4]);
  a.rows = pointer<int32_t>(tensors[5]);
  a.down = pointer<void>(tensors[6]);
  a.columns = pointer<int32_t>(tensors[7]);
  a.along = pointer<void>(tensors[8]);
  a.intersections = pointer<int64_t>(tensors[9]);
  a.areas = pointer<int64_t>(tensors[10]);
  a.stride_n = strides[0];
  a.stride_c = strides[1];
  a.stride_p = strides[2];
  a.dtype = dtype;
  a.mask_dtype = mask_dtype;
  pybind11::gil_scoped_release release;
  concepts(a, device, pointer<void>(stream), pointer<double>(scratch));
}

inline void bound_label_areas(int device, Address stream, const std::vector<Address>& tensors,
                              const std::vector<int64_t>& sizes, int mask_dtype) {
  if (tensors.size() != 3 || sizes.size() != 6)
    throw std::invalid_argument("label_areas: expected three tensors and six sizes");
  LabelAreaArgs a{};
  a.masks = pointer<void>(tensors[0]);
  a.labels = pointer<int64_t>(tensors[1]);
  a.areas = pointer<int64_t>(tensors[2]);
  a.n = sizes[0];
  a.layers = sizes[1];
  a.height = sizes[2];
  a.width = sizes[3];
  a.given = sizes[4];
  a.label_count = sizes[5];
  a.mask_dtype = mask_dtype;
  pybind11::gil_scoped_release release;
  label_areas(a, device, pointer<void>(stream));
}

inline void bound_unit_counts(int device, Address stream, const std::vector<Address>& tensors,
                              const std::vector<int64_t>& sizes,
                              const std::vector<int64_t>& strides, int dtype) {
  if (tensors.size() != 3 || sizes.size() != 5 || strides.size() != 3)
    throw std::invalid_argument(
        "unit_counts: expected three tensors, five sizes and three strides");
  UnitCountArgs a{};
  a.activations = pointer<void>(tensors[0]);
  a.low = pointer<int64_t>(tensors[1]);
  a.counts = pointer<int64_t>(tensors[2]);
  a.n = sizes[0];
  a.units = sizes[1];
  a.positions = sizes[2];
  a.shift = sizes[3];
  a.bits = sizes[4];
  a.stride_n = strides[0];
  a.stride_c = strides[1];
  a.stride_p = strides[2];
  a.dtype = dtype;
  pybind11::gil_scoped_release release;
  unit_counts(a, device, pointer<void>(stream));
}

inline void bind_operators(pybind11::module_& m) {
  m.def("kd_loss", &bound_kd_loss);
  m.def("kd_loss_workspace", &kd_loss_workspace);
  m.def("kd_loss_scale", &bound_kd_loss_scale);
  m.def("cam", &bound_cam);
  m.def("cam_workspace", &bound_cam_workspace);
  m.def("cam_backward", &bound_cam_backward);
  m.def("concepts", &bound_concepts);
  m.def("concepts_workspace", &bound_concepts_workspace);
  m.def("label_areas", &bound_label_areas);
  m.def("unit_counts", &bound_unit_counts);
  m.attr("DISTANCE_NARROW") = kDistanceNarrow;
  m.def("distance_tile", &bound_distance_tile);
  m.def("distance_workspace", &distance_workspace);
  m.def("distance_grad_tile", &bound_distance_grad_tile);
  m.def("pair_distances", &bound_pair_distances);
}

}  // namespace cuda
}  // namespace fxk
