/* The policy `echo` for one token and layer; experts/echo.py says what it computes and gives the constants. Included by
 * kernels.c.
 *
 * E experts. */
#ifndef FOREGATE_ECHO_H
#define FOREGATE_ECHO_H

enum { ECHO_MEANS = 4, ECHO_REACH = 8, ECHO_INFINITE = 3, ECHO_NEGATIVE = 4 };

typedef struct {
    float rates[ECHO_MEANS]; /* of the means of shares, the last of that of choices */
    float fades[ECHO_REACH]; /* what a row counts for the tokens before it, the farthest first */
    float fades_total, sharpness, floor, least;
} echo_rules;

/* The routing of one layer so far. */
typedef struct {
    float *shares;       /* [ECHO_MEANS + 1, E]: the means, and the votes */
    float *keys, *after; /* [2 length, E] */
    int32_t experts, length;
} echo_past;

/* `shares` [E] of `raw`, logits or shares of any sum. */
static void echo_shares(const float *raw, int logits, int n, float least, float *shares) {
    float largest = raw[0], sum = 0.0f;
    for (int e = 1; e < n; e++)
        largest = raw[e] > largest ? raw[e] : largest;
    for (int e = 0; e < n; e++)
        sum += shares[e] = logits ? expf(raw[e] - largest) : raw[e];
    const float inverse = 1.0f / (sum > least ? sum : least);
    for (int e = 0; e < n; e++)
        shares[e] *= inverse;
}

/* `key` [E]: `raw` without its mean, of norm 1. */
static void echo_key(const float *raw, int n, float least, float *key) {
    float sum = 0.0f;
    for (int e = 0; e < n; e++)
        sum += raw[e];
    for (int e = 0; e < n; e++)
        key[e] = raw[e] - sum / (float)n;
    const float inverse = 1.0f / (sqrtf(dot_of(key, key, n)) + least);
    for (int e = 0; e < n; e++)
        key[e] *= inverse;
}

/* Equal shares of the `count` experts `ids`; what is no expert counts for nothing. */
static void echo_choices(const int64_t *ids, int count, int n, float *choices) {
    int real = 0;
    memset(choices, 0, (size_t)n * 4);
    for (int i = 0; i < count; i++)
        if (ids[i] >= 0 && ids[i] < n && choices[ids[i]] == 0.0f) {
            choices[ids[i]] = 1.0f;
            real++;
        }
    for (int e = 0; real && e < n; e++)
        choices[e] /= (float)real;
}

/* One more token, as row `row` of the window: it chose `ids`, by `scores` [E] or NULL. Returns 0, 2 where memory is
 * missing, or, nothing changed, ECHO_INFINITE, or ECHO_NEGATIVE for scores that must be `logits` and are not said to be. */
int foregate_echo_see(const echo_rules *rules, const echo_past *p, int64_t row, const float *scores, int64_t logits,
                      const int64_t *ids, int64_t count) {
    const int n = p->experts;
    float smallest = 0.0f, poison = 0.0f;
    for (int e = 0; scores && e < n; e++) {
        poison += scores[e] * 0.0f;
        smallest = scores[e] < smallest ? scores[e] : smallest;
    }
    if (poison != 0.0f)
        return ECHO_INFINITE;
    if (smallest < 0.0f && !logits)
        return ECHO_NEGATIVE;
    if (!reserve((size_t)n * 8 + 128))
        return 2;
    float *choices = carve((size_t)n * 4), *shares = choices;
    echo_choices(ids, count, n, choices);
    if (scores) {
        shares = carve((size_t)n * 4);
        echo_shares(scores, logits, n, rules->least, shares);
    }
    for (int m = 0; m < ECHO_MEANS; m++) {
        const float rate = rules->rates[m], *new = m < ECHO_MEANS - 1 ? shares : choices;
        float *mean = p->shares + (size_t)m * n;
        for (int e = 0; e < n; e++)
            mean[e] = (1.0f - rate) * mean[e] + rate * new[e];
    }
    echo_key(scores ? scores : choices, n, rules->least, p->keys + (size_t)row * n);
    memset(p->after + (size_t)row * n, 0, (size_t)n * 4);
    for (int ago = 1; ago <= ECHO_REACH && ago <= row; ago++) {
        float *after = p->after + (size_t)(row - ago) * n, fade = rules->fades[ECHO_REACH - ago];
        for (int e = 0; e < n; e++)
            after[e] += fade * shares[e];
    }
    return 0;
}

/* What is needed after a token routed like the newest of `rows`, to the last row of `shares`. */
ALWAYS void echo_votes(const echo_rules *rules, const echo_past *p, int rows) {
    const int n = p->experts, last = rows - 1, first = last > p->length ? last - p->length : 0;
    const float *newest = p->keys + (size_t)last * n;
    float *restrict votes = p->shares + (size_t)ECHO_MEANS * n, total = 0.0f;
    if (first == last) {
        memcpy(votes, p->shares, (size_t)n * 4);
        return;
    }
    memset(votes, 0, (size_t)n * 4);
    for (int r = first; r < last; r++) {
        float vote = expf(rules->sharpness * (dot_of(p->keys + (size_t)r * n, newest, n) - 1.0f));
        const float *after = p->after + (size_t)r * n;
        total += vote;
        for (int e = 0; e < n; e++)
            votes[e] += vote * after[e];
    }
    for (int e = 0; e < n; e++)
        votes[e] /= total * rules->fades_total;
}

#ifdef X86
AVX2 static void votes_avx2(const echo_rules *rules, const echo_past *p, int rows) { echo_votes(rules, p, rows); }
AVX512 static void votes_avx512(const echo_rules *rules, const echo_past *p, int rows) { echo_votes(rules, p, rows); }
#endif

/* `worth` [E] after `rows` rows of the window: a logistic regression on the logs of the means and the votes, of so many
 * weights and a bias, and `advice` [E] or NULL. */
int foregate_echo_judge(const echo_rules *rules, const echo_past *p, int64_t rows, const float *weights,
                        const float *advice, float *worth) {
    const int n = p->experts;
    choose_best();
#ifdef X86
    if (chosen.level == WITH_AVX512)
        votes_avx512(rules, p, (int)rows);
    else if (chosen.level == WITH_AVX2)
        votes_avx2(rules, p, (int)rows);
    else
#endif
        echo_votes(rules, p, (int)rows);
    for (int e = 0; e < n; e++) {
        float sum = weights[ECHO_MEANS + 1] + (advice ? advice[e] : 0.0f);
        for (int m = 0; m <= ECHO_MEANS; m++)
            sum += weights[m] * logf((float)n * p->shares[(size_t)m * n + e] + rules->floor);
        worth[e] = -log1pf(expf(-sum));
    }
    return 0;
}

/* The lowest of `worth` [L, E] less `away` [L], of what is held; -1 if nothing is. `left` [L, E] is what was compared. */
int foregate_echo_lowest(const float *worth, const uint8_t *held, const float *away, int64_t layers, int64_t experts,
                         float *left) {
    int best = -1;
    for (int layer = 0, at = 0; layer < layers; layer++)
        for (int e = 0; e < experts; e++, at++) {
            left[at] = held[at] ? worth[at] - away[layer] : INFINITY;
            if (left[at] < INFINITY && (best < 0 || left[at] < left[best]))
                best = at;
        }
    return best;
}

#endif
