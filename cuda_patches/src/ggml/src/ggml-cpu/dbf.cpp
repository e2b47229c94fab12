// y = sa * (A @ (sm * (B @ (sb * x)))) with A and B matrices of signs (see ggml-dbf.h).
//
// CPUs with a byte shuffle look up sums of four inputs: dbf-tables.h. This is how all others do it, in plain C:
// a vector v is rounded to 16-bit integers with one scale, v ~ d*q with |q| <= 127*256 + 127, and
// q is kept as two planes of bytes, q = 256*hi + lo. With w the bits of a row of signs (1 = +1, 0 = -1),
//
//   row @ v = d * sum((2*w - 1)*q) = d * (2*S - sum(q)),    S = 256*sum(w*hi) + sum(w*lo)
//
// and both sums of S are sums of masked bytes, of which a vector holds many. Expanding the bits of w to bytes is what
// costs, so it is shared by both planes and by several tokens, and several rows share the loads of v.
//
// Two planes and not one: the factors multiply rounding errors of both products, and with 8 bits a token the logits of a
// model are off by several percent. At 16 bits the relative error of a product is at most 1e-5 * max|v|/rms(v).

#include "dbf.h"

#include "dbf-tables.h"
#include "ggml-dbf.h"
#include "ggml-cpu.h"
#include "ggml-cpu-impl.h"
#include "ggml-impl.h"
#include "simd-mappings.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

namespace {

constexpr int64_t QMAX     = 127*256 + 127;
constexpr int64_t ROWS     = 4;         // rows that share the loads of v
constexpr int64_t TOKENS   = 2;         // tokens that share the expansion of the signs
constexpr size_t  Q_TILE   = 128*1024;  // bytes of q that should stay in L2 while the signs stream past
constexpr int64_t PREFETCH = 4096;      // bytes ahead; the hardware prefetchers stop at the short rows

// one quantized vector: v ~ d * (256*hi + lo), planes at q and q + n
struct vec_info {
    float   d;
    int32_t sum_hi;
    int32_t sum_lo;
};

// A vector with a NaN or an infinity gets d = NaN, so that the whole result is NaN like that of a dense product;
// q stays finite and the integer sums are defined.
void quantize_vec(const float * v, int64_t n, int8_t * q, vec_info & info) {
    // the bits of |v| order like integers, with infinity and NaN above all finite values: one max sees everything
    uint32_t max_bits = 0;
    for (int64_t i = 0; i < n; ++i) {
        uint32_t bits;
        memcpy(&bits, v + i, sizeof(bits));
        max_bits = std::max(max_bits, bits & 0x7fffffff);
    }
    float amax;
    memcpy(&amax, &max_bits, sizeof(amax));

    int8_t * hi = q;
    int8_t * lo = q + n;

    const bool finite = max_bits < 0x7f800000;
    if (!finite || amax < 1e-30f) { // below, 1/d overflows
        memset(q, 0, 2*n);
        info = { finite ? 0.0f : NAN, 0, 0 };
        return;
    }

    const float d  = amax/QMAX;
    const float id = QMAX/amax;

    int32_t sum_hi = 0;
    int32_t sum_lo = 0;
    for (int64_t i = 0; i < n; ++i) {
        // adding 1.5*2^23 rounds to an integer in the low bits; unlike lrintf() this vectorizes
        const float shifted = v[i]*id + 12582912.0f;
        int32_t bits;
        memcpy(&bits, &shifted, sizeof(bits));
        const int32_t x = bits - 0x4b400000;

        const int32_t l = (int8_t) (x & 0xff);
        const int32_t h = (x - l) >> 8;
        hi[i] = (int8_t) h;
        lo[i] = (int8_t) l;
        sum_hi += h;
        sum_lo += l;
    }

    info = { d, sum_hi, sum_lo };
}

// ---- sums of q over the set bits of R rows for T vectors: s[r][t] = { sum(w*hi), sum(w*lo) }

inline uint32_t load_signs(const uint8_t * w) {
    uint32_t signs;
    memcpy(&signs, w, sizeof(signs));
    return signs;
}

// Plain C: the inner loop has a fixed length and no branch, so that compilers vectorize it on any target.
template <int R, int T>
void sum_rows(const uint8_t * w, size_t nb_w, const int8_t * q, int64_t n, int32_t (*s)[T][2]) {
    memset(s, 0, R*sizeof(*s));

    for (int64_t i = 0; i < n; i += 32) {
        for (int r = 0; r < R; ++r) {
            const uint32_t signs = load_signs(w + r*nb_w + i/8);
            if (i % 512 == 0) {
                dbf_prefetch(w + r*nb_w + i/8 + PREFETCH);
            }

            int8_t mask[32];
            for (int j = 0; j < 32; ++j) {
                mask[j] = -(int8_t) ((signs >> j) & 1);
            }
            for (int t = 0; t < T; ++t) {
                for (int plane = 0; plane < 2; ++plane) {
                    const int8_t * v = q + (2*t + plane)*n + i;
                    int32_t sum = 0;
                    for (int j = 0; j < 32; ++j) {
                        sum += (int8_t) (mask[j] & v[j]);
                    }
                    s[r][t][plane] += sum;
                }
            }
        }
    }
}

// ---- out[t*n_out + r] = scale[r] * (row r of W) @ v_t for rows [r0, r1)

// scales of rows [r, r + n)
void get_scales(const ggml_tensor * s, int64_t r, int64_t n, float * scale) {
    if (s->type == GGML_TYPE_F16) {
        ggml_cpu_fp16_to_fp32((const ggml_fp16_t *) s->data + r, scale, n);
    } else {
        memcpy(scale, (const float *) s->data + r, n*sizeof(float));
    }
}

template <int R, int T>
void mul_block(const ggml_tensor * W, const float * scale, const int8_t * q, const vec_info * info, int64_t r, float * out) {
    const int64_t n = W->ne[0];

    int32_t s[R][T][2];
    sum_rows<R, T>((const uint8_t *) W->data + r*W->nb[1], W->nb[1], q, n, s);

    for (int j = 0; j < R; ++j) {
        for (int t = 0; t < T; ++t) {
            // 256*sum(hi) leaves 32 bits from n = 65k on
            const int64_t hi = 2*(int64_t) s[j][t][0] - info[t].sum_hi;
            const int64_t lo = 2*(int64_t) s[j][t][1] - info[t].sum_lo;
            out[t*W->ne[1] + r + j] = scale[j] * info[t].d * (float) (256*hi + lo);
        }
    }
}

template <int R>
void mul_rows(const ggml_tensor * W, const ggml_tensor * s, const int8_t * q, const vec_info * info, int64_t n_vec, int64_t r, float * out) {
    const int64_t nb_q  = 2*W->ne[0];
    const int64_t n_out = W->ne[1];

    float scale[R];
    get_scales(s, r, R, scale);

    int64_t t = 0;
    for (; t + TOKENS <= n_vec; t += TOKENS) {
        mul_block<R, TOKENS>(W, scale, q + t*nb_q, info + t, r, out + t*n_out);
    }
    for (; t < n_vec; ++t) {
        mul_block<R, 1>(W, scale, q + t*nb_q, info + t, r, out + t*n_out);
    }
}

void mul_signs(const ggml_tensor * W, const ggml_tensor * s, const int8_t * q, const vec_info * info, int64_t n_vec,
        int64_t r0, int64_t r1, float * out) {
    const int64_t nb_q = 2*W->ne[0];
    const int64_t tile = std::max<int64_t>(TOKENS, Q_TILE/nb_q/TOKENS*TOKENS);

    for (int64_t t = 0; t < n_vec; t += tile) {
        const int64_t n = std::min(tile, n_vec - t);

        int64_t r = r0;
        for (; r + ROWS <= r1; r += ROWS) {
            mul_rows<ROWS>(W, s, q + t*nb_q, info + t, n, r, out + t*W->ne[1]);
        }
        for (; r < r1; ++r) {
            mul_rows<1>(W, s, q + t*nb_q, info + t, n, r, out + t*W->ne[1]);
        }
    }
}

// ---- how a factor lies in memory, see dbf.h

#if defined(DBF_TABLES)
namespace lut = dbf_tables;
#endif

const char TILES = 0; // its address in `extra` marks a factor that lies in tiles

// how many of its rows lie in tiles
int64_t tiled_rows(const ggml_tensor * W) {
#if defined(DBF_TABLES)
    return W->extra == &TILES ? W->ne[1]/lut::ROWS*lut::ROWS : 0;
#else
    GGML_UNUSED(W);
    return 0;
#endif
}

// sign i of row r
bool is_plus(const ggml_tensor * W, int64_t r, int64_t i) {
#if defined(DBF_TABLES)
    if (r < tiled_rows(W)) {
        return lut::is_plus((const uint8_t *) W->data + r/lut::ROWS*lut::ROWS*W->nb[1], r % lut::ROWS, i);
    }
#endif
    const block_dbf * row = (const block_dbf *) ((const char *) W->data + r*W->nb[1]);
    return (row[i/QK_DBF].signs >> (i % QK_DBF)) & 1;
}

// ---- the reference: nothing is rounded before the sum

void mul_signs_ref(const ggml_tensor * W, const ggml_tensor * s, const float * v, int64_t r0, int64_t r1, float * out) {
    for (int64_t r = r0; r < r1; ++r) {
        double sum = 0.0;
        for (int64_t i = 0; i < W->ne[0]; ++i) {
            sum += is_plus(W, r, i) ? v[i] : -v[i];
        }
        float scale;
        get_scales(s, r, 1, &scale);
        out[r] = (float) (scale*sum);
    }
}

// ---- the op

const float * input_row(const ggml_tensor * x, int64_t i) {
    const int64_t i3 = i/(x->ne[1]*x->ne[2]);
    const int64_t i2 = i/x->ne[1] % x->ne[2];
    const int64_t i1 = i % x->ne[1];
    return (const float *) ((const char *) x->data + i1*x->nb[1] + i2*x->nb[2] + i3*x->nb[3]);
}

// v = sb * x
void scale_input(const float * x, const ggml_tensor * sb, float * v) {
    const int64_t n = sb->ne[0];
    get_scales(sb, 0, n, v);
    for (int64_t i = 0; i < n; ++i) {
        v[i] *= x[i];
    }
}

// ---- how a product is computed

enum method {
    METHOD_PLANES,        // planes of bytes, all else
    METHOD_TABLES,        // a few tokens, one by one, by tables of bytes
    METHOD_SHARED_TABLES, // many tokens by the same tables, which the threads make together for a group of tokens
    METHOD_TOKEN_TABLES   // many tokens, 16 at a time
};

#if defined(DBF_TABLES)
constexpr int64_t FEW   = 4;  // with AVX2 so many tokens cost, one by one, as much as 16 at a time
constexpr int64_t GROUP = 16; // tokens whose tables, 8 bytes a column, should stay in L2 while the signs stream past
#endif

method choose_method(int64_t n_vec) {
#if defined(DBF_TABLES)
    return n_vec <= FEW ? METHOD_TABLES : lut::SINGLES ? METHOD_SHARED_TABLES : METHOD_TOKEN_TABLES;
#else
    GGML_UNUSED(n_vec);
    return METHOD_PLANES;
#endif
}

// Threads divide the rows of both products, so they must meet between the two: u is needed whole. What else could be
// divided, rounding the vectors, is for few tokens less work than another meeting costs: each thread does it for itself.
bool is_private(method m, int64_t n_vec) {
    return m == METHOD_TABLES || (m == METHOD_PLANES && n_vec == 1);
}

// the share of n rows of one thread, in whole groups
void split_rows(method m, int64_t n, int ith, int nth, int64_t & r0, int64_t & r1) {
    int64_t group = ROWS;
#if defined(DBF_TABLES)
    group = m != METHOD_PLANES ? lut::ROWS : group;
#endif
    GGML_UNUSED(m);
    const int64_t groups = (n + group - 1)/group;
    r0 = std::min(n, groups*ith/nth*group);
    r1 = std::min(n, groups*(ith + 1)/nth*group);
}

// The work buffer: u, what all threads share of the rounded vectors, and a part for each thread.
struct work_layout {
    method m;
    size_t u, q, d, own, nb_own; // offsets; q: rounded vectors or their tables, d: their scales, or vec_info
    size_t row, own_q, tile, tables, sums; // offsets within a thread's part
    size_t total;

    work_layout(const ggml_tensor * dst, int n_tasks) {
        const int64_t n_vec = ggml_nrows(dst->src[1]);
        const int64_t n_in  = dst->src[2]->ne[0];
        const int64_t k     = dst->src[0]->ne[0];
        const int64_t n     = std::max(n_in, k);
        m = choose_method(n_vec);

        size_t offs = 0;
        const auto take = [&](size_t size) {
            const size_t at = offs;
            offs += GGML_PAD(size, 64);
            return at;
        };
        row   = take(n_in*sizeof(float));
        own_q = tile = tables = sums = q = d = 0;
        switch (m) {
            case METHOD_PLANES:
                {
                    const size_t nb_q = 2*n;
                    own_q  = take(is_private(m, n_vec) ? nb_q : 0);
                    nb_own = offs;
                    offs   = 0;
                    q = take(is_private(m, n_vec) ? 0 : n_vec*nb_q);
                    d = take(n_vec*sizeof(vec_info));
                } break;
#if defined(DBF_TABLES)
            case METHOD_TABLES:
                {
                    own_q  = take(n*sizeof(int16_t));
                    tile   = take(n/8*lut::ROWS);
                    tables = take(n_vec*lut::tables_size(n));
                    nb_own = offs;
                    offs   = 0;
                } break;
            case METHOD_SHARED_TABLES:
                {
                    own_q  = take(n*sizeof(int16_t));
                    tile   = take(n/8*lut::ROWS);
                    nb_own = offs;
                    offs   = 0;
                    q = take(GROUP*lut::tables_size(n));
                    d = take(GROUP*sizeof(float));
                } break;
            case METHOD_TOKEN_TABLES:
                {
                    const int64_t n_pad = GGML_PAD(n_vec, lut::TOKENS);
                    own_q  = take(lut::TOKENS*n*sizeof(int16_t));
                    tables = take(lut::STRIP/4*16*lut::TOKENS*sizeof(int16_t));
                    sums   = take(lut::ROW_BLOCK*lut::TOKENS*sizeof(int32_t));
                    nb_own = offs;
                    offs   = 0;
                    q = take(n_pad*n*sizeof(int16_t));
                    d = take(n_pad*sizeof(float));
                } break;
#endif
            default: GGML_ABORT("no such method");
        }
        u     = take(n_vec*k*sizeof(float));
        own   = take(n_tasks*nb_own);
        total = offs + 64; // to align the start
    }
};

// ---- both products, by each method. `get(t, row)` gives vector t, in `row` or where it lies.

#if defined(DBF_TABLES)

// one vector's tables; returns their scale
float make_tables(const float * v, int64_t n, int16_t * q, uint8_t * tables) {
    const float d = lut::quantize(v, n, q);
    lut::make_tables(q, n, tables);
    return d;
}

// tokens one by one, by one thread; `tile` is for rows that are in none, `next` are the signs to prefetch behind the last
// of these
void mul_tables(const ggml_tensor * W, const ggml_tensor * s, int64_t n_vec, const float * d, const uint8_t * tables,
        int64_t r0, int64_t r1, const void * next, uint8_t * tile, float * out) {
    const int64_t n         = W->ne[0];
    const size_t  nb_tables = lut::tables_size(n);
    const int64_t n_tiled   = tiled_rows(W);

    for (int64_t r = r0; r < r1; r += lut::ROWS) {
        const int64_t   n_rows = std::min(lut::ROWS, r1 - r);
        const uint8_t * w      = (const uint8_t *) W->data + r*W->nb[1];
        const uint8_t * ahead  = r + n_rows < r1 ? w + n_rows*W->nb[1] : (const uint8_t *) next;
        const bool is_tile = r < n_tiled || n_vec > 1;
        if (r >= n_tiled && is_tile) {
            lut::to_tile(w, W->nb[1], n_rows, n, ahead, tile);
            w = tile;
        }
        float scale[lut::ROWS];
        get_scales(s, r, n_rows, scale);
        for (int64_t t = 0; t < n_vec; ++t) {
            int32_t sums[lut::ROWS];
            if (is_tile) {
                lut::sum_tile(w, tables + t*nb_tables, n, ahead, sums);
            } else {
                lut::sum_rows(w, W->nb[1], n_rows, tables, n, ahead, sums);
            }
            for (int64_t j = 0; j < n_rows; ++j) {
                out[t*W->ne[1] + r + j] = scale[j]*d[t]*(float) sums[j];
            }
        }
    }
}

// a few vectors: each thread makes all tables for itself
template <typename Get>
void mul_few(const ggml_tensor * W, const ggml_tensor * s, int64_t n_vec, const Get & get, int64_t r0, int64_t r1,
        const void * next, const work_layout & at, char * own, float * out) {
    const int64_t n      = W->ne[0];
    uint8_t     * tables = (uint8_t *) own + at.tables;

    float d[FEW];
    for (int64_t t = 0; t < n_vec; ++t) {
        d[t] = make_tables(get(t), n, (int16_t *) (own + at.own_q), tables + t*lut::tables_size(n));
    }
    mul_tables(W, s, n_vec, d, tables, r0, r1, next, (uint8_t *) own + at.tile, out);
}

// many: the threads meet when the tables of a group are made, and when they are read to the end
template <typename Get>
void mul_groups(const ggml_compute_params * params, const ggml_tensor * W, const ggml_tensor * s, int64_t n_vec, const Get & get,
        int64_t r0, int64_t r1, const void * next, const work_layout & at, char * work, char * own, float * out) {
    const int64_t n      = W->ne[0];
    uint8_t     * tables = (uint8_t *) work + at.q;
    float       * d      = (float *) (work + at.d);

    for (int64_t t0 = 0; t0 < n_vec; t0 += GROUP) {
        const int64_t n_tokens = std::min(GROUP, n_vec - t0);
        for (int64_t t = params->ith; t < n_tokens; t += params->nth) {
            d[t] = make_tables(get(t0 + t), n, (int16_t *) (own + at.own_q), tables + t*lut::tables_size(n));
        }
        ggml_barrier(params->threadpool);
        const void * ahead = t0 + GROUP < n_vec ? (const char *) W->data + r0*W->nb[1] : next;
        mul_tables(W, s, n_tokens, d, tables, r0, r1, ahead, (uint8_t *) own + at.tile, out + t0*W->ne[1]);
        ggml_barrier(params->threadpool);
    }
}

// one thread's share of the vectors
template <typename Get>
void interleave_tiles(int64_t n_vec, int64_t n, const Get & get, int ith, int nth, const work_layout & at, char * work, char * own) {
    for (int64_t t0 = ith*lut::TOKENS; t0 < n_vec; t0 += nth*lut::TOKENS) {
        const int64_t n_tokens = std::min(lut::TOKENS, n_vec - t0);
        const int16_t * rows[lut::TOKENS];
        for (int64_t t = 0; t < n_tokens; ++t) {
            int16_t * q = (int16_t *) (own + at.own_q) + t*n;
            ((float *) (work + at.d))[t0 + t] = lut::quantize(get(t0 + t), n, q);
            rows[t] = q;
        }
        lut::interleave(rows, n_tokens, n, (int16_t *) (work + at.q) + t0*n);
    }
}

void mul_token_tables(const ggml_tensor * W, const ggml_tensor * s, int64_t n_vec, int64_t r0, int64_t r1,
        const work_layout & at, const char * work, char * own, float * out) {
    const int64_t n    = W->ne[0];
    int32_t     * sums = (int32_t *) (own + at.sums);

    for (int64_t t0 = 0; t0 < n_vec; t0 += lut::TOKENS) {
        const float * d = (const float *) (work + at.d) + t0;
        for (int64_t r = r0; r < r1; r += lut::ROW_BLOCK) {
            const int64_t n_rows = std::min(lut::ROW_BLOCK, r1 - r);
            const int64_t n_tiled = std::clamp<int64_t>(tiled_rows(W) - r, 0, n_rows);
            lut::sum_rows_tokens((const uint8_t *) W->data + r*W->nb[1], W->nb[1], n_rows, n_tiled,
                    (const int16_t *) (work + at.q) + t0*n, n, (int16_t *) (own + at.tables), sums);
            float scale[lut::ROW_BLOCK];
            get_scales(s, r, n_rows, scale);
            for (int64_t t = 0; t < std::min(lut::TOKENS, n_vec - t0); ++t) {
                for (int64_t j = 0; j < n_rows; ++j) {
                    out[(t0 + t)*W->ne[1] + r + j] = scale[j]*d[t]*(float) sums[j*lut::TOKENS + t];
                }
            }
        }
    }
}

#endif

} // namespace

bool ggml_cpu_dbf_has_tiles(void) {
#if defined(DBF_TABLES)
    return true;
#else
    return false;
#endif
}

void ggml_cpu_dbf_set_tiles(ggml_tensor * factor, const void * rows) {
    const size_t    nb  = factor->nb[1];
    const uint8_t * src = (const uint8_t *) rows;
    uint8_t       * dst = (uint8_t       *) factor->data;
    GGML_ASSERT(factor->type == GGML_TYPE_DBF && ggml_is_contiguous(factor) && ggml_n_dims(factor) <= 2);
    GGML_ASSERT(factor->view_src == nullptr); // a view has no mark

    factor->extra = const_cast<char *>(&TILES);
    const int64_t n_tiled = tiled_rows(factor);
#if defined(DBF_TABLES)
    for (int64_t r = 0; r < n_tiled; r += lut::ROWS) {
        lut::to_tile(src + r*nb, nb, lut::ROWS, factor->ne[0], nullptr, dst + r*nb);
    }
#endif
    memcpy(dst + n_tiled*nb, src + n_tiled*nb, (factor->ne[1] - n_tiled)*nb);
}

void ggml_cpu_dbf_get_rows(const ggml_tensor * factor, void * rows) {
    const size_t    nb      = factor->nb[1];
    const uint8_t * src     = (const uint8_t *) factor->data;
    uint8_t       * dst     = (uint8_t       *) rows;
    const int64_t   n_tiled = tiled_rows(factor);
#if defined(DBF_TABLES)
    for (int64_t r = 0; r < n_tiled; r += lut::ROWS) {
        for (int64_t c = 0; c < factor->ne[0]; c += lut::STRIP) {
            const int64_t n = std::min(lut::STRIP, factor->ne[0] - c);
            uint8_t part[lut::ROWS*lut::STRIP/8];
            lut::from_tile(src + r*nb + c/8*lut::ROWS, n, part);
            for (int64_t i = 0; i < lut::ROWS; ++i) {
                memcpy(dst + (r + i)*nb + c/8, part + i*lut::STRIP/8, n/8);
            }
        }
    }
#endif
    memcpy(dst + n_tiled*nb, src + n_tiled*nb, (factor->ne[1] - n_tiled)*nb);
}

bool ggml_cpu_dbf_supports_op(const ggml_tensor * op) {
    if (op->op == GGML_OP_DBF_MUL_MAT) {
        return op->src[1]->type == GGML_TYPE_F32 && op->src[1]->nb[0] == sizeof(float);
    }
    for (int i = 0; i < GGML_MAX_SRC; ++i) {
        if (op->src[i] && op->src[i]->type == GGML_TYPE_DBF) {
            return false;
        }
    }
    return op->type != GGML_TYPE_DBF;
}

size_t ggml_cpu_dbf_work_size(const ggml_tensor * dst, int n_tasks) {
    return work_layout(dst, n_tasks).total;
}

void ggml_compute_forward_dbf_mul_mat(const ggml_compute_params * params, ggml_tensor * dst) {
    const ggml_tensor * A  = dst->src[0];
    const ggml_tensor * x  = dst->src[1];
    const ggml_tensor * B  = dst->src[2];
    const ggml_tensor * sa = dst->src[3];
    const ggml_tensor * sm = dst->src[4];
    const ggml_tensor * sb = dst->src[5];

    GGML_ASSERT(x->type == GGML_TYPE_F32 && x->nb[0] == sizeof(float));
    GGML_ASSERT(dst->type == GGML_TYPE_F32 && ggml_is_contiguous(dst));

    const int ith = params->ith;
    const int nth = params->nth;

    const int64_t n_vec = ggml_nrows(x);
    const int64_t n_in  = B->ne[0];
    const int64_t k     = A->ne[0];
    const int64_t n_out = A->ne[1];

    const work_layout at(dst, nth);
    GGML_ASSERT(params->wsize >= at.total);

    char  * work = (char *) GGML_PAD((uintptr_t) params->wdata, 64);
    char  * own  = work + at.own + ith*at.nb_own;
    float * u    = (float *) (work + at.u);
    float * row  = (float *) (own + at.row);
    float * y    = (float *) dst->data;

    int64_t k0, k1, o0, o1;
    split_rows(at.m, k,     ith, nth, k0, k1);
    split_rows(at.m, n_out, ith, nth, o0, o1);

    const auto scaled_x = [&](int64_t t) -> const float * {
        scale_input(input_row(x, t), sb, row);
        return row;
    };
    const auto middle = [&](int64_t t) -> const float * { return u + t*k; };

    if (params->use_ref) {
        for (int64_t t = 0; t < n_vec; ++t) {
            mul_signs_ref(B, sm, scaled_x(t), k0, k1, u + t*k);
        }
        ggml_barrier(params->threadpool);
        for (int64_t t = 0; t < n_vec; ++t) {
            mul_signs_ref(A, sa, middle(t), o0, o1, y + t*n_out);
        }
        return;
    }

#if defined(DBF_TABLES)
    const char * first_of_a = (const char *) A->data + o0*A->nb[1];
    if (at.m == METHOD_TABLES) {
        mul_few(B, sm, n_vec, scaled_x, k0, k1, first_of_a, at, own, u);
        ggml_barrier(params->threadpool);
        mul_few(A, sa, n_vec, middle, o0, o1, first_of_a, at, own, y);
        return;
    }
    if (at.m == METHOD_SHARED_TABLES) {
        mul_groups(params, B, sm, n_vec, scaled_x, k0, k1, first_of_a, at, work, own, u);
        mul_groups(params, A, sa, n_vec, middle, o0, o1, first_of_a, at, work, own, y);
        return;
    }
    if (at.m == METHOD_TOKEN_TABLES) {
        interleave_tiles(n_vec, n_in, scaled_x, ith, nth, at, work, own);
        ggml_barrier(params->threadpool);
        mul_token_tables(B, sm, n_vec, k0, k1, at, work, own, u);
        ggml_barrier(params->threadpool); // also: q is read to the end before it is overwritten
        interleave_tiles(n_vec, k, middle, ith, nth, at, work, own);
        ggml_barrier(params->threadpool);
        mul_token_tables(A, sa, n_vec, o0, o1, at, work, own, y);
        return;
    }
#endif

    if (is_private(at.m, n_vec)) {
        int8_t * q = (int8_t *) (own + at.own_q);
        vec_info info;
        quantize_vec(scaled_x(0), n_in, q, info);
        mul_signs(B, sm, q, &info, 1, k0, k1, u);
        ggml_barrier(params->threadpool);
        quantize_vec(u, k, q, info);
        mul_signs(A, sa, q, &info, 1, o0, o1, y);
        return;
    }

    int8_t   * q    = (int8_t   *) (work + at.q);
    vec_info * info = (vec_info *) (work + at.d);
    for (int64_t t = ith; t < n_vec; t += nth) {
        quantize_vec(scaled_x(t), n_in, q + t*2*n_in, info[t]);
    }
    ggml_barrier(params->threadpool);

    mul_signs(B, sm, q, info, n_vec, k0, k1, u);
    ggml_barrier(params->threadpool); // also: q is read to the end before it is overwritten

    for (int64_t t = ith; t < n_vec; t += nth) {
        quantize_vec(middle(t), k, q + t*2*k, info[t]);
    }
    ggml_barrier(params->threadpool);

    mul_signs(A, sa, q, info, n_vec, o0, o1, y);
}
