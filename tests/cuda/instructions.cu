// A kernel of one block whose results depend on many kinds of instructions, to compare g++'s reading of the source with the
// translation of nvcc's PTX, bit by bit. No sum of products in floating point: nvcc would contract it.

#ifndef __CUDACC__
#include "cuhost.h"
#else
#include <cuda_fp16.h>
#endif

#include "instructions.h"

static __device__ void mma(int (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#ifndef __CUDACC__
    cuhost::mma_u8s8_m16n8k32(c, a, b);
#elif __CUDA_ARCH__ >= 800
    asm volatile("mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
    // the same tile in four quarters
    for (int k = 0; k < 2; ++k) {
        for (int row = 0; row < 2; ++row) {
            asm volatile("mma.sync.aligned.m8n8k16.row.col.s32.u8.s8.s32 {%0, %1}, {%2}, {%3}, {%0, %1};"
                : "+r"(c[2*row]), "+r"(c[2*row + 1]) : "r"(a[2*k + row]), "r"(b[k]));
        }
    }
#endif
}

static __device__ void mma(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#ifndef __CUDACC__
    cuhost::mma_f16_m16n8k16(c, a, b);
#elif __CUDA_ARCH__ >= 800
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
    for (int k = 0; k < 2; ++k) {
        asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
            : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a[2*k]), "r"(a[2*k + 1]), "r"(b[k]));
    }
#endif
}

__global__ void instructions(instructions_args a) {
#ifdef __CUDACC__
    extern __shared__ __align__(16) char memory[];
#else
    char * memory = cuhost::shared_memory();
#endif
    const int t = threadIdx.x;
    uint32_t * out = a.out + (int64_t) t*a.stride;
    int n = 0;

    // integers
    const uint32_t x = a.in[t];
    const uint32_t y = a.in[63 - t];
    const int      s = (int) x;
    out[n++] = x*y + 12345u;
    out[n++] = (uint32_t) ((uint64_t) x*y >> 32);
    out[n++] = (uint32_t) (((int64_t) s*(int) y) >> 20);
    out[n++] = x % (y | 1) + (uint32_t) (s/(int) (y >> 8 | 1));
    out[n++] = (uint32_t) (s >> (t % 32)) ^ x >> (y % 32) ^ y << (t % 32);
    out[n++] = s < (int) y ? x : y;
    out[n++] = (uint32_t) max(s, (int) y) - (uint32_t) min(s, (int) y);
    out[n++] = (x & 0x01010101u << (t % 8)) | (~y & 0xf0f0u);
    out[n++] = (x & y) ^ (x | ~y);
    out[n++] = (uint32_t) __popc(x);
    out[n++] = __byte_perm(x, y, 0x7241 ^ (uint32_t) t);
    out[n++] = (uint32_t) __dp4a(s, (int) y, t);
    out[n++] = __dp4a(x, y, (uint32_t) t);
    out[n++] = (uint32_t) ((int8_t) (x >> 8) + (int16_t) y + (uint8_t) y);

    // a loop whose length is not known, with a division by its counter
    uint32_t sum = 0;
    for (int i = 1; i <= a.n; ++i) {
        sum = sum*31 + a.in[(t + i) % 64]/(uint32_t) i;
    }
    out[n++] = sum;

    // conversions
    const float f = a.f[t];
    out[n++] = (uint32_t) __float2int_rn(f);
    out[n++] = (uint32_t) __float2int_rz(f);
    out[n++] = __float_as_uint((float) s);
    out[n++] = __float_as_uint(fmaxf(f, 1.5f)*0.25f);
    out[n++] = __float_as_uint(fabsf(f) < 8.0f ? f : -f);
    const __half h = __float2half_rn(f);
    out[n++] = __float_as_uint(__half2float(h)) ^ (uint32_t) __half_as_ushort(h);

    // vector load
    const uint4 four = *((const uint4 *) a.in + t/4);
    out[n++] = four.x ^ four.y << 1 ^ four.z << 2 ^ four.w << 3;

    // shared memory, in several widths, and barriers
    uint4 * wide = (uint4 *) memory;
    wide[t] = make_uint4(x, y, x ^ y, sum);
    __syncthreads();
    const uint4 other = wide[(t + 32) % 64];
    out[n++] = other.x + other.w;
    out[n++] = (uint32_t) (((const int8_t *) memory)[(t*37) % 1024] + ((const uint16_t *) memory)[(t*11) % 512]);
    __syncwarp();

    // warp functions
    out[n++] = (uint32_t) __shfl_xor_sync(0xffffffff, s, 5);
    out[n++] = __float_as_uint(__shfl_sync(0xffffffff, f, (t + 3) % 8, 8));
    out[n++] = (uint32_t) __shfl_down_sync(0xffffffff, s, 3);
    out[n++] = __ballot_sync(0xffffffff, (x & 4) != 0);

    // tensor cores
    const uint32_t fragment_a[4] = { x, y, x ^ other.y, y + other.z };
    const uint32_t fragment_b[2] = { other.x, other.w };
    int c[4] = { s >> 8, 1, 2, 3 };
    mma(c, fragment_a, fragment_b);
    out[n++] = (uint32_t) c[0] ^ (uint32_t) c[1] << 7;
    out[n++] = (uint32_t) c[2] ^ (uint32_t) c[3] << 7;

    // halves between 1 and 2: no product is rounded, and sums of 16 stay exact
    uint32_t ha[4], hb[2];
    for (int i = 0; i < 4; ++i) {
        ha[i] = (fragment_a[i] & 0x001f001fu) << 5 | 0x3c003c00u;
    }
    for (int i = 0; i < 2; ++i) {
        hb[i] = (fragment_b[i] & 0x001f001fu) << 5 | 0x3c003c00u;
    }
    float d[4] = { 1.0f, -2.0f, 3.0f, -4.0f };
    mma(d, ha, hb);
    out[n++] = __float_as_uint(d[0]) ^ __float_as_uint(d[1]) << 3;
    out[n++] = __float_as_uint(d[2]) ^ __float_as_uint(d[3]) << 3;
    out[n] = (uint32_t) n;
}
