// The buffer type in which factors lie as tiles: see dbf.h. The loader asks for an op with a factor in it, fills the factor
// as a whole, and from then on the op knows it by its mark.

#include "dbf.h"

#include "ggml-backend-impl.h"
#include "ggml-cpu.h"
#include "ggml-impl.h"
#include "traits.h"

#include <cstdint>

#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>
#endif

static const char * dbf_buffer_type_name(ggml_backend_buffer_type_t) {
    return "CPU_DBF";
}

static void dbf_buffer_set_tensor(ggml_backend_buffer_t, ggml_tensor * tensor, const void * data, size_t offset, size_t size) {
    GGML_ASSERT(offset == 0 && size == ggml_nbytes(tensor));
    ggml_cpu_dbf_set_tiles(tensor, data);
}

static void dbf_buffer_get_tensor(ggml_backend_buffer_t, const ggml_tensor * tensor, void * data, size_t offset, size_t size) {
    GGML_ASSERT(offset == 0 && size == ggml_nbytes(tensor));
    ggml_cpu_dbf_get_rows(tensor, data);
}

// All of the buffer is read for every token, front to back: in pages of 4 KiB a part of that time goes into finding them.
// Only an advice, from which nothing but speed depends; where huge pages are always used or never it changes nothing.
static void advise_huge_pages(void * data, size_t size) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
    const uintptr_t page  = sysconf(_SC_PAGESIZE);
    const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + page - 1) / page * page;
    const uintptr_t end   = (reinterpret_cast<uintptr_t>(data) + size) / page * page;
    if (begin < end) {
        madvise(reinterpret_cast<void *>(begin), end - begin, MADV_HUGEPAGE);
    }
#else
    GGML_UNUSED(data);
    GGML_UNUSED(size);
#endif
}

static ggml_backend_buffer_t dbf_buffer_type_alloc_buffer(ggml_backend_buffer_type_t buft, size_t size) {
    ggml_backend_buffer_t buffer = ggml_backend_buft_alloc_buffer(ggml_backend_cpu_buffer_type(), size);
    if (buffer != nullptr) {
        advise_huge_pages(ggml_backend_buffer_get_base(buffer), size);
        buffer->buft             = buft;
        buffer->iface.set_tensor = dbf_buffer_set_tensor;
        buffer->iface.get_tensor = dbf_buffer_get_tensor;
        buffer->iface.cpy_tensor = nullptr;
    }
    return buffer;
}

static size_t dbf_buffer_type_alignment(ggml_backend_buffer_type_t) {
    return ggml_backend_buft_get_alignment(ggml_backend_cpu_buffer_type());
}

namespace {

struct dbf_extra_buffer_type : ggml::cpu::extra_buffer_type {
    // a buffer whose type is not a host's can only be read by who knows its layout
    static bool is_readable(const ggml_tensor * t, bool may_be_tiled) {
        return t == nullptr || t->buffer == nullptr || ggml_backend_buft_is_host(t->buffer->buft) ||
            (may_be_tiled && t->buffer->buft == ggml_backend_cpu_dbf_buffer_type());
    }

    bool supports_op(ggml_backend_dev_t, const ggml_tensor * op) override {
        if (op->op != GGML_OP_DBF_MUL_MAT) {
            return false;
        }
        for (int i = 0; i < GGML_MAX_SRC; ++i) {
            if (!is_readable(op->src[i], i == 0 || i == 2)) { // A and B
                return false;
            }
        }
        return true;
    }

    ggml::cpu::tensor_traits * get_tensor_traits(const ggml_tensor *) override {
        return nullptr; // the op itself knows both layouts
    }
};

} // namespace

ggml_backend_buffer_type_t ggml_backend_cpu_dbf_buffer_type(void) {
    if (!ggml_cpu_dbf_has_tiles()) {
        return nullptr;
    }
    static ggml_backend_buffer_type type = {
        /* .iface   = */ {
            /* .get_name       = */ dbf_buffer_type_name,
            /* .alloc_buffer   = */ dbf_buffer_type_alloc_buffer,
            /* .get_alignment  = */ dbf_buffer_type_alignment,
            /* .get_max_size   = */ nullptr, // any
            /* .get_alloc_size = */ nullptr, // that of the rows
            /* .is_host        = */ nullptr, // no
        },
        /* .device  = */ ggml_backend_reg_dev_get(ggml_backend_cpu_reg(), 0),
        /* .context = */ new dbf_extra_buffer_type(),
    };
    return &type;
}
