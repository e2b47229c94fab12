// Runs DBF products on the emulated GPU the way dbf.cu does on a real one: dbf_make_plan chooses kernels, grids and shared
// memory, dbf_execute says what each kernel gets. `driver CASES RESULTS`; cases.py writes the one and reads the other.
//
// Linked with g++'s object of the kernels' source or with that of nvcc's PTX: the names are the same.
//
// Every buffer is a heap block that ends where its last byte ends, so that AddressSanitizer sees the first byte behind it.
// Without it, a few bytes of a known value stand there instead. Outputs and workspace begin as NaNs.

#include "cuhost.h"

#include "dbf-kernels.cuh"

#include <cstdio>
#include <cstdlib>
#include <vector>

namespace {

#ifdef __SANITIZE_ADDRESS__
constexpr size_t TAIL = 0;
#else
constexpr size_t TAIL = 64;
#endif
constexpr char CANARY = 0x5a;

FILE * in;

void read_all(void * to, size_t n) {
    if (fread(to, 1, n, in) != n) {
        fprintf(stderr, "driver: the file of cases is too short\n");
        exit(2);
    }
}

int64_t read_number() {
    int64_t v;
    read_all(&v, sizeof(v));
    return v;
}

// `size` bytes at an address that is `offset` behind a multiple of 256
struct buffer {
    const char * name;
    char *       memory;
    char *       data;
    size_t       size;
    std::vector<char> was;  // inputs: their content, which must not change

    buffer(const char * name, size_t size, size_t offset, int fill) : name(name), size(size) {
        if (posix_memalign((void **) &memory, 256, offset + size + TAIL) != 0) {
            failed("is too large");
        }
        data   = memory + offset;
        memset(memory, CANARY, offset);
        memset(data, fill, size);
        memset(data + size, CANARY, TAIL);
    }

    buffer(const buffer &) = delete;

    ~buffer() {
        free(memory);
    }

    void read() {
        read_all(data, size);
        was.assign(data, data + size);
    }

    void check() const {
        for (const char * p = memory; p < data; ++p) {
            if (*p != CANARY) {
                failed("was written before its start");
            }
        }
        for (size_t i = 0; i < TAIL; ++i) {
            if (data[size + i] != CANARY) {
                failed("was written behind its end");
            }
        }
        if (!was.empty() && memcmp(was.data(), data, size) != 0) {
            failed("is an input and was changed");
        }
    }

    void failed(const char * what) const {
        fprintf(stderr, "driver: %s %s\n", name, what);
        abort();
    }
};

} // namespace

// ---- the kernels

// Their bodies are in another object, made from the source or from the PTX. (This file is compiled without optimisation, so
// that none of them is inlined here.)
#define DBF_NAME(...) __VA_ARGS__
#define DBF_DECLARE(id, kernel) extern template __global__ void DBF_NAME kernel(const dbf_args);
DBF_KERNELS(DBF_DECLARE)

#define DBF_CASE(id, kernel) case id: DBF_NAME kernel(args); break;

static void run_kernel(dbf_kernel kernel, const dbf_args & args) {
    switch (kernel) {
        DBF_KERNELS(DBF_CASE)
        case DBF_KERNEL_COUNT: break;
    }
}

namespace {

// ---- one product

// What ran on the stream before the op: it wrote x, and whatever it had in the memory that is workspace and output now. An
// early launch must not touch any of them before it has waited.
void run_previous_kernel(const buffer & x, const buffer & workspace, const buffer & y) {
    const buffer * bx = &x, * bw = &workspace, * by = &y;
    cuhost::launch(1, 32, 0, [=] {
        if (threadIdx.x == 0) {
            memcpy(bx->data, bx->was.data(), bx->size);
            memset(bw->data, 0xff, bw->size);
            memset(by->data, 0xff, by->size);
        }
    });
}

size_t scale_bytes(int64_t n, dbf_scale_type type) {
    return (size_t) n*(type == DBF_SCALE_F16 ? 2 : 4);
}

bool is_vector(const buffer & b) {
    return (uintptr_t) b.data % 16 == 0;
}

void run_case(FILE * out) {
    dbf_shape s = {};
    s.n_in     = read_number();
    s.k        = read_number();
    s.n_out    = read_number();
    s.n_tokens = read_number();
    s.x_stride = read_number();
    dbf_device device = {};
    device.cc           = (int)    read_number();
    device.n_sm         = (int)    read_number();
    device.shared_block = (size_t) read_number();
    device.shared_sm    = (size_t) read_number();
    s.sa = (dbf_scale_type) read_number();
    s.sm = (dbf_scale_type) read_number();
    s.sb = (dbf_scale_type) read_number();
    size_t offset[7];
    for (size_t & o : offset) {
        o = (size_t) read_number();
    }
    const dbf_path path = (dbf_path) read_number();
    cuhost::config.seed   = (uint32_t) read_number();
    cuhost::config.poison = (uint8_t)  read_number();

    // the last token of x ends where its last element does, not after a whole stride
    buffer A ("A",  (size_t) (s.n_out*s.k/8), offset[0], 0);
    buffer B ("B",  (size_t) (s.k*s.n_in/8),  offset[1], 0);
    buffer sa("sa", scale_bytes(s.n_out, s.sa), offset[2], 0);
    buffer sm("sm", scale_bytes(s.k, s.sm), offset[3], 0);
    buffer sb("sb", scale_bytes(s.n_in, s.sb), offset[4], 0);
    buffer x ("x",  (size_t) ((s.n_tokens - 1)*s.x_stride + s.n_in)*4, offset[5], 0xff);
    buffer y ("y",  (size_t) (s.n_tokens*s.n_out)*4, offset[6], 0xff);
    for (buffer * b : { &A, &B, &sa, &sm, &sb }) {
        b->read();
    }
    for (int64_t t = 0; t < s.n_tokens; ++t) {
        read_all(x.data + t*s.x_stride*4, (size_t) s.n_in*4);
    }
    x.was.assign(x.data, x.data + x.size);
    memset(x.data, 0xff, x.size);

    const dbf_plan plan = dbf_make_plan(s, device, is_vector(A), is_vector(B), path);
    buffer workspace("workspace", plan.workspace, 0, 0xff);

    for (const buffer * b : { &A, &B, &sa, &sm, &sb, &x }) {
        cuhost::declare_buffer(b->data, b->size, false);
    }
    cuhost::declare_buffer(y.data, y.size, true);
    cuhost::declare_buffer(workspace.data, workspace.size, true);

    run_previous_kernel(x, workspace, y);
    const dbf_operands operands = { A.data, B.data, sa.data, sm.data, sb.data, (const float *) x.data, (float *) y.data };
    dbf_execute(plan, operands, workspace.data, [&](const dbf_launch & l, const dbf_args & args) {
        if (l.shared > device.shared_block) {
            cuhost::fail("more shared memory than the device has");
        }
        const dim3 grid(l.grid.x, l.grid.y);
        const dbf_kernel kernel = l.kernel;
        cuhost::launch(grid, l.block, l.shared, [=] { run_kernel(kernel, args); }, cuhost::start::early);
    });
    cuhost::synchronize();
    cuhost::forget_buffers();

    for (const buffer * b : { &A, &B, &sa, &sm, &sb, &x, &y, &workspace }) {
        b->check();
    }
    fwrite(y.data, 1, y.size, out);
}

} // namespace

int main(int argc, char ** argv) {
    if (argc != 3) {
        fprintf(stderr, "usage: driver CASES RESULTS\n");
        return 2;
    }
    in = fopen(argv[1], "rb");
    FILE * out = fopen(argv[2], "wb");
    if (in == nullptr || out == nullptr) {
        fprintf(stderr, "driver: cannot open the files\n");
        return 2;
    }
    for (int i = 0; fgetc(in) == 'C'; ++i) {
        fprintf(stderr, "case %d\n", i);  // the last one printed is the one that failed
        run_case(out);
    }
    return fclose(out) == 0 ? 0 : 2;
}
