// Vectors of a processor's own length and what is done with them.

#pragma once
#include <cmath>
#include <type_traits>
#include <utility>

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
