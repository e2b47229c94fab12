#pragma once

#include "ggml.h"

#include <stddef.h>

// GGML_OP_DBF_MUL_MAT on the CPU, see ggml-dbf.h for the op and dbf.cpp for the method

#ifdef __cplusplus
extern "C" {
#endif

struct ggml_compute_params;

// false for every op that reads a DBF tensor and is not the DBF product: no other kernel knows the type
bool ggml_cpu_dbf_supports_op(const struct ggml_tensor * op);

// bytes of work buffer
size_t ggml_cpu_dbf_work_size(const struct ggml_tensor * dst, int n_tasks);

void ggml_compute_forward_dbf_mul_mat(const struct ggml_compute_params * params, struct ggml_tensor * dst);

#ifdef __cplusplus
}
#endif
