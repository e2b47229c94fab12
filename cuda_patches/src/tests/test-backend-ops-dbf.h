// Cases of GGML_OP_DBF_MUL_MAT, included by test-backend-ops.cpp behind the definition of test_case.
// The CPU backend is compared with its own scalar path (ggml_backend_cpu_set_use_ref), other backends too.

#include "ggml-dbf.h"

struct test_dbf_mul_mat : public test_case {
    const ggml_type type_s; // of the scales
    const int64_t n_in;
    const int64_t k;
    const int64_t n_out;
    const std::array<int64_t, 3> ne; // columns and batches of x
    const bool view; // x is a part of the rows of a wider tensor

    std::string vars() override {
        return VARS_TO_STR6(type_s, n_in, k, n_out, ne, view);
    }

    // 16-bit activations are off by 1e-9, 8-bit ones by 1e-4: the latter must not pass. The CPU's sums of four in 14 bits are off
    // by 4e-8, in the few outputs of the smallest shapes by up to several times that.
    double max_nmse_err(ggml_backend_t backend) override {
        const ggml_backend_reg_t reg = ggml_backend_dev_backend_reg(ggml_backend_get_device(backend));
        return strcmp(ggml_backend_reg_name(reg), "CPU") == 0 ? 5e-7 : 1e-7;
    }

    uint64_t op_flops(ggml_tensor * t) override {
        GGML_UNUSED(t);
        return 2*(n_in + n_out)*k*ne[0]*ne[1]*ne[2];
    }

    test_dbf_mul_mat(ggml_type type_s, int64_t n_in, int64_t k, int64_t n_out, std::array<int64_t, 3> ne, bool view = false)
        : type_s(type_s), n_in(n_in), k(k), n_out(n_out), ne(ne), view(view) {}

    ggml_tensor * build_graph(ggml_context * ctx) override {
        ggml_tensor * B  = ggml_new_tensor_2d(ctx, GGML_TYPE_DBF, n_in, k);
        ggml_tensor * A  = ggml_new_tensor_2d(ctx, GGML_TYPE_DBF, k, n_out);
        ggml_tensor * sb = ggml_new_tensor_1d(ctx, type_s, n_in);
        ggml_tensor * sm = ggml_new_tensor_1d(ctx, type_s, k);
        ggml_tensor * sa = ggml_new_tensor_1d(ctx, type_s, n_out);
        ggml_tensor * x  = ggml_new_tensor_4d(ctx, GGML_TYPE_F32, view ? 2*n_in : n_in, ne[0], ne[1], ne[2]);
        ggml_set_name(B,  "B");
        ggml_set_name(A,  "A");
        ggml_set_name(sb, "sb");
        ggml_set_name(sm, "sm");
        ggml_set_name(sa, "sa");
        ggml_set_name(x,  "x");

        if (view) {
            x = ggml_view_4d(ctx, x, n_in, ne[0], ne[1], ne[2], x->nb[1], x->nb[2], x->nb[3], n_in*sizeof(float));
            ggml_set_name(x, "view_of_x");
        }

        ggml_tensor * out = ggml_dbf_mul_mat(ctx, B, A, sb, sm, sa, x);
        ggml_set_name(out, "out");
        return out;
    }
};

static void add_dbf_test_cases_eval(std::vector<std::unique_ptr<test_case>> & cases) {
    for (ggml_type type_s : { GGML_TYPE_F16, GGML_TYPE_F32 }) {
        for (int64_t n : { 1, 2, 8, 33, 512 }) {
            cases.emplace_back(new test_dbf_mul_mat(type_s, 256, 128, 256, { n, 1, 1 }));
            // the smallest, and shapes of which nothing is a multiple of 128 (a single output could cancel to nothing)
            cases.emplace_back(new test_dbf_mul_mat(type_s, 32, 32, 17, { n, 1, 1 }));
            cases.emplace_back(new test_dbf_mul_mat(type_s, 544, 160, 333, { n, 1, 1 }));
            cases.emplace_back(new test_dbf_mul_mat(type_s, 576, 416, 1537, { n, 1, 1 }));
            cases.emplace_back(new test_dbf_mul_mat(type_s, 1536, 1120, 577, { n, 1, 1 }));
        }
        // on GPUs: where another kernel begins, and the columns of its tiles end in the middle
        for (int64_t n : { 3, 4, 5, 7, 9, 16 }) {
            cases.emplace_back(new test_dbf_mul_mat(type_s, 544, 160, 333, { n, 1, 1 }));
        }
        // where blocks of many columns fill a large card; several steps, and rows and columns that end in the middle
        cases.emplace_back(new test_dbf_mul_mat(type_s, 128, 1152, 2002, { 500, 1, 1 }));
        // and an input that takes more than 48 KB of shared memory, and one that does not fit it at all
        cases.emplace_back(new test_dbf_mul_mat(type_s,  30720, 64, 96, { 1, 1, 1 }));
        cases.emplace_back(new test_dbf_mul_mat(type_s, 122880, 64, 96, { 1, 1, 1 }));
        cases.emplace_back(new test_dbf_mul_mat(type_s, 4096, 2112, 4096, { 1, 1, 1 }));
        cases.emplace_back(new test_dbf_mul_mat(type_s, 14336, 3200, 4096, { 3, 1, 1 }));
        cases.emplace_back(new test_dbf_mul_mat(type_s, 544, 160, 333, { 3, 2, 5 }));
        cases.emplace_back(new test_dbf_mul_mat(type_s, 544, 160, 333, { 3, 2, 5 }, /*view =*/ true));
    }
}

// the linears of Llama 2 7B at 2 bits a weight
static void add_dbf_test_cases_perf(std::vector<std::unique_ptr<test_case>> & cases) {
    for (int64_t n : { 1, 8, 512 }) {
        cases.emplace_back(new test_dbf_mul_mat(GGML_TYPE_F16,  4096, 4064,  4096, { n, 1, 1 }));
        cases.emplace_back(new test_dbf_mul_mat(GGML_TYPE_F16,  4096, 5952, 11008, { n, 1, 1 }));
        cases.emplace_back(new test_dbf_mul_mat(GGML_TYPE_F16, 11008, 5952,  4096, { n, 1, 1 }));
    }
}
