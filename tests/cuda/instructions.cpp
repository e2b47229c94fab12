// Runs the kernel of instructions.cu, whatever it was made from, and prints its results.

#include "cuhost.h"
#include "instructions.h"

#include <cstdio>
#include <vector>

int main() {
    std::vector<uint32_t> in(64), out(64*INSTRUCTIONS_OUT);
    std::vector<float> f(64);
    uint32_t state = 1;
    for (int i = 0; i < 64; ++i) {
        in[i] = state = state*1664525u + 1013904223u;
        f[i] = (float) (int) state / (i % 2 ? 65536.0f : 268435456.0f);
    }
    f[5]  = NAN;
    f[11] = INFINITY;
    f[12] = -INFINITY;
    f[20] = 2.5f;
    f[21] = -0.5f;
    f[22] = 6e-8f;
    const instructions_args args = { in.data(), f.data(), out.data(), INSTRUCTIONS_OUT, 20 };
    cuhost::launch(1, 64, 64*sizeof(uint4), [&] { instructions(args); });
    cuhost::synchronize();
    for (const uint32_t v : out) {
        printf("%08x\n", v);
    }
}
