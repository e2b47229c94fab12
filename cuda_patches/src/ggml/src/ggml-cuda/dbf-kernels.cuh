#pragma once

//
// Sign products on CUDA: out[t][r] = s_out[r] * sum_i W[r][i]*v[t][i],  v = s_in*x,  W[r][i] = +1 or -1, stored as one bit.
//
// Numbers. v is rounded to 16-bit integers with one scale, v ~ d*q with |q| <= 127*256 + 127, and q is kept as two planes of
// bytes, q = 256*hi + lo. With w = 1 for +1 and 0 for -1,
//
//     sum_i W[i]*v[i] = d*sum (2*w - 1)*q = d*(2*S - sum q),    S = 256*(sum w*hi) + (sum w*lo)
//
// and what is left are sums of bytes over set bits. The int8 tensor cores (and dp4a) compute them exactly. One plane with
// one scale would be half the work but too coarse: the second product multiplies the rounding errors of the first.
//
// Bits to bytes. With m = 0x01010101, `word & m << j` is four bytes in one instruction: the bits j, j+8, j+16 and j+24, each
// times 2^j. No shift brings them back to 0 and 1. The sums for each j are kept apart, and at the end sum_j acc_j >> j is
// exact, since acc_j is a multiple of 2^j. Bits 4 to 7 use the masks of 0 to 3 on word >> 4: one shift for a whole word, and
// half the accumulators. Which bits come together is arbitrary as long as the input is laid out alike: the 32 bytes of a
// word's values are 8 registers, and register j has the values j, j+8, j+16, j+24.
//
// Fragments. A tensor core instruction multiplies 16 rows with 8 columns over 32 values. Lane = 4*g + t of a warp gives and
// gets (PTX ISA, mma.m16n8k32):
//
//                values of t      + 16                                      columns
//     row g      a0               a2        b0, b1: column g        c0 c1: row g,     columns 2t, 2t+1
//     row g+8    a1               a3        for the values of t     c2 c3: row g+8,   columns 2t, 2t+1
//
// The order of the values is free as long as a and b agree. So a lane gives bits of its own words and nothing is ever moved
// between lanes: a0 = word & m << j of row g, a1 of row g+8, a2 and a3 the same of word >> 4; b0 = register j of the input,
// b1 = register j+4. The columns are 2*token + plane, hi first, so that lane t receives both sums of token t:
//
//     word of a row:   4 instructions  (a0 a1 a2 a3) x (b0 b1)   for j = 0..3      = 16 rows * 32 signs * 8 columns each
//     a step:          16 words of each row; lane t has four of them, 16 bytes in one load where the alignment allows it
//
// 4 ANDs and one mma for 512 signs of both planes, where sm_75 has four mma.m8n8k16 for the one. The six other columns of a
// single token cost nothing: their lanes repeat columns 0 and 1, and nobody looks at the results.
//

#include "dbf-launch.h"

#ifdef DBF_ON_CPU // the tests compile this file as C++
#include "cuhost.h"
#define DBF_SHARED(type, name) type * name = (type *) cuhost::shared_memory()
#define DBF_UNROLL
#else
#include <cuda_fp16.h>
#define DBF_SHARED(type, name) extern __shared__ uint4 dbf_shared_memory[]; type * name = (type *) dbf_shared_memory
#define DBF_UNROLL _Pragma("unroll")
#endif

// Kernels are compiled for every architecture of a build, and are empty where they are never launched.
#if defined(DBF_ON_CPU) || __CUDA_ARCH__ >= 750
#define DBF_MMA_AVAILABLE
#endif
#if defined(DBF_ON_CPU) || __CUDA_ARCH__ >= 610
#define DBF_DP4A_AVAILABLE
#endif

#define DBF_QMAX     32639.0f      // 127*256 + 127
#define DBF_TINY     1e-30f        // a vector whose largest value is below counts as zero: 1/d would overflow
#define DBF_INFINITY 0x7f800000u   // bits; those of NaNs are larger
#define DBF_NAN      0x7fc00000u
#define DBF_F16_MAX  16384.0f      // what the largest value becomes in fp16
#define DBF_ONES     0x01010101u
#define DBF_AHEAD    2             // decode: steps whose signs are on their way

// ---- instructions

// c += a*b with bytes, a unsigned and b signed: 16 rows, 8 columns, 32 values
static __device__ __forceinline__ void dbf_mma(int (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#if defined(DBF_ON_CPU)
    cuhost::mma_u8s8_m16n8k32(c, a, b);
#elif __CUDA_ARCH__ >= 800
    asm("mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#elif __CUDA_ARCH__ >= 750
    // the same by 8 rows and 16 values at a time
    asm("mma.sync.aligned.m8n8k16.row.col.s32.u8.s8.s32 {%0, %1}, {%2}, {%3}, {%0, %1};"
        : "+r"(c[0]), "+r"(c[1]) : "r"(a[0]), "r"(b[0]));
    asm("mma.sync.aligned.m8n8k16.row.col.s32.u8.s8.s32 {%0, %1}, {%2}, {%3}, {%0, %1};"
        : "+r"(c[2]), "+r"(c[3]) : "r"(a[1]), "r"(b[0]));
    asm("mma.sync.aligned.m8n8k16.row.col.s32.u8.s8.s32 {%0, %1}, {%2}, {%3}, {%0, %1};"
        : "+r"(c[0]), "+r"(c[1]) : "r"(a[2]), "r"(b[1]));
    asm("mma.sync.aligned.m8n8k16.row.col.s32.u8.s8.s32 {%0, %1}, {%2}, {%3}, {%0, %1};"
        : "+r"(c[2]), "+r"(c[3]) : "r"(a[3]), "r"(b[1]));
#endif
}

// c += a*b with fp16 factors and fp32 sums: 16 rows, 8 columns, 16 values, two in a register
static __device__ __forceinline__ void dbf_mma(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#if defined(DBF_ON_CPU)
    cuhost::mma_f16_m16n8k16(c, a, b);
#elif __CUDA_ARCH__ >= 800
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#elif __CUDA_ARCH__ >= 750
    asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a[0]), "r"(a[1]), "r"(b[0]));
    asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a[2]), "r"(a[3]), "r"(b[1]));
#endif
}

// c + four products of signed bytes
static __device__ __forceinline__ int dbf_dp4a(uint32_t a, uint32_t b, int c) {
#ifdef DBF_DP4A_AVAILABLE
    return __dp4a((int) a, (int) b, c);
#else
    return c;
#endif
}

// Programmatic dependent launch, sm_90 and newer: a kernel may start while the one before it still runs. Signs and scales
// were there before both, so that their loads need not wait; everything that the kernel before wrote has to, and so has
// every write, because the kernel before may still read what was there.
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

static __device__ __forceinline__ uint32_t dbf_warp_max(uint32_t v) {
    DBF_UNROLL
    for (int bit = 16; bit > 0; bit >>= 1) {
        const uint32_t other = __shfl_xor_sync(0xffffffff, v, bit);
        v = v > other ? v : other;
    }
    return v;
}

static __device__ __forceinline__ int dbf_warp_sum(int v) {
    DBF_UNROLL
    for (int bit = 16; bit > 0; bit >>= 1) {
        v += __shfl_xor_sync(0xffffffff, v, bit);
    }
    return v;
}

static __device__ __forceinline__ uint32_t dbf_get(const uint4 & v, int i) {
    return i == 0 ? v.x : i == 1 ? v.y : i == 2 ? v.z : v.w;
}

static __device__ __forceinline__ float dbf_scale(const void * s, dbf_scale_type type, int i) {
    return type == DBF_SCALE_F16 ? __half2float(((const __half *) s)[i]) : ((const float *) s)[i];
}

// ---- signs

// Which of the 16 words of a step lane t has as its i-th. Neighbouring lanes load neighbouring bytes.
static __device__ __forceinline__ int dbf_word_of(int vec, int t, int i) {
    return vec == 4 ? 4*t + i : vec == 2 ? 8*(i/2) + 2*t + i%2 : 4*i + t;
}

// The four words of lane t of a step that begins at `word`. Behind the end of a ragged row any sign will do, because the
// input is zero there, so that the last load of the row stands in: no branch, and nothing outside the row is read.
// `once`: nobody will read these signs again before the next token. They must not evict the input from the caches.
template <int VEC, bool ONCE>
static __device__ __forceinline__ void dbf_load_signs(uint32_t (&w)[4], const uint32_t * row, int word, int t, int n_words) {
    DBF_UNROLL
    for (int i = 0; i < 4; i += VEC) {
        const int at   = word + dbf_word_of(VEC, t, i);
        const int last = n_words - VEC;
        const uint32_t * p = row + (at < last ? at : last);
        if constexpr (VEC == 4) {
            const uint4 v = ONCE ? __ldcs((const uint4 *) p) : __ldg((const uint4 *) p);
            w[0] = v.x;
            w[1] = v.y;
            w[2] = v.z;
            w[3] = v.w;
        } else if constexpr (VEC == 2) {
            const uint2 v = ONCE ? __ldcs((const uint2 *) p) : __ldg((const uint2 *) p);
            w[i]     = v.x;
            w[i + 1] = v.y;
        } else {
            w[i] = ONCE ? __ldcs(p) : __ldg(p);
        }
    }
}

static __device__ __forceinline__ const uint32_t * dbf_row(const dbf_args & a, int row) {
    row = row < a.n_rows ? row : a.n_rows - 1; // the result of a row that is not there is dropped
    return a.signs + (int64_t) row*a.n_words;
}

// ---- quantization
//
// A warp takes 16 words of the input, a step, at a time: lane = 8*t + j has the values j, j+8, j+16 and j+24 of the four words
// that lane t of the sign product has. Those are the bytes of register j, and eight lanes together read 32 bytes in a row.

template <dbf_scale_type S>
static __device__ __forceinline__ void dbf_load_input(const dbf_args & a, const float * x, int vec, int step, int lane, float (&v)[4][4]) {
    const int t = lane/8;
    const int j = lane%8;
    DBF_UNROLL
    for (int i = 0; i < 4; ++i) {
        const int word = step*DBF_STEP + dbf_word_of(vec, t, i);
        DBF_UNROLL
        for (int b = 0; b < 4; ++b) {
            const int at = word*DBF_WORD + 8*b + j;
            v[i][b] = 0.0f;
            if (word < a.n_words) {
                v[i][b] = S == DBF_SCALE_NONE ? x[at] : x[at]*dbf_scale(a.s_in, S, at);
            }
        }
    }
}

// The bits of |v| order like integers, with infinity and NaN above all finite values: one maximum sees everything.
static __device__ __forceinline__ uint32_t dbf_largest(const float (&v)[4][4], uint32_t largest) {
    DBF_UNROLL
    for (int i = 0; i < 4; ++i) {
        DBF_UNROLL
        for (int b = 0; b < 4; ++b) {
            const uint32_t bits = __float_as_uint(v[i][b]) & 0x7fffffffu;
            largest = largest > bits ? largest : bits;
        }
    }
    return largest;
}

// The scale d for values up to `largest`, which become integers (or fp16) up to `range`, and 1/d. A vector of zeros gets 0 for
// both. One with a NaN or an infinity gets d = NaN, so that all its results are NaN like those of a dense product, and 0
// for the other.
static __device__ __forceinline__ float dbf_step_size(uint32_t largest, float range, float & inverse) {
    inverse = 0.0f;
    if (largest >= DBF_INFINITY) {
        return __uint_as_float(DBF_NAN);
    }
    if (__uint_as_float(largest) < DBF_TINY) {
        return 0.0f;
    }
    const float d = __uint_as_float(largest)*(1.0f/range);
    inverse = __frcp_rn(d); // from 1/d and not from 1/largest, which fast arithmetic flushes to zero above 2^126
    return d;
}

// Four values to two planes of bytes: register j of a word
static __device__ __forceinline__ void dbf_quantize_q8(const float (&v)[4], float inverse, uint32_t & hi, uint32_t & lo) {
    if (inverse == 0.0f) { // v may be NaN
        hi = lo = 0;
        return;
    }
    // Adding 1.5*2^23 rounds to an integer, which is then in the low bits, as two's complement. lo is byte 0, as a signed
    // number; hi is the rest, and adding 128 first makes up for a negative lo: byte 1.
    uint32_t q[4], r[4];
    DBF_UNROLL
    for (int b = 0; b < 4; ++b) {
        q[b] = __float_as_uint(fmaf(v[b], inverse, 12582912.0f));
        r[b] = q[b] + 128;
    }
    lo = __byte_perm(__byte_perm(q[0], q[1], 0x0040), __byte_perm(q[2], q[3], 0x0040), 0x5410);
    hi = __byte_perm(__byte_perm(r[0], r[1], 0x0051), __byte_perm(r[2], r[3], 0x0051), 0x5410);
}

// Quantizes the steps [step0, step1) of one token with one scale, for the warp's own use: it computes the sums over these
// steps, and other warps never see them. So each slice gets a scale that fits it, and no barrier is needed before the sums.
// planes: of the token in the first step of the chunk, see dbf_decode
template <int VEC, int TOKENS, dbf_scale_type S>
static __device__ __forceinline__ void dbf_quantize_slice(
        const dbf_args & a, const float * x, uint32_t * planes, int chunk, int step0, int step1, int lane, float & d, int & sum) {
    float    v[4][4];
    uint32_t largest = 0;
    for (int step = step0; step < step1; ++step) {
        dbf_load_input<S>(a, x, VEC, chunk + step, lane, v);
        largest = dbf_largest(v, largest);
    }

    float inverse;
    d = dbf_step_size(dbf_warp_max(largest), DBF_QMAX, inverse);

    const int t = lane/8;
    const int j = lane%8;
    int sum_hi = 0;
    int sum_lo = 0;
    for (int step = step1 - 1; step >= step0; --step) { // backwards: the last step is still in registers
        if (step != step1 - 1) {
            dbf_load_input<S>(a, x, VEC, chunk + step, lane, v);
        }
        DBF_UNROLL
        for (int i = 0; i < 4; ++i) {
            uint32_t hi, lo;
            dbf_quantize_q8(v[i], inverse, hi, lo);
            sum_hi = dbf_dp4a(hi, DBF_ONES, sum_hi);
            sum_lo = dbf_dp4a(lo, DBF_ONES, sum_lo);
            uint32_t * to = planes + (((step*8 + 2*i + j/4)*TOKENS*2)*4 + t)*4 + j%4;
            to[0]   = hi;
            to[4*4] = lo;
        }
    }
    sum = dbf_warp_sum(256*sum_hi + sum_lo);
}

// ---- up to 4 tokens
//
// Reading the signs is nearly all that one token costs, so that everything is arranged around loads: a warp has the signs of
// DBF_AHEAD steps on their way before it quantizes its input, and while it computes.
//
//               n_words
//         +----+----+----+----+
//         | w0 | w1 | .. | w7 |   a tile: 16 rows. Each warp has a slice of the row, computes the sums of 16 rows for it,
//         +----+----+----+----+   with its own scale, and shared memory adds the slices up, always in the same order.
//         |    |    |    |    |   The next tile of the block is grid_x tiles further down.
//
// Shared memory, in uint4:
//     planes    [step of the chunk][2*word of the lane + half][token][plane][t]      half: registers 0..3 or 4..7
//     partial   [parity][warp][token][16] floats
// What a warp loads at a time is contiguous, whatever the number of tokens: no bank conflicts.
//
// An input that does not fit is taken in chunks, and y collects their results: rare, n > 30,000 with one token on most cards.
// Without tensor cores (MMA = false) the order of work is the same, for one token, and blockIdx.y goes through the tokens.
template <int VEC, int TOKENS, bool MMA>
__global__ void __launch_bounds__(32*DBF_WARPS, DBF_BLOCKS_SM) dbf_decode(const dbf_args a) {
#if defined(DBF_MMA_AVAILABLE) || defined(DBF_DP4A_AVAILABLE)
    DBF_SHARED(uint4, planes);
    float * partial = (float *) (planes + a.chunk_steps*64*TOKENS);

    const int lane    = threadIdx.x%32;
    const int warp    = threadIdx.x/32;
    const int n_warps = blockDim.x/32;
    const int g       = lane/4;
    const int t       = lane%4;
    const int n_tiles = (a.n_rows + DBF_ROWS - 1)/DBF_ROWS;
    int parity = 0;

    for (int token0 = blockIdx.y*TOKENS; token0 < a.n_tokens; token0 += gridDim.y*TOKENS) {
        const int live = a.n_tokens - token0 < TOKENS ? a.n_tokens - token0 : TOKENS;

        for (int chunk = 0; chunk < a.n_steps; chunk += a.chunk_steps) {
            const int n     = a.n_steps - chunk < a.chunk_steps ? a.n_steps - chunk : a.chunk_steps;
            const int step0 = n*warp/n_warps;
            const int step1 = n*(warp + 1)/n_warps;

            // signs of the steps to come: of this tile and then of the next one, so that no load waits for the end of a tile
            uint32_t ahead[DBF_AHEAD][2][4] = {};
            int next_tile = blockIdx.x;
            int next_step = step0;
            const uint32_t * next_row[2] = { dbf_row(a, next_tile*DBF_ROWS + g), dbf_row(a, next_tile*DBF_ROWS + g + 8) };
            const auto load_next = [&](uint32_t (&w)[2][4]) {
                if (next_tile >= n_tiles || step0 == step1) {
                    return;
                }
                dbf_load_signs<VEC, true>(w[0], next_row[0], (chunk + next_step)*DBF_STEP, t, a.n_words);
                dbf_load_signs<VEC, true>(w[1], next_row[1], (chunk + next_step)*DBF_STEP, t, a.n_words);
                if (++next_step == step1) {
                    next_step = step0;
                    next_tile += gridDim.x;
                    next_row[0] = dbf_row(a, next_tile*DBF_ROWS + g);
                    next_row[1] = dbf_row(a, next_tile*DBF_ROWS + g + 8);
                }
            };
            DBF_UNROLL
            for (int i = 0; i < DBF_AHEAD; ++i) {
                load_next(ahead[i]);
            }

            dbf_wait_for_previous_kernel();

            // lane t keeps the scale of token t, whose sums it will have
            float d   = 0.0f;
            int   sum = 0;
            DBF_UNROLL
            for (int token = 0; token < TOKENS; ++token) {
                if (token < live) {
                    const float * x  = a.x + (token0 + token)*a.x_stride;
                    uint32_t    * to = (uint32_t *) (planes + token*8);
                    float d_token;
                    int   sum_token;
                    if (a.s_in_type == DBF_SCALE_F16) {
                        dbf_quantize_slice<VEC, TOKENS, DBF_SCALE_F16>(a, x, to, chunk, step0, step1, lane, d_token, sum_token);
                    } else if (a.s_in_type == DBF_SCALE_F32) {
                        dbf_quantize_slice<VEC, TOKENS, DBF_SCALE_F32>(a, x, to, chunk, step0, step1, lane, d_token, sum_token);
                    } else {
                        dbf_quantize_slice<VEC, TOKENS, DBF_SCALE_NONE>(a, x, to, chunk, step0, step1, lane, d_token, sum_token);
                    }
                    d   = t == token ? d_token   : d;
                    sum = t == token ? sum_token : sum;
                }
            }
            __syncwarp();
            dbf_let_next_kernel_start();

            // the lane's column: a token and a plane. Columns behind the last token repeat its columns.
            const int column = (g/2)%TOKENS < live ? (g/2)%TOKENS : live - 1;
            const uint4 * input = planes + (MMA ? (column*2 + g%2)*4 : 0) + t;

            for (int tile = blockIdx.x; tile < n_tiles; tile += gridDim.x) {
                const int  row    = tile*DBF_ROWS + (int) threadIdx.x%DBF_ROWS;
                const int  token  = token0 + (int) threadIdx.x/DBF_ROWS;
                const bool writes = threadIdx.x < DBF_ROWS*TOKENS && row < a.n_rows && token < a.n_tokens;
                const float scale = writes ? dbf_scale(a.s_out, a.s_out_type, row) : 0.0f; // early: it takes its time

                int acc[4][4] = {}; // [j][row g: hi, lo, row g+8: hi, lo]
                for (int step = step0; step < step1; ++step) {
                    uint32_t w[2][4];
                    DBF_UNROLL
                    for (int i = 0; i < 4; ++i) {
                        w[0][i] = ahead[0][0][i];
                        w[1][i] = ahead[0][1][i];
                        DBF_UNROLL
                        for (int k = 0; k + 1 < DBF_AHEAD; ++k) {
                            ahead[k][0][i] = ahead[k + 1][0][i];
                            ahead[k][1][i] = ahead[k + 1][1][i];
                        }
                    }
                    load_next(ahead[DBF_AHEAD - 1]);

                    DBF_UNROLL
                    for (int i = 0; i < 4; ++i) {
                        const uint32_t upper[2] = { w[0][i] >> 4, w[1][i] >> 4 };
                        DBF_UNROLL
                        for (int plane = 0; plane < (MMA ? 1 : 2); ++plane) {
                            const uint4 b0 = input[((step*8 + 2*i)    *TOKENS*2 + plane)*4];
                            const uint4 b1 = input[((step*8 + 2*i + 1)*TOKENS*2 + plane)*4];
                            DBF_UNROLL
                            for (int j = 0; j < 4; ++j) {
                                const uint32_t mask = DBF_ONES << j;
                                const uint32_t bits[4] = { w[0][i] & mask, w[1][i] & mask, upper[0] & mask, upper[1] & mask };
                                const uint32_t b[2]    = { dbf_get(b0, j), dbf_get(b1, j) };
                                if constexpr (MMA) {
                                    dbf_mma(acc[j], bits, b);
                                } else {
                                    acc[j][plane]     = dbf_dp4a(bits[2], b[1], dbf_dp4a(bits[0], b[0], acc[j][plane]));
                                    acc[j][2 + plane] = dbf_dp4a(bits[3], b[1], dbf_dp4a(bits[1], b[0], acc[j][2 + plane]));
                                }
                            }
                        }
                    }
                }

                int s[4];
                DBF_UNROLL
                for (int i = 0; i < 4; ++i) {
                    s[i] = acc[0][i] + (acc[1][i] >> 1) + (acc[2][i] >> 2) + (acc[3][i] >> 3);
                    if constexpr (!MMA) { // the four lanes of a row have different words of it
                        s[i] += __shfl_xor_sync(0xffffffff, s[i], 1);
                        s[i] += __shfl_xor_sync(0xffffffff, s[i], 2);
                    }
                }

                // The two halves of `partial` take turns, and so one barrier a tile is enough: who writes a half again has
                // passed the barrier of the tile in between, which comes after the reads of this one.
                float * mine = partial + (parity*n_warps + warp)*TOKENS*DBF_ROWS;
                if (t < TOKENS) {
                    mine[t*DBF_ROWS + g]     = d*(float) (2*(256*s[0] + s[1]) - sum);
                    mine[t*DBF_ROWS + g + 8] = d*(float) (2*(256*s[2] + s[3]) - sum);
                }
                __syncthreads();
                if (writes) {
                    float total = 0.0f;
                    for (int i = 0; i < n_warps; ++i) {
                        total += partial[(parity*n_warps + i)*TOKENS*DBF_ROWS + (int) threadIdx.x];
                    }
                    float * y = a.y + (int64_t) token*a.n_rows + row;
                    *y = chunk == 0 ? scale*total : *y + scale*total; // this thread wrote it
                }
                parity ^= 1;
            }
        }
    }
#endif
}

// ---- more tokens: the input is quantized once, into the fragments that dbf_tile reads
//
// fragments, in uint4: [group][step][load][lane], lane = 4*column + t. A group is 8 columns:
//     int8    4 tokens of two planes; load = 2*word of the lane + half, 8 of them, the layout of dbf_decode with 4 tokens
//     fp16    8 tokens; load = 4*word of the lane + m/4, 16 of them: register m has the values m and m + 16

template <bool F16, dbf_scale_type S>
static __device__ __forceinline__ void dbf_quantize_token(const dbf_args & a, uint32_t * shared) {
    const int lane  = threadIdx.x%32;
    const int warp  = threadIdx.x/32;
    const int t     = lane/8;
    const int j     = lane%8;
    const int token = blockIdx.x;
    const float * x = a.x + token*a.x_stride;

    constexpr int TOKENS = F16 ? DBF_TOKENS_F16 : DBF_TOKENS_Q8;
    constexpr int LOADS  = F16 ? 16 : 8;
    uint32_t * fragments = (uint32_t *) a.fragments + (int64_t) (token/TOKENS)*a.n_steps*LOADS*128;

    float    v[4][4];
    uint32_t largest = 0;
    for (int step = warp; step < a.n_steps; step += DBF_WARPS) {
        dbf_load_input<S>(a, x, a.vec, step, lane, v);
        largest = dbf_largest(v, largest);
    }
    largest = dbf_warp_max(largest);
    if (lane == 0) {
        shared[warp] = largest;
    }
    __syncthreads();
    for (int i = 0; i < DBF_WARPS; ++i) {
        largest = largest > shared[i] ? largest : shared[i];
    }

    float inverse;
    dbf_info info = { 0.0f, 0, 0, 0 };
    info.d = dbf_step_size(largest, F16 ? DBF_F16_MAX : DBF_QMAX, inverse);

    for (int step = warp; step < a.n_steps; step += DBF_WARPS) {
        dbf_load_input<S>(a, x, a.vec, step, lane, v);
        DBF_UNROLL
        for (int i = 0; i < 4; ++i) {
            if constexpr (F16) {
                DBF_UNROLL
                for (int half = 0; half < 2; ++half) { // registers j and j + 8
                    const bool zero = inverse == 0.0f; // v may be NaN
                    const uint32_t lower = __half_as_ushort(__float2half_rn(zero ? 0.0f : v[i][half]*inverse));
                    const uint32_t upper = __half_as_ushort(__float2half_rn(zero ? 0.0f : v[i][half + 2]*inverse));
                    const int load = 4*i + 2*half + j/4;
                    fragments[((step*LOADS + load)*32 + token%TOKENS*4 + t)*4 + j%4] = upper << 16 | lower;
                }
            } else {
                uint32_t hi, lo;
                dbf_quantize_q8(v[i], inverse, hi, lo);
                info.sum_hi = dbf_dp4a(hi, DBF_ONES, info.sum_hi);
                info.sum_lo = dbf_dp4a(lo, DBF_ONES, info.sum_lo);
                uint32_t * to = fragments + ((step*LOADS + 2*i + j/4)*32 + token%TOKENS*8 + t)*4 + j%4;
                to[0]   = hi;
                to[4*4] = lo;
            }
        }
    }

    info.sum_hi = dbf_warp_sum(info.sum_hi);
    info.sum_lo = dbf_warp_sum(info.sum_lo);
    if (lane == 0) {
        shared[DBF_WARPS   + warp] = (uint32_t) info.sum_hi;
        shared[2*DBF_WARPS + warp] = (uint32_t) info.sum_lo;
    }
    __syncthreads();
    if (threadIdx.x == 0) {
        for (int i = 1; i < DBF_WARPS; ++i) {
            info.sum_hi += (int) shared[DBF_WARPS   + i];
            info.sum_lo += (int) shared[2*DBF_WARPS + i];
        }
        a.info[token] = info;
    }
}

// One block for each token
template <bool F16>
__global__ void __launch_bounds__(32*DBF_WARPS) dbf_quantize(const dbf_args a) {
#ifdef DBF_MMA_AVAILABLE
    DBF_SHARED(uint32_t, shared);

    dbf_wait_for_previous_kernel();
    dbf_let_next_kernel_start();
    if (a.s_in_type == DBF_SCALE_F16) {
        dbf_quantize_token<F16, DBF_SCALE_F16>(a, shared);
    } else if (a.s_in_type == DBF_SCALE_F32) {
        dbf_quantize_token<F16, DBF_SCALE_F32>(a, shared);
    } else {
        dbf_quantize_token<F16, DBF_SCALE_NONE>(a, shared);
    }
#endif
}

template <bool F16> struct dbf_number       { typedef int   type; };
template <>         struct dbf_number<true> { typedef float type; };

// A block computes 4*16*ROW_SETS rows by 8*COLUMNS columns. A warp has rows of its own and all columns: it turns signs to
// bytes (or fp16) once for all of them. The input goes through shared memory, in two buffers that take turns: while the warps
// compute with one, the threads have the loads for the other on their way.
//
//                    +--- 8*COLUMNS ---+
//                    |     input       |   a stage: 4 loads of 16 bytes for each lane and group of columns;
//                    +-----------------+   two words of each lane in int8, one in fp16
//     +---------+    +-----------------+
//     |  signs  |    |     warp 0      |   16*ROW_SETS rows
//     |         |    |     warp 1      |
//     |         |    |      ...        |
//     +---------+    +-----------------+
//
// Here the bits are shifted down to 0 and 1 and not left at 2^j: the shifts serve all columns, and one accumulator for each
// of four j would be too many registers.
template <int VEC, int ROW_SETS, int COLUMNS, bool F16>
__global__ void __launch_bounds__(32*DBF_TILE_WARPS, 2) dbf_tile(const dbf_args a) {
#ifdef DBF_MMA_AVAILABLE
    constexpr int STAGES = F16 ? 4 : 2;  // of a step
    constexpr int STAGE  = 4*32;         // uint4 of a stage and a group
    typedef typename dbf_number<F16>::type number;

    DBF_SHARED(uint4, shared); // [2][COLUMNS][4][lane]

    const int lane = threadIdx.x%32;
    const int warp = threadIdx.x/32;
    const int g    = lane/4;
    const int t    = lane%4;
    const int row0 = (blockIdx.x*DBF_TILE_WARPS + warp)*ROW_SETS*DBF_ROWS + g;

    const int     n_stages     = a.n_steps*STAGES;
    const int64_t group_stride = (int64_t) n_stages*STAGE;
    const uint4 * fragments    = (const uint4 *) a.fragments + (int64_t) blockIdx.y*COLUMNS*group_stride + threadIdx.x;

    const uint32_t * rows[ROW_SETS][2];
    uint32_t next[ROW_SETS][2][4]; // signs of the next step
    DBF_UNROLL
    for (int r = 0; r < ROW_SETS; ++r) {
        DBF_UNROLL
        for (int i = 0; i < 2; ++i) {
            rows[r][i] = dbf_row(a, row0 + 16*r + 8*i);
            dbf_load_signs<VEC, false>(next[r][i], rows[r][i], 0, t, a.n_words);
        }
    }

    dbf_wait_for_previous_kernel();
    dbf_let_next_kernel_start();

    uint4 next_input[COLUMNS];
    DBF_UNROLL
    for (int c = 0; c < COLUMNS; ++c) {
        shared[c*STAGE + threadIdx.x] = fragments[c*group_stride];
    }
    __syncthreads();

    number acc[ROW_SETS][COLUMNS][4] = {};
    for (int step = 0; step < a.n_steps; ++step) {
        uint32_t w[ROW_SETS][2][4];
        DBF_UNROLL
        for (int r = 0; r < ROW_SETS; ++r) {
            DBF_UNROLL
            for (int i = 0; i < 2; ++i) {
                DBF_UNROLL
                for (int k = 0; k < 4; ++k) {
                    w[r][i][k] = next[r][i][k];
                }
                if (step + 1 < a.n_steps) {
                    dbf_load_signs<VEC, false>(next[r][i], rows[r][i], (step + 1)*DBF_STEP, t, a.n_words);
                }
            }
        }

        DBF_UNROLL
        for (int stage = 0; stage < STAGES; ++stage) {
            const int  next_stage = step*STAGES + stage + 1;
            const bool more       = next_stage < n_stages;
            DBF_UNROLL
            for (int c = 0; c < COLUMNS; ++c) {
                next_input[c] = more ? fragments[c*group_stride + (int64_t) next_stage*STAGE] : make_uint4(0, 0, 0, 0);
            }

            const uint4 * input = shared + stage%2*COLUMNS*STAGE + lane;
            DBF_UNROLL
            for (int part = 0; part < 2; ++part) {
                uint32_t bits[4][ROW_SETS][4]; // [instruction][rows][register]
                DBF_UNROLL
                for (int r = 0; r < ROW_SETS; ++r) {
                    DBF_UNROLL
                    for (int i = 0; i < 2; ++i) {
                        DBF_UNROLL
                        for (int j = 0; j < 4; ++j) {
                            if constexpr (F16) {
                                // bits m and m + 16 become the signs of 1.0 in both halves, 1 = +1; m = 4*part + j, then + 8
                                const uint32_t word = w[r][i][stage];
                                bits[j][r][i]     = (word << (15 - 4*part - j) & 0x80008000u) ^ 0xbc00bc00u;
                                bits[j][r][i + 2] = (word << ( 7 - 4*part - j) & 0x80008000u) ^ 0xbc00bc00u;
                            } else {
                                const uint32_t word = w[r][i][2*stage + part];
                                bits[j][r][i]     = word >> j       & DBF_ONES;
                                bits[j][r][i + 2] = word >> (j + 4) & DBF_ONES;
                            }
                        }
                    }
                }
                DBF_UNROLL
                for (int c = 0; c < COLUMNS; ++c) {
                    const uint4 b0 = input[c*STAGE + (F16 ? part     : 2*part    )*32];
                    const uint4 b1 = input[c*STAGE + (F16 ? part + 2 : 2*part + 1)*32];
                    DBF_UNROLL
                    for (int j = 0; j < 4; ++j) {
                        const uint32_t b[2] = { dbf_get(b0, j), dbf_get(b1, j) };
                        DBF_UNROLL
                        for (int r = 0; r < ROW_SETS; ++r) {
                            dbf_mma(acc[r][c], bits[j][r], b);
                        }
                    }
                }
            }

            if (more) { // the other buffer was last read in the stage before, which the barrier at its end has closed
                DBF_UNROLL
                for (int c = 0; c < COLUMNS; ++c) {
                    shared[((stage + 1)%2*COLUMNS + c)*STAGE + threadIdx.x] = next_input[c];
                }
            }
            __syncthreads();
        }
    }

    DBF_UNROLL
    for (int c = 0; c < COLUMNS; ++c) {
        const int group = blockIdx.y*COLUMNS + c;
        DBF_UNROLL
        for (int k = 0; k < (F16 ? 2 : 1); ++k) {
            // fp16: columns 2t and 2t + 1 are two tokens. int8: they are the planes of token t.
            const int token = F16 ? group*DBF_TOKENS_F16 + 2*t + k : group*DBF_TOKENS_Q8 + t;
            if (token >= a.n_tokens) {
                continue;
            }
            const dbf_info info = a.info[token];
            DBF_UNROLL
            for (int r = 0; r < ROW_SETS; ++r) {
                DBF_UNROLL
                for (int i = 0; i < 2; ++i) {
                    const int row = row0 + 16*r + 8*i;
                    if (row < a.n_rows) {
                        float sum;
                        if constexpr (F16) {
                            sum = acc[r][c][2*i + k];
                        } else {
                            sum = 256.0f*(float) (2*acc[r][c][2*i] - info.sum_hi) + (float) (2*acc[r][c][2*i + 1] - info.sum_lo);
                        }
                        a.y[(int64_t) token*a.n_rows + row] = dbf_scale(a.s_out, a.s_out_type, row)*(info.d*sum);
                    }
                }
            }
        }
    }
#endif
}
