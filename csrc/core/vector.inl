// One register of the instruction set as a type, and the few operations that need an intrinsic. Every operation
// rounds as IEEE says, so the sets differ in width and never in a bit.

#define SYNTHWARD_INLINE static inline __attribute__((always_inline))

// each<N>(body) calls body(0) .. body(N - 1) with constants, for loops over the registers of one sum: an array that
// is indexed by a variable lives in memory.
template <int I>
struct Index {
  static const int value = I;
};
#define SYNTHWARD_BODY(i) [&](auto i) __attribute__((always_inline))

template <int N, typename Body>
SYNTHWARD_INLINE void each(Body body) {
  if constexpr (N > 1) each<N - 1>(body);
  body(Index<N - 1>{});
}

#if defined(__AVX512F__)
enum { LANES = 16, TILE = 4 };
#elif defined(__AVX2__)
enum { LANES = 8, TILE = 2 };
#else
enum { LANES = 4, TILE = 1 };
#endif
// Doubles in a register.
enum { WIDE = LANES / 2 };

typedef float vf __attribute__((vector_size(4 * LANES)));
typedef int32_t vi __attribute__((vector_size(4 * LANES)));
typedef uint32_t vu __attribute__((vector_size(4 * LANES)));
typedef double vd __attribute__((vector_size(8 * WIDE)));
typedef int64_t vl __attribute__((vector_size(8 * WIDE)));
typedef uint64_t vw __attribute__((vector_size(8 * WIDE)));

SYNTHWARD_INLINE void store(float* to, vf x) { __builtin_memcpy(to, &x, sizeof x); }
SYNTHWARD_INLINE vu splat(uint32_t value) { return vu{} + value; }
SYNTHWARD_INLINE vf to_float(vi x) { return __builtin_convertvector(x, vf); }

// WIDE floats as doubles.
SYNTHWARD_INLINE vd widen(const float* from) {
#if defined(__AVX512F__)
  return (vd)_mm512_cvtps_pd(_mm256_loadu_ps(from));
#elif defined(__AVX2__)
  return (vd)_mm256_cvtps_pd(_mm_loadu_ps(from));
#else
  vd out;
  for (int l = 0; l < WIDE; ++l) out[l] = (double)from[l];
  return out;
#endif
}

// WIDE doubles as floats.
SYNTHWARD_INLINE void narrow(vd x, float* to) {
#if defined(__AVX512F__)
  _mm256_storeu_ps(to, _mm512_cvtpd_ps((__m512d)x));
#elif defined(__AVX2__)
  _mm_storeu_ps(to, _mm256_cvtpd_ps((__m256d)x));
#else
  for (int l = 0; l < WIDE; ++l) to[l] = (float)x[l];
#endif
}

// WIDE words of 32 bits, each with 32 zeros before it.
SYNTHWARD_INLINE vw widen_words(const uint32_t* from) {
#if defined(__AVX512F__)
  return (vw)_mm512_cvtepu32_epi64(_mm256_loadu_si256((const __m256i*)from));
#elif defined(__AVX2__)
  return (vw)_mm256_cvtepu32_epi64(_mm_loadu_si128((const __m128i*)from));
#else
  vw out;
  for (int l = 0; l < WIDE; ++l) out[l] = from[l];
  return out;
#endif
}

// x * y + z for x, y widened from floats: their product is exact in double, so fused and unfused are the same.
SYNTHWARD_INLINE vd add_product(vd x, vd y, vd z) {
#if defined(__AVX512F__)
  return (vd)_mm512_fmadd_pd((__m512d)x, (__m512d)y, (__m512d)z);
#elif defined(__AVX2__)
  return (vd)_mm256_fmadd_pd((__m256d)x, (__m256d)y, (__m256d)z);
#else
  return x * y + z;
#endif
}

SYNTHWARD_INLINE vf square_root(vf x) {
#if defined(__AVX512F__)
  return (vf)_mm512_sqrt_ps((__m512)x);
#elif defined(__AVX2__)
  return (vf)_mm256_sqrt_ps((__m256)x);
#elif defined(__SSE2__)
  return (vf)_mm_sqrt_ps((__m128)x);
#else
  for (int l = 0; l < LANES; ++l) x[l] = __builtin_sqrtf(x[l]);
  return x;
#endif
}

// Nearest float of an unsigned word. The two halves convert exactly, so their sum is rounded once.
SYNTHWARD_INLINE vf unsigned_to_float(vu x) {
#if defined(__AVX512F__)
  return (vf)_mm512_cvtepu32_ps((__m512i)x);
#else
  return to_float((vi)(x >> 16)) * 65536.0f + to_float((vi)(x & 0xffffu));
#endif
}

SYNTHWARD_INLINE int any_below(vu x, uint32_t limit) {
#if defined(__AVX512F__)
  return _mm512_cmplt_epu32_mask((__m512i)x, (__m512i)splat(limit)) != 0;
#elif defined(__AVX2__)
  return _mm256_movemask_epi8((__m256i)(x < splat(limit))) != 0;
#elif defined(__SSE2__)
  return _mm_movemask_epi8((__m128i)(x < splat(limit))) != 0;
#else
  uint32_t any = 0;
  for (int l = 0; l < LANES; ++l) any |= x[l] < limit;
  return any != 0;
#endif
}

SYNTHWARD_INLINE vu smaller(vu x, vu y) {
  vu less = (vu)(x < y);
  return (x & less) | (y & ~less);
}

template <int N>
SYNTHWARD_INLINE vu rotate_left(vu x) {
#if defined(__AVX512F__)
  return (vu)_mm512_rol_epi32((__m512i)x, N);
#elif defined(__AVX2__)
  if (N == 16)
    return (vu)_mm256_shuffle_epi8((__m256i)x,
                                   _mm256_setr_epi8(2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13, 2, 3, 0, 1, 6,
                                                    7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13));
  if (N == 8)
    return (vu)_mm256_shuffle_epi8((__m256i)x,
                                   _mm256_setr_epi8(3, 0, 1, 2, 7, 4, 5, 6, 11, 8, 9, 10, 15, 12, 13, 14, 3, 0, 1, 2, 7,
                                                    4, 5, 6, 11, 8, 9, 10, 15, 12, 13, 14));
  return (x << N) | (x >> (32 - N));
#else
  return (x << N) | (x >> (32 - N));
#endif
}
