// CUDA kernel source as a C++ program: what a kernel file sees in place of the CUDA headers when g++ compiles it.
//
// Every CUDA thread is a fiber (a stack and a saved stack pointer), and the fibers of one block take turns on one CPU
// thread: a fiber runs until it has to wait for others, in __syncthreads, __syncwarp, a shuffle or an mma. cuhost.cpp has
// the scheduler. What this buys over reading the code is that rules which a GPU does not check are checked here:
//
//   out-of-bounds access       AddressSanitizer; every buffer and every block's shared memory is a heap block of exactly
//                              the size that the host asked for
//   misaligned vector access   UndefinedBehaviorSanitizer, on the alignment of uint4 and its like
//   missing barrier            ThreadSanitizer: fibers are threads to it, and only __syncthreads, __syncwarp and the end
//                              of a launch order their accesses. Shuffles and mma do not, as in CUDA. Without it, several
//                              orders of warps, lanes and blocks (`seed`) change the result of most races
//   divergent collectives      lanes of a warp that wait in different places, a mask that names an exited lane, a barrier
//                              that not every thread reaches: an error with the place
//   uninitialised shared mem.  filled with a poison byte at the start of each block
//
// Not seen: what ptxas makes of the PTX, the GPU's weaker memory order between blocks, timing.
//
// Only what the kernels use is here; anything else is a compile error. Warp functions want the full mask.

#pragma once

#include <cstddef>
#include <cstdint>

#include <cmath>
#include <cstring>
#include <type_traits>

// NVIDIA's own headers compile with plain g++ and bring the exact conversions and the vector types.
#include <cuda_fp16.h>
#include <vector_functions.h>
#include <vector_types.h>

#undef __global__
#undef __device__
#undef __host__
#undef __forceinline__
#undef __launch_bounds__
#undef __restrict__
#undef __noinline__
#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __restrict__ __restrict
#define __noinline__

// set by the scheduler before a fiber runs on
extern uint3 threadIdx;
extern uint3 blockIdx;
extern dim3  blockDim;
extern dim3  gridDim;

constexpr int warpSize = 32;

namespace cuhost {

constexpr uint32_t FULL_MASK = 0xffffffff;

struct settings {
    uint32_t seed   = 0;     // 0: threads and blocks in ascending order, 1: descending, else a random order of each
    uint8_t  poison = 0xff;  // what shared memory holds at the start of a block; 0xff... is a NaN and -1
};

extern settings config;

// Runs body(arg) once in every thread of the grid, block after block; returns when all are done. An early launch is one with
// programmatic stream serialization: it may begin while the grid before it still runs, and sees what that wrote only after
// wait_for_previous_grid(). It does not really run earlier here, but ThreadSanitizer knows no other order.
enum class start { in_order, early };

void launch(dim3 grid, dim3 block, size_t shared_bytes, start when, void (*body)(void *), void * arg);

template <class F> void launch(dim3 grid, dim3 block, size_t shared_bytes, F body, start when = start::in_order) {
    launch(grid, block, shared_bytes, when, [](void * f) { (*(F *) f)(); }, &body);
}

void wait_for_previous_grid();  // in a kernel: griddepcontrol.wait

void synchronize();  // on the host, before it reads what kernels wrote

// Dynamic shared memory of the block that runs.
char * shared_memory();

// Where an access may go, for code that checks it itself (the translated PTX does; a kernel's source has AddressSanitizer).
// The host declares its buffers; shared memory is known. They stay valid until forget_buffers().
void declare_buffer(const void * data, size_t size, bool writable);
void forget_buffers();
void check_access(const void * address, size_t size, bool write);

// Prints what happened, in which block and thread, and aborts.
[[noreturn]] void fail(const char * what);

// Collectives. All lanes of the warp must arrive at the same one.
enum class collective { none, syncwarp, shuffle, vote, mma_u8s8_m16n8k32, mma_u8s8_m8n8k16, mma_f16_m16n8k16, mma_f16_m16n8k8 };

constexpr int SLOTS = 6;  // 32-bit registers that a lane can show to the others

// Shows `n` registers to the other lanes and waits for them. The result, [lane][SLOTS], stays valid until the next but one
// collective of this warp.
const uint32_t (* exchange(uint32_t mask, collective op, const uint32_t * registers, int n))[SLOTS];

void sync_warp(uint32_t mask);
void sync_block();

inline int lane() {
    return (int) (threadIdx.x % warpSize);
}

template <class T, class Source> T shuffle(uint32_t mask, T value, int width, Source source) {
    static_assert(sizeof(T) % 4 == 0 && sizeof(T) <= 4*SLOTS, "a shuffle moves 32-bit registers");
    if (width <= 0 || width > warpSize || (width & (width - 1)) != 0) {
        fail("shuffle with a width that is no power of two up to 32");
    }
    uint32_t registers[SLOTS];
    memcpy(registers, &value, sizeof(T));
    const auto shown = exchange(mask, collective::shuffle, registers, sizeof(T)/4);
    memcpy(&value, shown[source(lane())], sizeof(T));
    return value;
}

// d = a*b + c on the tensor core; the fragments are laid out as the PTX ISA describes
void mma_u8s8_m16n8k32(int (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);
void mma_u8s8_m8n8k16(int (&c)[2], uint32_t a, uint32_t b);
void mma_f16_m16n8k16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);
void mma_f16_m16n8k8(float (&c)[4], const uint32_t (&a)[2], const uint32_t (&b)[1]);

} // namespace cuhost

inline void __syncthreads() {
    cuhost::sync_block();
}

inline void __syncwarp(unsigned mask = cuhost::FULL_MASK) {
    cuhost::sync_warp(mask);
}

template <class T> T __shfl_sync(unsigned mask, T v, int source, int width = 32) {
    return cuhost::shuffle(mask, v, width, [=](int l) { return (l & ~(width - 1)) | (source & (width - 1)); });
}

template <class T> T __shfl_xor_sync(unsigned mask, T v, int bits, int width = 32) {
    return cuhost::shuffle(mask, v, width, [=](int l) {
        const int s = l ^ bits;
        return s < (l & ~(width - 1)) + width ? s : l;
    });
}

template <class T> T __shfl_down_sync(unsigned mask, T v, unsigned delta, int width = 32) {
    return cuhost::shuffle(mask, v, width, [=](int l) { return (l & (width - 1)) + (int) delta < width ? l + (int) delta : l; });
}

template <class T> T __shfl_up_sync(unsigned mask, T v, unsigned delta, int width = 32) {
    return cuhost::shuffle(mask, v, width, [=](int l) { return (l & (width - 1)) >= (int) delta ? l - (int) delta : l; });
}

inline unsigned __ballot_sync(unsigned mask, int predicate) {
    const uint32_t mine  = predicate != 0;
    const auto     shown = cuhost::exchange(mask, cuhost::collective::vote, &mine, 1);
    unsigned ballot = 0;
    for (int l = 0; l < warpSize; ++l) {
        ballot |= shown[l][0] << l;
    }
    return ballot;
}

inline int __any_sync(unsigned mask, int predicate) {
    return __ballot_sync(mask, predicate) != 0;
}

inline int __all_sync(unsigned mask, int predicate) {
    return __ballot_sync(mask, predicate) == cuhost::FULL_MASK;
}

// The cache hints make no difference to the value. The load is a plain one, which UBSan checks for alignment.
template <class T> T __ldg (const T * p) { return *p; }
template <class T> T __ldca(const T * p) { return *p; }
template <class T> T __ldcg(const T * p) { return *p; }
template <class T> T __ldcs(const T * p) { return *p; }
template <class T> T __ldlu(const T * p) { return *p; }
template <class T> T __ldcv(const T * p) { return *p; }
template <class T> void __stcs(T * p, T v) { *p = v; }
template <class T> void __stcg(T * p, T v) { *p = v; }

inline int __dp4a(int a, int b, int c) {
    for (int i = 0; i < 4; ++i) {
        c = (int) ((unsigned) c + (unsigned) ((int8_t) (a >> 8*i) * (int8_t) (b >> 8*i)));
    }
    return c;
}

inline unsigned __dp4a(unsigned a, unsigned b, unsigned c) {
    for (int i = 0; i < 4; ++i) {
        c += (uint8_t) (a >> 8*i) * (uint8_t) (b >> 8*i);
    }
    return c;
}

// three bits of each nibble of the selector pick one of eight bytes
inline unsigned __byte_perm(unsigned a, unsigned b, unsigned selector) {
    const uint64_t bytes  = (uint64_t) b << 32 | a;
    unsigned       result = 0;
    for (int i = 0; i < 4; ++i) {
        result |= ((unsigned) (bytes >> 8*(selector >> 4*i & 7)) & 0xff) << 8*i;
    }
    return result;
}

inline int __popc(unsigned x) {
    return __builtin_popcount(x);
}

template <class To, class From> To cuhost_bits(From v) {
    static_assert(sizeof(To) == sizeof(From), "");
    To t;
    memcpy(&t, &v, sizeof(t));
    return t;
}

inline int      __float_as_int (float v)    { return cuhost_bits<int>(v); }
inline unsigned __float_as_uint(float v)    { return cuhost_bits<unsigned>(v); }
inline float    __int_as_float (int v)      { return cuhost_bits<float>(v); }
inline float    __uint_as_float(unsigned v) { return cuhost_bits<float>(v); }

// cvt.*.s32.f32: beyond the range of int the nearest end of it, NaN gives 0
inline int cuhost_to_int(float rounded) {
    if (rounded != rounded) {
        return 0;
    }
    return rounded >= 2147483648.0f ? INT32_MAX : rounded < -2147483648.0f ? INT32_MIN : (int) rounded;
}

inline int __float2int_rn(float v) { return cuhost_to_int(nearbyintf(v)); }
inline int __float2int_rz(float v) { return cuhost_to_int(truncf(v)); }

inline float __int2float_rn(int v) { return (float) v; }

inline float __fdividef(float a, float b) { return a/b; }
inline float __frcp_rn(float v)           { return 1.0f/v; }
inline float __fmul_rn(float a, float b)  { return a*b; }
inline float __fadd_rn(float a, float b)  { return a + b; }

template <class T> typename std::enable_if<std::is_integral<T>::value, T>::type min(T a, T b) { return b < a ? b : a; }
template <class T> typename std::enable_if<std::is_integral<T>::value, T>::type max(T a, T b) { return a < b ? b : a; }
