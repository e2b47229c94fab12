// AVX-512 for CPUs without it, by SIMDe's plain C: included before dbf.cpp, whose AVX-512 code then runs anywhere. Every
// intrinsic does what Intel's manual says, slowly.

#define SIMDE_ENABLE_NATIVE_ALIASES
#include <simde/x86/avx512.h>

// SIMDe 0.7 gives the first of these four arguments, and does not have the other two
#undef  _mm512_madd_epi16
#define _mm512_madd_epi16(a, b) simde_mm512_madd_epi16(a, b)

static inline simde__m512i simde_shuffle(simde__m512i v, int order) {
    simde__m512i_private from = simde__m512i_to_private(v), to = from;
    for (int i = 0; i < 16; ++i) {
        to.i32[i] = from.i32[i/4*4 + (order >> 2*(i % 4) & 3)];
    }
    return simde__m512i_from_private(to);
}
#undef  _mm512_shuffle_epi32
#define _mm512_shuffle_epi32 simde_shuffle

static inline simde__m512i simde_ternarylogic(simde__m512i a, simde__m512i b, simde__m512i c, int function) {
    const simde__m512i_private x = simde__m512i_to_private(a), y = simde__m512i_to_private(b), z = simde__m512i_to_private(c);
    simde__m512i_private to = x;
    for (int i = 0; i < 16; ++i) {
        uint32_t word = 0;
        for (int bit = 0; bit < 32; ++bit) {
            const int at = (x.u32[i] >> bit & 1)*4 + (y.u32[i] >> bit & 1)*2 + (z.u32[i] >> bit & 1);
            word |= (uint32_t) (function >> at & 1) << bit;
        }
        to.u32[i] = word;
    }
    return simde__m512i_from_private(to);
}
#undef  _mm512_ternarylogic_epi32
#define _mm512_ternarylogic_epi32 simde_ternarylogic

// not before: SIMDe would take the CPU's own instructions
#define __AVX512F__    1
#define __AVX512BW__   1
#define __AVX512VBMI__ 1
#define __AVX512VNNI__ 1
