// The part of DBF that every backend shares: the op's constructor and the conversions of the sign type.
// The arithmetic is in the backends, for the CPU in ggml-cpu/dbf.cpp.

#include "ggml-dbf.h"

#include <assert.h>

static bool ggml_dbf_is_scale(const struct ggml_tensor * s, int64_t n) {
    return (s->type == GGML_TYPE_F16 || s->type == GGML_TYPE_F32) && ggml_is_vector(s) && s->ne[0] == n && ggml_is_contiguous(s);
}

struct ggml_tensor * ggml_dbf_mul_mat(
        struct ggml_context * ctx,
        struct ggml_tensor  * B,
        struct ggml_tensor  * A,
        struct ggml_tensor  * sb,
        struct ggml_tensor  * sm,
        struct ggml_tensor  * sa,
        struct ggml_tensor  * x) {
    GGML_ASSERT(A->type == GGML_TYPE_DBF && ggml_is_matrix(A) && ggml_is_contiguous(A));
    GGML_ASSERT(B->type == GGML_TYPE_DBF && ggml_is_matrix(B) && ggml_is_contiguous(B));
    GGML_ASSERT(B->ne[0] == x->ne[0] && "DBF: x has another length than the rows of B");
    GGML_ASSERT(B->ne[1] == A->ne[0] && "DBF: A and B do not chain");
    GGML_ASSERT(ggml_dbf_is_scale(sb, B->ne[0]));
    GGML_ASSERT(ggml_dbf_is_scale(sm, A->ne[0]));
    GGML_ASSERT(ggml_dbf_is_scale(sa, A->ne[1]));
    GGML_ASSERT(x->type == GGML_TYPE_F32);

    struct ggml_tensor * result = ggml_new_tensor_4d(ctx, GGML_TYPE_F32, A->ne[1], x->ne[1], x->ne[2], x->ne[3]);

    result->op     = GGML_OP_DBF_MUL_MAT;
    result->src[0] = A;
    result->src[1] = x;
    result->src[2] = B;
    result->src[3] = sa;
    result->src[4] = sm;
    result->src[5] = sb;

    return result;
}

void quantize_row_dbf_ref(const float * GGML_RESTRICT x, block_dbf * GGML_RESTRICT y, int64_t k) {
    assert(k % QK_DBF == 0);

    for (int64_t i = 0; i < k/QK_DBF; ++i) {
        uint32_t signs = 0;
        for (int j = 0; j < QK_DBF; ++j) {
            signs |= (uint32_t) (x[i*QK_DBF + j] >= 0.0f) << j;
        }
        y[i].signs = signs;
    }
}

void dequantize_row_dbf(const block_dbf * GGML_RESTRICT x, float * GGML_RESTRICT y, int64_t k) {
    assert(k % QK_DBF == 0);

    for (int64_t i = 0; i < k/QK_DBF; ++i) {
        for (int j = 0; j < QK_DBF; ++j) {
            y[i*QK_DBF + j] = (x[i].signs >> j) & 1 ? 1.0f : -1.0f;
        }
    }
}

size_t quantize_dbf(const float * GGML_RESTRICT src, void * GGML_RESTRICT dst, int64_t nrows, int64_t n_per_row) {
    quantize_row_dbf_ref(src, (block_dbf *) dst, nrows*n_per_row);
    return nrows * ggml_row_size(GGML_TYPE_DBF, n_per_row);
}
