// Runs a CUDA kernel's source on the CPU, for tests: a block's threads are fibres of one OS thread,
// resumed in a fixed order and stopped at every barrier and warp collective. It finds what a GPU
// would pass over in silence: a barrier or a collective that not every thread reaches (an error), a
// barrier that is missing (the other order gives another result), memory read before it is written
// (shared memory starts as NaN). Blocks run one after the other; speed and the memory model are not
// emulated.
#pragma once
#include <math.h>
#include <stdint.h>
#include <string.h>

#include <algorithm>
#include <functional>
#include <map>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "../cpu/simd.h"

// Stack switching by hand takes a tenth of the time; the sanitizers know only the portable form.
#if !defined(__x86_64__) && !defined(FXK_EMULATOR_UCONTEXT)
#define FXK_EMULATOR_UCONTEXT
#endif
#if defined(FXK_EMULATOR_UCONTEXT)
#include <ucontext.h>
#endif

namespace fxk {
namespace emulator {

constexpr int kWarp = 32;
constexpr size_t kStack = 256 << 10;

struct Dim {
  unsigned x = 1;
  Dim() = default;
  Dim(unsigned x_) : x(x_) {}
};

// What a test may set.
struct Device {
  int multiprocessors = 2;
  bool reversed = false;  // the last warp and the last lane go first
};
inline Device device;

#if defined(FXK_EMULATOR_UCONTEXT)
struct Context {
  ucontext_t state;
};
inline void switch_to(Context* from, Context* to) { swapcontext(&from->state, &to->state); }
inline void prepare(Context* c, char* stack, void (*entry)()) {
  getcontext(&c->state);
  c->state.uc_stack.ss_sp = stack;
  c->state.uc_stack.ss_size = kStack;
  c->state.uc_link = nullptr;
  makecontext(&c->state, entry, 0);
}
#else
struct Context {
  void* stack;
};
// The registers that a call must preserve go to the old stack and come from the new one.
__attribute__((naked, noinline)) static void switch_to(Context*, Context*) {
  asm("pushq %rbp\n pushq %rbx\n pushq %r12\n pushq %r13\n pushq %r14\n pushq %r15\n"
      "movq %rsp, (%rdi)\n movq (%rsi), %rsp\n"
      "popq %r15\n popq %r14\n popq %r13\n popq %r12\n popq %rbx\n popq %rbp\n ret\n");
}
inline void prepare(Context* c, char* stack, void (*entry)()) {
  void** top = (void**)((uintptr_t)(stack + kStack) & ~(uintptr_t)15);
  top -= 2;  // `entry` begins as after a call: the stack off by one word from 16 bytes
  *top = (void*)entry;
  c->stack = top - 6;
}
#endif

enum Wait { kReady, kCollective, kBarrier, kDone };

struct Fibre {
  Context context;
  Wait wait;
  const char* what;  // the collective waited at, its line in the source and its lanes
  int line;
  unsigned mask;
  int source;  // lane read from; -1: a vote
  uint64_t value, result;
};

// One block in flight on this OS thread.
struct Block {
  Context scheduler;
  std::vector<Fibre> fibres;
  std::function<void()> kernel;
  int current;
  std::map<const void*, std::vector<uint64_t>> shared;  // by the type that names the variable
  std::vector<uint64_t> dynamic;
};
inline thread_local Block block;
inline thread_local std::vector<std::unique_ptr<char[]>> stacks;
inline thread_local Dim thread_index, block_index, block_dim, grid_dim;

[[noreturn]] inline void fail(int thread, const std::string& why) {
  throw std::runtime_error("emulator: block " + std::to_string(block_index.x) + ", thread " +
                           std::to_string(thread) + ": " + why);
}

inline std::string place(const Fibre& f) {
  if (f.wait == kDone) return "has returned";
  return "waits in " + std::string(f.what) + " at line " + std::to_string(f.line);
}

inline void entry() {
  block.kernel();
  Fibre& self = block.fibres[(size_t)block.current];
  self.wait = kDone;
  switch_to(&self.context, &block.scheduler);
}

inline Fibre& stop(Wait wait, const char* what, int line, unsigned mask) {
  Fibre& self = block.fibres[(size_t)block.current];
  self.wait = wait;
  self.what = what;
  self.line = line;
  self.mask = mask;
  return self;
}
inline void yield(Fibre& self) { switch_to(&self.context, &block.scheduler); }

// All lanes of a mask have met at the same line: hand each what it asked for.
inline void complete(Fibre* warp, int lanes, int first, int lane) {
  const Fibre asked = warp[lane];
  uint64_t votes = 0;
  for (int k = 0; k < kWarp; ++k) {
    if (!(asked.mask >> k & 1)) continue;
    if (k >= lanes) fail(first + lane, "a mask with lanes that the block does not have");
    const Fibre& other = warp[k];
    if (other.wait != kCollective || other.line != asked.line || other.mask != asked.mask)
      fail(first + lane, place(asked) + " for lane " + std::to_string(k) + ", which " +
                             place(other) + ": divergent collective");
    if (other.value) votes |= (uint64_t)1 << k;
  }
  for (int k = 0; k < lanes; ++k) {
    if (!(asked.mask >> k & 1)) continue;
    const int source = warp[k].source;
    if (source >= 0 && !(asked.mask >> source & 1))
      fail(first + k, "a shuffle from lane " + std::to_string(source) + ", outside the mask");
    warp[k].result = source < 0 ? votes : warp[source].value;
    warp[k].wait = kReady;
  }
}

// Runs a warp until all of it has returned or waits at the block's barrier.
inline void run_warp(int first, int lanes) {
  Fibre* warp = &block.fibres[(size_t)first];
  for (;;) {
    int collective = -1;
    for (int i = 0; i < lanes; ++i) {
      const int lane = device.reversed ? lanes - 1 - i : i;
      if (warp[lane].wait == kReady) {
        block.current = first + lane;
        thread_index = Dim((unsigned)block.current);
        switch_to(&block.scheduler, &warp[lane].context);
      }
      if (warp[lane].wait == kCollective) collective = lane;
    }
    if (collective < 0) return;
    complete(warp, lanes, first, collective);
  }
}

inline void run_block(int threads) {
  block.fibres.assign((size_t)threads, Fibre{});
  for (int i = 0; i < threads; ++i) {
    if ((int)stacks.size() <= i) stacks.emplace_back(new char[kStack]);
    memset(stacks[(size_t)i].get(), 0xCD, 16);  // overwritten when the stack runs over
    prepare(&block.fibres[(size_t)i].context, stacks[(size_t)i].get(), entry);
  }
  block.shared.clear();
  const int warps = (threads + kWarp - 1) / kWarp;
  for (int waiting = 1; waiting;) {
    for (int i = 0; i < warps; ++i) {
      const int first = kWarp * (device.reversed ? warps - 1 - i : i);
      run_warp(first, std::min(kWarp, threads - first));
    }
    waiting = 0;
    for (int i = 0; i < threads; ++i) waiting += block.fibres[(size_t)i].wait == kBarrier;
    if (waiting == 0) break;
    for (int i = 0; i < threads; ++i) {
      const Fibre &f = block.fibres[(size_t)i], &one = block.fibres[0];
      if (f.wait != one.wait || f.line != one.line)
        fail(i, place(f) + " while thread 0 " + place(one) + ": partial barrier");
    }
    for (Fibre& f : block.fibres) f.wait = kReady;
  }
  for (int i = 0; i < threads; ++i)
    for (int k = 0; k < 16; ++k)
      if ((unsigned char)stacks[(size_t)i][(size_t)k] != 0xCD) fail(i, "stack overflow");
}

inline void launch(Dim grid, Dim threads, size_t bytes, std::function<void()> kernel) {
  block.kernel = std::move(kernel);
  grid_dim = grid;
  block_dim = threads;
  for (unsigned b = 0; b < grid.x; ++b) {
    block_index = Dim(b);
    block.dynamic.assign(bytes / 8 + 1, ~(uint64_t)0);
    run_block((int)threads.x);
  }
}

template <class T, class Name>
T& shared() {
  static const char name = 0;
  auto& words = block.shared[&name];
  if (words.empty()) words.assign(sizeof(T) / 8 + 1, ~(uint64_t)0);
  return *reinterpret_cast<T*>(words.data());
}

template <class T>
T collective(const char* what, unsigned mask, int source, T value, int line) {
  static_assert(sizeof(T) <= 8, "as the hardware's shuffles");
  Fibre& self = stop(kCollective, what, line, mask);
  self.source = source;
  self.value = 0;
  memcpy(&self.value, &value, sizeof value);
  yield(self);
  memcpy(&value, &self.result, sizeof value);
  return value;
}

inline int lane() { return block.current % kWarp; }

}  // namespace emulator
}  // namespace fxk

// CUDA's names, as far as the kernels use them.
#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __noinline__ __attribute__((noinline, unused))
#define __launch_bounds__(...)
#define __restrict__
#define threadIdx fxk::emulator::thread_index
#define blockIdx fxk::emulator::block_index
#define blockDim fxk::emulator::block_dim
#define gridDim fxk::emulator::grid_dim

inline void __syncthreads(int line = __builtin_LINE()) {
  namespace e = fxk::emulator;
  e::yield(e::stop(e::kBarrier, "__syncthreads", line, 0));
}
inline void __syncwarp(unsigned mask = ~0u, int line = __builtin_LINE()) {
  fxk::emulator::collective("__syncwarp", mask, -1, 0, line);
}
template <class T>
T __shfl_sync(unsigned mask, T value, int source, int line = __builtin_LINE()) {
  return fxk::emulator::collective("__shfl_sync", mask, source & 31, value, line);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int with, int line = __builtin_LINE()) {
  const int source = fxk::emulator::lane() ^ with;
  return fxk::emulator::collective("__shfl_xor_sync", mask, source, value, line);
}
inline unsigned __ballot_sync(unsigned mask, int vote, int line = __builtin_LINE()) {
  return fxk::emulator::collective<unsigned>("__ballot_sync", mask, -1, vote != 0, line);
}
inline void __threadfence() {}
inline int __ffs(int v) { return __builtin_ffs(v); }
inline int __popc(unsigned v) { return __builtin_popcount(v); }
template <class T>
T atomicAdd(T* at, T value) {
  const T before = *at;
  *at += value;
  return before;
}
// The emulator is compiled so that nothing is contracted.
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline double __dadd_rn(double a, double b) { return a + b; }
inline double __dsub_rn(double a, double b) { return a - b; }
inline double __dmul_rn(double a, double b) { return a * b; }

using __nv_bfloat16 = fxk::baseline::BFloat16;
using __half = fxk::baseline::Float16;
inline float __bfloat162float(__nv_bfloat16 v) { return fxk::baseline::load(&v); }
inline float __half2float(__half v) { return fxk::baseline::load(&v); }
inline __nv_bfloat16 __float2bfloat16_rn(float v) {
  __nv_bfloat16 r;
  fxk::baseline::store(&r, v);
  return r;
}
inline __half __float2half_rn(float v) {
  __half r;
  fxk::baseline::store(&r, v);
  return r;
}
struct __nv_bfloat162 {
  __nv_bfloat16 x, y;
};
struct __half2 {
  __half x, y;
};
struct float2 {
  float x, y;
};
inline __nv_bfloat162 __floats2bfloat162_rn(float a, float b) {
  return {__float2bfloat16_rn(a), __float2bfloat16_rn(b)};
}
inline __half2 __floats2half2_rn(float a, float b) {
  return {__float2half_rn(a), __float2half_rn(b)};
}
inline float2 __half22float2(__half2 v) { return {__half2float(v.x), __half2float(v.y)}; }
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
inline float __log2f(float x) { return log2f(x); }

// The runtime: one device, nothing to select, launches that have ended when they return.
using cudaStream_t = void*;
using cudaError_t = int;
constexpr cudaError_t cudaSuccess = 0;
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount };
inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
inline cudaError_t cudaSetDevice(int device) { return device == 0 ? cudaSuccess : 101; }
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) {
  *value = fxk::emulator::device.multiprocessors;
  return cudaSuccess;
}
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t) { return "invalid device ordinal"; }

#define FXK_SHARED(type, name) \
  struct name##_name {};       \
  type& name = fxk::emulator::shared<type, name##_name>()
#define FXK_DYNAMIC_SHARED(name) \
  unsigned char* name = reinterpret_cast<unsigned char*>(fxk::emulator::block.dynamic.data())
#define FXK_LAUNCH(kernel, grid, threads, bytes, stream, ...)                            \
  ((void)(stream), fxk::emulator::launch((unsigned)(grid), (unsigned)(threads), (bytes), \
                                         [=] { kernel(__VA_ARGS__); }))
