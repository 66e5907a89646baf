// concepts: two launches. The first writes down, for every 32 pixels of a row, which labels lie
// there and as bits where. In the second a warp has one unit's map of one image; it up-samples 32
// pixels at a time, votes on the threshold, and counts the bits that its vote and a label share.
// Numbers are added up by atomics: of integers no order is better than another. Nothing is kept
// from image to image, and nothing depends on how many labels there are.
#include <float.h>

#include "concepts.h"
#include "launch.cuh"

namespace fxk {
namespace cuda {
namespace {

constexpr int kConceptThreads = 128, kConceptWarps = kConceptThreads / 32;
constexpr int kCategories = 64;  // as many bits tell which of them a warp has seen
// Of labels that are written down at one time.
#ifndef FXK_ENTRY_BYTES
#define FXK_ENTRY_BYTES (256 << 20)
#endif

// A label among 32 pixels of a row, in one layer.
struct Entry {
  int32_t label;
  uint32_t pixels;
};

// This warp's place among all of a launch, and their number.
__device__ __forceinline__ int64_t own_warp() {
  return (int64_t)blockIdx.x * kConceptWarps + threadIdx.x / 32;
}
__device__ __forceinline__ int64_t all_warps() { return (int64_t)gridDim.x * kConceptWarps; }

__device__ __forceinline__ void add_to(int64_t* total, int64_t count) {
  atomicAdd(reinterpret_cast<unsigned long long*>(total), (unsigned long long)count);
}

// Each lane whose `which` is not negative adds 1 to its count: most of them name one or two.
__device__ __forceinline__ void add_ones(int64_t* counts, int64_t which) {
  const int lane = (int)threadIdx.x % 32;
  uint32_t left = __ballot_sync(~0u, which >= 0);
  for (int turn = 0; left && turn < 2; ++turn) {
    const int first = __ffs((int)left) - 1;
    const int64_t common = __shfl_sync(~0u, which, first);
    const uint32_t same = __ballot_sync(~0u, which == common);
    if (lane == first) add_to(counts + common, __popc(same));
    left &= ~same;
  }
  if (left >> lane & 1) add_to(counts + which, 1);
}

// --- where labels lie

struct WordParams {
  const void* masks;
  Entry* entries;  // [words, capacity]
  int* counts;     // [words]
  int64_t words, label_count;
  int layers, height, width, across, capacity;
};

template <class L>
__global__ void __launch_bounds__(kConceptThreads) label_words_kernel(const WordParams a) {
  const int lane = (int)threadIdx.x % 32;
  const int64_t plane = (int64_t)a.height * a.width;
  for (int64_t word = own_warp(); word < a.words; word += all_warps()) {
    const int64_t row = word / a.across, image = row / a.height;
    const int x = 32 * (int)(word % a.across) + lane;
    const int64_t at = image * a.layers * plane + row % a.height * a.width + x;
    Entry* entries = a.entries + word * a.capacity;
    int count = 0;
    for (int m = 0; m < a.layers; ++m) {
      const int label = x < a.width ? (int)static_cast<const L*>(a.masks)[at + m * plane] : 0;
      uint32_t left = __ballot_sync(~0u, label > 0 && label < a.label_count);
      while (left) {
        const int first = __ffs((int)left) - 1;
        const uint32_t same = __ballot_sync(~0u, label == __shfl_sync(~0u, label, first));
        if (lane == first) entries[count] = {label, same};
        ++count;
        left &= ~same;
      }
    }
    if (lane == 0) a.counts[word] = count;
  }
}

// --- where units are above their thresholds

template <class F>
struct TallyParams {
  const void* activations;
  const F* thresholds;
  const int64_t* labels;
  const int64_t* categories;
  const int32_t* rows;
  const F* down;
  const int32_t* columns;
  const F* along;
  const Entry* entries;
  const int* counts;
  int64_t* intersections;
  int64_t* areas;
  int64_t pairs, units, stride_n, stride_c, stride_p;
  int64_t given, label_count, category_count, first_category;
  int height, width, out_height, out_width, across, capacity;
};

// a + share (b - a), each operation rounded by itself: contracted, as they else would be, they
// would tell another pixel from the threshold than the other kernels. Never above the larger.
__device__ __forceinline__ float on_the_way(float a, float b, float share) {
  return __fadd_rn(a, __fmul_rn(share, __fsub_rn(b, a)));
}
__device__ __forceinline__ double on_the_way(double a, double b, double share) {
  return __dadd_rn(a, __dmul_rn(share, __dsub_rn(b, a)));
}

// An infinity counts as a quarter of the largest number.
__device__ __forceinline__ float bounded(float v) {
  return fminf(fmaxf(v, -FLT_MAX / 4), FLT_MAX / 4);
}
__device__ __forceinline__ double bounded(double v) {
  return fmin(fmax(v, -DBL_MAX / 4), DBL_MAX / 4);
}

struct Either {
  static __device__ __forceinline__ uint64_t of(uint64_t a, uint64_t b) { return a | b; }
};

// The first launch for these arguments adds to the intersections; each one to kCategories areas.
template <class S>
__global__ void __launch_bounds__(kConceptThreads, 6)
    tally_kernel(const TallyParams<typename Compute<S>::type> a) {
  using F = typename Compute<S>::type;
  Warp warp;
  const int lane = warp.index();
  for (int64_t pair = own_warp(); pair < a.pairs; pair += all_warps()) {
    const int64_t image = pair / a.units, unit = pair % a.units;
    const S* map = static_cast<const S*>(a.activations) + image * a.stride_n + unit * a.stride_c;
    const F threshold = a.thresholds[unit];
    bool above = false, broken = false;
    for (int p = lane; p < a.height * a.width; p += 32) {
      const F v = (F)widen(map[p * a.stride_p]);
      above = above || v > threshold;
      broken = broken || v != v;
    }
    // The largest of a map with NaN is NaN, which is above nothing.
    if (__ballot_sync(~0u, above) == 0) continue;
    if (__ballot_sync(~0u, broken) != 0) continue;

    int64_t* found = a.intersections + unit * a.label_count;
    uint64_t seen = 0;
    const auto tally = [&](int64_t label, int64_t pixels) {
      if (a.first_category == 0) add_to(found + label, pixels);
      const int64_t category = a.categories[label] - a.first_category;
      if (category >= 0 && category < kCategories) seen |= (uint64_t)1 << category;
    };
    int covered = 0;
    for (int j = 0; j < a.across; ++j) {
      const int x = 32 * j + lane, column = x < a.out_width ? x : a.out_width - 1;
      const int left = a.columns[column], right = left + 1 < a.width ? left + 1 : left;
      const F share = a.along[column];
      const auto row_at = [&](int y) {
        const S* row = map + (int64_t)y * a.width * a.stride_p;
        return on_the_way(bounded((F)widen(row[left * a.stride_p])),
                          bounded((F)widen(row[right * a.stride_p])), share);
      };
      // The rows of the map that the output is between.
      int upper = -1;
      F top = 0, bottom = 0;
      bool reached = false;
      for (int y = 0; y < a.out_height; ++y) {
        const int next = a.rows[y];
        if (next != upper) {
          upper = next;
          top = row_at(upper);
          bottom = row_at(upper + 1 < a.height ? upper + 1 : upper);
          reached = __ballot_sync(~0u, larger(top, bottom) > threshold) != 0;
        }
        if (!reached) continue;
        const bool over = x < a.out_width && on_the_way(top, bottom, a.down[y]) > threshold;
        const uint32_t pixels = __ballot_sync(~0u, over);
        if (pixels == 0) continue;
        covered += __popc(pixels);
        const int64_t word = (image * a.out_height + y) * a.across + j;
        const Entry* entries = a.entries + word * a.capacity;
        const int count = a.counts[word];
        for (int e = lane; e < count; e += 32) {
          const Entry entry = entries[e];
          const int shared = __popc(pixels & entry.pixels);
          if (shared) tally(entry.label, shared);
        }
      }
    }
    if (covered == 0) continue;
    for (int64_t s = lane; s < a.given; s += 32) {
      const int64_t label = a.labels[image * a.given + s];
      if (label > 0 && label < a.label_count) tally(label, covered);
    }
    uint64_t all[1] = {seen};
    warp.all<Either>(all);
    const int64_t left = a.category_count - a.first_category;
    for (int k = lane; k < kCategories && k < left; k += 32)
      if (all[0] >> k & 1)
        add_to(a.areas + unit * a.category_count + a.first_category + k, covered);
  }
}

// --- counts without units, and of their values

template <class L>
__global__ void __launch_bounds__(kConceptThreads) label_areas_kernel(const LabelAreaArgs a) {
  const int64_t pixels = a.height * a.width, size = a.n * a.layers * pixels;
  const int64_t first = 32 * own_warp(), step = 32 * all_warps();
  const int lane = (int)threadIdx.x % 32;
  for (int64_t begin = first; begin < size; begin += step) {
    const int64_t at = begin + lane;
    const int64_t label = at < size ? (int64_t)static_cast<const L*>(a.masks)[at] : 0;
    add_ones(a.areas, label > 0 && label < a.label_count ? label : -1);
  }
  for (int64_t at = first + lane; at < a.n * a.given; at += step) {
    const int64_t label = a.labels[at];
    if (label > 0 && label < a.label_count) add_to(a.areas + label, pixels);
  }
}

// An integer as wide as the number, for its bits.
template <class S>
struct Ordered {
  using type = int16_t;
};
template <>
struct Ordered<float> {
  using type = int32_t;
};
template <>
struct Ordered<double> {
  using type = int64_t;
};

template <class S>
__device__ __forceinline__ int64_t ordered_key(S v) {
  using Bits = typename Ordered<S>::type;
  constexpr Bits kMagnitude = (Bits)(~(uint64_t)0 >> (65 - 8 * sizeof(Bits)));
  const Bits bits = bits_as<Bits>(v);
  return bits < 0 ? bits ^ kMagnitude : bits;
}

template <class S>
__global__ void __launch_bounds__(kConceptThreads) unit_counts_kernel(const UnitCountArgs a) {
  const int lane = (int)threadIdx.x % 32;
  const int64_t steps = (int64_t)1 << a.bits;
  for (int64_t pair = own_warp(); pair < a.n * a.units; pair += all_warps()) {
    const int64_t image = pair / a.units, unit = pair % a.units;
    const S* map = static_cast<const S*>(a.activations) + image * a.stride_n + unit * a.stride_c;
    const int64_t low = a.low[unit];
    for (int64_t begin = 0; begin < a.positions; begin += 32) {
      int64_t which = -1;
      if (begin + lane < a.positions) {
        const S v = map[(begin + lane) * a.stride_p];
        const int64_t key = ordered_key(v);
        // Of keys of 64 bits the difference may need the bit of the sign.
        const uint64_t step = ((uint64_t)key - (uint64_t)low) >> a.shift;
        if (widen(v) != widen(v))
          which = steps;
        else if (key >= low && step < (uint64_t)steps)
          which = (int64_t)step;
      }
      add_ones(a.counts + unit * (steps + 1), which);
    }
  }
}

// --- launches

// Warps take turns at `items`.
unsigned concept_grid(int64_t items, int device) {
  const int64_t blocks = smaller(ceil_div(items, kConceptWarps), 16 * multiprocessors(device));
  return (unsigned)(blocks < 1 ? 1 : blocks);
}

// Of 32 pixels of a row, how many there are in an image, and the most labels that one has.
int64_t words_of(const ConceptArgs& a) { return a.out_height * ceil_div(a.out_width, 32); }
int64_t capacity_of(const ConceptArgs& a) { return a.layers * smaller(a.out_width, 32); }
int64_t image_bytes(const ConceptArgs& a) {
  return words_of(a) * (capacity_of(a) * (int64_t)sizeof(Entry) + (int64_t)sizeof(int));
}
// Images whose labels are written down at one time.
int64_t images_of(const ConceptArgs& a) {
  const int64_t most = FXK_ENTRY_BYTES / image_bytes(a);
  return smaller(a.n, most < 1 ? 1 : most);
}

template <class L>
void launch_words(const WordParams& a, int device, cudaStream_t stream) {
  const auto kernel = &label_words_kernel<L>;
  FXK_LAUNCH(kernel, concept_grid(a.words, device), kConceptThreads, 0, stream, a);
  check(cudaGetLastError(), "concepts");
}

template <class S>
void run_concepts(const ConceptArgs& args, int device, cudaStream_t stream, double* scratch) {
  using F = typename Compute<S>::type;
  const int64_t chunk = images_of(args), capacity = capacity_of(args), words = words_of(args);
  WordParams w = {};
  w.entries = reinterpret_cast<Entry*>(scratch);
  w.counts = reinterpret_cast<int*>(w.entries + chunk * words * capacity);
  w.label_count = args.label_count;
  w.layers = (int)args.layers;
  w.height = (int)args.out_height;
  w.width = (int)args.out_width;
  w.across = (int)ceil_div(args.out_width, 32);
  w.capacity = (int)capacity;
  TallyParams<F> t = {};
  t.thresholds = static_cast<const F*>(args.thresholds);
  t.categories = args.categories;
  t.rows = args.rows;
  t.down = static_cast<const F*>(args.down);
  t.columns = args.columns;
  t.along = static_cast<const F*>(args.along);
  t.entries = w.entries;
  t.counts = w.counts;
  t.intersections = args.intersections;
  t.areas = args.areas;
  t.units = args.units;
  t.stride_n = args.stride_n;
  t.stride_c = args.stride_c;
  t.stride_p = args.stride_p;
  t.given = args.given;
  t.label_count = args.label_count;
  t.category_count = args.category_count;
  t.height = (int)args.height;
  t.width = (int)args.width;
  t.out_height = w.height;
  t.out_width = w.width;
  t.across = w.across;
  t.capacity = w.capacity;
  const int64_t mask_bytes =
      args.layers * args.out_height * args.out_width * ((int64_t)1 << args.mask_dtype);
  for (int64_t first = 0; first < args.n; first += chunk) {
    const int64_t images = smaller(chunk, args.n - first);
    w.masks = static_cast<const char*>(args.masks) + first * mask_bytes;
    w.words = images * words;
    switch (args.mask_dtype) {
      case kUInt8: launch_words<uint8_t>(w, device, stream); break;
      case kInt16: launch_words<int16_t>(w, device, stream); break;
      default: launch_words<int32_t>(w, device, stream);
    }
    t.activations = static_cast<const S*>(args.activations) + first * args.stride_n;
    t.labels = args.labels + first * args.given;
    t.pairs = images * args.units;
    for (t.first_category = 0; t.first_category < args.category_count;
         t.first_category += kCategories) {
      const auto kernel = &tally_kernel<S>;
      FXK_LAUNCH(kernel, concept_grid(t.pairs, device), kConceptThreads, 0, stream, t);
      check(cudaGetLastError(), "concepts");
    }
  }
}

template <class L>
void run_label_areas(const LabelAreaArgs& a, int device, cudaStream_t stream) {
  const int64_t size = a.n * a.layers * a.height * a.width, given = a.n * a.given;
  const auto kernel = &label_areas_kernel<L>;
  FXK_LAUNCH(kernel, concept_grid(ceil_div(size > given ? size : given, 32), device),
             kConceptThreads, 0, stream, a);
  check(cudaGetLastError(), "label_areas");
}

template <class S>
void run_unit_counts(const UnitCountArgs& a, int device, cudaStream_t stream) {
  const auto kernel = &unit_counts_kernel<S>;
  FXK_LAUNCH(kernel, concept_grid(a.n * a.units, device), kConceptThreads, 0, stream, a);
  check(cudaGetLastError(), "unit_counts");
}

void check_types(const char* what, int dtype, int mask_dtype, int64_t label_count) {
  const std::string name(what);
  if (dtype < kFloat32 || dtype > kFloat16) throw std::invalid_argument(name + ": unknown dtype");
  if (mask_dtype < kUInt8 || mask_dtype > kInt32)
    throw std::invalid_argument(name + ": unknown dtype of masks");
  if (label_count > INT32_MAX) throw std::invalid_argument(name + ": more than 2^31 - 1 labels");
}

void check_concepts(const ConceptArgs& a) {
  check_types("concepts", a.dtype, a.mask_dtype, a.label_count);
  // As far as a share of the way is told from the whole of it.
  if (a.out_height > 1 << 20 || a.out_width > 1 << 20)
    throw std::invalid_argument("concepts: masks of more than 2^20 rows or columns");
  if (a.height * a.width > INT32_MAX || a.layers > 1 << 20)
    throw std::invalid_argument("concepts: more than 2^31 - 1 positions or 2^20 layers");
}

}  // namespace

int64_t concepts_workspace(const ConceptArgs& a) {
  check_concepts(a);
  return ceil_div(images_of(a) * image_bytes(a), (int64_t)sizeof(double));
}

void concepts(const ConceptArgs& a, int device, void* stream, double* scratch) {
  check_concepts(a);
  if (a.n == 0 || a.units == 0) return;
  const OnDevice guard(device);
  const auto on = static_cast<cudaStream_t>(stream);
  switch (a.dtype) {
    case kFloat32: return run_concepts<float>(a, device, on, scratch);
    case kFloat64: return run_concepts<double>(a, device, on, scratch);
    case kBFloat16: return run_concepts<__nv_bfloat16>(a, device, on, scratch);
    default: return run_concepts<__half>(a, device, on, scratch);
  }
}

void label_areas(const LabelAreaArgs& a, int device, void* stream) {
  check_types("label_areas", kFloat32, a.mask_dtype, a.label_count);
  if (a.n == 0) return;
  const OnDevice guard(device);
  const auto on = static_cast<cudaStream_t>(stream);
  switch (a.mask_dtype) {
    case kUInt8: return run_label_areas<uint8_t>(a, device, on);
    case kInt16: return run_label_areas<int16_t>(a, device, on);
    default: return run_label_areas<int32_t>(a, device, on);
  }
}

void unit_counts(const UnitCountArgs& a, int device, void* stream) {
  check_types("unit_counts", a.dtype, kUInt8, 0);
  if (a.shift < 0 || a.shift > 63 || a.bits < 0 || a.bits > 24)
    throw std::invalid_argument("unit_counts: a shift of at most 63 and at most 24 bits");
  if (a.n == 0 || a.units == 0) return;
  const OnDevice guard(device);
  const auto on = static_cast<cudaStream_t>(stream);
  switch (a.dtype) {
    case kFloat32: return run_unit_counts<float>(a, device, on);
    case kFloat64: return run_unit_counts<double>(a, device, on);
    case kBFloat16: return run_unit_counts<__nv_bfloat16>(a, device, on);
    default: return run_unit_counts<__half>(a, device, on);
  }
}

}  // namespace cuda
}  // namespace fxk
