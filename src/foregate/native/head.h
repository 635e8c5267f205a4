/* What comes after the last layer, for one token: norm, head, the best of the logits. Included by kernels.c.
 *
 * D hidden, V vocabulary. */
#ifndef FOREGATE_HEAD_H
#define FOREGATE_HEAD_H

typedef struct {
    head_norm norm; /* of D numbers */
    matrix head;    /* [V, D] */
    uint16_t *normed, *logits;
} output_head;

/* Fill `h->logits` [V] for x [D], bf16. Returns as foregate_linear. */
int foregate_head(const output_head *h, const uint16_t *x, int64_t threads) {
    const int n = h->norm.width;
    choose_best();
    if (n < 16 || n % 16 || n != h->head.columns)
        return 1;
    chosen.norm(x, h->norm.weight, h->normed, n, h->norm.epsilon);
    return foregate_linear(&h->head, h->normed, n, BF16, 1, h->logits, h->head.rows, BF16, (int)threads);
}

/* The first of the largest of x [n], bf16; of NaNs, if there are any, as torch has it. */
int foregate_best(const uint16_t *x, int64_t n) {
    int best = 0;
    float most = from_bf16(x[0]);
    for (int i = 0; i < n; i++) {
        const float value = from_bf16(x[i]);
        if (value != value)
            return i;
        if (value > most) {
            most = value;
            best = i;
        }
    }
    return best;
}

#endif
