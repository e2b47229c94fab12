// The arithmetic of PTX instructions, for the C++ that ptx_to_cpp.py writes. Semantics after the PTX ISA.

#pragma once

#include "cuhost.h"

#include <limits>

namespace ptx {

// A register as another type: the same bits, or the lower ones.
template <class T, class R> inline T read(R r) {
    static_assert(sizeof(T) <= sizeof(R), "register is narrower than the instruction's type");
    T t;
    memcpy(&t, &r, sizeof(t));
    return t;
}

// Results go to a register of their size. Only loads of 8 and 16 bits and predicates may widen: signed types extend the sign.
template <class T, class R> inline void write(R & r, T value) {
    if constexpr (sizeof(T) == sizeof(R)) {
        memcpy(&r, &value, sizeof(r));
    } else {
        static_assert(sizeof(T) < sizeof(R) && std::is_integral<T>::value && std::is_integral<R>::value, "");
        r = (R) value;
    }
}

// By-value struct parameters. With more than 16 bytes the C++ calling convention passes them on the stack, whatever is inside.
template <int size, int align> struct alignas(align) parameter {
    static_assert(size > 16, "a struct this small goes through registers, which depend on its members");
    char bytes[size];
};

inline uint64_t shared(uint64_t offset) {
    return (uint64_t) cuhost::shared_memory() + (uint32_t) offset;
}

// A load or store of n elements. A GPU refuses one that is not aligned to all of its bytes.
enum class access { load, store };

template <access what, class T, int n> inline T * at(uint64_t address) {
    if (address % (n*sizeof(T)) != 0) {
        cuhost::fail("misaligned access");
    }
    cuhost::check_access((const void *) address, n*sizeof(T), what == access::store);
    return (T *) address;
}

// ---- integers; arithmetic wraps around

template <class T> using unsigned_of = typename std::make_unsigned<T>::type;

template <class T> inline T add(T a, T b) { return (T) ((unsigned_of<T>) a + (unsigned_of<T>) b); }
template <class T> inline T sub(T a, T b) { return (T) ((unsigned_of<T>) a - (unsigned_of<T>) b); }
template <class T> inline T neg(T a)      { return (T) (0 - (unsigned_of<T>) a); }
template <class T> inline T abs(T a)      { return a < 0 ? neg<T>(a) : a; }
template <class T> inline T min(T a, T b) { return b < a ? b : a; }
template <class T> inline T max(T a, T b) { return a < b ? b : a; }

template <class T> struct twice;
template <> struct twice<int16_t>  { typedef int32_t type; };
template <> struct twice<uint16_t> { typedef uint32_t type; };
template <> struct twice<int32_t>  { typedef int64_t type; };
template <> struct twice<uint32_t> { typedef uint64_t type; };
template <> struct twice<int64_t>  { typedef __int128 type; };
template <> struct twice<uint64_t> { typedef unsigned __int128 type; };

template <class T> inline typename twice<T>::type mul_wide(T a, T b) {
    return (typename twice<T>::type) a * (typename twice<T>::type) b;
}
template <class T> inline T mul_lo(T a, T b) { return (T) ((uint64_t) a * (uint64_t) b); }
template <class T> inline T mul_hi(T a, T b) { return (T) (mul_wide<T>(a, b) >> 8*sizeof(T)); }

template <class T> inline T div(T a, T b) {
    if (b == 0) {
        cuhost::fail("integer division by zero");
    }
    return a/b;
}
template <class T> inline T rem(T a, T b) {
    if (b == 0) {
        cuhost::fail("integer division by zero");
    }
    return a % b;
}

template <class T> inline T bit_and(T a, T b) { return a & b; }
template <class T> inline T bit_or (T a, T b) { return a | b; }
template <class T> inline T bit_xor(T a, T b) { return a ^ b; }
template <class T> inline T bit_not(T a)      { return (T) ~a; }
template <> inline bool bit_not(bool a)       { return !a; }

// shifts by the width and more give what the last bit leaves behind
template <class T> inline T shl(T a, uint32_t n) {
    return n >= 8*sizeof(T) ? (T) 0 : (T) ((uint64_t) a << n);
}
template <class T> inline T shr(T a, uint32_t n) {
    return (T) (a >> (n >= 8*sizeof(T) ? 8*sizeof(T) - 1 : n) >> (n >= 8*sizeof(T) ? 1 : 0));
}

inline uint32_t funnel_l_wrap (uint32_t a, uint32_t b, uint32_t n) { return (uint32_t) ((((uint64_t) b << 32 | a) << (n & 31)) >> 32); }
inline uint32_t funnel_r_wrap (uint32_t a, uint32_t b, uint32_t n) { return (uint32_t) (((uint64_t) b << 32 | a) >> (n & 31)); }
inline uint32_t funnel_l_clamp(uint32_t a, uint32_t b, uint32_t n) { return n >= 32 ? a : funnel_l_wrap(a, b, n); }
inline uint32_t funnel_r_clamp(uint32_t a, uint32_t b, uint32_t n) { return n >= 32 ? b : funnel_r_wrap(a, b, n); }

template <class T> inline T bit_field(T a, uint32_t position, uint32_t length) {
    const uint32_t width = 8*sizeof(T);
    const uint32_t p = position & 0xff;
    const uint32_t n = length & 0xff;
    if (n == 0) {
        return 0;
    }
    const uint32_t last = p + n - 1 < width ? p + n - 1 : width - 1;  // the field's highest bit, repeated above if signed
    if (p >= width) {
        return std::is_signed<T>::value && a < 0 ? (T) -1 : 0;
    }
    const T shifted = (T) ((unsigned_of<T>) a << (width - 1 - last));
    return (T) (shifted >> (width - 1 - last + p));
}

template <class T> inline T bit_field_insert(T field, T into, uint32_t position, uint32_t length) {
    const uint32_t width = 8*sizeof(T);
    const uint32_t p = position & 0xff;
    const uint32_t n = length & 0xff;
    if (p >= width || n == 0) {
        return into;
    }
    const uint64_t ones = n >= 64 ? ~0ull : (1ull << n) - 1;
    const T mask = (T) (ones << p);
    return (T) ((into & ~mask) | ((T) ((uint64_t) field << p) & mask));
}

// bit by bit the table says what comes of the three operands' bits
inline uint32_t lop3(uint32_t a, uint32_t b, uint32_t c, uint32_t table) {
    uint32_t result = 0;
    for (int i = 0; i < 8; ++i) {
        if (table >> i & 1) {
            result |= (i & 4 ? a : ~a) & (i & 2 ? b : ~b) & (i & 1 ? c : ~c);
        }
    }
    return result;
}

// like __byte_perm, but with a fourth bit in each nibble: instead of the byte its sign, eight times
inline uint32_t prmt(uint32_t a, uint32_t b, uint32_t selector) {
    uint32_t result = __byte_perm(a, b, selector);
    for (int i = 0; i < 4; ++i) {
        if (selector >> 4*i & 8) {
            const uint32_t sign = result >> 8*i & 0x80 ? 0xff : 0;
            result = (result & ~(0xffu << 8*i)) | sign << 8*i;
        }
    }
    return result;
}

// ---- floating point

inline bool unordered(float a, float b) { return a != a || b != b; }

// .ftz: denormals are taken, and given, as zeros of their sign
inline float keep(float v)  { return v; }
inline float flush(float v) { return std::fpclassify(v) == FP_SUBNORMAL ? std::copysign(0.0f, v) : v; }

inline float add(float a, float b)          { return a + b; }
inline float sub(float a, float b)          { return a - b; }
inline float mul(float a, float b)          { return a*b; }
inline float fma(float a, float b, float c) { return std::fma(a, b, c); }
inline float div(float a, float b)          { return a/b; }
inline float rcp(float a)                   { return 1.0f/a; }
inline float neg(float a)                   { return -a; }
inline float abs(float a)                   { return std::fabs(a); }
inline float min(float a, float b)          { return std::fmin(a, b); }
inline float max(float a, float b)          { return std::fmax(a, b); }
inline float min_nan(float a, float b)      { return unordered(a, b) ? NAN : std::fmin(a, b); }
inline float max_nan(float a, float b)      { return unordered(a, b) ? NAN : std::fmax(a, b); }

// The approximate instructions may be off by so many units in the last place. They are, up or down as the operand's bits
// have it: nothing may rely on the exact quotient.
inline float off_by(float v, int ulps, float operand) {
    if (!std::isfinite(v) || v == 0.0f) {
        return v;
    }
    const uint32_t hash = (read<uint32_t>(operand) * 2654435761u) >> 31;
    for (int i = 0; i < ulps; ++i) {
        v = std::nextafter(v, hash ? std::numeric_limits<float>::infinity() : -std::numeric_limits<float>::infinity());
    }
    return v;
}

inline float rcp_approx(float a) { return off_by(1.0f/a, 1, a); }
inline float div_full(float a, float b) { return off_by(a/b, 2, a); }
inline float div_approx(float a, float b) {
    if (std::fabs(b) > 0x1p126f) {  // computed as a times a reciprocal that has been flushed to zero
        return std::isinf(a) ? NAN : std::isnan(a) || std::isnan(b) ? NAN : std::copysign(0.0f, a*(b > 0 ? 1.0f : -1.0f));
    }
    return off_by(a/b, 2, a);
}

inline float rni(float v) { return std::nearbyint(v); }
inline float rzi(float v) { return std::trunc(v); }
inline float rmi(float v) { return std::floor(v); }
inline float rpi(float v) { return std::ceil(v); }

// saturates; NaN is 0
template <class T> inline T to_integer(float rounded) {
    if (rounded != rounded) {
        return 0;
    }
    const double v = rounded;
    return v >= (double) std::numeric_limits<T>::max() ? std::numeric_limits<T>::max() :
           v <= (double) std::numeric_limits<T>::min() ? std::numeric_limits<T>::min() : (T) v;
}

inline float from_half(uint16_t bits) {
    __half_raw h;
    h.x = bits;
    return __half2float(h);
}

inline uint16_t to_half(float v) {
    return __half_raw(__float2half_rn(v)).x;
}

// ---- shuffles: `clamp` holds the highest lane in bits 0-4 and the mask of the segment in bits 8-12

enum class shuffle_mode { up, down, bfly, idx };

inline uint32_t shuffle(shuffle_mode mode, uint32_t value, uint32_t b, uint32_t clamp, uint32_t mask, bool & valid) {
    const int lane    = cuhost::lane();
    const int segment = (int) (clamp >> 8 & 31);
    const int highest = (lane & segment) | ((int) (clamp & 31) & ~segment);
    const int by      = (int) (b & 31);
    int source = 0;
    switch (mode) {
        case shuffle_mode::up:   source = lane - by; break;
        case shuffle_mode::down: source = lane + by; break;
        case shuffle_mode::bfly: source = lane ^ by; break;
        case shuffle_mode::idx:  source = (lane & segment) | (by & ~segment); break;
    }
    valid = mode == shuffle_mode::up ? source >= highest : source <= highest;
    const auto shown = cuhost::exchange(mask, cuhost::collective::shuffle, &value, 1);
    return shown[valid ? source : lane][0];
}

} // namespace ptx
