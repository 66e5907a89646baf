// The only file that knows Python. Each function takes addresses and sizes, picks the ISA level
// and releases the GIL; checks and allocation are the Python wrappers' business (fastxkd/ops).
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <new>
#include <stdexcept>
#include <string>
#include <vector>

#include "ops.h"

namespace py = pybind11;
using fxk::kNoMemory;

namespace {

using Address = uintptr_t;

template <class T>
T* pointer(Address a) {
  return reinterpret_cast<T*>(a);
}

enum Level : int { kBaseline = 0, kAVX2 = 1, kAVX512 = 2 };

int best_level() {
#if defined(FXK_X86)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq"))
    return kAVX512;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return kAVX2;
#endif
  return kBaseline;
}

// The implementation of `fn` for a level; other processors have the baseline alone.
#if defined(FXK_X86)
#define FXK_AT(level, fn) \
  ((level) == kAVX512 ? &fxk::avx512::fn : (level) == kAVX2 ? &fxk::avx2::fn : &fxk::baseline::fn)
#else
#define FXK_AT(level, fn) (&fxk::baseline::fn)
#endif

int64_t checked(int64_t status) {
  if (status == kNoMemory) throw std::bad_alloc();
  return status;
}

int64_t kd_loss(int level, int threads, Address student, Address teacher, Address labels,
                Address class_weight, Address row_weight, Address teacher_indices, Address grad,
                Address loss, Address parts, int64_t rows, int64_t classes, int64_t student_stride,
                int64_t teacher_classes, int64_t teacher_stride, int64_t teacher_model_stride,
                const std::vector<double>& teacher_weights, int teacher_form, double temperature,
                double ce_weight, double kd_weight, int divergence, double alpha, double beta,
                double label_smoothing, int64_t ignore_index, int reduction, int dtype,
                int teacher_dtype) {
  fxk::KDLossArgs a{};
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
  py::gil_scoped_release release;
  return checked(FXK_AT(level, kd_loss)(a, threads));
}

void kd_loss_scale(int level, int threads, Address grad, Address upstream, int64_t rows,
                   int64_t cols, bool per_row, int dtype) {
  py::gil_scoped_release release;
  checked(FXK_AT(level, kd_loss_scale)(pointer<void>(grad), pointer<void>(upstream), rows, cols,
                                       per_row, dtype, threads));
}

// sizes: n, channels, height, width, out_height, out_width; strides: (n, c, p) of activations,
// then of gradients.
void cam(int level, int threads, Address activations, Address gradients, Address out,
         const std::vector<int64_t>& sizes, const std::vector<int64_t>& strides, int method,
         bool relu, int normalize, int dtype) {
  if (sizes.size() != 6 || strides.size() != 6)
    throw std::invalid_argument("cam: expected six sizes and six strides");
  fxk::CamArgs a{};
  a.activations = pointer<void>(activations);
  a.gradients = pointer<void>(gradients);
  a.out = pointer<void>(out);
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
  a.relu = relu;
  a.normalize = normalize;
  a.dtype = dtype;
  py::gil_scoped_release release;
  checked(FXK_AT(level, cam)(a, threads));
}

void cam_backward(int level, int threads, Address activations, Address gradients, Address upstream,
                  Address grad_activations, Address grad_gradients, int64_t n, int64_t channels,
                  int64_t plane, int method, int dtype) {
  fxk::CamBackwardArgs a{};
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
  py::gil_scoped_release release;
  checked(FXK_AT(level, cam_backward)(a, threads));
}

// features, strides, dtypes, widths: one entry per matrix, of the features as they were given.
void distance_tile(int level, int threads, const std::vector<int64_t>& grams,
                   const std::vector<int64_t>& features, const std::vector<int64_t>& strides,
                   const std::vector<int64_t>& dtypes, const std::vector<int64_t>& widths,
                   Address row_norms, Address col_norms, const std::vector<double>& shifts,
                   Address products, Address row_sums, int64_t rows, int64_t cols,
                   int64_t row_offset, int64_t col_offset, int64_t row_sums_stride, bool diagonal,
                   int dtype) {
  for (size_t size : {features.size(), strides.size(), dtypes.size(), widths.size(), shifts.size()})
    if (size != grams.size())
      throw std::invalid_argument("distance_tile: expected one entry per matrix");
  fxk::DistanceTileArgs a{};
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
  a.shifts = shifts.data();
  a.products = pointer<double>(products);
  a.row_sums = pointer<double>(row_sums);
  a.row_offset = row_offset;
  a.col_offset = col_offset;
  a.row_sums_stride = row_sums_stride;
  a.diagonal = diagonal;
  a.dtype = dtype;
  py::gil_scoped_release release;
  checked(FXK_AT(level, distance_tile)(a, threads));
}

void distance_grad_tile(int level, int threads, const std::vector<int64_t>& distances,
                        const std::vector<int64_t>& outputs, Address grad_products,
                        Address grad_row_sums, int64_t rows, int64_t cols, int64_t row_offset,
                        int64_t col_offset, int64_t grad_row_sums_stride, int dtype) {
  if (outputs.size() != distances.size())
    throw std::invalid_argument("distance_grad_tile: one output address per matrix");
  fxk::DistanceGradTileArgs a{};
  a.matrices = (int64_t)distances.size();
  a.rows = rows;
  a.cols = cols;
  a.distances = distances.data();
  a.outputs = outputs.data();
  a.grad_products = pointer<double>(grad_products);
  a.grad_row_sums = pointer<double>(grad_row_sums);
  a.row_offset = row_offset;
  a.col_offset = col_offset;
  a.grad_row_sums_stride = grad_row_sums_stride;
  a.dtype = dtype;
  py::gil_scoped_release release;
  checked(FXK_AT(level, distance_grad_tile)(a, threads));
}

void pair_distances(int level, int threads, Address rows, Address out, int64_t n, int64_t width,
                    int dtype) {
  py::gil_scoped_release release;
  checked(FXK_AT(level, pair_distances)(pointer<void>(rows), n, width, dtype, pointer<double>(out),
                                        threads));
}

// sizes: n, channels, positions, then their strides.
void principal(int level, int threads, Address parts, Address projection, Address loadings,
               const std::vector<int64_t>& sizes, int dtype) {
  if (sizes.size() != 6) throw std::invalid_argument("principal: expected three sizes and strides");
  fxk::PrincipalArgs a{};
  a.parts = pointer<void>(parts);
  a.projection = pointer<double>(projection);
  a.loadings = pointer<double>(loadings);
  a.n = sizes[0];
  a.channels = sizes[1];
  a.positions = sizes[2];
  a.stride_n = sizes[3];
  a.stride_c = sizes[4];
  a.stride_p = sizes[5];
  a.dtype = dtype;
  py::gil_scoped_release release;
  checked(FXK_AT(level, principal)(a, threads));
}

// tensors: activations, thresholds, masks, labels, categories, the rows and how far down, the
// columns and how far along, intersections, areas. sizes: n, units, height, width, layers,
// out_height, out_width, given, label_count, category_count. strides: n, c, p.
int64_t concepts(int level, int threads, const std::vector<Address>& tensors,
                 const std::vector<int64_t>& sizes, const std::vector<int64_t>& strides, int dtype,
                 int mask_dtype) {
  if (tensors.size() != 11 || sizes.size() != 10 || strides.size() != 3)
    throw std::invalid_argument("concepts: expected eleven tensors, ten sizes, three strides");
  fxk::ConceptArgs a{};
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
  a.stride_n = strides[0];
  a.stride_c = strides[1];
  a.stride_p = strides[2];
  a.dtype = dtype;
  a.mask_dtype = mask_dtype;
  py::gil_scoped_release release;
  return checked(FXK_AT(level, concepts)(a, threads));
}

// tensors: masks, labels, areas. sizes: n, layers, height, width, given, label_count.
int64_t label_areas(int level, int threads, const std::vector<Address>& tensors,
                    const std::vector<int64_t>& sizes, int mask_dtype) {
  if (tensors.size() != 3 || sizes.size() != 6)
    throw std::invalid_argument("label_areas: expected three tensors and six sizes");
  fxk::LabelAreaArgs a{};
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
  py::gil_scoped_release release;
  return checked(FXK_AT(level, label_areas)(a, threads));
}

// tensors: activations, low, counts. sizes: n, units, positions, shift, bits. strides: n, c, p.
void unit_counts(int level, int threads, const std::vector<Address>& tensors,
                 const std::vector<int64_t>& sizes, const std::vector<int64_t>& strides,
                 int dtype) {
  if (tensors.size() != 3 || sizes.size() != 5 || strides.size() != 3)
    throw std::invalid_argument("unit_counts: expected three tensors, five sizes, three strides");
  fxk::UnitCountArgs a{};
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
  py::gil_scoped_release release;
  checked(FXK_AT(level, unit_counts)(a, threads));
}

// tensors: activations, low, high, keys, found. sizes: n, units, positions, room. strides: n, c, p.
void unit_values(int level, int threads, const std::vector<Address>& tensors,
                 const std::vector<int64_t>& sizes, const std::vector<int64_t>& strides,
                 int dtype) {
  if (tensors.size() != 5 || sizes.size() != 4 || strides.size() != 3)
    throw std::invalid_argument("unit_values: expected five tensors, four sizes, three strides");
  fxk::UnitValueArgs a{};
  a.activations = pointer<void>(tensors[0]);
  a.low = pointer<int64_t>(tensors[1]);
  a.high = pointer<int64_t>(tensors[2]);
  a.keys = pointer<int64_t>(tensors[3]);
  a.found = pointer<int64_t>(tensors[4]);
  a.n = sizes[0];
  a.units = sizes[1];
  a.positions = sizes[2];
  a.room = sizes[3];
  a.stride_n = strides[0];
  a.stride_c = strides[1];
  a.stride_p = strides[2];
  a.dtype = dtype;
  py::gil_scoped_release release;
  checked(FXK_AT(level, unit_values)(a, threads));
}

}  // namespace

PYBIND11_MODULE(_cpu, m, py::mod_gil_not_used()) {
  m.doc() = "CPU kernels of fastxkd: raw addresses in, raw addresses out. Private.";
  m.def("best_level", &best_level, "Index of the highest ISA level this processor runs.");
  m.attr("LEVELS") = py::make_tuple("baseline", "avx2", "avx512");
  m.def("kd_loss", &kd_loss);
  m.def("kd_loss_scale", &kd_loss_scale);
  m.def("cam", &cam);
  m.def("cam_backward", &cam_backward);
  m.def("distance_tile", &distance_tile);
  m.def("distance_grad_tile", &distance_grad_tile);
  m.def("pair_distances", &pair_distances);
  m.def("principal", &principal);
  m.def("concepts", &concepts);
  m.def("label_areas", &label_areas);
  m.def("unit_counts", &unit_counts);
  m.def("unit_values", &unit_values);
}
