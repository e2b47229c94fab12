#pragma once

//
// Products with signs on CUDA: out[t][r] = s_out[r] * sum_i W[r][i]*v[t][i],  v = s_in*x,  W = +1 or -1, one bit each.
//
// Numbers. v is rounded to 16-bit integers with one scale, v ~ d*q, and q is kept as two planes of bytes, q = 256*hi + lo.
// With w the bits of a row (1 = +1, 0 = -1)
//
//     sum_i W[i]*v[i] = d*sum (2*w - 1)*q = d*(2*S - sum q),    S = 256*sum w*hi + sum w*lo
//
// so that all work is in sums of bytes over set bits, which the int8 tensor cores (or dp4a) do exactly. One plane with one
// scale would be half the work, and too coarse: the factors multiply the rounding errors of both products.
//
// Signs to bytes. With m_j = 0x01010101 << j, the word & m_j is four bytes, the bits j, j+8, j+16 and j+24, each times 2^j.
// That is one instruction for four signs, and needs no shift back to 0 and 1: the sums for each j are kept apart, and the end
// takes sum_j acc_j >> j, which is exact because acc_j is a multiple of 2^j. Odd bits use the masks of the even ones on
// word >> 1: one shift for a whole word, and half the accumulators. The inputs are laid out to match: a word's 32 values are
// 8 registers, register j holds the bytes of the values j, j+8, j+16, j+24.
//
// Fragments. A warp multiplies 16 rows, a tile, with up to 8 columns; lane = 4*g + t holds the rows g and g+8, and of 16 words,
// a step, the words 4t..4t+3: one load of 16 bytes for each row. m16n8k32 wants of A, B and C (k is summed over, so any
// order will do that is the same in A and B):
//
//            k = 0..15    k = 16..31           columns
//     row g    a0 of t      a2 of t       b0, b1 of (t, column g)      c0 c1: row g,   columns 2t, 2t+1
//     row g+8  a1 of t      a3 of t                                    c2 c3: row g+8, columns 2t, 2t+1
//
//     a0 = word of row g & m_2i, a2 = (word >> 1) & m_2i;   b0, b1 = registers 2i and 2i+1 of the word
//
// which takes four instructions for a word, i = 0..3. mma wants b0 and b1 in neighbouring registers, and there a load of 16
// bytes, the registers 0..3 or 4..7, puts them.
//
// Column 2*token is the plane hi of that token and 2*token + 1 the plane lo, so that lane t holds both sums of token t.
// 4 ANDs and one mma for 512 signs and both planes; sm_75 needs four of its m8n8k16 for it.
//

#include "dbf-launch.h"

#ifdef DBF_ON_CPU // tests compile this file as C++, see tests/cuda
#include "cuhost.h"
#define DBF_SHARED(type, name) type * name = (type *) cuhost::shared_memory()
#define DBF_UNROLL
#else
#include <cuda_fp16.h>
#define DBF_SHARED(type, name) extern __shared__ uint4 dbf_shared_memory[]; type * name = (type *) dbf_shared_memory
#define DBF_UNROLL _Pragma("unroll")
#endif

#define DBF_QMAX     (127*256 + 127)
#define DBF_TINY     1e-30f      // a vector below is zero: 1/d would overflow
#define DBF_INFINITY 0x7f800000u // |v| as an integer from here on: infinity or NaN

// Code is compiled for every architecture of a build; a kernel is empty where it is never launched.
#if defined(DBF_ON_CPU) || __CUDA_ARCH__ >= 750
#define DBF_HAS_MMA true
#else
#define DBF_HAS_MMA false
#endif

// ---- tensor cores

// c += a*b, a u8 [16 x 32], b s8 [32 x 8]
static __device__ __forceinline__ void dbf_mma_q8(int (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#if defined(DBF_ON_CPU)
    cuhost::mma_u8s8_m16n8k32(c, a, b);
#elif __CUDA_ARCH__ >= 800
    asm("mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#elif __CUDA_ARCH__ >= 750
    DBF_UNROLL
    for (int k = 0; k < 2; ++k) {     // halves of k
        DBF_UNROLL
        for (int r = 0; r < 2; ++r) { // halves of the rows
            asm("mma.sync.aligned.m8n8k16.row.col.s32.u8.s8.s32 {%0, %1}, {%2}, {%3}, {%0, %1};"
                : "+r"(c[2*r]), "+r"(c[2*r + 1]) : "r"(a[2*k + r]), "r"(b[k]));
        }
    }
#endif
}

// c += a*b, a [16 x 16], b [16 x 8] in fp16; a0 a1 b0 and a2 a3 b1 are the halves of k
static __device__ __forceinline__ void dbf_mma_f16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#if defined(DBF_ON_CPU)
    cuhost::mma_f16_m16n8k16(c, a, b);
#elif __CUDA_ARCH__ >= 800
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#elif __CUDA_ARCH__ >= 750
    DBF_UNROLL
    for (int k = 0; k < 2; ++k) {
        asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
            : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a[2*k]), "r"(a[2*k + 1]), "r"(b[k]));
    }
#endif
}

// c += four products of signed bytes
static __device__ __forceinline__ int dbf_dp4a(uint32_t a, uint32_t b, int c) {
#if defined(DBF_ON_CPU) || __CUDA_ARCH__ >= 610
    return __dp4a((int) a, (int) b, c);
#else
    return c;
#endif
}

// ---- launches that overlap

// From sm_90 on a kernel may be launched while the one before it still runs ("programmatic dependent launch", which ggml uses
// for its own kernels). What does not depend on that one is loaded before this wait: the signs, weights that no kernel writes. All else comes behind.
static __device__ __forceinline__ void dbf_wait_for_previous_kernel() {
#if defined(DBF_ON_CPU)
    cuhost::wait_for_previous_grid();
#elif __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

static __device__ __forceinline__ void dbf_let_next_kernel_start() {
#if !defined(DBF_ON_CPU) && __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// ---- small things

static __device__ __forceinline__ uint32_t dbf_get(const uint4 & v, int i) {
    return i == 0 ? v.x : i == 1 ? v.y : i == 2 ? v.z : v.w;
}

// A scale as it is stored, so that nothing waits for its load before it must
static __device__ __forceinline__ uint32_t dbf_load_scale(const void * s, dbf_scale_type type, int64_t i) {
    return type == DBF_SCALE_F16 ? ((const uint16_t *) s)[i] : ((const uint32_t *) s)[i];
}

static __device__ __forceinline__ float dbf_scale_of(uint32_t stored, dbf_scale_type type) {
    const __half_raw half = { (uint16_t) stored };
    return type == DBF_SCALE_F16 ? __half2float(__half(half)) : __uint_as_float(stored);
}

static __device__ __forceinline__ float dbf_scale(const void * s, dbf_scale_type type, int64_t i) {
    return dbf_scale_of(dbf_load_scale(s, type, i), type);
}

static __device__ __forceinline__ int dbf_warp_sum(int v) {
    DBF_UNROLL
    for (int bits = 16; bits > 0; bits >>= 1) {
        v += __shfl_xor_sync(0xffffffff, v, bits);
    }
    return v;
}

static __device__ __forceinline__ uint32_t dbf_warp_max(uint32_t v) {
    DBF_UNROLL
    for (int bits = 16; bits > 0; bits >>= 1) {
        const uint32_t other = __shfl_xor_sync(0xffffffff, v, bits);
        v = v > other ? v : other;
    }
    return v;
}

// A row that the matrix does not have is the last one again: its result is dropped, and no load needs a condition.
static __device__ __forceinline__ const uint32_t * dbf_row(const dbf_args & args, int row) {
    return (const uint32_t *) ((const char *) args.signs + (int64_t) min(row, args.rows - 1)*(4*args.n_words));
}

// The words 4t..4t+3 of a step of a row. Behind its end any signs will do, because the input is 0 there; the last ones are
// read again, and never a byte outside.
// VECTOR: words in a load. 4 wants rows of a multiple of 16 bytes, 1 fits all.
// ONCE: the signs are read exactly once, so they must not evict from the L2 cache what every block reads, the input.
template <int VECTOR, bool ONCE>
static __device__ __forceinline__ uint4 dbf_load_signs(const uint32_t * row, int n_words, int step, int t) {
    const int first = step*DBF_STEP_WORDS + 4*t;
    const int last  = n_words - VECTOR;
    const auto at = [&](int i) { return row + min(first + i, last); };

    if (VECTOR == 4) {
        const uint4 * p = (const uint4 *) at(0);
        return ONCE ? __ldcs(p) : *p;
    }
    const auto word = [](const uint32_t * p) { return ONCE ? __ldcs(p) : *p; };
    return make_uint4(word(at(0)), word(at(1)), word(at(2)), word(at(3)));
}

// ---- rounding the input

// v[j] = input i + j of a token, i a multiple of 4
static __device__ __forceinline__ void dbf_load_values(const dbf_args & args, int64_t token, int64_t i, float (&v)[4]) {
    const float * x = args.x + token*args.x_stride + i;
    if (args.x_vector) {
        const float4 f = *(const float4 *) x;
        v[0] = f.x; v[1] = f.y; v[2] = f.z; v[3] = f.w;
    } else {
        DBF_UNROLL
        for (int j = 0; j < 4; ++j) {
            v[j] = x[j];
        }
    }
}

// The stored scales of the inputs i to i + 3, i a multiple of 4; only where there are scales
static __device__ __forceinline__ uint4 dbf_load_scales(const dbf_args & args, int64_t i) {
    if (!args.x_vector) {
        const auto load = [&](int j) { return dbf_load_scale(args.s_in, args.s_in_type, i + j); };
        const uint4 s = make_uint4(load(0), load(1), load(2), load(3));
        return args.s_in_type == DBF_SCALE_F16 ? make_uint4(s.x | s.y << 16, s.z | s.w << 16, 0, 0) : s;
    }
    if (args.s_in_type == DBF_SCALE_F16) {
        const uint2 s = *(const uint2 *) ((const uint16_t *) args.s_in + i);
        return make_uint4(s.x, s.y, 0, 0);
    }
    return *(const uint4 *) ((const float *) args.s_in + i);
}

// v[j] *= the j-th of four stored scales, where there are scales
static __device__ __forceinline__ void dbf_multiply(const dbf_args & args, const uint4 & scales, float (&v)[4]) {
    if (args.s_in_type == DBF_SCALE_F16) {
        const float2 lo = __half22float2(*(const __half2 *) &scales.x);
        const float2 hi = __half22float2(*(const __half2 *) &scales.y);
        v[0] *= lo.x; v[1] *= lo.y; v[2] *= hi.x; v[3] *= hi.y;
    } else if (args.s_in_type == DBF_SCALE_F32) {
        v[0] *= __uint_as_float(scales.x); v[1] *= __uint_as_float(scales.y);
        v[2] *= __uint_as_float(scales.z); v[3] *= __uint_as_float(scales.w);
    }
}

// Half a word: v[b][j] = value 8*b + 4*half + j of the word, for the registers 4*half + j. Missing words are 0.
static __device__ __forceinline__ void dbf_load_input(const dbf_args & args, int64_t token, int word, int half, float (&v)[4][4]) {
    const bool there = word < args.n_words;

    DBF_UNROLL
    for (int b = 0; b < 4; ++b) {
        if (there) {
            dbf_load_values(args, token, (int64_t) word*DBF_WORD + 8*b + 4*half, v[b]);
        } else {
            v[b][0] = v[b][1] = v[b][2] = v[b][3] = 0.0f;
        }
    }
    if (!there || args.s_in_type == DBF_SCALE_NONE) {
        return;
    }
    DBF_UNROLL
    for (int b = 0; b < 4; ++b) {
        dbf_multiply(args, dbf_load_scales(args, (int64_t) word*DBF_WORD + 8*b + 4*half), v[b]);
    }
}

// The largest |v| as an integer: the bits of floats without a sign order like integers, with infinity and NaN on top, so
// that one maximum sees everything.
static __device__ __forceinline__ uint32_t dbf_largest(const float (&v)[4], uint32_t largest) {
    DBF_UNROLL
    for (int j = 0; j < 4; ++j) {
        const uint32_t bits = __float_as_uint(v[j]) & 0x7fffffffu;
        largest = largest > bits ? largest : bits;
    }
    return largest;
}

// d of a vector, and 1/d; a NaN or an infinity makes all results NaN, as in a dense product
static __device__ __forceinline__ float dbf_step_size(uint32_t largest, float & inverse) {
    const float amax = __uint_as_float(largest);
    inverse = 0.0f;
    if (largest >= DBF_INFINITY) {
        return __uint_as_float(0x7fc00000u);
    }
    if (amax < DBF_TINY) {
        return 0.0f;
    }
    const float d = amax*(1.0f/DBF_QMAX);
    inverse = 1.0f/d; // and not DBF_QMAX/amax: fast division makes 0 of it for amax above 2^126
    return d;
}

// Both bytes of four values. inverse = 0 stands for a vector of zeros, or one that is not finite.
static __device__ __forceinline__ void dbf_round_four(const float (&v)[4], float inverse, uint32_t & hi, uint32_t & lo) {
    if (!(inverse > 0.0f)) {
        hi = lo = 0;
        return;
    }
    uint32_t q[4], r[4]; // lo = byte 0 of q, as a signed one; hi = byte 1 of q + 128, to make up for its sign
    DBF_UNROLL
    for (int i = 0; i < 4; ++i) {
        // adding 1.5*2^23 leaves the nearest integer in the low bits, at the rate of additions and not of conversions
        q[i] = __float_as_uint(fmaf(v[i], inverse, 12582912.0f));
        r[i] = q[i] + 128;
    }
    lo = __byte_perm(__byte_perm(q[0], q[1], 0x0040), __byte_perm(q[2], q[3], 0x0040), 0x5410);
    hi = __byte_perm(__byte_perm(r[0], r[1], 0x0051), __byte_perm(r[2], r[3], 0x0051), 0x5410);
}

// Four registers of each plane, and what they add to the planes' sums
static __device__ __forceinline__ void dbf_round_q8(const float (&v)[4][4], float inverse, uint4 & hi, uint4 & lo, int & sum_hi, int & sum_lo) {
    uint32_t h[4], l[4];
    DBF_UNROLL
    for (int j = 0; j < 4; ++j) {
        const float octets[4] = { v[0][j], v[1][j], v[2][j], v[3][j] };
        dbf_round_four(octets, inverse, h[j], l[j]);
        sum_hi = dbf_dp4a(h[j], 0x01010101u, sum_hi);
        sum_lo = dbf_dp4a(l[j], 0x01010101u, sum_lo);
    }
    hi = make_uint4(h[0], h[1], h[2], h[3]);
    lo = make_uint4(l[0], l[1], l[2], l[3]);
}

// ---- one token

// Where the registers 4*half..4*half+3 of a plane of word `word` of a step are, in uint4. The 8 lanes that read them together,
// two columns and four t, read 128 bytes in a row: all banks once.
static __device__ __forceinline__ int dbf_plane_at(int step, int word, int half, int plane) {
    return (((step*4 + word%4)*2 + half)*4 + word/4)*2 + plane;
}

// What a lane rounds of a step for one token: four times four values in a row, the c-th at dbf_slice_at(lane, c). Eight lanes
// load a word, 128 bytes. The words that a warp takes together are those whose planes lie in different banks.
static __device__ __forceinline__ int dbf_slice_word(int lane, int c) {
    return (c + lane/8)%4*4 + lane/8;
}

static __device__ __forceinline__ int64_t dbf_slice_at(int lane, int c) {
    return dbf_slice_word(lane, c)*DBF_WORD + 4*(lane%8);
}

// The c-th scales and the c-th input of a lane, 0 in words that there are not
static __device__ __forceinline__ uint4 dbf_load_slice_scales(const dbf_args & args, int step, int lane, int c) {
    const bool there = args.s_in_type != DBF_SCALE_NONE && step*DBF_STEP_WORDS + dbf_slice_word(lane, c) < args.n_words;
    return there ? dbf_load_scales(args, (int64_t) step*DBF_STEP_WORDS*DBF_WORD + dbf_slice_at(lane, c)) : make_uint4(0, 0, 0, 0);
}

static __device__ __forceinline__ void dbf_load_slice(const dbf_args & args, int token, int step, int lane, int c, float (&v)[4]) {
    if (step*DBF_STEP_WORDS + dbf_slice_word(lane, c) < args.n_words) {
        dbf_load_values(args, token, (int64_t) step*DBF_STEP_WORDS*DBF_WORD + dbf_slice_at(lane, c), v);
    } else {
        v[0] = v[1] = v[2] = v[3] = 0.0f;
    }
}

// A 4 x 4 transpose: of the four lanes that differ in the bits 1 and 2, lane b has the bytes j = 0..3, and gets byte b of each.
static __device__ __forceinline__ uint32_t dbf_transpose_bytes(uint32_t v, int lane) {
    const uint32_t near = __shfl_xor_sync(0xffffffff, v, 2);
    v = __byte_perm(v, near, lane & 2 ? 0x3715 : 0x6240);
    const uint32_t far = __shfl_xor_sync(0xffffffff, v, 4);
    return __byte_perm(v, far, lane & 4 ? 0x3276 : 0x5410);
}

// Rounds the part of the input that this warp will sum, steps first, first + stride, … below end, into shared memory. `scales`
// are those of step `first`.
static __device__ __forceinline__ dbf_rounding dbf_round_slice(
        const dbf_args & args, int token, uint4 * planes, int begin, int end, int stride, int first, int lane, const uint4 (&scales)[4]) {
    float kept[4][4] = {}; // of the first step; often it is the only one
    if (first < end) {
        DBF_UNROLL
        for (int c = 0; c < 4; ++c) {
            dbf_load_slice(args, token, first, lane, c, kept[c]);
        }
        DBF_UNROLL
        for (int c = 0; c < 4; ++c) {
            dbf_multiply(args, scales[c], kept[c]);
        }
    }
    const auto load = [&](int step, int c, float (&v)[4]) {
        dbf_load_slice(args, token, step, lane, c, v);
        dbf_multiply(args, dbf_load_slice_scales(args, step, lane, c), v);
    };
    uint32_t largest = 0;
    DBF_UNROLL
    for (int c = 0; c < 4; ++c) {
        largest = dbf_largest(kept[c], largest);
    }
    for (int step = first + stride; step < end; step += stride) {
        DBF_UNROLL
        for (int c = 0; c < 4; ++c) {
            float v[4];
            load(step, c, v);
            largest = dbf_largest(v, largest);
        }
    }
    float inverse;
    dbf_rounding info = { dbf_step_size(dbf_warp_max(largest), inverse), 0, 0 };

    const int b    = lane%8/2; // octet of a word: the values 8*b + 4*half + j
    const int half = lane%2;
    const auto store = [&](int step, int c, const float (&v)[4]) {
        uint32_t hi, lo;
        dbf_round_four(v, inverse, hi, lo);
        info.sum_hi = dbf_dp4a(hi, 0x01010101u, info.sum_hi);
        info.sum_lo = dbf_dp4a(lo, 0x01010101u, info.sum_lo);
        hi = dbf_transpose_bytes(hi, lane);
        lo = dbf_transpose_bytes(lo, lane);
        // register 4*half + b of both planes; the halves store in turns, so that no two lanes want the same bank
        uint32_t * at = (uint32_t *) (planes + dbf_plane_at(step - begin, dbf_slice_word(lane, c), half, 0)) + b;
        at[4*half]       = half == 0 ? hi : lo;
        at[4*(1 - half)] = half == 0 ? lo : hi;
    };
    if (first < end) {
        DBF_UNROLL
        for (int c = 0; c < 4; ++c) {
            store(first, c, kept[c]);
        }
    }
    for (int step = first + stride; step < end; step += stride) { // read again: it comes from the L1 cache
        DBF_UNROLL
        for (int c = 0; c < 4; ++c) {
            float v[4];
            load(step, c, v);
            store(step, c, v);
        }
    }
    info.sum_hi = dbf_warp_sum(info.sum_hi);
    info.sum_lo = dbf_warp_sum(info.sum_lo);
    return info;
}

// acc[i] += the step's products for the bits 2i and 2i+1. Tensor cores: a fragment C, of which lane t = 0 has what counts.
// dp4a: { hi, lo } of row g and of row g+8, over this lane's words. planes: of this lane's column and words.
template <bool MMA>
static __device__ __forceinline__ void dbf_dot_step(int (&acc)[4][4], const uint4 & row0, const uint4 & row1, const uint4 * planes) {
    DBF_UNROLL
    for (int word = 0; word < 4; ++word) {
        const uint32_t w0 = dbf_get(row0, word);
        const uint32_t w1 = dbf_get(row1, word);
        DBF_UNROLL
        for (int half = 0; half < 2; ++half) {
            DBF_UNROLL
            for (int plane = 0; plane < (MMA ? 1 : 2); ++plane) {
                const uint4 b = planes[dbf_plane_at(0, word, half, plane)];
                DBF_UNROLL
                for (int i = 0; i < 2; ++i) {
                    const uint32_t m       = 0x01010101u << (4*half + 2*i);
                    const uint32_t a[4]    = { w0 & m, w1 & m, (w0 >> 1) & m, (w1 >> 1) & m };
                    const uint32_t pair[2] = { dbf_get(b, 2*i), dbf_get(b, 2*i + 1) };
                    int (&sums)[4] = acc[2*half + i];
                    if (MMA) {
                        dbf_mma_q8(sums, a, pair);
                    } else {
                        sums[plane]     = dbf_dp4a(a[2], pair[1], dbf_dp4a(a[0], pair[0], sums[plane]));
                        sums[plane + 2] = dbf_dp4a(a[3], pair[1], dbf_dp4a(a[1], pair[0], sums[plane + 2]));
                    }
                }
            }
        }
    }
}

// One token: a stage in one launch. The warps of a block share a tile of rows and divide its steps, so that each warp rounds only
// what it sums itself, with a scale of its own, and the first loads of signs are on their way before that begins. A block takes
// the tiles blockIdx.x, + gridDim.x, …; with it the input is rounded once for all of them.
//
//   shared memory:  planes of the input [chunk_steps][4][2][4][2] uint4  |  partial sums [2][WARPS][16]
//
// Signs are loaded two steps ahead, over the ends of tiles: 2 KB a warp and 32 KB a multiprocessor, which is what it takes to
// hide the latency of an H100's memory.
//
// Input that does not fit is taken in chunks, and then rounded anew for every tile: slow, and needed only for n above 24,000 on
// sm_61, 31,000 on sm_75 and 49,000 on newer cards.
// sm_61 to sm_72 (MMA = false) have the same order of work and a row of blocks for each token.
template <int WARPS, int VECTOR, bool MMA>
__global__ void __launch_bounds__(32*WARPS, DBF_DECODE_BLOCKS(WARPS)) dbf_decode(const dbf_args args) {
    if (MMA && !DBF_HAS_MMA) {
        return;
    }
    DBF_SHARED(uint4, planes);
    float * partial = (float *) (planes + args.chunk_steps*(DBF_STEP_BYTES/sizeof(uint4)));

    const int lane  = threadIdx.x%32;
    const int warp  = threadIdx.x/32;
    const int g     = lane/4;
    const int t     = lane%4;
    const int token = blockIdx.y;

    const int n_steps = (args.n_words + DBF_STEP_WORDS - 1)/DBF_STEP_WORDS;
    const int n_tiles = (args.rows + DBF_TILE_ROWS - 1)/DBF_TILE_ROWS;
    const bool chunked = args.chunk_steps < n_steps;

    dbf_let_next_kernel_start();

    uint4 ahead[2][2] = {}; // [this step and the next one, or the other way round][row g or g+8]
    int   ahead_step = warp;
    int   ahead_tile = warp < n_steps ? (int) blockIdx.x : n_tiles;
    const uint32_t * ahead_row[2] = { dbf_row(args, ahead_tile*DBF_TILE_ROWS + g), dbf_row(args, ahead_tile*DBF_TILE_ROWS + g + 8) };
    const auto load_ahead = [&](uint4 (&rows)[2]) {
        if (ahead_tile >= n_tiles) {
            return;
        }
        rows[0] = dbf_load_signs<VECTOR, true>(ahead_row[0], args.n_words, ahead_step, t);
        rows[1] = dbf_load_signs<VECTOR, true>(ahead_row[1], args.n_words, ahead_step, t);
        ahead_step += WARPS;
        if (ahead_step >= n_steps) {
            ahead_step   = warp;
            ahead_tile  += gridDim.x;
            ahead_row[0] = dbf_row(args, ahead_tile*DBF_TILE_ROWS + g);
            ahead_row[1] = dbf_row(args, ahead_tile*DBF_TILE_ROWS + g + 8);
        }
    };
    load_ahead(ahead[0]);
    load_ahead(ahead[1]);
    // Scales are weights too: those of the first step's input, and of the first tile's rows
    uint4 scales[4];
    const auto load_scales = [&](int step) {
        DBF_UNROLL
        for (int c = 0; c < 4; ++c) {
            scales[c] = dbf_load_slice_scales(args, step, lane, c);
        }
    };
    load_scales(warp);
    const auto load_scale = [&](int tile) {
        const int row = tile*DBF_TILE_ROWS + (int) threadIdx.x;
        return threadIdx.x < DBF_TILE_ROWS && row < args.rows ? dbf_load_scale(args.s_out, args.s_out_type, row) : 0;
    };
    uint32_t scale = load_scale(blockIdx.x);
    dbf_wait_for_previous_kernel();

    // The six columns without a token get the same planes again: a column of C depends on that column of B alone, nobody looks
    // at theirs, and a broadcast is cheaper than zeros.
    const uint4 * column = planes + dbf_plane_at(0, 4*t, 0, MMA ? g%2 : 0);

    dbf_rounding info = { 0.0f, 0, 0 };
    int  parity = 0;
    bool turned = false; // whether ahead[1] comes next
    for (int tile = blockIdx.x; tile < n_tiles; tile += gridDim.x, parity ^= 1) {
        float sum0 = 0.0f, sum1 = 0.0f; // rows g and g+8
        for (int begin = 0; begin < n_steps; begin += args.chunk_steps) {
            const int end = begin + args.chunk_steps < n_steps ? begin + args.chunk_steps : n_steps;
            if (chunked || tile == (int) blockIdx.x) {
                __syncwarp(); // the last chunk has been read
                if (chunked && (begin > 0 || tile != (int) blockIdx.x)) {
                    load_scales(begin + warp);
                }
                info = dbf_round_slice(args, token, planes, begin, end, WARPS, begin + warp, lane, scales);
                __syncwarp();
            }

            int acc[4][4] = {};
            const auto use = [&](uint4 (&rows)[2], int step) {
                dbf_dot_step<MMA>(acc, rows[0], rows[1], column + dbf_plane_at(step - begin, 0, 0, 0));
                load_ahead(rows);
            };
            // The two sets of registers take turns. Moving one to the other's place would wait for its load.
            const auto use_all = [&](uint4 (&now)[2], uint4 (&next)[2]) {
                for (int step = begin + warp; step < end; step += 2*WARPS) { // chunk_steps is a multiple of WARPS
                    use(now, step);
                    if (step + WARPS >= end) {
                        return true;
                    }
                    use(next, step + WARPS);
                }
                return false;
            };
            if (turned) {
                turned = !use_all(ahead[1], ahead[0]);
            } else {
                turned = use_all(ahead[0], ahead[1]);
            }

            int s[4] = {};
            DBF_UNROLL
            for (int i = 0; i < 4; ++i) {
                DBF_UNROLL
                for (int j = 0; j < 4; ++j) {
                    s[i] += acc[j][i] >> (2*j);
                }
                if (!MMA) { // over the four lanes of a row
                    s[i] += __shfl_xor_sync(0xffffffff, s[i], 1);
                    s[i] += __shfl_xor_sync(0xffffffff, s[i], 2);
                }
            }
            sum0 += info.d*(256.0f*(float) (2*s[0] - info.sum_hi) + (float) (2*s[1] - info.sum_lo));
            sum1 += info.d*(256.0f*(float) (2*s[2] - info.sum_hi) + (float) (2*s[3] - info.sum_lo));
        }

        // The two halves of `partial` take turns, so that one barrier a tile is enough: whoever writes a half again has been
        // at the barrier of the tile between, behind the reads of this one.
        float * mine = partial + parity*WARPS*DBF_TILE_ROWS;
        if (t == 0) {
            mine[warp*DBF_TILE_ROWS + g]     = sum0;
            mine[warp*DBF_TILE_ROWS + g + 8] = sum1;
        }
        __syncthreads();
        const int row = tile*DBF_TILE_ROWS + (int) threadIdx.x;
        if (threadIdx.x < DBF_TILE_ROWS && row < args.rows) {
            float sum = 0.0f; // always in this order
            for (int w = 0; w < WARPS; ++w) {
                sum += mine[w*DBF_TILE_ROWS + threadIdx.x];
            }
            args.y[(int64_t) token*args.rows + row] = dbf_scale_of(scale, args.s_out_type)*sum;
        }
        scale = load_scale(tile + gridDim.x);
    }
}

// ---- several tokens

template <bool F16> struct dbf_accumulator       { typedef int   type; };
template <>         struct dbf_accumulator<true> { typedef float type; };

// of a warp, 16 bytes a lane: what it takes to have a step of a group of tokens
template <bool F16> static constexpr int DBF_LOADS = (F16 ? DBF_F16_TOKENS : DBF_Q8_TOKENS)*DBF_STEP_BYTES/512;

// Where the fragments of B are, in uint4. Of a group of tokens (8 columns) and a step, what one load of a warp takes lies
// together: lane = 4*column + t.
template <bool F16>
static __device__ __forceinline__ int64_t dbf_fragment_at(int64_t group, int n_steps, int step, int load, int lane) {
    return ((group*n_steps + step)*DBF_LOADS<F16> + load)*32 + lane;
}

// Rounds the input of one token, in one block, to planes (columns 2*token and 2*token + 1 of its group of 4) or to fp16 (its
// column in a group of 8, scaled by a power of two so that no value overflows).
template <bool F16>
__global__ void __launch_bounds__(32*DBF_ROUND_WARPS) dbf_round(const dbf_args args) {
    if (!DBF_HAS_MMA) {
        return;
    }
    DBF_SHARED(uint32_t, shared);

    const int lane  = threadIdx.x%32;
    const int warp  = threadIdx.x/32;
    const int word  = lane/2;
    const int half  = lane%2;
    const int token = blockIdx.x;

    const int n_steps = (args.n_words + DBF_STEP_WORDS - 1)/DBF_STEP_WORDS;
    uint4 * out = (uint4 *) args.rounded;

    dbf_let_next_kernel_start();
    dbf_wait_for_previous_kernel();

    uint32_t largest = 0;
    for (int step = warp; step < n_steps; step += DBF_ROUND_WARPS) {
        float v[4][4];
        dbf_load_input(args, token, step*DBF_STEP_WORDS + word, half, v);
        DBF_UNROLL
        for (int b = 0; b < 4; ++b) {
            largest = dbf_largest(v[b], largest);
        }
    }
    largest = dbf_warp_max(largest);
    if (lane == 0) {
        shared[warp] = largest;
    }
    __syncthreads();
    for (int w = 0; w < DBF_ROUND_WARPS; ++w) {
        largest = largest > shared[w] ? largest : shared[w];
    }

    if (F16) {
        // to below 2^15: the power of two with the exponent of `largest`; sums of fp16 products are floats, and cannot overflow
        const bool  usable  = largest < DBF_INFINITY && __uint_as_float(largest) >= DBF_TINY;
        const int   power   = usable ? (int) (largest >> 23) - 127 - 14 : 0;
        const float inverse = usable ? __uint_as_float((uint32_t) (127 - power) << 23) : 0.0f;
        const float d       = largest >= DBF_INFINITY ? __uint_as_float(0x7fc00000u) : usable ? __uint_as_float((uint32_t) (127 + power) << 23) : 0.0f;
        for (int step = warp; step < n_steps; step += DBF_ROUND_WARPS) {
            float v[4][4];
            dbf_load_input(args, token, step*DBF_STEP_WORDS + word, half, v);
            // register e of a word holds the values e and e + 16: b = 0, 2 are e = 4*half + j, and b = 1, 3 are e = 8 + 4*half + j
            DBF_UNROLL
            for (int b = 0; b < 2; ++b) {
                uint32_t r[4];
                DBF_UNROLL
                for (int j = 0; j < 4; ++j) {
                    const __half2 pair = __floats2half2_rn(usable ? v[b][j]*inverse : 0.0f, usable ? v[b + 2][j]*inverse : 0.0f);
                    r[j] = *(const uint32_t *) &pair;
                }
                const int64_t group = token/DBF_F16_TOKENS;
                const int     at    = (token%DBF_F16_TOKENS)*4 + word/4;
                out[dbf_fragment_at<F16>(group, n_steps, step, (word%4)*4 + 2*b + half, at)] = make_uint4(r[0], r[1], r[2], r[3]);
            }
        }
        if (threadIdx.x == 0) {
            args.info[token] = { d, 0, 0 };
        }
    } else {
        float inverse;
        dbf_rounding info = { dbf_step_size(largest, inverse), 0, 0 };
        for (int step = warp; step < n_steps; step += DBF_ROUND_WARPS) {
            float v[4][4];
            dbf_load_input(args, token, step*DBF_STEP_WORDS + word, half, v);
            uint4 hi, lo;
            dbf_round_q8(v, inverse, hi, lo, info.sum_hi, info.sum_lo);
            const int at = 2*(token%DBF_Q8_TOKENS)*4 + word/4;
            out[dbf_fragment_at<F16>(token/DBF_Q8_TOKENS, n_steps, step, (word%4)*2 + half, at)]     = hi;
            out[dbf_fragment_at<F16>(token/DBF_Q8_TOKENS, n_steps, step, (word%4)*2 + half, at + 4)] = lo;
        }
        info.sum_hi = dbf_warp_sum(info.sum_hi);
        info.sum_lo = dbf_warp_sum(info.sum_lo);
        int32_t * sums = (int32_t *) shared + DBF_ROUND_WARPS;
        if (lane == 0) {
            sums[2*warp]     = info.sum_hi;
            sums[2*warp + 1] = info.sum_lo;
        }
        __syncthreads();
        if (threadIdx.x == 0) {
            for (int w = 1; w < DBF_ROUND_WARPS; ++w) {
                info.sum_hi += sums[2*w];
                info.sum_lo += sums[2*w + 1];
            }
            args.info[token] = info;
        }
    }
}

// acc += 32 rows of a step times TILES groups of tokens. row: the words of the rows g, g+8, g+16 and g+24. input(tile, load): what
// this lane has of a load of the step. The signs are shifted here and not masked in place: the shifts are shared by all columns,
// four sets of accumulators would not be.
template <int TILES, bool F16, class Input>
static __device__ __forceinline__ void dbf_gemm_step(typename dbf_accumulator<F16>::type (&acc)[2][TILES][4], const uint4 (&row)[4], const Input & input) {
    DBF_UNROLL
    for (int word = 0; word < 4; ++word) {
        DBF_UNROLL
        for (int part = 0; part < DBF_LOADS<F16>/4; ++part) {
            uint32_t a[2][2][4]; // [tile of rows][pair of registers][fragment]
            DBF_UNROLL
            for (int r = 0; r < 4; ++r) {
                DBF_UNROLL
                for (int i = 0; i < 4; ++i) {
                    const uint32_t w = dbf_get(row[r], word);
                    // bits e and e + 16 become the signs of 1.0 in both halves: bit 1 -> +1
                    a[r/2][i/2][2*(i%2) + r%2] = F16 ? ((w << (15 - (4*part + i))) & 0x80008000u) ^ 0xbc00bc00u
                                                     : (w >> (4*part + i)) & 0x01010101u;
                }
            }
            DBF_UNROLL
            for (int tile = 0; tile < TILES; ++tile) {
                const uint4 b = input(tile, DBF_LOADS<F16>/4*word + part);
                DBF_UNROLL
                for (int i = 0; i < 2; ++i) {
                    const uint32_t pair[2] = { dbf_get(b, 2*i), dbf_get(b, 2*i + 1) };
                    DBF_UNROLL
                    for (int r = 0; r < 2; ++r) {
                        if constexpr (F16) {
                            dbf_mma_f16(acc[r][tile], a[r][i], pair);
                        } else {
                            dbf_mma_q8(acc[r][tile], a[r][i], pair);
                        }
                    }
                }
            }
        }
    }
}

// Sums of a row, the columns 2t and 2t + 1 of a group of tokens that begins with `first`
template <bool F16, class Number>
static __device__ __forceinline__ void dbf_gemm_store(const dbf_args & args, int row, int first, int t, Number c0, Number c1) {
    const float scale = dbf_scale(args.s_out, args.s_out_type, row);
    if constexpr (F16) { // columns 2t and 2t + 1 are tokens
        DBF_UNROLL
        for (int i = 0; i < 2; ++i) {
            const int token = first + 2*t + i;
            if (token < args.n_tokens) {
                args.y[(int64_t) token*args.rows + row] = scale*(args.info[token].d*(i == 0 ? c0 : c1));
            }
        }
    } else { // and here the planes of token t
        const int token = first + t;
        if (token < args.n_tokens) {
            const dbf_rounding info = args.info[token];
            args.y[(int64_t) token*args.rows + row] =
                scale*(info.d*(256.0f*(float) (2*c0 - info.sum_hi) + (float) (2*c1 - info.sum_lo)));
        }
    }
}

// Several tokens: 4 warps compute 8*TILES columns. Each warp multiplies 32 rows at a time, for which it turns signs into bytes
// (or fp16) once and uses them for all columns. There are two kinds of block, by TILES:
//
//              many columns: 128 rows              few columns: 32 rows
//
//           step  0   1   2   3   4  ..         step  0   1   2   3   4  ..
//              +---+---+---+---+---+                +---+---+---+---+---+
//      warp 0  |   |   |   |   |   |                | 0 | 1 | 2 | 3 | 0 |  warp, and its sums are
//      warp 1  |   |   |   |   |   |                +---+---+---+---+---+  added to the others' at the end
//      warp 2  |   |   |   |   |   |
//      warp 3  |   |   |   |   |   |
//              +---+---+---+---+---+
//
// Many columns: the warps want the same input at the same time, and share it in shared memory. Few: the warps divide the steps
// (DBF_GEMM_DIVIDES_STEPS), because 4096 rows would be 32 blocks otherwise, and most of a large card would idle. No two
// warps want the same input, so it goes straight to registers, and nobody waits for anybody before the end.
//
//   shared memory:  input of a step [TILES][LOADS][32] uint4  or  partial sums [WARPS][4][TILES][32] pairs
template <int TILES, int VECTOR, bool F16>
__global__ void __launch_bounds__(32*DBF_GEMM_WARPS, DBF_GEMM_BLOCKS(TILES)) dbf_gemm(const dbf_args args) {
    if (!DBF_HAS_MMA) {
        return;
    }
    constexpr bool DIVIDES = DBF_GEMM_DIVIDES_STEPS(TILES);
    constexpr int  TOKENS  = F16 ? DBF_F16_TOKENS : DBF_Q8_TOKENS; // in a tile of columns
    constexpr int  LOADS   = DBF_LOADS<F16>;
    constexpr int  STRIDE  = DIVIDES ? DBF_GEMM_WARPS : 1;         // from a step of a warp to its next

    typedef typename dbf_accumulator<F16>::type number;
    struct alignas(8) sums { number c0, c1; };                     // of a row, the columns 2t and 2t + 1

    DBF_SHARED(uint4, shared);

    const int lane  = threadIdx.x%32;
    const int warp  = threadIdx.x/32;
    const int g     = lane/4;
    const int t     = lane%4;
    const int row0  = blockIdx.x*DBF_GEMM_ROWS(TILES) + (DIVIDES ? 0 : warp*2*DBF_TILE_ROWS) + g;
    const int group = blockIdx.y*TILES;
    const int step0 = DIVIDES ? warp : 0;

    const int n_steps  = (args.n_words + DBF_STEP_WORDS - 1)/DBF_STEP_WORDS;
    const int n_groups = (args.n_tokens + TOKENS - 1)/TOKENS;

    number acc[2][TILES][4] = {};

    const uint32_t * rows[4]; // row0, + 8, + 16, + 24
    DBF_UNROLL
    for (int r = 0; r < 4; ++r) {
        rows[r] = dbf_row(args, row0 + 8*r);
    }
    const auto load_ahead = [&](uint4 (&signs)[4], int step) {
        DBF_UNROLL
        for (int r = 0; r < 4; ++r) {
            signs[r] = dbf_load_signs<VECTOR, false>(rows[r], args.n_words, step, t);
        }
    };
    uint4 ahead[DIVIDES ? 2 : 1][4]; // of the next steps of this warp
    load_ahead(ahead[0], step0);
    if constexpr (DIVIDES) {
        load_ahead(ahead[1], step0 + STRIDE);
    }
    dbf_let_next_kernel_start();
    dbf_wait_for_previous_kernel();

    // A group of tokens that there is not: many columns take zeros, few the last group again, whichever needs no condition in
    // the loop. A column of C depends on that column of B alone, and nobody looks at theirs.
    const uint4 * rounded = (const uint4 *) args.rounded;
    const uint4 * columns = DIVIDES ? rounded + dbf_fragment_at<F16>(group, n_steps, 0, 0, lane) : shared + lane;
    int next[TILES]; // from the first group to another
    DBF_UNROLL
    for (int tile = 0; tile < TILES; ++tile) {
        next[tile] = DIVIDES ? min(tile, n_groups - 1 - group)*n_steps*LOADS*32 : tile*LOADS*32;
    }

    if constexpr (DIVIDES) {
        const auto use = [&](uint4 (&signs)[4], int step) {
            const int skip = step*LOADS*32;
            dbf_gemm_step<TILES, F16>(acc, signs, [&](int tile, int load) { return columns[next[tile] + skip + load*32]; });
            load_ahead(signs, step + 2*STRIDE);
        };
        for (int step = step0; step < n_steps; step += 2*STRIDE) { // two sets of registers, as in dbf_decode
            use(ahead[0], step);
            if (step + STRIDE < n_steps) {
                use(ahead[1], step + STRIDE);
            }
        }
    } else {
        for (int step = 0; step < n_steps; ++step) {
            __syncthreads(); // the last step's input has been read
            for (int i = threadIdx.x; i < TILES*LOADS*32; i += 32*DBF_GEMM_WARPS) {
                const int tile = i/(LOADS*32);
                shared[i] = group + tile < n_groups ? rounded[dbf_fragment_at<F16>(group + tile, n_steps, step, 0, i%(LOADS*32))]
                                                    : make_uint4(0, 0, 0, 0);
            }
            uint4 signs[4];
            DBF_UNROLL
            for (int r = 0; r < 4; ++r) {
                signs[r] = ahead[0][r];
            }
            load_ahead(ahead[0], step + 1);
            __syncthreads(); // the input is there
            dbf_gemm_step<TILES, F16>(acc, signs, [&](int tile, int load) { return columns[next[tile] + load*32]; });
        }
    }

    if constexpr (DIVIDES) {
        // Every warp shows its sums, and ends a quarter of the rows.
        sums * partial = (sums *) shared;
        DBF_UNROLL
        for (int r = 0; r < 4; ++r) {
            DBF_UNROLL
            for (int tile = 0; tile < TILES; ++tile) {
                partial[((warp*4 + r)*TILES + tile)*32 + lane] = { acc[r/2][tile][2*(r%2)], acc[r/2][tile][2*(r%2) + 1] };
            }
        }
        __syncthreads(); // the sums of all warps are there
        const int row = row0 + 8*warp;
        if (row >= args.rows) {
            return;
        }
        DBF_UNROLL
        for (int tile = 0; tile < TILES; ++tile) {
            sums sum = { 0, 0 };
            DBF_UNROLL
            for (int w = 0; w < DBF_GEMM_WARPS; ++w) { // always in this order
                const sums other = partial[((w*4 + warp)*TILES + tile)*32 + lane];
                sum.c0 += other.c0;
                sum.c1 += other.c1;
            }
            dbf_gemm_store<F16>(args, row, (group + tile)*TOKENS, t, sum.c0, sum.c1);
        }
    } else {
        DBF_UNROLL
        for (int r = 0; r < 4; ++r) {
            const int row = row0 + 8*r;
            if (row >= args.rows) {
                continue;
            }
            DBF_UNROLL
            for (int tile = 0; tile < TILES; ++tile) {
                dbf_gemm_store<F16>(args, row, (group + tile)*TOKENS, t, acc[r/2][tile][2*(r%2)], acc[r/2][tile][2*(r%2) + 1]);
            }
        }
    }
}

// For those who take the kernels by name out of an object file: all instances, as template instantiations
#define DBF_NO_PARENTHESES(...) __VA_ARGS__
#define DBF_INSTANTIATE_KERNEL(...) template __global__ void __VA_ARGS__(const dbf_args);
#define DBF_INSTANTIATE_LISTED(name, kernel) DBF_INSTANTIATE_EXPANDED(DBF_NO_PARENTHESES kernel)
#define DBF_INSTANTIATE_EXPANDED(...) DBF_INSTANTIATE_KERNEL(__VA_ARGS__)
#define DBF_INSTANTIATE_KERNELS DBF_KERNELS(DBF_INSTANTIATE_LISTED)
