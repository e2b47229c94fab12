// Prints what dbf_make_plan makes of shapes: `plan N_IN K N_OUT N_TOKENS CC N_SM SHARED ALIGNED PATH [...]`, nine numbers for
// each shape. One line of JSON per plan.

#include "dbf-launch.h"

#include <cstdio>
#include <cstdlib>

#define DBF_NAME_OF(name, kernel) #name,
static const char * const names[] = { DBF_KERNELS(DBF_NAME_OF) };

// made-up addresses, far apart, to see which of them a kernel gets
static const void * place(int i) {
    return (const void *) ((uintptr_t) i << 50);
}

static unsigned long long number(const void * p) {
    return (unsigned long long) (uintptr_t) p;
}

int main(int argc, char ** argv) {
    for (int i = 1; i + 9 <= argc; i += 9) {
        long long v[9];
        for (int j = 0; j < 9; ++j) {
            v[j] = atoll(argv[i + j]);
        }
        dbf_shape s = {};
        s.n_in     = v[0];
        s.k        = v[1];
        s.n_out    = v[2];
        s.n_tokens = v[3];
        s.x_stride = v[0] + 8;
        s.sa       = DBF_SCALE_F16;
        s.sm       = DBF_SCALE_F32;
        s.sb       = DBF_SCALE_F32;
        const dbf_device device = { (int) v[4], (int) v[5], (size_t) v[6], (size_t) v[6] + 1024 };
        const char * why_not = dbf_unsupported(s, device);
        if (why_not != nullptr) {
            printf("{\"unsupported\": \"%s\"}\n", why_not);
            continue;
        }
        const dbf_plan plan = dbf_make_plan(s, device, v[7] != 0, v[7] != 0, (dbf_path) v[8]);
        printf("{\"u\": %zu, \"rounded\": %zu, \"info\": %zu, \"workspace\": %zu, \"launches\": [", plan.u, plan.rounded,
               plan.info, plan.workspace);

        const dbf_operands o = { place(1), place(2), place(3), place(4), place(5), (const float *) place(6), (float *) place(7) };
        bool first = true;
        dbf_execute(plan, o, (void *) place(8), [&](const dbf_launch & l, const dbf_args & a) {
            printf("%s{\"kernel\": \"%s\", \"stage\": %d, \"grid\": [%d, %d], \"block\": %d, \"shared\": %zu, "
                   "\"signs\": %llu, \"x\": %llu, \"s_in\": %llu, \"s_out\": %llu, \"y\": %llu, \"rounded\": %llu, "
                   "\"info\": %llu, \"x_stride\": %lld, \"n_words\": %d, \"rows\": %d, \"n_tokens\": %d, "
                   "\"chunk_steps\": %d, \"s_in_type\": %d, \"s_out_type\": %d, \"x_vector\": %d}",
                   first ? "" : ", ", names[l.kernel], l.stage, l.grid.x, l.grid.y, l.block, l.shared, number(a.signs),
                   number(a.x), number(a.s_in), number(a.s_out), number(a.y), number(a.rounded), number(a.info),
                   (long long) a.x_stride, a.n_words, a.rows, a.n_tokens, a.chunk_steps, (int) a.s_in_type, (int) a.s_out_type,
                   a.x_vector);
            first = false;
        });
        printf("]}\n");
    }
}
