// Products of float vectors with matrices of signs, for lookup.py. The sums are those of the patched llama.cpp on the same
// CPU, whose dbf-tables.h this includes: see there.

#include "dbf-tables.h"

#include <cstdlib>
#include <memory>
#include <type_traits>

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

// tokens of one thread that go through the matrix together
constexpr int64_t GROUP = SINGLES ? 32 : TOKENS;

inline float to_float(float v) { return v; }

inline float to_float(uint16_t bfloat16) {
    const uint32_t bits = (uint32_t) bfloat16 << 16;
    float v;
    memcpy(&v, &bits, sizeof(v));
    return v;
}

inline void from_float(float v, float & to) { to = v; }

inline void from_float(float v, uint16_t & bfloat16) { // to the nearest, ties to even; a NaN that was computed stays one
    uint32_t bits;
    memcpy(&bits, &v, sizeof(bits));
    bfloat16 = (uint16_t) ((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

// Numbers of one of two types, or none at all
struct numbers {
    void * data;
    bool   half; // bfloat16, else float

    // f with a pointer to number `i`, of its type
    template <typename F>
    void at(int64_t i, const F & f) const {
        if (data != nullptr && half) {
            f((uint16_t *) data + i);
        } else if (data != nullptr) {
            f((float *) data + i);
        }
    }
};

// sums[i] += a[i]*b[i]
template <typename A, typename B>
void add_products(const A * a, const B * b, int64_t n, float * sums) {
    for (int64_t i = 0; i < n; ++i) {
        sums[i] += to_float(a[i])*to_float(b[i]);
    }
}

} // namespace

// The products p[t][r] = sum over c of sign[r][c]*scale[c]*x[t][c], for n_rows rows of n signs (a multiple of 32), n/8 bytes
// each. What is made of them and is not wanted, is null:
//
//     y[t][r]      = p[t][r]
//     scaled[t][r] = p[t][r]*out_scale[r]
//     dots[r]      = sum over t of p[t][r]*other[t][r]
//     x_dots[c]    = sum over t of x[t][c]*x_other[t][c]
//
// All is float, but x, scaled and other may be bfloat16. Nothing depends on the number of threads.
extern "C" void dbf_sign_product(const uint8_t * signs, int64_t n_rows, int64_t n, int64_t n_tokens, int n_threads, const float * scale,
        void * x, int x_half, const float * x_other, float * x_dots, float * y, const float * out_scale, void * scaled, int scaled_half,
        void * other, int other_half, float * dots) {
    const numbers in = { x, x_half != 0 }, out = { scaled, scaled_half != 0 }, against = { other, other_half != 0 };
    const int64_t n_groups = (n_tokens + GROUP - 1)/GROUP;
    const int64_t n_block  = std::min(ROW_BLOCK, n_rows);
    const int64_t nb       = n/8;
    // sums over the tokens of each group
    const auto    partial   = aligned<float>(dots   == nullptr ? 0 : n_groups*n_rows);
    const auto    x_partial = aligned<float>(x_dots == nullptr ? 0 : n_groups*n);

#pragma omp parallel num_threads(n_threads)
    {
        const auto input  = aligned<float>(n);
        const auto q      = aligned<int16_t>(GROUP*n);
        const auto tokens = aligned<int16_t>(SINGLES ? 0 : TOKENS*n);
        const auto tables = aligned<uint8_t>(SINGLES ? GROUP*tables_size(n) : TOKENS*STRIP/4*16*sizeof(int16_t));
        const auto tile   = aligned<uint8_t>(SINGLES ? ROWS*nb : 0);
        const auto sums   = aligned<int32_t>(SINGLES ? ROWS : TOKENS*n_block);

#pragma omp for schedule(static)
        for (int64_t g = 0; g < n_groups; ++g) {
            const int64_t   first = g*GROUP;
            const int64_t   count = std::min(GROUP, n_tokens - first);
            const int16_t * rows[GROUP];
            float           d[GROUP];
            float         * here = partial.get() + g*n_rows, * x_here = x_partial.get() + g*n;
            if (dots != nullptr) {
                std::fill(here, here + n_rows, 0.0f);
            }
            if (x_dots != nullptr) {
                std::fill(x_here, x_here + n, 0.0f);
            }
            for (int64_t t = 0; t < count; ++t) {
                in.at((first + t)*n, [&](const auto * token) {
                    if (x_dots != nullptr) {
                        add_products(token, x_other + (first + t)*n, n, x_here);
                    }
                    for (int64_t i = 0; i < n; ++i) {
                        input[i] = scale[i]*to_float(token[i]);
                    }
                });
                d[t]    = quantize(input.get(), n, q.get() + t*n);
                rows[t] = q.get() + t*n;
            }
            // for n_here rows from r0 on, of token t; their sums lie `stride` apart
            const auto finish = [&](auto stride, const int32_t * s, int64_t t, int64_t r0, int64_t n_here) {
                const int64_t at = (first + t)*n_rows + r0;
                float p[std::max(ROWS, TOKENS)];
                for (int64_t r = 0; r < n_here; ++r) {
                    p[r] = d[t]*(float) s[r*stride];
                }
                if (y != nullptr) {
                    std::copy(p, p + n_here, y + at);
                }
                out.at(at, [&](auto * to) {
                    for (int64_t r = 0; r < n_here; ++r) {
                        from_float(out_scale[r0 + r]*p[r], to[r]);
                    }
                });
                against.at(at, [&](const auto * values) { add_products(p, values, n_here, here + r0); });
            };
            if constexpr (SINGLES) {
                for (int64_t t = 0; t < count; ++t) {
                    make_tables(rows[t], n, tables.get() + t*tables_size(n));
                }
                for (int64_t r = 0; r < n_rows; r += ROWS) {
                    const int64_t n_here = std::min(ROWS, n_rows - r);
                    to_tile(signs + r*nb, nb, n_here, n, nullptr, tile.get());
                    for (int64_t t = 0; t < count; ++t) {
                        sum_tile(tile.get(), tables.get() + t*tables_size(n), n, tile.get(), sums.get());
                        finish(std::integral_constant<int64_t, 1>(), sums.get(), t, r, n_here);
                    }
                }
            } else {
                interleave(rows, count, n, tokens.get());
                for (int64_t r0 = 0; r0 < n_rows; r0 += n_block) {
                    const int64_t n_here = std::min(n_block, n_rows - r0);
                    sum_rows_tokens(signs + r0*nb, nb, n_here, 0, tokens.get(), n, (int16_t *) tables.get(), sums.get());
                    for (int64_t r = 0; r < n_here; r += TOKENS) { // so few that their sums stay in L1 for all tokens
                        for (int64_t t = 0; t < count; ++t) {
                            const auto stride = std::integral_constant<int64_t, TOKENS>();
                            finish(stride, sums.get() + r*TOKENS + t, t, r0 + r, std::min(TOKENS, n_here - r));
                        }
                    }
                }
            }
        }
    }
    const auto total = [&](const float * parts, int64_t count, float * sum) {
        for (int64_t i = 0; sum != nullptr && i < count; ++i) {
            sum[i] = 0;
            for (int64_t g = 0; g < n_groups; ++g) {
                sum[i] += parts[g*count + i];
            }
        }
    };
    total(partial.get(), n_rows, dots);
    total(x_partial.get(), n, x_dots);
}
