// What the CPU kernels share. Every function here is static: the same file is compiled once per
// ISA level, and the linker must never pick an AVX-512 copy for a baseline caller. For the same
// reason nothing from namespace std:: that could leave a weak symbol behind is used.
#pragma once
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "../ops.h"

#if defined(__SSE2__)
#include <immintrin.h>
#endif

#ifndef FXK_ISA
#define FXK_ISA baseline
#endif

#define FXK_INLINE static inline __attribute__((always_inline))

namespace fxk {
namespace FXK_ISA {

// Elements summed in single precision before going to double, spread over the lanes of a vector; a
// build whose loops are not vectorised (under the sanitizers) needs a shorter run for the same sum.
#ifndef FXK_BLOCK
#if defined(__AVX512F__)
#define FXK_BLOCK 1024
#else
#define FXK_BLOCK 512
#endif
#endif
constexpr int64_t kBlock = FXK_BLOCK;

// 16-bit floats are stored in types of their own so that overloads can tell them apart.
struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

FXK_INLINE float as_float(uint32_t u) {
  float f;
  memcpy(&f, &u, sizeof f);
  return f;
}
FXK_INLINE uint32_t as_bits(float f) {
  uint32_t u;
  memcpy(&u, &f, sizeof u);
  return u;
}

FXK_INLINE float load(const float* p) { return *p; }
FXK_INLINE double load(const double* p) { return *p; }
FXK_INLINE float load(const BFloat16* p) { return as_float((uint32_t)p->bits << 16); }
FXK_INLINE float load(const Float16* p) {
  const uint32_t h = p->bits;
  const uint32_t sign = (h & 0x8000u) << 16;
  const uint32_t magnitude = h & 0x7fffu;
  // Rebias the exponent by a multiplication, which turns subnormals into normals on the way;
  // infinities and NaN keep an all-ones exponent.
  const float scaled = as_float(magnitude << 13) * as_float((254u - 15u) << 23);
  const uint32_t special = as_bits(scaled) | 0x7f800000u;
  return as_float((magnitude >= 0x7c00u ? special : as_bits(scaled)) | sign);
}

FXK_INLINE void store(float* p, float v) { *p = v; }
FXK_INLINE void store(double* p, double v) { *p = v; }
FXK_INLINE void store(BFloat16* p, float v) {
  const uint32_t u = as_bits(v);
  const uint32_t rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  p->bits = (uint16_t)(v != v ? 0x7fc0u : rounded);
}
FXK_INLINE void store(Float16* p, float v) {
  const uint32_t u = as_bits(v);
  const uint32_t sign = (u >> 16) & 0x8000u;
  const uint32_t magnitude = u & 0x7fffffffu;
  // Normal results: round the 13 dropped bits to nearest even in integer arithmetic.
  const uint32_t odd = (magnitude >> 13) & 1u;
  const uint32_t normal = (magnitude - (112u << 23) + 0xfffu + odd) >> 13;
  // Subnormal results: adding 0.5 lines the mantissa up so that the FPU does the rounding.
  const uint32_t subnormal = as_bits(as_float(magnitude) + 0.5f) - as_bits(0.5f);
  uint32_t half = magnitude < (113u << 23) ? subnormal : normal;
  half = magnitude >= 0x477ff000u ? 0x7c00u : half;  // 65520 and above round to infinity
  half = magnitude > 0x7f800000u ? 0x7e00u : half;
  p->bits = (uint16_t)(half | sign);
}

// The arithmetic type of a storage type.
template <class S>
struct Compute {
  using type = float;
};
template <>
struct Compute<double> {
  using type = double;
};

// 2^z for z < 127 (and NaN): 2^k * 2^r with |r| <= 1/2, the polynomial fitted for relative error
// 9e-8 at its extremes, 7e-8 in the mean square with rounding. Exactly 0 below -126. Base 2,
// because the reduction is then exact and the caller's scale takes log2(e) in for nothing.
FXK_INLINE float exp2_of(float z) {
  constexpr float kMagic = 12582912.0f;  // 1.5 * 2^23: the sum's low bits are k
  const float shifted = z + kMagic;
  const float r = z - (shifted - kMagic);
  float p = 0x1.5bba14p-10f;
  p = p * r + 0x1.3cea88p-7f;
  p = p * r + 0x1.c6b752p-5f;
  p = p * r + 0x1.ebf9bcp-3f;
  p = p * r + 0x1.62e42ap-1f;
  p = p * r + 1.0f;
  // Adding k to the exponent field; a NaN has no low bits set, so it comes through.
  const float scaled = as_float(as_bits(p) + (as_bits(shifted) << 23));
  return z < -126.0f ? 0.0f : scaled;
}
// One degree more: what is left is rounding, and differs at random from class to class.
FXK_INLINE float exp2_closely(float z) {
  constexpr float kMagic = 12582912.0f;
  const float shifted = z + kMagic;
  const float r = z - (shifted - kMagic);
  float p = 0x1.41fbbcp-13f;
  p = p * r + 0x1.5f3e54p-10f;
  p = p * r + 0x1.3b2d4cp-7f;
  p = p * r + 0x1.c6aee8p-5f;
  p = p * r + 0x1.ebfbdcp-3f;
  p = p * r + 0x1.62e43p-1f;
  p = p * r + 1.0f;
  const float scaled = as_float(as_bits(p) + (as_bits(shifted) << 23));
  return z < -126.0f ? 0.0f : scaled;
}
FXK_INLINE double exp2_closely(double z) { return exp2(z); }
FXK_INLINE double exp2_of(double z) { return exp2(z); }

// log2 of a number that is not negative, -inf at 0 and wherever the number is not normal: the
// exponent, and a polynomial for the mantissa in [3/4, 3/2), off by 3e-8 of its value at most.
FXK_INLINE float log2_of(float x) {
  const uint32_t bits = as_bits(x);
  // The exponent that leaves a mantissa of at least 3/4.
  const int32_t k = (int32_t)(bits - 0x3f400000u) >> 23;
  const float t = as_float(bits - ((uint32_t)k << 23)) - 1.0f;
  float p = 0x1.3fe22ep-4f;
  p = p * t - 0x1.648c1p-3f;
  p = p * t + 0x1.bab882p-3f;
  p = p * t - 0x1.f10dbp-3f;
  p = p * t + 0x1.272014p-2f;
  p = p * t - 0x1.713baap-2f;
  p = p * t + 0x1.ec716ep-2f;
  p = p * t - 0x1.715494p-1f;
  p = p * t + 0x1.715476p+0f;
  const float value = p * t + (float)k;
  const float special = x > 0.0f ? value : -INFINITY;
  // Infinity and NaN keep their exponent of ones; below 2^-126 counts as 0.
  return x != x || x == INFINITY ? x : (x < 0x1p-126f ? -INFINITY : special);
}
FXK_INLINE double log2_of(double x) { return log2(x); }

FXK_INLINE float unless_zero(float p, float v) { return p == 0.0f ? 0.0f : v; }
FXK_INLINE double unless_zero(double p, double v) { return p == 0.0 ? 0.0 : v; }
FXK_INLINE float larger(float a, float b) { return a > b ? a : b; }
FXK_INLINE double larger(double a, double b) { return a > b ? a : b; }
FXK_INLINE float smaller(float a, float b) { return a < b ? a : b; }
FXK_INLINE double smaller(double a, double b) { return a < b ? a : b; }
FXK_INLINE float quotient(float a, float b) { return a / b; }
FXK_INLINE double quotient(double a, double b) { return a / b; }
FXK_INLINE float absolute(float v) { return v < 0.0f ? -v : v; }
FXK_INLINE double absolute(double v) { return v < 0.0 ? -v : v; }
FXK_INLINE float with_sign(float v, float of) { return of < 0.0f ? -v : of > 0.0f ? v : of; }
FXK_INLINE double with_sign(double v, double of) { return of < 0.0 ? -v : of > 0.0 ? v : of; }

#if defined(__AVX512F__)
// The same by hand: taking off the integer part and scaling by 2^it are single instructions here,
// which no scalar expression reaches. -inf has no fraction and scales to 0; above, it saturates to
// infinity. The fraction lies in [0, 1]; the polynomial is exact at both ends, so that a row's
// largest class has exactly 1.
FXK_INLINE __m512 exp2_of(__m512 z) {
  const __m512 r = _mm512_reduce_ps(z, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
  __m512 p = _mm512_set1_ps(0x1.eca6fp-10f);
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(0x1.269dfp-7f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(0x1.c9443ep-5f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(0x1.ebd89ep-3f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(0x1.62e4cap-1f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f));
  return _mm512_scalef_ps(p, z);
}
FXK_INLINE __m512 exp2_closely(__m512 z) {
  const __m512 r = _mm512_reduce_ps(z, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
  __m512 p = _mm512_set1_ps(0x1.c54188p-13f);
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(0x1.46d646p-10f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(0x1.3d0b92p-7f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(0x1.c68912p-5f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(0x1.ebfd58p-3f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(0x1.62e42cp-1f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f));
  return _mm512_scalef_ps(p, z);
}
// The exponent, and for the mantissa in [1, 2) the nearest of 16 reciprocals, looked up together
// with its logarithm; what is left is within 1/32 of 1. Off by 8e-8 at most. 0 gives -inf.
FXK_INLINE __m512 log2_of(__m512 x) {
  const __m512 reciprocal = _mm512_setr_ps(
      0x1.f07c2p-1f, 0x1.d41d42p-1f, 0x1.bacf92p-1f, 0x1.a41a42p-1f, 0x1.8f9c18p-1f, 0x1.7d05f4p-1f,
      0x1.6c16c2p-1f, 0x1.5c9882p-1f, 0x1.4e5e0ap-1f, 0x1.414142p-1f, 0x1.3521dp-1f, 0x1.29e412p-1f,
      0x1.1f7048p-1f, 0x1.15b1e6p-1f, 0x1.0c9714p-1f, 0x1.041042p-1f);
  const __m512 logarithm = _mm512_setr_ps(
      0x1.6bad2p-5f, 0x1.08c588p-3f, 0x1.acf5dep-3f, 0x1.24407ap-2f, 0x1.6e222p-2f, 0x1.b47ecp-2f,
      0x1.f7a854p-2f, 0x1.1bf314p-1f, 0x1.3abb4p-1f, 0x1.58482p-1f, 0x1.74b1fcp-1f, 0x1.900e62p-1f,
      0x1.aa708ep-1f, 0x1.c3e9cap-1f, 0x1.dc899ep-1f, 0x1.f45e06p-1f);
  const __m512i index = _mm512_srli_epi32(_mm512_castps_si512(x), 19);  // the mantissa's first bits
  const __m512 mantissa = _mm512_getmant_ps(x, _MM_MANT_NORM_1_2, _MM_MANT_SIGN_src);
  const __m512 r =
      _mm512_fmsub_ps(mantissa, _mm512_permutexvar_ps(index, reciprocal), _mm512_set1_ps(1.0f));
  __m512 p = _mm512_set1_ps(-0x1.7259e2p-2f);
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(0x1.ecc934p-2f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(-0x1.715464p-1f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(0x1.715476p+0f));
  p = _mm512_fmadd_ps(p, r, _mm512_permutexvar_ps(index, logarithm));
  return p + _mm512_getexp_ps(x);
}
FXK_INLINE __m512 unless_zero(__m512 p, __m512 v) {
  return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(p, _mm512_setzero_ps(), _CMP_NEQ_UQ), v);
}
FXK_INLINE __m512 larger(__m512 a, __m512 b) { return _mm512_max_ps(a, b); }
FXK_INLINE __m512 smaller(__m512 a, __m512 b) { return _mm512_min_ps(a, b); }
// To 2^-23 or so: an estimate and one Newton step, a quarter of the instruction's time.
FXK_INLINE __m512 quotient(__m512 a, __m512 b) {
  const __m512 estimate = _mm512_rcp14_ps(b);
  const __m512 error = _mm512_fnmadd_ps(b, estimate, _mm512_set1_ps(1.0f));
  return a * _mm512_fmadd_ps(estimate, error, estimate);
}
FXK_INLINE __m512 absolute(__m512 v) { return _mm512_abs_ps(v); }
FXK_INLINE __m512 with_sign(__m512 v, __m512 of) {
  const __m512 zero = _mm512_setzero_ps();
  const __m512 turned = _mm512_mask_sub_ps(v, _mm512_cmp_ps_mask(of, zero, _CMP_LT_OQ), zero, v);
  return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(of, zero, _CMP_NEQ_UQ), turned);
}
FXK_INLINE __m512 load16(const float* p) { return _mm512_loadu_ps(p); }
FXK_INLINE __m512 load16(const BFloat16* p) {
  const __m256i bits = _mm256_loadu_si256((const __m256i*)p);
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}
FXK_INLINE __m512 load16(const Float16* p) {
  return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
}
#endif

// Scratch of one kernel call, allocated before any parallel region so that a failure can throw.
class Scratch {
 public:
  explicit Scratch(size_t bytes) : data_(nullptr) {
    if (posix_memalign(&data_, 64, bytes ? bytes : 64) != 0) data_ = nullptr;
  }
  ~Scratch() { free(data_); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  bool ok() const { return data_ != nullptr; }
  template <class T>
  T* as(size_t byte_offset = 0) const {
    return reinterpret_cast<T*>(static_cast<char*>(data_) + byte_offset);
  }

 private:
  void* data_;
};

FXK_INLINE size_t align64(size_t bytes) { return (bytes + 63) & ~(size_t)63; }

// Threads worth waking for this much work: a region costs microseconds, and tens of milliseconds
// when the cores are taken, so small calls stay on the caller's thread.
FXK_INLINE int useful_threads(int threads, int64_t elements, int64_t tasks) {
  const int64_t by_work = elements / 16384;
  int64_t n = threads < by_work ? threads : by_work;
  n = n < tasks ? n : tasks;
  return n < 1 ? 1 : (int)n;
}

}  // namespace FXK_ISA
}  // namespace fxk
