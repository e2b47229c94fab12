#pragma once

#include <cstdint>

struct instructions_args {
    const uint32_t * in;   // 64
    const float *    f;    // 64
    uint32_t *       out;  // 64 threads x INSTRUCTIONS_OUT
    int64_t          stride;
    int              n;
};

constexpr int INSTRUCTIONS_OUT = 33;

#ifdef __CUDACC__
__global__ void instructions(instructions_args a);
#else
void instructions(instructions_args a);
#endif
