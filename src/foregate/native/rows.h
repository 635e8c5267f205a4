/* Rows of a matrix that are picked and added, as of experts that were chosen. Included by kernels.c. */
#ifndef FOREGATE_ROWS_H
#define FOREGATE_ROWS_H

/* Rows to pick and add: row k, column n is values[k N + n] * scales[n], int8, or values[k N + n], float, without. */
typedef struct {
    const void *values;
    const float *scales;
} rows;

/* out [N] += the same rows, each times its factor. */
ALWAYS void add_float_rows(const rows *from, int n, const int32_t *ids, const float *factors, int count,
                           float *restrict out) {
    for (int k = 0; k < count; k++) {
        const float *row = (const float *)from->values + (size_t)ids[k] * n;
        for (int i = 0; i < n; i++)
            out[i] += factors[k] * row[i];
    }
}

/* out [N] = the sum of `count` rows `ids`, each times its factor. Four at a time: `out` is read
 * and written less. */
ALWAYS void add_rows(const rows *from, int n, const int32_t *ids, const float *factors, int count, float *restrict out) {
    memset(out, 0, (size_t)n * 4);
    if (!from->scales) {
        add_float_rows(from, n, ids, factors, count, out);
        return;
    }
    for (int k = 0; k < count; k += 4) {
        const int8_t *row[4];
        float factor[4];
        for (int j = 0; j < 4; j++) {
            int at = k + j < count ? k + j : k;
            row[j] = (const int8_t *)from->values + (size_t)ids[at] * n;
            factor[j] = k + j < count ? factors[at] : 0.0f;
        }
        for (int i = 0; i < n; i++)
            out[i] += factor[0] * row[0][i] + factor[1] * row[1][i] + factor[2] * row[2][i] + factor[3] * row[3][i];
    }
    for (int i = 0; i < n; i++)
        out[i] *= from->scales[i];
}

/* Room for ids and their factors, used by one sum of rows after the other. */
typedef struct {
    int32_t *ids;
    float *factors;
} picks;

/* The `ids` [count] below `rows`, those after each `in_turn` of them `apart` further on, and their factors, or (NULL) 1. */
static int existing(const int64_t *ids, const float *factors, int count, int rows, int in_turn, int apart, picks *p) {
    int found = 0;
    for (int i = 0, from = 0; i < count; i += in_turn, from += apart)
        for (int j = i; j < i + in_turn && j < count; j++)
            if (ids[j] >= 0 && ids[j] < rows) {
                p->ids[found] = (int32_t)ids[j] + from;
                p->factors[found++] = factors ? factors[j] : 1.0f;
            }
    return found;
}

/* out [N] += the `count` rows `ids` of `known` there are, each times its factor. As foregate_linear. */
int foregate_add_rows(const rows *from, int64_t known, int64_t n, const int64_t *ids, const float *factors,
                      int64_t count, float *out) {
    if (from->scales || n < 1 || count < 0 || count > INT32_MAX)
        return 1;
    if (!reserve((size_t)count * 8 + 128))
        return 2;
    picks p = {carve((size_t)count * 4), carve((size_t)count * 4)};
    const int found = existing(ids, factors, (int)count, (int)known, (int)count, 0, &p);
    add_float_rows(from, (int)n, p.ids, p.factors, found, out);
    return 0;
}

#endif
