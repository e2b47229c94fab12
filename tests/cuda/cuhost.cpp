// The fibers behind cuhost.h. Compiled without sanitizers, also in their builds: the bookkeeping here belongs to no CUDA
// thread, and ThreadSanitizer would take it for races. CUHOST_ASAN and CUHOST_TSAN say which of them has to be told about
// the switches of stacks.

#include "cuhost.h"

#include <sys/mman.h>

#include <cstdio>
#include <cstdlib>

#ifdef CUHOST_ASAN
#include <sanitizer/common_interface_defs.h>
#endif

#ifdef CUHOST_TSAN
#include <sanitizer/tsan_interface.h>
#endif

#ifndef __x86_64__
#define CUHOST_UCONTEXT
#endif

#ifdef CUHOST_UCONTEXT
#include <ucontext.h>
#endif

uint3 threadIdx;
uint3 blockIdx;
dim3  blockDim;
dim3  gridDim;

namespace cuhost {

settings config;

namespace {

constexpr unsigned MAX_THREADS = 1024;
constexpr size_t   STACK       = 256*1024;  // address space only: pages that no fiber touches cost nothing
constexpr size_t   GUARD       = 4096;

enum class state { runs, waits_for_warp, waits_for_block, done };

struct fiber {
    state    st;
    uint3    index;
    char *   stack;
#ifdef CUHOST_UCONTEXT
    ucontext_t context;
#else
    void *   sp;
#endif
    void *   fake_stack;  // AddressSanitizer's
    void *   tsan;
};

struct warp {
    collective op;
    uint32_t   arrived;
    uint32_t   done;
    uint64_t   generation;           // collectives so far
    uint32_t   shown[2][32][SLOTS];  // in turns: a lane can still read those of one collective when others are at the next
};

// To ThreadSanitizer what one fiber does is in order. If the blocks of a launch ran on the same fibers, it would see no race
// between them; making fibers anew takes it a millisecond each. So blocks take turns with a few sets.
#ifdef CUHOST_TSAN
constexpr unsigned SETS = 3;
#else
constexpr unsigned SETS = 1;
#endif

fiber    fiber_sets[SETS][MAX_THREADS];
fiber *  fibers;  // the set of the block that runs
warp     warps[MAX_THREADS/32];
fiber    scheduler;
unsigned n_threads;
unsigned current;
unsigned n_live;
unsigned at_barrier;
unsigned n_barriers;
bool     running;

char *   block_memory;
size_t   block_memory_size;
void **  garbage;  // what synchronize() frees: shared memory of blocks that are done, kernels' arguments
unsigned n_garbage;

void (*kernel_body)(void *);
void * kernel_arg;

// ---- switching stacks

#ifndef CUHOST_UCONTEXT
// swapcontext() would do, but asks the kernel to save the signal mask each time, which takes longer than all the rest here.
extern "C" void cuhost_switch(void ** save, void * load);
asm(R"(
.text
.type cuhost_switch, @function
cuhost_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq  %rsp, (%rdi)
    movq  %rsi, %rsp
    popq  %r15
    popq  %r14
    popq  %r13
    popq  %r12
    popq  %rbx
    popq  %rbp
    ret
.size cuhost_switch, .-cuhost_switch
)");
#endif

void switch_stack(fiber & from, fiber & to) {
#ifdef CUHOST_UCONTEXT
    swapcontext(&from.context, &to.context);
#else
    cuhost_switch(&from.sp, to.sp);
#endif
}

#ifdef CUHOST_ASAN
const void * scheduler_stack;
size_t       scheduler_stack_size;
#endif

void resume(unsigned i) {
    fiber & f = fibers[i];
    current   = i;
    threadIdx = f.index;
#ifdef CUHOST_ASAN
    __sanitizer_start_switch_fiber(&scheduler.fake_stack, f.stack, STACK);
#endif
#ifdef CUHOST_TSAN
    __tsan_switch_to_fiber(f.tsan, __tsan_switch_to_fiber_no_sync);
#endif
    switch_stack(scheduler, f);
#ifdef CUHOST_ASAN
    __sanitizer_finish_switch_fiber(scheduler.fake_stack, nullptr, nullptr);
#endif
}

void to_scheduler() {
    fiber & f = fibers[current];
#ifdef CUHOST_ASAN
    __sanitizer_start_switch_fiber(f.st == state::done ? nullptr : &f.fake_stack, scheduler_stack, scheduler_stack_size);
#endif
#ifdef CUHOST_TSAN
    __tsan_switch_to_fiber(scheduler.tsan, __tsan_switch_to_fiber_no_sync);
#endif
    switch_stack(f, scheduler);
#ifdef CUHOST_ASAN
    __sanitizer_finish_switch_fiber(f.fake_stack, &scheduler_stack, &scheduler_stack_size);
#endif
}

// "What happened before the release is seen after the acquire": the only order that ThreadSanitizer knows here.
void release(void * tag) {
#ifdef CUHOST_TSAN
    __tsan_release(tag);
#else
    (void) tag;
#endif
}

void acquire(void * tag) {
#ifdef CUHOST_TSAN
    __tsan_acquire(tag);
#else
    (void) tag;
#endif
}

// Barriers take turns with two tags: with one, a thread that is late to leave a barrier would acquire what the fast ones
// released on their arrival at the next. So do the ends of grids: with one, a thread that waits for the previous grid would
// acquire the ends of those threads of its own grid that are done already.
char launch_tag, end_tags[2], barrier_tags[2], warp_tags[MAX_THREADS/32][2];
unsigned n_grids;  // launched so far; the last one's end has the tag end_tags[n_grids % 2]

void fiber_main() {
#ifdef CUHOST_ASAN
    __sanitizer_finish_switch_fiber(nullptr, &scheduler_stack, &scheduler_stack_size);
#endif
    acquire(&launch_tag);
    kernel_body(kernel_arg);
    release(&end_tags[n_grids % 2]);
    if (at_barrier > 0) {
        fail("thread exits while others wait in __syncthreads");
    }
    warp & w = warps[current/32];
    if (w.arrived != 0) {
        fail("thread exits while its warp waits for it");
    }
    w.done |= 1u << current % 32;
    n_live--;
    fibers[current].st = state::done;
    to_scheduler();
    abort();
}

void make_fiber(unsigned i, dim3 block) {
    fiber & f = fibers[i];
    f.st    = state::runs;
    f.index = { i % block.x, i/block.x % block.y, i/(block.x*block.y) };
    f.fake_stack = nullptr;
    if (f.stack == nullptr) {
        char * memory = (char *) mmap(nullptr, GUARD + STACK, PROT_READ | PROT_WRITE,
                                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (memory == MAP_FAILED || mprotect(memory, GUARD, PROT_NONE) != 0) {
            fail("no memory for a fiber's stack");
        }
        f.stack = memory + GUARD;
#ifdef CUHOST_TSAN
        f.tsan = __tsan_create_fiber(0);
#endif
    }
#ifdef CUHOST_UCONTEXT
    getcontext(&f.context);
    f.context.uc_stack.ss_sp   = f.stack;
    f.context.uc_stack.ss_size = STACK;
    f.context.uc_link          = nullptr;
    makecontext(&f.context, fiber_main, 0);
#else
    // what cuhost_switch pops: six registers, then the address it returns to. fiber_main must find its stack as if it had
    // been called, 8 bytes short of a multiple of 16.
    void ** top = (void **) (f.stack + STACK) - 2;
    *top = (void *) fiber_main;
    f.sp = top - 6;
    memset(f.sp, 0, 6*sizeof(void *));
#endif
}

// ---- orders

uint32_t random_state;

uint32_t next_random() {  // xorshift32
    random_state ^= random_state << 13;
    random_state ^= random_state >> 17;
    random_state ^= random_state << 5;
    return random_state;
}

void make_order(unsigned * order, unsigned n) {
    for (unsigned i = 0; i < n; ++i) {
        order[i] = config.seed == 1 ? n - 1 - i : i;
    }
    if (config.seed > 1) {
        for (unsigned i = n; i > 1; --i) {
            const unsigned j = next_random() % i;
            const unsigned t = order[i - 1];
            order[i - 1] = order[j];
            order[j] = t;
        }
    }
}

// A warp runs as far as it can before the next one starts: the widest gap between warps that barriers allow.
void run_block(dim3 block) {
    n_threads  = block.x*block.y*block.z;
    n_live     = n_threads;
    at_barrier = 0;
    n_barriers = 0;
    for (warp & w : warps) {  // field by field: a memset is an access that ThreadSanitizer sees, wherever it is called
        w.arrived    = 0;
        w.done       = 0;
        w.generation = 0;
    }
    for (unsigned i = 0; i < n_threads; ++i) {
        make_fiber(i, block);
    }
    release(&launch_tag);  // after the set-up, so that no thread's first access seems to race with it

    static unsigned warp_order[MAX_THREADS/32];
    unsigned lane_order[32];
    make_order(warp_order, n_threads/32);
    while (n_live > 0) {
        bool progress = false;
        for (unsigned w = 0; w < n_threads/32; ++w) {
            for (bool again = true; again;) {
                again = false;
                make_order(lane_order, 32);
                for (const unsigned l : lane_order) {
                    const unsigned i = 32*warp_order[w] + l;
                    if (fibers[i].st == state::runs) {
                        resume(i);
                        again = progress = true;
                    }
                }
            }
        }
        if (!progress) {
            fail("deadlock: the threads wait in different places");
        }
    }
}

} // namespace

[[noreturn]] void fail(const char * what) {
    fflush(stdout);
    if (running) {
        fprintf(stderr, "cuhost: %s (block %u,%u,%u of %u,%u,%u, thread %u of %u)\n", what, blockIdx.x, blockIdx.y, blockIdx.z,
                gridDim.x, gridDim.y, gridDim.z, current, n_threads);
    } else {
        fprintf(stderr, "cuhost: %s\n", what);
    }
    abort();
}

char * shared_memory() {
    return block_memory;
}

void synchronize() {
    for (char & tag : end_tags) {
        acquire(&tag);
    }
    for (unsigned i = 0; i < n_garbage; ++i) {
        free(garbage[i]);
    }
    n_garbage = 0;
}

void keep_until_synchronize(void * memory) {
    garbage = (void **) realloc(garbage, (n_garbage + 1)*sizeof(void *));
    garbage[n_garbage++] = memory;
}

void wait_for_previous_grid() {
    acquire(&end_tags[(n_grids - 1) % 2]);
}

void launch(dim3 grid, dim3 block, size_t shared_bytes, start when, void (*body)(void *), void * arg) {
    const unsigned n = block.x*block.y*block.z;
    if (n == 0 || n > MAX_THREADS || n % 32 != 0 || block.y != 1 || block.z != 1) {
        fail("block size: a multiple of 32 up to 1024, in x");
    }
    if (grid.x == 0 || grid.y == 0 || grid.z == 0 || grid.y > 65535 || grid.z > 65535 || grid.x > INT32_MAX) {
        fail("grid size");
    }
    if (when == start::in_order) {
        synchronize();
    }
    n_grids++;
    gridDim     = grid;
    blockDim    = block;
    kernel_body = body;
    kernel_arg  = arg;
#ifdef CUHOST_TSAN
    scheduler.tsan = __tsan_get_current_fiber();
#endif
    random_state = config.seed*2654435761u | 1;

    // Each block has shared memory of its own, freed when all are done: to ThreadSanitizer blocks run side by side.
    const unsigned n_blocks = grid.x*grid.y*grid.z;
    unsigned * order = (unsigned *) malloc(n_blocks*sizeof(unsigned));
    make_order(order, n_blocks);
    static unsigned n_run = 0;
    for (unsigned i = 0; i < n_blocks; ++i) {
        blockIdx     = { order[i] % grid.x, order[i]/grid.x % grid.y, order[i]/(grid.x*grid.y) };
        block_memory_size = shared_bytes;
        block_memory = shared_bytes > 0 ? (char *) malloc(shared_bytes) : nullptr;
        if (shared_bytes > 0) {
            memset(block_memory, config.poison, shared_bytes);
            keep_until_synchronize(block_memory);
        }
        fibers  = fiber_sets[n_run++ % SETS];
        running = true;
        run_block(block);
        running = false;
    }
    free(order);
}

// ---- bounds

namespace {

struct memory_range {
    const char * begin;
    const char * end;
    bool         writable;
};

memory_range ranges[64];
unsigned     n_ranges;

bool is_inside(const void * address, size_t size, const char * begin, const char * end) {
    return (const char *) address >= begin && (const char *) address < end && size <= (size_t) (end - (const char *) address);
}

} // namespace

void declare_buffer(const void * data, size_t size, bool writable) {
    if (n_ranges == sizeof(ranges)/sizeof(ranges[0])) {
        fail("too many buffers");
    }
    ranges[n_ranges++] = { (const char *) data, (const char *) data + size, writable };
}

void forget_buffers() {
    n_ranges = 0;
}

void check_access(const void * address, size_t size, bool write) {
    if (is_inside(address, size, block_memory, block_memory + block_memory_size)) {
        return;
    }
    for (unsigned i = 0; i < n_ranges; ++i) {
        if (is_inside(address, size, ranges[i].begin, ranges[i].end)) {
            if (write && !ranges[i].writable) {
                fail("write to a buffer that is an input");
            }
            return;
        }
    }
    fail(write ? "write out of bounds" : "read out of bounds");
}

// ---- collectives

void sync_block() {
    if (n_live < n_threads) {
        fail("__syncthreads after some threads have exited");
    }
    char * tag = &barrier_tags[n_barriers % 2];
    release(tag);
    if (++at_barrier == n_threads) {
        at_barrier = 0;
        n_barriers++;
        for (unsigned i = 0; i < n_threads; ++i) {
            if (fibers[i].st == state::waits_for_block) {
                fibers[i].st = state::runs;
            }
        }
    } else {
        fibers[current].st = state::waits_for_block;
        to_scheduler();
    }
    acquire(tag);
}

const uint32_t (* exchange(uint32_t mask, collective op, const uint32_t * registers, int n))[SLOTS] {
    warp & w = warps[current/32];
    if (mask != FULL_MASK) {
        fail("warp function with a partial mask, which is not emulated");
    }
    if (w.done != 0) {
        fail("warp function whose mask names an exited lane");
    }
    if (w.arrived == 0) {
        w.op = op;
    } else if (w.op != op) {
        fail("lanes of a warp are in different warp functions");
    }
    uint32_t (* shown)[SLOTS] = w.shown[w.generation % 2];
    for (int i = 0; i < n; ++i) {
        shown[current % 32][i] = registers[i];
    }
    w.arrived |= 1u << current % 32;
    if (w.arrived == FULL_MASK) {
        w.arrived = 0;
        w.generation++;
        for (unsigned i = current & ~31u; i < (current | 31u) + 1; ++i) {
            fibers[i].st = state::runs;
        }
    } else {
        fibers[current].st = state::waits_for_warp;
        to_scheduler();
    }
    return shown;
}

void sync_warp(uint32_t mask) {
    char * tag = &warp_tags[current/32][warps[current/32].generation % 2];
    release(tag);
    exchange(mask, collective::syncwarp, nullptr, 0);
    acquire(tag);
}

// Tensor core fragments, after the PTX ISA. With g = lane/4 and t = lane % 4 a 32-bit register holds consecutive elements of
// a row of A or of a column of B (4 bytes or 2 halves, `per` of them):
//
//   A   registers in pairs: row g and row g + 8 (of an 8-row tile only the first); the pair r is elements r*4*per + t*per ...
//   B   column g; register r is elements r*4*per + t*per ...
//   C   c0, c1: row g, columns 2t and 2t + 1; c2, c3: row g + 8

void mma_u8s8_m16n8k32(int (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    const uint32_t mine[6] = { a[0], a[1], a[2], a[3], b[0], b[1] };
    const auto shown = exchange(FULL_MASK, collective::mma_u8s8_m16n8k32, mine, 6);
    const int g = lane()/4;
    const int t = lane() % 4;
    for (int i = 0; i < 4; ++i) {
        uint32_t sum = (uint32_t) c[i];
        for (int r = 0; r < 2; ++r) {
            for (int l = 0; l < 4; ++l) {
                const uint32_t av = shown[4*g + l][2*r + i/2];
                const uint32_t bv = shown[4*(2*t + i % 2) + l][4 + r];
                for (int byte = 0; byte < 4; ++byte) {
                    sum += (uint32_t) ((int) (uint8_t) (av >> 8*byte) * (int8_t) (bv >> 8*byte));
                }
            }
        }
        c[i] = (int) sum;
    }
}

void mma_u8s8_m8n8k16(int (&c)[2], uint32_t a, uint32_t b) {
    const uint32_t mine[2] = { a, b };
    const auto shown = exchange(FULL_MASK, collective::mma_u8s8_m8n8k16, mine, 2);
    const int g = lane()/4;
    const int t = lane() % 4;
    for (int i = 0; i < 2; ++i) {
        uint32_t sum = (uint32_t) c[i];
        for (int l = 0; l < 4; ++l) {
            const uint32_t av = shown[4*g + l][0];
            const uint32_t bv = shown[4*(2*t + i) + l][1];
            for (int byte = 0; byte < 4; ++byte) {
                sum += (uint32_t) ((int) (uint8_t) (av >> 8*byte) * (int8_t) (bv >> 8*byte));
            }
        }
        c[i] = (int) sum;
    }
}

static double half_of(uint32_t pair, int which) {
    __half_raw half;
    half.x = (unsigned short) (pair >> 16*which);
    return (double) __half2float(half);
}

// The products are exact. How the tensor core rounds their sum is not documented; towards zero is the worst that has been
// observed, so that is done here.
static float round_to_zero(double v) {
    const float f = (float) v;
    return std::isfinite(f) && std::fabs((double) f) > std::fabs(v) ? nextafterf(f, 0.0f) : f;
}

static void mma_f16(float (&c)[4], const uint32_t (*shown)[SLOTS], int pairs) {
    const int g = lane()/4;
    const int t = lane() % 4;
    for (int i = 0; i < 4; ++i) {
        double sum = c[i];
        for (int r = 0; r < pairs; ++r) {
            for (int l = 0; l < 4; ++l) {
                const uint32_t av = shown[4*g + l][2*r + i/2];
                const uint32_t bv = shown[4*(2*t + i % 2) + l][2*pairs + r];
                sum += half_of(av, 0)*half_of(bv, 0) + half_of(av, 1)*half_of(bv, 1);
            }
        }
        c[i] = round_to_zero(sum);
    }
}

void mma_f16_m16n8k16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    const uint32_t mine[6] = { a[0], a[1], a[2], a[3], b[0], b[1] };
    mma_f16(c, exchange(FULL_MASK, collective::mma_f16_m16n8k16, mine, 6), 2);
}

void mma_f16_m16n8k8(float (&c)[4], const uint32_t (&a)[2], const uint32_t (&b)[1]) {
    const uint32_t mine[3] = { a[0], a[1], b[0] };
    mma_f16(c, exchange(FULL_MASK, collective::mma_f16_m16n8k8, mine, 3), 1);
}

} // namespace cuhost
