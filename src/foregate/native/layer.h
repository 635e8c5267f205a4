/* A decoder layer of one token up to its experts: norm, attention, sum, norm, router. Included by kernels.c.
 *
 * D hidden. Every value is rounded to bf16 where torch would. */
#ifndef FOREGATE_LAYER_H
#define FOREGATE_LAYER_H

typedef struct {
    const int32_t *slots;         /* of each expert: where it is resident, or -1 */
    const expert *const *experts; /* by slot; null where it is not known what lies there */
    const int32_t *on;            /* whether to begin any */
    int64_t hidden;
    uint64_t begun; /* bit i: the i-th of the chosen has been */
    int64_t number; /* of what was begun */
} residents;

typedef struct {
    const attention_block *attention;
    head_norm before, after; /* of D numbers: before attention, and before the router */
    matrix gate;
    int32_t top, normalised, dtype; /* of the router: see foregate_route */
    uint16_t *normed, *residual, *routed, *logits; /* [D], [D], [D], [N]: input of attention, sum after it, the router's */
    int64_t *ids;
    void *weights;
    float *scores, *shares; /* [N] and [top]: logits and weights again */
    uint16_t *parts;        /* [top, D]: what the experts give */
    residents *there;       /* or null */
} decoder_layer;

static int refuse_layer(const decoder_layer *l) {
    const int n = l->attention->o.rows;
    return l->before.width != n || l->after.width != n || l->gate.columns != n || n < 16 || n % 16;
}

/* Have the chosen that are resident computed by other threads, until foregate_experts_end: which of them. */
static uint64_t begin_residents(const decoder_layer *l, residents *r, int threads) {
    const expert *found[MOST_EXPERTS];
    void *outs[MOST_EXPERTS];
    uint64_t which = 0;
    int64_t count = 0, n = l->after.width;
    for (int i = 0; *r->on && i < l->top; i++) {
        const int32_t slot = l->ids[i] < 0 ? -1 : r->slots[l->ids[i]];
        if (slot < 0 || !r->experts[slot])
            continue;
        found[count] = r->experts[slot];
        outs[count++] = l->parts + i * n;
        which |= (uint64_t)1 << i;
    }
    if (!count || foregate_experts_begin(found, outs, count, r->hidden, l->routed, n, n, BF16, threads))
        return 0;
    r->number = atomic_load(&begun.number);
    return which;
}

static void begin_chosen(const decoder_layer *l, int threads) {
    if (l->there)
        l->there->begun = begin_residents(l, l->there, threads);
}

static void tell_choice(const decoder_layer *l) {
    for (int e = 0; e < l->gate.rows; e++)
        l->scores[e] = from_bf16(l->logits[e]);
    for (int i = 0; i < l->top; i++)
        l->shares[i] = l->dtype == F32 ? ((const float *)l->weights)[i] : from_bf16(((const uint16_t *)l->weights)[i]);
}

/* From x [D] to the chosen experts and all else that `l` has room for; `normed`: l->normed is there already. The other
 * arguments as for foregate_attention. Returns as foregate_route: UNDECIDED leaves only the choice open, and has begun
 * what is sure. */
int foregate_layer(const decoder_layer *l, const uint16_t *x, int64_t normed, const uint16_t *cos, const uint16_t *sin,
                   int64_t turned, uint16_t *k, int64_t k_head, int64_t k_row, uint16_t *v, int64_t v_head,
                   int64_t v_row, int64_t positions, int64_t threads) {
    choose_best();
    if (refuse_layer(l))
        return 1;
    const int n = l->after.width;
    if (!normed)
        chosen.norm(x, l->before.weight, l->normed, n, l->before.epsilon);
    int code = foregate_attention(l->attention, l->normed, cos, sin, (int)turned, k, k_head, k_row, v, v_head, v_row,
                                  (int)positions, l->residual, (int)threads);
    if (code)
        return code;
    for (int i = 0; i < n; i++)
        l->residual[i] = nearest_bf16(from_bf16(x[i]) + from_bf16(l->residual[i]));
    chosen.norm(l->residual, l->after.weight, l->routed, n, l->after.epsilon);
    code = foregate_route(&l->gate, l->routed, l->top, l->normalised, l->logits, l->ids, l->weights, l->dtype);
    if (!code || code == UNDECIDED)
        begin_chosen(l, (int)threads);
    if (!code)
        tell_choice(l);
    return code;
}

/* Make these logits, weights and ids, of the forms of `l`, what its router chose, after a call that was UNDECIDED. 1, and
 * nothing done, where an id is no expert. */
int foregate_layer_settle(const decoder_layer *l, const uint16_t *logits, const void *weights, const int64_t *ids,
                          int64_t threads) {
    for (int i = 0; i < l->top; i++)
        if (ids[i] < 0 || ids[i] >= l->gate.rows)
            return 1;
    for (int i = 0; i < l->top && l->there; i++)
        if (l->there->begun >> i & 1 && ids[i] != l->ids[i]) { /* equal ones in another order */
            foregate_experts_drop(l->there->number);
            l->there->begun = 0;
        }
    const int begun = l->there && l->there->begun;
    memcpy(l->logits, logits, (size_t)l->gate.rows * 2);
    memcpy(l->ids, ids, (size_t)l->top * 8);
    memcpy(l->weights, weights, (size_t)l->top * (l->dtype == F32 ? 4 : 2));
    if (!begun)
        begin_chosen(l, (int)threads);
    tell_choice(l);
    return 0;
}

/* out [D] = the residual, and the sum of `parts` by the weights, which is rounded before. As foregate_combine. */
int foregate_layer_out(const decoder_layer *l, uint16_t *out) {
    const int n = l->after.width;
    int code = foregate_combine(l->parts, l->weights, l->dtype, l->top, n, out);
    for (int i = 0; !code && i < n; i++)
        out[i] = nearest_bf16(from_bf16(l->residual[i]) + from_bf16(out[i]));
    return code;
}

enum { DROPPED = -1 };

/* foregate_experts_end of `number` (0: of nothing), foregate_layer_out to `out`, and for that foregate_layer of `next`,
 * whose other arguments follow: nothing lies between. Returns as the last; DROPPED, and nothing done, as the first.
 * `told`: what that answered, and for how many ns the second took, and the last. */
int foregate_layer_go_on(const decoder_layer *l, int64_t number, uint16_t *out, int64_t *told, const decoder_layer *next,
                         const uint16_t *cos, const uint16_t *sin, int64_t turned, uint16_t *k, int64_t k_head,
                         int64_t k_row, uint16_t *v, int64_t v_head, int64_t v_row, int64_t positions,
                         int64_t threads) {
    const int computed = number ? foregate_experts_end(number) : 0;
    if (computed < 0)
        return DROPPED;
    const int64_t ended = now_ns();
    int code = foregate_layer_out(l, out);
    const int64_t mixed = now_ns();
    if (!code)
        code = foregate_layer(next, out, 0, cos, sin, turned, k, k_head, k_row, v, v_head, v_row, positions, threads);
    told[0] = computed;
    told[1] = mixed - ended;
    told[2] = now_ns() - mixed;
    return code;
}

#endif
