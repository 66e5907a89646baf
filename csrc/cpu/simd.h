// What the CPU kernels share. Every function here is static: the same file is compiled once per
// ISA level, and the linker must never pick an AVX-512 copy for a baseline caller. For the same
// reason nothing from namespace std:: that could leave a weak symbol behind is used.
#pragma once
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "../ops.h"

#if defined(__AVX512F__)
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
#define FXK_BLOCK 512
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

// 2^z for z <= 0 (and NaN): 2^k * 2^r with |r| <= 1/2, the polynomial fitted for relative error
// 9e-8 at its extremes, 7e-8 in the mean square with rounding. Exactly 0 below -126. Base 2,
// because the reduction is then exact and the caller's scale takes log2(e) in for nothing.
FXK_INLINE float exp2_nonpositive(float z) {
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
FXK_INLINE double exp2_nonpositive(double z) { return exp2(z); }

#if defined(__AVX512F__)
// The same by hand: rounding to integer and scaling by 2^k are single instructions here, which no
// scalar expression reaches, and the second gives 0 on underflow and keeps NaN without a mask.
FXK_INLINE __m512 exp2_nonpositive(__m512 z) {
  z = _mm512_max_ps(_mm512_set1_ps(-1e3f), z);  // -inf has no fraction; a NaN is passed on
  const __m512 k = _mm512_roundscale_ps(z, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const __m512 r = _mm512_sub_ps(z, k);
  __m512 p = _mm512_set1_ps(0x1.5bba14p-10f);
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(0x1.3cea88p-7f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(0x1.c6b752p-5f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(0x1.ebf9bcp-3f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(0x1.62e42ap-1f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f));
  return _mm512_scalef_ps(p, k);
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
