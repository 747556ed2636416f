/* llm.c - the text model: batches, sums, positions. */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "tap_internal.h"

static int refuse(lv_tap *tap, const char *what) {
    if (tap == NULL) {
        return LV_E_ARG;
    }
    tap->status = LV_OK; /* the caller's mistake is newer than whatever the last run met */
    return lv_fail(tap, LV_E_ARG, "%s", what);
}

static void drop_sums(lv_tap *tap) {
    for (int c = 0; c < LV_N_CLASS; c++) {
        for (int r = 0; r < LV_N_REDUCTION; r++) {
            free(tap->sums[c][r]);
            tap->sums[c][r] = NULL;
        }
        tap->n_rows_seen[c] = 0;
    }
}

int lv_tap_llm(lv_tap *tap, int32_t n_layer, int32_t n_head) {
    if (tap == NULL || n_layer < 1 || n_layer > LV_MAX_LAYERS || n_head < 1 || n_head > LV_MAX_HEADS) {
        return refuse(tap, "layers and heads must be 1..1024");
    }
    drop_sums(tap);
    tap->n_layer = n_layer;
    tap->n_head = n_head;
    return LV_OK;
}

int lv_tap_reset(lv_tap *tap, int32_t n_image, uint32_t reductions) {
    if (tap == NULL || n_image < 0 || n_image > LV_MAX_IMAGE || reductions >= 1u << LV_N_REDUCTION) {
        return refuse(tap, "the number of image tokens or the reductions are out of range");
    }
    drop_sums(tap);
    lv_maps_drop(tap, n_image);
    tap->n_image = n_image;
    tap->reductions = reductions;
    return LV_OK;
}

int lv_tap_forget(lv_tap *tap) {
    if (tap == NULL) {
        return LV_E_ARG;
    }
    lv_maps_drop(tap, 0);
    return LV_OK;
}

static const char *wrong_batch(const lv_tap *tap, int32_t n_rows, const int32_t *image, const uint8_t *rows) {
    if (n_rows < 1 || n_rows > LV_MAX_ROWS) {
        return "a batch needs 1..1048576 rows";
    }
    for (int32_t i = 0; image != NULL && i < n_rows; i++) {
        if (image[i] < -1 || image[i] >= tap->n_image) {
            return "an image token index is not below the number given to lv_tap_reset";
        }
    }
    for (int32_t i = 0; rows != NULL && i < n_rows; i++) {
        if (rows[i] >= 1 << LV_N_CLASS) {
            return "a row has unknown class bits";
        }
        if (rows[i] != 0 && tap->n_layer == 0) {
            return "lv_tap_llm comes first";
        }
    }
    return NULL;
}

/* Sums are allocated when a class is first wanted; all zero until then. */
static bool sums_ready(lv_tap *tap, unsigned classes) {
    const size_t n = (size_t)tap->n_layer * (size_t)tap->n_head * (size_t)tap->n_image;
    for (int c = 0; c < LV_N_CLASS; c++) {
        for (int r = 0; r < LV_N_REDUCTION; r++) {
            const bool wanted = (classes >> c & 1u) != 0 && (tap->reductions >> r & 1u) != 0 && n > 0;
            if (wanted && tap->sums[c][r] == NULL) {
                tap->sums[c][r] = calloc(n, sizeof(float));
                if (tap->sums[c][r] == NULL) {
                    lv_fail(tap, LV_E_MEMORY, "no memory for %zu sums", n);
                    return false;
                }
            }
        }
    }
    return true;
}

static int copy_batch(lv_tap *tap, int32_t n_rows, const int32_t *image, const uint8_t *rows, const int32_t *pos) {
    const size_t n = (size_t)n_rows;
    if (!lv_grow(tap, &tap->image, n * sizeof(int32_t)) || !lv_grow(tap, &tap->rows, n) ||
        !lv_grow(tap, &tap->pos, n * sizeof(int32_t)) || !lv_grow(tap, &tap->armed, n * sizeof(int32_t))) {
        return tap->status;
    }
    unsigned classes = 0;
    tap->n_armed = 0;
    for (int32_t i = 0; i < n_rows; i++) {
        const uint8_t class = rows != NULL ? rows[i] : 0;
        ((int32_t *)tap->image.data)[i] = image != NULL ? image[i] : -1;
        ((uint8_t *)tap->rows.data)[i] = class;
        if (class != 0) {
            ((int32_t *)tap->armed.data)[tap->n_armed++] = i;
        }
        classes |= class;
    }
    if (pos != NULL) {
        memcpy(tap->pos.data, pos, n * sizeof(int32_t));
    }
    tap->n_rows = n_rows;
    tap->has_pos = pos != NULL;
    return sums_ready(tap, classes) ? LV_OK : tap->status;
}

int lv_tap_begin(lv_tap *tap, int32_t n_rows, const int32_t *image, const uint8_t *rows, const int32_t *pos) {
    const char *wrong = tap != NULL ? wrong_batch(tap, n_rows, image, rows) : "no tap";
    if (wrong != NULL) {
        return refuse(tap, wrong);
    }
    lv_restore_flags(tap); /* of a run that was never ended */
    tap->phase = LV_IDLE;
    tap->status = LV_OK;
    tap->error[0] = '\0';
    const int status = copy_batch(tap, n_rows, image, rows, pos);
    if (status != LV_OK) {
        return status;
    }
    lv_maps_begin(tap);
    memset(tap->seen, 0, sizeof tap->seen);
    memset(tap->stored, 0, sizeof tap->stored);
    for (int i = 0; i < LV_N_MASK; i++) {
        tap->masks[i].key = NULL;
    }
    tap->n_seen = tap->n_moved = 0;
    tap->stage.end = 0;
    tap->worst = 0.0f;
    tap->phase = LV_LLM;
    return LV_OK;
}

/* A layer that stored its keys but whose attention was not met: the node's name or shape is not what we know. */
static void check_complete(lv_tap *tap) {
    if (tap->n_seen == 0) {
        lv_fail(tap, LV_E_GRAPH, "no attention node was met");
        return;
    }
    for (int il = 0; il < tap->n_layer; il++) {
        if (tap->stored[il] && !tap->seen[il] && lv_stage_runs(tap, il)) {
            lv_fail(tap, LV_E_GRAPH, "the attention of layer %d was not met", il);
            return;
        }
    }
}

static void count_rows(lv_tap *tap) {
    const uint8_t *rows = tap->rows.data;
    for (int32_t i = 0; i < tap->n_rows; i++) {
        for (int c = 0; c < LV_N_CLASS; c++) {
            tap->n_rows_seen[c] += rows[i] >> c & 1;
        }
    }
}

int lv_tap_end(lv_tap *tap) {
    if (tap == NULL) {
        return LV_E_ARG;
    }
    lv_restore_flags(tap);
    if (tap->phase != LV_LLM) {
        return refuse(tap, "lv_tap_end without lv_tap_begin");
    }
    if (tap->status == LV_OK && lv_tap_abort(tap)) {
        lv_fail(tap, LV_E_CANCELLED, "cancelled"); /* stopped by the abort callback before a node was asked */
    }
    if (tap->status == LV_OK) {
        lv_stage_complete(tap);
    }
    if (tap->status == LV_OK && tap->n_armed > 0) {
        check_complete(tap);
    }
    if (tap->status == LV_OK && tap->has_pos && tap->n_moved == 0) {
        lv_fail(tap, LV_E_GRAPH, "positions were given, but the graph has no ROPE on inp_pos");
    }
    if (tap->status == LV_OK) {
        count_rows(tap);
    }
    tap->phase = LV_IDLE;
    return tap->status;
}

int lv_tap_read(const lv_tap *tap, int32_t cls, int32_t reduction, float *out, size_t size) {
    if (tap == NULL || out == NULL || cls < 0 || cls >= LV_N_CLASS || reduction < 0 || reduction >= LV_N_REDUCTION) {
        return LV_E_ARG;
    }
    const size_t n = (size_t)tap->n_layer * (size_t)tap->n_head * (size_t)tap->n_image;
    if (size != n || (tap->reductions >> reduction & 1u) == 0) {
        return LV_E_ARG;
    }
    if (tap->sums[cls][reduction] != NULL) {
        memcpy(out, tap->sums[cls][reduction], n * sizeof(float));
    } else {
        memset(out, 0, n * sizeof(float));
    }
    return LV_OK;
}

int64_t lv_tap_rows(const lv_tap *tap, int32_t cls) {
    return tap != NULL && cls >= 0 && cls < LV_N_CLASS ? tap->n_rows_seen[cls] : LV_E_ARG;
}

/* ---- in the callback ---- */

static void move_positions(lv_tap *tap, const struct ggml_tensor *rope) {
    struct ggml_tensor *t = rope->src[1];
    if (t == NULL || !lv_has_name(t, "inp_pos") || lv_once(tap->moved, &tap->n_moved, t) == 0) {
        return;
    }
    if (t->type != GGML_TYPE_I32 || ggml_nelements(t) != tap->n_rows) {
        lv_fail(tap, LV_E_GRAPH, "'%s' has %lld positions for a batch of %d rows: one per token expected", t->name,
                (long long)ggml_nelements(t), tap->n_rows);
        return;
    }
    lv_write(tap, t, tap->pos.data, (size_t)tap->n_rows * sizeof(int32_t));
}

/* Stops a GPU, so that a cancel is looked for; a few rows are done sooner than anyone waits. */
static bool is_point(const lv_tap *tap, const struct ggml_tensor *t) {
    return tap->points && lv_starts(t, "l_out-") && ggml_nrows(t) > LV_FEW_ROWS;
}

bool lv_llm_ask(lv_tap *tap, struct ggml_tensor *t) {
    const bool run = tap->phase == LV_LLM;
    if (t->op == GGML_OP_SET_ROWS) {
        /* outside a run too: cells that are overwritten must not keep their image token */
        lv_map_store(tap, t, run ? tap->image.data : NULL, run ? tap->n_rows : 0);
    }
    if (run && tap->status == LV_OK && tap->has_pos && t->op == GGML_OP_ROPE) {
        move_positions(tap, t); /* in layers that are left out too: the input is that of all */
    }
    const enum lv_step step = run && tap->stage.end > 0 ? lv_stage_ask(tap, t) : LV_RUN;
    if (step != LV_RUN) {
        return step == LV_CUT;
    }
    if (!run || tap->status != LV_OK) {
        return is_point(tap, t);
    }
    switch (t->op) {
    case GGML_OP_FLASH_ATTN_EXT:
        return tap->n_armed > 0;
    case GGML_OP_SOFT_MAX: /* a router of experts is one too: the name tells */
        return tap->n_armed > 0 && lv_starts(t, "kq_soft_max-");
    default:
        return is_point(tap, t);
    }
}

/* The layer in the name of q or of what q was made from: rotation and views leave unnamed nodes in between. */
static int query_layer(const struct ggml_tensor *q) {
    for (int i = 0; q != NULL && i < 8; i++) {
        const int layer = lv_number_after_dash(q->name);
        if (layer >= 0) {
            return layer;
        }
        q = q->op == GGML_OP_MUL_MAT ? q->src[1] : q->src[0];
    }
    return -1;
}

static int node_layer(lv_tap *tap, const struct ggml_tensor *node, int cache_layer) {
    int layer = node->op == GGML_OP_SOFT_MAX ? lv_number_after_dash(node->name) : query_layer(node->src[0]);
    if (layer < 0) {
        layer = cache_layer;
    }
    /* layers come in order, and none twice; hybrid models leave some out */
    if (layer < 0 || layer >= tap->n_layer || layer < tap->n_seen || tap->seen[layer]) {
        lv_fail(tap, LV_E_GRAPH, "attention node %d ('%s', q '%s') says layer %d of %d%s", tap->n_seen, node->name,
                node->src[0] != NULL ? node->src[0]->name : "", layer, tap->n_layer,
                layer >= 0 && layer < tap->n_layer && tap->seen[layer] ? ", seen before: more than one micro-batch?" : "");
        return -1;
    }
    return layer;
}

struct sum_ctx {
    lv_tap *tap;
    int layer;
    const struct lv_map *map;
};

/* One row: plain loops over the pairs. */
static void add_row(float *out, int reduction, const struct lv_block *b, const int32_t *cell, const int32_t *image,
                    int64_t n, float w) {
    for (int64_t j = 0; j < n; j++) {
        const float p = b->e[cell[j]] * w;
        float *to = out + image[j];
        *to = reduction == LV_MAX ? (p > *to ? p : *to) : *to + p;
    }
}

static float concentration(const lv_tap *tap, float entropy) {
    if (tap->n_image < 2) {
        return 1.0f;
    }
    const float s = 1.0f - entropy / logf((float)tap->n_image);
    return s > 0.0f ? s * s : 0.0f;
}

static void add_class(const struct sum_ctx *s, const struct lv_block *b, int class, int64_t from, int64_t n) {
    lv_tap *tap = s->tap;
    const int32_t *cell = (const int32_t *)s->map->cell.data + from;
    const int32_t *image = (const int32_t *)s->map->pair_image.data + from;
    const uint8_t *rows = tap->rows.data;
    const size_t at = ((size_t)s->layer * (size_t)tap->n_head + (size_t)b->head) * (size_t)tap->n_image;
    for (int r = 0; r < LV_N_REDUCTION; r++) {
        if (tap->sums[class][r] == NULL) {
            continue;
        }
        float w[LV_LANES] = {0}, any = 0.0f;
        for (int l = 0; l < b->n; l++) {
            w[l] = (rows[b->rows[l]] >> class & 1) != 0 ? b->w[l] : 0.0f;
            w[l] *= r == LV_WEIGHTED ? concentration(tap, b->entropy[l]) : 1.0f;
            any += w[l];
        }
        if (any == 0.0f) {
            continue;
        }
        float *out = tap->sums[class][r] + at;
        if (b->lanes == 1) {
            add_row(out, r, b, cell, image, n, w[0]);
        } else {
            (r == LV_MAX ? tap->kernels->top : tap->kernels->add)(out, b->e, cell, image, n, w);
        }
    }
}

static void add_block(void *ctx, const struct lv_block *b) {
    const struct sum_ctx *s = ctx;
    const int32_t *cell = s->map->cell.data;
    int64_t from = 0, to = s->map->n_pairs; /* pairs are in cell order */
    while (from < to && cell[from] < b->first) {
        from++;
    }
    while (to > from && cell[to - 1] >= b->end) {
        to--;
    }
    for (int class = 0; class < LV_N_CLASS && to > from; class++) {
        add_class(s, b, class, from, to - from);
    }
}

static bool wants(const lv_tap *tap, int reduction) { return (tap->reductions >> reduction & 1u) != 0; }

static int flash_node(lv_tap *tap, const struct ggml_tensor *node, struct sum_ctx *s) {
    struct lv_attn a;
    const int32_t *rows = tap->armed.data;
    if (lv_attn_open(tap, node, tap->check, &a) != LV_OK) {
        return tap->status;
    }
    if (a.n_head != tap->n_head || a.n_q != tap->n_rows) {
        return lv_fail(tap, LV_E_GRAPH, "layer %d: %lld heads and %lld rows, expected %d and %d", s->layer,
                       (long long)a.n_head, (long long)a.n_q, tap->n_head, tap->n_rows);
    }
    if (tap->check && lv_check_node(tap, &a, s->layer, rows[tap->n_armed - 1]) != LV_OK) {
        return tap->status;
    }
    const struct ggml_tensor *k = node->src[1];
    const int64_t base = k->view_src != NULL ? (int64_t)(k->view_offs / k->nb[1]) : 0;
    s->map = lv_map_pairs(tap, lv_cache_layer(k), base, a.n_kv);
    if (s->map == NULL || s->map->n_pairs == 0) {
        return tap->status;
    }
    if (lv_attn_mask(tap, &a, rows, tap->n_armed, true) != LV_OK) {
        return tap->status;
    }
    const float *flag = wants(tap, LV_WEIGHTED) ? s->map->flag.data : NULL;
    return lv_attn_run(tap, &a, rows, tap->n_armed, flag, add_block, s);
}

/* src[0] of kq_soft_max is, through scalings and a soft cap, mul_mat(k, q). */
static int soft_max_cache_layer(const struct ggml_tensor *node) {
    const struct ggml_tensor *t = node->src[0];
    for (int i = 0; t != NULL && i < 8; i++, t = t->src[0]) {
        if (t->op == GGML_OP_MUL_MAT) {
            return t->src[0] != NULL ? lv_cache_layer(t->src[0]) : -1;
        }
    }
    return -1;
}

static int soft_max_node(lv_tap *tap, const struct ggml_tensor *node, struct sum_ctx *s) {
    if (node->ne[2] != tap->n_head || node->ne[1] != tap->n_rows || node->ne[3] != 1) {
        return lv_fail(tap, LV_E_GRAPH, "layer %d: '%s' has %lld heads and %lld rows, expected %d and %d", s->layer,
                       node->name, (long long)node->ne[2], (long long)node->ne[1], tap->n_head, tap->n_rows);
    }
    const int32_t *rows = tap->armed.data;
    if (tap->check && lv_check_soft_max(tap, node, s->layer, rows[tap->n_armed - 1]) != LV_OK) {
        return tap->status;
    }
    s->map = lv_map_pairs(tap, soft_max_cache_layer(node), 0, node->ne[0]);
    if (s->map == NULL || s->map->n_pairs == 0) {
        return tap->status;
    }
    return lv_soft_max_run(tap, node, rows, tap->n_armed, wants(tap, LV_WEIGHTED) ? s->map : NULL, add_block, s);
}

void lv_llm_done(lv_tap *tap, struct ggml_tensor *t) {
    if (lv_stage_done(tap, t)) {
        return;
    }
    const bool flash = t->op == GGML_OP_FLASH_ATTN_EXT;
    if ((!flash && t->op != GGML_OP_SOFT_MAX) || tap->n_armed == 0) {
        return; /* a cancel point */
    }
    const int cache = flash ? (t->src[1] != NULL ? lv_cache_layer(t->src[1]) : -1) : soft_max_cache_layer(t);
    struct sum_ctx s = {.tap = tap, .layer = node_layer(tap, t, cache)};
    if (s.layer < 0) {
        return;
    }
    const int status = flash ? flash_node(tap, t, &s) : soft_max_node(tap, t, &s);
    if (status == LV_OK) {
        tap->seen[s.layer] = 1;
        tap->n_seen++;
    }
}
