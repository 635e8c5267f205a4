/* Routers of one token: asked ahead (norm, product, order of all experts), and for its own layer (product, choice,
 * weights). One thread: waking a second costs more than a router. Included by kernels.c.
 *
 * N experts, K columns. */
#ifndef FOREGATE_ROUTE_H
#define FOREGATE_ROUTE_H

typedef struct {
    matrix gate;          /* bf16 */
    const uint16_t *norm; /* weight [K] of the norm before it, or NULL */
    float epsilon;
    float *scores;  /* [N] out, best first: what bf16 keeps of the products */
    int64_t *order; /* [N] out: rows of the gate, best first, the lower first where they tie */
} ranking;

enum { MOST_RANKED = 4096, UNDECIDED = 3 };

/* Larger is better, and among equals the lower row: bf16 as an integer that grows with it, then the row. */
static uint32_t rank_key(uint16_t bits, int row) {
    if (!(bits & 0x7fff))
        bits = 0; /* -0 ties with 0 */
    uint16_t grows = bits & 0x8000 ? (uint16_t)~bits : (uint16_t)(bits | 0x8000);
    return (uint32_t)grows << 16 | (uint32_t)(0xffff - row);
}

/* Products [N] of the gate's rows and x [K], rounded to bf16, to `logits`; 1 for a NaN. Needs `gate_bytes`. */
static int gate_products(const matrix *m, const uint16_t *x, uint16_t *logits) {
    const int padded = round_up(m->columns, STEP);
    float *row = carve((size_t)padded * 4), *products = carve((size_t)round_up(m->rows, ROWS) * 4);
    input in;
    load_row(x, BF16, 0, m->columns, row, padded);
    make_input(m, row, &in);
    chosen.kernels[BF16](m, 0, m->rows, &in, 1, products, round_up(m->rows, ROWS));
    int nan = 0;
    for (int i = 0; i < m->rows; i++) {
        logits[i] = to_bf16(products[i]);
        nan |= products[i] != products[i];
    }
    return nan;
}

static size_t gate_bytes(const matrix *m) {
    return input_bytes(m) + (size_t)round_up(m->columns, STEP) * 4 + (size_t)round_up(m->rows, ROWS) * 4 + 256;
}

static int refuse_gate(const matrix *m) { return refuse(m, 1) || m->dtype != BF16 || m->rows > MOST_RANKED; }

/* The `most` largest keys of `logits` [N], falling. */
static void best_keys(const uint16_t *logits, int n, int most, uint32_t *keys) {
    for (int i = 0, held = 0; i < n; i++) { /* few rows: each goes to its place among those before */
        const uint32_t key = rank_key(logits[i], i);
        if (held == most && keys[held - 1] > key)
            continue;
        int low = 0, high = held;
        while (low < high) {
            int middle = (low + high) / 2;
            if (keys[middle] > key)
                low = middle + 1;
            else
                high = middle;
        }
        held += held < most;
        memmove(keys + low + 1, keys + low, (size_t)(held - 1 - low) * 4);
        keys[low] = key;
    }
}

static int row_of(uint32_t key) { return 0xffff - (int)(key & 0xffff); }

/* Rank the rows of `r->gate` for x [K], bf16. Returns as foregate_linear, or UNDECIDED where the order cannot be told: a
 * NaN, or a tie at place `top`, which routers settle each in its own way. */
int foregate_rank(const ranking *r, const uint16_t *x, int top) {
    choose_best();
    const matrix *m = &r->gate;
    const int n = m->columns, rows = m->rows;
    if (refuse_gate(m) || top < 1 || (r->norm && (n < 16 || n % 16)))
        return 1;
    if (!reserve(gate_bytes(m) + (size_t)n * 2 + (size_t)rows * 6 + 256))
        return 2;
    uint16_t *normed = carve((size_t)n * 2), *logits = carve((size_t)rows * 2);
    uint32_t *keys = carve((size_t)rows * 4);
    if (r->norm)
        chosen.norm(x, r->norm, normed, n, r->epsilon);
    if (gate_products(m, r->norm ? normed : x, logits))
        return UNDECIDED;
    best_keys(logits, rows, rows, keys);
    if (top < rows && keys[top - 1] >> 16 == keys[top] >> 16)
        return UNDECIDED;
    for (int i = 0; i < rows; i++) {
        r->order[i] = row_of(keys[i]);
        r->scores[i] = from_bf16(logits[r->order[i]]);
    }
    return 0;
}

/* Choose the `top` rows of `gate` (bf16) with the largest products with x [K]: `logits` [N] are those, bf16; `ids` [top]
 * the rows, best first; `weights` [top], F32 or BF16, the softmax over all rows, divided by their sum with `normalised`.
 * Returns as foregate_linear, or UNDECIDED where the choice or its order cannot be told: a NaN, or a tie, which routers
 * settle each in its own way. */
int foregate_route(const matrix *gate, const uint16_t *x, int top, int normalised, uint16_t *logits, int64_t *ids,
                   void *weights, int dtype) {
    choose_best();
    const int rows = gate->rows;
    if (refuse_gate(gate) || top < 1 || top > rows || (dtype != F32 && dtype != BF16))
        return 1;
    if (!reserve(gate_bytes(gate) + (size_t)(top + 1) * 8 + 256))
        return 2;
    const int most = top < rows ? top + 1 : top;
    uint32_t *keys = carve((size_t)most * 4);
    float *shares = carve((size_t)top * 4), all = 0.0f, sum = 0.0f;
    if (gate_products(gate, x, logits))
        return UNDECIDED;
    best_keys(logits, rows, most, keys);
    for (int i = 1; i < most; i++)
        if (keys[i - 1] >> 16 == keys[i] >> 16)
            return UNDECIDED;
    const float largest = from_bf16(logits[row_of(keys[0])]);
    for (int i = 0; i < rows; i++)
        all += expf(from_bf16(logits[i]) - largest);
    for (int i = 0; i < top; i++) {
        ids[i] = row_of(keys[i]);
        shares[i] = expf(from_bf16(logits[ids[i]]) - largest) / all;
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
