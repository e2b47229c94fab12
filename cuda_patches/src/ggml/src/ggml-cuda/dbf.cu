// GGML_OP_DBF_MUL_MAT on CUDA: what an op's tensors come to in terms of dbf-launch.h, and the launches. The kernels are in
// dbf-kernels.cuh. Nothing waits for the host and no memory is allocated but the pool's, so the op may be captured into a graph.

#include "dbf.cuh"

#if defined(GGML_USE_HIP) || defined(GGML_USE_MUSA)

bool ggml_cuda_dbf_supports_op(int device, const ggml_tensor * op) {
    GGML_UNUSED(device);
    GGML_UNUSED(op);
    return false;
}

void ggml_cuda_op_dbf_mul_mat(ggml_backend_cuda_context & ctx, ggml_tensor * dst) {
    GGML_UNUSED(ctx);
    GGML_UNUSED(dst);
    GGML_ABORT("DBF: no kernels for this platform");
}

#else

#include "dbf-kernels.cuh"

#include <cstdlib>
#include <cstring>
#include <mutex>

// GGML_DBF_CUDA_F16=1: inputs in fp16 instead of two planes of int8. For comparing the accuracy of the two.
static dbf_path dbf_chosen_path() {
    static const dbf_path path = []() {
        const char * s = getenv("GGML_DBF_CUDA_F16");
        return s != nullptr && strcmp(s, "0") != 0 ? DBF_PATH_F16 : DBF_PATH_DEFAULT;
    }();
    return path;
}

static dbf_device dbf_get_device(int id) {
    const auto & info = ggml_cuda_info().devices[id];
    // The kernels are chosen for the architecture that the code was compiled for, which may be older than the card.
    // A multiprocessor has a KiB more than a block may opt in to; where it has less, fewer blocks run at a time.
    return { ggml_cuda_highest_compiled_arch(info.cc), info.nsm, info.smpbo, info.smpbo + 1024 };
}

static dbf_scale_type dbf_type_of(const ggml_tensor * s) {
    return s->type == GGML_TYPE_F16 ? DBF_SCALE_F16 : DBF_SCALE_F32;
}

static dbf_shape dbf_shape_of(const ggml_tensor * op) {
    const ggml_tensor * A = op->src[0];
    const ggml_tensor * x = op->src[1];
    const ggml_tensor * B = op->src[2];

    dbf_shape s = {};
    s.n_in     = B->ne[0];
    s.k        = A->ne[0];
    s.n_out    = A->ne[1];
    s.n_tokens = ggml_nrows(x);
    // the distance of two tokens, in whichever dimension there are several
    s.x_stride = (x->ne[1] > 1 ? x->nb[1] : x->ne[2] > 1 ? x->nb[2] : x->nb[3])/sizeof(float);
    s.sa       = dbf_type_of(op->src[3]);
    s.sm       = dbf_type_of(op->src[4]);
    s.sb       = dbf_type_of(op->src[5]);
    return s;
}

// NULL or why not. The constructor of the op has checked types and shapes of the factors.
static const char * dbf_refusal(int device, const ggml_tensor * op) {
    const ggml_tensor * x = op->src[1];
    if (x->type != GGML_TYPE_F32 || x->nb[0] != sizeof(float) || x->nb[1] % sizeof(float) != 0) {
        return "x is not F32 with values next to each other";
    }
    const size_t stride = dbf_shape_of(op).x_stride*sizeof(float);
    if ((x->ne[2] > 1 && x->nb[2] != x->ne[1]*stride) || (x->ne[3] > 1 && x->nb[3] != x->ne[1]*x->ne[2]*stride)) {
        return "the tokens of x are not evenly spaced";
    }
    for (const int factor : { 0, 2, 3, 4, 5 }) {
        if (op->src[factor]->op != GGML_OP_NONE) {
            return "signs or scales are no weights"; // they are read while the kernel before may still write
        }
    }
    return dbf_unsupported(dbf_shape_of(op), dbf_get_device(device));
}

bool ggml_cuda_dbf_supports_op(int device, const ggml_tensor * op) {
    const char * reason = dbf_refusal(device, op);
    if (reason != nullptr) {
        static std::once_flag once;
        std::call_once(once, [&]() {
            GGML_LOG_WARN("%s: '%s' is computed on the CPU: %s\n", __func__, op->name, reason);
        });
    }
    return reason == nullptr;
}

void ggml_cuda_op_dbf_mul_mat(ggml_backend_cuda_context & ctx, ggml_tensor * dst) {
    const ggml_tensor * A  = dst->src[0];
    const ggml_tensor * x  = dst->src[1];
    const ggml_tensor * B  = dst->src[2];

    GGML_ASSERT(dst->type == GGML_TYPE_F32 && ggml_is_contiguous(dst));
    GGML_ASSERT(ggml_is_contiguous(A) && ggml_is_contiguous(B));

    const dbf_operands operands = {
        A->data, B->data, dst->src[3]->data, dst->src[4]->data, dst->src[5]->data, (const float *) x->data, (float *) dst->data
    };
    const auto at_16_bytes = [](const ggml_tensor * t) { return (uintptr_t) t->data % 16 == 0; };
    const dbf_plan plan = dbf_make_plan(dbf_shape_of(dst), dbf_get_device(ctx.device), at_16_bytes(A), at_16_bytes(B), dbf_chosen_path());

    ggml_cuda_pool_alloc<char> workspace(ctx.pool(), plan.workspace);
    const size_t limit = ggml_cuda_info().devices[ctx.device].smpbo;
    dbf_execute(plan, operands, workspace.get(), [&](const dbf_launch & l, const dbf_args & args) {
        const ggml_cuda_kernel_launch_params params(dim3(l.grid.x, l.grid.y, 1), dim3(l.block, 1, 1), l.shared, ctx.stream());
        // Each kernel once may take more than 48 KiB of shared memory: as much as there is, not what this launch takes. The macro
        // remembers by the place where it stands, so it has to stand here and not in a function that all kernels share.
        switch (l.kernel) {
#define DBF_CASE(name, kernel)                                   \
            case name:                                           \
                if (l.shared > 48*1024) {                        \
                    CUDA_SET_SHARED_MEMORY_LIMIT(kernel, limit); \
                }                                                \
                ggml_cuda_kernel_launch(kernel, params, args);   \
                break;
            DBF_KERNELS(DBF_CASE)
#undef DBF_CASE
            case DBF_KERNEL_COUNT: GGML_ABORT("DBF: no kernel");
        }
    });
}

#endif
