/* What trained predictors compute for one token and layer, each in one call. Included by kernels.c. Matrices are int8
 * or int4: most of what a prediction costs is the memory that it reads.
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

enum { AHEAD_OF_TIME = 8 << 10 };

/* Ask for the beginning of what is multiplied next: memory is idle while little is computed. */
static inline void expect(const matrix *m) {
    const char *at = m->weights;
    for (int i = 0; i < AHEAD_OF_TIME; i += 64)
        __builtin_prefetch(at + i, 0, 2);
}

static size_t apply_bytes(const matrix *m) { return input_bytes(m) + (size_t)round_up(m->columns, STEP) * 4 + 64; }

/* `n` floats and zeros up to `columns` of a matrix, and on to a whole step. */
static float *padded_floats(int n, int columns) {
    int padded = round_up(columns, STEP);
    float *found = carve((size_t)padded * 4);
    memset(found + n, 0, (size_t)(padded - n) * 4);
    return found;
}

ALWAYS float inverse_rms(const float *x, int n) { return 1.0f / sqrtf(dot_of(x, x, n) / (float)n + 1e-9f); }

/* ---- Matrices, one after the other, on what is given and on rows that are picked ---- */

enum { LINEAR = 0, RELU = 1, SILU = 2, GELU = 3 };

typedef struct {
    matrix weights; /* [N, K], K the rows of the one before, or `entry` */
    const float *bias;
    int32_t activation; /* of what goes in */
} stage;

/* What goes into the first of `depth` stages, or is ranked if there is none, are `entry` numbers: `start` (NULL: zeros)
 * and what is given and picked. Given are `entry` numbers or, with `norms` [entry / given, given], as many as there,
 * divided by their size and multiplied with each row. What comes out of the last stage are scores [hops, experts], of
 * which `counts` [hops] exist. */
typedef struct {
    rows picked;
    const float *start, *norms;
    const stage *stages;
    const int32_t *counts;
    int32_t in_turn, apart; /* of so many ids each, the next are meant that many rows further on */
    int32_t rows, entry, given, depth, hops, experts, named; /* how many rows there are; how many experts to name */
} network;

ALWAYS float sigmoid(float x) {
    const float below = exp_below(-fabsf(x)), share = 1.0f / (1.0f + below);
    return x < 0.0f ? below * share : share;
}

/* One loop each: the compiler makes vectors of them. GELU: x / 2 (1 + tanh y) is x sigmoid(2 y). */
ALWAYS void activate_all(float *x, int n, int activation) {
    if (activation == RELU)
        for (int i = 0; i < n; i++)
            x[i] = x[i] > 0.0f ? x[i] : 0.0f;
    else if (activation == SILU)
        for (int i = 0; i < n; i++)
            x[i] *= sigmoid(x[i]);
    else if (activation == GELU)
        for (int i = 0; i < n; i++)
            x[i] *= sigmoid(1.5957691216f * (x[i] + 0.044715f * x[i] * x[i] * x[i]));
}

static int refuse_network(const network *n) {
    int width = n->entry;
    for (int s = 0; s < n->depth; s++) {
        const matrix *m = &n->stages[s].weights;
        if (refuse(m, 1) || m->columns != width)
            return 1;
        width = m->rows;
    }
    for (int hop = 0; hop < n->hops; hop++)
        if (n->counts[hop] < 1 || n->counts[hop] > n->experts)
            return 1;
    if (n->in_turn < 0 || n->apart < 0 || (n->in_turn && n->apart < 1) || n->hops < 1 || n->named < 1 ||
        n->named > n->experts || width != n->hops * n->experts)
        return 1;
    return n->entry < 1 || n->given < 1 || n->entry % n->given || (!n->norms && n->given != n->entry);
}

/* To x [entry]: what is given. */
ALWAYS void take_given(const network *n, const void *given, int dtype, float *restrict x) {
    float *row = padded_floats(n->given, n->given);
    load_row(given, dtype, 0, n->given, row, n->given);
    const float scale = n->norms ? inverse_rms(row, n->given) : 1.0f;
    for (int from = 0; from < n->entry; from += n->given)
        for (int i = 0; i < n->given; i++)
            x[from + i] += row[i] * scale * (n->norms ? n->norms[from + i] : 1.0f);
}

ALWAYS int run_network(const network *n, const void *given, int dtype, const int64_t *ids, const float *factors,
                       int64_t count, float *scores, int32_t *order, int threads) {
    int widest = n->entry;
    size_t size = (size_t)n->named * 8 + (size_t)count * 8 + (size_t)round_up(n->given, STEP) * 4 + 512;
    for (int s = 0; s < n->depth; s++) {
        const matrix *m = &n->stages[s].weights;
        widest = m->rows > widest ? m->rows : widest;
        size += apply_bytes(m);
    }
    if (!reserve(size + (size_t)2 * round_up(widest, STEP) * 4 + 128))
        return 2;
    float *x = padded_floats(n->entry, widest), *next = padded_floats(0, widest);
    uint64_t *keys = carve((size_t)n->named * 8);
    picks p = {carve((size_t)count * 4), carve((size_t)count * 4)};
    if (n->depth)
        expect(&n->stages->weights);
    const int found = n->in_turn ? existing(ids, factors, (int)count, n->apart, n->in_turn, n->apart, &p)
                                 : existing(ids, factors, (int)count, n->rows, (int)count, 0, &p);
    if (found)
        add_rows(&n->picked, n->entry, p.ids, p.factors, found, x);
    else
        memset(x, 0, (size_t)n->entry * 4);
    for (int i = 0; n->start && i < n->entry; i++)
        x[i] += n->start[i];
    if (given)
        take_given(n, given, dtype, x);
    for (int s = 0; s < n->depth; s++) {
        const stage *now = n->stages + s;
        const int rows = now->weights.rows;
        activate_all(x, now->weights.columns, now->activation);
        apply(&now->weights, x, next, threads);
        if (s + 1 < n->depth)
            expect(&now[1].weights);
        for (int i = 0; i < rows; i++)
            next[i] += now->bias[i];
        memset(next + rows, 0, (size_t)(round_up(rows, STEP) - rows) * 4);
        float *old = x;
        x = next;
        next = old;
    }
    for (int hop = 0; hop < n->hops; hop++) {
        const size_t to = (size_t)hop * n->named;
        sort_scores(x + (size_t)hop * n->experts, n->counts[hop], n->named, keys, order + to, scores + to);
    }
    return 0;
}

#ifdef X86
AVX2 static int run_network_avx2(const network *n, const void *given, int dtype, const int64_t *ids,
                                 const float *factors, int64_t count, float *scores, int32_t *order, int threads) {
    return run_network(n, given, dtype, ids, factors, count, scores, order, threads);
}

AVX512 static int run_network_avx512(const network *n, const void *given, int dtype, const int64_t *ids,
                                     const float *factors, int64_t count, float *scores, int32_t *order, int threads) {
    return run_network(n, given, dtype, ids, factors, count, scores, order, threads);
}
#endif

/* The best experts of each hop and their scores, both [hops, named]. `given`, F32 or BF16, or NULL; `count` rows `ids`, each
 * times its factor, of which those that do not exist are passed over. As foregate_linear. */
int foregate_predict_network(const network *n, const void *given, int64_t dtype, const int64_t *ids,
                             const float *factors, int64_t count, float *scores, int32_t *order, int64_t threads) {
    choose_best();
    const int64_t turns = n->in_turn > 0 ? (count + n->in_turn - 1) / n->in_turn : 0;
    if (refuse_network(n) || (dtype != F32 && dtype != BF16) || count < 0 || count > INT32_MAX ||
        turns * n->apart > n->rows || (count && (!n->picked.values || !ids)))
        return 1;
#ifdef X86
    if (chosen.level == WITH_AVX512)
        return run_network_avx512(n, given, dtype, ids, factors, count, scores, order, threads);
    if (chosen.level == WITH_AVX2)
        return run_network_avx2(n, given, dtype, ids, factors, count, scores, order, threads);
#endif
    return run_network(n, given, dtype, ids, factors, count, scores, order, threads);
}

/* ---- Fusion: predictors/fusion.py says what it computes ---- */

typedef struct {
    matrix dense, outward; /* [R, (2 + H) D] of what is known, [A (D + E), R]; either may be filled up with zeros */
    const matrix *routers; /* A of [E, D] */
    rows picked;           /* [E, 2 R + A D]: what a chosen expert adds to the inner values, their gates, the guess */
    const float *base;     /* [2 R + A D]: what is there without any */
    const rows *repeats;   /* A of [E, E] */
    const float *bias;     /* [A, E] */
    int32_t hops, asked, width, hidden, experts;
} fusion;

/* Rows of the model's state. `now` and `last`: residuals [L, D] of this token and the last. `ids` [L, K] and `weights`:
 * what the layers up to `layer` chose, and beyond it what they chose for the last token; a negative id is none. `counts`
 * [L]: experts that a layer has, at most E; `named` of them are told, or all. */
typedef struct {
    float *now, *last;
    int64_t *ids;
    float *weights;
    const int32_t *counts;
    int32_t layer, layers, chosen, named;
} fusion_state;

static int refuse_fusion(const fusion *f, const fusion_state *s) {
    if (refuse(&f->dense, 1) || refuse(&f->outward, 1) || f->asked < 1 || f->asked > f->hops ||
        f->dense.rows < f->width || f->dense.columns < (2 + f->hops) * f->hidden || f->outward.columns < f->width ||
        f->outward.rows < f->asked * (f->hidden + f->experts) || s->layer < 0 || s->layer >= s->layers || s->chosen < 1 ||
        s->named < 1 || s->named > f->experts)
        return 1;
    for (int hop = 0; hop < f->asked; hop++) {
        int there = s->counts[(s->layer + hop + 1) % s->layers];
        if (refuse(f->routers + hop, 1) || f->routers[hop].rows != f->experts ||
            f->routers[hop].columns != f->hidden || there < 1 || there > f->experts)
            return 1;
    }
    return 0;
}

/* What is known of the token: the residual by its size, the input of attention, what the last token's residual gained
 * up to each hop by its own size; zero beyond the last layer. */
ALWAYS void known_of(const fusion *f, const fusion_state *s, const void *residual, const void *before, int dtype,
                     float *restrict seen) {
    const int n = f->hidden;
    const float *last = s->last + (size_t)s->layer * n;
    load_row(residual, dtype, 0, n, seen, n);
    memcpy(s->now + (size_t)s->layer * n, seen, (size_t)n * 4); /* not read here: another question may write it */
    float scale = inverse_rms(seen, n), last_scale = inverse_rms(last, n);
    for (int i = 0; i < n; i++)
        seen[i] *= scale;
    load_row(before, dtype, 0, n, seen + n, n);
    for (int hop = 1; hop <= f->hops; hop++) {
        float *restrict gain = seen + (size_t)(1 + hop) * n;
        const float *later = last + (size_t)hop * n;
        if (s->layer + hop < s->layers)
            for (int i = 0; i < n; i++)
                gain[i] = (later[i] - last[i]) * last_scale;
        else
            memset(gain, 0, (size_t)n * 4);
    }
}

/* What `layer` chose, by its weights or (NULL) each once. */
ALWAYS int pick(const fusion_state *s, int layer, const float *weights, picks *p) {
    int count = 0;
    for (int i = layer * s->chosen; i < (layer + 1) * s->chosen; i++)
        if (s->ids[i] >= 0 && s->ids[i] < s->counts[layer]) {
            p->ids[count] = (int32_t)s->ids[i];
            p->factors[count++] = weights ? weights[i] : 1.0f;
        }
    return count;
}

ALWAYS int fuse(const fusion *f, const fusion_state *s, const void *residual, const void *before, int dtype,
                float *scores, int32_t *order, int threads) {
    const int n = f->hidden, width = f->width, experts = f->experts, row = 2 * width + f->asked * n;
    const int known = (2 + f->hops) * n;
    if (!reserve(apply_bytes(&f->dense) + apply_bytes(&f->outward) + (size_t)f->asked * apply_bytes(f->routers) +
                 (size_t)(row + f->outward.rows + n + f->dense.rows + f->outward.columns + 4 * STEP) * 4 + (size_t)experts * 16 + (size_t)s->chosen * 8 + 1024))
        return 2;
    float *seen = padded_floats(known, f->dense.columns), *guess = padded_floats(n, n);
    float *inner = carve((size_t)f->dense.rows * 4), *opened = padded_floats(width, f->outward.columns);
    float *picked = carve((size_t)row * 4), *out = carve((size_t)f->outward.rows * 4);
    float *all = carve((size_t)experts * 4), *repeated = carve((size_t)experts * 4);
    uint64_t *keys = carve((size_t)experts * 8);
    picks p = {carve((size_t)s->chosen * 4), carve((size_t)s->chosen * 4)};
    expect(&f->dense);
    const int count = pick(s, s->layer, s->weights, &p);
    known_of(f, s, residual, before, dtype, seen);
    add_rows(&f->picked, row, p.ids, p.factors, count, picked);
    for (int i = 0; i < row; i++)
        picked[i] += f->base[i];
    apply(&f->dense, seen, inner, threads);
    expect(&f->outward);
    for (int i = 0; i < width; i++)
        opened[i] = silu_times(inner[i] + picked[i], picked[width + i]);
    apply(&f->outward, opened, out, threads);
    expect(f->routers);
    for (int hop = 0; hop < f->asked; hop++) {
        const int target = (s->layer + hop + 1) % s->layers;
        const float *shift = out + (size_t)hop * n, *moved = picked + 2 * width + (size_t)hop * n;
        const float *direct = out + (size_t)f->asked * n + (size_t)hop * experts, *bias = f->bias + (size_t)hop * experts;
        for (int i = 0; i < n; i++)
            guess[i] = seen[i] + shift[i] + moved[i];
        apply(f->routers + hop, guess, all, threads);
        const float scale = inverse_rms(guess, n);
        const int again = pick(s, target, NULL, &p);
        add_rows(f->repeats + hop, experts, p.ids, p.factors, again, repeated);
        for (int e = 0; e < experts; e++)
            all[e] = direct[e] + bias[e] + all[e] * scale + repeated[e];
        const size_t to = (size_t)hop * s->named;
        sort_scores(all, s->counts[target], s->named, keys, order + to, scores + to);
    }
    return 0;
}

#ifdef X86
AVX2 static int fuse_avx2(const fusion *f, const fusion_state *s, const void *residual, const void *before, int dtype,
                          float *scores, int32_t *order, int threads) {
    return fuse(f, s, residual, before, dtype, scores, order, threads);
}

AVX512 static int fuse_avx512(const fusion *f, const fusion_state *s, const void *residual, const void *before,
                              int dtype, float *scores, int32_t *order, int threads) {
    return fuse(f, s, residual, before, dtype, scores, order, threads);
}
#endif

/* The best experts of the A layers after this one and their scores, both [A, named], from its residual and the input of
 * its attention [D], F32 or BF16. The residual is kept in `now`, and what it chose, unless NULL, in `ids` and `weights`.
 * As foregate_linear. */
int foregate_predict_fusion(const fusion *f, const fusion_state *s, const void *residual, const void *before,
                            int64_t dtype, const int64_t *ids, const float *weights, float *scores, int32_t *order,
                            int64_t threads) {
    choose_best();
    if (refuse_fusion(f, s) || (dtype != F32 && dtype != BF16))
        return 1;
    if (ids && weights) {
        memcpy(s->ids + (size_t)s->layer * s->chosen, ids, (size_t)s->chosen * sizeof *ids);
        memcpy(s->weights + (size_t)s->layer * s->chosen, weights, (size_t)s->chosen * sizeof *weights);
    }
#ifdef X86
    if (chosen.level == WITH_AVX512)
        return fuse_avx512(f, s, residual, before, dtype, scores, order, threads);
    if (chosen.level == WITH_AVX2)
        return fuse_avx2(f, s, residual, before, dtype, scores, order, threads);
#endif
    return fuse(f, s, residual, before, dtype, scores, order, threads);
}

#endif
