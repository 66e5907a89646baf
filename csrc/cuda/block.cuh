// What the CUDA kernels share: element types, 16-byte access, and sums over the threads that work
// on a row. The same source runs on the CPU for tests, see csrc/emulator/simt.h.
#pragma once
#include <math.h>
#include <stdint.h>
#include <string.h>

#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#define FXK_SHARED(type, name) __shared__ type name
#define FXK_LAUNCH(kernel, grid, threads, bytes, stream, ...) \
  kernel<<<grid, threads, bytes, stream>>>(__VA_ARGS__)
#else
#include "../emulator/simt.h"
#endif

#include <stdexcept>
#include <string>

namespace fxk {
namespace cuda {
namespace {

// The arithmetic type of a storage type.
template <class S>
struct Compute {
  using type = float;
};
template <>
struct Compute<double> {
  using type = double;
};

__device__ __forceinline__ float fused(float a, float b, float c) { return fmaf(a, b, c); }
__device__ __forceinline__ double fused(double a, double b, double c) { return fma(a, b, c); }
__device__ __forceinline__ float larger(float a, float b) { return fmaxf(a, b); }
__device__ __forceinline__ double larger(double a, double b) { return fmax(a, b); }
__device__ __forceinline__ float magnitude(float a) { return fabsf(a); }
__device__ __forceinline__ double magnitude(double a) { return fabs(a); }

// 2^z, 0 below the normal numbers. The library's exp2f spends three instructions on those.
__device__ __forceinline__ float exp2_of(float z) {
#if defined(__CUDACC__)
  float r;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(z));
  return r;
#else
  return z < -126.0f ? 0.0f : exp2f(z);
#endif
}
__device__ __noinline__ double exp2_of(double z) { return exp2(z); }
__device__ __forceinline__ float log2_of(float x) { return __log2f(x); }
__device__ __noinline__ double log2_of(double x) { return log2(x); }

// Of scalars. In double precision they are long, and called rather than copied to every use.
__device__ __forceinline__ float log_of(float x) { return logf(x); }
__device__ __forceinline__ float exp_of(float x) { return expf(x); }
__device__ __forceinline__ float log1p_of(float x) { return log1pf(x); }
__device__ __forceinline__ float expm1_of(float x) { return expm1f(x); }
__device__ __noinline__ double log_of(double x) { return log(x); }
__device__ __noinline__ double exp_of(double x) { return exp(x); }
__device__ __noinline__ double log1p_of(double x) { return log1p(x); }
__device__ __noinline__ double expm1_of(double x) { return expm1(x); }

__device__ __forceinline__ float widen(float v) { return v; }
__device__ __forceinline__ double widen(double v) { return v; }
__device__ __forceinline__ float widen(__nv_bfloat16 v) { return __bfloat162float(v); }
__device__ __forceinline__ float widen(__half v) { return __half2float(v); }
__device__ __forceinline__ void narrow(float v, float* p) { *p = v; }
__device__ __forceinline__ void narrow(double v, double* p) { *p = v; }
__device__ __forceinline__ void narrow(float v, __nv_bfloat16* p) { *p = __float2bfloat16_rn(v); }
__device__ __forceinline__ void narrow(float v, __half* p) { *p = __float2half_rn(v); }

// Bits that travel as one: 16 bytes are the widest load and store there is.
template <class To, class From>
__device__ __forceinline__ To bits_as(const From& from) {
  static_assert(sizeof(To) == sizeof(From), "the same bits");
  To to;
  memcpy(&to, &from, sizeof to);
  return to;
}

__device__ __forceinline__ void unpack(uint32_t word, const __nv_bfloat16*, float* out) {
  out[0] = bits_as<float>(word << 16);
  out[1] = bits_as<float>(word & 0xffff0000u);
}
__device__ __forceinline__ void unpack(uint32_t word, const __half*, float* out) {
  const float2 pair = __half22float2(bits_as<__half2>(word));
  out[0] = pair.x;
  out[1] = pair.y;
}
__device__ __forceinline__ uint32_t pack(const float* v, const __nv_bfloat16*) {
  return bits_as<uint32_t>(__floats2bfloat162_rn(v[0], v[1]));
}
__device__ __forceinline__ uint32_t pack(const float* v, const __half*) {
  return bits_as<uint32_t>(__floats2half2_rn(v[0], v[1]));
}
__device__ __forceinline__ void unpack(const uint4& raw, const float*, float* out) {
  out[0] = bits_as<float>(raw.x);
  out[1] = bits_as<float>(raw.y);
  out[2] = bits_as<float>(raw.z);
  out[3] = bits_as<float>(raw.w);
}
__device__ __forceinline__ uint4 pack4(const float* v, const float*) {
  return {bits_as<uint32_t>(v[0]), bits_as<uint32_t>(v[1]), bits_as<uint32_t>(v[2]),
          bits_as<uint32_t>(v[3])};
}
struct TwoDoubles {
  double v[2];
};
__device__ __forceinline__ void unpack(const uint4& raw, const double*, double* out) {
  const TwoDoubles pair = bits_as<TwoDoubles>(raw);
  out[0] = pair.v[0];
  out[1] = pair.v[1];
}
__device__ __forceinline__ uint4 pack4(const double* v, const double*) {
  return bits_as<uint4>(TwoDoubles{{v[0], v[1]}});
}
template <class S>
__device__ __forceinline__ void unpack(const uint4& raw, const S* kind, float* out) {
  unpack(raw.x, kind, out);
  unpack(raw.y, kind, out + 2);
  unpack(raw.z, kind, out + 4);
  unpack(raw.w, kind, out + 6);
}
template <class S>
__device__ __forceinline__ uint4 pack4(const float* v, const S* kind) {
  return {pack(v, kind), pack(v + 2, kind), pack(v + 4, kind), pack(v + 6, kind)};
}

// 16 bytes of -inf, which adds nothing to a maximum and nothing to a sum of exponentials.
__device__ __forceinline__ uint4 four_words(uint32_t a, uint32_t b) { return {a, b, a, b}; }
__device__ __forceinline__ uint4 minus_infinities(const float*) {
  return four_words(0xff800000u, 0xff800000u);
}
__device__ __forceinline__ uint4 minus_infinities(const double*) {
  return four_words(0, 0xfff00000u);
}
__device__ __forceinline__ uint4 minus_infinities(const __nv_bfloat16*) {
  return four_words(0xff80ff80u, 0xff80ff80u);
}
__device__ __forceinline__ uint4 minus_infinities(const __half*) {
  return four_words(0xfc00fc00u, 0xfc00fc00u);
}

// kCount elements from an address that is a multiple of 16 bytes.
template <int kCount, class S, class F>
__device__ __forceinline__ void load_vector(const S* p, F* out) {
  constexpr int kEach = 16 / sizeof(S);
#pragma unroll
  for (int i = 0; i < kCount; i += kEach)
    unpack(*reinterpret_cast<const uint4*>(p + i), p, out + i);
}
template <class S, class F>
__device__ __forceinline__ void store_vector(const F* v, S* p) {
  *reinterpret_cast<uint4*>(p) = pack4(v, p);
}

struct Sum {
  template <class F>
  static __device__ __forceinline__ F of(F a, F b) {
    return a + b;
  }
  static constexpr double kNothing = 0;
};
struct Max {
  template <class F>
  static __device__ __forceinline__ F of(F a, F b) {
    return larger(a, b);
  }
  static constexpr double kNothing = -HUGE_VAL;
};

// The threads of a row: some or all of a warp, or all of a block. `all` leaves in every one of them
// the same bits: the sum (or the maximum) over all.
struct Warp {
  int width = 32;  // a power of two: as many neighbours work together
  __device__ __forceinline__ int index() const { return (int)threadIdx.x & (width - 1); }
  __device__ __forceinline__ int size() const { return width; }
  template <class Op, int kCount, class F>
  __device__ __forceinline__ void all(F (&v)[kCount]) {
    // Neighbours of other rows may be elsewhere in the program: they are not waited for.
    const unsigned mask = width == 32 ? ~0u : ((1u << width) - 1) << (threadIdx.x & 31 & -width);
#pragma unroll
    for (int step = width / 2; step > 0; step /= 2)
#pragma unroll
      for (int i = 0; i < kCount; ++i) v[i] = Op::of(v[i], __shfl_xor_sync(mask, v[i], step));
  }
};

constexpr int kMostWarps = 32;

struct Block {
  int turn = 0;
  __device__ __forceinline__ int index() const { return (int)threadIdx.x; }
  __device__ __forceinline__ int size() const { return (int)blockDim.x; }
  template <class Op, int kCount, class F>
  __device__ __forceinline__ void all(F (&v)[kCount]) {
    Warp warp;
    warp.all<Op>(v);
    // Two places in turn: whoever writes one has passed the barrier of the other, and with it
    // everybody's reading of this one.
    using Space = F[2][kCount][kMostWarps];
    FXK_SHARED(Space, space);
    auto& place = space[turn];
    turn ^= 1;
    if (warp.index() == 0)
#pragma unroll
      for (int i = 0; i < kCount; ++i) place[i][threadIdx.x / 32] = v[i];
    __syncthreads();
    const bool there = warp.index() < size() / 32;
#pragma unroll
    for (int i = 0; i < kCount; ++i) v[i] = there ? place[i][warp.index()] : (F)Op::kNothing;
    warp.all<Op>(v);
  }
};

template <bool kPerWarp>
struct Choose {
  using type = Block;
};
template <>
struct Choose<true> {
  using type = Warp;
};

inline void check(cudaError_t status, const char* what) {
  if (status == cudaSuccess) return;
  cudaGetLastError();  // leave no sticky error behind for the caller's own CUDA code
  throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(status));
}

// Launches go to the current device: `device` for the life of this object.
class OnDevice {
 public:
  explicit OnDevice(int device) {
    check(cudaGetDevice(&before_), "cudaGetDevice");
    changed_ = before_ != device;
    if (changed_) check(cudaSetDevice(device), "cudaSetDevice");
  }
  ~OnDevice() {
    if (changed_) cudaSetDevice(before_);
  }
  OnDevice(const OnDevice&) = delete;
  OnDevice& operator=(const OnDevice&) = delete;

 private:
  int before_ = 0;
  bool changed_ = false;
};

}  // namespace
}  // namespace cuda
}  // namespace fxk
