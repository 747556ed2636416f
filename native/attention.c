/* attention.c - recomputes softmax(scale q k + mask) of chosen rows from a FLASH_ATTN_EXT node's inputs. */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "tap_internal.h"

#define E_BYTES ((int64_t)1 << 20) /* scores kept per thread: about what a core's L2 cache holds */

int lv_lanes(int64_t n_rows) { return n_rows >= 4 ? LV_LANES : 1; }

static int bad_node(lv_tap *tap, const struct ggml_tensor *node, const char *what) {
    const struct ggml_tensor *q = node->src[0], *k = node->src[1];
    return lv_fail(tap, LV_E_GRAPH,
                   "%s '%s': %s (q '%s' %lldx%lldx%lldx%lld, k '%s' %s %lldx%lldx%lldx%lld)", ggml_op_name(node->op),
                   node->name, what, q ? q->name : "", q ? (long long)q->ne[0] : 0, q ? (long long)q->ne[1] : 0,
                   q ? (long long)q->ne[2] : 0, q ? (long long)q->ne[3] : 0, k ? k->name : "",
                   k ? ggml_type_name(k->type) : "", k ? (long long)k->ne[0] : 0, k ? (long long)k->ne[1] : 0,
                   k ? (long long)k->ne[2] : 0, k ? (long long)k->ne[3] : 0);
}

static const char *wrong_shape(const struct ggml_tensor *node) {
    const struct ggml_tensor *q = node->src[0], *k = node->src[1], *v = node->src[2], *mask = node->src[3];
    if (q == NULL || k == NULL || v == NULL || q->type != GGML_TYPE_F32) {
        return "inputs missing, or q is not f32";
    }
    if (q->ne[3] != 1 || k->ne[3] != 1 || v->ne[3] != 1) {
        return "more than one sequence or picture in a batch";
    }
    if (q->ne[0] != k->ne[0] || k->ne[2] < 1 || q->ne[2] % k->ne[2] != 0 || q->ne[2] > LV_MAX_HEADS) {
        return "heads do not match";
    }
    if (q->nb[0] != sizeof(float) || k->nb[0] != ggml_type_size(k->type) || k->ne[0] % ggml_blck_size(k->type) != 0) {
        return "rows are not contiguous";
    }
    if (v->ne[1] != k->ne[1] || v->ne[2] < 1 || q->ne[2] % v->ne[2] != 0) {
        return "v does not match k";
    }
    if (mask != NULL && (mask->ne[0] != k->ne[1] || mask->ne[1] < q->ne[1] || mask->ne[2] != 1 || mask->ne[3] != 1 ||
                         mask->nb[0] != ggml_type_size(mask->type) ||
                         (mask->type != GGML_TYPE_F16 && mask->type != GGML_TYPE_F32))) {
        return "mask does not match";
    }
    const struct ggml_tensor *sinks = node->src[4];
    if (sinks != NULL && (sinks->type != GGML_TYPE_F32 || sinks->ne[0] != q->ne[2] || sinks->nb[0] != sizeof(float))) {
        return "sinks do not match";
    }
    return NULL;
}

static int attn_values(lv_tap *tap, const struct ggml_tensor *node, struct lv_attn *a) {
    const struct ggml_tensor *v = node->src[2];
    a->dv = v->ne[0];
    a->v_type = v->type;
    a->v_row = v->nb[1];
    a->v_head = v->nb[2];
    a->v_float = ggml_get_type_traits(v->type)->to_float;
    a->out_head = node->nb[1];
    a->out_row = node->nb[2];
    const bool fits = node->type == GGML_TYPE_F32 && node->ne[0] == v->ne[0] && node->ne[1] == a->n_head &&
                      node->ne[2] == a->n_q && node->nb[0] == sizeof(float);
    if (!fits || v->nb[0] != ggml_type_size(v->type) || (a->v_float == NULL && v->type != GGML_TYPE_F32)) {
        return bad_node(tap, node, "v or the output cannot be read");
    }
    a->v = lv_host(tap, &tap->fetch[2], v, ggml_nbytes(v));
    a->out = lv_host(tap, &tap->fetch[5], node, ggml_nbytes(node));
    return a->v != NULL && a->out != NULL ? LV_OK : tap->status;
}

int lv_attn_open(lv_tap *tap, const struct ggml_tensor *node, bool need_v, struct lv_attn *a) {
    memset(a, 0, sizeof *a);
    const char *wrong = wrong_shape(node);
    if (wrong != NULL) {
        return bad_node(tap, node, wrong);
    }
    const struct ggml_tensor *q = node->src[0], *k = node->src[1];
    *a = (struct lv_attn){.node = node, .d = q->ne[0], .n_q = q->ne[1], .n_head = q->ne[2], .n_kv = k->ne[1],
                          .n_head_kv = k->ne[2], .q_row = q->nb[1], .q_head = q->nb[2], .k_row = k->nb[1],
                          .k_head = k->nb[2], .k_type = k->type};
    float params[3]; /* scale, max_bias, softcap */
    memcpy(params, node->op_params, sizeof params);
    a->max_bias = params[1];
    a->softcap = params[2];
    a->scale = a->softcap != 0.0f ? params[0] / a->softcap : params[0];
    a->k_float = ggml_get_type_traits(k->type)->to_float;
    if (a->k_float == NULL && k->type != GGML_TYPE_F32) {
        return bad_node(tap, node, "keys of this type cannot be read");
    }
    a->q = lv_host(tap, &tap->fetch[0], q, ggml_nbytes(q));
    a->k = lv_host(tap, &tap->fetch[1], k, ggml_nbytes(k));
    if (a->q == NULL || a->k == NULL) {
        return tap->status;
    }
    if (node->src[4] != NULL) {
        a->sinks = lv_host(tap, &tap->fetch[4], node->src[4], (size_t)a->n_head * sizeof(float));
        if (a->sinks == NULL) {
            return tap->status;
        }
    }
    return need_v ? attn_values(tap, node, a) : LV_OK;
}

float lv_slope(const struct lv_attn *a, int64_t head) {
    if (a->max_bias <= 0.0f) {
        return 1.0f;
    }
    int64_t log2 = 1; /* largest power of two that is no more than n_head */
    while (2 * log2 <= a->n_head) {
        log2 *= 2;
    }
    const float m0 = powf(2.0f, -a->max_bias / (float)log2);
    const float m1 = powf(2.0f, -(a->max_bias / 2.0f) / (float)log2);
    return head < log2 ? powf(m0, (float)(head + 1)) : powf(m1, (float)(2 * (head - log2) + 1));
}

/* ---- mask ---- */

static void mask_row(const struct lv_kernels *kernels, const struct ggml_tensor *t, const char *src, float *out) {
    if (t->type == GGML_TYPE_F16) {
        kernels->from_f16((const uint16_t *)src, out, t->ne[0]);
    } else {
        memcpy(out, src, (size_t)t->ne[0] * sizeof(float));
    }
}

/* One block: rows side by side, and the range of cells that any of them sees. */
static void mask_block(struct lv_mask *m, int64_t block, int lane, const float *row) {
    float *out = (float *)m->data.data + block * m->n_kv * m->lanes + lane;
    int32_t *first = (int32_t *)m->first.data + block, *end = (int32_t *)m->end.data + block;
    int64_t lo = 0, hi = m->n_kv;
    while (lo < hi && row[lo] == -INFINITY) {
        lo++;
    }
    while (hi > lo && row[hi - 1] == -INFINITY) {
        hi--;
    }
    if (lo < hi) {
        *first = lo < *first ? (int32_t)lo : *first;
        *end = hi > *end ? (int32_t)hi : *end;
    }
    for (int64_t c = 0; c < m->n_kv; c++) {
        out[c * m->lanes] = row[c];
    }
}

static bool mask_room(lv_tap *tap, struct lv_mask *m, int64_t n_blocks) {
    /* one row more for the conversion, at the end */
    const size_t n = (size_t)(n_blocks * m->lanes + 1) * (size_t)m->n_kv;
    if (!lv_grow(tap, &m->data, n * sizeof(float)) || !lv_grow(tap, &m->first, (size_t)n_blocks * sizeof(int32_t)) ||
        !lv_grow(tap, &m->end, (size_t)n_blocks * sizeof(int32_t))) {
        return false;
    }
    for (int64_t b = 0; b < n_blocks; b++) {
        ((int32_t *)m->first.data)[b] = (int32_t)m->n_kv;
        ((int32_t *)m->end.data)[b] = 0;
    }
    return true;
}

static int mask_convert(lv_tap *tap, struct lv_mask *m, const struct ggml_tensor *t, const int32_t *rows,
                        int32_t n_rows) {
    const char *src = lv_host(tap, &tap->fetch[3], t, ggml_nbytes(t));
    const int64_t n_blocks = (n_rows + m->lanes - 1) / m->lanes;
    if (src == NULL || !mask_room(tap, m, n_blocks)) {
        return tap->status;
    }
    float *row = (float *)m->data.data + n_blocks * m->lanes * m->n_kv;
    for (int64_t i = 0; i < n_blocks * m->lanes; i++) {
        /* lanes without a row repeat the last one: they stay finite and get weight 0 */
        const int32_t r = rows[i < n_rows ? i : n_rows - 1];
        mask_row(tap->kernels, t, src + (size_t)r * t->nb[1], row);
        mask_block(m, i / m->lanes, (int)(i % m->lanes), row);
    }
    return LV_OK;
}

int lv_attn_mask(lv_tap *tap, struct lv_attn *a, const int32_t *rows, int32_t n_rows, bool keep) {
    const struct ggml_tensor *t = a->node->src[3];
    a->mask = NULL;
    if (t == NULL) {
        return LV_OK;
    }
    for (int i = 0; keep && i < LV_N_MASK; i++) {
        if (tap->masks[i].key == t) {
            a->mask = &tap->masks[i];
            return LV_OK;
        }
    }
    struct lv_mask *m = &tap->masks[tap->next_mask];
    tap->next_mask = (tap->next_mask + 1) % LV_N_MASK;
    m->key = NULL;
    m->n_kv = t->ne[0];
    m->lanes = lv_lanes(n_rows);
    const int status = mask_convert(tap, m, t, rows, n_rows);
    if (status == LV_OK) {
        m->key = keep ? t : NULL;
        a->mask = m;
    }
    return status;
}

/* ---- scores ---- */

struct job {
    lv_tap *tap;
    const struct lv_attn *a;
    const int32_t *rows;
    int32_t n_rows;
    const float *flag;
    lv_emit emit;
    void *ctx;
    int lanes;
    int64_t n_blocks, group; /* blocks in all, and taken through the keys together */
};

/* A thread's scratch, cut up. */
struct work {
    float *q;    /* (group, d, lanes) */
    float *tile; /* (LV_TILE, d) */
    float *e;    /* (group, n_kv, lanes) */
};

static size_t work_floats(const struct job *j) {
    return (size_t)(j->group * j->a->d * j->lanes + LV_TILE * j->a->d + j->group * j->a->n_kv * j->lanes);
}

static struct work work_of(const struct job *j, int thread) {
    struct work w;
    w.e = j->tap->scratch[thread].data;
    w.q = w.e + j->group * j->a->n_kv * j->lanes;
    w.tile = w.q + j->group * j->a->d * j->lanes;
    return w;
}

static void range_of(const struct job *j, int64_t block, int64_t *first, int64_t *end) {
    const struct lv_mask *m = j->a->mask;
    *first = m != NULL ? ((const int32_t *)m->first.data)[block] : 0;
    *end = m != NULL ? ((const int32_t *)m->end.data)[block] : j->a->n_kv;
    *end = *end > *first ? *end : *first;
}

static void load_queries(const struct job *j, int64_t head, int64_t block, float *q) {
    const struct lv_attn *a = j->a;
    for (int l = 0; l < j->lanes; l++) {
        const int64_t i = block * j->lanes + l;
        const int32_t row = j->rows[i < j->n_rows ? i : j->n_rows - 1];
        const float *src = (const float *)(a->q + (size_t)row * a->q_row + (size_t)head * a->q_head);
        for (int64_t x = 0; x < a->d; x++) {
            q[x * j->lanes + l] = src[x] * a->scale;
        }
    }
}

static void key_row(const struct job *j, const char *src, float *out) {
    if (j->a->k_type == GGML_TYPE_F16) {
        j->tap->kernels->from_f16((const uint16_t *)src, out, j->a->d);
    } else if (j->a->k_type == GGML_TYPE_F32) {
        memcpy(out, src, (size_t)j->a->d * sizeof(float));
    } else {
        j->a->k_float(src, out, j->a->d);
    }
}

/* Few rows: one dot product per cell, straight from the cache where it holds halves. */
static void score_row(const struct job *j, const char *keys, const struct work *w, int64_t first, int64_t end) {
    const struct lv_attn *a = j->a;
    if (a->k_type == GGML_TYPE_F16) {
        j->tap->kernels->dots_f16(keys + (size_t)first * a->k_row, a->k_row, end - first, w->q, a->d, w->e + first);
        return;
    }
    for (int64_t c = first; c < end; c++) {
        key_row(j, keys + (size_t)c * a->k_row, w->tile);
        w->e[c] = j->tap->kernels->dot(w->tile, w->q, a->d);
    }
}

/* Many rows: a tile of keys is converted once for all blocks of the group. */
static void score_blocks(const struct job *j, const char *keys, const struct work *w, int64_t n, int64_t first,
                         int64_t end) {
    const struct lv_attn *a = j->a;
    for (int64_t c = first; c < end; c += LV_TILE) {
        const int n_cells = (int)(end - c < LV_TILE ? end - c : LV_TILE);
        for (int i = 0; i < n_cells; i++) {
            key_row(j, keys + (size_t)(c + i) * a->k_row, w->tile + i * a->d);
        }
        for (int64_t b = 0; b < n; b++) {
            j->tap->kernels->scores(w->q + b * a->d * LV_LANES, w->tile, a->d, n_cells,
                                    w->e + (b * a->n_kv + c) * LV_LANES);
        }
    }
}

static void emit_block(const struct job *j, int64_t head, int64_t block, float *e) {
    struct lv_block out = {.head = (int32_t)head, .lanes = j->lanes, .rows = j->rows + block * j->lanes, .e = e};
    const int64_t left = j->n_rows - block * j->lanes;
    out.n = (int32_t)(left < j->lanes ? left : j->lanes);
    range_of(j, block, &out.first, &out.end);
    const struct lv_mask *m = j->a->mask;
    const struct lv_softmax o = {
        .mask = m != NULL ? (const float *)m->data.data + (block * m->n_kv + out.first) * m->lanes : NULL,
        .flag = j->flag != NULL ? j->flag + out.first : NULL,
        .sink = j->a->sinks != NULL ? j->a->sinks + head : NULL,
        .slope = lv_slope(j->a, head),
        .softcap = j->a->softcap,
    };
    struct lv_stats st;
    const struct lv_kernels *k = j->tap->kernels;
    (j->lanes == 1 ? k->softmax_row : k->softmax)(e + out.first * j->lanes, out.end - out.first, &o, &st);
    for (int l = 0; l < j->lanes; l++) {
        out.w[l] = l < out.n && st.sum[l] > 0.0f ? 1.0f / st.sum[l] : 0.0f;
        out.entropy[l] = st.image[l] > 0.0f ? logf(st.image[l]) - st.slog[l] / st.image[l] : 0.0f;
    }
    j->emit(j->ctx, &out);
}

static void head_task(void *ctx, int head, int thread) {
    const struct job *j = ctx;
    const struct lv_attn *a = j->a;
    const struct work w = work_of(j, thread);
    const int64_t kv_head = head / (a->n_head / a->n_head_kv);
    const char *keys = a->k + (size_t)kv_head * a->k_head;
    for (int64_t b0 = 0; b0 < j->n_blocks; b0 += j->group) {
        const int64_t n = j->n_blocks - b0 < j->group ? j->n_blocks - b0 : j->group;
        int64_t first = a->n_kv, end = 0;
        for (int64_t b = 0; b < n; b++) {
            int64_t lo, hi;
            range_of(j, b0 + b, &lo, &hi);
            first = lo < first ? lo : first;
            end = hi > end ? hi : end;
            load_queries(j, head, b0 + b, w.q + b * a->d * j->lanes);
        }
        if (j->lanes == 1) {
            score_row(j, keys, &w, first, end);
        } else {
            score_blocks(j, keys, &w, n, first, end);
        }
        for (int64_t b = 0; b < n; b++) {
            emit_block(j, head, b0 + b, w.e + b * a->n_kv * j->lanes);
        }
    }
}

int lv_attn_run(lv_tap *tap, const struct lv_attn *a, const int32_t *rows, int32_t n_rows, const float *flag,
                lv_emit emit, void *ctx) {
    struct job j = {.tap = tap, .a = a, .rows = rows, .n_rows = n_rows, .flag = flag, .emit = emit, .ctx = ctx,
                    .lanes = lv_lanes(n_rows), .group = 1};
    for (int32_t i = 0; i < n_rows; i++) {
        if (rows[i] < 0 || rows[i] >= a->n_q) {
            return bad_node(tap, a->node, "a wanted row is not in the graph");
        }
    }
    j.n_blocks = (n_rows + j.lanes - 1) / j.lanes;
    if (j.lanes > 1) {
        const int64_t fit = E_BYTES / (a->n_kv * j.lanes * (int64_t)sizeof(float) + 1);
        j.group = fit < 1 ? 1 : fit > 4 ? 4 : fit;
        j.group = j.group < j.n_blocks ? j.group : j.n_blocks;
    }
    const int n_threads = tap->n_threads;
    for (int i = 0; i < n_threads; i++) {
        if (!lv_grow(tap, &tap->scratch[i], work_floats(&j) * sizeof(float))) {
            return tap->status;
        }
    }
    lv_parallel(tap, (int)a->n_head, head_task, &j);
    return LV_OK;
}

/* ---- flash attention off ---- */

static float row_entropy(const float *p, const struct lv_map *map) {
    const int32_t *cell = map->cell.data;
    double sum = 0.0, plogp = 0.0;
    for (int64_t i = 0; i < map->n_pairs; i++) {
        const float x = p[cell[i]];
        sum += x;
        plogp += x > 0.0f ? (double)x * logf(x) : 0.0;
    }
    return sum > 0.0 ? (float)(log(sum) - plogp / sum) : 0.0f;
}

int lv_soft_max_run(lv_tap *tap, const struct ggml_tensor *node, const int32_t *rows, int32_t n_rows,
                    const struct lv_map *map, lv_emit emit, void *ctx) {
    if (node->type != GGML_TYPE_F32 || node->ne[3] != 1 || node->nb[0] != sizeof(float) ||
        node->ne[2] > LV_MAX_HEADS) {
        return bad_node(tap, node, "probabilities cannot be read");
    }
    const char *data = lv_host(tap, &tap->fetch[5], node, ggml_nbytes(node));
    if (data == NULL) {
        return tap->status;
    }
    for (int64_t head = 0; head < node->ne[2]; head++) {
        for (int32_t i = 0; i < n_rows; i++) {
            if (rows[i] < 0 || rows[i] >= node->ne[1]) {
                return bad_node(tap, node, "a wanted row is not in the graph");
            }
            const float *p = (const float *)(data + (size_t)head * node->nb[2] + (size_t)rows[i] * node->nb[1]);
            struct lv_block b = {.head = (int32_t)head, .n = 1, .lanes = 1, .rows = rows + i, .e = p,
                                 .end = node->ne[0], .w = {1.0f}};
            if (map != NULL) {
                b.entropy[0] = row_entropy(p, map);
            }
            emit(ctx, &b);
        }
    }
    return LV_OK;
}
