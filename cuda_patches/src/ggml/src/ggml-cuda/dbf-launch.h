#pragma once

//
// The host side of GGML_OP_DBF_MUL_MAT on CUDA, as plain functions: which kernels run for a shape, with which grid and shared
// memory, and what each of them gets. dbf.cu launches what is said here; so do the tests, on an emulated GPU.
//
// The op is two products with signs, "stages", that differ in nothing but their operands:
//
//   stage 1    u[t][r] = sm[r] * sum_i B[r][i] * (sb[i]*x[t][i])      r < k
//   stage 2    y[t][r] = sa[r] * sum_i A[r][i] * u[t][i]              r < n_out
//
//   one token                         2 launches; every block rounds the input for itself
//   several tokens, sm_75 and newer   4 launches; the input of a stage is rounded once, by a kernel of its own
//   several tokens, sm_61 to sm_72    2 launches, a row of blocks for each token
//

#include <algorithm>
#include <cassert>
#include <cstddef>
#include <cstdint>

#define DBF_WORD          32  // signs in a word
#define DBF_STEP_WORDS    16  // words of a row that a warp takes at a time: 4 lanes with 4 words (16 bytes) each
#define DBF_TILE_ROWS     16  // rows of a tile: m of the tensor cores' m16n8k32
#define DBF_GEMM_WARPS    4
#define DBF_ROUND_WARPS   8
#define DBF_STEP_BYTES    (2*DBF_WORD*DBF_STEP_WORDS)   // of a step's input in two planes of int8, and also in fp16
#define DBF_Q8_TOKENS     4   // tokens in the 8 columns of a tile: two planes each
#define DBF_F16_TOKENS    8

// Several tokens: the 4 warps of a block with few tiles of columns divide the steps, with many the rows. See dbf_gemm.
#define DBF_GEMM_DIVIDES_STEPS(tiles) ((tiles) <= 2)
#define DBF_GEMM_ROWS(tiles)          (2*DBF_TILE_ROWS*(DBF_GEMM_DIVIDES_STEPS(tiles) ? 1 : DBF_GEMM_WARPS))

#define DBF_GEMM_MANY_AS_FEW          13 // see docs/gpu-model.md

// registers a thread may take, as __launch_bounds__ promises the compiler; with it the blocks on a multiprocessor
#define DBF_DECODE_BLOCKS(warps) ((warps) == 8 ? 2 : 1)
#define DBF_GEMM_BLOCKS(tiles)   (DBF_GEMM_DIVIDES_STEPS(tiles) ? 4 : 2)

enum dbf_path {
    DBF_PATH_DEFAULT, // two planes of int8
    DBF_PATH_F16,     // inputs in fp16, the reference for accuracy; needs tensor cores
};

enum dbf_scale_type : int32_t { DBF_SCALE_NONE, DBF_SCALE_F16, DBF_SCALE_F32 };

// X(name, kernel): all kernels that ship, one instance a line
#define DBF_KERNELS(X)                                                  \
    X(DBF_KERNEL_DECODE_MMA_8,         (dbf_decode< 8, 4, true>))       \
    X(DBF_KERNEL_DECODE_MMA_8_WORDS,   (dbf_decode< 8, 1, true>))       \
    X(DBF_KERNEL_DECODE_MMA_16,        (dbf_decode<16, 4, true>))       \
    X(DBF_KERNEL_DECODE_MMA_16_WORDS,  (dbf_decode<16, 1, true>))       \
    X(DBF_KERNEL_DECODE_DP4A_8,        (dbf_decode< 8, 4, false>))      \
    X(DBF_KERNEL_DECODE_DP4A_8_WORDS,  (dbf_decode< 8, 1, false>))      \
    X(DBF_KERNEL_ROUND_Q8,             (dbf_round<false>))              \
    X(DBF_KERNEL_ROUND_F16,            (dbf_round<true>))               \
    X(DBF_KERNEL_GEMM_Q8_1,            (dbf_gemm<1, 4, false>))         \
    X(DBF_KERNEL_GEMM_Q8_1_WORDS,      (dbf_gemm<1, 1, false>))         \
    X(DBF_KERNEL_GEMM_Q8_2,            (dbf_gemm<2, 4, false>))         \
    X(DBF_KERNEL_GEMM_Q8_2_WORDS,      (dbf_gemm<2, 1, false>))         \
    X(DBF_KERNEL_GEMM_Q8_8,            (dbf_gemm<8, 4, false>))         \
    X(DBF_KERNEL_GEMM_Q8_8_WORDS,      (dbf_gemm<8, 1, false>))         \
    X(DBF_KERNEL_GEMM_F16_1,           (dbf_gemm<1, 4, true>))          \
    X(DBF_KERNEL_GEMM_F16_1_WORDS,     (dbf_gemm<1, 1, true>))          \
    X(DBF_KERNEL_GEMM_F16_4,           (dbf_gemm<4, 4, true>))          \
    X(DBF_KERNEL_GEMM_F16_4_WORDS,     (dbf_gemm<4, 1, true>))

#define DBF_KERNEL_ID(name, kernel) name,
enum dbf_kernel { DBF_KERNELS(DBF_KERNEL_ID) DBF_KERNEL_COUNT };
#undef DBF_KERNEL_ID

struct dbf_shape {
    int64_t n_in, k, n_out, n_tokens;
    int64_t x_stride;              // floats from one token to the next
    dbf_scale_type sb, sm, sa;
};

struct dbf_device {
    int    cc;             // 100*major + 10*minor
    int    n_sm;           // multiprocessors
    size_t shared_block;   // bytes of shared memory that a block may have (opt-in)
    size_t shared_sm;      // that a multiprocessor has for its blocks
};

struct dbf_operands {
    const void * A, * B, * sa, * sm, * sb;
    const float * x;
    float * y;
};

// how a vector was rounded: v ~ d*(256*hi + lo), or d*h
struct dbf_rounding {
    float   d;
    int32_t sum_hi;
    int32_t sum_lo;
};

// what a kernel gets: one stage
struct dbf_args {
    const uint32_t * signs;    // [rows][n_words]
    const float    * x;        // [n_tokens], x_stride floats apart
    const void     * s_in;     // [n] or NULL
    const void     * s_out;    // [rows]
    float          * y;        // [n_tokens][rows]
    void           * rounded;  // x as planes or fp16, in fragments: see dbf-kernels.cuh
    dbf_rounding   * info;     // [n_tokens]
    int64_t          x_stride;
    int32_t          n_words;
    int32_t          rows;
    int32_t          n_tokens;
    int32_t          chunk_steps;  // steps whose input is in shared memory at a time
    dbf_scale_type   s_in_type;
    dbf_scale_type   s_out_type;
    int32_t          x_vector;     // x and s_in may be read 4 values at a time
};

struct dbf_dim {
    int x, y;
};

struct dbf_launch {
    dbf_kernel kernel;
    dbf_dim    grid;
    int        block;        // threads
    size_t     shared;       // bytes
    int        stage;        // 0 or 1
    int        chunk_steps;
};

struct dbf_plan {
    dbf_shape  shape;
    int        n_launches;
    dbf_launch launches[4];
    size_t     u, rounded, info;  // offsets in the workspace
    size_t     workspace;         // bytes
};

static inline int64_t dbf_div_up(int64_t a, int64_t b) {
    return (a + b - 1)/b;
}

static inline bool dbf_has_mma(int cc) {
    return cc >= 750;
}

// NULL if the op can be computed, else why not
static inline const char * dbf_unsupported(const dbf_shape & s, const dbf_device & device) {
    if (device.cc < 610) {
        return "the GPU has no dp4a";
    }
    if (std::min(std::min(s.n_in, s.k), std::min(s.n_out, s.n_tokens)) <= 0) {
        return "a dimension is empty";
    }
    if (s.n_in % DBF_WORD != 0 || s.k % DBF_WORD != 0) {
        return "n_in and k must be multiples of 32";
    }
    if (std::max(std::max(s.n_in, s.k), s.n_out/16) > (1 << 22)) {
        return "a dimension is too large"; // twice the sum of n bytes must fit 32 bits, and so must the number of a row
    }
    if (s.n_tokens > 65535) {
        return "more than 65535 tokens"; // grid.y
    }
    return nullptr;
}

static inline dbf_launch dbf_plan_decode(const dbf_device & device, int stage, int64_t n, int64_t rows, int64_t n_tokens, bool words, bool mma) {
    const int64_t n_steps = dbf_div_up(n, DBF_WORD*DBF_STEP_WORDS);
    const int64_t n_tiles = dbf_div_up(rows, DBF_TILE_ROWS);

    // Every block rounds the whole input. With few steps two blocks of 8 warps share a multiprocessor, one rounds while the
    // other computes; with many, one block of 16 warps rounds half as much.
    const int  warps = mma && n_steps >= 16 ? 16 : 8;
    const auto bytes = [warps](int64_t steps) {
        return (size_t) (steps*DBF_STEP_BYTES + 2*warps*DBF_TILE_ROWS*sizeof(float));
    };
    const int64_t fits = (int64_t) (device.shared_block - bytes(0))/DBF_STEP_BYTES;
    const int64_t chunk_steps = n_steps <= fits ? n_steps : fits/warps*warps; // see dbf_decode: whole rounds of the warps
    assert(chunk_steps > 0 && "DBF: shared memory for not even one step a warp");

    dbf_launch l = {};
    l.stage       = stage;
    l.chunk_steps = (int) chunk_steps;
    l.block       = 32*warps;
    l.shared      = bytes(chunk_steps);
    // as many blocks as run at the same time: each rounds the input once and takes tiles in turn
    const int64_t per_sm = std::max<int64_t>(1, std::min<int64_t>(DBF_DECODE_BLOCKS(warps), device.shared_sm/(l.shared + 1024)));
    l.grid = { (int) std::min(n_tiles, std::max<int64_t>(1, per_sm*device.n_sm/n_tokens)), (int) n_tokens };
    if (mma) {
        l.kernel = warps == 8 ? (words ? DBF_KERNEL_DECODE_MMA_8_WORDS  : DBF_KERNEL_DECODE_MMA_8)
                              : (words ? DBF_KERNEL_DECODE_MMA_16_WORDS : DBF_KERNEL_DECODE_MMA_16);
    } else {
        l.kernel = words ? DBF_KERNEL_DECODE_DP4A_8_WORDS : DBF_KERNEL_DECODE_DP4A_8;
    }
    return l;
}

static inline dbf_launch dbf_plan_round(int stage, int64_t n_tokens, bool f16) {
    dbf_launch l = {};
    l.kernel = f16 ? DBF_KERNEL_ROUND_F16 : DBF_KERNEL_ROUND_Q8;
    l.stage  = stage;
    l.grid   = { (int) n_tokens, 1 };
    l.block  = 32*DBF_ROUND_WARPS;
    l.shared = 4*DBF_ROUND_WARPS*sizeof(uint32_t);
    return l;
}

static inline dbf_launch dbf_plan_gemm(const dbf_device & device, int stage, int64_t rows, int64_t n_tokens, bool words, bool f16) {
    const int64_t tokens = f16 ? DBF_F16_TOKENS : DBF_Q8_TOKENS; // in a tile of columns
    const int64_t groups = dbf_div_up(n_tokens, tokens);

    // Blocks of many columns read the signs and the input fewer times, and turn signs into bytes for more columns at once: one
    // takes about as long as DBF_GEMM_MANY_AS_FEW of few columns, of which 16 would do the same. What counts is the multiprocessor
    // that gets most of them.
    const int  many = f16 ? 4 : 8;
    const int  few  = groups <= 1 || f16 ? 1 : 2;
    const auto most = [&](int tiles) {
        return dbf_div_up(dbf_div_up(rows, DBF_GEMM_ROWS(tiles))*dbf_div_up(groups, tiles), device.n_sm);
    };
    const int tiles = DBF_GEMM_MANY_AS_FEW*most(many) <= most(few) ? many : few; // of columns in a block

    dbf_launch l = {};
    if (f16) {
        l.kernel = tiles == 1 ? (words ? DBF_KERNEL_GEMM_F16_1_WORDS : DBF_KERNEL_GEMM_F16_1)
                              : (words ? DBF_KERNEL_GEMM_F16_4_WORDS : DBF_KERNEL_GEMM_F16_4);
    } else {
        l.kernel = tiles == 1 ? (words ? DBF_KERNEL_GEMM_Q8_1_WORDS : DBF_KERNEL_GEMM_Q8_1)
                 : tiles == 2 ? (words ? DBF_KERNEL_GEMM_Q8_2_WORDS : DBF_KERNEL_GEMM_Q8_2)
                              : (words ? DBF_KERNEL_GEMM_Q8_8_WORDS : DBF_KERNEL_GEMM_Q8_8);
    }
    l.stage  = stage;
    l.grid   = { (int) dbf_div_up(rows, DBF_GEMM_ROWS(tiles)), (int) dbf_div_up(groups, tiles) };
    l.block  = 32*DBF_GEMM_WARPS;
    l.shared = DBF_GEMM_DIVIDES_STEPS(tiles) ? DBF_GEMM_WARPS*DBF_GEMM_ROWS(tiles)*8*tiles*sizeof(int32_t) // the sums of each warp
                                             : tiles*tokens*DBF_STEP_BYTES;                               // input of a step
    return l;
}

// `a_vector`, `b_vector`: A and B lie at multiples of 16 bytes.
static inline dbf_plan dbf_make_plan(const dbf_shape & shape, const dbf_device & device, bool a_vector, bool b_vector, dbf_path path) {
    const bool mma = dbf_has_mma(device.cc);
    const bool f16 = mma && path == DBF_PATH_F16;

    dbf_plan plan = {};
    plan.shape = shape;

    size_t end = 0;
    const auto take = [&](size_t bytes) {
        const size_t at = end;
        end += (bytes + 255)/256*256;
        return at;
    };
    plan.u = take(shape.n_tokens*shape.k*sizeof(float));

    const bool rounded_once = f16 || (mma && shape.n_tokens > 1);
    if (rounded_once) {
        const int64_t group = f16 ? DBF_F16_TOKENS : DBF_Q8_TOKENS;
        const int64_t steps = dbf_div_up(std::max(shape.n_in, shape.k), DBF_WORD*DBF_STEP_WORDS);
        plan.rounded = take(dbf_div_up(shape.n_tokens, group)*group*steps*DBF_STEP_BYTES);
        plan.info    = take(shape.n_tokens*sizeof(dbf_rounding));
    }
    plan.workspace = end;

    for (int stage = 0; stage < 2; ++stage) {
        const int64_t n     = stage == 0 ? shape.n_in : shape.k;
        const int64_t rows  = stage == 0 ? shape.k    : shape.n_out;
        const bool    words = n % (4*DBF_WORD) != 0 || !(stage == 0 ? b_vector : a_vector);
        if (rounded_once) {
            plan.launches[plan.n_launches++] = dbf_plan_round(stage, shape.n_tokens, f16);
            plan.launches[plan.n_launches++] = dbf_plan_gemm(device, stage, rows, shape.n_tokens, words, f16);
        } else {
            plan.launches[plan.n_launches++] = dbf_plan_decode(device, stage, n, rows, shape.n_tokens, words, mma);
        }
    }
    return plan;
}

// launch(const dbf_launch &, const dbf_args &) for each kernel, in order
template <class L>
static inline void dbf_execute(const dbf_plan & plan, const dbf_operands & o, void * workspace, L && launch) {
    const dbf_shape & s = plan.shape;
    float * u = (float *) ((char *) workspace + plan.u);

    const auto at_16_bytes = [](const void * p) { return (uintptr_t) p % 16 == 0; };
    for (int i = 0; i < plan.n_launches; ++i) {
        const dbf_launch & l = plan.launches[i];
        const bool first = l.stage == 0;

        dbf_args a = {};
        a.signs       = (const uint32_t *) (first ? o.B : o.A);
        a.x           = first ? o.x : u;
        a.s_in        = first ? o.sb : nullptr;
        a.s_out       = first ? o.sm : o.sa;
        a.y           = first ? u : o.y;
        a.rounded     = (char *) workspace + plan.rounded;
        a.info        = (dbf_rounding *) ((char *) workspace + plan.info);
        a.x_stride    = first ? s.x_stride : s.k;
        a.n_words     = (int32_t) ((first ? s.n_in : s.k)/DBF_WORD);
        a.rows        = (int32_t) (first ? s.k : s.n_out);
        a.n_tokens    = (int32_t) s.n_tokens;
        a.chunk_steps = l.chunk_steps;
        a.s_in_type   = first ? s.sb : DBF_SCALE_NONE;
        a.s_out_type  = first ? s.sm : s.sa;
        a.x_vector    = at_16_bytes(a.x) && a.x_stride % 4 == 0 && (a.s_in == nullptr || at_16_bytes(a.s_in));
        launch(l, a);
    }
}
