#include "common.cuh"

// GGML_OP_DBF_MUL_MAT, see ggml-dbf.h. It may be asked often: the first refusal is logged with its reason.
bool ggml_cuda_dbf_supports_op(int device, const ggml_tensor * op);

void ggml_cuda_op_dbf_mul_mat(ggml_backend_cuda_context & ctx, ggml_tensor * dst);
