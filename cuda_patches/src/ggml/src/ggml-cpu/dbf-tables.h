// Products with matrices of signs by table lookup, for CPUs with a byte shuffle: AVX2, AVX-512 and 64-bit NEON. Part of
// dbf.cpp.
//
// Four neighbouring signs of a row are a number from 0 to 15, and what they add up to with their four inputs is one of 16
// sums. These are computed once for a vector; from then on a row costs one lookup for four signs. (The technique is known
// from T-MAC, Wei et al. 2024; there it serves weights of 1 to 4 bits, and the file's layout is made for it.)
//
// The sums. Inputs are rounded to 16-bit integers q with one scale a vector, such that no sum of four magnitudes leaves 16
// bits. The sum of four is then rounded once more, to T = sum/4, which has 14 bits: its error is that of inputs
// with one bit more. All that follows is exact integer arithmetic, so that one token and many give the same result.
//
// One token: a lookup is a byte shuffle with the table in one register and 16 (or 2 x 16) rows in the other.
//
//            columns of signs, 8 to a byte                        rows
//          c0  c1  c2 ... c15                                 r0  r1 ... r15
//     r0  [ 16 bytes of a row ]                          c0  [ one byte of 16 rows ]
//     r1  [                   ]     transposed in        c1  [                     ]    & 15, >> 4: two vectors of
//     ..  [                   ]     registers: four      ..  [                     ]    indices, each into the tables
//     r15 [                   ]     rounds of zips       c15 [                     ]    of its four columns
//
// The zips cost as much as the lookups. So where a model is loaded into memory of its own, its rows are put into tiles,
// whose rows are the columns on the right: 16 (or 32) rows, byte by byte, one tile after the other. Rows at the end that
// do not fill a tile stay as they are. Of what is in rows, tiles are made for several tokens.
//
// T + 8192 is looked up as two digits of 7 bits, hi and lo. Two such digits fit a byte, so only every second result is
// widened to 16 bits. (With 12 bits, two digits of 6, it would be every fourth, some 6 % faster; random models notice.)
//
// With AVX-512 a shuffle takes the tables of four such fours of columns at a time (VBMI), and one instruction adds four
// neighbouring bytes into 32 bits (VNNI). So there the columns of a tile are words of 32 signs instead of bytes. That takes
// 11 instructions for 512 signs where the code for AVX2 takes 30, and an eighth as many loads of tables; on a Zen 4 it is
// 1.6 times as fast as long as the signs are in a cache. (Bytes in vectors of 64, 15 instructions, were hardly faster than
// in those of 32.) CPUs that lack one of the two take the code for AVX2.
//
// Many tokens: with AVX-512 one by one. Else the tables lie in L1 with the sums of 16 tokens side by side; a lookup is an
// address, followed by one addition of 16-bit integers, of which every fourth is widened. Nothing is multiplied.

#pragma once

// What is read soon; no hardware prefetcher follows many rows at a time. Into L2: the few lines that L1 can wait for at a
// time are the limit otherwise. One thread of a Zen 4 reads signs from memory 1.7 times as fast as when they go to L1.
inline void dbf_prefetch(const void * p) {
#if defined(__GNUC__)
    __builtin_prefetch(p, 0, 2);
#else
    (void) p;
#endif
}

#if defined(__AVX2__) || (defined(__aarch64__) && defined(__ARM_NEON))

#define DBF_TABLES

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__AVX2__)
#include <immintrin.h>
#else
#include <arm_neon.h>
#endif

namespace dbf_tables {

constexpr int     Q_MAX     = 32752;  // of the sum of four magnitudes: with the rounding of each it stays below 2^15 - 8
constexpr int     T_SHIFT   = 2;
// What is added before the shift that rounds. Always half a unit would round ties up, and that adds up over many columns;
// so those of every other group of four are rounded down.
constexpr int     HALF[2]   = { 2, 1 };
constexpr int     T_ZERO    = 8192;   // added to T, so that digits are not negative
constexpr int64_t STRIP     = 128;    // columns of 16 bytes of signs
constexpr int64_t AHEAD     = 8192;   // bytes from what is read of a tile to what is fetched for later
constexpr int64_t TOKENS    = 16;     // that share a lookup
constexpr int64_t ROW_BLOCK = 1024;   // rows whose sums for 16 tokens stay in L2 (64 KiB)

// ---- Vectors of each instruction set. A strip of ROWS rows is 16 `bytes`, in the order in which a tile has them: one byte
// of each row, but for AVX-512 a word of each of 16 rows. make_tables32() makes the 256 bytes of tables for 32 columns.
// `digit_sums` are the sums T + T_ZERO of ROWS rows, by digits; its add() takes 32 columns of signs and their tables.

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VBMI__) && defined(__AVX512VNNI__)

using bytes = __m512i;

constexpr int64_t ROWS     = 64;
constexpr int64_t UNIT     = 4;       // bytes of a row that are neighbours in a tile
constexpr int64_t MAX_COLS = 1 << 20; // whose sums of a digit surely fit the 32 bits that they are added in
constexpr bool    SINGLES  = true;    // many tokens are fastest one by one: 1.3 times as fast as 16 at a time on a Zen 4

inline bytes load_bytes(const uint8_t * p)      { return _mm512_loadu_si512(p); }
inline void  store_bytes(uint8_t * p, bytes a)  { _mm512_storeu_si512(p, a); }

// four words of four rows in each quarter, to four rows of each word, or back
inline void transpose(bytes * a) {
    const bytes low01 = _mm512_unpacklo_epi32(a[0], a[1]), high01 = _mm512_unpackhi_epi32(a[0], a[1]);
    const bytes low23 = _mm512_unpacklo_epi32(a[2], a[3]), high23 = _mm512_unpackhi_epi32(a[2], a[3]);
    a[0] = _mm512_unpacklo_epi64(low01,  low23);
    a[1] = _mm512_unpackhi_epi64(low01,  low23);
    a[2] = _mm512_unpacklo_epi64(high01, high23);
    a[3] = _mm512_unpackhi_epi64(high01, high23);
}

inline void load_strip(const uint8_t * w, size_t nb, bytes * a) {
    for (int64_t g = 0; g < 4; ++g) {
        bytes words[4];
        for (int64_t j = 0; j < 4; ++j) {
            const auto row = [&](int64_t i) { return _mm_loadu_si128((const __m128i *) (w + (16*g + 4*i + j)*nb)); };
            words[j] = _mm512_castsi128_si512(row(0));
            words[j] = _mm512_inserti32x4(words[j], row(1), 1);
            words[j] = _mm512_inserti32x4(words[j], row(2), 2);
            words[j] = _mm512_inserti32x4(words[j], row(3), 3);
        }
        transpose(words);
        for (int64_t j = 0; j < 4; ++j) {
            a[4*j + g] = words[j];
        }
    }
}

inline void store_strip(const bytes * a, uint8_t * w, size_t nb) {
    for (int64_t g = 0; g < 4; ++g) {
        bytes words[4];
        for (int64_t j = 0; j < 4; ++j) {
            words[j] = a[4*j + g];
        }
        transpose(words);
        for (int64_t j = 0; j < 4; ++j) {
            const auto row = [&](int64_t i) { return (__m128i *) (w + (16*g + 4*i + j)*nb); };
            _mm_storeu_si128(row(0), _mm512_extracti32x4_epi32(words[j], 0));
            _mm_storeu_si128(row(1), _mm512_extracti32x4_epi32(words[j], 1));
            _mm_storeu_si128(row(2), _mm512_extracti32x4_epi32(words[j], 2));
            _mm_storeu_si128(row(3), _mm512_extracti32x4_epi32(words[j], 3));
        }
    }
}

// Byte j of a word takes the tables of its own two fours of columns, which lie at 16*j. 64 bytes each: lo and hi for the low
// digits of the four bytes, lo and hi for the high ones.
inline void make_tables32(const int16_t * q, uint8_t * tables) {
    const __m512i all   = _mm512_loadu_si512(q); // in quarter j the columns of byte j
    const __m512i first = _mm512_set4_epi32(0x00010001, 0x0001ffff, -65535, -1); // signs of a four's first two columns
    for (int i = 0; i < 2; ++i) {
        const __m512i q01 = i == 0 ? _mm512_shuffle_epi32(all, (_MM_PERM_ENUM) 0x00) : _mm512_shuffle_epi32(all, (_MM_PERM_ENUM) 0xaa);
        const __m512i q23 = i == 0 ? _mm512_shuffle_epi32(all, (_MM_PERM_ENUM) 0x55) : _mm512_shuffle_epi32(all, (_MM_PERM_ENUM) 0xff);
        const __m512i s01 = _mm512_madd_epi16(q01, first);
        const auto sums = [&](int32_t last) { return _mm512_add_epi32(s01, _mm512_madd_epi16(q23, _mm512_set1_epi32(last))); };
        const __m512i half = _mm512_set1_epi16((int16_t) ((T_ZERO << T_SHIFT) + HALF[i])); // as with AVX2
        const __m512i a = _mm512_add_epi16(_mm512_packs_epi32(sums(-1),         sums(-65535)),     half);
        const __m512i b = _mm512_add_epi16(_mm512_packs_epi32(sums(0x0001ffff), sums(0x00010001)), half);
        const auto lo = [](__m512i x) { return _mm512_and_si512(_mm512_srli_epi16(x, T_SHIFT), _mm512_set1_epi16(127)); };
        store_bytes(tables + 128*i,      _mm512_packus_epi16(lo(a), lo(b)));
        store_bytes(tables + 128*i + 64, _mm512_packus_epi16(_mm512_srli_epi16(a, T_SHIFT + 7), _mm512_srli_epi16(b, T_SHIFT + 7)));
    }
}

struct digit_sums {
    __m512i lo[4], hi[4]; // of 16 rows each

    digit_sums() {
        for (int g = 0; g < 4; ++g) {
            lo[g] = hi[g] = _mm512_setzero_si512();
        }
    }

    void add(const bytes * signs, const uint8_t * tables) {
        const __m512i digit = _mm512_set1_epi8(15), one = _mm512_set1_epi8(1);
        const __m512i table = _mm512_set1_epi32(0x30201000);
        const __m512i lo0 = load_bytes(tables),       hi0 = load_bytes(tables + 64);
        const __m512i lo1 = load_bytes(tables + 128), hi1 = load_bytes(tables + 192);
        for (int g = 0; g < 4; ++g) {
            const __m512i i0 = _mm512_ternarylogic_epi32(signs[g], digit, table, 0xea); // (signs & digit) | table
            const __m512i i1 = _mm512_ternarylogic_epi32(_mm512_srli_epi16(signs[g], 4), digit, table, 0xea);
            lo[g] = _mm512_dpbusd_epi32(lo[g], _mm512_add_epi8(_mm512_permutexvar_epi8(i0, lo0), _mm512_permutexvar_epi8(i1, lo1)), one);
            hi[g] = _mm512_dpbusd_epi32(hi[g], _mm512_add_epi8(_mm512_permutexvar_epi8(i0, hi0), _mm512_permutexvar_epi8(i1, hi1)), one);
        }
    }

    void add_to(int32_t * sums) const {
        for (int g = 0; g < 4; ++g) {
            const __m512i sum = _mm512_add_epi32(lo[g], _mm512_slli_epi32(hi[g], 7));
            _mm512_storeu_si512(sums + 16*g, _mm512_add_epi32(_mm512_loadu_si512(sums + 16*g), sum));
        }
    }
};

#else // one byte of each row

constexpr int64_t UNIT     = 1;
constexpr int64_t MAX_COLS = 2048;  // 2048/8 sums of two digits, at most 254 each, fit 16 bits
constexpr bool    SINGLES  = false; // of many tokens 16 at a time are faster

#if defined(__AVX2__)

using bytes = __m256i;

constexpr int64_t ROWS = 32; // 16 in either half: shuffles and zips work on halves

inline bytes load_rows(const uint8_t * w, size_t nb) {
    const __m128i low  = _mm_loadu_si128((const __m128i *) w);
    const __m128i high = _mm_loadu_si128((const __m128i *) (w + 16*nb));
    return _mm256_inserti128_si256(_mm256_castsi128_si256(low), high, 1);
}

inline void store_rows(uint8_t * w, size_t nb, bytes a) {
    _mm_storeu_si128((__m128i *) w,            _mm256_castsi256_si128(a));
    _mm_storeu_si128((__m128i *) (w + 16*nb), _mm256_extracti128_si256(a, 1));
}

inline bytes load_bytes(const uint8_t * p)      { return _mm256_loadu_si256((const __m256i *) p); }
inline void  store_bytes(uint8_t * p, bytes a)  { _mm256_storeu_si256((__m256i *) p, a); }

inline bytes zip_low (bytes a, bytes b) { return _mm256_unpacklo_epi8(a, b); }
inline bytes zip_high(bytes a, bytes b) { return _mm256_unpackhi_epi8(a, b); }
inline bytes add(bytes a, bytes b)      { return _mm256_add_epi8(a, b); }
inline bytes low_digits (bytes a)       { return _mm256_and_si256(a, _mm256_set1_epi8(15)); }
inline bytes high_digits(bytes a)       { return _mm256_and_si256(_mm256_srli_epi16(a, 4), _mm256_set1_epi8(15)); }

inline bytes lookup(const uint8_t * table, bytes index) {
    return _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(_mm_load_si128((const __m128i *) table)), index);
}

// Sums of bytes in 16 bits. `all` adds pairs of bytes as they are and wraps around, `odd` the upper byte of each pair:
// that is one operation less than to separate the bytes first.
struct wide_sum {
    __m256i all = _mm256_setzero_si256();
    __m256i odd = _mm256_setzero_si256();

    void add(bytes v) {
        all = _mm256_add_epi16(all, v);
        odd = _mm256_add_epi16(odd, _mm256_srli_epi16(v, 8));
    }

    void store(uint16_t * sums) const { // in the order of the rows
        const __m256i even = _mm256_sub_epi16(all, _mm256_slli_epi16(odd, 8));
        const __m256i low  = _mm256_unpacklo_epi16(even, odd);
        const __m256i high = _mm256_unpackhi_epi16(even, odd);
        _mm256_storeu_si256((__m256i *) sums,        _mm256_permute2x128_si256(low, high, 0x20));
        _mm256_storeu_si256((__m256i *) (sums + 16), _mm256_permute2x128_si256(low, high, 0x31));
    }
};

// the digits of the 16 sums of four columns: 16 bytes of lo, then 16 of hi
inline void make_table(const int16_t * q, int half, uint8_t * table) {
    int32_t q01, q23;
    memcpy(&q01, q,     sizeof(q01));
    memcpy(&q23, q + 2, sizeof(q23));
    // sums 0-3 and 8-11 first, then 4-7 and 12-15: the order in which packs restores them
    const __m256i sign01  = _mm256_setr_epi16(-1, -1, 1, -1, -1, 1, 1, 1, -1, -1, 1, -1, -1, 1, 1, 1);
    const __m256i sign23a = _mm256_setr_epi16(-1, -1, -1, -1, -1, -1, -1, -1, -1, 1, -1, 1, -1, 1, -1, 1);
    const __m256i sign23b = _mm256_setr_epi16(1, -1, 1, -1, 1, -1, 1, -1, 1, 1, 1, 1, 1, 1, 1, 1);
    const __m256i sum01   = _mm256_madd_epi16(_mm256_set1_epi32(q01), sign01);
    const __m256i sum_a   = _mm256_add_epi32(sum01, _mm256_madd_epi16(_mm256_set1_epi32(q23), sign23a));
    const __m256i sum_b   = _mm256_add_epi32(sum01, _mm256_madd_epi16(_mm256_set1_epi32(q23), sign23b));

    // with its top bit flipped a 16-bit sum is itself plus 2^15 = T_ZERO << T_SHIFT, and then unsigned
    const __m256i zero    = _mm256_set1_epi16((int16_t) ((T_ZERO << T_SHIFT) + half));
    const __m256i sums    = _mm256_add_epi16(_mm256_packs_epi32(sum_a, sum_b), zero);
    const __m256i low     = _mm256_and_si256(_mm256_srli_epi16(sums, T_SHIFT), _mm256_set1_epi16(127));
    const __m256i high    = _mm256_and_si256(_mm256_srli_epi16(sums, T_SHIFT - 1), _mm256_set1_epi16(127 << 8));
    const __m256i part    = _mm256_setr_epi8(0, 2, 4, 6, 8, 10, 12, 14, 1, 3, 5, 7, 9, 11, 13, 15,
                                             0, 2, 4, 6, 8, 10, 12, 14, 1, 3, 5, 7, 9, 11, 13, 15);
    const __m256i digits  = _mm256_shuffle_epi8(_mm256_or_si256(low, high), part);
    _mm256_storeu_si256((__m256i *) table, _mm256_permute4x64_epi64(digits, 0xd8));
}

#else // NEON

using bytes = uint8x16_t;

constexpr int64_t ROWS = 16;

inline bytes load_rows(const uint8_t * w, size_t)           { return vld1q_u8(w); }
inline void  store_rows(uint8_t * w, size_t, bytes a)       { vst1q_u8(w, a); }
inline bytes load_bytes(const uint8_t * p)                  { return vld1q_u8(p); }
inline void  store_bytes(uint8_t * p, bytes a)              { vst1q_u8(p, a); }

inline bytes zip_low (bytes a, bytes b) { return vzip1q_u8(a, b); }
inline bytes zip_high(bytes a, bytes b) { return vzip2q_u8(a, b); }
inline bytes add(bytes a, bytes b)      { return vaddq_u8(a, b); }
inline bytes low_digits (bytes a)       { return vandq_u8(a, vdupq_n_u8(15)); }
inline bytes high_digits(bytes a)       { return vshrq_n_u8(a, 4); }

inline bytes lookup(const uint8_t * table, bytes index) { return vqtbl1q_u8(vld1q_u8(table), index); }

struct wide_sum {
    uint16x8_t low  = vdupq_n_u16(0);
    uint16x8_t high = vdupq_n_u16(0);

    void add(bytes v) {
        low  = vaddw_u8(low, vget_low_u8(v));
        high = vaddw_high_u8(high, v);
    }

    void store(uint16_t * sums) const {
        vst1q_u16(sums,     low);
        vst1q_u16(sums + 8, high);
    }
};

inline void make_table(const int16_t * q, int half, uint8_t * table) {
    static const int16_t sign[3][8] = {
        { -1,  1, -1,  1, -1,  1, -1,  1 },
        { -1, -1,  1,  1, -1, -1,  1,  1 },
        { -1, -1, -1, -1,  1,  1,  1,  1 },
    };
    int16x8_t sum = vdupq_n_s16((int16_t) ((T_ZERO << T_SHIFT) + half));
    for (int i = 0; i < 3; ++i) {
        sum = vmlaq_n_s16(sum, vld1q_s16(sign[i]), q[i]);
    }
    const int16x8_t  q3    = vdupq_n_s16(q[3]);
    const uint16x8_t minus = vshrq_n_u16(vreinterpretq_u16_s16(vsubq_s16(sum, q3)), T_SHIFT);
    const uint16x8_t plus  = vshrq_n_u16(vreinterpretq_u16_s16(vaddq_s16(sum, q3)), T_SHIFT);
    vst1q_u8(table,      vandq_u8(vcombine_u8(vmovn_u16(minus), vmovn_u16(plus)), vdupq_n_u8(127)));
    vst1q_u8(table + 16, vcombine_u8(vshrn_n_u16(minus, 7), vshrn_n_u16(plus, 7)));
}

#endif

// 16 bytes of ROWS rows, as load_rows() gives them, to 16 columns of ROWS bytes, or back
inline void transpose(bytes * a) {
    bytes b[16];
    const auto zip = [](const bytes * from, bytes * to) {
        for (int r = 0; r < 8; ++r) {
            to[2*r + 0] = zip_low (from[r], from[r + 8]);
            to[2*r + 1] = zip_high(from[r], from[r + 8]);
        }
    };
    zip(a, b);
    zip(b, a);
    zip(a, b);
    zip(b, a);
}

inline void load_strip(const uint8_t * w, size_t nb, bytes * a) {
    for (int r = 0; r < 16; ++r) {
        a[r] = load_rows(w + r*nb, nb);
    }
    transpose(a);
}

inline void store_strip(const bytes * a, uint8_t * w, size_t nb) {
    bytes rows[16];
    std::copy(a, a + 16, rows);
    transpose(rows);
    for (int r = 0; r < 16; ++r) {
        store_rows(w + r*nb, nb, rows[r]);
    }
}

inline void make_tables32(const int16_t * q, uint8_t * tables) {
    for (int i = 0; i < 8; ++i) {
        make_table(q + 4*i, HALF[i % 2], tables + 32*i);
    }
}

struct digit_sums {
    wide_sum lo, hi;

    void add(const bytes * signs, const uint8_t * tables) {
        for (int i = 0; i < 4; ++i, tables += 64) {
            const bytes i0 = low_digits(signs[i]), i1 = high_digits(signs[i]);
            lo.add(dbf_tables::add(lookup(tables,      i0), lookup(tables + 32, i1)));
            hi.add(dbf_tables::add(lookup(tables + 16, i0), lookup(tables + 48, i1)));
        }
    }

    void add_to(int32_t * sums) const {
        uint16_t digits[2][ROWS];
        lo.store(digits[0]);
        hi.store(digits[1]);
        for (int64_t r = 0; r < ROWS; ++r) {
            sums[r] += 128*digits[1][r] + digits[0][r];
        }
    }
};

#endif

// ---- what the rest needs of x86 or ARM

#if defined(__AVX2__)

// 16-bit integers of 16 tokens
struct tokens16 {
    __m256i v;
};

inline tokens16 load(const int16_t * p)                { return { _mm256_load_si256((const __m256i *) p) }; }
inline void     store(int16_t * p, tokens16 a)         { _mm256_store_si256((__m256i *) p, a.v); }
inline tokens16 add(tokens16 a, tokens16 b)            { return { _mm256_add_epi16(a.v, b.v) }; }
inline tokens16 sub(tokens16 a, tokens16 b)            { return { _mm256_sub_epi16(a.v, b.v) }; }
inline tokens16 shift_right(tokens16 a)                { return { _mm256_srai_epi16(a.v, T_SHIFT) }; }
inline tokens16 set1(int16_t x)                        { return { _mm256_set1_epi16(x) }; }

// sums of 16 tokens in 32 bits
struct wide_tokens {
    __m256i low  = _mm256_setzero_si256();
    __m256i high = _mm256_setzero_si256();

    void add(tokens16 a) {
        low  = _mm256_add_epi32(low,  _mm256_cvtepi16_epi32(_mm256_castsi256_si128(a.v)));
        high = _mm256_add_epi32(high, _mm256_cvtepi16_epi32(_mm256_extracti128_si256(a.v, 1)));
    }

    void add_to(int32_t * sums) const {
        __m256i * s = (__m256i *) sums;
        _mm256_store_si256(s,     _mm256_add_epi32(_mm256_load_si256(s),     low));
        _mm256_store_si256(s + 1, _mm256_add_epi32(_mm256_load_si256(s + 1), high));
    }
};

#else

struct tokens16 {
    int16x8_t a, b;
};

inline tokens16 load(const int16_t * p)                { return { vld1q_s16(p), vld1q_s16(p + 8) }; }
inline void     store(int16_t * p, tokens16 x)         { vst1q_s16(p, x.a); vst1q_s16(p + 8, x.b); }
inline tokens16 add(tokens16 x, tokens16 y)            { return { vaddq_s16(x.a, y.a), vaddq_s16(x.b, y.b) }; }
inline tokens16 sub(tokens16 x, tokens16 y)            { return { vsubq_s16(x.a, y.a), vsubq_s16(x.b, y.b) }; }
inline tokens16 shift_right(tokens16 x)                { return { vshrq_n_s16(x.a, T_SHIFT), vshrq_n_s16(x.b, T_SHIFT) }; }
inline tokens16 set1(int16_t x)                        { return { vdupq_n_s16(x), vdupq_n_s16(x) }; }

struct wide_tokens {
    int32x4_t s[4] = { vdupq_n_s32(0), vdupq_n_s32(0), vdupq_n_s32(0), vdupq_n_s32(0) };

    void add(tokens16 x) {
        s[0] = vaddw_s16     (s[0], vget_low_s16(x.a));
        s[1] = vaddw_high_s16(s[1], x.a);
        s[2] = vaddw_s16     (s[2], vget_low_s16(x.b));
        s[3] = vaddw_high_s16(s[3], x.b);
    }

    void add_to(int32_t * sums) const {
        for (int i = 0; i < 4; ++i) {
            vst1q_s32(sums + 4*i, vaddq_s32(vld1q_s32(sums + 4*i), s[i]));
        }
    }
};

#endif

// A strip of at most 16 bytes of ROWS rows, `nb` bytes apart, column by column. Where there are only n_rows or n_bytes, nothing
// else is read, and the rest is zero. `next`, unless null, is what will be read thereafter: ROWS rows are so many streams
// that no hardware prefetcher follows.
inline void load_strip(const uint8_t * rows, size_t nb, int64_t n_rows, int64_t n_bytes, const uint8_t * next, bytes * a) {
    for (int64_t i = 0; next != nullptr && i < ROWS*STRIP/8; i += 64) {
        dbf_prefetch(next + i);
    }
    if (n_rows == ROWS && n_bytes == STRIP/8) {
        load_strip(rows, nb, a);
        return;
    }
    uint8_t copy[ROWS*STRIP/8] = {};
    for (int64_t r = 0; r < n_rows; ++r) {
        memcpy(copy + r*STRIP/8, rows + r*nb, n_bytes);
    }
    load_strip(copy, STRIP/8, a);
}

// One tile: n_rows of n signs and zeros for the others of ROWS, and the same column by column
inline void to_tile(const uint8_t * rows, size_t nb, int64_t n_rows, int64_t n, const uint8_t * next, uint8_t * tile) {
    for (int64_t c = 0; c < n/8; c += STRIP/8) {
        const int64_t n_bytes = std::min(STRIP/8, n/8 - c);
        bytes a[16];
        load_strip(rows + c, nb, n_rows, n_bytes, next == nullptr ? next : next + c*ROWS, a);
        for (int64_t i = 0; i < n_bytes; ++i) {
            store_bytes(tile + (c + i)*ROWS, a[i]);
        }
    }
}

// `n` columns of a tile, at most STRIP, to ROWS rows of STRIP columns. What lies in the rest of these is not said.
inline void from_tile(const uint8_t * tile, int64_t n, uint8_t * rows) {
    bytes a[16];
    for (int64_t i = 0; i < 16; ++i) {
        a[i] = load_bytes(tile + std::min(i, n/8 - 1)*ROWS);
    }
    store_strip(a, rows, STRIP/8);
}

// sign i of row r of a tile
inline bool is_plus(const uint8_t * tile, int64_t r, int64_t i) {
    return (tile[i/8/UNIT*UNIT*ROWS + r*UNIT + i/8 % UNIT] >> (i % 8)) & 1;
}

// v ~ d*T for sums of four; a vector with a NaN or an infinity gets d = NaN and q = 0
inline float quantize(const float * v, int64_t n, int16_t * q) {
    // The bits of positive floats order like integers, with infinity and NaN above all finite values: one max sees everything.
    // Quarters, since the sum of four large numbers must not overflow.
    uint32_t max_bits = 0;
    for (int64_t i = 0; i < n; i += 4) {
        const float sum = 0.25f*std::fabs(v[i])     + 0.25f*std::fabs(v[i + 1])
                        + 0.25f*std::fabs(v[i + 2]) + 0.25f*std::fabs(v[i + 3]);
        uint32_t bits;
        memcpy(&bits, &sum, sizeof(bits));
        max_bits = std::max(max_bits, bits & 0x7fffffff);
    }
    float max_sum;
    memcpy(&max_sum, &max_bits, sizeof(max_sum));
    const bool finite = max_bits < 0x7f800000;
    if (!finite || max_sum < 1e-30f) { // below, 1/d overflows
        memset(q, 0, n*sizeof(int16_t));
        return finite ? 0.0f : NAN;
    }
    const float id = (Q_MAX/4)/max_sum;
    for (int64_t i = 0; i < n; ++i) {
        // adding 1.5*2^23 rounds to an integer in the low bits; unlike lrintf() this vectorizes
        const float shifted = v[i]*id + 12582912.0f;
        int32_t bits;
        memcpy(&bits, &shifted, sizeof(bits));
        q[i] = (int16_t) (bits - 0x4b400000);
    }
    return max_sum/(Q_MAX/4)*(1 << T_SHIFT); // in this order: max_sum may be nearly as large as a float can be
}

// ---- one token

constexpr size_t tables_size(int64_t n) {
    return n/4*32;
}

inline void make_tables(const int16_t * q, int64_t n, uint8_t * tables) {
    for (int64_t i = 0; i < n; i += 32) {
        make_tables32(q + i, tables + i/4*32);
    }
}

// Sums T of n_rows of signs, `nb` bytes apart
inline void sum_rows(const uint8_t * rows, size_t nb, int64_t n_rows, const uint8_t * tables, int64_t n, const uint8_t * next, int32_t * sums) {
    std::fill(sums, sums + ROWS, (int32_t) -(n/4*T_ZERO));

    for (int64_t c0 = 0; c0 < n; c0 += MAX_COLS) {
        digit_sums digits;
        const int64_t c1 = std::min(n, c0 + MAX_COLS);
        for (int64_t c = c0; c < c1; c += STRIP) {
            const int64_t n_bytes = std::min(STRIP, c1 - c)/8;
            bytes a[16];
            load_strip(rows + c/8, nb, n_rows, n_bytes, next + c/8*ROWS, a);
            for (int64_t i = 0; i < n_bytes; i += 4) {
                digits.add(a + i, tables + c*8 + i*64);
            }
        }
        digits.add_to(sums);
    }
}

// The same of the ROWS rows of a tile. `next` is where it goes on behind it.
inline void sum_tile(const uint8_t * tile, const uint8_t * tables, int64_t n, const uint8_t * next, int32_t * sums) {
    std::fill(sums, sums + ROWS, (int32_t) -(n/4*T_ZERO));

    const int64_t size = n/8*ROWS;
    for (int64_t c0 = 0; c0 < n; c0 += MAX_COLS) {
        digit_sums digits;
        const int64_t c1 = std::min(n, c0 + MAX_COLS);
        for (int64_t c = c0; c < c1; c += 32) {
            const int64_t at = c/8*ROWS;
            for (int64_t i = at + AHEAD; i < at + AHEAD + 4*ROWS; i += 64) {
                dbf_prefetch(i < size ? tile + i : next + i - size);
            }
            bytes a[4];
            for (int64_t i = 0; i < 4; ++i) {
                a[i] = load_bytes(tile + at + i*ROWS);
            }
            digits.add(a, tables + c*8);
        }
        digits.add_to(sums);
    }
}

// ---- many tokens

// q of 16 tokens, [n][16]. `rows` are the 16 vectors; those that are missing are zero.
inline void interleave(const int16_t * const * rows, int64_t n_tokens, int64_t n, int16_t * q) {
    for (int64_t i = 0; i < n; ++i) {
        for (int64_t t = 0; t < TOKENS; ++t) {
            q[i*TOKENS + t] = t < n_tokens ? rows[t][i] : 0;
        }
    }
}

// the sums T of `n_cols` columns, [n_cols/4][16 sums][16 tokens]
inline void make_token_tables(const int16_t * q, int64_t n_cols, int16_t * tables) {
    for (int64_t c = 0; c < n_cols; c += 4) {
        const tokens16 half = set1(HALF[c/4 % 2]);
        const tokens16 q0 = load(q + (c + 0)*TOKENS), q1 = load(q + (c + 1)*TOKENS);
        const tokens16 q2 = load(q + (c + 2)*TOKENS), q3 = load(q + (c + 3)*TOKENS);
        const tokens16 sum = add(q0, q1), dif = sub(q0, q1);
        const tokens16 ends[4] = { sub(sub(half, q2), q3), sub(add(half, q2), q3), add(sub(half, q2), q3), add(add(half, q2), q3) };
        for (int i = 0; i < 4; ++i) {
            int16_t * t = tables + (c/4*16 + 4*i)*TOKENS;
            store(t + 0*TOKENS, shift_right(sub(ends[i], sum)));
            store(t + 1*TOKENS, shift_right(add(ends[i], dif)));
            store(t + 2*TOKENS, shift_right(sub(ends[i], dif)));
            store(t + 3*TOKENS, shift_right(add(ends[i], sum)));
        }
    }
}

// sums[n_rows][16] += T of 16 tokens over WORDS words of signs of each row
template <int WORDS>
inline void add_words(const uint8_t * w, size_t nb, int64_t n_rows, const int16_t * tables, int32_t * sums) {
    for (int64_t r = 0; r < n_rows; ++r, w += nb, sums += TOKENS) {
        dbf_prefetch(w + 16*nb); // the stride of the rows is too long for the hardware
        wide_tokens wide;
        for (int i = 0; i < WORDS; ++i) {
            uint32_t word;
            memcpy(&word, w + 4*i, sizeof(word));
            const uint64_t signs = (uint64_t) word << 5; // times 32, the bytes of a sum
            const char * t = (const char *) (tables + i*8*16*TOKENS);
            for (int j0 = 0; j0 < 8; j0 += 4) { // four sums T of 14 bits fit 16 bits
                tokens16 sum = set1(0);
                for (int j = j0; j < j0 + 4; ++j) {
                    sum = add(sum, load((const int16_t *) (t + j*16*32 + ((signs >> 4*j) & (15 << 5)))));
                }
                wide.add(sum);
            }
        }
        wide.add_to(sums);
    }
}

inline void add_columns(const uint8_t * w, size_t nb, int64_t n_rows, int64_t n_cols, const int16_t * tables, int32_t * sums) {
    switch (n_cols/32) {
        case 4: add_words<4>(w, nb, n_rows, tables, sums); break;
        case 3: add_words<3>(w, nb, n_rows, tables, sums); break;
        case 2: add_words<2>(w, nb, n_rows, tables, sums); break;
        case 1: add_words<1>(w, nb, n_rows, tables, sums); break;
    }
}

// The same for all n columns of the rows, of which the first n_tiled are in tiles. `tables` has room for STRIP columns.
inline void sum_rows_tokens(const uint8_t * w, size_t nb, int64_t n_rows, int64_t n_tiled, const int16_t * q, int64_t n,
        int16_t * tables, int32_t * sums) {
    memset(sums, 0, n_rows*TOKENS*sizeof(int32_t));
    for (int64_t c = 0; c < n; c += STRIP) {
        const int64_t n_cols = std::min(STRIP, n - c);
        make_token_tables(q + c*TOKENS, n_cols, tables);
        for (int64_t r = 0; r < n_tiled; r += ROWS) {
            const uint8_t * tile = w + r*nb + c/8*ROWS;
            for (int64_t i = 0; i < ROWS*STRIP/8; i += 64) {
                dbf_prefetch(tile + ROWS*nb + i);
            }
            uint8_t rows[ROWS*STRIP/8];
            from_tile(tile, n_cols, rows);
            add_columns(rows, STRIP/8, ROWS, n_cols, tables, sums + r*TOKENS);
        }
        add_columns(w + n_tiled*nb + c/8, nb, n_rows - n_tiled, n_cols, tables, sums + n_tiled*TOKENS);
    }
}

} // namespace dbf_tables

#endif
