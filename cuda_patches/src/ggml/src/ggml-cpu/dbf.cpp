// y = sa * (A @ (sm * (B @ (sb * x)))) with A and B matrices of signs (see ggml-dbf.h).
//
// How the fast path works. A vector v is rounded to 16-bit integers with one scale, v ~ d*q with |q| <= 127*256 + 127, and
// q is kept as two planes of bytes, q = 256*hi + lo. With w the bits of a row of signs (1 = +1, 0 = -1),
//
//   row @ v = d * sum((2*w - 1)*q) = d * (2*S - sum(q)),    S = 256*sum(w*hi) + sum(w*lo)
//
// and both sums of S are plain u8 x s8 dot products, the thing that VNNI, AVX2 and NEON are good at. Expanding the bits of w
// to bytes is what costs, so it is shared by both planes and by several tokens, and several rows share the loads of v.
//
// Two planes and not one: the factors multiply rounding errors of both products, and with 8 bits a token the logits of a
// model are off by several percent. At 16 bits the relative error of a product is at most 1e-5 * max|v|/rms(v).

#include "dbf.h"

#include "ggml-dbf.h"
#include "ggml-cpu.h"
#include "ggml-cpu-impl.h"
#include "ggml-impl.h"
#include "simd-mappings.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__AVX2__) || defined(__AVX512BW__)
#include <immintrin.h>
#endif

namespace {

constexpr int64_t QMAX     = 127*256 + 127;
constexpr int64_t PLANE    = 64;        // planes are padded with zeros to whole AVX-512 vectors
constexpr int64_t ROWS     = 4;         // rows that share the loads of v
constexpr int64_t TOKENS   = 2;         // tokens that share the expansion of the signs
constexpr size_t  Q_TILE   = 128*1024;  // bytes of q that should stay in L2 while the signs stream past
constexpr int64_t PREFETCH = 4096;      // bytes ahead; the hardware prefetchers stop at the short rows

// one quantized vector: v ~ d * (256*hi + lo), planes at q and q + n_pad
struct vec_info {
    float   d;
    int32_t sum_hi;
    int32_t sum_lo;
};

int64_t plane_size(int64_t n) {
    return GGML_PAD(n, PLANE);
}

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

    const int64_t n_pad = plane_size(n);
    int8_t * hi = q;
    int8_t * lo = q + n_pad;

    const bool finite = max_bits < 0x7f800000;
    if (!finite || amax < 1e-30f) { // below, 1/d overflows
        memset(q, 0, 2*n_pad);
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
    memset(hi + n, 0, n_pad - n);
    memset(lo + n, 0, n_pad - n);

    info = { d, sum_hi, sum_lo };
}

// ---- sums of q over the set bits of R rows for T vectors: s[r][t] = { sum(w*hi), sum(w*lo) }

inline uint32_t load_signs(const uint8_t * w) {
    uint32_t signs;
    memcpy(&signs, w, sizeof(signs));
    return signs;
}

inline void prefetch(const uint8_t * p) {
#if defined(__GNUC__)
    __builtin_prefetch(p);
#else
    GGML_UNUSED(p);
#endif
}

#if defined(__AVX512F__) && defined(__AVX512BW__)

inline __m512i dot_add(__m512i acc, __m512i w, __m512i v) {
#if defined(__AVX512VNNI__)
    return _mm512_dpbusd_epi32(acc, w, v);
#else
    // w is 0 or 1: the pair sums fit 16 bits
    return _mm512_add_epi32(acc, _mm512_madd_epi16(_mm512_maddubs_epi16(w, v), _mm512_set1_epi16(1)));
#endif
}

template <int R, int T>
void sum_rows(const uint8_t * w, size_t nb_w, const int8_t * q, int64_t n, int32_t (*s)[T][2]) {
    const int64_t n_pad = plane_size(n);
    const __m512i one   = _mm512_set1_epi8(1);

    __m512i acc[R][T][2];
    for (int r = 0; r < R; ++r) {
        for (int t = 0; t < T; ++t) {
            acc[r][t][0] = acc[r][t][1] = _mm512_setzero_si512();
        }
    }

    // no branch on the way: with one, gcc moves every accumulator twice in each step
    const auto step = [&](int64_t i, const auto & load_mask) {
        __m512i bytes[R];
        for (int r = 0; r < R; ++r) {
            bytes[r] = _mm512_maskz_mov_epi8(load_mask(w + r*nb_w + i/8), one);
        }
        for (int t = 0; t < T; ++t) {
            const __m512i hi = _mm512_loadu_si512(q + (2*t + 0)*n_pad + i);
            const __m512i lo = _mm512_loadu_si512(q + (2*t + 1)*n_pad + i);
            for (int r = 0; r < R; ++r) {
                acc[r][t][0] = dot_add(acc[r][t][0], bytes[r], hi);
                acc[r][t][1] = dot_add(acc[r][t][1], bytes[r], lo);
            }
        }
    };

    const int64_t n_full = n/64*64;
    for (int64_t i0 = 0; i0 < n_full; i0 += 512) { // 64 bytes of signs
        for (int r = 0; r < R; ++r) {
            prefetch(w + r*nb_w + i0/8 + PREFETCH);
        }
        const int64_t i1 = std::min(n_full, i0 + 512);
        for (int64_t i = i0; i < i1; i += 64) {
            step(i, [](const uint8_t * p) {
                uint64_t signs;
                memcpy(&signs, p, sizeof(signs));
                return (__mmask64) signs;
            });
        }
    }
    if (n_full < n) { // the last 32
        step(n_full, [](const uint8_t * p) { return (__mmask64) load_signs(p); });
    }

    for (int r = 0; r < R; ++r) {
        for (int t = 0; t < T; ++t) {
            s[r][t][0] = _mm512_reduce_add_epi32(acc[r][t][0]);
            s[r][t][1] = _mm512_reduce_add_epi32(acc[r][t][1]);
        }
    }
}

#elif defined(__AVX2__)

inline __m256i dot_add(__m256i acc, __m256i w, __m256i v) {
    return _mm256_add_epi32(acc, _mm256_madd_epi16(_mm256_maddubs_epi16(w, v), _mm256_set1_epi16(1)));
}

inline int32_t reduce_add(__m256i v) {
    __m128i x = _mm_add_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
    x = _mm_add_epi32(x, _mm_shuffle_epi32(x, 0x4e));
    x = _mm_add_epi32(x, _mm_shuffle_epi32(x, 0xb1));
    return _mm_cvtsi128_si32(x);
}

template <int R, int T>
void sum_rows(const uint8_t * w, size_t nb_w, const int8_t * q, int64_t n, int32_t (*s)[T][2]) {
    const int64_t n_pad = plane_size(n);
    const __m256i one   = _mm256_set1_epi8(1);
    // byte i of the vector takes byte i/8 of the word and of that bit i%8
    const __m256i pick  = _mm256_setr_epi8(0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1,
                                           2, 2, 2, 2, 2, 2, 2, 2, 3, 3, 3, 3, 3, 3, 3, 3);
    const __m256i bit   = _mm256_set1_epi64x((int64_t) 0x8040201008040201ull);

    __m256i acc[R][T][2];
    for (int r = 0; r < R; ++r) {
        for (int t = 0; t < T; ++t) {
            acc[r][t][0] = acc[r][t][1] = _mm256_setzero_si256();
        }
    }

    for (int64_t i = 0; i < n; i += 32) {
        if (i % 512 == 0) { // 64 bytes of signs
            for (int r = 0; r < R; ++r) {
                prefetch(w + r*nb_w + i/8 + PREFETCH);
            }
        }

        for (int r = 0; r < R; ++r) {
            const __m256i word  = _mm256_shuffle_epi8(_mm256_set1_epi32((int32_t) load_signs(w + r*nb_w + i/8)), pick);
            const __m256i bytes = _mm256_and_si256(_mm256_cmpeq_epi8(_mm256_and_si256(word, bit), bit), one);
            for (int t = 0; t < T; ++t) {
                const __m256i hi = _mm256_loadu_si256((const __m256i *) (q + (2*t + 0)*n_pad + i));
                const __m256i lo = _mm256_loadu_si256((const __m256i *) (q + (2*t + 1)*n_pad + i));
                acc[r][t][0] = dot_add(acc[r][t][0], bytes, hi);
                acc[r][t][1] = dot_add(acc[r][t][1], bytes, lo);
            }
        }
    }

    for (int r = 0; r < R; ++r) {
        for (int t = 0; t < T; ++t) {
            s[r][t][0] = reduce_add(acc[r][t][0]);
            s[r][t][1] = reduce_add(acc[r][t][1]);
        }
    }
}

#else

// Plain C: the inner loop has a fixed length and no branch, so that compilers vectorize it on any target.
template <int R, int T>
void sum_rows(const uint8_t * w, size_t nb_w, const int8_t * q, int64_t n, int32_t (*s)[T][2]) {
    const int64_t n_pad = plane_size(n);
    memset(s, 0, R*sizeof(*s));

    for (int64_t i = 0; i < n; i += 32) {
        for (int r = 0; r < R; ++r) {
            const uint32_t signs = load_signs(w + r*nb_w + i/8);
            if (i % 512 == 0) {
                prefetch(w + r*nb_w + i/8 + PREFETCH);
            }

            int8_t mask[32];
            for (int j = 0; j < 32; ++j) {
                mask[j] = -(int8_t) ((signs >> j) & 1);
            }
            for (int t = 0; t < T; ++t) {
                for (int plane = 0; plane < 2; ++plane) {
                    const int8_t * v = q + (2*t + plane)*n_pad + i;
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

#endif

// ---- out[t*n_out + r] = scale[r] * (row r of W) @ v_t for rows [r0, r1)

float get_scale(const ggml_tensor * s, int64_t i) {
    return s->type == GGML_TYPE_F16 ? GGML_CPU_FP16_TO_FP32(((const ggml_fp16_t *) s->data)[i]) : ((const float *) s->data)[i];
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
    const int64_t nb_q  = 2*plane_size(W->ne[0]);
    const int64_t n_out = W->ne[1];

    float scale[R];
    for (int j = 0; j < R; ++j) {
        scale[j] = get_scale(s, r + j);
    }

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
    const int64_t nb_q = 2*plane_size(W->ne[0]);
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

// ---- the reference: nothing is rounded before the sum

void mul_signs_ref(const ggml_tensor * W, const ggml_tensor * s, const float * v, int64_t r0, int64_t r1, float * out) {
    for (int64_t r = r0; r < r1; ++r) {
        const block_dbf * row = (const block_dbf *) ((const char *) W->data + r*W->nb[1]);
        double sum = 0.0;
        for (int64_t i = 0; i < W->ne[0]; ++i) {
            sum += (row[i/QK_DBF].signs >> (i % QK_DBF)) & 1 ? v[i] : -v[i];
        }
        out[r] = (float) (get_scale(s, r)*sum);
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
    if (sb->type == GGML_TYPE_F16) {
        ggml_cpu_fp16_to_fp32((const ggml_fp16_t *) sb->data, v, n);
    } else {
        memcpy(v, sb->data, n*sizeof(float));
    }
    for (int64_t i = 0; i < n; ++i) {
        v[i] *= x[i];
    }
}

// the share of n rows of one thread, in whole groups of ROWS
void split_rows(int64_t n, int ith, int nth, int64_t & r0, int64_t & r1) {
    const int64_t groups = (n + ROWS - 1)/ROWS;
    r0 = std::min(n, groups*ith/nth*ROWS);
    r1 = std::min(n, groups*(ith + 1)/nth*ROWS);
}

// The work buffer: q (of x, then of u: never both), their scales, u, and a row of floats per thread.
struct work_layout {
    size_t q, info, u, row, nb_row, total;

    work_layout(const ggml_tensor * dst, int n_tasks) {
        const int64_t n_vec = ggml_nrows(dst->src[1]);
        const int64_t n_in  = dst->src[2]->ne[0];
        const int64_t k     = dst->src[0]->ne[0];

        size_t offs = 0;
        const auto take = [&](size_t size) {
            const size_t at = offs;
            offs += GGML_PAD(size, 64);
            return at;
        };
        nb_row = GGML_PAD(n_in*sizeof(float), 64);
        q      = take(n_vec*2*plane_size(std::max(n_in, k)));
        info   = take(n_vec*sizeof(vec_info));
        u      = take(n_vec*k*sizeof(float));
        row    = take(n_tasks*nb_row);
        total  = offs + 64; // to align the start
    }
};

} // namespace

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

    char     * work = (char *) GGML_PAD((uintptr_t) params->wdata, 64);
    int8_t   * q    = (int8_t   *) (work + at.q);
    vec_info * info = (vec_info *) (work + at.info);
    float    * u    = (float    *) (work + at.u);
    float    * row  = (float    *) (work + at.row + ith*at.nb_row);
    float    * y    = (float    *) dst->data;

    int64_t k0, k1, o0, o1;
    split_rows(k,     ith, nth, k0, k1);
    split_rows(n_out, ith, nth, o0, o1);

    if (params->use_ref) {
        for (int64_t t = 0; t < n_vec; ++t) {
            scale_input(input_row(x, t), sb, row);
            mul_signs_ref(B, sm, row, k0, k1, u + t*k);
        }
        ggml_barrier(params->threadpool);
        for (int64_t t = 0; t < n_vec; ++t) {
            mul_signs_ref(A, sa, u + t*k, o0, o1, y + t*n_out);
        }
        return;
    }

    for (int64_t t = ith; t < n_vec; t += nth) {
        scale_input(input_row(x, t), sb, row);
        quantize_vec(row, n_in, q + t*2*plane_size(n_in), info[t]);
    }
    ggml_barrier(params->threadpool);

    mul_signs(B, sm, q, info, n_vec, k0, k1, u);
    ggml_barrier(params->threadpool); // also: q is read to the end before it is overwritten

    for (int64_t t = ith; t < n_vec; t += nth) {
        quantize_vec(u + t*k, k, q + t*2*plane_size(k), info[t]);
    }
    ggml_barrier(params->threadpool);

    mul_signs(A, sa, q, info, n_vec, o0, o1, y);
}
