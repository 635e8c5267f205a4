/* What trained predictors compute for one token and layer, each in one call. Included by kernels.c. Matrices are bf16.
 *
 * L layers, E experts, D hidden, H hops that were trained, A of them asked for, R width of a network. */
#ifndef FOREGATE_PREDICT_H
#define FOREGATE_PREDICT_H

enum { LARGE_MATRIX = 1 << 20 }; /* bytes from which on a second thread is woken for it */

/* out [N] = m x. `x` is padded with zeros to a multiple of STEP. */
static void apply(const matrix *m, const float *x, float *out, int threads) {
    input in;
    make_input(m, x, &in);
    multiply(m, &in, 1, out, F32, m->rows, row_bytes(m) * m->rows < LARGE_MATRIX ? 1 : threads);
}

static size_t apply_bytes(const matrix *m) { return input_bytes(m) + (size_t)round_up(m->columns, STEP) * 4 + 64; }

static float *padded_floats(int n) {
    int padded = round_up(n, STEP);
    float *found = carve((size_t)padded * 4);
    memset(found + n, 0, (size_t)(padded - n) * 4);
    return found;
}

static float inverse_rms(const float *x, int n) {
    float sums[16] = {0}, sum = 0.0f;
    for (int i = 0; i < n; i += 16)
        for (int j = 0; j < 16 && i + j < n; j++)
            sums[j] += x[i + j] * x[i + j];
    for (int j = 0; j < 16; j++)
        sum += sums[j];
    return 1.0f / sqrtf(sum / (float)n + 1e-9f);
}

static void add_floats(float *to, const float *from, float factor, int n) {
    for (int i = 0; i < n; i++)
        to[i] += factor * from[i];
}

/* ---- second act(first x + first_bias) + second_bias ---- */

enum { SILU = 0, GELU = 1 };

typedef struct {
    matrix first, second; /* [R, K], [E, R] */
    const float *first_bias, *second_bias;
    int32_t activation;
} network;

static float gelu(float x) { return 0.5f * x * (1.0f + tanhf(0.7978845608f * (x + 0.044715f * x * x * x))); }

/* out [E] of x [K]. As foregate_linear. */
int foregate_network(const network *n, const float *x, float *out, int threads) {
    choose_best();
    const int inputs = n->first.columns, width = n->first.rows;
    if (refuse(&n->first, 1) || refuse(&n->second, 1) || n->first.dtype != BF16 || n->second.dtype != BF16 ||
        n->second.columns != width)
        return 1;
    if (!reserve(apply_bytes(&n->first) + apply_bytes(&n->second)))
        return 2;
    float *row = padded_floats(inputs), *inner = padded_floats(width);
    memcpy(row, x, (size_t)inputs * 4);
    apply(&n->first, row, inner, threads);
    for (int i = 0; i < width; i++) {
        float value = inner[i] + n->first_bias[i];
        inner[i] = n->activation == GELU ? gelu(value) : silu_times(value, 1.0f);
    }
    apply(&n->second, inner, out, threads);
    add_floats(out, n->second_bias, 1.0f, n->second.rows);
    return 0;
}

/* ---- Fusion: predictors/fusion.py says what it computes ---- */

typedef struct {
    matrix dense, outward; /* [R, (2 + H) D] of what is known, [A D + A E, R] */
    const matrix *routers; /* A of [E, D] */
    const float *picked;   /* [E, 2 R + A D]: what a chosen expert adds to the inner values, their gates, the guess */
    const float *base;     /* [2 R + A D]: what is there without any */
    const float *bias;     /* [A, E] */
    const float *repeat;   /* [A, E, E] */
    int32_t hops, asked, width, hidden, experts;
} fusion;

/* Rows of the model's state: `now` and `last` are residuals [L, D] of this token and the last, `chosen` [L, E]. */
typedef struct {
    const float *now, *last, *chosen;
    int32_t layer, layers;
} fusion_state;

static int refuse_fusion(const fusion *f) {
    if (refuse(&f->dense, 1) || refuse(&f->outward, 1) || f->dense.dtype != BF16 || f->outward.dtype != BF16 ||
        f->asked < 1 || f->asked > f->hops || f->dense.rows != f->width || f->outward.columns != f->width ||
        f->dense.columns != (2 + f->hops) * f->hidden || f->outward.rows != f->asked * (f->hidden + f->experts))
        return 1;
    for (int hop = 0; hop < f->asked; hop++)
        if (refuse(f->routers + hop, 1) || f->routers[hop].dtype != BF16 || f->routers[hop].rows != f->experts ||
            f->routers[hop].columns != f->hidden)
            return 1;
    return 0;
}

/* What is known of the token: the residual by its size, the input of attention, what the last token's residual gained
 * up to each hop by its own size; zero beyond the last layer. */
static void known_of(const fusion *f, const fusion_state *s, const float *before, float *seen) {
    const int n = f->hidden;
    const float *now = s->now + (size_t)s->layer * n, *last = s->last + (size_t)s->layer * n;
    float scale = inverse_rms(now, n), last_scale = inverse_rms(last, n);
    for (int i = 0; i < n; i++)
        seen[i] = now[i] * scale;
    memcpy(seen + n, before, (size_t)n * 4);
    for (int hop = 1; hop <= f->hops; hop++) {
        float *gain = seen + (size_t)(1 + hop) * n;
        const float *later = last + (size_t)hop * n;
        for (int i = 0; i < n; i++)
            gain[i] = s->layer + hop < s->layers ? (later[i] - last[i]) * last_scale : 0.0f;
    }
}

/* scores [A, E] from `before` [D] and the `count` experts `ids` that the layer has chosen, with their weights. As
 * foregate_linear. */
int foregate_fusion(const fusion *f, const fusion_state *s, const float *before, const int64_t *ids,
                    const float *weights, int count, float *scores, int threads) {
    choose_best();
    const int n = f->hidden, width = f->width, experts = f->experts, row = 2 * width + f->asked * n;
    if (refuse_fusion(f) || s->layer < 0 || s->layer >= s->layers)
        return 1;
    if (!reserve(apply_bytes(&f->dense) + apply_bytes(&f->outward) + (size_t)f->asked * apply_bytes(f->routers) +
                 (size_t)(row + f->outward.rows + experts) * 4 + 512))
        return 2;
    float *seen = padded_floats(f->dense.columns), *inner = padded_floats(width), *guess = padded_floats(n);
    float *picked = carve((size_t)row * 4), *out = carve((size_t)f->outward.rows * 4);
    float *routed = carve((size_t)experts * 4);
    known_of(f, s, before, seen);
    memcpy(picked, f->base, (size_t)row * 4);
    for (int i = 0; i < count; i++)
        if (ids[i] >= 0 && ids[i] < experts)
            add_floats(picked, f->picked + (size_t)ids[i] * row, weights[i], row);
    apply(&f->dense, seen, inner, threads);
    for (int i = 0; i < width; i++)
        inner[i] = silu_times(inner[i] + picked[i], picked[width + i]);
    apply(&f->outward, inner, out, threads);
    for (int hop = 0; hop < f->asked; hop++) {
        float *to = scores + (size_t)hop * experts;
        for (int i = 0; i < n; i++)
            guess[i] = seen[i] + out[hop * n + i] + picked[2 * width + hop * n + i];
        apply(f->routers + hop, guess, routed, threads);
        float scale = inverse_rms(guess, n);
        for (int e = 0; e < experts; e++)
            to[e] = out[f->asked * n + hop * experts + e] + f->bias[hop * experts + e] + routed[e] * scale;
        const float *before_it = s->chosen + (size_t)((s->layer + hop + 1) % s->layers) * experts;
        for (int e = 0; e < experts; e++)
            if (before_it[e] != 0.0f)
                add_floats(to, f->repeat + ((size_t)hop * experts + e) * experts, before_it[e], experts);
    }
    return 0;
}

#endif
