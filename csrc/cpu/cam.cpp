// cam: channel weights, weighted sum, ReLU, min-max, bilinear up-sampling and min-max again, per
// image, reading activations and gradients once each (gradients first where the weights are
// spatial means). Work is cut into (image, 256 channels): enough parallelism for one image, the
// same result for any number of threads, and short single-precision sums.
//   gradcam     w_c = mean_p g            map = sum_c w_c A
//   hirescam    map = sum_c g A           layercam    map = sum_c max(g, 0) A
//   elementwise map = sum_c max(g A, 0)
//   gradcam++   w_c = sum_p max(g, 0) g^2 / (2 g^2 + S_c g^3 + 1e-6),  S_c = sum_p A
//   xgradcam    w_c = sum_p g A / (S_c + 1e-7)
#include "simd.h"

namespace fxk {
namespace FXK_ISA {
namespace {

constexpr int64_t kChannels = 256;
constexpr int64_t kRun = 32;  // elements summed in single precision before going to double
constexpr double kPlusPlusEps = 1e-6, kXGradEps = 1e-7, kMinMaxEps = 1e-7;

template <class F>
FXK_INLINE F plus_plus(F g, F total) {
  const F g2 = g * g;
  const F w = g2 * g / ((F)2 * g2 + total * g2 * g + (F)kPlusPlusEps);
  return g != g ? g : (g > (F)0 ? w : (F)0);
}

template <class F>
FXK_INLINE F positive(F x) {
  return x < (F)0 ? (F)0 : x;  // NaN passes
}

// Both layouts: `inner` is the contiguous axis.
template <class S>
struct Chunk {
  using F = typename Compute<S>::type;
  const S* a;
  const S* g;
  int64_t channels, plane;
  int64_t ac, ap, gc, gp;  // strides of channel and position
};

// sum over the plane of `kind` of one contiguous channel: 0 A, 1 g, 2 g A, 3 the ++ term.
template <class S, int kKind>
double plane_sum(const S* a, const S* g, int64_t plane, typename Compute<S>::type total) {
  using F = typename Compute<S>::type;
  double whole = 0;
  for (int64_t begin = 0; begin < plane; begin += kRun) {
    const int64_t end = begin + kRun < plane ? begin + kRun : plane;
    F sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t p = begin; p < end; ++p) {
      if (kKind == 0) sum += load(a + p);
      if (kKind == 1) sum += load(g + p);
      if (kKind == 2) sum += load(g + p) * load(a + p);
      if (kKind == 3) sum += plus_plus<F>(load(g + p), total);
    }
    whole += sum;
  }
  return whole;
}

template <class S>
void channel_weights(const Chunk<S>& x, int method, typename Compute<S>::type* w) {
  using F = typename Compute<S>::type;
  if (method == kWeights) {
    for (int64_t c = 0; c < x.channels; ++c) w[c] = load(x.g + c * x.gc);
    return;
  }
  if (x.ap == 1) {
    for (int64_t c = 0; c < x.channels; ++c) {
      const S* a = x.a + c * x.ac;
      const S* g = x.g + c * x.gc;
      if (method == kGradCAM) {
        w[c] = (F)(plane_sum<S, 1>(a, g, x.plane, 0) / (double)x.plane);
        continue;
      }
      const double total = plane_sum<S, 0>(a, g, x.plane, 0);
      w[c] = method == kXGradCAM ? (F)(plane_sum<S, 2>(a, g, x.plane, 0) / (total + kXGradEps))
                                 : (F)plane_sum<S, 3>(a, g, x.plane, (F)total);
    }
    return;
  }
  double total[kChannels], sum[kChannels];
  for (int64_t c = 0; c < x.channels; ++c) total[c] = sum[c] = 0;
  if (method != kGradCAM) {
    for (int64_t p = 0; p < x.plane; ++p) {
      const S* a = x.a + p * x.ap;
#pragma omp simd
      for (int64_t c = 0; c < x.channels; ++c) total[c] += load(a + c);
    }
  }
  for (int64_t p = 0; p < x.plane; ++p) {
    const S* a = x.a + p * x.ap;
    const S* g = x.g + p * x.gp;
    if (method == kGradCAM) {
#pragma omp simd
      for (int64_t c = 0; c < x.channels; ++c) sum[c] += load(g + c);
    } else if (method == kXGradCAM) {
#pragma omp simd
      for (int64_t c = 0; c < x.channels; ++c) sum[c] += load(g + c) * load(a + c);
    } else {
#pragma omp simd
      for (int64_t c = 0; c < x.channels; ++c) sum[c] += plus_plus<F>(load(g + c), (F)total[c]);
    }
  }
  for (int64_t c = 0; c < x.channels; ++c) {
    w[c] = (F)(method == kGradCAM    ? sum[c] / (double)x.plane
               : method == kXGradCAM ? sum[c] / (total[c] + kXGradEps)
                                     : sum[c]);
  }
}

// What a position adds: the activation times a channel weight, or times its own gradient.
template <class S, int kKind>  // 0 weight, 1 gradient, 2 positive gradient, 3 positive product
FXK_INLINE typename Compute<S>::type term(const S* a, const S* g, typename Compute<S>::type w) {
  if (kKind == 0) return w * load(a);
  if (kKind == 1) return load(g) * load(a);
  if (kKind == 3) return positive(load(g) * load(a));
  return positive(load(g)) * load(a);
}

// map[p] += the terms of kGroup channels: summed in registers, so that the map is touched once for
// all of them and the single-precision runs stay short.
template <class S, int kKind, int kGroup>
FXK_INLINE void add_channels(const S* a, const S* g, int64_t ac, int64_t gc,
                             const typename Compute<S>::type* w, int64_t plane, double* map) {
  using F = typename Compute<S>::type;
  F weight[kGroup];
  for (int k = 0; k < kGroup; ++k) weight[k] = kKind == 0 ? w[k] : (F)0;
#pragma omp simd
  for (int64_t p = 0; p < plane; ++p) {
    F sum = term<S, kKind>(a + p, kKind == 0 ? a : g + p, weight[0]);
    for (int k = 1; k < kGroup; ++k)
      sum += term<S, kKind>(a + k * ac + p, kKind == 0 ? a : g + k * gc + p, weight[k]);
    map[p] += sum;
  }
}

template <class S, int kKind>
void weighted_sum(const Chunk<S>& x, const typename Compute<S>::type* w, double* map) {
  using F = typename Compute<S>::type;
  if (x.ap == 1) {
    for (int64_t p = 0; p < x.plane; ++p) map[p] = 0;
    int64_t c = 0;
    for (; c + 8 <= x.channels; c += 8)
      add_channels<S, kKind, 8>(x.a + c * x.ac, x.g + c * x.gc, x.ac, x.gc, w + c, x.plane, map);
    for (; c < x.channels; ++c)
      add_channels<S, kKind, 1>(x.a + c * x.ac, x.g + c * x.gc, x.ac, x.gc, w + c, x.plane, map);
    return;
  }
  for (int64_t p = 0; p < x.plane; ++p) {
    const S* a = x.a + p * x.ap;
    const S* g = x.g + p * x.gp;
    double whole = 0;
    for (int64_t begin = 0; begin < x.channels; begin += kRun) {
      const int64_t end = begin + kRun < x.channels ? begin + kRun : x.channels;
      F sum = 0;
#pragma omp simd reduction(+ : sum)
      for (int64_t c = begin; c < end; ++c)
        sum += term<S, kKind>(a + c, kKind == 0 ? a : g + c, kKind == 0 ? w[c] : (F)0);
      whole += sum;
    }
    map[p] = whole;
  }
}

template <class F>
void min_max(F* map, int64_t n) {
  F low = (F)INFINITY, high = -(F)INFINITY;
  int bad = 0;
#pragma omp simd reduction(min : low) reduction(max : high) reduction(+ : bad)
  for (int64_t p = 0; p < n; ++p) {
    const F v = map[p];
    low = v < low ? v : low;
    high = v > high ? v : high;
    bad += v != v;
  }
  // One NaN makes the scale of the whole picture unknown; say so rather than show the rest.
  const F offset = bad ? (F)NAN : low;
  const F scale = (F)kMinMaxEps + (high - low);
#pragma omp simd
  for (int64_t p = 0; p < n; ++p) map[p] = (map[p] - offset) / scale;
}

template <class F>
void source_position(int64_t i, int64_t in, int64_t out, int64_t* lower, int64_t* upper, F* frac) {
  const double scale = (double)in / (double)out;
  double at = ((double)i + 0.5) * scale - 0.5;  // half-pixel centres
  if (at < 0) at = 0;
  int64_t low = (int64_t)at;
  if (low > in - 1) low = in - 1;
  *lower = low;
  *upper = low + 1 < in ? low + 1 : in - 1;
  *frac = (F)(at - (double)low);
}

// a + f (b - a), which is a where both are: min-max would blow the rounding of (1 - f) a + f b up.
template <class F>
void resize(const F* map, int64_t h, int64_t w, F* out, int64_t oh, int64_t ow, F* line,
            const int64_t* lower, const int64_t* upper, const F* frac) {
  for (int64_t i = 0; i < oh; ++i) {
    int64_t top, bottom;
    F down;
    source_position<F>(i, h, oh, &top, &bottom, &down);
    const F* a = map + top * w;
    const F* b = map + bottom * w;
    for (int64_t j = 0; j < w; ++j) line[j] = a[j] + down * (b[j] - a[j]);
    F* to = out + i * ow;
    for (int64_t j = 0; j < ow; ++j)
      to[j] = line[lower[j]] + frac[j] * (line[upper[j]] - line[lower[j]]);
  }
}

template <class S>
int64_t run(const CamArgs& a, int threads) {
  using F = typename Compute<S>::type;
  const int64_t plane = a.height * a.width;
  const int64_t chunks = (a.channels + kChannels - 1) / kChannels;
  const int64_t tasks = a.n * chunks;
  const size_t partials = align64(sizeof(double) * (size_t)(tasks * plane));
  const size_t sums = align64(sizeof(F) * (size_t)(a.n * plane));
  const size_t lines = align64(sizeof(F) * (size_t)(a.n * a.width));
  const size_t columns = align64(sizeof(int64_t) * (size_t)a.out_width);
  Scratch scratch(partials + sums + lines + 2 * columns + sizeof(F) * (size_t)a.out_width);
  if (!scratch.ok()) return kNoMemory;
  double* maps = scratch.as<double>();
  F* raw = scratch.as<F>(partials);
  F* line = scratch.as<F>(partials + sums);
  int64_t* lower = scratch.as<int64_t>(partials + sums + lines);
  int64_t* upper = scratch.as<int64_t>(partials + sums + lines + columns);
  F* frac = scratch.as<F>(partials + sums + lines + 2 * columns);
  for (int64_t j = 0; j < a.out_width; ++j)
    source_position<F>(j, a.width, a.out_width, lower + j, upper + j, frac + j);
  const int n_threads = useful_threads(threads, a.n * a.channels * plane, tasks);

#pragma omp parallel for num_threads(n_threads) if (n_threads > 1) schedule(static)
  for (int64_t task = 0; task < tasks; ++task) {
    const int64_t n = task / chunks, first = (task % chunks) * kChannels;
    const int64_t left = a.channels - first;
    Chunk<S> x = {
        static_cast<const S*>(a.activations) + n * a.activation_stride_n +
            first * a.activation_stride_c,
        static_cast<const S*>(a.gradients) + n * a.gradient_stride_n + first * a.gradient_stride_c,
        left < kChannels ? left : kChannels,
        plane,
        a.activation_stride_c,
        a.activation_stride_p,
        a.gradient_stride_c,
        a.gradient_stride_p};
    F weights[kChannels];
    double* map = maps + task * plane;
    if (a.method == kHiResCAM) {
      weighted_sum<S, 1>(x, weights, map);
    } else if (a.method == kLayerCAM) {
      weighted_sum<S, 2>(x, weights, map);
    } else if (a.method == kElementwise) {
      weighted_sum<S, 3>(x, weights, map);
    } else {
      channel_weights(x, a.method, weights);
      weighted_sum<S, 0>(x, weights, map);
    }
  }

  const int64_t out_plane = a.out_height * a.out_width;
  const bool same_size = a.out_height == a.height && a.out_width == a.width;
  const int tail_threads = useful_threads(threads, a.n * (chunks * plane + 4 * out_plane), a.n);
#pragma omp parallel for num_threads(tail_threads) if (tail_threads > 1) schedule(static)
  for (int64_t n = 0; n < a.n; ++n) {
    const double* partial = maps + n * chunks * plane;
    F* map = raw + n * plane;
    for (int64_t p = 0; p < plane; ++p) {
      double sum = partial[p];
      for (int64_t k = 1; k < chunks; ++k) sum += partial[k * plane + p];
      map[p] = a.relu ? positive((F)sum) : (F)sum;
    }
    if (a.normalize >= 1) min_max(map, plane);
    F* out = static_cast<F*>(a.out) + n * out_plane;
    if (same_size) {
      memcpy(out, map, sizeof(F) * (size_t)plane);
    } else {
      resize<F>(map, a.height, a.width, out, a.out_height, a.out_width, line + n * a.width, lower,
                upper, frac);
    }
    if (a.normalize >= 2) min_max(out, out_plane);
  }
  return kOk;
}

// The gradient of the raw map sum (no ReLU, no resizing), one channel plane at a time.
template <class S>
void channel_backward(const CamBackwardArgs& x, int64_t n, int64_t c) {
  using F = typename Compute<S>::type;
  const int64_t plane = x.plane, at = (n * x.channels + c) * plane;
  const bool given = x.method == kWeights;
  const S* a = static_cast<const S*>(x.activations) + at;
  const S* g = static_cast<const S*>(x.gradients) + (given ? n * x.channels + c : at);
  const F* u = static_cast<const F*>(x.upstream) + n * plane;
  S* da = static_cast<S*>(x.grad_activations) + at;
  S* dg = static_cast<S*>(x.grad_gradients) + (given ? n * x.channels + c : at);
  if (x.method == kHiResCAM || x.method == kLayerCAM || x.method == kElementwise) {
    for (int64_t p = 0; p < plane; ++p) {
      const F grad = load(g + p), act = load(a + p);
      const F sign = x.method == kHiResCAM ? (F)1 : x.method == kLayerCAM ? grad : grad * act;
      const bool pass = !(sign <= (F)0);  // NaN passes
      store(da + p, pass ? grad * u[p] : (F)0);
      store(dg + p, pass ? act * u[p] : (F)0);
    }
    return;
  }
  F total = 0, sum = 0, upstream_weight = 0;
  for (int64_t p = 0; p < plane; ++p) {
    total += load(a + p);
    upstream_weight += load(a + p) * u[p];
  }
  if (given) {
    const F w = load(g);
    for (int64_t p = 0; p < plane; ++p) store(da + p, w * u[p]);
    store(dg, upstream_weight);
  } else if (x.method == kGradCAM) {
    for (int64_t p = 0; p < plane; ++p) sum += load(g + p);
    const F w = sum / (F)plane, share = upstream_weight / (F)plane;
    for (int64_t p = 0; p < plane; ++p) {
      store(da + p, w * u[p]);
      store(dg + p, share);
    }
  } else if (x.method == kXGradCAM) {
    for (int64_t p = 0; p < plane; ++p) sum += load(g + p) * load(a + p);
    const F den = total + (F)kXGradEps, w = sum / den, share = upstream_weight / den;
    for (int64_t p = 0; p < plane; ++p) {
      const F grad = load(g + p), act = load(a + p);
      store(da + p, w * u[p] + share * (grad - w));
      store(dg + p, share * act);
    }
  } else {
    // w = sum f(g, S), f = g^3 / q, q = 2 g^2 + S g^3 + eps for g > 0
    F on_total = 0;
    for (int64_t p = 0; p < plane; ++p) {
      const F grad = load(g + p);
      if (grad <= (F)0) {  // NaN is not
        store(dg + p, (F)0);
        continue;
      }
      const F g2 = grad * grad, g3 = g2 * grad;
      const F q = (F)2 * g2 + total * g3 + (F)kPlusPlusEps;
      sum += g3 / q;
      on_total -= (g3 / q) * (g3 / q);
      const F slope = ((F)3 * g2 * q - g3 * ((F)4 * grad + (F)3 * total * g2)) / (q * q);
      store(dg + p, upstream_weight * slope);
    }
    for (int64_t p = 0; p < plane; ++p) store(da + p, sum * u[p] + upstream_weight * on_total);
  }
}

template <class S>
int64_t run_backward(const CamBackwardArgs& a, int threads) {
  const int64_t tasks = a.n * a.channels;
  const int n_threads = useful_threads(threads, tasks * a.plane, tasks);
#pragma omp parallel for num_threads(n_threads) if (n_threads > 1) schedule(static)
  for (int64_t task = 0; task < tasks; ++task)
    channel_backward<S>(a, task / a.channels, task % a.channels);
  return kOk;
}

}  // namespace

int64_t cam(const CamArgs& a, int threads) {
  switch (a.dtype) {
    case kFloat32: return run<float>(a, threads);
    case kFloat64: return run<double>(a, threads);
    case kBFloat16: return run<BFloat16>(a, threads);
    default: return run<Float16>(a, threads);
  }
}

int64_t cam_backward(const CamBackwardArgs& a, int threads) {
  switch (a.dtype) {
    case kFloat32: return run_backward<float>(a, threads);
    case kFloat64: return run_backward<double>(a, threads);
    case kBFloat16: return run_backward<BFloat16>(a, threads);
    default: return run_backward<Float16>(a, threads);
  }
}

}  // namespace FXK_ISA
}  // namespace fxk
