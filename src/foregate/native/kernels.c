/* Matrix-vector products of experts at the speed of memory: bf16, int8 (a scale a row), int4 (a scale a group).
 *
 * Shapes: T tokens, N rows (outputs), K columns (inputs). Integer formats quantise the input to 15 bits and a sign with
 * one scale a token, kept as two int8 halves, x = 256 hi + lo, so that byte dot products apply without losing accuracy;
 * sums of integers are exact in any order. Every row of a result depends on its own weights and token alone: not on the
 * number of threads, on who computes it, or on the other tokens. */
#include "pool.h"

#include <float.h>
#include <limits.h>
#include <math.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>

#if defined(__x86_64__)
#include <immintrin.h>
#define X86 1
#endif

enum { BF16 = 0, INT8 = 1, INT4 = 2, F32 = 3 };
enum { ROWS = 16, STEP = 64, QUANTUM = 8 };
#define ALWAYS static inline __attribute__((always_inline)) /* compiled anew for the processor of each caller */
#define LEVELS 32512.0f /* 127 * 256: the high half stays within int8 */
#define CHUNK_BYTES (48 << 10)
#define AHEAD 1536 /* bytes of software prefetch into L2: from 4 KB on it gets in the way of the processor's own */
#define AHEAD4 8192 /* bytes of software prefetch */

/* One weight matrix. bf16, int8: [N, K] row-major; int8 has scales float[N]. int4: blocks of 16 rows x 8 columns in 64
 * bytes (byte 4 r + j: column j low, column 4 + j high; value + 8), [N/16, K/8]; scales bf16 [N/16, K/group, 16];
 * group 32, 64 or 128; N padded to a multiple of 16, K to one of the group. */
typedef struct {
    const void *weights;
    const void *scales;
    int32_t dtype, rows, columns, group;
} matrix;

/* One token's input in the form that the kernels read. Lengths are padded with zeros to a multiple of STEP. */
typedef struct {
    float *even, *odd; /* bf16: columns 0 2 4 ... and 1 3 5 ... */
    int8_t *hi, *lo;
    int16_t *wide;
    int32_t *group_sums;
    float scale;
    int64_t sum;
} input;

static inline int round_up(int n, int to) { return (n + to - 1) / to * to; }

static inline float from_bf16(uint16_t bits) {
    uint32_t wide = (uint32_t)bits << 16;
    float value;
    memcpy(&value, &wide, 4);
    return value;
}

static inline uint32_t bits_of(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    return bits;
}

static inline uint16_t to_bf16(float value) {
    uint32_t bits = bits_of(value);
    if (value != value)
        return (uint16_t)(bits >> 16 | 0x40);
    return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

/* ---- Input: split floats for bf16 weights, integers for the others ---- */

static void split_floats(const float *x, int n, input *in) {
    for (int i = 0; i < n / 2; i++) {
        in->even[i] = x[2 * i];
        in->odd[i] = x[2 * i + 1];
    }
}

ALWAYS void quantise_any(const float *x, int n, int group, input *in) {
    int16_t *restrict wide = in->wide; /* stores of bytes might change `in` itself, as far as C knows */
    int8_t *restrict hi = in->hi, *restrict lo = in->lo;
    uint32_t top = 0; /* sizes by their bits: a maximum of integers takes every lane of a vector */
    for (int i = 0; i < n; i++) {
        uint32_t size = bits_of(x[i]) & 0x7fffffff;
        top = size > top ? size : top;
    }
    const int real = top < 0x7f800000; /* otherwise an input is infinite or NaN, and so is every result */
    float largest;
    memcpy(&largest, &top, 4);
    const int any = real && largest > 1e-30f;
    in->scale = any ? largest / LEVELS : real ? 0.0f : NAN;
    const float inverse = any ? LEVELS / largest : 0.0f;
    if (real)
        for (int i = 0; i < n; i++)
            wide[i] = (int16_t)nearbyintf(x[i] * inverse);
    else
        memset(wide, 0, (size_t)n * 2);
    for (int i = 0; i < n; i++) {
        int16_t high = (int16_t)((wide[i] + 128) >> 8);
        hi[i] = (int8_t)high;
        lo[i] = (int8_t)(wide[i] - 256 * high);
    }
    int32_t sum = 0; /* 65536 columns of 32512 fit */
    for (int i = 0; i < n; i++)
        sum += wide[i];
    in->sum = sum;
    for (int g = 0; group && g * group < n; g++) {
        int32_t part = 0;
        for (int i = g * group; i < (g + 1) * group && i < n; i++)
            part += wide[i];
        in->group_sums[g] = part;
    }
}

/* ---- Kernels: `rows` results from row `row` on, for every token, to out[token * stride + 0 ... rows-1] ----
 * `row` is a multiple of ROWS; int4 writes whole blocks, so `out` has room for a multiple of ROWS. */

typedef void (*kernel_fn)(const matrix *m, int row, int rows, const input *in, int tokens, float *out, int stride);

static void bf16_plain(const matrix *m, int row, int rows, const input *in, int tokens, float *out, int stride) {
    int k = m->columns;
    for (int r = 0; r < rows; r++) {
        const uint16_t *w = (const uint16_t *)m->weights + (size_t)(row + r) * k;
        for (int t = 0; t < tokens; t++) {
            float even = 0.0f, odd = 0.0f;
            for (int i = 0; i < k / 2; i++) {
                even += from_bf16(w[2 * i]) * in[t].even[i];
                odd += from_bf16(w[2 * i + 1]) * in[t].odd[i];
            }
            if (k & 1)
                even += from_bf16(w[k - 1]) * in[t].even[k / 2];
            out[t * stride + r] = even + odd;
        }
    }
}

static void int8_plain(const matrix *m, int row, int rows, const input *in, int tokens, float *out, int stride) {
    int k = m->columns;
    for (int r = 0; r < rows; r++) {
        const int8_t *w = (const int8_t *)m->weights + (size_t)(row + r) * k;
        float scale = ((const float *)m->scales)[row + r];
        for (int t = 0; t < tokens; t++) {
            int64_t sum = 0;
            for (int i = 0; i < k; i++)
                sum += (int32_t)w[i] * in[t].wide[i];
            out[t * stride + r] = (float)sum * (scale * in[t].scale);
        }
    }
}

static inline const uint8_t *int4_block(const matrix *m, int row) {
    return (const uint8_t *)m->weights + (size_t)row / ROWS * (m->columns / QUANTUM) * 64;
}

static inline const uint16_t *int4_scales(const matrix *m, int row) {
    return (const uint16_t *)m->scales + (size_t)row / ROWS * (m->columns / m->group) * ROWS;
}

static void int4_plain(const matrix *m, int row, int rows, const input *in, int tokens, float *out, int stride) {
    int steps = m->columns / QUANTUM, per_group = m->group / QUANTUM;
    for (int block = 0; block < rows; block += ROWS) {
        const uint8_t *w = int4_block(m, row + block);
        const uint16_t *scales = int4_scales(m, row + block);
        for (int t = 0; t < tokens; t++) {
            float total[ROWS] = {0};
            for (int first = 0, g = 0; first < steps; first += per_group, g++) {
                int32_t sum[ROWS] = {0};
                for (int s = first; s < first + per_group && s < steps; s++)
                    for (int r = 0; r < ROWS; r++)
                        for (int j = 0; j < 4; j++) {
                            uint8_t pair = w[s * 64 + 4 * r + j];
                            sum[r] += (pair & 15) * in[t].wide[8 * s + j] + (pair >> 4) * in[t].wide[8 * s + 4 + j];
                        }
                for (int r = 0; r < ROWS; r++)
                    total[r] += (float)(sum[r] - 8 * in[t].group_sums[g]) * from_bf16(scales[g * ROWS + r]);
            }
            for (int r = 0; r < ROWS; r++)
                out[t * stride + block + r] = total[r] * in[t].scale;
        }
    }
}

#ifdef X86
#define AVX2 __attribute__((target("avx2,fma")))
#define AVX512 __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma")))

AVX2 static void quantise_avx2(const float *x, int n, int group, input *in) { quantise_any(x, n, group, in); }
AVX512 static void quantise_avx512(const float *x, int n, int group, input *in) { quantise_any(x, n, group, in); }

AVX2 static inline float sum8(__m256 v) {
    __m128 four = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    four = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(four, _mm_movehdup_ps(four)));
}

AVX2 static inline int64_t sum8_wide(__m256i v) {
    __m256i low = _mm256_cvtepi32_epi64(_mm256_castsi256_si128(v));
    __m256i high = _mm256_cvtepi32_epi64(_mm256_extracti128_si256(v, 1));
    __m256i four = _mm256_add_epi64(low, high);
    __m128i two = _mm_add_epi64(_mm256_castsi256_si128(four), _mm256_extracti128_si256(four, 1));
    return _mm_cvtsi128_si64(two) + _mm_extract_epi64(two, 1);
}

AVX2 static void bf16_avx2(const matrix *m, int row, int rows, const input *in, int tokens, float *out, int stride) {
    int k = m->columns, whole = k / 16 * 16;
    const __m256i mask = _mm256_set1_epi32((int)0xffff0000);
    for (int r = 0; r < rows; r++) {
        const uint16_t *w = (const uint16_t *)m->weights + (size_t)(row + r) * k;
        for (int t = 0; t < tokens; t++) {
            __m256 even[2] = {_mm256_setzero_ps(), _mm256_setzero_ps()};
            __m256 odd[2] = {_mm256_setzero_ps(), _mm256_setzero_ps()};
            for (int i = 0; i < whole; i += 16) {
                __m256i pair = _mm256_loadu_si256((const __m256i *)(w + i));
                if (!(i & 31))
                    _mm_prefetch((const char *)(w + i) + AHEAD, _MM_HINT_T1);
                int a = i >> 4 & 1;
                even[a] = _mm256_fmadd_ps(_mm256_castsi256_ps(_mm256_slli_epi32(pair, 16)),
                                          _mm256_loadu_ps(in[t].even + i / 2), even[a]);
                odd[a] = _mm256_fmadd_ps(_mm256_castsi256_ps(_mm256_and_si256(pair, mask)),
                                         _mm256_loadu_ps(in[t].odd + i / 2), odd[a]);
            }
            float rest = 0.0f;
            for (int i = whole; i < k; i++)
                rest += from_bf16(w[i]) * (i & 1 ? in[t].odd : in[t].even)[i / 2];
            __m256 all = _mm256_add_ps(_mm256_add_ps(even[0], even[1]), _mm256_add_ps(odd[0], odd[1]));
            out[t * stride + r] = sum8(all) + rest;
        }
    }
}

AVX2 static void int8_avx2(const matrix *m, int row, int rows, const input *in, int tokens, float *out, int stride) {
    int k = m->columns, whole = k / 32 * 32;
    for (int r = 0; r < rows; r++) {
        const int8_t *w = (const int8_t *)m->weights + (size_t)(row + r) * k;
        float scale = ((const float *)m->scales)[row + r];
        for (int t = 0; t < tokens; t++) {
            int64_t sum = 0;
            for (int begin = 0; begin < whole; begin += 2048) { /* 128 products of 2^23 a lane fit in 32 bits */
                __m256i one = _mm256_setzero_si256(), other = _mm256_setzero_si256();
                for (int i = begin; i < whole && i < begin + 2048; i += 32) {
                    __m256i both = _mm256_loadu_si256((const __m256i *)(w + i));
                    if (!(i & 63))
                        _mm_prefetch((const char *)(w + i) + AHEAD, _MM_HINT_T1);
                    __m256i low = _mm256_cvtepi8_epi16(_mm256_castsi256_si128(both));
                    __m256i high = _mm256_cvtepi8_epi16(_mm256_extracti128_si256(both, 1));
                    const __m256i *x = (const __m256i *)(in[t].wide + i);
                    one = _mm256_add_epi32(one, _mm256_madd_epi16(low, _mm256_loadu_si256(x)));
                    other = _mm256_add_epi32(other, _mm256_madd_epi16(high, _mm256_loadu_si256(x + 1)));
                }
                sum += sum8_wide(one) + sum8_wide(other);
            }
            for (int i = whole; i < k; i++)
                sum += (int32_t)w[i] * in[t].wide[i];
            out[t * stride + r] = (float)sum * (scale * in[t].scale);
        }
    }
}

AVX2 static inline __m256i quad(const int8_t *x) {
    int32_t four;
    memcpy(&four, x, 4);
    return _mm256_set1_epi32(four);
}

AVX2 static inline __m256i dot_bytes(__m256i sum, __m256i unsigned_, __m256i signed_) {
    __m256i pairs = _mm256_maddubs_epi16(unsigned_, signed_); /* 4-bit values: cannot saturate */
    return _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
}

AVX2 static void int4_avx2(const matrix *m, int row, int rows, const input *in, int tokens, float *out, int stride) {
    int steps = m->columns / QUANTUM, per_group = m->group / QUANTUM;
    const __m256i nibble = _mm256_set1_epi8(15);
    for (int block = 0; block < rows; block += ROWS) {
        const uint8_t *weights = int4_block(m, row + block);
        const uint16_t *scales = int4_scales(m, row + block);
        for (int t = 0; t < tokens; t++) {
            __m256 total[2] = {_mm256_setzero_ps(), _mm256_setzero_ps()};
            for (int first = 0, g = 0; first < steps; first += per_group, g++) {
                __m256i hi[2] = {_mm256_setzero_si256(), _mm256_setzero_si256()}, lo[2] = {hi[0], hi[0]};
                for (int s = first; s < first + per_group && s < steps; s++) {
                    const int8_t *xh = in[t].hi + 8 * s, *xl = in[t].lo + 8 * s;
                    _mm_prefetch((const char *)(weights + s * 64) + AHEAD, _MM_HINT_T1);
                    for (int half = 0; half < 2; half++) {
                        __m256i both = _mm256_loadu_si256((const __m256i *)(weights + s * 64 + 32 * half));
                        __m256i a = _mm256_and_si256(both, nibble);
                        __m256i b = _mm256_and_si256(_mm256_srli_epi16(both, 4), nibble);
                        hi[half] = dot_bytes(dot_bytes(hi[half], a, quad(xh)), b, quad(xh + 4));
                        lo[half] = dot_bytes(dot_bytes(lo[half], a, quad(xl)), b, quad(xl + 4));
                    }
                }
                __m256i offset = _mm256_set1_epi32(8 * in[t].group_sums[g]);
                for (int half = 0; half < 2; half++) {
                    __m256i sum = _mm256_sub_epi32(_mm256_add_epi32(_mm256_slli_epi32(hi[half], 8), lo[half]), offset);
                    __m128i raw = _mm_loadu_si128((const __m128i *)(scales + g * ROWS + 8 * half));
                    __m256 scale = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(raw), 16));
                    total[half] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(sum), scale, total[half]);
                }
            }
            __m256 scale = _mm256_set1_ps(in[t].scale);
            _mm256_storeu_ps(out + t * stride + block, _mm256_mul_ps(total[0], scale));
            _mm256_storeu_ps(out + t * stride + block + 8, _mm256_mul_ps(total[1], scale));
        }
    }
}

/* Four vectors to the four sums of their elements. The order of addition is fixed. */
AVX512 static inline __m128i sum4_int(const __m512i v[4]) {
    __m512i a = _mm512_add_epi32(_mm512_unpacklo_epi32(v[0], v[1]), _mm512_unpackhi_epi32(v[0], v[1]));
    __m512i b = _mm512_add_epi32(_mm512_unpacklo_epi32(v[2], v[3]), _mm512_unpackhi_epi32(v[2], v[3]));
    __m512i c = _mm512_add_epi32(_mm512_unpacklo_epi64(a, b), _mm512_unpackhi_epi64(a, b));
    __m256i d = _mm256_add_epi32(_mm512_castsi512_si256(c), _mm512_extracti64x4_epi64(c, 1));
    return _mm_add_epi32(_mm256_castsi256_si128(d), _mm256_extracti128_si256(d, 1));
}

AVX512 static inline __m128 sum4_float(const __m512 v[4]) {
    __m512 a = _mm512_add_ps(_mm512_unpacklo_ps(v[0], v[1]), _mm512_unpackhi_ps(v[0], v[1]));
    __m512 b = _mm512_add_ps(_mm512_unpacklo_ps(v[2], v[3]), _mm512_unpackhi_ps(v[2], v[3]));
    __m512d low = _mm512_unpacklo_pd(_mm512_castps_pd(a), _mm512_castps_pd(b));
    __m512d high = _mm512_unpackhi_pd(_mm512_castps_pd(a), _mm512_castps_pd(b));
    __m512 c = _mm512_add_ps(_mm512_castpd_ps(low), _mm512_castpd_ps(high));
    __m256 d = _mm256_add_ps(_mm512_castps512_ps256(c), _mm512_extractf32x8_ps(c, 1));
    return _mm_add_ps(_mm256_castps256_ps128(d), _mm256_extractf128_ps(d, 1));
}

/* One row against one token, memory read straight forwards: four rows side by side would share cache sets. */
AVX512 static inline __m512 bf16_row(const uint16_t *w, int k, const input *in) {
    const __m512i mask = _mm512_set1_epi32((int)0xffff0000);
    __m512 even[2], odd[2];
    even[0] = even[1] = odd[0] = odd[1] = _mm512_setzero_ps();
    int i = 0;
    for (; i + 64 <= k; i += 64) {
#pragma GCC unroll 2
        for (int a = 0; a < 2; a++) {
            __m512i pair = _mm512_loadu_si512(w + i + 32 * a);
            _mm_prefetch((const char *)(w + i + 32 * a) + AHEAD, _MM_HINT_T1);
            __m512 x = _mm512_loadu_ps(in->even + i / 2 + 16 * a), y = _mm512_loadu_ps(in->odd + i / 2 + 16 * a);
            even[a] = _mm512_fmadd_ps(_mm512_castsi512_ps(_mm512_slli_epi32(pair, 16)), x, even[a]);
            odd[a] = _mm512_fmadd_ps(_mm512_castsi512_ps(_mm512_and_si512(pair, mask)), y, odd[a]);
        }
    }
    for (int a = 0; i < k; i += 32, a++) {
        __mmask32 there = k - i >= 32 ? ~0u : (1u << (k - i)) - 1;
        __m512i pair = _mm512_maskz_loadu_epi16(there, w + i);
        __m512 x = _mm512_loadu_ps(in->even + i / 2), y = _mm512_loadu_ps(in->odd + i / 2);
        even[a] = _mm512_fmadd_ps(_mm512_castsi512_ps(_mm512_slli_epi32(pair, 16)), x, even[a]);
        odd[a] = _mm512_fmadd_ps(_mm512_castsi512_ps(_mm512_and_si512(pair, mask)), y, odd[a]);
    }
    return _mm512_add_ps(_mm512_add_ps(even[0], even[1]), _mm512_add_ps(odd[0], odd[1]));
}

AVX512 static void bf16_avx512(const matrix *m, int row, int rows, const input *in, int tokens, float *out, int stride) {
    for (int r = 0; r < rows; r += 4) {
        const uint16_t *w[4];
        for (int j = 0; j < 4; j++)
            w[j] = (const uint16_t *)m->weights + (size_t)(row + (r + j < rows ? r + j : rows - 1)) * m->columns;
        for (int t = 0; t < tokens; t++) {
            __m512 sums[4];
#pragma GCC unroll 4
            for (int j = 0; j < 4; j++)
                sums[j] = bf16_row(w[j], m->columns, in + t);
            _mm_storeu_ps(out + t * stride + r, sum4_float(sums));
        }
    }
}

/* Sums of (weight + 128) * x, the two halves of x apart. K <= 65536: 65536 * 255 * 128 fits in 32 bits. */
AVX512 static inline void int8_row(const int8_t *w, int k, const input *in, __m512i *high, __m512i *low) {
    const __m512i sign = _mm512_set1_epi8((char)0x80);
    __m512i hi[2], lo[2];
    hi[0] = hi[1] = lo[0] = lo[1] = _mm512_setzero_si512();
    int i = 0;
    for (; i + 128 <= k; i += 128) {
#pragma GCC unroll 2
        for (int a = 0; a < 2; a++) {
            __m512i v = _mm512_xor_si512(_mm512_loadu_si512(w + i + 64 * a), sign);
            _mm_prefetch((const char *)(w + i + 64 * a) + AHEAD, _MM_HINT_T1);
            hi[a] = _mm512_dpbusd_epi32(hi[a], v, _mm512_loadu_si512(in->hi + i + 64 * a));
            lo[a] = _mm512_dpbusd_epi32(lo[a], v, _mm512_loadu_si512(in->lo + i + 64 * a));
        }
    }
    for (int a = 0; i < k; i += 64, a++) {
        __mmask64 there = k - i >= 64 ? ~0ull : (1ull << (k - i)) - 1;
        __m512i v = _mm512_xor_si512(_mm512_maskz_loadu_epi8(there, w + i), sign); /* meets zeros beyond k */
        hi[a] = _mm512_dpbusd_epi32(hi[a], v, _mm512_loadu_si512(in->hi + i));
        lo[a] = _mm512_dpbusd_epi32(lo[a], v, _mm512_loadu_si512(in->lo + i));
    }
    *high = _mm512_add_epi32(hi[0], hi[1]);
    *low = _mm512_add_epi32(lo[0], lo[1]);
}

AVX512 static void int8_avx512(const matrix *m, int row, int rows, const input *in, int tokens, float *out, int stride) {
    for (int r = 0; r < rows; r += 4) {
        const int8_t *w[4];
        float own[4];
        for (int j = 0; j < 4; j++) {
            int at = row + (r + j < rows ? r + j : rows - 1);
            w[j] = (const int8_t *)m->weights + (size_t)at * m->columns;
            own[j] = ((const float *)m->scales)[at];
        }
        for (int t = 0; t < tokens; t++) {
            __m512i hi[4], lo[4];
#pragma GCC unroll 4
            for (int j = 0; j < 4; j++)
                int8_row(w[j], m->columns, in + t, hi + j, lo + j);
            __m256i wide = _mm256_slli_epi64(_mm256_cvtepi32_epi64(sum4_int(hi)), 8);
            wide = _mm256_add_epi64(wide, _mm256_cvtepi32_epi64(sum4_int(lo)));
            wide = _mm256_sub_epi64(wide, _mm256_set1_epi64x(128 * in[t].sum));
            __m128 scale = _mm_mul_ps(_mm_loadu_ps(own), _mm_set1_ps(in[t].scale));
            _mm_storeu_ps(out + t * stride + r, _mm_mul_ps(_mm256_cvtepi64_ps(wide), scale));
        }
    }
}

AVX512 static inline __m512i quad512(const int8_t *x) {
    int32_t four;
    memcpy(&four, x, 4);
    return _mm512_set1_epi32(four);
}

/* One block of 16 rows; `count` is the number of 64-byte steps a group has, known where the caller is compiled. */
AVX512 static inline __attribute__((always_inline)) __m512 int4_groups(const uint8_t *w, const uint16_t *scales,
                                                                        int groups, const int count, const input *in) {
    const __m512i low = _mm512_set1_epi8(15), high = _mm512_set1_epi8((char)0xf0), zero = _mm512_setzero_si512();
    const int8_t *xh = in->hi, *xl = in->lo;
    __m512 total = _mm512_setzero_ps();
    for (int g = 0; g < groups; g++, w += 64 * count, xh += 8 * count, xl += 8 * count) {
        __m512i hi = zero, lo = zero, hi16 = zero, lo16 = zero;
#pragma GCC unroll 8
        for (int i = 0; i < count; i++) {
            __m512i both = _mm512_loadu_si512(w + i * 64);
            _mm_prefetch((const char *)(w + i * 64) + AHEAD4, _MM_HINT_T1);
            __m512i a = _mm512_and_si512(both, low), b = _mm512_and_si512(both, high);
            hi = _mm512_dpbusd_epi32(hi, a, quad512(xh + 8 * i));
            lo = _mm512_dpbusd_epi32(lo, a, quad512(xl + 8 * i));
            hi16 = _mm512_dpbusd_epi32(hi16, b, quad512(xh + 8 * i + 4));
            lo16 = _mm512_dpbusd_epi32(lo16, b, quad512(xl + 8 * i + 4));
        }
        /* b was left where it lies in the byte, 16 times its value: exact to shift back once */
        __m512i sum = _mm512_add_epi32(_mm512_slli_epi32(hi, 8), _mm512_slli_epi32(hi16, 4));
        sum = _mm512_add_epi32(sum, _mm512_add_epi32(lo, _mm512_srai_epi32(lo16, 4)));
        sum = _mm512_sub_epi32(sum, _mm512_set1_epi32(8 * in->group_sums[g]));
        __m256i raw = _mm256_loadu_si256((const __m256i *)(scales + g * ROWS));
        __m512 scale = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(raw), 16));
        total = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum), scale, total);
    }
    return _mm512_mul_ps(total, _mm512_set1_ps(in->scale));
}

AVX512 static __m512 int4_32(const uint8_t *w, const uint16_t *s, int n, const input *in) { return int4_groups(w, s, n, 4, in); }
AVX512 static __m512 int4_64(const uint8_t *w, const uint16_t *s, int n, const input *in) { return int4_groups(w, s, n, 8, in); }
AVX512 static __m512 int4_128(const uint8_t *w, const uint16_t *s, int n, const input *in) { return int4_groups(w, s, n, 16, in); }

AVX512 static void int4_avx512(const matrix *m, int row, int rows, const input *in, int tokens, float *out, int stride) {
    __m512 (*block)(const uint8_t *, const uint16_t *, int, const input *) =
        m->group == 32 ? int4_32 : m->group == 64 ? int4_64 : int4_128;
    for (int r = 0; r < rows; r += ROWS)
        for (int t = 0; t < tokens; t++)
            _mm512_storeu_ps(out + t * stride + r,
                             block(int4_block(m, row + r), int4_scales(m, row + r), m->columns / m->group, in + t));
}
#endif

#include "decode.h"

/* ---- Dispatch ---- */

enum { PORTABLE, WITH_AVX2, WITH_AVX512 };

static struct {
    const char *name;
    int level;
    kernel_fn kernels[3];
    void (*quantise)(const float *x, int n, int group, input *in);
    norm_fn norm;
    rotate_fn rotate;
    combine_fn combine;
    attend_fn attend;
} chosen;

static void quantise_plain(const float *x, int n, int group, input *in) { quantise_any(x, n, group, in); }

static void choose(int level) {
    chosen.name = "portable";
    chosen.level = PORTABLE;
    chosen.kernels[BF16] = bf16_plain;
    chosen.kernels[INT8] = int8_plain;
    chosen.kernels[INT4] = int4_plain;
    chosen.quantise = quantise_plain;
    chosen.norm = norm_plain;
    chosen.rotate = rotate_plain;
    chosen.combine = combine_plain;
    chosen.attend = attend_plain;
#ifdef X86
    __builtin_cpu_init();
    int avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    int avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                 __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
                 __builtin_cpu_supports("avx512vnni");
    if (avx2 && level >= 1) {
        chosen.name = "avx2";
        chosen.level = WITH_AVX2;
        chosen.kernels[BF16] = bf16_avx2;
        chosen.kernels[INT8] = int8_avx2;
        chosen.kernels[INT4] = int4_avx2;
        chosen.quantise = quantise_avx2;
        chosen.norm = norm_avx2;
        chosen.rotate = rotate_avx2;
        chosen.combine = combine_avx2;
        chosen.attend = attend_avx2;
    }
    if (avx2 && avx512 && level >= 2) {
        chosen.name = "avx512-vnni";
        chosen.level = WITH_AVX512;
        chosen.kernels[BF16] = bf16_avx512;
        chosen.kernels[INT8] = int8_avx512;
        chosen.kernels[INT4] = int4_avx512;
        chosen.quantise = quantise_avx512;
        chosen.norm = norm_avx512;
        chosen.rotate = rotate_avx512;
        chosen.combine = combine_avx512;
        chosen.attend = attend_avx512;
    }
#else
    (void)level;
#endif
}

static void choose_best(void) {
    if (!chosen.name)
        choose(2);
}

/* 0 portable, 1 AVX2, 2 AVX-512: the best up to `level` that this processor has, for tests. Returns its name. */
const char *foregate_kernels(int level) {
    if (level >= 0)
        choose(level);
    choose_best();
    return chosen.name;
}

/* ---- Memory of one call ---- */

typedef struct {
    char *memory;
    size_t size, used;
} arena;

static __thread arena scratch;

/* Room for `size` bytes in all; what an earlier call had is gone. 0 if there is no memory. */
static int reserve(size_t size) {
    scratch.used = 0;
    if (size <= scratch.size)
        return 1;
    free(scratch.memory);
    scratch.size = 0;
    scratch.memory = aligned_alloc(64, (size + 63) / 64 * 64);
    if (scratch.memory)
        scratch.size = size;
    return scratch.memory != NULL;
}

static void *carve(size_t size) {
    void *found = scratch.memory + scratch.used;
    scratch.used += (size + 63) / 64 * 64;
    return found;
}

static size_t input_bytes(const matrix *m) {
    size_t n = round_up(m->columns, STEP);
    return n * 12 + (m->group ? n / m->group * 4 + 4 : 0) + 64 * 8;
}

static void make_input(const matrix *m, const float *x, input *in) {
    int n = round_up(m->columns, STEP); /* x is padded to as much */
    if (m->dtype == BF16) {
        in->even = carve(n * 2);
        in->odd = carve(n * 2);
        split_floats(x, n, in);
        return;
    }
    in->hi = carve(n);
    in->lo = carve(n);
    in->wide = carve(n * 2);
    in->group_sums = m->group ? carve(((size_t)n / m->group + 1) * 4) : NULL;
    chosen.quantise(x, n, m->group, in);
}

ALWAYS void load_row(const void *x, int dtype, int row, int n, float *restrict out, int padded) {
    if (dtype == F32)
        memcpy(out, (const float *)x + (size_t)row * n, (size_t)n * 4);
    else
        for (int i = 0; i < n; i++)
            out[i] = from_bf16(((const uint16_t *)x)[(size_t)row * n + i]);
    memset(out + n, 0, (size_t)(padded - n) * 4);
}

static void store(void *out, int dtype, size_t at, const float *values, int n) {
    if (dtype == F32)
        memcpy((float *)out + at, values, (size_t)n * 4);
    else
        for (int i = 0; i < n; i++)
            ((uint16_t *)out)[at + i] = to_bf16(values[i]);
}

static size_t row_bytes(const matrix *m) {
    return m->dtype == BF16 ? (size_t)m->columns * 2 : m->dtype == INT8 ? (size_t)m->columns : (size_t)m->columns / 2;
}

/* Rows of one chunk: a multiple of ROWS whose weights are about CHUNK_BYTES. */
static int chunk_rows(const matrix *m, int matrices) {
    size_t rows = CHUNK_BYTES / (row_bytes(m) * matrices + 1);
    return rows < ROWS ? ROWS : rows > 256 ? 256 : (int)rows / ROWS * ROWS;
}

/* ---- One matrix ---- */

typedef struct {
    const matrix *m;
    const input *in;
    int tokens, step;
    void *out;
    int out_dtype;
    int width; /* of a row of out */
} product;

enum { MOST_TOKENS = 16 };

static void product_chunk(void *context, int chunk) {
    const product *p = context;
    int row = chunk * p->step, rows = p->m->rows - row < p->step ? p->m->rows - row : p->step;
    int stride = round_up(p->step, ROWS);
    float values[MOST_TOKENS * 256];
    chosen.kernels[p->m->dtype](p->m, row, rows, p->in, p->tokens, values, stride);
    for (int t = 0; t < p->tokens; t++) {
        int real = p->width - row < rows ? p->width - row : rows;
        if (real > 0)
            store(p->out, p->out_dtype, (size_t)t * p->width + row, values + t * stride, real);
    }
}

static void multiply(const matrix *m, const input *in, int tokens, void *out, int out_dtype, int width, int threads) {
    product p = {m, in, tokens, chunk_rows(m, 1), out, out_dtype, width};
    pool_run(product_chunk, &p, (m->rows + p.step - 1) / p.step, threads);
}

static int refuse(const matrix *m, int tokens) {
    int ok = tokens >= 1 && tokens <= MOST_TOKENS && m->rows > 0 && m->columns > 0 && m->columns <= 65536;
    if (m->dtype == INT4)
        ok = ok && (m->group == 32 || m->group == 64 || m->group == 128) &&
             m->rows % ROWS == 0 && m->columns % m->group == 0;
    return !(ok && m->dtype >= BF16 && m->dtype <= INT4);
}

/* out [T, width] = x [T, inputs] * m^T. x and out are F32 or BF16. int4 pads: inputs <= K, width <= N.
 * Returns 0, 1 for arguments that it does not take, 2 where memory is missing. */
int foregate_linear(const matrix *m, const void *x, int inputs, int x_dtype, int tokens, void *out, int width,
                    int out_dtype, int threads) {
    choose_best();
    if (refuse(m, tokens) || inputs > m->columns || width > m->rows)
        return 1;
    int padded = round_up(m->columns, STEP);
    if (!reserve(tokens * input_bytes(m) + (size_t)padded * 4 + 128))
        return 2;
    input in[MOST_TOKENS];
    float *row = carve((size_t)padded * 4);
    for (int t = 0; t < tokens; t++) {
        load_row(x, x_dtype, t, inputs, row, padded);
        make_input(m, row, in + t);
    }
    multiply(m, in, tokens, out, out_dtype, width, threads);
    return 0;
}

/* ---- One expert: down(silu(gate x) * up x) ---- */

typedef struct {
    const matrix *gate, *up;
    const input *in;
    int tokens, step;
    float *hidden; /* [T, padded] */
    int padded, width;
} gated;

static inline float silu_times(float g, float u) { return g / (1.0f + expf(-g)) * u; }

#ifdef X86
/* exp by the usual range reduction and a polynomial of degree 6; relative error below 2e-7 where it is normal. */
AVX512 static inline __m512 exp512(__m512 x) {
    x = _mm512_min_ps(_mm512_max_ps(x, _mm512_set1_ps(-87.3f)), _mm512_set1_ps(88.3f));
    __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)), 8);
    __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), x);
    r = _mm512_fnmadd_ps(n, _mm512_set1_ps(-2.12194440e-4f), r);
    __m512 p = _mm512_set1_ps(1.9875691500e-4f);
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.3981999507e-3f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(8.3334519073e-3f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(4.1665795894e-2f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.6666665459e-1f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(5.0000001201e-1f));
    p = _mm512_fmadd_ps(p, _mm512_mul_ps(r, r), _mm512_add_ps(r, _mm512_set1_ps(1.0f)));
    return _mm512_scalef_ps(p, n);
}

AVX512 static void silu_avx512(const float *g, const float *u, float *out, int n) {
    for (int i = 0; i < n; i += 16) {
        __m512 x = _mm512_loadu_ps(g + i);
        __m512 below = _mm512_add_ps(_mm512_set1_ps(1.0f), exp512(_mm512_sub_ps(_mm512_setzero_ps(), x)));
        __m512 y = _mm512_mul_ps(_mm512_div_ps(x, below), _mm512_loadu_ps(u + i));
        __mmask16 nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q); /* max and min have swallowed it */
        _mm512_storeu_ps(out + i, _mm512_mask_mov_ps(y, nan, x));
    }
}
#endif

static void activate(const float *g, const float *u, float *out, int rows) {
#ifdef X86
    if (chosen.level == WITH_AVX512) {
        silu_avx512(g, u, out, round_up(rows, ROWS)); /* out is padded, and what is beyond is cleared below */
        return;
    }
#endif
    for (int r = 0; r < rows; r++)
        out[r] = silu_times(g[r], u[r]);
}

static void gated_chunk(void *context, int chunk) {
    const gated *p = context;
    int row = chunk * p->step, rows = p->gate->rows - row < p->step ? p->gate->rows - row : p->step;
    int stride = round_up(p->step, ROWS);
    float g[MOST_TOKENS * 256], u[MOST_TOKENS * 256], h[256];
    chosen.kernels[p->gate->dtype](p->gate, row, rows, p->in, p->tokens, g, stride);
    chosen.kernels[p->up->dtype](p->up, row, rows, p->in, p->tokens, u, stride);
    int real = p->width - row < rows ? p->width - row : rows;
    for (int t = 0; t < p->tokens && real > 0; t++) {
        for (int r = real; r < round_up(real, ROWS); r++)
            g[t * stride + r] = u[t * stride + r] = 0.0f;
        activate(g + t * stride, u + t * stride, h, real);
        memcpy(p->hidden + (size_t)t * p->padded + row, h, (size_t)real * 4);
    }
}

/* out [T, width] = down(silu(gate x) * up x), x [T, inputs]; `hidden` real rows of gate and up. As foregate_linear. */
int foregate_expert(const matrix *gate, const matrix *up, const matrix *down, int hidden, const void *x, int inputs,
                    int x_dtype, int tokens, void *out, int width, int out_dtype, int threads) {
    choose_best();
    if (refuse(gate, tokens) || refuse(up, tokens) || refuse(down, tokens) || gate->rows != up->rows ||
        gate->columns != up->columns || gate->dtype != up->dtype || gate->group != up->group ||
        inputs > gate->columns || hidden > gate->rows || hidden > down->columns || width > down->rows)
        return 1;
    int wide = round_up(gate->columns, STEP), padded = round_up(down->columns, STEP);
    size_t need = tokens * (input_bytes(gate) + input_bytes(down) + (size_t)padded * 4) + (size_t)wide * 4 + 256;
    if (!reserve(need))
        return 2;
    input in[MOST_TOKENS];
    float *row = carve((size_t)wide * 4);
    float *between = carve((size_t)tokens * padded * 4);
    for (int t = 0; t < tokens; t++) {
        load_row(x, x_dtype, t, inputs, row, wide);
        make_input(gate, row, in + t);
        memset(between + (size_t)t * padded + hidden, 0, (size_t)(padded - hidden) * 4);
    }
    gated p = {gate, up, in, tokens, chunk_rows(gate, 2), between, padded, hidden};
    pool_run(gated_chunk, &p, (gate->rows + p.step - 1) / p.step, threads);
    for (int t = 0; t < tokens; t++)
        make_input(down, between + (size_t)t * padded, in + t);
    multiply(down, in, tokens, out, out_dtype, width, threads);
    return 0;
}

/* ---- Several experts for one token: all rows of all of them are one job, so threads meet twice ---- */

enum { MOST_EXPERTS = 64 };

typedef struct {
    matrix gate, up, down;
} expert;

typedef struct {
    const gated *parts;
    int chunks; /* of each expert */
} gated_all;

typedef struct {
    const product *parts;
    int chunks;
} product_all;

static void gated_all_chunk(void *context, int chunk) {
    const gated_all *all = context;
    gated_chunk((void *)(all->parts + chunk / all->chunks), chunk % all->chunks);
}

static void product_all_chunk(void *context, int chunk) {
    const product_all *all = context;
    product_chunk((void *)(all->parts + chunk / all->chunks), chunk % all->chunks);
}

static int same_form(const matrix *a, const matrix *b) {
    return a->dtype == b->dtype && a->rows == b->rows && a->columns == b->columns && a->group == b->group;
}

/* The experts of one token, in two parts: between them every result of the first is needed. */
typedef struct {
    input in, between[MOST_EXPERTS];
    gated parts[MOST_EXPERTS];
    product last[MOST_EXPERTS];
    gated_all first;
    product_all second;
    int count;
} token_experts;

/* What foregate_experts is given, looked at and laid out in the memory of this call. 0, or its answer. */
static int prepare_experts(token_experts *t, const expert *const *experts, void *const *outs, int64_t count,
                           int64_t hidden, const void *x, int64_t inputs, int64_t width, int64_t dtype) {
    choose_best();
    if (count < 1 || count > MOST_EXPERTS)
        return 1;
    const matrix *gate = &experts[0]->gate, *down = &experts[0]->down;
    for (int e = 0; e < count; e++)
        if (!same_form(&experts[e]->gate, gate) || !same_form(&experts[e]->up, gate) ||
            !same_form(&experts[e]->down, down))
            return 1;
    if (refuse(gate, 1) || refuse(down, 1) || inputs > gate->columns || hidden > gate->rows ||
        hidden > down->columns || width > down->rows)
        return 1;
    int wide = round_up(gate->columns, STEP), padded = round_up(down->columns, STEP);
    if (!reserve(input_bytes(gate) + (size_t)wide * 4 + 256 + count * (input_bytes(down) + (size_t)padded * 4 + 64)))
        return 2;
    float *row = carve((size_t)wide * 4);
    load_row(x, (int)dtype, 0, inputs, row, wide);
    make_input(gate, row, &t->in);
    for (int e = 0; e < count; e++) {
        float *values = carve((size_t)padded * 4);
        memset(values + hidden, 0, (size_t)(padded - hidden) * 4);
        t->parts[e] =
            (gated){&experts[e]->gate, &experts[e]->up, &t->in, 1, chunk_rows(gate, 2), values, padded, hidden};
        t->last[e] = (product){&experts[e]->down, t->between + e, 1, chunk_rows(down, 1), outs[e], (int)dtype, width};
    }
    t->first = (gated_all){t->parts, (gate->rows + t->parts->step - 1) / t->parts->step};
    t->second = (product_all){t->last, (down->rows + t->last->step - 1) / t->last->step};
    t->count = (int)count;
    return 0;
}

static void link_experts(token_experts *t) {
    for (int e = 0; e < t->count; e++)
        make_input(t->last[e].m, t->parts[e].hidden, t->between + e);
}

/* outs[i] [width] is what foregate_expert gives for experts[i], which all have one form, and x [1, inputs]; all of
 * `dtype`. */
int foregate_experts(const expert *const *experts, void *const *outs, int64_t count, int64_t hidden, const void *x,
                     int64_t inputs, int64_t width, int64_t dtype, int64_t threads) {
    token_experts t;
    int code = prepare_experts(&t, experts, outs, count, hidden, x, inputs, width, dtype);
    if (code)
        return code;
    pool_run(gated_all_chunk, &t.first, t.first.chunks * t.count, threads);
    link_experts(&t);
    pool_run(product_all_chunk, &t.second, t.second.chunks * t.count, threads);
    return 0;
}

static struct {
    token_experts experts;
    arena memory; /* not that of a thread: other calls come in between */
    int threads, forks;
    int64_t busy; /* as pool_busy was */
    _Atomic int64_t number;
    pthread_t owner;
} begun; /* by whoever has claimed the pool, and left it */

static void swap_memory(void) {
    arena mine = scratch;
    scratch = begun.memory;
    begun.memory = mine;
}

enum { NOBODY = 5 };

/* As foregate_experts, by other threads while the caller goes on: foregate_experts_end waits for it and helps. NOBODY,
 * and nothing done, where there is no other thread or it has something to do. Experts and outs[i] stay where they are. */
int foregate_experts_begin(const expert *const *experts, void *const *outs, int64_t count, int64_t hidden,
                           const void *x, int64_t inputs, int64_t width, int64_t dtype, int64_t threads) {
    const int there = pool_claim((int)threads);
    if (!there)
        return NOBODY;
    begun.threads = there;
    swap_memory();
    int code = prepare_experts(&begun.experts, experts, outs, count, hidden, x, inputs, width, dtype);
    swap_memory();
    if (code) {
        pool_release();
        return code;
    }
    begun.owner = pthread_self();
    begun.forks = atomic_load(&forks);
    begun.busy = pool_busy();
    atomic_fetch_add(&begun.number, 1);
    const gated_all *first = &begun.experts.first;
    pool_hand_out(gated_all_chunk, (void *)first, first->chunks * begun.experts.count, begun.threads);
    pool_keep();
    return 0;
}

static int as_int(int64_t ns) { return ns < 0 ? 0 : ns < INT_MAX ? (int)ns : INT_MAX; }

/* Whether what has begun is that of this number, or for 0 of this thread. */
static int is_begun(int64_t number) {
    return number ? number == atomic_load(&begun.number) : pthread_equal(begun.owner, pthread_self());
}

static int take_back(int64_t number) {
    if (!is_begun(number) || !pool_return())
        return 0;
    if (is_begun(number))
        return 1;
    pool_keep(); /* that was another */
    return 0;
}

/* Nobody is sure to end what has begun, of this `number`: from now on others may use the pool. */
int foregate_experts_leave(int64_t number) {
    if (is_begun(number))
        pool_leave();
    return 0;
}

static void run_alone(chunk_fn fn, void *context, int chunks) {
    for (int chunk = 0; chunk < chunks; chunk++)
        fn(context, chunk);
}

/* After a foregate_experts_begin that answered 0, once: of this `number` (`residents`), or for 0 the last of this thread.
 * For how many ns anybody has computed since; -1, and nothing done, where what had begun was dropped. */
int foregate_experts_end(int64_t number) {
    if (!take_back(number))
        return -1;
    gated_all *first = &begun.experts.first;
    product_all *second = &begun.experts.second;
    /* a child has neither the pool nor what others had taken of the first part */
    const int forked = begun.forks != atomic_load(&forks), computed = as_int(pool_busy() - begun.busy);
    if (forked)
        run_alone(gated_all_chunk, first, first->chunks * begun.experts.count);
    else
        pool_run_rest();
    swap_memory();
    link_experts(&begun.experts);
    swap_memory();
    if (forked) {
        run_alone(product_all_chunk, second, second->chunks * begun.experts.count);
    } else {
        pool_hand_out(product_all_chunk, second, second->chunks * begun.experts.count, begun.threads);
        pool_run_rest();
    }
    pool_release();
    return computed;
}

/* What has begun, `number` as above, is over, if it was kept from its end: experts and outputs are nobody's any more. */
int foregate_experts_drop(int64_t number) {
    if (!take_back(number))
        return 0;
    if (begun.forks == atomic_load(&forks))
        pool_run_rest();
    pool_release();
    return 0;
}

/* ---- Between the matrices ---- */

/* out [rows, n] = w * bf16(x / sqrt(mean(x^2) + eps)), all bf16. Returns 0, or 1 for a width that it does not take. */
int foregate_rms_norm(const uint16_t *x, const uint16_t *w, uint16_t *out, int rows, int n, float eps) {
    choose_best();
    if (n < 16 || n % 16)
        return 1;
    for (int r = 0; r < rows; r++)
        chosen.norm(x + (size_t)r * n, w, out + (size_t)r * n, n, eps);
    return 0;
}

enum { MOST_COMBINED = 64 };

/* out [n] = the sum of x [rows, n] (bf16), each row times its weight (F32 or BF16). Returns 0, or 1 for a shape that it
 * does not take. */
int foregate_combine(const uint16_t *x, const void *weights, int64_t dtype, int64_t rows, int64_t n, uint16_t *out) {
    choose_best();
    float w[MOST_COMBINED];
    if (n < 16 || n % 16 || rows < 1 || rows > MOST_COMBINED || (dtype != F32 && dtype != BF16))
        return 1;
    for (int r = 0; r < rows; r++)
        w[r] = dtype == F32 ? ((const float *)weights)[r] : from_bf16(((const uint16_t *)weights)[r]);
    chosen.combine(x, w, rows, n, out);
    return 0;
}

static int refuse_attention(const attention *a, int heads) {
    return heads < 1 || a->positions < 1 || a->width < 16 || a->width % 16 || a->width > MOST_WIDTH ||
           a->out_width < 16 || a->out_width % 16 || a->out_width > MOST_WIDTH || a->group < 1 ||
           (int64_t)a->group * a->width > MOST_VALUES || (int64_t)a->group * a->out_width > MOST_VALUES;
}

static void attend_chunk(void *context, int head) { chosen.attend(context, head); }

static void attend_all(attention *a, int heads, int threads) {
    int64_t products = (int64_t)heads * a->group * a->positions * (a->width + a->out_width);
    pool_run(attend_chunk, a, heads, products < WORTH_A_THREAD ? 1 : threads);
}

/* Attention of one token; `a->scores` is filled in here. Returns as foregate_linear. */
int foregate_attend(attention *a, int heads, int threads) {
    choose_best();
    if (refuse_attention(a, heads))
        return 1;
    if (!reserve((size_t)heads * a->group * a->positions * 4))
        return 2;
    a->scores = carve(0);
    attend_all(a, heads, threads);
    return 0;
}

/* In sixteen lanes, which a compiler may not make of one sum. */
ALWAYS float dot_of(const float *a, const float *b, int n) {
    float sums[16] = {0}, sum = 0.0f;
    int i = 0;
    for (; i + 16 <= n; i += 16)
        for (int j = 0; j < 16; j++)
            sums[j] += a[i + j] * b[i + j];
    for (; i < n; i++)
        sum += a[i] * b[i];
    for (int j = 0; j < 16; j++)
        sum += sums[j];
    return sum;
}

#include "block.h"
#include "rows.h"
#include "route.h"
#include "layer.h"
#include "head.h"
#include "predict.h"
#include "history.h"
#include "match.h"
#include "echo.h"

/* ---- The bar: reading memory and nothing else ---- */

typedef struct {
    const char *memory;
    size_t nbytes;
    _Atomic uint64_t sum;
} reading;

enum { READ_CHUNK = 256 << 10 };

#ifdef X86
AVX2 static uint64_t read_avx2(const char *memory, size_t nbytes) {
    __m256i sums[4];
    for (int i = 0; i < 4; i++)
        sums[i] = _mm256_setzero_si256();
    for (size_t at = 0; at + 256 <= nbytes; at += 256)
        for (int i = 0; i < 8; i++) {
            if (!(i & 1))
                _mm_prefetch(memory + at + 32 * i + AHEAD, _MM_HINT_T1);
            sums[i & 3] = _mm256_xor_si256(sums[i & 3], _mm256_loadu_si256((const __m256i *)(memory + at + 32 * i)));
        }
    __m256i all = _mm256_xor_si256(_mm256_xor_si256(sums[0], sums[1]), _mm256_xor_si256(sums[2], sums[3]));
    return (uint64_t)_mm256_extract_epi64(all, 0) ^ (uint64_t)_mm256_extract_epi64(all, 2);
}
#endif

static uint64_t read_plain(const char *memory, size_t nbytes) {
    uint64_t sum = 0, word;
    for (size_t at = 0; at + 8 <= nbytes; at += 8) {
        memcpy(&word, memory + at, 8);
        sum ^= word;
    }
    return sum;
}

static void read_chunk(void *context, int chunk) {
    reading *r = context;
    size_t begin = (size_t)chunk * READ_CHUNK, left = r->nbytes - begin;
    size_t count = left < READ_CHUNK ? left : READ_CHUNK;
#ifdef X86
    uint64_t sum = chosen.kernels[BF16] == bf16_plain ? read_plain(r->memory + begin, count)
                                                      : read_avx2(r->memory + begin, count);
#else
    uint64_t sum = read_plain(r->memory + begin, count);
#endif
    atomic_fetch_xor(&r->sum, sum);
}

/* Read `nbytes` of memory on `threads` threads. Returns a checksum, so that nobody optimises it away. */
uint64_t foregate_read(const void *memory, size_t nbytes, int threads) {
    choose_best();
    reading r = {memory, nbytes, 0};
    pool_run(read_chunk, &r, (int)((nbytes + READ_CHUNK - 1) / READ_CHUNK), threads);
    return r.sum;
}

/* ---- A matrix as numbers, for products with many tokens ---- */

typedef struct {
    const matrix *m;
    uint16_t *out;
    int width, rows, step;
} expansion;

/* Finite values only: scales are. */
static inline __attribute__((always_inline)) void int8_row_any(const int8_t *w, float scale, uint16_t *out, int n) {
    for (int k = 0; k < n; k++) {
        float value = (float)w[k] * scale;
        uint32_t bits;
        memcpy(&bits, &value, 4);
        out[k] = (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
    }
}

static void int8_row_plain(const int8_t *w, float scale, uint16_t *out, int n) { int8_row_any(w, scale, out, n); }

static void int4_row_plain(const matrix *m, int row, uint16_t *out, int from, int n) {
    const uint8_t *w = int4_block(m, row) + 4 * (row % ROWS);
    const uint16_t *scales = int4_scales(m, row) + row % ROWS;
    for (int k = from; k < n; k++) {
        uint8_t both = w[k / QUANTUM * 64 + k % 4];
        int value = (k & 4 ? both >> 4 : both & 15) - 8;
        out[k] = to_bf16((float)value * from_bf16(scales[k / m->group * ROWS]));
    }
}

#ifdef X86
AVX2 static void int8_row_avx2(const int8_t *w, float scale, uint16_t *out, int n) { int8_row_any(w, scale, out, n); }
AVX512 static void int8_row_avx512(const int8_t *w, float scale, uint16_t *out, int n) {
    int8_row_any(w, scale, out, n);
}

AVX2 static void int4_row_avx2(const matrix *m, int row, uint16_t *out, int n) {
    const uint8_t *w = int4_block(m, row) + 4 * (row % ROWS);
    const uint16_t *scales = int4_scales(m, row) + row % ROWS;
    const __m256i shifts = _mm256_setr_epi32(0, 0, 0, 0, 4, 4, 4, 4), nibble = _mm256_set1_epi32(15);
    int whole = n / QUANTUM, per_group = m->group / QUANTUM;
    for (int s = 0; s < whole; s++) {
        int32_t four;
        memcpy(&four, w + s * 64, 4);
        __m256i bytes = _mm256_cvtepu8_epi32(_mm_set1_epi32(four)); /* the four columns, twice */
        __m256i value = _mm256_and_si256(_mm256_srlv_epi32(bytes, shifts), nibble);
        __m256 scale = _mm256_set1_ps(from_bf16(scales[s / per_group * ROWS]));
        __m256 product = _mm256_mul_ps(_mm256_cvtepi32_ps(_mm256_sub_epi32(value, _mm256_set1_epi32(8))), scale);
        __m256i bits = _mm256_castps_si256(product);
        __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
        bits = _mm256_srli_epi32(_mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd), 16);
        __m128i packed = _mm_packus_epi32(_mm256_castsi256_si128(bits), _mm256_extracti128_si256(bits, 1));
        _mm_storeu_si128((__m128i *)(out + s * QUANTUM), packed);
    }
    int4_row_plain(m, row, out, whole * QUANTUM, n);
}
#endif

static void expand_row(const matrix *m, int row, uint16_t *out, int n) {
    const int8_t *w = (const int8_t *)m->weights + (size_t)row * m->columns;
#ifdef X86
    if (chosen.kernels[BF16] != bf16_plain) {
        if (m->dtype == INT4)
            int4_row_avx2(m, row, out, n);
        else
            (chosen.kernels[BF16] == bf16_avx2 ? int8_row_avx2 : int8_row_avx512)(w, ((const float *)m->scales)[row],
                                                                                 out, n);
        return;
    }
#endif
    if (m->dtype == INT4)
        int4_row_plain(m, row, out, 0, n);
    else
        int8_row_plain(w, ((const float *)m->scales)[row], out, n);
}

static void expand_chunk(void *context, int chunk) {
    const expansion *e = context;
    int first = chunk * e->step, last = first + e->step < e->rows ? first + e->step : e->rows;
    for (int row = first; row < last; row++)
        expand_row(e->m, row, e->out + (size_t)row * e->width, e->width);
}

/* The first `rows` rows and `width` columns of an int8 or int4 matrix as bf16 [rows, width]. Returns as above. */
int foregate_expand(const matrix *m, void *out, int rows, int width, int threads) {
    choose_best();
    if (refuse(m, 1) || m->dtype == BF16 || rows > m->rows || width > m->columns)
        return 1;
    expansion e = {m, out, width, rows, 64};
    pool_run(expand_chunk, &e, (rows + e.step - 1) / e.step, threads);
    return 0;
}

/* ---- Beside the caller ---- */

/* As pool_post and pool_join. */
int foregate_post(chunk_fn fn, void *context, int64_t threads) { return pool_post(fn, context, (int)threads); }

void foregate_join(void) { pool_join(); }

/* How many ns of this thread's last foregate_join went into jobs of others; told once. */
int foregate_helped(int64_t nothing) {
    (void)nothing;
    const int told = as_int(helped);
    helped = 0;
    return told;
}

/* library.py says when this is counted up. */
int foregate_version_11(void) { return 11; }
