/* Self-attention of one decoded token, the matrices around it included: hidden state -> q, k, v, and q with the cache
 * -> output. Between the two k and v go into the cache: in one call where it has room for them. Included by kernels.c.
 *
 * D hidden, H heads, G key/value heads, W width of a head. Every value is rounded to bf16 where torch would. */
#ifndef FOREGATE_BLOCK_H
#define FOREGATE_BLOCK_H

typedef struct {
    const uint16_t *weight; /* NULL: none */
    int32_t width;          /* W, or that of all heads together */
    float epsilon;
} head_norm;

/* Biases are NULL where there is none. */
typedef struct {
    matrix q, k, v, o; /* [H W, D], [G W, D], [G W, D], [D, H W] */
    const uint16_t *q_bias, *k_bias, *v_bias, *o_bias;
    head_norm q_norm, k_norm;
    int32_t heads, shared, width;
    float scale;
} attention_block;

static void add(uint16_t *x, const uint16_t *bias, int n) {
    for (int i = 0; bias && i < n; i++)
        x[i] = nearest_bf16(from_bf16(x[i]) + from_bf16(bias[i]));
}

/* `spare` has room for as much as `x`: a loop from one array to another is compiled to vectors. */
static void finish_heads(uint16_t *x, uint16_t *spare, int heads, int width, const uint16_t *bias,
                         const head_norm *norm, const uint16_t *cos, const uint16_t *sin, int turned) {
    add(x, bias, heads * width);
    if (norm->weight)
        memcpy(spare, x, (size_t)heads * width * sizeof *x);
    for (int i = 0; norm->weight && i < heads * width; i += norm->width)
        chosen.norm(spare + i, norm->weight, x + i, norm->width, norm->epsilon);
    for (int h = 0; h < heads; h++)
        chosen.rotate(x + (size_t)h * width, cos, sin, turned);
}

typedef struct {
    product parts[3];
    int ends[3]; /* chunks of the parts up to here */
} products3;

static void products3_chunk(void *context, int chunk) {
    const products3 *all = context;
    int part = (chunk >= all->ends[0]) + (chunk >= all->ends[1]);
    product_chunk((void *)(all->parts + part), part ? chunk - all->ends[part - 1] : chunk);
}

static int refuse_norm(const head_norm *norm, int heads, int width) {
    return norm->weight && (norm->width < 16 || norm->width % 16 || heads * width % norm->width);
}

static int refuse_qkv(const attention_block *b, int turned) {
    const matrix *matrices[3] = {&b->q, &b->k, &b->v};
    int heads[3] = {b->heads, b->shared, b->shared};
    if (b->heads < b->shared || turned < 0 || turned % 2 || turned > b->width || refuse_norm(&b->q_norm, b->heads, b->width) ||
        refuse_norm(&b->k_norm, b->shared, b->width))
        return 1;
    for (int i = 0; i < 3; i++)
        if (refuse(matrices[i], 1) || matrices[i]->dtype != b->q.dtype || matrices[i]->columns != b->q.columns ||
            matrices[i]->group || matrices[i]->rows != heads[i] * b->width)
            return 1;
    return 0;
}

static size_t qkv_bytes(const attention_block *b) {
    return input_bytes(&b->q) + (size_t)round_up(b->q.columns, STEP) * 4 + (size_t)b->heads * b->width * 2 + 256;
}

static void project(const attention_block *b, const uint16_t *x, const uint16_t *cos, const uint16_t *sin, int turned,
                    uint16_t *q, uint16_t *k, uint16_t *v, int threads) {
    const matrix *matrices[3] = {&b->q, &b->k, &b->v};
    uint16_t *out[3] = {q, k, v};
    const int padded = round_up(b->q.columns, STEP);
    products3 all;
    input in;
    uint16_t *spare = carve((size_t)b->heads * b->width * sizeof *q);
    float *row = carve((size_t)padded * 4);
    load_row(x, BF16, 0, b->q.columns, row, padded);
    make_input(&b->q, row, &in);
    for (int i = 0, chunks = 0; i < 3; i++) {
        int step = chunk_rows(matrices[i], 1);
        all.parts[i] = (product){matrices[i], &in, 1, step, out[i], BF16, matrices[i]->rows};
        all.ends[i] = chunks += (matrices[i]->rows + step - 1) / step;
    }
    pool_run(products3_chunk, &all, all.ends[2], threads);
    finish_heads(q, spare, b->heads, b->width, b->q_bias, &b->q_norm, cos, sin, turned);
    finish_heads(k, spare, b->shared, b->width, b->k_bias, &b->k_norm, cos, sin, turned);
    add(v, b->v_bias, b->shared * b->width);
}

/* Heads that share a key; 0, which is refused, where there is none. */
static int group_of(const attention_block *b) { return b->shared > 0 ? b->heads / b->shared : 0; }

static int refuse_out(const attention_block *b, const attention *a) {
    return refuse_attention(a, b->shared) || refuse(&b->o, 1) || b->o.group || b->o.columns != b->heads * b->width;
}

static size_t out_bytes(const attention_block *b, int positions) {
    const size_t values = (size_t)b->heads * b->width;
    return (size_t)b->heads * positions * 4 + values * 2 + (size_t)round_up(b->o.columns, STEP) * 4 + input_bytes(&b->o) + 256;
}

static void attend_project(const attention_block *b, attention *a, uint16_t *out, int threads) {
    const int values = b->heads * b->width, padded = round_up(b->o.columns, STEP);
    a->scores = carve((size_t)b->heads * a->positions * 4);
    a->out = carve((size_t)values * 2);
    attend_all(a, b->shared, threads);
    input in;
    float *row = carve((size_t)padded * 4);
    load_row(a->out, BF16, 0, values, row, padded);
    make_input(&b->o, row, &in);
    multiply(&b->o, &in, 1, out, BF16, b->o.rows, threads);
    add(out, b->o_bias, b->o.rows);
}

/* q [H, W], k and v [G, W] of x [D]; q and k are normed and turned by cos and sin [turned]. As foregate_linear. */
int foregate_qkv(const attention_block *b, const uint16_t *x, const uint16_t *cos, const uint16_t *sin, int turned,
                 uint16_t *q, uint16_t *k, uint16_t *v, int threads) {
    choose_best();
    if (refuse_qkv(b, turned))
        return 1;
    if (!reserve(qkv_bytes(b)))
        return 2;
    project(b, x, cos, sin, turned, q, k, v, threads);
    return 0;
}

/* out [D] = o softmax(scale q k^T) v for q [H, W] over `positions` rows of k and v, whose strides (of a head, of a
 * row) are in elements. As foregate_linear. */
int foregate_attend_out(const attention_block *b, const uint16_t *q, const uint16_t *k, int64_t k_head, int64_t k_row,
                        const uint16_t *v, int64_t v_head, int64_t v_row, int positions, uint16_t *out, int threads) {
    choose_best();
    attention a = {q,     k,     v,     NULL,   NULL,  group_of(b), positions, b->width, b->width, k_head,
                   k_row, v_head, v_row, b->scale};
    if (refuse_out(b, &a))
        return 1;
    if (!reserve(out_bytes(b, positions)))
        return 2;
    attend_project(b, &a, out, threads);
    return 0;
}

/* Both in one: key and value of x become the last of the `positions` rows of k and v. As foregate_linear. */
int foregate_attention(const attention_block *b, const uint16_t *x, const uint16_t *cos, const uint16_t *sin,
                       int turned, uint16_t *k, int64_t k_head, int64_t k_row, uint16_t *v, int64_t v_head,
                       int64_t v_row, int positions, uint16_t *out, int threads) {
    choose_best();
    attention a = {NULL,  k,      v,     NULL, NULL, group_of(b), positions, b->width, b->width, k_head,
                   k_row, v_head, v_row, b->scale};
    if (refuse_qkv(b, turned) || refuse_out(b, &a))
        return 1;
    const size_t wide = (size_t)b->heads * b->width * 2, narrow = (size_t)b->shared * b->width * 2;
    if (!reserve(qkv_bytes(b) + out_bytes(b, positions) + wide + 2 * narrow + 256))
        return 2;
    uint16_t *q = carve(wide), *key = carve(narrow), *value = carve(narrow);
    project(b, x, cos, sin, turned, q, key, value, threads);
    for (int g = 0; g < b->shared; g++) {
        memcpy(k + g * k_head + (positions - 1) * k_row, key + (size_t)g * b->width, (size_t)b->width * 2);
        memcpy(v + g * v_head + (positions - 1) * v_row, value + (size_t)g * b->width, (size_t)b->width * 2);
    }
    a.q = q;
    attend_project(b, &a, out, threads);
    return 0;
}

#endif
