// cam: up to three launches. The channel weights, where a method has any, are sums over a channel's
// plane; the map is a sum over channels, cut into parts for parallelism; one block per image adds
// the parts up and does the rest: ReLU, min-max, bilinear resizing, min-max. Formulas: cpu/cam.cpp.
//
// Each of the two sums runs along the contiguous axis of memory in one of the two layouts and
// across it in the other. Along it, a warp or a block takes a line. Across it, a thread takes the
// 16 bytes at one place of every line. Planes of 7 x 7 do not divide into 16 bytes, but four of
// them do: the sum over channels then goes in steps of `fold` channels, and `fold` sums are left of
// each place.
#include "cam.h"
#include "launch.cuh"

namespace fxk {
namespace cuda {
namespace {

constexpr double kPlusPlusEps = 1e-6, kXGradEps = 1e-7, kMinMaxEps = 1e-7;

// The arguments as the kernels read them. A line is what lies contiguous in memory: a channel's
// plane, or a position's channels.
template <class F>
struct CamParams {
  const void* activations;
  const void* gradients;
  F* weights;   // [n, channels]
  F* partials;  // [n, parts, plane]: the map in so many parts
  F* map;       // [n, plane]
  F* out;
  int64_t n, activation_n, activation_line, gradient_n, gradient_line;
  int channels, plane;
  int width;  // threads of a line, where a warp has several
  // Of the sum over channels across lines: `splits` runs of `per_split` steps of `fold` channels,
  // and the 16-byte places of a step in segments of a block.
  int64_t steps;
  int fold, places, segments, splits, per_split, parts;
  int height, in_width, out_height, out_width;
  bool relu;
  int normalize;
};

template <class F>
__device__ __forceinline__ F cam_positive(F x) {
  return x < 0 ? (F)0 : x;  // NaN passes
}

// What one gradient adds to its channel's weight in Grad-CAM++, given its channel's sum.
template <class F>
__device__ __forceinline__ F plus_plus(F g, F total) {
  const F square = g * g;
  const F term = square * g / (2 * square + total * square * g + (F)kPlusPlusEps);
  return g <= 0 ? (F)0 : term;  // NaN is not
}

// What a sum adds up.
enum CamTerm : int { kActivation, kGradient, kProduct, kPlusPlus, kWeighted, kClipped, kRectified };
template <int kTerm>
constexpr bool kReadsGradients = kTerm != kActivation && kTerm != kWeighted;
template <int kTerm>
constexpr bool kReadsActivations = kTerm != kGradient && kTerm != kPlusPlus;

// `given`: the channel's sum or weight.
template <int kTerm, class F>
__device__ __forceinline__ F cam_term(F act, F grad, F given) {
  if constexpr (kTerm == kActivation) return act;
  if constexpr (kTerm == kGradient) return grad;
  if constexpr (kTerm == kProduct) return grad * act;
  if constexpr (kTerm == kPlusPlus) return plus_plus(grad, given);
  if constexpr (kTerm == kWeighted) return given * act;
  if constexpr (kTerm == kClipped) return cam_positive(grad) * act;
  if constexpr (kTerm == kRectified) return cam_positive(grad * act);
}

// Elements of a line in chunks whose 16 bytes are aligned in the activations: the first chunk
// begins `skew` elements before the line.
template <class S>
__device__ __forceinline__ int skew_of(const S* line) {
  return (int)((uintptr_t)line / sizeof(S) % (16 / sizeof(S)));
}
__device__ __forceinline__ bool on_16_bytes(const void* p) { return (uintptr_t)p % 16 == 0; }

// kVec elements from `at` on, 0 outside the line.
template <int kVec, class S, class F>
__device__ __forceinline__ void load_chunk(const S* line, int at, int n, F* out) {
  const bool whole = at >= 0 && at + kVec <= n;
  if (whole && on_16_bytes(line + at)) {
    load_vector<kVec>(line + at, out);
  } else {
#pragma unroll
    for (int e = 0; e < kVec; ++e)
      out[e] = (unsigned)(at + e) < (unsigned)n ? (F)widen(line[at + e]) : (F)0;
  }
}
template <int kVec, class S, class F>
__device__ __forceinline__ void store_chunk(const F* v, S* line, int at, int n) {
  const bool whole = at >= 0 && at + kVec <= n;
  if (whole && on_16_bytes(line + at)) {
    store_vector(v, line + at);
  } else {
#pragma unroll
    for (int e = 0; e < kVec; ++e)
      if ((unsigned)(at + e) < (unsigned)n) narrow(v[e], line + at + e);
  }
}

// A place where 16 bytes are known to be aligned, or a single element.
template <int kVec, class S, class F>
__device__ __forceinline__ void load_place(const S* p, F* out) {
  if constexpr (kVec == 1)
    out[0] = widen(*p);
  else
    load_vector<kVec>(p, out);
}

// use(x, y) with this thread's chunks of a line that two tensors have, or of one of them: several
// chunks are on their way at a time, but for those at the ends and where the two are not aligned
// alike.
template <bool kFirst, bool kSecond, class F, class A, class B, class Group, class Use>
__device__ __forceinline__ void over_line(const A* a, const B* b, int n, const Group& group,
                                          Use use) {
  constexpr int kVec = 16 / (int)(kFirst ? sizeof(A) : sizeof(B)), kBatch = kVec == 8 ? 2 : 4;
  const int skew = kFirst ? skew_of(a) : skew_of(b), step = group.size() * kVec;
  const bool alike = !kFirst || !kSecond || on_16_bytes(b - skew);
  int at = group.index() * kVec - skew;
  const auto one = [&] {
    F x[kVec] = {}, y[kVec] = {};
    if constexpr (kFirst) load_chunk<kVec>(a, at, n, x);
    if constexpr (kSecond) load_chunk<kVec>(b, at, n, y);
    use(x, y);
    at += step;
  };
  if (at < 0) one();
  while (alike && at + (kBatch - 1) * step + kVec <= n) {
    F x[kBatch][kVec] = {}, y[kBatch][kVec] = {};
#pragma unroll
    for (int k = 0; k < kBatch; ++k) {
      if constexpr (kFirst) load_vector<kVec>(a + at + k * step, x[k]);
      if constexpr (kSecond) load_vector<kVec>(b + at + k * step, y[k]);
    }
#pragma unroll
    for (int k = 0; k < kBatch; ++k) use(x[k], y[k]);
    at += kBatch * step;
  }
  while (at < n) one();
}

// This thread's share of the sum over a line, and of that of the activations.
template <int kTerm, class S, class F, class Group>
__device__ __forceinline__ F sum_of_line(const S* a, const S* g, int n, F given, const Group& group,
                                         F* activations = nullptr) {
  constexpr int kVec = 16 / (int)sizeof(S);
  F sum = 0;
  over_line<kReadsActivations<kTerm>, kReadsGradients<kTerm>, F>(
      a, g, n, group, [&](const F* x, const F* y) {
        F part = 0, plain = 0;
#pragma unroll
        for (int e = 0; e < kVec; ++e) {
          part += cam_term<kTerm>(x[e], y[e], given);
          plain += x[e];
        }
        sum += part;
        if (activations != nullptr) *activations += plain;
      });
  return sum;
}

template <int kMethod, class F>
__device__ __forceinline__ F weight_of(double total, double sum, int plane) {
  if (kMethod == kGradCAM) return (F)(sum / plane);
  if (kMethod == kXGradCAM) return (F)(sum / (total + kXGradEps));
  return (F)sum;
}
template <int kMethod>
constexpr int kWeightTerm = kMethod == kGradCAM    ? kGradient
                            : kMethod == kXGradCAM ? kProduct
                                                   : kPlusPlus;

// Weights of channels that are lines.
template <class S, int kMethod, bool kPerWarp>
__global__ void __launch_bounds__(256, 4)
    line_weights_kernel(const CamParams<typename Compute<S>::type> a) {
  using F = typename Compute<S>::type;
  typename Choose<kPerWarp>::type group;
  if constexpr (kPerWarp) group.width = a.width;
  const int number = kPerWarp ? (int)threadIdx.x / group.size() : 0;
  const int per_block = kPerWarp ? (int)blockDim.x / group.size() : 1;
  const int64_t lines = a.n * a.channels, stride = (int64_t)gridDim.x * per_block;
  for (int64_t i = (int64_t)blockIdx.x * per_block + number; i < lines; i += stride) {
    const int64_t image = i / a.channels, c = i % a.channels;
    const S* act =
        static_cast<const S*>(a.activations) + image * a.activation_n + c * a.activation_line;
    const S* grad = static_cast<const S*>(a.gradients) + image * a.gradient_n + c * a.gradient_line;
    // Of the activations, and of what the weight is made of.
    F sum[2] = {0, 0};
    double total[2] = {0, 0};
    if (kMethod == kGradCAMPlusPlus) {
      double first[1] = {(double)sum_of_line<kActivation>(act, grad, a.plane, (F)0, group)};
      group.template all<Sum>(first);
      sum[0] = (F)first[0];
    }
    const F given = sum[0];
    sum[1] = sum_of_line<kWeightTerm<kMethod>>(act, grad, a.plane, given, group,
                                               kMethod == kXGradCAM ? &sum[0] : nullptr);
    total[0] = (double)sum[0];
    total[1] = (double)sum[1];
    group.template all<Sum>(total);
    if (group.index() == 0) a.weights[i] = weight_of<kMethod, F>(total[0], total[1], a.plane);
  }
}

// Threads of a block across lines: so many places beside each other, and lines.
constexpr int kAcross = 8, kDown = 32;

// The threads of a block that have the same place add up what they have of its kVec elements; each
// of the first kAcross * kVec threads gets the total of one of them.
template <int kVec, class F>
__device__ __forceinline__ double add_down(const F* sum) {
  using Space = double[kAcross * kDown / 32][kAcross * kVec];
  FXK_SHARED(Space, space);
  const int place = (int)threadIdx.x % kAcross, warp = (int)threadIdx.x / 32;
  __syncthreads();  // the sums before these have been read
#pragma unroll
  for (int e = 0; e < kVec; ++e) {
    double v = (double)sum[e];
#pragma unroll
    for (int step = kAcross; step < 32; step *= 2) v += __shfl_xor_sync(~0u, v, step);
    if (threadIdx.x % 32 < kAcross) space[warp][place * kVec + e] = v;
  }
  __syncthreads();
  double total = 0;
  if ((int)threadIdx.x < kAcross * kVec)
    for (int w = 0; w < kAcross * kDown / 32; ++w) total += space[w][threadIdx.x];
  return total;
}

// This thread's share of the sums down kVec channels, and of those of the activations.
template <int kTerm, int kVec, class S, class F>
__device__ __forceinline__ void sum_down(const CamParams<F>& a, const S* act, const S* grad,
                                         int rows, const F* given, F* sum,
                                         F* activations = nullptr) {
  const int row = (int)threadIdx.x / kAcross;
  act += row * a.activation_line;
  grad += row * a.gradient_line;
#pragma unroll(kVec == 8 ? 2 : 4)
  for (int p = row; p < rows; p += kDown) {
    F x[kVec] = {}, y[kVec] = {};
    if (kReadsActivations<kTerm>) load_place<kVec>(act, x);
    if (kReadsGradients<kTerm>) load_place<kVec>(grad, y);
#pragma unroll
    for (int e = 0; e < kVec; ++e) {
      sum[e] += cam_term<kTerm>(x[e], y[e], given[e]);
      if (activations != nullptr) activations[e] += x[e];
    }
    act += kDown * a.activation_line;
    grad += kDown * a.gradient_line;
  }
}

// Weights of channels that lie across the lines.
template <class S, int kMethod, bool kVector>
__global__ void __launch_bounds__(kAcross* kDown, 2)
    across_weights_kernel(const CamParams<typename Compute<S>::type> a) {
  using F = typename Compute<S>::type;
  constexpr int kVec = kVector ? 16 / (int)sizeof(S) : 1;
  const int64_t tiles = (a.channels + kAcross * kVec - 1) / (kAcross * kVec);
  const int64_t image = blockIdx.x / tiles;
  const int first = ((int)(blockIdx.x % tiles) * kAcross + (int)threadIdx.x % kAcross) * kVec;
  const bool inside = first < a.channels;
  const int at = inside ? first : 0;
  const S* act = static_cast<const S*>(a.activations) + image * a.activation_n + at;
  const S* grad = static_cast<const S*>(a.gradients) + image * a.gradient_n + at;
  const int rows = inside ? a.plane : 0;
  F given[kVec] = {}, plain[kVec] = {}, sum[kVec] = {};
  double total = 0;
  if constexpr (kMethod == kGradCAMPlusPlus) {
    sum_down<kActivation, kVec>(a, act, grad, rows, given, plain);
    total = add_down<kVec>(plain);
    using Totals = F[kAcross * kVec];
    FXK_SHARED(Totals, totals);
    if ((int)threadIdx.x < kAcross * kVec) totals[threadIdx.x] = (F)total;
    __syncthreads();
#pragma unroll
    for (int e = 0; e < kVec; ++e) given[e] = totals[(int)threadIdx.x % kAcross * kVec + e];
  }
  sum_down<kWeightTerm<kMethod>, kVec>(a, act, grad, rows, given, sum,
                                       kMethod == kXGradCAM ? plain : nullptr);
  if (kMethod == kXGradCAM) total = add_down<kVec>(plain);
  const double of_terms = add_down<kVec>(sum);
  const int channel = (int)(blockIdx.x % tiles) * kAcross * kVec + (int)threadIdx.x;
  if ((int)threadIdx.x < kAcross * kVec && channel < a.channels)
    a.weights[image * a.channels + channel] = weight_of<kMethod, F>(total, of_terms, a.plane);
}

// The map where positions are lines; `weights` [n, channels] of kWeighted are given ones, in the
// activations' dtype, or our own.
template <class S, class W, int kTerm>
__global__ void __launch_bounds__(256, 4)
    line_map_kernel(const CamParams<typename Compute<S>::type> a, const W* weights) {
  using F = typename Compute<S>::type;
  constexpr int kVec = 16 / sizeof(S);
  Warp group;
  group.width = a.width;
  const int per_block = (int)blockDim.x / group.size();
  const int64_t lines = a.n * a.plane, stride = (int64_t)gridDim.x * per_block;
  int64_t i = (int64_t)blockIdx.x * per_block + (int)threadIdx.x / group.size();
  for (; i < lines; i += stride) {
    const int64_t image = i / a.plane, p = i % a.plane;
    const S* act =
        static_cast<const S*>(a.activations) + image * a.activation_n + p * a.activation_line;
    F sum = 0;
    if constexpr (kTerm == kWeighted) {
      const W* weight = weights + image * a.channels;
      over_line<true, true, F>(act, weight, a.channels, group, [&](const F* x, const F* w) {
        F part = 0;
#pragma unroll
        for (int e = 0; e < kVec; ++e) part = fused(w[e], x[e], part);
        sum += part;
      });
    } else {
      const S* grad =
          static_cast<const S*>(a.gradients) + image * a.gradient_n + p * a.gradient_line;
      sum = sum_of_line<kTerm>(act, grad, a.channels, (F)0, group);
    }
    double total[1] = {(double)sum};
    group.template all<Sum>(total);
    if (group.index() == 0) a.partials[i] = (F)total[0];
  }
}

// How a place is read: element by element, 16 bytes of one channel, 16 bytes of several.
enum Access : int { kElements, kVectors, kFolded };

// The map where channels are lines: a part of it.
template <class S, class W, int kTerm, int kAccess>
__global__ void __launch_bounds__(256)
    across_map_kernel(const CamParams<typename Compute<S>::type> a, const W* weights) {
  using F = typename Compute<S>::type;
  constexpr int kVec = kAccess == kElements ? 1 : 16 / (int)sizeof(S);
  const int64_t segment = blockIdx.x % a.segments, run = blockIdx.x / a.segments;
  const int64_t image = run / a.splits;
  const int place = (int)segment * (int)blockDim.x + (int)threadIdx.x;
  if (place >= a.places) return;
  const int64_t begin = run % a.splits * a.per_split;
  const int64_t end = begin + a.per_split < a.steps ? begin + a.per_split : a.steps;
  const int64_t act_step = a.fold * a.activation_line, grad_step = a.fold * a.gradient_line;
  const S* act = static_cast<const S*>(a.activations) + image * a.activation_n + begin * act_step +
                 (int64_t)place * kVec;
  const S* grad = static_cast<const S*>(a.gradients) + image * a.gradient_n + begin * grad_step +
                  (int64_t)place * kVec;
  const W* weight = weights + image * a.channels + begin * a.fold;
  F sum[kVec] = {};
  if constexpr (kTerm == kWeighted) {
    int channel[kVec];
#pragma unroll
    for (int e = 0; e < kVec; ++e)
      channel[e] = kAccess == kFolded ? (int)(((int64_t)place * kVec + e) / a.plane) : 0;
#pragma unroll 4
    for (int64_t k = begin; k < end; ++k) {
      F x[kVec];
      load_place<kVec>(act, x);
      act += act_step;
#pragma unroll
      for (int e = 0; e < kVec; ++e) sum[e] = fused((F)widen(weight[channel[e]]), x[e], sum[e]);
      weight += a.fold;
    }
  } else {
#pragma unroll 4
    for (int64_t k = begin; k < end; ++k) {
      F x[kVec], y[kVec];
      load_place<kVec>(act, x);
      load_place<kVec>(grad, y);
      act += act_step;
      grad += grad_step;
#pragma unroll
      for (int e = 0; e < kVec; ++e) sum[e] += cam_term<kTerm>(x[e], y[e], (F)0);
    }
  }
  F* part = a.partials + run * a.fold * a.plane + (int64_t)place * kVec;
#pragma unroll
  for (int e = 0; e < kVec; ++e) part[e] = sum[e];
}

// Where an output row or column lies between two of the map: half-pixel centres, in whole numbers.
template <class F>
struct Between {
  int lower, upper;
  F share;
  __device__ __forceinline__ Between(int i, int in, int out) {
    const int at = (2 * i + 1) * in - out, unit = 2 * out;
    lower = at <= 0 ? 0 : at / unit;
    share = at <= 0 ? (F)0 : (F)(at - lower * unit) / (F)unit;
    upper = lower + 1 < in ? lower + 1 : lower;
  }
};
// Which is a where both are: min-max would blow the rounding of (1 - f) a + f b up.
template <class F>
__device__ __forceinline__ F between(F a, F b, F share) {
  return fused(share, b - a, a);
}

// The extrema of what a block's threads have seen.
template <class F>
struct Extent {
  F v[3] = {-infinity<F>(), -infinity<F>(), 0};  // -low, high, whether there was a NaN
  __device__ __forceinline__ void add(F x) {
    v[0] = larger(v[0], -x);
    v[1] = larger(v[1], x);
    if (x != x) v[2] = 1;
  }
  __device__ __forceinline__ void over(Block& block) { block.all<Max>(v); }
  __device__ __forceinline__ F scaled(F x) const {
    // One NaN makes the scale of the whole picture unknown.
    const F low = v[2] != 0 ? not_a_number<F>() : -v[0];
    return (x - low) / ((F)kMinMaxEps + (v[1] - -v[0]));
  }
};

constexpr int kFinishThreads = 1024;

template <class F>
__global__ void __launch_bounds__(kFinishThreads) finish_map_kernel(const CamParams<F> a) {
  Block block;
  const int64_t image = blockIdx.x;
  const F* partials = a.partials + image * a.parts * a.plane;
  F* map = a.map + image * a.plane;
  const int thread = (int)threadIdx.x, threads = (int)blockDim.x;
  using Space = double[kFinishThreads];
  FXK_SHARED(Space, space);
  // Small planes: several threads to a position.
  const int each = a.plane < threads ? threads / a.plane : 1;
  if (each > 1) {
    double sum = 0;
    if (thread < each * a.plane) {
#pragma unroll 4
      for (int64_t k = thread / a.plane; k < a.parts; k += each)
        sum += (double)partials[k * a.plane + thread % a.plane];
    }
    space[thread] = sum;
    __syncthreads();
  }
  Extent<F> extent;
  for (int p = thread; p < a.plane; p += threads) {
    double sum = 0;
    if (each > 1) {
      for (int k = 0; k < each; ++k) sum += space[k * a.plane + p];
    } else {
#pragma unroll 4
      for (int64_t k = 0; k < a.parts; ++k) sum += (double)partials[k * a.plane + p];
    }
    const F value = a.relu ? cam_positive((F)sum) : (F)sum;
    map[p] = value;
    extent.add(value);
  }
  if (a.normalize >= 1) {
    extent.over(block);
    for (int p = thread; p < a.plane; p += threads) map[p] = extent.scaled(map[p]);
  }
  __syncthreads();

  // A warp takes rows of the output.
  F* out = a.out + image * a.out_height * a.out_width;
  const bool same = a.out_height == a.height && a.out_width == a.in_width;
  const auto each_value = [&](auto use) {
    for (int i = thread / 32; i < a.out_height; i += threads / 32) {
      const Between<F> down(i, a.height, a.out_height);
      const F* top = map + (int64_t)down.lower * a.in_width;
      const F* bottom = map + (int64_t)down.upper * a.in_width;
      const int64_t row = (int64_t)i * a.out_width;
      for (int j = thread % 32; j < a.out_width; j += 32) {
        if (same) {
          use(row + j, map[row + j]);
          continue;
        }
        const Between<F> right(j, a.in_width, a.out_width);
        use(row + j,
            between(between(top[right.lower], bottom[right.lower], down.share),
                    between(top[right.upper], bottom[right.upper], down.share), right.share));
      }
    }
  };
  if (a.normalize < 2) {
    each_value([&](int64_t at, F value) { out[at] = value; });
    return;
  }
  Extent<F> outer;
  each_value([&](int64_t, F value) { outer.add(value); });
  outer.over(block);
  each_value([&](int64_t at, F value) { out[at] = outer.scaled(value); });
}

// --- the gradient of the map before ReLU and resizing

template <class F>
struct CamBackwardParams {
  const void* activations;  // as in CamBackwardArgs
  const void* gradients;
  const F* upstream;
  void* grad_activations;
  void* grad_gradients;
  int64_t n;
  int channels, plane, width;
};

// A channel's plane: sums first, where the method has any, then both gradients.
template <class S, int kMethod, class Group>
__device__ __forceinline__ void backward_line(const CamBackwardParams<typename Compute<S>::type>& a,
                                              int64_t i, Group& group) {
  using F = typename Compute<S>::type;
  constexpr int kVec = 16 / sizeof(S);
  constexpr bool kGiven = kMethod == kWeights;
  constexpr bool kByElement =
      kMethod == kHiResCAM || kMethod == kLayerCAM || kMethod == kElementwise;
  const int n = a.plane;
  const S* act = static_cast<const S*>(a.activations) + i * n;
  const S* grad = static_cast<const S*>(a.gradients) + (kGiven ? i : i * n);
  const F* up = a.upstream + i / a.channels * n;
  S* on_act = static_cast<S*>(a.grad_activations) + i * n;
  S* on_grad = static_cast<S*>(a.grad_gradients) + (kGiven ? i : i * n);
  const int first = group.index() * kVec - skew_of(act), step = group.size() * kVec;

  // Sums of A u, of A, and of g or g A.
  double sum[3] = {0, 0, 0};
  if constexpr (!kByElement) {
    F part[3] = {0, 0, 0};
    for (int at = first; at < n; at += step) {
      F x[kVec], y[kVec] = {}, u[kVec];
      load_chunk<kVec>(act, at, n, x);
      load_chunk<kVec>(up, at, n, u);
      if (kMethod == kGradCAM || kMethod == kXGradCAM) load_chunk<kVec>(grad, at, n, y);
#pragma unroll
      for (int e = 0; e < kVec; ++e) {
        part[0] = fused(x[e], u[e], part[0]);
        part[1] += x[e];
        part[2] += kMethod == kXGradCAM ? x[e] * y[e] : y[e];
      }
    }
    for (int k = 0; k < 3; ++k) sum[k] = (double)part[k];
    group.template all<Sum>(sum);
  }
  const F on_weight = (F)sum[0], total = (F)sum[1];
  // What multiplies u, and what is added: of the activations' gradient.
  F weight = 0, more = 0, share = 0;
  if (kGiven) {
    weight = (F)widen(grad[0]);
    if (group.index() == 0) narrow(on_weight, on_grad);
  } else if (kMethod == kGradCAM) {
    weight = (F)(sum[2] / n);
    share = (F)(sum[0] / n);
  } else if (kMethod == kXGradCAM) {
    weight = (F)(sum[2] / (sum[1] + kXGradEps));
    share = (F)(sum[0] / (sum[1] + kXGradEps));
  } else if (kMethod == kGradCAMPlusPlus) {
    // w = sum f(g, S), f = g^3 / q, q = 2 g^2 + S g^3 + eps for g > 0
    F part[2] = {0, 0};
    for (int at = first; at < n; at += step) {
      F y[kVec], v[kVec];
      load_chunk<kVec>(grad, at, n, y);
#pragma unroll
      for (int e = 0; e < kVec; ++e) {
        const F square = y[e] * y[e], cube = square * y[e];
        const F q = 2 * square + total * cube + (F)kPlusPlusEps;
        const F term = y[e] <= 0 ? (F)0 : cube / q;
        part[0] += term;
        part[1] = fused(term, term, part[1]);
        const F slope = (3 * square * q - cube * (4 * y[e] + 3 * total * square)) / (q * q);
        v[e] = y[e] <= 0 ? (F)0 : on_weight * slope;
      }
      store_chunk<kVec>(v, on_grad, at, n);
    }
    double both[2] = {(double)part[0], (double)part[1]};
    group.template all<Sum>(both);
    weight = (F)both[0];
    more = (F)(-sum[0] * both[1]);
  }
  for (int at = first; at < n; at += step) {
    F x[kVec] = {}, y[kVec] = {}, u[kVec], v[kVec], w[kVec];
    load_chunk<kVec>(up, at, n, u);
    if (kByElement || kMethod == kXGradCAM) {
      load_chunk<kVec>(act, at, n, x);
      load_chunk<kVec>(grad, at, n, y);
    }
#pragma unroll
    for (int e = 0; e < kVec; ++e) {
      if constexpr (kByElement) {
        const F sign = kMethod == kHiResCAM ? (F)1 : kMethod == kLayerCAM ? y[e] : y[e] * x[e];
        v[e] = sign <= 0 ? (F)0 : y[e] * u[e];  // NaN is not
        w[e] = sign <= 0 ? (F)0 : x[e] * u[e];
      } else if constexpr (kMethod == kXGradCAM) {
        v[e] = fused(weight, u[e], share * (y[e] - weight));
        w[e] = share * x[e];
      } else {
        v[e] = fused(weight, u[e], more);
        w[e] = share;
      }
    }
    store_chunk<kVec>(v, on_act, at, n);
    if (!kGiven && kMethod != kGradCAMPlusPlus) store_chunk<kVec>(w, on_grad, at, n);
  }
}

template <class S, int kMethod, bool kPerWarp>
__global__ void __launch_bounds__(256)
    cam_backward_kernel(const CamBackwardParams<typename Compute<S>::type> a) {
  typename Choose<kPerWarp>::type group;
  if constexpr (kPerWarp) group.width = a.width;
  const int number = kPerWarp ? (int)threadIdx.x / group.size() : 0;
  const int per_block = kPerWarp ? (int)blockDim.x / group.size() : 1;
  const int64_t lines = a.n * a.channels, stride = (int64_t)gridDim.x * per_block;
  for (int64_t i = (int64_t)blockIdx.x * per_block + number; i < lines; i += stride)
    backward_line<S, kMethod>(a, i, group);
}

// --- launches

// How lines are shared out: a warp's or a block's, threads of a line and of a block, blocks.
struct LineGrid {
  bool per_warp;
  int width, threads;
  int64_t blocks;
};

// Longer lines, in chunks of 16 bytes, than a warp takes in a few turns belong to a block.
constexpr int64_t kWarpChunks = 512;

inline LineGrid line_grid(int64_t lines, int64_t chunks, bool always_warps, int device) {
  LineGrid grid = {always_warps || chunks <= kWarpChunks, 32, 256, 0};
  if (grid.per_warp) {
    grid.width = threads_for(chunks, 2, kLeastWidth, 32);
  } else {
    grid.threads = threads_for(chunks, 4, 64, 256);
  }
  const int64_t per_block = grid.per_warp ? grid.threads / grid.width : 1;
  grid.blocks =
      smaller(ceil_div(lines, per_block), (int64_t)multiprocessors(device) * (2048 / grid.threads));
  return grid;
}

template <class S>
bool channels_last(const CamArgs& a) {
  return a.activation_stride_c == 1 && (a.height * a.width == 1 || a.activation_stride_p != 1);
}

// The sum over channels across lines; with `fold` 0 no 16 bytes can be read at once.
struct MapPlan {
  int fold, places, segments, threads, splits, per_split;
  int64_t steps;
  int64_t parts() const { return (int64_t)splits * (fold ? fold : 1); }
};

inline MapPlan map_plan(int64_t n, int64_t channels, int64_t plane, int vec, bool vectors,
                        int device) {
  int common = 1;
  while (common < vec && plane % (2 * common) == 0) common *= 2;
  MapPlan plan = {};
  plan.fold = vectors ? vec / common : 0;
  const int fold = vectors ? plan.fold : 1;
  plan.places = (int)(vectors ? plane / common : plane);
  plan.segments = (int)ceil_div(plan.places, 256);
  plan.threads = 32 * (int)ceil_div(ceil_div(plan.places, plan.segments), 32);
  plan.steps = channels / fold;
  // Enough blocks to fill the device, runs short enough for sums in single precision, and, as far
  // as that allows, no more parts than one block can add up in the time of the others.
  const int64_t wanted = (int64_t)multiprocessors(device) * (2048 / plan.threads);
  const int64_t most = (1 << 17) / (fold * plane) + 1;
  int64_t each = ceil_div(plan.steps * n * plan.segments, wanted);
  each = each < 8 ? 8 : each;
  each = smaller(each < ceil_div(plan.steps, most) ? ceil_div(plan.steps, most) : each, 64);
  plan.per_split = (int)smaller(each, plan.steps);
  plan.splits = (int)ceil_div(plan.steps, plan.per_split);
  return plan;
}

// Whether the strides leave every place of every line on 16 bytes.
template <class S>
bool places_are_vectors(int64_t n, int64_t channels, int64_t plane, int64_t stride_n,
                        int64_t stride_line) {
  constexpr int kVec = 16 / sizeof(S);
  if (n > 1 && stride_n % kVec != 0) return false;
  if (plane % kVec == 0) return channels == 1 || stride_line % kVec == 0;
  int common = 1;
  while (plane % (2 * common) == 0) common *= 2;
  return stride_line == plane && channels % (kVec / common) == 0;
}

template <class S>
bool reads_both(const CamArgs& a) {
  return a.method == kHiResCAM || a.method == kLayerCAM || a.method == kElementwise;
}
inline bool has_own_weights(int method) {
  return method == kGradCAM || method == kXGradCAM || method == kGradCAMPlusPlus;
}

template <class S>
MapPlan map_plan_of(const CamArgs& a, bool aligned, int device) {
  const int64_t plane = a.height * a.width;
  bool vectors = aligned && places_are_vectors<S>(a.n, a.channels, plane, a.activation_stride_n,
                                                  a.activation_stride_c);
  if (reads_both<S>(a))
    vectors = vectors && places_are_vectors<S>(a.n, a.channels, plane, a.gradient_stride_n,
                                               a.gradient_stride_c);
  return map_plan(a.n, a.channels, plane, 16 / (int)sizeof(S), vectors, device);
}

inline int64_t to_16_bytes(int64_t count) { return (count + 3) / 4 * 4; }

template <class S>
int64_t workspace(const CamArgs& a, int device) {
  using F = typename Compute<S>::type;
  const int64_t plane = a.height * a.width;
  int64_t parts = 1;
  // What the addresses are is not known yet.
  if (!channels_last<S>(a))
    for (bool aligned : {false, true}) {
      const int64_t found = map_plan_of<S>(a, aligned, device).parts();
      if (found > parts) parts = found;
    }
  const int64_t weights = has_own_weights(a.method) ? to_16_bytes(a.n * a.channels) : 0;
  const int64_t numbers = weights + to_16_bytes(a.n * parts * plane) + a.n * plane;
  return ceil_div(numbers * (int64_t)sizeof(F), (int64_t)sizeof(double));
}

template <class S, int kMethod>
void launch_weights(const CamParams<typename Compute<S>::type>& given, bool last, bool vectors,
                    int device, cudaStream_t stream) {
  CamParams<typename Compute<S>::type> a = given;
  constexpr int kVec = 16 / sizeof(S);
  if (last) {
    const int64_t tiles = ceil_div(a.channels, kAcross * (vectors ? kVec : 1));
    const auto kernel = vectors ? &across_weights_kernel<S, kMethod, true>
                                : &across_weights_kernel<S, kMethod, false>;
    FXK_LAUNCH(kernel, (unsigned)(a.n * tiles), kAcross * kDown, 0, stream, a);
  } else {
    const int64_t chunks = ceil_div((int64_t)a.plane + kVec - 1, kVec);
    const LineGrid grid = line_grid(a.n * a.channels, chunks, false, device);
    a.width = grid.width;
    const auto kernel = grid.per_warp ? &line_weights_kernel<S, kMethod, true>
                                      : &line_weights_kernel<S, kMethod, false>;
    FXK_LAUNCH(kernel, (unsigned)grid.blocks, (unsigned)grid.threads, 0, stream, a);
  }
  check(cudaGetLastError(), "cam");
}

template <class S, class W, int kTerm>
void launch_map(const CamParams<typename Compute<S>::type>& given, const W* weights, bool last,
                const MapPlan& plan, int device, cudaStream_t stream) {
  CamParams<typename Compute<S>::type> a = given;
  constexpr int kVec = 16 / sizeof(S);
  if (last) {
    const int64_t chunks = ceil_div((int64_t)a.channels + kVec - 1, kVec);
    const LineGrid grid = line_grid(a.n * a.plane, chunks, true, device);
    a.width = grid.width;
    const auto kernel = &line_map_kernel<S, W, kTerm>;
    FXK_LAUNCH(kernel, (unsigned)grid.blocks, (unsigned)grid.threads, 0, stream, a, weights);
  } else {
    constexpr int kSeveral = kTerm == kWeighted ? kFolded : kVectors;
    const auto kernel = plan.fold == 0   ? &across_map_kernel<S, W, kTerm, kElements>
                        : plan.fold == 1 ? &across_map_kernel<S, W, kTerm, kVectors>
                                         : &across_map_kernel<S, W, kTerm, kSeveral>;
    const int64_t blocks = a.n * plan.splits * plan.segments;
    FXK_LAUNCH(kernel, (unsigned)blocks, (unsigned)plan.threads, 0, stream, a, weights);
  }
  check(cudaGetLastError(), "cam");
}

template <class S>
void run_cam(const CamArgs& args, int device, cudaStream_t stream, double* scratch) {
  using F = typename Compute<S>::type;
  const int64_t plane = args.height * args.width;
  const bool last = channels_last<S>(args), both = reads_both<S>(args);
  const bool own = has_own_weights(args.method);
  const bool aligned =
      (uintptr_t)args.activations % 16 == 0 && (!both || (uintptr_t)args.gradients % 16 == 0);
  const MapPlan plan = last ? MapPlan{0, 0, 0, 0, 1, 0, 0} : map_plan_of<S>(args, aligned, device);
  CamParams<F> a = {};
  a.activations = args.activations;
  a.gradients = args.gradients;
  a.weights = reinterpret_cast<F*>(scratch);
  a.partials = a.weights + (own ? to_16_bytes(args.n * args.channels) : 0);
  a.map = a.partials + to_16_bytes(args.n * plan.parts() * plane);
  a.out = static_cast<F*>(args.out);
  a.n = args.n;
  a.activation_n = args.activation_stride_n;
  a.activation_line = last ? args.activation_stride_p : args.activation_stride_c;
  a.gradient_n = args.gradient_stride_n;
  a.gradient_line = last ? args.gradient_stride_p : args.gradient_stride_c;
  a.channels = (int)args.channels;
  a.plane = (int)plane;
  a.steps = plan.steps;
  a.fold = plan.fold ? plan.fold : 1;
  a.places = plan.places;
  a.segments = plan.segments;
  a.splits = plan.splits;
  a.per_split = plan.per_split;
  a.parts = (int)plan.parts();
  a.height = (int)args.height;
  a.in_width = (int)args.width;
  a.out_height = (int)args.out_height;
  a.out_width = (int)args.out_width;
  a.relu = args.relu != 0;
  a.normalize = args.normalize;

  if (own) {
    constexpr int kVec = 16 / sizeof(S);
    const bool vectors = last && aligned && (uintptr_t)args.gradients % 16 == 0 &&
                         args.channels % kVec == 0 && a.activation_n % kVec == 0 &&
                         a.activation_line % kVec == 0 && a.gradient_n % kVec == 0 &&
                         a.gradient_line % kVec == 0;
    if (args.method == kGradCAM)
      launch_weights<S, kGradCAM>(a, last, vectors, device, stream);
    else if (args.method == kXGradCAM)
      launch_weights<S, kXGradCAM>(a, last, vectors, device, stream);
    else
      launch_weights<S, kGradCAMPlusPlus>(a, last, vectors, device, stream);
  }
  const F* none = nullptr;
  switch (args.method) {
    case kWeights:
      launch_map<S, S, kWeighted>(a, static_cast<const S*>(args.gradients), last, plan, device,
                                  stream);
      break;
    case kHiResCAM: launch_map<S, F, kProduct>(a, none, last, plan, device, stream); break;
    case kLayerCAM: launch_map<S, F, kClipped>(a, none, last, plan, device, stream); break;
    case kElementwise: launch_map<S, F, kRectified>(a, none, last, plan, device, stream); break;
    default: launch_map<S, F, kWeighted>(a, a.weights, last, plan, device, stream);
  }
  const int64_t most =
      plane > args.out_height * args.out_width ? plane : args.out_height * args.out_width;
  const int64_t work = smaller(a.parts * plane > most ? a.parts * plane : most, 1 << 20);
  const int threads = threads_for(work, 4, 64, kFinishThreads);
  const auto kernel = &finish_map_kernel<F>;
  FXK_LAUNCH(kernel, (unsigned)a.n, (unsigned)threads, 0, stream, a);
  check(cudaGetLastError(), "cam");
}

template <class S, int kMethod>
void launch_backward(CamBackwardParams<typename Compute<S>::type>& a, int device,
                     cudaStream_t stream) {
  constexpr int kVec = 16 / sizeof(S);
  const int64_t chunks = ceil_div((int64_t)a.plane + kVec - 1, kVec);
  const LineGrid grid = line_grid(a.n * a.channels, chunks, false, device);
  a.width = grid.width;
  const auto kernel = grid.per_warp ? &cam_backward_kernel<S, kMethod, true>
                                    : &cam_backward_kernel<S, kMethod, false>;
  FXK_LAUNCH(kernel, (unsigned)grid.blocks, (unsigned)grid.threads, 0, stream, a);
  check(cudaGetLastError(), "cam_backward");
}

template <class S>
void run_cam_backward(const CamBackwardArgs& args, int device, cudaStream_t on) {
  using F = typename Compute<S>::type;
  CamBackwardParams<F> a = {
      args.activations,      args.gradients,      static_cast<const F*>(args.upstream),
      args.grad_activations, args.grad_gradients, args.n,
      (int)args.channels,    (int)args.plane,     32};
  switch (args.method) {
    case kGradCAM: return launch_backward<S, kGradCAM>(a, device, on);
    case kHiResCAM: return launch_backward<S, kHiResCAM>(a, device, on);
    case kLayerCAM: return launch_backward<S, kLayerCAM>(a, device, on);
    case kGradCAMPlusPlus: return launch_backward<S, kGradCAMPlusPlus>(a, device, on);
    case kXGradCAM: return launch_backward<S, kXGradCAM>(a, device, on);
    case kWeights: return launch_backward<S, kWeights>(a, device, on);
    default: return launch_backward<S, kElementwise>(a, device, on);
  }
}

void check_cam(int64_t channels, int64_t plane, int method, int dtype) {
  if (method < kGradCAM || method > kElementwise)
    throw std::invalid_argument("cam: unknown method");
  if (dtype < kFloat32 || dtype > kFloat16) throw std::invalid_argument("cam: unknown dtype");
  if (channels > 1 << 27 || plane > 1 << 27)
    throw std::invalid_argument("cam: more than 2^27 channels or positions");
}

}  // namespace

int64_t cam_workspace(const CamArgs& a, int device) {
  check_cam(a.channels, a.height * a.width, a.method, a.dtype);
  switch (a.dtype) {
    case kFloat32: return workspace<float>(a, device);
    case kFloat64: return workspace<double>(a, device);
    case kBFloat16: return workspace<__nv_bfloat16>(a, device);
    default: return workspace<__half>(a, device);
  }
}

void cam(const CamArgs& a, int device, void* stream, double* scratch) {
  check_cam(a.channels, a.height * a.width, a.method, a.dtype);
  for (int64_t product : {a.height * a.out_height, a.width * a.out_width})
    if (product >= 1 << 30)
      throw std::invalid_argument(
          "cam: a side of the map times that of the output is 2^30 or more");
  if (a.n == 0) return;
  const OnDevice guard(device);
  const auto on = static_cast<cudaStream_t>(stream);
  switch (a.dtype) {
    case kFloat32: return run_cam<float>(a, device, on, scratch);
    case kFloat64: return run_cam<double>(a, device, on, scratch);
    case kBFloat16: return run_cam<__nv_bfloat16>(a, device, on, scratch);
    default: return run_cam<__half>(a, device, on, scratch);
  }
}

void cam_backward(const CamBackwardArgs& a, int device, void* stream) {
  check_cam(a.channels, a.plane, a.method, a.dtype);
  if (a.n == 0) return;
  const OnDevice guard(device);
  const auto on = static_cast<cudaStream_t>(stream);
  switch (a.dtype) {
    case kFloat32: return run_cam_backward<float>(a, device, on);
    case kFloat64: return run_cam_backward<double>(a, device, on);
    case kBFloat16: return run_cam_backward<__nv_bfloat16>(a, device, on);
    default: return run_cam_backward<__half>(a, device, on);
  }
}

}  // namespace cuda
}  // namespace fxk
