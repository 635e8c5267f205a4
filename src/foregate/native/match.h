/* Which of M stored tokens or requests is most like the one that is computed, and what that one used: the search of
 * predictors/stored.py. Included by kernels.c.
 *
 * L layers, E experts of the widest, A layers that are told of. */
#ifndef FOREGATE_MATCH_H
#define FOREGATE_MATCH_H

/* At one layer of those that are computed. */
typedef struct {
    rows columns;             /* [E, M]: what a chosen expert adds to the likeness, by its weight */
    float *likeness;          /* [M] */
    const float *inverse;     /* [M]: by what it is multiplied at this layer; NULL: nothing */
    float *known;             /* the sum of the weights' squares; the likeness of a match that is given */
    const int32_t *order;     /* [M, L, E]: experts, most used first */
    const float *shares;      /* [M, L, E]: how much */
    const int32_t *targets;   /* [A]: layers, below L */
    const int32_t *counts;    /* [A]: experts that they have */
    const float *near;        /* [A]: by what their shares are multiplied */
    int32_t stored, here, layers, experts, asked, named, least; /* how many are told: until shares reach 1 - likeness */
} match;

static int refuse_match(const match *m) {
    if (m->columns.scales || !m->columns.values || m->stored < 1 || m->here < 1 || m->here > m->experts ||
        m->layers < 1 || m->asked < 1 || m->named < 1 || m->named > m->experts || m->least < 1)
        return 1;
    for (int i = 0; i < m->asked; i++)
        if (m->targets[i] < 0 || m->targets[i] >= m->layers || m->counts[i] < 1 || m->counts[i] > m->experts)
            return 1;
    return 0;
}

/* The first of the largest, and how large. */
ALWAYS int most_alike(const match *m, float *values, float *largest) {
    for (int i = 0; i < m->stored; i++)
        values[i] = m->inverse ? m->likeness[i] * m->inverse[i] : m->likeness[i];
    int found = 0;
    for (int i = 1; i < m->stored; i++)
        if (values[i] > values[found])
            found = i;
    *largest = values[found];
    return found;
}

/* How many of `most` are told: at least `least`, then until their shares reach `wanted`. */
static int told_of(const float *shares, int most, int least, float wanted) {
    float sum = 0.0f;
    for (int i = 0; i < most; i++) {
        sum += shares[i];
        if (sum >= wanted && i + 1 >= least)
            return i + 1;
    }
    return most;
}

ALWAYS int run_match(const match *m, const int64_t *ids, const float *weights, int64_t count, int64_t given,
                     float *scores, int32_t *order) {
    if (!reserve((size_t)count * 8 + (size_t)m->stored * 4 + 256))
        return 2;
    picks p = {carve((size_t)count * 4), carve((size_t)count * 4)};
    const int found = existing(ids, weights, (int)count, m->here, (int)count, 0, &p);
    add_float_rows(&m->columns, m->stored, p.ids, p.factors, found, m->likeness);
    for (int i = 0; i < found; i++)
        m->known[0] += p.factors[i] * p.factors[i];
    float score = m->known[1];
    if (given < 0) {
        given = most_alike(m, carve((size_t)m->stored * 4), &score);
        score /= fmaxf(sqrtf(m->known[0]), 1e-12f);
    }
    const float wanted = 1.0f - fminf(fmaxf(score, 0.0f), 1.0f);
    for (int i = 0; i < m->asked; i++) {
        const size_t from = ((size_t)given * m->layers + m->targets[i]) * m->experts, to = (size_t)i * m->named;
        const int most = m->counts[i] < m->named ? m->counts[i] : m->named;
        const int told = told_of(m->shares + from, most, m->least, wanted);
        for (int e = 0; e < m->named; e++) {
            order[to + e] = e < told ? m->order[from + e] : -1;
            scores[to + e] = e < told ? m->near[i] * m->shares[from + e] : 0.0f;
        }
    }
    return 0;
}

#ifdef X86
AVX2 static int run_match_avx2(const match *m, const int64_t *ids, const float *weights, int64_t count, int64_t given,
                               float *scores, int32_t *order) {
    return run_match(m, ids, weights, count, given, scores, order);
}

AVX512 static int run_match_avx512(const match *m, const int64_t *ids, const float *weights, int64_t count,
                                   int64_t given, float *scores, int32_t *order) {
    return run_match(m, ids, weights, count, given, scores, order);
}
#endif

/* What the stored one that is `given` (negative: the most alike) used, both [A, named], and -1 after the last that is
 * told. First the `count` experts `ids` that the layer chose are noted, by their `weights`. As foregate_linear. */
int foregate_predict_match(const match *m, const int64_t *ids, const float *weights, int64_t count, int64_t given,
                           float *scores, int32_t *order, int64_t threads) {
    (void)threads;
    choose_best();
    if (refuse_match(m) || given >= m->stored || count < 0 || count > INT32_MAX || (count && (!ids || !weights)))
        return 1;
#ifdef X86
    if (chosen.level == WITH_AVX512)
        return run_match_avx512(m, ids, weights, count, given, scores, order);
    if (chosen.level == WITH_AVX2)
        return run_match_avx2(m, ids, weights, count, given, scores, order);
#endif
    return run_match(m, ids, weights, count, given, scores, order);
}

#endif
