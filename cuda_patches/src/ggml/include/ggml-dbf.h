#pragma once

//
// Double Binary Factorization (DBF)
//
// A linear layer W [n_in, n_out] is stored as two matrices of signs and three vectors of scales:
//
//   y = sa * (A @ (sm * (B @ (sb * x))))
//
//   B   GGML_TYPE_DBF [n_in, k]    sb  F16 or F32 [n_in]
//   A   GGML_TYPE_DBF [k, n_out]   sm  F16 or F32 [k]
//                                  sa  F16 or F32 [n_out]
//
// k sets the size: (n_in + n_out)*k bits and the scales.
//

#include "ggml.h"

#ifdef  __cplusplus
extern "C" {
#endif

#define QK_DBF 32

// Bit j of the little-endian word is element j of the block: 1 = +1, 0 = -1. There is no scale in the block.
typedef struct {
    uint32_t signs;
} block_dbf;

// One op for the whole product and not five: no intermediate goes through the graph allocator, F16 scales need no copy,
// and a backend can keep k values on chip between the two sign products.
// result: F32 [n_out, x->ne[1], x->ne[2], x->ne[3]]
// sources: 0 = A, 1 = x, 2 = B, 3 = sa, 4 = sm, 5 = sb; A and x stand where mul_mat has them, because schedulers look there
GGML_API struct ggml_tensor * ggml_dbf_mul_mat(
        struct ggml_context * ctx,
        struct ggml_tensor  * B,
        struct ggml_tensor  * A,
        struct ggml_tensor  * sb,
        struct ggml_tensor  * sm,
        struct ggml_tensor  * sa,
        struct ggml_tensor  * x);

// "Quantizing" to DBF keeps the sign and drops the magnitude; +0 and -0 count as +1. k is a multiple of QK_DBF.
GGML_API void   quantize_row_dbf_ref(const float     * GGML_RESTRICT x, block_dbf * GGML_RESTRICT y, int64_t k);
GGML_API void   dequantize_row_dbf  (const block_dbf * GGML_RESTRICT x, float     * GGML_RESTRICT y, int64_t k);
GGML_API size_t quantize_dbf        (const float     * GGML_RESTRICT src, void    * GGML_RESTRICT dst, int64_t nrows, int64_t n_per_row);

#ifdef  __cplusplus
}
#endif
