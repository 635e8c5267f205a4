/* XXH3, 128 bits, seed 0, for inputs of a multiple of 1024 bytes: what a pack's experts are checked with.
   Written from the published description of the algorithm; the digest may be fed block by block. */
#ifndef FOREGATE_XXH3_H
#define FOREGATE_XXH3_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "big-endian machines take the Python reader"
#endif

#define XXH3_BLOCK 1024 /* 16 stripes of 64 bytes */
#define XXH3_STRIPE 64
#define P32_1 0x9E3779B1U
#define P32_2 0x85EBCA77U
#define P32_3 0xC2B2AE3DU
#define P64_1 0x9E3779B185EBCA87ULL
#define P64_2 0xC2B2AE3D27D4EB4FULL
#define P64_3 0x165667B19E3779F9ULL
#define P64_4 0x85EBCA77C2B2AE63ULL
#define P64_5 0x27D4EB2F165667C5ULL

static const uint8_t xxh3_secret[192] = {
    0xb8, 0xfe, 0x6c, 0x39, 0x23, 0xa4, 0x4b, 0xbe, 0x7c, 0x01, 0x81, 0x2c, 0xf7, 0x21, 0xad, 0x1c, 0xde, 0xd4, 0x6d, 0xe9,
    0x83, 0x90, 0x97, 0xdb, 0x72, 0x40, 0xa4, 0xa4, 0xb7, 0xb3, 0x67, 0x1f, 0xcb, 0x79, 0xe6, 0x4e, 0xcc, 0xc0, 0xe5, 0x78,
    0x82, 0x5a, 0xd0, 0x7d, 0xcc, 0xff, 0x72, 0x21, 0xb8, 0x08, 0x46, 0x74, 0xf7, 0x43, 0x24, 0x8e, 0xe0, 0x35, 0x90, 0xe6,
    0x81, 0x3a, 0x26, 0x4c, 0x3c, 0x28, 0x52, 0xbb, 0x91, 0xc3, 0x00, 0xcb, 0x88, 0xd0, 0x65, 0x8b, 0x1b, 0x53, 0x2e, 0xa3,
    0x71, 0x64, 0x48, 0x97, 0xa2, 0x0d, 0xf9, 0x4e, 0x38, 0x19, 0xef, 0x46, 0xa9, 0xde, 0xac, 0xd8, 0xa8, 0xfa, 0x76, 0x3f,
    0xe3, 0x9c, 0x34, 0x3f, 0xf9, 0xdc, 0xbb, 0xc7, 0xc7, 0x0b, 0x4f, 0x1d, 0x8a, 0x51, 0xe0, 0x4b, 0xcd, 0xb4, 0x59, 0x31,
    0xc8, 0x9f, 0x7e, 0xc9, 0xd9, 0x78, 0x73, 0x64, 0xea, 0xc5, 0xac, 0x83, 0x34, 0xd3, 0xeb, 0xc3, 0xc5, 0x81, 0xa0, 0xff,
    0xfa, 0x13, 0x63, 0xeb, 0x17, 0x0d, 0xdd, 0x51, 0xb7, 0xf0, 0xda, 0x49, 0xd3, 0x16, 0x55, 0x26, 0x29, 0xd4, 0x68, 0x9e,
    0x2b, 0x16, 0xbe, 0x58, 0x7d, 0x47, 0xa1, 0xfc, 0x8f, 0xf8, 0xb8, 0xd1, 0x7a, 0xd0, 0x31, 0xce, 0x45, 0xcb, 0x3a, 0x8f,
    0x95, 0x16, 0x04, 0x28, 0xaf, 0xd7, 0xfb, 0xca, 0xbb, 0x4b, 0x40, 0x7e,
};

typedef struct {
    uint64_t low, high;
} xxh3_digest;

static inline uint64_t xxh3_word(const uint8_t *at) {
    uint64_t word;
    memcpy(&word, at, 8);
    return word;
}

static void xxh3_start(uint64_t acc[8]) {
    const uint64_t first[8] = {P32_3, P64_1, P64_2, P64_3, P64_4, P32_2, P64_5, P32_1};
    memcpy(acc, first, sizeof first);
}

static void xxh3_stripes(uint64_t acc[8], const uint8_t *data, const uint8_t *secret, int stripes) {
    for (int s = 0; s < stripes; s++, data += XXH3_STRIPE, secret += 8)
        for (int i = 0; i < 8; i++) {
            uint64_t value = xxh3_word(data + 8 * i), key = value ^ xxh3_word(secret + 8 * i);
            acc[i ^ 1] += value;
            acc[i] += (key & 0xffffffffU) * (key >> 32);
        }
}

static void xxh3_scramble(uint64_t acc[8]) {
    for (int i = 0; i < 8; i++)
        acc[i] = (acc[i] ^ (acc[i] >> 47) ^ xxh3_word(xxh3_secret + 128 + 8 * i)) * P32_1;
}

static void xxh3_blocks_plain(uint64_t acc[8], const uint8_t *data, uint64_t blocks) {
    for (; blocks; blocks--, data += XXH3_BLOCK) {
        xxh3_stripes(acc, data, xxh3_secret, 16);
        xxh3_scramble(acc);
    }
}

#if defined(__x86_64__)
__attribute__((target("avx512f"))) static void xxh3_blocks_avx512(uint64_t acc[8], const uint8_t *data, uint64_t blocks) {
    __m512i a = _mm512_loadu_si512(acc), prime = _mm512_set1_epi64(P32_1);
    __m512i last = _mm512_loadu_si512(xxh3_secret + 128);
    for (; blocks; blocks--) {
        for (int s = 0; s < 16; s++, data += XXH3_STRIPE) {
            __m512i value = _mm512_loadu_si512(data);
            __m512i key = _mm512_xor_si512(value, _mm512_loadu_si512(xxh3_secret + 8 * s));
            a = _mm512_add_epi64(a, _mm512_shuffle_epi32(value, (_MM_PERM_ENUM)_MM_SHUFFLE(1, 0, 3, 2)));
            a = _mm512_add_epi64(a, _mm512_mul_epu32(key, _mm512_srli_epi64(key, 32)));
        }
        a = _mm512_xor_si512(_mm512_xor_si512(a, _mm512_srli_epi64(a, 47)), last);
        __m512i high = _mm512_slli_epi64(_mm512_mul_epu32(_mm512_srli_epi64(a, 32), prime), 32);
        a = _mm512_add_epi64(_mm512_mul_epu32(a, prime), high);
    }
    _mm512_storeu_si512(acc, a);
}

__attribute__((target("avx2"))) static void xxh3_blocks_avx2(uint64_t acc[8], const uint8_t *data, uint64_t blocks) {
    __m256i a[2], prime = _mm256_set1_epi64x(P32_1);
    for (int h = 0; h < 2; h++) a[h] = _mm256_loadu_si256((const __m256i *)(acc + 4 * h));
    for (; blocks; blocks--) {
        for (int s = 0; s < 16; s++, data += XXH3_STRIPE)
            for (int h = 0; h < 2; h++) {
                __m256i value = _mm256_loadu_si256((const __m256i *)(data + 32 * h));
                __m256i secret = _mm256_loadu_si256((const __m256i *)(xxh3_secret + 8 * s + 32 * h));
                __m256i key = _mm256_xor_si256(value, secret);
                a[h] = _mm256_add_epi64(a[h], _mm256_shuffle_epi32(value, _MM_SHUFFLE(1, 0, 3, 2)));
                a[h] = _mm256_add_epi64(a[h], _mm256_mul_epu32(key, _mm256_srli_epi64(key, 32)));
            }
        for (int h = 0; h < 2; h++) {
            __m256i secret = _mm256_loadu_si256((const __m256i *)(xxh3_secret + 128 + 32 * h));
            a[h] = _mm256_xor_si256(_mm256_xor_si256(a[h], _mm256_srli_epi64(a[h], 47)), secret);
            __m256i high = _mm256_slli_epi64(_mm256_mul_epu32(_mm256_srli_epi64(a[h], 32), prime), 32);
            a[h] = _mm256_add_epi64(_mm256_mul_epu32(a[h], prime), high);
        }
    }
    for (int h = 0; h < 2; h++) _mm256_storeu_si256((__m256i *)(acc + 4 * h), a[h]);
}
#endif

typedef void (*xxh3_blocks)(uint64_t acc[8], const uint8_t *data, uint64_t blocks);
/* Takes whole blocks, none of them the last of the input. */

/* The way of kind 0 (any machine), 1 (AVX2) or 2 (AVX-512); NULL where this processor has it not. */
static xxh3_blocks xxh3_way(int kind) {
#if defined(__x86_64__)
    if (kind == 2) return __builtin_cpu_supports("avx512f") ? xxh3_blocks_avx512 : NULL;
    if (kind == 1) return __builtin_cpu_supports("avx2") ? xxh3_blocks_avx2 : NULL;
#endif
    return kind == 0 ? xxh3_blocks_plain : NULL;
}

static uint64_t xxh3_merge(const uint64_t acc[8], const uint8_t *secret, uint64_t sum) {
    for (int i = 0; i < 8; i += 2) {
        unsigned __int128 product = (unsigned __int128)(acc[i] ^ xxh3_word(secret + 8 * i)) *
                                    (acc[i + 1] ^ xxh3_word(secret + 8 * i + 8));
        sum += (uint64_t)product ^ (uint64_t)(product >> 64);
    }
    sum = (sum ^ (sum >> 37)) * 0x165667919E3779F9ULL;
    return sum ^ (sum >> 32);
}

/* The digest of `nbytes` bytes, of which `last` is the final block and all others have been fed to `acc`. */
static xxh3_digest xxh3_finish(uint64_t acc[8], const uint8_t *last, uint64_t nbytes) {
    xxh3_stripes(acc, last, xxh3_secret, 15);
    xxh3_stripes(acc, last + XXH3_BLOCK - XXH3_STRIPE, xxh3_secret + 192 - XXH3_STRIPE - 7, 1);
    xxh3_digest digest;
    digest.low = xxh3_merge(acc, xxh3_secret + 11, nbytes * P64_1);
    digest.high = xxh3_merge(acc, xxh3_secret + 192 - XXH3_STRIPE - 11, ~(nbytes * P64_2));
    return digest;
}

#endif
