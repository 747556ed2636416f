/* cut.c - one run of a vision encoder's blocks for two contexts: what the last block gave in the one is kept, and given
 * to the other, which leaves the blocks out. */
#include <stdio.h>
#include <string.h>

#include "tap_internal.h"

void lv_cut_begin(lv_tap *tap) {
    struct lv_cut *cut = &tap->cut;
    cut->name[0] = '\0';
    cut->given = cut->begun = cut->done = cut->open = false;
    cut->node = NULL;
    cut->n = 0;
}

static bool is_cut(const lv_tap *tap) { return tap->cut.name[0] != '\0'; }

int lv_tower_cut(lv_tap *tap, int32_t layer, const float *rows, size_t size) {
    if (tap == NULL) {
        return LV_E_ARG;
    }
    struct lv_cut *cut = &tap->cut;
    if (tap->phase != LV_TOWER || layer < 0 || layer >= LV_MAX_LAYERS || (rows != NULL) != (size > 0) ||
        size > (size_t)LV_MAX_ROWS * LV_MAX_WIDTH || (rows != NULL && tap->tower.mode != LV_TOWER_OFF)) {
        return lv_fail(tap, LV_E_ARG, "a cut after block %d, %zu floats given: out of range, not in a run, or in one "
                       "that reads attention", layer, size);
    }
    if (rows != NULL) {
        if (!lv_grow(tap, &cut->rows, size * sizeof(float))) {
            return tap->status;
        }
        memcpy(cut->rows.data, rows, size * sizeof(float));
    }
    cut->n = size;
    cut->given = rows != NULL;
    snprintf(cut->name, sizeof cut->name, "layer_out-%d", layer);
    return LV_OK;
}

int64_t lv_tower_cut_read(const lv_tap *tap, float *out, size_t n) {
    if (tap == NULL) {
        return LV_E_ARG;
    }
    const struct lv_cut *cut = &tap->cut;
    const size_t have = tap->status == LV_OK && cut->done && !cut->given && !cut->open ? cut->n : 0;
    if (out != NULL && have > 0) {
        memcpy(out, cut->rows.data, (n < have ? n : have) * sizeof(float));
    }
    return (int64_t)have;
}

/* The node of the blocks whose result a tensor is, or is a copy of for another device, which has its name alone; NULL =
 * none. Most were met shortly before. */
static const struct ggml_tensor *node_of(const lv_tap *tap, const struct ggml_tensor *t) {
    struct ggml_tensor *const *blocks = tap->cleared.data;
    const bool copy = t->op == GGML_OP_NONE && strchr(t->name, '#') != NULL;
    for (size_t i = t->op != GGML_OP_NONE || copy ? tap->n_cleared : 0; i > 0; i--) {
        if (blocks[i - 1] == t || (copy && lv_is_copy_of(t, blocks[i - 1]->name))) {
            return blocks[i - 1];
        }
    }
    return NULL;
}

/* The first result of the blocks, but for the cut itself, that a node reads, NULL = none. */
static const struct ggml_tensor *read_of_blocks(const lv_tap *tap, const struct ggml_tensor *t) {
    for (int i = 0; i < GGML_MAX_SRC; i++) {
        const struct ggml_tensor *src = lv_computed(t->src[i]), *node = src != NULL ? node_of(tap, src) : NULL;
        if (node != NULL && node != tap->cut.node) {
            return node;
        }
    }
    return NULL;
}

static void look_behind(lv_tap *tap, const struct ggml_tensor *t) {
    struct lv_cut *cut = &tap->cut;
    const struct ggml_tensor *gone = cut->open || lv_is_empty(t) ? NULL : read_of_blocks(tap, t);
    if (gone == NULL) {
        return;
    }
    cut->open = true;
    if (cut->given) {
        lv_fail(tap, LV_E_GRAPH, "'%s' behind '%s' reads '%s' from before it", t->name, cut->name, gone->name);
    }
}

/* Whether a node, of those from the first of block 0 to the cut, belongs to a block: by its name, or by what it reads.
 * Others may come in between, such as a weight that the projector has transposed. */
static bool is_of_blocks(const lv_tap *tap, const struct ggml_tensor *t) {
    return (t->flags & GGML_TENSOR_FLAG_COMPUTE) != 0 && !lv_is_empty(t) &&
           (lv_number_after_dash(t->name) >= 0 || read_of_blocks(tap, t) != NULL);
}

enum lv_step lv_cut_ask(lv_tap *tap, struct ggml_tensor *t) {
    struct lv_cut *cut = &tap->cut;
    if (!is_cut(tap)) {
        return LV_RUN;
    }
    if (cut->node != NULL) {
        look_behind(tap, t);
        return LV_RUN;
    }
    cut->begun = cut->begun || lv_number_after_dash(t->name) == 0;
    const bool left_out = cut->begun && is_of_blocks(tap, t);
    if (left_out) {
        cut->given ? lv_clear_flag(tap, t) : lv_note_node(tap, t);
    }
    if (strcmp(t->name, cut->name) == 0) {
        cut->node = t;
        return LV_CUT;
    }
    return left_out && cut->given ? LV_SKIP : LV_RUN;
}

bool lv_cut_done(lv_tap *tap, struct ggml_tensor *t) {
    struct lv_cut *cut = &tap->cut;
    if (!is_cut(tap) || t != cut->node) {
        return false;
    }
    const size_t size = ggml_nbytes(t), n = size / sizeof(float);
    const bool plain = t->type == GGML_TYPE_F32 && ggml_is_contiguous(t);
    if (cut->given) {
        if (!plain || n != cut->n) {
            lv_fail(tap, LV_E_GRAPH, "'%s' has %zu floats' room, and %zu were given", t->name, n, cut->n);
        }
        cut->done = tap->status == LV_OK && lv_write(tap, t, cut->rows.data, size);
        return true;
    }
    const void *rows = plain && lv_grow(tap, &cut->rows, size) ? lv_host(tap, &tap->fetch[5], t, size) : NULL;
    if (rows != NULL) {
        memcpy(cut->rows.data, rows, size);
        cut->n = n;
        cut->done = true;
    }
    return true;
}

void lv_cut_complete(lv_tap *tap) {
    const struct lv_cut *cut = &tap->cut;
    if (is_cut(tap) && cut->given && !cut->done) {
        lv_fail(tap, LV_E_GRAPH, "the graph has no node '%s'", cut->name);
    }
}
