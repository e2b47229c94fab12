#pragma once

#include "ggml.h"
#include "ggml-backend.h"

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

// Factors may lie in memory as tiles (dbf-tables.h) instead of rows, in the same number of bytes, which some CPUs read
// faster. The op takes both, each factor as it is.

// Whether the kernels that were compiled are faster with tiles
bool ggml_cpu_dbf_has_tiles(void);

// Fills a factor from rows, [ne[1]][ne[0]/32] blocks, and marks it in `extra`
void ggml_cpu_dbf_set_tiles(struct ggml_tensor * factor, const void * rows);

// The rows of a factor, whichever way it lies
void ggml_cpu_dbf_get_rows(const struct ggml_tensor * factor, void * rows);

// Memory in which factors lie as tiles, for the loader, which prefers such extra types unless told otherwise
// (--no-repack). NULL where there is nothing to gain.
ggml_backend_buffer_type_t ggml_backend_cpu_dbf_buffer_type(void);

#ifdef __cplusplus
}
#endif
