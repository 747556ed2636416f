/* tower.c - the vision encoder: what its blocks attend to, and inputs that are mended before they are used. */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "tap_internal.h"

static int refuse(lv_tap *tap, const char *what) {
    if (tap == NULL) {
        return LV_E_ARG;
    }
    tap->status = LV_OK;
    return lv_fail(tap, LV_E_ARG, "%s", what);
}

static const char *wrong(int32_t n_layer, int32_t n_patches, int32_t cls_row, int mode, uint32_t repairs) {
    if (n_layer < 0 || n_layer > LV_MAX_LAYERS || n_patches < 0 || n_patches > LV_MAX_ROWS) {
        return "layers or patches are out of range";
    }
    const uint32_t known = LV_REPAIR_LLAVA_CLS | LV_REPAIR_POSITIONS | LV_REPAIR_GELU;
    if (mode < LV_TOWER_OFF || mode > LV_TOWER_RECEIVED || (repairs & ~known) != 0) {
        return "unknown mode or repair";
    }
    if (mode != LV_TOWER_OFF && (n_layer < 1 || n_patches < 1)) {
        return "reading a tower needs its layers and patches";
    }
    if (mode == LV_TOWER_CLS && (cls_row < 0 || cls_row > LV_MAX_ROWS)) {
        return "the CLS row is out of range";
    }
    return repairs != 0 && n_patches < 1 ? "a repair needs the number of patches" : NULL;
}

/* Weights are as the file has them whenever no encoder runs. */
static void unroll(lv_tap *tap) {
    struct lv_tower *tower = &tap->tower;
    if (tower->rolled != NULL) {
        lv_write(tap, tower->rolled, tower->table.data, ggml_nbytes(tower->rolled));
        tower->rolled = NULL;
    }
}

int lv_tower_begin(lv_tap *tap, int32_t n_layer, int32_t n_patches, int32_t cls_row, int mode, const uint8_t *layers,
                   uint32_t repairs) {
    const char *why = tap != NULL ? wrong(n_layer, n_patches, cls_row, mode, repairs) : "no tap";
    if (why != NULL) {
        return refuse(tap, why);
    }
    struct lv_tower *tower = &tap->tower;
    lv_restore_flags(tap);
    unroll(tap); /* of a run that was never ended */
    tap->phase = LV_IDLE;
    tap->status = LV_OK;
    tap->error[0] = '\0';
    const size_t n = (size_t)n_layer * (size_t)n_patches;
    if (!lv_grow(tap, &tower->out, n * sizeof(float))) {
        return tap->status;
    }
    for (size_t i = 0; i < n; i++) {
        ((float *)tower->out.data)[i] = NAN;
    }
    tower->n_layer = n_layer;
    tower->n_patches = n_patches;
    tower->cls_row = cls_row;
    tower->mode = mode;
    tower->repairs = repairs;
    memset(tower->layers, 0, sizeof tower->layers);
    memset(tower->seen, 0, sizeof tower->seen);
    for (int il = 0; il < n_layer; il++) {
        tower->layers[il] = layers == NULL || layers[il] != 0;
    }
    tower->n_mended = 0;
    tower->positions_done = tower->patches_done = tower->window_done = false;
    tower->roll_done = tower->gelu_done = false;
    tower->n_window = 0;
    lv_cut_begin(tap);
    tap->phase = LV_TOWER;
    return LV_OK;
}

int lv_tower_end(lv_tap *tap) {
    if (tap == NULL) {
        return LV_E_ARG;
    }
    lv_restore_flags(tap);
    unroll(tap);
    if (tap->phase != LV_TOWER) {
        return refuse(tap, "lv_tower_end without lv_tower_begin");
    }
    if (tap->status == LV_OK && lv_tap_abort(tap)) {
        lv_fail(tap, LV_E_CANCELLED, "cancelled");
    }
    bool wanted = false, seen = false;
    for (int il = 0; il < tap->tower.n_layer; il++) {
        wanted |= tap->tower.layers[il] != 0;
        seen |= tap->tower.seen[il] != 0;
    }
    if (tap->status == LV_OK && tap->tower.mode != LV_TOWER_OFF && wanted && !seen) {
        lv_fail(tap, LV_E_GRAPH, "no attention node of the encoder was met");
    }
    lv_cut_complete(tap);
    tap->phase = LV_IDLE;
    return tap->status;
}

int lv_tower_read(const lv_tap *tap, float *out, size_t size) {
    if (tap == NULL || out == NULL || size != (size_t)tap->tower.n_layer * (size_t)tap->tower.n_patches) {
        return LV_E_ARG;
    }
    if (size > 0) {
        memcpy(out, tap->tower.out.data, size * sizeof(float));
    }
    return LV_OK;
}

int64_t lv_tower_window_index(const lv_tap *tap, int32_t *out, size_t n) {
    if (tap == NULL) {
        return LV_E_ARG;
    }
    const size_t have = (size_t)tap->tower.n_window;
    if (out != NULL && have > 0) {
        memcpy(out, tap->tower.window.data, (n < have ? n : have) * sizeof(int32_t));
    }
    return tap->tower.n_window;
}

uint32_t lv_tower_repaired(const lv_tap *tap) {
    if (tap == NULL) {
        return LV_REPAIR_NONE;
    }
    const bool both = tap->tower.positions_done && tap->tower.patches_done;
    return (both ? LV_REPAIR_LLAVA_CLS : 0u) | (tap->tower.roll_done ? LV_REPAIR_POSITIONS : 0u) |
           (tap->tower.gelu_done ? LV_REPAIR_GELU : 0u);
}

/* ---- in the callback ---- */

static void keep_window(lv_tap *tap, const struct ggml_tensor *t) {
    struct lv_tower *tower = &tap->tower;
    const size_t size = ggml_nbytes(t);
    if (tower->window_done || t->type != GGML_TYPE_I32 || !ggml_is_contiguous(t)) {
        return;
    }
    const void *data = lv_host(tap, &tap->fetch[0], t, size);
    if (data != NULL && lv_grow(tap, &tower->window, size)) {
        memcpy(tower->window.data, data, size);
        tower->n_window = ggml_nelements(t);
        tower->window_done = true;
    }
}

/* positions: i + 1, and 0 for the last row, CLS; patches: i */
static void mend(lv_tap *tap, struct ggml_tensor *t, bool positions) {
    struct lv_tower *tower = &tap->tower;
    const int64_t n = (int64_t)tower->n_patches + (positions ? 1 : 0);
    if (lv_once(tower->mended, &tower->n_mended, t) == 0) {
        return;
    }
    if (t->type != GGML_TYPE_I32 || ggml_nelements(t) != n) {
        lv_fail(tap, LV_E_GRAPH, "input '%s' has %lld entries, %lld expected: the CLS repair does not fit this encoder",
                t->name, (long long)ggml_nelements(t), (long long)n);
        return;
    }
    if (!lv_grow(tap, &tap->fetch[0], (size_t)n * sizeof(int32_t))) {
        return;
    }
    int32_t *values = tap->fetch[0].data;
    for (int32_t i = 0; i < n; i++) {
        values[i] = positions ? (i + 1) % (int32_t)n : i;
    }
    if (lv_write(tap, t, values, (size_t)n * sizeof(int32_t))) {
        tower->positions_done |= positions;
        tower->patches_done |= !positions;
    }
}

/* Position rows CLS, 0, 1, ... become 0, 1, ..., CLS, as the graph has its rows. */
static void roll(lv_tap *tap, struct ggml_tensor *t) {
    struct lv_tower *tower = &tap->tower;
    const size_t size = t != NULL ? ggml_nbytes(t) : 0;
    if (t == NULL || !ggml_is_contiguous(t) || ggml_nrows(t) != (int64_t)tower->n_patches + 1) {
        lv_fail(tap, LV_E_GRAPH, "'%s' has %lld rows, %d expected: the repair of positions does not fit this encoder",
                t != NULL ? t->name : "", t != NULL ? (long long)ggml_nrows(t) : 0, tower->n_patches + 1);
        return;
    }
    const char *rows = lv_host(tap, &tap->fetch[0], t, size);
    if (rows == NULL || !lv_grow(tap, &tower->table, size) || !lv_grow(tap, &tap->fetch[1], size)) {
        return;
    }
    const size_t row = t->nb[1];
    memcpy(tower->table.data, rows, size);
    memcpy(tap->fetch[1].data, rows + row, size - row);
    memcpy((char *)tap->fetch[1].data + size - row, rows, row);
    if (lv_write(tap, t, tap->fetch[1].data, size)) {
        tower->rolled = t;
        tower->roll_done = true;
    }
}

static void look_at_rows(lv_tap *tap, struct ggml_tensor *index) {
    if (index == NULL) {
        return;
    }
    if (lv_has_name(index, "inv_window_idx")) {
        keep_window(tap, index);
    }
    if ((tap->tower.repairs & LV_REPAIR_LLAVA_CLS) != 0) {
        if (lv_has_name(index, "positions")) {
            mend(tap, index, true);
        } else if (lv_has_name(index, "patches")) {
            mend(tap, index, false);
        }
    }
}

/* Blocks name their keys "Kcur-3", "Kcur_rope-3"; a resampler's attention is not one of them. */
static int layer_of(const struct ggml_tensor *node) {
    const struct ggml_tensor *k = node->src[1];
    if (node->op == GGML_OP_SOFT_MAX) {
        const struct ggml_tensor *kq = node->src[0];
        k = kq != NULL && kq->op == GGML_OP_MUL_MAT ? kq->src[0] : NULL;
    }
    return k != NULL && strstr(k->name, "Kcur") != NULL ? lv_number_after_dash(k->name) : -1;
}

static bool wanted(const lv_tap *tap, const struct ggml_tensor *node) {
    if (tap->tower.mode == LV_TOWER_OFF) {
        return false;
    }
    const int layer = layer_of(node);
    return layer >= 0 && layer < tap->tower.n_layer && tap->tower.layers[layer] != 0;
}

bool lv_tower_ask(lv_tap *tap, struct ggml_tensor *t) {
    if (tap->status == LV_OK && t->op == GGML_OP_GET_ROWS) {
        look_at_rows(tap, t->src[1]);
    }
    if (tap->status == LV_OK && (tap->tower.repairs & LV_REPAIR_POSITIONS) != 0 && tap->tower.rolled == NULL &&
        t->op == GGML_OP_ADD && lv_has_name(t, "pos_embed")) {
        roll(tap, t->src[1]);
    }
    if ((tap->tower.repairs & LV_REPAIR_GELU) != 0 && t->op == GGML_OP_UNARY &&
        ggml_get_unary_op(t) == GGML_UNARY_OP_GELU_QUICK) {
        t->op_params[0] = GGML_UNARY_OP_GELU; /* the graph is built anew for each run */
        tap->tower.gelu_done = true;
    }
    const enum lv_step step = lv_cut_ask(tap, t);
    if (step != LV_RUN) {
        return step == LV_CUT;
    }
    if (tap->status == LV_OK && (t->op == GGML_OP_FLASH_ATTN_EXT || t->op == GGML_OP_SOFT_MAX)) {
        return wanted(tap, t);
    }
    return lv_starts(t, "layer_out-"); /* where a cancel is noticed */
}

/* One head's row of sums; heads run on different threads and share nothing. */
static void add_received(void *ctx, const struct lv_block *b) {
    lv_tap *tap = ctx;
    const int64_t n_patches = tap->tower.n_patches;
    const int64_t end = b->end < n_patches ? b->end : n_patches;
    float *out = (float *)tap->tower.heads.data + b->head * n_patches;
    if (b->lanes == 1) {
        for (int64_t c = b->first; c < end; c++) {
            out[c] += b->e[c] * b->w[0];
        }
    } else if (end > b->first) {
        const int32_t *self = (const int32_t *)tap->tower.rows.data + b->first;
        tap->kernels->add(out, b->e, self, self, end - b->first, b->w);
    }
}

static bool prepare(lv_tap *tap, int64_t n_head, int64_t n_rows) {
    struct lv_tower *tower = &tap->tower;
    const size_t size = (size_t)n_head * (size_t)tower->n_patches * sizeof(float);
    if (!lv_grow(tap, &tower->heads, size) || !lv_grow(tap, &tower->rows, (size_t)n_rows * sizeof(int32_t))) {
        return false;
    }
    memset(tower->heads.data, 0, size);
    for (int64_t i = 0; i < n_rows; i++) {
        ((int32_t *)tower->rows.data)[i] = (int32_t)i;
    }
    return true;
}

static void head_mean(lv_tap *tap, int layer, int64_t n_head, int64_t n_rows) {
    const struct lv_tower *tower = &tap->tower;
    float *out = (float *)tower->out.data + (size_t)layer * (size_t)tower->n_patches;
    const float *heads = tower->heads.data;
    for (int64_t c = 0; c < tower->n_patches; c++) {
        double sum = 0.0;
        for (int64_t h = 0; h < n_head; h++) {
            sum += heads[h * tower->n_patches + c];
        }
        out[c] = (float)(sum / (double)(n_head * n_rows));
    }
}

static int run_node(lv_tap *tap, const struct ggml_tensor *t, const int32_t *rows, int32_t n_rows) {
    if (t->op == GGML_OP_SOFT_MAX) {
        return lv_soft_max_run(tap, t, rows, n_rows, NULL, add_received, tap);
    }
    struct lv_attn a;
    if (lv_attn_open(tap, t, tap->check, &a) != LV_OK || (tap->check && lv_check_node(tap, &a, layer_of(t), rows[0]))) {
        return tap->status;
    }
    if (lv_attn_mask(tap, &a, rows, n_rows, false) != LV_OK) {
        return tap->status;
    }
    return lv_attn_run(tap, &a, rows, n_rows, NULL, add_received, tap);
}

void lv_tower_done(lv_tap *tap, struct ggml_tensor *t) {
    if (lv_cut_done(tap, t)) {
        return;
    }
    const bool flash = t->op == GGML_OP_FLASH_ATTN_EXT;
    if ((!flash && t->op != GGML_OP_SOFT_MAX) || !wanted(tap, t)) {
        return; /* a cancel point */
    }
    struct lv_tower *tower = &tap->tower;
    const int layer = layer_of(t);
    const int64_t n_q = flash ? t->src[0]->ne[1] : t->ne[1], n_kv = flash ? t->src[1]->ne[1] : t->ne[0];
    const int64_t n_head = flash ? t->src[0]->ne[2] : t->ne[2];
    const bool cls = tower->mode == LV_TOWER_CLS;
    if (tower->seen[layer] || n_kv < tower->n_patches || t->ne[3] != 1 || (cls && tower->cls_row >= n_q)) {
        lv_fail(tap, LV_E_GRAPH, "encoder layer %d: %lld rows, %lld keys, batch %lld, for %d patches and CLS row %d%s",
                layer, (long long)n_q, (long long)n_kv, (long long)t->ne[3], tower->n_patches, tower->cls_row,
                tower->seen[layer] ? ", seen before" : "");
        return;
    }
    if (!prepare(tap, n_head, n_q)) {
        return;
    }
    const int32_t row = tower->cls_row;
    const int32_t n_rows = cls ? 1 : (int32_t)n_q;
    if (run_node(tap, t, cls ? &row : tower->rows.data, n_rows) == LV_OK) {
        head_mean(tap, layer, n_head, n_rows);
        tower->seen[layer] = 1;
    }
}
