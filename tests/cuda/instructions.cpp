// Runs the kernel of instructions.cu, whatever it was made from, and prints its results. An argument plants a defect.

#include "cuhost.h"
#include "instructions.h"

#include <cstdio>
#include <string>
#include <vector>

int main(int argc, char ** argv) {
    const std::string defect = argc > 1 ? argv[1] : "";
    std::vector<uint32_t> in(68), out(64*INSTRUCTIONS_OUT);
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
    const instructions_args args = { in.data() + (defect == "misaligned"), f.data(), out.data(), INSTRUCTIONS_OUT, 20 };
    cuhost::declare_buffer(in.data(), 4*in.size(), defect == "constant");
    cuhost::declare_buffer(f.data(), 4*f.size() - (defect == "read"), false);
    cuhost::declare_buffer(out.data(), 4*out.size() - 4*(defect == "write"), defect != "constant");
    cuhost::launch(1, 64, 64*sizeof(uint4) - (defect == "shared"), [&] { instructions(args); });
    cuhost::synchronize();
    for (const uint32_t v : out) {
        printf("%08x\n", v);
    }
}
