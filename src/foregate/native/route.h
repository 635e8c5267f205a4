/* Routers of one token: asked ahead (norm, product, order of all experts), and for its own layer (product, choice,
 * weights). One thread: waking a second costs more than a router. Included by kernels.c.
 *
 * N experts, K columns. */
#ifndef FOREGATE_ROUTE_H
#define FOREGATE_ROUTE_H

/* ---- Experts by their scores ---- */

/* Grows as the score falls, then as the row grows: order of a stable sort by falling score. NaN comes last. */
ALWAYS uint64_t place_key(float score, int row) {
    uint32_t bits = bits_of(score + 0.0f), grows = bits >> 31 ? ~bits : bits | 0x80000000u;
    return (uint64_t)(score != score ? UINT32_MAX : ~grows) << 32 | (uint32_t)row;
}

/* The best `most` of `scores` [N], or all: their rows to `order`, their scores to `best`. `keys` has room for as many. */
ALWAYS void sort_scores(const float *scores, int n, int most, uint64_t *keys, int32_t *order, float *best) {
    int held = 0;
    for (int i = 0; i < n; i++) {
        uint64_t key = place_key(scores[i], i);
        if (held == most && keys[held - 1] < key)
            continue;
        int low = 0, high = held;
        while (low < high) {
            int middle = (low + high) / 2;
            if (keys[middle] < key)
                low = middle + 1;
            else
                high = middle;
        }
        held += held < most;
        memmove(keys + low + 1, keys + low, (size_t)(held - 1 - low) * 8);
        keys[low] = key;
    }
    for (int i = 0; i < held; i++) {
        order[i] = (int32_t)(uint32_t)keys[i];
        best[i] = scores[order[i]];
    }
}

/* ---- A router asked ahead: norm, product, order of all experts ---- */

typedef struct {
    matrix gate;          /* bf16 */
    const uint16_t *norm; /* weight [K] of the norm before it, or NULL */
    float epsilon;
} ranking;

enum { MOST_RANKED = 4096, UNDECIDED = 3 };

/* What is added to the token before: `base` [width] and `count` rows of `known`, each times its weight. */
typedef struct {
    rows picked;
    const float *base;
    const int64_t *ids;
    const float *weights;
    int32_t count, known, width;
} shift;

/* x [n], bf16, and `s` on the first `width` of it. */
ALWAYS void shift_any(const shift *s, const uint16_t *x, int n, picks *p, float *added, uint16_t *out) {
    const int found = existing(s->ids, s->weights, s->count, s->known, s->count, 0, p);
    add_rows(&s->picked, s->width, p->ids, p->factors, found, added);
    memcpy(out, x, (size_t)n * 2);
    for (int i = 0; i < s->width; i++)
        out[i] = nearest_bf16(from_bf16(x[i]) + (added[i] + s->base[i]));
}

static size_t shift_bytes(const shift *s, int n) {
    return (size_t)s->count * 8 + (size_t)s->width * 4 + (size_t)n * 2 + 512;
}

#ifdef X86
AVX2 static void shift_avx2(const shift *s, const uint16_t *x, int n, picks *p, float *added, uint16_t *out) {
    shift_any(s, x, n, p, added, out);
}

AVX512 static void shift_avx512(const shift *s, const uint16_t *x, int n, picks *p, float *added, uint16_t *out) {
    shift_any(s, x, n, p, added, out);
}
#endif

/* `x` shifted, in memory of this call. */
static const uint16_t *shifted(const shift *s, const uint16_t *x, int n) {
    picks p = {carve((size_t)s->count * 4), carve((size_t)s->count * 4)};
    float *added = carve((size_t)s->width * 4);
    uint16_t *out = carve((size_t)n * 2);
#ifdef X86
    if (chosen.level == WITH_AVX512)
        shift_avx512(s, x, n, &p, added, out);
    else if (chosen.level == WITH_AVX2)
        shift_avx2(s, x, n, &p, added, out);
    else
#endif
        shift_any(s, x, n, &p, added, out);
    return out;
}

/* Products [N] of the gate's rows and x [K], rounded to bf16; NULL for a NaN. Needs `gate_bytes`. */
static float *gate_products(const matrix *m, const uint16_t *x) {
    const int padded = round_up(m->columns, STEP);
    float *row = carve((size_t)padded * 4), *products = carve((size_t)round_up(m->rows, ROWS) * 4);
    input in;
    load_row(x, BF16, 0, m->columns, row, padded);
    make_input(m, row, &in);
    chosen.kernels[BF16](m, 0, m->rows, &in, 1, products, round_up(m->rows, ROWS));
    int nan = 0;
    for (int i = 0; i < m->rows; i++) {
        products[i] = from_bf16(to_bf16(products[i]));
        nan |= products[i] != products[i];
    }
    return nan ? NULL : products;
}

static size_t gate_bytes(const matrix *m) {
    return input_bytes(m) + (size_t)round_up(m->columns, STEP) * 4 + (size_t)round_up(m->rows, ROWS) * 4 + 256;
}

static int refuse_gate(const matrix *m) { return refuse(m, 1) || m->dtype != BF16 || m->rows > MOST_RANKED; }

/* Rank the rows of `r->gate` for x [K], bf16, shifted by `s` unless that is NULL: the best `most`, the lower first where
 * they tie, and what bf16 keeps of their products. Returns as foregate_linear, or UNDECIDED where the order cannot be
 * told: a NaN, or a tie at place `top`, which routers settle each in its own way.
 * `scores` and `order` have room for `top` + 1, or all. One thread: a router is small. */
int foregate_rank(const ranking *r, int64_t top, int64_t most, const shift *s, const uint16_t *x, float *scores,
                  int32_t *order, int64_t threads) {
    (void)threads;
    choose_best();
    const matrix *m = &r->gate;
    const int n = m->columns, rows = m->rows;
    const int last = top < rows ? (int)top + 1 : rows, sorted = most < last ? last : most < rows ? (int)most : rows;
    if (refuse_gate(m) || top < 1 || (r->norm && (n < 16 || n % 16)) ||
        (s && (s->width < 1 || s->width > n || s->count < 0)))
        return 1;
    if (!reserve(gate_bytes(m) + (s ? shift_bytes(s, n) : 0) + (size_t)n * 2 + (size_t)rows * 8 + 256))
        return 2;
    if (s)
        x = shifted(s, x, n);
    uint16_t *normed = carve((size_t)n * 2);
    uint64_t *keys = carve((size_t)rows * 8);
    if (r->norm)
        chosen.norm(x, r->norm, normed, n, r->epsilon);
    const float *products = gate_products(m, r->norm ? normed : x);
    if (!products)
        return UNDECIDED;
    sort_scores(products, rows, sorted, keys, order, scores);
    return top < rows && scores[top - 1] == scores[top] ? UNDECIDED : 0;
}

/* ---- The router of a layer ---- */

/* Choose the `top` rows of `gate` (bf16) with the largest products with x [K]: `logits` [N] are those, bf16; `ids` [top]
 * the rows, best first; `weights` [top], F32 or BF16, the softmax over all rows, divided by their sum with `normalised`.
 * Returns as foregate_linear, or UNDECIDED where the choice cannot be told: a NaN, or a tie at the last place, which
 * routers settle each in its own way; `ids` are then those that are chosen however that is done, and -1 for the others.
 * Among the chosen, the lower row comes first where they tie. */
int foregate_route(const matrix *gate, const uint16_t *x, int top, int normalised, uint16_t *logits, int64_t *ids,
                   void *weights, int dtype) {
    choose_best();
    const int rows = gate->rows;
    if (refuse_gate(gate) || top < 1 || top > rows || (dtype != F32 && dtype != BF16))
        return 1;
    const int most = top < rows ? top + 1 : top;
    if (!reserve(gate_bytes(gate) + (size_t)most * 16 + (size_t)top * 4 + 512))
        return 2;
    uint64_t *keys = carve((size_t)most * 8);
    int32_t *order = carve((size_t)most * 4);
    float *best = carve((size_t)most * 4), *shares = carve((size_t)top * 4), all = 0.0f, sum = 0.0f;
    for (int i = 0; i < top; i++)
        ids[i] = -1;
    const float *products = gate_products(gate, x);
    if (!products)
        return UNDECIDED;
    sort_scores(products, rows, most, keys, order, best);
    if (most > top && best[top - 1] == best[top]) {
        for (int i = 0; best[i] > best[top]; i++)
            ids[i] = order[i];
        return UNDECIDED;
    }
    for (int i = 0; i < rows; i++) {
        logits[i] = to_bf16(products[i]);
        all += expf(products[i] - best[0]);
    }
    for (int i = 0; i < top; i++) {
        ids[i] = order[i];
        shares[i] = expf(best[i] - best[0]) / all;
        sum += shares[i];
    }
    if (!(shares[top - 1] > 0.0f)) /* of those that vanish, one is as good as another; or all of it is NaN */
        return UNDECIDED;
    for (int i = 0; i < top; i++) {
        const float weight = normalised ? shares[i] / sum : shares[i];
        if (dtype == F32)
            ((float *)weights)[i] = weight;
        else
            ((uint16_t *)weights)[i] = to_bf16(weight);
    }
    return 0;
}

#endif
