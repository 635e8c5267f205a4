/* What predictors/history.py computes up to its head, a network (predict.h) on the last state: an LSTM that steps from
 * layer to layer, and an encoder over a window of layers; and the step of predictors/sequence.py from token to token.
 * Included by kernels.c.
 *
 * L layers, E experts, K of them chosen, W window, d width. */
#ifndef FOREGATE_HISTORY_H
#define FOREGATE_HISTORY_H

/* out [n, N] = x [n rows, `stride` apart] m^T + bias. Rows of x are padded with zeros to a multiple of STEP. */
static void apply_rows(const matrix *m, const float *bias, const float *x, int stride, int n, float *out) {
    for (int from = 0; from < n; from += MOST_TOKENS) {
        const int count = n - from < MOST_TOKENS ? n - from : MOST_TOKENS;
        input in[MOST_TOKENS];
        for (int t = 0; t < count; t++)
            make_input(m, x + (size_t)(from + t) * stride, in + t);
        multiply(m, in, count, out + (size_t)from * m->rows, F32, m->rows, 1);
    }
    for (int t = 0; t < n; t++)
        for (int i = 0; i < m->rows; i++)
            out[(size_t)t * m->rows + i] += bias[i];
}

static size_t apply_rows_bytes(const matrix *m, int n) { return (size_t)n * (input_bytes(m) + 64); }

/* The `choice` of a layer of `experts`, if any, to `row` [K]: -1 for what is none of them. */
static void note_choice(int64_t *row, const int64_t *choice, int k, int experts) {
    if (!choice)
        return;
    for (int i = 0; i < k; i++)
        row[i] = choice[i] < experts ? choice[i] : -1;
}

/* ---- Two recurrent layers ---- */

typedef struct {
    rows picked;            /* [E, 4 d]: what an expert adds to the first's gates: enter, keep, new, leave */
    const float *biases[2]; /* [4 d] each */
    matrix again[2];        /* [4 d, d]: of the state before; of what the first gives: */
    matrix second;          /* [4 d, d] */
    int64_t *ids;           /* [L, K] of this token up to the layer that is asked; negative: none */
    const int32_t *there;   /* [L]: experts that exist */
    float *states;          /* [L, 2, 2, d]: hidden and cell of both after a layer */
    int64_t *stamps;        /* [L]: of which token that is */
    int32_t width, chosen, experts, layers;
} lstm;

/* The next `state` (hidden, cell) [2, d] of the one `before` (NULL: zeros), from `gates` [4 d]. */
ALWAYS void step_state(const float *restrict gates, const float *before, float *restrict state, int n) {
    for (int i = 0; i < n; i++) {
        const float kept = before ? sigmoid(gates[n + i]) * before[n + i] : 0.0f;
        const float cell = kept + sigmoid(gates[i]) * (2.0f * sigmoid(2.0f * gates[2 * n + i]) - 1.0f);
        state[n + i] = cell;
        state[i] = sigmoid(gates[3 * n + i]) * (2.0f * sigmoid(2.0f * cell) - 1.0f);
    }
}

ALWAYS void step_lstm(const lstm *m, int layer, picks *p, float *gates, float *more, float *row) {
    const int n = m->width, all = 4 * n;
    const size_t size = (size_t)4 * n;
    float *now = m->states + layer * size;
    const float *before = layer ? now - size : NULL;
    const int found = existing(m->ids + (size_t)layer * m->chosen, NULL, m->chosen, m->experts, m->chosen, 0, p);
    add_rows(&m->picked, all, p->ids, p->factors, found, gates);
    for (int part = 0; part < 2; part++) {
        if (part) {
            memcpy(row, now, (size_t)n * 4);
            apply(&m->second, row, gates, 1);
        }
        for (int i = 0; i < all; i++)
            gates[i] += m->biases[part][i];
        if (before) {
            memcpy(row, before + part * 2 * n, (size_t)n * 4);
            apply(m->again + part, row, more, 1);
            for (int i = 0; i < all; i++)
                gates[i] += more[i];
        }
        step_state(gates, before ? before + part * 2 * n : NULL, now + part * 2 * n, n);
    }
}

ALWAYS int run_lstm(const lstm *m, int layer, int64_t stamp) {
    int from = layer;
    while (from > 0 && m->stamps[from - 1] != stamp)
        from--;
    for (; from <= layer; from++) {
        const int all = 4 * m->width;
        if (!reserve(3 * apply_bytes(m->again) + (size_t)(2 * all + m->width + STEP + 2 * m->chosen) * 4 + 512))
            return 2;
        float *gates = carve((size_t)all * 4), *more = carve((size_t)all * 4), *row = padded_floats(m->width, m->width);
        picks p = {carve((size_t)m->chosen * 4), carve((size_t)m->chosen * 4)};
        step_lstm(m, from, &p, gates, more, row);
        m->stamps[from] = stamp;
    }
    return 0;
}

/* ---- A gated recurrent unit, one step a token ---- */

typedef struct {
    matrix input, again, toward; /* [3 d, d] of what comes in and of the state: forget, update, new; [d, d] of the state */
    const float *biases[2];      /* [3 d] of the first two */
    float *state;                /* [d] */
    int32_t width;
} gru;

static size_t gru_bytes(const gru *m) {
    return apply_bytes(&m->input) + apply_bytes(&m->again) + apply_bytes(&m->toward) +
           (size_t)(2 * round_up(m->width, STEP) + 6 * m->width) * 4 + 512;
}

ALWAYS int run_gru(const gru *m, float *sum) {
    const int n = m->width;
    if (!reserve(gru_bytes(m)))
        return 2;
    float *x = padded_floats(n, n), *now = padded_floats(n, n);
    float *in = carve((size_t)3 * n * 4), *again = carve((size_t)3 * n * 4);
    memcpy(x, sum, (size_t)n * 4);
    activate_all(x, n, SILU);
    apply(&m->input, x, in, 1);
    memcpy(now, m->state, (size_t)n * 4);
    apply(&m->again, now, again, 1);
    for (int i = 0; i < 3 * n; i++) {
        in[i] += m->biases[0][i];
        again[i] += m->biases[1][i];
    }
    for (int i = 0; i < n; i++) {
        const float forget = sigmoid(in[i] + again[i]), update = sigmoid(in[n + i] + again[n + i]);
        const float new = 2.0f * sigmoid(2.0f * (in[2 * n + i] + forget * again[2 * n + i])) - 1.0f;
        now[i] = new + update * (now[i] - new);
    }
    memcpy(m->state, now, (size_t)n * 4);
    memset(sum, 0, (size_t)n * 4);
    apply(&m->toward, now, sum + n, 1);
    return 0;
}

/* ---- Encoder blocks ---- */

enum { BLOCKS = 2, MOST_STATE = 4096 };

typedef struct {
    matrix qkv, out, up, down; /* [3 d, d], [d, d], [F, d], [d, F] */
    const float *qkv_bias, *out_bias, *up_bias, *down_bias, *norm1, *norm1_bias, *norm2, *norm2_bias;
} encoder_block;

typedef struct {
    rows embed;             /* [E, d] */
    const float *positions; /* [L, d] */
    int64_t *ids;           /* [W - 1 + L, K]: nothing was chosen in the first W - 1 */
    const int32_t *there;   /* [L]: experts that exist */
    encoder_block blocks[BLOCKS];
    int32_t window, width, heads, chosen, experts, layers;
} encoder;

/* `to` [n] = the norm of a + b. */
ALWAYS void add_norm(const float *a, const float *b, const float *weight, const float *bias, float *to, int n) {
    float mean = 0.0f, square = 0.0f;
    for (int i = 0; i < n; i++)
        mean += to[i] = a[i] + b[i];
    mean /= (float)n;
    for (int i = 0; i < n; i++)
        square += (to[i] - mean) * (to[i] - mean);
    const float inverse = 1.0f / sqrtf(square / (float)n + 1e-5f);
    for (int i = 0; i < n; i++)
        to[i] = (to[i] - mean) * inverse * weight[i] + bias[i];
}

/* `mixed` [asked rows, `stride` apart]: attention of the last `asked` of n positions over all of them. */
ALWAYS void attend_rows(const float *qkv, int n, int asked, int heads, int width, float *weights, float *mixed, int stride) {
    const int each = width / heads;
    const float scale = 1.0f / sqrtf((float)each);
    for (int t = 0; t < asked; t++)
        for (int h = 0; h < heads; h++) {
            const float *q = qkv + (size_t)(n - asked + t) * 3 * width + h * each;
            float *to = mixed + (size_t)t * stride + h * each;
            for (int i = 0; i < n; i++)
                weights[i] = scale * dot_of(q, qkv + (size_t)i * 3 * width + width + h * each, each);
            softmax(weights, n);
            memset(to, 0, (size_t)each * 4);
            for (int i = 0; i < n; i++)
                for (int j = 0; j < each; j++)
                    to[j] += weights[i] * qkv[(size_t)i * 3 * width + 2 * width + h * each + j];
        }
}

static size_t encode_bytes(const encoder_block *b, int n, int width) {
    const size_t wide = (size_t)b->up.rows + STEP, row = (size_t)width + STEP;
    return apply_rows_bytes(&b->qkv, n) + apply_rows_bytes(&b->out, n) + apply_rows_bytes(&b->up, n) +
           apply_rows_bytes(&b->down, n) + (size_t)n * (3 * width + 4 * row + 2 * wide + 1) * 4 + 1024;
}

/* One block: the last `asked` of `x` [n rows] become what it makes of them, first in `x`. */
ALWAYS void encode(const encoder_block *b, float *x, int n, int asked, int heads, int width) {
    const int stride = round_up(width, STEP), wide = b->up.rows, far = round_up(wide, STEP);
    float *qkv = carve((size_t)n * 3 * width * 4), *weights = carve((size_t)n * 4);
    float *mixed = carve((size_t)asked * stride * 4), *added = carve((size_t)asked * width * 4);
    float *opened = carve((size_t)asked * wide * 4), *padded = carve((size_t)asked * far * 4);
    memset(mixed, 0, (size_t)asked * stride * 4);
    memset(padded, 0, (size_t)asked * far * 4);
    apply_rows(&b->qkv, b->qkv_bias, x, stride, n, qkv);
    attend_rows(qkv, n, asked, heads, width, weights, mixed, stride);
    apply_rows(&b->out, b->out_bias, mixed, stride, asked, added);
    for (int t = 0; t < asked; t++)
        add_norm(x + (size_t)(n - asked + t) * stride, added + (size_t)t * width, b->norm1, b->norm1_bias,
                 mixed + (size_t)t * stride, width);
    apply_rows(&b->up, b->up_bias, mixed, stride, asked, opened);
    for (int t = 0; t < asked; t++)
        for (int i = 0; i < wide; i++) {
            const float value = opened[(size_t)t * wide + i];
            padded[(size_t)t * far + i] = value > 0.0f ? value : 0.0f;
        }
    apply_rows(&b->down, b->down_bias, padded, far, asked, added);
    for (int t = 0; t < asked; t++)
        add_norm(mixed + (size_t)t * stride, added + (size_t)t * width, b->norm2, b->norm2_bias,
                 x + (size_t)t * stride, width);
}

/* To `last` [d]: the state of the window's last position. */
ALWAYS int run_encoder(const encoder *m, int layer, float *last) {
    const int width = m->width, stride = round_up(width, STEP), from = layer + 1 > m->window ? layer + 1 - m->window : 0;
    const int n = layer + 1 - from;
    if (!reserve(encode_bytes(m->blocks, n, width) + encode_bytes(m->blocks + 1, n, width) +
                 (size_t)n * stride * 4 + (size_t)m->chosen * 8 + 512))
        return 2;
    float *x = carve((size_t)n * stride * 4);
    picks p = {carve((size_t)m->chosen * 4), carve((size_t)m->chosen * 4)};
    memset(x, 0, (size_t)n * stride * 4);
    for (int t = 0; t < n; t++) {
        const int64_t *ids = m->ids + (size_t)(m->window - 1 + from + t) * m->chosen;
        memcpy(x + (size_t)t * stride, m->positions + (size_t)(from + t) * width, (size_t)width * 4);
        const int found = existing(ids, NULL, m->chosen, m->experts, m->chosen, 0, &p);
        add_float_rows(&m->embed, width, p.ids, p.factors, found, x + (size_t)t * stride);
    }
    encode(m->blocks, x, n, n, m->heads, width);
    encode(m->blocks + 1, x, n, 1, m->heads, width);
    memcpy(last, x, (size_t)width * 4);
    return 0;
}

#ifdef X86
AVX2 static int run_lstm_avx2(const lstm *m, int layer, int64_t stamp) { return run_lstm(m, layer, stamp); }
AVX512 static int run_lstm_avx512(const lstm *m, int layer, int64_t stamp) { return run_lstm(m, layer, stamp); }
AVX2 static int run_gru_avx2(const gru *m, float *sum) { return run_gru(m, sum); }
AVX512 static int run_gru_avx512(const gru *m, float *sum) { return run_gru(m, sum); }
AVX2 static int run_encoder_avx2(const encoder *m, int layer, float *last) { return run_encoder(m, layer, last); }
AVX512 static int run_encoder_avx512(const encoder *m, int layer, float *last) { return run_encoder(m, layer, last); }
#endif

static int refuse_shape(const matrix *m, int rows, int columns) {
    return refuse(m, 1) || m->dtype == INT4 || m->rows != rows || m->columns != columns;
}

/* What `head` says of the state after `layer`, whose `choice` is noted, of the token `stamp`; the layers before it that
 * nobody asked about are stepped through. As foregate_linear. */
int foregate_predict_lstm(const lstm *m, const network *head, int64_t layer, int64_t stamp, const int64_t *choice,
                          float *scores, int32_t *order, int64_t threads) {
    choose_best();
    const int n = m->width;
    if (layer < 0 || layer >= m->layers || n < 1 || m->chosen < 1 || m->experts < 1 ||
        refuse_shape(m->again, 4 * n, n) || refuse_shape(m->again + 1, 4 * n, n) || refuse_shape(&m->second, 4 * n, n))
        return 1;
    note_choice(m->ids + layer * m->chosen, choice, m->chosen, m->there[layer]);
    int failed;
#ifdef X86
    if (chosen.level == WITH_AVX512)
        failed = run_lstm_avx512(m, (int)layer, stamp);
    else if (chosen.level == WITH_AVX2)
        failed = run_lstm_avx2(m, (int)layer, stamp);
    else
#endif
        failed = run_lstm(m, (int)layer, stamp);
    const float *last = m->states + ((size_t)layer * 2 + 1) * 2 * n;
    return failed ? failed : foregate_predict_network(head, last, F32, NULL, NULL, 0, scores, order, threads);
}

/* The state after a token whose choices add up to the first half of `sum` [2, d], which is then the next token's: zeros,
 * and `toward` times the state. As foregate_linear. */
int foregate_step_gru(const gru *m, float *sum) {
    choose_best();
    const int n = m->width;
    if (n < 1 || refuse_shape(&m->input, 3 * n, n) || refuse_shape(&m->again, 3 * n, n) ||
        refuse_shape(&m->toward, n, n))
        return 1;
#ifdef X86
    if (chosen.level == WITH_AVX512)
        return run_gru_avx512(m, sum);
    if (chosen.level == WITH_AVX2)
        return run_gru_avx2(m, sum);
#endif
    return run_gru(m, sum);
}

/* What `head` says of the window that ends with `layer`, whose `choice` is noted. As foregate_linear. */
int foregate_predict_encoder(const encoder *m, const network *head, int64_t layer, const int64_t *choice, float *scores,
                             int32_t *order, int64_t threads) {
    choose_best();
    const int n = m->width;
    if (layer < 0 || layer >= m->layers || n < 1 || n > MOST_STATE || m->window < 1 || m->heads < 1 || n % m->heads ||
        m->chosen < 1 || m->experts < 1)
        return 1;
    for (int i = 0; i < BLOCKS; i++) {
        const encoder_block *b = m->blocks + i;
        if (refuse_shape(&b->qkv, 3 * n, n) || refuse_shape(&b->out, n, n) || refuse_shape(&b->up, b->up.rows, n) ||
            refuse_shape(&b->down, n, b->up.rows))
            return 1;
    }
    note_choice(m->ids + (m->window - 1 + layer) * m->chosen, choice, m->chosen, m->there[layer]);
    float last[MOST_STATE];
    int failed;
#ifdef X86
    if (chosen.level == WITH_AVX512)
        failed = run_encoder_avx512(m, (int)layer, last);
    else if (chosen.level == WITH_AVX2)
        failed = run_encoder_avx2(m, (int)layer, last);
    else
#endif
        failed = run_encoder(m, (int)layer, last);
    return failed ? failed : foregate_predict_network(head, last, F32, NULL, NULL, 0, scores, order, threads);
}

#endif
