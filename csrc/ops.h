// The C ABI of the kernels: one struct and one function per operator. Raw pointers, sizes and
// element strides only; the caller owns every buffer for the length of the call.
#pragma once
#include <cstdint>

namespace fxk {

enum DType : int { kFloat32 = 0, kFloat64 = 1, kBFloat16 = 2, kFloat16 = 3 };

enum Divergence : int {
  kForwardKL = 0,
  kReverseKL = 1,
  kJSD = 2,
  kTVD = 3,
  kDecoupled = 4,  // alpha * KL(target, rest) + beta * KL among the rest
  kDIST = 5        // alpha * (1 - correlation of rows) + beta * (1 - correlation of columns)
};

struct KDLossArgs {
  const void* student;         // [rows, classes], classes contiguous
  const void* teacher;         // [models, rows, teacher_classes], the last contiguous
  const int64_t* labels;       // [rows] or null
  const double* class_weight;  // [classes] or null
  const double* row_weight;    // [rows] or null
  const int64_t*
      teacher_indices;  // [models, rows, teacher_classes] contiguous, or null: every class
  void* grad;           // [rows, classes] contiguous, or null: evaluation; CPU: may be `student`
  void* loss;           // [1] or [rows]; float64 for float64 logits, else float32
  void* parts;          // [2] or [2, rows]: hard, soft
  const double* teacher_weights;  // [models], sums to 1
  int64_t rows, classes, student_stride;
  int64_t models, teacher_classes, teacher_stride, teacher_model_stride;
  int teacher_form;  // 0 logits, 1 probabilities
  double temperature, ce_weight, kd_weight;
  int divergence;
  double alpha, beta, label_smoothing;
  int64_t ignore_index;
  int reduction;  // 0 none, 1 sum, 2 mean over the rows that count
  int dtype, teacher_dtype;
};

enum CamMethod : int {
  kGradCAM = 0,
  kHiResCAM = 1,
  kLayerCAM = 2,
  kGradCAMPlusPlus = 3,
  kXGradCAM = 4,
  kWeights = 5,  // `gradients` already holds one weight per channel
  kElementwise = 6
};

struct CamArgs {
  const void* activations;  // [n, channels, plane]: plane contiguous or channels contiguous
  const void* gradients;    // the same layout; [n, channels] for kWeights
  void* out;                // [n, out_height, out_width]; float64 for float64 input, else float32
  int64_t n, channels, height, width, out_height, out_width;
  int64_t activation_stride_n, activation_stride_c, activation_stride_p;
  int64_t gradient_stride_n, gradient_stride_c, gradient_stride_p;
  int method;
  int relu;
  int normalize;  // 0 none, 1 min-max before resizing, 2 before and after
  int dtype;
};

struct CamBackwardArgs {
  const void* activations;  // [n, channels, plane] contiguous
  const void* gradients;    // [n, channels, plane] contiguous; [n, channels] for kWeights
  const void* upstream;     // [n, plane] contiguous, dtype of the raw map
  void* grad_activations;   // like activations
  void* grad_gradients;     // like gradients
  int64_t n, channels, plane;
  int method, dtype;
};

struct DistanceTileArgs {
  int64_t matrices, rows, cols;
  const int64_t* grams;            // [matrices] addresses of [rows, cols]: Gram in, distance out
  const int64_t* features;         // [matrices] addresses of the whole [n, widths[k]] as given
  const int64_t* feature_strides;  // [matrices] between rows
  const int64_t* feature_dtypes;   // [matrices]
  const int64_t* widths;           // [matrices]
  const void* row_norms;           // [matrices, rows] squared norms of the centred features
  const void* col_norms;           // [matrices, cols]
  const double* shifts;            // [matrices] taken off every distance before it is summed
  double* products;                // [matrices, matrices], accumulated into; null: distances only
  double* row_sums;                // [matrices, row_sums_stride], accumulated into
  int64_t row_offset, col_offset, row_sums_stride;
  int diagonal;  // the tile lies on the diagonal: rows and columns are the same
  int dtype;     // kFloat32 or kFloat64
};

struct DistanceGradTileArgs {
  int64_t matrices, rows, cols;
  const int64_t* distances;     // [matrices] addresses of [rows, cols]
  const int64_t* outputs;       // [matrices] addresses of [rows, cols], or 0: not wanted
  const double* grad_products;  // [matrices, matrices]
  const double* grad_row_sums;  // [matrices, grad_row_sums_stride]
  int64_t row_offset, col_offset, grad_row_sums_stride;
  int dtype;
};

struct PrincipalArgs {
  const void* parts;   // [n, channels, positions]
  double* projection;  // [n, positions]: onto the component, which has no sign of its own
  double* loadings;    // [n]: the component's, added up over the channels
  int64_t n, channels, positions, stride_n, stride_c, stride_p;
  int dtype;
};

struct ConceptArgs {
  const void* activations;  // [n, units, height * width]: positions contiguous or units contiguous
  const void* thresholds;   // [units]; float64 for float64 activations, else float32
  const void* masks;        // [n, layers, out_height, out_width] contiguous: labels, 0 for none
  const int64_t* labels;    // [n, given]: image-level labels, 0 for none
  const int64_t* categories;  // [label_count]
  const int32_t* rows;        // [out_height]: the upper of the two rows that each is between
  const void* down;           // [out_height], like thresholds: how far it is from that one
  const int32_t* columns;     // [out_width]
  const void* along;          // [out_width]
  int64_t* intersections;     // [units, label_count], added to
  int64_t* areas;             // [units, category_count], added to
  int64_t n, units, height, width, layers, out_height, out_width;
  int64_t given, label_count, category_count;
  int64_t stride_n, stride_c, stride_p;
  int dtype, mask_dtype;
};

struct LabelAreaArgs {
  const void* masks;      // [n, layers, height, width] contiguous
  const int64_t* labels;  // [n, given]
  int64_t* areas;         // [label_count], added to
  int64_t n, layers, height, width, given, label_count;
  int mask_dtype;
};

struct UnitCountArgs {
  const void* activations;  // [n, units, positions]: positions contiguous or units contiguous
  const int64_t* low;       // [units]: the first key that is counted
  int64_t* counts;          // [units, 2^bits + 1], added to
  int64_t n, units, positions, shift, bits;
  int64_t stride_n, stride_c, stride_p;
  int dtype;
};

struct UnitValueArgs {
  const void* activations;  // as of UnitCountArgs
  const int64_t* low;       // [units]: the first key that is wanted
  const int64_t* high;      // [units]: the last; below `low` where none is
  int64_t* keys;            // [units, room]: those found, in no order
  int64_t* found;           // [units]: how many; added to, beyond `room` too
  int64_t n, units, positions, room;
  int64_t stride_n, stride_c, stride_p;
  int dtype;
};

enum MaskType : int { kUInt8 = 0, kInt16 = 1, kInt32 = 2 };

// What every kernel returns: kOk, kNoMemory, kBadIndex (a teacher index outside the classes), or
// the row whose label lies outside the classes; of concepts and label_areas, the image.
enum Status : int64_t { kOk = -1, kNoMemory = -2, kBadIndex = -3 };

// kd_loss_scale: grad *= upstream, row by row when per_row; returns at once where every factor is
// one. distance_tile, distance_grad_tile: one tile of the sweep over pairs, see distance.cpp.
// pair_distances: [n, n] of contiguous float32 or float64 rows [n, width].
#define FXK_DECLARE(level)                                                                         \
  namespace level {                                                                                \
  int64_t kd_loss(const KDLossArgs&, int threads);                                                 \
  int64_t kd_loss_scale(void* grad, const void* upstream, int64_t rows, int64_t cols, int per_row, \
                        int dtype, int threads);                                                   \
  int64_t cam(const CamArgs&, int threads);                                                        \
  int64_t cam_backward(const CamBackwardArgs&, int threads);                                       \
  int64_t distance_tile(const DistanceTileArgs&, int threads);                                     \
  int64_t distance_grad_tile(const DistanceGradTileArgs&, int threads);                            \
  int64_t pair_distances(const void* rows, int64_t n, int64_t width, int dtype, double* out,       \
                         int threads);                                                             \
  int64_t principal(const PrincipalArgs&, int threads);                                            \
  int64_t concepts(const ConceptArgs&, int threads);                                               \
  int64_t label_areas(const LabelAreaArgs&, int threads);                                          \
  int64_t unit_counts(const UnitCountArgs&, int threads);                                          \
  int64_t unit_values(const UnitValueArgs&, int threads);                                          \
  }
FXK_DECLARE(baseline)
FXK_DECLARE(avx2)
FXK_DECLARE(avx512)
#undef FXK_DECLARE

}  // namespace fxk
