// AVX-512 for CPUs without it, by SIMDe's plain C: included before dbf.cpp, whose AVX-512 code then runs anywhere. Every
// intrinsic does what Intel's manual says, slowly. -DWITH_VNNI takes the code for CPUs that have that too.

#define SIMDE_ENABLE_NATIVE_ALIASES
#include <simde/x86/avx512.h>

// SIMDe 0.7 gives the first of these four arguments, and has the second not at all
#undef  _mm512_madd_epi16
#define _mm512_madd_epi16(a, b) simde_mm512_madd_epi16(a, b)

static inline int simde_reduce_add(simde__m512i v) {
    const simde__m512i_private lanes = simde__m512i_to_private(v);
    int sum = 0;
    for (int i = 0; i < 16; ++i) {
        sum += lanes.i32[i];
    }
    return sum;
}
#undef  _mm512_reduce_add_epi32
#define _mm512_reduce_add_epi32 simde_reduce_add

// not before: SIMDe would take the CPU's own instructions
#define __AVX512F__  1
#define __AVX512BW__ 1
#ifdef WITH_VNNI
#define __AVX512VNNI__ 1
#endif
