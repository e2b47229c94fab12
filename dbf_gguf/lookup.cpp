// Products of float vectors with matrices of signs, for lookup.py. The sums are those of the patched llama.cpp on the same
// CPU, whose dbf-tables.h this includes: see there.

#include "dbf-tables.h"

#include <cstdlib>
#include <memory>

#if !defined(DBF_TABLES)
#error "a CPU with AVX2 or 64-bit NEON"
#endif

using namespace dbf_tables;

namespace {

struct release {
    void operator()(void * p) const { free(p); }
};

template <typename T>
std::unique_ptr<T[], release> aligned(int64_t count) {
    return std::unique_ptr<T[], release>((T *) aligned_alloc(64, (count*sizeof(T) + 63)/64*64));
}

} // namespace

// y[t][r] = sum over c of sign[r][c]*scale[c]*x[t][c], for n_rows rows of n signs (a multiple of 32), n/8 bytes each
extern "C" void dbf_sign_product(const uint8_t * signs, int64_t n_rows, int64_t n, const float * scale, const float * x,
        int64_t n_tokens, float * y, int n_threads) {
    const int64_t n_groups = (n_tokens + TOKENS - 1)/TOKENS;
    const int64_t n_block  = std::min(ROW_BLOCK, n_rows);
    const int64_t nb       = n/8;

#pragma omp parallel num_threads(n_threads)
    {
        const auto scaled = aligned<float>(n);
        const auto q      = aligned<int16_t>(TOKENS*n);
        const auto tokens = aligned<int16_t>(TOKENS*n);
        const auto tables = aligned<int16_t>(TOKENS*STRIP/4*16);
        const auto sums   = aligned<int32_t>(TOKENS*n_block);

#pragma omp for schedule(static)
        for (int64_t g = 0; g < n_groups; ++g) {
            const int64_t   first = g*TOKENS;
            const int64_t   count = std::min(TOKENS, n_tokens - first);
            const int16_t * rows[TOKENS];
            float           d[TOKENS];
            for (int64_t t = 0; t < count; ++t) {
                const float * token = x + (first + t)*n;
                for (int64_t i = 0; i < n; ++i) {
                    scaled[i] = scale[i]*token[i];
                }
                d[t]    = quantize(scaled.get(), n, q.get() + t*n);
                rows[t] = q.get() + t*n;
            }
            interleave(rows, count, n, tokens.get());
            for (int64_t r0 = 0; r0 < n_rows; r0 += n_block) {
                const int64_t n_here = std::min(n_block, n_rows - r0);
                sum_rows_tokens(signs + r0*nb, nb, n_here, 0, tokens.get(), n, tables.get(), sums.get());
                for (int64_t r1 = 0; r1 < n_here; r1 += TOKENS) { // so few that their sums stay in L1 for all tokens
                    const int64_t r2 = std::min(r1 + TOKENS, n_here);
                    for (int64_t t = 0; t < count; ++t) {
                        float * out = y + (first + t)*n_rows + r0;
                        for (int64_t r = r1; r < r2; ++r) {
                            out[r] = d[t]*(float) sums[r*TOKENS + t];
                        }
                    }
                }
            }
        }
    }
}
