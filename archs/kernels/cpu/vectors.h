// Vectors of a processor's own length and what is done with them.

#pragma once
#include <cmath>
#include <cstdint>
#include <type_traits>
#include <utility>
#if defined(__F16C__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
constexpr int NATIVE = 16, REGISTERS = 32;
#elif defined(__AVX__)
constexpr int NATIVE = 8, REGISTERS = 16;
#elif defined(__aarch64__)
constexpr int NATIVE = 4, REGISTERS = 32;
#else
constexpr int NATIVE = 4, REGISTERS = 16;
#endif

#define UNROLL _Pragma("GCC unroll 32")
#define SOME _Pragma("GCC unroll 4")
#define INLINED __attribute__((always_inline))
#define INLINE static inline INLINED
#define APART __attribute__((noinline))  // loops that two hyperthreads' shared decoders should find in one place
constexpr int LINE = 16;  // floats in a cache line

template <int L> struct Vector {
    typedef float type __attribute__((vector_size(4 * L)));
    typedef float loose __attribute__((vector_size(4 * L), aligned(4)));
};
typedef Vector<NATIVE>::type native;
template <class T> constexpr int width = sizeof(T) / 4;
template <class T> using Lanes = std::make_integer_sequence<int, width<T>>;

template <class T> INLINE T load(const float *x) { return *(const typename Vector<width<T>>::loose *)x; }
template <class T> INLINE void store(float *x, T a) { *(typename Vector<width<T>>::loose *)x = a; }

// What a cache stores: floats, or numbers of 16 bits, with which nothing is computed: a load widens, a store rounds.
struct bf16 {
    uint16_t bits;
};
struct fp16 {
    uint16_t bits;
};
#ifndef STORED
#define STORED float
#endif
typedef STORED stored;

template <int L> struct Bits {
    typedef uint32_t type __attribute__((vector_size(4 * L)));
    typedef uint16_t loose __attribute__((vector_size(2 * L), aligned(2)));
};
template <class T> using bits = typename Bits<width<T>>::type;

template <class T> INLINE bits<T> load_bits(const void *x) {
    return __builtin_convertvector(*(const typename Bits<width<T>>::loose *)x, bits<T>);
}
template <class T> INLINE void store_bits(void *x, bits<T> a) {
    *(typename Bits<width<T>>::loose *)x = __builtin_convertvector(a, typename Bits<width<T>>::loose);
}

template <class T> INLINE T load(const bf16 *x) { return (T)(load_bits<T>(x) << 16); }
template <class T> INLINE void store(bf16 *x, T a) {  // to the nearest, of two as near to the even one
    bits<T> b = (bits<T>)a;
    store_bits<T>(x, a == a ? (b + 0x7fff + (b >> 16 & 1)) >> 16 : bits<T>{} + 0x7fc0);
}

template <class T> INLINE T load(const fp16 *x) {
#if defined(__AVX512F__)
    if constexpr (width<T> == 16) return (T)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)x));
#endif
#if defined(__F16C__)
    if constexpr (width<T> == 8) return (T)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)x));
#endif
    bits<T> h = load_bits<T>(x), number = (h & 0x7fff) << 13;
    bits<T> finite = (bits<T>)((T)number * 0x1p112f);  // whose exponent is 112 more, also where it was 0
    return (T)((number < 0x7c00 << 13 ? finite : number | 0x7f800000) | (h & 0x8000) << 16);
}
template <class T> INLINE void store(fp16 *x, T a) {
    bits<T> b = (bits<T>)a, size = b & 0x7fffffff;
    bits<T> normal = (size - (112 << 23) + 0xfff + (size >> 13 & 1)) >> 13;
    bits<T> small = (bits<T>)((T)size + 0.5f) - 0x3f000000;  // below 2^-14: the sum is rounded to multiples of 2^-24
    bits<T> number = size < 113 << 23 ? small : size < 0x477ff000 ? normal : bits<T>{} + 0x7c00;
    store_bits<T>(x, (a == a ? number : bits<T>{} + 0x7e00) | (b >> 16 & 0x8000));
}

// body(vector, i) for each of n numbers: as many at a time as a vector has lanes, then one by one.
template <class F> INLINE void each(long n, F body) {
    long i = 0;
    for (; i <= n - NATIVE; i += NATIVE) body(native{}, i);
    for (; i < n; i++) body(Vector<1>::type{}, i);
}

// In a register, so that it is loaded once and not by each instruction that takes it from memory.
template <class T> INLINE T held(T a) {
#if defined(__x86_64__)
    if constexpr (width<T> >= 4) asm("" : "+v"(a));
#endif
    return a;
}

template <class T> INLINE T larger(T a, T b) { return a > b ? a : b; }

template <class T, int... I> INLINE T pick(T a, T b, std::integer_sequence<int, I...>) {
#if defined(__clang__)
    return __builtin_shufflevector(a, b, I...);
#else
    return __builtin_shuffle(a, b, decltype(a < b){I...});
#endif
}

// Lane i of the result is lane i ^ W.
template <int W, class T, int... I> INLINE T cross(T a, std::integer_sequence<int, I...>) {
    return pick(a, a, std::integer_sequence<int, (I ^ W)...>());
}

template <class T, int W = width<T> / 2> INLINE float sum(T a) {
    if constexpr (W == 0) return a[0];
    else return sum<T, W / 2>(a + cross<W>(a, Lanes<T>()));
}

// The largest of each FROM-th lane among TO lanes, in all of them.
template <int FROM, int TO, class T> INLINE T largest(T a) {
    if constexpr (FROM >= TO) return a;
    else return largest<2 * FROM, TO>(larger(a, cross<FROM>(a, Lanes<T>())));
}

// Of two rows of a matrix: columns whose bit W is OF, the other row's in the places whose bit W is set.
template <int W, int OF, class T, int... I> INLINE T zip(T a, T b, std::integer_sequence<int, I...>) {
    return pick(a, b, std::integer_sequence<int, (I & ~W) + OF + (I & W ? width<T> : 0)...>());
}

// The sums of as many vectors as one has lanes, each in its lane.
template <int W = 1, class T> INLINE T sums(T *rows) {
    if constexpr (W == width<T>) return rows[0];
    else {
        UNROLL for (int i = 0; i < width<T> / W / 2; i++) {
            T a = rows[2 * i], b = rows[2 * i + 1];
            rows[i] = zip<W, 0>(a, b, Lanes<T>()) + zip<W, W>(a, b, Lanes<T>());
        }
        return sums<2 * W>(rows);
    }
}

// 2^x of x <= 0: a polynomial for the fraction, |r| <= 1/2 (minimax, 2e-7), and the whole part into the exponent.
template <class T> INLINE T exp2_of(T x) {
    x = larger(T{} - 126, x);  // in this order NaN stays
    auto whole = __builtin_convertvector(x - 0.5f, decltype(x < x));
    T r = x - __builtin_convertvector(whole, T);
    T y = r * 1.327647174e-3f + 9.675541540e-3f;
    y = y * r + 5.550713276e-2f;
    y = y * r + 2.402211972e-1f;
    y = y * r + 6.931469671e-1f;
    y = y * r + 1.000000072f;
    return (T)((decltype(whole))y + (whole << 23));
}
