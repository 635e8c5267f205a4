/* What a decode step does between its matrices: the norm, the rotary embedding, and attention of one token over the
 * cache. bf16 in and out, fp32 between. Included by kernels.c. */
#ifndef FOREGATE_DECODE_H
#define FOREGATE_DECODE_H

enum { MOST_VALUES = 16384, MOST_WIDTH = 1024 }; /* floats on the stack: of all heads of a group, of one head */
enum { WORTH_A_THREAD = 1 << 21 };               /* products of an attention from which on a second thread is woken */

#define INLINE static inline __attribute__((always_inline))

/* Sixteen lanes: the compiler makes them registers of whatever the target has. */
typedef float lanes __attribute__((vector_size(64), aligned(4), may_alias));
typedef uint32_t words __attribute__((vector_size(64), may_alias));
typedef uint16_t halves __attribute__((vector_size(32), aligned(2), may_alias));

#define LOAD(p) (*(const lanes *)(p))
#define WIDEN(p) ((lanes)(__builtin_convertvector(*(const halves *)(p), words) << 16))

INLINE float total_of(lanes sums) { /* always in the same order: halves onto halves */
    float *s = (float *)&sums;
    for (int width = 8; width; width /= 2)
        for (int j = 0; j < width; j++)
            s[j] += s[j + width];
    return s[0];
}

INLINE uint16_t nearest_bf16(float value) { /* as to_bf16, but without a branch: NaN stays NaN, quiet */
    uint32_t bits;
    memcpy(&bits, &value, 4);
    uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16, quiet = bits >> 16 | 0x40;
    return (uint16_t)((bits & 0x7fffffff) > 0x7f800000 ? quiet : rounded);
}

/* ---- RMSNorm: w * bf16(x / sqrt(mean(x^2) + eps)) ---- */

INLINE void norm_any(const uint16_t *x, const uint16_t *w, uint16_t *out, int n, float eps) {
    lanes sums = {0};
    for (int i = 0; i < n; i += 16)
        sums += WIDEN(x + i) * WIDEN(x + i);
    float inverse = 1.0f / sqrtf(total_of(sums) / (float)n + eps), value;
    for (int i = 0; i < n; i++) {
        uint32_t bits = (uint32_t)x[i] << 16, weight = (uint32_t)w[i] << 16;
        float scaled, by;
        memcpy(&value, &bits, 4);
        memcpy(&by, &weight, 4);
        bits = (uint32_t)nearest_bf16(value * inverse) << 16;
        memcpy(&scaled, &bits, 4);
        out[i] = nearest_bf16(by * scaled);
    }
}

typedef void (*norm_fn)(const uint16_t *x, const uint16_t *w, uint16_t *out, int n, float eps);

static void norm_plain(const uint16_t *x, const uint16_t *w, uint16_t *out, int n, float eps) {
    norm_any(x, w, out, n, eps);
}

/* ---- Rotary embedding of one head's first `turned` values, x cos + (-second half, first half) sin, each operation
 * rounded to bf16 as torch's are ---- */

INLINE uint32_t rounded(float value) { /* as nearest_bf16, still 32 bits wide */
    return (uint32_t)nearest_bf16(value) << 16;
}

INLINE float float_of(uint32_t bits) {
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

INLINE uint16_t turn(uint16_t x, uint16_t other, float sign, uint16_t cos, uint16_t sin) {
    float straight = float_of((uint32_t)x << 16) * float_of((uint32_t)cos << 16);
    float across = sign * float_of((uint32_t)other << 16) * float_of((uint32_t)sin << 16);
    return nearest_bf16(float_of(rounded(straight)) + float_of(rounded(across)));
}

INLINE void rotate_any(uint16_t *restrict x, const uint16_t *cos, const uint16_t *sin, int turned) {
    const int half = turned / 2;
    uint16_t *restrict y = x + half;
    for (int i = 0; i < half; i++) {
        uint16_t first = x[i], second = y[i];
        x[i] = turn(first, second, -1.0f, cos[i], sin[i]);
        y[i] = turn(second, first, 1.0f, cos[half + i], sin[half + i]);
    }
}

typedef void (*rotate_fn)(uint16_t *x, const uint16_t *cos, const uint16_t *sin, int turned);

static void rotate_plain(uint16_t *x, const uint16_t *cos, const uint16_t *sin, int turned) {
    rotate_any(x, cos, sin, turned);
}

/* ---- Outputs of experts times their weights, added up: out [n] of x [rows, n] and w [rows], rounded once ---- */

INLINE void combine_any(const uint16_t *x, const float *w, int rows, int n, uint16_t *restrict out) {
    for (int i = 0; i < n; i += 16) {
        lanes sums = {0};
        for (int r = 0; r < rows; r++)
            sums += WIDEN(x + (size_t)r * n + i) * w[r];
        for (int j = 0; j < 16; j++)
            out[i + j] = nearest_bf16(sums[j]);
    }
}

typedef void (*combine_fn)(const uint16_t *x, const float *w, int rows, int n, uint16_t *out);

static void combine_plain(const uint16_t *x, const float *w, int rows, int n, uint16_t *out) {
    combine_any(x, w, rows, n, out);
}

/* ---- Attention of one token: softmax(scale q k^T) v, every position seen ---- */

typedef struct {
    const uint16_t *q, *k, *v; /* q [heads, width]; k, v: rows of `width` and `out_width`, with strides in elements */
    uint16_t *out;             /* [heads, out_width] */
    float *scores;             /* [heads, positions] */
    int group, positions, width, out_width; /* `group` heads share a key/value head */
    int64_t k_head, k_row, v_head, v_row;
    float scale;
} attention;

/* exp for x <= 0, by range reduction and a polynomial of degree 6, without branches or calls. */
INLINE float exp_below(float x) {
    x = x < -87.0f ? -87.0f : x;
    float n = rintf(x * 1.44269504f), r = x - n * 0.693359375f + n * 2.12194440e-4f, p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    uint32_t bits = (uint32_t)((int32_t)n + 127) << 23;
    float power;
    memcpy(&power, &bits, 4);
    return p * power;
}

INLINE void softmax(float *s, int n) {
    float most = s[0], total = 0.0f;
    for (int i = 1; i < n; i++)
        most = s[i] > most ? s[i] : most;
    for (int i = 0; i < n; i++)
        s[i] = exp_below(s[i] - most);
    for (int i = 0; i < n; i++)
        total += s[i];
    for (int i = 0; i < n; i++)
        s[i] /= total;
}

INLINE void attend_any(const attention *a, int head) {
    _Alignas(64) float query[MOST_VALUES], sums[MOST_VALUES];
    const int group = a->group, positions = a->positions, width = a->width, out_width = a->out_width;
    const uint16_t *q = a->q + (size_t)head * group * width;
    const uint16_t *k = a->k + head * a->k_head, *v = a->v + head * a->v_head;
    float *scores = a->scores + (size_t)head * group * positions;
    for (int i = 0; i < group * width; i += 16)
        *(lanes *)(query + i) = WIDEN(q + i) * a->scale;
    for (int p = 0; p < positions; p++, k += a->k_row)
        for (int g = 0; g < group; g++) {
            const float *mine = query + g * width;
            lanes products = {0};
            for (int i = 0; i < width; i += 16)
                products += LOAD(mine + i) * WIDEN(k + i);
            scores[(size_t)g * positions + p] = total_of(products);
        }
    for (int g = 0; g < group; g++)
        softmax(scores + (size_t)g * positions, positions);
    memset(sums, 0, (size_t)group * out_width * sizeof *sums);
    for (int p = 0; p < positions; p++, v += a->v_row)
        for (int g = 0; g < group; g++) {
            const float share = scores[(size_t)g * positions + p];
            float *sum = sums + g * out_width;
            for (int i = 0; i < out_width; i += 16)
                *(lanes *)(sum + i) += share * WIDEN(v + i);
        }
    uint16_t *out = a->out + (size_t)head * group * out_width;
    for (int i = 0; i < group * out_width; i++)
        out[i] = nearest_bf16(sums[i]);
}

typedef void (*attend_fn)(const attention *a, int head);

static void attend_plain(const attention *a, int head) { attend_any(a, head); }

#ifdef X86
AVX2 static void norm_avx2(const uint16_t *x, const uint16_t *w, uint16_t *out, int n, float eps) {
    norm_any(x, w, out, n, eps);
}
AVX512 static void norm_avx512(const uint16_t *x, const uint16_t *w, uint16_t *out, int n, float eps) {
    norm_any(x, w, out, n, eps);
}
AVX2 static void rotate_avx2(uint16_t *x, const uint16_t *cos, const uint16_t *sin, int turned) {
    rotate_any(x, cos, sin, turned);
}
AVX512 static void rotate_avx512(uint16_t *x, const uint16_t *cos, const uint16_t *sin, int turned) {
    rotate_any(x, cos, sin, turned);
}
AVX2 static void combine_avx2(const uint16_t *x, const float *w, int rows, int n, uint16_t *out) {
    combine_any(x, w, rows, n, out);
}
AVX512 static void combine_avx512(const uint16_t *x, const float *w, int rows, int n, uint16_t *out) {
    combine_any(x, w, rows, n, out);
}
AVX2 static void attend_avx2(const attention *a, int head) { attend_any(a, head); }
AVX512 static void attend_avx512(const attention *a, int head) { attend_any(a, head); }
#endif

#endif
