# cython: boundscheck=False, wraparound=False, language_level=3
"""The accelerator of dfly.py: the same names and the same results as its pure functions, faster.

MD5 and SHA-256 of many messages at once, each in one lane of the processor's vectors.  How wide these are is found out when the
module is imported, so one built file serves a mixed fleet; DFLY_LANES=plain|sse2|avx2|avx512 chooses another width that is there.
A processor with instructions of its own for SHA-256 takes two messages at once by those instead: one alone leaves them idle half the time.

And bytes from a socket into a file, by the kernel's own means, without the GIL however often it has to wait.
"""
import hashlib
import os

from cpython.buffer cimport PyBUF_SIMPLE, PyBuffer_Release, PyObject_GetBuffer
from cpython.exc cimport PyErr_CheckSignals
from libc.errno cimport EBADF, EINTR, EINVAL
from libc.stdint cimport uint8_t
from libc.stdlib cimport calloc, free, malloc
from posix.types cimport off_t

cdef extern from *:
    """
    #include <errno.h>
    #include <fcntl.h>
    #include <stdint.h>
    #include <stdlib.h>
    #include <string.h>
    #include <sys/mman.h>
    #include <sys/socket.h>
    #include <sys/stat.h>
    #include <time.h>
    #include <unistd.h>

    /* ---- vectors ----------------------------------------------------------------
       GCC's vector types, of 4, 8 or 16 lanes of 32 bits; a compiler splits what the processor has no register for. */

    #if defined(__clang__)
    #define SHUFFLE(V, a, b, ...) ((V)__builtin_shufflevector((a), (b), __VA_ARGS__))
    #else
    #define SHUFFLE(V, a, b, ...) ((V)__builtin_shuffle((a), (b), (V){__VA_ARGS__}))
    #endif
    #define INLINE static inline __attribute__((always_inline))

    typedef uint32_t v4 __attribute__((vector_size(16)));
    typedef uint32_t v8 __attribute__((vector_size(32)));
    typedef uint32_t v16 __attribute__((vector_size(64)));

    #define ROL(x, n) (((x) << (n)) | ((x) >> (32 - (n))))
    #define ROR(x, n) ROL(x, 32 - (n))
    #define SWAP(x) ((ROL(x, 8) & 0x00ff00ffu) | (ROL(x, 24) & 0xff00ff00u))  /* between big and little end */

    /* Transposing: one step swaps the blocks off the diagonal, of ever larger size. */
    #define PAIR(V, r, i, j, low, high) { V x = r[i], y = r[j]; r[i] = low(V, x, y); r[j] = high(V, x, y); }

    #define LOW4_1(V, a, b) SHUFFLE(V, a, b, 0, 4, 2, 6)
    #define HIGH4_1(V, a, b) SHUFFLE(V, a, b, 1, 5, 3, 7)
    #define LOW4_2(V, a, b) SHUFFLE(V, a, b, 0, 1, 4, 5)
    #define HIGH4_2(V, a, b) SHUFFLE(V, a, b, 2, 3, 6, 7)
    #define LOW8_1(V, a, b) SHUFFLE(V, a, b, 0, 8, 2, 10, 4, 12, 6, 14)
    #define HIGH8_1(V, a, b) SHUFFLE(V, a, b, 1, 9, 3, 11, 5, 13, 7, 15)
    #define LOW8_2(V, a, b) SHUFFLE(V, a, b, 0, 1, 8, 9, 4, 5, 12, 13)
    #define HIGH8_2(V, a, b) SHUFFLE(V, a, b, 2, 3, 10, 11, 6, 7, 14, 15)
    #define LOW8_4(V, a, b) SHUFFLE(V, a, b, 0, 1, 2, 3, 8, 9, 10, 11)
    #define HIGH8_4(V, a, b) SHUFFLE(V, a, b, 4, 5, 6, 7, 12, 13, 14, 15)
    #define LOW16_1(V, a, b) SHUFFLE(V, a, b, 0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14, 30)
    #define HIGH16_1(V, a, b) SHUFFLE(V, a, b, 1, 17, 3, 19, 5, 21, 7, 23, 9, 25, 11, 27, 13, 29, 15, 31)
    #define LOW16_2(V, a, b) SHUFFLE(V, a, b, 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29)
    #define HIGH16_2(V, a, b) SHUFFLE(V, a, b, 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31)
    #define LOW16_4(V, a, b) SHUFFLE(V, a, b, 0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27)
    #define HIGH16_4(V, a, b) SHUFFLE(V, a, b, 4, 5, 6, 7, 20, 21, 22, 23, 12, 13, 14, 15, 28, 29, 30, 31)
    #define LOW16_8(V, a, b) SHUFFLE(V, a, b, 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23)
    #define HIGH16_8(V, a, b) SHUFFLE(V, a, b, 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31)

    #define PAIRS4_1(V, r, o, l, h) PAIR(V, r, o, o + 1, l, h) PAIR(V, r, o + 2, o + 3, l, h)
    #define PAIRS4_2(V, r, o, l, h) PAIR(V, r, o, o + 2, l, h) PAIR(V, r, o + 1, o + 3, l, h)
    #define PAIRS8_4(V, r, o, l, h) PAIR(V, r, o, o + 4, l, h) PAIR(V, r, o + 1, o + 5, l, h) PAIR(V, r, o + 2, o + 6, l, h) PAIR(V, r, o + 3, o + 7, l, h)
    #define PAIRS16_8(V, r, l, h) PAIR(V, r, 0, 8, l, h) PAIR(V, r, 1, 9, l, h) PAIR(V, r, 2, 10, l, h) PAIR(V, r, 3, 11, l, h) \\
        PAIR(V, r, 4, 12, l, h) PAIR(V, r, 5, 13, l, h) PAIR(V, r, 6, 14, l, h) PAIR(V, r, 7, 15, l, h)
    #define TRANSPOSE4(V, r) PAIRS4_1(V, r, 0, LOW4_1, HIGH4_1) PAIRS4_2(V, r, 0, LOW4_2, HIGH4_2)
    #define TRANSPOSE8(V, r) PAIRS4_1(V, r, 0, LOW8_1, HIGH8_1) PAIRS4_1(V, r, 4, LOW8_1, HIGH8_1) \\
        PAIRS4_2(V, r, 0, LOW8_2, HIGH8_2) PAIRS4_2(V, r, 4, LOW8_2, HIGH8_2) PAIRS8_4(V, r, 0, LOW8_4, HIGH8_4)
    #define TRANSPOSE16(V, r) \\
        PAIRS4_1(V, r, 0, LOW16_1, HIGH16_1) PAIRS4_1(V, r, 4, LOW16_1, HIGH16_1) PAIRS4_1(V, r, 8, LOW16_1, HIGH16_1) PAIRS4_1(V, r, 12, LOW16_1, HIGH16_1) \\
        PAIRS4_2(V, r, 0, LOW16_2, HIGH16_2) PAIRS4_2(V, r, 4, LOW16_2, HIGH16_2) PAIRS4_2(V, r, 8, LOW16_2, HIGH16_2) PAIRS4_2(V, r, 12, LOW16_2, HIGH16_2) \\
        PAIRS8_4(V, r, 0, LOW16_4, HIGH16_4) PAIRS8_4(V, r, 8, LOW16_4, HIGH16_4) PAIRS16_8(V, r, LOW16_8, HIGH16_8)

    /* ---- the two digests ---------------------------------------------------------- */

    static const uint32_t MD5_K[64] = {
        0xd76aa478, 0xe8c7b756, 0x242070db, 0xc1bdceee, 0xf57c0faf, 0x4787c62a, 0xa8304613, 0xfd469501,
        0x698098d8, 0x8b44f7af, 0xffff5bb1, 0x895cd7be, 0x6b901122, 0xfd987193, 0xa679438e, 0x49b40821,
        0xf61e2562, 0xc040b340, 0x265e5a51, 0xe9b6c7aa, 0xd62f105d, 0x02441453, 0xd8a1e681, 0xe7d3fbc8,
        0x21e1cde6, 0xc33707d6, 0xf4d50d87, 0x455a14ed, 0xa9e3e905, 0xfcefa3f8, 0x676f02d9, 0x8d2a4c8a,
        0xfffa3942, 0x8771f681, 0x6d9d6122, 0xfde5380c, 0xa4beea44, 0x4bdecfa9, 0xf6bb4b60, 0xbebfbc70,
        0x289b7ec6, 0xeaa127fa, 0xd4ef3085, 0x04881d05, 0xd9d4d039, 0xe6db99e5, 0x1fa27cf8, 0xc4ac5665,
        0xf4292244, 0x432aff97, 0xab9423a7, 0xfc93a039, 0x655b59c3, 0x8f0ccc92, 0xffeff47d, 0x85845dd1,
        0x6fa87e4f, 0xfe2ce6e0, 0xa3014314, 0x4e0811a1, 0xf7537e82, 0xbd3af235, 0x2ad7d2bb, 0xeb86d391};
    static const uint32_t SHA_K[64] = {
        0x428a2f98, 0x71374491, 0xb5c0fbcf, 0xe9b5dba5, 0x3956c25b, 0x59f111f1, 0x923f82a4, 0xab1c5ed5,
        0xd807aa98, 0x12835b01, 0x243185be, 0x550c7dc3, 0x72be5d74, 0x80deb1fe, 0x9bdc06a7, 0xc19bf174,
        0xe49b69c1, 0xefbe4786, 0x0fc19dc6, 0x240ca1cc, 0x2de92c6f, 0x4a7484aa, 0x5cb0a9dc, 0x76f988da,
        0x983e5152, 0xa831c66d, 0xb00327c8, 0xbf597fc7, 0xc6e00bf3, 0xd5a79147, 0x06ca6351, 0x14292967,
        0x27b70a85, 0x2e1b2138, 0x4d2c6dfc, 0x53380d13, 0x650a7354, 0x766a0abb, 0x81c2c92e, 0x92722c85,
        0xa2bfe8a1, 0xa81a664b, 0xc24b8b70, 0xc76c51a3, 0xd192e819, 0xd6990624, 0xf40e3585, 0x106aa070,
        0x19a4c116, 0x1e376c08, 0x2748774c, 0x34b0bcb5, 0x391c0cb3, 0x4ed8aa4a, 0x5b9cca4f, 0x682e6ff3,
        0x748f82ee, 0x78a5636f, 0x84c87814, 0x8cc70208, 0x90befffa, 0xa4506ceb, 0xbef9a3f7, 0xc67178f2};
    static const uint32_t MD5_START[8] = {0x67452301, 0xefcdab89, 0x98badcfe, 0x10325476};
    static const uint32_t SHA_START[8] = {0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a, 0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19};

    #define MD5_F(b, c, d) ((d) ^ ((b) & ((c) ^ (d))))
    #define MD5_G(b, c, d) ((c) ^ ((d) & ((b) ^ (c))))
    #define MD5_H(b, c, d) ((b) ^ (c) ^ (d))
    #define MD5_I(b, c, d) ((c) ^ ((b) | ~(d)))
    #define EACH(G) _Pragma("GCC unroll 4") for (int g = 0; g < (G); g++)
    #define MD5_STEP(G, f, a, b, c, d, k, i, s) EACH(G) { a[g] += f(b[g], c[g], d[g]) + w[g][k] + MD5_K[i]; a[g] = ROL(a[g], s) + b[g]; }
    #define MD5_FOUR(G, f, i, k0, k1, k2, k3, s0, s1, s2, s3) \\
        MD5_STEP(G, f, a, b, c, d, k0, i, s0) MD5_STEP(G, f, d, a, b, c, k1, i + 1, s1) \\
        MD5_STEP(G, f, c, d, a, b, k2, i + 2, s2) MD5_STEP(G, f, b, c, d, a, k3, i + 3, s3)
    #define MD5_BLOCK(G) \\
        MD5_FOUR(G, MD5_F, 0, 0, 1, 2, 3, 7, 12, 17, 22) MD5_FOUR(G, MD5_F, 4, 4, 5, 6, 7, 7, 12, 17, 22) \\
        MD5_FOUR(G, MD5_F, 8, 8, 9, 10, 11, 7, 12, 17, 22) MD5_FOUR(G, MD5_F, 12, 12, 13, 14, 15, 7, 12, 17, 22) \\
        MD5_FOUR(G, MD5_G, 16, 1, 6, 11, 0, 5, 9, 14, 20) MD5_FOUR(G, MD5_G, 20, 5, 10, 15, 4, 5, 9, 14, 20) \\
        MD5_FOUR(G, MD5_G, 24, 9, 14, 3, 8, 5, 9, 14, 20) MD5_FOUR(G, MD5_G, 28, 13, 2, 7, 12, 5, 9, 14, 20) \\
        MD5_FOUR(G, MD5_H, 32, 5, 8, 11, 14, 4, 11, 16, 23) MD5_FOUR(G, MD5_H, 36, 1, 4, 7, 10, 4, 11, 16, 23) \\
        MD5_FOUR(G, MD5_H, 40, 13, 0, 3, 6, 4, 11, 16, 23) MD5_FOUR(G, MD5_H, 44, 9, 12, 15, 2, 4, 11, 16, 23) \\
        MD5_FOUR(G, MD5_I, 48, 0, 7, 14, 5, 6, 10, 15, 21) MD5_FOUR(G, MD5_I, 52, 12, 3, 10, 1, 6, 10, 15, 21) \\
        MD5_FOUR(G, MD5_I, 56, 8, 15, 6, 13, 6, 10, 15, 21) MD5_FOUR(G, MD5_I, 60, 4, 11, 2, 9, 6, 10, 15, 21)

    #define SHA_S(x, i, j, k) (ROR(x, i) ^ ROR(x, j) ^ ROR(x, k))
    #define SHA_T(x, i, j, k) (ROR(x, i) ^ ROR(x, j) ^ ((x) >> (k)))
    #define SHA_STEP(G, a, b, c, d, e, f, h0, h1, i, k) EACH(G) { \\
        h1[g] += SHA_S(e[g], 6, 11, 25) + (h0[g] ^ (e[g] & (f[g] ^ h0[g]))) + w[g][k] + SHA_K[i + k]; \\
        d[g] += h1[g]; h1[g] += SHA_S(a[g], 2, 13, 22) + ((a[g] & b[g]) | (c[g] & (a[g] | b[g]))); }
    #define SHA_NEXT(G, k) EACH(G) { w[g][k] += SHA_T(w[g][(k + 1) & 15], 7, 18, 3) + w[g][(k + 9) & 15] + SHA_T(w[g][(k + 14) & 15], 17, 19, 10); }
    #define SHA_EIGHT(G, i, k) \\
        SHA_STEP(G, a, b, c, d, e, f, h, j, i, k) SHA_STEP(G, j, a, b, c, d, e, f, h, i, k + 1) \\
        SHA_STEP(G, h, j, a, b, c, d, e, f, i, k + 2) SHA_STEP(G, f, h, j, a, b, c, d, e, i, k + 3) \\
        SHA_STEP(G, e, f, h, j, a, b, c, d, i, k + 4) SHA_STEP(G, d, e, f, h, j, a, b, c, i, k + 5) \\
        SHA_STEP(G, c, d, e, f, h, j, a, b, i, k + 6) SHA_STEP(G, b, c, d, e, f, h, j, a, i, k + 7)
    #define SHA_ALL_NEXT(G) SHA_NEXT(G, 0) SHA_NEXT(G, 1) SHA_NEXT(G, 2) SHA_NEXT(G, 3) SHA_NEXT(G, 4) SHA_NEXT(G, 5) SHA_NEXT(G, 6) SHA_NEXT(G, 7) \\
        SHA_NEXT(G, 8) SHA_NEXT(G, 9) SHA_NEXT(G, 10) SHA_NEXT(G, 11) SHA_NEXT(G, 12) SHA_NEXT(G, 13) SHA_NEXT(G, 14) SHA_NEXT(G, 15)

    /* G groups of N lanes each: take `blocks` blocks from each p[lane] into state[word][lane]. */
    #define KERNELS(NAME, V, N, G, TARGET) \\
    TARGET INLINE void load_##NAME(V w[G][16], const uint8_t *const *p, size_t at) { \\
        EACH(G) for (int part = 0; part < 16; part += N) { \\
            V r[N]; \\
            for (int i = 0; i < N; i++) memcpy(&r[i], p[g * N + i] + at + 4 * part, 4 * N); \\
            TRANSPOSE##N(V, r) \\
            for (int i = 0; i < N; i++) w[g][part + i] = r[i]; \\
        } \\
    } \\
    TARGET static void md5_##NAME(uint32_t *state, const uint8_t *const *p, size_t blocks) { \\
        V a[G], b[G], c[G], d[G], w[G][16]; \\
        EACH(G) { memcpy(&a[g], state + N * g, 4 * N); memcpy(&b[g], state + N * (G + g), 4 * N); \\
                  memcpy(&c[g], state + N * (2 * G + g), 4 * N); memcpy(&d[g], state + N * (3 * G + g), 4 * N); } \\
        for (size_t at = 0; at < 64 * blocks; at += 64) { \\
            V a0[G], b0[G], c0[G], d0[G]; \\
            load_##NAME(w, p, at); \\
            EACH(G) { a0[g] = a[g]; b0[g] = b[g]; c0[g] = c[g]; d0[g] = d[g]; } \\
            MD5_BLOCK(G) \\
            EACH(G) { a[g] += a0[g]; b[g] += b0[g]; c[g] += c0[g]; d[g] += d0[g]; } \\
        } \\
        EACH(G) { memcpy(state + N * g, &a[g], 4 * N); memcpy(state + N * (G + g), &b[g], 4 * N); \\
                  memcpy(state + N * (2 * G + g), &c[g], 4 * N); memcpy(state + N * (3 * G + g), &d[g], 4 * N); } \\
    } \\
    TARGET static void sha256_##NAME(uint32_t *state, const uint8_t *const *p, size_t blocks) { \\
        V s[8][G], w[G][16]; \\
        for (int i = 0; i < 8; i++) EACH(G) memcpy(&s[i][g], state + N * (i * G + g), 4 * N); \\
        for (size_t at = 0; at < 64 * blocks; at += 64) { \\
            V a[G], b[G], c[G], d[G], e[G], f[G], h[G], j[G]; \\
            load_##NAME(w, p, at); \\
            EACH(G) for (int i = 0; i < 16; i++) w[g][i] = SWAP(w[g][i]); \\
            EACH(G) { a[g] = s[0][g]; b[g] = s[1][g]; c[g] = s[2][g]; d[g] = s[3][g]; \\
                      e[g] = s[4][g]; f[g] = s[5][g]; h[g] = s[6][g]; j[g] = s[7][g]; } \\
            SHA_EIGHT(G, 0, 0) SHA_EIGHT(G, 0, 8) \\
            for (int i = 16; i < 64; i += 16) { SHA_ALL_NEXT(G) SHA_EIGHT(G, i, 0) SHA_EIGHT(G, i, 8) } \\
            EACH(G) { s[0][g] += a[g]; s[1][g] += b[g]; s[2][g] += c[g]; s[3][g] += d[g]; \\
                      s[4][g] += e[g]; s[5][g] += f[g]; s[6][g] += h[g]; s[7][g] += j[g]; } \\
        } \\
        for (int i = 0; i < 8; i++) EACH(G) memcpy(state + N * (i * G + g), &s[i][g], 4 * N); \\
    }

    typedef void (*kernel)(uint32_t *state, const uint8_t *const *p, size_t blocks);

    /* One group for a few messages; for more a second one, whose steps fill the gaps between those of the first. */
    #define BOTH(NAME, V, N, TARGET) KERNELS(NAME##_1, V, N, 1, TARGET) KERNELS(NAME##_2, V, N, 2, TARGET)
    #define WIDTH(NAME, N) (width){#NAME, N, {md5_##NAME##_1, md5_##NAME##_2}, {sha256_##NAME##_1, sha256_##NAME##_2}}

    BOTH(plain, v4, 4, )
    #if defined(__x86_64__) || defined(__i386__)
    #include <cpuid.h>
    #include <immintrin.h>
    BOTH(sse2, v4, 4, __attribute__((target("sse2"))))
    BOTH(avx2, v8, 8, __attribute__((target("avx2"))))
    BOTH(avx512, v16, 16, __attribute__((target("avx512f"))))

    /* SHA-256 by the processor's own instructions, G messages side by side: the steps of one fill the gaps of another.  The state
       words lie as these want them, {f, e, b, a} and {h, g, d, c}. */
    #define SHA_UNIT(G) \
    __attribute__((target("sha,sse4.1"))) static void sha256_unit_##G(uint32_t *state, const uint8_t *const *p, size_t blocks) { \
        const __m128i swap = _mm_set_epi32(0x0c0d0e0f, 0x08090a0b, 0x04050607, 0x00010203); \
        __m128i ab[G], cd[G]; \
        EACH(G) { \
            ab[g] = _mm_set_epi32((int)state[g], (int)state[G + g], (int)state[4 * G + g], (int)state[5 * G + g]); \
            cd[g] = _mm_set_epi32((int)state[2 * G + g], (int)state[3 * G + g], (int)state[6 * G + g], (int)state[7 * G + g]); \
        } \
        for (size_t at = 0; at < 64 * blocks; at += 64) { \
            __m128i ab0[G], cd0[G], w[G][4]; \
            EACH(G) { \
                ab0[g] = ab[g]; cd0[g] = cd[g]; \
                for (int i = 0; i < 4; i++) w[g][i] = _mm_shuffle_epi8(_mm_loadu_si128((const __m128i *)(p[g] + at + 16 * i)), swap); \
            } \
            _Pragma("GCC unroll 16") for (int i = 0; i < 16; i++) { \
                EACH(G) { \
                    __m128i k = _mm_add_epi32(w[g][i & 3], _mm_loadu_si128((const __m128i *)(SHA_K + 4 * i))); \
                    cd[g] = _mm_sha256rnds2_epu32(cd[g], ab[g], k); \
                    ab[g] = _mm_sha256rnds2_epu32(ab[g], cd[g], _mm_shuffle_epi32(k, 0x0e)); \
                } \
                if (i < 12) EACH(G) { \
                    __m128i next = _mm_alignr_epi8(w[g][(i + 3) & 3], w[g][(i + 2) & 3], 4); \
                    next = _mm_add_epi32(_mm_sha256msg1_epu32(w[g][i & 3], w[g][(i + 1) & 3]), next); \
                    w[g][i & 3] = _mm_sha256msg2_epu32(next, w[g][(i + 3) & 3]); \
                } \
            } \
            EACH(G) { ab[g] = _mm_add_epi32(ab[g], ab0[g]); cd[g] = _mm_add_epi32(cd[g], cd0[g]); } \
        } \
        EACH(G) { \
            uint32_t s[4]; \
            _mm_storeu_si128((__m128i *)s, ab[g]); \
            state[g] = s[3]; state[G + g] = s[2]; state[4 * G + g] = s[1]; state[5 * G + g] = s[0]; \
            _mm_storeu_si128((__m128i *)s, cd[g]); \
            state[2 * G + g] = s[3]; state[3 * G + g] = s[2]; state[6 * G + g] = s[1]; state[7 * G + g] = s[0]; \
        } \
    }
    SHA_UNIT(1)
    SHA_UNIT(2)
    #endif

    typedef struct { const char *name; int lanes; kernel md5[2], sha256[2]; } width;  /* kernels of one group of lanes, and of two */
    static width widths[4], unit = {"sha", 1, {NULL, NULL}, {NULL, NULL}};  /* and what a processor has for SHA-256 alone */

    /* Return how many widths this processor has, the best one last. */
    static int find_widths(void) {
        int n = 0;
        widths[n++] = WIDTH(plain, 4);
    #if defined(__x86_64__) || defined(__i386__)
        __builtin_cpu_init();
        if (__builtin_cpu_supports("sse2")) widths[n++] = WIDTH(sse2, 4);
        if (__builtin_cpu_supports("avx2")) widths[n++] = WIDTH(avx2, 8);
        if (__builtin_cpu_supports("avx512f")) widths[n++] = WIDTH(avx512, 16);
    #endif
        return n;
    }

    /* Return whether the processor has instructions of its own for SHA-256, which a library then uses; `unit` has ours where we know how. */
    static int has_sha(void) {
    #if defined(__x86_64__) || defined(__i386__)
        unsigned a, b, c, d;
        if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(b >> 29 & 1) || !__builtin_cpu_supports("sse4.1")) return 0;
        unit.sha256[0] = sha256_unit_1;
        unit.sha256[1] = sha256_unit_2;
        return 1;
    #elif defined(__ARM_FEATURE_SHA2)
        return 1;
    #else
        return 0;
    #endif
    }

    /* ---- messages, each a run through three stretches of whole blocks ------------------ */

    #define MOST 32
    #define CHUNK 512  /* blocks of a file that a lane reads at once: all lanes' chunks stay in the second cache */
    #define WINDOW 16384  /* or looks at where they lie: that is memory of ours as long as it lasts */

    typedef struct {
        const uint8_t *head, *data, *tail;  /* the caller's bytes, */
        size_t heads, count, tails;
        int fd;                             /* or -1 or those of a file, */
        off_t offset;
        size_t unread;                      /* blocks */
        int fault;                          /* errno, or -1 where the file ends too early */
        void *window;                       /* what is mapped of the file just now, or NULL */
        size_t window_size;
        const uint8_t *at[3];               /* what is put together here, the caller's bytes, what is put together at the end */
        size_t blocks[3];
        uint8_t first[64], last[128];
    } message;

    /* Copy bytes of a message's data; on a fault there is nothing more to read of it. */
    static void copy(message *m, size_t from, size_t count, uint8_t *to) {
        if (m->fd < 0) { if (count) memcpy(to, m->data + from, count); return; }
        while (count && !m->fault) {
            ssize_t got = pread(m->fd, to, count, m->offset + (off_t)from);
            if (got > 0) { to += got; from += (size_t)got; count -= (size_t)got; }
            else if (!got) m->fault = -1;
            else if (errno != EINTR) m->fault = errno;
        }
    }

    /* Lay out head + data + tail (head and tail together at most 60 bytes), with the padding that the digest wants. */
    static void lay_out(message *m, int big) {
        size_t heads = m->heads, count = m->count, total = heads + count + m->tails, taken = 0, whole = 0, left;
        uint8_t *end = m->last;
        memset(m->blocks, 0, sizeof m->blocks);
        memset(m->last, 0, sizeof m->last);
        memset(m->first, 0, sizeof m->first);
        m->at[0] = m->first; m->at[1] = NULL; m->at[2] = m->last;
        m->unread = 0; m->fault = 0;
        if (heads && count >= 64 - heads) {
            taken = 64 - heads;
            memcpy(m->first, m->head, heads);
            copy(m, 0, taken, m->first + heads);
            m->blocks[0] = 1;
            heads = 0;
        }
        if (!heads) whole = (count - taken) / 64;
        if (m->fd < 0) { m->at[1] = m->data + taken; m->blocks[1] = whole; }
        else { m->unread = whole; m->offset += (off_t)taken; m->count -= taken; count -= taken; taken = 0; }
        taken += 64 * whole;
        if (heads) memcpy(end, m->head, heads);
        end += heads;
        left = count - taken;
        copy(m, taken, left, end);
        end += left;
        if (m->tails) memcpy(end, m->tail, m->tails);
        end += m->tails;
        *end++ = 0x80;
        m->blocks[2] = (size_t)(end - m->last) > 56 ? 2 : 1;
        end = m->last + 64 * m->blocks[2] - 8;
        for (int i = 0; i < 8; i++) end[big ? 7 - i : i] = (uint8_t)((uint64_t)total * 8 >> 8 * i);
    }

    static void close_window(message *m) {
        if (m->window) munmap(m->window, m->window_size);
        m->window = NULL;
    }

    /* Map the next blocks of a file; return where they are, NULL where they had better be read: only that says what is wrong with them. */
    static const uint8_t *open_window(message *m, size_t blocks) {
    #ifdef MADV_POPULATE_READ
        struct stat about;
        size_t before = (size_t)m->offset % (size_t)sysconf(_SC_PAGESIZE);
        if (fstat(m->fd, &about) || about.st_size < m->offset + (off_t)(64 * blocks)) return NULL;
        m->window_size = before + 64 * blocks;
        m->window = mmap(NULL, m->window_size, PROT_READ, MAP_SHARED, m->fd, m->offset - (off_t)before);
        if (m->window == MAP_FAILED) m->window = NULL;
        if (m->window && madvise(m->window, m->window_size, MADV_POPULATE_READ)) close_window(m);
        if (m->window) return (const uint8_t *)m->window + before;
    #else
        (void)m; (void)blocks;
    #endif
        return NULL;
    }

    /* Get at the next blocks of a file. */
    static void refill(message *m, uint8_t *chunk) {
        size_t blocks = m->unread < WINDOW ? m->unread : WINDOW;
        close_window(m);
        m->at[1] = blocks > CHUNK ? open_window(m, blocks) : NULL;
        if (!m->at[1]) {
            blocks = blocks < CHUNK ? blocks : CHUNK;
            copy(m, 0, 64 * blocks, chunk);
            m->at[1] = chunk;
        }
        if (m->fault) { m->unread = 0; return; }
        m->offset += (off_t)(64 * blocks);
        m->unread -= blocks;
        m->blocks[1] = blocks;
    }

    /* Digest `count` messages, each in a lane while it lasts; the digests follow each other in `out`.  `chunks` has one for each lane. */
    static void digest_all(const width *wide, int big, message *m, size_t count, uint8_t *out, uint8_t *chunks) {
        int groups = count > (size_t)wide->lanes ? 2 : 1, lanes = groups * wide->lanes, words = big ? 8 : 4, active = 0;
        kernel take = (big ? wide->sha256 : wide->md5)[groups - 1];
        const uint32_t *start = big ? SHA_START : MD5_START;
        uint32_t state[8 * MOST];
        const uint8_t *p[MOST];
        size_t owner[MOST], next = 0;
        int run[MOST];
        memset(state, 0, sizeof state);
        for (int l = 0; l < lanes; l++) { owner[l] = count; run[l] = 3; }
        for (;;) {
            size_t blocks = (size_t)-1;
            int some = -1;
            for (int l = 0; l < lanes; l++) {
                while (run[l] < 3 && !m[owner[l]].blocks[run[l]]) {
                    if (run[l] == 1 && m[owner[l]].unread) refill(&m[owner[l]], chunks + (size_t)l * 64 * CHUNK);
                    else run[l]++;
                }
                if (run[l] == 3) {
                    if (owner[l] < count) {
                        close_window(&m[owner[l]]);
                        for (int i = 0; i < words; i++)
                            for (int k = 0; k < 4; k++)
                                out[owner[l] * 4 * words + 4 * i + k] = (uint8_t)(state[i * lanes + l] >> 8 * (big ? 3 - k : k));
                        owner[l] = count;
                        active--;
                    }
                    if (next < count) {
                        owner[l] = next++;
                        run[l] = 0;
                        active++;
                        for (int i = 0; i < words; i++) state[i * lanes + l] = start[i];
                        lay_out(&m[owner[l]], big);
                        l--;  /* on to its first blocks */
                        continue;
                    }
                }
                if (run[l] < 3) {
                    message *one = &m[owner[l]];
                    p[l] = one->at[run[l]];
                    if (one->blocks[run[l]] < blocks) blocks = one->blocks[run[l]];
                    some = l;
                }
            }
            if (!active) return;
            for (int l = 0; l < lanes; l++) if (run[l] == 3) p[l] = p[some];  /* what an idle lane digests, nobody asks for */
            take(state, p, blocks);
            for (int l = 0; l < lanes; l++) if (run[l] < 3) {
                m[owner[l]].at[run[l]] += 64 * blocks;
                m[owner[l]].blocks[run[l]] -= blocks;
            }
        }
    }

    /* ---- from a socket into a file ------------------------------------------------------ */

    #ifdef SPLICE_F_NONBLOCK
    #define FULL (128 << 10)  /* bytes that are in the pipe before they move on */
    #define LONGEST_S 1.0     /* one call goes on: whoever asks wants to see that something moves, and how fast */
    typedef struct { size_t got, put; int fault, file_fault; } moved;

    static double now_s(void) {
        struct timespec t;
        clock_gettime(CLOCK_MONOTONIC, &t);
        return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
    }

    static int drain(moved *m, int from, int fd, off_t offset) {
        while (m->put < m->got) {
            loff_t at = offset + (off_t)m->put;
            ssize_t n = splice(from, NULL, fd, &at, m->got - m->put, SPLICE_F_MOVE);
            if (n > 0) m->put += (size_t)n;
            else if (!n || errno != EINTR) { m->file_fault = n ? errno : EIO; return 0; }
        }
        return 1;
    }

    static moved splice_all(int sock, int from, int into, int fd, off_t offset, size_t count, size_t heap, size_t behind) {
        moved m = {0, 0, 0, 0};
        int lowat = 0;
        double end_s = now_s() + LONGEST_S;
        while (m.got < count) {
            ssize_t n;
            int late;
            size_t wish = count - m.got + behind;
            if (wish > heap) wish = heap;
            if (heap && lowat != (int)wish) {
                lowat = (int)wish;
                if (setsockopt(sock, SOL_SOCKET, SO_RCVLOWAT, &lowat, sizeof lowat)) m.fault = errno;
            }
            n = m.fault ? 0 : splice(sock, NULL, into, NULL, count - m.got, SPLICE_F_MOVE | SPLICE_F_NONBLOCK);
            if (n < 0 && !(errno == EAGAIN && m.put < m.got)) m.fault = errno;  /* else the pipe is full */
            late = now_s() >= end_s;
            if (n > 0) m.got += (size_t)n;
            if (n > 0 && m.got < count && m.got - m.put < FULL && !late) continue;
            if (!drain(&m, from, fd, offset) || n == 0 || m.fault || late) return m;
        }
        return m;
    }
    #else
    typedef struct { size_t got, put; int fault, file_fault; } moved;
    static moved splice_all(int sock, int from, int into, int fd, off_t offset, size_t count, size_t heap, size_t behind) {
        moved m = {0, 0, ENOSYS, 0};
        (void)sock; (void)from; (void)into; (void)fd; (void)offset; (void)count; (void)heap; (void)behind;
        return m;
    }
    #endif
    """
    ctypedef struct moved:
        size_t got, put
        int fault, file_fault
    moved c_splice_all "splice_all" (int sock, int source, int into, int fd, off_t offset, size_t count, size_t heap, size_t behind) nogil
    ctypedef void (*kernel)(unsigned *state, const uint8_t *const *p, size_t blocks) nogil
    ctypedef struct width:
        const char *name
        int lanes
        kernel *sha256
    ctypedef struct message:
        const uint8_t *head
        const uint8_t *data
        const uint8_t *tail
        size_t heads, count, tails
        int fd, fault
        off_t offset
    width widths[4]
    width unit
    int MOST, CHUNK
    int find_widths() nogil
    int has_sha() nogil
    void digest_all(const width *wide, int big, message *m, size_t count, uint8_t *out, uint8_t *chunks) nogil


cdef int _count = find_widths()
cdef int _best = _count - 1
_names = [widths[i].name.decode() for i in range(_count)]
if os.environ.get("DFLY_LANES") in _names:
    _best = _names.index(os.environ["DFLY_LANES"])

#: How wide the vectors in use are: plain, sse2, avx2 or avx512.
LANES = _names[_best]
_own = bool(has_sha())  # whether the processor, and so hashlib, has instructions for SHA-256,
_unit = unit.sha256[0] != NULL and LANES != os.environ.get("DFLY_LANES")  # and whether they are in use here
#: From how many messages on it is faster than one after the other by hashlib; what has instructions of its own is hard to beat by vectors.
WORTH = {"md5": 2, "sha256": 1 if _unit else (10 if LANES == "avx512" else 1 << 30) if _own else 3 if LANES == "avx512" else 6}


def digest_many(str kind, list messages, str lanes=""):
    """Return the digests (bytes) of messages, each (head, data, tail): head and tail are bytes, at most 60 of them together, data any
    contiguous buffer or (fd, offset, length) of a file; b"" for one whose file ends too early.  `kind` is md5 or sha256; `lanes` another
    width than LANES, or sha for the processor's own instructions, for comparison.

    One thread, without the GIL.  Raises ValueError, BufferError, OSError.
    """
    cdef int big = kind == "sha256"
    cdef const width *wide
    cdef Py_ssize_t count = len(messages), i = 0, size = 32 if big else 16
    cdef Py_buffer *views
    cdef message *laid
    cdef bytes head, tail, out
    cdef uint8_t *found
    cdef uint8_t *chunks = NULL
    if kind not in ("md5", "sha256"):
        raise ValueError(kind)
    if big and (lanes == "sha" and unit.sha256[0] or _unit and not lanes):
        wide = &unit
    else:
        wide = &widths[_names.index(lanes) if lanes else _best]
    if not count:
        return []
    views = <Py_buffer *>calloc(count, sizeof(Py_buffer))
    laid = <message *>calloc(count, sizeof(message))
    try:
        if not views or not laid:
            raise MemoryError()
        for i in range(count):
            head, data, tail = messages[i]
            if len(head) + len(tail) > 60:
                raise ValueError("head and tail have more than 60 bytes")
            laid[i].head, laid[i].heads, laid[i].tail, laid[i].tails = head, len(head), tail, len(tail)
            laid[i].fd = -1
            if isinstance(data, tuple):
                laid[i].fd, laid[i].offset, laid[i].count = data
                if laid[i].fd < 0 or laid[i].offset < 0:
                    raise OSError(EBADF if laid[i].fd < 0 else EINVAL, "no place in a file: %r" % (data,))
                if not chunks:
                    chunks = <uint8_t *>malloc(MOST * CHUNK * 64)
                    if not chunks:
                        raise MemoryError()
            else:
                PyObject_GetBuffer(data, &views[i], PyBUF_SIMPLE)
                laid[i].data, laid[i].count = <const uint8_t *>views[i].buf, views[i].len
        out = bytes(count * size)
        found = out
        with nogil:
            digest_all(wide, big, laid, count, found, chunks)
        for i in range(count):
            if laid[i].fault > 0:
                raise OSError(laid[i].fault, os.strerror(laid[i].fault))
        return [b"" if laid[i].fault else out[i * size:(i + 1) * size] for i in range(count)]
    finally:
        if views:
            for i in range(count):
                PyBuffer_Release(&views[i])  # does nothing to one that was never taken
        free(views)
        free(laid)
        free(chunks)


def splice_all(sock, tuple pipe, int fd, off_t offset, size_t count, size_t heap, size_t behind):
    """Move `count` bytes, as far as they come within a second or so, from a blocking socket by a pipe into a file, from `offset` on.

    With a `heap` we are woken only for so many bytes; at least `behind` more will follow.  Returns how many left the socket and how
    many are in the file (the rest is in the pipe), and the errno that ended it at the socket and at the file, 0 for none.
    """
    cdef int source = sock.fileno(), reader = pipe[0], writer = pipe[1]
    cdef size_t done = 0
    cdef moved found
    while True:
        with nogil:
            found = c_splice_all(source, reader, writer, fd, offset + <off_t>done, count - done, heap, behind)
        if found.fault != EINTR or found.file_fault:
            return done + found.got, done + found.put, found.fault, found.file_fault
        done += found.put
        PyErr_CheckSignals()


def nums_of(mask):
    """Return the piece numbers in a bit mask, lowest first."""
    cdef list nums = []
    cdef Py_ssize_t at, bit, size
    cdef unsigned char byte
    if mask <= 0:
        return nums
    cdef bytes data = mask.to_bytes((mask.bit_length() + 7) // 8, "little")
    size = len(data)
    for at in range(size):
        byte = data[at]
        bit = at * 8
        while byte:
            if byte & 1:
                nums.append(bit)
            byte >>= 1
            bit += 1
    return nums
