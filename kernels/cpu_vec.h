/* The vector type that the CPU kernels are written in, and the few things C cannot say about it.
 *
 * VL floats make a vector: 16 with AVX-512, 8 with AVX2, 4 elsewhere (NEON, SSE). Plain operators work on it (GCC and
 * Clang vector extensions). Everything is compiled without -ffast-math: sums have the order that is written here, so a
 * row's result depends neither on the other rows in a batch nor on the number of threads.
 */
#ifndef QUIRE_CPU_VEC_H
#define QUIRE_CPU_VEC_H

#include <math.h>
#include <stdint.h>
#include <string.h>

#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

#if defined(__AVX512F__)
#define VL 16
#elif defined(__AVX2__)
#define VL 8
#else
#define VL 4
#endif

typedef float vf __attribute__((vector_size(VL * 4)));
typedef int32_t vi __attribute__((vector_size(VL * 4)));
typedef float vf_any __attribute__((vector_size(VL * 4), aligned(4), may_alias)); /* the same at any address */
typedef float quad __attribute__((vector_size(16), aligned(4), may_alias));

#define INLINE static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 16")

/* `call` with the constant N in place of `count`, which is 1 to `most`, a constant of at most 8: so that loops over it are unrolled. */
#define WITH_CONSTANT(N, count, most, call) \
    switch (count) { \
    CASE_OF(N, 1, most, call) CASE_OF(N, 2, most, call) CASE_OF(N, 3, most, call) CASE_OF(N, 4, most, call) \
    CASE_OF(N, 5, most, call) CASE_OF(N, 6, most, call) CASE_OF(N, 7, most, call) CASE_OF(N, 8, most, call) \
    }
#define CASE_OF(N, value, most, call) \
    case value: \
        if (value <= (most)) { \
            enum { N = value <= (most) ? value : (most) }; \
            call; \
        } \
        break;

INLINE vf load(const float *p) { return *(const vf_any *)p; }
INLINE void store(float *p, vf x) { *(vf_any *)p = x; }

INLINE vf splat(float x) {
#if VL == 16
    return (vf){x, x, x, x, x, x, x, x, x, x, x, x, x, x, x, x};
#elif VL == 8
    return (vf){x, x, x, x, x, x, x, x};
#else
    return (vf){x, x, x, x};
#endif
}

/* a b + c, rounded once where the processor can. Left to itself a compiler fuses the same sum in one loop and not in another. */
INLINE vf fused(vf a, vf b, vf c) {
#if VL == 16
    return (vf)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif VL == 8 && defined(__FMA__)
    return (vf)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined(__ARM_NEON)
    return (vf)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#else
    return a * b + c;
#endif
}

INLINE vi iota(void) {
#if VL == 16
    return (vi){0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
#elif VL == 8
    return (vi){0, 1, 2, 3, 4, 5, 6, 7};
#else
    return (vi){0, 1, 2, 3};
#endif
}

/* yes where the mask is -1, no where it is 0 */
INLINE vf pick(vi mask, vf yes, vf no) { return (vf)(((vi)yes & mask) | ((vi)no & ~mask)); }
INLINE vf vmax(vf a, vf b) { return pick(a > b, a, b); }

INLINE float sum(vf x) {
    float part[VL];
    memcpy(part, &x, sizeof part);
    for (int half = VL / 2; half; half /= 2)
        for (int i = 0; i < half; i++) part[i] += part[i + half];
    return part[0];
}

INLINE float largest(vf x) {
    float part[VL];
    memcpy(part, &x, sizeof part);
    for (int half = VL / 2; half; half /= 2)
        for (int i = 0; i < half; i++) part[i] = part[i] > part[i + half] ? part[i] : part[i + half];
    return part[0];
}

/* The sums of four vectors, as one quad. */
INLINE quad sum4(vf a, vf b, vf c, vf d) {
#if VL == 16
    __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps((__m512)a, (__m512)b), _mm512_unpackhi_ps((__m512)a, (__m512)b));
    __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps((__m512)c, (__m512)d), _mm512_unpackhi_ps((__m512)c, (__m512)d));
    __m512 all = _mm512_add_ps(_mm512_shuffle_ps(ab, cd, 0x44), _mm512_shuffle_ps(ab, cd, 0xee));
    __m256 half = _mm256_add_ps(_mm512_castps512_ps256(all), _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(all), 1)));
    return (quad)_mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
#elif VL == 8
    __m256 ab = _mm256_hadd_ps((__m256)a, (__m256)b), cd = _mm256_hadd_ps((__m256)c, (__m256)d), all = _mm256_hadd_ps(ab, cd);
    return (quad)_mm_add_ps(_mm256_castps256_ps128(all), _mm256_extractf128_ps(all, 1));
#else
    return (quad){sum(a), sum(b), sum(c), sum(d)};
#endif
}

/* 2^x for x <= 126; 0 below -126 (and for -inf), exactly 1 at 0. Relative error about 1e-7 (Taylor series on [-1/2, 1/2]). */
INLINE vf exp2_(vf x) {
    const vf magic = splat(12582912.0f); /* 1.5 * 2^23: adding it rounds to an integer, held in the low bits */
    vf shifted = x + magic, f = x - (shifted - magic), y = splat(1.52527338e-5f);
    y = y * f + splat(1.54035304e-4f);
    y = y * f + splat(1.33335581e-3f);
    y = y * f + splat(9.61812911e-3f);
    y = y * f + splat(5.55041087e-2f);
    y = y * f + splat(2.40226507e-1f);
    y = y * f + splat(6.93147181e-1f);
    y = y * f + splat(1.0f);
    vi scaled = (vi)y + (((vi)shifted - (vi)magic) << 23);
    return (vf)(scaled & ~(vi)(x < splat(-126.0f))); /* NaN stays NaN */
}

#endif
